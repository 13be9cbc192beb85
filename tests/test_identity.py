"""A model's identity: one for all its forms, another for any other tensor, none where names are nobody's."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import families
from safetensors.torch import load_file, save_file

from tensorkeep.cli import main
from tensorkeep.diagnosis.identity.demand import demand
from tensorkeep.diagnosis.identity.identify import identify
from tensorkeep.diagnosis.identity.parts import canonical_parts
from tensorkeep.diagnosis.identity.proofs import check_proof, check_tensor, prove_tensor
from tensorkeep.diagnosis.identity.statement import read_statement, state
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.companions import Companion
from tensorkeep.formats.view import read
from tensorkeep.storage import merkle
from tests import identity_reference as reference
from tests.helpers import refused, to, write_hf
from tests.identity_forms import DENSE, FORMS, config_beside, state_of
from tests.language_files import save_model
from tests.tools import TINY
from tests.training import ranks

MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False, "sliding_window": None}


@pytest.fixture(scope="module", autouse=True)
def _one_thread(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What transformers is asked is kept in a folder of these tests; torch starts no threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    patched = pytest.MonkeyPatch()
    patched.setenv("HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache") / "hub"))
    yield
    patched.undo()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return half(save_model(tmp_path_factory.mktemp("dense") / "model", "llama", tie_word_embeddings=True))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return half(save_model(tmp_path_factory.mktemp("moe") / "model", "mixtral", **MOE))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
    return half(save_model(tmp_path_factory.mktemp("qwen") / "model", "qwen3_moe", tie_word_embeddings=False, **sizes))


def half(folder: Path) -> Path:
    """The model in bfloat16, with gains that are not all ones."""
    drawn = torch.Generator().manual_seed(3)
    state = {
        n: (t if t.ndim > 1 else torch.rand(t.shape, generator=drawn) + 0.5).bfloat16()
        for n, t in state_of(folder).items()
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}, indent=2))
    return folder


def of(path: Path) -> str:
    return identify(path).identity


@pytest.mark.parametrize("form", DENSE)
def test_every_form_of_a_dense_model_has_its_identity(form: str, dense: Path, tmp_path: Path) -> None:
    assert of(DENSE[form](dense, tmp_path / "form", state_of(dense))) == of(dense)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_mixture_of_experts_has_its_identity(form: str, experts: Path, tmp_path: Path) -> None:
    assert of(FORMS[form](experts, tmp_path / "form", state_of(experts))) == of(experts)


@pytest.mark.parametrize("form", ["torchtitan", "live", "gguf", "flame"])
def test_experts_that_another_program_stacks_have_one_identity(form: str, qwen: Path, tmp_path: Path) -> None:
    assert of(DENSE[form](qwen, tmp_path / "form", state_of(qwen))) == of(qwen)


@pytest.mark.parametrize("family", ["gpt2", "deepseek_v3", "gemma3", "nemotron_h"])
def test_a_live_model_saved_by_torch_has_the_identity_of_its_files(family: str, tmp_path: Path) -> None:
    state = families.built(family, tmp_path / "hf").state_dict()
    config_beside(tmp_path / "hf", tmp_path / "live")
    torch.save(state, tmp_path / "live" / "model.pth")
    assert of(tmp_path / "live" / "model.pth") == of(tmp_path / "hf")


@pytest.mark.parametrize("dimension", [0, 1])
def test_dcp_that_three_processes_wrote_has_the_identity(dimension: int, dense: Path, tmp_path: Path) -> None:
    state, place = state_of(dense), tmp_path / "dcp"
    config_beside(dense, place)

    def work(world: Any) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        mesh = init_device_mesh("cpu", (world.size,))
        held = {n: distribute_tensor(t, mesh, [Shard(min(dimension, t.ndim - 1))]) for n, t in state.items()}
        dcp.save(held, checkpoint_id=str(place))
        torch.distributed.barrier()

    assert ranks(3, work) == [0, 0, 0]
    assert any(len(record.blocks) > 1 for record in read(place).values())
    assert of(place) == of(dense)


def test_the_vectors_are_what_the_page_says_and_what_the_program_makes(tmp_path: Path) -> None:
    pytest.importorskip("rfc8785")
    kept = json.loads(reference.VECTORS.read_text())
    assert kept == json.loads(json.dumps(reference.vectors()))
    for model in kept["models"]:
        leaves = {}
        for tensor in model["tensors"]:
            data = reference.bytes_of(tensor["bytes"])
            chunks = []
            for at in range(0, len(data), merkle.CHUNK):
                state = merkle.chunk_hasher()
                state.update(data[at : at + merkle.CHUNK])
                chunks.append(state.digest())
            assert merkle.content_hash(chunks).hex() == tensor["content"]
            leaf = merkle.tensor_leaf(tensor["name"], tensor["dtype"], tensor["shape"], merkle.content_hash(chunks))
            assert leaf.hex() == tensor["leaf"]
            leaves[tensor["name"]] = leaf
        assert merkle.identity([leaves[n] for n in sorted(leaves, key=str.encode)]).hex() == model["identity"]
    files = {"config": "config.json", "chat_template": "chat_template.jinja", "tokenizer": "tokenizer_config.json"}
    for part in kept["parts"]:
        document = part["document"]
        text = {"chat_template": document.get("default"), "tokenizer": document.get("tokenizer_config.json")}
        data = text.get(part["kind"], document)
        data = data if isinstance(data, str) else json.dumps(data)
        made = canonical_parts([Companion(files[part["kind"]], data.encode(), "here")])
        assert made[part["kind"]].decode() == part["canonical"]
        assert merkle.part_leaf(part["kind"], made[part["kind"]]).hex() == part["hash"]


def test_the_identity_of_a_file_is_the_references(dense: Path) -> None:
    words = {torch.bfloat16: "BF16"}
    given = {
        n: (words[t.dtype], tuple(t.shape), t.view(torch.uint8).numpy().tobytes()) for n, t in state_of(dense).items()
    }
    assert of(dense) == reference.identity(given).hex()


def test_a_tensor_of_several_chunks_is_hashed_alike_whole_and_in_pieces(tmp_path: Path) -> None:
    tensor = torch.arange(5 << 20, dtype=torch.float32).reshape(1024, -1)  # 20 MiB
    folder = write_hf(tmp_path / "hf", {"model.norm.weight": tensor, "lm_head.weight": tensor[:2] + 1})
    torch.save({"lm_head.weight": tensor[:2] + 1, "model.norm.weight": tensor.T.contiguous().T}, tmp_path / "a.pth")
    given = {
        "model.norm.weight": ("F32", tensor.shape, tensor.numpy().tobytes()),
        "lm_head.weight": ("F32", (2, tensor.shape[1]), (tensor[:2] + 1).numpy().tobytes()),
    }
    assert of(folder) == of(tmp_path / "a.pth") == reference.identity(given).hex()


def test_any_bit_any_name_any_shape_and_any_dtype_makes_another_model(dense: Path, tmp_path: Path) -> None:
    state, draw, seen = state_of(dense), random.Random(5), {of(dense)}
    for number in range(20):
        name = draw.choice(sorted(state))
        changed = {n: t.clone() for n, t in state.items()}
        raw = changed[name].view(torch.uint8).reshape(-1)
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        model, before = identify(write_hf(tmp_path / str(number), changed)), identify(dense)
        assert [n for n in model.leaves if model.leaves[n] != before.leaves[n]] == [name]
        seen.add(model.identity)
    name = "model.layers.0.mlp.up_proj.weight"
    others = [
        {**state, name: state[name].reshape(-1, 2)},
        {n.replace("up_proj", "gate_proj_"): t for n, t in state.items()},
        {**state, name: state[name].view(torch.float16)},
        {n: t for n, t in state.items() if n != name},
        {n: t.float() for n, t in state.items()},
    ]
    for number, other in enumerate(others):
        seen.add(of(write_hf(tmp_path / f"other{number}", other)))
    assert len(seen) == 1 + 20 + len(others)


def test_a_gguf_and_what_is_made_of_it_keep_the_identity(dense: Path, tmp_path: Path) -> None:
    to(dense, tmp_path / "a.gguf", "gguf")
    to(tmp_path / "a.gguf", tmp_path / "back", "hf")
    assert {t.dtype for t in load_file(tmp_path / "back" / "model.safetensors").values()} == {
        torch.bfloat16,
        torch.float32,
    }
    model = identify(tmp_path / "back")
    assert model.identity == of(dense) and len(model.narrowed) == 5
    changed = load_file(tmp_path / "back" / "model.safetensors")
    changed["model.norm.weight"][0] += 1e-6  # no bfloat16: the vector counts as it is
    assert identify(write_hf(tmp_path / "other", changed)).leaves["model.norm.weight"].dtype == "F32"


def test_ties_count_once_under_the_embeddings_name(dense: Path, tmp_path: Path) -> None:
    state = state_of(dense)
    both = {**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}
    assert identify(write_hf(tmp_path / "both", both)).tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert of(tmp_path / "both") == of(dense)
    config = json.loads((dense / "config.json").read_text())
    head = {("lm_head" if "embed" in n else n.removesuffix(".weight")) + ".weight": t for n, t in state.items()}
    assert of(write_hf(tmp_path / "head", head, config)) == of(dense)
    both["lm_head.weight"][0, 0] += 1
    assert of(write_hf(tmp_path / "apart", both)) != of(dense)


def test_configs_count_by_what_they_say(dense: Path) -> None:
    config = json.loads((dense / "config.json").read_text())

    def hashed(document: dict[str, Any]) -> bytes:
        return canonical_parts([Companion("config.json", json.dumps(document).encode(), "here")])["config"]

    same = dict(reversed(config.items())) | {"transformers_version": "4.1", "torch_dtype": "float32", "x": None}
    older = {k: v for k, v in config.items() if k != "rope_parameters"} | {"rope_theta": 10000}
    assert hashed(config) == hashed(same) == hashed(older)
    assert hashed(config) != hashed(older | {"rope_theta": 10001}) != hashed(config | {"vocab_size": 321})
    assert hashed(config) != hashed(config | {"rope_theta": 500.0})  # said twice and differently


def test_a_chat_template_is_one_wherever_it_stands(dense: Path) -> None:
    text = (dense / "chat_template.jinja").read_text()
    new = canonical_parts([Companion("chat_template.jinja", text.encode(), "here")])
    old = canonical_parts([Companion("tokenizer_config.json", json.dumps({"chat_template": text}).encode(), "here")])
    assert new["chat_template"] == old["chat_template"] and old["tokenizer"] == b'{"tokenizer_config.json":{}}'
    with refused("F07", "no UTF-8"):
        canonical_parts([Companion("chat_template.jinja", b"\xff", "here")])
    with refused("F07", "not valid JSON"):
        canonical_parts([Companion("config.json", b"{", "here")])


def test_what_has_no_hf_names_gets_no_identity(experts: Path, dense: Path, tmp_path: Path) -> None:
    torch.save({"block.0.w": torch.ones(2, 2)}, tmp_path / "a.pth")
    live = FORMS["live"](experts, tmp_path / "live", state_of(experts))
    (tmp_path / "live" / "config.json").unlink()
    titan = DENSE["torchtitan"](dense, tmp_path / "titan", state_of(dense))
    for place in (tmp_path / "titan" / "model", tmp_path / "titan"):
        (place / "config.json").unlink()
    for path, words in ((tmp_path / "a.pth", "no known scheme"), (live, "stack of experts"), (titan, "size of a head")):
        with pytest.raises(TensorkeepError, match=words) as caught:
            identify(path)
        assert caught.value.exit_code == 3


def test_a_quantized_gguf_has_an_identity_of_its_codes(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import gguf

    to(dense, tmp_path / "q.gguf", "gguf", dtype="Q8_0")
    model = identify(tmp_path / "q.gguf")
    stored = {t.name: t for t in gguf.GGUFReader(tmp_path / "q.gguf").tensors}
    given = {n: (t.tensor_type.name, t.shape[::-1].tolist(), t.data.tobytes()) for n, t in stored.items()}
    assert model.identity == reference.identity(given).hex()
    assert {leaf.dtype for leaf in model.leaves.values()} == {"Q8_0", "F16", "F32"} and model.of == "codes"
    to(tmp_path / "q.gguf", tmp_path / "values", "hf", dtype="F32")
    assert model.identity not in (of(dense), of(tmp_path / "values"))
    code, out, _ = run(capsys, "identify", tmp_path / "q.gguf", "--json")
    assert code == 0 and json.loads(out)["of"] == "codes"

    name = "blk.0.attn_q.weight"
    proof = prove_tensor(model, name)
    _, proven, leaf = check_proof(proof)
    assert check_tensor(read(tmp_path / "q.gguf"), proven, leaf)
    read_statement(state(model, "q"), "here")
    data = bytearray((tmp_path / "q.gguf").read_bytes())
    data[stored[name].data_offset + 40] ^= 1
    (tmp_path / "other.gguf").write_bytes(data)
    changed = identify(tmp_path / "other.gguf")
    assert [n for n in model.leaves if changed.leaves[n] != model.leaves[n]] == [name]
    with pytest.raises(TensorkeepError, match="is not the model"):
        demand(tmp_path / "other.gguf", model.identity)
    demand(tmp_path / "q.gguf", model.identity)
    odd = {**proof, "tensor": {**proof["tensor"], "shape": [3, 5]}}
    with pytest.raises(TensorkeepError, match="whole blocks"):
        check_proof(odd)


def test_a_tensor_is_proven_by_the_identity_alone(dense: Path, tmp_path: Path) -> None:
    model = identify(dense)
    to(dense, tmp_path / "a.gguf", "gguf")
    for name in model.leaves:
        proof = json.loads(json.dumps(prove_tensor(model, name)))
        identity, proven, leaf = check_proof(proof)
        assert (identity, proven) == (model.identity, name)
    assert check_tensor(read(tmp_path / "a.gguf"), proven, leaf)
    with refused("K01", "no tensor"):
        prove_tensor(model, "model.nrm.weight")


def test_a_proof_that_was_changed_anywhere_is_refused(dense: Path) -> None:
    proof = prove_tensor(identify(dense), "model.norm.weight")
    tensor = proof["tensor"]
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("F03", {"index": proof["index"] - 1}),
        ("F03", {"leaves": proof["leaves"] + 1}),
        ("F03", {"path": proof["path"][1:]}),
        ("F03", {"path": [*proof["path"], "00" * 32]}),
        ("F03", {"identity": "00" * 32}),
        ("F03", {"tensor": tensor | {"name": "model.layers.0.input_layernorm.weight"}}),
        ("F03", {"tensor": tensor | {"dtype": "F16"}}),
        ("F03", {"tensor": tensor | {"shape": [1, *tensor["shape"]]}}),
        ("F07", {"identity": proof["identity"][:40]}),
        ("F07", {"identity": proof["identity"].upper()}),
        ("F07", {"path": [proof["path"][0] + "00"]}),
        ("F07", {"tensor": tensor | {"content": "12"}}),
        ("F07", {"tensor": None}),
        ("F07", {"index": -1}),
        ("F07", {"index": True}),
        ("F07", {"leaves": 1 << 70}),
        ("F07", {"schema": 2}),
        ("F07", {"path": "x"}),
    ]
    for code, change in wrong:
        with refused(code):
            check_proof(proof | change)


def test_an_inner_node_is_no_leaf_and_a_count_is_part_of_the_identity() -> None:
    leaves = [bytes([n]) * 32 for n in range(8)]
    pairs = [merkle._node(merkle._NODE, a, b) for a, b in zip(leaves[::2], leaves[1::2])]
    assert merkle.identity(leaves) != merkle.identity(pairs)  # of equal roots
    assert merkle.identity_by(pairs[0], 0, 4, merkle.path(pairs, 0)) != merkle.identity(leaves)
    for count in range(1, 20):
        some = [bytes([n]) * 32 for n in range(count)]
        for index in range(count):
            assert merkle.identity_by(some[index], index, count, merkle.path(some, index)) == merkle.identity(some)


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([str(w) for w in words])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_the_commands(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "identify", dense, "--json")
    document = json.loads(out)
    assert code == 0 and document["schema"] == 1 and document["identity"] == of(dense)
    assert (document["path"], document["tensors"]) == (str(dense), 20)
    assert set(document["parts"]) == {"config", "tokenizer", "chat_template", "generation"}
    code, out, _ = run(capsys, "identify", dense)
    assert code == 0 and out.splitlines()[0] == of(dense)
    assert run(capsys, "identify", TINY, "--tensors")[1].count("BF16") == 20
    torch.save({"block.0.w": torch.ones(2, 2)}, tmp_path / "a.pth")
    code, out, err = run(capsys, "identify", tmp_path / "a.pth")
    assert code == 3 and out == "" and "no identity" in err
    proof = tmp_path / "proof.json"
    assert run(capsys, "prove", dense, "--tensor", "lm_head.weight", "-o", proof)[0] == 2  # no such tensor
    code, out, _ = run(capsys, "prove", dense, "--tensor", "model.norm.weight", "-o", proof)
    assert code == 0 and f"one of 20 tensors of {of(dense)}" in out
    assert run(capsys, "prove", dense, "--tensor", "model.norm.weight", "-o", proof)[0] == 2  # exists
    assert run(capsys, "prove", dense, "--tensor", "model.norm.weight", "-o", proof, "--overwrite")[0] == 0
    assert json.loads(run(capsys, "prove", dense, "--tensor", "model.norm.weight")[1]) == json.loads(proof.read_text())
    assert run(capsys, "verify", proof)[0] == 0
    to(dense, tmp_path / "a.gguf", "gguf")
    code, out, _ = run(capsys, "verify", tmp_path / "a.gguf", "--proof", proof, "--json")
    assert code == 0 and json.loads(out)["equal"] is True
    assert run(capsys, "verify", TINY, "--proof", proof)[0] == 1
    document = json.loads(proof.read_text())
    proof.write_text(json.dumps(document | {"index": 0}))
    code, out, err = run(capsys, "verify", proof)
    assert code == 2 and out == "" and "F03" in err


def test_diff_shows_identities_first(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to(dense, tmp_path / "a.gguf", "gguf")
    code, out, _ = run(capsys, "diff", dense, tmp_path / "a.gguf", "--json")
    assert json.loads(out)["identities"] == {"a": of(dense), "b": of(dense)}
    code, out, _ = run(capsys, "diff", dense, TINY)
    assert code == 1 and out.splitlines()[:2] == [f"identity of A: {of(dense)}", f"identity of B: {of(TINY)}"]
    torch.save({"block.0.w": torch.ones(2, 2)}, tmp_path / "a.pth")
    code, out, _ = run(capsys, "diff", tmp_path / "a.pth", tmp_path / "a.pth")
    assert code == 0 and out.startswith("identity of A: none")


def test_a_bill_of_materials_names_model_files_and_origin(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "bom.json"
    assert run(capsys, "identify", dense, "--bom", place)[0] == 0
    document = json.loads(place.read_text())
    whole = document["metadata"]["component"]
    assert (document["bomFormat"], document["specVersion"], whole["type"]) == (
        "CycloneDX",
        "1.6",
        "machine-learning-model",
    )
    assert {"name": "tensorkeep:identity", "value": of(dense)} in whole["properties"]
    assert whole["modelCard"]["modelParameters"] == {
        "architectureFamily": "llama",
        "modelArchitecture": "LlamaForCausalLM",
    }
    config = hashlib.sha256((dense / "config.json").read_bytes()).hexdigest()
    assert {"alg": "SHA-256", "content": config} in document["components"][0]["hashes"] + document["components"][1][
        "hashes"
    ]
    assert run(capsys, "identify", dense, "--bom", place)[0] == 2  # exists
    (tmp_path / "other.json").write_text("{}")
    assert run(capsys, "identify", dense, "--bom", tmp_path / "other.json", "--overwrite")[0] == 2
    made = tmp_path / "half"
    assert run(capsys, "convert", dense, made, "--to", "hf", "--dtype", "fp16", "--identify")[0] == 0
    assert run(capsys, "identify", made, "--bom", place, "--overwrite")[0] == 0
    ancestors = json.loads(place.read_text())["metadata"]["component"]["pedigree"]["ancestors"]
    assert [a["properties"][0]["value"] for a in ancestors] == [of(dense)]
