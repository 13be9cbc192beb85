"""`tensorkeep demo`: chapters that show the main jobs on a real model; a module a chapter."""

from __future__ import annotations

from pathlib import Path

from tensorkeep.commands.shared import Say


def demo(chapter: str = "convert", /, *, out: Path | None = None, say: Say = Say()) -> int:
    """A real model through every format, proven at every stop; and what a broken conversion looks like.

    Parameters
    ----------
    chapter
        convert, diagnose, resume, qlora, detection, or all; samples: files to try the guides on, without torch.
    out
        The folder to leave everything in. Default ./demo, of samples ./examples
    """
    if chapter == "samples":
        from tensorkeep.commands.demo import samples

        return samples.write(out or Path("examples"), say.output())
    import gguf  # noqa: F401  each chapter needs these: say so before anything is made
    import torch  # noqa: F401
    import transformers  # noqa: F401

    from tensorkeep.commands.demo import story as chapters

    printer, place = say.output(), out or Path("demo")
    code = chapters.run(chapter, place, printer.line)
    if say.json:
        printer.document({"chapter": chapter, "out": str(place), "held": code == 0})
    return code
