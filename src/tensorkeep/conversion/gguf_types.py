"""Choose the type of every tensor of a GGUF file, as llama.cpp computes with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tensorkeep.conversion.plan import Plan, Step
from tensorkeep.conversion.streams import as_stored
from tensorkeep.errors import TensorkeepError, word
from tensorkeep.formats.view import Note, StateView
from tensorkeep.quantization.stored import find_quantized
from tensorkeep.storage.layout import SinkTensor
from tensorkeep.storage.record import BLOCK_TYPES, DTYPES, OTHER_BLOCKS, PASSED_BLOCKS

_MATRICES = ("F32", "F16", "BF16")


def refuse_made_elsewhere(dtype: str, sources: Sequence[str], out: str, command: str = "convert") -> None:
    """Stop at a type of blocks that llama.cpp's own tool makes and the gguf package only reads.

    Args:
        dtype: the type's word, in capitals.
        sources: the paths that are converted, for the line that makes it.
        out: the path that was asked for.
        command: the command that was given.

    Raises:
        TensorkeepError: the type is one of them; the hint has the lines that make it.
    """
    if dtype not in OTHER_BLOCKS:
        return
    final = out if out.endswith(".gguf") else f"{out}.gguf"
    wide = final.removesuffix(".gguf") + "-f16.gguf"
    first = f"tensorkeep {command} {' '.join(map(word, sources))} {word(wide)} --to gguf --dtype fp16"
    raise TensorkeepError(
        f"{dtype} is read here and not made: the gguf package has no quantizer for it",
        where="--dtype",
        hint=f"{first} && llama-quantize {word(wide)} {word(final)} {dtype}",
    )


def refuse_types(to: str, naming: str | None, dtype: str | None, sources: Sequence[StateView]) -> None:
    """Stop where blocks are asked of another format than GGUF, or other names than llama.cpp's of GGUF.

    Args:
        to: the output's format.
        naming: the naming that was asked for; None for the format's own.
        dtype: the dtype that was asked for; None where each tensor keeps its own.
        sources: the checkpoints.

    Raises:
        TensorkeepError: the weights are codes that GGUF has not (Q01), or the format has no such type or no such names.
    """
    if dtype is not None:
        refuse_made_elsewhere(dtype, [str(v.path) for v in sources], "OUT.gguf")
    if to == "gguf" and naming not in (None, "gguf"):
        raise TensorkeepError(f"a GGUF file has llama.cpp's names, not {naming}'s", hint="leave --naming out")
    if to == "gguf" and dtype is None:
        for view in sources:
            weights = find_quantized(view)
            if weights:
                what = f"{len(weights)} weights are {next(iter(weights.values())).kind} codes, which GGUF has not"
                raise TensorkeepError(what, where=view.path, code="Q01", hint="--dtype bf16, or --dtype q8_0")
    if to != "gguf" and dtype in BLOCK_TYPES:
        raise TensorkeepError(f"{dtype} is a type of GGUF's", hint="--to gguf, or another --dtype")


def dtypes_of(sources: Sequence[StateView], to: str, dtype: str | None, notes: list[Note]) -> list[str | None]:
    """Return the dtype that each source's floats are cast to: the user's, or bfloat16 for a quantized GGUF.

    A quantized file's F32 norms follow: they were widened when it was made, and a model loads in one dtype. Written as
    GGUF again they stay, as do blocks that nothing changes (`gguf_steps`).

    Args:
        sources: the checkpoints.
        to: the output's format.
        dtype: the dtype that was asked for.
        notes: gains V02 where nothing was asked for and what a quantized GGUF decodes to is rounded.

    Returns:
        One for each source; None keeps its floats as they are.
    """
    quantized = [any(r.encoding != "plain" for r in view.records.values()) for view in sources]
    wanted = None if dtype in BLOCK_TYPES else dtype
    if to == "gguf":
        return [wanted for _ in sources]
    for view, found in zip(sources, quantized):
        if found and dtype is None:
            kinds = ", ".join(sorted({r.encoding for r in view.records.values()} - {"plain"}))
            what = f"{kinds} weights, and the F32 ones beside them, are rounded to bfloat16"
            notes.append(Note("V02", f"{what}; --dtype fp32 keeps what they decode to"))
    return [wanted or ("BF16" if found else None) for found in quantized]


def gguf_steps(
    steps: Sequence[Step], to: str, dtype: str | None, notes: list[Note], sources: Sequence[StateView]
) -> list[Step]:
    """Return a plan's steps with the types of a GGUF file; those of another format as they are.

    llama.cpp computes with vectors and routers in float32 alone; the rest may be float32, float16, bfloat16 or blocks.

    Args:
        steps: with floating tensors in any dtype.
        to: the output's format.
        dtype: what was asked for; of it, only a block-quantized type ("Q8_0") is not done yet.
        notes: gains one for matrices whose rows are no whole blocks and which become float16, and one for blocks that
            cannot be kept where no type was asked for.
        sources: the checkpoints; blocks of a GGUF file that nothing changes stay as they are.

    Raises:
        TensorkeepError: a tensor has a dtype that GGUF has not.
    """
    if to != "gguf":
        return list(steps)
    blocks = dtype if dtype in BLOCK_TYPES else None
    out = [s if s.sink is None else _typed(s, s.sink, blocks, dtype, sources) for s in steps]
    moved = [s.sink.name for s in out if s.sink is not None and s.sink.encoding == "plain" and _blocks(s, sources)]
    if dtype is None and moved:
        what = f"{len(moved)} quantized weights change and are rounded to bfloat16, first {moved[0]}"
        notes.append(Note("V02", f"{what}; --dtype says another type", tuple(moved)))
    odd = [s.sink.name for s in out if blocks and s.sink is not None and s.sink.dtype == "F16"]
    if odd:
        what = f"rows of {len(odd)} matrices are no whole blocks of {blocks} and are stored as F16, first {odd[0]}"
        notes.append(Note("Q06", what, tuple(odd)))
    return out


def remarks(plan: Plan) -> list[Note]:
    """Return what a GGUF file leaves out of a model, for the user to know.

    Args:
        plan: what will be written.
    """
    out = []
    if not any(c.name.startswith(("tokenizer", "vocab")) for c in plan.companions):
        out.append(Note("C03", "no tokenizer lies beside the model: llama.cpp loads the file and cannot take text"))
    config = plan.config or {}
    window, longest = config.get("sliding_window"), config.get("max_position_embeddings")
    limited = isinstance(window, int) and isinstance(longest, int) and window < longest
    if config.get("model_type") == "phi3" and limited:
        what = f"phi3's layers see {window} tokens back, and llama.cpp lets them see all: texts beyond that differ"
        out.append(Note("C03", what))
    return out


def _blocks(step: Step, sources: Sequence[StateView]) -> set[str]:
    """Return the types of blocks that a step's parts are stored in."""
    return {sources[p.source][p.name].encoding for p in step.parts} - {"plain"}


