"""Everything that a person or a program sees is printed here: data on stdout, everything else on stderr.

Whatever it is told, nothing that commands a terminal gets out (`errors.visible`), and no password in a URL.

`--json` gives one document on stdout; `--quiet` leaves errors and data. Progress shows on a terminal only, with bytes
and the time left; a terminal that takes no commands (TERM=dumb) and a CI's log get plain lines. rich is imported when a
table is drawn, not before.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TextIO

from tensorkeep.errors import TensorkeepError, masked, printable, visible

SCHEMA = 1


@dataclass(frozen=True)
class Output:
    """Prints what a command has to say.

    Attributes:
        json: print one document and nothing else on stdout.
        quiet: no remarks and no progress.
    """

    json: bool = False
    quiet: bool = False

    def document(self, document: dict[str, Any]) -> None:
        """Print the one document of `--json`."""
        json.dump({"schema": SCHEMA, **_masked(document)}, sys.stdout, ensure_ascii=True, allow_nan=False)
        sys.stdout.write("\n")

    def line(self, text: str = "") -> None:
        """Print a line of data for people; silent under --json."""
        if not self.json:
            _leave()
            sys.stdout.write(visible(text) + "\n")

    def piece(self, text: str) -> None:
        """Print a piece of data for people at once, without a line's end; silent under --json."""
        if not self.json:
            _leave()
            sys.stdout.write(visible(text))
            sys.stdout.flush()

    def remark(self, text: str) -> None:
        """Print a note, a warning or what was done on stderr."""
        if not self.quiet:
            _leave()
            sys.stderr.write(visible(text) + "\n")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]], right: Sequence[str] = ()) -> None:
        """Print a table on stdout; plain text where stdout is not a terminal, so that it can be piped."""
        if self.json:
            return
        _leave()
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for column in columns:
            table.add_column(
                column, justify="right" if column in right else "left", overflow="fold", no_wrap=column in right
            )
        for row in rows:
            table.add_row(*(_escaped(cell) for cell in row))
        wide = None if sys.stdout.isatty() else 160
        Console(width=wide, highlight=False, soft_wrap=False).print(table)

    def error(self, error: TensorkeepError) -> None:
        """Print an error and its hint on stderr, and as the document under --json."""
        _leave()
        sys.stderr.write(f"error: {error.line}\n")
        if error.hint:
            sys.stderr.write(f"hint: {visible(error.hint)}\n")
        if self.json:
            self.document(
                {"error": {"code": error.code, "message": error.what, "where": error.where, "hint": error.hint}}
            )

    @contextlib.contextmanager
    def progress(self, unit: str = "") -> Iterator[Callable[[str, int, int], None]]:
        """Give a callback (what, done, in all) that draws a bar, with rate and time left: of bytes, or of `unit`."""
        if self.quiet or self.json or not drawable(sys.stderr):
            yield lambda _what, _done, _total: None
            return
        bar = _Bar(unit)
        try:
            yield bar.update
        finally:
            bar.close()

    def status(self) -> Status | None:
        """Return a line that a long run keeps up to date; None where nobody is to see one."""
        return None if self.quiet or self.json else Status(drawable(sys.stderr))

    @contextlib.contextmanager
    def page(self) -> Iterator[Callable[[Callable[[int], Sequence[str]]], None] | None]:
        """Give what draws lines over a whole terminal, which afterwards shows again what it showed before.

        It takes a function from columns to lines. A longer line goes on in the next; below the last row all is cut.

        Yields:
            What draws; None where stderr is no terminal or nobody is to see anything.
        """
        if self.quiet or self.json or not drawable(sys.stderr):
            yield None
            return

        def draw(lines: Callable[[int], Sequence[str]]) -> None:
            columns, rows = screen(sys.stderr)
            told = [printable(line) for line in lines(columns)]
            cut = [line[at : at + columns] for line in told for at in range(0, max(len(line), 1), columns)]
            sys.stderr.write("\x1b[H" + "".join(f"{line}\x1b[K\n" for line in cut[: rows - 1]) + "\x1b[J")
            sys.stderr.flush()

        sys.stderr.write("\x1b[?1049h\x1b[?7l\x1b[?25l")  # another screen, no wrapping, no cursor
        try:
            yield draw
        finally:
            sys.stderr.write("\x1b[?25h\x1b[?7h\x1b[?1049l")
            sys.stderr.flush()


