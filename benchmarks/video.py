"""How fast do frames come out of video files, and how fast are they augmented, on one core?

The floor is PyAV decoding everything and doing nothing with it. Beside it: our decoding with scaling and RGB, of every
frame and of every fourth (what a detector with a stride of 4 asks for; counted in frames of the file that are passed
over); PyAV as it is commonly used (`frame.to_ndarray`, then a resize in torch); torchcodec, where it can be imported.

Videos are made on the spot: noise that moves over a pan, 320 x 180 and 1280 x 720, H.264 at 30 frames a second; or name
your own.

    python -m benchmarks.video [VIDEO ...] [--frames 1536] [--repeat 3]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.measure import versions
from tensorkeep.detection.data.augment import AugmentConfig, augment, draw_augmentation
from tensorkeep.detection.data.containers import frame_table, probe
from tensorkeep.detection.data.synthetic import write_video
from tensorkeep.detection.data.video import decode
from tensorkeep.errors import TensorkeepError

SIDE = 160


def scenes(height: int, width: int, number: int) -> Iterator[np.ndarray]:
    """Draw a pan over a soft texture with moving squares and some noise: as hard to decode as a sports broadcast."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(40, 215, (height // 8, width // 8, 3)).astype(np.uint8)
    texture = np.kron(coarse, np.ones((8, 8, 1), dtype=np.uint8))
    texture = np.tile(texture, (2, 2, 1))
    places, speeds = rng.uniform(0, 1, (12, 2)), rng.uniform(-0.02, 0.02, (12, 2))
    size = height // 8
    for t in range(number):
        top, left = (t // 2) % (height // 8 * 8), t % (width // 8 * 8)
        frame = texture[top : top + height, left : left + width][:height, :width].copy()
        for k, (place, speed) in enumerate(zip(places, speeds)):
            y, x = ((place + speed * t) % 1 * (height - size, width - size)).astype(int)
            frame[y : y + size, x : x + size] = (k * 20, 255 - k * 20, 128)
        yield np.clip(frame + rng.integers(-3, 4, frame.shape), 0, 255).astype(np.uint8)


def floor(path: Path, frames: int) -> None:
    """Decode the first frames on one thread; keep nothing."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_type, stream.codec_context.thread_count = "NONE", 1
        for number, _ in enumerate(container.decode(stream), 1):
            if number == frames:
                return


def common(path: Path, frames: int) -> None:
    """As the examples do it: RGB at full size, then a resize."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_type, stream.codec_context.thread_count = "NONE", 1
        for number, frame in enumerate(container.decode(stream), 1):
            pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)[None]
            F.interpolate(pixels, (SIDE, SIDE), mode="bilinear", antialias=True)
            if number == frames:
                return


def rate(action: Callable[[], object], frames: int, repeat: int) -> float:
    """Frames a second of processor time, the best of `repeat` runs: other work on the machine only slows."""
    best = float("inf")
    for _ in range(repeat):
        begin = time.process_time()
        action()
        best = min(best, time.process_time() - begin)
    return frames / best


def decoding(path: Path, frames: int, repeat: int) -> None:
    info = probe(path)
    frames = min(frames, info.frames)
    frame_table(path)  # once a file
    square, every, fourth = (SIDE, SIDE), np.arange(frames), np.arange(0, frames, 4)
    rows: list[tuple[str, Callable[[], object]]] = [
        ("PyAV, decode and nothing (floor)", lambda: floor(path, frames)),
        (f"ours, every frame at {SIDE} x {SIDE}", lambda: decode(path, every, size=square)),
        (f"ours, every 4th frame at {SIDE} x {SIDE}", lambda: decode(path, fourth, size=square)),
        (f"PyAV, to_ndarray, then resized to {SIDE} x {SIDE}", lambda: common(path, frames)),
    ]
    try:
        decode(path, [0], decoder="torchcodec")
        rows.append(
            (
                f"torchcodec, every 4th at {SIDE} x {SIDE}",
                lambda: decode(path, fourth, size=square, decoder="torchcodec"),
            )
        )
    except TensorkeepError as error:
        print(f"(torchcodec left out: {error.what})")
    print(f"\n{info.width} x {info.height}, {info.codec}, {frames} frames of {path.name}\n")
    print("| | frames/s of the file | of the floor |\n|---|---|---|")
    base = 0.0
    for name, action in rows:
        speed = rate(action, frames, repeat)
        base = base or speed
        print(f"| {name} | {speed:,.0f} | {speed / base:.2f} |")


def augmentation(repeat: int, frames: int = 256) -> None:
    """The training pipeline after decoding: short side 182, crop to 160, flip, two operations, jitter."""
    config = AugmentConfig()
    clip = torch.randint(0, 256, (frames, 3, config.short_side, 324), dtype=torch.uint8)
    draws = [draw_augmentation(config, *clip.shape[2:], torch.Generator().manual_seed(seed)) for seed in range(12)]
    plain = AugmentConfig(operations=0, jitter=(0.0, 0.0, 0.0, 0.0))
    crop = draw_augmentation(plain, *clip.shape[2:], torch.Generator().manual_seed(0))
    speeds = [rate(lambda drawn=drawn: augment(clip, drawn, config.size), frames, repeat) for drawn in draws]  # type: ignore[misc]
    print("\n| augmentation, frames out | frames/s |\n|---|---|")
    print(f"| crop, resize, flip | {rate(lambda: augment(clip, crop, config.size), frames, repeat):,.0f} |")
    print(
        f"| and two operations and jitter: mean of {len(draws)} draws "
        f"| {len(speeds) / sum(1 / s for s in speeds):,.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="*", type=Path)
    parser.add_argument("--frames", type=int, default=1536)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{versions('torch', 'av', 'torchcodec')}, one thread")
    with tempfile.TemporaryDirectory() as folder:
        videos = list(options.videos)
        if not videos:
            for height, width, number in ((180, 320, options.frames), (720, 1280, options.frames // 4)):
                videos.append(Path(folder) / f"made_{height}.mp4")
                write_video(videos[-1], scenes(height, width, number), 30)
        for path in videos:
            decoding(path, options.frames, options.repeat)
        augmentation(options.repeat)


if __name__ == "__main__":
    main()
