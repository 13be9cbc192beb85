"""A part of a file as a seekable stream, which is what zipfile reads, and as a folder that reads its ends once."""

from __future__ import annotations

import io

from tensorkeep.storage.files import Folder


class Range(io.RawIOBase):
    """A part of a file as a seekable stream, which is what zipfile reads."""

    def __init__(self, folder: Folder, file: str, start: int, length: int) -> None:
        self.folder, self.file, self.first, self.length, self.at = folder, file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = max({0: 0, 1: self.at, 2: self.length}[whence] + offset, 0)
        return self.at

    def tell(self) -> int:
        return self.at

    def read(self, size: int | None = -1) -> bytes:
        left = max(self.length - self.at, 0)
        size = left if size is None or size < 0 else min(size, left)
        data = self.folder.read(self.file, self.first + self.at, size) if size else b""
        self.at += size
        return data


_END = 1024  # bytes at either end of an archive, in which its directory, its small entries and their headers lie


class Ends:
    """One archive of a file, as a `Folder`: what is read near its ends is read once, however many calls ask for it."""

    def __init__(self, folder: Folder, start: int, length: int) -> None:
        self.folder, self.url, self._first, self._last = folder, folder.url, start, start + length
        self._kept: list[tuple[int, bytes]] = []

    def names(self) -> list[str]:
        return self.folder.names()

    def size(self, name: str) -> int:
        return self.folder.size(name)

    def changed(self) -> list[str]:
        return self.folder.changed()

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        self.folder.read_into(name, start, buffer)

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        if length is None or start < self._first or start + length > self._last:
            return self.folder.read(name, start, length)
        for at, data in self._kept:
            if at <= start and start + length <= at + len(data):
                return data[start - at : start - at + length]
        head, tail = min(self._first + _END, self._last), max(self._last - _END, self._first)
        at, end = (tail, self._last) if start >= tail else (self._first, head) if start + length <= head else (0, 0)
        if end == 0:
            return self.folder.read(name, start, length)
        data = self.folder.read(name, at, end - at)
        self._kept.append((at, data))
        return data[start - at : start - at + length]
