"""`tensorkeep prove`: that one tensor is part of a model, to someone who knows the model's identity alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tensorkeep.commands.identify import identified, opened
from tensorkeep.commands.shared import Flag, Say
from tensorkeep.errors import TensorkeepError, word
from tensorkeep.output import size
from tensorkeep.storage.certificate import dump
from tensorkeep.storage.overwriting import lone_file, refuse_existing
from tensorkeep.storage.placement import replacing, write_bytes

_PROOF = lone_file("an inclusion proof", r'\{\s*"schema": 1,\s*"kind": "tensorkeep inclusion proof"')


def prove(
    checkpoint: str,
    /,
    *,
    tensor: str,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    config: str | None = None,
    overwrite: Flag = False,
    say: Say = Say(),
) -> int:
    """Prove that a tensor is part of a model: its hash, and those that lead from it to the model's identity.

    The proof is a JSON document. `tensorkeep verify PROOF.json` checks it, alone; `tensorkeep verify CKPT --proof
    PROOF.json` compares one tensor of any checkpoint with it.

    Args:
        checkpoint: A file, a folder, a run, a Hub model id or a URL.
        tensor: The tensor's hf name, as `tensorkeep identify --tensors` lists it.
        out: Write the proof here instead of to stdout.
        config: A config.json, or a folder with one, where the checkpoint brings none and it matters.
        overwrite: Replace an existing proof.
    """
    from tensorkeep.diagnosis.identity.proofs import prove_tensor

    output = say.output()
    if out is not None and out.suffix != ".json":
        raise TensorkeepError("a proof is a .json file", where=out, hint=f"-o {word(out.with_suffix('.json'))}")
    if out is not None:
        refuse_existing(out, overwrite, _PROOF)
    with opened(output, checkpoint, config) as view:
        proof = prove_tensor(identified(output, view), tensor)
    if out is None:
        output.document(proof)  # the proof is the data
        return 0
    with replacing(out, overwrite, _PROOF) as temporary:
        write_bytes(temporary, dump(proof))
    if say.json:
        output.document(proof)
    held = f"{len(proof['path'])} hashes, {size(out.stat().st_size)}"
    output.line(f"{out}: {proof['tensor']['name']} is one of {proof['leaves']} tensors of {proof['identity']} ({held})")
    return 0