def drawable(stream: TextIO) -> bool:
    """Tell whether a line may be redrawn there: a terminal that takes commands, and no log of a CI.

    Args:
        stream: stdout or stderr.
    """
    return stream.isatty() and os.environ.get("TERM") != "dumb" and os.environ.get("CI", "") in ("", "false", "0")


def screen(stream: TextIO) -> tuple[int, int]:
    """Return the columns and rows of a terminal as they are now; 80 and 24 where it does not say.

    Args:
        stream: stdout or stderr, on a terminal.
    """
    try:
        columns, rows = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError):
        columns, rows = 0, 0
    return columns or 80, rows or 24


class Status:
    """Shows how far a run is: one line redrawn on a terminal, a line every half minute elsewhere."""

    def __init__(self, terminal: bool) -> None:
        self.terminal, self.last = terminal, 0.0
        self.first: tuple[float, int] | None = None

    def show(self, text: str, done: int, total: int, parts: Callable[[], Sequence[str]] | None = None) -> None:
        """Show `text` about update `done` of `total`; the time left follows from the pace since the first call.

        On a terminal `parts` are shown instead where they are given, the first ones where not all find room.
        """
        now = time.monotonic()
        self.first = self.first or (now, done)
        if now - self.last < (0.1 if self.terminal else 30.0) and done < total:
            return
        self.last = now
        pace = (now - self.first[0]) / (done - self.first[1]) if done > self.first[1] else 0.0
        left = f"{duration(pace * (total - done))} left" if pace and done < total else ""
        step = f"step {done}/{total}"
        if self.terminal:
            told = [step, left, *parts()] if parts is not None else [step, text, left]
            _draw(fitted([printable(part) for part in told if part], screen(sys.stderr)[0] - 1))
        else:
            sys.stderr.write(f"{step}  {printable(text)}{'  ' + left if left else ''}\n")
            sys.stderr.flush()

    def close(self) -> None:
        """End the line."""
        end_line()


def fitted(parts: Sequence[str], width: int) -> str:
    """Join the parts that fit in a line, left to right; the first one is cut where even that is too long.

    Args:
        parts: the most important first.
        width: columns that there are.

    Returns:
        The line.

    Example:
        >>> fitted(["step 1/9", "loss 2.5", "lr 1e-4"], 20)
        'step 1/9  loss 2.5'
    """
    line = parts[0][: max(width, 1)]
    for part in parts[1:]:
        if len(line) + 2 + len(part) <= width:
            line += f"  {part}"
    return line


