from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from vac_ddp.data.mixing import cutmix_box, draw_mixing, mix, soft_targets
from vac_ddp.settings import AugmentSettings

BOTH = AugmentSettings(mixup=0.8, cutmix=1.0)


def collate(samples: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}


def params(*, keep: float, box=(0, 0, 0, 0), cut: bool = False) -> dict[str, np.ndarray]:
    return {
        "mix_keep": np.array(keep, np.float32),
        "mix_box": np.array(box, np.int64),
        "mix_cut": np.array(cut),
    }


def clips_of(rows: int, *, frames: int = 3, height: int = 12, width: int = 12) -> torch.Tensor:
    return torch.randn(rows, frames, 3, height, width, generator=torch.Generator().manual_seed(rows))


def by_loop(clips: torch.Tensor, partner: list[int], samples: list[dict[str, np.ndarray]]) -> torch.Tensor:
    """The definition, clip by clip and frame by frame."""
    out = clips.clone()
    for i, j in enumerate(partner):
        lam, (top, left, height, width) = float(samples[i]["mix_keep"]), samples[i]["mix_box"].tolist()
        bottom, right = top + height, left + width
        for t in range(clips.shape[1]):
            if samples[i]["mix_cut"]:
                out[i, t, :, top:bottom, left:right] = clips[j, t, :, top:bottom, left:right]
            elif i != j:
                out[i, t] = clips[i, t] * lam + clips[j, t] * (1 - lam)
    return out


