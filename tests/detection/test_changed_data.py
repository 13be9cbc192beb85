"""A detection run on other data than it began with stops, and names the videos and the annotations that changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tensorkeep import cli
from tensorkeep.detection.data.clips import Clips
from tensorkeep.detection.data.file_ends import _END, digest_of_ends
from tests.detection.runs import dataset, document
from tests.test_older_versions import DATA


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two updates, its data beside it."""
    place = tmp_path_factory.mktemp("run")
    recipe = document(dataset(place / "data"))
    recipe["training"] = {**recipe["training"], "updates": 2, "epochs": None, "save_every": 2}
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    words = [
        "train",
        "detection",
        str(place / "recipe.yaml"),
        "--out",
        str(place / "out"),
        "--device",
        "cpu",
        "--quiet",
    ]
    assert cli.main(words) == 0
    return place


def first(data: Path) -> str:
    """The first video that is trained on."""
    videos = json.loads((data / "annotations.json").read_text())["database"]
    return next(n for n, v in videos.items() if v["subset"] == "training")


def one_byte(data: Path) -> str:
    (file,) = (data / "videos").glob(f"{first(data)}.*")
    held = bytearray(file.read_bytes())
    held[-1] ^= 1
    file.write_bytes(held)
    return f"data.files: {first(data)} has other content"


def another_second(data: Path) -> str:
    document_ = json.loads((data / "annotations.json").read_text())
    document_["database"][first(data)]["annotations"][0]["segment"][0] += 0.01
    (data / "annotations.json").write_text(json.dumps(document_))
    return f"data.files: {first(data)} (annotations) has other content"


def one_less(data: Path) -> str:
    document_ = json.loads((data / "annotations.json").read_text())
    name = first(data)
    del document_["database"][name]
    (data / "annotations.json").write_text(json.dumps(document_))
    return f"data.files: {name} is gone"


@pytest.mark.parametrize("change", [one_byte, another_second, one_less])
def test_a_resume_on_other_data_names_what_changed(
    change: Callable[[Path], str], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = run / "kept"
    shutil.copytree(run / "data", kept)
    try:
        said = change(run / "data")
        words = ["train", "detection", str(run / "recipe.yaml"), "--out", str(run / "out"), "--device", "cpu"]
        capsys.readouterr()
        assert cli.main([*words, "--training.updates", "4", "--allow", "training.updates"]) == 2
        err = capsys.readouterr().err
        assert "R04" in err and said in err, err
    finally:
        shutil.rmtree(run / "data")
        kept.rename(run / "data")


def test_data_that_did_not_change_are_no_other_data_however_they_are_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document_ = json.loads((run / "data" / "annotations.json").read_text())
    (run / "data" / "annotations.json").write_text(json.dumps(document_, indent=2, sort_keys=True))
    for path in (run / "data").rglob("*"):
        path.touch()
    (run / "link").symlink_to(run / "data")
    monkeypatch.chdir(run)
    for name in ("data", "link"):
        recipe = (run / "recipe.yaml").read_text().replace(str(run / "data"), f"./{name}")
        assert f"./{name}/videos" in recipe
        (run / "other.yaml").write_text(recipe)
        capsys.readouterr()
        assert cli.main(["train", "detection", "other.yaml", "--out", "out", "--device", "cpu"]) == 0
        assert "R04" not in capsys.readouterr().err


def test_two_films_that_changed_places_are_told_and_one_with_another_name_is_not() -> None:
    from tensorkeep.training._resume import _files_changed

    then = {"": "clips 1", "a": "1", "b": "2"}
    told = ["data.files: a has other content", "data.files: b has other content"]
    assert _files_changed(then, {"": "clips 1", "a": "2", "b": "1"}) == told
    assert _files_changed(then, {"": "clips 1", "c": "1", "b": "2"}) == []


def test_the_hint_of_a_refusal_is_enough(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "detection", str(run / "recipe.yaml"), "--out", str(run / "out"), "--device", "cpu"]
    words += ["--training.seed", "4"]
    capsys.readouterr()
    assert cli.main(words) == 2
    hint = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("hint"))
    assert "--allow training.seed" in hint
    assert cli.main([*words, *hint[hint.index("--allow") :].split()]) == 0


def test_of_a_file_size_and_both_ends_count_and_of_many_none(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(3 * _END))
    whole = digest_of_ends([tmp_path / "a"])
    for at, seen in ((0, True), (_END - 1, True), (3 * _END - 1, True), (_END + 5, False)):
        held = bytearray(3 * _END)
        held[at] = 1
        (tmp_path / "b").write_bytes(held)
        assert (digest_of_ends([tmp_path / "b"]) != whole) is seen
    (tmp_path / "b").write_bytes(bytes(3 * _END + 1))
    assert digest_of_ends([tmp_path / "b"]) != whole != digest_of_ends([tmp_path / "nothing"])


def test_a_checkpoint_of_before_has_no_such_digests_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(DATA / "detection", tmp_path / "d")
    monkeypatch.chdir(tmp_path / "d")
    states = list((tmp_path / "d" / "run").rglob("*.json"))
    assert states and not any('"clips 1"' in p.read_text() for p in states)
    assert cli.main(["train", "detection", "started_from.yaml", "--out", "run", "--device", "cpu"]) == 0, (
        capsys.readouterr().err
    )


def test_more_videos_than_are_named_have_no_digests(run: Path) -> None:
    item: Any = None
    assert Clips((item,) * 1001, None, None, ()).digests == {}  # type: ignore[arg-type]
