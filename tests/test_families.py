"""A dozen architectures through names, diagnosis, conversion and training; `benchmarks.families` has all of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
import yaml
from benchmarks import families
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tensorkeep as tk
from tensorkeep.adapters.lora import add_lora, layers, merged
from tensorkeep.cli import main
from tensorkeep.conversion import naming
from tensorkeep.conversion.naming import hf
from tensorkeep.conversion.plan import Part, RowPermutation
from tensorkeep.conversion.row_maps import numbered, runs
from tensorkeep.conversion.streams import pieces
from tensorkeep.diagnosis import repair
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.memory import view_of
from tensorkeep.formats.view import read
from tensorkeep.language._fits_rows import refuse_rows
from tensorkeep.language._reachable import unreached
from tensorkeep.language.data.batches import Collate
from tensorkeep.language.losses import TokenLoss
from tensorkeep.models.meta_rows import loaded
from tensorkeep.models.names import model_names, to_file
from tensorkeep.quantization.linear_layers import linear_layers, read_directly
from tensorkeep.quantization.modules import quantize_
from tensorkeep.quantization.wide import stayed_wide
from tests.language_files import LINES, texts

CHOSEN = (
    "gpt2 gpt_neox falcon mixtral nemotron_h deepseek_v3 lfm2_moe mamba gemma3n_text qwen2_5_vl gemma3 llama".split()
)


@pytest.fixture(scope="module", autouse=True)
def _kept(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What transformers is asked is kept in a folder of these tests."""
    patched = pytest.MonkeyPatch()
    patched.setenv("HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache") / "hub"))
    yield
    patched.undo()


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """A family's model as transformers loads it, and its folder; made once."""
    made: dict[str, tuple[Any, Path]] = {}

    def of(name: str) -> tuple[Any, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name) / "model"
            made[name] = families.built(name, folder), folder
        return made[name]

    return of


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