def drawn_batch(rows: int, size: int, augment: AugmentSettings = BOTH):
    """Rows 0 and 1 are a pair, 2 and 3, ...; an odd last row is alone. Samples carry their pair's draw."""
    samples = [draw_mixing(np.random.default_rng([3, i // 2]), augment, size=size) for i in range(rows)]
    partner = [min(i ^ 1, rows - 1) for i in range(rows)]
    return samples, partner


@pytest.mark.parametrize("lam", [0.0, 0.07, 0.5, 0.93, 1.0])
@pytest.mark.parametrize("centre", [(0, 0), (11, 19), (5, 9), (3, 18)])
def test_the_box_is_timms_for_the_same_centre(lam, centre, monkeypatch):
    from timm.data import mixup

    given = iter(centre)
    monkeypatch.setattr(mixup.np.random, "randint", lambda low, high, size=None: next(given))
    expected = mixup.rand_bbox((8, 3, 12, 20), lam)

    class Chosen:
        def __init__(self) -> None:
            self.values = list(centre)

        def integers(self, high: int) -> int:
            assert high == (12 if len(self.values) == 2 else 20)
            return self.values.pop(0)

    top, left, height, width = cutmix_box(Chosen(), lam, 12, 20)
    assert (top, top + height, left, left + width) == tuple(map(int, expected))


def test_draws_follow_the_settings():
    n, size = 4000, 224
    rng = np.random.default_rng(0)
    augment = AugmentSettings(mixup=0.8, cutmix=1.0, mix_probability=0.7, mix_switch=0.3)
    draws = [draw_mixing(rng, augment, size=size) for _ in range(n)]
    cut = np.array([draw["mix_cut"] for draw in draws])
    keep = np.array([draw["mix_keep"] for draw in draws])
    assert cut.mean() == pytest.approx(0.7 * 0.3, abs=0.026)  # 4 standard errors
    mixup = keep[~cut & (keep < 1)]
    assert len(mixup) / n == pytest.approx(0.7 * 0.7, abs=0.032)
    assert mixup.mean() == pytest.approx(0.5, abs=0.03)
    assert mixup.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), rel=0.1)  # of Beta(0.8, 0.8)
    boxes = np.array([draw["mix_box"] for draw in draws])
    areas = boxes[:, 2] * boxes[:, 3]
    assert (boxes >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= size).all()
    assert (areas[~cut] == 0).all()
    np.testing.assert_allclose(keep[cut], 1 - areas[cut] / size**2, atol=1e-6)
    assert {draw["mix_box"].shape for draw in draws} == {(4,)}


@pytest.mark.parametrize(("mixup", "cutmix", "kind"), [(0.8, 0.0, {False}), (0.0, 1.0, {True}), (0.0, 0.0, {False})])
def test_one_of_them_alone_or_none(mixup, cutmix, kind):
    augment = AugmentSettings(mixup=mixup, cutmix=cutmix)
    draws = [draw_mixing(np.random.default_rng(i), augment, size=32) for i in range(50)]
    assert {bool(draw["mix_cut"]) for draw in draws} == kind
    mixed = [draw["mix_keep"] < 1 for draw in draws]
    assert np.mean(mixed) > 0.9 if mixup or cutmix else not any(mixed)


@pytest.mark.parametrize("rows", [1, 2, 7, 20])
def test_mixing_is_its_definition(rows):
    samples, partner = drawn_batch(rows, 12)
    clips = clips_of(rows)
    before = clips.clone()
    mixed, keep = mix(clips, torch.tensor(partner), collate(samples))
    if rows % 2:
        samples[-1] = params(keep=1.0)
    torch.testing.assert_close(mixed, by_loop(clips, partner, samples))
    assert keep.tolist() == [float(sample["mix_keep"]) for sample in samples]
    assert torch.equal(clips, before)
    if rows == 20:
        assert {bool(sample["mix_cut"]) for sample in samples} == {True, False}


@pytest.mark.parametrize("cut", [True, False])
def test_frames_are_mixed_as_timm_mixes_images(cut, monkeypatch):
    """timm mixes row i with row B - 1 - i of a batch of images; so do we here with clips of the same image."""
    from timm.data import mixup

    images = clips_of(4, frames=1, height=12, width=12)[:, 0]
    reference = mixup.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=5, label_smoothing=0.1)
    box, lam = (2, 9, 5, 12), 0.3  # top, bottom, left, right
    monkeypatch.setattr(reference, "_params_per_batch", lambda: (lam, cut))
    monkeypatch.setattr(mixup, "rand_bbox", lambda shape, lam, count=None: box)
    labels = torch.tensor([3, 0, 1, 4])
    expected, targets = reference(images.clone(), labels)

    share = 1 - 49 / 144 if cut else lam
    one = params(keep=share, box=(2, 5, 7, 7) if cut else (0, 0, 0, 0), cut=cut)
    clips = images[:, None].expand(-1, 6, -1, -1, -1).contiguous()
    partner = torch.arange(4).flip(0)
    ours, keep = mix(clips, partner, collate([one] * 4))
    for t in range(6):
        torch.testing.assert_close(ours[:, t], expected)
    torch.testing.assert_close(soft_targets(labels, labels[partner], keep, 5, 0.1), targets)


def test_cutmix_labels_what_it_replaces():
    """In every frame: the share of pixels from the partner is the share of its label."""
    clips = torch.stack([torch.zeros(4, 3, 40, 40), torch.ones(4, 3, 40, 40)])
    for seed in range(20):
        draw = draw_mixing(np.random.default_rng(seed), AugmentSettings(cutmix=1.0), size=40)
        mixed, keep = mix(clips, torch.tensor([1, 0]), collate([draw, draw]))
        for t in range(4):
            assert mixed[0, t].mean() == pytest.approx(1 - float(keep[0]), abs=1e-6)
            assert mixed[1, t].mean() == pytest.approx(float(keep[1]), abs=1e-6)


def test_a_clip_alone_stays_as_it_is():
    clips = clips_of(2)
    for one in (params(keep=0.3), params(keep=0.5, box=(0, 0, 6, 12), cut=True)):
        mixed, keep = mix(clips, torch.tensor([0, 1]), collate([one, one]))
        assert torch.equal(mixed, clips)
        assert keep.tolist() == [1.0, 1.0]


def test_a_pair_does_not_see_the_batch_around_it():
    samples, partner = drawn_batch(16, 12)
    clips = clips_of(16)
    together, keep = mix(clips, torch.tensor(partner), collate(samples))
    for i in range(0, 16, 2):
        alone, own = mix(clips[i : i + 2], torch.tensor([1, 0]), collate(samples[i : i + 2]))
        assert torch.equal(alone, together[i : i + 2])
        assert torch.equal(own, keep[i : i + 2])


@pytest.mark.parametrize("cut", [False, True])
def test_the_channels_of_a_pixel_stay_neighbours_in_memory(cut: bool) -> None:
    """As `normalize` leaves them and the embedding takes them, with the values of clips laid out otherwise."""
    planar = clips_of(2)
    clips = planar.movedim(2, -1).contiguous().movedim(-1, 2)
    batch = collate([params(keep=0.3, box=(2, 1, 5, 8), cut=cut)] * 2)
    mixed, _ = mix(clips, torch.tensor([1, 0]), batch)
    assert mixed.movedim(2, -1).is_contiguous()
    assert torch.equal(mixed, mix(planar, torch.tensor([1, 0]), batch)[0])


def test_bfloat16_is_mixed_in_float32():
    samples, partner = drawn_batch(8, 12)
    clips = clips_of(8).bfloat16()
    mixed, _ = mix(clips, torch.tensor(partner), collate(samples))
    exact, _ = mix(clips.float(), torch.tensor(partner), collate(samples))
    assert torch.equal(mixed, exact.bfloat16())


def test_nothing_waits_for_the_device():
    """On tensors without values, every look at one from the host is an error."""
    samples, partner = drawn_batch(8, 12)
    mixed, keep = mix(clips_of(8).to("meta"), torch.tensor(partner), collate(samples))
    labels = torch.empty(8, dtype=torch.int64, device="meta")
    targets = soft_targets(labels, labels, keep, 5, 0.1)
    assert (mixed.shape, targets.shape) == ((8, 3, 3, 12, 12), (8, 5))


def test_an_empty_batch_passes():
    none = {name: tensor[:0] for name, tensor in collate([params(keep=1.0)]).items()}
    mixed, keep = mix(clips_of(1)[:0], torch.zeros(0, dtype=torch.int64), none)
    assert (len(mixed), len(keep)) == (0, 0)
    labels = torch.zeros(0, dtype=torch.int64)
    assert soft_targets(labels, labels, keep, 5, 0.1).shape == (0, 5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_soft_targets_are_torchs_label_smoothing(smoothing):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 7, generator=generator)
    labels, others = torch.randint(0, 7, (2, 9), generator=generator)
    keep = torch.rand(9, generator=generator)
    reference = torch.nn.CrossEntropyLoss(label_smoothing=smoothing, reduction="none")

    plain = soft_targets(labels, others, torch.ones(9), 7, smoothing)
    torch.testing.assert_close(functional.cross_entropy(logits, plain, reduction="none"), reference(logits, labels))

    targets = soft_targets(labels, others, keep, 7, smoothing)
    assert targets.dtype == torch.float32
    torch.testing.assert_close(targets.sum(1), torch.ones(9))
    expected = keep * reference(logits, labels) + (1 - keep) * reference(logits, others)
    torch.testing.assert_close(functional.cross_entropy(logits, targets, reduction="none"), expected)
