"""Every kind of detector: equal to what OpenTAD's recorded, its files both ways, scanned, trained and gone on with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tensorkeep import cli
from tensorkeep.conversion.naming import identify
from tensorkeep.conversion.naming.opentad_recipe import read_off
from tensorkeep.detection.inference import Selection, decode_predictions
from tensorkeep.detection.model import kinds
from tensorkeep.detection.model.config import DetectorConfig
from tensorkeep.detection.model.detector import Detector
from tensorkeep.detection.model.kinds.causaltad import selective_scan, states_by_doubling, states_in_turn
from tensorkeep.detection.opentad._moments import optimizer_orders
from tensorkeep.detection.recipe.text import detection_recipe, read_recipe
from tensorkeep.detection.start import load_detector, open_detector
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import read
from tensorkeep.training.recipe import plain
from tensorkeep.training.schema import from_mapping
from tests.detection import runs
from tests.detection.test_training import assert_same_run, features
from tests.gpu import needs_gpu
from tests.helpers import assert_same, held, to
from tests.parity.opentad_detectors import compare
from tests.parity.opentad_fixtures import Fixture

RECORDED = Path(__file__).parent.parent / "data" / "opentad_detectors"
FILES = list(compare.recorded(RECORDED))
NEW = [name for name in kinds.NAMES if name != "actionformer"]
# what a recipe's `model` section has beside the fields that all kinds share
PARTS: dict[str, dict[str, Any]] = {
    "tridet": {"projection": {"stem_layers": 1, "mlp_dim": 16, "max_length": 16}, "head": {"bins": 4}},
    "temporalmaxer": {"projection": {}, "head": {}},
    "causaltad": {"projection": {"stem_layers": 1, "heads": 2}, "head": {}},
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


def with_kind(document: dict[str, Any], kind: str) -> dict[str, Any]:
    """A recipe's document with another detector on the same inputs."""
    model = document["model"]
    shared = {key: model["projection"][key] for key in ("in_channels", "channels", "embed_layers", "branch_layers")}
    model |= {"kind": kind, "projection": shared | PARTS[kind]["projection"]}
    model["head"] |= PARTS[kind]["head"]
    return document


def test_there_is_a_record_of_every_kind() -> None:
    assert {compare.made(fixture).config.kind for fixture in FILES} == set(NEW)


@pytest.mark.parametrize("fixture", FILES, ids=[fixture.name for fixture in FILES])
def test_a_detector_computes_what_opentads_does(fixture: Fixture) -> None:
    found = list(compare.cases(fixture))
    assert [(name, figure) for name, figure, tolerance in found if not figure <= tolerance] == []
    assert len(found) > 18


def test_the_comparison_fails_where_one_weight_differs() -> None:
    fixture = next(f for f in FILES if f.name == "tridet_0")
    name = "weights/rpn_head.cls_end_head.bias"
    moved = replace(fixture, tensors={**fixture.tensors, name: fixture.tensors[name] + 0.05})
    wrong = {name for name, figure, tolerance in compare.cases(moved) if not figure <= tolerance}
    assert {"offsets of each class", "train1 reg_loss"} <= wrong and "logits" not in wrong


