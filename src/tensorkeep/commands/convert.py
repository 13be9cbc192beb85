"""`tensorkeep convert`: checkpoints of any format and naming into one, proven by reading it back."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from tensorkeep.commands.programs import installed, loads
from tensorkeep.commands.shared import (
    Flag,
    Say,
    found_in_store,
    known_dtype,
    known_naming,
    known_root,
    prepare,
    shard_limit,
    with_config,
)
from tensorkeep.commands.sign import Recorded, Recorder, carry_statement
from tensorkeep.conversion.targets import arranged, check, root_of
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats import table as formats
from tensorkeep.formats.names import grouped
from tensorkeep.formats.view import read
from tensorkeep.models.alignment import tied_names
from tensorkeep.models.names import all_live
from tensorkeep.output import Output, size


def convert(
    *paths: str,
    to: str,
    naming: str | None = None,
    root: str | None = None,
    dtype: str | None = None,
    drop: Annotated[tuple[str, ...], Parameter(negative="", show_default=False)] = (),
    prefer: Literal["first", "last"] | None = None,
    from_naming: str | None = None,
    shard_size: str | None = None,
    ranks: int | None = None,
    config: str | None = None,
    for_: Annotated[str | None, Parameter(name="--for")] = None,
    ema: Flag = False,
    dry_run: Flag = False,
    overwrite: Flag = False,
    recorded: Recorded = Recorded(),
    say: Say = Say(),
) -> int:
    """Convert one or more checkpoints into another format or naming: SRC... OUT.

    Tensors are streamed, and the result is read back and compared with the plan before it gets its name. "proven: loads
    in X" is said where X's own rules were applied to the plan and found nothing (docs/reference/who-loads-it.md).

    Args:
        paths: The sources (files, folders, Hub ids, URLs), then the sink: a folder, or a .safetensors or .pth file.
        to: The sink's format: {formats}.
        naming: The sink's names: {namings}. Default: hf, or as they are where nothing is recognised.
        root: Nest the sink's names under this word (older versions of flame ask for `model`). Default: none.
        dtype: Round every floating tensor to this dtype (bf16, fp16, fp32, ...). Default: each keeps its own.
        drop: Leave out tensors whose stored names fit this pattern (docs/concepts/patterns.md); may be repeated.
        prefer: Which source to take a tensor from where two hold it.
        from_naming: The sources' naming, where it is not recognised by itself: {any_naming}.
        shard_size: The largest data file to write, e.g. 5GB.
        ranks: Write a dcp folder as so many ranks under FSDP2 would: a file a rank, with its rows of every tensor.
        config: A config.json, or a folder with one, for sources that bring none, and in place of a GGUF's metadata.
        for_: The program that is to load it: {targets}. Chooses its names; what it would misread is refused.
        ema: Take a run's averaged weights (--to hf, or peft of an adapter); OpenTAD's file of a detector holds both.
        dry_run: Print the plan and write nothing.
        overwrite: Replace an existing sink, once the new one is proven.
    """
    from tensorkeep.commands.export import minimind_resume, staged

    out = say.output()
    formats.writer(to)
    naming, twice = arranged(for_, to, naming)
    _begun(out, paths, to, dry_run)
    if not dry_run and (*paths[2:], to, naming) == ("pth", "minimind") and paths[1].endswith("_resume.pth"):
        return minimind_resume(out, paths[0], paths[1], overwrite)
    with contextlib.ExitStack() as stack:
        opened = staged(out, paths[0], paths[1], to, naming, ema, dry_run) if len(paths) == 2 else None
        run = stack.enter_context(opened) if opened is not None else None
        sources = [with_config(v, config) for v in ([run.view] if run is not None else map(read, paths[:-1]))]
        root, wanted = root or root_of(for_), known_dtype(dtype, "convert", paths)
        plan = _planned(sources, to, naming, root, wanted, drop, prefer, from_naming, twice, ranks)
        proof, limit = check(plan, to, Path(paths[-1]).name, for_, installed()), shard_limit(shard_size, to, paths[-1])
        settings: dict[str, Any] = {"dtype": wanted, "drop": list(drop), "prefer": prefer}
        made = recorded.of("convert", [(v, "source", 1.0) for v in sources], **settings)
        return _carry_out(out, plan, proof, paths[-1], to, limit, dry_run, overwrite, run, made)


def _begun(out: Output, paths: tuple[str, ...], to: str, dry_run: bool) -> None:
    """Refuse a line without a sink, and make its place ready."""
    if len(paths) < 2:
        raise TensorkeepError("convert needs a source and a sink", hint=f"tensorkeep convert SRC... OUT --to {to}")
    if not dry_run:
        prepare(out, paths[-1])


def _planned(sources: list[Any], to: str, naming: str | None, root: str | None, dtype: str | None, *rest: Any) -> Any:
    """Decide the conversion, once the words that the user gave are known."""
    from tensorkeep.conversion.planning import make_plan

    drop, prefer, from_naming, twice, ranks = rest
    live = all_live if twice and naming == "hf" else None  # of `--for transformers` and flame: dcp and pth
    plan = make_plan(
        sources,
        to,
        naming=known_naming(naming),
        root=known_root(root, to),
        dtype=dtype,
        drop=drop,
        prefer=prefer,
        from_naming=known_naming(from_naming),
        ask=loads,
        head_twice=twice,
        ties=tied_names,
        live=live,
    )
    plan.ranks = ranks
    return plan


def _carry_out(
    out: Output,
    plan: Any,
    proof: Any,
    sink: str,
    to: str,
    limit: int | None,
    dry_run: bool,
    overwrite: bool,
    run: Any,
    made: Recorder,
) -> int:
    """Write what is planned, or show it alone; `run` is what was made ready of a run, None for any other source."""
    from tensorkeep.conversion import execution
    from tensorkeep.conversion.naming.detectors import put_average
    from tensorkeep.conversion.sink import sink_files

    if run is not None and run.average is not None:
        put_average(plan, run.average)
    _announce(out, plan)
    if dry_run:
        sink_files(plan, Path(sink).name, to, limit)  # refuses what could not be laid out
        return _show_plan(out, plan, proof, sink, to)
    with out.progress() as progress:
        result = execution.convert(plan, sink, to, limit, overwrite, progress)
    code = _show_result(out, plan, proof, result, to, run.said if run is not None else {})
    carry_statement(out, plan, sink)
    made(out, sink)
    if run is not None and run.after:
        out.remark(run.after)
    return code


def _show_plan(out: Output, plan: Any, proof: Any, sink: str, to: str) -> int:
    """What a conversion would do, line by line."""
    if out.json:
        shown = {"format": to, "naming": plan.naming, "root": plan.root, "ranks": plan.ranks, "bytes": plan.nbytes}
        shown["steps"] = plan.to_json()
        out.document({"dry_run": True, "sink": sink, **shown, "proof": {**proof.to_json(), "bytes": False}})
    for step in plan.steps:
        out.line(step.told(plan.sources))
    out.line(f"{len(plan.tensors)} tensors, {size(plan.nbytes)}; {len(plan.dropped)} dropped; nothing written")
    return 0


def _show_result(out: Output, plan: Any, proof: Any, result: Any, to: str, said: dict[str, Any]) -> int:
    """What a conversion did, and what its casts lost; `said` is of the run that was converted."""
    for name, cast in result.casts.items():
        lost = f"{cast.overflowed} values overflowed and {cast.vanished} became zero in the cast"
        out.remark(f"warning: V02 {name}: {lost}")
    if out.json:
        out.document(
            {
                "sink": result.path,
                "format": to,
                "naming": plan.naming,
                "root": plan.root,
                "ranks": plan.ranks,
                "bytes": result.nbytes,
                "tensors": len(result.digests),
                "dropped": [{"name": s.parts[0].name, "reason": s.reason} for s in plan.dropped],
                "proven": True,
                "proof": proof.to_json(),
                "notes": [{"code": n.code, "message": n.message, "tensors": list(n.names)} for n in plan.notes],
                "casts": {n: {"overflowed": c.overflowed, "vanished": c.vanished} for n, c in result.casts.items()},
                "seconds": result.seconds,
                **said,
            }
        )
    for note in found_in_store(result):
        out.remark(note)
    took = sum(result.seconds.values())
    ranks = f" in the shards of {plan.ranks} ranks" if plan.ranks is not None else ""
    out.line(f"{result.path}: {len(result.digests)} tensors, {size(result.nbytes)}{ranks}, {proof.line} ({took:.1f} s)")
    return 0


def _announce(out: Output, plan: Any) -> None:
    """Everything the user should know before anything is written: notes, and what is left out, by reason."""
    for note in plan.notes:
        out.remark(f"note: {note.code} {note.message}")
    reasons: dict[str, list[str]] = {}
    for step in plan.dropped:
        reasons.setdefault(step.reason, []).append(step.parts[0].name)
    for reason, names in reasons.items():
        groups = grouped(names)
        more = " ..." if len(groups) > 3 else ""
        out.remark(f"left out: {', '.join(groups[:3])}{more} ({len(names)}): {reason}")
