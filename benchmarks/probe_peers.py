"""Features by Hugging Face's pipeline and probes by scikit-learn alone, as one would write them without vac_ddp.

    python -m benchmarks.probe_peers embed JSON      # {"data", "out", "weights", "backbone", "frames", "size", ...}
    python -m benchmarks.probe_peers select JSON     # {"features", "out", "folds", "repeats", "statistics", ...}

What they share with vac_ddp: the network's weights, which frames of a video are read, the statistics over time and the
grids of penalties. `benchmarks.probe` starts both in processes of their own and times them.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


def embed(options: dict[str, Any]) -> None:
    """Write steps (V, T, D), labels and groups of a frame folder as .npz, by the pipeline image-feature-extraction."""
    import torch
    from transformers import pipeline

    from vac_ddp.data.clip_sampling import view_windows
    from vac_ddp.data.index import open_index
    from vac_ddp.data.split import make_split
    from vac_ddp.settings import ClipSettings, DataSettings, ViewSettings

    data = DataSettings(cache=options["cache"], group_regex=options["group_regex"])
    index = open_index(options["data"], labelled=True, settings=data)
    groups = make_split(index, data, seed=0).groups
    clip = ClipSettings(frames=options["frames"], size=options["size"], sampling="segments")
    views = ViewSettings(windows="phases", count=1)
    model, processor = wrapped(options)
    extract = pipeline("image-feature-extraction", model=model, image_processor=processor, device="cpu")
    began = time.perf_counter()
    files = [
        str(Path(index.folder(video)) / index.frames.name(video, frame))
        for video in range(len(index))
        for frame in view_windows(int(index.frame_counts[video]), clip, views)[0].tolist()
    ]
    with torch.inference_mode():
        out = extract(files, batch_size=clip.frames, pool=True, return_tensors=True)
    steps = torch.cat(out).numpy().reshape(len(index), clip.frames, -1)
    np.savez(options["out"], steps=steps, labels=index.labels, groups=np.array(groups))
    print(json.dumps({"seconds": time.perf_counter() - began}))


def wrapped(options: dict[str, Any]) -> tuple[Any, Any]:
    """(TimmWrapperModel with the same weights, its processor set to the same size, mean and std)."""
    import timm
    from transformers import TimmWrapperConfig, TimmWrapperModel
    from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

    from vac_ddp.models import load_model
    from vac_ddp.settings import ClipSettings, ModelSettings

    settings = ModelSettings(name="frame_vit", backbone=options["backbone"], weights=options["weights"])
    ours: Any = load_model(settings, ClipSettings(size=options["size"]), ["a", "b"], seed=0)
    known = timm.get_pretrained_cfg(options["backbone"]).to_dict()
    same = {"mean": list(ours.mean), "std": list(ours.std), "crop_pct": 1.0, "interpolation": "bilinear"}
    config = TimmWrapperConfig(
        architecture=options["backbone"],
        pretrained_cfg={**known, **same, "input_size": (3, options["size"], options["size"])},
    )
    model = TimmWrapperModel(config).eval()
    model.timm_model.load_state_dict(ours.model.backbone.state_dict())
    processor = TimmWrapperImageProcessor(pretrained_cfg=config.pretrained_cfg, architecture=options["backbone"])
    return model, processor


def statistics_of(steps: np.ndarray, names: str) -> np.ndarray:
    """(V, T, D) to (V, n D): mean, std and mean absolute difference of neighbours over time, as `names` say."""
    parts = {
        "mean": lambda: steps.mean(axis=1),
        "std": lambda: steps.std(axis=1),
        "difference": lambda: np.abs(np.diff(steps, axis=1)).mean(axis=1),
    }
    return np.concatenate([parts[name]() for name in names.split("+")], axis=1)


def select(options: dict[str, Any]) -> None:
    """Print {probe: {"seconds", "accuracy"}}: nested grouped cross-validation, each probe by itself."""
    from sklearn.linear_model import LogisticRegression, RidgeClassifier
    from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import FunctionTransformer, StandardScaler

    with np.load(options["features"]) as file:
        steps, labels, groups = file["steps"].astype(np.float32), file["labels"], file["groups"]
    functions = [functools.partial(statistics_of, names=names) for names in options["statistics"]]
    models = {
        "ridge": (RidgeClassifier(), {"probe__alpha": options["ridge"]}),
        "logistic": (LogisticRegression(max_iter=1000), {"probe__C": options["logistic"]}),
    }
    found = {}
    for name, (model, grid) in models.items():
        began, right = time.perf_counter(), 0
        steps_to_logits = Pipeline(
            [("statistics", FunctionTransformer(functions[0])), ("scale", StandardScaler()), ("probe", model)]
        )
        grids = {"statistics__func": functions, **grid}
        for repeat in range(options["repeats"]):
            outer = StratifiedGroupKFold(options["folds"], shuffle=True, random_state=repeat)
            for train, test in outer.split(steps, labels, groups):
                inner = StratifiedGroupKFold(options["folds"] - 1, shuffle=True, random_state=repeat)
                search = GridSearchCV(steps_to_logits, grids, cv=inner)
                search.fit(steps[train], labels[train], groups=groups[train])
                right += int((search.predict(steps[test]) == labels[test]).sum())
        accuracy = right / len(labels) / options["repeats"]
        found[name] = {"seconds": time.perf_counter() - began, "accuracy": accuracy}
    print(json.dumps(found))


def main(argv: list[str] | None = None) -> int:
    part, options = sys.argv[1:] if argv is None else argv
    {"embed": embed, "select": select}[part](json.loads(options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
