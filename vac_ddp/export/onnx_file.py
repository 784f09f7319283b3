"""A model as model.onnx, and what onnxruntime computes with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from vac_ddp import files
from vac_ddp.errors import UserError


def write_model(folder: Path, model: nn.Module, clips: Tensor, classes: list[str]) -> None:
    """model.onnx with the input `clips` (N, T, 3, H, W) and the output `logits` (N, K), any N."""
    try:
        import onnxscript  # noqa: F401  torch.onnx needs it, and says so only in a traceback
    except ImportError as error:
        raise UserError(f"--onnx needs {error.name}: pip install 'vac_ddp[export]'") from error
    torch.onnx.export(
        model,
        (clips[:2],),
        folder / "model.onnx",
        input_names=["clips"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )
    files.write_json(folder / "classes.json", classes)


def logits_of(folder: Path) -> Callable[[Tensor], Tensor]:
    """A function from clips to the logits of model.onnx in `folder`, by onnxruntime on the CPU."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"--onnx needs {error.name}: pip install 'vac_ddp[export]'") from error
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return lambda clips: torch.from_numpy(session.run(None, {"clips": clips.numpy()})[0])
