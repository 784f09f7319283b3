"""Attentive probes: cross-attention pooling over time and a classifier; a grid of them is trained as one model.

A probe pools standardized features x_t (D) of T steps by H learned queries: scores q_h . x_t / sqrt(D) + b[h, t],
softmax over t, and the sums over t of all queries, one after the other, go to a linear classifier
(`models.pooling.AttentivePool`, with the standardization outside). Without positions b is 0, and the order of the
steps does not matter. The probes of a grid read the same batches; each has parameters, learning rate and weight decay
of its own, so that its result is that of a training alone (to rounding).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vac_ddp.probing.head import Candidate, Head
from vac_ddp.settings import ProbeSettings

ATTENTIVE = "attentive"
_BATCH = 256  # rows of an optimizer step; fewer rows than that are one batch
_QUERY_STD = 0.02
_WIDTHS = 0.5  # std of a query's first window, as a fraction of the distance between windows
_BLOCK = 1 << 24  # features read at a time
_PRODUCTS = 1 << 26  # scores and values of a batch that are in memory at a time


@dataclass(kw_only=True)
class Probes:
    """The parameters of P probes: matrix (P, H, 1 + K, D), position (P, H, T), bias (P, K).

    matrix[p, h]: query h of probe p, then the weights of the K classes on what it pools.
    """

    matrix: Tensor
    position: Tensor
    bias: Tensor

    def logits(self, x: Tensor) -> Tensor:
        """Logits (P, B, K) of standardized features (B, T, D)."""
        batch, steps, width = x.shape
        # One matrix product for scores and values, which are classified before they are summed over time: features are
        # read once, and nothing of their width is written.
        products = self.matrix.flatten(0, 2) @ x.flatten(0, 1).T
        products = products.view(*self.matrix.shape[:3], batch, steps)
        scores, values = products.split([1, products.shape[2] - 1], dim=2)
        attention = (scores / math.sqrt(width) + self.position[:, :, None, None]).softmax(4)
        return (attention * values).sum((1, 4)).transpose(1, 2) + self.bias[:, None]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a grid of probes is trained with; lr, weight_decay and seeds (P,): one for each probe."""

    lr: list[float]
    weight_decay: list[float]
    seeds: list[int]
    queries: int
    positions: bool
    steps: int

    def __getitem__(self, at: slice) -> Recipe:
        """The same for some of the probes."""
        return dataclasses.replace(self, lr=self.lr[at], weight_decay=self.weight_decay[at], seeds=self.seeds[at])


