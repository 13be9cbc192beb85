"""Choose the type of every tensor of a GGUF file, as llama.cpp computes with it."""

from __future__ import annotations

from collections.abc import Sequence

from tensorkeep.conversion.plan import Step
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import Note
from tensorkeep.storage.record import BLOCK_TYPES, DTYPES

_MATRICES = ("F32", "F16", "BF16")


def gguf_steps(steps: Sequence[Step], blocks: str | None, notes: list[Note]) -> list[Step]:
    """Return a plan's steps with the types of a GGUF file.

    llama.cpp computes with vectors and routers in float32 alone; the rest may be float32, float16, bfloat16 or blocks.

    Args:
        steps: with floating tensors in any dtype.
        blocks: the block-quantized type of matrices ("Q8_0"); None keeps them.
        notes: gains one for matrices whose rows are no whole blocks and which become float16.

    Raises:
        TensorkeepError: a tensor has a dtype that GGUF has not.
    """
    out, whole = [], []
    for step in steps:
        sink = step.sink
        if sink is None or not DTYPES[sink.dtype].floating:
            if sink is not None:
                raise TensorkeepError(f"{sink.name}: llama.cpp has no {sink.dtype} weights", hint="--to hf keeps them")
            out.append(step)
            continue
        made, encoding = sink.dtype, "plain"
        if len(sink.shape) < 2 or sink.name.endswith("ffn_gate_inp.weight"):
            made = "F32"
        elif blocks and sink.shape[-1] % BLOCK_TYPES[blocks][0] == 0:
            made, encoding = "F32", blocks
        elif blocks:
            made = "F16"
            whole.append(sink.name)
        elif sink.dtype not in _MATRICES:
            if sink.dtype != "F64":
                raise TensorkeepError(f"{sink.name}: {sink.dtype} is no type of GGUF's", hint="--dtype bf16")
            made = "F32"
        actions = [a for a in step.actions if a != "keep"] if made != sink.dtype or encoding != "plain" else step.actions
        if encoding != "plain":
            actions = [*(a for a in actions if a != "cast"), "quantize"]
        elif made != sink.dtype and "cast" not in actions:
            actions = [*actions, "cast"]
        changed = sink._replace(dtype=made, encoding=encoding, tied_to=None)
        out.append(Step(tuple(actions), step.parts, changed, step.reason))
    if whole:
        what = f"rows of {len(whole)} matrices are no whole blocks of {blocks}: they are stored as F16, first {whole[0]}"
        notes.append(Note("Q06", what, tuple(whole)))
    return out
