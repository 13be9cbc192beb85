"""Write docs/tensorkeep.1, the man page, from the command line's own help and the tables of its page on exit codes.

python docs/write_man.py            (a test holds page and program equal; the wheel brings it to share/man/man1)
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

from tensorkeep import __version__
from tensorkeep.cli import COMMANDS, USERS, application

DOCS = Path(__file__).parent
PAGE = DOCS / "tensorkeep.1"
WIDTH = 78  # of a source line
WHAT = """Reads every checkpoint format that its users meet, converts by streaming, proves the result tensor by tensor,
and trains language models and detectors that go on bit for bit after a kill. A path is a folder, a file, a Hub model id
or a URL."""
ENVIRONMENT = {
    "TENSORKEEP_DEBUG": "1: errors come with their traceback.",
    "TENSORKEEP_JOIN_SECONDS": "How long the processes of a run wait for each other at its start (600).",
    "TENSORKEEP_KEY_PASSWORD": "The password of the private key that --key and --sign-key name.",
    "HF_HOME, HF_HUB_OFFLINE": "Hugging Face's cache, in which model ids are looked up first; 1: nowhere else.",
    "TORCHINDUCTOR_CACHE_DIR": "Where compiled layers are kept instead of ~/.cache/tensorkeep/compiled.",
    "NO_COLOR, COLUMNS, TERM, CI": "No colours; the width of what is printed; dumb, or CI=true: no redrawn line.",
}
FILES = {
    "RUN/recipe.yaml": "What decides the numbers of a run.",
    "RUN/metrics.jsonl, RUN/status.json": "Its rows, and how it stands.",
    "RUN/checkpoints/": "Its checkpoints, steps in folders of their own; best and latest name one; resumes.jsonl.",
    "RUN/stacks/": "Where every process was when a run hung.",
    "tensorkeep.json": "The certificate of a checkpoint: the digest of every tensor.",
    "~/.cache/tensorkeep/compiled/": "Layers that were compiled; may be removed at any time.",
}


def page() -> str:
    """The whole page."""
    parts = [
        ".\\\" Written by docs/write_man.py from the program's own help.",
        f'.TH TENSORKEEP 1 "{released()}" "tensorkeep {__version__}" "User Commands"',
        ".SH NAME\ntensorkeep \\- fine\\-tune with quantized adapters, and keep every tensor right",
        ".SH SYNOPSIS\n.B tensorkeep\n.I COMMAND\n.RI [ OPTIONS ]\n.RI [ ARGUMENTS ]\n.br\n.B tensorkeep\n"
        ".RI [ COMMAND ]\n.B \\-\\-help",
        ".SH DESCRIPTION\n" + prose(WHAT),
        ".SH COMMANDS",
    ]
    for title, names in USERS.items():
        parts.append(f".SS {title}")
        parts.append("\n.PP\n".join(command(name) for name in commands(names)))
    parts.append(".SH EXIT STATUS\n" + pairs(exit_codes()))
    parts.append(".SH ENVIRONMENT\n" + pairs(ENVIRONMENT, "B"))
    parts.append(".SH FILES\n" + pairs(FILES, "I"))
    parts.append(f".SH SEE ALSO\nGuides and reference:\n.I {escaped(homepage())}")
    return "\n".join(parts) + "\n"


def commands(names: tuple[str, ...]) -> list[str]:
    """The commands of a title, those of a group one after the other."""
    return [known for name in names for known in COMMANDS if name in (known, known.partition(" ")[0])]


def command(name: str) -> str:
    """A command: how it is called, what it does, its arguments and flags."""
    app = application([*name.split(), "--help"])
    for word in name.split():
        app = app[word]
    shown = [argument for argument in app.assemble_argument_collection(parse_docstring=True) if argument.show]
    positional = [argument for argument in shown if argument.index is not None]
    called = [f".B tensorkeep {escaped(name)}", *(f".I {word}" for word in map(usage, positional))]
    lines = [*called, ".RS", prose(described(app.help), between=".PP")]
    for argument in shown:
        lines.append(f".TP\n{label(argument)}\n{prose(told(argument))}")
    return "\n".join([*lines, ".RE"])


def described(text: str) -> str:
    """A docstring without its sections of arguments, results and examples."""
    return re.split(r"\n\s*(?:Args|Returns|Raises|Example|Parameters)\b:?\s*\n", text)[0].strip()


def usage(argument: Any) -> str:
    """An argument in a synopsis: in brackets where it may be left out."""
    word = escaped(argument.names[0]) + ("..." if "tuple" in str(argument.hint) else "")
    return word if argument.required else f"[{word}]"


def label(argument: Any) -> str:
    """The head of an argument or flag."""
    if argument.index is not None:
        return f".I {escaped(argument.names[0])}"
    names = [name for name in argument.names if len(name) > 1]
    value = "" if argument.hint is bool else " " + kind(argument)
    return ".B " + escaped(", ".join(names)) + (f" \\fI{value.strip()}\\fR" if value else "")


def kind(argument: Any) -> str:
    """The word for a flag's value."""
    hint = str(argument.hint)
    known = {"Path": "PATH", "Literal": "CHOICE", "float": "NUMBER", "int": "N"}
    return next((word for part, word in known.items() if part in hint), "TEXT") + ("..." if "tuple" in hint else "")


