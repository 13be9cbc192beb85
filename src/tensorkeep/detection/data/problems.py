"""What is wrong with a video or an annotation, in one form for all who look for it and all who show it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

_MOST = 20  # lines about pictures


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


def done(problem: Problem) -> str:
    """Return what a problem of a picture is, and that damaged ones were kept, lacking ones as the one before."""
    return f"kept: {problem.message}" if problem.kind == "damaged video" else problem.message


@dataclass(frozen=True)
class Told:
    """Tells what samples say about their videos (`meta["problems"]`), each thing once, at most 20.

    Attributes:
        part: of the data, which begins each line.
        remark: gets the lines.
        before: what was told.
        notes: what was told of the run itself (`meta["note"]`), each once, whatever else was.
    """

    part: str
    remark: Callable[[str], None]
    before: set[str] = field(default_factory=set)
    notes: set[str] = field(default_factory=set)

    def __call__(self, metas: Iterable[Mapping[str, Any]]) -> None:
        """Tell the problems of these samples that were not told before."""
        for meta in metas:
            if (note := meta.get("note")) is not None and note not in self.notes:
                self.notes.add(note)
                self.remark(note)
            for message in meta.get("problems", ()):
                line = f"{self.part}: {meta['video']}: {message}"
                if line in self.before or len(self.before) > _MOST:
                    continue
                self.before.add(line)
                self.remark(line if len(self.before) <= _MOST else f"{self.part}: more such pictures are not told")
