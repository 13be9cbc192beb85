import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorkeep.detection.data import augment as A
from tensorkeep.detection.data.augment import OPERATIONS, AugmentConfig, Draw, augment, centre_crop, draw_augmentation
from tensorkeep.errors import TensorkeepError

SMALL = AugmentConfig(size=24, short_side=30)
STILL = (1.0, 1.0, 1.0, 0.0)


def key(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clip(frames: int = 12, height: int = 30, width: int = 41) -> torch.Tensor:
    return torch.randint(0, 256, (frames, 3, height, width), dtype=torch.uint8, generator=key(0))


def smooth(height: int = 40, width: int = 40) -> torch.Tensor:
    """One frame `[1, 3, H, W]` whose values change slowly, so that interpolation changes them little."""
    y, x = torch.meshgrid(torch.linspace(0, 3, height), torch.linspace(0, 3, width), indexing="ij")
    waves = torch.stack([torch.sin(x + y), torch.cos(x * 1.3 - y), torch.sin(y * 0.7 + 1)]) * 90 + 128
    return waves.round().to(torch.uint8)[None]


@pytest.mark.parametrize("seed", range(6))
def test_the_same_key_gives_the_same_clip_whatever_the_number_of_threads(seed):
    frames, threads = clip(), torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(augment(frames, draw_augmentation(SMALL, 30, 41, key(seed)), SMALL.size))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)
    assert results[0].shape == (12, 3, 24, 24) and results[0].dtype == torch.uint8
    assert draw_augmentation(SMALL, 30, 41, key(seed)) != draw_augmentation(SMALL, 30, 41, key(seed + 1))


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("level", [0.9, -0.9])
def test_equal_frames_of_a_clip_stay_equal(name, level):
    frames = clip(1, 24, 24).expand(11, -1, -1, -1).contiguous()
    before = frames.clone()
    out = OPERATIONS[name](frames, level, 0.3, 0.8)
    assert out.shape == frames.shape and out.dtype == torch.uint8
    assert torch.equal(out, out[:1].expand_as(out))
    assert torch.equal(frames, before)  # the input is not written to
    assert not torch.equal(out, frames) or name in ("autocontrast",)  # noise has every value already


@given(
    st.integers(0, 2**40), st.integers(24, 90), st.integers(24, 90), st.sampled_from(["resized", "random", "centre"])
)
@settings(max_examples=60, deadline=None)
def test_a_box_lies_in_the_frame_and_has_the_area_and_shape_asked_for(seed, height, width, crop):
    config = AugmentConfig(size=24, short_side=24, crop=crop, area=(0.3, 0.6))
    top, left, h, w = draw_augmentation(config, height, width, key(seed)).box
    assert 0 <= top <= top + h <= height and 0 <= left <= left + w <= width and h > 0 and w > 0
    if crop == "resized":
        fits = 0.29 * height * width <= h * w <= 0.65 * height * width
        assert fits or (h == w == min(height, width))  # or nothing fitted, and the middle is taken
    else:
        assert h == w == 24


def test_flips_and_operations_come_as_often_as_asked():
    draws = [draw_augmentation(SMALL, 30, 41, key(seed)) for seed in range(400)]
    assert 0.4 < sum(drawn.flip for drawn in draws) / 400 < 0.6
    assert all(len({name for name, *_ in drawn.operations}) == 2 for drawn in draws)
    assert {name for drawn in draws for name, *_ in drawn.operations} == set(OPERATIONS)
    assert {level for drawn in draws for _, level, *_ in drawn.operations} == {0.9, -0.9}
    never = AugmentConfig(size=24, short_side=30, flip=0, operations=0, jitter=(0, 0, 0, 0))
    drawn = draw_augmentation(never, 30, 41, key(0))
    assert not drawn.flip and drawn.operations == () and drawn.jitter == STILL


def test_a_draw_that_does_nothing_is_a_crop():
    frames = clip()
    assert torch.equal(
        augment(frames, Draw((3, 5, 24, 24), False, (), STILL, (0, 1, 2, 3)), 24), frames[..., 3:27, 5:29]
    )
    flipped = augment(frames, Draw((3, 5, 24, 24), True, (), STILL, (0, 1, 2, 3)), 24)
    assert torch.equal(flipped, frames[..., 3:27, 5:29].flip(-1))
    assert torch.equal(centre_crop(frames, 30), frames[..., 5:35])


