"""Run one part of `detection_gpu` in its own process: `python -m benchmarks.detection_gpu_parts PART OUT SCRATCH`."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.detection_gpu_watch import LIGHT, Bench, Held, Utilisation, Watch, apart, loud, plain, same, short
from tensorkeep.detection.data.clips import kept_parts
from tensorkeep.detection.data.frame_cache import describe, open_cache
from tensorkeep.detection.job import build
from tensorkeep.detection.recipe.schema import DetectionRecipe
from tensorkeep.detection.recipe_data import read_classes, read_clips
from tensorkeep.errors import TensorkeepError
from tensorkeep.training import distributed, metrics
from tensorkeep.training import loop as train
from tensorkeep.training import saver as checkpoint
from tensorkeep.training.distributed import World
from tensorkeep.training.job import Job
from tensorkeep.training.loop import fit

CORES = 8  # processes that decode for one GPU

# -- busy -------------------------------------------------------------------------------------------------------------


def busy(bench: Bench) -> None:
    """How busy one GPU is with decoded video."""
    shm = shutil.disk_usage("/dev/shm").free / 2**30
    sample = 2 * 3 * 768 * 160 * 160 / 2**30
    cores = os.cpu_count() or 2
    workers = 2 if bench.tiny else int(max(4, min(cores - 5, CORES, 0.7 * shm / (4 * sample))))
    bench.tell(shm_free_gib=round(shm, 1), workers=workers, cores=cores, torch=torch.__version__)
    if not bench.tiny:
        bench.tell(gpu=torch.cuda.get_device_name())

    def run(name: str, changes: list[tuple[str, str]], updates: int, seconds: float, graph: bool | None = None) -> None:
        made = bench.recipe(*changes, ("training.workers", str(workers)), ("training.graph", json.dumps(graph)))
        place = bench.scratch / "busy" / f"{name}-{graph}"
        world = World(device=bench.device)
        job, loop = build(made, place, world, print)
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with Utilisation() as driver, Watch(bench.device, seconds) as watch:
            fit(plain(job), place, short(loop, updates, save_every=max(2, updates // 6)), world=world, say=loud())
        skip = min(20, len(watch.marks) // 3)
        found = watch.figures(skip)
        found |= {"graph": graph, "driver_percent": driver.mean(0.7), "changes": [f"{k} {v}" for k, v in changes]}
        frames = made.data.window_size * made.data.scale_factor * loop.batch
        bench.tell(**{name: found | {"frames_a_second": frames / found["seconds_an_update"]}})

    def full() -> None:  # the recipe as it is: every 4th frame, AdaTAD's whole augmentation
        run_or_eager("full", [], bench.steps(320, 9), 45)

    def light() -> None:  # every frame, crop and flip alone: what fewer cores can feed
        run_or_eager("light", [] if bench.tiny else LIGHT, bench.steps(160, 9), 18)

    def run_or_eager(name: str, changes: list[tuple[str, str]], updates: int, seconds: float) -> None:
        try:
            run(name, changes, updates, seconds)
        except TensorkeepError as error:
            bench.tell(**{f"{name}_graph_error": error.line, f"{name}_cause": repr(error.__cause__)})
            run(name, changes, updates, seconds, graph=False)

    bench.attempt(full)
    bench.attempt(light)


# -- cached -----------------------------------------------------------------------------------------------------------


def cached(bench: Bench) -> None:
    """How busy one GPU is once the frames of decoded video are kept in `data.cache`."""
    folder = bench.scratch / "cache"
    workers = 2 if bench.tiny else int(min(max(2, (os.cpu_count() or 2) - 5), CORES))
    bench.tell(workers=workers, cores=os.cpu_count(), torch=torch.__version__, disk=_disk(bench.scratch))
    changes = [("data.cache", str(folder)), ("data.cache_gib", "16"), ("training.workers", str(workers))]
    said: list[str] = []

    def busy_after_the_first_epochs() -> None:
        made, place, world = bench.recipe(*changes), bench.scratch / "cached", World(device=bench.device)
        job, loop = build(made, place, world, said.append)
        epoch = len(job.data) / loop.batch  # updates
        updates = bench.steps(int(12 * epoch) + 420, int(6 * epoch))
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with Utilisation() as driver, Watch(bench.device, 55) as watch:
            fit(plain(job), place, short(loop, updates, save_every=max(2, updates // 6)), world=world, say=loud())
        fills = int(
            (2 if bench.tiny else 6) * epoch
        )  # windows are drawn: what one epoch shows is not all that there is
        found = watch.figures(fills) | {"skipped": fills, "epoch": epoch, "driver_percent": driver.mean(0.5)}
        frames = made.data.window_size * made.data.scale_factor * loop.batch
        first = watch.host[: max(2, int(epoch))]
        found |= {"first_epoch_seconds_an_update": (first[-1] - first[0]) / (len(first) - 1)}
        bench.tell(cached=found | {"frames_a_second": frames / found["seconds_an_update"]})

    def one_process() -> None:
        plainly = bench.recipe()
        made = read_clips(plainly, "train", read_classes(plainly))
        for name, kept in (("decodes", None), ("reads", open_cache(folder, 16))):
            data = replace(made, uncut=True, kept=kept)
            began, frames, k = time.perf_counter(), 0, 0
            while k < len(data) and time.perf_counter() - began < 3:
                frames += len(data.sample(k, torch.Generator().manual_seed(k))["inputs"].frames)
                k += 1
            bench.tell(**{f"one_process_{name}": round(frames / (time.perf_counter() - began))})
        bench.tell(kept=describe(open_cache(folder, 16), kept_parts(made)))

    bench.attempt(busy_after_the_first_epochs)
    bench.tell(said=[line for line in said if "cache" in line])
    bench.attempt(one_process)


def _disk(place: Path) -> str:
    """Where the cache lies: file system and free space."""
    kind = subprocess.run(["stat", "-f", "-c", "%T", str(place)], capture_output=True, text=True).stdout.strip()
    return f"{kind}, {shutil.disk_usage(place).free / 2**30:.0f} GiB free"


# -- resume -----------------------------------------------------------------------------------------------------------

EXACT = [("training.deterministic", "true"), ("schedule.warmup", "0"), *LIGHT]


def exact_run(bench: Bench, place: Path, die_at: int | None = None) -> train.Outcome:
    """24 updates on decoded video with deterministic kernels, from the newest checkpoint; dies by SIGKILL."""
    made = bench.recipe(*EXACT, ("training.workers", "2" if bench.tiny else "6"))
    world = World(device=bench.device)
    job, loop = build(made, place, world)
    calls = 0

    def count(batch: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return job.count(batch)

    return fit(
        replace(plain(job), count=count), place, short(loop, 24, save_every=8, log_every=1), world=world, say=loud()
    )


def killed(bench: Bench) -> None:
    """The process that dies."""
    exact_run(bench, bench.scratch / "resume" / "broken", die_at=21)


def resume(bench: Bench) -> None:
    """Exact resume on one GPU, and what deterministic kernels and graphs cost and give."""
    folder = bench.scratch / "resume"

    def gone_on() -> None:
        dies = [sys.executable, "-m", "benchmarks.detection_gpu_parts", "killed", str(bench.out), str(bench.scratch)]
        child = subprocess.Popen([*dies, *(["--tiny"] if bench.tiny else [])])  # beside the run that nobody touches
        exact_run(bench, folder / "whole")
        bench.tell(killed_by=child.wait(60), checkpoints_left=checkpoint.steps(folder / "broken"))
        outcome = exact_run(bench, folder / "broken")
        bench.tell(level=outcome.level, step=outcome.step)
        bench.tell(decoded_run_bitwise=same(folder / "broken", folder / "whole"))

    bench.attempt(gone_on)
    losses: dict[str, list[Tensor]] = {}

    def timed(name: str, updates: int, place: Path, **loop_changes: Any) -> None:
        graph = json.dumps(bool(loop_changes.get("graph")))
        changes = [("training.workers", "2"), ("training.graph", graph), ("schedule.warmup", "0")]
        made = bench.recipe(*changes)
        world = World(device=bench.device)
        job, loop = build(made, place, world)
        job = replace(plain(job), data=held(job, made))
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with Watch(bench.device) as watch:
            fit(job, place, short(loop, updates, **loop_changes), world=world, allow=("updates",))
        losses.setdefault(name, []).extend(watch.losses)
        if name not in bench.found:
            found = watch.figures(min(10, updates // 2))
            bench.tell(**{name: {k: found[k] for k in ("seconds_an_update", "median_of_an_update", "peak_gib")}})

    cache: list[Held] = []

    def held(job: Job, made: DetectionRecipe) -> Held:
        if not cache:
            cache.append(Held(job, made))
        return cache[0]

    many = bench.steps(26, 6)
    ways = {
        "eager": {},
        "eager_again": {},
        "eager_deterministic": {"deterministic": True},
        "graph": {"graph": True},
        "graph_deterministic": {"graph": True, "deterministic": True},
    }

    def ways_of_a_step() -> None:
        for name, changes in ways.items():
            bench.attempt(lambda name=name, changes=changes: timed(name, many, folder / name, **changes))
        for one, other in (
            ("eager", "graph"),
            ("eager_deterministic", "graph_deterministic"),
            ("eager", "eager_again"),
        ):
            if one in losses and other in losses:
                a, b = (torch.stack(losses[n]).double().cpu() for n in (one, other))
                away = float(((a - b).abs() / a.abs()).max()) if len(a) == len(b) else None
                bench.tell(
                    **{
                        f"{one}_against_{other}": {
                            "losses_bitwise": bool(torch.equal(a, b)),
                            "largest_relative_difference": away,
                            "state_bitwise": same(folder / one, folder / other),
                            "weights": apart(folder / one, folder / other),
                        }
                    }
                )

    def graph_gone_on() -> None:
        way = ways["graph_deterministic"]
        timed("graph_first_half", many // 2, folder / "graph_halves", **way)
        timed("graph_second_half", many, folder / "graph_halves", **way)
        bench.tell(graph_resumed_bitwise=same(folder / "graph_halves", folder / "graph_deterministic"))

    def kernels() -> None:  # last: a profiler may fail, or change what comes after
        if bench.device.type != "cuda":
            return
        for name, changes in (("eager", {}), ("graph", {"graph": True})):
            bench.tell(**{f"{name}_kernels": kernel_share(bench, folder / f"profiled-{name}", held, changes)})

    bench.attempt(ways_of_a_step)
    bench.attempt(graph_gone_on)
    bench.attempt(kernels)


def kernel_share(bench: Bench, place: Path, held: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """Of five updates on held data: the share of the time in which some kernel or copy ran on the device."""
    from torch.profiler import ProfilerActivity, profile

    made = bench.recipe(("training.workers", "2"), ("training.graph", json.dumps(bool(changes))))
    world = World(device=bench.device)
    job, loop = build(made, place, world)
    profiler = profile(activities=[ProfilerActivity.CUDA])
    clock: list[float] = []

    def each(update: int) -> None:
        if update in (10, 15):
            torch.cuda.synchronize()
            clock.append(time.perf_counter())
            profiler.start() if update == 10 else profiler.stop()

    with Watch(bench.device, each=each):
        fit(replace(plain(job), data=held(job, made)), place, short(loop, 16, **changes), world=world)
    spans, copies = [], 0.0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if "CUDA" in str(event.device_type()):
            spans.append((event.start_ns(), event.start_ns() + event.duration_ns()))
            copies += event.duration_ns() / 1e9 if "HtoD" in event.name() else 0.0
    spans.sort()
    covered, end = 0, 0
    for start, stop in spans:
        covered += max(0, stop - max(start, end))
        end = max(end, stop)
    whole = (spans[-1][1] - spans[0][0]) / 1e9
    return {
        "kernels": len(spans) / 5,
        "share": covered / 1e9 / whole,
        "seconds": whole / 5,
        "copies_to_device": copies / 5,
    }


# -- scaling ----------------------------------------------------------------------------------------------------------


def scaling(bench: Bench) -> None:
    """Two processes against one; every rank runs this, the first one alone trains in between."""
    world = distributed.start("cpu" if bench.tiny else "cuda")
    bench.quiet = not world.first
    folder = bench.scratch / "scaling"
    alone = World(device=world.device)

    def speed(name: str, who: World, batch: int, graph: bool) -> float:
        workers, place = "0" if bench.tiny else "4", folder / f"{name}-{graph}"
        changes = [
            ("training.workers", workers),
            ("training.batch_size", str(batch)),
            ("training.graph", json.dumps(graph)),
        ]
        made = bench.recipe(*changes)
        job, loop = build(made, place, who)
        job = replace(plain(job), data=Held(job, made, 4))
        with Watch(who.device) as watch:
            fit(job, place, short(loop, bench.steps(45)), world=who)
        seconds = float(watch.figures(min(15, len(watch.marks) // 2))["seconds_an_update"])
        return batch * made.data.window_size / seconds

    def weak(graph: bool, each: int = 2) -> None:
        found = speed(f"one-{each}", alone, each, graph) if world.first else 0.0
        distributed.gathered(world, None)
        two = speed(f"two-{each}", world, 2 * each, graph)
        name = f"frames_a_second_{'recorded' if graph else 'launched'}_batch_{each}"
        if world.first:
            bench.tell(**{name: {"one": found, "two": two, "scaling": two / found}})

    def equal() -> None:
        torch.backends.cudnn.allow_tf32 = False  # rounding alone shall differ
        changes = [
            ("model.backbone.vit.drop_path", "0.0"),
            ("model.projection.drop_path", "0.0"),
            ("training.precision", "fp32"),
            ("model.backbone.frozen_dtype", "float32"),
            ("training.batch_size", "4"),
            ("training.best", "loss"),
            ("schedule.warmup", "0"),
            ("data.feature_stride", "2"),
            ("window_size", "64" if bench.tiny else "192"),
            ("training.workers", "2" if bench.tiny else "6"),
        ]
        made = bench.recipe(*changes)

        def trained(name: str, who: World) -> tuple[list[list[str]], dict[str, float]]:
            heard: list[list[str]] = []
            job, loop = build(made, folder / name, who)

            def count(batch: Any) -> float:
                heard.append([meta["video"] + f"@{meta['window_start_frame']}" for meta in batch["meta"]])
                return job.count(batch)

            listening = replace(job, count=count)
            outcome = fit(listening, folder / name, short(loop, bench.steps(20), log_every=1), world=who)
            return heard, outcome.evaluation

        heard, numbers = trained("equal-two", world)
        parts = distributed.gathered(world, heard)
        if not world.first:
            return
        ids, reference = trained("equal-one", alone)
        both = [sorted(a + b) for a, b in zip(*parts)]
        rows = [
            [r["loss"] for r in metrics.rows(folder / n / metrics.METRICS) if "loss" in r]
            for n in ("equal-two", "equal-one")
        ]
        bench.tell(
            same_ids=both == [sorted(batch) for batch in ids],
            updates=len(ids),
            weights_relative_l2=apart(folder / "equal-two", folder / "equal-one"),
            losses_largest_relative=max(abs(a - b) / abs(b) for a, b in zip(*rows)),
            evaluated_by_two=numbers,
            evaluated_by_one=reference,
        )

    bench.attempt(lambda: weak(True))
    bench.attempt(lambda: weak(True, 8))
    bench.attempt(equal)
    bench.attempt(lambda: weak(False))
    distributed.stop()


# -- sharded ----------------------------------------------------------------------------------------------------------


def sharded(bench: Bench) -> None:
    """VideoMAEv2-g with adapters: one GPU, shards on two, and one that goes on from the shards' checkpoint."""
    world = distributed.start("cpu" if bench.tiny else "cuda")
    bench.quiet = not world.first
    folder, alone = bench.scratch / "sharded", World(device=world.device)

    def trained(name: str, who: World, parallel: str, updates: int, begin: Path | None = None) -> dict[str, Any]:
        changes = [
            ("training.parallel", parallel),
            ("training.precision", "bf16"),
            ("training.batch_size", "2"),
            ("training.workers", "0"),
            ("data.feature_stride", "1"),
            ("model.backbone.checkpointing", "none"),  # shards know no other
            ("window_size", "64" if bench.tiny else "192"),
        ]
        made = bench.recipe(*changes, name="adatad_thumos_videomae_v2_g")
        job, loop = build(made, folder / name, who)
        job = replace(plain(job), data=Held(job, made, 4))
        if not bench.tiny:
            torch.cuda.reset_peak_memory_stats()
        start = "auto" if begin is None else str(begin)
        with Watch(who.device) as watch:
            outcome = fit(
                job, folder / name, short(loop, updates, save_every=bench.steps(6, 2)), start, who, ("updates",)
            )
        found = watch.figures(2)
        seconds = float(found["seconds_an_update"])
        return {
            "frames_a_second": 2 * made.data.window_size / seconds,
            "peak_gib": found["peak_gib"],
            "stalls": found["stalls_of_saver"],
            "level": outcome.level,
            "losses": [float(loss) for loss in watch.losses],
        }

    def pair() -> None:
        whole = bench.steps(9, 3)
        one = trained("one", alone, "ddp", whole) if world.first else {}
        distributed.gathered(world, None)
        two = trained("two", world, "fsdp", whole)
        peaks = distributed.gathered(world, two["peak_gib"])
        bench.tell(one=one, two={**two, "peak_gib": peaks})
        if world.first:
            steps = sorted((folder / "two" / "checkpoints").glob("step-*"))
            on = trained("elsewhere", alone, "ddp", whole, begin=steps[0])
            bench.tell(
                gone_on_by_one={**on, "from": steps[0].name},
                weights_relative_l2=apart(folder / "two", folder / "elsewhere"),
                weights_of_one_untouched=apart(folder / "two", folder / "one"),
            )
        distributed.gathered(world, None)

    bench.attempt(pair)
    distributed.stop()


