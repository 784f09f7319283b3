"""Compare the logits of an exported model with ours, on random clips and on real ones where there are any."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vac_ddp.data.dataset import TestViews
from vac_ddp.data.frame_cache_setup import for_clips
from vac_ddp.data.index import open_index
from vac_ddp.data.normalization import normalize
from vac_ddp.data.pack import is_pack, read_facts
from vac_ddp.data.scan import looks_labelled
from vac_ddp.errors import UserError
from vac_ddp.models.load_report import Loaded
from vac_ddp.settings import Config, ViewSettings

# Largest difference of logits, relative to the largest of them: rounding over some dozen layers.
TOLERANCE = 1e-4  # float32
HALF_TOLERANCE = 2e-2  # weights and activations in float16
REAL_VIDEOS = 4

Probe = tuple[str, Tensor]  # what the clips are, and the clips (B, T, 3, H, W), normalised


def random_clips(shape: tuple[int, ...]) -> Tensor:
    """Clips (N, T, 3, H, W) of normal noise, the same with every version of numpy and torch."""
    return torch.from_numpy(np.random.Generator(np.random.PCG64(0)).standard_normal(shape, np.float32))


def limit_of(logits: Tensor, tolerance: float) -> float:
    """How far other logits may be from these."""
    return tolerance * max(0.01, float(logits.abs().max()))


@torch.no_grad()
def compare(
    model: nn.Module,
    other: Callable[[Tensor], Tensor],
    probes: list[Probe],
    *,
    what: str,
    tolerance: float = TOLERANCE,
) -> list[str]:
    """One line per probe with the largest difference of logits; RuntimeError above `tolerance` of the largest logit."""
    lines = []
    for name, clips in probes:
        ours, theirs = model(clips), other(clips)
        limit = limit_of(ours, tolerance)
        difference = float((ours - theirs).abs().max())
        if not difference <= limit:
            raise RuntimeError(f"{what}'s logits differ by {difference:.3g} on {name}, at most {limit:.3g} is rounding")
        lines.append(f"{what}: logits within {difference:.1e} of ours on {name}")
    return lines


def make_probes(config: Config, loaded: Loaded, data: str | None) -> tuple[list[Probe], list[str]]:
    """Random clips, and clips of some videos where there are any; and what to say where there are none."""
    clip = config.clip
    probes = [("2 random clips", random_clips((2, clip.frames, 3, clip.size, clip.size)))]
    root = Path(data or config.data.val or config.data.train)
    if data is not None and not root.exists():
        raise UserError(f"--data {data}: no such directory")
    try:
        clips = _real_clips(root, config)
    except UserError as error:
        if data is not None:
            raise
        return probes, [f"not compared on real clips: {error}"]
    mean, std = tuple(loaded.mean), tuple(loaded.std)
    probes.append((f"{len(clips)} real clips", normalize(clips, mean, std, torch.float32)))
    return probes, []


def _real_clips(root: Path, config: Config) -> Tensor:
    """Clips (N, T, S, S, 3) uint8 of up to REAL_VIDEOS videos, spread over the index of `root`."""
    if not root.exists():
        raise UserError(f"{root.name} is not here (--data DIR names another)")
    labelled = bool(read_facts(root)["labelled"]) if is_pack(root) else looks_labelled(root)
    index = for_clips(open_index(root, labelled=labelled, settings=config.data), config)
    good = np.flatnonzero(index.frame_counts > 0)
    if not len(good):
        raise UserError(f"{root.name} has no video with frames")
    videos = good[np.linspace(0, len(good) - 1, min(REAL_VIDEOS, len(good))).astype(int)]
    views = TestViews(index, videos, config.clip, ViewSettings(windows="spread", count=1), tolerant=True)
    batch = views.__getitems__(range(len(videos)))
    return batch.clips.flatten(0, 1)
