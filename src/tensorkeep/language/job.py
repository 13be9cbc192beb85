"""A language run from its recipe: `build` makes the live objects, `loop_of` says how the loop is to go."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tensorkeep.errors import TensorkeepError, near_misses
from tensorkeep.language._recompute import lean
from tensorkeep.language._schedules import Schedule
from tensorkeep.language.data.chat import Chat, tokenizer_settings
from tensorkeep.language.data.packing import plan
from tensorkeep.language.data.preferences import CollatePairs, Pairs, PreferenceLoss, pairs_of, with_reference
from tensorkeep.language.data.rows import Collate, LiveConversations, PackedData, as_line, targets_of
from tensorkeep.language.data.texts import Conversation, Objective, Preference, records
from tensorkeep.language.data.tokens import Encoded, cached, fingerprint, in_batches
from tensorkeep.language.losses import TokenLoss, plain_head, refuse_packing
from tensorkeep.language.recipe import DataConfig, GroupRule, LanguageRecipe, OptimizerConfig
from tensorkeep.language.start import Remark, Start, start_of
from tensorkeep.training import distributed, trackers
from tensorkeep.training.batches import Data, to_device
from tensorkeep.training.distributed import World
from tensorkeep.training.ema import Ema
from tensorkeep.training.job import Job, Loop, at_least_one
from tensorkeep.training.loop import autocast
from tensorkeep.training.randomness import derive
from tensorkeep.training.recipe import plain
from tensorkeep.training.saver import Keep, State

CACHE = "cache"
# of a recipe, what may differ between two starts of a run: where its tokens are kept
FREE = ("cache",)


def build(recipe: LanguageRecipe, run: str | Path, world: World | None = None, remark: Remark = lambda _: None) -> Job:
    """The job of a recipe, its model on `world.device`; tokens, config and tokenizer go into the run folder.

    Raises TensorkeepError where weights, tokenizer, data and recipe do not fit together.

    >>> job = build(read_language("recipes/language/smollm2_sft.yaml"), "runs/one")      # doctest: +SKIP
    """
    world, run = world or World(), Path(run)
    start = start_of(recipe, run, world, remark)
    model = start.model
    if recipe.data.packing != "none":
        refuse_packing(model.config, recipe.data.length)
    digest = start.digest() if recipe.adapter is not None or recipe.objective == "dpo" else None
    choose_trainable(model, recipe)
    model.to(world.device)
    head = plain_head(model)
    data = make_data(recipe, recipe.data, start, run, world, remark)
    if isinstance(data, Pairs):
        micro = recipe.training.micro_batch or max(recipe.training.batch // world.size, 1)
        data = with_reference(data, model, head, _cache(recipe, run), str(digest), world, _pad(start), micro, remark)
    if recipe.training.gradient_checkpointing:
        lean(decoder_layers(model), recipe.training.kept, recipe.training.compile)
    loss: Any = (
        TokenLoss(head, router=_router(model)) if recipe.objective != "dpo" else PreferenceLoss(head, recipe.beta)
    )
    document = plain(recipe)
    document["data"] = {k: v for k, v in document["data"].items() if k not in FREE}
    return Job(
        model=model,
        optimizer=make_optimizer(model, recipe.optimizer),
        data=data,
        collate=CollatePairs(_pad(start)) if recipe.objective == "dpo" else Collate(_pad(start)),
        loss=loss,
        count=pairs_of if recipe.objective == "dpo" else targets_of,
        pace=("pairs" if recipe.objective == "dpo" else "tokens", None),
        schedule=Schedule(recipe.schedule, _updates_of(recipe, len(data))),
        evaluate=_evaluation(recipe, start, run, world, loss, remark),
        ema=None if recipe.training.ema is None else Ema(model, recipe.training.ema),
        recipe=document,
        base=None if recipe.adapter is None else {"digest": digest, "path": str(recipe.model)},
        trackers=[_tracker(name, run) for name in recipe.training.trackers if world.first],
    )


def continued(
    recipe: LanguageRecipe, path: str, job: Job, loop: Loop, remark: Remark = lambda _: None
) -> tuple[Job, Loop, State]:
    """Job and loop that go on from MiniMind's resume file: its weights, moments, position, order and learning rates.

    The recipe's `micro_batch` (or `batch`) is MiniMind's --batch_size and its `epochs` --epochs; the accumulation is
    read off the file. Raises TensorkeepError where the file does not belong to the model and data.
    """
    from tensorkeep.language.minimind.continue_from import continue_from

    t = recipe.training
    epochs = int(t.epochs) if t.epochs is not None and float(t.epochs).is_integer() else None
    on = continue_from(path, job.model, len(job.data), t.micro_batch or t.batch, epochs=epochs, base=job.base)
    job.orders, job.recipe = on.orders, job.recipe | {"continued_from": on.origin}
    job.schedule = on.schedule or job.schedule
    for group in job.optimizer.param_groups:
        group |= {key: value for key, value in on.optimizer.items() if value is not None}
    for line in on.remarks:
        remark(line)
    return job, replace(loop, updates=on.updates or loop.updates, batch=on.batch, micro=on.micro), on.state


def _tracker(name: str, run: Path) -> trackers.Tracker:
    return trackers.tensorboard(run) if name == "tensorboard" else trackers.wandb(run, "tensorkeep")


def decoder_layers(model: Any) -> list[nn.Module]:
    """The layers of a model of transformers, which keep only their input under gradient checkpointing."""
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        what = f"{type(model).__name__} has no list of layers to recompute"
        raise TensorkeepError(what, where="training.gradient_checkpointing", hint="gradient_checkpointing: false")
    return list(layers)


def _updates_of(recipe: LanguageRecipe, samples: int) -> int:
    """Updates of the whole run, from `updates` or from `epochs` over so many samples."""
    training = recipe.training
    if training.updates is not None:
        return training.updates
    return max(1, math.ceil(float(training.epochs or 0) * samples / training.batch))


def loop_of(recipe: LanguageRecipe, samples: int) -> Loop:
    """How the loop is to go; `samples`: of one epoch."""
    t = recipe.training
    return Loop(
        updates=_updates_of(recipe, samples),
        batch=t.batch,
        micro=t.micro_batch,
        seed=t.seed,
        workers=t.workers,
        clip=t.clip,
        precision=t.precision,
        compile=t.compile and not t.gradient_checkpointing,
        log_every=t.log_every,
        save_every=t.save_every,
        evaluate_every=t.evaluate_every,
        evaluate_from=t.evaluate_from,
        parallel=t.parallel,
        deterministic=t.deterministic,
        keep=Keep(t.keep_last, t.keep_every),
        best=t.best,
        patience=t.patience,
    )


def _router(model: Any) -> float:
    on = getattr(model.config, "output_router_logits", False)
    return float(getattr(model.config, "router_aux_loss_coef", 0.0) or 0.0) if on else 0.0


def _pad(start: Start) -> int:
    pad = start.tokenizer.pad_token_id
    return int(pad) if isinstance(pad, int) else 0


def _cache(recipe: LanguageRecipe, run: Path) -> Path:
    return Path(recipe.data.cache) if recipe.data.cache is not None else run / CACHE


# -- what trains --------------------------------------------------------------------------------------------------------


def choose_trainable(model: nn.Module, recipe: LanguageRecipe) -> None:
    """Freeze what the recipe does not train; put low-rank updates on, and codes under them."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in recipe.trainable:
        if not any(fits(name, pattern) for name in names):
            hint = near_misses(pattern, {*names, *(part for name in names for part in name.split("."))})
            raise TensorkeepError(f"{pattern!r} fits no parameter", where="trainable", hint=hint or f"e.g. {names[0]}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fits(name, pattern) for pattern in recipe.trainable))
    if recipe.adapter is None:
        return
    from tensorkeep.adapters.lora import add_lora
    from tensorkeep.quantization.modules import quantize_, quantized_layers

    model.requires_grad_(False)
    if recipe.training.quantize_backbone and not quantized_layers(model):  # else they were on the way in
        quantize_(model, recipe.training.quantize_backbone)
    adapter = recipe.adapter
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(recipe.training.seed, 1))
        add_lora(model, adapter.targets, adapter.lora_r, adapter.lora_alpha, adapter.lora_dropout, adapter.rslora)


