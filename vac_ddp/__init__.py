"""Fine-tune video classifiers on frame folders with raw PyTorch DDP.

From Python: `vac_ddp.load(run)` gives a `Classifier`, whose `predict` takes videos as paths, arrays, tensors and images
(see `vac_ddp.api`); `vac_ddp.run_training(settings, nproc=N)` trains in processes of its own. What the user must change
is a `vac_ddp.UserError` of one line.
"""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from typing import TYPE_CHECKING, Any

from vac_ddp.version import VERSION as __version__

if TYPE_CHECKING:
    from vac_ddp.api import Classifier, Embedding, Embeddings, Prediction, Predictions, load
    from vac_ddp.errors import UserError
    from vac_ddp.launcher import TrainingResult, run_training

__all__ = [
    "Classifier",
    "Embedding",
    "Embeddings",
    "Prediction",
    "Predictions",
    "TrainingResult",
    "UserError",
    "__version__",
    "load",
    "run_training",
]
_MODULES = {  # what is imported when it is asked for: `import vac_ddp` alone stays light
    "vac_ddp.api": ("Classifier", "Embedding", "Embeddings", "Prediction", "Predictions", "load"),
    "vac_ddp.errors": ("UserError",),
    "vac_ddp.launcher": ("TrainingResult", "run_training"),
}


def __getattr__(name: str) -> Any:
    """The Python API."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The Python API, for completion."""
    return sorted(__all__)


def predict(model: Classifier, data: Any, **options: Any) -> Predictions:
    """Deprecated: `model.predict(data, ...)`. Goes with version 0.2, and with it the class below."""
    warnings.warn(
        "vac_ddp.predict(model, data) is deprecated: use model.predict(data)", DeprecationWarning, stacklevel=2
    )
    return model.predict(data, **options)


class _Package(types.ModuleType):
    """The package, whose `predict` stays the function above when the program of that name is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "predict" or not isinstance(value, types.ModuleType):  # imports set submodules as attributes
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
