"""Laws of namings: every scheme goes to hf and back bit by bit, and rows move as RoPE's layouts demand."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tensorkeep.conversion.naming import NAMINGS, identify, module
from tensorkeep.conversion.naming.rope import rope_rows
from tensorkeep.conversion.naming.table import from_hf, from_own
from tensorkeep.conversion.plan import Part, RowPermutation, Step
from tensorkeep.conversion.streams import write_tensor
from tensorkeep.formats.view import read
from tensorkeep.storage.layout import SinkTensor
from tests.helpers import LLAMA, assert_same, held, interleaved, model_tensors, refused, to, with_config, write_hf

shapes = st.fixed_dictionaries(
    {
        "layers": st.integers(1, 12),
        "heads": st.sampled_from([1, 2, 3, 4]),
        "kv": st.sampled_from([1, 2]),
        "dim": st.sampled_from([2, 4, 6, 8]),
        "hidden": st.integers(3, 9),
        "width": st.integers(1, 7),
        "vocab": st.integers(2, 9),
    }
)
quick = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))


def config_of(kind: str, sizes: dict[str, int], **more: Any) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": sizes["hidden"],
        "num_attention_heads": sizes["heads"],
        "head_dim": sizes["dim"],
        "num_key_value_heads": sizes["kv"],
        "tie_word_embeddings": False,
        **more,
    }


def there_and_back(tensors: dict[str, torch.Tensor], config: dict[str, Any], naming: str) -> dict[str, torch.Tensor]:
    """The tensors under `naming`, once their way back to hf is proven."""
    with tempfile.TemporaryDirectory() as work:
        source = write_hf(Path(work) / "hf", tensors, config)
        to(source, Path(work) / "there", "dcp", naming=naming)
        view = with_config(Path(work) / "there", config)
        assert identify(view).naming == naming
        to(view, Path(work) / "back", "hf")
        assert_same(held(Path(work) / "back"), tensors)
        return held(Path(work) / "there")


@quick
@given(shapes, st.booleans(), st.sampled_from(["torchtitan", "torchtitan-0.2"]), st.sampled_from([None, 0.5, 1.0]))
def test_llama_goes_to_torchtitan_and_back(sizes: dict[str, int], bias: bool, naming: str, part: float | None) -> None:
    rotary = int(sizes["dim"] * (part or 1))
    if rotary % 2:
        part, rotary = None, sizes["dim"]
    tensors = model_tensors(**sizes, bias=bias)
    config = config_of("llama", sizes, rope_parameters={"partial_rotary_factor": part} if part else None)
    made = there_and_back(tensors, config, naming)
    own = "qkv_linear." if naming == "torchtitan" else ""
    last = sizes["layers"] - 1
    for proj in ("q", "k"):
        for leaf in ("weight", "bias") if bias else ("weight",):
            wanted = interleaved(tensors[f"model.layers.{last}.self_attn.{proj}_proj.{leaf}"], sizes["dim"], rotary)
            assert torch.equal(made[f"layers.{last}.attention.{own}w{proj}.{leaf}"], wanted)
    assert torch.equal(
        made[f"layers.{last}.attention.{own}wv.weight"], tensors[f"model.layers.{last}.self_attn.v_proj.weight"]
    )


@quick
@given(shapes, st.integers(0, 11), st.sampled_from(["torchtitan", "torchtitan-0.2"]))
def test_qwen3_goes_to_torchtitan_and_back(sizes: dict[str, int], experts: int, naming: str) -> None:
    tensors = model_tensors(**sizes, norms=True, experts=experts)
    made = there_and_back(tensors, config_of("qwen3_moe" if experts else "qwen3", sizes), naming)
    own = "qkv_linear." if naming == "torchtitan" else ""
    assert torch.equal(made[f"layers.0.attention.{own}wq.weight"], tensors["model.layers.0.self_attn.q_proj.weight"])
    if experts:
        inner = (
            "layers.0.moe.routed_experts.inner_experts.w1_EFD" if naming == "torchtitan" else "layers.0.moe.experts.w1"
        )
        stack = torch.stack([tensors[f"model.layers.0.mlp.experts.{e}.gate_proj.weight"] for e in range(experts)])
        assert torch.equal(made[inner], stack)


@quick
@given(shapes, st.integers(0, 11))
def test_early_minimind_goes_to_hf_and_back(sizes: dict[str, int], experts: int) -> None:
    tensors = model_tensors(**sizes, experts=experts)
    config = config_of("llama", sizes, minimind_generation="mm2a")
    with tempfile.TemporaryDirectory() as work:
        source = write_hf(Path(work) / "hf", tensors, config)
        to(source, Path(work) / "there", "pth", naming="minimind")
        file = Path(work) / "there" / f"pretrain_{sizes['hidden']}{'_moe' if experts else ''}.pth"
        view = with_config(file, config)
        assert identify(view).naming == "minimind" and "tok_embeddings.weight" in view
        assert torch.equal(
            held(file)["layers.0.attention.wk.weight"],
            interleaved(tensors["model.layers.0.self_attn.k_proj.weight"], sizes["dim"]),
        )
        to(view, Path(work) / "back", "hf")
        assert_same(held(Path(work) / "back"), tensors)


@quick
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 3), st.sampled_from([(), (3,), (2, 2)]))
def test_rows_move_and_come_back(heads: int, half: int, still: int, rest: tuple[int, ...]) -> None:
    rotary, dim = 2 * half, 2 * half + still
    rows = RowPermutation(dim, rotary, "pairs")
    tensor = torch.randn(heads * dim, *rest)
    turned = tensor.reshape(heads, dim, *rest)[:, rows.order()].reshape(tensor.shape)
    assert torch.equal(turned, interleaved(tensor, dim, rotary))
    assert torch.equal(turned.reshape(heads, dim, *rest)[:, rows.inverse().order()].reshape(tensor.shape), tensor)
    assert Part(0, "w").permuted(rows).permuted(rows.inverse()) == Part(0, "w")


@pytest.mark.parametrize("heads", [1, 3], ids=["norm per head", "norm over the full width"])
def test_norms_turn_with_their_rows(tmp_path: Path, heads: int) -> None:
    weight = torch.randn(heads * 6)
    view = read(write_hf(tmp_path, {"n": weight}) / "model.safetensors")
    rows = rope_rows({"head_dim": 6}, "pairs", "n", tuple(weight.shape))
    out = bytearray()
    write_tensor(Step((), (Part(0, "n", None, (rows,)),), SinkTensor("n", "F32", (heads * 6,))), [view], out.extend)
    assert torch.equal(torch.frombuffer(out, dtype=torch.float32), interleaved(weight, 6))


def test_rope_needs_a_config_that_fits(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", model_tensors())
    with refused("C03", "_proj", "config"):
        to(source, tmp_path / "out", "dcp", naming="torchtitan")
    with refused("C01", "whole heads"):
        to(with_config(source, LLAMA | {"head_dim": 3}), tmp_path / "out", "dcp", naming="torchtitan")
    with refused("C03"):
        to(with_config(source, LLAMA | {"num_attention_heads": "two"}), tmp_path / "out", "dcp", naming="torchtitan")


@pytest.mark.parametrize("naming", [n for n in NAMINGS if hasattr(module(n), "FAMILIES")])
def test_tables_lead_back(naming: str) -> None:
    for rows in module(naming).FAMILIES.values():
        for row in rows:
            own = row.own.replace("{n}", "11").replace("{e}", "10") + ("" if row.stacked or row.exact else ".weight")
            links = from_own(own, rows, experts=2)
            assert links, own
            for link in links:
                back = from_hf(link.hf, rows) or []
                assert [b for b in back if (b.own, b.expert, b.rope) == (own, link.expert, link.rope)], link


def test_torchtitan_refuses_what_it_has_no_model_for(tmp_path: Path) -> None:
    olmo = with_config(write_hf(tmp_path / "hf", model_tensors()), LLAMA | {"model_type": "olmo2"})
    with refused(None, "olmo2", "--naming hf"):
        to(olmo, tmp_path / "out", "dcp", naming="torchtitan")
    normed = with_config(write_hf(tmp_path / "normed", model_tensors(norms=True)), LLAMA)
    with refused("K07", "q_norm"):
        to(normed, tmp_path / "out", "dcp", naming="torchtitan")


def test_wrappers_and_roots_are_recognised(tmp_path: Path) -> None:
    plain = model_tensors()
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        torch.save({f"{prefix}{n}": t for n, t in plain.items()}, tmp_path / "a.pth")
        to(tmp_path / "a.pth", tmp_path / prefix / "hf", "hf")
        assert_same(held(tmp_path / prefix / "hf"), plain)
    torch.save({"model": plain, "optimizer": {"state": {0: torch.ones(2)}}, "epoch": 3}, tmp_path / "b.pth")
    plan, _ = to(tmp_path / "b.pth", tmp_path / "b", "hf")
    assert_same(held(tmp_path / "b"), plain)
    assert [s.reason for s in plan.dropped] == ["optimizer state"]


def test_names_equal_without_their_wrappers_are_refused(tmp_path: Path) -> None:
    tensors = model_tensors(layers=1)
    torch.save(tensors | {f"module.{n}": t for n, t in tensors.items()}, tmp_path / "a.pth")
    with refused("K03", "wrapper"):
        to(tmp_path / "a.pth", tmp_path / "out", "hf")


def test_computed_buffers_are_not_written(tmp_path: Path) -> None:
    tensors = model_tensors()
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    plan, _ = to(write_hf(tmp_path / "hf", tensors | extra, LLAMA), tmp_path / "out", "hf")
    assert [s.parts[0].name for s in plan.dropped] == list(extra)
    assert_same(held(tmp_path / "out"), tensors)


def test_lightnings_state_of_a_module_that_holds_the_model_is_the_model(tmp_path: Path) -> None:

    from tensorkeep.cli import main
    from tests.language_files import save_model

    save_model(tmp_path / "model", "qwen3")
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    before = {f"model.{n}": t.clone() for n, t in model.state_dict().items()}
    optimizer.step()
    saved = {"state_dict": before, "optimizer_states": [optimizer.state_dict()], "epoch": 1, "loops": {}}
    torch.save(saved, tmp_path / "epoch=1.ckpt")
    words = [str(tmp_path / n) for n in ("model", "epoch=1.ckpt", "back")]
    assert main(["diff", *words[:2]]) == 0
    assert main(["convert", *words[1:], "--to", "hf", "--config", words[0]]) == 0
    assert main(["diff", words[0], words[2]]) == 0


def test_lightnings_state_of_a_module_that_holds_torchtitans_model_is_torchtitans(tmp_path: Path) -> None:
    from tensorkeep.cli import main
    from tests.language_files import save_model

    save_model(tmp_path / "model", "qwen3")
    words = [str(tmp_path / n) for n in ("model", "titan.pth", "last.ckpt", "back")]
    assert main(["convert", words[0], words[1], "--to", "pth", "--naming", "torchtitan"]) == 0
    state = torch.load(words[1])
    state = {f"model.{n}": t for n, t in state.get("model", state).items()}
    torch.save({"state_dict": state, "epoch": 1, "global_step": 3}, words[2])
    assert identify(read(tmp_path / "last.ckpt")).naming == "torchtitan"
    assert main(["convert", words[2], words[3], "--to", "hf", "--config", words[0]]) == 0
    assert main(["diff", words[0], words[3]]) == 0


@pytest.mark.parametrize("naming", ["hf", "torchtitan", "olmo-core"])
def test_lightnings_model_beside_weights_of_a_loss_or_a_teacher_is_the_model(naming: str, tmp_path: Path) -> None:
    from tensorkeep.cli import main
    from tests.language_files import save_model

    save_model(tmp_path / "model", "qwen3")
    words = [str(tmp_path / n) for n in ("model", "own.pth", "last.ckpt", "back")]
    assert main(["convert", *words[:2], "--to", "pth", "--naming", naming]) == 0
    state = torch.load(words[1])
    state = state.get("model", state)
    for more in ({"loss.weight": torch.ones(3)}, {f"teacher.{n}": t + 1 for n, t in state.items()}):
        torch.save({"state_dict": {f"model.{n}": t for n, t in state.items()} | more, "epoch": 1}, words[2])
        found = identify(read(tmp_path / "last.ckpt"))
        assert (found.naming, found.root) == (naming, "state_dict.model")
        assert main(["convert", *words[2:], "--to", "hf", "--config", words[0], "--overwrite"]) == 0
        assert main(["diff", words[0], words[3]]) == 0
