"""A checkpoint written as MiniMind's resume file goes on there as it does here, but for fp16; losses are told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tensorkeep.errors import TensorkeepError
from tensorkeep.language.minimind._resume_file import read_resume
from tensorkeep.language.minimind.continue_from import continue_from
from tensorkeep.language.minimind.export import export_resume
from tensorkeep.training import saver as checkpoint
from tensorkeep.training.distributed import World
from tensorkeep.training.live_state import put_tensors
from tensorkeep.training.saver import State
from tests.minimind_runs import EMBEDDING, held_of, rows, save, small, stopped, trained
from tests.parity.minimind_model import MiniMind
from tests.parity.minimind_resume import go_on, load, replay
from tests.training import ranks


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Stacked(nn.Module):
    """A model whose experts lie in one tensor, as transformers 5 has them."""

    def __init__(self, of: MiniMind) -> None:
        super().__init__()
        self.model, self.lm_head = of.model, of.lm_head
        for layer in self.model.layers:
            experts = [dict(e.named_parameters()) for e in layer.mlp.experts]
            gates = [torch.cat([e["gate_proj.weight"], e["up_proj.weight"]]) for e in experts]
            layer.mlp.experts = nn.Module()
            layer.mlp.experts.gate_up_proj = nn.Parameter(torch.stack(gates).detach())
            layer.mlp.experts.down_proj = nn.Parameter(torch.stack([e["down_proj.weight"] for e in experts]).detach())


def save_in_shards(run: Path, state: State) -> None:
    """Save a state as two ranks would that have it in shards of rows."""

    def work(world: World) -> None:
        mesh = init_device_mesh("cpu", (2,))

        def spread(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {n: distribute_tensor(t, mesh, [Shard(0)]) if t.dim() else t for n, t in tensors.items()}

        saver = checkpoint.Saver(run, world=world)
        saver.save(replace(state, model=spread(state.model), optimizer=spread(state.optimizer)))
        saver.close()

    assert ranks(2, work) == [0, 0]


def test_stacked_experts_get_stacked_moments_and_go_back_apart(tmp_path: Path) -> None:
    model = small("mm3", 3)
    optimizer = trained(model)
    file = save(tmp_path, held_of(model, optimizer, 0, 1, torch.float32), "pretrain_16_moe_resume.pth")
    expected = Stacked(small("mm3", 3)).state_dict()
    stacked = Stacked(small("mm3", 3, seed=4))
    on = continue_from(file, stacked, 26, 3, 1)
    put_tensors(stacked, on.state.model, base=False)
    wanted = Stacked(model).state_dict()
    assert all(torch.equal(t, wanted[n]) for n, t in stacked.state_dict().items()) and wanted.keys() == expected.keys()
    own = read_resume(file)
    name = "model.layers.1.mlp.experts"
    first = own.view.tensor(own.moments[f"{name}.2.up_proj.weight"]["exp_avg"])
    moment = on.state.optimizer[f"{name}.gate_up_proj/exp_avg"]
    assert moment.shape == (3, 24, 16) and torch.equal(moment[2, 12:], first)

    on.state.document |= {"batch": 3, "data": {"length": 26}}
    on.state.document["optimizer"]["groups"] = [{"lr": 1e-3, "betas": [0.9, 0.999], "names": []}]
    checkpoint.save(tmp_path / "run", on.state)
    export_resume(tmp_path / "run", tmp_path / "back_16_moe_resume.pth")
    back, then = (torch.load(f, weights_only=True) for f in (tmp_path / "back_16_moe_resume.pth", file))
    assert back["model"].keys() == then["model"].keys()
    assert all(torch.equal(t, then["model"][n].half()) for n, t in back["model"].items())
    assert back["optimizer"]["state"].keys() == then["optimizer"]["state"].keys()
    for i, state in then["optimizer"]["state"].items():
        assert all(torch.equal(back["optimizer"]["state"][i][slot], value) for slot, value in state.items())

    save_in_shards(tmp_path / "shards", on.state)
    export_resume(tmp_path / "shards", tmp_path / "shards_16_moe_resume.pth")
    assert (tmp_path / "shards_16_moe_resume.pth").read_bytes() == (tmp_path / "back_16_moe_resume.pth").read_bytes()


@pytest.mark.parametrize("kind", [("mm3", 0), ("mm2", 0)])
def test_minimind_goes_on_from_what_we_wrote_as_we_do_ourselves(tmp_path: Path, kind: tuple[str, int]) -> None:
    file, _, _ = stopped(tmp_path, (1, 2), kind=kind)
    model, data = small(*kind, seed=9), rows()
    on = continue_from(file, model, 26, 3, epochs=2)
    step = on.state.document["step"]
    go_on(on, model, data, tmp_path / "run", step + 1)
    made = export_resume(tmp_path / "run", tmp_path / "pretrain_16_resume_out" / "pretrain_16_resume.pth")
    assert (made.epoch, made.step, made.world_size) == (1, 4, 1)
    assert [n.code for n in made.notes] == ["V02"]  # the order of this epoch is MiniMind's, so nothing comes twice

    held = torch.load(made.path, weights_only=True)
    assert list(held) == ["model", "optimizer", "epoch", "step", "world_size", "wandb_id", "scaler"]
    original = torch.load(file, weights_only=True)
    assert list(held["model"]) == [n for n in original["model"] if n in held["model"]]
    assert held["model"].keys() == original["model"].keys() and {t.dtype for t in held["model"].values()} == {
        torch.float16
    }
    assert held["optimizer"]["param_groups"][0]["params"] == original["optimizer"]["param_groups"][0]["params"]
    theirs = small(*kind, seed=3)
    optimizer = load(held, theirs, 2e-3)
    there = replay(theirs, optimizer, data, 3, 2, 2, 2e-3, start=(held["epoch"], held["step"]), stop=(1, 8))
    again = small(*kind, seed=9)
    here = go_on(continue_from(file, again, 26, 3, epochs=2), again, data, tmp_path / "run", step + 3)
    assert [i for i, _ in there] == [i for i, _ in here]
    assert max(abs(a - b) for (_, a), (_, b) in zip(there, here)) < 2e-3

    state, _, _ = checkpoint.newest(tmp_path / "run") or pytest.fail("no checkpoint")
    assert state.document["samples"] == 26 + 24
    for name, slots in read_resume(made.path).moments.items():
        moment = read_resume(made.path).view.tensor(slots["exp_avg"])
        assert moment.dtype == torch.float32 and moment.shape == state.optimizer[f"{name}/exp_avg"].shape


def test_an_export_says_what_it_cannot_hold_and_refuses_what_fp16_cannot(tmp_path: Path) -> None:
    model = small()
    on = continue_from(save(tmp_path, held_of(model, trained(model), 0, 1, torch.float32)), model, 26, 3, 1)
    state = on.state
    state.document |= {"samples": 26 + 8, "batch": 6, "data": {"length": 26}, "scaler": {"scale": 2.0}}
    groups = [{"lr": 1e-3, "weight_decay": 0.0, "names": ["a"]}, {"lr": 1e-3, "weight_decay": 0.1, "names": ["b", "c"]}]
    state.document["optimizer"]["groups"] = groups
    checkpoint.save(tmp_path / "run", state)
    out = tmp_path / "elsewhere.pth"
    made = export_resume(tmp_path / "run", out, batch=3)
    assert (made.epoch, made.step) == (1, 2)
    said = " ".join(n.message for n in made.notes)
    assert "2 samples beyond step 2" in said and "shuffles this epoch its own way" in said
    assert "weight_decay as in the largest" in said and "_16_resume.pth" in said
    held = torch.load(out, weights_only=True)
    assert held["scaler"] == {"scale": 2.0} and held["optimizer"]["param_groups"][0]["weight_decay"] == 0.1
    with pytest.raises(TensorkeepError, match="exists already"):
        export_resume(tmp_path / "run", out)

    state.model[EMBEDDING] = torch.full_like(state.model[EMBEDDING], 7e4)
    checkpoint.save(tmp_path / "big", state)
    with pytest.raises(TensorkeepError, match="beyond fp16") as caught:
        export_resume(tmp_path / "big", tmp_path / "big_16_resume.pth")
    assert caught.value.code == "V02" and not list(tmp_path.glob("*big_16*"))
    with pytest.raises(TensorkeepError, match="is not a run of tensorkeep"):
        export_resume(tmp_path, tmp_path / "none_16_resume.pth")
