"""Choose the type of every tensor of a GGUF file, as llama.cpp computes with it."""

from __future__ import annotations

from collections.abc import Sequence

from tensorkeep.conversion.plan import Step
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import Note, StateView
from tensorkeep.quantization.stored import find_quantized
from tensorkeep.storage.layout import SinkTensor
from tensorkeep.storage.record import BLOCK_TYPES, DTYPES

_MATRICES = ("F32", "F16", "BF16")


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


def dtypes_of(sources: Sequence[StateView], dtype: str | None, notes: list[Note]) -> list[str | None]:
    """Return the dtype that each source's floats are cast to: the user's, or bfloat16 for a quantized GGUF.

    A quantized file's F32 norms follow: they were widened when it was made, and a model loads in one dtype.

    Args:
        sources: the checkpoints.
        dtype: the dtype that was asked for.
        notes: gains V02 where nothing was asked for and what a quantized GGUF decodes to is rounded.

    Returns:
        One for each source; None keeps its floats as they are.
    """
    quantized = [any(r.encoding != "plain" for r in view.records.values()) for view in sources]
    wanted = None if dtype in BLOCK_TYPES else dtype
    for view, found in zip(sources, quantized):
        if found and dtype is None:
            kinds = ", ".join(sorted({r.encoding for r in view.records.values()} - {"plain"}))
            what = f"{kinds} weights, and the F32 ones beside them, are rounded to bfloat16"
            notes.append(Note("V02", f"{what}; --dtype fp32 keeps what they decode to"))
    return [wanted or ("BF16" if found else None) for found in quantized]


def gguf_steps(steps: Sequence[Step], to: str, dtype: str | None, notes: list[Note]) -> list[Step]:
    """Return a plan's steps with the types of a GGUF file; those of another format as they are.

    llama.cpp computes with vectors and routers in float32 alone; the rest may be float32, float16, bfloat16 or blocks.

    Args:
        steps: with floating tensors in any dtype.
        to: the output's format.
        dtype: what was asked for; of it, only a block-quantized type ("Q8_0") is not done yet.
        notes: gains one for matrices whose rows are no whole blocks and which become float16.

    Raises:
        TensorkeepError: a tensor has a dtype that GGUF has not.
    """
    if to != "gguf":
        return list(steps)
    blocks = dtype if dtype in BLOCK_TYPES else None
    out = [s if s.sink is None else _typed(s, s.sink, blocks) for s in steps]
    odd = [s.sink.name for s in out if blocks and s.sink is not None and s.sink.dtype == "F16"]
    if odd:
        what = f"rows of {len(odd)} matrices are no whole blocks of {blocks} and are stored as F16, first {odd[0]}"
        notes.append(Note("Q06", what, tuple(odd)))
    return out


def _typed(step: Step, sink: SinkTensor, blocks: str | None) -> Step:
    """Return one step with the type of its tensor in a GGUF file."""
    made, encoding = sink.dtype, "plain"
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
