"""Translate a YAML config of the ActionFormer or TriDet release into a recipe, with an account of what stayed behind.

The releases merge a config into defaults of their code; these are in `DEFAULTS`. What is not read is lost, as with
OpenTAD's configs; so is what the programs do otherwise than here, which `_differences` lists.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tensorkeep.detection.model.config import DetectorConfig, HeadConfig, ProjectionConfig
from tensorkeep.detection.model.groups import OptimizerConfig
from tensorkeep.detection.model.kinds import tridet
from tensorkeep.detection.model.opentad_sections import expect, extended, file_widths
from tensorkeep.detection.opentad._config_file import Setting, unread
from tensorkeep.detection.opentad._literals import Section
from tensorkeep.detection.opentad.recipe import Imported
from tensorkeep.detection.recipe.schema import (
    ClassifierConfig,
    DataConfig,
    DetectionRecipe,
    EvaluationConfig,
    PostProcessingConfig,
    ScheduleConfig,
    SplitConfig,
    TrainingConfig,
)
from tensorkeep.detection.results.nms import Suppression
from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.yaml_documents import read_yaml
from tensorkeep.training.recipe import plain
from tensorkeep.training.schema import from_mapping

_THRESHOLDS = {
    "thumos": (0.3, 0.4, 0.5, 0.6, 0.7),
    "epic": (0.1, 0.2, 0.3, 0.4, 0.5),
    "ego4d": (0.1, 0.2, 0.3, 0.4, 0.5),
    "anet": tuple(0.5 + 0.05 * step for step in range(10)),
    "hacs": tuple(0.5 + 0.05 * step for step in range(10)),
}
_RANGES = [[0, 4], [4, 8], [8, 16], [16, 32], [32, 64], [64, 10000]]
# what the code of the releases has where a config says nothing (and a recipe is made of)
DEFAULTS: dict[str, dict[str, Any]] = {
    "dataset": {
        "feat_stride": 16,
        "num_frames": 32,
        "default_fps": None,
        "input_dim": 2304,
        "num_classes": 97,
        "downsample_rate": 1,
        "max_seq_len": 2304,
        "trunc_thresh": 0.5,
        "crop_ratio": None,
        "force_upsampling": False,
        "file_prefix": None,
        "file_ext": ".npy",
    },
    "loader": {"batch_size": 8, "num_workers": 4},
    "model": {
        "fpn_type": "identity",
        "backbone_arch": [2, 2, 5],
        "scale_factor": 2,
        "regression_range": _RANGES,
        "n_head": 4,
        "embd_kernel_size": 3,
        "embd_dim": 512,
        "embd_with_ln": True,
        "fpn_dim": 512,
        "fpn_with_ln": True,
        "fpn_start_level": 0,
        "head_dim": 512,
        "head_kernel_size": 3,
        "boudary_kernel_size": 3,
        "head_num_layers": 3,
        "head_with_ln": True,
        "use_abs_pe": False,
        "use_rel_pe": False,
        "use_trident_head": True,
        "downsample_type": "max",
        "k": 1.5,
        "init_conv_vars": 0,
        "num_bins": 16,
        "iou_weight_power": 1.0,
        "input_noise": 0,
    },
    "train_cfg": {
        "center_sample": "radius",
        "center_sample_radius": 1.5,
        "loss_weight": 1.0,
        "cls_prior_prob": 0.01,
        "init_loss_norm": 2000,
        "clip_grad_l2norm": -1,
        "dropout": 0.0,
        "droppath": 0.1,
        "label_smoothing": 0.0,
    },
    "test_cfg": {
        "pre_nms_thresh": 0.001,
        "pre_nms_topk": 5000,
        "iou_threshold": 0.1,
        "min_score": 0.01,
        "max_seg_num": 1000,
        "nms_method": "soft",
        "nms_sigma": 0.5,
        "duration_thresh": 0.05,
        "multiclass_nms": True,
        "ext_score_file": None,
        "voting_thresh": 0.75,
    },
    "opt": {
        "type": "AdamW",
        "weight_decay": 0.0,
        "learning_rate": 1e-3,
        "epochs": 30,
        "warmup": True,
        "warmup_epochs": 5,
        "schedule_type": "cosine",
        "eta_min": 1e-8,
    },
}
_HARMLESS = {
    "output_folder": "--out names the run",
    "devices": "processes are started by torchrun",
    "model_name": "the detector is told by its fields",
    "model.max_buffer_len_factor": "points are made for any length",
    "model.backbone_type": "the detector is told by its fields",
    "dataset.backbone_type": "it names the features",
    "test_cfg.voting_thresh": "the releases ignore it with multiclass_nms",
    "opt.momentum": "of SGD alone",
    "opt.schedule_steps": "of the multistep schedule alone",
    "opt.schedule_gamma": "of the multistep schedule alone",
}


def import_release(path: str | Path) -> Imported:
    """Read a YAML config of the ActionFormer or TriDet release.

    Args:
        path: the file.

    Returns:
        The recipe, and which settings it does not carry over.

    Raises:
        TensorkeepError: The file cannot be read, is none of theirs, or asks for a part that is not built here, which is
            named.
    """
    document = read_yaml(path)
    if not isinstance(document, Mapping) or not {"dataset", "dataset_name"} <= set(document):
        hint = "their configs have dataset_name, dataset, model, opt, train_cfg and test_cfg"
        raise TensorkeepError("is no config of ActionFormer or TriDet", where=path, hint=hint)
    own = {name: document.get(name, {}) for name in DEFAULTS}
    if odd := [name for name, part in own.items() if not isinstance(part, Mapping)]:
        raise TensorkeepError("is no section of settings", where=f"{path}: {odd[0]}")
    said = {name: set(part) for name, part in own.items()}
    config = _section({**document, **{name: {**DEFAULTS[name], **part} for name, part in own.items()}})
    try:
        recipe = from_mapping(DetectionRecipe, plain(_recipe(config)), str(path))
    except TensorkeepError as error:
        place = error.where if str(error.where).startswith(str(path)) else f"{path}: {error.where}"
        raise TensorkeepError(error.what, where=place, hint=error.hint) from error
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise TensorkeepError(f"a value has not the form that the release gives it: {error!r}", where=path) from error
    lost, left = list(_differences(config)), list[Setting]()
    for row in unread(config):
        part, _, key = row.path.partition(".")
        if not key or key in said.get(part, ()):
            why = _HARMLESS.get(row.path)
            (lost if why is None else left).append(row._replace(where="", why=why or row.why))
    taken = [
        Setting(f"{name}.{key}", "", value, "not in the config: the release's default")
        for name, part in DEFAULTS.items()
        for key, value in part.items()
        if key not in said.get(name, ()) and key in config[name].seen and value not in (None, False, 0)
    ]
    return Imported(recipe, Path(path), lost, left, taken, "ActionFormer or TriDet")


def _section(values: Mapping[Any, Any]) -> Section:
    """Return plain values as sections that note what is read of them."""
    return Section({str(k): _section(v) if isinstance(v, Mapping) else v for k, v in values.items()})


def _recipe(config: Section) -> DetectionRecipe:
    """Translate all sections."""
    data, opt, train, test = (config[name] for name in ("dataset", "opt", "train_cfg", "test_cfg"))
    expect(opt, "type", ("AdamW",), "opt")
    expect(opt, "schedule_type", ("cosine",), "opt")
    warmup = opt["warmup_epochs"] if opt["warmup"] else 0
    total = opt["epochs"] + warmup
    trained = opt.get("early_stop_epochs", total)
    clip = train["clip_grad_l2norm"]
    rule = Suppression(
        method={"soft": "gaussian", "hard": "greedy"}.get(test["nms_method"], test["nms_method"]),
        sigma=test["nms_sigma"],
        iou=test["iou_threshold"],
        min_score=test["min_score"],
        limit=test["max_seg_num"],
        multiclass=test["multiclass_nms"],
        voting=None if test["multiclass_nms"] or test["voting_thresh"] <= 0 else test["voting_thresh"],
    )
    scores = test["ext_score_file"]
    return DetectionRecipe(
        model=_model(config),
        data=_data(config, data),
        optimizer=OptimizerConfig(lr=opt["learning_rate"], weight_decay=opt["weight_decay"], groups=()),
        schedule=ScheduleConfig(
            "opentad", "epochs", warmup, floor=opt["eta_min"], ends_at=None if trained == total else total
        ),
        training=TrainingConfig(
            epochs=trained,
            clip=clip if clip > 0 else None,
            batch_size=config["loader"]["batch_size"],
            workers=config["loader"]["num_workers"],
            precision="fp32",
            seed=config.get("init_rand_seed", 1234567891),
        ),
        post_processing=PostProcessingConfig(
            pre_nms_thresh=test["pre_nms_thresh"],
            pre_nms_topk=test["pre_nms_topk"],
            nms=rule,
            classifier=None if scores is None else ClassifierConfig(scores, 2, "geometric"),
        ),
        evaluation=EvaluationConfig(thresholds=_THRESHOLDS.get(config["dataset_name"], ())),
    )


def _data(config: Section, data: Section) -> DataConfig:
    """Translate the `dataset` section: features of whole videos, trained on random windows of them."""
    parts = []
    for name in ("train_split", "val_split"):
        subset = config[name]
        subset, folder = (tuple(v) if isinstance(v, list) else v for v in (subset, data["feat_folder"]))
        parts.append(SplitConfig(data["json_file"], subset, folder))
    return DataConfig(
        train=parts[0],
        test=parts[1],
        inputs="features",
        file_pattern=f"{data['file_prefix'] or ''}{{video}}{data['file_ext']}",
        mode="resized" if data["force_upsampling"] else "whole",
        window_size=data["max_seq_len"],
        feature_stride=data["feat_stride"],
        sample_stride=data["downsample_rate"],
        offset_frames=0 if data["force_upsampling"] else data["num_frames"] // 2,
        fps=data["default_fps"],
        floor_frames=False,
        trunc_thresh=data["trunc_thresh"],
        crop_ratio=None if data["crop_ratio"] is None else tuple(data["crop_ratio"]),
        class_agnostic=data["num_classes"] == 1,
        augment=None,
    )


def _model(config: Section) -> DetectorConfig:
    """Translate the `model` section, with what `train_cfg` says of the head."""
    model, data, train = config["model"], config["dataset"], config["train_cfg"]
    for key, value in {
        "fpn_type": "identity",
        "scale_factor": 2,
        "embd_with_ln": True,
        "fpn_with_ln": True,
        "fpn_start_level": 0,
        "head_with_ln": True,
        "use_rel_pe": False,
    }.items():
        expect(model, key, (value,), "model")
    widths = file_widths({"in_channels": data["input_dim"], "out_channels": model["embd_dim"]}, "dataset.input_dim")
    if model["fpn_dim"] != widths["channels"]:
        raise TensorkeepError(f"fpn_dim {model['fpn_dim']} is not embd_dim {widths['channels']}", where="model")
    embed, stem, branch = model["backbone_arch"]
    ranges = tuple((low, high) for low, high in model["regression_range"])
    head = HeadConfig(
        classes=data["num_classes"],
        channels=model["head_dim"],
        convs=model["head_num_layers"] - 1,
        prior=train["cls_prior_prob"],
        strides=tuple(2**level for level in range(len(ranges))),
        ranges=ranges,
        centre_radius=train["center_sample_radius"] if train["center_sample"] == "radius" else None,
        loss_normalizer=train["init_loss_norm"],
        label_smoothing=train["label_smoothing"],
        loss_weight=train["loss_weight"],
    )
    shape = {
        **widths,
        "embed_layers": embed,
        "stem_layers": stem,
        "branch_layers": branch,
        "kernel_size": model["embd_kernel_size"],
        "drop_path": train["droppath"],
        "positions": model["use_abs_pe"],
        "max_length": data["max_seq_len"],
    }
    if "n_sgp_win_size" in model:
        if "per_file" in shape:
            what = "TriDet has no convolution of its own for each feature file"
            raise TensorkeepError(what, where="dataset.input_dim", hint="one number: their sum")
        return _tridet(model, shape, head)
    expect(model, "head_kernel_size", (3,), "model")
    return DetectorConfig(
        ProjectionConfig(
            heads=model["n_head"],
            windows=_windows(model.get("n_mha_win_size", -1)),
            layer_scale=train["droppath"] > 0,
            proj_dropout=train["dropout"],
            **shape,
        ),
        head,
    )


def _tridet(model: Section, shape: dict[str, Any], head: HeadConfig) -> tridet.Config:
    """Translate what TriDet has of its own."""
    expect(model, "use_trident_head", (True,), "model")
    expect(model, "downsample_type", ("max", "avg"), "model")
    projection = tridet.SgpConfig(
        mlp_dim=model["sgp_mlp_dim"],
        windows=_windows(model["n_sgp_win_size"]),
        wide=model["k"],
        init_std=model["init_conv_vars"],
        pooling="max" if model["downsample_type"] == "max" else "mean",
        input_noise=model["input_noise"],
        **shape,
    )
    more = {
        "kernel_size": model["head_kernel_size"],
        "boundary_kernel_size": model["boudary_kernel_size"],
        "bins": model["num_bins"],
        "iou_power": model["iou_weight_power"],
    }
    return tridet.Config(projection, extended(head, tridet.TridentConfig, **more))


def _windows(value: Any) -> tuple[int, ...]:
    """Return one window, or one for each level."""
    return tuple(value) if isinstance(value, list) else (value,)


def _differences(config: Section) -> Iterator[Setting]:
    """List what the programs do otherwise than here, and may change the numbers."""
    data, test = config["dataset"], config["test_cfg"]
    test.seen.add("duration_thresh")
    yield Setting(
        "test_cfg.duration_thresh", "", dict.get(test, "duration_thresh"), "shorter detections are dropped there"
    )
    if data["num_classes"] > 1:
        why = "there so many candidates of each level, here of all levels together"
        yield Setting("test_cfg.pre_nms_topk", "", dict.get(test, "pre_nms_topk"), why)
    if data["file_ext"] not in (".npy", ".npz", ".pt"):
        why = "such files are not read here (torch tensors that pickle wrote): store one array of each as .npy"
        yield Setting("dataset.file_ext", "", data["file_ext"], why)
    if data["force_upsampling"]:
        data.seen.add("num_frames")
        why = "a resized video begins and ends with its first and last frame here, half a clip outside of it there"
        yield Setting("dataset.force_upsampling", "", True, why)
