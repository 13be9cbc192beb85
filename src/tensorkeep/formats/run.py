"""`run`: a checkpoint of a run of ours, or the newest complete one of a run's folder; its weights lie in another format."""

from __future__ import annotations

from tensorkeep.formats import view
from tensorkeep.storage import run_folder
from tensorkeep.storage.files import Folder, LocalFolder


def sniff(folder: Folder, names: list[str], single: bool) -> bool:
    """Whether the folder is a run of ours, or a step folder of one."""
    return (
        not single and isinstance(folder, LocalFolder) and run_folder.find_checkpoint(folder.path.resolve()) is not None
    )


def read(folder: Folder, names: list[str], path: str) -> view.StateView:
    """The view of the checkpoint's weights; `metadata["run"]` is its position, notes name newer steps passed over.

    Raises TensorkeepError with an F code where manifest, sizes or the weights' header are not whole.
    """
    assert isinstance(folder, LocalFolder)
    step = run_folder.open_checkpoint(folder.path)
    assert step is not None
    found = view.recognised(LocalFolder(step.path), step.files, path, but="run")
    found.metadata["run"] = step.run
    found.notes += [view.Note(f.code, f"passed over: {f.message}", tuple(f.tensors)) for f in step.passed]
    return found
