"""Translate an OpenTAD config into a recipe, with an account of what was not carried over.

Every key that is read is marked as read, so nothing is left out in silence: what was not read is looked up in
`HARMLESS`, and is *lost* (it may change the numbers) where it is not there. Keys that a config does not set are listed
with the default taken. Models are translated by `_model_section`, data pipelines by `_pipelines`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tensorkeep.detection.model import kinds
from tensorkeep.detection.model.config import DetectorConfig
from tensorkeep.detection.opentad._config_file import Setting, read_config, unread
from tensorkeep.detection.opentad._literals import Section, Unknown
from tensorkeep.detection.opentad._model_section import REVERSIBLE, detector_config, optimizer_config, schedule_config
from tensorkeep.detection.opentad._pipelines import data_config, expected, padding_of
from tensorkeep.detection.recipe.schema import (
    ClassifierConfig,
    DetectionRecipe,
    EvaluationConfig,
    PostProcessingConfig,
    SplitConfig,
    TrainingConfig,
)
from tensorkeep.detection.results.nms import from_opentad
from tensorkeep.errors import TensorkeepError, printable
from tensorkeep.training.recipe import plain, to_yaml
from tensorkeep.training.schema import from_mapping

# what OpenTAD's engine reads; other top-level names are a config's own variables
_SECTIONS = ("model", "dataset", "solver", "optimizer", "scheduler", "post_processing", "evaluation", "workflow")
_READ_BY_NONE = ("work_dir", "inference", "custom_imports")
_IMPLIED = "follows from the other parts here"
_EVALUATION_LOSS = "no loss is computed for evaluation, where detections are scored instead"
# path without list numbers (or the start of one, up to a dot) -> why it changes no number
HARMLESS = {
    "work_dir": "--out names the run",
    "inference": "raw predictions are not kept",
    "custom_imports": "code is not executed; what it registers is refused by name where it is used",
    "dataset.val": _EVALUATION_LOSS,
    "solver.val": _EVALUATION_LOSS,
    "workflow.val_loss_interval": _EVALUATION_LOSS,
    "solver.test": "the size of a batch does not change its detections",
    "solver.static_graph": "of its DDP alone",
    "solver.fp16_compress": "gradients are exchanged as they are",
    "post_processing.save_dict": "detections are always written",
    "post_processing.pre_nms_thresh": "OpenTAD's TriDet takes 0.001, whatever a config says",
    "post_processing.pre_nms_topk": "OpenTAD's TriDet takes 2000, whatever a config says",
    "post_processing.nms.voting_thresh": "OpenTAD ignores it with multiclass=True",
    "model.neck": _IMPLIED,
    "model.rpn_head.in_channels": _IMPLIED,
    "model.backbone.type": "the recogniser around the backbone",
    "model.backbone.backbone.norm_cfg.type": "a ViT has layer norms",
    "model.backbone.backbone.init_cfg": "OpenTAD never calls it",
    "model.backbone.data_preprocessor.type": "mean and std are taken",
    "model.backbone.data_preprocessor.format_shape": "frames come as [C, T, H, W]",
    "model.backbone.custom.norm_eval": "layer norms have no running statistics",
    "model.backbone.custom.post_processing_pipeline.keys": _IMPLIED,
    "model.backbone.custom.post_processing_pipeline.ops": _IMPLIED,
    "model.backbone.custom.temporal_checkpointing": "memory is saved by model.backbone.checkpointing",
    "evaluation.thread": "evaluation needs none",
}
_CLASSIFIERS = {
    "CUHKANETClassifier": "product",
    "UntrimmedNetTHUMOSClassifier": "product",
    "StandardClassifier": "geometric",
}
# what OpenTAD fixes in its code or on its command line
_FIXED = {
    "training.seed": "its --seed",
    "training.ema": "in its code",
    "evaluation.protocol": "in its code",
    "training.keep_last": "it keeps every checkpoint",
    "training.best": "it chooses by validation loss, if at all",
}
_LORA_BACKBONE = "VisionTransformerQLoRA"
_LORA_FIELDS = ("lora_r", "lora_alpha", "lora_dropout", "quantize_bits")


class Imported(NamedTuple):
    """A recipe made of a config, and the account of it.

    Attributes:
        recipe: the recipe.
        source: the config's file.
        lost: settings that were not carried over and may change the numbers.
        left: settings that were not carried over and change no number.
        defaults: settings that the config leaves open, with the value taken.
        program: whose config it is.
    """

    recipe: DetectionRecipe
    source: Path
    lost: list[Setting]
    left: list[Setting]
    defaults: list[Setting]
    program: str = "OpenTAD"

    def text(self) -> str:
        """Write the recipe as YAML, headed by its source and ended by what was not carried over."""
        notes = [f"From the {self.program} config {self.source.name}, by `tensorkeep recipe import`."]
        behind: list[str] = []
        for title, rows in (("Lost, and it may change the numbers", self.lost), ("Not carried over", self.left)):
            behind += [f"{title}:"] if rows else []
            behind += [f"  {row.path or Path(row.where).name} = {shown(row.value)}: {row.why}" for row in rows]
        # a line of a comment must stay one
        head, tail = (["# " + printable(row) + "\n" for row in part] for part in (notes, behind))
        return "".join([*head, to_yaml(self.recipe), *tail])


def import_config(path: str | Path) -> Imported:
    """Read an OpenTAD config without executing it.

    Args:
        path: the Python file.

    Returns:
        The recipe, and which settings it does not carry over.

    Raises:
        TensorkeepError: The file cannot be read, its detector or backbone is not one that is built here, or a value
            that must be known is not; file and line are named where they can be.

    Example:
        >>> import_config("configs/adatad/thumos/e2e_thumos_videomae_s_768x1_160_adapter.py").lost  # doctest: +SKIP
        []
    """
    config = read_config(path)
    lost: list[Setting] = []
    left: list[Setting] = []
    if absent := [name for name in _SECTIONS if name not in config.values]:
        hint = "is it a _base_ of another config? Give that one"
        raise TensorkeepError(f"has no {', '.join(absent)}", where=path, hint=hint)
    try:
        recipe = _recipe(config.values, lost)
    except TensorkeepError as error:
        if error.where is not None and error.where.startswith(tuple(map(str, config.files))):
            raise
        place = f"{path}: {error.where}" if error.where else path
        raise TensorkeepError(error.what, where=place, hint=error.hint) from error
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
        raise TensorkeepError(f"a value has not the form that OpenTAD gives it: {error!r}", where=path) from error
    recipe = from_mapping(DetectionRecipe, plain(recipe), str(path))  # types and contradictions
    for row in unread(config.values):
        if row.path.partition(".")[0] not in (*_SECTIONS, *_READ_BY_NONE):
            continue
        why = harmless(row.path)
        (lost if why is None else left).append(row if why is None else row._replace(why=why))
    told = {row.where for row in (*lost, *left)}
    left += [Setting("", row.where, row.text, row.why) for row in config.unknown if row.where not in told]
    return Imported(recipe, Path(path), lost, left, [*_defaults(config.values), *_fixed(recipe)])


def harmless(path: str) -> str | None:
    """Return why a setting of OpenTAD changes no number here, or None where it may.

    Example:
        >>> harmless("dataset.val.pipeline[2].scale")
        'no loss is computed for evaluation, where detections are scored instead'
    """
    bare = re.sub(r"\[\d+\]", "", path)
    return next((why for start, why in HARMLESS.items() if bare == start or bare.startswith(start + ".")), None)


def shown(value: Any) -> str:
    """Return a value as text on one line, shortened to 60 characters.

    Args:
        value: of a config.
    """
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def _defaults(section: Section, path: str = "") -> Iterator[Setting]:
    """List settings that were asked for and are not in the config, with the default taken."""
    for key, value in section.missed.items():
        if value not in (None, {}, (), "") and harmless(f"{path}{key}") is None:
            yield Setting(f"{path}{key}", "", value, "not in the config: OpenTAD's default")
    for key, value in section.items():
        items = value if isinstance(value, list | tuple) and not isinstance(value, Unknown) else [value]
        for number, item in enumerate(items):
            if isinstance(item, Section):
                yield from _defaults(item, f"{path}{key}." if item is value else f"{path}{key}[{number}].")


def _fixed(recipe: DetectionRecipe) -> Iterator[Setting]:
    """List settings that OpenTAD fixes in its code or on its command line."""
    for path, why in _FIXED.items():
        section, _, name = path.partition(".")
        value = getattr(getattr(recipe, section), name)
        if value is not None:
            yield Setting(path, "", value, why)


def _recipe(config: Section, lost: list[Setting]) -> DetectionRecipe:
    """Translate all sections of a config."""
    model = _model(config["model"], lost)
    solver, workflow = config["solver"], config["workflow"]
    length: int | None = model.projection.max_length
    if length is None:  # the detector does not pad: what a step of the data set pads to
        length = padding_of(config["dataset"]["test"])
        model = replace(model, projection=replace(model.projection, max_length=length))  # type: ignore[arg-type]
    data = data_config(config["dataset"], length, lost)
    clip = solver.get("clip_grad_norm", 0.0)
    optimizer = config["optimizer"]
    frozen = model.backbone is None or model.backbone.tuning == "none"
    expected(optimizer, "paramwise", True)
    if not optimizer.get("paramwise", False):
        lost.append(Setting("optimizer.paramwise", "", False, "biases, norms and scales do not decay here"))
    if model.backbone is not None and not frozen:
        _backbone_groups(optimizer["backbone"], lost)
    adapter = None if model.backbone is None else model.backbone.adapter
    ladder = adapter is not None and adapter.kind == "ladder"
    found = optimizer_config(_same(optimizer, backbone=Section()) if frozen else optimizer, ladder)
    if not found.groups and model.backbone is not None and not frozen:  # a rate of 0 everywhere
        model = replace(model, backbone=replace(model.backbone, tuning="none"))
    custom = config["model"].get("backbone", Section()).get("custom", Section())
    schedule, epochs = schedule_config(config["scheduler"], workflow.get("end_epoch"))
    training = TrainingConfig(
        epochs=epochs,
        clip=max(clip, 0.0) or None,
        batch_size=solver["train"]["batch_size"],
        workers=solver["train"].get("num_workers", 4),
        precision="fp16" if solver.get("amp", False) else "fp32",
        ema=0.999 if solver.get("ema", False) else None,
        pretrained=custom.get("pretrain"),
        save_every=workflow["checkpoint_interval"],
        evaluate_every=max(workflow["val_eval_interval"], 1),
        evaluate_from=workflow.get("val_start_epoch", 0),
        log_every=workflow.get("logging_interval", 50),
    )
    if dict.get(dict.get(config, "inference", Section()), "load_from_raw_predictions", False):
        fused = config["inference"]
        why = "what several runs predict is averaged there; here one run is trained and scored"
        where, value = fused.lines.get("fuse_list", ""), fused.get("fuse_list", fused["load_from_raw_predictions"])
        lost.append(Setting("inference.fuse_list", where, value, why))
    if workflow["val_eval_interval"] < 1:
        lost.append(Setting("workflow.val_eval_interval", "", workflow["val_eval_interval"], "evaluation is never off"))
    return DetectionRecipe(
        model=model,
        data=data,
        optimizer=found,
        schedule=schedule,
        training=training,
        post_processing=_post_processing(config["post_processing"], model.kind),
        evaluation=_evaluation(config["evaluation"], data.test),
    )


def _model(model: Section, lost: list[Setting]) -> DetectorConfig:
    """Translate the `model` section with its adapters, AdaTAD's or the QLoRA form's, and check the chunks of frames."""
    backbone = model.get("backbone")
    if backbone is None:
        return detector_config(model)
    inner = backbone["backbone"]
    qlora = str(inner["type"]).removeprefix("mmaction.") == _LORA_BACKBONE
    if qlora:
        inner = _same(inner, type="VisionTransformerAdapter")
        model = _same(model, backbone=_same(backbone, backbone=inner))
    if str(inner["type"]).removeprefix("mmaction.") == REVERSIBLE:
        for step in backbone.get("custom", Section()).get("post_processing_pipeline", ()):
            expected(step, "ops", "b t c tt h w -> b c tt")
            expected(step, "keys", ["feats"])
        return detector_config(model)
    expected(inner, "return_feat_map", True)
    inner.seen.add("use_mean_pooling")  # acts on what return_feat_map leaves out
    config = detector_config(model)
    assert config.backbone is not None and config.backbone.vit is not None
    depth, frames = config.backbone.vit.depth, config.backbone.vit.chunk_frames
    _check_chunks(backbone.get("custom", Section()), frames, lost)
    adapter = config.backbone.adapter
    if adapter is None:
        return config
    adapter = replace(adapter, ratio=inner.get("adapter_mlp_ratio", 0.25))
    if adapter.blocks is not None and sorted(set(adapter.blocks)) == list(range(depth)):
        adapter = replace(adapter, blocks=None)
    if qlora:
        lora = {name: inner.get(name, getattr(adapter, name)) for name in _LORA_FIELDS}
        adapter = replace(adapter, kind="plain" if inner.get("use_plain_adapter", False) else "qlora", **lora)
    return replace(config, backbone=replace(config.backbone, adapter=adapter))


def _check_chunks(custom: Section, frames: int, lost: list[Setting]) -> None:
    """Check that the backbone's pipelines cut frames into chunks and join the features in time, as is done here."""
    chunks = next(
        (s.get("t1") for s in custom.get("post_processing_pipeline", ()) if dict.get(s, "type") == "Rearrange"), 1
    )
    before = custom.get("pre_processing_pipeline", ())
    for step in before:
        expected(step, "type", "Rearrange")
        expected(step, "keys", ["frames"])
        expected(step, "ops", "b n c (t1 t) h w -> (b t1) n c t h w")
        expected(step, "t1", chunks)
    if len(before) != 1:
        why = f"frames go through the backbone in chunks of {frames}"
        lost.append(Setting("model.backbone.custom.pre_processing_pipeline", "", len(before), why))
    for step in custom.get("post_processing_pipeline", ()):
        expected(step, "ops", "b n c t h w -> b c t", "(b t1) c t -> b c (t1 t)")
        expected(step, "keys", ["feats"])


