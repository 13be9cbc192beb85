"""The train engine fixture: the original's loop replayed with our model, groups, schedule, clipping and EMA."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tensorkeep.conversion.naming import opentad
from tensorkeep.detection.model.detector import Detector
from tensorkeep.detection.model.groups import OptimizerConfig, make_optimizer
from tensorkeep.detection.model.head import valid_proposals
from tensorkeep.detection.opentad._model_section import detector_config
from tensorkeep.training.ema import Ema
from tensorkeep.training.migration import backbone_pattern
from tensorkeep.training.schedules import learning_rate
from tensorkeep.training.sections import GroupRule
from tests.opentad_names import load_opentad
from tests.parity.opentad_fixtures import Case, Fixture, difference, relative


def cases(fixture: Fixture) -> Iterator[Case]:
    config = detector_config(fixture.meta["config"])
    assert config.backbone is not None
    backbone = replace(config.backbone, vit=replace(config.backbone.vit, drop_path=0.0))
    config = replace(config, backbone=backbone, projection=replace(config.projection, drop_path=0.0))
    detector = Detector(config)
    load_opentad(detector, fixture.under("init/"))
    optimizer = make_optimizer(detector, optimizer_of(fixture.meta["optimizer"]))
    yield from group_cases(optimizer.param_groups, fixture.meta["optimizer"]["groups"])
    ema = Ema(detector, decay=fixture.meta["ema_decay"])
    yield from _train(fixture, detector, optimizer, ema)
    yield from _final(fixture, detector, optimizer, ema)


def optimizer_of(section: dict[str, Any]) -> OptimizerConfig:
    """Our config from a fixture's list of groups: a backbone rule for each backbone group, then the detector's."""
    rules, detector = [], []
    for group in section["groups"]:
        lr = group.get("initial_lr", group.get("lr"))
        if all(name.startswith("backbone.") for name in group["names"]):
            word = "adapter" if all(".adapter." in name for name in group["names"]) else ""
            rules.append(GroupRule(backbone_pattern(word), lr, group["weight_decay"]))
        else:
            detector.append((lr, group["weight_decay"]))
    lr, decay = max(detector)
    settings = {**section["groups"][0], **section}
    betas, eps = tuple(settings.get("betas", (0.9, 0.999))), settings.get("eps", 1e-8)
    return OptimizerConfig(lr, decay, betas, eps, groups=tuple(rules))


def group_cases(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> Iterator[Case]:
    """Same tensors in the same groups (but for fc_norm, which has no gradient), same rates and decays."""
    for index, (mine, group) in enumerate(zip(ours, theirs)):
        names = {opentad.from_hf(name) for name in mine["names"]}
        wanted = {name for name in group["names"] if ".fc_norm." not in name}
        yield f"group {index}, names", float(len(names ^ wanted)), 0
        rate = group.get("initial_lr", group.get("lr"))
        yield f"group {index}, rate", abs(mine["base_lr"] - rate), 0
        yield f"group {index}, decay", abs(mine["weight_decay"] - group["weight_decay"]), 0
    yield "number of groups", float(abs(len(ours) - len(theirs))), 0


def _batches(fixture: Fixture) -> list[tuple[Tensor, Tensor, list[Tensor], list[Tensor]]]:
    found = []
    while f"in/{len(found)}.mask" in fixture.tensors:
        given = fixture.under(f"in/{len(found)}.")
        mask = given["mask"]
        segments = [given[f"gt_segments.{b}"] for b in range(len(mask))]
        labels = [given[f"gt_labels.{b}"] for b in range(len(mask))]
        found.append((given["frames_uint8"].squeeze(1), mask, segments, labels))
    return found


def _train(fixture: Fixture, detector: Detector, optimizer: torch.optim.Optimizer, ema: Ema) -> Iterator[Case]:
    schedule, batches = fixture.meta["scheduler"], _batches(fixture)
    worst = {"losses": 0.0, "learning rates": 0.0, "gradient norm": 0.0}
    detector.train()
    for update, step in enumerate(fixture.meta["steps"]):
        frames, mask, segments, labels = batches[update % len(batches)]
        for group, theirs in zip(optimizer.param_groups, step["lr"]):
            group["lr"] = learning_rate(update, group["base_lr"], schedule["warmup_epoch"], schedule["max_epoch"])
            worst["learning rates"] = max(worst["learning rates"], abs(group["lr"] - theirs))
        losses = detector.loss(detector(frames, mask), segments, labels)
        for part, theirs in step["losses"].items():
            worst["losses"] = max(worst["losses"], relative(getattr(losses, part), theirs))
        optimizer.zero_grad()
        losses.cost.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(detector.parameters(), fixture.meta["clip_grad_norm"])
        worst["gradient norm"] = max(worst["gradient norm"], relative(norm, step["grad_norm_before_clip"]))
        optimizer.step()
        ema.update(detector)
    steps = len(fixture.meta["steps"])
    yield f"losses over {steps} steps, relative", worst["losses"], 1e-5
    yield f"learning rates over {steps} steps", worst["learning rates"], 1e-12
    yield f"gradient norms over {steps} steps, relative", worst["gradient norm"], 1e-4


def _final(fixture: Fixture, detector: Detector, optimizer: torch.optim.Optimizer, ema: Ema) -> Iterator[Case]:
    state = {opentad.from_hf(name): tensor for name, tensor in detector.state_dict().items()}
    final = fixture.under("final/")
    yield "final weights, names", float(len(state.keys() ^ final.keys())), 0
    yield "final weights", max(difference(state[name], tensor) for name, tensor in final.items()), 5e-4
    for moment in ("exp_avg", "exp_avg_sq"):
        worst, seen = 0.0, 0
        for group in optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"]):
                theirs = fixture.tensors.get(f"optim/{opentad.from_hf(name)}.{moment}")
                if theirs is not None:
                    seen += 1
                    worst = max(worst, difference(optimizer.state[parameter][moment], theirs))
        wanted = sum(key.startswith("optim/") and key.endswith(f".{moment}") for key in fixture.tensors)
        yield f"optimizer {moment}", worst, 5e-4
        yield f"optimizer {moment}, tensors without a counterpart", float(wanted - seen), 0
    averages = {opentad.from_hf(name): tensor for name, tensor in ema.tensors.items()}
    # frozen tensors have no average of their own: the model's serve; the original's int64 normaliser is its defect
    theirs = {name: t for name, t in fixture.under("ema/").items() if not name.endswith("loss_normalizer")}
    yield "EMA", max(difference(averages.get(name, state[name]), t) for name, t in theirs.items()), 1e-5
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    frames, mask, _, _ = _batches(fixture)[0]
    with ema.applied(detector), torch.no_grad():
        proposals = valid_proposals(detector.eval()(frames, mask))
    for b, (segments, scores) in enumerate(proposals):
        yield f"EMA proposals {b}", difference(segments, fixture.tensors[f"ema_eval/proposals.{b}"]), 1e-3
        yield f"EMA scores {b}", difference(scores, fixture.tensors[f"ema_eval/scores.{b}"]), 1e-4
    changed = sum(not torch.equal(tensor, before[name]) for name, tensor in detector.state_dict().items())
    yield "weights changed by evaluating the EMA", float(changed), 0
