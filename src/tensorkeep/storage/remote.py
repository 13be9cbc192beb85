"""Read checkpoints from object stores through fsspec (`s3://`, `memory://` and others), by byte ranges.

Writing to a store is in `conversion`.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.files import Folder, inside, short_file

_BLOCK, _BLOCKS = 128 << 10, 32  # small reads fetch whole blocks, of which the last are kept


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
    with explained_store(url):
        system.invalidate_cache()
        kind = system.info(path)["type"]
    if kind == "directory":
        return RemoteFolder(system, path, url.rstrip("/")), None
    parent, _, name = path.rstrip("/").rpartition("/")
    return RemoteFolder(system, parent, parent_of(url)), name


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
        self._blocks: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

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
        if length > _BLOCK:
            return self._fetch(name, start, length)
        first = start // _BLOCK * _BLOCK
        blocks = b"".join(self._block(name, at, size) for at in range(first, start + length, _BLOCK))
        return blocks[start - first : start - first + length]

    def _block(self, name: str, at: int, size: int) -> bytes:
        """Return a block of a file; the last few are kept, for headers and pickles are read in many small pieces."""
        with self._lock:
            if (name, at) in self._blocks:
                self._blocks.move_to_end((name, at))
                return self._blocks[name, at]
        data = self._fetch(name, at, min(_BLOCK, size - at))
        with self._lock:
            self._blocks[name, at] = data
            while len(self._blocks) > _BLOCKS:
                self._blocks.popitem(last=False)
        return data

    def _fetch(self, name: str, start: int, length: int) -> bytes:
        """Ask the store for a byte range."""
        where = f"{self.url}/{name}"
        with explained_store(where):
            data = bytes(self.system.cat_file(f"{self.path}/{name}", start=start, end=start + length))
        if len(data) != length:
            raise short_file(where, start, length, start + len(data))
        return data

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `start` of a file; F02 where it is shorter."""
        buffer[:] = self.read(name, start, len(buffer))

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
        raise TensorkeepError("no such file or folder", where=where, hint="check the URL", code="F05") from None
    except PermissionError as error:
        raise TensorkeepError(
            f"permission denied: {error}", where=where, hint="check the credentials and the bucket's policy"
        ) from None
    except failures() as error:
        hint = "check the network, the endpoint and the credentials, then run again"
        raise TensorkeepError(f"{type(error).__name__}: {error}", where=where, hint=hint) from None


def failures() -> tuple[type[BaseException], ...]:
    """Return the exception types that stores' clients raise: built-in ones, and those of the libraries loaded."""
    found: list[type[BaseException]] = [OSError, ValueError, RuntimeError, NotImplementedError, EOFError]
    for module, names in (("botocore.exceptions", ("BotoCoreError", "ClientError")), ("aiohttp", ("ClientError",))):
        if module in sys.modules:
            found += [getattr(sys.modules[module], name) for name in names]
    return tuple(found)


def parent_of(url: str) -> str:
    """Return the URL of the folder that holds a file or folder.

    Args:
        url: the URL of the latter.

    Example:
        >>> parent_of("s3://bucket/llama/model.pth")
        's3://bucket/llama'
    """
    return url.rstrip("/").rpartition("/")[0]
