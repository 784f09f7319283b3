"""Architectures, and the weights that go in and out of them."""

from __future__ import annotations

from vac_ddp.models.build import build_model, load_model, rebuild_model
from vac_ddp.models.load_report import Loaded, LoadReport, file_state, load_file_state
from vac_ddp.models.video_model import VideoModel

__all__ = [
    "LoadReport",
    "Loaded",
    "VideoModel",
    "build_model",
    "file_state",
    "load_file_state",
    "load_model",
    "rebuild_model",
]
