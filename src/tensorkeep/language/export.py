"""What a run made, for use elsewhere: an adapter folder with the base's digest, or an hf folder; the average on request.

`tensorkeep convert RUN OUT --to hf` gives the plain weights of a full run; this is for adapters and averages.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from tensorkeep.adapters.files import save_adapter
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.companions import COMPANIONS
from tensorkeep.language.evaluation import checkpoint_of, leans, put_state
from tensorkeep.language.recipe_text import read_language
from tensorkeep.language.start import start_of
from tensorkeep.storage import run_folder
from tensorkeep.storage.files import explained
from tensorkeep.storage.placement import replacing, write_bytes
from tensorkeep.training.distributed import World


def exported(run: str | Path, out: str | Path, ema: bool = True, best: bool = False, overwrite: bool = False) -> Path:
    """Write the newest valid (or the best) checkpoint of a language run to the folder `out`.

    Under an adapter: a PEFT folder (`adapter.safetensors`, `adapter_config.json`) that names its base by digest.
    Otherwise an hf folder with config and tokenizer. `ema`: the averaged weights where there are some. Raises
    TensorkeepError where the run holds no valid checkpoint, or `out` is there and `overwrite` is not set.

    >>> exported("runs/one", "adapter")                                  # doctest: +SKIP
    PosixPath('adapter')
    """
    run, out = Path(run), Path(out)
    if not (run / run_folder.CHECKPOINTS).is_dir() or not (run / "recipe.yaml").is_file():
        raise TensorkeepError("is no run: no recipe.yaml or no checkpoints", where=run)
    recipe, state = read_language(run / "recipe.yaml"), checkpoint_of(run, run, best)
    start = start_of(recipe, run, World(), weights=leans(recipe))
    with put_state(start, recipe, state, ema):
        if recipe.adapter is not None:
            digest = (state.base or {}).get("digest")
            save_adapter(start.model, out, digest, recipe.model, overwrite=overwrite)
            return out
        tied = state.document["ties"]
        tensors = {
            n: t.contiguous()
            for n, t in start.model.state_dict().items()
            if n not in tied and isinstance(t, torch.Tensor)
        }
        with replacing(out, overwrite) as temporary, explained(out):
            temporary.mkdir()
            save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
            for name in COMPANIONS:
                if (run / name).is_file():
                    write_bytes(temporary / name, (run / name).read_bytes())
    return out
