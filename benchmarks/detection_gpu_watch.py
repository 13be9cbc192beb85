"""Tools of `detection_gpu_parts`: the recipe and figures of a part, a loop that is watched, runs that are compared."""

from __future__ import annotations

import json
import os
import signal
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensorkeep.detection.data.clips import most_segments
from tensorkeep.detection.recipe.schema import DetectionRecipe
from tensorkeep.detection.recipe.text import read_recipe
from tensorkeep.output import Output
from tensorkeep.training import loop as train
from tensorkeep.training import saver as checkpoint
from tensorkeep.training.job import Job, Loop

RECIPE = "videomae_s_thumos_qlora"
LIGHT = [("data.augment.operations", "0"), ("data.augment.jitter", "[0, 0, 0, 0]"), ("data.feature_stride", "1")]
TINY = [
    (
        "model.backbone.vit",
        "{image_size: 32, patch_size: 16, embed_dim: 32, depth: 2, heads: 2, mlp_dim: 64, chunk_frames: 16, "
        "tubelet: 2, drop_path: 0.1}",
    ),
    ("model.projection.in_channels", "32"),
    ("model.projection.channels", "32"),
    ("model.head.channels", "32"),
    ("window_size", "64"),
    ("crop_size", "32"),
    ("data.augment.short_side", "40"),
    ("data.feature_stride", "2"),
]


@dataclass
class Bench:
    """Where a part works: the folder of its figures, that of its videos and runs, whether everything is small."""

    name: str
    out: Path
    scratch: Path
    tiny: bool
    found: dict[str, Any] = field(default_factory=dict)
    quiet: bool = False

    def tell(self, **figures: Any) -> None:
        """Say figures, and write all that there are so far."""
        if self.quiet:
            return
        for key, value in figures.items():
            self.found[key] = value
            print(f"{key}: {json.dumps(value)[:400]}", flush=True)
        path = self.out / f"{self.name}.json"
        path.with_suffix(".new").write_text(json.dumps(self.found, indent=1) + "\n")
        path.with_suffix(".new").replace(path)

    def attempt(self, work: Callable[[], None]) -> None:
        """Do it; what goes wrong is a figure too, and the rest goes on."""
        try:
            work()
        except Exception:  # noqa: BLE001  one fault must not take the other figures along
            traceback.print_exc()
            self.tell(**{f"{getattr(work, '__name__', 'work')} failed": traceback.format_exc(limit=-6)})
            if torch.distributed.is_initialized():
                os._exit(3)  # the other process waits for this one: nothing can follow

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.tiny else "cuda:0")

    def recipe(self, *changes: tuple[str, str], name: str = RECIPE) -> DetectionRecipe:
        """ViT-S + QLoRA, or another recipe of ours, with random weights, on the synthetic videos."""
        data = self.scratch / "data"
        moved = [(f"data.{part}.annotations", str(data / "annotations.json")) for part in ("train", "test")]
        moved += [(f"data.{part}.folder", str(data / "videos")) for part in ("train", "test")]
        moved += [
            ("data.class_map", str(data / "category_idx.txt")),
            ("model.head.classes", "3"),
            ("training.pretrained", "null"),
            ("training.workers", "2" if self.tiny else "4"),
        ]
        return read_recipe(name, [*moved, *(TINY if self.tiny else []), *changes])

    def steps(self, many: int, few: int = 6) -> int:
        return few if self.tiny else many


