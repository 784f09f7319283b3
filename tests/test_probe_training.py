"""Training a probe: the same for any split of its batches, and from a probe that was trained before; what it leaves."""

from __future__ import annotations

import contextlib
import io
import json

import numpy as np
import pytest
import torch

import vac_ddp
from tests.runs import Workplace
from vac_ddp import cli, train
from vac_ddp.models import load_model
from vac_ddp.models.weight_files import open_own
from vac_ddp.predict import main as predict_main
from vac_ddp.results.logits_file import read_views
from vac_ddp.settings import ClipSettings, ModelSettings

pytestmark = pytest.mark.distributed

PROBE = (
    "model.name=probe",
    "model.encoder=frame_vit",
    "model.pooling=statistics",
    "model.statistics=difference,mean,std",
    "model.head_dropout=0.2",
    "model.head_init_scale=1",
    "train.max_steps=6",
)


def here(place: Workplace, run: str, *words: str) -> str:
    """Train in this process; its log."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = train.main(place.arguments(run, *words))
    assert status == 0, err.getvalue()
    return out.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    place = Workplace(tmp_path_factory.mktemp("probe"))
    here(place, "probe", *PROBE, "train.clips_per_gpu=6")
    return place


def test_ranks_and_micro_batches_do_not_change_the_loss(place: Workplace) -> None:
    """One process with whole batches of 6 clips against two ranks with micro-batches of 2."""
    done = place.train("ranks", *PROBE, ranks=2)
    assert done.returncode == 0, done.stderr
    for kind, figures in (("train", ["loss", "accuracy", "lr", "grad_norm"]), ("epoch", ["val_loss", "val_top1"])):
        expected, found = place.lines("probe", kind), place.lines("ranks", kind)
        assert len(expected) == len(found) > 0
        for a, b in zip(expected, found, strict=True):
            assert [b[name] for name in figures] == pytest.approx([a[name] for name in figures], rel=1e-5)


def test_fine_tuning_starts_with_the_head_of_a_probe(place: Workplace) -> None:
    """Its pooling comes from the checkpoint, and is what the new run says, predicts and resumes with."""
    weights = place.folder / "probe" / "best_probe.pt"
    sizes = ("model.width=null", "model.depth=null", "model.heads=null")
    words = ("model.name=probe", *sizes, f"model.weights={weights}", "train.max_steps=4")
    said = here(place, "tuned", *words, "optim.lr=1e-12", "optim.min_lr=0")
    assert "kept, 3 classes" in said
    assert "as in the checkpoint: model.width=32 " in said
    assert "model.pooling=statistics model.statistics=difference,mean,std" in said
    report = json.loads((place.folder / "tuned" / "load_report.json").read_text())
    assert report["missing"] == [] and report["pooling"] == "difference and mean and std over 4 time steps"
    before, after = (torch.load(place.folder / run / "best_probe.pt", weights_only=True) for run in ("probe", "tuned"))
    assert after["model"].keys() == before["model"].keys()
    for name, tensor in before["model"].items():
        torch.testing.assert_close(after["model"][name], tensor, rtol=0, atol=1e-6)
    assert after["config"]["model"]["statistics"] == ["difference", "mean", "std"]

    for path in (place.folder / "tuned" / "checkpoints").glob("step-*"):
        if int(path.stem[5:]) > 3:
            path.unlink()
    weights.rename(place.folder / "gone.pt")
    try:
        said = here(place, "tuned", *words, "optim.lr=1e-12", "optim.min_lr=0", "run.resume=auto")
    finally:
        (place.folder / "gone.pt").rename(weights)
    assert "bit for bit" in said
    out = place.folder / "tuned_predicted"
    assert (
        predict_main(["--run", str(place.folder / "tuned"), f"--data={place.folder / 'data_val'}", f"--out={out}"]) == 0
    )


def test_other_classes_get_a_new_head(place: Workplace) -> None:
    other = place.folder / "other_data"
    for name in ("x", "y"):
        (other / name).mkdir(parents=True)
        for number in range(3):
            source = place.folder / "data_train" / f"class{number}" / f"v{number:02d}"
            (other / name / f"clip{number}").symlink_to(source)
    weights = place.folder / "probe" / "best_probe.pt"
    sizes = ("model.width=null", "model.depth=null", "model.heads=null")
    words = (
        f"data.train={other}",
        "data.val=null",
        "model.name=probe",
        f"model.weights={weights}",
        "train.max_steps=1",
    )
    assert "drawn for 2 classes: the source's 3 are others" in here(place, "other", *words, *sizes)


def test_a_run_of_a_probe_is_used_as_any_other(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    run, data, out = place.folder / "probe", place.folder / "data_val", place.folder / "predicted"
    assert predict_main([f"--run={run}", f"--data={data}", f"--out={out}"]) == 0
    views = read_views(next(out.glob("*.npz")))
    found = vac_ddp.load(run).predict(data / "class1" / "v01")
    (row,) = [i for i, name in enumerate(views.ids) if name == "class1/v01"]
    np.testing.assert_allclose(found[0].logits, views.logits[row].mean(0), rtol=1e-5, atol=1e-6)
    assert cli.main(["score", str(out), "--out", str(place.folder / "scored")]) == 0
    assert cli.main(["report", str(run)]) == 0
    assert (run / "report.html").stat().st_size > 10_000
    assert cli.main(["runs", str(place.folder)]) == 0
    assert "probe" in capsys.readouterr().out


def test_a_soup_of_probes_wants_the_same_statistics(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    best = torch.load(place.folder / "probe" / "best_probe.pt", weights_only=True)
    best["config"]["model"]["statistics"] = ["mean", "std", "difference"]
    torch.save(best, place.folder / "other_order.pt")
    paths = [str(place.folder / name) for name in ("probe", "other_order.pt")]
    assert cli.main(["soup", *paths, str(place.folder / "soup")]) == 2
    assert "model.statistics is ['difference', 'mean', 'std'] in " in capsys.readouterr().err
    assert cli.main(["soup", paths[0], paths[0], str(place.folder / "soup")]) == 0
    made = open_own(place.folder / "soup")
    assert all(torch.equal(tensor, open_own(paths[0]).state[name]) for name, tensor in made.state.items())


@pytest.mark.fault
def test_batch_norm_statistics_are_the_same_on_all_ranks(place: Workplace) -> None:
    """With those of the micro-batches the ranks validate one model: the loss is that of the saved file by itself."""
    words = ("model.name=frame_vit", "model.backbone=test_resnet", "model.batch_norm=batch", "model.drop_path=0")
    sizes = ("model.width=null", "model.depth=null", "model.heads=null", "model.patch=null")
    done = place.train("norm", *words, *sizes, "train.max_steps=8", "train.ema_decay=null", ranks=2)
    assert done.returncode == 0, done.stderr
    assert "BatchNorm layers use the statistics of each micro-batch" in done.stdout
    best = max(place.lines("norm", "epoch"), key=lambda line: line["val_top1"])
    out = place.folder / "norm_predicted"
    words = [f"--run={place.folder / 'norm'}", f"--data={place.folder / 'data_val'}", f"--out={out}", "--views=1x1"]
    assert predict_main(words) == 0
    views = read_views(next(out.glob("*.npz")))
    losses = torch.nn.functional.cross_entropy(torch.tensor(views.logits[:, 0]), torch.tensor(views.labels))
    assert float(losses) == pytest.approx(best["val_loss"], rel=1e-4)
    state = open_own(place.folder / "norm").state
    fresh = load_model(
        ModelSettings(name="frame_vit", backbone="test_resnet", weights=None), ClipSettings(size=32), ["a", "b"], seed=0
    )
    (name,) = [name for name in state if name.endswith("running_mean")][:1]
    assert not torch.equal(state[name], fresh.model.state_dict()[name])
