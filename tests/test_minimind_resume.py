"""MiniMind's resume files: every moment under its parameter's name, every sample once, no gradient lost."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tensorkeep.adapters.lora import add_lora
from tensorkeep.errors import TensorkeepError
from tensorkeep.language.minimind._resume_file import read_resume, registered
from tensorkeep.language.minimind.continue_from import continue_from, model_config, order
from tensorkeep.training.batches import Stream
from tests.minimind_runs import HEAD, SIZES, held_of, rows, save, small, stopped, trained
from tests.parity.minimind_model import MiniMind, config_of
from tests.parity.minimind_resume import go_on, load, replay, resume_cases

KINDS = [("mm3", 0), ("mm3", 3), ("mm2", 0), ("mm2", 3)]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("kind", KINDS)
def test_every_moment_gets_its_parameter_s_name(tmp_path: Path, kind: tuple[str, int], prefix: str) -> None:
    model = small(*kind)
    optimizer = trained(model)
    resume = read_resume(save(tmp_path, held_of(model, optimizer, 0, 1, prefix=prefix)))
    assert (resume.generation, resume.tied, resume.adapter) == (kind[0], True, False)
    assert list(resume.moments) == [n for n, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        for slot in ("exp_avg", "exp_avg_sq"):
            kept = resume.view.tensor(resume.moments[name][slot])
            assert torch.equal(kept, optimizer.state[parameter][slot])
    assert resume.updates == 1 and resume.groups[0]["names"] == list(resume.moments)
    assert "R06" in [n.code for n in resume.notes]


def test_an_untied_head_has_moments_of_its_own(tmp_path: Path) -> None:
    model = small()
    model.lm_head.weight = nn.Parameter(torch.randn(24, 16))
    resume = read_resume(save(tmp_path, held_of(model, trained(model), 0, 1)))
    assert not resume.tied and list(resume.moments)[-1] == HEAD


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_whose_keys_were_sorted_is_named_all_the_same(tmp_path: Path, kind: tuple[str, int]) -> None:
    model = small(*kind)
    held = held_of(model, trained(model), 0, 1)
    names, state = list(held["model"].items()), held["model"]
    random.Random(1).shuffle(names)
    held["model"] = dict(names)
    resume = read_resume(save(tmp_path, held))
    assert list(resume.moments) == [n for n, _ in model.named_parameters()] and set(resume.weights) == set(state)
    assert any("order of" in n.message for n in resume.notes)


class Low(nn.Module):
    def __init__(self, of: nn.Linear, rank: int) -> None:
        super().__init__()
        self.A = nn.Linear(of.in_features, rank, bias=False)
        self.B = nn.Linear(rank, of.out_features, bias=False)


def with_lora(model: MiniMind, rank: int = 2) -> list[str]:
    """MiniMind's apply_lora as far as names go: a child of every square linear; the names that train."""
    for _, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module.in_features == module.out_features:
            module.lora = Low(module, rank)
    return [n for n, _ in model.named_parameters() if ".lora." in n]


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_run_has_moments_of_lora_alone_in_module_order(tmp_path: Path, kind: tuple[str, int]) -> None:
    model = small(*kind)
    names = with_lora(model)
    own = dict(model.named_parameters())
    optimizer = trained(model, [own[n] for n in names])
    resume = read_resume(save(tmp_path, held_of(model, optimizer, 0, 1), "lora_x_16_resume.pth"))
    assert resume.adapter and list(resume.moments) == names and len(names) == 8
    for name in names:
        kept = resume.view.tensor(resume.moments[name]["exp_avg"])
        assert torch.equal(kept, optimizer.state[own[name]]["exp_avg"])


def test_registration_order_is_the_model_s_own() -> None:
    for kind in KINDS:
        names = [n for n, _ in small(*kind).named_parameters()]
        assert registered(sorted(names), kind[0]) == names


def test_what_is_not_the_model_s_is_listed_and_a_scaler_is_read(tmp_path: Path) -> None:
    model = small()
    more = {"scheduler": {"T_max": 5}, "critic_model": {"value_head.weight": torch.ones(1, 16)}}
    scaler = {
        "scale": 1024.0,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 2000,
        "_growth_tracker": 3,
    }
    resume = read_resume(save(tmp_path, held_of(model, trained(model), 0, 1, **more) | {"scaler": scaler}))
    assert resume.extras == {"critic_model": ["critic_model.value_head.weight"], "scheduler": ["scheduler.T_max"]}
    assert sum("stays in the file" in n.message for n in resume.notes) == 2 and resume.scaler == scaler
    held = held_of(model, trained(model), 0, 1)
    del held["scaler"]
    assert read_resume(save(tmp_path, held)).scaler == {}


