"""`vac audio DATA --out DIR`: train a classifier of the videos' sound, and write its views files for `vac score`.

OUT/audio.pt, OUT/val/views.npz and, with --test, OUT/test/views.npz. Picture and sound are put together by
`vac score VIDEO/test OUT/test --fit VIDEO/val OUT/val --temperature-from VIDEO/val OUT/val`: without temperatures the
less confident of two models drowns. A video without sound counts as failed, so that the picture alone decides.
The weights are those of the last epoch: nothing is chosen on the validation part, which stays good for fitting.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from vac_ddp import config as settings_io
from vac_ddp.arguments import ArgumentParser, number
from vac_ddp.audio import spectrogram
from vac_ddp.audio.spectrogram import SoundModel, SoundSettings
from vac_ddp.checks import check_bounds
from vac_ddp.data.clip_sampling import AUGMENT, FRAMES, ORDER, generator
from vac_ddp.data.index import Index, open_index
from vac_ddp.data.split import Split, make_split, read_split
from vac_ddp.errors import Findings, UserError, reason
from vac_ddp.files import sha256, write_atomic
from vac_ddp.report.run_reader import read_classes
from vac_ddp.results import averaging, evaluation
from vac_ddp.results.logits_file import NAME as VIEWS
from vac_ddp.results.logits_file import ViewsHead, read_views, write_views
from vac_ddp.runtime import distributed
from vac_ddp.settings import Config
from vac_ddp.version import VERSION

WEIGHTS = "audio.pt"
NAMED = 5
SMOOTHING, DECAY, WARM_UP = 0.1, 0.05, 0.1  # label smoothing, weight decay, share of the steps with a rising rate


def main(argv: list[str] | None = None) -> int:
    """Read the sounds, train, write weights and views files. Raises UserError, and Findings for damaged sounds."""
    options, config = _parse(argv)
    out = Path(options.out).expanduser()
    if (out / WEIGHTS).exists() and not options.overwrite:
        raise UserError(f"{out} holds a classifier already: --overwrite throws it away, or give another --out")
    index, val_index, split = _read_data(options, config)
    sounds = Sounds(index)
    train = np.array([video for video in split.train.tolist() if sounds.lengths[video]], np.int64)
    print(f"{len(train)} of {len(split.train)} training videos have sound", flush=True)
    if len(np.unique(index.labels[train])) < 2:
        raise UserError(_too_few(index, sounds))
    settings = SoundSettings(
        seconds=options.seconds, mels=options.mels, backbone=options.backbone, pretrained=options.pretrained
    )
    device = distributed.pick_device()
    model = SoundModel(settings, len(index.classes), seed=config.seed).to(device)
    train_model(model, sounds, train, options, seed=config.seed)
    content = {
        "model": {name: value.cpu() for name, value in model.state_dict().items()},
        "classes": list(index.classes),
        "settings": dataclasses.asdict(settings),
    }
    write_atomic(out / WEIGHTS, lambda stream: torch.save(content, stream))
    counts = np.bincount(index.labels[split.train], minlength=len(index.classes))
    read = [sounds]
    for name, part, groups in _parts(index, val_index, split, options, config):
        heard = sounds if part is index else Sounds(part)
        read += [] if heard is sounds else [heard]
        videos = split.val if part is index else np.arange(len(part), dtype=np.int64)
        head, logits = hear(model, heard, videos, groups, counts, classes=content["classes"], windows=options.windows)
        head.about |= {"weights": sha256(out / WEIGHTS), "settings": content["settings"]}
        head.about |= {"versions": {"vac_ddp": VERSION, "torch": torch.__version__}}
        write_views(out / name / VIEWS, head, [logits])
        _say(out / name)
    damaged = [line for some in read for line in some.damaged]
    if damaged:
        raise Findings(f"{len(damaged)} sounds cannot be used: {'; '.join(damaged[:NAMED])}")
    return 0


def _too_few(index: Index, sounds: Sounds) -> str:
    """Why fewer than two classes have sound: sounds that cannot be used, or that there are none."""
    few = f"fewer than two classes of {index.root} have sound that can be used"
    if sounds.damaged:
        some = "; ".join(sounds.damaged[:NAMED])
        return f"{len(sounds.damaged)} of {len(index)} sounds cannot be used, and so {few}: {some}"
    return f"{few}: `vac extract --audio` writes {spectrogram.NAME}"


def _parse(argv: list[str] | None) -> tuple[argparse.Namespace, Config]:
    parser = ArgumentParser(
        prog="vac audio",
        description="Train a classifier of log-mel spectrograms, and predict with it.",
        epilog="seed=N and data.name=value change the settings of the data, as for vac train.",
    )
    add = parser.add_argument
    add("data", metavar="DATA", help="the training folder, with an audio.wav beside the frames of a video")
    add("--out", required=True, metavar="DIR", help="where the weights and the views files go")
    add("--run", metavar="DIR", help="a run of the picture: its split.csv, classes, seed and data settings")
    add("--test", metavar="DIR", help="a test folder to predict, labelled or not")
    add("--backbone", default="resnet18", help="timm image model (default: resnet18)")
    add("--pretrained", action="store_true", help="begin with timm's weights for pictures")
    add("--epochs", type=number(int, low=1, high=10**6), default=30)
    add("--batch", type=number(int, low=1, high=10**6), default=32, help="sounds of a step (default: 32)")
    add("--lr", type=number(float, above=0, high=10), default=1e-3, help="peak learning rate of AdamW (default: 0.001)")
    add("--seconds", type=number(float, above=0, high=3600), default=4.0, help="length of a window (default: 4)")
    add("--mels", type=number(int, low=1, high=1024), default=64, help="bands of a spectrogram (default: 64)")
    add(
        "--windows",
        type=number(int, low=1, high=1000),
        default=3,
        help="windows of a scored video, spread over it (default: 3)",
    )
    add("--overwrite", action="store_true", help="throw away what --out holds")
    options, words = parser.parse_known_args(argv)
    config = settings_io.read_yaml(Path(options.run).expanduser() / "config.yaml") if options.run else Config()
    for word in words:
        if not word.startswith(("data.", "seed=")) or "=" not in word:
            raise UserError(f"unknown argument {word} (see --help)")
        settings_io.override(config, word)
    check_bounds(config, ("data.", "seed"))
    return options, config


# ---------------------------------------------------------------- data


def _read_data(options: argparse.Namespace, config: Config) -> tuple[Index, Index, Split]:
    """Training and validation videos and their split: that of the run, or one of its own."""
    run = Path(options.run).expanduser() if options.run else None
    classes = read_classes(run) if run else None
    index = open_index(options.data, labelled=True, settings=config.data, classes=classes)
    if index.packed is not None:
        raise UserError(f"{options.data} is a packed set, which holds no sound: give the folder it was made of")
    split = read_split(run / "split.csv", index) if run else make_split(index, config.data, seed=config.seed)
    for note in [*index.notes, *split.notes]:
        print(note)
    val_index = index
    if config.data.val:
        val_index = open_index(config.data.val, labelled=True, settings=config.data, classes=index.classes)
    return index, val_index, split


def _parts(
    index: Index, val_index: Index, split: Split, options: argparse.Namespace, config: Config
) -> list[tuple[str, Index, list[str] | None]]:
    """What is predicted: name, videos, and their sources where known. The validation part is `index` or another one."""
    parts: list[tuple[str, Index, list[str] | None]] = []
    if val_index is not index:
        parts.append(("val", val_index, None))
    elif len(split.val):
        parts.append(("val", index, [split.groups[video] for video in split.val.tolist()]))
    if options.test:
        from vac_ddp.data.data_kind import kind_of

        labelled = kind_of(Path(options.test).expanduser()) == "labelled"
        classes = index.classes if labelled else None
        parts.append(("test", open_index(options.test, labelled=labelled, settings=config.data, classes=classes), None))
    return parts


class Sounds:
    """The sound files of an index: `lengths` (V,) in samples, 0 without one, and what is wrong with damaged ones."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.damaged: list[str] = []
        self.paths = [Path(index.folder(video)) / spectrogram.NAME for video in range(len(index))]
        with ThreadPoolExecutor(16) as pool:
            self.lengths = np.array(list(pool.map(self._length, self.paths)), np.int64)

    def _length(self, path: Path) -> int:
        try:
            return spectrogram.sound_length(path)
        except ValueError as error:
            self.damaged.append(f"{path}: {error}")
            return 0

    def windows(self, asked: Sequence[tuple[int, int]], length: int) -> torch.Tensor:
        """Samples (n, length) int16 of the windows (video, first sample)."""
        with ThreadPoolExecutor(8) as pool:
            rows = list(pool.map(lambda one: self._window(*one, length), asked))
        return torch.from_numpy(np.stack(rows))

    def _window(self, video: int, start: int, length: int) -> np.ndarray:
        """Silence where the file cannot be read, though its header could: from then on it counts as silent."""
        try:
            return spectrogram.read_window(self.paths[video], start, length)
        except Exception as error:
            if self.lengths[video]:
                self.damaged.append(f"{self.paths[video]}: {reason(error)}")
            self.lengths[video] = 0
            return np.zeros(length, np.int16)


