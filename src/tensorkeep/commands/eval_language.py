"""`tensorkeep eval language`: loss and perplexity of a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tensorkeep.commands.shared import Flag, Say
from tensorkeep.output import Output

if TYPE_CHECKING:
    from tensorkeep.training.job import Job, Loop
    from tensorkeep.training.saver import State

    Start = tuple[Job, Loop, str | State]
from tensorkeep.commands.train_language import Several


def eval_language(
    checkpoint: str,
    /,
    *,
    data: Several = (),
    ema: bool = True,
    best: Flag = False,
    length: int | None = None,
    batch: int = 8,
    tokenizer: str | None = None,
    device: str | None = None,
    say: Say = Say(),
) -> int:
    """Measure a checkpoint's loss and perplexity on text, conversations or preferences.

    Args:
        checkpoint: A run (its newest valid checkpoint), a step folder of one, or any checkpoint with config and
            tokenizer.
        data: A file of JSON lines or plain text; may be given several times. Default: what the recipe evaluates on.
        ema: Use the averaged weights where there are some.
        best: Take a run's best checkpoint instead of its newest.
        length: Tokens in a row. Default: the recipe's, or 512.
        batch: Rows in one forward.
        tokenizer: Another tokenizer than the checkpoint's: a folder or a tokenizer.json.
        device: The device to run on, cpu or cuda. Default: a GPU where there is one.
    """
    from tensorkeep.language.evaluation import evaluate_checkpoint
    from tensorkeep.training import distributed

    printer = say.output()
    world = distributed.start(device)
    how: dict[str, Any] = {"ema": ema, "best": best, "length": length, "batch": batch, "tokenizer": tokenizer}
    try:
        with (printer if world.first else Output(quiet=True)).progress("rows") as progress:
            found = evaluate_checkpoint(checkpoint, data, **how, world=world, remark=printer.remark, progress=progress)
    finally:
        distributed.stop()
    if printer.json:
        printer.document(found)
        return 0
    spoken = {"ema": "averaged weights (ema)"}
    rows = [(spoken.get(name, name), _cell(value)) for name, value in found.items() if value is not None]
    printer.table(["", "value"], rows, right=["value"])
    return 0


def _cell(value: Any) -> str:
    """A value of the document as people read it."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,.6g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
