"""The recipe of a detection run, section by section: everything that decides its numbers.

`model` is the dataclass of the detector itself; `training`, `optimizer` and `schedule` are those of every run
(`tensorkeep.training.sections`) with other defaults. Names are OpenTAD's where they mean the same thing (`window_size`,
`feature_stride`, `trunc_thresh`, `lora_r`, `quantize_bits`). Paths are relative to the working directory. Defaults are
AdaTAD's for THUMOS-14, except that nothing is quantized.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tensorkeep.detection.backbones import backbone_module
from tensorkeep.detection.data.augment import AugmentConfig
from tensorkeep.detection.model.config import BackboneConfig, DetectorConfig
from tensorkeep.detection.model.groups import OptimizerConfig
from tensorkeep.detection.model.layers import BY_HAND
from tensorkeep.detection.results.nms import Suppression
from tensorkeep.detection.results.protocols import PROTOCOLS
from tensorkeep.errors import TensorkeepError, near_misses
from tensorkeep.training import sections
from tensorkeep.training.migration import VERSION

# fields of `training` that a detection run refuses, and why
REFUSED = {
    "gradient_checkpointing": "model.backbone.checkpointing says how a backbone is recomputed",
    "kept": "model.backbone.checkpointing says what a backbone keeps",
    "memory_limit_gib": "model.backbone.checkpointing says what a backbone keeps, and where",
    "memory": "model.backbone.checkpointing says what a backbone keeps, and where",
}
Range = tuple[float, float]


@dataclass(frozen=True)
class SplitConfig:
    """One part of the data: the videos of `subset` in the file `annotations`, found in `folder`.

    `subset` of the training part may be a list. `folder` may be an HDF5 file where `inputs` is `features`, or a list of
    both: the channels of a video's files, one in each folder, are put side by side in this order (see `feature_rows`).
    `blocked`: videos to leave out, a JSON list or one name a line (null: none).
    """

    annotations: str
    subset: str | tuple[str, ...]
    folder: str | tuple[str, ...]
    blocked: str | None = None

    def __post_init__(self) -> None:
        for key in ("subset", "folder"):
            value = getattr(self, key)
            if value == ():
                raise TensorkeepError("is empty", where=f"data: {key}")
            if isinstance(value, tuple) and len(value) == 1:
                object.__setattr__(self, key, value[0])

    @property
    def subsets(self) -> tuple[str, ...]:
        """Names of the subsets."""
        return (self.subset,) if isinstance(self.subset, str) else self.subset

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders that a video has a file in."""
        return (self.folder,) if isinstance(self.folder, str) else self.folder


