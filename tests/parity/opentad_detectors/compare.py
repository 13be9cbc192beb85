"""Our detector against what the peer recorded of OpenTAD's: (name, figure, tolerance) for each thing compared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tensorkeep.conversion.naming import opentad
from tensorkeep.detection._training import count_positives
from tensorkeep.detection.inference import Selection, decode_predictions
from tensorkeep.detection.model.detector import Detector
from tensorkeep.detection.model.groups import OptimizerConfig, make_optimizer
from tensorkeep.detection.model.head import Losses, Predictions, valid_proposals
from tensorkeep.detection.opentad._model_section import detector_config
from tensorkeep.detection.results.nms import from_opentad
from tests.opentad_names import load_opentad, to_opentad
from tests.parity.opentad_fixtures import Case, Fixture, difference, read_fixtures, relative, unequal
from tests.parity.opentad_model import gradient_cases

NMS = {"use_soft_nms": True, "sigma": 0.5, "max_seg_num": 300, "min_score": 0.001, "multiclass": True}


def recorded(folder: Path) -> Iterator[Fixture]:
    """The peer's files in a folder."""
    yield from (f for f in read_fixtures(folder) if f.kind == "detector" and "case" in f.meta)


def cases(fixture: Fixture) -> Iterator[Case]:
    """Every comparison of one file."""
    detector = made(fixture)
    weights = fixture.under("weights/")
    load_opentad(detector, weights)
    yield "names there and back", float(len(to_opentad(detector).keys() ^ weights.keys())), 0
    yield from _evaluated(fixture, detector.eval())
    yield from _losses(fixture, detector)
    yield from _groups(fixture, detector)


def made(fixture: Fixture) -> Detector:
    """Our detector of the file's config, nothing dropped and without noise; scales stay."""
    config = detector_config(fixture.meta["case"]["model"])
    still = {"drop_path", "input_noise", "input_dropout"} & set(vars(config.projection))
    detector = Detector(config)
    detector.projection.config = replace(config.projection, **dict.fromkeys(still, 0.0))  # type: ignore[assignment]
    for module in detector.modules():
        if hasattr(module, "rate"):
            module.rate = 0.0
    return detector


def _evaluated(fixture: Fixture, detector: Detector) -> Iterator[Case]:
    tensors = fixture.tensors
    features, mask = tensors["in/features"], tensors["in/mask"]
    levels: list[torch.Tensor] = []
    handle = detector.neck.register_forward_hook(lambda m, i, out: levels.extend(out))
    with torch.no_grad():
        out = detector(features, mask)
    handle.remove()
    yield "masks", max(unequal(m, tensors[f"eval/mask.{i}"]) for i, m in enumerate(out.masks)), 0
    yield "levels", max(difference(x, tensors[f"eval/neck.{i}"]) for i, x in enumerate(levels)), 1e-4
    yield "logits", max(difference(x, tensors[f"eval/logits.{i}"]) for i, x in enumerate(out.logits)), 1e-4
    if "eval/offsets" in tensors:
        offsets = torch.cat(out.offsets, -1).transpose(-1, -2)  # [B, K, P, 2]
        yield "offsets of each class", difference(offsets, tensors["eval/offsets"]), 1e-4
    else:
        for b, (segments, scores) in enumerate(valid_proposals(out)):
            yield f"segments {b}", difference(segments, tensors[f"eval/proposals.{b}"]), 1e-3
            yield f"scores {b}", difference(scores, tensors[f"eval/scores.{b}"]), 1e-5
    yield from _detected(fixture, out)


def _detected(fixture: Fixture, out: Predictions) -> Iterator[Case]:
    """Detections after suppression: how many of theirs have none of ours at the same place, and the other way round."""
    length = fixture.meta["case"]["length"]
    meta = {"method": "resize", "duration": 100.0, "window_size": length}
    found = decode_predictions(out, [meta, meta], Selection(nms=from_opentad(NMS)))
    for b, ours in enumerate(found):
        rows = fixture.meta["detections"][str(b)]
        theirs = np.array([[*row["segment"], row["score"], int(row["label"])] for row in rows])
        mine = np.column_stack([ours.segments, ours.scores, ours.labels])
        near = (np.abs(theirs[:, None] - mine) <= [0.0051, 0.0051, 6e-5, 0]).all(2)  # theirs are rounded
        lost = float((~near.any(1)).sum() + (~near.any(0)).sum() + abs(len(theirs) - len(mine)))
        yield f"detections {b} of {len(theirs)} without a counterpart", lost, 0


def _losses(fixture: Fixture, detector: Detector) -> Iterator[Case]:
    tensors, theirs = fixture.tensors, fixture.meta["losses"]
    segments, labels = ([tensors[f"in/{key}.{b}"] for b in range(2)] for key in ("segments", "labels"))
    features, mask = tensors["in/features"], tensors["in/mask"]
    head = detector.head
    state = head.get_buffer("loss_normalizer")
    for run in ("eval", "train1", "train2"):
        detector.train(run != "eval").zero_grad()
        before = float(state)
        losses: Losses = detector.loss(detector(features, mask), segments, labels)
        # the losses of TriDet and TemporalMaxer divide the classes' by the average in evaluation too: ours by the count
        own = 1.0 if "cls_start_head" in dict(head.named_children()) or hasattr(head.config, "keep_percent") else None
        factor = float(losses.positives) / before if own and run == "eval" else 1.0
        yield f"{run} cls_loss", relative(losses.cls_loss * factor, theirs[run]["cls_loss"]), 1e-5
        yield f"{run} reg_loss", relative(losses.reg_loss, theirs[run]["reg_loss"]), 1e-5
        yield f"{run} normalizer", relative(state, theirs[run]["normalizer"]), 1e-6
        if run != "eval":
            yield f"{run} cost", relative(losses.cost, theirs[run]["cost"]), 1e-5
        if run == "train1":
            losses.cost.backward()  # type: ignore[no-untyped-call]
            yield from gradient_cases(detector, fixture.under("grad/"), opentad.from_hf)
            count = count_positives(mask, segments, labels, detector.config)
            yield "positives, counted from the annotations alone", abs(float(losses.positives) - count), 0


def _groups(fixture: Fixture, detector: Detector) -> Iterator[Case]:
    config = OptimizerConfig(lr=1e-4, weight_decay=0.05, groups=())
    ours: list[dict[str, Any]] = make_optimizer(detector, config).param_groups
    wrong = [
        {opentad.from_hf(name) for name in mine["names"]} ^ set(group["names"])
        for mine, group in zip(ours, fixture.meta["groups"], strict=True)
    ]
    yield "optimizer groups, names", float(sum(map(len, wrong))), 0
    decays = [abs(m["weight_decay"] - g["weight_decay"]) for m, g in zip(ours, fixture.meta["groups"], strict=True)]
    yield "optimizer groups, decays", max(decays), 0
