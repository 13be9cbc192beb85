"""The height and width that pictures are scaled to."""

from __future__ import annotations

Size = int | tuple[int, int] | None  # short side, or (height, width), or as stored


def fitted(height: int, width: int, size: Size) -> tuple[int, int]:
    """Return the height and width that a picture gets: `size` for its shorter side, or `size` itself, or as it was.

    Args:
        height: of the picture, in pixels.
        width: of the picture, in pixels.
        size: what is asked for.

    Example:
        >>> fitted(180, 320, 90)
        (90, 160)
    """
    if size is None:
        return height, width
    if isinstance(size, tuple):
        return size
    factor = size / min(height, width)
    return max(1, round(height * factor)), max(1, round(width * factor))
