"""Remote checkpoints through fsspec: `s3://`, `memory://` and whatever else it knows, read by ranges.

Writing is `remote_sinks`.
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
    """The remote folder a URL stands for, and the file in it where the URL names a file.

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
    """Files under one prefix, listed once and read by ranges; the listing and a few blocks are kept."""

    def __init__(self, system: Any, path: str, url: str) -> None:
        self.system, self.path, self.url = system, path, url
        self._listing: dict[str, dict[str, Any]] | None = None
        self._read: set[str] = set()
        self._blocks: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<RemoteFolder {self.url}>"

    def _files(self) -> dict[str, dict[str, Any]]:
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
        return sorted(self._files())

    def size(self, name: str) -> int:
        entry = self._files().get(inside(name, self.url))
        if entry is None:
            raise TensorkeepError(
                "no such file or folder", where=f"{self.url}/{name}", hint="check the URL", code="F05"
            )
        self._read.add(name)
        return int(entry["size"])

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
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
        """A block of a file; the last few stay, for headers and pickles are read in many small pieces."""
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
        where = f"{self.url}/{name}"
        with explained_store(where):
            data = bytes(self.system.cat_file(f"{self.path}/{name}", start=start, end=start + length))
        if len(data) != length:
            raise short_file(where, start, length, start + len(data))
        return data

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        buffer[:] = self.read(name, start, len(buffer))

    def changed(self) -> list[str]:
        now = self._list()
        before = self._files()
        return sorted(n for n in self._read if n not in now or _version(now[n]) != _version(before[n]))


def _version(entry: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(entry.get(key)) for key in ("size", "ETag", "etag", "LastModified", "mtime", "created"))


def connect(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path on it."""
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
    """Turn what a store's client raises into one error that says what to do."""
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
    """What clients raise: the built-in errors, and those of the libraries that are loaded."""
    found: list[type[BaseException]] = [OSError, ValueError, RuntimeError, NotImplementedError, EOFError]
    for module, names in (("botocore.exceptions", ("BotoCoreError", "ClientError")), ("aiohttp", ("ClientError",))):
        if module in sys.modules:
            found += [getattr(sys.modules[module], name) for name in names]
    return tuple(found)


def parent_of(url: str) -> str:
    """The URL of the folder that holds this one."""
    return url.rstrip("/").rpartition("/")[0]
