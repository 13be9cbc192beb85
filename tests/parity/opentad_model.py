"""The model side of the OpenTAD fixtures: each function yields (name, figure, tolerance) for one fixture kind."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensorkeep.conversion.naming import opentad, videomae
from tensorkeep.detection.model._positions import sinusoid_table
from tensorkeep.detection.model.assignment import assign_targets, make_points
from tensorkeep.detection.model.config import DetectorConfig, VitConfig
from tensorkeep.detection.model.detector import Detector, build_backbone, padded_length, video_features
from tensorkeep.detection.model.head import valid_proposals
from tensorkeep.detection.model.layers import VideoShape
from tensorkeep.detection.model.losses import diou_loss, focal_loss, giou_loss
from tensorkeep.detection.model.vit import VisionTransformer
from tensorkeep.detection.model.weights import load_exactly, load_videomae
from tensorkeep.detection.opentad._model_section import backbone_config, detector_config
from tensorkeep.training.ema import Ema
from tensorkeep.training.schedules import learning_rate
from tests.opentad_names import load_opentad, to_opentad
from tests.parity import opentad_keys, opentad_training
from tests.parity.opentad_fixtures import Capture, Case, Fixture, difference, read_fixtures, relative, unequal


def cases(folder: Path) -> Iterator[Case]:
    """All cases of the folder's model fixtures."""
    torch.manual_seed(0)
    for fixture in read_fixtures(folder):
        for name, figure, tolerance in KINDS[fixture.kind](fixture):
            yield f"{fixture.name}/{name}", figure, tolerance


def without_drop_path(config: DetectorConfig) -> DetectorConfig:
    """The fixtures' condition: drop path off, everything else as configured (layer scale stays)."""
    backbone = config.backbone
    if backbone is not None:
        backbone = replace(backbone, vit=replace(backbone.vit, drop_path=0.0))
    return replace(config, projection=replace(config.projection, drop_path=0.0), backbone=backbone)


def detector_cases(fixture: Fixture) -> Iterator[Case]:
    config = without_drop_path(detector_config(fixture.meta["config"]))
    detector = Detector(config)
    weights = fixture.under("weights/")
    load_opentad(detector, weights)
    yield "names there and back", float(len(to_opentad(detector).keys() ^ weights.keys())), 0
    yield from _evaluated(fixture, detector.eval())
    yield from _losses(fixture, detector)


def _evaluated(fixture: Fixture, detector: Detector) -> Iterator[Case]:
    tensors = fixture.tensors
    features, mask = tensors["in/features"], tensors["in/mask"]
    inner = [key for key in fixture.under("eval/") if _module_of(key)]
    with Capture(detector, sorted({_module_of(key) for key in inner})) as capture, torch.no_grad():
        out = detector(features, mask)
    ours = {key: capture.outputs[_module_of(key)][_call_of(key)] for key in inner}
    # our norms see [B, T, C]
    ours |= {key: ours[key].transpose(1, 2) for key in inner if key.startswith("neck.")}
    length = padded_length(features.shape[-1], detector.config)
    padded = torch.zeros(len(mask), length, dtype=torch.bool)
    padded[:, : mask.shape[1]] = mask
    yield "mask padded", unequal(padded, tensors["in/mask_padded"]), 0
    for level in range(len(out.logits)):
        ours[f"rpn_head.cls_logits.level{level}"] = out.logits[level]
        ours[f"rpn_head.reg_offsets.level{level}"] = out.offsets[level]
    for b, (segments, scores) in enumerate(valid_proposals(out)):
        ours[f"proposals.{b}"], ours[f"scores.{b}"] = segments, scores
    theirs = fixture.under("eval/")
    yield "eval tensors without a counterpart", float(len(theirs.keys() - ours.keys())), 0
    parts = ("projection", "neck", "rpn_head.cls", "rpn_head.reg", "proposals", "scores")
    for part in parts:
        shared = [key for key in theirs if key.startswith(part) and key in ours]
        if shared:
            figure = max(difference(ours[key], theirs[key]) for key in shared)
            yield part, figure, 1e-3 if part == "proposals" else 1e-4
    masks = [unequal(m, tensors[f"mask.level{i}"]) for i, m in enumerate(out.masks)]
    points = [unequal(p, tensors[f"points.level{i}"]) for i, p in enumerate(out.points)]
    yield "masks", max(masks), 0
    yield "points", max(points), 0


