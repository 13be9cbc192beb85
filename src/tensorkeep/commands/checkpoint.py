"""One short function a command: read, call a tool, show. The docstrings are the help texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from tensorkeep.convert import naming as namings
from tensorkeep.errors import TensorkeepError, near_misses
from tensorkeep.findings import EXIT, verdict_of
from tensorkeep.formats.names import grouped, matches
from tensorkeep.output import Output, number, size
from tensorkeep.storage.record import SPELLINGS
from tensorkeep.formats.view import StateView, read

Flag = Annotated[bool, Parameter(negative="", show_default=False)]


@Parameter(name="*")
@dataclass(frozen=True)
class Say:
    """Flags of every command.

    Parameters
    ----------
    json
        One JSON document on stdout.
    quiet
        Nothing on stderr but errors.
    """

    json: Flag = False
    quiet: Flag = False

    def output(self) -> Output:
        return Output(self.json, self.quiet)


def inspect(checkpoint: str, /, *, tensors: str | None = None, digests: Flag = False, say: Say = Say()) -> int:
    """What is in a checkpoint: format, naming, tensors, sizes, ties, quantisation, step.

    Parameters
    ----------
    checkpoint
        A file, a folder, a Hub model id or a URL.
    tensors
        Show only tensors whose name fits this pattern, one line each ('*q_proj*').
    digests
        Read the data and give each tensor's xxh3_128 too.
    """
    from tensorkeep.diagnose import inspect as inspection

    out = say.output()
    view = read(checkpoint)
    chosen = [n for n in view if tensors is None or matches(n, [tensors])]
    if tensors and not chosen:
        raise TensorkeepError(
            f"no tensor fits {tensors!r}",
            where=checkpoint,
            hint=near_misses(tensors.strip("*."), {s for n in view for s in n.split(".")})
            or "list them all without --tensors",
        )
    identity = namings.identify(view)
    found: dict[str, str] = {}
    if digests:
        with out.progress() as progress:
            found = inspection.digests(view, chosen, progress)
    if say.json:
        out.document(inspection.document(view, identity, chosen, found))
        return 0
    for line in inspection.summary(view, identity):
        out.line(line)
    columns = ["tensor", "dtype", "shape", "bytes", "file"] + (["xxh3_128"] if digests else [])
    rows = inspection.rows(view, chosen, found, gathered=tensors is None and not digests)
    out.table(columns, rows, right=["bytes"])
    for note in view.notes:
        out.remark(f"note: {note.code} {note.message}")
    return 0


def diff(a: str, b: str, /, *, config: str | None = None, say: Say = Say()) -> int:
    """Compare two checkpoints tensor by tensor, whatever their formats and namings.

    Exit code 1 when they differ.

    Parameters
    ----------
    a, b
        Files, folders, Hub model ids or URLs.
    config
        A config.json (or a folder with one), where neither side brings its own and head sizes matter.
    """
    from tensorkeep.diagnose.compare import compare

    out = say.output()
    first, second = _with_config(read(a), config), read(b)
    with out.progress() as progress:
        found = compare(first, second, progress)
    counts: dict[str, int] = {}
    for row in found:
        counts[row.status] = counts.get(row.status, 0) + 1
    differing = [r for r in found if r.status != "equal"]
    out_document = {"a": a, "b": b, "equal": not differing, "counts": counts, "tensors": [r.to_json() for r in found]}
    if say.json:
        out.document(out_document)
        return 1 if differing else 0
    elements = [sum(h.elements for h in view.values()) for view in (first, second)]
    out.line(f"A {a}: {first.format}, {len(first)} tensors, {elements[0]:,} elements")
    out.line(f"B {b}: {second.format}, {len(second)} tensors, {elements[1]:,} elements")
    if not differing:
        out.line(f"equal: all {len(found)} tensors, bit for bit")
        return 0
    rows = [
        (r.name, _status(r), _sides(r), r.different or "-", number(r.max_difference), number(r.relative))
        for r in differing
    ]
    out.table(
        ["tensor", "difference", "A / B", "elements", "largest", "relative"],
        rows,
        right=["elements", "largest", "relative"],
    )
    out.line(f"{len(differing)} of {len(found)} tensors differ")
    moved = [r.name for r in differing if r.same_rows]
    if moved:
        out.line(f"the same rows in another order: {', '.join(grouped(moved)[:4])}")
    return 1


def _status(row: Any) -> str:
    words = {"only_a": "only in A", "only_b": "only in B", "values": "values", "shape": "shape", "dtype": "dtype"}
    if row.status == "dtype":
        return "dtype, same values" if not row.different else "dtype and values"
    return "same rows, other order" if row.same_rows else words[row.status]


def _sides(row: Any) -> str:
    shown = [f"{h.dtype}{list(h.shape)}" if h else "-" for h in (row.a, row.b)]
    return shown[0] if shown[0] == shown[1] else f"{shown[0]} / {shown[1]}"


def verify(checkpoint: str, /, *, say: Say = Say()) -> int:
    """Is it complete, is it undamaged: structure, digests of the certificate, CRCs.

    Exit code 1 when something is wrong.

    Parameters
    ----------
    checkpoint
        A file or folder.
    """
    from tensorkeep.diagnose.verify import verify as run

    out = say.output()
    with out.progress() as progress:
        findings, view, certified = run(checkpoint, progress)
    verdict = verdict_of(findings)
    if say.json:
        out.document({
            "checkpoint": checkpoint, "verdict": verdict, "certificate": certified,
            "tensors": len(view) if view is not None else 0, "findings": [f.to_json() for f in findings],
        })  # fmt: skip
        return EXIT[verdict]
    for finding in findings:
        out.line(f"{finding.severity}: {finding.code} {finding.message}")
        if finding.tensors:
            out.line(f"  {', '.join(grouped(finding.tensors)[:6])}")
        if finding.fix:
            out.line(f"  fix: {finding.fix}")
    if view is not None and verdict == "ok":
        content = _proven(checkpoint) if certified else _unproven(view)
        out.line(f"ok: {len(view)} tensors, {size(sum(r.nbytes for r in view.values()))}, complete; {content}")
    return EXIT[verdict]


def _proven(checkpoint: str) -> str:
    whose = (
        "manifest"
        if (Path(checkpoint) / "manifest.json").is_file() or (Path(checkpoint) / "checkpoints").is_dir()
        else "certificate"
    )
    return f"every digest is the {whose}'s"


def _unproven(view: StateView) -> str:
    if view.format in ("dcp", "pth"):
        return "every byte fits the file's own CRC-32 (no certificate)"
    return "no certificate, so the values themselves cannot be checked"


def convert(
    *paths: str,
    to: Literal["hf", "dcp", "pth", "peft"],
    naming: str | None = None,
    root: str | None = None,
    dtype: str | None = None,
    drop: Annotated[tuple[str, ...], Parameter(negative="", show_default=False)] = (),
    prefer: Literal["first", "last"] | None = None,
    from_naming: str | None = None,
    shard_size: str | None = None,
    config: str | None = None,
    ema: Flag = False,
    dry_run: Flag = False,
    overwrite: Flag = False,
    say: Say = Say(),
) -> int:
    """Convert one or more checkpoints into one: SRC... OUT. The result is read back and proven.

    Parameters
    ----------
    paths
        The sources, then the sink: a folder, or a file ending in .safetensors or .pth.
    to
        The sink's format.
    naming
        The sink's names: hf, torchtitan, torchtitan-0.2, minimind, opentad, videomae. Default hf.
    root
        Nest the sink's names under this word (older flame: model), or none.
    dtype
        Cast every floating tensor (bf16, fp16, fp32, ...). Default: keep each as it is.
    drop
        Leave out tensors whose stored name fits this pattern; may be given several times.
    prefer
        Which source wins where two hold the same tensor.
    from_naming
        The sources' naming, where detection gets it wrong.
    shard_size
        Largest data file, e.g. 5GB.
    config
        A config.json (or a folder with one) for sources that bring none.
    ema
        Of a run: its averaged weights instead of the last (--to hf, or peft where it trained an adapter).
    dry_run
        Print the plan and write nothing.
    overwrite
        Replace an existing sink, once the new one is proven.
    """
    from tensorkeep.commands import export as commands_export
    from tensorkeep.convert import convert as conversion
    from tensorkeep.convert.planning import make_plan

    out = say.output()
    if len(paths) < 2:
        raise TensorkeepError("convert needs a source and a sink", hint="tensorkeep convert SRC... OUT --to dcp")
    if len(paths) == 2 and not dry_run:
        made = commands_export.of_run(out, paths[0], paths[1], to, naming, ema, overwrite)
        if made is not None:
            return made
    sources = [_with_config(read(p), config) for p in paths[:-1]]
    plan = make_plan(
        sources, to, naming=_known_naming(naming), root=None if root in (None, "none") else root, dtype=_known_dtype(dtype),
        drop=drop, prefer=prefer, from_naming=_known_naming(from_naming),
    )  # fmt: skip
    limit = parse_size(shard_size) if shard_size else None
    _announce(out, plan)
    if dry_run:
        conversion.sink_files(plan, Path(paths[-1]).name, to, limit)  # refuses what could not be laid out
        return _show_plan(out, plan, paths[-1], to)
    with out.progress() as progress:
        result = conversion.convert(plan, paths[-1], to, limit, overwrite, progress)
    return _show_result(out, plan, result, to)


def _show_plan(out: Output, plan: Any, sink: str, to: str) -> int:
    """What a conversion would do, line by line."""
    if out.json:
        shown = {"format": to, "naming": plan.naming, "root": plan.root, "bytes": plan.nbytes, "steps": plan.to_json()}
        out.document({"dry_run": True, "sink": sink, **shown})
    for step in plan.steps:
        out.line(step.line)
    out.line(f"{len(plan.tensors)} tensors, {size(plan.nbytes)}; {len(plan.dropped)} dropped; nothing written")
    return 0


def _show_result(out: Output, plan: Any, result: Any, to: str) -> int:
    """What a conversion did, and what its casts lost."""
    for name, cast in result.casts.items():
        lost = f"{cast.overflowed} values overflowed and {cast.vanished} became zero in the cast"
        out.remark(f"warning: V02 {name}: {lost}")
    if out.json:
        out.document({
            "sink": result.path, "format": to, "naming": plan.naming, "root": plan.root, "bytes": result.nbytes, "tensors": len(result.digests),
            "dropped": [{"name": s.parts[0].name, "reason": s.reason} for s in plan.dropped], "proven": True,
            "notes": [{"code": n.code, "message": n.message, "tensors": list(n.names)} for n in plan.notes],
            "casts": {n: {"overflowed": c.overflowed, "vanished": c.vanished} for n, c in result.casts.items()}, "seconds": result.seconds,
        })  # fmt: skip
    took = sum(result.seconds.values())
    out.line(
        f"{result.path}: {len(result.digests)} tensors, {size(result.nbytes)}, proven equal to the plan ({took:.1f} s)"
    )
    return 0


def _announce(out: Output, plan: Any) -> None:
    """Everything the user should know before anything is written: notes, and what is left out, by reason."""
    for note in plan.notes:
        out.remark(f"note: {note.code} {note.message}")
    reasons: dict[str, list[str]] = {}
    for step in plan.dropped:
        reasons.setdefault(step.reason, []).append(step.parts[0].name)
    for reason, names in reasons.items():
        out.remark(
            f"left out: {', '.join(grouped(names)[:3])}{' ...' if len(grouped(names)) > 3 else ''} ({len(names)}): {reason}"
        )


def _with_config(view: StateView, config: str | None) -> StateView:
    """The view with the config the user names; it also travels to the sink."""
    if config is None or view.config is not None:
        return view
    from tensorkeep.storage.files import LocalFolder
    from tensorkeep.storage.certificate import parse_json
    from tensorkeep.formats.view import COMPANIONS, Companion

    path = Path(config)
    folder = LocalFolder(path if path.is_dir() else path.parent)
    name = "config.json" if path.is_dir() else path.name
    document = parse_json(folder.read(name), f"{folder.url}/{name}")
    if not isinstance(document, dict):
        raise TensorkeepError("is not a config.json", where=path)
    present = folder.names() if path.is_dir() else []
    view.config = document
    view.companions = [Companion("config.json", folder.read(name), f"{folder.url}/{name}"), *view.companions]
    view.companions += [Companion(n, folder.read(n), f"{folder.url}/{n}") for n in COMPANIONS[1:] if n in present]
    return view


def _known_naming(naming: str | None) -> str | None:
    if naming is not None:
        namings.module(naming)
    return naming


def _known_dtype(dtype: str | None) -> str | None:
    if dtype is None:
        return None
    if dtype.lower() not in SPELLINGS:
        raise TensorkeepError(
            f"no dtype {dtype!r}", hint=near_misses(dtype.lower(), SPELLINGS) or "e.g. --dtype bf16, fp16, fp32"
        )
    return SPELLINGS[dtype.lower()]


def parse_size(text: str) -> int:
    """Bytes from `5GB`, `500MB`, `2GiB` or a plain number.

    >>> parse_size("5GB"), parse_size("2GiB")
    (5000000000, 2147483648)
    """
    units = {
        "": 1,
        "B": 1,
        "KB": 10**3,
        "MB": 10**6,
        "GB": 10**9,
        "TB": 10**12,
        "KIB": 2**10,
        "MIB": 2**20,
        "GIB": 2**30,
        "TIB": 2**40,
    }
    digits = text.rstrip("KMGTIBkmgtib ")
    unit = text[len(digits) :].strip().upper()
    try:
        value = float(digits)
    except ValueError:
        value = -1.0
    if unit not in units or value <= 0:
        raise TensorkeepError(f"{text!r} is not a size", hint="e.g. --shard-size 5GB")
    return int(value * units[unit])


def demo(chapter: str = "convert", /, *, out: Path | None = None, say: Say = Say()) -> int:
    """A real model through every format, proven at every stop; and what a broken conversion looks like.

    Parameters
    ----------
    chapter
        convert, diagnose, resume, qlora, detection, or all.
    out
        The folder to leave everything in. Default ./demo
    """
    from tensorkeep.commands.demo import story as chapters

    return chapters.run(chapter, out or Path("demo"), say.output().line)
