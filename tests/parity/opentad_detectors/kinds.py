"""The cases: for each kind of detector, `model` sections of OpenTAD with small sizes, varied by seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

Section = dict[str, Any]


def all_cases(seeds: int) -> Iterator[Section]:
    """Every kind's variants, each with `seeds` seeds."""
    for number in range(seeds):
        for kind, variants in VARIANTS.items():
            for at, change in enumerate(variants):
                draw = random.Random(1000 * number + at)
                yield _case(f"{kind}_{at}_{number}", kind, change, draw, 10 * number + at + 1)


def small_cases() -> Iterator[Section]:
    """Forms of each kind that is new beside ActionFormer, as small as they can be, for files that are kept."""
    for kind, at in (("tridet", 0), ("tridet", 1), ("temporalmaxer", 3), ("temporalmaxer", 5), ("causaltad", 1)):
        change = {**VARIANTS[kind][at], "channels": 16, "length": 32}
        case = _case(f"{kind}_{at}", kind, change, random.Random(at), at + 1)
        case["model"]["projection"]["arch"] = [1, 0 if kind == "temporalmaxer" else 1, 2]
        case["model"]["rpn_head"] |= {"feat_channels": 8, "num_convs": 1}
        yield case


def _case(name: str, kind: str, change: Section, draw: random.Random, seed: int) -> Section:
    levels = change.get("levels", 3)
    channels, feats = change.get("channels", 32), draw.choice([16, 24])
    length = change.get("length", 48)
    projection: Section = {
        "in_channels": draw.choice([6, 12]),
        "out_channels": channels,
        "conv_cfg": {"kernel_size": 3},
        "norm_cfg": {"type": "LN"},
        "arch": [2, 0 if kind == "temporalmaxer" else draw.choice([1, 2]), levels - 1],
    }
    if "files" in change:
        wide = channels * 5 // 8
        projection |= {"in_channels": change["files"], "out_channels": [wide, channels - wide]}
    loss = {"cls_loss": {"type": "FocalLoss"}, "reg_loss": {"type": "DIOULoss"}}
    head: Section = {
        "num_classes": 4,
        "in_channels": channels,
        "feat_channels": feats,
        "num_convs": 2,
        "cls_prior_prob": 0.01,
        "prior_generator": {
            "type": "PointGenerator",
            "strides": [2**level for level in range(levels)],
            "regression_range": [[2 ** (level + 1) if level else 0, 2 ** (level + 2)] for level in range(levels - 1)]
            + [[2**levels, 10000]],
        },
        "loss_normalizer": draw.choice([100, 250]),
        "loss": loss,
    }
    model: Section = {
        "projection": projection,
        "neck": {"type": "FPNIdentity", "in_channels": channels, "out_channels": channels, "num_levels": levels},
        "rpn_head": head,
    }
    KINDS[kind](model, draw)
    for part in ("projection", "neck", "rpn_head"):
        model[part] |= change.get(part, {})
    valid = [length, length - draw.randrange(5, 20)]
    return {"name": name, "seed": seed, "length": length, "valid": valid, "segments": 6, "model": model}


def _tridet(model: Section, draw: random.Random) -> None:
    model["type"] = "TriDet"
    levels = len(model["rpn_head"]["prior_generator"]["strides"])
    model["projection"] |= {
        "type": "TriDetProj",
        "sgp_mlp_dim": draw.choice([24, 40]),
        "sgp_win_size": [draw.choice([1, 3, 5]) for _ in range(levels)],
        "k": draw.choice([1.3, 1.5, 4, 5]),
        "init_conv_vars": 0.2,
        "path_pdrop": 0.1,
        "max_seq_len": 64,
        "input_noise": 0.1,
    }
    model["rpn_head"] |= {"type": "TriDetHead", "num_bins": draw.choice([5, 8])}
    model["rpn_head"]["loss"]["iou_rate"] = {"type": "GIOULoss"}


def _temporalmaxer(model: Section, draw: random.Random) -> None:
    model["type"] = "TemporalMaxer"
    model["projection"] |= {"type": "TemporalMaxerProj", "drop_out": 0.2}
    assigner = {"iou_weight": 2, "cls_weight": 1.0, "center_radius": 1.5, "keep_percent": 1.0, "confuse_weight": 0.0}
    model["rpn_head"] |= {"type": "TemporalMaxerHead", "assigner": {"type": "AnchorFreeSimOTAAssigner", **assigner}}


def _causaltad(model: Section, draw: random.Random) -> None:
    model["type"] = "VideoMambaSuite"
    model["projection"] |= {"type": "CausalProj", "max_seq_len": 48, "num_head": draw.choice([2, 4])}
    model["projection"] |= {"mamba_kernel_size": draw.choice([3, 4]), "input_pdrop": 0.3, "drop_path_rate": 0.3}
    model["rpn_head"] |= {"type": "ActionFormerHead", "center_sample_radius": 1.5}


def _actionformer(model: Section, draw: random.Random) -> None:
    model["type"] = "ActionFormer"
    attention = {"n_head": 4, "n_mha_win_size": draw.choice([-1, 5])}
    model["projection"]["conv_cfg"] = {"kernel_size": 3, "proj_pdrop": 0.0}
    model["projection"] |= {"type": "Conv1DTransformerProj", "attn_cfg": attention, "path_pdrop": 0.1}
    model["projection"] |= {"max_seq_len": 64}
    model["rpn_head"] |= {"type": "ActionFormerHead"}


KINDS = {
    "actionformer": _actionformer,
    "tridet": _tridet,
    "temporalmaxer": _temporalmaxer,
    "causaltad": _causaltad,
}
GROUPED = {"norm_cfg": {"type": "GN", "num_groups": 4, "affine": False}}
VARIANTS: dict[str, list[Section]] = {
    "actionformer": [
        {},
        {"neck": {"norm_cfg": {"type": "GN", "num_groups": 8}}},
        {"files": [6, 5], "projection": {"use_abs_pe": True}},
    ],
    "tridet": [
        {},
        {"rpn_head": {"num_classes": 1, "label_smoothing": 0.1, "kernel_size": 5, "boundary_kernel_size": 1}},
        {"projection": {"downsample_type": "avg", "use_abs_pe": True, "path_pdrop": 0.0}},
        {"length": 64, "rpn_head": {"iou_weight_power": 1, "loss_weight": 0.5}, "channels": 48},
        {"length": 80},
    ],
    "temporalmaxer": [
        {"neck": GROUPED},
        {"length": 45},
        {"length": 37, "rpn_head": {"label_smoothing": 0.1}, "levels": 4},
        {
            "rpn_head": {
                "assigner": {
                    "type": "AnchorFreeSimOTAAssigner",
                    "center_radius": 2.0,
                    "iou_weight": 3,
                    "keep_percent": 0.65,
                    "confuse_weight": 0.1,
                }
            }
        },
        {"rpn_head": {"num_classes": 1}},
        {"length": 41, "files": [3, 7]},
    ],
    "causaltad": [
        {},
        {"length": 37, "projection": {"channel_expand": 1}},
        {"length": 67, "levels": 4, "projection": {"use_abs_pe": True, "max_seq_len": 72}},
        {"projection": {"drop_path_rate": 0.0}, "rpn_head": {"filter_similar_gt": False, "loss_weight": 2.0}},
        {"length": 43, "files": [5, 3]},
    ],
}