def told(argument: Any) -> str:
    """What an argument is for, its choices and its default."""
    words = [argument.parameter.help or ""]
    if choices := argument.get_choices():
        words.append(f"One of {', '.join(choices)}.")
    default = argument.field_info.default
    if isinstance(default, str | int | float) and not isinstance(default, bool) and "Default:" not in words[0]:
        words.append(f"Default: {default}.")
    return " ".join(words)


def exit_codes() -> dict[str, str]:
    """The table of docs/reference/exit-codes.md."""
    table = (DOCS / "reference" / "exit-codes.md").read_text(encoding="utf-8").partition("## Streams")[0]
    rows = re.findall(r"^\| (\d[\d, ]*) \| (.*) \|$", table, re.MULTILINE)
    return {
        codes: re.sub(r" ?\(\[[^)]*\)\)|\[([^]]*)\]\([^)]*\)", r"\1", told).replace("`", "") for codes, told in rows
    }


def pairs(entries: dict[str, str], font: str = "B") -> str:
    """A list of words and what they mean."""
    return "\n".join(f".TP\n.{font} {escaped(word)}\n{prose(text)}" for word, text in entries.items())


def prose(text: str, between: str = ".IP") -> str:
    """Running text as source: escaped, sentences on lines of their own, `between` two paragraphs."""
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text.strip())]
    return f"\n{between}\n".join("\n".join(lines_of(part)) for part in paragraphs)


def lines_of(paragraph: str) -> list[str]:
    """Lines of a paragraph; none begins with what the formatter takes for a request."""
    sentences = re.split(r"(?<=[.;:]) (?=[A-Z0-9`])", paragraph.replace("`", ""))
    cut = [line for sentence in sentences for line in wrapped(escaped(sentence))]
    return [("\\&" if line[:1] in ".'" else "") + line for line in cut]


def wrapped(text: str) -> list[str]:
    """Lines of at most WIDTH letters."""
    return textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def escaped(text: str) -> str:
    """Text as the formatter shows it word for word."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return text.replace("'", "\\(aq").replace('"', "\\(dq").replace("~", "\\(ti").replace("^", "\\(ha")


def released() -> str:
    """The date of the version in the changelog; none before its release."""
    newest = re.search(r"^## .*$", (DOCS.parent / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    found = re.search(r"\d{4}-\d\d-\d\d", newest[0] if newest else "")
    return found[0] if found else ""


def homepage() -> str:
    """The address of the pages."""
    found = re.search(r'^Documentation = "(.*)"', (DOCS.parent / "pyproject.toml").read_text(), re.MULTILINE)
    return found[1] if found else ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
