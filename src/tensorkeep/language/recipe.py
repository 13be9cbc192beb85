"""The recipe of a language run, section by section: everything that decides its numbers.

`training`, `optimizer` and `schedule` are those of every run (`tensorkeep.training.sections`). A sample is a row of
tokens, for dpo a pair of rows. Paths are relative to the working directory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tensorkeep.diagnosis.identity.demand import split_demand
from tensorkeep.errors import TensorkeepError
from tensorkeep.language.data.augmentation import Augmentation
from tensorkeep.language.data.conversations import Format, Objective
from tensorkeep.language.data.packing import Packing
from tensorkeep.training.migration import VERSION
from tensorkeep.training.sections import (
    CheckpointConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainingConfig,
    refuse,
    refuse_local,
)

# fields of `training` that a language run refuses, and why
REFUSED = {
    "pretrained": "`model` names the weights that a language run starts from",
    "graph": "every batch holds another number of tokens to learn, a CUDA graph needs batches of one form",
}


@dataclass(frozen=True)
class DataConfig:
    """What is trained on.

    Attributes:
        files: JSON lines (`.gz` too), parquet, `datasets` folders, webdataset tars or plain text; folders and patterns
            stand for their files.
        format: How files are read; `auto` goes by their endings.
        length: Tokens of a row.
        packing: `none`: a row a document. `first_fit`: documents whole, rows filled up. `concatenate`: the stream cut
            every `length` tokens.
        bos: Whether a token for the beginning is put before each text, of objective pretrain.
        eos: Whether one for the end is put behind it.
        cache: Folder for tokens; null: in the run.
        augmentation: MiniMind's random changes of a conversation, of objective sft and packing none; null: none.
        streaming: Whether texts are tokenized while they are read, and never as a whole: for corpora that are large
            beside the disk or the time. How long is then said in updates.
        shuffle_buffer: Documents that are mixed with each other where `streaming` is on; 0: they keep their order.
    """

    files: tuple[str, ...]
    format: Format = "auto"
    length: int = 512
    packing: Packing = "none"
    bos: bool = False
    eos: bool = True
    cache: str | None = None
    augmentation: Augmentation | None = None
    streaming: bool = False
    shuffle_buffer: int = 10_000

    def __post_init__(self) -> None:
        if self.shuffle_buffer < 0:
            raise TensorkeepError(f"shuffle_buffer {self.shuffle_buffer} cannot be negative", where="data")
        if self.streaming and self.augmentation is not None and self.augmentation.on:
            raise TensorkeepError("a stream is not augmented", where="data", hint="augmentation: null")
        if not self.files:
            raise TensorkeepError("names no file", where="data.files")
        if self.length < 2:
            raise TensorkeepError(f"length {self.length} leaves no target", where="data", hint="at least 2")
        if self.augmentation is not None and self.augmentation.on and self.packing != "none":
            raise TensorkeepError("what is drawn anew each time cannot be packed", where="data", hint="packing: none")


@dataclass(frozen=True)
class EvaluationConfig:
    """Which files the loss is measured on, read like the training data; `rows`: at most so many (null: all)."""

    files: tuple[str, ...]
    format: Format = "auto"
    rows: int | None = None


@dataclass(frozen=True)
class AdapterConfig:
    """Low-rank updates of the linears that `targets` name (`all-linear`: all but the head); everything else freezes.

    Attributes:
        lora_r: Rank.
        lora_alpha: Updates are scaled by `lora_alpha / lora_r`.
        lora_dropout: Share of the inputs that is dropped on the way to an update.
        targets: Patterns of names.
        rslora: Whether updates are scaled by `lora_alpha / sqrt(lora_r)` instead.
        target_parameters: Patterns of parameters that stack experts, each of which gets an update of its own.
        quantize_aware: The forward sees weight and update as one weight in this 4-bit format; null: side by side.
    """

    lora_r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    targets: tuple[str, ...] = ("all-linear",)
    rslora: bool = False
    target_parameters: tuple[str, ...] = ()
    quantize_aware: Literal["nf4", "q4_0"] | None = None

    def __post_init__(self) -> None:
        if self.quantize_aware is not None and (self.lora_dropout or self.target_parameters):
            what, hint = "with dropout in its updates there is no merged weight", "lora_dropout: 0"
            if self.target_parameters:
                what, hint = "stacks of experts are not trained so", "target_parameters: []"
            raise TensorkeepError(what, where="adapter.quantize_aware", hint=hint)
        if self.lora_dropout and self.target_parameters:
            what = f"dropout {self.lora_dropout:g} with target_parameters, for which PEFT has none"
            raise TensorkeepError(what, where="adapter.lora_dropout", hint="lora_dropout: 0")


@dataclass(frozen=True)
class LanguageRecipe:
    """A whole language run.

    Attributes:
        version: Of the recipe's words.
        data: What is trained on.
        training: How long, in what portions, and what happens on the way.
        model: A checkpoint of any format or a Hub id; or `config`, exactly one of them. `NAME@IDENTITY` demands what
            `tensorkeep identify` says of it.
        config: What config.json says, to start from nothing.
        tokenizer: A folder, a Hub id or a tokenizer.json; null: the model's.
        objective: `pretrain`, `sft` or `dpo`.
        beta: How strongly `dpo` holds on to the reference.
        trainable: Patterns of the names that train.
        adapter: Low-rank updates; null: none.
        evaluation: Files whose loss is measured; null: none.
        optimizer: Rates and decays.
        schedule: How the learning rate moves.
        checkpoint: Where checkpoints lie when the processes run on several hosts.
        continued_from: Written by a run that goes on from MiniMind's resume file: which, and where it was.

    Raises:
        TensorkeepError: Where two sections contradict each other, or a field of `training` is refused.

    >>> LanguageRecipe(DataConfig(("a.jsonl",)), TrainingConfig(updates=1), model="m").objective
    'pretrain'
    """

    version: int = field(default=VERSION, kw_only=True)
    data: DataConfig
    training: TrainingConfig
    model: str | None = None
    config: dict | None = None  # type: ignore[type-arg]  # `from_mapping` takes a plain class
    tokenizer: str | None = None
    objective: Objective = "pretrain"
    beta: float = 0.1  # of dpo
    trainable: tuple[str, ...] = ("*",)
    adapter: AdapterConfig | None = None
    evaluation: EvaluationConfig | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    continued_from: dict | None = None  # type: ignore[type-arg]

    @property
    def source(self) -> str:
        """The checkpoint that `model` names, without the identity that it demands."""
        return split_demand(str(self.model))[0]

    def __post_init__(self) -> None:
        refuse(self.training, REFUSED)
        refuse_local(self.training, self.checkpoint)
        if (self.model is None) is (self.config is None):
            what = "says neither model nor config" if self.model is None else "says both model and config"
            raise TensorkeepError(what, where="recipe", hint="model: a checkpoint; config: to start from nothing")
        if self.config is not None and self.tokenizer is None:
            raise TensorkeepError("a model from nothing needs a tokenizer", where="recipe", hint="tokenizer: FOLDER")
        if self.training.memory is not None and self.training.parallel == "fsdp":
            hint = "parallel: ddp, or gradient_checkpointing: true"
            raise TensorkeepError("memory is not for sharded training", where="training.memory", hint=hint)
        if self.training.quantize_backbone and self.adapter is None:
            hint = "add --lora_r 16, or leave quantize_backbone out"
            raise TensorkeepError(
                "weights that train cannot be quantized", where="training.quantize_backbone", hint=hint
            )
        if self.adapter is not None and self.adapter.quantize_aware is not None:
            if self.objective == "dpo":
                what, hint = "dpo compares with a reference in floats", "objective: sft, or quantize_aware: null"
                raise TensorkeepError(what, where="adapter.quantize_aware", hint=hint)
            _refuse_beside_aware(self.training)
        _refuse_float8(self)
        if self.adapter is not None and self.config is not None:
            raise TensorkeepError(
                "an adapter needs a trained model under it", where="adapter", hint="model: CHECKPOINT"
            )
        if self.training.best is not None and self.evaluation is None:
            raise TensorkeepError("nothing is evaluated", where="training.best", hint="evaluation: {files: [...]}")
        if self.objective == "dpo" and (self.data.packing != "none" or self.data.augmentation is not None):
            raise TensorkeepError("pairs are neither packed nor augmented", where="data", hint="packing: none")
        if self.data.streaming and self.objective == "dpo":
            raise TensorkeepError("pairs are not streamed", where="data.streaming", hint="streaming: false")
        counted = self.training.epochs is not None or "epochs" in (self.training.unit, self.schedule.unit)
        if self.data.streaming and counted:
            what = "how long an epoch of a stream is is not known before it is read"
            raise TensorkeepError(what, where="training.epochs, unit", hint="training.updates, and unit: updates")
        if self.objective == "dpo" and self.model is None:
            raise TensorkeepError("preferences need a trained model", where="recipe", hint="model: CHECKPOINT")
        if self.objective != "sft" and self.data.augmentation is not None:
            raise TensorkeepError(
                "augmentation changes conversations", where="data.augmentation", hint="objective: sft"
            )


def _refuse_beside_aware(training: TrainingConfig) -> None:
    """Refuse what changes how a layer computes or where its base lies, beside a forward over rounded weights."""
    beside = {
        "compile": (training.compile, "compile: false"),
        "parallel": (training.parallel == "fsdp", "parallel: ddp"),
        "memory": (training.memory is not None, "memory: null"),
        "memory_limit_gib": (training.memory_limit_gib is not None, "memory_limit_gib: null"),
        "quantize_compute": (training.quantize_compute is not None, "quantize_compute: null"),
    }
    for name, (given, hint) in beside.items():
        if given:
            what = f"training.{name} is not for a forward over rounded weights"
            raise TensorkeepError(what, where="adapter.quantize_aware", hint=hint)


def _refuse_float8(recipe: LanguageRecipe) -> None:
    """Refuse float8 products where nothing could be computed in them, or what they do to the result is not known."""
    training = recipe.training
    wrong = {
        ("only frozen linears have float8 products", "add --lora_r 16"): recipe.adapter is None,
        ("the rest is computed in bf16", "precision: bf16"): training.precision != "bf16",
        ("sharded codes have no float8 products", "parallel: ddp"): training.parallel == "fsdp",
        ("a pair's two losses may differ by less than float8 rounds", "objective: sft"): recipe.objective == "dpo",
    }
    found = next((said for said, here in wrong.items() if here), None)
    if training.quantize_compute is not None and found is not None:
        what, instead = found
        raise TensorkeepError(what, where="training.quantize_compute", hint=f"{instead}, or leave quantize_compute out")
