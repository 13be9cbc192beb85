"""Write a page where it belongs, whole or not at all."""

from __future__ import annotations

from pathlib import Path

from tensorkeep.storage.overwriting import PAGE
from tensorkeep.storage.placement import replacing, write_bytes


def write(text: str, out: str | Path, overwrite: bool = False) -> None:
    """Write a page into a file.

    Args:
        text: the page.
        out: the file.
        overwrite: whether an earlier page of ours may be replaced.
    """
    with replacing(Path(out), overwrite, PAGE) as temporary:
        write_bytes(temporary, text.encode("utf-8", "backslashreplace"))
