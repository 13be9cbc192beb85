"""GGUF: decoding against the gguf package, models against transformers' own loading."""

from __future__ import annotations

import json
import math
import struct
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorkeep.conversion.naming import identify
from tensorkeep.conversion.planning import make_plan
from tensorkeep.diagnosis.comparison import compare
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats import view
from tensorkeep.formats._gguf_header import read_gguf_header
from tensorkeep.formats.gguf_config import LLAMA3, llama3_factors, shortest
from tensorkeep.storage.files import LocalFolder
from tests.gguf_files import HEAD_DIM, HEADS, HIDDEN, LAYERS, VOCAB, WIDE, gguf, shapes, to_hf, write_model
from tests.test_gguf_tokenizer import TEXTS


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


# -- reading and decoding ---------------------------------------------------------------------------------------------


def test_header_agrees_with_the_package(tiny: Path) -> None:
    reader, ours = gguf.GGUFReader(tiny), view.read(tiny)
    metadata = ours.metadata["gguf"]
    assert list(ours) == [t.name for t in reader.tensors]
    for tensor in reader.tensors:
        record = ours[tensor.name]
        assert record.shape == tuple(int(n) for n in reversed(tensor.shape))
        assert (record.blocks[0].start, record.blocks[0].nbytes) == (tensor.data_offset, tensor.n_bytes)
        assert record.encoding == ("plain" if tensor.tensor_type.name == "F32" else "Q8_0") and record.dtype == "F32"
    for name, field in reader.fields.items():
        assert name.startswith("GGUF.") or metadata[name] == field.contents()


