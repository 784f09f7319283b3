"""Frames of validation videos as strips, for the report, W&B and TensorBoard."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vac_ddp import config as settings_io
from vac_ddp.data.decode import DamagedFrame, decode_frame
from vac_ddp.data.frame_cache_setup import for_clips
from vac_ddp.data.index import Index, open_index
from vac_ddp.errors import UserError
from vac_ddp.report import plots
from vac_ddp.report.run_reader import read_classes
from vac_ddp.report.tracker import Tracker
from vac_ddp.results import averaging, evaluation
from vac_ddp.results.logits_file import Views
from vac_ddp.results.metrics import log_softmax

FRAMES = 8  # in a strip
HEIGHT = 96  # of a strip, in pixels
SHOWN = 8  # strips in W&B and TensorBoard

Strip = Callable[[str], bytes | None]  # the frames of the video of a name as one JPEG, or None


def frame_strips(run: Path) -> Strip:
    """A function that makes a strip of frames of a validation video; it gives None where the data is not at hand."""
    try:
        config = settings_io.read_yaml(run / "config.yaml")
        classes = read_classes(run) if config.data.val else None
        root = config.data.val or config.data.train
        index = for_clips(open_index(root, labelled=True, settings=config.data, classes=classes), config)
    except (UserError, OSError, ValueError) as error:
        print(f"no frames in the report: {error}", file=sys.stderr)
        return lambda name: None
    return strips_of(index)


def strips_of(index: Index) -> Strip:
    """A function that makes a strip of frames of the video of a name; None where it is not in the index."""
    place = {name: i for i, name in enumerate(index.names)}

    def strip(name: str) -> bytes | None:
        video = place.get(name)
        if video is None or not index.frame_counts[video]:
            return None
        count = int(index.frame_counts[video])
        wanted = sorted({round(i * (count - 1) / (FRAMES - 1)) for i in range(FRAMES)})
        return make_strip([_bytes(index, video, frame) for frame in wanted])

    return strip


def _bytes(index: Index, video: int, frame: int) -> bytes:
    try:
        return index.frame_bytes(video, frame)
    except OSError:
        return b""


def make_strip(frames: Sequence[bytes]) -> bytes | None:
    """Image files side by side, each `HEIGHT` pixels high, as one JPEG; what does not decode is left out."""

    def enough(height: int, width: int) -> int:
        return next((factor for factor in (8, 4, 2) if height // factor >= HEIGHT), 1)

    pictures = []
    for data in frames:
        try:
            image = Image.fromarray(decode_frame(data, factor=enough))
        except DamagedFrame:
            continue
        width = max(1, min(4 * HEIGHT, round(image.width * HEIGHT / image.height)))
        pictures.append(image.resize((width, HEIGHT)))
    if not pictures:
        return None
    strip = Image.new("RGB", (sum(p.width + 2 for p in pictures) - 2, HEIGHT), "white")
    left = 0
    for one in pictures:
        strip.paste(one, (left, 0))
        left += one.width + 2
    buffer = io.BytesIO()
    strip.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def show_pictures(tracker: Tracker, views: Views, index: Index, step: int) -> None:
    """Give the tracker's services the confusion matrix of labelled views and the strips of some videos.

    index: holds the videos of the views by their names. step: the training step they belong to.
    """
    scores = averaging.average_views(views.logits, method=averaging.method_for([views]))
    found = evaluation.evaluate(scores, views.labels, views.classes, views.sources)
    matrix = plots.confusion(found.metrics.confusion, views.classes, "png")
    tracker.picture("validation/confusion", Image.fromarray(decode_frame(matrix)), step)
    shares = np.exp(log_softmax(scores))
    strip = strips_of(index)
    wanted = np.linspace(0, len(views.ids) - 1, min(SHOWN, len(views.ids))).round().astype(int)
    for place, video in enumerate(wanted.tolist()):
        data = strip(views.ids[video])
        best, true = int(shares[video].argmax()), views.classes[views.labels[video]]
        caption = f"{views.ids[video]}: {views.classes[best]} {shares[video, best]:.2f}, is {true}"
        if data is not None:
            tracker.picture(f"validation/example_{place + 1}", Image.fromarray(decode_frame(data)), step, caption)
