"""What is wrong with a video or an annotation, in one form for all who look for it and all who show it."""

from __future__ import annotations

from typing import NamedTuple


class Problem(NamedTuple):
    """One thing wrong with a video or an annotation.

    Attributes:
        severity: `error` (results would be wrong or missing), `warning` or `info`.
        kind: what is wrong in two or three words, the same for all problems alike.
        video: name of the video; None where the whole file is meant.
        message: what is wrong, with its figures.
    """

    severity: str
    kind: str
    video: str | None
    message: str
