"""What a model was made from: recorded, checked by whoever has the sources, made again; no gap is passed over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tensorkeep.cli import main
from tests.test_signing import Keys, run
from tests.tools import ROOT, TINY

pytest.importorskip("model_signing.signing")
ADAPTER = ROOT / "examples" / "tiny-adapter"


@pytest.fixture
def chain(tmp_path: Path, keys: Keys) -> dict[str, Path]:
    """A signed base, a merge of it and an adapter, and the merge cast to float16 in another format."""
    made = {"base": tmp_path / "base", "merged": tmp_path / "merged", "cast": tmp_path / "cast"}
    shutil.copytree(TINY, made["base"])
    key = str(keys / "own.pem")
    words = [
        ["sign", made["base"], "--key", key],
        ["merge", made["base"], f"{ADAPTER}=0.5", made["merged"], "--sign-key", key],
        ["convert", made["merged"], made["cast"], "--to", "dcp", "--dtype", "fp16", "--sign-key", key],
    ]
    for line in words:
        assert main([str(w) for w in (*line, "--quiet")]) == 0
    return {**made, "adapter": ADAPTER}


def ask(chain: dict[str, Path], what: str, *given: str, **more: object) -> list[object]:
    """The words that check one model of the chain with some of the others."""
    return ["verify", chain[what], "--derivation", *(w for name in given for w in ("--from", chain[name]))]


def test_a_chain_is_checked_with_signatures_and_made_again(
    chain: dict[str, Path], keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*ask(chain, "cast", "base", "adapter", "merged"), "--key", keys / "own.pub"]
    code, out, err = run(capsys, *words)
    assert code == 0 and err == "" and out.count("made again, equal") == 2
    assert "0 of 20 tensors unchanged" in out and "16 of 20 tensors unchanged" in out
    code, out, _ = run(capsys, *words, "--json")
    links = json.loads(out)["derivation"]["links"]
    assert [(link["made"], link["unchanged"], link["made_again"]) for link in links] == [
        ("convert", 0, True),
        ("merge", 16, True),
    ]
    assert [(e["role"], e.get("weight")) for e in links[1]["from"]] == [("base", None), ("adapter", "0.5")]


@pytest.mark.parametrize("gap", ["base", "adapter", "merged"])
def test_a_chain_with_a_missing_link_is_refused(
    gap: str, chain: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    given = [n for n in ("base", "adapter", "merged") if n != gap]
    code, out, err = run(capsys, *ask(chain, "cast", *given))
    assert code == 2 and out == "" and err.count("error:") == 1 and "F05" in err and "a link is missing" in err


def test_a_source_in_another_format_is_the_same_link(
    chain: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The merge was made from a base with a statement: another copy of it needs that statement beside it."""
    assert main(["convert", str(chain["base"]), str(tmp_path / "other"), "--to", "dcp", "--quiet"]) == 0
    (tmp_path / "other" / "identity.json").unlink()
    other = {**chain, "base": tmp_path / "other"}
    code, _, err = run(capsys, *ask(other, "merged", "base", "adapter"))
    assert code == 2 and "the statement of" in err
    shutil.copy(chain["base"] / "identity.json", tmp_path / "other" / "identity.json")
    assert run(capsys, *ask(other, "merged", "base", "adapter"))[0] == 0


def rewritten(place: Path, change: Any) -> None:
    """Change what a statement says of how its model was made."""
    document = json.loads(place.read_text())
    change(document["predicate"]["derivation"])
    place.write_text(json.dumps(document))


