"""LoRA over dense and quantized linears: identity at step 0, PEFT's gradients, exact merging, names that stay."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tensorkeep.adapters.files import adapter_state, load_adapter, quantization, save_adapter
from tensorkeep.adapters.lora import add_lora, layers, merge_, merged, unmerge_
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import read
from tensorkeep.quantization.loading import load_quantized
from tensorkeep.quantization.modules import model_sizes, quantize_

KINDS = ["dense", "nf4", "fp4", "int8"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(32, 48), nn.Linear(32, 48, bias=False)
        self.down_proj = nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down_proj(torch.tanh(self.q_proj(x)) * self.v_proj(x))
        return out


class Model(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.lm_head = nn.LayerNorm(32), nn.Linear(32, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.lm_head(self.norm(x))
        return out


def model(kind: str = "dense", seed: int = 0) -> Model:
    made = Model(seed).requires_grad_(False)
    if kind != "dense":
        quantize_(made, kind)  # type: ignore[arg-type]
    return made


def adapted(kind: str = "dense", seed: int = 0, wake: bool = True, **options: Any) -> Model:
    made = model(kind, seed)
    add_lora(made, ["*_proj"], **{"r": 4, "alpha": 8, **options})
    if wake:
        with torch.no_grad():
            for layer in layers(made).values():
                layer.lora_B.normal_()
    return made


X = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))


# -- putting it on ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_bitwise_unchanged_at_step_0(kind: str, autocast: bool, dropout: float) -> None:
    made = model(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        before = made(X)
        add_lora(made, "all-linear", r=4, dropout=dropout)
        assert torch.equal(made.train()(X), before) and torch.equal(made.eval()(X), before)


def test_names_of_the_base_stay_and_only_the_update_trains() -> None:
    made = model()
    before, pointers = set(made.state_dict()), {n: p.data_ptr() for n, p in made.named_parameters()}
    names = add_lora(made, ["q_proj", "layers.1.down_proj"], r=4)
    assert names == ["layers.0.q_proj", "layers.1.q_proj", "layers.1.down_proj"]
    assert set(made.state_dict()) - before == {f"{n}.lora_{half}" for n in names for half in "AB"}
    assert all(p.data_ptr() == pointers[n] for n, p in made.named_parameters() if n in pointers)
    assert {n for n, p in made.named_parameters() if p.requires_grad} == set(made.state_dict()) - before
    assert {p.dtype for p in made.parameters() if p.requires_grad} == {torch.float32}
    assert model_sizes(made).trainable == 2 * 4 * (32 + 48) + 4 * (48 + 32)


def test_ranks_and_alphas_follow_their_patterns() -> None:
    made = model()
    add_lora(
        made,
        "all-linear",
        r=4,
        alpha=8,
        rank_pattern={"layers.1.*": 2},
        alpha_pattern={"v_proj": 6},
        exclude=["down_proj"],
    )
    found = {n: (m.r, m.alpha, m.scale) for n, m in layers(made).items()}
    assert found == {
        "layers.0.q_proj": (4, 8, 2),
        "layers.0.v_proj": (4, 6, 1.5),
        "layers.1.q_proj": (2, 8, 4),
        "layers.1.v_proj": (2, 6, 3),
    }
    rs = adapted(rslora=True, alpha=8)
    assert {m.scale for m in layers(rs).values()} == {4.0}  # 8 / sqrt(4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"targets": ["q_porj"]}, "did you mean q_proj"),
        ({"targets": ["*_proj"], "rank_pattern": {"k_proj": 2}}, "'k_proj' fits no linear"),
        ({"targets": ["*_proj"], "exclude": ["norm"]}, "'norm' fits no linear"),
        ({"targets": ["q_proj"], "exclude": ["q_proj"]}, "no linear is left"),
        ({"targets": ["q_proj"], "kind": "dora"}, "get_peft_model"),
        ({"targets": ["q_proj"], "r": 0}, "r=0"),
    ],
)
def test_what_cannot_be_adapted_is_refused_by_name(options: dict[str, Any], match: str) -> None:
    with pytest.raises(TensorkeepError, match=match):
        add_lora(model(), **options)
    with pytest.raises(TensorkeepError, match="wrap it"):
        add_lora(nn.Linear(4, 4), ["*"])


def test_a_shared_linear_stays_shared() -> None:
    made = nn.ModuleDict({"a": nn.Linear(4, 4)})
    made["b"] = made["a"]
    add_lora(made, ["a"], r=2)
    assert made["a"] is made["b"] and len(layers(made)) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_deepcopy_pickle_and_one_compiled_graph(kind: str) -> None:
    made = adapted(kind)
    wanted = made(X)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(other(X), wanted)
        with torch.no_grad():
            next(iter(layers(other).values())).lora_A.zero_()
    assert torch.equal(made(X), wanted)
    made.layers = made.layers[:1]  # each further one is traced alike, for half a second
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(X), made(X), atol=1e-6)


# -- gradients --------------------------------------------------------------------------------------------------------


def run(made: nn.Module, autocast: bool) -> list[Tensor]:
    """Output, then the gradients of A and B layer by layer."""
    made.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = made(X).float()
    out.square().sum().backward()
    grads = [p.grad for n, p in made.named_parameters() if "lora_" in n and p.grad is not None]
    assert {g.dtype for g in grads} == {torch.float32} and len(grads) == 12
    return [out.detach(), *grads]


def apart(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, wanted)]


@pytest.mark.parametrize("rslora", [False, True])
def test_outputs_and_gradients_are_those_of_peft(rslora: bool) -> None:
    peft = pytest.importorskip("peft")
    ours = adapted(rslora=rslora)
    with torch.no_grad():
        for layer in layers(ours).values():
            layer.lora_B *= 0.05
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], use_rslora=rslora)
    theirs = peft.get_peft_model(Model(), config)
    own = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, tensor in adapter_state(ours).items():
            own[name.replace(".weight", ".default.weight")].copy_(tensor)
    exact = run(theirs, autocast=False)
    assert max(apart(run(ours, autocast=False), exact)) < 2e-6
    # under autocast both round to bfloat16, in other places; ours must not be the worse way
    mine, peers = apart(run(ours, autocast=True), exact), apart(run(theirs, autocast=True), exact)
    assert sum(mine) < 1.2 * sum(peers)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_autograd_on_the_dense_weight(kind: str) -> None:
    layer: Any = layers(adapted(kind))["layers.0.q_proj"]
    weight = layer.weight if kind == "dense" else layer.dequantize()
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    a, b = layer.lora_A.detach().clone().requires_grad_(), layer.lora_B.detach().clone().requires_grad_()
    grad = torch.randn(2, 5, 48)
    layer(x).backward(grad)
    (nn.functional.linear(y, weight, layer.bias) + layer.scale * (y @ a.T) @ b.T).backward(grad)
    for mine, wanted in ((x.grad, y.grad), (layer.lora_A.grad, a.grad), (layer.lora_B.grad, b.grad)):
        assert (mine - wanted).norm() <= 1e-6 * wanted.norm()


def test_dropout_acts_on_the_update_alone_and_only_in_training() -> None:
    made = adapted(dropout=0.5)
    layer: Any = layers(made)["layers.0.v_proj"]
    torch.manual_seed(3)
    out = layer(X)
    torch.manual_seed(3)
    wanted = (
        nn.functional.linear(X, layer.weight)
        + layer.scale * nn.functional.dropout(X, 0.5) @ layer.lora_A.T @ layer.lora_B.T
    )
    assert torch.allclose(out, wanted, atol=1e-5)
    assert torch.equal(made.eval()(X), made(X))
    layer.train()(X).sum().backward()
    assert layer.lora_A.grad.abs().sum() > 0 and layer.weight.grad is None


def test_nothing_but_the_input_and_its_small_product_is_kept() -> None:
    layer, x = layers(adapted("nf4"))["layers.0.q_proj"], X.clone().requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    states = {t.data_ptr() for t in layer.buffers()}
    activations = [t for t in kept if t.data_ptr() not in states]
    # x [10, 32], x A^T [10, 4], A [4, 32], B [48, 4]
    assert sorted(t.numel() for t in activations) == sorted([X.numel(), 10 * 4, 4 * 32, 48 * 4])


def test_a_linear_that_trains_beside_its_update_gets_both_gradients() -> None:
    made = adapted()
    made.layers[0].q_proj.weight.requires_grad_()
    made(X).sum().backward()
    assert made.layers[0].q_proj.weight.grad is not None and made.layers[0].q_proj.lora_A.grad is not None


# -- merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_merged_logits_equal_adapted_ones_and_unmerging_is_exact(kind: str) -> None:
    made = adapted(kind).eval()
    before, state = made(X), {k: v.clone() for k, v in made.state_dict().items()}
    with pytest.raises(ZeroDivisionError), merged(made):
        inside = made(X)
        assert made.state_dict().keys() == state.keys()
        raise ZeroDivisionError
    assert (inside - before).norm() <= 2e-6 * before.norm() and not torch.equal(inside, before)
    assert torch.equal(made(X), before)
    assert all(torch.equal(v, state[k]) for k, v in made.state_dict().items())


def test_merging_twice_training_merged_and_merging_nothing_are_errors() -> None:
    made = adapted("nf4")
    merge_(made)
    with pytest.raises(TensorkeepError, match="is merged already"):
        merge_(made)
    with pytest.raises(TensorkeepError, match="unmerge_"):
        made(X)
    assert len(unmerge_(made)) == 6 and unmerge_(made) == []
    with pytest.raises(TensorkeepError, match="no LoRA layers"):
        merge_(model())


def test_quantizing_under_lora_keeps_the_update() -> None:
    made = adapted().eval()
    state = adapter_state(made)
    quantize_(made, "nf4")
    wanted = adapted("nf4").eval()
    assert torch.equal(made(X), wanted(X))
    assert all(torch.equal(v, state[k]) for k, v in adapter_state(made).items())


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_comes_back_bitwise_on_its_own_base_alone(kind: str, tmp_path: Path) -> None:
    made = adapted(kind).eval()
    folder = save_adapter(made, tmp_path / "adapter", base_digest="0" * 32, base="base")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 4 and not {"kind", "base_digest"} & set(config)
    config = read(folder).metadata["adapter"]  # what PEFT has no field for is in the header of the weights
    assert config["kind"] == "lora" and config["base_digest"] == "0" * 32
    assert config["quantization"] == quantization(made)
    fresh = adapted(kind, wake=False).eval()
    load_adapter(fresh, folder, base_digest="0" * 32)
    assert torch.equal(fresh(X), made(X))
    for options, shown in (({"base_digest": "1" * 32}, f"{'0' * 32}.*{'1' * 32}"), ({}, "nothing says")):
        with pytest.raises(TensorkeepError, match=f"A04.*{shown}"):
            load_adapter(fresh, folder, **options)
    load_adapter(fresh, folder, allow_other_base=True)
    other = adapted("int8" if kind != "int8" else "nf4")
    with pytest.raises(TensorkeepError, match=r"A04.*was trained on"):
        load_adapter(other, folder, base_digest="0" * 32)
    with pytest.raises(TensorkeepError, match="exists already"):
        save_adapter(made, folder)


def test_peft_loads_the_tensors_and_the_config_we_write(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    made = adapted(rank_pattern={"layers.1.q_proj": 2}, alpha_pattern={"layers.0.v_proj": 3}).eval()
    folder = save_adapter(made, tmp_path / "adapter", task=None)
    config = json.loads((folder / "adapter_config.json").read_text())
    theirs = peft.get_peft_model(Model(), peft.LoraConfig(**{k: v for k, v in config.items() if k != "peft_type"}))
    result = peft.set_peft_model_state_dict(theirs, load_file(folder / "adapter_model.safetensors"))
    assert not result.unexpected_keys and not [k for k in result.missing_keys if "lora_" in k]
    assert torch.allclose(theirs.eval()(X), made(X), atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    fresh = adapted(wake=False, rank_pattern={"layers.1.q_proj": 2}, alpha_pattern={"layers.0.v_proj": 3}).eval()
    load_adapter(fresh, tmp_path / "theirs")
    assert torch.equal(fresh(X), made(X))


def test_adapters_written_before_0_2_are_read(tmp_path: Path) -> None:
    made = adapted("nf4").eval()
    folder = save_adapter(made, tmp_path / "adapter", base_digest="0" * 32)
    document = read(folder).metadata["adapter"]
    save_file(load_file(folder / "adapter_model.safetensors"), folder / "adapter.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_config.json").write_text(json.dumps(document))  # with the base and how it was quantized
    fresh = adapted("nf4", wake=False).eval()
    load_adapter(fresh, folder, base_digest="0" * 32)
    assert torch.equal(fresh(X), made(X))
    with pytest.raises(TensorkeepError, match="A04"):
        load_adapter(fresh, folder, base_digest="1" * 32)


def test_adapters_of_other_names_ranks_and_scales_are_refused_and_nothing_is_copied(tmp_path: Path) -> None:
    folder = save_adapter(adapted(), tmp_path / "adapter")
    for options, code in (
        ({"r": 2}, "A01"),
        ({"alpha": 16}, "A02"),
        ({"rslora": True}, "A02"),
        ({"exclude": ["v_proj"]}, "A01"),
    ):
        fresh = adapted(wake=False, **options)
        before = {k: v.clone() for k, v in adapter_state(fresh).items()}
        with pytest.raises(TensorkeepError, match=code):
            load_adapter(fresh, folder)
        assert all(torch.equal(v, before[k]) for k, v in adapter_state(fresh).items())
    (folder / "adapter_config.json").unlink()
    with pytest.raises(TensorkeepError, match="A02"):
        load_adapter(adapted(), folder)


def test_other_trainable_parameters_travel_with_the_adapter(tmp_path: Path) -> None:
    made = adapted()
    made.norm.requires_grad_(True)
    with torch.no_grad():
        made.norm.weight.normal_()
    folder = save_adapter(made, tmp_path / "adapter")
    assert json.loads((folder / "adapter_config.json").read_text())["modules_to_save"] == ["norm"]
    fresh = adapted(wake=False)
    with pytest.raises(TensorkeepError, match="unexpected"):
        load_adapter(fresh, folder)
    fresh.norm.requires_grad_(True)
    load_adapter(fresh, folder)
    assert torch.equal(fresh.norm.weight, made.norm.weight)


def test_a_quantized_model_with_its_adapter_restarts_bitwise() -> None:
    made = adapted("nf4").eval()
    fresh = adapted("int8", seed=5, wake=False).eval()
    load_quantized(fresh, made.state_dict())
    assert torch.equal(fresh(X), made(X))
    assert fresh.load_state_dict(made.state_dict(), strict=True)
