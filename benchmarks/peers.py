"""What people use today, on the same frames: Hugging Face's Trainer with its VideoMAE, and the notebook's loop."""

from __future__ import annotations

import functools
import random
import tempfile
import warnings
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    VideoMAEImageProcessor,
    logging,
)

from benchmarks.common import CLASSES, Stopwatch
from benchmarks.loader import Clip, notebook_clip
from vac_ddp.models.load_report import IMAGENET_MEAN, IMAGENET_STD
from vac_ddp.models.tensor_names import to_hf
from vac_ddp.models.videomae import VideoMAE

logging.set_verbosity_error()


def hf_model(ours: VideoMAE, *, attention: str = "sdpa") -> VideoMAEForVideoClassification:
    """Hugging Face's class with our architecture and our weights, on the CPU."""
    arch = ours.arch
    config = VideoMAEConfig(
        image_size=arch.image[0],
        patch_size=arch.patch,
        num_frames=arch.frames,
        tubelet_size=arch.tubelet,
        hidden_size=arch.width,
        num_hidden_layers=arch.depth,
        num_attention_heads=arch.heads,
        intermediate_size=arch.mlp,
        layer_norm_eps=arch.eps,
        num_labels=ours.num_classes,
        use_mean_pooling=True,
        attn_implementation=attention,
    )
    model = VideoMAEForVideoClassification(config)
    state = {name: tensor.detach().cpu() for name, tensor in ours.state_dict().items()}
    found = model.load_state_dict(to_hf(state, arch), strict=False)
    if found.missing_keys or found.unexpected_keys:
        warnings.warn(f"the peer has weights of its own: {found}", stacklevel=2)  # its speed is the same
    return model


class PilFrames(Dataset):
    """Frames of planned clips as PIL images, and a label."""

    def __init__(self, clips: list[Clip]) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, i: int) -> dict[str, Any]:
        paths = self.clips[i % len(self.clips)].paths
        return {"frames": [Image.open(path).convert("RGB") for path in paths], "label": i % len(CLASSES)}


class Numbers(Dataset):
    """A data set whose collator makes the batch."""

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, i: int) -> int:
        return i


class NotebookClips(Dataset):
    """The notebook's float clips, and a label."""

    def __init__(self, clips: list[Clip], size: int) -> None:
        self.clips, self.size = clips, size

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        paths = self.clips[i % len(self.clips)].paths
        return notebook_clip(paths, self.size, random.Random(i), jitter=True), i % len(CLASSES)


def processed(size: int, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch by transformers' image processor."""
    processor = VideoMAEImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    pixels = processor([item["frames"] for item in items], return_tensors="pt")["pixel_values"]
    return {"pixel_values": pixels, "labels": torch.tensor([item["label"] for item in items])}


def kept(batch: dict[str, torch.Tensor], _: list[int]) -> dict[str, torch.Tensor]:
    """The same batch again and again: data in memory. Bytes (B, T, H, W, 3) become what the image processor makes."""
    if "bytes" in batch:
        return {"pixel_values": rescaled(batch["bytes"]), "labels": batch["labels"]}
    return batch


def rescaled(clips: torch.Tensor) -> torch.Tensor:
    """Clips (B, T, H, W, 3) uint8 as (B, T, 3, H, W) float32, rescaled and normalised as by the image processor."""
    mean, std = (torch.tensor(v, device=clips.device)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (clips.permute(0, 1, 4, 2, 3).float() / 255 - mean) / std


class _Watch(TrainerCallback):
    def __init__(self, watch: Stopwatch, clips: int) -> None:
        self.watch, self.clips = watch, clips

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.watch.tick(self.clips):
            control.should_training_stop = True


def one_thread(_: int) -> None:
    """A loader process beside others."""
    torch.set_num_threads(1)


def hf_trainer(
    model: nn.Module,
    watch: Stopwatch,
    *,
    clips: int,
    planned: list[Clip] | None,
    size: int,
    batch: dict[str, torch.Tensor] | None = None,
    workers: int = 0,
    best: bool = True,
    compile: bool = False,
) -> float:
    """Clips a second of `Trainer.train()`, with frames of `planned` clips or a `batch` in memory.

    best: bf16 on CUDA, fused AdamW, pinned memory, loader processes that stay and fetch ahead, no look at the loss in
    every step, no clipping. Otherwise TrainingArguments as the documented example leaves them: float32, no loader
    processes.
    """
    cuda = watch.device.type == "cuda"
    settings: dict[str, Any] = {}
    if best:
        settings = {
            "bf16": cuda,
            "optim": "adamw_torch_fused",
            "max_grad_norm": 0.0,
            "logging_nan_inf_filter": False,
            "dataloader_num_workers": workers,
            "dataloader_pin_memory": cuda and batch is None,
            "torch_compile": compile,
        }
        if workers:
            settings |= {"dataloader_persistent_workers": True, "dataloader_prefetch_factor": 4}
    else:
        settings = {"dataloader_pin_memory": cuda and batch is None}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=clips,
            max_steps=1 << 20,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            logging_steps=1 << 20,
            save_strategy="no",
            eval_strategy="no",
            report_to=[],
            remove_unused_columns=False,
            disable_tqdm=True,
            use_cpu=not cuda,
            **settings,
        )
        collate = functools.partial(processed, size) if batch is None else functools.partial(kept, batch)
        data = PilFrames(planned or []) if batch is None else Numbers()
        trainer = Trainer(model=model, args=options, train_dataset=data, data_collator=collate)
        # A sampler that draws one permutation of a data set without end would never begin.
        trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(data)  # type: ignore[method-assign]
        trainer.add_callback(_Watch(watch, clips))
        trainer.train()
    return watch.rate


def notebook_loop(
    model: nn.Module,
    watch: Stopwatch,
    *,
    clips: int,
    planned: list[Clip] | None,
    size: int,
    batch: dict[str, torch.Tensor] | None = None,
    workers: int = 4,
    accumulation: int = 8,
) -> float:
    """Clips a second of the notebook's loop: float loader, fp16 with a GradScaler on CUDA, `.item()` in every step."""
    device, cuda = watch.device, watch.device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.05)
    scaler = torch.amp.GradScaler(device.type, enabled=cuda)
    loss_of = nn.CrossEntropyLoss()
    model.train()
    if batch is None:
        loader = iter(
            DataLoader(
                NotebookClips(planned or [], size),
                batch_size=clips,
                num_workers=workers,
                pin_memory=cuda,
                worker_init_fn=one_thread,
            )
        )
    running, number, going = 0.0, 0, True
    while going:
        if batch is None:
            pixels, labels = next(loader)
            pixels, labels = pixels.to(device), labels.to(device)
        else:
            pixels, labels = batch["pixel_values"], batch["labels"]
        with torch.autocast(device.type, dtype=torch.float16, enabled=cuda):
            loss = loss_of(model(pixel_values=pixels).logits, labels) / accumulation
        scaler.scale(loss).backward()
        number += 1
        if number % accumulation == 0:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
        running += loss.item()
        going = watch.tick(len(pixels))
    return watch.rate