def test_turning_by_a_right_angle_and_moving_by_whole_pixels_are_exact():
    frame = clip(2, 40, 40)
    assert torch.equal(OPERATIONS["rotate"](frame, 3.0, 0, 0), torch.rot90(frame, -1, (2, 3)))  # 90 degrees clockwise
    moved = OPERATIONS["translate_x"](frame, 0.5, 0, 0)  # a tenth of the side to the right
    assert torch.equal(moved[..., 4:], frame[..., :-4]) and not moved[..., :4].any()
    moved = OPERATIONS["translate_y"](frame, -0.5, 0, 0)
    assert torch.equal(moved[:, :, :-4], frame[:, :, 4:]) and not moved[:, :, -4:].any()
    for name in ("rotate", "shear_x", "shear_y", "translate_x"):
        assert torch.equal(OPERATIONS[name](frame, 0.0, 0, 0), frame)


def test_a_shear_moves_rows_by_the_tangent_of_its_angle():
    frame = torch.zeros(1, 3, 41, 41, dtype=torch.uint8)
    frame[..., 20] = 255  # an upright line
    out = OPERATIONS["shear_x"](frame, 1.0, 0, 0)[0, 0].float()
    centres = (out * torch.arange(41)).sum(1) / out.sum(1)
    slope = float(centres[30] - centres[10]) / 20
    assert slope == pytest.approx(math.tan(math.radians(17.19)), abs=0.01)


def test_colour_operations_do_what_their_names_say():
    frame = smooth()
    assert torch.equal(OPERATIONS["invert"](OPERATIONS["invert"](frame, 1, 0, 0), 1, 0, 0), frame)
    assert torch.equal(OPERATIONS["posterize"](frame, 0.9, 0, 0), frame // 32 * 32)  # int(4 * 0.9) = 3 bits
    assert torch.equal(OPERATIONS["solarize"](frame, 0.5, 0, 0), torch.where(frame < 128, frame, 255 - frame))
    wide = OPERATIONS["autocontrast"](frame // 2 + 30, 0.9, 0, 0)
    assert wide.amin((0, 2, 3)).tolist() == [0, 0, 0] and wide.amax((0, 2, 3)).tolist() == [255, 255, 255]
    flat = OPERATIONS["equalize"](clip(4, 64, 64) // 4, 0.9, 0, 0)[:, 0].float()
    assert flat.mean() == pytest.approx(127.5, abs=4) and flat.std() == pytest.approx(256 / math.sqrt(12), abs=4)
    one = torch.full((2, 3, 24, 24), 7, dtype=torch.uint8)
    for name in ("equalize", "autocontrast", "sharpness", "contrast"):
        assert torch.equal(OPERATIONS[name](one, 0.9, 0, 0), one)  # nothing to spread
    cut = OPERATIONS["cutout"](torch.zeros(1, 3, 50, 50, dtype=torch.uint8), 1.0, 0.5, 0.5)
    assert (cut == 128).sum() == 3 * 10 * 10


def test_jitter_is_brightness_contrast_saturation_and_hue():
    frame, order = smooth(), (0, 1, 2, 3)
    assert A._jittered(frame, STILL, order) is frame
    darker = A._jittered(frame, (0.5, 1.0, 1.0, 0.0), order)
    assert (darker.int() - frame.int() / 2).abs().max() <= 0.5
    grey = A._jittered(frame, (1.0, 1.0, 0.0, 0.0), order).int()
    assert (grey - grey.float().mean(1, keepdim=True)).abs().max() <= 0.5
    assert (A._jittered(frame, (1.0, 1.0, 1.0, 1.0), order).int() - frame.int()).abs().max() <= 1  # a full turn
    plain = torch.full((1, 3, 8, 8), 90, dtype=torch.uint8)
    assert (A._jittered(plain, (1.0, 1.0, 1.0, 0.37), order).int() - 90).abs().max() <= 1  # grey has no hue
    assert torch.equal(A._jittered(plain, (1.0, 1.4, 1.0, 0.0), order), plain)  # contrast turns about the mean
    third = A._jittered(smooth(), (1.0, 1.0, 1.0, 1 / 3), order).float().mean((0, 2, 3))
    assert (third - smooth().float().mean((0, 2, 3))).abs().max() > 5


@pytest.mark.parametrize(
    "make",
    [
        lambda: AugmentConfig(size=200, short_side=182, crop="random"),
        lambda: AugmentConfig(area=(0.0, 1.0)),
        lambda: AugmentConfig(operations=99),
        lambda: draw_augmentation(AugmentConfig(size=30, short_side=30, crop="centre"), 20, 40, key(0)),
        lambda: augment(clip().float(), draw_augmentation(SMALL, 30, 41, key(0)), 24),
        lambda: centre_crop(clip(), 31),
    ],
)
def test_what_cannot_be_is_an_error(make):
    with pytest.raises(TensorkeepError):
        make()
