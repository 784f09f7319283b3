"""Train a classifier of sounds, and predict with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from vac_ddp.audio import spectrogram
from vac_ddp.audio.sounds import Sounds
from vac_ddp.audio.spectrogram import SoundModel
from vac_ddp.data.clip_sampling import AUGMENT, FRAMES, ORDER, generator
from vac_ddp.predicting.fingerprint import data_mark
from vac_ddp.results.logits_file import ViewsHead, log_prior

SMOOTHING, DECAY, WARM_UP = 0.1, 0.05, 0.1  # label smoothing, weight decay, share of the steps with a rising rate


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long a classifier of sounds trains, and by which steps. lr: the peak learning rate of AdamW."""

    epochs: int
    batch: int
    lr: float


def train_model(
    model: SoundModel,
    sounds: Sounds,
    videos: np.ndarray,
    schedule: Schedule,
    *,
    seed: int,
    log: Callable[[str], None],
) -> None:
    """Train on a random window of every video an epoch; the order, windows and masks are drawn from `seed`."""
    device, length, epochs = model.level.device, model.settings.samples, schedule.epochs
    some = [(v, 0) for v in generator(seed, 0, 1, ORDER).permutation(videos)[:256].tolist()]
    pictures = torch.cat(
        [spectrogram.log_mel(s.to(device), model.settings.mels) for s in sounds.windows(some, length).split(32)]
    )
    model.level.copy_(torch.stack([pictures.mean(), pictures.std().clamp(min=1e-3)]))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": DECAY}, {"params": plain, "weight_decay": 0.0}])
    batches = -(-len(videos) // schedule.batch)
    rates = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, schedule.lr, total_steps=epochs * batches, pct_start=WARM_UP, cycle_momentum=False
    )
    model.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)  # dropout inside the backbone
        for epoch in range(epochs):
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
                rates.step()
                total += float(loss.detach()) * len(batch)
                right += int((logits.argmax(1) == labels).sum())
            figures = f"loss {total / len(videos):.4f}  acc {right / len(videos):.3f}"
            log(f"epoch {epoch + 1:>3}/{epochs}  {figures}")
    model.eval()


def _random_start(sounds: Sounds, video: int, length: int, seed: int, epoch: int) -> int:
    last = max(0, int(sounds.lengths[video]) - length)
    return int(generator(seed, epoch, video, FRAMES).integers(0, last + 1))


@torch.no_grad()
def predict_sounds(
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
    length, index = model.settings.samples, sounds.index
    prior = log_prior(counts.tolist(), len(counts))
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