@dataclass(frozen=True)
class DataConfig:
    """Which videos or features, how they become windows, and how frames become pictures.

    Attributes:
        train: The part that is trained on.
        test: The part that is evaluated on.
        class_map: One class name a line, in label order; null: the annotations' own order.
        inputs: Video files, or features of a whole video in one file.
        file_pattern: The file of a video in its folder or below; another ending, in either case, will do where there is
            none of the ending given.
        grid: `time` puts annotated seconds on the frames shown then; `opentad` on seconds / duration x frames of the
            annotation, as OpenTAD does whatever the file holds: the same where the rate is constant.
        mode: `sliding` trains on random windows and tests on overlapping ones; `resized` shows a whole video as
            `window_size` grid steps; `whole` (features) trains on random windows and tests on the whole video.
        window_size: Grid steps of a window.
        feature_stride: Frames between two features (or snippets), of which every `sample_stride`th is a grid step.
        sample_stride: See `feature_stride`.
        scale_factor: Frames decoded for each grid step.
        offset_frames: Frame in which the first feature is centred.
        fps: Frames a second that annotations and features count in; null: frames / duration of each video.
        window_overlap_ratio: Of test windows.
        floor_frames: Whether annotated seconds become whole frames.
        trunc_thresh: Share of an action that a training window must show for it to stay; null: no random window.
        crop_ratio: A video shorter than a window is cut to a share in this range; null: never.
        min_length: Annotated actions not longer than this are left out of training: a share of the video in mode
            `resized`, else frames; null: all stay.
        class_agnostic: One class stands for all, an external classifier names them.
        crop_size: Pixels of a test frame's shorter side, and of the square in its middle that is shown.
        augment: Of training frames, its `size` being crop_size; null: as test frames.
        broken: What a file that cannot be decoded does (see `tensorkeep.detection.data.clips`); `fatal` is another word
            for `error`, the one that `predict` and `features` have.
        decode: Where the frames of training videos are decoded: `cpu` in the processes that load data, `gpu` by the
            decoder engines of the GPU that trains, through torchcodec; colours then differ by rounding.
        cache: A folder, new or empty or one of its own, that decoded frames are kept in, so that each is decoded once
            and not in every epoch: the same bytes; null: nothing is kept.
        cache_gib: How much of the disk the folder may take; what is not in it is decoded each time.
        feature_layout: Axes of the stored array, time and channels, where both are as long as `in_channels`; else the
            axis that is so long has the channels.
        feature_key: Name of the array in files that hold several; null: the only one, or `feats`.
        feature_channels: First and one-past-last channel used; null: all.
        feature_rows: Of the files of a video in several folders: `equal` refuses files of different length, `resized`
            stretches the shorter ones to the longest, linear in time, as OpenTAD does.
    """

    train: SplitConfig
    test: SplitConfig
    class_map: str | None = None
    inputs: Literal["video", "features"] = "video"
    file_pattern: str = "{video}.mp4"
    grid: Literal["time", "opentad"] = "time"
    mode: Literal["sliding", "resized", "whole"] = "sliding"
    window_size: int = 768
    feature_stride: int = 4
    sample_stride: int = 1
    scale_factor: int = 1
    offset_frames: int = 0
    fps: float | None = None
    window_overlap_ratio: float = 0.5
    floor_frames: bool = True
    trunc_thresh: float | None = 0.75
    crop_ratio: Range | None = (0.9, 1.0)
    min_length: float | None = None
    class_agnostic: bool = False
    crop_size: int = 160
    augment: AugmentConfig | None = field(default_factory=AugmentConfig)
    broken: Literal["error", "skip", "keep", "fatal"] = "error"
    decode: Literal["cpu", "gpu"] = "cpu"
    cache: str | None = None
    cache_gib: float = 100.0
    feature_layout: Literal["tc", "ct"] = "tc"
    feature_key: str | None = None
    feature_channels: tuple[int, int] | None = None
    feature_rows: Literal["equal", "resized"] = "equal"

    def __post_init__(self) -> None:
        if not isinstance(self.test.subset, str):
            what = f"a run is scored on one subset, here are {', '.join(self.test.subset)}"
            raise TensorkeepError(what, where="data.test.subset")
        if self.inputs == "video" and (len(self.train.folders) > 1 or len(self.test.folders) > 1):
            what = "several folders are for features, which are put side by side"
            raise TensorkeepError(what, where="data: folder", hint="inputs: features, or one folder above all videos")
        if len(self.train.folders) != len(self.test.folders):
            what = f"{len(self.train.folders)} folders of features to train on, {len(self.test.folders)} to test on"
            raise TensorkeepError(what, where="data: folder")
        if self.broken == "fatal":
            object.__setattr__(self, "broken", "error")
        if self.decode == "gpu":
            self._check_decode()
        if self.cache is not None:
            self._check_cache()
        for name in ("window_size", "feature_stride", "sample_stride", "scale_factor", "crop_size"):
            if getattr(self, name) < 1:
                raise TensorkeepError(f"{name} {getattr(self, name)} must be at least 1", where="data")
        if self.inputs == "video" and self.augment is not None and self.augment.size != self.crop_size:
            what = f"augment.size {self.augment.size} is not crop_size {self.crop_size}"
            raise TensorkeepError(what, where="data", hint="--crop_size sets both")
        if not 0 <= self.window_overlap_ratio < 1:
            raise TensorkeepError(f"window_overlap_ratio {self.window_overlap_ratio} must be in [0, 1)", where="data")
        if self.inputs == "video" and self.mode == "whole":
            hint = "sliding, or resized for ActivityNet's way"
            raise TensorkeepError("mode 'whole' is for features alone", where="data.mode", hint=hint)
        if "{video}" not in self.file_pattern:
            hint = "e.g. '{video}.mp4', or 'v_{video}.mp4'"
            raise TensorkeepError(f"{self.file_pattern!r} does not say {{video}}", where="data.file_pattern", hint=hint)
        if (
            self.inputs == "video"
            and self.mode == "sliding"
            and self.feature_stride * self.sample_stride % self.scale_factor
        ):
            what = f"{self.feature_stride * self.sample_stride} frames a grid step are no multiple of scale_factor"
            hint = (
                f"scale_factor frames lie evenly in a grid step: take feature_stride {self.scale_factor}, or a multiple"
            )
            raise TensorkeepError(f"{what} {self.scale_factor}", where="data", hint=hint)

    def _check_cache(self) -> None:
        hint = "cache: null"
        if self.inputs != "video":
            raise TensorkeepError("features are not decoded", where="data.cache", hint=hint)
        if self.decode == "gpu":
            what = "frames that a GPU decodes are not kept"
            raise TensorkeepError(what, where="data.cache", hint="decode: cpu, or cache: null")
        if self.cache == "" or not 0 < self.cache_gib < float("inf"):
            what = f"there is no room of {self.cache_gib} GiB in a folder {self.cache!r}"
            raise TensorkeepError(what, where="data.cache", hint="a folder, and cache_gib above 0")

    def _check_decode(self) -> None:
        if self.inputs != "video":
            raise TensorkeepError("features are not decoded", where="data.decode", hint="decode: cpu")
        if self.broken == "skip":
            what = "a sample is left out before its batch is made, and frames decoded on a GPU come after that"
            raise TensorkeepError(what, where="data.broken", hint="broken: keep, or error; or decode: cpu")


