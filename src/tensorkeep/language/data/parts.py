"""The token cache in parts: a file, or 256 MiB of a file of lines, is tokenized once, by whichever process comes first.

Each part has a cache of its own (see `tokens`), named by the bytes it is made of. So a run that was killed goes on with
the parts that are left, a file that was added costs its own tokens alone, and several processes share the work: a part
is locked by who makes it, and nobody waits in a collective. One part is the whole cache, as in version 0.1.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import xxhash

from tensorkeep.errors import TensorkeepError
from tensorkeep.language.data.sources import GZIP, LONGEST, as_lines
from tensorkeep.language.data.tokens import SCHEMA, Encoded, Tokens, cached
from tensorkeep.storage.files import explained
from tensorkeep.storage.placement import clear_leftovers

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SIZE = 256 << 20  # bytes of a part of a file of lines
_NAMED = 1000  # files; a checkpoint names no more
_READ, _WAIT, _TOLD = 8 << 20, 0.5, 20.0  # bytes; seconds between looks; seconds between lines about progress


class Part(NamedTuple):
    """What one cache is made of: a file, or of a file of lines those that begin in a range of bytes.

    Attributes:
        path: the file.
        begin: first byte.
        end: byte behind the last; None: the file's end.
        digest: of its bytes and the settings.
    """

    path: Path
    begin: int
    end: int | None
    digest: str

    @property
    def size(self) -> int:
        """Bytes of it."""
        return (self.path.stat().st_size if self.end is None else self.end) - self.begin


def parts_of(
    files: Sequence[Path],
    settings: Mapping[str, Any],
    form: str = "auto",
    size: int | None = None,
    remark: Callable[[str], None] = lambda _: None,
) -> tuple[str, list[Part]]:
    """Divide files into parts, and digest settings and bytes in one pass.

    Args:
        files: as `sources.expanded` gives them.
        settings: what else the tokens depend on.
        form: the recipe's `format`.
        size: bytes of a part of a file of lines; None: 256 MiB.
        remark: is told now and then how much is read.

    Returns:
        The digest of all (xxh3_128 as hex, as `tokens.fingerprint` gives it), and the parts in order.

    Raises:
        TensorkeepError: a file cannot be read.
    """
    head = json.dumps({"schema": SCHEMA, **settings}, sort_keys=True, default=str).encode()
    size = SIZE if size is None else size
    whole, found = xxhash.xxh3_128(head), list[Part]()
    told, done = time.monotonic(), 0
    for path in files:
        with explained(path), path.open("rb") as file:
            total = path.stat().st_size
            divided = as_lines(path, form) and path.suffix.lower() != GZIP and total > size
            bounds = [*range(0, total, size), total] if divided else [0, total]
            read = 0
            for begin, end in itertools.pairwise(bounds):
                own = xxhash.xxh3_128(head + (b"lines" if divided else b""))
                read += _digest(file, end - begin if divided else None, (whole, own))
                if divided:  # a line goes on behind the part's end
                    own.update(file.readline(LONGEST) + (b"later" if begin else b"first"))
                    file.seek(end)
                else:  # what the file alone has as a whole
                    own.update(read.to_bytes(8, "little"))
                found.append(Part(path, begin, end if divided else None, own.hexdigest()))
                done += end - begin
                if time.monotonic() - told > _TOLD:
                    told = time.monotonic()
                    remark(f"data.files: {done / 1e9:,.1f} GB read for their digests")
            whole.update(read.to_bytes(8, "little"))
    return whole.hexdigest(), found


def file_digests(settings: Mapping[str, Any], parts: Sequence[Part]) -> dict[str, str]:
    """Digest each file from its parts, to name the one that changed.

    Args:
        settings: as `parts_of` had them; the digests of parts are taken with them.
        parts: as `parts_of` gives them.

    Returns:
        A digest by path, and that of the settings under the empty name. Nothing of more than a thousand files.
    """
    made: dict[str, Any] = {}
    for part in parts:
        made.setdefault(str(part.path), xxhash.xxh3_128()).update(part.digest.encode())
    if len(made) > _NAMED:
        return {}
    head = json.dumps({"schema": SCHEMA, **settings}, sort_keys=True, default=str).encode()
    return {"": xxhash.xxh3_128_hexdigest(head)} | {name: state.hexdigest() for name, state in made.items()}


def _digest(file: IO[bytes], size: int | None, states: Iterable[Any]) -> int:
    """Read so many bytes (None: all) into some states; gives how many there were."""
    read = 0
    while piece := file.read(_READ if size is None else min(_READ, size - read)):
        for state in states:
            state.update(piece)
        read += len(piece)
    return read


def cached_parts(
    folder: Path,
    digest: str,
    parts: Sequence[Part],
    encode: Callable[[Part], Iterable[Encoded]],
    vocabulary: int,
    remark: Callable[[str], None] = lambda _: None,
    shift: int = 0,
) -> Tokens:
    """Open the caches of all parts as one, after making those that are not there.

    Several processes may call this at once for one folder: each takes the next part that nobody makes.

    Args:
        folder: holds one folder a part.
        digest: of all parts together.
        parts: as `parts_of` gives them.
        encode: gives a part's documents, tokenized.
        vocabulary: number of ids.
        remark: is told how far it is, and when a damaged cache is made again.
        shift: the part to begin with, so that processes begin at different ones.

    Raises:
        TensorkeepError: as `tokens.cached` does, or no part has a document.
    """
    if (Path(folder) / digest).is_dir():  # made whole, by version 0.1 or of one part
        return cached(folder, digest, lambda: (row for part in parts for row in encode(part)), vocabulary, remark)
    for part in parts:  # what a process that was killed left
        clear_leftovers(Path(folder) / part.digest)
    order = [*parts[shift % len(parts) :], *parts[: shift % len(parts)]]
    made: dict[str, Tokens] = {}
    told = began = time.monotonic()
    while len(made) < len({part.digest for part in parts}):
        before = len(made)
        for part in order:
            if part.digest in made:
                continue
            with _turn(Path(folder), part.digest) as mine:
                if mine or (Path(folder) / part.digest).is_dir():
                    made[part.digest] = cached(
                        folder, part.digest, functools.partial(encode, part), vocabulary, remark, empty=len(parts) > 1
                    )
            if time.monotonic() - told > _TOLD:
                told = time.monotonic()
                remark(_progress(parts, made, told - began))
        if len(made) == before:
            time.sleep(_WAIT)
    return joined([made[part.digest] for part in parts], digest)


def _progress(parts: Sequence[Part], made: Mapping[str, Tokens], seconds: float) -> str:
    """One line: how much is tokenized, how fast, and how long the rest takes."""
    total, done = (sum(p.size for p in parts if all_of or p.digest in made) for all_of in (True, False))
    tokens = sum(len(t.ids) for t in made.values())
    left = f", {seconds * (total - done) / done / 60:.0f} min left" if done else ""
    return f"tokens: {len(made)} of {len(parts)} parts, {tokens / max(seconds, 1e-9):,.0f} tokens/s{left}"


@contextlib.contextmanager
def _turn(folder: Path, digest: str) -> Iterator[bool]:
    """Hold the lock on a part while it is made; False where another process holds it.

    Where the file system has no locks two processes may make one part: each replaces it whole, with the same bytes.
    """
    with explained(folder):
        (folder / ".making").mkdir(parents=True, exist_ok=True)
        with (folder / ".making" / digest).open("a") as handle:
            free = True
            if fcntl is not None:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    free = False
                except OSError:
                    free = True
            yield free
            if free:
                (folder / ".making" / digest).unlink(missing_ok=True)


@dataclass(frozen=True, eq=False)
class Joined:
    """Arrays one after another, read by slices that lie in one of them.

    >>> Joined([np.arange(3), np.arange(10, 12)])[3:5]
    array([10, 11])
    """

    arrays: Sequence[Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "_starts", np.cumsum([0, *map(len, self.arrays)]).tolist())

    def __len__(self) -> int:
        return int(self._starts[-1])  # type: ignore[attr-defined]

    def __getitem__(self, where: slice) -> Any:
        starts: list[int] = self._starts  # type: ignore[attr-defined]
        at = bisect_right(starts, where.start) - 1
        while at < len(self.arrays) - 1 and not len(self.arrays[at]):
            at += 1
        return self.arrays[at][where.start - starts[at] : where.stop - starts[at]]


def joined(parts: Sequence[Tokens], digest: str) -> Tokens:
    """Put the tokens of parts one after another.

    Args:
        parts: in order.
        digest: of all together.

    Raises:
        TensorkeepError: no part has a document.
    """
    full = [part for part in parts if len(part)]
    if not full:
        raise TensorkeepError("the data is empty", where="data.files", hint="no document has a token that counts")
    if len(full) == 1:
        return Tokens(full[0].ids, full[0].marks, full[0].offsets, digest)
    starts = np.cumsum([0, *(len(part.ids) for part in full)])
    offsets = [part.offsets[:-1].astype("<u8") + np.uint64(start) for part, start in zip(full, starts.tolist())]
    marks = None if any(part.marks is None for part in full) else Joined([part.marks for part in full])
    ends: Any = np.concatenate([*offsets, starts[-1:].astype("<u8")])
    return Tokens(Joined([part.ids for part in full]), marks, ends, digest)  # type: ignore[arg-type]
