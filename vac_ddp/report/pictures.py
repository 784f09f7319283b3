"""Pictures of the validation part for W&B and TensorBoard: the confusion matrix, and frames with what was predicted."""

from __future__ import annotations

import numpy as np
from PIL import Image

from vac_ddp.commands.report_command import strips_of
from vac_ddp.data.decode import decode_frame
from vac_ddp.data.index import Index
from vac_ddp.report import plots
from vac_ddp.report.tracker import Tracker
from vac_ddp.results import averaging, evaluation
from vac_ddp.results.logits_file import Views
from vac_ddp.results.metrics import log_softmax

SHOWN = 8  # strips of frames


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