# -- going on -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("at", "accumulation"), [((1, 4), 2), ((1, 5), 2), ((0, 7), 4), ((1, 2), 3)])
def test_from_an_fp32_file_every_later_loss_is_the_uninterrupted_one(
    tmp_path: Path, at: tuple[int, int], accumulation: int
) -> None:
    file, after, _ = stopped(tmp_path, at, accumulation=accumulation)
    model, data = small(seed=9), rows()
    on = continue_from(file, model, len(data), 3, accumulation, epochs=2)
    lost = at[1] % accumulation
    assert on.position.again == 3 * lost and abs(on.optimizer["lr"] - 2e-3) < 1e-12
    windows = (8 - at[1] + lost) // accumulation  # of whole micro-batches, of which the epoch has 8
    seen = go_on(on, model, data, tmp_path / "run", on.state.document["step"] + windows)
    assert len(seen) == windows * accumulation
    fresh = seen[lost:]  # those before come again
    assert fresh == after[: len(fresh)]


@pytest.mark.parametrize("kind", [("mm3", 0), ("mm2", 3)])
def test_from_an_fp16_file_losses_agree_to_its_rounding(tmp_path: Path, kind: tuple[str, int]) -> None:
    file, after, _ = stopped(tmp_path, (1, 2), kind=kind, dtype=torch.float16)
    model, data = small(*kind, seed=9), rows()
    on = continue_from(file, model, len(data), 3, epochs=2)
    assert on.batching.accumulation == 2 and any(r.startswith("R06") for r in on.remarks)
    seen = go_on(on, model, data, tmp_path / "run", on.state.document["step"] + 3)
    assert [i for i, _ in seen] == [i for i, _ in after[:6]]
    gaps = [abs(a - b) for (_, a), (_, b) in zip(seen, after)]
    assert 0 < max(gaps) < 5e-3  # rounding is there, and is all there is


def test_old_files_that_stepped_a_micro_batch_early_are_known_by_adam_s_counter(tmp_path: Path) -> None:
    file, after, _ = stopped(tmp_path, (0, 5), kind=("mm2", 0), early=True)
    model, data = small("mm2", seed=9), rows()
    on = continue_from(file, model, len(data), 3, epochs=2)
    assert on.batching.early and on.position == (15, 0) and on.orders.keys() == {0}
    seen = go_on(on, model, data, tmp_path / "run", on.state.document["step"] + 1)
    assert seen == after[:2]