@pytest.mark.parametrize("kind", sorted(k.name for k in gguf.quants._type_traits if k.name != "BF16"))
def test_every_decodable_type_equals_gguf(tmp_path: Path, kind: str) -> None:
    quantized = gguf.GGMLQuantizationType[kind]
    per_block, nbytes = gguf.GGML_QUANT_SIZES[quantized]
    raw = np.random.default_rng(1).integers(0, 256, (3, 7, 2 * nbytes), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("a", raw, raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = view.read(tmp_path / "x.gguf")
    assert ours["a"].shape == (3, 7, 2 * per_block) and ours["a"].encoding == kind
    with np.errstate(all="ignore"):
        wanted = np.stack([gguf.dequantize(r, quantized) for r in raw.reshape(21, -1)]).reshape(3, 7, -1)
    assert bytes(ours.bytes("a")) == wanted.astype("<f4").tobytes()
    assert b"".join(bytes(p) for p in ours.stream("a", rows=(1, 2), chunk=1)) == wanted[1].astype("<f4").tobytes()


@pytest.mark.parametrize("piece", range(1, 30))
def test_a_header_is_read_in_pieces_of_any_size(tiny: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    whole = read_gguf_header(LocalFolder(tiny.parent), tiny.name)
    monkeypatch.setattr("tensorkeep.formats._gguf_header.FIRST_READ", piece)
    assert read_gguf_header(LocalFolder(tiny.parent), tiny.name) == whole


def test_decoding_streams_in_whole_granules(tiny: Path) -> None:
    ours = view.read(tiny)
    row = HIDDEN * 4
    pieces = [len(p) for p in ours.stream("token_embd.weight", granule=3 * row, chunk=10 * row)]
    assert sum(pieces) == VOCAB * row and set(pieces[:-1]) == {9 * row}


def test_split_file(tmp_path: Path, tiny: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    for i in range(5):
        writer.add_tensor(f"blk.{i}.attn_q.weight", np.full((2, 4), i, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) == 3
    for path in (tmp_path, parts[1]):
        ours = view.read(path)
        assert len(ours) == 5 and all(ours.array(f"blk.{i}.attn_q.weight")[0, 0] == i for i in range(5))
    parts[2].unlink()
    with pytest.raises(TensorkeepError, match="parts are not there"):
        view.read(parts[0])


# -- against transformers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "bias", "norms"), [("llama", False, False), ("qwen2", True, False), ("qwen3", False, True)]
)
def test_model_equals_transformers_own_loading(tmp_path: Path, arch: str, bias: bool, norms: bool) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="transformers reads GGUF with it")
    source = write_model(tmp_path / "x.gguf", arch, "Q4_1", shapes(bias, norms))
    to_hf(source, tmp_path / "hf", dtype="F32")
    # transformers overlooks qwen3's head size in a GGUF and takes 128
    config = {"config": transformers.AutoConfig.from_pretrained(tmp_path / "hf")} if arch == "qwen3" else {}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="x.gguf", dtype=torch.float32, **config
    )
    ours, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report.values()) and ours.dtype == torch.float32
    wanted, found = theirs.state_dict(), ours.state_dict()
    assert set(wanted) == set(found)
    assert [n for n in wanted if not torch.equal(wanted[n], found[n])] == []
    ids = torch.arange(40)[None] % VOCAB
    theirs.config.rms_norm_eps = ours.config.rms_norm_eps
    with torch.inference_mode():
        assert torch.equal(theirs.eval()(ids).logits, ours.eval()(ids).logits)


def test_olmo2_and_mixtral_load_in_transformers(tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    plain = {n: s for n, s in shapes().items() if "_norm" not in n or n == "output_norm.weight"}
    olmo2 = dict(plain)
    mixtral = {n: s for n, s in shapes().items() if ".ffn_" not in n or "ffn_norm" in n}
    for n in range(LAYERS):
        olmo2 |= {f"blk.{n}.{w}.weight": (HIDDEN,) for w in ("post_attention_norm", "post_ffw_norm", "attn_q_norm")}
        olmo2 |= {f"blk.{n}.attn_k_norm.weight": (2 * HEAD_DIM,)}
        mixtral |= {
            f"blk.{n}.ffn_gate_inp.weight": (4, HIDDEN),
            f"blk.{n}.ffn_gate_exps.weight": (4, WIDE, HIDDEN),
            f"blk.{n}.ffn_up_exps.weight": (4, WIDE, HIDDEN),
            f"blk.{n}.ffn_down_exps.weight": (4, HIDDEN, WIDE),
        }

    def experts(writer: Any) -> None:
        writer.add_expert_count(4)
        writer.add_expert_used_count(2)

    for arch, tensors, extra in (("olmo2", olmo2, None), ("llama", mixtral, experts)):
        source = write_model(tmp_path / f"{arch}.gguf", arch, "Q8_0", tensors, extra=extra)
        to_hf(source, tmp_path / arch, dtype="F32")
        model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / arch, output_loading_info=True)
        assert not any(report.values()) and model.config.model_type == ("mixtral" if extra else arch)
        with torch.inference_mode():
            assert torch.isfinite(model(torch.arange(20)[None]).logits).all()


def test_diff_sees_through_names_and_permutation(tiny: Path, tmp_path: Path) -> None:
    to_hf(tiny, tmp_path / "hf", dtype="F32")
    assert {d.status for d in compare(view.read(tiny), view.read(tmp_path / "hf"))} == {"equal"}


def test_only_the_llama_family_is_permuted(tmp_path: Path) -> None:
    kinds = {}
    outs = {f"blk.{n}.attn_output.bias": (HIDDEN,) for n in range(LAYERS)}  # llama's attention_bias means four
    for arch, tensors in (("llama", shapes(bias=True) | outs), ("qwen2", shapes(bias=True))):
        source = view.read(write_model(tmp_path / f"{arch}.gguf", arch, "F32", tensors))
        kinds[arch] = {s.sink.name for s in make_plan([source], "hf").steps if s.sink and "permute" in s.actions}
    assert kinds["qwen2"] == set()
    assert kinds["llama"] == {
        f"model.layers.{n}.self_attn.{w}_proj.{leaf}"
        for n in range(LAYERS)
        for w in "qk"
        for leaf in ("weight", "bias")
    }


def test_bias_rows_move_with_the_weight_rows(tmp_path: Path) -> None:
    tensors = shapes(bias=True) | {f"blk.{n}.attn_output.bias": (HIDDEN,) for n in range(LAYERS)}
    source = write_model(tmp_path / "x.gguf", "llama", "F32", tensors)
    ours = to_hf(source, tmp_path / "hf")
    raw = view.read(source)
    pairs = np.arange(HEADS * HEAD_DIM).reshape(HEADS, HEAD_DIM // 2, 2).swapaxes(1, 2).reshape(-1)
    for leaf in ("weight", "bias"):
        assert np.array_equal(
            ours.array(f"model.layers.1.self_attn.q_proj.{leaf}"), raw.array(f"blk.1.attn_q.{leaf}")[pairs]
        )


def test_dtypes(tmp_path: Path, tiny: Path) -> None:
    for dtype, wanted, spelled in ((None, "BF16", "bfloat16"), ("F32", "F32", "float32"), ("F16", "F16", "float16")):
        ours = to_hf(tiny, tmp_path / f"q8-{dtype}", dtype=dtype)
        assert (
            {r.dtype for r in ours.values()} == {wanted} and ours.config is not None and ours.config["dtype"] == spelled
        )
    plain = to_hf(write_model(tmp_path / "f16.gguf", kind="F16"), tmp_path / "f16")
    assert plain["model.norm.weight"].dtype == "F32" and plain["model.layers.0.mlp.up_proj.weight"].dtype == "F16"
    assert plain.config is not None and plain.config["dtype"] == "float16"


def test_config(tiny: Path) -> None:
    ours = view.read(tiny)
    wanted = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "vocab_size": VOCAB,
        "tie_word_embeddings": True,
        "max_position_embeddings": 128,
        "num_hidden_layers": LAYERS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    }
    assert ours.config is not None and {k: ours.config[k] for k in wanted} == wanted
    assert identify(ours).naming == "gguf"
    assert shortest(struct.unpack("<f", struct.pack("<f", 1e-6))[0]) == 1e-6 and shortest(1e300) == 1e300


def test_llama3_scaling_is_read_off_the_factors(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    scaling = {"rope_type": "llama3", "factor": 32.0, **LLAMA3}
    factors = llama3_factors(500000.0, HEAD_DIM, scaling)
    source = write_model(tmp_path / "x.gguf", freqs=factors)
    ours = to_hf(source, tmp_path / "hf")
    assert ours.config is not None and ours.config["rope_parameters"] == {**scaling, "rope_theta": 500000.0}
    assert not any("rope_freqs" in n for n in ours)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    assert config.rope_parameters["factor"] == 32.0 and config.rope_parameters["rope_theta"] == 500000.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = [500000.0 ** (-i / HEAD_DIM) for i in range(0, HEAD_DIM, 2)]
    assert np.allclose(scaled.numpy(), [p / f for p, f in zip(plain, factors)], rtol=1e-5)
    odd = view.read(write_model(tmp_path / "odd.gguf", freqs=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]))
    assert [n.code for n in odd.notes] == ["C03", "C03"] and "rope_freqs" in odd.notes[0].message


def test_experts_are_taken_apart(tmp_path: Path) -> None:
    tensors = {
        n: s
        for n, s in shapes(norms=True).items()
        if ".ffn_gate." not in n and ".ffn_up." not in n and ".ffn_down." not in n
    }
    for n in range(LAYERS):
        tensors |= {
            f"blk.{n}.ffn_gate_inp.weight": (4, HIDDEN),
            f"blk.{n}.ffn_gate_exps.weight": (4, 32, HIDDEN),
            f"blk.{n}.ffn_up_exps.weight": (4, 32, HIDDEN),
            f"blk.{n}.ffn_down_exps.weight": (4, HIDDEN, 32),
        }

    def extra(writer: Any) -> None:
        writer.add_expert_count(4)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(32)

    source = write_model(tmp_path / "x.gguf", "qwen3moe", "Q8_0", tensors, extra=extra)
    ours, raw = to_hf(source, tmp_path / "hf", dtype="F32"), view.read(source)
    for e in range(4):
        assert np.array_equal(
            ours.array(f"model.layers.1.mlp.experts.{e}.up_proj.weight"), raw.array("blk.1.ffn_up_exps.weight")[e]
        )
    transformers = pytest.importorskip("transformers")
    _, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report.values())


