"""MiniMind-3 without tied head: resumed, trained on, exported and back, with each moment at its own parameter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tensorkeep.conversion.execution import convert
from tensorkeep.conversion.planning import make_plan
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import read
from tensorkeep.language.minimind.continue_from import continue_from, model_config
from tensorkeep.language.minimind.export import export_resume
from tensorkeep.models.language_model import silent
from tensorkeep.training import saver as checkpoint
from tensorkeep.training.live_state import put_tensors
from tests.minimind_runs import EMBEDDING, HEAD, held_of, save, small, trained
from tests.parity.minimind_model import MiniMind
from tests.parity.minimind_resume import load


def untied(kind: str = "mm3", experts: int = 0, seed: int = 0) -> MiniMind:
    """MiniMind's module with a head of its own, as `tie_word_embeddings: false` makes it."""
    model = small(kind, experts, seed=seed)
    draw = torch.Generator().manual_seed(seed + 7)
    model.lm_head.weight = nn.Parameter(torch.randn(model.lm_head.weight.shape, generator=draw) * 0.02)
    return model


def resumed(tmp_path: Path, experts: int = 0) -> tuple[MiniMind, torch.optim.Optimizer, Path]:
    """A trained untied model, its optimizer, and MiniMind's resume file of both in float32."""
    model = untied(experts=experts)
    optimizer = trained(model)
    name = f"pretrain_16{'_moe' if experts else ''}_resume.pth"
    return model, optimizer, save(tmp_path, held_of(model, optimizer, 0, 1, torch.float32), name)


@pytest.mark.parametrize("experts", [0, 3])
def test_each_moment_is_its_parameter_s_in_transformers_model_and_back(tmp_path: Path, experts: int) -> None:
    import transformers

    model, optimizer, file = resumed(tmp_path, experts)
    config = model_config(file)
    assert config["tie_word_embeddings"] is False
    with silent():
        live = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    assert live.lm_head.weight is not live.model.embed_tokens.weight
    on = continue_from(file, live, 26, 3, 1)
    put_tensors(live, on.state.model, base=False)
    ids = torch.arange(12)[None] % 24
    assert torch.allclose(live(ids).logits, model(ids), atol=1e-5)
    moments = {n: optimizer.state[p] for n, p in model.named_parameters()}
    assert len(moments) == len({id(p) for p in model.parameters()})
    if not experts:
        for name, slots in moments.items():
            for slot in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(on.state.optimizer[f"{name}/{slot}"], slots[slot]), name

    on.state.document |= {"batch": 3, "data": {"length": 26}}
    on.state.document["optimizer"]["groups"] = [{"lr": 1e-3, "betas": [0.9, 0.999], "names": []}]
    checkpoint.save(tmp_path / "run", on.state)
    made = export_resume(tmp_path / "run", tmp_path / "back" / file.name)
    held = torch.load(made.path, weights_only=True)
    theirs = untied(experts=experts, seed=3)
    back = load(held, theirs, 1e-3)
    for (name, mine), (other, parameter) in zip(model.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other and torch.equal(parameter.detach(), mine.detach().half().float()), name
        for slot in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(back.state[parameter][slot], moments[name][slot]), name
    assert not torch.equal(held["model"][HEAD], held["model"][EMBEDDING])


def test_weights_go_to_hf_and_back_with_two_tensors(tmp_path: Path) -> None:
    import transformers

    model, _, file = resumed(tmp_path)
    convert(make_plan([read(str(file))], "hf"), str(tmp_path / "hf"), "hf")
    with silent():
        live, said = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "hf", dtype=torch.float32, output_loading_info=True
        )
    assert not any(said.values())
    ids = torch.arange(12)[None] % 24
    assert torch.allclose(live.eval()(ids).logits, model(ids), atol=1e-5)
    plan = make_plan([read(str(tmp_path / "hf"))], "pth", naming="minimind")
    assert not [n for n in plan.notes if n.code == "T01"]
    convert(plan, str(tmp_path / "back"), "pth")
    (back,) = (tmp_path / "back").glob("*.pth")
    held = torch.load(back, weights_only=True)
    assert all(torch.equal(t, held[n]) for n, t in model.state_dict().items()) and len(held) == len(model.state_dict())


def test_an_earlier_minimind_that_always_ties_is_refused(tmp_path: Path) -> None:
    model = untied("mm2")
    on = continue_from(save(tmp_path, held_of(model, trained(model), 0, 1, torch.float32)), model, 26, 3, 1)
    on.state.document |= {"batch": 3, "data": {"length": 26}}
    on.state.document["optimizer"]["groups"] = [{"lr": 1e-3, "names": []}]
    checkpoint.save(tmp_path / "run", on.state)
    with pytest.raises(TensorkeepError, match="head of its own") as caught:
        export_resume(tmp_path / "run", tmp_path / "out_16_resume.pth")
    assert caught.value.code == "T01"
