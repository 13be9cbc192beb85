"""The tensors of a sharded checkpoint of a run, read when and where they are wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan

from tensorkeep.errors import FOREIGN, TensorkeepError, shown
from tensorkeep.storage.run_manifest import Manifest
from tensorkeep.training.durable_reader import DurableReader

PARTS = ("model", "optimizer", "ema")


class Shards:
    """The tensors of a sharded checkpoint, not yet read.

    Args:
        folder: the checkpoint.
        manifest: its manifest, whose files have their sizes.

    Attributes:
        bytes_read: bytes of tensors that were read.
        fetch: where files lie on several hosts: gets what this rank's `read` will want; every rank must call it.

    Raises:
        TensorkeepError: with an F code where its metadata is damaged or holds what no save of a run makes.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self._reader = folder, DurableReader(folder)
        self._metadata: Metadata = self._reader.of(manifest)
        self.parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
        for key, entry in self._metadata.state_dict_metadata.items():
            part, _, name = key.partition(".")
            if part not in PARTS or not isinstance(entry, TensorStorageMetadata):
                what = f"holds {shown(key)}, which is no tensor of model, optimizer or average"
                raise TensorkeepError(what, where=folder, code="F07", hint="use the checkpoint before it")
            self.parts[part][name] = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        self.fetch: Callable[[Mapping[str, Mapping[str, Tensor]]], None] | None = None
        claimed = sum(tensor.nbytes for own in self.parts.values() for tensor in own.values())
        if claimed > sum(entry.size for entry in manifest.files.values()):
            what = f"its metadata speaks of {claimed:,} bytes, more than its files have"
            raise TensorkeepError(what, where=folder, code="F07", hint="use the checkpoint before it")

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors that this process read."""
        return self._reader.bytes_read

    def read(self, into: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Fill tensors, whole or in shards, each by byte ranges of its own; every piece is compared with its digest.

        Args:
            into: part -> name -> the tensor to fill, of the stored shape.

        Raises:
            TensorkeepError: a piece is damaged or missing (F02, F03); tensors may then be half filled.
        """
        planner, plan = self._plan(into)
        self._reader.read_data(planner.finish_plan(plan), planner)

    def files(self, into: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
        """List the files that `read` opens.

        Args:
            into: as `read` takes it.
        """
        return self._reader.files(self._plan(into)[1])

    def ranges(self, into: Mapping[str, Mapping[str, Tensor]]) -> list[tuple[str, int, int]]:
        """List what `read` reads: file, first byte, bytes. The lists of shards of these files must be there.

        Args:
            into: as `read` takes it.
        """
        return self._reader.ranges(self._plan(into)[1])

    def _plan(self, into: Mapping[str, Mapping[str, Tensor]]) -> tuple[DefaultLoadPlanner, LoadPlan]:
        """Plan what is read into which tensor."""
        state = {f"{part}.{name}": tensor for part, own in into.items() for name, tensor in own.items()}
        planner = DefaultLoadPlanner(flatten_state_dict=False)
        planner.set_up_planner(state, self._metadata, is_coordinator=True)
        try:
            return planner, planner.create_local_plan()
        except FOREIGN as error:  # whatever metadata that cannot be makes of torch's planner
            raise TensorkeepError(f"cannot be read back: {error}", where=self.folder, code="F07") from None

    def whole(self) -> dict[str, dict[str, Tensor]]:
        """Read everything, as whole tensors on the CPU."""
        made = {
            part: {n: torch.empty_like(t, device="cpu") for n, t in own.items()} for part, own in self.parts.items()
        }
        self.read(made)
        return made
