"""Load the model a language run starts from: any checkpoint that can be read, or a config with random weights.

A checkpoint that is no hf folder is converted into the run's `base/` first, and proven; transformers then loads that
and must report nothing missing and nothing unexpected. Config and tokenizer are copied into the run, so that its
checkpoints can be read, evaluated and converted without the recipe.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tensorkeep.conversion import configs
from tensorkeep.conversion import execution as conversion
from tensorkeep.conversion import naming as namings
from tensorkeep.conversion.dequantizing import float_config
from tensorkeep.conversion.plan import HfTensor
from tensorkeep.conversion.planning import make_plan
from tensorkeep.diagnosis.identity.demand import demand, split_demand
from tensorkeep.diagnosis.identity.parts import counted
from tensorkeep.errors import Inconclusive, TensorkeepError, word
from tensorkeep.formats.companions import COMPANIONS, Companion, leads_out
from tensorkeep.formats.view import StateView, read
from tensorkeep.formats.whole_config import complete
from tensorkeep.language._bases import in_codes, is_quantized
from tensorkeep.language._shards import prepare, why_whole
from tensorkeep.language.recipe import LanguageRecipe
from tensorkeep.models.language_model import auto_class, believable_config, model_of, never_rescaled, text_config
from tensorkeep.models.refusals import refusals, said
from tensorkeep.storage import run_folder
from tensorkeep.storage.canonical_json import canonical
from tensorkeep.storage.certificate import digest_of_all
from tensorkeep.storage.files import LocalFolder, explained
from tensorkeep.storage.placement import replacing, write_bytes
from tensorkeep.training import distributed
from tensorkeep.training.distributed import World
from tensorkeep.training.randomness import derive

BASE = "base"
Remark = Callable[[str], None]


@dataclass
class StartingModel:
    """The model a run starts from, with its tokenizer.

    Args:
        model: a causal language model of transformers.
        tokenizer: of transformers.
        view: the checkpoint that the weights belong to (None: they were drawn at random from a config).
        tensors: what the model's tensors are made of, where it has no values yet (`_shards.fill` reads them).
    """

    model: nn.Module
    tokenizer: Any
    view: StateView | None
    tensors: dict[str, HfTensor] | None = None
    _digests: dict[str, str] | None = None

    @property
    def vocabulary(self) -> int:
        """How many token ids the model knows."""
        return int(text_config(self.model.config).vocab_size)

    def digest(self, world: World | None = None) -> str | None:
        """Digest of the checkpoint's tensors, by which merges and adapters name a base; None without a checkpoint.

        Args:
            world: all of its ranks must call this, each hashes its part of the tensors; None: this process hashes all.
        """
        if self.view is None or self._digests is not None:
            return None if self._digests is None else digest_of_all(self._digests)
        world, view, loads = world or World(), self.view, [0] * (world.size if world else 1)
        mine: list[str] = []
        for name in sorted(view, key=lambda n: (-view[n].nbytes, n)):
            rank = loads.index(min(loads))
            loads[rank] += view[name].nbytes
            mine += [name] if rank == world.rank else []
        found = distributed.together(world, lambda: {name: view.digest(name) for name in mine})
        self._digests = {n: d for theirs in distributed.gathered(world, found) for n, d in theirs.items()}
        return digest_of_all(self._digests)

    def base(self, path: str, world: World) -> dict[str, Any]:
        """Describe the base of an adapter: its digest, and those of its files and config, which name what changed.

        Args:
            path: as the recipe has it.
            world: as of `digest`.
        """
        made: dict[str, Any] = {"digest": self.digest(world), "path": path}
        if self.view is None or self._digests is None:
            return made
        within: dict[str, dict[str, str]] = {}
        for name, digest in self._digests.items():
            for block in self.view[name].blocks:
                within.setdefault(block.file, {})[name] = digest
        if self.view.config is not None:
            said = canonical(counted(self.view.config))
            made["config"] = hashlib.sha256(said).hexdigest()[:32]
        return made | {"files": {file: digest_of_all(held) for file, held in sorted(within.items())}}


def start_of(
    recipe: LanguageRecipe,
    run: Path,
    world: World,
    remark: Remark = lambda _: None,
    weights: bool = True,
    sharded: bool = False,
) -> StartingModel:
    """Load or make the model and tokenizer a recipe starts from; write config, tokenizer and `base/` into the run.

    Args:
        recipe: `model` or `config`, `tokenizer`, `training.quantize_backbone` and `training.seed` are used.
        run: the run's folder.
        world: this process among its peers; the first rank converts and writes, the others wait.
        remark: is told what was converted, and what a conversion noticed.
        weights: False draws random weights, for a run whose checkpoint holds them all.
        sharded: where it can be, the model comes without values, for `_shards.fill`.

    Returns:
        The model in float32 on the CPU; with `quantize_backbone` its linears may be quantized and on the rank's device.

    Raises:
        TensorkeepError: the checkpoint is not the one that is demanded (F03), cannot be read or loaded whole, or the
            tokenizer has more tokens than the model (C02).
    """
    name, wanted = split_demand(str(recipe.model))
    if wanted is not None and weights:
        distributed.from_first(world, lambda: _demand(name, wanted, run, remark))
    begun = _without_values(recipe, run, world, remark) if sharded and weights and recipe.model is not None else None
    if sharded and recipe.model is None and world.first:
        remark("note: every rank makes the whole model before it is sharded: its weights are drawn at random")
    view = begun[1] if begun else _hf_view(recipe, run, world, remark) if recipe.model is not None else None
    own = str(view.folder.url) if view is not None else ""
    if begun and view is not None and view.format != "hf":  # its tokenizer may lie beside its folder
        own = str(run)
        distributed.together(world, lambda: _keep_companions(run, begun[0], view, recipe) if world.makes else None)
    tokenizer = load_tokenizer(recipe.tokenizer or own)
    kind, model = recipe.training.quantize_backbone, begun[0] if begun else None
    if model is None and view is not None and weights and (kind or is_quantized(view)):
        model = in_codes(view, _hollow, kind, world.device, recipe.adapter is None, remark, _held_in(recipe))
    if model is None and (view is None or not weights):
        stored = sum(record.nbytes for record in view.records.values()) if view is not None else None
        model = from_config(
            _whole_config(view) if view else dict(recipe.config or {}), derive(recipe.training.seed, 0), stored
        )
    elif model is None:
        assert view is not None
        model = loaded(view)
    start = StartingModel(model, tokenizer, view, begun[2] if begun else None)
    if len(tokenizer) > start.vocabulary:
        raise TensorkeepError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {start.vocabulary} rows",
            where="tokenizer",
            code="C02",
            hint="take the tokenizer that belongs to the model",
        )
    distributed.together(world, lambda: _keep_companions(run, model, view, recipe) if world.makes else None)
    return start


def _held_in(recipe: LanguageRecipe) -> torch.dtype:
    """The dtype in which floats beside codes are loaded: that of computation where they freeze and memory counts."""
    training = recipe.training
    little = training.memory is not None or training.memory_limit_gib is not None
    return torch.bfloat16 if little and recipe.adapter is not None and training.precision == "bf16" else torch.float32


def _demand(name: str, identity: str, run: Path, remark: Remark) -> None:
    """Stop where the starting checkpoint is another than the recipe demands."""
    if (run / BASE).is_dir() and not Path(name).exists():
        remark(f"note: {name} is not there any more; {run / BASE} was made from it when its identity was checked")
        return
    demand(name, identity)


def _without_values(
    recipe: LanguageRecipe, run: Path, world: World, remark: Remark
) -> tuple[nn.Module, StateView, dict[str, HfTensor]] | None:
    """Make the model of a starting checkpoint without values; None, with a remark, where it must be loaded whole.

    A checkpoint of another format is read as it lies, but for a base, whose digest is that of its hf names.
    """
    direct = recipe.adapter is None and recipe.objective != "dpo"
    direct = not any(distributed.gathered(world, (run / BASE).is_dir())) and direct
    view = read(recipe.source) if direct else _hf_view(recipe, run, world, remark)
    unsure = recipe.data.packing != "none" or (recipe.adapter is not None and "all-linear" in recipe.adapter.targets)
    found: Any = why_whole(view, unsure)
    if found is None and recipe.adapter is not None and recipe.adapter.target_parameters:
        found = "stacks of experts are adapted"
    model = None
    if found is None:
        model = _hollow(_whole_config(view))
        found = prepare(view, model, recipe.training.quantize_backbone, world)
    reasons = distributed.gathered(world, found if isinstance(found, str) else None)
    whole = next((reason for reason in reasons if reason is not None), None)
    if whole is None and model is not None:
        return model, view, found
    if world.first:
        remark(f"note: every rank loads the whole model before it is sharded: {whole}")
    return None


def _hf_view(recipe: LanguageRecipe, run: Path, world: World, remark: Remark) -> StateView:
    """Open the starting checkpoint as an hf folder: itself, or converted into RUN/base and proven."""
    base = run / BASE
    source = recipe.source
    there = base.is_dir()  # made by an earlier start of this run; its certificate names what it was made from
    if all(distributed.gathered(world, there)):
        return read(base)
    view = read(source)
    if view.format == "hf" and isinstance(view.folder, LocalFolder) and "config.json" in view.folder.names():
        named = namings.identify(view).naming
        if named == "hf" or (named is None and all(s.actions == ("keep",) for s in make_plan([view], "hf").steps)):
            return view
    if world.makes and not there:
        plan = make_plan([view], "hf", dtype="F32" if view.format == "gguf" else None)
        for note in plan.notes:
            remark(f"note: {note.code} {note.message}")
        result = conversion.convert(plan, str(base), "hf")
        remark(f"{source} ({view.format}) converted: {base}, {len(result.digests)} tensors, proven equal to the plan")
    distributed.gathered(world, None)
    return read(base)


def loaded(view: StateView) -> nn.Module:
    """Load a checkpoint's model for training, in float32 on the CPU.

    Args:
        view: an hf folder, or what can be loaded as one.

    Returns:
        The model, as transformers builds it; of a quantized checkpoint codes of bitsandbytes stay, others are floats.

    Raises:
        TensorkeepError: transformers cannot load it, or reports a tensor as missing (K01) or unexpected (K02).
    """
    _refuse_encoders(view.config or {}, view.path)
    if is_quantized(view) and (coded := in_codes(view, _hollow, None, torch.device("cpu"))) is not None:
        return coded
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
            hint=f"tensorkeep diagnose {word(view.path)}",
            tensors=found,
        )
    made: nn.Module = model
    return made


def _refuse_encoders(config: Mapping[str, Any], path: str) -> None:
    """Stop at an encoder-decoder: its decoder alone would load, without most of the file."""
    named = str((config.get("architectures") or [""])[0])
    if config.get("is_encoder_decoder") is True and not named.endswith("ForCausalLM"):
        what = f"{named or 'the model'} has an encoder: only causal language models train here"
        raise TensorkeepError(what, where=path, hint="convert, diagnose and merge take it, with adapters of PEFT's own")


def _hollow(config: Mapping[str, Any]) -> nn.Module:
    """Make the model of a config on the meta device, without memory."""
    with torch.device("meta"):
        return from_config(dict(config), 0)


def _whole_config(view: StateView) -> dict[str, Any]:
    """Return the config beside a checkpoint as its floats have it, with what it says for each layer."""
    config, companions = float_config(view)
    return complete(config or {}, companions)


def from_config(config: dict[str, Any], seed: int, stored: int | None = None) -> nn.Module:
    """Make a model with random weights, the same for the same seed; the process's random state is left alone.

    Args:
        config: what config.json says, `model_type` included.
        seed: of the weights.
        stored: bytes of the weights that the config describes, where there are some: it may not ask for many more.

    Returns:
        The model in float32.

    Raises:
        TensorkeepError: transformers cannot build such a model.
    """
    import transformers

    ignored = ("dtype", "torch_dtype", "transformers_version", "architectures")
    auto = auto_class(transformers, config) or transformers.AutoModelForCausalLM
    config = {k: v for k, v in config.items() if k not in ignored}
    believed = believable_config(transformers, config, stored)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            made: nn.Module = never_rescaled(auto.from_config(believed, trust_remote_code=False))
    except refusals() as error:
        raise TensorkeepError(
            f"transformers cannot build it: {said(error)}",
            where="config",
            hint="config is what config.json says, with model_type",
        ) from None
    return made.float()


def load_tokenizer(path: str, where: str | None = None) -> Any:
    """Load a fast tokenizer from a folder, a Hub id or a tokenizer.json; no code of others runs.

    Args:
        path: the folder, id or file.
        where: what errors call it, where that is not `path`.

    Returns:
        A fast tokenizer of transformers.

    Raises:
        TensorkeepError: nothing there can be loaded as a tokenizer.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    place = Path(path)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        if place.suffix == ".json" and place.is_file():
            made: Any = PreTrainedTokenizerFast(tokenizer_file=str(place))
        else:
            if not place.is_dir():
                from tensorkeep.storage.hub import cached_snapshot

                place = cached_snapshot(path)
            made = AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
        made("")  # settings of a wrong type are found only when it is used
        return made
    except refusals() as error:
        what = f"no tokenizer can be loaded: {said(error)}"
        raise TensorkeepError(
            what, where=where or path or "tokenizer", hint="tokenizer: FOLDER or tokenizer.json"
        ) from None