def test_unknown_architecture_is_read_but_not_converted(tmp_path: Path) -> None:
    ours = view.read(write_model(tmp_path / "x.gguf", "gemma3"))
    assert len(ours) == len(shapes()) and "gemma3" in ours.notes[0].message
    with pytest.raises(TensorkeepError, match="no table for the model type 'gemma3'"):
        make_plan([ours], "hf")


def test_a_tensor_without_a_place_stops_the_plan(tmp_path: Path) -> None:
    source = view.read(write_model(tmp_path / "x.gguf", tensors={**shapes(), "blk.0.attn_sinks.weight": (HEADS,)}))
    with pytest.raises(TensorkeepError, match="attn_sinks") as error:
        make_plan([source], "hf")
    assert error.value.code == "K07" and len(make_plan([source], "hf", drop=["*sinks*"]).dropped) == 1


# -- the real model ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_equals_transformers_and_its_loss_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="transformers reads GGUF with it")
    from tensorkeep.commands.demo import story as demo

    try:
        source = demo.smollm2()
    except TensorkeepError as error:
        pytest.skip(str(error))
    ours = to_hf(source, tmp_path / "hf")
    assert ours.notes == [] and len(ours) == 272 and sum(r.elements for r in ours.values()) == 134_515_008
    with monkeypatch.context() as patch:  # their header, read twice in items that each map the file anew: 3 s
        mapped = np.memmap
        patch.setattr(np, "memmap", lambda *words, **named: np.asarray(mapped(*words, **named)))
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, cache(getattr(gguf, name)))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32
        ).state_dict()
    model = demo.load_hf(tmp_path / "hf")
    assert [n for n, t in model.state_dict().items() if not torch.equal(t, theirs[n].bfloat16())] == []
    first = demo.token_ids(tmp_path / "hf")[:1]  # of the four rows of the demo, whose loss is 2.886
    assert math.isclose(demo.loss(model, first), 2.9495, abs_tol=0.002)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    document = json.loads((tmp_path / "hf" / "tokenizer.json").read_text())
    # SmolLM2's own tokenizer.json says the same: single digits first, then GPT-2's cuts
    assert [p["type"] for p in document["pre_tokenizer"]["pretokenizers"]] == ["Digits", "ByteLevel"]
    for sample in TEXTS:
        assert tokenizer.decode(tokenizer(sample)["input_ids"]) == sample
    assert tokenizer.tokenize("y=22  44") == ["y", "=", "2", "2", "ĠĠ", "4", "4"]
