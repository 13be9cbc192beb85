"""`tensorkeep merge`: adapters into the base they were trained on, streamed, computed twice, proven."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tensorkeep.commands.merge_aware import as_trained
from tensorkeep.commands.merge_bits import Computed, merge_in_bits
from tensorkeep.commands.merge_forward import merge_proven_forward
from tensorkeep.commands.merge_recorded import rounded
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
from tensorkeep.commands.sign import Recorded, Recorder, Source
from tensorkeep.diagnosis.identity.merging import name_as_files
from tensorkeep.errors import TensorkeepError, word
from tensorkeep.formats import table as formats
from tensorkeep.formats.names import grouped
from tensorkeep.formats.view import Note, StateView, read
from tensorkeep.models.names import names_for
from tensorkeep.output import Output, size

_MOST_ROWS = 12  # of the human table; --json has all


def merge(
    *paths: str,
    onto: Literal["trained", "original"] = "trained",
    to: str = "hf",
    naming: str | None = None,
    root: str | None = None,
    dtype: str | None = None,
    shard_size: str | None = None,
    ranks: int | None = None,
    config: str | None = None,
    untie: Flag = False,
    allow_other_base: Flag = False,
    dry_run: Flag = False,
    overwrite: Flag = False,
    computed: Computed = Computed(),
    recorded: Recorded = Recorded(),
    say: Say = Say(),
) -> int:
    """Add adapters into the weights they were trained on: BASE ADAPTER[=WEIGHT]... OUT.

    The result is rounded once, computed a second time and read back before it gets its name.

    Args:
        paths: The base, one or more adapters (PEFT folders, runs of ours, MiniMind's LoRA files), the sink. ADAPTER=0.5
            adds half of it. Without one, the adapter in BASE's own file is merged; of a run, its own into its base.
        onto: The weights to add to. trained: what the adapter was trained on, so a quantized base is dequantized.
            original: the float weights, though the adapter was trained on a quantized form of them.
        to: The sink's format: {model_formats}.
        naming: The sink's names: {namings}. Default: hf, or as they are where nothing is recognised.
        root: Nest the sink's names under this word. Default: none.
        dtype: Round every floating tensor to it (bf16, fp16, fp32). Default: the base's own.
        shard_size: The largest data file to write, e.g. 5GB.
        ranks: Write a dcp folder as so many ranks under FSDP2 would: a file a rank, with its rows of every tensor.
        config: A config.json, or a folder with one, for a base that brings none, and in place of a GGUF's metadata.
        untie: Write tied tensors apart (head and embedding, weights that layers share), where the adapter changes one.
        allow_other_base: Merge though the adapter names another base by digest.
        dry_run: Print the plan and write nothing.
        overwrite: Replace an existing sink, once the new one is proven.
    """
    from tensorkeep.adapters.planning import plan_merge

    out = say.output()
    first = _refuse(paths, to, naming, dtype, computed)
    if (done := as_trained(out, paths, to, computed, shard_size, overwrite, dry_run, recorded)) is not None:
        return done
    with contextlib.ExitStack() as stack:
        base, sources = _opened(out, paths, config, stack)
        name_as_files(base, [s.adapter for s in sources])
        _refuse_sources(base, sources, allow_other_base)
        named: dict[str, Any] = {"naming": known_naming(naming), "root": known_root(root, first), "untie": untie}
        named["dtype"] = "F32" if computed.to_bits else known_dtype(dtype, "merge", paths)
        job = plan_merge(base, sources, first, onto=onto, ask=names_for, **named)
        job.plan.ranks, job.plan.notes = ranks, [*job.plan.notes, *_left_out_by_peft(base, sources)]
        limit = shard_limit(shard_size, to, paths[-1])
        made = _recorder(recorded, base, sources, computed, onto, named)
        if computed.to_bits is not None and not dry_run:
            return merge_in_bits(out, job, base, paths[-1], computed, limit, overwrite, made)
        given = (out, job, base, paths[-1], computed.prove_forward, computed.device, limit, overwrite)
        proven = partial(merge_proven_forward, *given) if computed.prove_forward else None
        return _carry_out(out, job, paths[-1], to, limit, dry_run, overwrite, proven, made)


def _refuse(paths: tuple[str, ...], to: str, naming: str | None, dtype: str | None, computed: Computed) -> str:
    """Refuse words that make no merge; the format that is merged into, before --to-bits makes another of it."""
    formats.writer(to, models=True)
    other = to != "hf" or naming not in (None, "hf")
    bits, forward = computed.to_bits, computed.prove_forward
    if bits and (dtype or (other and ((to, naming) != ("gguf", None) or bits not in ("q4_k", "q4_0")))):
        form = "a GGUF file" if bits in ("q4_k", "q4_0") else "an hf folder"
        raise TensorkeepError(f"{bits} makes {form} alone", where="--to-bits", hint="leave --to, --dtype out")
    if forward and (other or bits):
        what, hint = "an hf folder of floats alone is run beside PEFT", "leave --to, --naming and --to-bits out"
        raise TensorkeepError(what, where="--prove-forward", hint=hint)
    if computed.calibrate and not bits:
        raise TensorkeepError("is for --to-bits", where="--calibrate", hint="add --to-bits nf4")
    if len(paths) < 2:
        raise TensorkeepError("merge needs a base, an adapter and a sink", hint="tensorkeep merge BASE ADAPTER OUT")
    return "hf" if bits else to


def _refuse_sources(base: StateView, sources: list[Any], allow_other_base: bool) -> None:
    """Refuse adapters that the base holds already, or that name another one."""
    from tensorkeep.adapters import merging

    merging.refuse_merged_before(base, sources)
    merging.refuse_other_base(base, [] if allow_other_base else sources)


def _recorder(
    recorded: Recorded, base: StateView, sources: list[Any], computed: Computed, onto: str, named: dict[str, Any]
) -> Recorder:
    """Return what leaves the merge's statement beside it."""
    if computed.to_bits is not None:
        return rounded(recorded, partial(_made_from, base, sources), computed, onto, named["untie"])
    return recorded.of("merge", _made_from(base, sources), onto=onto, dtype=named["dtype"], untie=named["untie"])


def _made_from(base: StateView, sources: list[Any]) -> list[Source]:
    """List what a merge is made from, for its statement."""
    adapters = [(s.adapter.view, "adapter", s.weight) for s in sources if s.adapter.view is not base]
    return [(base, "base", 1.0), *adapters]


def _left_out_by_peft(base: StateView, sources: list[Any]) -> list[Note]:
    """Say (K07) what PEFT itself would not load of an adapter onto a mixture of experts; this merge takes all of it."""
    try:
        from tensorkeep.models.peft_loading import left_out_by_peft
    except ImportError:
        return []
    notes = []
    for source in sources:
        adapter = source.adapter
        found = left_out_by_peft(base, adapter.document, adapter.view, [n for p in adapter.pairs.values() for n in p])
        if found is not None:
            text = (
                f"PEFT {found[0]} leaves out {len(found[1])} tensors of {source.path} when it loads it, and does not "
            )
            text += f"say so: {', '.join(grouped(found[1])[:3])}; this merge has them, PEFT's own has not"
            notes.append(Note("K07", text, tuple(found[1])))
    return notes


def _carry_out(
    out: Output,
    job: Any,
    sink: str,
    to: str,
    limit: int | None,
    dry_run: bool,
    overwrite: bool,
    proven: Callable[..., Any] | None,
    made: Recorder,
) -> int:
    """Merge as planned, or show the plan alone."""
    from tensorkeep.adapters import merging
    from tensorkeep.commands.programs import installed
    from tensorkeep.conversion.sink import sink_files
    from tensorkeep.conversion.targets import check

    proof = check(job.plan, to, Path(sink).name, programs=installed())
    for note in job.plan.notes:
        out.remark(f"note: {note.code} {note.message}")
    if dry_run:
        sink_files(job.plan, Path(sink).name, to, limit)
        return _show_plan(out, job, proof, sink, to)
    prepare(out, sink)
    with out.progress() as progress:
        done = proven(progress) if proven else merging.merge(job, sink, to, limit, overwrite, progress)
    for note in done.notes:
        out.remark(f"note: {note.code} {note.message}")
    for said in found_in_store(done):
        out.remark(said)
    made(out, sink)
    return _show(out, job, proof, done, to)


def _opened(
    out: Output, paths: tuple[str, ...], config: str | None, stack: contextlib.ExitStack
) -> tuple[StateView, list[Any]]:
    """The base and the adapters; where no adapter is given, the one in the base's own file, or of the run."""
    from tensorkeep.adapters.planning import open_adapters
    from tensorkeep.commands.export import adapter_run, base_of_run

    trained = adapter_run(paths[0])
    if trained is not None:
        if len(paths) > 2:
            what, hint = "is a run with an adapter, not a base", f"tensorkeep merge {word(paths[0])} OUT"
            raise TensorkeepError(what, where=paths[0], code="K08", hint=hint)
        paths = (base_of_run(trained), *paths)
    base = with_config(read(paths[0]), config)
    if base.format == "peft":
        raise TensorkeepError(
            "is an adapter, not a base", where=paths[0], hint="the base comes first: tensorkeep merge BASE ADAPTER OUT"
        )
    given = [_split_weight(p) for p in paths[1:-1]]
    return base, open_adapters([(_adapter(out, p, stack), w) for p, w in given] or [(base, 1.0)])


def _adapter(out: Output, path: str, stack: contextlib.ExitStack) -> StateView:
    """An adapter as it is stored; of a run, its newest checkpoint's last weights."""
    from tensorkeep.commands.export import adapter_run, read_run

    run = adapter_run(path)
    if run is None:
        return read(path)
    place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tensorkeep-"))) / "adapter"
    return read_run(out, run, place)


def _split_weight(text: str) -> tuple[str, float]:
    """`ADAPTER=0.5` as path and weight; a path that exists as it stands is never taken apart.

    >>> _split_weight("runs/style=0.5"), _split_weight("runs/style")
    (('runs/style', 0.5), ('runs/style', 1.0))
    """
    path, found, weight = text.rpartition("=")
    if not found or Path(text).exists():
        return text, 1.0
    try:
        value = float(weight)
    except ValueError:
        value = float("nan")
    if not abs(value) < 1e6 or value == 0:
        raise TensorkeepError(
            f"{weight!r} is no weight", where=path, hint="e.g. ADAPTER=0.5; leave an adapter out to give it none"
        )
    return path, value


def _show_plan(out: Output, job: Any, proof: Any, sink: str, to: str) -> int:
    plan = job.plan
    if out.json:
        out.document(
            {
                "dry_run": True,
                "sink": sink,
                "format": to,
                "naming": plan.naming,
                "root": plan.root,
                "bytes": plan.nbytes,
                "onto": job.onto,
                "quantization": job.kind,
                "adapters": _adapters(job),
                "steps": plan.to_json(),
                "proof": {**proof.to_json(), "bytes": False},
            }
        )
    for step in plan.steps:
        out.line(step.told(plan.sources))
    out.line(f"{len(plan.tensors)} tensors, {size(plan.nbytes)}; {len(job.terms)} merged; nothing written")
    return 0


def _adapters(job: Any) -> list[dict[str, Any]]:
    return [
        {
            "path": s.path,
            "digest": s.digest,
            "weight": s.weight,
            "kind": s.adapter.kind,
            "modules": sum(t.number == i for ts in job.terms.values() for t in ts),
        }
        for i, s in enumerate(job.sources)
    ]


def _show(out: Output, job: Any, proof: Any, done: Any, to: str) -> int:
    """What was added to what, how far the weights moved, and what a requantization would have left of it."""
    from tensorkeep.adapters import merging

    rows, whole = merging.figures(job, done.moved), merging.overall(done.moved)
    if out.json:
        out.document(
            {
                "sink": done.path,
                "format": to,
                "naming": job.plan.naming,
                "root": job.plan.root,
                "bytes": done.nbytes,
                "tensors": len(done.digests),
                "base": {"path": job.view.path, "digest": done.base_digest},
                "onto": job.onto,
                "quantization": job.kind,
                "adapters": _adapters(job),
                "merged": rows,
                "overall": whole,
                "proven": True,
                "proof": proof.to_json(),
                "dropped": [{"name": s.parts[0].name, "reason": s.reason} for s in job.plan.dropped],
                "notes": [
                    {"code": n.code, "message": n.message, "tensors": list(n.names)}
                    for n in (*job.plan.notes, *done.notes)
                ],
                "seconds": done.seconds,
            }
        )
        return 0
    for entry in _adapters(job):
        times = f", times {entry['weight']:g}" if entry["weight"] != 1 else ""
        out.line(f"{entry['path']}: {entry['kind']} on {entry['modules']} tensors{times}")
    out.line(_onto(job, whole))
    quantized = any(r["kept"] is not None for r in rows)
    columns = ["tensor", "added", "change", *(["kept if requantized"] if quantized else [])]
    out.table(columns, _rows(rows, quantized), right=columns[2:])
    if whole["change"] is not None:
        out.line(
            f"{len(rows)} of {len(done.digests)} tensors changed, by {share(whole['change'])} of their size together"
        )
    if whole["kept"] is not None and whole["kept"] < 0.9:
        kind = f"Quantized to {job.kind} again, the merged weights would keep {share(whole['kept'])} of the update"
        out.line(f"{kind}: keep them as they are, or keep the adapter apart")
    took = f"computed twice, {proof.line} ({sum(done.seconds.values()):.1f} s)"
    out.line(f"{done.path}: {len(done.digests)} tensors, {size(done.nbytes)}, {took}")
    return 0


def _onto(job: Any, whole: dict[str, float | None]) -> str:
    """Which weights were added to, in a sentence."""
    if job.kind is None and any(s.adapter.document.get("quantization") for s in job.sources):
        return "onto the original float weights, though the adapter was trained on quantized ones"
    if job.kind is None:
        return "onto the base's weights as they are"
    far = whole["original_distance"]
    if far is None:
        return f"onto the weights it was trained on: {job.kind}, dequantized"
    away = f"they are {share(far)} away from the original ones"
    return f"onto the weights it was trained on: {job.kind}, dequantized; {away}"


def _rows(rows: list[dict[str, Any]], quantized: bool) -> list[list[object]]:
    """Rows of the table: one a tensor where few, one a kind of layer (the range over layers) where many."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        alike = row["name"] if len(rows) <= _MOST_ROWS else re.sub(r"\d+", "#", row["name"])
        groups.setdefault((alike, row["kind"]), []).append(row)
    return [
        [
            ", ".join(grouped(r["name"] for r in found)),
            kind,
            _range(found, "change"),
            *([_range(found, "kept")] if quantized else []),
        ]
        for (_, kind), found in groups.items()
    ]


def _range(rows: list[dict[str, Any]], key: str) -> str:
    values = sorted(r[key] for r in rows if r[key] is not None)
    if not values:
        return "-"
    low, high = share(values[0]), share(values[-1])
    return low if low == high else f"{low} to {high}"


def share(value: float | None) -> str:
    """A part of a whole for people.

    >>> share(0.0213), share(0.84), share(None), share(1e-6)
    ('2.1 %', '84 %', '-', '0.0001 %')
    """
    return "-" if value is None else f"{100 * value:.2g} %" if abs(value) < 0.095 else f"{100 * value:.0f} %"