def _keep_companions(run: Path, model: Any, view: StateView | None, recipe: LanguageRecipe) -> None:
    """Copy config and tokenizer into the run where they are not there, so that `read(run)` finds them."""
    inherited = float_config(view)[1] if view is not None else []
    found = [c for c in inherited if c.name in COMPANIONS and c.name != "recipe.yaml"]
    if view is None:
        found = [configs.companion("config.json", model.config.to_dict())]
    if recipe.tokenizer is not None:
        place = Path(recipe.tokenizer)
        names = [c for c in COMPANIONS if c != "config.json" and c not in ("generation_config.json", "recipe.yaml")]
        own = {n: place / n for n in names if (place / n).is_file() and not leads_out(place / n)}
        own = {"tokenizer.json": place} if place.is_file() else own
        with explained(place):
            tokenizer = [Companion(name, path.read_bytes(), str(path)) for name, path in own.items()]
        found = [c for c in found if c.name not in own] + tokenizer
    with explained(run):
        run.mkdir(parents=True, exist_ok=True)
    _refuse_stale(run, found)
    for companion in found:
        if not (run / companion.name).exists():
            with replacing(run / companion.name, overwrite=False) as temporary:
                write_bytes(temporary, companion.data)


def _refuse_stale(run: Path, found: Sequence[Companion]) -> None:
    """Refuse a folder without a checkpoint that holds another model's files, of a start that ended early."""
    if run_folder.steps(run):
        return
    wanted = {companion.name: companion.data for companion in found}
    for name in COMPANIONS:
        path = run / name
        if name == "recipe.yaml" or not path.is_file():
            continue
        if wanted.get(name) != path.read_bytes():
            what = f"{name} is not that of this model and tokenizer: an earlier start, or another program, left it"
            raise TensorkeepError(what, where=run, hint=f"choose another --out, or remove {word(path)}")
