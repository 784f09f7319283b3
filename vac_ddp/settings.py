"""Every setting of vac_ddp: its name, type, default and meaning. The one place to look a setting up.

Text on the command line reaches these fields as `group.name=value`; YAML files have the same names.
`config.py` reads them, `checks.py` checks them; nothing here imports anything but the standard library.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Which numbers a setting takes: finite ones, `low` and `high` included, `above` and `below` excluded."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, number: float) -> bool:
        return (
            abs(number) != math.inf
            and number == number  # not NaN; math.isfinite takes no integer of 400 digits
            and (self.low is None or number >= self.low)
            and (self.high is None or number <= self.high)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        if self.low is not None and self.high is not None:
            return f"between {self.low} and {self.high}"
        words = {"at least": self.low, "above": self.above, "at most": self.high, "below": self.below}
        return " and ".join(f"{word} {number}" for word, number in words.items() if number is not None)


def setting(default: Any, meaning: str, **bounds: float) -> Any:
    """A dataclass field with a default, the line that `--help` shows, and what its numbers may be (see `Bounds`)."""
    metadata = {"help": meaning, "bounds": Bounds(**bounds) if bounds else None}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class DataSettings:
    """Where the frames are, how they are split and read."""

    train: str = setting(
        "data_train", "folder <class>/<video>/*.jpg or <class>/*.mp4, a packed data set, or a CSV (path,label)"
    )
    val: str | None = setting(None, "validation data in the same forms; without it a part of `train` is held out")
    val_fraction: float = setting(
        0.2, "share of each class held out for validation; 0 trains on everything", low=0, below=1
    )
    fold: str | None = setting(None, "k/K: fold k (from 1) of K grouped folds is the validation part")
    group_by: Literal["auto", "hmdb51", "ucf101", "numbered", "regex", "csv", "none"] = setting(
        "auto", "how the source of a video is told from its name; clips of one source stay on one side"
    )
    group_regex: str | None = setting(None, "regular expression whose first group is the source (group_by=regex)")
    group_csv: str | None = setting(None, "CSV with the columns video,source (group_by=csv)")
    group_across_classes: bool | None = setting(
        None, "a source of the same name in two classes is one source; default: yes, but for hmdb51"
    )
    official_lists: str | None = setting(None, "folder of official HMDB51 or UCF101 list files that make the split")
    official_split: int = setting(1, "which of the three official splits", low=1, high=3)
    frame_pattern: str | None = setting(
        None, "form of the frames' file names, as img_*.jpg, where a video's folder holds other pictures as well"
    )
    on_bad_video: Literal["error", "skip"] = setting("error", "a training video without any good frame")
    max_damaged: float = setting(0.05, "share of damaged frames above which training is refused", low=0, high=1)
    rescan: bool = setting(False, "check the whole tree against the cached index, not a sample of it")
    cache: str | None = setting(
        None, "folder of cached indexes and of the frames of video files; default: ~/.cache/vac_ddp"
    )
    cache_gb: float = setting(
        20.0,
        "size limit of the cached frames of video files, in GB; the others are decoded in every epoch",
        low=0,
        high=10**6,
    )
    cache_format: Literal["jpeg", "png"] = setting(
        "jpeg",
        "frames of video files become JPEGs as vac extract writes them, or lossless PNGs of several times the size",
    )
    video_short_side: int | None = setting(
        None,
        "larger frames of video files are shrunk to this short side, in pixels; default: twice clip.size",
        low=1,
        high=16384,
    )
    balance: Literal["none", "class"] = setting("none", "class: draw every class equally often")
    limit: int | None = setting(None, "use only so many videos of each part (a quick look, --debug)", low=1, high=10**9)
    workers: int | None = setting(
        None, "loader processes a rank; default: the cores it has, at most 16", low=0, high=1024
    )
    prefetch: int = setting(
        4,
        "batches that each loader process keeps ready; at most 16 per rank, fewer to fit into memory",
        low=1,
        high=1000,
    )
    reduced_decode: bool = setting(True, "decode frames much larger than needed at 1/2, 1/4 or 1/8 of their size")


@dataclass(kw_only=True)
class ClipSettings:
    """What one clip is."""

    frames: int = setting(16, "frames in a clip", low=1, high=1024)
    stride: int = setting(
        2, "distance between neighbouring frames of a dense clip, in frames of the video", low=1, high=10**6
    )
    stride_jitter: int = setting(
        0, "training: the stride is drawn from stride - jitter to stride + jitter (>= 1)", low=0, high=10**6
    )
    sampling: Literal["dense", "segments"] = setting("dense", "a window of neighbours, or one frame a segment")
    size: int = setting(224, "height and width of a clip, in pixels", low=1, high=4096)
    short_side: int | None = setting(
        None, "short side of a test frame before the crop; default: size", low=1, high=16384
    )
    short: Literal["hold", "repeat"] = setting("hold", "a video shorter than the clip holds its last frame or repeats")


@dataclass(kw_only=True)
class ViewSettings:
    """Which views of a video are scored."""

    windows: Literal["offsets", "spread", "phases", "official_phases"] = setting(
        "offsets",
        "clips at the given first frames, K clips over the whole video, or K phases of its segments: their middles at "
        "(k + 1/2) / K, or k / K as VideoMAE's test on Something-Something v2",
    )
    offsets: list[int] = setting([0, 4, 8], "first frames of the clips, for windows=offsets", low=0, high=10**9)
    count: int = setting(5, "number K of clips, for windows other than offsets", low=1, high=1000)
    crops: int = setting(1, "crops of each clip along its long side: 1 (centre) or 3", low=1, high=3)
    flip: bool = setting(False, "score every clip mirrored as well")


@dataclass(kw_only=True)
class AugmentSettings:
    """How training clips are changed. One draw a clip, a pure function of (seed, epoch, sample)."""

    repeats: int = setting(1, "clips made of every decoded video (repeated augmentation)", low=1, high=1024)
    crop_scale: tuple[float, float] = setting(
        (0.08, 1.0), "area of the random crop, as a share of the frame", above=0, high=1
    )
    crop_ratio: tuple[float, float] = setting((0.75, 4 / 3), "aspect ratio of the random crop", low=0.01, high=100)
    flip: float = setting(0.5, "probability of mirroring; 0 where left and right make the class", low=0, high=1)
    color_jitter: float = setting(0.0, "strength of brightness, contrast and saturation jitter", low=0, high=10)
    randaugment: str = setting("", "timm's notation, as rand-m7-n4-mstd0.5-inc1; empty for none")
    erase: float = setting(0.0, "probability of erasing a rectangle (the same in all frames)", low=0, high=1)
    mixup: float = setting(0.0, "alpha of mixup; 0 for none", low=0, high=1000)
    cutmix: float = setting(0.0, "alpha of cutmix; 0 for none", low=0, high=1000)
    mix_probability: float = setting(
        1.0, "share of the pairs that are mixed, where mixup or cutmix is on", low=0, high=1
    )
    mix_switch: float = setting(0.5, "share of cutmix where both are on", low=0, high=1)


@dataclass(kw_only=True)
class ModelSettings:
    """Which network, and where its weights come from."""

    name: Literal["videomae", "lsvit", "frame_vit", "hf", "probe"] = setting(
        "videomae", "architecture; probe: an encoder, its features pooled over time, and a linear classifier"
    )
    encoder: Literal["videomae", "lsvit", "frame_vit", "hf"] = setting(
        "frame_vit", "probe: architecture of the encoder, which takes weights, backbone and the other settings here"
    )
    weights: str | None = setting(
        "MCG-NJU/videomae-base",
        "hub id, HF directory, .pth/.pt file, run directory or timm name; null: from scratch",
    )
    width: int | None = setting(
        None, "token width; with depth, heads: sizes by number, from scratch", low=2, high=65536
    )
    depth: int | None = setting(None, "transformer blocks", low=1, high=1000)
    heads: int | None = setting(None, "attention heads", low=1, high=1024)
    mlp_ratio: float | None = setting(
        None, "width of the MLP as a multiple of the token width; default: 4, giant 48/11", above=0, high=64
    )
    size: Literal["small", "base", "large", "huge", "giant"] | None = setting(None, "size by name, from scratch")
    patch: int | None = setting(
        None, "height and width of a patch, in pixels (from scratch); default: 16, giant 14", low=1, high=4096
    )
    tubelet: int = setting(2, "frames of a tubelet (from scratch)", low=1, high=1024)
    norm_eps: float | None = setting(
        None, "LayerNorm epsilon of the encoder; default: as the weights were trained", above=0, high=0.1
    )
    drop_path: float = setting(0.0, "stochastic depth at the last block, rising linearly from 0", low=0, below=1)
    head_dropout: float = setting(0.0, "dropout before the classifier", low=0, below=1)
    head_init_scale: float = setting(0.001, "factor on the new classifier's initial weights", low=0, high=1000)
    pooling: Literal["mean", "statistics", "attention", "attentive", "transformer"] = setting(
        "mean",
        "frame_vit, probe: aggregation over time; statistics: those of model.statistics; attention: one learned query; "
        "attentive: several queries with positions in time; transformer: frame_vit only",
    )
    statistics: list[Literal["mean", "std", "difference"]] = setting(
        ["mean", "std"],
        "pooling=statistics: mean and std over time steps, mean absolute difference of neighbouring steps",
    )
    queries: int = setting(4, "pooling=attentive: number of learned queries", low=1, high=64)
    spatial_grid: int = setting(
        1,
        "frame_vit, probe: each frame's features are averaged over a grid of this many regions a side",
        low=1,
        high=16,
    )
    batch_norm: Literal["stored", "batch"] = setting(
        "stored",
        "BatchNorm in training: stored statistics, or those of the micro-batch, whose results depend on its size",
    )
    backbone: str = setting("vit_small_patch16_224", "frame_vit, lsvit: timm image model")
    lsvit_version: int = setting(
        2,
        "lsvit: 1 as in the starting notebook; 2 as in the public code it came from (runs without this setting: 1)",
        low=1,
        high=2,
    )
    smif: bool = setting(True, "lsvit: short-term motion fusion on pixels")
    lmi: bool = setting(True, "lsvit: long-term motion integration after every block")
    mean: tuple[float, float, float] | None = setting(
        None, "pixel mean (0 to 1); default: as the weights were trained", low=0, high=1
    )
    std: tuple[float, float, float] | None = setting(
        None, "pixel deviation; default: as the weights were trained", above=0, high=1
    )
    revision: str | None = setting(None, "revision of a hub id")

    @property
    def family(self) -> str:
        """The architecture that takes weights and sizes: that of the encoder in a probe."""
        return self.encoder if self.name == "probe" else self.name


@dataclass(kw_only=True)
class ProbeSettings:
    """Which probes are tried on frozen features, and how one is selected."""

    features: str | None = setting(
        None, "features file of the training videos (`vac embed --steps`); default: they are embedded first"
    )
    probes: list[Literal["ridge", "logistic", "attentive"]] = setting(
        ["ridge", "logistic"], "probes to choose from: ridge or logistic regression on statistics, attentive pooling"
    )
    statistics: list[str] = setting(
        ["mean", "mean+std", "mean+difference", "std", "difference", "mean+std+difference"],
        "statistics over time steps that linear probes are tried on (see model.statistics)",
    )
    ridge: list[float] = setting([10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0], "ridge penalties", above=0, high=1e12)
    logistic: list[float] = setting(
        [1e-4, 1e-3, 1e-2, 1e-1], "inverse penalties C of logistic regression", above=0, high=1e12
    )
    attentive_lr: list[float] = setting([1e-3, 3e-3], "peak learning rates of attentive probes", above=0, high=10)
    attentive_weight_decay: list[float] = setting([0.01, 0.1], "weight decays of attentive probes", low=0, high=10)
    attentive_seeds: int = setting(1, "initial weights tried for each attentive probe", low=1, high=1000)
    attentive_steps: int = setting(200, "optimizer steps of attentive probes", low=1, high=10**6)
    attentive_positions: bool = setting(True, "give attentive probes the position of each time step")
    folds: int = setting(5, "grouped folds; the inner folds of each outer one are the others", low=3, high=100)
    repeats: int | None = setting(
        None, "times the outer folds are sampled anew; default: 4 for fewer than 500 videos, else 1", low=1, high=100
    )


@dataclass(kw_only=True)
class OptimSettings:
    """AdamW and its schedule."""

    lr: float | None = setting(None, "peak learning rate as used", above=0, high=10)
    base_lr: float | None = setting(
        5e-4, "peak learning rate per 256 clips of the global batch (or lr, not both)", above=0, high=10
    )
    min_lr: float = setting(1e-6, "learning rate at the end, in the terms of lr or base_lr", low=0, high=10)
    warmup_epochs: float = setting(5.0, "epochs of linear warm-up", low=0, high=10**6)
    warmup_lr: float = setting(0.0, "learning rate at the first step, in the terms of lr or base_lr", low=0, high=10)
    weight_decay: float = setting(
        0.05, "decoupled weight decay; none on 1-D parameters and position tables", low=0, high=10
    )
    betas: tuple[float, float] = setting((0.9, 0.999), "AdamW betas", low=0, below=1)
    eps: float = setting(1e-8, "AdamW epsilon", above=0, high=1)
    layer_decay: float = setting(1.0, "factor on the learning rate per layer below the head", above=0, high=1)
    head_lr_scale: float = setting(1.0, "factor on the learning rate of the classifier", above=0, high=10**6)
    clip_norm: float | None = setting(None, "largest norm of the gradient", above=0, high=10**9)
    shard: bool = setting(False, "shard the optimizer's state over the ranks (ZeRO stage 1)")
    fused: bool = setting(True, "fused AdamW kernel")


@dataclass(kw_only=True)
class TrainSettings:
    """How long, how large, how precise."""

    epochs: int = setting(20, "passes over the training part", low=1, high=10**6)
    max_steps: int | None = setting(
        None, "end after this many optimizer steps, the schedule fitted to it", low=1, high=10**12
    )
    max_minutes: float | None = setting(
        None,
        "time limit of the whole run, earlier starts included: the number of steps is fixed after the first measured "
        "ones, epochs and max_steps are its upper bound",
        above=0,
        high=10**6,
    )
    global_batch: int = setting(64, "clips of one optimizer step over all ranks", low=1, high=10**6)
    even_steps: bool = setting(
        False, "spread an epoch's clips evenly over its steps, instead of a short last one: for very small sets"
    )
    clips_per_gpu: int | Literal["auto"] = setting(
        "auto",
        "clips of one micro-batch on one rank; auto: equal parts of a step that fit (CPU: at most 8 clips)",
        low=1,
        high=10**6,
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = setting(
        "auto", "autocast; auto: bf16 on GPUs (fp16 on those that only emulate bf16, as a T4), fp32 on the CPU"
    )
    label_smoothing: float = setting(0.0, "label smoothing", low=0, below=1)
    class_weights: Literal["none", "inverse"] = setting("none", "weights of the loss by class frequency, mean 1")
    ema_decay: float | None = setting(
        None, "moving average of the weights, per step; validated and saved as best", above=0, below=1
    )
    patience: int | None = setting(
        None, "epochs without a better validation accuracy before the end", low=0, high=10**6
    )
    freeze_depth: int = setting(
        0, "layers from below that stay as they are (1: embedding, 2: and first block...)", low=0, high=1001
    )
    checkpointing: int = setting(
        0, "blocks from below whose activations are computed again in the backward pass", low=0, high=1000
    )
    compile: bool | None = setting(None, "compile the blocks; default: on CUDA, for 500 micro-batches a rank and more")
    keep_tokens: float = setting(
        1.0, "part of a clip's tokens that is computed (videomae); validation computes all", above=0, high=1
    )
    keep_policy: Literal["random", "motion"] = setting(
        "random", "which tokens are kept: random ones, or those that differ most from one time step earlier"
    )
    full_token_epochs: int = setting(0, "last epochs with all tokens", low=0, high=10**6)
    bf16_reduce: bool = setting(False, "all-reduce gradients in bfloat16")
    val_every: int = setting(1, "epochs between validations; the last one is always validated", low=1, high=10**6)


@dataclass(kw_only=True)
class CheckpointSettings:
    """When and what is saved."""

    keep: int = setting(2, "step-numbered checkpoints kept", low=1, high=10**6)
    every_steps: int | None = setting(
        None, "steps between checkpoints, beside those of every epoch", low=1, high=10**12
    )
    every_minutes: float | None = setting(
        10.0, "minutes between checkpoints, beside those of every epoch", above=0, high=10**6
    )
    before_end_s: float = setting(
        120.0,
        "seconds before the end of a SLURM job at which the run saves and ends, to be requeued; 0: never",
        low=0,
        high=10**6,
    )
    on_failure: Literal["continue", "stop"] = setting("continue", "when a checkpoint cannot be written (disk full)")


@dataclass(kw_only=True)
class HealthSettings:
    """What ends a run that goes wrong."""

    max_bad_steps: int = setting(
        10, "steps with a non-finite loss or gradient in a row before the run ends", low=1, high=10**9
    )
    checksum_every: int = setting(
        500, "steps between comparisons of the parameters over the ranks; 0: never", low=0, high=10**12
    )
    start_timeout_s: float = setting(1800.0, "as timeout_s, until the first step is done", low=1, high=10**6)
    timeout_s: float = setting(300.0, "seconds without progress of a rank after which all ranks end", low=1, high=10**6)
    slow_factor: float = setting(2.0, "a rank that takes this many times the median is named", low=1, high=10**6)


@dataclass(kw_only=True)
class LogSettings:
    """What is written while a run goes on."""

    every_steps: int = setting(
        10, "steps between lines in metrics.jsonl; the counters are read only then", low=1, high=10**9
    )
    wandb: Literal["disabled", "online", "offline"] = setting("disabled", "Weights & Biases")
    wandb_project: str = setting("vac_ddp", "W&B project")
    wandb_artifact: bool = setting(False, "upload the best checkpoint as a W&B artifact")
    tensorboard: bool = setting(False, "write TensorBoard files as well")
    progress: bool | None = setting(None, "progress bar; default: only on a terminal")


@dataclass(kw_only=True)
class RunSettings:
    """Where a run lives and how it starts."""

    dir: str = setting("runs/default", "directory of the run")
    resume: str = setting("none", "auto: go on where a checkpoint is; none: start anew; or the path of a checkpoint")
    overwrite: bool = setting(
        False, "discard the run in the directory after the first checkpoint of the new one (on the command line only)"
    )


@dataclass(kw_only=True)
class PredictSettings:
    """How a test folder is predicted."""

    views: ViewSettings = field(default_factory=ViewSettings, metadata={"help": "views of a test video"})
    clips_per_gpu: int | Literal["auto"] = setting(
        "auto", "clips of one forward pass on one rank; auto: what is fastest and fits", low=1, high=10**6
    )
    average: Literal["mean-logits", "mean-probs"] = setting(
        "mean-logits", "what is averaged over a video's views: logits, or probabilities as the official test does"
    )
    keep_tokens: float = setting(
        1.0, "part of a clip's tokens that is computed (videomae): those in motion", above=0, high=1
    )
    compile: bool | None = setting(None, "compile the blocks; default: on CUDA, for 2000 clips and more")
    save_every: int = setting(50, "videos between saves of what is done, a rank", low=1, high=10**9)
    answer: Literal["name", "index"] = setting("name", "class column of submission.csv: class names, or their numbers")


def _centre_view() -> ViewSettings:
    return ViewSettings(windows="spread", count=1)


@dataclass(kw_only=True)
class Config:
    """All settings of a run."""

    seed: int = setting(0, "seed of everything that is drawn", low=0, high=2**63 - 1)
    data: DataSettings = field(default_factory=DataSettings)
    clip: ClipSettings = field(default_factory=ClipSettings)
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    probe: ProbeSettings = field(default_factory=ProbeSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    val: ViewSettings = field(default_factory=_centre_view, metadata={"help": "views of a validation video"})
    predict: PredictSettings = field(default_factory=PredictSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    health: HealthSettings = field(default_factory=HealthSettings)
    log: LogSettings = field(default_factory=LogSettings)
    run: RunSettings = field(default_factory=RunSettings)


@dataclass(frozen=True, kw_only=True)
class Removed:
    """A setting of an earlier version: values that change nothing are accepted, others are an error that says why."""

    harmless: tuple[str, ...]
    why: str


REMOVED = {
    "data.decode": Removed(harmless=("cpu",), why="frames are decoded on the CPU, by data.workers processes"),
}