def fits(name: str, pattern: str) -> bool:
    """Whether a shell-style pattern fits a parameter's name, or a plain word is a part of it.

    >>> fits("layers.0.q_proj.lora_A", "lora"), fits("layers.0.q_proj.weight", "layers.1.*")
    (True, False)
    """
    return fnmatchcase(name, pattern) or (not set(pattern) & set("*?[") and pattern in name)


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups for the optimizer: one for each rule, in order, then what is left with and without decay.

    Each has `params`, `label`, `lr`, `base_lr`, `weight_decay`. The first rule that fits a name takes it. Raises
    TensorkeepError where a rule gets nothing, naming the rule that was first.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    taken: dict[str, str] = {}
    groups = []
    for rule in config.groups:
        fitting = [name for name in trainable if fits(name, rule.pattern)]
        own = [name for name in fitting if name not in taken]
        if not own:
            raise _empty(rule, fitting, taken, trainable)
        taken |= dict.fromkeys(own, rule.pattern)
        decay = config.weight_decay if rule.weight_decay is None else rule.weight_decay
        groups.append(_group(rule.pattern, own, trainable, rule.lr, decay))
    rest = [name for name in trainable if name not in taken]
    decayed = [name for name in rest if trainable[name].ndim > 1 or config.decay_all]
    plain_ones = [name for name in rest if name not in set(decayed)]
    groups.append(_group("weights", decayed, trainable, config.lr, config.weight_decay))
    groups.append(_group("norms and biases", plain_ones, trainable, config.lr, 0.0))
    return [group for group in groups if group["params"]]


