"""OpenTAD's checkpoints go on as runs of ours: by name, at the same place, over the same frozen weights."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tensorkeep.conversion.execution import convert
from tensorkeep.conversion.planning import make_plan
from tensorkeep.detection.job import build
from tensorkeep.detection.model.config import AdapterConfig, LoraConfig
from tensorkeep.detection.model.detector import Detector
from tensorkeep.detection.model.groups import OptimizerConfig, make_optimizer
from tensorkeep.detection.model.quantization import quantize_backbone
from tensorkeep.detection.opentad._moments import optimizer_orders
from tensorkeep.detection.opentad.resume import continue_from
from tensorkeep.detection.recipe.schema import ScheduleConfig, TrainingConfig
from tensorkeep.formats.view import read
from tensorkeep.quantization.linear import QuantLinear
from tensorkeep.training import saver as checkpoint
from tensorkeep.training.ema import Ema
from tensorkeep.training.live_state import put_optimizer, put_tensors, stored_tensors
from tensorkeep.training.loop import fit
from tensorkeep.training.sections import GroupRule
from tests.detection import runs, tiny
from tests.helpers import refused
from tests.opentad_names import to_opentad
from tests.threads import one_thread  # noqa: F401
from tests.tools import ROOT

CONFIG, SCHEDULE = OptimizerConfig(), ScheduleConfig(warmup=1)
TRAINING = TrainingConfig(epochs=4, batch_size=2)
BASE = {"digest": "of the frozen part", "path": "pretrained.pth"}


def theirs_of(detector: Detector) -> dict[str, str]:
    """Our parameter names -> OpenTAD's, also of adapters that OpenTAD has no word for."""
    named = {tensor.data_ptr(): name for name, tensor in to_opentad(detector).items()}
    return {name: named[p.data_ptr()] for name, p in detector.named_parameters()}


