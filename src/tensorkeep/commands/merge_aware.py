"""`tensorkeep merge RUN OUT --to-bits nf4` of a run that was trained for these bits: its own codes, no texts."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tensorkeep.commands.merge_bits import Computed
from tensorkeep.commands.merge_recorded import trained
from tensorkeep.commands.programs import installed
from tensorkeep.commands.shared import prepare, shard_limit
from tensorkeep.commands.sign import Recorded
from tensorkeep.conversion.execution import convert
from tensorkeep.conversion.targets import check
from tensorkeep.errors import TensorkeepError, word
from tensorkeep.output import Output, size


def as_trained(
    out: Output,
    paths: tuple[str, ...],
    to: str,
    computed: Computed,
    shard_size: str | None,
    overwrite: bool,
    dry_run: bool,
    recorded: Recorded = Recorded(),
) -> int | None:
    """Merge a quantize-aware run into the codes that its forward computes with, where that is asked for.

    Args:
        out: where to print; is told that floats are another model where nothing is asked for.
        paths: of the command line.
        to: the format that was asked for; "hf" where nothing was.
        computed: what was asked for.
        shard_size: the largest weight file.
        overwrite: replace what is there.
        dry_run: write nothing.
        recorded: what is left beside the sink.

    Returns:
        The exit code; None where this is an ordinary merge.

    Raises:
        TensorkeepError: another kind or more than the run is asked for, or as `aware_merge`.
    """
    found = _aware_run(paths)
    if found is None or computed.to_bits is None:
        if computed.ema:
            hint = "tensorkeep convert RUN ADAPTER --to peft --ema, and merge that"
            raise TensorkeepError("is for --to-bits of a run with quantize_aware", where="--ema", hint=hint)
        if found is not None:
            what = f"was trained for {found[1]}: floats are not what it computed with, --to-bits {found[1]} is"
            out.remark(f"note: {found[0]} {what}")
        return None
    run, kind = found
    sink, own = paths[-1], f"tensorkeep merge {word(run)} {word(paths[-1])} --to-bits {kind}"
    if computed.to_bits != kind or len(paths) != 2 or computed.calibrate or dry_run:
        what = f"was trained for {kind}, and its codes are made of the run alone"
        raise TensorkeepError(what, where=run, hint=own)
    if "://" in sink:
        raise TensorkeepError("is written as a local folder or file alone", where=sink, hint="then: tensorkeep convert")
    if kind == "q4_0" and (not sink.endswith(".gguf") or to not in ("hf", "gguf")):
        raise TensorkeepError("q4_0 is GGUF's", where=sink, hint=own.replace(word(sink), word(f"{sink}.gguf")))
    return _merge(out, run, kind, sink, computed.ema, shard_limit(shard_size, to, sink), overwrite, recorded)


def _aware_run(paths: tuple[str, ...]) -> tuple[str, str] | None:
    """Return the quantize-aware run among what is merged, and its format; None where there is none."""
    from tensorkeep.commands.export import run_at

    for path in paths[:-1]:
        found = run_at(path if Path(path).exists() else path.rpartition("=")[0] or path)
        if found is not None and found.adapter and not found.detection:
            from tensorkeep.language.aware_merge import aware_kind

            kind = aware_kind(found.path)
            if kind is not None:
                return found.path, kind
    return None


def _merge(
    out: Output, run: str, kind: str, sink: str, ema: bool, limit: int | None, overwrite: bool, recorded: Recorded
) -> int:
    """Write the codes, compare them with codes made anew, and say so."""
    from tensorkeep.language.aware_merge import aware_merge, check_written

    prepare(out, sink)
    recorded.of("merge", ())  # who signs is known before anything is made
    place = Path(sink).absolute().parent
    with tempfile.TemporaryDirectory(prefix=".tensorkeep-", dir=place) as scratch:
        with out.progress() as progress:
            made = aware_merge(run, Path(scratch) / "merged", ema, out.remark)
            proof = check(made.plan, made.to, Path(sink).name, programs=installed())
            done = convert(made.plan, sink, made.to, limit, overwrite, progress)
            equal = check_written(made, sink)
        trained(recorded, out, run, kind, made.averaged, Path(scratch) / "adapter")(out, sink)
    for note in made.plan.notes:
        out.remark(f"note: {note.code} {note.message}")
    if out.json:
        written = {"sink": done.path, "format": made.to, "bytes": done.nbytes, "tensors": len(done.digests)}
        codes = {"quantize_aware": kind, "averaged": made.averaged, "equal": equal}
        out.document({**written, **codes, "proof": proof.to_json()})
        return 0
    held = "of the averaged weights" if made.averaged else "of the last step"
    out.line(f"{equal} weights {held} in {kind}, read back: each has the codes that the run's forward computes with")
    out.line(f"{done.path}: {len(done.digests)} tensors, {size(done.nbytes)}, {proof.line}")
    return 0
