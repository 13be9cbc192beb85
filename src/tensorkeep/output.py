"""Everything that a person or a program sees is printed here: data on stdout, everything else on stderr.

Whatever it is told, nothing that commands a terminal gets out (`errors.visible`), and no password in a URL.

`--json` gives one document on stdout; `--quiet` leaves errors and data. Progress shows on a terminal only, with bytes
and the time left. rich is imported when a table or a bar is drawn, not before.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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
            sys.stdout.write(visible(text) + "\n")

    def piece(self, text: str) -> None:
        """Print a piece of data for people at once, without a line's end; silent under --json."""
        if not self.json:
            sys.stdout.write(visible(text))
            sys.stdout.flush()

    def remark(self, text: str) -> None:
        """Print a note, a warning or what was done on stderr."""
        if not self.quiet:
            sys.stderr.write(visible(text) + "\n")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]], right: Sequence[str] = ()) -> None:
        """Print a table on stdout; plain text where stdout is not a terminal, so that it can be piped."""
        if self.json:
            return
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
        sys.stderr.write(f"error: {error.line}\n")
        if error.hint:
            sys.stderr.write(f"hint: {visible(error.hint)}\n")
        if self.json:
            self.document(
                {"error": {"code": error.code, "message": error.what, "where": error.where, "hint": error.hint}}
            )

    @contextlib.contextmanager
    def progress(self) -> Iterator[Callable[[str, int, int], None]]:
        """Give a callback (what, bytes done, bytes in all) that draws a bar, with rate and time left."""
        if self.quiet or self.json or not sys.stderr.isatty():
            yield lambda _what, _done, _total: None
            return
        bar = _Bar()
        try:
            yield bar.update
        finally:
            bar.close()

    def status(self) -> Status | None:
        """Return a line that a long run keeps up to date; None where nobody is to see one."""
        return None if self.quiet or self.json else Status(sys.stderr.isatty())


class Status:
    """Shows how far a run is: one line redrawn on a terminal, a line every half minute elsewhere."""

    def __init__(self, terminal: bool) -> None:
        self.terminal, self.last = terminal, 0.0
        self.first: tuple[float, int] | None = None

    def show(self, text: str, done: int, total: int) -> None:
        """Show `text` about update `done` of `total`; the time left follows from the pace since the first call."""
        now = time.monotonic()
        self.first = self.first or (now, done)
        if now - self.last < (0.1 if self.terminal else 30.0) and done < total:
            return
        self.last = now
        pace = (now - self.first[0]) / (done - self.first[1]) if done > self.first[1] else 0.0
        left = f"  {duration(pace * (total - done))} left" if pace and done < total else ""
        line = f"step {done}/{total}  {printable(text)}{left}"
        sys.stderr.write(f"\r\x1b[2K{line}" if self.terminal else line + "\n")
        sys.stderr.flush()

    def close(self) -> None:
        """End the line."""
        if self.terminal and self.last:
            sys.stderr.write("\n")


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

    def __init__(self) -> None:
        self.what, self.started, self.drawn, self.lock = "", 0.0, False, threading.Lock()
        self.last = 0.0

    def update(self, what: str, done: int, total: int) -> None:
        """Redraw the line where enough time has passed."""
        now = time.monotonic()
        with self.lock:
            if what != self.what:
                self.what, self.started, self.last = what, now, now
            if now - self.started < 1.0 or (now - self.last < 0.1 and done < total):
                return
            self.last, self.drawn = now, True
            rate = done / max(now - self.started, 1e-9)
            left = (total - done) / rate if rate else 0.0
            filled = int(24 * done / total) if total else 24
            bar = f"{'━' * filled}{'╌' * (24 - filled)}"
            spoken = f"{size(done)} of {size(total)}  {size(rate)}/s  {left:.0f} s left"
            sys.stderr.write(f"\r\x1b[2K{printable(what, 80):<8} {bar} {spoken}")
            sys.stderr.flush()

    def close(self) -> None:
        """Wipe the line."""
        if self.drawn:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()


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


def size(count: float) -> str:
    """Return a number of bytes in decimal units.

    Args:
        count: number of bytes.

    Example:
        >>> size(269060552)
        '269.1 MB'
    """
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
    if "mAP" in name or name.startswith("recall"):
        return f"{100 * value:.2f} %"
    return number(value) if digits == 3 else f"{value:.{digits}g}"