class AttentiveGrid:
    """Attentive probes of every learning rate, weight decay and seed."""

    def __init__(
        self,
        steps: np.ndarray,
        videos: np.ndarray,
        labels: np.ndarray,
        settings: ProbeSettings,
        *,
        classes: int,
        queries: int,
        seed: int,
        device: torch.device,
    ) -> None:
        """Take steps (., n, T, D): a file's features, of which video v of this grid has row videos[v]; labels (V,)."""
        self.steps, self.videos, self.labels, self.classes, self.device = steps, videos, labels, classes, device
        grid = list(
            itertools.product(settings.attentive_lr, settings.attentive_weight_decay, range(settings.attentive_seeds))
        )
        self.order_seed = seed  # of the batches, which all probes of the grid share, however it is divided
        self.recipe = Recipe(
            lr=[lr for lr, _, _ in grid],
            weight_decay=[decay for _, decay, _ in grid],
            seeds=[seed + number for _, _, number in grid],
            queries=queries,
            positions=settings.attentive_positions,
            steps=settings.attentive_steps,
        )
        self.at_once = max(1, _PRODUCTS // (queries * (classes + 1) * _BATCH * steps.shape[2]))
        self.candidates = [
            Candidate(
                probe=ATTENTIVE,
                settings=(
                    ("lr", lr),
                    ("weight_decay", decay),
                    *((("seed", number),) if settings.attentive_seeds > 1 else ()),
                ),
            )
            for lr, decay, number in grid
        ]

    def held_out(self, train: np.ndarray, test: np.ndarray) -> np.ndarray:
        """Logits (C, v, K) float32 of the videos `test` (v,), the mean over their views."""
        mean, scale = self._standardization(train)
        found = np.empty((len(self.candidates), len(test), self.classes), np.float32)
        rows = max(1, _BATCH // self.steps.shape[1])
        for number in range(0, len(self.candidates), self.at_once):
            at = slice(number, number + self.at_once)
            probes = self._train(train, self.recipe[at], mean, scale)
            for start in range(0, len(test), rows):
                x = (self._read(test[start : start + rows]) - mean) / scale
                logits = probes.logits(x.flatten(0, 1)).unflatten(1, x.shape[:2]).mean(2)
                found[at, start : start + rows] = logits.cpu().numpy()
        return found

    def fit(self, train: np.ndarray, number: int) -> Head:
        """Fit candidate `number` on the videos `train`."""
        recipe, (mean, scale) = self.recipe, self._standardization(train)
        probes = self._train(train, recipe[number : number + 1], mean, scale)
        matrix, position, bias, m, s = (
            value.double().cpu().numpy()
            for value in (probes.matrix[0], probes.position[0], probes.bias[0], mean, scale)
        )
        # The scores lose q . mean / scale, which is the same in all steps: the softmax does not see it.
        matrix = matrix / s
        weight = matrix[:, 1:].transpose(1, 0, 2)
        return Head(
            weight=weight.reshape(self.classes, -1),
            bias=bias - (weight @ m).sum(axis=1),
            query=matrix[:, 0],
            position=position if recipe.positions else None,
        )

    def _train(self, train: np.ndarray, recipe: Recipe, mean: Tensor, scale: Tensor) -> Probes:
        views = self.steps.shape[1]
        rows, labels = len(train) * views, torch.from_numpy(self.labels[train]).to(self.device)
        small = rows <= _BATCH
        whole = ((self._read(train) - mean) / scale).flatten(0, 1) if small else None

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            order = np.random.default_rng(self.order_seed)
            while True:
                if whole is not None:
                    yield whole, labels.repeat_interleave(views)
                    continue
                shuffled = order.permutation(rows)
                for start in range(0, rows - _BATCH + 1, _BATCH):
                    some = np.sort(shuffled[start : start + _BATCH])
                    x = np.asarray(self.steps[self.videos[train[some // views]], some % views], np.float32)
                    yield (torch.from_numpy(x).to(self.device) - mean) / scale, labels[some // views]

        return train_probes(batches(), recipe, classes=self.classes, shape=self.steps.shape[2:], device=self.device)

    def _standardization(self, train: np.ndarray) -> tuple[Tensor, Tensor]:
        """Mean and std (D,) of the features of `train` over views and steps; a std of 0 counts as 1."""
        total, squares = torch.zeros(2, self.steps.shape[3], dtype=torch.float64, device=self.device)
        for videos in self._blocks(train):
            x = self._read(videos).double().flatten(0, 2)
            total += x.sum(0)
            squares += x.square().sum(0)
        count = len(train) * math.prod(self.steps.shape[1:3])
        mean = total / count
        variance = (squares / count - mean**2).clamp(min=0)
        scale = torch.where(variance > 1e-12 * mean**2, variance, 1.0).sqrt()
        return mean.float(), scale.float()

    def _read(self, videos: np.ndarray) -> Tensor:
        """Features (v, n, T, D) float32 of some videos, on the device."""
        return torch.from_numpy(np.asarray(self.steps[self.videos[videos]], np.float32)).to(self.device)

    def _blocks(self, videos: np.ndarray) -> Iterator[np.ndarray]:
        rows = max(1, _BLOCK // math.prod(self.steps.shape[1:]))
        for start in range(0, len(videos), rows):
            yield videos[start : start + rows]


def train_probes(
    batches: Iterator[tuple[Tensor, Tensor]],
    recipe: Recipe,
    *,
    classes: int,
    shape: tuple[int, ...],
    device: torch.device,
) -> Probes:
    """Train the probes of a recipe on batches of standardized features (B, T, D) and labels (B,).

    AdamW (Loshchilov and Hutter 2019) on the mean cross entropy of each probe, rates falling to 0 by a cosine; no
    decay on positions and biases.
    """
    probes = first_probes(recipe, classes=classes, shape=shape, device=device)
    trained = [probes.matrix, probes.bias, *([probes.position] if recipe.positions else [])]
    # Each probe's part of the parameters, without a copy: learning rate and weight decay are its own.
    groups = [
        {"params": [value[number] for value in part], "weight_decay": decay if part[0] is probes.matrix else 0.0}
        for number, decay in enumerate(recipe.weight_decay)
        for part in (trained[:1], trained[1:])
    ]
    optimizer = torch.optim.AdamW(groups, fused=True)
    for step in range(recipe.steps):
        x, labels = next(batches)
        for value in trained:
            value.requires_grad_(True)
        # The sum over probes: the gradient of each is that of its own mean.
        loss = torch.nn.functional.cross_entropy(
            probes.logits(x).flatten(0, 1), labels.repeat(len(recipe.lr)), reduction="sum"
        ) / len(labels)
        gradients = torch.autograd.grad(loss, trained)
        for value in trained:
            value.requires_grad_(False)
        factor = 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        for number, lr in enumerate(recipe.lr):
            pair = optimizer.param_groups[2 * number : 2 * number + 2]
            for group, some in zip(pair, (gradients[:1], gradients[1:]), strict=True):
                group["lr"] = lr * factor
                for value, gradient in zip(group["params"], some, strict=True):
                    value.grad = gradient[number]
        optimizer.step()
    return probes


def first_probes(recipe: Recipe, *, classes: int, shape: tuple[int, ...], device: torch.device) -> Probes:
    """Parameters before training: random queries by each probe's seed, a classifier of zeros.

    Positions start as windows spread evenly over the steps, so that queries see different times from the first step.
    """
    steps, width = shape
    count, queries = len(recipe.lr), recipe.queries
    drawn = [
        torch.randn(queries, width, generator=torch.Generator().manual_seed(seed)) * _QUERY_STD for seed in recipe.seeds
    ]
    position = torch.zeros(count, queries, steps)
    if recipe.positions:
        distance = steps / queries
        centres = (torch.arange(queries) + 0.5) * distance - 0.5
        position += -0.5 * ((torch.arange(steps) - centres[:, None]) / (_WIDTHS * distance)).square()
    matrix = torch.zeros(count, queries, 1 + classes, width)
    matrix[:, :, 0] = torch.stack(drawn)
    return Probes(
        matrix=matrix.to(device),
        position=position.to(device),
        bias=torch.zeros(count, classes, device=device),
    )