def optimizer_of(detector: Detector, rest: bool = False, config: OptimizerConfig = CONFIG) -> torch.optim.AdamW:
    """OpenTAD's `build_optimizer` from its published behaviour, over our detector: everything by its names."""
    own = dict(detector.named_parameters())
    theirs = {their: own[name] for name, their in theirs_of(detector).items()}
    backbone = {n: p for n, p in theirs.items() if n.startswith("backbone")}
    words = [
        (rule.pattern.removesuffix("_*").strip("*"), rule) for rule in config.groups if rule.pattern != "^backbone.*"
    ]
    custom = [[p for n, p in backbone.items() if word in n] for word, _ in words]
    left = [p for n, p in backbone.items() if not any(word in n for word, _ in words)]
    other = {n: p for n, p in theirs.items() if n not in backbone}
    decayed = sorted(n for n, p in other.items() if n.endswith("weight") and p.ndim > 1)
    groups: list[dict[str, Any]] = [{"params": left, "lr": 1e-5}] if rest else []
    groups += [{"params": p, "lr": r.lr, "weight_decay": 0.05} for p, (_, r) in zip(custom, words)]
    groups += [{"params": [other[n] for n in decayed], "lr": config.lr, "weight_decay": 0.05}]
    groups += [{"params": [other[n] for n in sorted(set(other) - set(decayed))], "lr": config.lr, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=0.05)


def stepped(detector: Detector, optimizer: torch.optim.AdamW, steps: int = 3) -> None:
    generator = torch.Generator().manual_seed(4)
    for _ in range(steps):
        for parameter in detector.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def held_of(detector: Detector, optimizer: torch.optim.AdamW | None, epoch: int = 1, each: int = 5) -> dict[str, Any]:
    """What OpenTAD's `save_checkpoint` keeps, under DDP."""
    state = {f"module.{n}": t.clone() for n, t in to_opentad(detector).items()}
    state["module.rpn_head.loss_normalizer"] = torch.tensor(77)
    average = {n: t * 2 if t.is_floating_point() else t - 9 for n, t in state.items()}
    for name, tensor in state.items():
        if "adapter" not in name and "backbone" in name:
            average[name] = tensor.clone()
    done = (epoch + 1) * each
    schedule = {"warmup_epoch": each, "max_epoch": 4 * each, "last_epoch": done, "_step_count": done + 1}
    held = {"epoch": epoch, "state_dict": state, "state_dict_ema": average, "scheduler": schedule}
    return held | ({} if optimizer is None else {"optimizer": optimizer.state_dict()})


def saved(folder: Path, held: dict[str, Any]) -> Path:
    torch.save(held, folder / "epoch_1.pth")
    return folder / "epoch_1.pth"


def ours(**backbone: Any) -> Detector:
    """The same frozen weights as any other detector of these tests, what trains moved away."""
    torch.manual_seed(0)
    detector = tiny.detector(**backbone)
    with torch.no_grad():
        for parameter in detector.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    return detector


def going_on(path: Path, detector: Detector, config: OptimizerConfig = CONFIG, **options: Any) -> Any:
    return continue_from(path, detector, config, SCHEDULE, 10, TRAINING, **{"base": BASE, **options})


# -- by name ----------------------------------------------------------------------------------------------------------


def test_opentads_own_groups_come_out_of_its_own_names() -> None:
    known = json.loads((ROOT / "tests/data/opentad/optimizer_groups.json").read_text())
    orders = optimizer_orders(dict(known["parameters"]), ["adapter"])
    assert [group for group in next(orders) if group] == known["groups"]


@pytest.mark.parametrize("empty", [False, True])
def test_every_tensor_of_a_checkpoint_reaches_its_name(tmp_path: Path, empty: bool) -> None:
    """`empty`: a group `lora` listed after `adapter`, which takes everything, as in published QLoRA configs."""
    source, sink = ours(), ours()
    rules = (*CONFIG.groups, *([GroupRule("no such name", 1e-4)] if empty else []))
    optimizer = optimizer_of(source, config=replace(CONFIG, groups=rules))
    stepped(source, optimizer)
    assert len(optimizer.param_groups) == 3 + empty
    on = going_on(saved(tmp_path, held_of(source, optimizer)), sink)
    state = on.state
    assert (on.epoch, state.document["step"], state.document["samples"]) == (2, 10, 20)
    put_tensors(sink, state.model, base=True)
    fresh = make_optimizer(sink, CONFIG)
    put_optimizer(sink, fresh, state.optimizer, state.document["optimizer"])
    own = dict(source.named_parameters())
    for name, parameter in sink.named_parameters():
        assert torch.equal(parameter, own[name]), name
        if parameter.requires_grad:
            for slot in ("exp_avg", "exp_avg_sq", "step"):
                assert torch.equal(fresh.state[parameter][slot], optimizer.state[own[name]][slot]), (name, slot)
    assert sink.head.get_buffer("loss_normalizer") == 77.0
    ema = Ema(sink)
    ema.load_state_dict(state.ema, state.document["ema"]["updates"])
    assert ema.updates == 10 and all(torch.equal(t, 2 * own[n]) for n, t in ema.tensors.items())
    assert state.document["foreign"]["level"] == "weights, moments, average and epoch from OpenTAD"
    assert not [line for line in on.remarks if line.startswith(("R02", "R04", "R05"))], on.remarks


def test_a_ladders_moments_reach_their_names(tmp_path: Path) -> None:
    adapter = AdapterConfig("ladder", blocks=(0, 1))
    config = replace(CONFIG, groups=(GroupRule("adapters", 2e-4, 0.05),))
    source, sink = ours(adapter=adapter), ours(adapter=adapter)
    optimizer = optimizer_of(source, config=config)
    stepped(source, optimizer)
    on = going_on(saved(tmp_path, held_of(source, optimizer)), sink, config)
    put_tensors(sink, on.state.model, base=True)
    own, found = dict(source.named_parameters()), dict(sink.named_parameters())
    ladder = [name for name in own if ".ladders." in name]
    assert len(ladder) == 18
    for name in ladder:
        assert torch.equal(found[name], own[name]), name
        assert torch.equal(on.state.optimizer[f"{name}/exp_avg"], optimizer.state[own[name]]["exp_avg"]), name


def test_a_backbone_that_trained_whole_has_its_group_first(tmp_path: Path) -> None:
    config = replace(CONFIG, groups=(GroupRule("adapter", 2e-4), GroupRule("^backbone.*", 1e-5, 0.05)))
    source = ours(tuning="all")
    optimizer = optimizer_of(source, rest=True, config=replace(CONFIG, groups=config.groups[:1]))
    stepped(source, optimizer)
    on = going_on(saved(tmp_path, held_of(source, optimizer)), ours(tuning="all"), config, base=None)
    for name, parameter in source.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(on.state.optimizer[f"{name}/exp_avg"], optimizer.state[parameter]["exp_avg"]), name


def test_an_order_that_is_not_opentads_costs_the_moments_and_nothing_else(tmp_path: Path) -> None:
    source = ours()
    optimizer = optimizer_of(source)
    stepped(source, optimizer)
    held = held_of(source, optimizer)
    names = list(held["state_dict"])
    random.Random(0).shuffle(names)
    wide = copy.deepcopy(held)
    wide["optimizer"]["state"][3]["exp_avg"] = torch.zeros(2, 2)
    blocks = sorted(held["state_dict"], key=lambda n: (".blocks." in n, ".blocks.0." in n))  # shapes say nothing of it
    orders = [held | {"state_dict": {n: held["state_dict"][n] for n in order}} for order in (names, blocks)]
    for odd in (*orders, wide):
        on = going_on(saved(tmp_path, odd), ours())
        assert on.state.optimizer == {} and "optimizer" not in on.state.document
        assert on.state.document["foreign"]["level"] == "weights, average and epoch from OpenTAD"
        assert any("its moments are left, ours begin at zero" in line for line in on.remarks)
        assert torch.equal(on.state.model["head.cls_head.bias"], source.state_dict()["head.cls_head.bias"])


def test_what_trains_on_one_side_alone_is_said(tmp_path: Path) -> None:
    source = ours()
    optimizer = optimizer_of(source)
    stepped(source, optimizer)
    sink = ours()
    sink.neck.requires_grad_(False)
    put = copy.deepcopy(source)
    sink.neck.load_state_dict(put.neck.state_dict())
    on = going_on(saved(tmp_path, held_of(source, optimizer)), sink)
    assert any(line.startswith("R05 6 moments of what does not train here are left") for line in on.remarks)
    assert not any("neck" in name for name in on.state.optimizer)
    held = held_of(source, optimizer)
    del held["optimizer"]["state"][0]
    on = going_on(saved(tmp_path, held), ours())
    assert any("R05 1 trained parameters have no moments in the file" in line for line in on.remarks)


# -- what it stands on ------------------------------------------------------------------------------------------------


def test_other_frozen_weights_are_refused_with_the_way_to_take_the_files(tmp_path: Path) -> None:
    source = ours()
    path = saved(tmp_path, held_of(source, None))
    sink = ours()
    with torch.no_grad():
        sink.backbone.blocks[1].mlp.fc1.weight.mul_(1.01)  # type: ignore[union-attr,operator]
    with refused("A04", "convert", "--training.pretrained"):
        going_on(path, sink)
    assert going_on(path, ours()).epoch == 2


def test_a_base_in_four_bits_is_that_of_the_file_rounded(tmp_path: Path) -> None:
    path = saved(tmp_path, held_of(ours(), None))
    sink = ours()
    quantize_backbone(sink.backbone, "nf4")
    freeze_codes(sink)
    on = going_on(path, sink)
    assert "rounded" in on.state.document["foreign"]["level"] and any("8 frozen linears" in line for line in on.remarks)
    assert not any(part in name for part in (".attn.", ".mlp.") for name in on.state.model if "backbone" in name)
    other = ours()
    with torch.no_grad():
        other.backbone.blocks[1].mlp.fc2.weight.mul_(1.5)  # type: ignore[union-attr,operator]
    quantize_backbone(other.backbone, "nf4")
    freeze_codes(other)
    with refused("A04", "blocks.1.mlp.fc2"):
        going_on(path, other)


def freeze_codes(detector: Detector) -> None:
    """As a run over a base has it: codes are not the checkpoint's."""
    for module in detector.modules():
        if isinstance(module, QuantLinear):
            module.frozen_state = True  # type: ignore[assignment]


def codes_of(detector: Detector) -> dict[str, torch.Tensor]:
    """State with bitsandbytes keys, as an OpenTAD run over quantized linears writes it."""
    from tensorkeep.conversion.naming import opentad

    out: dict[str, torch.Tensor] = {}
    for name, tensor in detector.state_dict().items():
        if not name.endswith("weight_digest"):
            rest = ""
            for mark in (".weight.absmax", ".weight.quant_map", ".weight.nested", ".weight.quant_state"):
                if mark in name:
                    name, rest = name[: name.index(mark) + len(".weight")], name[name.index(mark) + len(".weight") :]
                    break
            out[f"module.{opentad.from_hf(name)}{rest}"] = tensor.clone()
    return out


@pytest.mark.parametrize("averaged", [False, True])
def test_bitsandbytes_keys_stay_with_the_base(tmp_path: Path, averaged: bool) -> None:
    source, sink = ours(), ours()
    for detector in (source, sink):
        quantize_backbone(detector.backbone, "nf4")
        freeze_codes(detector)
    state = codes_of(source)
    average = {
        n: t * 2 if t.is_floating_point() and ("adapter" in n or "backbone" not in n) else t.clone()
        for n, t in state.items()
    }
    if averaged:  # a decay that truncates: codes became other codes
        average |= {
            n: (t * 0.9).to(torch.uint8)
            for n, t in average.items()
            if t.dtype == torch.uint8 and "quant_state" not in n
        }
    held = held_of(ours(), None) | {"state_dict": state, "state_dict_ema": average}
    on = going_on(saved(tmp_path, held), sink)
    assert on.state.document["foreign"]["level"] == "weights, average and epoch from OpenTAD"
    assert all(torch.equal(t, 2 * source.get_parameter(n)) for n, t in on.state.ema.items())
    assert any("Q03" in line for line in on.remarks) is averaged
    with refused("Q01", "--quantize-backbone nf4"):
        going_on(tmp_path / "epoch_1.pth", ours())
    with torch.no_grad():
        sink.backbone.blocks[0].attn.qkv.weight[:4] += 1  # type: ignore[union-attr,index]
    with refused("A04", "qkv"):
        going_on(tmp_path / "epoch_1.pth", sink)


def test_seeds_adapters_and_lora_go_on_by_name(tmp_path: Path) -> None:
    for more in ({"adapter": AdapterConfig("qlora", lora_r=2)}, {"lora": LoraConfig(lora_r=2)}):
        config = replace(CONFIG, groups=(GroupRule("lora_*", 1e-4), GroupRule("adapter", 2e-4)))
        source = ours(**more)
        with pytest.raises(Exception, match="no tensor for"):
            to_opentad(source)  # upstream has no such names; the integration writes ours below OpenTAD's prefix
        state = {f"module.{_below(n)}": t.clone() for n, t in source.state_dict().items()}
        held = held_of(ours(), None) | {"state_dict": state, "state_dict_ema": state}
        on = going_on(saved(tmp_path, held), ours(**more), config)
        assert all(torch.equal(t, source.state_dict()[n]) for n, t in on.state.model.items())


def _below(name: str) -> str:
    swaps = (
        ("backbone.", "backbone.model.backbone."),
        ("neck.norms", "neck.fpn_norms"),
        ("head.", "rpn_head."),
        ("patch_embed.proj.", "patch_embed.projection."),
    )
    for old, new in swaps:
        name = name.replace(old, new, 1) if name.startswith(old) or old.startswith("patch") else name
    return name.replace("mlp.fc1.", "mlp.layers.0.0.").replace("mlp.fc2.", "mlp.layers.1.")


# -- what is refused, and said ----------------------------------------------------------------------------------------


def test_files_that_are_none_of_this_are_refused(tmp_path: Path) -> None:
    held = held_of(ours(), None)
    for odd, code, words in (
        ({k: v for k, v in held.items() if k != "epoch"}, "K01", ("epoch not in it", "--training.pretrained")),
        ({"epoch": 3}, "K01", ("state_dict not in it",)),
        (held | {"epoch": -2}, "K01", ("epoch is -2",)),
        (held | {"state_dict": held["state_dict"] | {"module.backbone.stem.weight": torch.zeros(1)}}, "K02", ("stem",)),
        (
            held | {"state_dict": held["state_dict"] | {"module.neck.fpn_norms.9.bias": torch.zeros(1)}},
            "K01",
            ("not in the run",),
        ),
        (
            held | {"state_dict": held["state_dict"] | {"module.rpn_head.cls_head.bias": torch.full((3,), torch.nan)}},
            "V01",
            ("cls_head",),
        ),
    ):
        with refused(code, *words):
            going_on(saved(tmp_path, odd), ours())


def junk(held: dict[str, Any], name: str) -> dict[str, Any]:
    held = copy.deepcopy(held)
    optimizer, schedule = held["optimizer"], held["scheduler"]
    changes: dict[str, Any] = {
        "step of words": lambda: optimizer["state"][0].update(step="x"),
        "step of many": lambda: optimizer["state"][0].update(step=torch.zeros(2)),
        "no moment": lambda: optimizer["state"][0].pop("exp_avg"),
        "whole moments": lambda: optimizer["state"][0].update(exp_avg=torch.zeros(1, dtype=torch.int64)),
        "moments of NaN": lambda: optimizer["state"][0].update(exp_avg=torch.full((1,), torch.nan)),
        "unknown index": lambda: optimizer["state"].update({10**6: optimizer["state"][0]}),
        "params of words": lambda: optimizer["param_groups"][0].update(params=["a", None]),
        "params as number": lambda: optimizer["param_groups"][0].update(params=7),
        "params twice": lambda: optimizer["param_groups"][1].update(params=optimizer["param_groups"][0]["params"]),
        "no groups": lambda: optimizer.update(param_groups=[]),
        "rates of words": lambda: optimizer["param_groups"][0].update(lr="x" * 10**5, weight_decay=[1]),
        "schedule of words": lambda: schedule.update(last_epoch="z", warmup_epoch=None, max_epoch=-1),
        "schedule of zero": lambda: schedule.update(last_epoch=0),
    }
    changes[name]()
    return held


@pytest.mark.parametrize(
    "name",
    [
        "step of words",
        "step of many",
        "no moment",
        "whole moments",
        "moments of NaN",
        "unknown index",
        "params of words",
        "params as number",
        "params twice",
        "no groups",
        "rates of words",
        "schedule of words",
        "schedule of zero",
    ],
)
def test_what_cannot_be_read_is_left_and_said(tmp_path: Path, name: str) -> None:
    source = ours()
    optimizer = optimizer_of(source)
    stepped(source, optimizer)
    on = going_on(saved(tmp_path, junk(held_of(source, optimizer), name)), ours())
    kept = name.startswith(("rates", "schedule"))
    assert bool(on.state.optimizer) is kept and len(on.state.model) > 50
    said = "lr 'x" if "rates" in name else "R02" if "schedule" in name else "begin at zero"
    assert any(said in line for line in on.remarks) and max(map(len, on.remarks)) < 400, on.remarks


def test_counters_of_older_torch_are_plain_numbers(tmp_path: Path) -> None:
    source = ours()
    optimizer = optimizer_of(source)
    stepped(source, optimizer)
    held = held_of(source, optimizer)
    for state in held["optimizer"]["state"].values():
        state["step"] = 3
    on = going_on(saved(tmp_path, held), ours())
    steps = [t for n, t in on.state.optimizer.items() if n.endswith("/step")]
    assert len(steps) > 50 and all(float(t) == 3.0 for t in steps)


def test_what_the_file_and_the_recipe_disagree_on_is_said_line_by_line(tmp_path: Path) -> None:
    source = ours()
    optimizer = optimizer_of(source)
    stepped(source, optimizer)
    path = saved(tmp_path, held_of(source, optimizer, each=6))
    other = replace(CONFIG, groups=(GroupRule("adapter", 5e-4),))
    text = "\n".join(
        continue_from(path, ours(), other, ScheduleConfig(warmup=2), 10, replace(TRAINING, epochs=2), base=BASE).remarks
    )
    for said in (
        "2 epochs of OpenTAD are 20 samples, 10 updates of 2",
        "R02 OpenTAD made 6 updates an epoch, these data and this batch make 5",
        "R04 warmup_epoch was 1 epochs, the recipe says 2",
        "R04 group 0 (backbone.blocks.0.adapter",
        "nothing is left to train",
        "R01 the file has no random states",
    ):
        assert said in text, said
    text = "\n".join(continue_from(path, ours(), CONFIG, SCHEDULE, 11, TRAINING, base=BASE, ema=False).remarks)
    assert "6 updates an epoch, its last one smaller" in text and "its average is left" in text


# -- a whole run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("av")
    return runs.dataset(tmp_path_factory.mktemp("synthetic") / "data")


def test_a_run_that_went_through_an_opentad_file_ends_where_it_would_have_ended(data: Path, tmp_path: Path) -> None:
    """Our own run at the end of an epoch, written as OpenTAD writes, and taken up again in another folder."""
    recipe = runs.recipe(data)
    straight, broken, after = tmp_path / "straight", tmp_path / "broken", tmp_path / "after"
    runs.trained(recipe, straight)
    job, loop = build(recipe, broken)
    assert len(job.data) == 4 and loop.updates == 8
    fit(job, broken, replace(loop, updates=4, evaluate_every=None))
    own = dict(job.model.named_parameters())
    optimizer = optimizer_of(job.model, config=recipe.optimizer)  # type: ignore[arg-type]
    for parameter, state in job.optimizer.state.items():
        optimizer.state[parameter] = state
    held = held_of(job.model, optimizer, epoch=1, each=2)  # type: ignore[arg-type]
    held["state_dict"] = {f"module.{n}": t for n, t in to_opentad(job.model).items()}
    theirs = theirs_of(job.model)  # type: ignore[arg-type]
    assert job.ema is not None
    held["state_dict_ema"] = held["state_dict"] | {f"module.{theirs[n]}": t for n, t in job.ema.tensors.items()}
    path = saved(tmp_path, held)

    convert(
        make_plan([read(path)], "hf", drop=["*.adapter.*"]), str(tmp_path / "base"), "hf"
    )  # the frozen weights, as the hint says
    again = runs.recipe(data, training__pretrained=str(tmp_path / "base"))
    job, loop = build(again, after)
    on = continue_from(path, job.model, again.optimizer, again.schedule, len(job.data), again.training, job.base)  # type: ignore[arg-type]
    outcome = fit(job, after, loop, resume=on.state)
    assert outcome.level == "weights, moments, average and epoch from OpenTAD" and outcome.step == 8
    wanted, found = (checkpoint.newest(folder) for folder in (straight, after))
    assert wanted is not None and found is not None and own
    for part in ("model", "optimizer", "ema"):
        mine, other = getattr(found[0], part), getattr(wanted[0], part)
        assert mine.keys() == other.keys() and all(torch.equal(mine[n], other[n]) for n in mine), part
    # from here the run has checkpoints of its own: the plain command goes on
    job, loop = build(again, after)
    assert fit(job, after, loop).level == "exact"


def test_stored_tensors_of_a_base_leave_codes_out() -> None:
    """What these tests stand on: a run over a base stores what trains and the buffers."""
    detector = ours()
    names = set(stored_tensors(detector, True)[0])
    assert {n for n, p in detector.named_parameters() if p.requires_grad} < names
    assert not any(".attn." in n or ".mlp.fc" in n for n in names if n.startswith("backbone"))