@dataclass(frozen=True)
class TrainingConfig(sections.TrainingConfig):
    """`training` with AdaTAD's defaults: what is counted on the way counts epochs."""

    epochs: float | None = 100
    batch_size: int = 2
    seed: int = 42
    precision: Literal["fp32", "bf16", "fp16"] = "fp16"
    ema: float | None = 0.999
    unit: sections.Unit = "epochs"
    save_every: int | None = 2
    evaluate_every: int | None = 2
    keep_last: int = 2
    best: str | None = "average_mAP"
    workers: int = 2
    log_every: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.micro_batch is not None and self.batch_size % self.micro_batch:
            what = f"micro_batch {self.micro_batch} does not divide batch_size {self.batch_size}"
            raise TensorkeepError(what, where="training", hint="batch_size counts all processes and accumulated steps")
        if self.best == "loss":
            raise TensorkeepError("a larger loss is no better one", where="training.best", hint="best: -loss")


@dataclass(frozen=True)
class ScheduleConfig(sections.ScheduleConfig):
    """`schedule` with AdaTAD's defaults, in epochs."""

    kind: Literal["cosine", "constant", "wsd", "minimind", "opentad"] = "opentad"
    unit: sections.Unit = "epochs"
    warmup: float = 5


@dataclass(frozen=True)
class ClassifierConfig:
    """A video classifier that names what a class-agnostic detector finds: its `top` classes, fused by `rule`.

    `product`: score * p; `geometric`: sqrt(score * p). `path`: see `tensorkeep.detection.results.classifiers`.
    """

    path: str
    top: int = 2
    rule: Literal["product", "geometric"] = "product"


@dataclass(frozen=True)
class PostProcessingConfig:
    """How raw predictions become detections.

    Attributes:
        pre_nms_thresh: The score that a candidate needs.
        pre_nms_topk: How many candidates of a window stay, the best ones.
        nms: Suppression within a video; sliding windows are merged under it.
        classifier: What names the classes of a class-agnostic detector; null: nothing.
        round_like_opentad: Whether numbers are rounded before windows are merged, for OpenTAD's published digits.
    """

    pre_nms_thresh: float = 0.001
    pre_nms_topk: int = 2000
    nms: Suppression = field(default_factory=lambda: Suppression(sigma=0.7, limit=2000))
    classifier: ClassifierConfig | None = None
    round_like_opentad: bool = False


@dataclass(frozen=True)
class EvaluationConfig:
    """How detections are scored.

    Attributes:
        protocol: Whose rules, as in `eval detection --protocol`.
        thresholds: Temporal IoUs; empty: the protocol's.
        subset: Null: that of `data.test`.
        annotations: Null: those of `data.test`.
        blocked: Videos left out on both sides.
        recall_at: k of "recall at k x".
    """

    protocol: str = "opentad"
    thresholds: tuple[float, ...] = ()
    subset: str | None = None
    annotations: str | None = None
    blocked: str | None = None
    recall_at: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            hint = near_misses(self.protocol, PROTOCOLS) or f"one of {', '.join(PROTOCOLS)}"
            raise TensorkeepError(f"unknown protocol {self.protocol!r}", where="evaluation.protocol", hint=hint)
        if not all(0 < limit <= 1 for limit in self.thresholds):
            raise TensorkeepError(f"thresholds {self.thresholds} must lie in (0, 1]", where="evaluation")


