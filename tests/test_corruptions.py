"""Natural corruptions: what each does, how strong it grows, and on what its draw depends."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from verideq.data import load
from verideq.data.corruptions import CORRUPTIONS, FAMILIES, SEVERITIES, corrupt, parse_corruptions
from verideq.errors import InputError, UnknownName

NAMES = tuple(CORRUPTIONS)


def coloured(count: int = 12, side: int = 32) -> Tensor:
    """Soft blobs of colour, float64."""
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return F.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)


def grey(count: int = 12) -> Tensor:
    """Digits of the size of MNIST's."""
    return F.interpolate(load("digits").scaled(list(range(count))), size=(28, 28), mode="bilinear")


def flat(value: float, channels: int = 1, side: int = 16) -> Tensor:
    return torch.full((1, channels, side, side), value, dtype=torch.float64)


def one(x: Tensor, name: str, severity: int = 5) -> Tensor:
    return corrupt(x, name, severity, indices=range(len(x)))


def test_four_families_with_five_severities() -> None:
    assert {c.family for c in CORRUPTIONS.values()} == set(FAMILIES)
    sizes = [sum(c.family == family for c in CORRUPTIONS.values()) for family in FAMILIES]
    assert sizes == [4, 5, 5, 5]
    assert all(len(c.levels) == len(SEVERITIES) for c in CORRUPTIONS.values())


@pytest.mark.parametrize("name", NAMES)
def test_every_corruption_stays_in_range_and_grows_with_the_severity(name: str) -> None:
    for x in [coloured(), *([] if CORRUPTIONS[name].coloured else [grey()])]:
        distances = []
        for severity in SEVERITIES:
            y = one(x, name, severity)
            assert y.shape == x.shape and y.dtype == x.dtype
            assert bool(((y >= 0) & (y <= 1)).all())
            distances.append(float((y - x).abs().mean()))
        assert distances[0] > 1e-3
        assert distances == sorted(set(distances)), distances


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_is_the_same_in_every_batch_and_order(name: str) -> None:
    x = coloured(4)
    whole = corrupt(x, name, 3, indices=[5, 1, 8, 3], seed=2)
    assert torch.equal(corrupt(x[[2]], name, 3, indices=[8], seed=2), whole[[2]])
    assert torch.equal(corrupt(x[[3, 0]], name, 3, indices=torch.tensor([3, 5]), seed=2), whole[[3, 0]])
    single = corrupt(x.float(), name, 3, indices=[5, 1, 8, 3], seed=2)
    assert single.dtype == torch.float32


DRAWN = [n for n in NAMES if n not in {
    "defocus-blur", "zoom-blur", "gaussian-blur", "brightness", "contrast", "pixelate", "jpeg", "saturate",
}]  # fmt: skip


@pytest.mark.parametrize("name", DRAWN)
def test_index_and_seed_change_what_is_drawn(name: str) -> None:
    x = coloured(1)
    first = corrupt(x, name, 3, indices=[0])
    assert not torch.equal(first, corrupt(x, name, 3, indices=[1]))
    assert not torch.equal(first, corrupt(x, name, 3, indices=[0], seed=1))


def test_names_draw_apart() -> None:
    x = flat(0.5)
    gauss, speckle = (one(x, name) - 0.5 for name in ("gaussian-noise", "speckle-noise"))
    assert float(torch.corrcoef(torch.stack([gauss.flatten(), speckle.flatten()]))[0, 1].abs()) < 0.3


# Noise


def test_noises_have_their_deviations() -> None:
    x = flat(0.5, side=64)
    assert float(one(x, "gaussian-noise").std()) == pytest.approx(0.10, rel=0.05)
    assert float(one(x, "speckle-noise").std()) == pytest.approx(0.5 * 0.20, rel=0.05)
    assert float(one(x, "shot-noise").std()) == pytest.approx((0.5 / 50) ** 0.5, rel=0.05)
    shot = one(x, "shot-noise") * 50
    torch.testing.assert_close(shot, shot.round())
    black = flat(0.0)
    assert torch.equal(one(black, "speckle-noise"), black) and torch.equal(one(black, "shot-noise"), black)