def _typed(step: Step, sink: SinkTensor, blocks: str | None, dtype: str | None, sources: Sequence[StateView]) -> Step:
    """Return one step with the type of its tensor in a GGUF file."""
    made, encoding = sink.dtype, "plain"
    found = _blocks(step, sources)
    if dtype is None and found:
        kept = sink._replace(dtype="F32", encoding=min(found), tied_to=None)
        if kept.encoding in PASSED_BLOCKS and as_stored(replace(step, sink=kept), sources) is not None:
            return replace(step, sink=kept)
        wide = len(sink.shape) < 2 or sink.name.endswith("ffn_gate_inp.weight")
        actions = dict.fromkeys([*(a for a in step.actions if a != "keep"), *([] if wide else ["cast"])])
        return replace(step, actions=tuple(actions) or ("keep",), sink=sink._replace(dtype="F32" if wide else "BF16"))
    if not DTYPES[sink.dtype].floating:
        raise TensorkeepError(f"{sink.name}: llama.cpp has no {sink.dtype} weights", hint="--to hf keeps them")
    if len(sink.shape) < 2 or sink.name.endswith("ffn_gate_inp.weight"):
        made = "F32"
    elif blocks and sink.shape[-1] % BLOCK_TYPES[blocks][0] == 0:
        made, encoding = "F32", blocks
    elif blocks:
        made = "F16"
    elif sink.dtype == "F64":
        made = "F32"
    elif sink.dtype not in _MATRICES:
        raise TensorkeepError(f"{sink.name}: {sink.dtype} is no type of GGUF's", hint="--dtype bf16")
    if (made, encoding) == (sink.dtype, sink.encoding):
        return step
    done = "cast" if encoding == "plain" else "quantize"
    actions = dict.fromkeys([*(a for a in step.actions if a not in ("keep", "cast")), done])
    return Step(tuple(actions), step.parts, sink._replace(dtype=made, encoding=encoding, tied_to=None), step.reason)
