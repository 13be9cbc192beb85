"""What many tests need: the tiny model, damaged copies of it."""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent
TINY = ROOT / "examples" / "tiny-llama"
SHARED = ROOT.parent / "shared"


def tiny_copy(folder: Path) -> Path:
    shutil.copytree(TINY, folder)
    return folder


def flip_a_byte(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(data)