def _backbone_groups(section: Section, lost: list[Setting]) -> None:
    """Check `exclude`, whose words keep backbone parameters out of training: here it is all of them, or none."""
    words = section.get("exclude", [])
    if not section.get("lr") or "backbone" in words:
        section.seen.add("weight_decay")  # of a group that does not move, or is empty
    if words not in ([], ["backbone"]):
        why = "names that are left out of training are given by model.backbone.tuning"
        lost.append(Setting("optimizer.backbone.exclude", section.lines.get("exclude", ""), words, why))


def _post_processing(section: Section, kind: str) -> PostProcessingConfig:
    """Translate the `post_processing` section; what a detector of OpenTAD fixes in its code is not read."""
    fixed = getattr(kinds.module(kind), "FIXED", {})
    nms, external = section["nms"], section.get("external_cls")
    known = {key: nms.get(key) for key, value in nms.items() if not isinstance(value, Unknown)}
    if nms.get("multiclass", True) and nms.get("voting_thresh"):
        nms.seen.discard("voting_thresh")
    classifier = None
    if external is not None:
        rule = _CLASSIFIERS.get(str(external["type"]))
        if rule is None:
            external.seen.discard("type")  # listed as lost; a recipe without labels would be refused
        expected(external, "apply_softmax", False)
        classifier = ClassifierConfig(external["path"], external.get("topk", 1), rule or "product")  # type: ignore[arg-type]
    return PostProcessingConfig(
        pre_nms_thresh=fixed.get("pre_nms_thresh") or section.get("pre_nms_thresh", 0.001),
        pre_nms_topk=fixed.get("pre_nms_topk") or section.get("pre_nms_topk", 2000),
        nms=from_opentad(known),
        classifier=classifier,
    )


def _evaluation(section: Section, test: SplitConfig) -> EvaluationConfig:
    """Translate the `evaluation` section."""
    expected(section, "type", "mAP")
    truth, subset = section["ground_truth_filename"], section["subset"]
    return EvaluationConfig(
        thresholds=tuple(section["tiou_thresholds"]),
        subset=None if subset == test.subset else subset,
        annotations=None if truth == test.annotations else truth,
        blocked=section.get("blocked_videos"),
        recall_at=tuple(section.get("top_k") or ()),
    )


def _same(section: Section, **changes: Any) -> Section:
    """Return a section with other values; what is read of it counts for the original."""
    copy = Section({**section, **changes}, section.lines)
    copy.seen, copy.missed = section.seen, section.missed
    return copy