# ---------------------------------------------------------------- training and prediction


def train_model(
    model: SoundModel, sounds: Sounds, videos: np.ndarray, options: argparse.Namespace, *, seed: int
) -> None:
    """Train on a random window of every video an epoch; the order, windows and masks are drawn from `seed`."""
    device, length = model.level.device, model.settings.samples
    some = [(v, 0) for v in generator(seed, 0, 1, ORDER).permutation(videos)[:256].tolist()]
    pictures = torch.cat(
        [spectrogram.log_mel(s.to(device), model.settings.mels) for s in sounds.windows(some, length).split(32)]
    )
    model.level.copy_(torch.stack([pictures.mean(), pictures.std().clamp(min=1e-3)]))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": DECAY}, {"params": plain, "weight_decay": 0.0}])
    batches = -(-len(videos) // options.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.lr, total_steps=options.epochs * batches, pct_start=WARM_UP, cycle_momentum=False
    )
    model.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)  # dropout inside the backbone
        for epoch in range(options.epochs):
            total, right = 0.0, 0
            order = generator(seed, epoch, 0, ORDER).permutation(videos)
            for batch in np.array_split(order, batches):
                samples = sounds.windows(
                    [(v, _random_start(sounds, v, length, seed, epoch)) for v in batch.tolist()], length
                )
                labels = torch.from_numpy(sounds.index.labels[batch]).to(device)
                logits = model(samples.to(device), [generator(seed, epoch, v, AUGMENT) for v in batch.tolist()])
                loss = F.cross_entropy(logits, labels, label_smoothing=SMOOTHING)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += float(loss.detach()) * len(batch)
                right += int((logits.argmax(1) == labels).sum())
            print(f"epoch {epoch + 1:>3}/{options.epochs}  loss {total / len(videos):.4f}  "
                  f"acc {right / len(videos):.3f}", flush=True)  # fmt: skip
    model.eval()


