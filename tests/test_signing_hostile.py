"""What a loader would read is what was signed, or is named: nothing that is put beside, instead or away is verified."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tensorkeep.diagnosis.identity.identify import identify
from tensorkeep.diagnosis.identity.parts import counted
from tensorkeep.diagnosis.identity.statement import compare_with, read_statement, state
from tests.helpers import to
from tests.language_files import save_model
from tests.test_identity import half
from tests.test_signing import Keys, run

pytest.importorskip("model_signing.signing")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Head and embedding are two tensors of equal bytes, and a null says that there is no window."""
    folder = half(save_model(tmp_path_factory.mktemp("model") / "model", "llama", tie_word_embeddings=False))
    edit(folder / "config.json", sliding_window=None)
    state_ = load_file(folder / "model.safetensors")
    state_["lm_head.weight"] = state_["model.embed_tokens.weight"].clone()
    save_file(state_, folder / "model.safetensors", {"format": "pt"})
    return folder


def edit(file: Path, **fields: Any) -> None:
    document = json.loads(file.read_text()) if file.exists() else {}
    kept = {k: v for k, v in {**document, **fields}.items() if v is not ...}
    file.write_text(json.dumps(kept))


def evil(folder: Path) -> dict[str, torch.Tensor]:
    return {n: torch.ones_like(t) for n, t in load_file(folder / "model.safetensors").items()}


def shards_with_another_file(folder: Path) -> None:
    """transformers takes model.safetensors where there is one, whatever an index says."""
    other, (one, two) = evil(folder), (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    held = load_file(folder / "model.safetensors")
    places = {n: one if at % 2 else two for at, n in enumerate(held)}
    for file in (one, two):
        save_file({n: held[n] for n in places if places[n] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    save_file(other, folder / "model.safetensors", {"format": "pt"})


def bin_and_an_index_of_safetensors(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(evil(folder), "evil.safetensors")})
    )
    save_file(evil(folder), folder / "evil.safetensors", {"format": "pt"})
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def an_adapter_on_top(folder: Path) -> None:
    edit(folder / "adapter_config.json", peft_type="LORA", r=1, lora_alpha=1, target_modules=["q_proj"])
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora"
    factors = {f"{stem}_A.weight": torch.ones(1, 64), f"{stem}_B.weight": torch.ones(64, 1)}
    save_file(factors, folder / "adapter_model.safetensors")


def an_adapter_of_pickles(folder: Path) -> None:
    edit(folder / "adapter_config.json", peft_type="LORA", r=1, lora_alpha=1, target_modules=["q_proj"])
    torch.save({}, folder / "adapter_model.bin")


def without_its_head(folder: Path) -> None:
    held = load_file(folder / "model.safetensors")
    del held["lm_head.weight"]
    save_file(held, folder / "model.safetensors", {"format": "pt"})


def a_name_twice(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    more = b',"model.norm.weight":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}'
    header = data[8 : 8 + size].rstrip()[:-1] + more
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])


def a_member_twice(folder: Path) -> None:
    text = (folder / "config.json").read_text().rstrip()
    (folder / "config.json").write_text(text[:-1] + ', "hidden_act": "gelu"}')


def a_nan_of_other_bits(folder: Path) -> None:
    held = load_file(folder / "model.safetensors")
    held["model.norm.weight"].view(torch.int16)[0] = 0x7FC1
    save_file(held, folder / "model.safetensors", {"format": "pt"})


def a_negative_zero(folder: Path) -> None:
    held = load_file(folder / "model.safetensors")
    held["model.layers.0.mlp.up_proj.weight"][0, 0] = -0.0
    save_file(held, folder / "model.safetensors", {"format": "pt"})


def two_swapped(folder: Path) -> None:
    held = load_file(folder / "model.safetensors")
    one, two = (f"model.layers.{n}.mlp.up_proj.weight" for n in (0, 1))
    save_file({**held, one: held[two], two: held[one]}, folder / "model.safetensors", {"format": "pt"})


def one_behind_a_wrapper(folder: Path) -> None:
    held = load_file(folder / "model.safetensors")
    held["module.model.norm.weight"] = torch.ones_like(held["model.norm.weight"])
    save_file(held, folder / "model.safetensors", {"format": "pt"})


