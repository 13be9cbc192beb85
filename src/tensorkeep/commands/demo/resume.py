"""Chapter `resume`: kill a fine-tuning of SmolLM2 while it saves and once more at random; it ends where it would have.

Every start is a process of its own with the command that a user types. The run that is killed and one that nobody
touched must agree in every bit of weights, moments and averages, and in every number of their metrics. Only the last
_TRAINED layers of 30 train: the forward is the whole model's, a checkpoint all of its weights.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tensorkeep.commands.demo.story import Show, smollm2
from tensorkeep.conversion.execution import convert
from tensorkeep.conversion.planning import make_plan
from tensorkeep.diagnosis.verification import verify
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import read
from tensorkeep.storage import durable, run_folder
from tensorkeep.storage.run_manifest import step_of
from tensorkeep.training import metrics
from tensorkeep.training import saver as checkpoint

TOPICS = ("calls",)  # of pydoc: a text that every Python carries
_TRAINED = 2
UPDATES, _SAVE_EVERY, BATCH, LENGTH = 8, 2, 4, 96
_TELLING = ("resumed from", "skipped:", "exact resume", "not bitwise", "made again")  # what a start says of a resume


def chapter_resume(out: Path, show: Show) -> int:
    """Train, kill, resume, kill, resume; return 0 if all of it ended bitwise where the untouched run ended."""
    started = time.perf_counter()
    base = hf_folder(out, show)
    folder = empty(out / "resume")
    text = write_topics(folder / "text.txt", TOPICS)
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(resume_recipe(base, text), sort_keys=False))
    show(
        f"2/5  Trained: the last {_TRAINED} of its layers on pydoc's {', '.join(TOPICS)}, {UPDATES} updates, "
        f"saved every {_SAVE_EVERY}:"
    )
    show(f"     {' '.join(shown_command(recipe, folder / 'run'))}")
    held = killed_and_compared(recipe, folder, show, random.Random())
    show(f"{'All of it held' if held else 'NOT ALL OF IT HELD'}; {time.perf_counter() - started:.0f} s.")
    show(
        f"Try next:\n  tensorkeep verify {folder / 'run'}\n  tensorkeep diff {folder / 'run'} {folder / 'whole'}\n"
        f"  tensorkeep eval language {folder / 'run'} --data {text}"
    )
    return 0 if held else 1


def killed_and_compared(recipe: Path, folder: Path, show: Show, chance: random.Random) -> bool:
    """Train once untouched and once killed twice; return whether both ended alike."""
    whole, run = folder / "whole", folder / "run"
    start = TrainingProcess(recipe, whole)
    start.finish()
    losses = [row["loss"] for row in rows_of(whole)]
    show(f"     {start.seconds:4.1f} s  nobody touches it: loss {losses[0]:.4f} at first, {losses[-1]:.4f} at the end")
    training = sum(float(row["seconds"]) for row in metrics.rows(whole / metrics.METRICS))  # without loading the model

    show("3/5  The same once more, killed (SIGKILL) in the middle of a save:")
    hit = _kill_in_a_save(recipe, run, show)
    show("4/5  Started again by the same command, killed at a random instant, and started again:")
    second = _kill_after(recipe, run, chance.uniform(0, 0.6 * training), show)
    last = TrainingProcess(recipe, run)
    last.finish()
    show(f"     {last.seconds:4.1f} s  to the end")
    tell(last.said(), show)
    said = [*second.said(), *last.said()]
    confirmed = any("exact resume confirmed" in s for s in said) and not any("not bitwise" in s for s in said)

    show("5/5  Is it the run that nobody touched?")
    return same_end(whole, run, show) and hit and second.killed and confirmed and losses[-1] < losses[0]


# -- what is trained --------------------------------------------------------------------------------------------------


def hf_folder(out: Path, show: Show, number: str = "1/5") -> Path:
    """Return the model's folder as chapter `convert` makes it; made again unless it is there and whole."""
    folder = out / "1-hf"
    if folder.is_dir():
        findings, view, certified = verify(folder)
        if view is not None and certified and not findings:
            show(f"{number}  The model: {folder}, {len(view)} tensors, each as its certificate says")
            return folder
    result = convert(make_plan([read(smollm2())], "hf"), str(folder), "hf", overwrite=True)
    count = len(result.digests)
    show(f"{number}  The model: {smollm2().name} converted to {folder}, {count} tensors, bytes equal to the plan")
    return folder