def _random_start(sounds: Sounds, video: int, length: int, seed: int, epoch: int) -> int:
    last = max(0, int(sounds.lengths[video]) - length)
    return int(generator(seed, epoch, video, FRAMES).integers(0, last + 1))


@torch.no_grad()
def hear(
    model: SoundModel,
    sounds: Sounds,
    videos: np.ndarray,
    sources: list[str] | None,
    counts: np.ndarray,
    *,
    classes: list[str],
    windows: int,
) -> tuple[ViewsHead, np.ndarray]:
    """Logits (V, windows, K) float32 of `videos`; without sound, or silent, a video has failed and gets the prior.

    classes: (K,) names; an unlabelled index has none. counts: (K,) training videos of each class.
    """
    from vac_ddp.predicting.fingerprint import data_mark

    length, index = model.settings.samples, sounds.index
    prior = np.log(np.maximum(counts, 0.5) / np.maximum(counts, 0.5).sum()).astype(np.float32)
    logits = np.tile(prior, (len(videos), windows, 1))
    failed = np.ones(len(videos), bool)
    for place, video in enumerate(videos.tolist()):
        if not sounds.lengths[video]:
            continue
        starts = spectrogram.window_starts(int(sounds.lengths[video]), length, windows)
        samples = sounds.windows([(video, start) for start in starts], length)
        if samples.any():
            logits[place] = model(samples.to(model.level.device)).cpu().numpy()
            failed[place] = False
    part = index.take(videos)
    head = ViewsHead(
        ids=list(part.names),
        classes=classes,
        views=np.array([[window, 0, 0] for window in range(windows)], np.int64),
        labels=np.asarray(part.labels, np.int64),
        sources=sources or [""] * len(videos),
        damaged=np.zeros(len(videos), np.int64),
        failed=failed,
        about={"fingerprint": {"data": data_mark(part)}},
    )
    return head, logits


def _say(folder: Path) -> None:
    views = read_views(folder)
    heard = len(views.ids) - int(views.failed.sum())
    print(f"\n{views.path}: {heard} of {len(views.ids)} videos with sound")
    if views.labelled:
        found = evaluation.evaluate(
            averaging.average_views(views.logits, method=averaging.method_for([views])),
            views.labels,
            views.classes,
            views.sources,
        )
        print("\n".join(evaluation.lines(found)))


if __name__ == "__main__":
    from vac_ddp.runtime.exit_status import run_command

    sys.exit(run_command(main, sys.argv[1:]))
