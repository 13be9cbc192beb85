"""Clips augmented on the device that trains: the CPU's pixels, operation by operation, and the run that they give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorkeep.detection.data.augment import OPERATIONS, AugmentConfig, Draw, augment, draw_augmentation
from tensorkeep.detection.data.device_augment import Uncut, augment_batch, augment_uncut, cut_out, scaled
from tensorkeep.detection.job import augmented_on_device, build
from tensorkeep.training.loop import fit
from tests.detection import runs
from tests.gpu import DEVICES, needs_gpu
from tests.training import assert_same_run

CONFIG = AugmentConfig(size=24, short_side=30)
STILL = (1.0, 1.0, 1.0, 0.0)
# of the pixels of one operation that moves them, so many may be a step of 255 off on a GPU, whose kernel interpolates;
# on a CPU, and of all others, none
MOVED = 2e-3
MOVES = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")


def key(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clip(seed: int, frames: int = 9, height: int = 30, width: int = 41) -> torch.Tensor:
    """Noise over a picture that changes slowly."""
    wave = torch.linspace(0, 6, width).sin() * 60 + torch.linspace(0, 4, height).cos()[:, None] * 40 + 110
    noise = torch.randint(-25, 26, (frames, 3, height, width), generator=key(seed))
    return (wave + noise).clamp(0, 255).to(torch.uint8)


def compare(frames: torch.Tensor, drawn: Draw, size: int, device: str) -> tuple[float, int]:
    """The share of pixels that differ, and by how much at most."""
    wanted = augment(frames, drawn, size)
    uncut = cut_out(frames, drawn)
    found = augment_uncut(Uncut(uncut.frames.to(device), uncut.drawn), size)
    assert found.device.type == device and found.dtype == torch.uint8
    apart = (found.cpu().int() - wanted.int()).abs()
    return float((apart > 0).float().mean()), int(apart.max())


@given(st.integers(0, 2**40), st.integers(8, 60), st.integers(8, 70))
@settings(max_examples=40, deadline=None)
def test_for_every_key_the_pixels_are_those_of_the_cpus_path(seed: int, height: int, width: int) -> None:
    config = AugmentConfig(size=24, short_side=30, operations=4)
    frames = clip(seed, 3, height, width)
    assert compare(frames, draw_augmentation(config, height, width, key(seed)), 24, "cpu") == (0.0, 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_by_itself_gives_the_cpus_pixels(name: str, device: str) -> None:
    for level in (0.9, -0.35):
        drawn = Draw((2, 4, 25, 30), level > 0, ((name, level, 0.3, 0.8),), STILL, (0, 1, 2, 3))
        share, most = compare(clip(3), drawn, 24, device)
        assert most == 0 or (device == "cuda" and name in MOVES and most == 1 and share <= MOVED), (share, most)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 0, 3, 2), (2, 3, 0, 1)])
def test_jitter_in_every_order_gives_the_cpus_pixels(order: tuple[int, ...], device: str) -> None:
    drawn = Draw((0, 0, 30, 41), False, (), (0.7, 1.4, 0.6, 0.08), order)
    assert compare(clip(5), drawn, 24, device) == (0.0, 0)
    assert not torch.equal(augment(clip(5), drawn, 24), augment(clip(5), drawn._replace(jitter=STILL), 24))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", [(24, 24), (24, 31), (7, 24), (5, 9), (61, 200), (130, 90), (1, 3), (333, 17)])
def test_scaling_is_torchs_of_bytes_on_a_cpu(sizes: tuple[int, int], device: str) -> None:
    frames = torch.randint(0, 256, (2, 3, *sizes), dtype=torch.uint8, generator=key(1))
    wanted = F.interpolate(frames, (24, 24), mode="bilinear", antialias=True)
    assert torch.equal(scaled(frames.to(device), 24).cpu(), wanted)


def test_a_batch_is_its_clips_and_another_batch_stays() -> None:
    clips = [cut_out(clip(n, 4), draw_augmentation(CONFIG, 30, 41, key(n))) for n in range(2)]
    clips.append(Uncut(torch.zeros(4, 3, 24, 24, dtype=torch.uint8), None))  # of a file that cannot be read
    found = augment_batch({"inputs": clips, "masks": 1}, 24)
    assert found["masks"] == 1 and found["inputs"].shape == (3, 3, 4, 24, 24)
    for n in range(2):
        wanted = augment(clip(n, 4), draw_augmentation(CONFIG, 30, 41, key(n)), 24)
        assert torch.equal(found["inputs"][n], wanted.transpose(0, 1))
    assert not found["inputs"][2].any()
    assert augment_batch(found, 24) is found


def test_a_run_that_augments_on_its_device_is_the_run_whose_samples_were_augmented(tmp_path: Path) -> None:
    """Here the device is the CPU, whose pixels are the same."""
    pytest.importorskip("av")
    torch.set_num_threads(1)
    data = runs.dataset(tmp_path / "data", videos=3, held_out=1)
    changes = {"data__augment": {"size": 32, "short_side": 36, "operations": 2}, "training__epochs": 2}
    made = runs.recipe(data, **changes, training__workers=1)
    for name in ("host", "device"):
        job, loop = build(made, tmp_path / name)
        assert job.prepare is None
        fit(augmented_on_device(job, made) if name == "device" else job, tmp_path / name, loop)
    assert_same_run(tmp_path / "host", tmp_path / "device")
    bare = runs.recipe(data, data__augment=None)
    job, _ = build(bare, tmp_path / "bare")
    assert augmented_on_device(job, bare) is job  # nothing is drawn: the middle is cut out where it is decoded


@needs_gpu
def test_whole_pipelines_of_a_gpu_are_the_cpus_but_for_few_pixels() -> None:
    config = AugmentConfig()
    shares = [
        compare(clip(n, 40, 182, 324), draw_augmentation(config, 182, 324, key(n)), 160, "cuda")[0] for n in range(24)
    ]
    assert sum(shares) / len(shares) < MOVED and sorted(shares)[12] < 1e-4, shares
