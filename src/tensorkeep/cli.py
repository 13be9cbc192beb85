"""The command line: the table of commands, what every command shares, exit codes.

0 ok, 1 findings or differences, 2 usage or bad input, 3 inconclusive, 130 interrupted. Commands are loaded when they
are called, so that `tensorkeep inspect` starts fast.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from tensorkeep.errors import TensorkeepError
from tensorkeep.output import Output

# command -> where it lives; nothing is imported before it is called. Two words: a command of a group
COMMANDS = {
    "inspect": "tensorkeep.commands.checkpoint:inspect",
    "diff": "tensorkeep.commands.checkpoint:diff",
    "verify": "tensorkeep.commands.checkpoint:verify",
    "convert": "tensorkeep.commands.checkpoint:convert",
    "merge": "tensorkeep.commands.merge:merge",
    "demo": "tensorkeep.commands.checkpoint:demo",
    "eval detection": "tensorkeep.commands.eval:eval_detection",
    "diagnose": "tensorkeep.commands.diagnose:diagnose",
    "explain": "tensorkeep.commands.diagnose:explain",
    "repair": "tensorkeep.commands.diagnose:repair",
    "report": "tensorkeep.commands.report_page:report",
    "recipe import": "tensorkeep.commands.recipe:import_recipe",
    "train language": "tensorkeep.commands.train:train_language",
    "train detection": "tensorkeep.commands_train_detection:train_detection",
    "eval language": "tensorkeep.commands.train:eval_language",
    "generate": "tensorkeep.commands.generate:generate",
    "predict": "tensorkeep.commands.predict:predict",
}

HELP = {
    "inspect": "What is in a checkpoint: format, naming, tensors, sizes, ties, quantisation, step.",
    "diff": "Compare two checkpoints tensor by tensor, whatever their formats and namings.",
    "verify": "Is it complete, is it undamaged: structure, digests, certificate.",
    "convert": "Convert one or more checkpoints into one, and prove the result.",
    "merge": "Add adapters into the base they were trained on, and prove the result.",
    "demo": "A real model through every format, proven at every stop.",
    "diagnose": "Name the cause of a broken checkpoint, and prove it.",
    "explain": "What a finding code means, how it happens, what to do.",
    "repair": "Apply the fixes of the causes found; verify; refuse what is ambiguous.",
    "report": "One offline HTML page from a run or from findings.",
    "recipe": "Recipes from other frameworks' configs.",
    "recipe import": "Turn an OpenTAD config (AdaTAD, ActionFormer) into a recipe, without executing it.",
    "train": "Train from a recipe; the same command again goes on.",
    "train language": "Train a language model: pretrain, sft or dpo, full or with an adapter.",
    "train detection": "Train a temporal action detector on videos or features; the same command again goes on.",
    "predict": "Which actions happen when in a video: JSON, subtitles, a timeline.",
    "eval language": "Loss and perplexity of a checkpoint, under its average where it has one.",
    "generate": "Continue a prompt token by token: a run, a checkpoint, with an adapter, quantised.",
    "eval": "Loss and perplexity, or mAP at each tIoU.",
    "eval detection": "Mean average precision of a detector or of detections at each temporal IoU, and what is wrong.",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; the console script and `python -m tensorkeep` call this."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    output = Output(json="--json" in words, quiet="--quiet" in words)
    try:
        return run(words, output)
    except TensorkeepError as error:
        if os.environ.get("TENSORKEEP_DEBUG") == "1":
            raise
        output.error(error)
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except BrokenPipeError:
        # the reader of our output has gone (`| head`); flushing at exit would complain again
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
        return 0


def run(words: list[str], output: Output) -> int:
    from cyclopts import App, CycloptsError

    import tensorkeep

    app = App(
        name="tensorkeep",
        help="Fine-tune with quantised low-rank adapters, and keep every tensor right.",
        version=tensorkeep.__version__,
        version_flags=["--version"],
        help_format="plaintext",
        result_action="return_value",
        suppress_keyboard_interrupt=False,  # `main` answers it, with code 130
    )
    groups: dict[str, App] = {}
    for command, place in COMMANDS.items():
        group, _, name = command.rpartition(" ")
        if group and group not in groups:
            groups[group] = App(name=group, help=HELP[group])
            app.command(groups[group])
        groups.get(group, app).command(place, name=name, help=HELP[command])
    try:
        code = app(words, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        known = next((c for c in COMMANDS if c.split() == words[: len(c.split())]), None)
        raise TensorkeepError(
            " ".join(str(error).split()), hint=f"tensorkeep {known + ' ' if known else ''}--help"
        ) from None
    return int(code or 0)
