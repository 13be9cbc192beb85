"""Read checkpoints from object stores through fsspec (`s3://`, `memory://` and others), by byte ranges.

What is read one after the other is fetched ahead in large ranges (`_ahead`); of S3 every range is of the version that
was listed. Writing to a store is in `conversion`.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from tensorkeep.errors import TensorkeepError, untold
from tensorkeep.storage._ahead import Ahead
from tensorkeep.storage.files import Folder, inside, short_file
from tensorkeep.storage.s3 import failures, get_range, speaks_s3, unfinished

_BLOCK, _BLOCKS = 128 << 10, 32  # small reads fetch whole blocks, of which the last are kept


class StoreFailed(TensorkeepError):
    """A store, or the way to it, failed: what was sent before is not wrong, and another attempt may go on from it."""


def open_remote(url: str) -> tuple[Folder, str | None]:
    """Open the remote folder that a URL stands for.

    Args:
        url: a folder or a file, in any scheme that fsspec knows.

    Returns:
        The folder, and the file's name where the URL names a file, else None.

    Raises:
        TensorkeepError: F05 where nothing is there; without a code where fsspec is missing or the store refuses.

    Example:
        >>> open_remote("s3://bucket/llama/model.safetensors")        # doctest: +SKIP
        (<RemoteFolder s3://bucket/llama>, 'model.safetensors')
    """
    system, path = connect(url)
    try:
        with explained_store(url):
            system.invalidate_cache()
            kind = system.info(path)["type"]
    except TensorkeepError as error:
        if error.code == "F05":
            error.hint = _unfinished_there(system, path) or error.hint
        raise
    if kind == "directory":
        return RemoteFolder(system, path, url.rstrip("/")), None
    parent, _, name = path.rstrip("/").rpartition("/")
    return RemoteFolder(system, parent, parent_of(url)), name


def _unfinished_there(system: Any, path: str) -> str | None:
    """Say what a writer that was killed, or is at work, has sent to a place where nothing can be read yet."""
    with contextlib.suppress(*failures()):
        begun = unfinished(system, path) if speaks_s3(system) else []
        if begun:
            what = "an unfinished upload is" if len(begun) == 1 else f"{len(begun)} unfinished uploads are"
            return (
                f"{what} there: a writer is at work or was killed; the command that wrote goes on from it; "
                f"to give it up: {begun[0].abort_command}"
            )
    return None


class RemoteFolder:
    """The files under one prefix of a store, as a `Folder`; the listing and the last few blocks read are kept.

    Args:
        system: the store's fsspec file system.
        path: the prefix there.
        url: the same as the user wrote it.
    """

    def __init__(self, system: Any, path: str, url: str) -> None:
        self.system, self.path, self.url = system, path, url
        self._listing: dict[str, dict[str, Any]] | None = None
        self._read: set[str] = set()
        self._blocks: OrderedDict[tuple[str, int], bytearray] = OrderedDict()
        self._lock = threading.Lock()
        self._ahead = Ahead(self._fetch)

    def __del__(self) -> None:
        if hasattr(self, "_ahead"):
            self._ahead.close()

    def __repr__(self) -> str:
        return f"<RemoteFolder {self.url}>"

    def _files(self) -> dict[str, dict[str, Any]]:
        """Return the listing by name; the store is asked once."""
        with self._lock:
            if self._listing is None:
                self._listing = self._list()
            return self._listing

    def _list(self) -> dict[str, dict[str, Any]]:
        with explained_store(self.url):
            self.system.invalidate_cache(self.path)
            found = self.system.ls(self.path, detail=True)
        files = {e["name"].rstrip("/").rpartition("/")[2]: e for e in found if e["type"] == "file"}
        # some tools mark a folder by an empty object of its own name
        return {name: e for name, e in files.items() if name and e["name"].strip("/") != self.path.strip("/")}

    def names(self) -> list[str]:
        """List the files directly inside, sorted."""
        return sorted(self._files())

    def etag(self, name: str) -> str | None:
        """Return what S3 calls the version of a file's bytes; None where the store has no such word."""
        found = self._files().get(name, {}).get("ETag")
        return str(found).strip('"') if found else None

    def size(self, name: str) -> int:
        """Return the size of a file in bytes; F05 where it is not there."""
        entry = self._files().get(inside(name, self.url))
        if entry is None:
            raise TensorkeepError(
                "no such file or folder", where=f"{self.url}/{name}", hint="check the URL", code="F05"
            )
        self._read.add(name)
        return int(entry["size"])

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Return `length` bytes of a file from byte `start`; F02 where it is shorter."""
        where, size = f"{self.url}/{name}", self.size(name)
        length = size - start if length is None else length
        if start < 0 or length < 0 or start + length > size:
            raise short_file(where, start, length, size)
        buffer = bytearray(length)
        self._fill(name, start, memoryview(buffer), size)
        return bytes(buffer)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `start` of a file; F02 where it is shorter."""
        size = self.size(name)
        if start < 0 or start + len(buffer) > size:
            raise short_file(f"{self.url}/{name}", start, len(buffer), size)
        self._fill(name, start, buffer, size)

    def expect(self, name: str, start: int, length: int) -> None:
        """Take note that a range is going to be read from its first byte to its last; it may be fetched ahead."""
        if length > _BLOCK:
            self._ahead.expect(name, start, length)

    def _fill(self, name: str, start: int, buffer: memoryview, size: int) -> None:
        """Fill `buffer`; small reads take whole blocks, for headers and pickles are read in many small pieces."""
        if len(buffer) > _BLOCK:
            self._ahead.read_into(name, start, buffer, size)
            return
        first = start // _BLOCK * _BLOCK
        for at in range(first, start + len(buffer), _BLOCK):
            block = memoryview(self._block(name, at, size))
            low, high = max(start, at), min(start + len(buffer), at + len(block))
            buffer[low - start : high - start] = block[low - at : high - at]

    def _block(self, name: str, at: int, size: int) -> bytearray:
        """Return a block of a file; the last few are kept."""
        with self._lock:
            if (name, at) in self._blocks:
                self._blocks.move_to_end((name, at))
                return self._blocks[name, at]
        data = bytearray(min(_BLOCK, size - at))
        self._ahead.read_into(name, at, memoryview(data), size)
        with self._lock:
            self._blocks[name, at] = data
            while len(self._blocks) > _BLOCKS:
                self._blocks.popitem(last=False)
        return data

    def _fetch(self, name: str, start: int, length: int) -> bytes | bytearray:
        """Ask the store for a byte range."""
        where, path = f"{self.url}/{name}", f"{self.path}/{name}"
        with explained_store(where):
            if speaks_s3(self.system):
                etag = self._files()[name].get("ETag")
                data = get_range(self.system, path, start, length, str(etag) if etag else None)
            else:
                data = self.system.cat_file(path, start=start, end=start + length)
        if len(data) != length:
            raise short_file(where, start, length, start + len(data))
        return data

    def changed(self) -> list[str]:
        """List the files that are not what they were when first listed (size, tag or time), sorted."""
        now = self._list()
        before = self._files()
        return sorted(n for n in self._read if n not in now or _version(now[n]) != _version(before[n]))


def _version(entry: dict[str, Any]) -> tuple[str, ...]:
    """What tells that an object was written again: size, tags and times, as far as the store gives them."""
    return tuple(str(entry.get(key)) for key in ("size", "ETag", "etag", "LastModified", "mtime", "created"))


def connect(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path on it.

    Args:
        url: in any scheme that fsspec knows.

    Raises:
        TensorkeepError: fsspec, or the package that the scheme needs, is not installed.
    """
    try:
        import fsspec
    except ImportError:
        raise TensorkeepError("remote paths need fsspec", where=url, hint="pip install 'tensorkeep[remote]'") from None
    try:
        with explained_store(url):
            system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:  # fsspec names the package that this protocol needs
        raise TensorkeepError(
            f"{error}", where=url, hint="pip install 'tensorkeep[remote]', and what the message names"
        ) from None
    return system, str(path)


@contextlib.contextmanager
def explained_store(where: object) -> Iterator[None]:
    """Turn what a store's client raises in the body into a TensorkeepError that says what to do.

    Args:
        where: the URL that the body works on, for messages.

    Yields:
        Nothing.

    Raises:
        TensorkeepError: for every failure of the store; F05 where the object is not there.
    """
    try:
        yield
    except FileNotFoundError:
        raise StoreFailed("no such file or folder", where=where, hint="check the URL", code="F05") from None
    except PermissionError as error:
        raise StoreFailed(
            f"permission denied: {untold(str(error), where)}",
            where=where,
            hint="check the credentials and the bucket's policy",
        ) from None
    except failures() as error:
        hint = "check the network, the endpoint and the credentials, then run again"
        raise StoreFailed(f"{type(error).__name__}: {untold(str(error), where)}", where=where, hint=hint) from None


def parent_of(url: str) -> str:
    """Return the URL of the folder that holds a file or folder.

    Args:
        url: the URL of the latter.

    Example:
        >>> parent_of("s3://bucket/llama/model.pth")
        's3://bucket/llama'
    """
    return url.rstrip("/").rpartition("/")[0]
