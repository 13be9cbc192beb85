"""`tensorkeep repair`: undo what a diagnosis proves, in a new checkpoint."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from tensorkeep.commands.shared import Flag, Say, known_loader, prepare
from tensorkeep.formats.names import grouped
from tensorkeep.output import size


def repair(
    checkpoint: str,
    out: str,
    /,
    *,
    reference: str,
    for_: Annotated[str | None, Parameter(name="--for")] = None,
    overwrite: Flag = False,
    say: Say = Say(),
) -> int:
    """Undo what a diagnosis proves, write a new checkpoint, and diagnose that.

    Refuses what is ambiguous or lost, and says what it needs. The broken checkpoint stays as it is.

    Args:
        checkpoint: The broken checkpoint.
        out: The new checkpoint: a folder, or a file where the broken one is a file.
        reference: The checkpoint that it should equal, or was trained from.
        for_: The program that is to load it: {loaders} (hf is transformers).
        overwrite: Replace an existing checkpoint, once the new one is proven.
    """
    from tensorkeep.diagnosis.repairs import repair as run

    output = say.output()
    known_loader(for_)
    prepare(output, out)
    with output.progress() as progress:
        made = run(checkpoint, out, reference, for_, overwrite, progress)
    if say.json:
        output.document(
            {
                "checkpoint": checkpoint,
                "sink": made.result.path,
                "reference": reference,
                "causes": made.before.causes,
                "done": made.done,
                "taken_from_reference": made.taken,
                "tensors": len(made.result.digests),
                "bytes": made.result.nbytes,
                "after": made.after.to_json(),
            }
        )
        return made.after.exit_code
    for code, what in made.done.items():
        output.line(f"undone: {code} ({what})")
    if made.taken:
        output.line(f"from the reference: {', '.join(grouped(made.taken)[:6])}")
    wrote = f"{len(made.result.digests)} tensors, {size(made.result.nbytes)}, proven"
    output.line(f"{made.result.path}: {wrote}; diagnosed again: {made.after.verdict}")
    return made.after.exit_code
