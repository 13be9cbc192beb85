"""Decode on a GPU's own engines (NVDEC, through torchcodec) beside PyAV in processes: the same frames, and how many.

    python -m benchmarks.decode_gpu --out figures            one GPU, 16 cores, torchcodec and PyAV; about 80 s
    python -m benchmarks.decode_gpu --out figures --device cpu --seconds 30        a check of the script, anywhere

Videos are drawn and encoded first (one of each size and kind, by libx264 and libx265 of PyAV's wheel). Then:

- `frames`: what the device decodes against what PyAV decodes, as stored and scaled to 160 pixels: B-frames, an open
  group of pictures, a variable rate, an edit list, BT.709, turned by 90 degrees, HEVC.
- `speed`: frames used a second at stride 1 and 4, and frames decoded for them, with 1, 4, 8 and 16 threads through
  `decoded_ahead`, as training does, and by 1, 4 and 8 processes through `decode`, as training does without it.

A table goes to the screen, figures to OUT/decode_gpu.json after every row. What the time does not suffice for is said.
The script starts itself again with LD_LIBRARY_PATH set to links to PyAV's FFmpeg.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.measure import versions
from tensorkeep.detection.data.asking import Asked, ask
from tensorkeep.detection.data.augment import AugmentConfig, draw_augmentation
from tensorkeep.detection.data.containers import frame_table
from tensorkeep.detection.data.device_augment import cut_out
from tensorkeep.detection.data.device_decode import decode_asked, decoded_ahead
from tensorkeep.detection.data.ffmpeg_links import library_path
from tensorkeep.detection.data.opening import import_av
from tensorkeep.detection.data.video import decode, fitted
from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.placement import replacing

BEGAN = time.monotonic()
SIDE = 160
SIZES = {"192 x 192": (192, 192), "640 x 360": (360, 640), "1920 x 1080": (1080, 1920)}
RATE, GOP = 30, 48
THREADS, WORKERS, STRIDES = (1, 4, 8, 16), (1, 4, 8), (4, 1)
LINKED = "TENSORKEEP_BENCHMARK_LINKED"
# mean difference of a value, of 255: colours are rounded otherwise, and chroma is scaled from other places
TOLERANCE = 2.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=88, help="for everything; what is not done by then is cut")
    parser.add_argument("--each", type=float, default=0.8, help="seconds of a measurement, at least")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if LINKED not in os.environ:
            path = ":".join(
                [library_path(Path(scratch) / "ffmpeg"), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
            )
            command = [sys.executable, "-m", "benchmarks.decode_gpu", *sys.argv[1:]]
            raise SystemExit(
                subprocess.run(command, env=os.environ | {"LD_LIBRARY_PATH": path, LINKED: "1"}).returncode
            )
        measure(args, Path(scratch))


def measure(args: argparse.Namespace, scratch: Path) -> None:
    """Do everything, in processes that are forked before the GPU is touched."""
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    found: dict[str, Any] = {"frames": [], "speed": [], "cut": []}

    def note(part: str, row: Any) -> None:
        found[part].append(row)
        with replacing(args.out / "decode_gpu.json", overwrite=True) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n")

    with ProcessPoolExecutor(max(WORKERS), multiprocessing.get_context("fork")) as pool:
        whole = {name: pool.submit(make_video, scratch / f"{h}.mp4", h, w) for name, (h, w) in SIZES.items()}
        kinds = {name: pool.submit(make, scratch / f"kind_{n}") for n, (name, make) in enumerate(KINDS.items())}
        videos = {name: job.result() for name, job in whole.items()}
        odd = {name: job.result() for name, job in kinds.items()}
        device = torch.device(args.device, 0) if args.device == "cuda" else torch.device(args.device)
        found |= about(device) | {"encoding_s": round(time.monotonic() - BEGAN, 1)}
        print(json.dumps({k: v for k, v in found.items() if v}), flush=True)
        print("\n| picture against PyAV's | as stored: mean, 99.9 %, most | scaled | decoded by |\n|---|---|---|---|")
        for name, path in {**{f"H.264 {n}": p for n, p in videos.items()}, **odd}.items():
            note("frames", compare(name, path, device))
        print("\n| size | stride | by | frames used/s | frames decoded/s | s |\n|---|---|---|---|---|---|")
        for stride in STRIDES:
            for name, path in videos.items():
                rows = [(f"{n} threads", partial(by_device, path, stride, n, device, args.each)) for n in THREADS]
                rows += [(f"{n} processes", partial(by_processes, path, stride, n, pool, args.each)) for n in WORKERS]
                for by, action in rows:
                    if time.monotonic() - BEGAN > args.seconds:
                        note("cut", [name, stride, by])
                    else:
                        note("speed", speed_row(name, stride, by, action))
        print(f"\n{len(found['cut'])} rows cut; {time.monotonic() - BEGAN:.0f} s in all", flush=True)
    wrong = [row["name"] for row in found["frames"] if not row["ok"]]
    if wrong:
        raise SystemExit(f"differs by more than {TOLERANCE} in the mean, or was not decoded by the device: {wrong}")


def about(device: torch.device) -> dict[str, Any]:
    """Say what is measured on."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"versions": versions("torch", "av", "torchcodec"), "gpu": gpu, "cores": len(os.sched_getaffinity(0))}


