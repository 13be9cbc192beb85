"""What `convert` makes of a run besides its plain weights: an adapter, the average, a whole model, a resume file."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tensorkeep.errors import TensorkeepError, word
from tensorkeep.formats.run import has_part
from tensorkeep.formats.view import StateView, read
from tensorkeep.output import Output
from tensorkeep.storage import run_folder
from tensorkeep.storage.files import local_path
from tensorkeep.storage.leftovers import writing_in
from tensorkeep.storage.placement import remove, temporary_name
from tensorkeep.storage.yaml_documents import parse_yaml

RECIPE = "recipe.yaml"


class Made(NamedTuple):
    """What stands for a run in a conversion.

    Attributes:
        view: the checkpoint to read.
        said: what the document tells of it beside the conversion.
        after: what to say once it is done; empty for nothing.
        average: what the second state of an OpenTAD checkpoint holds, where that is another than the first.
    """

    view: StateView
    said: dict[str, Any]
    after: str = ""
    average: StateView | None = None


class Run(NamedTuple):
    """A run of ours, as it is named on a command line.

    Attributes:
        path: what was named: the run's folder or a step folder in it.
        folder: the run's folder.
        detection: whether it trained a detector; else a language model.
        adapter: whether its checkpoint holds what trains over a frozen base, and not a whole model.
        averaged: whether it keeps an average.
    """

    path: str
    folder: Path
    detection: bool
    adapter: bool
    averaged: bool


def run_at(path: str) -> Run | None:
    """Return the run that a path means; None where it is none.

    Args:
        path: as the user gave it.
    """
    if "://" in path:
        return None
    for folder in (Path(path), Path(path).parent.parent):
        if (folder / run_folder.CHECKPOINTS).is_dir() and (folder / RECIPE).is_file():
            found = run_folder.find_checkpoint(Path(path).resolve())
            if found is None:
                return None
            recipe = parse_yaml((folder / RECIPE).read_bytes(), str(folder / RECIPE))
            model = recipe.get("model") if isinstance(recipe, dict) else None
            adapter, average = (has_part(found[0], part) for part in ("adapter", "ema"))
            return Run(path, folder, isinstance(model, dict) and "projection" in model, adapter, average)
    return None


def adapter_run(path: str) -> Run | None:
    """Return the language run with an adapter that a path means; None for anything that is no run.

    Args:
        path: as the user gave it.

    Raises:
        TensorkeepError: K08 for a detector's run, whose adapters are parts of the detector.
    """
    run = run_at(path) if not Path(path).is_file() else None
    if run is None or not run.adapter:
        return None
    if run.detection:
        raise TensorkeepError(
            "is a run of a detector, which is joined with its base as it is converted",
            where=path,
            code="K08",
            hint=f"the whole detector: tensorkeep convert {word(path)} OUT --to hf",
        )
    return run


def base_of_run(run: Run) -> str:
    """Return what a language run's adapter belongs to.

    Args:
        run: from `adapter_run`.
    """
    from tensorkeep.language.export import base_of

    return base_of(run.folder)


def read_run(out: Output, run: Run, place: Path, ema: bool = False, check: bool = False) -> StateView:
    """Write what a language run made to a folder, and open it under the run's own path.

    Args:
        out: is told what was checked.
        run: the run.
        place: the folder, which is not there yet.
        ema: take the averaged weights.
        check: load an adapter with PEFT.
    """
    from tensorkeep.language.export import exported

    exported(run.path, place, ema=ema, remark=out.remark, check=check)
    view = read(str(place))
    view.path = run.path
    return view


@contextlib.contextmanager
def staged(
    out: Output, source: str, sink: str, to: str, naming: str | None, ema: bool, dry_run: bool
) -> Iterator[Made | None]:
    """Give the checkpoint that stands for a run in a conversion, and what is to be told of it.

    None where the source is no run, or its stored weights are all that is wanted and `convert` streams them itself.

    Args:
        out: is told what was checked.
        source: what is converted.
        sink: where it goes; what is written in between lies beside it.
        to: the sink's format.
        naming: the sink's naming.
        ema: take the averaged weights.
        dry_run: leave nothing beside the sink.

    Raises:
        TensorkeepError: K08 where the run has no such thing to give, with a command that gives what it has.
    """
    run = run_at(source)
    if ema and (run is None or to not in ("hf", "peft")):
        raise TensorkeepError("--ema is about a run, --to hf or peft", hint="tensorkeep convert RUN OUT --to hf --ema")
    if run is not None:
        _refuse(run, to, ema)
    if run is None or not (run.detection or ema or run.adapter or (to == "hf" and _renamed(run))):
        yield None
        return
    with _place(sink, dry_run) as place:
        if run.detection:
            yield _detector(out, run, place, ema, both=to == "pth" and naming == "opentad")
        else:
            yield _made(out, run, place, sink, ema)


def _detector(out: Output, run: Run, place: Path, ema: bool, both: bool) -> Made:
    """Write the whole detector beside the sink: base and what trained, joined."""
    from tensorkeep.detection.export import write_detector

    whole = write_detector(run.path, place, ema, both, out.remark)
    return Made(whole.view, {"averaged": (ema or both) and run.averaged}, average=whole.average)


def _made(out: Output, run: Run, place: Path, sink: str, ema: bool) -> Made:
    """Write the export beside the sink and open it."""
    view = read_run(out, run, place, ema, check=True)
    after = f"merge it: tensorkeep merge {word(base_of_run(run))} {word(sink)} OUT" if run.adapter else ""
    return Made(view, {"averaged": ema and run.averaged}, after)


def _refuse(run: Run, to: str, ema: bool) -> None:
    """Stop (K08) where a run has another thing to give than was asked for."""
    if run.detection and to == "peft":
        hint = f"the whole detector: tensorkeep convert {word(run.path)} OUT.pth --to pth --naming opentad"
        what = "is a run of a detector, which trains projection and head whole beside its adapters: no PEFT folder"
        raise TensorkeepError(what, where=run.path, code="K08", hint=hint)
    if run.detection or run.adapter == (to == "peft"):
        return
    more = " --ema" if ema else ""
    if not run.adapter:
        hint = f"tensorkeep convert {word(run.path)} OUT --to hf{more}"
        raise TensorkeepError("holds a whole model", where=run.path, code="K08", hint=hint)
    hint = (
        f"tensorkeep merge {word(run.path)} OUT; the adapter alone: tensorkeep convert {word(run.path)} OUT --to peft"
    )
    raise TensorkeepError("holds an adapter", where=run.path, code="K08", hint=hint + more)


def _renamed(run: Run) -> bool:
    """Whether a run's tensors may have other names than a file of transformers: all but what the table knows."""
    from tensorkeep.conversion.fit import Offer, by_table

    view = read(run.path)
    offers = {n: Offer(r.dtype, r.shape) for n, r in view.records.items()}
    found = by_table(view.config, offers) if view.config is not None else None
    return view.config is not None and (found is None or found.count > 0)


