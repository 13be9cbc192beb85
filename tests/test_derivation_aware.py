"""Codes of quantize-aware runs record what they were made from, and are made again from the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tensorkeep.cli import main
from tensorkeep.diagnosis.identity.identify import identify
from tensorkeep.diagnosis.identity.statement import state
from tests import test_aware
from tests.test_derivation_bits import derivation
from tests.test_signing import Keys, run

pytest.importorskip("model_signing.signing")
place, runs = test_aware.place, test_aware.runs  # fixtures: bases, and quantize-aware runs


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys"))


@pytest.mark.parametrize(
    ("name", "kind", "ema"), [("floats", "nf4", False), ("codes", "nf4", True), ("q4_0",) * 2 + (False,)]
)
def test_codes_of_a_run_that_was_trained_for_them_are_made_again_from_the_run(
    name: str, kind: str, ema: bool, runs: Any, keys: Keys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / ("out" if kind == "nf4" else "out.gguf")
    words = ["merge", runs[name], out, "--to-bits", kind, "--sign-key", keys / "own.pem", *["--ema"][: int(ema)]]
    code, _, err = run(capsys, *words)
    assert code == 0, err
    said = derivation(out)
    assert said["recipe"]["rounding"]["by"] == "training" and said["recipe"]["rounding"]["averaged"] is ema
    from tensorkeep.commands.export import base_of_run, run_at

    base = base_of_run(run_at(str(runs[name])))  # type: ignore[arg-type]
    ask = ["verify", out, "--key", keys / "own.pub", "--derivation", "--from", base, "--from"]
    code, shown, err = run(capsys, *ask, runs[name])
    assert code == 0 and "made again, equal" in shown and shown.startswith("verified: "), (shown, err)
    exported = ["convert", runs[name], tmp_path / "adapter", "--to", "peft", *["--ema"][: int(ema)]]
    assert run(capsys, *exported)[0] == 0
    code, shown, _ = run(capsys, *ask, tmp_path / "adapter")
    assert code == 3 and "give the run itself" in shown and "verified" not in shown
    if kind != "nf4":
        return
    state_ = load_file(out / "model.safetensors")
    mine_, theirs = identify(out).leaves, identify(base).leaves
    coded = next(n for n in mine_ if n.endswith(".weight") and mine_[n].dtype == "U8" and theirs.get(n) != mine_[n])
    plain = "model.norm.weight"
    for changed, exit_code, word in ((coded, 3, "came out otherwise"), (plain, 2, "made again from its sources")):
        mine = {n: t.clone() for n, t in state_.items()}
        mine[changed].view(torch.uint8).view(-1)[0] ^= 1
        save_file(mine, out / "model.safetensors", {"format": "pt"})
        again = dict(said)
        if changed == plain:
            again |= {"unchanged": said["unchanged"] - 1, "changed": said["changed"] + 1}
        (out / "identity.json").write_bytes(state(identify(out), "out", again))
        code, shown, err = run(capsys, *[w for w in ask if w not in ("--key", keys / "own.pub")], runs[name])
        assert code == exit_code and word in shown + err and "verified" not in shown, (shown, err)


def test_who_signs_is_known_before_codes_are_made(
    runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["merge", runs["floats"], tmp_path / "out", "--to-bits", "nf4", "--sign-key", tmp_path / "none.pem"]
    assert run(capsys, *words)[0] == 2 and not (tmp_path / "out").exists()
    assert main(["merge", str(runs["floats"]), str(tmp_path / "plain"), "--identify", "--quiet"]) == 0
    assert derivation(tmp_path / "plain")["recipe"]["onto"] == "trained"


def test_codes_are_not_verified_as_made_from_what_the_run_was_not_trained_on(
    runs: Any, place: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.language_files import save_model

    run_, out, base, other = runs["codes"], tmp_path / "out", place / "nf4", tmp_path / "other"
    shape = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "attention_bias": True}
    save_model(other, "llama", **shape, initializer_range=0.5)
    for name, more in (("live", []), ("average", ["--ema"])):
        assert run(capsys, "convert", run_, tmp_path / name, "--to", "peft", *more)[0] == 0
    assert run(capsys, "merge", run_, out, "--to-bits", "nf4", "--ema", "--identify")[0] == 0
    said, mine = derivation(out), identify(out)
    ask = ["verify", out, "--derivation", "--from", base, "--from", other, "--from", run_]
    assert run(capsys, *ask)[0] == 0
    first, last = said["from"]
    live = {**last, "identity": identify(tmp_path / "live").identity}
    foreign = {**first, "identity": identify(other).identity}
    for sources in ([foreign, last], [first, {**last, "weight": "5.0"}], [first, live, last], [first, live], [last]):
        named = {identify(p).identity: identify(p) for p in (base, other, tmp_path / "average")}
        leaves = named[sources[0]["identity"]].leaves
        same = sum(leaves.get(n) == leaf for n, leaf in mine.leaves.items())
        counts = {"unchanged": same, "changed": len(mine.leaves) - same}
        (out / "identity.json").write_bytes(state(mine, "out", {**said, "from": sources, **counts}))
        code, shown, err = run(capsys, *ask)
        assert code == 2 and shown == "" and ("F03" in err or "F07" in err), (sources, shown, err)