@pytest.mark.parametrize("name", CHOSEN)
def test_files_and_memory_map_onto_each_other_and_a_sound_model_is_called_sound(
    name: str, family: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    model, folder = family(name)
    saved = tmp_path / "saved.pth"
    assert dict(families.arranged(model, folder, saved)) == {"live": "", "file": ""}
    alone = tk.diagnose(str(folder))
    assert alone.exit_code == 0, [f.message for f in alone.findings]
    beside = tk.diagnose(str(saved), reference=str(folder))
    assert beside.exit_code == 0, [f.message for f in beside.findings]
    assert {d.status for d in tk.compare(read(folder), read(saved))} == {"equal"}


@pytest.mark.parametrize("name", ["gpt_neox", "mixtral", "mamba"])
def test_a_tensor_that_the_model_asks_for_and_one_that_it_does_not_are_found_alone(
    name: str, family: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    _, folder = family(name)
    lost = next(n for n in load_file(folder / "model.safetensors") if ".1." in n and n.endswith("weight"))
    changed(folder, tmp_path / "bad", lambda t: {**{n: v for n, v in t.items() if n != lost}, "stray": t[lost]})
    found = {f.code: f for f in tk.diagnose(str(tmp_path / "bad")).findings if f.severity == "error"}
    assert found["K01"].tensors == [lost] and found["K02"].tensors == ["stray"]


def changed(folder: Path, sink: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """A copy of a folder whose tensors went through a change."""
    sink.mkdir()
    (sink / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = change(load_file(folder / "model.safetensors"))
    save_file({n: np.ascontiguousarray(v) for n, v in tensors.items()}, sink / "model.safetensors")


def neox(values: Any) -> Any:
    """Four heads of 16 rows each of q, k and v; RoPE turns 4 of the 16 of q and k."""
    values = values.copy()
    for start in (16 * part + 48 * head for head in range(4) for part in (0, 1)):
        values[start : start + 4] = values[start : start + 4][[0, 2, 1, 3]]
    return values


def latent(values: Any) -> Any:
    """Four heads of 16 rows without RoPE and 8 with it, which pair 2i with 2i + 1."""
    values = values.copy()
    for start in range(16, 96, 24):
        values[start : start + 8] = values[start : start + 8][[0, 2, 4, 6, 1, 3, 5, 7]]
    return values


@pytest.mark.parametrize(
    ("name", "tensor", "turn", "word"),
    [
        ("gpt_neox", "gpt_neox.layers.1.attention.query_key_value.weight", neox, "interleaved, where half-split"),
        ("deepseek_v3", "model.layers.1.self_attn.q_b_proj.weight", latent, "half-split, where interleaved"),
    ],
)
def test_rows_in_the_other_rope_layout_are_named_inside_fused_and_latent_projections_and_turned_back(
    name: str,
    tensor: str,
    turn: Callable[[Any], Any],
    word: str,
    family: Callable[[str], tuple[Any, Path]],
    tmp_path: Path,
) -> None:
    _, folder = family(name)
    changed(folder, tmp_path / "bad", lambda t: {**t, tensor: turn(t[tensor])})
    found = tk.diagnose(str(tmp_path / "bad"), reference=str(folder))
    assert found.causes == ["O01"] and word in found.findings[0].message
    repair(str(tmp_path / "bad"), str(tmp_path / "good"), reference=str(folder))
    good, wanted = (load_file(p / "model.safetensors") for p in (tmp_path / "good", folder))
    assert all(np.array_equal(good[n], v) for n, v in wanted.items())


@pytest.mark.parametrize("name", ["gpt2", "falcon", "mamba"])
def test_a_head_tied_to_an_embedding_of_another_name_is_written_for_torchs_loader(
    name: str, family: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    model, folder = family(name)
    assert families.told("convert", folder, tmp_path / "dcp", "--to", "dcp")[0] == 0
    state = {n: torch.zeros_like(t) for n, t in model.state_dict().items()}
    dcp.load(state, checkpoint_id=str(tmp_path / "dcp"), no_dist=True)
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())


def test_older_names_are_read_as_transformers_reads_them(family: Callable[[str], tuple[Any, Path]]) -> None:
    _, folder = family("gemma3")
    config = config_of(folder)
    view = read(folder)
    _, hub = families.opened(folder, config)
    names = model_names(config)
    assert "language_model.model.embed_tokens.weight" in names.file and "lm_head.weight" in names.live
    older = {n.replace("vision_tower.", "vision_tower.vision_model.", 1): t for n, t in hub.items()}
    found = to_file(config, older, [view])
    assert not found.unexpected and not found.missing and set(hub) <= set(found.tensors)


def test_a_naming_of_experts_is_no_longer_taken_for_minimind(family: Callable[[str], tuple[Any, Path]]) -> None:
    _, folder = family("lfm2_moe")
    assert naming.identify(read(folder)).naming == "hf"
    assert hf.recognise("model.layers.1.feed_forward.experts.0.w1.weight")
    assert not hf.recognise("model.layers.1.attention.wq.weight")


def test_what_transformers_said_is_kept_so_that_later_commands_do_not_import_it(
    family: Callable[[str], tuple[Any, Path]],
) -> None:
    _, folder = family("gpt_neox")
    code = (
        "import sys; from tensorkeep.diagnosis import diagnose; "
        f"print(diagnose({str(folder)!r}).exit_code, [m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    assert tk.diagnose(str(folder)).exit_code == 0
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "0 []\n"


def test_without_transformers_the_tables_serve_and_say_so(
    family: Callable[[str], tuple[Any, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, code in (("gpt_neox", 3), ("llama", 0)):
        _, folder = family(name)
        changed(folder, tmp_path / name, lambda tensors: tensors)
        config = config_of(folder) | {"_name_or_path": "never asked before"}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        monkeypatch.setitem(sys.modules, "transformers", None)
        found = tk.diagnose(str(tmp_path / name))
        monkeypatch.undo()
        assert found.exit_code == code
        said = [f.message for f in found.findings if f.code == "K01"]
        assert not said or "transformers is not installed" in said[0]


def test_a_config_that_nobody_can_have_is_refused_before_it_is_built() -> None:
    with pytest.raises(TensorkeepError, match="the most believed"):
        model_names({"model_type": "gpt_neox", "num_hidden_layers": 10**9})
    with pytest.raises(TensorkeepError, match=r"no model of type|cannot build it"):
        model_names({"model_type": "nobodys"})


# -- rows -------------------------------------------------------------------------------------------------------------


def test_runs_describe_stacked_and_reordered_rows_and_nothing_else() -> None:
    first, second = numbered(0, (4, 3)), numbered(1, (4, 3))
    joined = np.concatenate([first[1:3], second])
    assert [r[:3] for r in runs(joined, ["a", "b"], [(4, 3), (4, 3)]) or ()] == [
        ("a", (1, 3), None),
        ("b", None, None),
    ]
    turned = numbered(0, (8, 3))[RowPermutation(8, 8, "pairs").order()]
    (run,) = runs(turned, ["a"], [(8, 3)]) or ()
    assert run.permute == RowPermutation(8, 8, "pairs")
    shuffled = numbered(0, (8192, 3))[np.random.default_rng(0).permutation(8192)]
    assert runs(shuffled, ["a"], [(8192, 3)]) is None


def test_a_part_of_one_expert_is_streamed_alone() -> None:
    stack = torch.arange(2 * 6 * 3, dtype=torch.float32).view(2, 6, 3)
    view = view_of({"w": stack})
    part = Part(0, "w", (1, 2), (), (2, 5))
    assert b"".join(bytes(p) for p in pieces(part, view)) == stack[1, 2:5].numpy().tobytes()
    turned = part._replace(inner=(0, 4), permutes=(RowPermutation(4, 4, "pairs"),))
    assert b"".join(bytes(p) for p in pieces(turned, view)) == stack[1, [0, 2, 1, 3]].numpy().tobytes()
    assert part.key == "w[1:2][2:5]"


def test_names_that_the_loader_has_no_place_for_are_told(family: Callable[[str], tuple[Any, Path]]) -> None:
    model, _ = family("mixtral")
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    made, strangers = loaded(model, {**shapes, "stray.weight": (2, 2)})
    assert strangers == ["stray.weight"] and set(made) == set(shapes)


# -- training ---------------------------------------------------------------------------------------------------------


def test_conv1d_and_classes_derived_from_linear_get_updates_that_merge_exactly() -> None:
    for name, kinds in (("gpt2", {"conv1d", "linear"}), ("falcon", {"linear"})):
        model = families.model_of(name)
        assert {kind for _, kind, _ in linear_layers(model)} == kinds
        adapted = add_lora(model, "all-linear", r=4)
        assert len(adapted) == 12  # four matrices in each of three layers
        ids = torch.arange(3, 19)[None]
        with torch.no_grad():
            before = model(input_ids=ids).logits
            for layer in layers(model).values():
                layer.lora_B.normal_(std=0.1)
            after = model(input_ids=ids).logits
            with merged(model):
                together = model(input_ids=ids).logits
        assert not torch.allclose(before, after) and torch.allclose(after, together, atol=1e-4)


def test_a_weight_that_the_model_takes_itself_stays_plain_and_what_a_text_never_reaches_is_left_out() -> None:
    model = families.model_of("mamba")
    taken = read_directly(model)
    assert {n.rpartition(".")[2] for n in taken} >= {"dt_proj"}
    sees = families.model_of("gemma3")
    linears = {n: m for n, kind, m in linear_layers(sees) if kind == "linear" and n != "lm_head"}
    idle = unreached(sees, linears)
    assert idle and all(n.startswith(("model.vision_tower", "model.multi_modal")) for n in idle)
    assert not any("language_model" in n for n in idle) and all(p.grad is None for p in sees.parameters())


def test_stacked_experts_that_stay_wide_are_named_with_their_share() -> None:
    model = families.model_of("qwen3_moe").requires_grad_(False)
    quantize_(model, "nf4", exclude=["experts", "lm_head$"])
    said = stayed_wide(model)
    assert said is not None and "mlp.experts.gate_up_proj" in said and "% stay in floats" in said
    quantize_(model, "nf4", include=["experts"])
    said = stayed_wide(model)
    assert said is not None and "experts" not in said and "84 % of the parameters are quantized" in said


def test_rows_beyond_a_table_of_positions_and_packing_that_leaks_are_refused() -> None:
    with pytest.raises(TensorkeepError, match="256 positions"):
        refuse_rows(families.model_of("gpt2"), 257, packed=False)
    refuse_rows(families.model_of("opt"), 256, packed=True)
    refuse_rows(families.model_of("gpt_neox"), 4096, packed=True)
    with pytest.raises(TensorkeepError, match="cannot be packed for BloomForCausalLM"):
        refuse_rows(families.model_of("bloom"), 64, packed=True)


def test_padding_behind_packed_documents_has_a_gradient_where_the_model_takes_the_root_of_its_states() -> None:
    model: Any = families.model_of("gemma3n_text").float()
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = 0
    rows = [
        {"input_ids": torch.arange(3, 3 + sum(n)), "labels": torch.arange(3, 3 + sum(n)), "lengths": list(n)}
        for n in ((6, 5), (4, 3))
    ]
    TokenLoss(False)(model, Collate(0)(rows), 16.0)["loss"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def words(folder: Path) -> None:
    """A tokenizer of fewer words than the models have rows."""
    known = dict.fromkeys(["<unk>", "<s>", "</s>", *" ".join(LINES).split()])
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(known)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    ).save_pretrained(folder)


@pytest.mark.parametrize("name", ["gemma3", "gemma3n_text", "jamba"])
def test_a_wrapped_a_nested_and_a_hybrid_model_train_an_adapter_over_four_bits(name: str, tmp_path: Path) -> None:
    families.built(name, tmp_path / "model")
    words(tmp_path / "tok")
    recipe = {
        "model": str(tmp_path / "model"),
        "tokenizer": str(tmp_path / "tok"),
        "data": {"files": [str(texts(tmp_path / "a.jsonl"))], "length": 24},
        "training": {"updates": 1, "batch": 2, "quantize_backbone": "nf4"},
        "adapter": {"lora_r": 2, "lora_alpha": 4},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    code, said = families.told("train", "language", tmp_path / "recipe.yaml", "--out", tmp_path / "run")
    assert code == 0, said
    assert "stay in floats" in said


@pytest.mark.parametrize("kind", ["latent", "gated"])
def test_heads_of_two_parts_and_gated_ones_are_no_finding_and_wrong_numbers_of_heads_are(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DeepSeek without a low-rank query, and Qwen3-Next whose first layer attends to all."""
    experts = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "vocab_size": 128, "hidden_size": 64}
    if kind == "latent":
        made: Any = transformers.DeepseekV3Config(
            **experts,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=128,
            kv_lora_rank=16,
            q_lora_rank=None,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=16,
            first_k_dense_replace=1,
        )
    else:
        made = transformers.Qwen3NextConfig(
            **experts,
            num_experts=4,
            shared_expert_intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            layer_types=["full_attention", "linear_attention"],
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
        )
    transformers.AutoModelForCausalLM.from_config(made).save_pretrained(tmp_path / "model")
    assert main(["diagnose", str(tmp_path / "model")]) == 0
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"num_attention_heads": 8}))
    assert main(["diagnose", str(tmp_path / "model")]) == 1 and "q_proj" in capsys.readouterr().out