class Held:
    """Random frames in memory, in the shape of samples: what a step costs where nothing is decoded."""

    def __init__(self, job: Job, made: DetectionRecipe, count: int = 8) -> None:
        length, side = made.data.window_size, made.data.crop_size
        most = most_segments(job.data)  # type: ignore[arg-type]
        self.length = len(job.data)
        generator = torch.Generator().manual_seed(0)
        self.samples = []
        for number in range(count):
            pixels = torch.randint(0, 256, (3, length, side, side), dtype=torch.uint8, generator=generator)
            starts = torch.rand(min(3 + number % 5, most), generator=generator) * length * 0.8
            spans = 2 + torch.rand(len(starts), generator=generator) * length * 0.15
            labels = torch.randint(0, made.model.head.classes, (len(starts),), generator=generator)
            self.samples.append(
                {
                    "inputs": pixels,
                    "mask": torch.ones(length, dtype=torch.bool),
                    "labels": labels,
                    "segments": torch.stack([starts, starts + spans], -1),
                }
            )

    def __len__(self) -> int:
        return self.length

    def sample(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        return {**self.samples[index % len(self.samples)], "meta": {"video": f"{index}"}}

    def fingerprint(self) -> str:
        return "held"


# -- watching ---------------------------------------------------------------------------------------------------------


@dataclass
class Watch:
    """Looks on while `fit` trains: when each update began and ended (on the device), its loss, waits and saves."""

    device: torch.device
    stop_after: float | None = None  # seconds; then the run is asked to save and leave
    each: Callable[[int], None] = lambda _: None
    marks: list[tuple[Any, Any]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    saves: list[float] = field(default_factory=list)
    savers: list[Any] = field(default_factory=list)

    def __enter__(self) -> Watch:
        self.began = time.monotonic()
        self.kept = train.update, train.batches, train._save, train.Saver
        train.update, train.batches, train._save, train.Saver = self._update, self._batches, self._save, self._saver  # type: ignore[assignment,misc]
        return self

    def __exit__(self, *_: object) -> None:
        train.update, train.batches, train._save, train.Saver = self.kept  # type: ignore[misc]

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _update(self, run: Any, model: Any, parts: Any, wish: Any) -> Any:
        self.host.append(time.perf_counter())
        begin = self._mark()
        made = self.kept[0](run, model, parts, wish)
        if made is not None:
            self.marks.append((begin, self._mark()))
            self.losses.append(made.losses["loss"].detach().clone())
            self.each(len(self.marks))
        if self.stop_after is not None and time.monotonic() - self.began > self.stop_after:
            wish.signal = signal.SIGTERM
        return made

    def _batches(self, *args: Any, **kwargs: Any) -> Iterator[list[Any]]:
        source = self.kept[1](*args, **kwargs)
        while True:
            begin = time.perf_counter()
            try:
                part = next(source)
            except StopIteration:
                return
            self.waits.append(time.perf_counter() - begin)
            yield part

    def _save(self, run: Any) -> None:
        begin = time.perf_counter()
        self.kept[2](run)
        self.saves.append(time.perf_counter() - begin)

    def _saver(self, *args: Any, **kwargs: Any) -> Any:
        self.savers.append(self.kept[3](*args, **kwargs))
        return self.savers[-1]

    def _between(self, one: Any, other: Any) -> float:
        return float(other - one if isinstance(one, float) else one.elapsed_time(other) / 1e3)

    def figures(self, skip: int) -> dict[str, Any]:
        """Summarise the updates after the first `skip`; `working_share`: the device's time inside updates over all."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        skip = min(skip, len(self.marks) // 2)
        marks = self.marks[skip:]
        inside = [self._between(*mark) for mark in marks]
        whole = self._between(marks[0][0], marks[-1][1])
        late = marks[
            len(marks) // 2 :
        ]  # what was fetched ahead while the first update was made ready is used up by then
        late_whole = self._between(late[0][0], late[-1][1])
        losses = [float(x) for x in self.losses]
        return {
            "updates": len(self.marks),
            "measured": len(marks),
            "seconds_an_update": whole / len(marks),
            "median_of_an_update": statistics.median(inside),
            "working_share": sum(inside) / whole,
            "late": {
                "updates": len(late),
                "seconds_an_update": late_whole / len(late),
                "working_share": sum(inside[len(marks) // 2 :]) / late_whole,
            },
            "waited_for_batches": sum(self.waits[skip : len(self.marks)]),
            "longest_wait": max(self.waits[skip:]),
            "first_batch": self.waits[0],
            "finite": all(map(torch.isfinite, self.losses)),
            "losses": [round(x, 4) for x in losses[:: max(1, len(losses) // 15)]],
            "mean_first_20": statistics.fmean(losses[:20]),
            "mean_last_20": statistics.fmean(losses[-20:]),
            "saves": [round(x, 4) for x in self.saves],
            "stalls_of_saver": [round(x, 4) for saver in self.savers for x in saver.stalls],
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0,
        }


class Utilisation:
    """The driver's word for how busy the GPU is, asked every 100 ms: a cross-check, since it rounds up."""

    def __init__(self) -> None:
        self.percents: list[int] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def __enter__(self) -> Utilisation:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(timeout=2)

    def _ask(self) -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
            place = pynvml.nvmlDeviceGetHandleByIndex(int(os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]))
            while not self._over.wait(0.1):
                self.percents.append(int(pynvml.nvmlDeviceGetUtilizationRates(place).gpu))
        except Exception as error:  # noqa: BLE001  a cross-check that is not there
            print(f"no utilisation: {error}", flush=True)

    def mean(self, part: float) -> float | None:
        """Mean per cent of the last `part` of the samples."""
        late = self.percents[int(len(self.percents) * (1 - part)) :]
        return statistics.fmean(late) if late else None


def plain(job: Job) -> Job:
    """The job, without its evaluation."""
    return replace(job, evaluate=None)


def short(loop: Loop, updates: int, **changes: Any) -> Loop:
    return replace(
        loop,
        **{"updates": updates, "best": None, "evaluate_every": None, "save_every": None, "log_every": 10, **changes},
    )


def loud() -> Output:
    return Output(quiet=False)


def same(one: Path, other: Path) -> bool | None:
    """Whether weights, moments, average and random states of two runs' newest checkpoints are equal to the bit."""
    a, b = checkpoint.newest(one), checkpoint.newest(other)
    if a is None or b is None:
        return None
    parts = [(getattr(a[0], part), getattr(b[0], part)) for part in ("model", "optimizer", "ema")]
    equal = all(x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x) for x, y in parts)
    return equal and a[0].document["rng"] == b[0].document["rng"] and a[0].document["step"] == b[0].document["step"]


def apart(one: Path, other: Path) -> float:
    """Relative L2 distance of two runs' newest weights."""
    a, b = (checkpoint.newest(run) for run in (one, other))
    assert a is not None and b is not None and a[0].model.keys() == b[0].model.keys()
    x, y = (torch.cat([t.double().flatten() for _, t in sorted(f[0].model.items())]) for f in (a, b))
    return float((x - y).norm() / x.norm())
