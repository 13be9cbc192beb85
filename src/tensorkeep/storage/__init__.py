"""Bytes on disks and object stores: read within bounds, written whole or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorkeep._face import lazy

if TYPE_CHECKING:
    from tensorkeep.storage.certificate import parse_json as parse_json
    from tensorkeep.storage.files import Folder as Folder
    from tensorkeep.storage.files import LocalFolder as LocalFolder
    from tensorkeep.storage.placement import replacing as replacing
    from tensorkeep.storage.placement import write_bytes as write_bytes
    from tensorkeep.storage.record import TensorRecord as TensorRecord

_WHERE = {
    "Folder": "files",
    "LocalFolder": "files",
    "TensorRecord": "record",
    "parse_json": "certificate",
    "replacing": "placement",
    "write_bytes": "placement",
}
__all__ = ["Folder", "LocalFolder", "TensorRecord", "parse_json", "replacing", "write_bytes"]
__getattr__, __dir__ = lazy(__name__, _WHERE)
