"""Fine-tune video classifiers on frame folders with raw PyTorch DDP.

From Python: `from vac_ddp import load, predict` (see `vac_ddp.api`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vac_ddp.version import VERSION as __version__

if TYPE_CHECKING:
    from vac_ddp.api import Classifier, Prediction, load, predict

__all__ = ["Classifier", "Prediction", "__version__", "load", "predict"]


def __getattr__(name: str) -> Any:
    """The Python API, imported when it is asked for: `import vac_ddp` alone stays light."""
    if name == "predict":
        return importlib.import_module("vac_ddp.predict")  # a module that can be called
    if name in ("load", "Classifier", "Prediction"):
        return getattr(importlib.import_module("vac_ddp.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