def _group(
    label: str, names: Iterable[str], parameters: Mapping[str, nn.Parameter], lr: float, decay: float
) -> dict[str, Any]:
    params = [parameters[name] for name in names]
    return {"params": params, "label": label, "lr": lr, "base_lr": lr, "weight_decay": decay}


def _empty(
    rule: GroupRule, fitting: list[str], taken: Mapping[str, str], trainable: Mapping[str, Any]
) -> TensorkeepError:
    what = f"the rule {rule.pattern!r} gets no parameter"
    if not fitting:
        hint = f"no trainable parameter has that name; there are {', '.join(list(trainable)[:3])} ..."
        return TensorkeepError(what, where="optimizer.groups", hint=hint)
    first = taken[fitting[0]]
    hint = (
        f"{fitting[0]} and {len(fitting) - 1} more went to the earlier rule {first!r}: put {rule.pattern!r} before it"
    )
    return TensorkeepError(what, where="optimizer.groups", hint=hint)


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; the fused kernel where the parameters are on a GPU."""
    groups = parameter_groups(model, config)
    fused = all(p.is_cuda for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused or None)


# -- data ---------------------------------------------------------------------------------------------------------------


def make_data(recipe: LanguageRecipe, config: DataConfig, start: Start, run: Path, world: World, remark: Remark) -> Any:
    """The data of a section: tokens from the cache (made by the first rank), then rows."""
    settings = {
        "objective": recipe.objective,
        "format": config.format,
        "cut": config.length if _cut(recipe, config) else None,
        "bos": config.bos,
        "eos": config.eos,
        **tokenizer_settings(start.tokenizer),
    }
    live = config.augmentation is not None and config.augmentation.on
    digest = fingerprint(config.files, settings | ({"lines": True} if live else {}))
    rows, folder = start.rows, _cache(recipe, run)

    def encoded() -> Iterator[Encoded]:
        return (
            _lines(config) if live else encode(recipe.objective, config, start.tokenizer, _cut(recipe, config), remark)
        )

    if world.first:
        tokens = cached(folder, digest, encoded, max(rows, 256), remark)
    distributed.gathered(world, None)
    if not world.first:
        tokens = cached(folder, digest, encoded, max(rows, 256), remark)
    if live and config.augmentation is not None:
        drawn = f"{digest} {config.length} {config.augmentation}"
        return LiveConversations(tokens, Chat(start.tokenizer), config.augmentation, config.length, drawn)
    if recipe.objective == "dpo":
        return Pairs(tokens, None, str(config.length))
    return PackedData(tokens, plan(tokens.offsets, config.length, config.packing), f"{config.packing} {config.length}")


def _cut(recipe: LanguageRecipe, config: DataConfig) -> int | None:
    """Tokens a document is cut at: conversations always, texts where each has a row of its own."""
    return config.length if config.packing == "none" or recipe.objective != "pretrain" else None


def encode(
    objective: Objective, config: DataConfig, tokenizer: Any, cut: int | None, remark: Remark
) -> Iterator[Encoded]:
    """Every document as tokens; what has no target is left out, and counted."""
    found = records(config.files, objective, config.format)
    if objective == "pretrain":
        yield from _encode_texts((str(text) for text in found), tokenizer, config.bos, config.eos, cut, remark)
        return
    chat, idle = Chat(tokenizer), 0
    for record in found:
        both = list(record) if isinstance(record, Preference) else [record]
        made = [chat.encode(one) for one in both if isinstance(one, Conversation)]
        short = [Encoded(ids[:cut], marks[:cut]) for ids, marks in made]
        if not all(any((one.marks or [])[1:]) for one in short):
            idle += 1
            continue
        yield from short
    if idle:
        remark(f"{idle} records hold no answer within {cut} tokens: left out")


def _encode_texts(
    texts: Iterable[str], tokenizer: Any, bos: bool, eos: bool, cut: int | None, remark: Remark = lambda _: None
) -> Iterator[Encoded]:
    """Texts as `[bos] tokens [eos]`, the tokens cut so that it fits into `cut` (MiniMind's rule); what is cut is told."""
    begin, end = ([_special(tokenizer, name)] if on else [] for name, on in (("bos", bos), ("eos", eos)))
    most = None if cut is None else cut - len(begin) - len(end)
    lost = whole = 0
    for batch in in_batches(texts):
        for ids in tokenizer(batch, add_special_tokens=False)["input_ids"]:
            whole, lost = whole + len(ids), lost + len(ids[most:] if most is not None else [])
            yield Encoded([*begin, *ids[:most], *end])
    if lost:
        remark(
            f"{lost:,} of {whole:,} tokens lie beyond a row of {cut} and are left out; data.packing: concatenate keeps them"
        )


def _special(tokenizer: Any, name: str) -> int:
    found = getattr(tokenizer, f"{name}_token_id")
    if found is None:
        raise TensorkeepError(f"the tokenizer has no {name} token", where=f"data.{name}", hint=f"{name}: false")
    return int(found)


def _lines(config: DataConfig) -> Iterator[Encoded]:
    for record in records(config.files, "sft", config.format):
        if isinstance(record, Conversation):
            yield Encoded(list(as_line(record)))


# -- evaluation ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Loss over held-out rows: every rank takes its share, every rank gets the numbers."""

    data: Data
    collate: Callable[[list[Any]], Any]
    loss: Callable[[nn.Module, Any, float], Mapping[str, torch.Tensor]]
    count: Callable[[Any], float]
    loop: Loop
    world: World
    perplexity: bool
    rows: int

    def __call__(self, model: nn.Module) -> dict[str, float]:
        sums: dict[str, float] = {}
        counted, micro = 0.0, self.loop.micro or max(self.loop.batch // self.world.size, 1)
        every = self.world.size * micro
        for at in range(self.world.rank * micro, math.ceil(self.rows / every) * every, every):
            own = range(at, min(at + micro, self.rows))
            indices = own or range(1)  # a rank without rows runs along: under FSDP a forward takes all of them
            batch = self.collate([self.data.sample(i, torch.Generator().manual_seed(i)) for i in indices])
            counted += self.count(batch) if own else 0.0
            with autocast(self.loop, self.world):
                for name, value in self.loss(model, to_device(batch, self.world.device), 1.0).items():
                    sums[name] = sums.get(name, 0.0) + (float(value) if own else 0.0)
        names = sorted({n for theirs in distributed.gathered(self.world, list(sums)) for n in theirs})
        total, *values = distributed.total(self.world, counted, *(sums.get(n, 0.0) for n in names))
        out = {name: value / at_least_one(total) for name, value in zip(names, values)}
        if self.perplexity:
            out |= {"perplexity": math.exp(min(out["loss"], 700.0)), "count": total}
        return out


def _evaluation(
    recipe: LanguageRecipe, start: Start, run: Path, world: World, loss: Any, remark: Remark
) -> Callable[[nn.Module], Mapping[str, float]] | None:
    if recipe.evaluation is None:
        return None
    return evaluation_of(
        recipe,
        recipe.evaluation.files,
        recipe.evaluation.format,
        start,
        run,
        world,
        loss,
        remark,
        recipe.evaluation.rows,
    )


def evaluation_of(
    recipe: LanguageRecipe,
    files: tuple[str, ...],
    form: Any,
    start: Start,
    run: Path,
    world: World,
    loss: Any,
    remark: Remark,
    rows: int | None = None,
) -> Evaluation:
    """The evaluation of some files under a recipe, read like its training data but never augmented."""

    config = replace(recipe.data, files=files, format=form, augmentation=None)
    data = make_data(recipe, config, start, run, world, remark)
    dpo = recipe.objective == "dpo"
    if isinstance(data, Pairs):
        digest, micro = str(start.digest()), recipe.training.micro_batch or recipe.training.batch
        data = with_reference(
            data, start.model, loss.plain, _cache(recipe, run), digest, world, _pad(start), micro, remark
        )
    count = min(len(data), rows) if rows is not None else len(data)
    collate: Any = CollatePairs(_pad(start)) if dpo else Collate(_pad(start))
    counter: Any = pairs_of if dpo else targets_of
    return Evaluation(data, collate, loss, counter, loop_of(recipe, max(len(data), 1)), world, not dpo, count)
