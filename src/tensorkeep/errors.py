"""The one error that leaves this package, and how anything from a file or an argument is spelled for people.

Names, configs and errors of other libraries come out of untrusted files. What reaches a terminal, a hint, a page or
subtitles is spelled by `printable` (one line), `visible` (free text) or `shown` (a value), a command to be pasted with
`word` around each path. `output.py`, the only file that prints, puts everything through `visible` once more.

Whatever goes wrong with a file, a name or an argument reaches the user as a `TensorkeepError`: what
happened and where in one line, then `hint:` with the next command. A finding code (F01, K04, ...) goes
along where one applies, so that `tensorkeep explain CODE` can say more.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterable
from urllib.parse import unquote

# what code of other people raises of odd values, or where it is called out of its usual place (NotImplementedError and
# RecursionError are RuntimeErrors, UnicodeError is a ValueError)
FOREIGN = (
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    ImportError,
    AssertionError,
)
TEMPORARY = 75  # exit code: a process of a run hung or was lost, and the same command goes on (sysexits' EX_TEMPFAIL)


class TensorkeepError(Exception):
    """Say what went wrong, where, and what to do next.

    Args:
        what: what happened, as the rest of a sentence about `where`.
        where: the file, tensor or argument concerned.
        hint: what to do about it.
        code: the finding code that applies, e.g. "F05".
        exit_code: what the command line returns.
        tensors: stored names that the error is about, where it is about some.

    Example:
        >>> print(TensorkeepError("no tensor 'lm_hed'", where="model.safetensors", hint="did you mean lm_head?"))
        model.safetensors: no tensor 'lm_hed'
        hint: did you mean lm_head?
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        hint: str | None = None,
        code: str | None = None,
        exit_code: int = 2,
        tensors: Iterable[str] = (),
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = None if where is None else str(where)
        self.hint = hint
        self.code = code
        self.exit_code = exit_code
        self.tensors = tuple(tensors)  # stored names that the error is about, where it is about some

    @property
    def line(self) -> str:
        """Code, place and what happened in one line, printable on any terminal; without the hint."""
        code = f"{self.code} " if self.code else ""
        where = f"{self.where}: " if self.where else ""
        return printable(f"{code}{where}{self.what}")

    def __str__(self) -> str:
        return f"{self.line}\nhint: {visible(self.hint)}" if self.hint else self.line

    def __reduce__(self) -> tuple[object, ...]:
        # keyword-only arguments do not survive the default protocol, and errors cross process borders in tests
        return (_rebuild, (self.what, self.where, self.hint, self.code, self.exit_code, self.tensors))


def _rebuild(
    what: str, where: str | None, hint: str | None, code: str | None, exit_code: int, tensors: tuple[str, ...]
) -> TensorkeepError:
    return TensorkeepError(what, where=where, hint=hint, code=code, exit_code=exit_code, tensors=tensors)


def printable(text: str, most: int = 2000) -> str:
    r"""Return text in one line without control characters and lone surrogates, URLs masked, cut at `most`.

    Args:
        text: any text.
        most: most characters to keep.

    Example:
        >>> printable("a\x1b[2Jb")
        'a\\x1b[2Jb'
    """
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in masked(text[:most]))
    return plain + (f"... ({len(text)} characters)" if len(text) > most else "")


def visible(text: str) -> str:
    r"""Return free text in which a terminal finds no command: control and direction characters are spelled out.

    Line ends, tabs, every kind of space and the joiners within words stay.

    Args:
        text: any text.

    Example:
        >>> visible("one\ntwo\x1b[2J\u202e")
        'one\ntwo\\x1b[2J\\u202e'
    """
    text = masked(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _PLAIN else c.encode("unicode_escape").decode() for c in text)


# line ends and tabs; spaces that Unicode calls unprintable, which Chinese and French texts are full of; joiners
_PLAIN = frozenset("\n\t\xa0\u1680\u202f\u205f\u3000\u200c\u200d" + "".join(map(chr, range(0x2000, 0x200B))))
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+:/{1,3})([^\s/?#'\"`]*@)?([^\s?'\"`]*)(\?[^\s'\"`]*)?")
_TOKEN = re.compile(r"#[^#]*=.*")  # in a fragment


def masked(text: str) -> str:
    """Return text with user names, passwords and query strings of URLs masked: they are often credentials.

    Args:
        text: any text.

    Example:
        >>> masked("s3://key:secret@host/a.pth?sig=1 is missing")
        's3://***@host/a.pth?*** is missing'
    """
    if ":/" not in text:
        return text
    return _URL.sub(lambda m: f"{m[1]}{'***@' if m[2] else ''}{_TOKEN.sub('#***', m[3])}{'?***' if m[4] else ''}", text)


def untold(text: str, url: object) -> str:
    """Return what a library says of a URL without the URL's user name, password and token, however it repeats them.

    Args:
        text: the library's message.
        url: what it was asked for.

    Example:
        >>> untold('Invalid bucket name "key:secret@bucket"', "s3://key:secret@bucket/a")
        'Invalid bucket name "***@bucket"'
    """
    found = _URL.match(str(url))
    user = found[2][:-1] if found and found[2] else ""
    secrets = {user, *user.split(":")}
    for secret in sorted(secrets | {unquote(s) for s in secrets}, key=len, reverse=True):
        text = text.replace(secret, "***") if secret else text
    return text


def word(value: object) -> str:
    """Return a path or a name as one word of a shell, for a command that is printed to be pasted.

    Args:
        value: the path or name.

    Example:
        >>> word("runs/one"), word("a b; rm x"), word("-x")
        ('runs/one', "'a b; rm x'", './-x')
    """
    text = str(value)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def shown(value: object, most: int = 80) -> str:
    """Return a value from an untrusted file as text for a message: short, whatever its size, depth and sharing.

    Args:
        value: anything.
        most: most characters of a text to keep.

    Example:
        >>> shown("a name"), shown([1, [2, 3]]), shown(1 << 20000)
        ("'a name'", '[1, list]', 'a number of 20001 bits')
    """
    if isinstance(value, (str, bytes)):
        return repr(value[:most]) + ("..." if len(value) > most else "")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value) if value.bit_length() <= 256 else f"a number of {value.bit_length()} bits"
    if value is None or isinstance(value, (bool, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        parts = [type(v).__name__ if isinstance(v, (list, tuple, dict)) else shown(v, 20) for v in value[:8]]
        return f"[{', '.join(parts)}{', ...' if len(value) > 8 else ''}]"
    return type(value).__name__


def near_misses(word: str, known: Iterable[str], most: int = 3) -> str:
    """Suggest the known words nearest to a misspelt one.

    Args:
        word: what somebody wrote.
        known: the words that exist.
        most: most words to suggest.

    Returns:
        `did you mean a, b?`, or an empty string where none is near.

    Example:
        >>> near_misses("torchtian", ["hf", "torchtitan", "minimind"])
        'did you mean torchtitan?'
    """
    close = difflib.get_close_matches(word, list(known), n=most, cutoff=0.6)
    return f"did you mean {', '.join(close)}?" if close else ""


class Inconclusive(Exception):
    """Raised where a check that matters cannot run; the verdict is then `inconclusive` unless an error was found.

    Args:
        reason: why it cannot run.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
