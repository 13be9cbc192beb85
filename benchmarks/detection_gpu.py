"""What detection training does on a machine with two GPUs, in one run of five minutes.

    python -m benchmarks.detection_gpu --out figures                two GPUs, 32 cores; about 300 s
    python -m benchmarks.detection_gpu --out figures --tiny         a check of the script, on any machine

Synthetic videos are drawn first. Then, each in processes of its own and with a time limit of its own:

- `busy` (first GPU): ViT-S + QLoRA by `train.fit` on decoded mp4 files, 768 frames of 160 x 160, batch 2: share of the
  time the GPU works, waits for decoding, what a checkpoint stalls, every loss.
- `cached` (first GPU, where asked for): the same with `data.cache`: its first epochs fill it, the later updates count;
  frames a second of one process that decodes, and of one that reads what was kept.
- `resume` (second GPU, beside it): deterministic kernels, killed by SIGKILL and resumed by the same call, to the bit;
  what they cost; a CUDA graph against launches.
- `scaling` (both, NCCL): frames a second of two processes against one; the same updates from the same global batches.
- `sharded` (both, NCCL): VideoMAEv2-g with adapters under FSDP2 against one GPU, and gone on with by one.
- `language` (both, NCCL): a tiny language model under DDP and FSDP2, saved and resumed, also on another number of
  processes.

Each part writes OUT/PART.json after every figure, so that a cut loses only the rest; OUT/summary.md is made at the end,
OUT/log.txt on the way. The parts themselves are in `detection_gpu_parts`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from tensorkeep.detection.data.synthetic import SyntheticConfig, make_video, write_video

PARTS = ("busy", "resume", "cached", "scaling", "sharded", "language")
LIMITS = {
    "busy": 120.0,
    "cached": 90.0,
    "resume": 150.0,
    "scaling": 260.0,
    "sharded": 150.0,
    "language": 60.0,
}  # seconds from its turn on
BEGAN = time.monotonic()
CLASSES = ("blink", "slide", "spin")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=420, help="for everything; what is not done by then is cut")
    parser.add_argument("--parts", nargs="+", default=[p for p in PARTS if p != "cached"], choices=PARTS)
    parser.add_argument("--tiny", action="store_true", help="small models on the CPU, two processes through gloo")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, (args.out / "log.txt").open("a") as log:
        bench = Bench(args, Path(scratch), log)
        try:
            bench.start()
            bench.make_videos()
            bench.together([n for n in ("busy", "resume") if n in args.parts])
            for name in ("cached", "scaling", "sharded", "language"):
                bench.together([name] if name in args.parts else [])
        finally:
            bench.stop()
            summary = summarised(args.out)
            (args.out / "summary.md").write_text(summary)
            print(summary, flush=True)
            bench.say("main", "done")


class Bench:
    """The parts, run as processes until the time is up; what they say goes to the screen and the log.

    All of them start at once, since importing takes seconds, and wait for their turn: the file SCRATCH/go-PART.
    """

    def __init__(self, args: argparse.Namespace, scratch: Path, log: Any) -> None:
        self.args, self.scratch, self.log = args, scratch, log
        self.processes: dict[str, list[subprocess.Popen[str]]] = {}

    def say(self, name: str, line: str) -> None:
        text = f"[{time.monotonic() - BEGAN:6.1f} {name}] {line.rstrip()}"
        print(text, flush=True)
        self.log.write(text + "\n")
        self.log.flush()

    def start(self) -> None:
        for name in PARTS:
            if name in self.args.parts:
                several = name in ("scaling", "sharded", "language")
                shown = {} if several else {"CUDA_VISIBLE_DEVICES": "1" if name == "resume" else "0"}
                world = _world(2) if several else [{}]
                self.processes[name] = [self._started(name, {**shown, **rank}) for rank in world]

    def make_videos(self) -> None:
        """Training videos, one a core, and short ones to evaluate on; drawn small, each pixel shown as four."""
        tiny = self.args.tiny
        cores = os.cpu_count() or 2
        jobs = [("training", n, tiny) for n in range(4 if tiny else max(8, min(cores - 2, 32)))]
        jobs += [("validation", n, tiny) for n in range(2)]
        folder = self.scratch / "data" / "videos"
        folder.mkdir(parents=True)
        with ProcessPoolExecutor(2 if tiny else cores) as pool:
            made = dict(pool.map(_video, jobs, [str(folder)] * len(jobs)))
        (folder.parent / "annotations.json").write_text(json.dumps({"database": made}))
        (folder.parent / "category_idx.txt").write_text("\n".join(CLASSES) + "\n")
        size = sum(p.stat().st_size for p in folder.iterdir()) / 1e6
        self.say("main", f"{len(made)} videos of {max(v['frame'] for v in made.values())} frames, {size:.0f} MB")

    def together(self, names: list[str]) -> None:
        """Let these parts begin; come back when all of them have ended or their time is up."""
        for name in names:
            (self.scratch / f"go-{name}").touch()
        began = time.monotonic()
        running = {name: self.processes[name] for name in names}
        while running:
            time.sleep(0.05)
            for name, ranks in list(running.items()):
                codes = [process.poll() for process in ranks]
                limit = min(began + LIMITS[name] * (4 if self.args.tiny else 1), BEGAN + self.args.seconds)
                if None not in codes:
                    self.say("main", f"{name} ended with {codes}")
                elif any(codes) or time.monotonic() > limit:  # one that fell leaves the other waiting for it
                    time.sleep(2.0 if any(codes) else 0.0)
                    self.say("main", f"{name} is cut: {'a process fell' if any(codes) else 'its time is up'}")
                    end(ranks)
                else:
                    continue
                del running[name]

    def stop(self) -> None:
        for ranks in self.processes.values():
            end(ranks)

    def _started(self, name: str, environment: dict[str, str]) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "benchmarks.detection_gpu_parts", name, str(self.args.out), str(self.scratch)]
        threads = "1" if self.args.tiny else "4"
        process = subprocess.Popen(
            command + (["--tiny"] if self.args.tiny else []),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={
                **os.environ,
                "PYTHONUNBUFFERED": "1",
                "OMP_NUM_THREADS": threads,
                "HF_HUB_OFFLINE": "1",
                **environment,
            },
        )
        threading.Thread(target=self._listen, args=(name, process), daemon=True).start()
        return process

    def _listen(self, name: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.say(name, line)


def end(processes: list[subprocess.Popen[str]]) -> None:
    """Kill those that still run, each with the group that it was started as."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _world(size: int) -> list[dict[str, str]]:
    """What torchrun would tell each process; sockets on this machine alone."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    return [{**place, "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(size)} for r in range(size)]


def _video(job: tuple[str, int, bool], folder: str) -> tuple[str, dict[str, Any]]:
    """One video, and what the annotations say of it: 30 frames a second, 192 x 192 (tiny: 64 x 64)."""
    subset, number, tiny = job
    long = subset == "training"
    seconds = (9.0, 10.0) if tiny else (106.0, 112.0) if long else (52.0, 56.0)
    actions = (2, 3) if tiny else (10, 16)
    config = SyntheticConfig(CLASSES, 32 if tiny else 96, 30, seconds, actions, (2.0, 6.0))
    frames, happens = make_video(config, np.random.default_rng([number, long]))
    name = f"{subset}_{number:04d}"
    write_video(Path(folder) / f"{name}.mp4", (f.repeat(2, 0).repeat(2, 1) for f in frames), config.fps)
    told = [{"segment": [a.start, a.end], "label": a.label} for a in happens]
    return name, {"subset": subset, "duration": len(frames) / 30, "frame": len(frames), "annotations": told}


def summarised(out: Path) -> str:
    """Every figure of every part as a list."""
    lines = []
    for name in PARTS:
        path = out / f"{name}.json"
        lines.append(f"## {name}\n")
        found = json.loads(path.read_text()) if path.exists() else {"error": "nothing came back"}
        lines += [f"- {key}: {json.dumps(value)}" for key, value in found.items()] + [""]
    return "\n".join(lines)


if __name__ == "__main__":
    assert shutil.disk_usage(tempfile.gettempdir()).free > 4e9, (
        "the videos and checkpoints need 4 GB of temporary space"
    )
    main()