def test_every_sample_of_the_epoch_comes_once_and_the_next_epoch_is_ours(tmp_path: Path) -> None:
    file, _, _ = stopped(tmp_path, (0, 5), epochs=3)
    on = continue_from(file, small(), 26, 3, epochs=3)
    stream = Stream(11, 26, on.orders)
    before = order(0, 26, distributed=False)[: on.position.samples]
    rest = [i for _, i in stream.keys(on.position.samples, 26 - on.position.samples)]
    assert sorted(before + rest) == list(range(26))
    assert stream.keys(26, 26) == Stream(11, 26).keys(26, 26)
    assert on.updates == on.state.document["step"] + -(-(3 * 26 - on.position.samples) // 6)
    wider = continue_from(
        file, small(), 26, 3, 2, epochs=3, global_batch=12
    )  # another batch: the same rate where it ends alike
    step = on.state.document["step"]
    assert wider.batch == 12 and wider.schedule is not None and on.schedule is not None
    assert [wider.schedule(step + i, 1.0) for i in range(4)] == [on.schedule(step + 2 * i + 1, 1.0) for i in range(4)]


def test_the_same_command_again_goes_on_from_the_run_s_own_checkpoints(tmp_path: Path) -> None:
    file, _, _ = stopped(tmp_path, (1, 2))
    data, step = rows(), 7  # five steps in epoch 0, of which the last takes the micro-batch that is left
    whole = small(seed=9)
    on = continue_from(file, whole, 26, 3, epochs=2)
    step = on.state.document["step"]
    expected = go_on(on, whole, data, tmp_path / "whole", step + 3)
    seen = []
    for updates in (step + 1, step + 3):
        model = small(seed=9)
        seen += go_on(continue_from(file, model, 26, 3, epochs=2), model, data, tmp_path / "run", updates)
    assert seen == expected


def test_a_lora_run_goes_on_over_its_own_base_at_its_own_scale(tmp_path: Path) -> None:
    theirs = small()
    names = with_lora(theirs)
    own = dict(theirs.named_parameters())
    optimizer = trained(theirs, [own[n] for n in names])
    file = save(tmp_path, held_of(theirs, optimizer, 0, 3), "lora_x_16_resume.pth")

    def ours(alpha: float = 2.0, seed: int = 0) -> MiniMind:
        model = small(seed=seed)
        add_lora(model, ["q_proj", "o_proj"], r=2, alpha=alpha)
        return model

    model, base = ours(), {"digest": "0", "path": "base"}
    on = continue_from(file, model, 26, 3, 3, base=base)
    assert on.state.base == base and len(on.state.model) == 8
    for name in names:
        live = name.replace(".lora.A.weight", ".lora_A").replace(".lora.B.weight", ".lora_B")
        assert torch.equal(on.state.model[live], own[name].detach().half().float())
        assert torch.equal(on.state.optimizer[f"{live}/exp_avg"], optimizer.state[own[name]]["exp_avg"])
    for code, other in (("A02", ours(alpha=4.0)), ("A04", ours(seed=3))):
        with pytest.raises(TensorkeepError) as caught:
            continue_from(file, other, 26, 3, 3, base=base)
        assert caught.value.code == code


def test_the_config_of_a_file_is_what_transformers_would_build_and_never_another_model(tmp_path: Path) -> None:
    for kind, expected in ((("mm3", 0), "qwen3"), (("mm3", 3), "qwen3_moe"), (("mm2", 0), "llama")):
        model = small(*kind)
        moe = "_moe" if kind[1] else ""
        file = save(tmp_path, held_of(model, trained(model), 0, 1), f"pretrain_16{moe}_resume.pth")
        config = model_config(file)
        assert (config["model_type"], config["hidden_size"], config["vocab_size"]) == (expected, 16, 24)
    model = small("mm2", 3)
    with pytest.raises(TensorkeepError, match="shared experts") as caught:
        model_config(save(tmp_path, held_of(model, trained(model), 0, 1), "pretrain_16_moe_resume.pth"))
    assert caught.value.code == "K07"


# -- damaged and foreign files ------------------------------------------------------------------------------------


def spoil(what: str, held: dict[str, Any]) -> None:
    state, group = held["optimizer"]["state"], held["optimizer"]["param_groups"][0]
    if what in held:
        del held[what]
    elif what == "shape":
        state[3]["exp_avg"] = torch.zeros(5, 5)
    elif what == "slot":
        del state[2]["exp_avg_sq"]
    elif what == "beyond":
        state[99] = state[0]
    elif what == "rate":
        group["lr"] = float("nan")
    elif what == "numbers":
        group["params"] = group["params"][::-1]
    elif what == "fewer":
        group["params"] = group["params"][:-3]
        for i in list(state)[-3:]:
            del state[i]
    elif what == "position":
        held["step"] = -4
    elif what == "counter":
        state[0]["step"] = torch.tensor(-1.0)
    elif what == "conflict":
        held["model"][HEAD] = held["model"][HEAD] + 1
    elif what == "name":
        held["model"]["model.layers.0.mlp.odd.weight"] = held["model"].pop("model.layers.0.mlp.up_proj.weight")
    elif what == "old":
        held["model"] = {"tok_embeddings.weight": torch.ones(4, 4)}


DAMAGE = {
    "model": "K01",
    "optimizer": "K01",
    "epoch": "K01",
    "step": "K01",
    "shape": "S01",
    "slot": "R05",
    "beyond": "R05",
    "numbers": "R05",
    "rate": "R05",
    "fewer": "R05",
    "position": "F07",
    "counter": "F07",
    "conflict": "T01",
    "name": "K02",
    "old": "K06",
}


@pytest.mark.parametrize(("what", "code"), DAMAGE.items())
def test_a_file_that_is_not_whole_stops_with_one_error(tmp_path: Path, what: str, code: str) -> None:
    model = small()
    held = held_of(model, trained(model), 0, 1)
    spoil(what, held)
    with pytest.raises(TensorkeepError) as caught:
        read_resume(save(tmp_path, held))
    assert caught.value.code == code and "\n" not in caught.value.line


def test_truncated_flipped_and_non_finite_files_are_refused(tmp_path: Path) -> None:
    model = small()
    held = held_of(model, trained(model), 0, 1)
    file = save(tmp_path, held)
    data = bytearray(file.read_bytes())
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(TensorkeepError):
        continue_from(file, small(), 26, 3, 1)
    raw = held["model"]["model.norm.weight"].numpy().tobytes()
    data[data.index(raw) + 3] ^= 1
    file.write_bytes(data)
    with pytest.raises(TensorkeepError) as caught:
        continue_from(file, small(), 26, 3, 1)
    assert caught.value.code == "F03"
    held["model"]["model.norm.weight"][2] = float("inf")
    with pytest.raises(TensorkeepError) as caught:
        continue_from(save(tmp_path, held), small(), 26, 3, 1)
    assert caught.value.code == "V01" and "model.norm.weight" in caught.value.line


def test_another_model_is_refused_with_the_names_that_differ(tmp_path: Path) -> None:
    model = small("mm2", 3)
    file = save(tmp_path, held_of(model, trained(model), 0, 1), "pretrain_16_moe_resume.pth")
    with pytest.raises(TensorkeepError, match="shared experts"):
        continue_from(file, small("mm3", 3), 26, 3, 1)
    dense = save(tmp_path, held_of(small(), trained(small()), 0, 1))
    with pytest.raises(TensorkeepError, match="q_norm"):
        continue_from(dense, small("mm2"), 26, 3, 1)
    wide = MiniMind({**SIZES, "experts": 0, "qk_norm": True, "width": 32})
    with pytest.raises(TensorkeepError, match=r"\[32, 16\].*\[24, 16\]") as caught:
        continue_from(dense, wide, 26, 3, 1)
    assert caught.value.code == "S01"
    untied = small()
    untied.lm_head.weight = nn.Parameter(torch.randn(24, 16))
    with pytest.raises(TensorkeepError, match="no optimizer state of lm_head"):
        continue_from(dense, untied, 26, 3, 1)


def test_an_accumulation_that_adam_did_not_count_is_said_and_none_at_all_is_asked_for(tmp_path: Path) -> None:
    model = small()
    optimizer = trained(model)
    file = save(tmp_path, held_of(model, optimizer, 2, 4))
    with pytest.raises(TensorkeepError, match="Adam counted 1 steps by epoch 2 step 4") as caught:
        continue_from(file, model, 26, 3)
    assert "accumulation_steps" in str(caught.value.hint)
    on = continue_from(file, model, 26, 3, 2)
    assert any("by step alone" in r for r in on.remarks) and on.position.samples == 52 + 12


# -- the parity runner ----------------------------------------------------------------------------------------------


def test_the_parity_runner_on_a_folder_of_another_shape(tmp_path: Path) -> None:
    """Stopped inside an accumulation in the first epoch, it goes back to the last step and replays the rest."""
    place, kind, data = tmp_path / "mm2_other", ("mm2", 3), rows()
    file, _, _ = stopped(place / "checkpoints", (0, 5), accumulation=4, kind=kind, dtype=torch.float16)
    file.rename(file.with_name("pretrain_16_moe_resume.pth"))
    file = file.with_name("pretrain_16_moe_resume.pth")
    known = {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "num_experts_per_tok": 2,
        "aux_loss_alpha": 5e-4,
        "hidden_size": 16,
    }
    (place / "config.json").write_text(json.dumps(known))
    whole, again = small(*kind), small(*kind)
    assert config_of(known, {n: tuple(t.shape) for n, t in whole.state_dict().items()})["experts"] == 3
    after = replay(whole, torch.optim.AdamW(whole.parameters(), lr=2e-3), data, 3, 4, 2, 2e-3)
    held = torch.load(file, weights_only=True)
    resumed = replay(again, load(held, again, 2e-3), data, 3, 4, 2, 2e-3, start=(0, 5))
    rowed = [[{"idx": i, "loss": x} for i, x in seen] for seen in (after, resumed)]
    traj = {"uninterrupted": rowed[0], "resumed_by_original": rowed[1], "interrupted_after_microbatches": 5}
    (place / "traj.json").write_text(json.dumps(traj))
    save_file({"input_ids": data.ids, "labels": data.labels}, place / "data.safetensors")
    outcomes = list(resume_cases(tmp_path))
    assert [o.line for o in outcomes if not o.figure <= o.tolerance] == [] and len(outcomes) == 5
