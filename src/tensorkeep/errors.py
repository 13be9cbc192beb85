"""The one error that leaves this package, and how it reads.

Whatever goes wrong with a file, a name or an argument reaches the user as a `TensorkeepError`: what
happened and where in one line, then `hint:` with the next command. A finding code (F01, K04, ...) goes
along where one applies, so that `tensorkeep explain CODE` can say more.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
        return f"{self.line}\nhint: {self.hint}" if self.hint else self.line

    def __reduce__(self) -> tuple[object, ...]:
        # keyword-only arguments do not survive the default protocol, and errors cross process borders in tests
        return (_rebuild, (self.what, self.where, self.hint, self.code, self.exit_code, self.tensors))


def _rebuild(
    what: str, where: str | None, hint: str | None, code: str | None, exit_code: int, tensors: tuple[str, ...]
) -> TensorkeepError:
    return TensorkeepError(what, where=where, hint=hint, code=code, exit_code=exit_code, tensors=tensors)


def printable(text: str, most: int = 2000) -> str:
    r"""Return text without control characters and lone surrogates, cut at `most`: names come out of untrusted files.

    Args:
        text: any text.
        most: most characters to keep.

    Example:
        >>> printable("a\x1b[2Jb")
        'a\\x1b[2Jb'
    """
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:most])
    return plain + (f"... ({len(text)} characters)" if len(text) > most else "")


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
