"""A model as model.onnx, and what onnxruntime computes with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from vac_ddp import files
from vac_ddp.errors import UserError

NAME = "model.onnx"
_LARGEST = 2_000_000_000  # bytes of weights in one file: protobuf takes 2 GiB


def write_model(folder: Path, model: nn.Module, clips: Tensor, classes: list[str], *, half: bool) -> list[str]:
    """model.onnx with the input `clips` (N, T, 3, H, W) and the output `logits` (N, K), both float32, any N.

    half: weights and activations in float16. Returns what a user should know: weights of more than one file can hold
    lie beside it.
    """
    try:
        import onnxscript  # noqa: F401  torch.onnx needs it, and says so only in a traceback
    except ImportError as error:
        raise UserError(f"--onnx needs {error.name}: pip install 'vac_ddp[export]'") from error
    path = folder / NAME
    size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    beside = size > _LARGEST
    torch.onnx.export(
        model,
        (clips[:2],),
        path,
        input_names=["clips"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        external_data=beside,
        verbose=False,
    )
    if half:
        beside = _to_half(path, size)
    files.write_json(folder / "classes.json", classes)
    return [f"the weights are too large for one ONNX file: keep {NAME}.data beside {NAME}"] if beside else []


def _to_half(path: Path, size: int) -> bool:
    """Convert the file at `path`, whose weights take `size` bytes, to float16; whether weights lie beside it."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = convert_float_to_float16(
        onnx.load(path), keep_io_types=True, disable_shape_infer=size > _LARGEST, min_positive_val=2.0**-24
    )
    data = path.with_name(f"{NAME}.data")
    path.unlink()
    data.unlink(missing_ok=True)
    beside = size // 2 > _LARGEST
    onnx.save(model, path, save_as_external_data=beside, location=data.name)
    return beside


def logits_of(folder: Path) -> Callable[[Tensor], Tensor]:
    """A function from clips to the logits of model.onnx in `folder`, by onnxruntime on the CPU."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"--onnx needs {error.name}: pip install 'vac_ddp[export]'") from error
    session = onnxruntime.InferenceSession(folder / NAME, providers=["CPUExecutionProvider"])
    return lambda clips: torch.from_numpy(session.run(None, {"clips": clips.numpy()})[0])