ATTACKS: list[tuple[Callable[[Path], Any], str]] = [
    (shards_with_another_file, "model.safetensors: transformers loads this too or instead"),
    (bin_and_an_index_of_safetensors, "F0"),
    (an_adapter_on_top, "F0"),
    (an_adapter_of_pickles, "F0"),
    (without_its_head, "K01 lm_head.weight: stored beside model.embed_tokens.weight"),
    (a_name_twice, "occurs twice"),
    (a_member_twice, "occurs twice"),
    (a_nan_of_other_bits, "model.norm.weight"),
    (a_negative_zero, "model.layers.0.mlp.up_proj.weight"),
    (two_swapped, "2 tensors changed since the statement"),
    (one_behind_a_wrapper, "K03"),
    (lambda f: edit(f / "config.json", sliding_window=...), "sliding_window is absent, was None"),
    (lambda f: edit(f / "config.json", _attn_implementation="org/kernel"), "_attn_implementation is 'org/kernel'"),
    (lambda f: edit(f / "config.json", auto_map={"AutoModel": "x.Y"}), "auto_map.AutoModel is 'x.Y', was absent"),
    (lambda f: edit(f / "tokenizer_config.json", chat_template="evil"), "not the chat template"),
    (lambda f: edit(f / "added_tokens.json", x=5), "added_tokens.json: not the tokenizer"),
    (lambda f: edit(f / "generation_config.json", temperature=9.5), "not the generation"),
    (lambda f: edit(f / "processor_config.json", a=1), "the statement has no processor"),
    (lambda f: (f / "evil.py").write_text("1"), "evil.py: the statement has no code"),
]


@pytest.mark.parametrize("case", range(len(ATTACKS)))
def test_what_a_loader_would_read_otherwise_is_found(
    case: int, signed: Path, keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    change, said = ATTACKS[case]
    change(signed)
    code, out, err = run(capsys, "verify", signed, "--key", keys / "own.pub")
    assert code in (1, 2) and "verified" not in out and said in out + err, (out, err)


BESIDE: list[tuple[str, Callable[[Path], Any]]] = [
    ("pytorch_model.bin", lambda f: torch.save({}, f / "pytorch_model.bin")),
    ("model.fp16.safetensors", lambda f: shutil.copy(f / "model.safetensors", f / "model.fp16.safetensors")),
    ("tokenizer.4.0.0.json", lambda f: edit(f / "tokenizer.4.0.0.json", a=1)),
    ("spiece.model", lambda f: (f / "spiece.model").write_bytes(b"x")),
    ("other.index.json", lambda f: edit(f / "other.index.json", a=1)),
    ("additional_chat_templates/", lambda f: (f / "additional_chat_templates").mkdir()),
    ("inner/", lambda f: (f / "inner").mkdir()),
]


@pytest.mark.parametrize(("name", "add"), BESIDE, ids=[n for n, _ in BESIDE])
def test_what_lies_beside_and_no_hash_covers_is_named(
    name: str, add: Callable[[Path], Any], signed: Path, keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    add(signed)
    code, out, _ = run(capsys, "verify", signed, "--key", keys / "own.pub")
    assert code == 0 and f"not covered by the statement: {name}" in out


def test_what_is_left_out_of_a_file_or_of_the_tensors_is_said(
    signed: Path, keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(signed / "tokenizer_config.json", tokenizer_file="/elsewhere/tokenizer.json")
    held = load_file(signed / "model.safetensors")
    held["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(held, signed / "model.safetensors", {"format": "pt"})
    code, out, _ = run(capsys, "verify", signed, "--key", keys / "own.pub")
    assert code == 0 and "not compared: name_or_path, tokenizer_file" in out
    assert "1 tensors of it do not count: a buffer that the model computes" in out


def test_a_copy_of_the_embedding_that_no_config_ties_is_compared_in_every_form(
    signed: Path, keys: Keys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for form, name in (("dcp", "dcp"), ("pth", "a.pth"), ("gguf", "a.gguf"), ("hf", "hf")):
        to(signed, tmp_path / name, form)
        code, out, err = run(capsys, "verify", tmp_path / name, "--statement", signed, "--key", keys / "own.pub")
        assert code == 0 and out.startswith("verified: "), (form, out, err)
    without_its_head(signed)
    statement = read_statement(state(identify(signed), "m"), "here")
    assert statement.apart == {}
    (found,) = compare_with(statement, identify(tmp_path / "hf"), None).findings
    assert (found.code, list(found.tensors)) == ("K02", ["lm_head.weight"])


def test_a_statement_of_before_counts_no_nulls_and_says_nothing_of_copies(signed: Path) -> None:
    document = json.loads((signed / "identity.json").read_text())
    predicate = document["predicate"]
    del predicate["nulls"], predicate["apart"], predicate["config"]["sliding_window"]
    model = identify(signed)
    edit(signed / "config.json", sliding_window=...)
    predicate["parts"]["config"] = identify(signed).parts["config"]
    old = read_statement(json.dumps(document).encode(), "here")
    assert [f for f in compare_with(old, model, None).findings if f.severity == "error"] == []
    assert counted({"sliding_window": None, "pad_token_id": None}) == {"sliding_window": None}


def test_a_folder_with_weights_that_would_be_loaded_instead_is_not_signed(
    model: Path, keys: Keys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model, tmp_path / "m")
    shards_with_another_file(tmp_path / "m")
    code, _, err = run(capsys, "sign", tmp_path / "m", "--key", keys / "own.pem")
    assert code == 2 and "transformers would load model.safetensors" in err