# -- videos -----------------------------------------------------------------------------------------------------------


def pictures(height: int, width: int, number: int) -> Iterator[NDArray[np.uint8]]:
    """Waves of colour and a texture that move, and a box that moves the other way."""
    rng = np.random.default_rng(0)
    texture = np.kron(rng.integers(-25, 25, (height // 4 + 1, width // 2 + 1)), np.ones((4, 4)))[:height, : 2 * width]
    y, x = np.mgrid[:height, : 2 * width].astype(np.float32)
    waves = np.stack([110 + 70 * np.sin(x / a) * np.cos(y / b) for a, b in ((37, 23), (61, 41), (53, 31))], 2)
    canvas = (waves + texture[..., None]).clip(0, 255).astype(np.uint8)
    for n in range(number):
        at, box = 3 * n % width, 5 * n % (width - height // 4)
        out = canvas[:, at : at + width].copy()
        out[height // 2 : height // 2 + height // 4, width - height // 4 - box : width - box] = (200, 40, 90)
        yield out


def make_video(
    path: Path, height: int, width: int, frames: int = 320, codec: str = "libx264", colour: int = 2, **how: Any
) -> Path:
    """Write a video with B-frames; `times`: milliseconds of a picture, `turn`: degrees it is turned by."""
    av = import_av()
    times, turn = how.pop("times", None), how.pop("turn", 0)
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=RATE)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.gop_size, context.max_b_frames, context.thread_count = GOP, 2, 4
        log = {"libx264": "x264-params", "libx265": "x265-params"}[codec]
        context.options = {"preset": "veryfast", "crf": "20", log: "log-level=none" + how.pop("params", "")}
        context.time_base = Fraction(1, 1000 if times is not None else RATE)
        context.colorspace = colour
        if turn:
            stream.set_display_rotation(turn)
        for n, pixels in enumerate(pictures(height, width, frames)):
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24").reformat(format="yuv420p", dst_colorspace=colour)
            frame.pts, frame.time_base = n if times is None else int(times[n]), context.time_base
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def copied(path: Path, first: float = 0.7) -> Path:
    """The packets of a video from the keyframe before `first` seconds on, which an edit list hides up to there."""
    av = import_av()
    source = make_video(path.with_suffix(".whole.mp4"), 360, 640, 150)
    with av.open(str(source)) as whole, av.open(str(path), "w") as out:
        kept = out.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            if packet.dts is not None:
                by = round(first / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - by, packet.dts - by, kept
                out.mux(packet)
    return path


def uneven() -> NDArray[np.int64]:
    """Milliseconds at which pictures of a variable rate are shown."""
    return np.cumsum(np.random.default_rng(1).integers(10, 200, 150))


def _kind(path: Path, **how: Any) -> Path:
    return make_video(path.with_suffix(".mp4"), 360, 640, 150, **how)


def _edit_list(path: Path) -> Path:
    return copied(path.with_suffix(".mp4"))


KINDS: dict[str, Callable[[Path], Path]] = {
    "variable rate": partial(_kind, times=uneven()),
    "edit list": _edit_list,
    "open group": partial(_kind, params=":open-gop=1:bframes=3"),
    "BT.709": partial(_kind, colour=1),
    "turned": partial(_kind, turn=90),
    "HEVC": partial(_kind, codec="libx265", params=":keyint=48"),
}


# -- the same frames --------------------------------------------------------------------------------------------------


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> list[float]:
    """The mean, the 99.9 percentile and the largest of the differences."""
    found = torch.bincount((ours.int() - theirs.int()).abs().flatten(), minlength=256).double()
    share = found.cumsum(0) / found.sum()
    mean = float((found * torch.arange(256)).sum() / found.sum())
    return [round(mean, 3), int((share < 0.999).sum()), int(found.nonzero().max())]


def compare(name: str, path: Path, device: torch.device) -> dict[str, Any]:
    """Decode some frames in both ways, as stored and scaled."""
    number = len(frame_table(path).pts)
    wanted = np.r_[np.arange(0, number, 17), number - 1, np.arange(40, 60)]
    row: dict[str, Any] = {"name": name, "frames": len(wanted), "by": "the device", "ok": True}
    for which, side in (("stored", None), ("scaled", SIDE)):
        asked = ask(str(path), wanted, lambda height, width, side=side: fitted(height, width, side))  # type: ignore[misc]
        if isinstance(asked, str):
            row |= {"by": f"PyAV: {asked}", "ok": False}
            break
        size, square = asked.size, min(asked.size)
        clip, why = decode_asked(asked._replace(side=square), device)
        top, left = (size[0] - square) // 2, (size[1] - square) // 2
        theirs = decode(path, wanted, size=side)[:, :, top : top + square, left : left + square]
        row[which] = apart(clip.frames.cpu(), theirs)
        row["by"] = why or row["by"]
        row["ok"] = row["ok"] and why is None and row[which][0] <= TOLERANCE
    mark = "" if row["ok"] else " **differs**"
    print(f"| {name} | {row.get('stored')} | {row.get('scaled')} | {row['by']}{mark} |", flush=True)
    return row


# -- how many frames --------------------------------------------------------------------------------------------------


def clips(path: Path, stride: int) -> list[NDArray[np.int64]]:
    """Windows of 256 frames of a video, of which every `stride`th is used."""
    number = len(frame_table(path).pts)
    return [np.arange(first, first + 256, stride) for first in range(0, number - 255, 8)]


def asked_for(path: Path, stride: int) -> list[Asked]:
    """What the processes that load data ask for, with AdaTAD's crop."""
    config, asked = AugmentConfig(), []
    for seed, window in enumerate(clips(path, stride)):
        one = ask(str(path), window, lambda height, width: fitted(height, width, config.short_side))
        assert isinstance(one, Asked)
        drawn = draw_augmentation(config, *one.size, torch.Generator().manual_seed(seed))
        asked.append(one._replace(drawn=drawn, side=SIDE))
    return asked


def by_device(path: Path, stride: int, threads: int, device: torch.device, seconds: float) -> dict[str, Any]:
    """Count the clips that come for some seconds, once every thread has given one."""
    every = asked_for(path, stride)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    came, told = 0, set()
    begin = last = time.monotonic()
    going = decoded_ahead(([{"inputs": [one], "meta": [{"problems": []}]}] for one in cycle(every)), device, threads)
    for n, (batch,) in enumerate(going):
        last = time.monotonic()
        told |= set(batch["meta"][0]["problems"])
        if n < threads:
            begin = last
            continue
        came += len(batch["inputs"][0].frames)
        if last - begin > seconds:
            break
    going.close()
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    row = {"used": came / (last - begin), "s": last - begin, "peak_GiB": round(memory, 2)}
    return row | ({"told": sorted(told)} if told else {})


def one_process(path: Path, stride: int, seconds: float, seed: int) -> tuple[int, float]:
    """Decode clips and cut them as a loader's process does; frames and seconds."""
    config = AugmentConfig()
    windows, came, begin = clips(path, stride), 0, time.monotonic()
    while time.monotonic() - begin < seconds:
        frames = decode(path, windows[seed % len(windows)], size=config.short_side)
        drawn = draw_augmentation(config, *frames.shape[2:], torch.Generator().manual_seed(seed))
        came, seed = came + len(cut_out(frames, drawn).frames), seed + 1
    return came, time.monotonic() - begin


def by_processes(path: Path, stride: int, workers: int, pool: ProcessPoolExecutor, seconds: float) -> dict[str, Any]:
    """Decode in several processes at a time."""
    jobs = [pool.submit(one_process, path, stride, seconds, n) for n in range(workers)]
    done = [job.result() for job in jobs]
    return {"used": sum(frames / took for frames, took in done), "s": max(took for _, took in done)}


def speed_row(name: str, stride: int, by: str, action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Measure and print one row; a failure is a row too, and the rest goes on."""
    try:
        found = action()
    except (TensorkeepError, RuntimeError, AssertionError) as error:
        found = {"failed": str(error).splitlines()[0]}
        print(f"| {name} | {stride} | {by} | failed: {found['failed']} | | |", flush=True)
        return {"size": name, "stride": stride, "by": by, **found}
    row = {"size": name, "stride": stride, "by": by, **found, "decoded": found["used"] * stride}
    told = f" (told: {row['told']})" if row.get("told") else ""
    print(
        f"| {name} | {stride} | {by} | {row['used']:,.0f} | {row['decoded']:,.0f} | {row['s']:.1f}{told} |", flush=True
    )
    return row


if __name__ == "__main__":
    main()
