"""The model a language run starts from: any checkpoint that can be read, or a config and nothing.

What is not an hf folder is converted into the run's `base/` first, and proven; transformers then loads that and must
report nothing missing and nothing unexpected. Config and tokenizer are copied into the run, so that its checkpoints
can be read, evaluated and converted without the recipe.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tensorkeep.conversion import configs
from tensorkeep.conversion import execution as conversion
from tensorkeep.conversion import naming as namings
from tensorkeep.conversion.planning import make_plan
from tensorkeep.errors import Inconclusive, TensorkeepError
from tensorkeep.formats.companions import COMPANIONS, Companion
from tensorkeep.formats.view import StateView, read
from tensorkeep.language.recipe import LanguageRecipe
from tensorkeep.models.buffers import REFUSALS
from tensorkeep.models.language_model import model_of
from tensorkeep.storage.certificate import digest_of_all
from tensorkeep.storage.files import LocalFolder, explained
from tensorkeep.storage.placement import replacing, write_bytes
from tensorkeep.training import distributed
from tensorkeep.training.distributed import World
from tensorkeep.training.randomness import derive

BASE = "base"
Remark = Callable[[str], None]


@dataclass
class Start:
    """A model and its tokenizer. `view`: the checkpoint the weights came from (None: drawn at random)."""

    model: nn.Module
    tokenizer: Any
    view: StateView | None

    @property
    def rows(self) -> int:
        """Tokens that the model knows."""
        config: Any = self.model.config
        return int(config.vocab_size)

    def digest(self) -> str | None:
        """Of the weights it started from, as merges and adapters name a base."""
        return digest_of_all({n: self.view.digest(n) for n in self.view}) if self.view is not None else None


def start_of(
    recipe: LanguageRecipe, run: Path, world: World, remark: Remark = lambda _: None, weights: bool = True
) -> Start:
    """The model in float32 on the CPU, and the tokenizer; writes config, tokenizer and `base/` into the run.

    `weights=False` draws them at random, for a run whose checkpoint holds them all.
    """
    view = _hf_view(recipe, run, world, remark) if recipe.model is not None else None
    tokenizer = load_tokenizer(recipe.tokenizer or str(view.folder.url if view else ""))
    if view is not None and weights and recipe.training.quantize_backbone and _plain_names(view):
        model = packed(view, recipe.training.quantize_backbone, world)
    elif view is None or not weights:
        model = from_config(dict((view.config if view else recipe.config) or {}), derive(recipe.training.seed, 0))
    else:
        model = loaded(view)
    rows = Start(model, tokenizer, view).rows
    if len(tokenizer) > rows:
        raise TensorkeepError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {rows} rows",
            where="tokenizer",
            code="C02",
            hint="take the tokenizer that belongs to the model",
        )
    if world.first:
        _keep_companions(run, model, view, recipe)
    distributed.gathered(world, None)
    return Start(model, tokenizer, view)


def _hf_view(recipe: LanguageRecipe, run: Path, world: World, remark: Remark) -> StateView:
    """The start checkpoint as an hf folder: itself, or converted into RUN/base and proven."""
    base = run / BASE
    source = str(recipe.model)
    if base.is_dir():  # made by an earlier start of this run; its certificate names what it was made from
        return read(base)
    view = read(source)
    if view.format == "hf" and isinstance(view.folder, LocalFolder) and "config.json" in view.folder.names():
        named = namings.identify(view).naming
        if named == "hf":
            return view
    if world.first:
        plan = make_plan([view], "hf", dtype="F32" if view.format == "gguf" else None)
        for note in plan.notes:
            remark(f"note: {note.code} {note.message}")
        result = conversion.convert(plan, str(base), "hf")
        remark(f"{source} ({view.format}) converted: {base}, {len(result.digests)} tensors, proven equal to the plan")
    distributed.gathered(world, None)
    return read(base)


def loaded(view: StateView) -> nn.Module:
    """A view's model for training. Raises K01/K02 where transformers reports anything missing or unexpected."""
    try:
        model, report = model_of(view)
    except Inconclusive as error:
        raise TensorkeepError(f"no model to train: {error.reason}", where=view.path) from None
    if report:
        kind, found = next(iter(report.items()))
        raise TensorkeepError(
            f"{kind.replace('_', ' ')}: {', '.join(found[:4])} ({len(found)})",
            where=view.path,
            code="K01" if kind == "missing_keys" else "K02",
            hint=f"tensorkeep diagnose {view.path}",
            tensors=found,
        )
    made: nn.Module = model
    return made


def packed(view: StateView, kind: Any, world: World) -> nn.Module:
    """A view's model with its linears quantized as they are read: memory of the quantized model and one tensor."""
    from tensorkeep.models.repair import repair_buffers
    from tensorkeep.quantization.loading import load_quantizing

    model = _skeleton(view)
    load_quantizing(model, view, kind, device=world.device, dtype=torch.float32, repair=repair_buffers)
    return model.eval()


def _plain_names(view: StateView) -> bool:
    """Whether the file's tensors are the model's one by one (transformers stacks the experts of some models)."""
    return set(view) <= set(_skeleton(view).state_dict())


def _skeleton(view: StateView) -> nn.Module:
    """The model of a view's config without memory."""
    with torch.device("meta"):
        return from_config(dict(view.config or {}), 0)


def from_config(config: dict[str, Any], seed: int) -> nn.Module:
    """A model with random weights, the same for the same seed; the process's random state is left alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {
        k: v for k, v in config.items() if k not in ("dtype", "torch_dtype", "transformers_version", "architectures")
    }
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            made: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), trust_remote_code=False)
    except REFUSALS as error:
        raise TensorkeepError(
            f"transformers cannot build it: {type(error).__name__}: {' '.join(str(error).split())[:200]}",
            where="config",
            hint="config is what config.json says, with model_type",
        ) from None
    return made.float()


def load_tokenizer(path: str) -> Any:
    """A fast tokenizer from a folder, a Hub id or a tokenizer.json; no code of others runs."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    place = Path(path)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        if place.suffix == ".json" and place.is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(place))
        if not place.is_dir():
            from tensorkeep.storage.hub import cached_snapshot

            place = cached_snapshot(path)
        return AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    except (*REFUSALS, OSError) as error:
        what = f"no tokenizer can be loaded: {' '.join(str(error).split())[:200]}"
        raise TensorkeepError(what, where=path or "tokenizer", hint="tokenizer: FOLDER or tokenizer.json") from None


def _keep_companions(run: Path, model: Any, view: StateView | None, recipe: LanguageRecipe) -> None:
    """Config and tokenizer into the run, where they are not there: what `read(run)` finds beside its checkpoints."""
    found = [
        c for c in (view.companions if view is not None else []) if c.name in COMPANIONS and c.name != "recipe.yaml"
    ]
    if view is None:
        found = [configs.companion("config.json", model.config.to_dict())]
    if recipe.tokenizer is not None:
        place = Path(recipe.tokenizer)
        names = [c for c in COMPANIONS if c != "config.json" and c not in ("generation_config.json", "recipe.yaml")]
        own = {"tokenizer.json": place} if place.is_file() else {n: place / n for n in names if (place / n).is_file()}
        with explained(place):
            tokenizer = [Companion(name, path.read_bytes(), str(path)) for name, path in own.items()]
        found = [c for c in found if c.name not in own] + tokenizer
    with explained(run):
        run.mkdir(parents=True, exist_ok=True)
    for companion in found:
        if not (run / companion.name).exists():
            with replacing(run / companion.name, overwrite=False) as temporary:
                write_bytes(temporary, companion.data)
