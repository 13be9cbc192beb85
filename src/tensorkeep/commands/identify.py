"""`tensorkeep identify`: one hash of a model's tensors, whatever the format."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorkeep.commands.shared import Flag, Say, with_config
from tensorkeep.formats.view import StateView, read
from tensorkeep.output import Output, size
from tensorkeep.storage.certificate import dump
from tensorkeep.storage.overwriting import lone_file
from tensorkeep.storage.placement import replacing, write_bytes

_BOM = lone_file("a CycloneDX document", r'\{\s*"bomFormat": "CycloneDX"')


def identify(
    checkpoint: str,
    /,
    *,
    tensors: Flag = False,
    bom: Path | None = None,
    config: str | None = None,
    overwrite: Flag = False,
    say: Say = Say(),
) -> int:
    """Show a model's identity: one hash that every format, naming and sharding of the same tensors has.

    Exit code 3 where its tensors cannot be brought under hf names: then it gets none (docs/reference/identity.md).

    Args:
        checkpoint: A file, a folder, a run, a Hub model id or a URL.
        tensors: Show every tensor's name, dtype, shape and hash too.
        bom: Write a bill of materials too: a CycloneDX document with the model, its files and what it was made from.
        config: A config.json, or a folder with one, where the checkpoint brings none and it matters.
        overwrite: Replace an earlier bill of materials.
    """
    out = say.output()
    with opened(out, checkpoint, config) as view:
        model = identified(out, view)
    for note in view.notes:
        out.remark(f"note: {note.code} {note.message}")
    if bom is not None:
        _write_bom(bom, checkpoint, model, view, overwrite)
    if say.json:
        listed = [leaf.to_json(name) for name, leaf in model.leaves.items()] if tensors else None
        out.document(model.to_json() | {"path": checkpoint} | ({"leaves": listed} if listed is not None else {}))
        return 0
    out.line(model.identity)
    of = "an adapter of " if model.adapter else "codes of " if model.coded else ""
    out.line(f"{checkpoint}: {model.format}, {of}{len(model.leaves)} tensors, {size(model.nbytes)}")
    for kind, found in model.parts.items():
        out.line(f"  {kind} {found}")
    for line in _remarks(model):
        out.remark(f"note: {line}")
    if tensors:
        rows = [(n, leaf.dtype, list(leaf.shape), leaf.content.hex()) for n, leaf in model.leaves.items()]
        out.table(["tensor", "dtype", "shape", "content"], rows)
    return 0


def _write_bom(place: Path, checkpoint: str, model: Any, view: StateView, overwrite: bool) -> None:
    """Write a bill of materials; what the model was made from is taken from a statement beside it that fits it."""
    from tensorkeep.diagnosis.identity.bom import bill
    from tensorkeep.diagnosis.identity.stored import find_statement

    stored = find_statement(checkpoint)
    fits = stored is not None and stored.statement.identity == model.identity
    made = stored.statement.derivation if fits and stored is not None else None
    data = dump(bill(model, Path(checkpoint).resolve().name, view.config, made))
    with replacing(place, overwrite, _BOM) as temporary:
        write_bytes(temporary, data)


def _remarks(model: Any) -> Iterator[str]:
    """Yield what was decided on the way to the identity."""
    for name, other in model.tied.items():
        yield f"{name} has the bytes of {other} and counts once"
    if model.narrowed:
        dtype = model.leaves[model.narrowed[0]].dtype
        yield f"{len(model.narrowed)} F32 tensors count as {dtype}, which holds their values exactly"
    reasons: dict[str, int] = {}
    for why in model.left_out.values():
        reasons[why] = reasons.get(why, 0) + 1
    for why, count in reasons.items():
        yield f"{count} tensors do not count: {why}"
    if model.coded:
        yield "an identity of codes: blocks count as they are stored, and no model in floats has it"
    if model.format == "gguf":
        yield "config and tokenizer are made of a GGUF's metadata and get no hash"


def identified(out: Output, view: StateView) -> Any:
    """Return a model's identity, with a bar that says how far it is.

    Args:
        out: what the bar is drawn by.
        view: the opened checkpoint.
    """
    from tensorkeep.diagnosis.identity.identify import identify as run

    with out.progress() as progress:
        return run(view, progress)


@contextlib.contextmanager
def opened(out: Output, path: str, config: str | None = None) -> Iterator[StateView]:
    """Open a checkpoint; of a run that trained an adapter, the adapter as PEFT has it.

    Args:
        out: is told what was done with a run.
        path: as the user gave it.
        config: the config that the user names; None for none.

    Yields:
        The checkpoint.
    """
    from tensorkeep.commands.export import adapter_run, read_run

    run = adapter_run(path)
    if run is None:
        yield with_config(read(path), config)
        return
    with tempfile.TemporaryDirectory(prefix="tensorkeep-") as place:
        yield read_run(out, run, Path(place) / "adapter")
