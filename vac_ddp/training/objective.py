"""The objective of a training: what a sample is, how it becomes input and target, the model, and its loss.

`Stepper`, `Trainer` and what they write know of it the methods of `Classification` and its attributes (model, data,
loaded, mean and std): another objective is another class with these, made in `build_trainer`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vac_ddp.data import randaugment
from vac_ddp.data.augment import augment_clips
from vac_ddp.data.batch import Batch
from vac_ddp.data.dataset import TrainClips
from vac_ddp.data.mixing import mix, soft_targets
from vac_ddp.data.split import parse_fold
from vac_ddp.models import Loaded
from vac_ddp.models.build import architecture_of
from vac_ddp.models.compilation import zero_clips
from vac_ddp.models.kept_tokens import kept_tokens
from vac_ddp.settings import Config
from vac_ddp.training.data_setup import Data


@dataclass(kw_only=True)
class Prepared:
    """A batch as the model takes it: clips (B, T, 3, S, S) normalized, noise (B, n), targets (B, K), samples (B,)."""

    clips: Tensor
    noise: Tensor
    targets: Tensor
    samples: Tensor

    def __getitem__(self, rows: slice) -> Prepared:
        return Prepared(
            clips=self.clips[rows], noise=self.noise[rows], targets=self.targets[rows], samples=self.samples[rows]
        )


class Classification:
    """One class a video: augmented and mixed clips, soft targets, cross entropy.

    model: on `device`; loaded: how it got its weights; class_weights: (K,) by inverse frequency, or None.
    """

    def __init__(self, config: Config, data: Data, loaded: Loaded, device: torch.device) -> None:
        self.config, self.data, self.loaded, self.device = config, data, loaded, device
        self.model = loaded.model.to(device)
        train = config.train
        self.model.train_tokens = kept_tokens(
            self.model, train.keep_tokens, train.keep_policy, setting="train.keep_tokens"
        )
        self.model.all_tokens = train.full_token_epochs > 0  # what is tried before the first epoch is the larger pass
        self.mean, self.std = tuple(loaded.mean), tuple(loaded.std)
        self.class_weights = _class_weights(data, device) if config.train.class_weights != "none" else None

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Epoch number `epoch`, from 0, of `epochs` begins: the last ones may be with all tokens."""
        self.model.all_tokens = epoch >= epochs - self.config.train.full_token_epochs

    def dataset(self) -> TrainClips:
        """The data set of the loader processes."""
        return TrainClips(self.data.index, self.data.split.train, self.config, self.model.noise_size, self.config.seed)

    def prepare(self, batch: Batch) -> Prepared:
        """Augment, normalize and mix a batch on the device; soft targets."""
        augment = self.config.augment
        clips = augment_clips(batch.clips, batch.params, augment, mean=self.mean, std=self.std, dtype=torch.float32)
        partner = batch.params["partner"].to(self.device, non_blocking=True)
        if augment.mixup > 0 or augment.cutmix > 0:
            clips, keep = mix(clips, partner, batch.params)
        else:
            keep = torch.ones(len(clips), device=self.device)
        targets = soft_targets(
            batch.labels, batch.labels[partner], keep, len(self.data.classes), self.config.train.label_smoothing
        )
        return Prepared(clips=clips, targets=targets, noise=batch.noise, samples=batch.samples)

    def zeros(self, count: int) -> tuple[Tensor, Tensor]:
        """Input of the model for `count` samples that mean nothing."""
        noise = torch.full((count, self.model.noise_size), 0.5, device=self.device)
        return zero_clips(self.config.clip, count, self.device), noise

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy (B,) of logits (B, K) with soft targets (B, K), weighted by class where weights are set."""
        terms = targets * torch.log_softmax(logits.float(), dim=1)
        return -(terms if self.class_weights is None else terms * self.class_weights).sum(1)

    def correct(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Whether the largest logit is that of the largest target, (B,) bool."""
        return logits.argmax(1).eq(targets.argmax(1))


def check_settings(config: Config) -> None:
    """Raise UserError for text settings and sizes that the data or the model would refuse, before either is opened."""
    parse_fold(config.data.fold)
    randaugment.parse(config.augment.randaugment)
    if config.model.family == "videomae" and config.model.weights is None:
        architecture_of(config.model, config.clip)


def _class_weights(data: Data, device: torch.device) -> Tensor:
    """Weights by inverse frequency in the training part, mean 1 over its videos."""
    counts = np.bincount(data.index.labels[data.split.train], minlength=len(data.classes)).clip(min=1)
    weights = counts.sum() / (len(counts) * counts)
    return torch.tensor(weights, dtype=torch.float32, device=device)