def test_impulses_are_black_and_white_and_as_many_as_said() -> None:
    x = flat(0.5, side=64)
    y = one(x, "impulse-noise")
    hit = y != 0.5
    assert set(y[hit].tolist()) == {0.0, 1.0}
    assert float(hit.double().mean()) == pytest.approx(0.07, abs=0.015)
    assert float((y == 1).double().mean()) == pytest.approx(0.035, abs=0.01)


# Blur


@pytest.mark.parametrize("name", [n for n in NAMES if CORRUPTIONS[n].family == "blur"])
def test_blurs_leave_a_flat_image_and_the_mean_of_a_dot(name: str) -> None:
    x = flat(0.3, 3)
    torch.testing.assert_close(one(x, name), x, rtol=0, atol=1e-12)
    dot = flat(0.0, side=33)
    dot[..., 16, 16] = 1.0
    y = one(dot, name)
    if name not in ("glass-blur", "zoom-blur"):  # a zoom enlarges a dot, and glass hides and repeats pixels
        assert 0 < float(y.max()) < 0.5
        assert float(y.sum()) == pytest.approx(1.0, abs=1e-9)
        assert int((y > 1e-6).sum()) > 4


def test_motion_goes_one_way_and_lens_blur_goes_all_ways() -> None:
    dot = flat(0.0, side=33)
    dot[..., 16, 16] = 1.0
    columns = torch.arange(33, dtype=torch.float64) - 16
    moved = float((one(dot, "motion-blur").sum((0, 1, 2)) * columns).sum())
    still = float((one(dot, "defocus-blur").sum((0, 1, 2)) * columns).sum())
    assert abs(moved) > 1 and abs(still) < 1e-9
    y = one(dot, "defocus-blur")
    torch.testing.assert_close(y, y.flip(2))
    torch.testing.assert_close(y, y.transpose(2, 3))


def test_a_zoom_moves_away_from_the_middle() -> None:
    x = flat(0.0, side=33)
    x[..., 16, 24] = 1.0
    columns = torch.arange(33, dtype=torch.float64)
    mass = one(x, "zoom-blur").sum((0, 1, 2))
    assert float((mass * columns).sum() / mass.sum()) > 24