def empty(folder: Path) -> Path:
    """Return the folder with nothing in it; what an earlier demo left is deleted."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def write_topics(path: Path, names: Sequence[str]) -> Path:
    """Write topics of pydoc as one plain text."""
    from pydoc_data.topics import topics

    path.write_text("\n\n".join(topics[name] for name in names), encoding="utf-8")
    return path


def resume_recipe(base: Path, text: Path) -> dict[str, Any]:
    """Return a recipe that trains the last layers and the final norm on rows of LENGTH tokens, and keeps an average."""
    layers = int((read(base).config or {})["num_hidden_layers"])
    return {
        "version": 2,
        "model": str(base),
        "objective": "pretrain",
        "trainable": [f"model.layers.{n}.*" for n in range(layers - _TRAINED, layers)] + ["model.norm.weight"],
        "data": {"files": [str(text)], "length": LENGTH, "packing": "concatenate"},
        "optimizer": {"lr": 2e-4, "weight_decay": 0.01},
        "schedule": {"kind": "cosine", "warmup": 0.1, "final": 0.1},
        "training": {
            "updates": UPDATES,
            "batch_size": BATCH,
            "micro_batch": BATCH // 2,
            "ema": 0.9,
            "log_every": 1,
            "save_every": _SAVE_EVERY,
            "keep_last": 2,
        },
    }


# -- starts and kills -------------------------------------------------------------------------------------------------


def shown_command(recipe: Path, run: Path, kind: str = "language") -> list[str]:
    """Return the command as a person types it, on the CPU, where equal numbers are equal bits whatever the machine."""
    return ["tensorkeep", "train", kind, str(recipe), "--out", str(run), "--device", "cpu"]


def command(recipe: Path, run: Path, kind: str = "language") -> list[str]:
    """Return the same command for this Python, whatever is on the PATH."""
    return [sys.executable, "-m", *shown_command(recipe, run, kind)]


@dataclass
class TrainingProcess:
    """One process that trains; what it says goes into a file beside the run, one file for each process.

    Args:
        recipe: the recipe's file.
        run: the run's folder.
        kind: "language" or "detection".
        killed: whether `kill` ended it.
        seconds: how long it lived.
    """

    recipe: Path
    run: Path
    kind: str = "language"
    killed: bool = False
    seconds: float = 0.0
    process: subprocess.Popen[bytes] = field(init=False)
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.log = next(p for n in range(1, 99) if not (p := self.run.with_name(f"{self.run.name}-{n}.log")).exists())
        self.begun = time.perf_counter()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command(self.recipe, self.run, self.kind), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def until(self, reached: Callable[[], bool]) -> bool:
        """Wait until `reached` says so and return True; return False where the process ended before."""
        try:
            while self.process.poll() is None:
                if reached():
                    return True
                time.sleep(0.001)
        except BaseException:
            self.process.kill()  # nobody trains on behind an interrupted demo
            raise
        return False

    def kill(self) -> None:
        """Kill the process with SIGKILL: nothing of it runs afterwards."""
        self.process.kill()
        self.killed = self.process.wait() < 0
        self.seconds = time.perf_counter() - self.begun

    def finish(self) -> None:
        """Wait for the end of the process.

        Raises:
            TensorkeepError: it failed; with its last words.
        """
        self.until(lambda: False)
        self.seconds = time.perf_counter() - self.begun
        if self.process.returncode:
            words = self.said()[-1:] or ["it said nothing"]
            raise TensorkeepError(f"training failed: {words[0][:300]}", where=self.run, hint=f"see {self.log}")

    def said(self) -> list[str]:
        """Return its lines so far."""
        return self.log.read_text("utf-8", "replace").splitlines()


def _kill_in_a_save(recipe: Path, run: Path, show: Show) -> bool:
    """Kill when half of a checkpoint is written, with a whole one before it; return whether a half was left."""
    for _ in range(UPDATES // _SAVE_EVERY):
        start = TrainingProcess(recipe, run)
        if not start.until(lambda: half_written(run) is not None):
            break
        start.kill()
        left = half_written(run)
        if left is None:
            continue  # the save was faster than the signal: the next one, then
        size, newest = sum(p.stat().st_size for p in left.iterdir()), checkpoint.newest(run)
        show(
            f"     {start.seconds:4.1f} s  killed; {left.name}, {size / 1e6:.0f} MB without a manifest, "
            "is no checkpoint and is passed over"
        )
        show(f"             newest checkpoint: {newest[1].name if newest else 'NONE'}, every byte as its manifest says")
        return newest is not None and start.killed
    show("     NO SAVE WAS HIT: each was over before the signal came")
    return False


def half_written(run: Path) -> Path | None:
    """Return the temporary folder of a save after a whole checkpoint, once it holds half as many bytes."""
    done = run_folder.steps(run)
    for name in run_folder.remains(run) if done else ():
        step, folder = step_of(name.split(".")[1]), run / run_folder.CHECKPOINTS / name
        try:
            written, before = (
                sum(p.stat().st_size for p in f.iterdir()) for f in (folder, run_folder.folder_of(run, done[0]))
            )
        except (FileNotFoundError, NotADirectoryError):  # renamed meanwhile: it is whole
            continue
        if step is not None and step > done[0] and 2 * written >= before:
            return folder
    return None


def _kill_after(recipe: Path, run: Path, seconds: float, show: Show) -> TrainingProcess:
    """Kill some seconds after the run has gone on, before its last update at the latest."""
    start = TrainingProcess(recipe, run)
    start.until(lambda: any(line.startswith("resumed") for line in start.said()))
    end = time.perf_counter() + seconds
    start.until(lambda: time.perf_counter() >= end or any(row["step"] >= UPDATES - 1 for row in rows_of(run)))
    start.kill()
    rows = rows_of(run)
    show(f"     {start.seconds:4.1f} s  killed {seconds:.2f} s after it went on, {rows[-1]['step']} updates told of")
    tell(start.said(), show)
    return start


def tell(said: Sequence[str], show: Show) -> None:
    """Show the lines that speak of a resume."""
    for line in said:
        if any(word in line for word in _TELLING):
            show(f"             {line}")


# -- the proof --------------------------------------------------------------------------------------------------------


def rows_of(run: Path) -> list[metrics.Row]:
    """Return the rows of a run's updates without what the machine says: seconds, memory."""
    return metrics.comparable(run / metrics.METRICS)


