"""Merges into codes record what they were made from; what nobody can make again is said so, and is never verified."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests import test_rounding
from tests.test_derivation import rewritten
from tests.test_signing import Keys, run

pytest.importorskip("model_signing.signing")
place = test_rounding.place  # a fixture: a base, an adapter and texts


def derivation(folder: Path) -> Any:
    statement = folder / "identity.json" if folder.is_dir() else folder.with_name(f"{folder.name}.identity.json")
    return json.loads(statement.read_text())["predicate"]["derivation"]


@pytest.mark.parametrize("kind", ["nf4", "q4_k"])
def test_codes_by_texts_name_the_texts_and_are_not_said_to_be_made_again(
    kind: str, place: Path, keys: Keys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / ("out" if kind == "nf4" else "out.gguf")
    words = ["merge", place / "base", place / "adapter", out, "--to-bits", kind, "--device", "cpu"]
    texts = place / "short-texts.jsonl"
    assert run(capsys, *words, "--calibrate", texts, "--sign-key", keys / "own.pem")[0] == 0
    said = derivation(out)
    sha256 = hashlib.sha256(texts.read_bytes()).hexdigest()
    assert said["recipe"]["rounding"]["texts"] == [{"name": texts.name, "sha256": sha256}]
    assert (said["made"], said["recipe"]["to_bits"]) == ("merge", kind)
    assert [e["role"] for e in said["from"]] == ["base", "adapter"]
    ask = ["verify", out, "--derivation", "--from", place / "base", "--from", place / "adapter"]
    code, shown, err = run(capsys, *ask, "--key", keys / "own.pub")
    assert code == 3 and err == "" and "verified" not in shown and "codes not made again" in shown
    assert "inconclusive" in shown and shown.startswith("signed: ")
    code, shown, _ = run(capsys, *ask, "--json")
    (link,) = json.loads(shown)["derivation"]["links"]
    assert code == 3 and link["made_again"] is False and "BLAS" in link["said"]
    assert (link["unchanged"] > 0) is (kind == "nf4")
    code, _, err = run(capsys, *ask[:-2])
    assert code == 2 and "a link is missing" in err
    statement = out / "identity.json" if kind == "nf4" else tmp_path / "out.gguf.identity.json"
    for change in (
        lambda d: d["recipe"]["rounding"].update(texts=[]),
        lambda d: d["recipe"]["rounding"]["texts"][0].update(sha256="ab"),
        lambda d: d["recipe"]["rounding"].update(by="magic"),
        lambda d: d["recipe"].pop("rounding"),
    ):
        kept = statement.read_bytes()
        rewritten(statement, change)
        code, shown, err = run(capsys, *ask)
        assert code == 2 and shown == "" and "F07" in err
        statement.write_bytes(kept)