def _module_of(key: str) -> str:
    """Path of our submodule whose output an `eval/` tensor is; empty where it is no submodule's."""
    bare = re.sub(r"\.level\d+$", "", key)
    if bare == "rpn_head.reg_raw":
        return "head.reg_head"
    if re.fullmatch(r"neck\.\d+", bare):
        return f"neck.norms.{bare.split('.')[1]}"
    if re.match(r"projection\.|rpn_head\.(cls|reg)_convs\.", bare):
        return opentad.to_hf(bare) or ""
    return ""


def _call_of(key: str) -> int:
    found = re.search(r"\.level(\d+)$", key)
    return int(found[1]) if found else 0


def _losses(fixture: Fixture, detector: Detector) -> Iterator[Case]:
    tensors = fixture.tensors
    count = len(fixture.under("in/gt_segments."))
    segments = [tensors[f"in/gt_segments.{b}"] for b in range(count)]
    labels = [tensors[f"in/gt_labels.{b}"] for b in range(count)]
    out = detector(tensors["in/features"], tensors["in/mask"])
    head = detector.config.head
    points = torch.cat(out.points)
    wrong, worst = 0.0, 0.0
    for b in range(count):
        classes, distances = assign_targets(
            points, segments[b], labels[b], head.classes, head.centre_radius, head.near_ties
        )
        theirs = tensors[f"targets/cls.{b}"]
        wrong += unequal(classes, theirs)
        meant = theirs.sum(-1) > 0
        worst = max(worst, difference(distances[meant], tensors[f"targets/reg.{b}"][meant]))
    yield "targets cls", wrong, 0
    yield "targets reg", worst, 1e-5
    result = fixture.under("loss/")
    state = detector.head.get_buffer("loss_normalizer")
    yield "normalizer before", relative(state, result["normalizer.before"]), 1e-6
    for run in ("eval", "train1", "train2"):
        detector.train(run != "eval")
        losses = detector.loss(detector(tensors["in/features"], tensors["in/mask"]), segments, labels)
        for part in ("cls_loss", "reg_loss", "cost"):
            yield f"{run} {part}", relative(getattr(losses, part), result[f"{run}.{part}"]), 1e-5
        if run != "eval":
            yield f"{run} normalizer", relative(state, result[f"normalizer.after{run[-1]}"]), 1e-6
        if run == "train1":
            losses.cost.backward()  # type: ignore[no-untyped-call]
            if fixture.under("grad/"):
                yield from gradient_cases(detector, fixture.under("grad/"), opentad.from_hf)
            norm = torch.nn.utils.get_total_norm([p.grad for p in detector.parameters() if p.grad is not None])
            yield "gradient norm", relative(norm, result["grad_norm"]), 1e-5


def gradient_cases(module: nn.Module, theirs: dict[str, Tensor], rename: Any, prefix: str = "") -> Iterator[Case]:
    """Which parameters have a gradient, and how far each is from the fixture's, relative to its largest entry."""
    ours = {rename(prefix + name): p.grad for name, p in module.named_parameters() if p.grad is not None}
    yield "gradients, names", float(len(ours.keys() ^ theirs.keys())), 0
    # some gradients are zero but for rounding (the bias of keys): a floor keeps them from deciding
    floor = 1e-3 * max((float(grad.abs().max()) for grad in theirs.values()), default=1.0)
    figures = [
        difference(ours[name], grad) / max(float(grad.abs().max()), floor)
        for name, grad in theirs.items()
        if name in ours
    ]
    yield "gradients, relative", max(figures, default=float("inf")), 1e-4


