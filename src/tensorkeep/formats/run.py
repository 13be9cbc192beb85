"""Read a checkpoint of a training run, or the newest complete one of a run's folder (`run`).

The weights in it lie in another format, which reads them.
"""

from __future__ import annotations

from tensorkeep.formats import view
from tensorkeep.storage import run_folder
from tensorkeep.storage.files import Folder, LocalFolder


def sniff(folder: Folder, names: list[str], single: bool) -> bool:
    """Tell whether the folder is a run, or a step folder of one."""
    return (
        not single and isinstance(folder, LocalFolder) and run_folder.find_checkpoint(folder.path.resolve()) is not None
    )


def read(folder: Folder, names: list[str], path: str) -> view.StateView:
    """Open the weights of a run's checkpoint.

    `metadata["run"]` of the view is the position in the run; its notes name newer steps that were passed over.

    Args:
        folder: the run's folder or a step folder.
        names: not used.
        path: what the user typed, for messages.

    Raises:
        TensorkeepError: with an F code where manifest, sizes or the weights' header are not whole.
    """
    assert isinstance(folder, LocalFolder)
    step = run_folder.open_checkpoint(folder.path)
    assert step is not None
    found = view.recognised(LocalFolder(step.path), step.files, path, but="run")
    found.metadata["run"] = step.run
    found.notes += [view.Note(f.code, f"passed over: {f.message}", tuple(f.tensors)) for f in step.passed]
    return found