@contextlib.contextmanager
def _place(sink: str, dry_run: bool) -> Iterator[Path]:
    """Give a path beside the sink for what is written in between; it is removed in the end."""
    if dry_run or "://" in sink.removeprefix("file://"):
        with tempfile.TemporaryDirectory(prefix="tensorkeep-") as folder:
            yield Path(folder) / "run"
        return
    final = local_path(sink.removeprefix("file://")).absolute()
    parent = next(p for p in final.parents if p.is_dir())
    with writing_in(parent):
        place = temporary_name(parent / final.name)
        try:
            yield place
        finally:
            remove(place)


def minimind_resume(out: Output, run: str, sink: str, overwrite: bool) -> int:
    """Write a run as a resume file of MiniMind; only a run has what such a file holds."""
    from tensorkeep.language.minimind.export import export_resume

    made = export_resume(run, sink, overwrite=overwrite)
    for note in made.notes:
        out.remark(f"note: {note.code} {note.message}")
    if out.json:
        out.document(
            {
                "sink": made.path,
                "format": "pth",
                "naming": "minimind",
                "epoch": made.epoch,
                "step": made.step,
                "world_size": made.world_size,
                "notes": [{"code": n.code, "message": n.message} for n in made.notes],
            }
        )
    out.line(f"{made.path}: MiniMind's epoch {made.epoch}, step {made.step}, proven equal to the run but for fp16")
    return 0