def test_lengths_grow_with_large_images() -> None:
    def width(side: int) -> float:
        dot = flat(0.0, side=side)
        dot[..., side // 2, side // 2] = 1.0
        away = torch.arange(side, dtype=torch.float64) - side // 2
        return float((one(dot, "gaussian-blur").sum((0, 1, 2)) * away.square()).sum().sqrt())

    assert width(16) == pytest.approx(width(32))
    assert width(96) == pytest.approx(3 * width(32), rel=0.05)


# Weather


def test_brightness_adds_and_keeps_the_tint() -> None:
    torch.testing.assert_close(one(flat(0.4), "brightness", 2), flat(0.5))
    torch.testing.assert_close(one(flat(0.9), "brightness"), flat(1.0))
    x = torch.tensor([0.4, 0.2, 0.1], dtype=torch.float64).view(1, 3, 1, 1)
    torch.testing.assert_close(one(x, "brightness", 4), x * 1.5)
    torch.testing.assert_close(one(flat(0.0, 3), "brightness", 1), flat(0.05, 3))


@pytest.mark.parametrize("name", ["snow", "frost", "fog"])
def test_weather_brightens_a_dark_image_unevenly(name: str) -> None:
    y = one(flat(0.1, 3, 32), name)
    assert name == "fog" or float(y.mean()) > 0.12
    assert float(y.std()) > 0.005


def test_fog_keeps_the_brightest_below_what_it_was_and_hides_contrast() -> None:
    x = coloured(1)
    y = one(x, "fog")
    assert float(y.max()) <= float(x.max()) + 1e-12
    assert float(y.std()) < 0.7 * float(x.std())


@pytest.mark.parametrize("severity", SEVERITIES)
def test_spatter_covers_its_share(severity: int) -> None:
    x = flat(0.0, side=40)
    covered = float((one(x, "spatter", severity) > 0).double().mean())
    assert covered == pytest.approx(CORRUPTIONS["spatter"].levels[severity - 1][0], abs=0.01)


# Digital


def test_contrast_shrinks_around_the_mean_of_every_channel() -> None:
    x = coloured(2)
    mean = x.mean((2, 3), keepdim=True)
    torch.testing.assert_close(one(x, "contrast") - mean, 0.15 * (x - mean))


def test_pixelate_shows_blocks_of_means() -> None:
    x = coloured(1)
    y = one(x, "pixelate", 3)  # a half: blocks of two by two
    expected = F.avg_pool2d(x, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(y, expected)
    for severity, share in zip(SEVERITIES, (0.8, 0.65, 0.5, 0.4, 0.3), strict=True):
        y = one(x, "pixelate", severity)
        edges = [int((y.diff(dim=axis) != 0).flatten(0, 1).any(0).any(3 - axis).sum()) for axis in (2, 3)]
        assert edges == [int(32 * share) - 1] * 2


def test_elastic_moves_and_invents_no_values() -> None:
    x = coloured(2)
    y = one(x, "elastic")
    assert float(y.min()) >= float(x.min()) and float(y.max()) <= float(x.max())
    torch.testing.assert_close(one(flat(0.7), "elastic"), flat(0.7))


def test_jpeg_gives_bytes_and_quality_counts() -> None:
    y = one(coloured(1), "jpeg") * 255
    torch.testing.assert_close(y, y.round())
    # Four channels are no colours: each goes by itself.
    four = coloured(1)[:, [0, 1, 2, 0]]
    parts = torch.cat([one(four[:, [k]], "jpeg") for k in range(4)], 1)
    assert torch.equal(one(four, "jpeg"), parts)


def test_saturate_moves_away_from_grey_and_leaves_grey() -> None:
    import colorsys

    x = coloured(1, 8)
    y = one(x, "saturate", 2)
    for place in ((0, 0), (3, 5), (7, 2)):
        before, after = (colorsys.rgb_to_hsv(*t[0, :, place[0], place[1]].tolist()) for t in (x, y))
        assert after[1] == pytest.approx(min(1.0, 1.6 * before[1]), abs=1e-9)
        assert after[2] == pytest.approx(before[2])
        assert np.isclose(after[0], before[0])
    assert torch.equal(one(grey(), "saturate"), grey())
    assert torch.equal(one(flat(0.3, 3), "saturate"), flat(0.3, 3))


# What is refused


def test_names_are_parsed_and_coloured_ones_need_colour() -> None:
    assert parse_corruptions("all", (3, 32, 32)) == list(NAMES)
    assert parse_corruptions("all", (1, 28, 28)) == [n for n in NAMES if n != "saturate"]
    assert parse_corruptions("fog, noise,fog", (1, 8, 8)) == [*NAMES[:4], "fog"]
    with pytest.raises(UnknownName, match="corruption 'rain'"):
        parse_corruptions("noise,rain", (3, 8, 8))
    with pytest.raises(InputError, match="no corruption of images with 1 channels"):
        parse_corruptions("saturate", (1, 8, 8))
    with pytest.raises(InputError, match=r"samples are \(5,\)"):
        parse_corruptions("all", (5,))


@pytest.mark.parametrize(
    ("images", "name", "severity", "indices", "words"),
    [
        (flat(0.5), "rain", 1, [0], "unknown corruption"),
        (flat(0.5), "fog", 0, [0], "severity 0"),
        (flat(0.5), "fog", 6, [0], "severity 6"),
        (flat(0.5)[0], "fog", 1, [0], r"got \(1, 16, 16\)"),
        (flat(0.5), "fog", 1, [0, 1], "1 images need as many indices"),
        (flat(0.5), "fog", 1, [-1], "0 or more"),
        (flat(1.5), "fog", 1, [0], r"in \[0, 1\]"),
        (flat(float("nan")), "fog", 1, [0], "NaN"),
    ],
)
def test_calls_that_make_no_sense_are_refused(
    images: Tensor, name: str, severity: int, indices: list[int], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        corrupt(images, name, severity, indices=indices)


def test_an_empty_batch_stays_empty() -> None:
    assert one(flat(0.5)[:0], "fog").shape == (0, 1, 16, 16)