def _digests_of(run: Path) -> dict[str, dict[str, str]]:
    """Digest every weight, moment and average of the newest checkpoint; by kind and name."""
    import torch

    found = checkpoint.newest(run)
    if found is None:
        raise TensorkeepError("the run holds no checkpoint", where=run)
    state = found[0]
    return {
        kind: {
            n: durable.digest(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()) for n, t in part.items()
        }
        for kind, part in (("weights", state.model), ("moments", state.optimizer), ("averages", state.ema))
    }


def same_end(whole: Path, run: Path, show: Show) -> bool:
    """Whether two runs ended in the same state with the same metrics, bit for bit; shows what was compared."""
    mine, theirs = _digests_of(run), _digests_of(whole)
    parts = []
    for kind, wanted in theirs.items():
        equal = sum(mine[kind].get(name) == digest for name, digest in wanted.items())
        parts.append(f"{equal} of {len(wanted)} {kind}")
    rows = (rows_of(whole), rows_of(run))
    equal = sum(a == b for a, b in zip(*rows))
    show(f"     equal by digest: {', '.join(parts)}; equal in every number: {equal} of {len(rows[0])} rows of metrics")
    same = mine == theirs and all(theirs.values()) and rows[0] == rows[1]
    show(f"     {'Bitwise equal' if same else 'NOT EQUAL'}")
    return same
