"""Files that were sent and are still known in part: all that is not tensor data, as a folder that formats can open."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence

from tensorkeep.conversion.streams import Sums
from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.files import inside, short_file
from tensorkeep.storage.layout import FileLayout, Fixed, Slot


class NotHeld(Exception):
    """Tensor data was asked for, which is with the store alone."""


class Held:
    """What was sent of an output beside its tensors, as a `Folder`; tensor data next to what is read is zeros.

    Args:
        layouts: the files.
        sums: the checksums of their tensors, by output name.
        url: the output, for messages.
    """

    def __init__(self, layouts: Sequence[FileLayout], sums: Mapping[str, Sums], url: str) -> None:
        self.url = url
        self._sizes = {layout.name: layout.size for layout in layouts}
        self._starts: dict[str, list[int]] = {}
        self._data: dict[str, list[bytes]] = {}
        for layout in layouts:
            crcs = {s.tensor: sums[s.tensor].crc for s in layout.slots} if layout.wants_crc else {}
            known = [s for s in layout.segments if not isinstance(s, Slot)]
            self._starts[layout.name] = [s.start for s in known]
            self._data[layout.name] = [s.data if isinstance(s, Fixed) else s.make(crcs) for s in known]

    def names(self) -> list[str]:
        """List the files, sorted."""
        return sorted(self._sizes)

    def size(self, name: str) -> int:
        """Return the size of a file in bytes; F05 where it is none of them."""
        if inside(name, self.url) not in self._sizes:
            raise TensorkeepError("no such file or folder", where=f"{self.url}/{name}", code="F05")
        return self._sizes[name]

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Return bytes of a file; F02 where it is shorter, NotHeld where tensor data alone is asked for."""
        size = self.size(name)
        length = size - start if length is None else length
        if start < 0 or length < 0 or start + length > size:
            raise short_file(f"{self.url}/{name}", start, length, size)
        starts, data, out, held = self._starts[name], self._data[name], bytearray(length), 0
        for i in range(max(bisect_right(starts, start) - 1, 0), len(starts)):
            low, high = max(start, starts[i]), min(start + length, starts[i] + len(data[i]))
            if starts[i] >= start + length:
                break
            if low < high:
                out[low - start : high - start] = data[i][low - starts[i] : high - starts[i]]
                held += high - low
        if length and not held:
            raise NotHeld(name)
        return bytes(out)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `start` of a file, as `read` gives it."""
        buffer[:] = self.read(name, start, len(buffer))

    def changed(self) -> list[str]:
        """Nothing changes what was sent."""
        return []
