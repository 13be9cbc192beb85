"""A part of a file as a seekable stream, which is what zipfile reads."""

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
