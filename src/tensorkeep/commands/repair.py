"""`tensorkeep repair`: undo what a diagnosis proves, in a new checkpoint."""

from __future__ import annotations

from typing import Annotated, Any

from cyclopts import Parameter

from tensorkeep.commands.shared import Flag, Say, known_loader, prepare
from tensorkeep.commands.sign import Recorded
from tensorkeep.formats.names import grouped
from tensorkeep.formats.view import read
from tensorkeep.output import size


def repair(
    checkpoint: str,
    out: str,
    /,
    *,
    reference: str,
    for_: Annotated[str | None, Parameter(name="--for")] = None,
    overwrite: Flag = False,
    take_from_reference: Annotated[list[str] | None, Parameter(negative="")] = None,
    yes: Flag = False,
    recorded: Recorded = Recorded(),
    say: Say = Say(),
) -> int:
    """Undo what a diagnosis proves, write a new checkpoint, and diagnose that.

    Moves the checkpoint's own values, takes from the reference what you name alone, and refuses what is ambiguous.

    Args:
        checkpoint: The broken checkpoint.
        out: The new checkpoint: a folder, or a file where the broken one is a file.
        reference: The checkpoint that it should equal, or was trained from.
        for_: The program that is to load it: {loaders} (hf is transformers).
        overwrite: Replace an existing checkpoint, once the new one is proven.
        take_from_reference: Tensors or files (patterns) to fill with the reference's where the checkpoint's are lost.
        yes: Go on where values of the checkpoint would be lost; without it they are listed.
    """
    from tensorkeep.diagnosis.repairs import repair as run

    output = say.output()
    known_loader(for_)
    prepare(output, out)
    taken = list(take_from_reference or ())
    sources = [(read(checkpoint), "source", 1.0), (read(reference), "reference", 1.0)]
    left = {"for": for_, "take_from_reference": taken, "yes": yes}
    record = recorded.of("repair", sources, **left)
    with output.progress() as progress:
        made = run(checkpoint, out, reference, for_, overwrite, progress, taken, yes)
    record(output, out)
    if say.json:
        output.document(_document(made, checkpoint, reference))
        return made.after.exit_code
    for code, what in made.done.items():
        output.line(f"mended: {code} ({what})")
    if made.taken:
        output.line(f"from the reference: {', '.join(grouped(made.taken)[:6])}")
    if made.lost:
        output.line(f"lost: {'; '.join(f'{name} ({what})' for name, what in list(made.lost.items())[:6])}")
    else:
        output.line("lost: nothing")
    wrote = f"{len(made.result.digests)} tensors, {size(made.result.nbytes)}, bytes equal to the plan"
    output.line(f"{made.result.path}: {wrote}; diagnosed again: {made.after.verdict}")
    return made.after.exit_code


def _document(made: Any, checkpoint: str, reference: str) -> dict[str, Any]:
    """Return the document of `--json`."""
    return {
        "checkpoint": checkpoint,
        "sink": made.result.path,
        "reference": reference,
        "causes": made.before.causes,
        "done": made.done,
        "taken_from_reference": made.taken,
        "lost": made.lost,
        "tensors": len(made.result.digests),
        "bytes": made.result.nbytes,
        "after": made.after.to_json(),
    }
