"""The command line: the table of commands, what every command shares, exit codes.

0 ok, 1 findings or differences, 2 usage or bad input, 3 inconclusive; ended by a signal: 130 Ctrl-C, 143 SIGTERM,
129 SIGHUP. Commands are loaded when they are called, so that `tensorkeep inspect` starts fast.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorkeep.errors import TensorkeepError, near_misses, visible, word
from tensorkeep.output import Output
from tensorkeep.storage import signals

if TYPE_CHECKING:
    from cyclopts import App, CycloptsError

# Each lives in a file of its name under commands/, as a function of that name, and is imported when it is called. Two
# words: a command of a group. Its help is its docstring; `tensorkeep --help` reads the first lines without importing.
COMMANDS = {  # command -> the extra that holds all it can need; none where the core does
    "inspect": None,
    "diff": None,
    "verify": None,
    "replay": "language",
    "identify": None,
    "prove": None,
    "sign": "signing",
    "convert": None,
    "merge": None,
    "demo": "demo",
    "eval language": "language",
    "eval detection": "detection",
    "diagnose": None,
    "explain": None,
    "repair": None,
    "report": None,
    "recipe import": None,
    "recipe list": None,
    "recipe show": None,
    "train language": "language",
    "train detection": "detection",
    "watch": None,
    "generate": "language",
    "predict": "detection",
    "annotate": "detection",
    "check detection": "detection",
    "features": "detection",
    "doctor": None,
    "completion": None,
}
GROUPS = {
    "check": "Check what a recipe would train on, before the first update.",
    "eval": "Measure a model: loss and perplexity, or mean average precision.",
    "recipe": "List and show the recipes that are shipped; make some from other frameworks' configs.",
    "train": "Train from a recipe; the same command again goes on.",
}
# who looks for which: the titles of `tensorkeep --help`, in order
USERS = {
    "Checkpoints": ("inspect", "diff", "verify", "diagnose", "explain", "repair", "convert", "merge"),
    "Identity and signing": ("identify", "prove", "sign", "replay"),
    "Training": ("check", "train", "watch", "eval", "recipe", "report"),
    "Language models": ("generate",),
    "Video": ("annotate", "predict", "features"),
    "This installation": ("demo", "doctor", "completion"),
}
ENDS = (  # below every command's help
    "Exit codes: 0 done; 1 findings, differences, a failed run or input left out; 2 wrong usage or input; 3 "
    "inconclusive; 75 a training run that the same command goes on with; 130 interrupted."
)

_OVER_FILES = ("inspect", "diff", "verify", "convert", "merge", "diagnose", "repair")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; the console script and `python -m tensorkeep` call this.

    Args:
        arguments: the words after `tensorkeep`; None: those of this process.

    Returns:
        0 where nothing is to report, 1 for findings, 2 for unusable input, 3 where a check that matters could not
        run, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    output = Output(json="--json" in words, quiet="--quiet" in words)
    try:
        with signals.answered(), _seldom_collected(words):
            return run(words, output)
    except TensorkeepError as error:
        if os.environ.get("TENSORKEEP_DEBUG") == "1":
            raise
        output.error(error)
        return error.exit_code
    except ModuleNotFoundError as error:
        needed = missing_package(words, error)
        if needed is None or os.environ.get("TENSORKEEP_DEBUG") == "1":
            raise
        output.error(needed)
        return needed.exit_code
    except KeyboardInterrupt as error:
        number = getattr(error, "number", signals.ENDING[0])
        with contextlib.suppress(OSError):  # after a SIGHUP the terminal may be gone
            sys.stderr.write("interrupted\n" if number == signals.ENDING[0] else f"ended by {error}\n")
            if left := getattr(error, "left", ""):  # what an upload keeps in a store
                sys.stderr.write(f"hint: {visible(left)}\n")
        return 128 + int(number)
    except PermissionError as error:  # of a path that no command expects to be closed
        if error.filename is None or os.environ.get("TENSORKEEP_DEBUG") == "1":
            raise
        closed = TensorkeepError("permission denied", where=error.filename, hint="check who owns it and its mode")
        output.error(closed)
        return closed.exit_code
    except BrokenPipeError:
        # the reader of our output has gone (`| head`); flushing at exit would complain again
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
        return 0


@contextlib.contextmanager
def _seldom_collected(words: Sequence[str]) -> Iterator[None]:
    """Let Python look for unused objects less often in commands over files: a third of their time, for many tensors.

    They make a few objects for every tensor, which all stay until the end. In a training, what is in circles may hold
    the memory of tensors, so there everything stays as it is.
    """
    before = gc.get_threshold()
    if words[:1] and words[0] in _OVER_FILES:
        gc.set_threshold(50_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def missing_package(words: Sequence[str], error: ModuleNotFoundError) -> TensorkeepError | None:
    """The one line for a command that needs a package of an extra; None where the missing module is in no extra."""
    from importlib.metadata import PackageNotFoundError, requires

    module = (error.name or "").partition(".")[0]
    try:
        stated = requires("tensorkeep") or []
    except PackageNotFoundError:  # a bare source tree on the module path
        stated = []
    packages: dict[str, set[str]] = {}  # extra -> modules of its packages, as far as they are named alike
    for line in stated:
        package, in_extra = re.match(r"[\w.-]+", line), re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        if package and in_extra:
            packages.setdefault(in_extra[1], set()).add(package[0].replace("-", "_"))
    holding = [extra for extra, modules in packages.items() if module in modules]
    if not holding:
        return None
    command = command_of(words)
    extra = (COMMANDS.get(command) if command else None) or min(holding, key=lambda e: len(packages[e]))
    what = f"tensorkeep {command} needs {module}" if command else f"this needs {module}"
    return TensorkeepError(f"{what}, which is not installed", hint=f"pip install 'tensorkeep[{extra}]'")


def command_of(words: Sequence[str]) -> str | None:
    """The command that a line begins with."""
    return next((c for c in COMMANDS if c.split() == list(words[: len(c.split())])), None)


def run(words: list[str], output: Output) -> int:
    """Run one command and return its exit code; errors are the caller's."""
    from cyclopts import CycloptsError

    if any(not word and not before.startswith("-") for before, word in zip(["", *words], words)):
        hint = "is a variable of the shell not set? A path . is this folder"
        raise TensorkeepError("a word is empty", where=command_of(words), hint=hint)
    try:
        code = application(words)(words, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        raise told(error, words) from None
    return int(code or 0)


def told(error: CycloptsError, words: Sequence[str]) -> TensorkeepError:
    """Say what is wrong with a command line: one line, and a hint with what is spelled like it or with the help."""
    from cyclopts import MissingArgumentError, UnknownOptionError, UnusedCliTokensError
    from cyclopts.exceptions import UnknownCommandError

    known = command_of(words) or next((group for group in GROUPS if words[:1] == [group]), None)
    help_ = f"tensorkeep {known + ' ' if known else ''}--help"
    what, near = " ".join(str(error).split()), ""
    if isinstance(error, UnknownCommandError):
        rest = words[1:] if known else words
        inner = [c.split()[-1] for c in COMMANDS if c.split()[:-1] == [known]]
        what = f"no command {rest[0]!r}" if rest else what
        near = near_misses(rest[0], inner or [*{c.split()[0]: None for c in COMMANDS}]) if rest else ""
        near = near or (f"tensorkeep {known} {' or '.join(inner)}" if known else "")
    elif isinstance(error, UnknownOptionError):
        flag = error.token.keyword or error.token.value
        flags = [name.removeprefix("--") for a in error.argument_collection for name in a.names if a.show]
        near = re.sub(r"[\w-]+(?=[,?])", r"--\g<0>", near_misses(flag.removeprefix("--"), flags))
        what = f"no flag {flag}"
    elif isinstance(error, UnusedCliTokensError):
        what = f"too many words: {' '.join(map(word, error.unused_tokens or ()))}"
    elif type(error) is MissingArgumentError and error.argument is not None and not error.tokens_so_far:
        what = f"{error.keyword} needs a value" if error.keyword else f"{_names(error.argument.names)} is missing"
    return TensorkeepError(what, where=known, hint=f"{near} (all: {help_})" if near else help_)


def _names(names: Sequence[str]) -> str:
    """The name of a flag with its short form."""
    return " or ".join(names[:2])


def application(words: Sequence[str]) -> App:
    """Return the parser of the command line, with the help that `words` can ask for."""
    from cyclopts import App, Group

    import tensorkeep

    app = App(
        name="tensorkeep",
        help="Fine-tune with quantized low-rank adapters, and keep every tensor right.",
        help_epilogue=ENDS,
        version=tensorkeep.__version__,
        version_flags=["--version"],
        help_format="plaintext",
        result_action="return_value",
        suppress_keyboard_interrupt=False,  # `main` answers it, with code 130
    )
    titles: dict[str, Group] = {}
    for n, (title, names) in enumerate(USERS.items()):
        titles |= dict.fromkeys(names, Group(title, sort_key=n))
    app["--help"].group = app["--version"].group = (Group("Flags", sort_key=len(USERS)),)
    groups = {name: App(name=name, help=text, group=titles[name]) for name, text in GROUPS.items()}
    for inner in groups.values():
        app.command(inner)
    every = list(words[:1]) == ["completion"]  # all flags of all commands
    asked = list(words[:1]) in ([], ["--help"], ["-h"]) or words[0] in GROUPS
    helping = not {"--help", "-h"}.isdisjoint(words)
    for command in COMMANDS:
        group, _, name = command.rpartition(" ")
        function = command.replace(" ", "_")
        own: dict[str, Any] = {} if group else {"group": titles[name]}
        if every or (helping and list(words[: command.count(" ") + 1]) == command.split()):
            parser = {"parser": app} if command == "completion" else {}
            groups.get(group, app).command(with_tables(function, **parser), name=name, **own)
        else:
            place = f"tensorkeep.commands.{function}:{function}"
            own["help"] = first_line(function) if asked else ""
            groups.get(group, app).command(place, name=name, **own)
    return app


def with_tables(command: str, **more: Any) -> Callable[..., Any]:
    """Return a command whose docstring names what the tables of formats, namings and loaders hold now.

    Only its help is asked for: a call that does something takes the function itself and imports no table for this. But
    `completion` runs with all of this program's parser, which is `more`.
    """
    from tensorkeep.commands.shared import filled

    function = getattr(importlib.import_module(f"tensorkeep.commands.{command}"), command)

    @functools.wraps(function)
    def shown(*positional: Any, **named: Any) -> Any:
        return function(*positional, **named, **more)

    shown.__doc__ = filled(function.__doc__ or "")
    return shown


def first_line(command: str) -> str:
    """Return the first line of a command's docstring, read from its source: nothing is imported.

    >>> first_line("verify")
    'Check that a checkpoint is complete and undamaged: structure, digests, checksums.'
    """
    folder = Path(__file__).parent / "commands"
    place = folder / command / "__init__.py" if (folder / command).is_dir() else folder / f"{command}.py"
    body = place.read_text(encoding="utf-8").partition(f"\ndef {command}(")[2]
    return body.partition('"""')[2].partition("\n")[0].removesuffix('"""')