@pytest.mark.parametrize("fixture", FILES, ids=[fixture.name for fixture in FILES])
def test_a_checkpoint_goes_to_our_names_and_back_with_a_recipe_read_off_it(fixture: Fixture, tmp_path: Path) -> None:
    state = {f"module.{name}": tensor for name, tensor in fixture.under("weights/").items()}
    torch.save({"epoch": 7, "state_dict": state}, tmp_path / "epoch_7.pth")
    assert identify(read(tmp_path / "epoch_7.pth")).naming == "opentad"
    to(tmp_path / "epoch_7.pth", tmp_path / "out", "hf")
    detector = compare.made(fixture)
    config = from_mapping(DetectorConfig, yaml.safe_load((tmp_path / "out/recipe.yaml").read_text())["model"], "recipe")
    shapes = {name: tensor.shape for name, tensor in Detector(config).state_dict().items()}
    assert config.kind == detector.config.kind
    assert shapes == {name: tensor.shape for name, tensor in detector.state_dict().items()}
    assert held(tmp_path / "out").keys() == shapes.keys()
    to(tmp_path / "out", tmp_path / "back.pth", "pth", naming="opentad")
    assert_same(torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"], state)


@pytest.mark.parametrize("fixture", FILES, ids=[fixture.name for fixture in FILES])
def test_the_order_of_opentads_optimizer_state_is_known(fixture: Fixture) -> None:
    parameters = [name for group in fixture.meta["groups"] for name in group["names"]]
    shapes = {n: tuple(t.shape) for n, t in fixture.under("weights/").items() if n in parameters}
    assert shapes.keys() == set(parameters)
    assert [g for g in next(optimizer_orders(shapes, [])) if g] == [g["names"] for g in fixture.meta["groups"]]


def test_shapes_that_lack_what_a_recipe_is_read_off_give_none() -> None:
    from tensorkeep.conversion.naming.opentad_recipe import readable

    for fixture in FILES:
        detector = compare.made(fixture)
        shapes = {name: tuple(tensor.shape) for name, tensor in detector.state_dict().items()}
        assert readable(shapes) and f"kind: {detector.config.kind}" in read_off(shapes)[0]
        for name in ("projection.branch.1.psi.weight", "projection.branch.1.block.conv1d.weight"):
            stem = name.replace("branch.1", "branch.0")
            if name in shapes:
                assert not readable({n: s for n, s in shapes.items() if n not in (name, stem)} | {stem: (1,)})


@pytest.mark.parametrize("length", [1, 63, 64, 65, 130])
def test_a_scan_in_chunks_is_the_recurrence_and_so_are_its_gradients(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    x, step, into, out_of = (torch.randn(2, n, length, generator=generator).double() for n in (3, 3, 4, 4))
    decay = -torch.rand(3, 4, generator=generator).double() * 3
    leaves = [x, step.exp() * 0.2, decay, into, out_of]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    x, step, decay, into, out_of = leaves
    state, rows = torch.zeros(2, 3, 4).double(), []
    for t in range(length):
        state = (step[..., t, None] * decay).exp() * state + (step * x)[..., t, None] * into[:, None, :, t]
        rows.append((state * out_of[:, None, :, t]).sum(-1))
    wanted, found = torch.stack(rows, -1), selective_scan(x, step, decay, into, out_of)
    assert torch.allclose(wanted, found, atol=1e-12)
    weigh = torch.randn(wanted.shape, generator=generator).double()
    for mine, theirs in zip(*(torch.autograd.grad((y * weigh).sum(), leaves) for y in (found, wanted))):
        assert torch.allclose(mine, theirs, atol=1e-10)
    with torch.no_grad():
        assert torch.equal(selective_scan(x, step, decay, into, out_of), found)


@needs_gpu
@pytest.mark.parametrize("length", [1, 63, 64, 65, 768])
def test_a_gpus_scan_is_the_plain_one_and_so_are_its_gradients(length: int) -> None:
    """Of 40 channels, no multiple of a program's 32: the CPU's recurrence in float64."""
    generator = torch.Generator().manual_seed(length)
    x, step, into, out_of = (torch.randn(2, n, length, generator=generator) for n in (40, 40, 16, 16))
    leaves = [x, step.exp() * 0.1, -torch.rand(40, 16, generator=generator) * 3, into, out_of]
    weigh = torch.randn(x.shape, generator=generator)
    found = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32), ("cuda", torch.float32)):
        own = [leaf.to(device, dtype).requires_grad_() for leaf in leaves]
        y = selective_scan(*own)
        found.append([y.detach(), *torch.autograd.grad((y * weigh.to(device, dtype)).sum(), own)])
    for exact, one, again in zip(*found):
        assert float((one.cpu().double() - exact).norm()) <= 1e-5 * float(exact.norm())  # 0 of one step's decay
        assert torch.equal(one, again)  # sums of several programs come in one order


