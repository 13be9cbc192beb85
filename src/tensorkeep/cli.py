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

# Each lives in a file of its name under commands/, as a function of that name, and is imported when it is called. Two
# words: a command of a group. `tensorkeep --help` reads the first line of its docstring, without importing it.
COMMANDS = (
    "inspect",
    "diff",
    "verify",
    "convert",
    "merge",
    "demo",
    "eval language",
    "eval detection",
    "diagnose",
    "explain",
    "repair",
    "report",
    "recipe import",
    "train language",
    "train detection",
    "generate",
    "predict",
)
GROUPS = {
    "eval": "Measure a model: loss and perplexity, or mean average precision.",
    "recipe": "Make recipes from other frameworks' configs.",
    "train": "Train from a recipe; the same command again goes on.",
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
        help="Fine-tune with quantized low-rank adapters, and keep every tensor right.",
        version=tensorkeep.__version__,
        version_flags=["--version"],
        help_format="plaintext",
        result_action="return_value",
        suppress_keyboard_interrupt=False,  # `main` answers it, with code 130
    )
    groups = {name: App(name=name, help=text) for name, text in GROUPS.items()}
    for inner in groups.values():
        app.command(inner)
    asked = words[:1] in ([], ["--help"], ["-h"]) or words[0] in GROUPS
    for command in COMMANDS:
        group, _, name = command.rpartition(" ")
        function = command.replace(" ", "_")
        place = f"tensorkeep.commands.{function}:{function}"
        groups.get(group, app).command(place, name=name, help=first_line(function) if asked else "")
    try:
        code = app(words, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        known = next((c for c in COMMANDS if c.split() == words[: len(c.split())]), None)
        raise TensorkeepError(
            " ".join(str(error).split()), hint=f"tensorkeep {known + ' ' if known else ''}--help"
        ) from None
    return int(code or 0)


def first_line(command: str) -> str:
    """The first line of a command's docstring, read from its source: nothing is imported.

    >>> first_line("verify")
    'Is it complete, is it undamaged: structure, digests of the certificate, CRCs.'
    """
    import ast
    from importlib.resources import files

    folder = files("tensorkeep") / "commands"
    place = folder / command / "__init__.py" if (folder / command).is_dir() else folder / f"{command}.py"
    for node in ast.parse(place.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == command:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    raise LookupError(f"no function {command} in {place}")
