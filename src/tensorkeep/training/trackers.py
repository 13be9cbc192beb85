"""Pass a run's rows on to TensorBoard, Weights & Biases or trackio: functions for `Job.trackers`.

A resumed run goes on in the same run of theirs, whose id lies in RUN/trackers.json, and no row comes twice: rows that
were made again after a kill replace the old ones (TensorBoard purges them) or are left out (W&B, whose rows cannot be
taken back; they are the same numbers, but for `seconds` and `memory`). trackio sends rows later, so a kill may lose
some: each start gives it those of `metrics.jsonl` that it does not hold. W&B writes later too, and what a kill loses
there stays lost: the whole course is in `metrics.jsonl`.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.budget import read_small
from tensorkeep.storage.placement import replacing, write_bytes
from tensorkeep.training import metrics

TRACKERS = "trackers.json"
Tracker = Callable[[dict[str, Any]], None]


def named(names: Iterable[str], run: Path) -> list[Tracker]:
    """Make the trackers that a recipe names: `tensorboard`, and `wandb` and `trackio` under the project `tensorkeep`.

    Args:
        names: of "tensorboard", "wandb" and "trackio".
        run: the run's folder.

    Returns:
        One tracker for each name; each takes rows of metrics.
    """
    services: dict[str, Callable[[Path, str], Tracker]] = {"wandb": wandb, "trackio": trackio}
    return [services[name](run, "tensorkeep") if name in services else tensorboard(run) for name in names]


def tensorboard(run: Path, writer: Callable[..., Any] | None = None) -> Tracker:
    """Make a tracker that writes the numbers of every row into RUN/tensorboard.

    Args:
        run: the run's folder.
        writer: makes a SummaryWriter (None: torch.utils.tensorboard's).

    Raises:
        TensorkeepError: tensorboard is not installed.

    Example:
        >>> job.trackers.append(tensorboard(Path("runs/one")))                        # doctest: +SKIP
    """
    make: Callable[..., Any] = writer if writer is not None else _summary_writer()
    opened: list[Any] = []

    def track(row: dict[str, Any]) -> None:
        if not opened:  # rows of this step and later ones are made again from here on
            opened.append(make(log_dir=str(run / "tensorboard"), purge_step=row["step"]))
        for name, value in scalars(row):
            opened[0].add_scalar(name, value, row["step"])
        opened[0].flush()

    return track


def wandb(run: Path, project: str, module: Any = None, **options: Any) -> Tracker:
    """Make a tracker that logs every row to a W&B run, which goes on after a resume.

    Args:
        run: the run's folder; the W&B run's id lies in its trackers.json.
        project: of W&B.
        module: what has wandb's `init` (None: wandb itself).
        options: go to `wandb.init`.

    Raises:
        TensorkeepError: wandb is not installed, or RUN/trackers.json cannot be read.

    Example:
        >>> job.trackers.append(wandb(Path("runs/one"), project="mine", mode="offline"))  # doctest: +SKIP
    """
    library = module if module is not None else _library("wandb")
    state = _read(run)
    opened: list[Any] = []

    def track(row: dict[str, Any]) -> None:
        if not opened:
            known = state.get("wandb")
            opened.append(library.init(project=project, dir=str(run), id=known, resume="allow", **options))
            state["wandb"] = opened[0].id
        # an evaluation and its step's losses are two rows of one step, so each kind counts for itself
        kind = "evaluation" if "evaluation" in row else "update"
        last = state.setdefault("last", {})
        if row["step"] <= last.get(kind, -1):
            return
        opened[0].log({**dict(scalars(row)), "step": row["step"]})
        last[kind] = row["step"]
        _write(run, state)  # after the row: killed in between, one row comes twice rather than never

    return track


def trackio(
    run: Path, project: str, module: Any = None, held: Callable[[str, str], list[Any]] | None = None
) -> Tracker:
    """Make a tracker that logs every row to a trackio run of this machine, which goes on after a resume.

    Args:
        run: the run's folder; the trackio run's name lies in its trackers.json.
        project: of trackio.
        module: what has trackio's `init` (None: trackio itself).
        held: `held(project, name)` gives the rows that trackio holds (None: asks its database).

    Raises:
        TensorkeepError: trackio is not installed, or RUN/trackers.json cannot be read.

    Example:
        >>> job.trackers.append(trackio(Path("runs/one"), project="mine"))            # doctest: +SKIP
    """
    library = module if module is not None else _library("trackio")
    ask = held if held is not None else _library("trackio.sqlite_storage").SQLiteStorage.get_logs
    state = _read(run)
    opened: list[Any] = []

    def log(row: Mapping[str, Any]) -> None:
        opened[0].log({**dict(scalars(row)), "train/step": row["step"]}, step=row["step"])

    def finish() -> None:
        with contextlib.redirect_stdout(sys.stderr):  # it prints, and stdout is for data
            library.finish()

    def track(row: dict[str, Any]) -> None:
        if opened:
            log(row)
            return
        name = state.setdefault("trackio", f"{run.resolve().name}-{secrets.token_hex(3)}")
        _write(run, state)
        with contextlib.redirect_stdout(sys.stderr):
            known = {(found.get("step"), _evaluated(found)) for found in ask(project, name)}
            opened.append(library.init(project=project, name=name, resume="allow", embed=False))
        atexit.register(finish)
        for earlier in metrics.rows(run / metrics.METRICS):  # this one is among them
            if (earlier["step"], "evaluation" in earlier) not in known:
                log(earlier)

    return track


def _evaluated(row: Mapping[str, Any]) -> bool:
    """Whether a row that trackio holds is of an evaluation."""
    return any(name.startswith("evaluation/") for name in row)


def scalars(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """List names and numbers of a row; evaluated ones under `evaluation/`, others under `train/`.

    >>> dict(scalars({"step": 3, "loss": 0.5, "lr": None})), dict(scalars({"step": 3, "evaluation": {"mAP": 0.5}}))
    ({'train/loss': 0.5}, {'evaluation/mAP': 0.5})
    """
    inner = row.get("evaluation")
    group, values = ("evaluation", inner) if isinstance(inner, Mapping) else ("train", row)
    for name, value in values.items():
        if name != "step" and isinstance(value, (int, float)):
            yield f"{group}/{name}", float(value)


def _summary_writer() -> Callable[..., Any]:
    """Return torch's SummaryWriter."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise TensorkeepError(
            "tensorboard is not installed", where="trackers", hint="pip install tensorboard"
        ) from None
    made: Callable[..., Any] = SummaryWriter
    return made


def _library(name: str) -> Any:
    """A module of a tracker's package."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise TensorkeepError(f"{package} is not installed", where="trackers", hint=f"pip install {package}") from None


def _read(run: Path) -> dict[str, Any]:
    """What trackers.json holds; {} where it is not there."""
    path = run / TRACKERS
    if not path.exists():
        return {}
    text = read_small(path)
    try:
        state = json.loads(text)
    except ValueError:
        state = None
    last = state.get("last", {}) if isinstance(state, dict) else None
    if not isinstance(last, dict) or not all(type(step) is int for step in last.values()):
        raise TensorkeepError("is not what a tracker wrote", where=path, hint="remove it: the tracker begins a new run")
    return dict(state)


def _write(run: Path, state: Mapping[str, Any]) -> None:
    """Replace trackers.json in one step."""
    with replacing(run / TRACKERS, overwrite=True) as temporary:
        write_bytes(temporary, (json.dumps(state) + "\n").encode())
