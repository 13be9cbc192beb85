"""Export what a language run made: an adapter folder that PEFT loads, or an hf folder with the base's own names.

An adapter is loaded with PEFT before it gets its name, a model's names and shapes with transformers.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import nn

from tensorkeep.adapters.files import write_adapter
from tensorkeep.adapters.lora import layers
from tensorkeep.adapters.stacked import adapted_stacks
from tensorkeep.errors import TensorkeepError, word
from tensorkeep.formats.earlier import CHECKPOINT
from tensorkeep.language._as_hf import whole_model
from tensorkeep.language._as_peft import load_in_peft
from tensorkeep.language.checkpoints import checkpoint_of, needs_start_weights, put_state, run_of
from tensorkeep.language.recipe import LanguageRecipe
from tensorkeep.language.recipe_text import read_language
from tensorkeep.language.start import BASE, Remark, start_of
from tensorkeep.storage.placement import remove, replacing
from tensorkeep.training.distributed import World
from tensorkeep.training.saver import State

_BESIDE_EXPERTS = re.compile(r"mlp|moe|expert|feed_forward|ffn")


def exported(
    run: str | Path,
    out: str | Path,
    ema: bool = True,
    best: bool = False,
    overwrite: bool = False,
    remark: Remark = lambda _: None,
    check: bool = True,
) -> Path:
    """Write the newest valid (or the best, or the named) checkpoint of a language run to a folder for use elsewhere.

    A run with an adapter gives PEFT's folder (`adapter_model.safetensors`, `adapter_config.json`) that names its base
    by digest; any other an hf folder with config and tokenizer.

    Args:
        run: the run's folder, or one of its step folders.
        out: the folder to write.
        ema: write the averaged weights where there are some.
        best: take the run's best checkpoint instead of its newest.
        overwrite: replace `out` where it is there.
        remark: is told what was checked.
        check: load an adapter with PEFT before it gets its name.

    Returns:
        `out`.

    Raises:
        TensorkeepError: the run holds no valid checkpoint, `out` is there and `overwrite` is not set, or (A01, K01) the
            program that the export is for would not load it as it is.

    Example:
        >>> exported("runs/one", "adapter")                                  # doctest: +SKIP
        PosixPath('adapter')
    """
    path, out = Path(run), Path(out)
    place = run_of(path)
    if place is None:
        raise TensorkeepError(
            "is no run: no recipe.yaml or no checkpoints",
            hint="name the folder of `tensorkeep train --out RUN`",
            where=path,
        )
    recipe, state = read_language(place / "recipe.yaml"), checkpoint_of(place, path, best, remark)
    with replacing(out, overwrite, CHECKPOINT) as temporary:
        if recipe.adapter is None:
            _write_whole(recipe, state, place, ema, temporary, remark)
            return out
        digest, base = (state.base or {}).get("digest"), base_of(place)
        start = start_of(recipe, place, World())
        with put_state(start, recipe, state, ema):
            write_adapter(start.model, temporary, digest, base)
            if check:
                _check(start.model, temporary, digest, base, path, remark)
    return out


def _write_whole(recipe: LanguageRecipe, state: State, run: Path, ema: bool, folder: Path, remark: Remark) -> None:
    """Write a model that was trained whole.

    Transformers knows how to write what it has loaded (a language model out of one that sees too). So where names do
    not come out right, the base is loaded first.
    """
    start = start_of(recipe, run, World(), weights=needs_start_weights(recipe))
    with put_state(start, recipe, state, ema):
        whole = whole_model(start, state.document["ties"], run)
    if whole.misfit and recipe.model is not None and not needs_start_weights(recipe):
        start = start_of(recipe, run, World())
        with put_state(start, recipe, state, ema):
            whole = whole_model(start, state.document["ties"], run)
    whole.write(folder, run, remark)


def base_of(run: Path) -> str:
    """Return what a run's adapter belongs to: RUN/base where the weights had to be converted, else the recipe's model.

    Args:
        run: the run's folder.
    """
    return str(run / BASE) if (run / BASE).is_dir() else read_language(run / "recipe.yaml").source


def _check(model: nn.Module, folder: Path, digest: str | None, base: str, run: Path, remark: Remark) -> None:
    """Let PEFT load the folder; name what it takes for experts by its weights, and stop where it holds another adapter.

    PEFT moves targets called as the experts of transformers 4 were (`gate_proj`) onto the stacked parameters, linears
    beside them too. A target that is a parameter stays what it is.
    """
    try:
        found = load_in_peft(folder, model)
    except TensorkeepError as error:
        remark(f"note: PEFT has not loaded the adapter: {error.line}")
        return
    if found is None:
        remark("note: PEFT is not installed, and has not loaded the adapter")
        return
    without = (load_in_peft(folder, model, dropout=False) or found) if found.refused else found
    linears = list(layers(model))
    left = [n for n in without.left if n in linears]
    if without.refused and adapted_stacks(model):  # it meant to move them onto parameters that are adapted themselves
        left = [n for n in linears if _BESIDE_EXPERTS.search(n)] or linears
    if left:
        remove(folder)
        write_adapter(model, folder, digest, base, parameters=left)
        found = load_in_peft(folder, model) or found
        if not found.problem:
            remark(f"note: {found.by} takes {len(left)} linears for stacked experts: they are named as parameters")
    if found.problem:
        raise TensorkeepError(
            f"{found.by} {found.problem}",
            where=run,
            code="A01",
            hint=f"tensorkeep merge {word(base)} {word(run)} OUT",
        )
    remark(f"{found.by} loads it: {found.pairs} low-rank pairs, each equal bit for bit to the run's")
