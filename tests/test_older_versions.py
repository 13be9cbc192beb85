"""Runs and a certificate that tensorkeep 0.1.0 wrote verify, go on, and give the numbers they would have given."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tensorkeep import cli
from tensorkeep.training import metrics
from tensorkeep.training import saver as checkpoint
from tests.tools import ROOT

DATA = Path(__file__).parent / "data" / "version_0_1_0"
KINDS = ("language", "detection")
# the step that was saved when each run was killed
SAVED = {"language": 3, "detection": 4}


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder in which the run was started, which is where paths in its recipe begin."""
    kind = request.node.callspec.params["kind"]
    if kind == "language":
        pytest.importorskip("transformers")
    else:
        pytest.importorskip("av")
    shutil.copytree(DATA / kind, tmp_path / kind)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as they were trained
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    monkeypatch.chdir(tmp_path / kind)
    return tmp_path / kind


def rows(run: Path) -> list[dict[str, Any]]:
    return metrics.comparable(run / metrics.METRICS)


def flat(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k != "evaluation"} | row.get("evaluation", {})


@pytest.mark.parametrize("recipe", ["started_from.yaml", "run/recipe.yaml"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_an_older_version_goes_on_with_its_own_numbers(
    kind: str, recipe: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", "run"]) == 0
    before = rows(folder / "run")
    command = ["train", kind, recipe, "--out", "run", "--device", "cpu"]
    assert cli.main(command) == 0
    said = capsys.readouterr().err
    assert f"resumed from step-{SAVED[kind]:06d}" in said and said.count(" now") >= 1
    found, expected = rows(folder / "run"), json.loads((folder / "expected_rows.json").read_text())
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    kept = [row for row in before if row["step"] <= SAVED[kind]]
    assert found[: len(kept)] == kept and len(found) > len(kept)
    # kernels of another machine may round otherwise, and 0.1.0 did not write down which processor it was
    assert f"at step {SAVED[kind]}, sample-exact" in said
    for row, then in zip(found[len(kept) :], expected[len(kept) :]):
        assert flat(row) == pytest.approx(flat(then), rel=1e-5, abs=1e-8)
    assert cli.main(["verify", "run"]) == 0
    # what it wrote is of this version, and goes on as well
    assert yaml.safe_load((folder / "run" / "recipe.yaml").read_text())["version"] == 2
    newest = checkpoint.newest(folder / "run")
    assert newest is not None and newest[0].document["recipe"]["version"] == 2
    assert cli.main(["train", kind, "run/recipe.yaml", "--out", "run", "--device", "cpu"]) == 0
    assert rows(folder / "run") == found and " now" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_a_field_that_did_change_is_still_another_run(
    kind: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", kind, "started_from.yaml", "--out", "run", "--device", "cpu", "--optimizer.lr", "0.5"]
    assert cli.main(command) == 2
    assert "R04" in (said := capsys.readouterr().err) and "optimizer.lr was 0.002, is 0.5\n" in said


@pytest.mark.parametrize("kind", KINDS)
def test_diagnosis_sees_one_recipe_in_two_versions_and_a_change_between_them(
    kind: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorkeep.training.migration import migrated

    def codes() -> list[str]:
        cli.main(["diagnose", f"run/checkpoints/step-{SAVED[kind]:06d}", "--json"])
        return [found["code"] for found in json.loads(capsys.readouterr().out)["findings"]]

    place = folder / "run" / "recipe.yaml"
    document = migrated(yaml.safe_load(place.read_text()))[0]
    place.write_text(yaml.safe_dump(document))
    assert "R04" not in codes()
    place.write_text(yaml.safe_dump(document | {"optimizer": {**document["optimizer"], "lr": 0.5}}))
    assert "R04" in codes()


def test_a_certificate_of_an_older_version_verifies_and_proves_the_same_tensors() -> None:
    sink = str(DATA / "certificate" / "dcp")
    assert cli.main(["verify", sink]) == 0
    assert cli.main(["diff", str(ROOT / "examples" / "tiny-llama"), sink]) == 0