def backbone_cases(fixture: Fixture) -> Iterator[Case]:
    config = backbone_config(fixture.meta["config"])
    config = replace(config, vit=replace(config.vit, drop_path=0.0))
    vit = build_backbone(config)
    weights = {opentad.to_hf(f"backbone.{name}"): tensor for name, tensor in fixture.under("weights/").items()}
    load_exactly(vit, {str(name).removeprefix("backbone."): t for name, t in weights.items()}, fixture.name)
    yield "frozen as the original", float(len(_frozen(vit) ^ set(fixture.meta["frozen_after_forward"]))), 0
    frames = fixture.tensors["in/frames_uint8"].squeeze(1)
    theirs = fixture.under("eval/")
    paths = [key for key in theirs if key.startswith("blocks.") or key == "patch_embed"]
    with Capture(vit, paths) as capture, torch.no_grad():
        features = video_features(vit.eval(), frames, config.output_length)
    ours = {path: torch.cat(capture.outputs[path]) for path in paths}
    grid = tuple(size // step for size, step in zip(frames.shape[2:], vit.patch_embed.kernel))
    shape = VideoShape(len(frames), config.vit.chunk_frames // config.vit.tubelet, *grid[1:])
    ours |= {"pos_embed_used": vit.positions(shape), "features": features}
    last = ours[f"blocks.{config.vit.depth - 1}"]
    ours["feat_map"] = last.transpose(1, 2).reshape(len(last), -1, *shape[1:])
    for key in sorted(theirs):
        yield key, difference(ours[key], theirs[key]) if key in ours else float("inf"), 1e-4
    for mode in ("none", "blocks", "attention", "segments"):
        vit.checkpointing = mode  # type: ignore[assignment]
        vit.train().zero_grad()
        features = video_features(vit, frames, config.output_length)
        yield f"train features ({mode} recomputed)", difference(features, fixture.tensors["train/features"]), 1e-4
        (features * fixture.tensors["in/grad_out"]).sum().backward()  # type: ignore[no-untyped-call]
        for name, figure, tolerance in gradient_cases(vit, fixture.under("grad/"), _backbone_name):
            yield f"{name} ({mode} recomputed)", figure, tolerance


def _backbone_name(name: str) -> str:
    return str(opentad.from_hf(f"backbone.{name}")).removeprefix("backbone.")


def _frozen(vit: VisionTransformer) -> set[str]:
    # ours freezes fc_norm too: nothing passes through it, and the original leaves it out of the optimizer
    names = {_backbone_name(name) for name, p in vit.named_parameters() if not p.requires_grad}
    return {name for name in names if "fc_norm" not in name}


def label_assignment_cases(fixture: Fixture) -> Iterator[Case]:
    for case, settings in fixture.meta.items():
        given = fixture.under(f"{case}/")
        strides = tuple(settings["strides"])
        lengths = tuple(len(given[f"points.level{i}"]) for i in range(len(strides)))
        points = make_points(lengths, strides, tuple(map(tuple, settings["regression_range"])))
        yield f"{case} points", sum(unequal(p, given[f"points.level{i}"]) for i, p in enumerate(points)), 0
        radius = settings["center_sample_radius"] if settings["center_sample"] == "radius" else None
        wrong, worst = 0.0, 0.0
        for b in range(sum(key.startswith("gt_segments.") for key in given)):
            segments, labels = given[f"gt_segments.{b}"], given[f"gt_labels.{b}"]
            classes, distances = assign_targets(
                torch.cat(points), segments, labels, settings["num_classes"], radius, settings["filter_similar_gt"]
            )
            theirs = given[f"cls_targets.{b}"]
            meant = theirs.sum(-1) > 0
            wrong += unequal(classes, theirs)
            worst = max(worst, difference(distances[meant], given[f"reg_targets.{b}"][meant]))
        yield f"{case} classes", wrong, 0
        yield f"{case} distances", worst, 1e-5


def losses_cases(fixture: Fixture) -> Iterator[Case]:
    given = fixture.tensors
    logits = given["focal/logits"].clone().requires_grad_()
    settings = {key: fixture.meta[key] for key in ("alpha", "gamma") if key in fixture.meta}
    yield from _loss(fixture, "focal", focal_loss(logits, given["focal/targets"], **settings), logits)
    target = given["diou/gt"]
    for name, function in (("diou", diou_loss), ("giou", giou_loss)):
        if f"{name}/none" in given:
            predicted = given.get(f"{name}/pred", given["diou/pred"]).clone().requires_grad_()
            yield from _loss(fixture, name, function(predicted, given.get(f"{name}/gt", target)), predicted)


def _loss(fixture: Fixture, name: str, each: Tensor, leaf: Tensor) -> Iterator[Case]:
    given = fixture.under(f"{name}/")
    yield f"{name} each", difference(each, given["none"]), 1e-5
    yield f"{name} sum", relative(each.sum(), given["sum"]), 1e-5
    each.sum().backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    scale = given["grad"].abs().clamp(min=1.0)
    yield f"{name} gradient", difference(leaf.grad / scale, given["grad"] / scale), 1e-5


def schedule_cases(fixture: Fixture) -> Iterator[Case]:
    meta = fixture.meta
    per_epoch = meta.get("iters_per_epoch", 1)
    warmup, total = meta["warmup_epoch"] * per_epoch, meta["max_epoch"] * per_epoch
    settings = {"floor": meta.get("eta_min", 1e-8), "start": meta.get("warmup_start_lr", 0.0)}
    worst = 0.0
    for update, rates in enumerate(meta["lr_used_at_iteration"]):
        ours = [learning_rate(update, base, warmup, total, **settings) for base in meta["base_lrs"]]
        worst = max(worst, *(abs(a - b) for a, b in zip(ours, rates)))
    yield "learning rates", worst, 1e-12


def pos_embed_cases(fixture: Fixture) -> Iterator[Case]:
    for name, theirs in sorted(fixture.tensors.items()):
        if name.startswith("vit/"):
            yield name, difference(sinusoid_table(*theirs.shape[1:]), theirs), 1e-6
        elif name.startswith("actionformer/"):
            channels, length = theirs.shape[1:]
            yield name, difference(sinusoid_table(length, channels).transpose(1, 2), theirs), 1e-6


def videomae_cases(fixture: Fixture) -> Iterator[Case]:
    arch = fixture.meta["arch"]
    original = fixture.under("original/")
    config = VitConfig(
        image_size=arch["img_size"],
        patch_size=arch["patch"],
        embed_dim=arch["embed_dim"],
        depth=arch["depth"],
        heads=arch["heads"],
        mlp_dim=len(original["blocks.0.mlp.fc1.weight"]),
        chunk_frames=arch["frames"],
        tubelet=arch["tubelet"],
        eps=arch["eps"],
    )
    vit = VisionTransformer(config).eval()
    left = load_videomae(vit, original)
    yield "names left out", float(len(set(left) ^ set(fixture.meta["dropped"]))), 0
    mapped = fixture.meta["key_map_original_to_opentad_backbone"]
    yield "key map", float(sum(videomae.to_hf(a) != opentad.to_hf(b) for a, b in mapped.items())), 0
    yield "pos_embed", difference(vit.get_buffer("pos_embed"), fixture.tensors["pos_embed"]), 1e-6
    video = fixture.tensors["in/video"]
    grid = [size // step for size, step in zip(video.shape[2:], vit.patch_embed.kernel)]
    with torch.no_grad():
        tokens = vit.encode(vit.patch_embed(video), VideoShape(len(video), *grid))
        pooled = vit.fc_norm(tokens.mean(1))
        logits = nn.functional.linear(pooled, original["head.weight"], original["head.bias"])
    yield "tokens", difference(tokens, fixture.tensors["out/tokens_before_fc_norm"]), 1e-4
    yield "logits", difference(logits, fixture.tensors["out/logits"]), 1e-4


def ema_cases(fixture: Fixture) -> Iterator[Case]:
    model = nn.ParameterDict({"w": nn.Parameter(fixture.tensors["init/w"].clone())})
    ema = Ema(model, decay=fixture.meta["decay"])
    worst, step = 0.0, 0
    while f"step{step}/model_w" in fixture.tensors:
        model["w"].data.copy_(fixture.tensors[f"step{step}/model_w"])
        ema.update(model)
        worst = max(worst, difference(ema.tensors["w"], fixture.tensors[f"step{step}/ema_w"]))
        step += 1
    yield f"average over {step} steps", worst, 1e-5


KINDS = {
    "detector": detector_cases,
    "backbone": backbone_cases,
    "train_engine": opentad_training.cases,
    "label_assignment": label_assignment_cases,
    "losses": losses_cases,
    "schedule": schedule_cases,
    "pos_embed": pos_embed_cases,
    "videomae": videomae_cases,
    "ema": ema_cases,
    "keys": opentad_keys.cases,
}