@dataclass(frozen=True)
class DetectionRecipe:
    """A whole detection run.

    Attributes:
        version: Of the recipe's words.
        model: The detector.
        data: Videos or features, and how they become windows.
        optimizer: Rates and decays.
        schedule: How the learning rate moves.
        training: How long, in what portions, and what happens on the way.
        post_processing: How raw predictions become detections.
        evaluation: How detections are scored.
        checkpoint: Where checkpoints lie when the processes run on several hosts.

    Raises:
        TensorkeepError: Where two sections contradict each other, or a field of `training` is refused.

    >>> from tensorkeep.detection.recipe.text import read_recipe
    >>> read_recipe("adatad_thumos_videomae_s").data.window_size
    768
    """

    version: int = field(default=VERSION, kw_only=True)
    model: DetectorConfig
    data: DataConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    post_processing: PostProcessingConfig = field(default_factory=PostProcessingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: sections.CheckpointConfig = field(default_factory=sections.CheckpointConfig)

    def __post_init__(self) -> None:
        sections.refuse(self.training, REFUSED)
        sections.refuse_local(self.training, self.checkpoint)
        self._check_inputs()
        if self.data.class_agnostic and self.model.head.classes != 1:
            what = f"class_agnostic data, but head.classes is {self.model.head.classes}"
            raise TensorkeepError(what, where="model.head", hint="a class-agnostic head has 1 class")
        if self.data.class_agnostic and self.post_processing.classifier is None:
            hint = "set post_processing.classifier, or class_agnostic: false"
            raise TensorkeepError("nothing names the classes that are found", where="post_processing", hint=hint)

    def _check_inputs(self) -> None:
        backbone, data = self.model.backbone, self.data
        if (data.inputs == "video") is not (backbone is not None):
            what = f"data.inputs is {data.inputs}, but the model has {'no' if backbone is None else 'a'} backbone"
            raise TensorkeepError(what, where="model", hint="video needs model.backbone, features need none")
        if backbone is None:
            if self.training.quantize_backbone or self.training.quantize_compute or self.training.pretrained:
                raise TensorkeepError("there is no backbone to load or to quantize", where="training")
            return
        if getattr(self.model.projection, "per_file", ()):
            hint = "leave it out, or model.backbone and data.inputs: features"
            raise TensorkeepError("per_file is for feature files", where="model.projection", hint=hint)
        backbone_module(backbone.kind)
        if backbone.output_length != data.window_size:
            what = f"model.backbone.output_length {backbone.output_length} is not data.window_size {data.window_size}"
            raise TensorkeepError(what, where="model", hint="--window_size sets both")
        frames = data.window_size * data.scale_factor
        chunk = backbone.network.chunk_frames
        if chunk and frames % chunk:
            what = f"{frames} frames of a window are no multiple of chunk_frames {chunk}"
            raise TensorkeepError(what, where="data", hint="frames are window_size x scale_factor")
        ladder = backbone.adapter is not None and backbone.adapter.kind == "ladder"
        if self.training.parallel == "fsdp" and ladder:
            what = "a ladder reads blocks from outside of them, where they are shards"
            raise TensorkeepError(what, where="training.parallel", hint="parallel: ddp")
        # the other ways compute with a block's weights from outside of it, where they are shards
        whole = ("none", "blocks", "attention") if backbone.tuning == "all" else ("none",)
        if self.training.parallel == "fsdp" and backbone.checkpointing not in whole:
            what = f"checkpointing {backbone.checkpointing} does not go with shards of the model"
            raise TensorkeepError(what, where="training.parallel", hint=f"one of {', '.join(whole)}; or parallel: ddp")
        self._check_float8(backbone)
        if self.training.quantize_backbone and backbone.tuning == "all":
            hint = "freeze it (tuning: adapter), or leave quantize_backbone out"
            raise TensorkeepError("a backbone that trains cannot be quantized", where="training", hint=hint)

    def _check_float8(self, backbone: BackboneConfig) -> None:
        """Refuse float8 products where no linear could have them, or where nothing of them was tried."""
        training, ladder = self.training, backbone.adapter is not None and backbone.adapter.kind == "ladder"
        by_hand = backbone_module(backbone.kind).Backbone.by_hand
        wrong = {
            (f"blocks of {backbone.kind} have no backward in float8", "kind: videomae"): not by_hand,
            ("only frozen linears have float8 products", "tuning: adapter"): backbone.tuning == "all",
            ("linears under low-rank updates have none", "adapters in place of lora"): backbone.lora is not None,
            ("int8 codes have no float8 products", "quantize_backbone: nf4"): training.quantize_backbone == "int8",
            ("sharded weights have no float8 products", "parallel: ddp"): training.parallel == "fsdp",
            ("float8 products are not compiled", "compile: false"): training.compile,
            (
                f"the rest of the backbone is computed in bf16, not {backbone.frozen_dtype}",
                "model.backbone.frozen_dtype: bfloat16",
            ): backbone.frozen_dtype != "bfloat16",
            (
                f"checkpointing {backbone.checkpointing} has no backward in float8",
                f"model.backbone.checkpointing: {', '.join(BY_HAND[:-1])} or {BY_HAND[-1]}",
            ): not ladder and backbone.checkpointing not in BY_HAND,
        }
        found = next((said for said, here in wrong.items() if here), None)
        if training.quantize_compute is not None and found is not None:
            what, instead = found
            hint = f"{instead}, or leave quantize_compute out"
            raise TensorkeepError(what, where="training.quantize_compute", hint=hint)
