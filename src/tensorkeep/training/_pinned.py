"""Page-locked memory that is safe to drop: CUDA forgets it before the system can give its address to anything else.

Memory that is unmapped while CUDA still has it registered stays registered. The next mapping of the same size usually
gets the same address, and a copy off the GPU into it lands in the freed pages: the host keeps its old bytes, and no
error is raised. And a registration that fails leaves CUDA's last error set, which the next unrelated kernel raises.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from typing import Any

import torch

from tensorkeep.storage import durable

ALREADY_REGISTERED = 712  # cudaErrorHostMemoryAlreadyRegistered
_TRIES = 4  # mappings tried where CUDA holds on to the addresses of memory that is gone


class PinnedPages(mmap.mmap):
    """Anonymous memory that CUDA may have registered.

    Whatever lets go of its last view (a closed stage, a dropped one, an exception) ends in `__del__`, which waits for
    copies under way and unregisters before the pages go.
    """

    _address = 0  # where CUDA has it registered; 0: it has not
    _process = 0  # the process that registered it: a forked child must leave CUDA alone

    def __del__(self) -> None:
        self.unregister()

    def register(self) -> int:
        """Page-lock the memory for CUDA; returns CUDA's error code, 0 where it worked."""
        if self._address:
            return 0
        address = torch.frombuffer(self, dtype=torch.uint8).data_ptr()
        code = int(_cudart().cudaHostRegister(address, len(self), 0))
        if code == ALREADY_REGISTERED:  # these pages are new: what is registered here is memory that is gone
            forget_last_error()
            if int(_cudart().cudaHostUnregister(address)) == 0:
                code = int(_cudart().cudaHostRegister(address, len(self), 0))
        if code == 0:
            self._address, self._process = address, os.getpid()
        else:
            forget_last_error()
        return code

    def unregister(self) -> None:
        """Wait for copies into the memory and let CUDA forget it; does nothing where CUDA does not know it."""
        address, self._address = self._address, 0
        if not address or self._process != os.getpid():
            return
        torch.cuda.synchronize()  # a copy under way would land in pages that are somebody else's by then
        if int(_cudart().cudaHostUnregister(address)):
            forget_last_error()

    @property
    def registered(self) -> bool:
        """Whether CUDA has the memory page-locked."""
        return bool(self._address)


def pinned_memory(size: int) -> tuple[memoryview, str]:
    """Allocate page-locked memory for copies off a GPU.

    Args:
        size: bytes wanted; rounded up to whole blocks of direct I/O.

    Returns:
        The memory, and why it is not page-locked ("" where it is). Without the lock copies are right but slower: each
        goes through the driver's own buffers and holds the caller.
    """
    kept = []  # addresses that CUDA holds on to stay taken until another one is found
    for _ in range(_TRIES):
        memory = durable.allocate(size, PinnedPages)
        assert isinstance(memory.obj, PinnedPages)
        code = memory.obj.register()
        if code != ALREADY_REGISTERED:
            return memory, f"cudaHostRegister failed with error {code}" if code else ""
        kept.append(memory)
    return kept[-1], "CUDA holds on to the address of memory that is gone"


def forget_last_error() -> None:
    """Clear CUDA's last error, which the next unrelated kernel would raise: torch clears what it raises."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")  # a kernel of our own; zeros would be a memset, which looks at no earlier error


def _cudart() -> Any:
    """The CUDA runtime as torch has loaded it."""
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
