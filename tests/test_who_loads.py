"""Where we say "proven: loads in X", X loads it: bitwise, and with nothing to say. Where we refuse, it would not."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tensorkeep.cli import main
from tests.tools import ROOT
from tests.who_loads import ADAPTERS, ROWS, SOURCES, Row, Source, adapter, by_peft, complaints, made, tried

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = tmp_path_factory.mktemp("sources")
    return cache(lambda name: made(name, place / name.replace(" ", "-")))


def converted(source: Source, sink: Path, words: str) -> tuple[int, dict[str, Any], str]:
    """The exit code, the document and the errors of one conversion."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["convert", str(source.folder), str(sink), *words.split(), "--json"])
    return code, json.loads(out.getvalue()) if code == 0 else {}, err.getvalue()


@pytest.fixture(scope="module")
def verdict(sources: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What becomes of a source in a sink, and whether that is right: (word of the table, what is wrong)."""

    @cache
    def found(row: Row, name: str) -> tuple[str, list[str]]:
        source, place = sources(name), tmp_path_factory.mktemp("sink")
        code, document, _ = converted(source, place / row.name, row.words)
        if code == 0:
            said = tried(row, place / row.name, source)
            proven = document["proof"]["target"] is not None
            return ("proven" if proven else "unchecked" if said else "loads"), said if proven else []
        left = [] if code == 2 and not list(place.iterdir()) else ["something was written"]
        code, document, _ = converted(source, place / row.name, row.undeclared or row.words)
        if code == 0 and (document["proof"]["target"] or not tried(row, place / row.name, source)):
            left.append("it would have loaded")
        return "refused", left

    return found


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.words} {row.name}")
def test_what_is_proven_loads_and_what_is_refused_does_not(row: Row, name: str, verdict: Any) -> None:
    assert verdict(row, name)[1] == []


def test_the_page_shows_what_the_programs_did(verdict: Any) -> None:
    page = (ROOT / "docs" / "reference" / "who-loads-it.md").read_text()
    lines = []
    for row in ROWS:
        cells: dict[str, list[str]] = {}
        for name in SOURCES:
            cells.setdefault(verdict(row, name)[0], []).append(name)
        shown = [", ".join(cells.get(word, [])) for word in ("proven", "loads", "refused", "unchecked")]
        lines.append(f"| `{row.words}` ({row.name}) | {row.program} | {' | '.join(shown)} |")
    titan = {to: ", ".join(n for n, t in TITAN if t == to) for to in ("dcp", "hf")}
    lines += [f"| `--to {to} --for torchtitan` (out) | torchtitan | {titan[to]} | | " for to in titan]
    lines = [re.sub(r" +", " ", line) for line in lines]
    print("\n".join(lines))
    assert [line for line in lines if line.strip() not in re.sub(r" +", " ", page)] == []
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line[:60])
    for program in ("transformers", "torch", "peft", "bitsandbytes", "safetensors"):
        assert f"{program} {pins[program].split()[0]}" in page


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_that_is_proven_loads_in_peft(
    kind: str, sources: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = sources("qwen2" if kind == "biases" else "llama")
    wanted = adapter(ADAPTERS[kind], source, tmp_path / "adapter")
    code = main(["convert", str(tmp_path / "adapter"), str(tmp_path / "out"), "--to", "peft", "--json"])
    proof = json.loads(capsys.readouterr().out)["proof"]
    assert (code, proof["target"], proof["objection"]) == (0, "peft", None)
    assert by_peft(tmp_path / "out", source, wanted) == []


@pytest.mark.parametrize(
    ("changed", "code"),
    [({"r": 2}, "S01"), ({"target_modules": ["up_proj"]}, "A01"), ({"target_modules": ["q_proj"]}, "K02")],
)
def test_an_adapter_that_contradicts_its_config_is_refused(
    changed: dict[str, Any], code: str, sources: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = adapter(ADAPTERS["two projections"], sources("llama"), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    words = ["convert", str(tmp_path / "adapter"), str(tmp_path / "out"), "--to", "peft"]
    assert main([*words, "--for", "peft"]) == 2 and not (tmp_path / "out").exists()
    assert code in capsys.readouterr().err
    assert main(words) == 0 and "peft" in capsys.readouterr().out
    with pytest.raises((RuntimeError, ValueError, AssertionError)):
        assert by_peft(tmp_path / "out", sources("llama"), wanted) == []


# -- OpenTAD -----------------------------------------------------------------------------------------------------------


def test_a_detector_that_is_proven_has_every_key_of_opentads_strict_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.detection.test_conversion import checkpoint
    from tests.opentad_names import to_opentad

    wanted = {f"module.{n}": t for n, t in to_opentad(checkpoint(tmp_path / "epoch_59.pth")).items()}
    words = ["convert", str(tmp_path / "epoch_59.pth"), str(tmp_path / "out.pth"), "--to", "pth", "--for", "opentad"]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["proof"]["target"] == "opentad"
    state = torch.load(tmp_path / "out.pth", weights_only=True)
    assert complaints(state["state_dict"], wanted) == complaints(state["state_dict_ema"], wanted) == []
    assert main([*words[:2], str(tmp_path / "less.pth"), *words[3:], "--drop", "**neck.fpn_norms.0.weight"]) == 2
    assert "K01" in capsys.readouterr().err and not (tmp_path / "less.pth").exists()


# -- torchtitan --------------------------------------------------------------------------------------------------------

TITAN = [
    *((name, "dcp") for name in ("llama", "llama tied", "qwen3", "qwen3 tied")),
    *((name, "hf") for name in ("llama", "llama tied", "qwen3", "qwen3 tied", "qwen3 moe")),
]


def test_torchtitan_has_no_place_for_biases_and_asks_for_the_experts_load(sources: Any, tmp_path: Path) -> None:
    for name, words in (("qwen3 moe", "moe.expert_bias_E"), ("qwen2", "torchtitan has no model for 'qwen2'")):
        code, _, said = converted(sources(name), tmp_path / "out", "--to dcp --for torchtitan")
        assert code == 2 and words in said and not (tmp_path / "out").exists()
    code, document, _ = converted(sources("qwen3 moe"), tmp_path / "own", "--to dcp --naming torchtitan")
    assert code == 0 and document["proof"]["target"] is None and "expert_bias_E" in document["proof"]["objection"]


@pytest.mark.skipif("TENSORKEEP_TORCHTITAN" not in os.environ, reason="torchtitan is installed apart")
@pytest.mark.parametrize("version", ["0.3", "0.2"])
def test_what_is_proven_for_torchtitan_loads_there(version: str, sources: Any, tmp_path: Path) -> None:
    pairs: list[str] = []
    for name, to in TITAN:
        if version == "0.2" and to == "hf" and name == "llama tied":
            continue  # its llama ties nothing, and asks for the head
        words = f"--to {to} --for torchtitan" + (" --naming torchtitan-0.2" if (version, to) == ("0.2", "dcp") else "")
        for more in ["", " --ranks 3"] if to == "dcp" else [""]:
            sink = tmp_path / f"{name}-{to}{more}".replace(" ", "-")
            code, document, _ = converted(sources(name), sink, words + more)
            assert (code, document["proof"]["target"]) == (0, "torchtitan"), name
            pairs += [str(sink), str(sources(name).folder)]
    place = os.environ["TENSORKEEP_TORCHTITAN" if version == "0.3" else "TENSORKEEP_TORCHTITAN_02"]
    words = [sys.executable, str(ROOT / "tests" / "torchtitan_program.py"), *pairs]
    done = subprocess.run(words, env=os.environ | {"PYTHONPATH": place}, capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    tied = {"missing": ["lm_head.weight"], "differ": []}  # 0.2's llama has a head of its own, and gives it back
    assert [f for f in found if f != {"missing": [], "differ": []}] in ([], [tied])
    assert len(found) == len(pairs) // 2
