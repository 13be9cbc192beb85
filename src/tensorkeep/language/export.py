"""Export what a language run made: an adapter folder with the base's digest, or an hf folder, averaged or not.

`tensorkeep convert RUN OUT --to hf` gives the plain weights of a full run; this is for adapters and averages.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from tensorkeep.adapters.files import save_adapter
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.companions import find_companions, travelling
from tensorkeep.formats.earlier import CHECKPOINT
from tensorkeep.language.checkpoints import checkpoint_of, needs_start_weights, put_state
from tensorkeep.language.recipe_text import read_language
from tensorkeep.language.start import start_of
from tensorkeep.storage import run_folder
from tensorkeep.storage.files import LocalFolder, explained
from tensorkeep.storage.placement import replacing, write_bytes
from tensorkeep.training.distributed import World


def exported(run: str | Path, out: str | Path, ema: bool = True, best: bool = False, overwrite: bool = False) -> Path:
    """Write the newest valid (or the best) checkpoint of a language run to a folder for use elsewhere.

    A run with an adapter gives a PEFT folder (`adapter.safetensors`, `adapter_config.json`) that names its base by
    digest; any other an hf folder with config and tokenizer.

    Args:
        run: the run's folder.
        out: the folder to write.
        ema: write the averaged weights where there are some.
        best: take the run's best checkpoint instead of its newest.
        overwrite: replace `out` where it is there.

    Returns:
        `out`.

    Raises:
        TensorkeepError: the run holds no valid checkpoint, or `out` is there and `overwrite` is not set.

    Example:
        >>> exported("runs/one", "adapter")                                  # doctest: +SKIP
        PosixPath('adapter')
    """
    run, out = Path(run), Path(out)
    if not (run / run_folder.CHECKPOINTS).is_dir() or not (run / "recipe.yaml").is_file():
        raise TensorkeepError("is no run: no recipe.yaml or no checkpoints", where=run)
    recipe, state = read_language(run / "recipe.yaml"), checkpoint_of(run, run, best)
    start = start_of(recipe, run, World(), weights=needs_start_weights(recipe))
    with put_state(start, recipe, state, ema):
        if recipe.adapter is not None:
            digest = (state.base or {}).get("digest")
            save_adapter(start.model, out, digest, recipe.model, overwrite=overwrite)
            return out
        tied = state.document["ties"]
        held = {n: t for n, t in start.model.state_dict().items() if isinstance(t, torch.Tensor)}
        tensors = {n: t.contiguous() for n, t in held.items() if n not in tied}
        with replacing(out, overwrite, CHECKPOINT) as temporary, explained(out):
            temporary.mkdir()
            save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
            for companion in travelling(find_companions(LocalFolder(run), [], described=True)):
                write_bytes(temporary / companion.name, companion.data)
    return out
