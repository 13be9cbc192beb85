"""`tensorkeep merge --to-bits nf4`: merge in floats, then round to codes for what the model computes on texts."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cyclopts import Parameter

from tensorkeep.commands.programs import installed
from tensorkeep.commands.shared import Flag, prepare
from tensorkeep.commands.sign import Recorder
from tensorkeep.commands.train_language import Several
from tensorkeep.conversion.execution import convert
from tensorkeep.conversion.targets import check
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import StateView
from tensorkeep.output import Output, size

_SHOWN = 3  # layers that keep least


@Parameter(name="*")
@dataclass(frozen=True)
class Computed:
    """What a merge computes with the whole model.

    Args:
        to_bits: Round merged linears and experts for what they compute on the texts of --calibrate: nf4, fp4, int8
            (bitsandbytes), mxfp4 (compressed-tensors), q4_k (a GGUF file). Of a run that was trained with
            quantize_aware, nf4 or q4_0 (GGUF) as there: the codes of its forward, no texts.
        calibrate: Texts like what the model is for, as training reads them; may be given several times.
        prove_forward: Texts to run the merged model on, layer by layer beside its base with the adapter active in PEFT.
        ema: Take the averaged weights of a run that was trained with quantize_aware.
        device: Where --to-bits and --prove-forward compute, cpu or cuda. Default: a GPU where there is one.
    """

    to_bits: Literal["nf4", "fp4", "int8", "mxfp4", "q4_k", "q4_0"] | None = None
    calibrate: Several = ()
    prove_forward: Several = ()
    ema: Flag = False
    device: str | None = None


def merge_in_bits(
    out: Output,
    job: Any,
    base: StateView,
    sink: str,
    computed: Computed,
    limit: int | None,
    overwrite: bool,
    recorded: Recorder,
) -> int:
    """Carry out a merge plan whose sink holds quantized weights; print how much of the update is left.

    Args:
        out: where to print.
        job: a plan of float32 weights in an hf folder.
        base: what the adapters are merged into.
        sink: the folder to write, or with q4_k the file.
        computed: the kind of codes, the texts and the device.
        limit: bytes of a weight file.
        overwrite: replace what is there.
        recorded: leaves the statement beside the sink, where one is asked for.

    Returns:
        The exit code.

    Raises:
        TensorkeepError: there is no text, or as `rounded_merge`.
    """
    from tensorkeep.adapters import merging
    from tensorkeep.language.rounded_merge import refuse_experts, rounded_merge

    bits, texts, device = computed.to_bits, computed.calibrate, computed.device
    if bits == "q4_0":
        hint = "train with --quantize-aware q4_0; any model: tensorkeep convert MODEL OUT.gguf --to gguf --dtype q4_0"
        raise TensorkeepError("q4_0 is of runs that were trained for it", where="--to-bits", hint=hint)
    if not texts or bits is None:
        hint = "add --calibrate FILE: JSON lines, text or parquet, like what the model is for"
        raise TensorkeepError(f"{bits} rounds by texts, and none are named", where="--to-bits", hint=hint)
    if "://" in sink:
        raise TensorkeepError("rounds onto a local disk alone", where=sink, hint="then: tensorkeep convert")
    refuse_experts(base, bits)
    to, place = "gguf" if bits == "q4_k" else "hf", Path(sink).absolute().parent
    prepare(out, sink)
    with tempfile.TemporaryDirectory(prefix=".tensorkeep-", dir=place) as scratch, out.progress() as progress:
        merged, rounding = (Path(scratch) / name for name in ("merged", "rounded"))
        done = merging.merge(job, str(merged), "hf", None, False, progress)
        plan, figures = rounded_merge(str(merged), base, job.kind, texts, bits, rounding, device, progress, out.remark)
        proof = check(plan, to, Path(sink).name, programs=installed())
        made = convert(plan, sink, to, limit, overwrite, progress)
    recorded(out, sink)
    for note in (*job.plan.notes, *done.notes):
        out.remark(f"note: {note.code} {note.message}")
    if out.json:
        out.document(_document(made, to, job, figures, proof))
        return 0
    if job.kind is not None:
        out.line(f"onto the weights it was trained on: {job.kind}, dequantized")
    _show(out, figures)
    out.line(f"{made.path}: {len(made.digests)} tensors, {size(made.nbytes)}, {proof.line}")
    return 0


def _document(made: Any, to: str, job: Any, figures: dict[str, Any], proof: Any) -> dict[str, Any]:
    """Return what `--json` prints."""
    return {
        "sink": made.path,
        "format": to,
        "bytes": made.nbytes,
        "tensors": len(made.digests),
        "onto": job.onto,
        "merged": len(job.terms),
        "rounded": figures,
        "proof": proof.to_json(),
    }


def _show(out: Output, figures: dict[str, Any]) -> None:
    """Print the divergences, then the layers whose outputs are furthest off."""
    kl, loss = figures["kl"], figures["loss"]
    spoken = {"base": "the base, without the update", "plain": "rounded number by number", "rounded": "this merge"}
    kept = {"base": 0.0, "plain": figures["kept_plain"], "rounded": figures["kept"]}
    rows = [[spoken[n], f"{kl[n]:.4g}", f"{100 * kept[n]:.1f} %", f"{loss[n]:.4f}"] for n in spoken]
    rows.insert(1, ["the merged model in floats", "0", "100 %", f"{loss['merged']:.4f}"])
    columns = ["weights", "KL to the merged model", "of the update kept", "loss"]
    out.table(columns, rows, right=columns[1:])
    worst = sorted(figures["layers"], key=lambda r: -r["error"])[:_SHOWN]
    named = ", ".join(f"{r['name']} {100 * r['error']:.2g} % (plain {100 * r['plain']:.2g} %)" for r in worst)
    out.line(f"largest errors of a layer's output, squared: {named}")
    if figures["wide"]:
        odd, count = figures["wide"][0], len(figures["wide"])
        out.line(f"{count} linears stay floats, their rows are no whole blocks: first {odd}")
    forms = ", ".join(f"{count} weights in {form}" for form, count in figures["forms"].items())
    by = f"{forms} at {figures['bits']:g} bits a weight, rounded to fit {figures['calibration_tokens']:,} tokens"
    out.line(f"measured on {figures['tokens']:,} held-out tokens of the texts; {by}")