# -- language ---------------------------------------------------------------------------------------------------------


def language(bench: Bench) -> None:
    """A tiny language model under DDP and FSDP2: saved, gone on with, and gone on with by one process."""
    from tests.language_files import config, save_tokenizer, texts

    from tensorkeep.language.job import build as build_language
    from tensorkeep.language.job import loop_of
    from tensorkeep.language.recipe_text import language_recipe

    world = distributed.start("cpu" if bench.tiny else "cuda")
    bench.quiet = not world.first
    alone = World(device=world.device)
    folder = bench.scratch / "language"
    if world.first:
        save_tokenizer(folder / "tok")
        texts(folder / "a.jsonl", 40)
    distributed.gathered(world, None)

    def trained(name: str, who: World, parallel: str, updates: int, begin: str | None = None) -> train.Outcome:
        made = language_recipe(
            {
                "version": 2,
                "config": config(hidden_size=64, intermediate_size=128),
                "tokenizer": str(folder / "tok"),
                "data": {"files": str(folder / "a.jsonl"), "length": 32, "packing": "first_fit"},
                "training": {
                    "updates": 12,
                    "batch_size": 4,
                    "log_every": 1,
                    "ema": 0.9,
                    "parallel": parallel,
                    "save_every": 6,
                },
                "optimizer": {"lr": 1e-3},
            }
        )
        job = build_language(made, folder / name, who)
        loop = replace(loop_of(made, len(job.data)), updates=updates, keep=checkpoint.Keep(9))
        start = "auto" if begin is None else str(folder / begin / "checkpoints" / "step-000006")
        return fit(job, folder / name, loop, start, who, ("updates",))

    def pair(parallel: str) -> None:
        trained(f"{parallel}-whole", world, parallel, 12)
        trained(f"{parallel}-halves", world, parallel, 6)
        outcome = trained(f"{parallel}-halves", world, parallel, 12)
        distributed.gathered(world, None)
        if world.first:
            whole, halves = folder / f"{parallel}-whole", folder / f"{parallel}-halves"
            on = trained(f"{parallel}-elsewhere", alone, "ddp", 12, begin=f"{parallel}-halves")
            bench.tell(
                **{
                    parallel: {
                        "level": outcome.level,
                        "bitwise": same(whole, halves),
                        "weights": apart(whole, halves),
                        "level_on_one": on.level,
                        "weights_on_one": apart(whole, folder / f"{parallel}-elsewhere"),
                        "weights_of_one_untouched": apart(whole, folder / "one"),
                    }
                }
            )
        distributed.gathered(world, None)

    def ddp() -> None:
        pair("ddp")

    def fsdp() -> None:
        pair("fsdp")

    if world.first:
        trained("one", alone, "ddp", 12)
    distributed.gathered(world, None)
    bench.attempt(ddp)
    bench.attempt(fsdp)
    distributed.stop()


PARTS = {"busy": busy, "cached": cached, "resume": resume, "killed": killed, "scaling": scaling, "sharded": sharded}
PARTS |= {"language": language}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("out", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard > soft >= 0:  # each prefetched tensor is a file descriptor
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 1 << 16), hard))
    bench = Bench(args.part, args.out, args.scratch, args.tiny, quiet=args.part == "killed")
    if args.part == "language":
        importlib.import_module("tensorkeep.language.job")
    while args.part != "killed" and not (args.scratch / f"go-{args.part}").exists():
        time.sleep(0.05)
    began = time.monotonic()

    def work() -> None:
        PARTS[args.part](bench)

    work.__name__ = args.part
    bench.attempt(work)
    bench.tell(seconds=round(time.monotonic() - began, 1))
    sys.stdout.flush()
    os._exit(0)  # interpreters take seconds to tidy up, of which there are few


if __name__ == "__main__":
    main()