LIES: list[tuple[str, Any, str]] = [
    ("another weight", lambda d: d["from"][1].update(weight="0.25"), "made again from its sources"),
    ("another count", lambda d: d.update(unchanged=17, changed=3), "16 are"),
    ("another command", lambda d: d.update(made="magic"), "was made by"),
    ("another recipe", lambda d: d["recipe"].update(dtype="F16"), "made again from its sources"),
    ("a recipe of another type", lambda d: d["recipe"].update(dtype=3), "the recipe's dtype"),
    ("no sources", lambda d: d.update({"from": []}), "names no sources"),
    ("a short hash", lambda d: d["from"][0].update(identity="ab"), "not 64 hex digits"),
    ("no number", lambda d: d["from"][1].update(weight="much"), "gives the weight"),
    ("a weight without end", lambda d: d["from"][1].update(weight="inf"), "gives the weight"),
    ("no dtype", lambda d: d["recipe"].update(dtype="F99"), "the recipe's dtype"),
    ("no such way", lambda d: d["recipe"].update(onto="both"), "the recipe's onto"),
    ("a list for a recipe", lambda d: d.update(recipe=[]), "was made by"),
    ("another statement", lambda d: d["from"][0].update(statement_sha256="ab" * 32), "another statement"),
    ("itself as the base", lambda d: d["from"].reverse(), ""),
]


@pytest.mark.parametrize(("lie", "change", "said"), LIES, ids=[lie for lie, *_ in LIES])
def test_a_false_derivation_is_one_error(
    lie: str, change: Any, said: str, chain: dict[str, Path], keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    rewritten(chain["merged"] / "identity.json", change)
    code, out, err = run(capsys, *ask(chain, "merged", "base", "adapter"))
    assert code == 2 and out == "" and err.count("error:") == 1 and said in err
    code, out, err = run(capsys, *ask(chain, "merged", "base", "adapter"), "--key", keys / "own.pub")
    assert code == 2 and out == "" and "a signature of another statement" in err


def test_a_merge_that_was_changed_afterwards_is_found_though_its_statement_was_made_anew(
    chain: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever signs can say anything of how a model was made; making it again shows what is not so."""
    said = json.loads((chain["merged"] / "identity.json").read_text())["predicate"]["derivation"]
    file = chain["merged"] / "model.safetensors"
    state = load_file(file)
    name = "model.layers.0.self_attn.q_proj.weight"
    state[name].view(torch.uint8)[0, 0] ^= 1
    save_file(state, file, metadata={"format": "pt"})
    from tensorkeep.diagnosis.identity.identify import identify
    from tensorkeep.diagnosis.identity.statement import state as stated

    (chain["merged"] / "identity.json").write_bytes(stated(identify(chain["merged"]), "merged", said))
    code, out, err = run(capsys, *ask(chain, "merged", "base", "adapter"))
    assert code == 2 and "made again from its sources" in err and name in err and out == ""


def test_a_repair_records_what_it_moved_from_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: Keys
) -> None:
    state = load_file(TINY / "model.safetensors")
    one, two = (f"model.layers.{n}.mlp.up_proj.weight" for n in (0, 1))
    state[one], state[two] = state[two].clone(), state[one].clone()
    shutil.copytree(TINY, tmp_path / "broken", ignore=shutil.ignore_patterns("tensorkeep.json"))
    save_file(state, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    words = ["repair", tmp_path / "broken", tmp_path / "mended", "--reference", TINY, "--identify"]
    assert run(capsys, *words)[0] == 0
    words = ["verify", tmp_path / "mended", "--derivation", "--from", tmp_path / "broken", "--from", TINY]
    code, out, err = run(capsys, *words)
    assert code == 0 and "made again, equal; 18 of 20 tensors unchanged" in out, err


def test_what_says_nothing_of_its_making_is_no_chain(
    tmp_path: Path, keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(TINY, tmp_path / "base")
    assert run(capsys, "sign", tmp_path / "base", "--key", keys / "own.pem")[0] == 0
    code, out, err = run(capsys, "verify", tmp_path / "base", "--derivation")
    assert code == 2 and out == "" and "does not say what its model was made from" in err
    assert run(capsys, "verify", TINY, "--derivation", "--identity", "ab" * 32)[0] == 2
    assert run(capsys, "verify", TINY, "--from", TINY)[0] == 2
    assert run(capsys, "verify", TINY, "--issuer", "https://example.org")[0] == 2
