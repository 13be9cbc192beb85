"""The recipe of a language run, section by section: everything that decides its numbers.

Counts in `training` are in updates, sizes in samples of the global batch; a sample is a row of tokens (a pair of rows
for dpo). Paths are relative to the working directory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tensorkeep.errors import TensorkeepError
from tensorkeep.language._schedules import ScheduleConfig
from tensorkeep.language.data.chat import Augmentation
from tensorkeep.language.data.packing import Packing
from tensorkeep.language.data.texts import Format, Objective


@dataclass(frozen=True)
class DataConfig:
    """What is trained on. files: JSON lines or plain text. length: tokens of a row. packing: `none` (a row a document),
    `first_fit` (documents whole, rows filled up), `concatenate` (the stream cut every `length` tokens).

    bos, eos: put around each text (pretrain). cache: folder for tokens (None: in the run). augmentation: MiniMind's
    random changes of a conversation (sft; None: none), which need packing none.
    """

    files: tuple[str, ...]
    format: Format = "auto"
    length: int = 512
    packing: Packing = "none"
    bos: bool = False
    eos: bool = True
    cache: str | None = None
    augmentation: Augmentation | None = None

    def __post_init__(self) -> None:
        if not self.files:
            raise TensorkeepError("names no file", where="data.files")
        if self.length < 2:
            raise TensorkeepError(f"length {self.length} leaves no target", where="data", hint="at least 2")
        if self.augmentation is not None and self.augmentation.on and self.packing != "none":
            raise TensorkeepError("what is drawn anew each time cannot be packed", where="data", hint="packing: none")


@dataclass(frozen=True)
class EvaluationConfig:
    """Loss on other files, read like the training data. rows: at most so many (None: all)."""

    files: tuple[str, ...]
    format: Format = "auto"
    rows: int | None = None


@dataclass(frozen=True)
class GroupRule:
    """Trainable parameters whose name fits `pattern` (docs/concepts/patterns.md) get this rate and decay."""

    pattern: str
    lr: float
    weight_decay: float | None = None


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. groups are tried in order and the first that fits takes a parameter; what is left gets `lr` and
    `weight_decay`, parameters of one dimension (norms, biases) no decay unless `decay_all`."""

    lr: float = 1e-5
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    decay_all: bool = False
    groups: tuple[GroupRule, ...] = ()


@dataclass(frozen=True)
class AdapterConfig:
    """Low-rank updates on the linears that `targets` name (`all-linear`: all but the head); everything else freezes."""

    lora_r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    targets: tuple[str, ...] = ("all-linear",)
    rslora: bool = False


@dataclass(frozen=True)
class TrainingConfig:
    """How it is trained, saved and chosen.

    updates, or epochs: exactly one. batch: samples of one update over all processes and accumulated steps.
    micro_batch: samples of one process in one forward (None: its share). ema: decay of the averaged weights (None: no
    average). kept: what of a layer gradient checkpointing keeps, besides its input the matrix products no wider than it or
    all of them (both with compile). parallel: over several processes, copies (ddp) or shards (fsdp).
    deterministic: the same bits at every start, on a GPU too; slower. quantize_backbone: how frozen linears are
    held. No evaluation before update `evaluate_from`, but always one at the end. best: the evaluated number whose best checkpoint stays,
    `-loss` for the smallest loss; trackers: who else gets the rows (wandb: under the project `tensorkeep`); patience: evaluations without a better one before the run stops.
    """

    updates: int | None = None
    epochs: float | None = None
    batch: int = 32
    micro_batch: int | None = None
    seed: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    clip: float | None = 1.0
    compile: bool = False
    gradient_checkpointing: bool = False
    kept: Literal["input", "narrow", "products"] = "input"
    ema: float | None = None
    quantize_backbone: Literal["nf4", "fp4", "int8"] | None = None
    log_every: int = 10
    save_every: int | None = None
    evaluate_every: int | None = None
    evaluate_from: int = 0
    keep_last: int = 3
    keep_every: int | None = None
    best: str | None = None
    patience: int | None = None
    workers: int = 0
    parallel: Literal["ddp", "fsdp"] = "ddp"
    deterministic: bool = False
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()

    def __post_init__(self) -> None:
        if (self.updates is None) is (self.epochs is None):
            what = "says neither updates nor epochs" if self.updates is None else "says both updates and epochs"
            raise TensorkeepError(what, where="training", hint="one of them; the other null")
        for name in (
            "updates",
            "epochs",
            "batch",
            "micro_batch",
            "log_every",
            "save_every",
            "evaluate_every",
            "keep_last",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise TensorkeepError(f"{name} {value} must be positive", where="training")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise TensorkeepError(f"ema {self.ema} must be in [0, 1)", where="training", hint="null switches it off")
        if self.patience is not None and self.best is None:
            raise TensorkeepError("patience needs to know what is better", where="training", hint="best: -loss")


@dataclass(frozen=True)
class LanguageRecipe:
    """A whole run. `model`: a checkpoint of any format or a Hub id; or `config` (as config.json has it) to start from
    nothing. tokenizer: a folder, a Hub id or a tokenizer.json (None: the model's). trainable: patterns of names that
    train. Raises TensorkeepError where two sections contradict each other.

    >>> LanguageRecipe(DataConfig(("a.jsonl",)), TrainingConfig(updates=1), model="m").objective
    'pretrain'
    """

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

    def __post_init__(self) -> None:
        if (self.model is None) is (self.config is None):
            what = "says neither model nor config" if self.model is None else "says both model and config"
            raise TensorkeepError(what, where="recipe", hint="model: a checkpoint; config: to start from nothing")
        if self.config is not None and self.tokenizer is None:
            raise TensorkeepError("a model from nothing needs a tokenizer", where="recipe", hint="tokenizer: FOLDER")
        if self.training.quantize_backbone and self.adapter is None:
            hint = "add --lora_r 16, or leave quantize_backbone out"
            raise TensorkeepError(
                "weights that train cannot be quantized", where="training.quantize_backbone", hint=hint
            )
        if self.adapter is not None and self.config is not None:
            raise TensorkeepError(
                "an adapter needs a trained model under it", where="adapter", hint="model: CHECKPOINT"
            )
        if self.training.best is not None and self.evaluation is None:
            raise TensorkeepError("nothing is evaluated", where="training.best", hint="evaluation: {files: [...]}")
        if self.objective == "dpo" and (self.data.packing != "none" or self.data.augmentation is not None):
            raise TensorkeepError("pairs are neither packed nor augmented", where="data", hint="packing: none")
        if self.objective == "dpo" and self.model is None:
            raise TensorkeepError("preferences need a trained model", where="recipe", hint="model: CHECKPOINT")
        if self.objective != "sft" and self.data.augmentation is not None:
            raise TensorkeepError(
                "augmentation changes conversations", where="data.augmentation", hint="objective: sft"
            )