@pytest.mark.parametrize("length", [1, 2, 37, 64])
def test_steps_in_turn_and_by_doubling_are_the_same(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    state, added = (torch.randn(*size, generator=generator).double() for size in ((2, 3, 4), (2, 3, length, 4)))
    factor = torch.rand(2, 3, length, 4, generator=generator).double()
    leaves = [leaf.requires_grad_() for leaf in (state, factor, added)]
    one, other = states_in_turn(*leaves), states_by_doubling(*leaves)
    assert torch.allclose(one, other, atol=1e-13)
    weigh = torch.randn(one.shape, generator=generator).double()
    for mine, theirs in zip(*(torch.autograd.grad((y * weigh).sum(), leaves) for y in (one, other))):
        assert torch.allclose(mine, theirs, atol=1e-12)


@pytest.mark.parametrize("fixture", FILES, ids=[fixture.name for fixture in FILES])
def test_ground_truth_filled_up_to_one_shape_teaches_the_same(fixture: Fixture) -> None:
    detector = compare.made(fixture).eval()
    segments = [fixture.tensors[f"in/segments.{b}"] for b in range(2)]
    segments[0][0, 0] = -3.0  # the first point lies in it, and at the place of what is filled in
    labels = [fixture.tensors[f"in/labels.{b}"] for b in range(2)]
    with torch.no_grad():
        out = detector(fixture.tensors["in/features"], fixture.tensors["in/mask"])
        filled = [torch.nn.functional.pad(s, (0, 0, 0, 3)) for s in segments]
        more = [torch.nn.functional.pad(y, (0, 3)) for y in labels]
        assert detector.loss(out, filled, more) == detector.loss(out, segments, labels)
        nothing = [torch.zeros(0, 2)] * 2, [torch.zeros(0, dtype=torch.int32)] * 2
        assert float(detector.loss(out, *nothing).reg_loss) == 0.0


def test_a_candidate_has_the_segment_of_its_class() -> None:
    head = Detector(
        from_mapping(DetectorConfig, with_kind(runs.document(Path("x")), "tridet")["model"], "model")
    ).eval()
    with torch.no_grad():
        out = head(torch.rand(1, 3, 32, 32, 32) * 255, torch.ones(1, 16, dtype=torch.bool))
    assert out.offsets[0].shape == (1, 2, 2, 16)
    out.logits[0][:], out.logits[1][:] = -20.0, -20.0
    out.logits[0][0, :, 5], out.offsets[0][0, 0, :, 5], out.offsets[0][0, 1, :, 5] = 9.0, 1.0, 3.0
    meta = {"method": "resize", "duration": 16.0, "window_size": 16}
    (found,) = decode_predictions(out, [meta], Selection())
    rows = sorted(zip(found.labels.tolist(), found.segments.tolist()))
    assert rows == [(0, [4.0, 6.0]), (1, [2.0, 8.0])]


@pytest.mark.parametrize("kind", NEW)
def test_a_killed_run_on_features_ends_bitwise_where_it_would_have_ended(kind: str, tmp_path: Path) -> None:
    made = detection_recipe(with_kind(plain(features(tmp_path)), kind))
    assert made == detection_recipe(plain(made)) and made.model.kind == kind
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    runs.trained(made, whole)
    runs.killed(made, broken, 4)
    assert runs.trained(made, broken).level == "exact"
    assert_same_run(whole, broken)


@pytest.mark.parametrize("kind", NEW)
def test_the_commands_take_every_kind(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("av")
    data = runs.dataset(tmp_path / "data", videos=2, held_out=1)
    document = with_kind(runs.document(data), kind)
    document["model"]["backbone"]["adapter"]["kind"] = "qlora"
    document["model"]["backbone"]["adapter"]["ratio"] = 1.0
    document["training"]["epochs"] = 1
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(document))
    run, out = str(tmp_path / "run"), str(tmp_path / "found")
    video = str(next((data / "videos").iterdir()))
    for words in (
        ["check", "detection", str(tmp_path / "recipe.yaml")],
        ["train", "detection", str(tmp_path / "recipe.yaml"), "--out", run, "--quiet"],
        ["eval", "detection", run],
        ["predict", run, video, "-o", out],
        ["features", run, video, "-o", str(tmp_path / "rows")],
        ["convert", run, str(tmp_path / "one.pth"), "--to", "pth", "--naming", "opentad"],
    ):
        assert cli.main(words) == 0, (words, capsys.readouterr().err)
    assert json.loads((Path(out) / "detections.json").read_text())["results"]
    trained = open_detector(run).detector
    assert trained.config.kind == kind
    document["model"]["backbone"]["adapter"]["kind"] = "tia"  # what the low-rank updates went into
    (tmp_path / "exported.yaml").write_text(yaml.safe_dump(document))
    back = load_detector(tmp_path / "one.pth", tmp_path / "exported.yaml", average=True)
    inputs = torch.rand(1, 32, 16), torch.ones(1, 16, dtype=torch.bool)
    trained.backbone = back.backbone = None
    with torch.no_grad():
        ours, theirs = trained(*inputs), back(*inputs)
    assert all(map(torch.equal, ours.offsets, theirs.offsets)) and all(map(torch.equal, ours.logits, theirs.logits))


def test_a_kind_is_named_and_its_fields_are_changed_by_dotted_names(tmp_path: Path) -> None:
    document = with_kind(runs.document(tmp_path), "tridet")
    assert detection_recipe(document, [("model.head.bins", "7"), ("window_size", "32")]).model.head.bins == 7  # type: ignore[attr-defined]
    with pytest.raises(TensorkeepError, match=r"unknown kind of detector 'tridt'.*\n.*tridet"):
        detection_recipe(document, [("model.kind", "tridt")])
    with pytest.raises(TensorkeepError, match="bins: of kind tridet"):
        detection_recipe(runs.document(tmp_path), [("model.head.bins", "7")])
    pooled = with_kind(runs.document(tmp_path), "temporalmaxer")
    assert detection_recipe(pooled, [("window_size", "32")]).model.projection.max_length is None
    with pytest.raises(TensorkeepError, match="window 4 is not odd"):
        detection_recipe(document, [("model.projection.windows", "[4]")])
    with pytest.raises(TensorkeepError, match=r"groups 3 does not divide the 16 channels"):
        detection_recipe(document, [("model.neck", "{groups: 3}")])


@pytest.mark.parametrize("kind", ["tridet", "temporalmaxer", "causaltad"])
def test_a_projection_of_another_kind_is_one_error_that_names_both_kinds(kind):
    with pytest.raises(TensorkeepError, match=f"this recipe's kind is {kind}") as caught:
        read_recipe("own_small", [("model.kind", kind)])
    assert f"{kind}'s own fields: in_channels" in str(caught.value) and "projection" in str(caught.value)
    with pytest.raises(TensorkeepError, match="of kind tridet; this recipe's kind is actionformer"):
        read_recipe("own_small", [("model.projection.wide", "5")])