_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Iterable[float], width: int, stream: TextIO) -> str:
    """Draw numbers as a row of bars from their lowest to their highest, each the mean of as many of them.

    Args:
        values: finite numbers, oldest first.
        width: bars at most.
        stream: where they go; "" where its encoding has no bars.

    Returns:
        The bars; "" for fewer than two numbers.

    Example:
        >>> sparkline([3.0, 2.0, 1.0], 10, sys.stdout) in ("█▅▁", "")
        True
    """
    try:
        _BARS.encode(stream.encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return ""
    values = list(values)
    if len(values) < 2:
        return ""
    count = min(width, len(values))
    edges = [len(values) * n // count for n in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    return "".join(_BARS[round((m - low) / (high - low) * 7) if high > low else 0] for m in means)


_drawn = False  # whether a line that is redrawn stands on the terminal, and the cursor at its end


def _draw(line: str) -> None:
    """Draw the line anew."""
    global _drawn
    sys.stderr.write(f"\r\x1b[2K{line}")
    sys.stderr.flush()
    _drawn = True


def end_line() -> None:
    """Let the line stay as it is, and go to the next one; nothing where none is drawn."""
    _leave("\n")


def _leave(by: str = "\r\x1b[2K") -> None:
    """Go off the line where one is drawn: it is wiped, and comes again with the next update."""
    global _drawn
    if _drawn:
        print(end=by, file=sys.stderr, flush=True)
        _drawn = False


def duration(seconds: float) -> str:
    """Return seconds in the units that people say them in.

    Args:
        seconds: the time.

    Example:
        >>> duration(42), duration(4000), duration(200000)
        ('42 s', '1 h 7 min', '2 d 7 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


class _Bar:
    """One line on stderr, redrawn a few times a second and wiped at the end; cheap enough to call per chunk."""

    def __init__(self, unit: str) -> None:
        self.what, self.unit, self.lock = "", unit, threading.Lock()
        self.started, self.last = 0.0, 0.0

    def update(self, what: str, done: int, total: int) -> None:
        """Redraw the line where enough time has passed."""
        now = time.monotonic()
        with self.lock:
            if what != self.what:
                self.what, self.started, self.last = what, now, now
            if now - self.started < 1.0 or (now - self.last < 0.1 and done < total):
                return
            self.last = now
            rate = done / max(now - self.started, 1e-9)
            left = f"  {duration((total - done) / rate)} left" if rate else ""
            bar = f"{'━' * (filled := int(24 * done / total) if total else 24)}{'╌' * (24 - filled)}"
            told, each = ("{:,}".format, f" {self.unit}") if self.unit else (size, f"  {size(rate)}/s")
            line = f"{printable(what, 80):<8} {bar} {told(done)} of {told(total)}{each}{left}"
            _draw(line[: screen(sys.stderr)[0] - 1])

    def close(self) -> None:
        """Wipe the line."""
        _leave()


def _escaped(cell: object) -> str:
    """Make a table cell harmless: names come out of untrusted files."""
    from rich.markup import escape

    return escape(printable(str(cell)))


def _masked(value: Any) -> Any:
    """Return a document with the URLs in its texts masked; JSON escapes the rest."""
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, dict):
        return {k: _masked(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_masked(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float)) else masked(str(value))


def size(count: float, memory: bool = False) -> str:
    """Return a number of bytes: of files in decimal units, of memory in GiB, as recipes and reports count it.

    Args:
        count: number of bytes.
        memory: whether they are in memory.

    Example:
        >>> size(269060552), size(269060552, memory=True), size(150 << 30, memory=True)
        ('269.1 MB', '0.25 GiB', '150.0 GiB')
    """
    if memory:
        return f"{count / 2**30:.{1 if count >= 10 << 30 else 2}f} GiB"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def number(value: float | None) -> str:
    """Return a number as people read it: three digits, or a dash where there is none.

    Args:
        value: the number or None.

    Example:
        >>> number(0.0123456), number(None), number(0.0)
        ('0.0123', '-', '0')
    """
    return "-" if value is None else "0" if value == 0 else f"{value:.3g}"


def figure(name: str, value: float | None, digits: int = 3) -> str:
    """Return what an evaluation gave as people read it: mAP and recall, which files hold as shares of 1, in percent.

    Args:
        name: of the figure.
        value: as files hold it, or None.
        digits: of figures that are no shares.

    Example:
        >>> figure("average_mAP", 0.63512), figure("mAP@0.5", 0.0), figure("loss", 0.63512)
        ('63.51 %', '0.00 %', '0.635')
    """
    if value is None:
        return "-"
    if is_share(name):
        return f"{100 * value:.2f} %"
    return number(value) if digits == 3 else f"{value:.{digits}g}"


def is_share(name: str) -> bool:
    """Say whether a figure of an evaluation is a share of 1, told in percent.

    Args:
        name: of the figure.

    Returns:
        Whether it is mAP or recall.

        >>> is_share("average_mAP"), is_share("recall@5"), is_share("loss")
        (True, True, False)
    """
    return "mAP" in name or name.startswith("recall")
