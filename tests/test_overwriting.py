"""`--overwrite` replaces what is of the kind that is written, whole, and nothing that is anybody else's."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorkeep.cli import main
from tensorkeep.conversion.execution import convert
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.companions import COMPANIONS
from tensorkeep.formats.earlier import CHECKPOINT
from tensorkeep.formats.view import read
from tensorkeep.storage.files import CERTIFICATE
from tensorkeep.storage.overwriting import PAGE, Kind, lone_file, refuse_existing
from tensorkeep.training.shipped import shipped
from tests.run_states import state as run_state
from tests.samples import everything, plan_of, read_all, run, state, write_hf

FOLDERS = ["hf", "dcp", "pth"]
FILES = [("hf", "out.safetensors"), ("pth", "out.pth"), ("pth", "out.bin")]
CONFIGS = Path(__file__).parent / "data" / "opentad_configs"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "source")


def tree(folder: Path) -> dict[str, str]:
    """Every name below a folder with what it is: its bytes, or where it leads."""
    found = {}
    for path in sorted(folder.rglob("*")):
        link, name = path.is_symlink(), str(path.relative_to(folder))
        found[name] = str(path.readlink()) if link else path.read_bytes().hex() if path.is_file() else "folder"
    return found


def refused(source: Path, out: Path, to: str) -> TensorkeepError:
    """The error of an overwrite that is refused before and without any change."""
    before = tree(out.parent)
    with pytest.raises(TensorkeepError) as caught:
        convert(plan_of(source, to), str(out), to, overwrite=True)
    assert caught.value.exit_code == 2 and caught.value.hint and tree(out.parent) == before
    return caught.value


def file(place: Path, name: str) -> str:
    (place / name).parent.mkdir(parents=True, exist_ok=True)
    (place / name).write_text("years of work")
    return name


def link(place: Path, name: str, target: str) -> str:
    (place / name).symlink_to(target)
    return name


def weights(place: Path, name: str) -> str:
    torch.save({"w": torch.ones(2)}, place / name)
    return name


# what somebody may have put into a folder that also holds a checkpoint
STRANGERS: dict[str, Callable[[Path], str]] = {
    "a text": lambda place: file(place, "thesis.tex"),
    "a readme": lambda place: file(place, "README.md"),
    "a hidden file": lambda place: file(place, ".env"),
    "a file in a subfolder": lambda place: file(place, "src/deep/thesis.tex"),
    "a companion's name in a subfolder": lambda place: file(place, "src/config.json"),
    "an empty subfolder": lambda place: [(place / "empty").mkdir(), "empty"][1],
    "a link to a file": lambda place: link(place, "notes", "../source/config.json"),
    "a link to a folder": lambda place: link(place, "data", "../source"),
    "a link to nothing": lambda place: link(place, "gone", "nowhere"),
    "an optimizer": lambda place: weights(place, "optimizer.pt"),
    "other weights": lambda place: weights(place, "best.ckpt"),
}


@pytest.mark.parametrize("form", FOLDERS)
@pytest.mark.parametrize("kind", STRANGERS)
def test_a_checkpoint_s_folder_with_anything_else_in_it_stays(
    form: str, kind: str, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(source, out, form)
    name = STRANGERS[kind](out)
    error = refused(source, out, "hf")
    assert name in error.what or "best.ckpt" in error.what or "thesis" in error.what, error.line


@pytest.mark.parametrize("kind", STRANGERS)
def test_a_folder_without_a_checkpoint_stays(kind: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    STRANGERS[kind](tmp_path / "out")
    if kind == "other weights":  # alone it is a checkpoint, and may be replaced
        file(tmp_path / "out", "notes.txt")
    refused(source, tmp_path / "out", "dcp")


def test_all_are_counted_and_the_first_named(source: Path, tmp_path: Path) -> None:
    for number in range(7):
        file(tmp_path / "out", f"chapter_{number}.tex")
    error = refused(source, tmp_path / "out", "hf")
    assert "chapter_0.tex" in error.what and "7 in all" in error.what and "chapter_6" not in error.what


@pytest.mark.parametrize("first", [*FOLDERS, "peft"])
@pytest.mark.parametrize("second", FOLDERS)
def test_an_earlier_sink_is_replaced_with_its_companions(first: str, second: str, source: Path, tmp_path: Path) -> None:
    for name in COMPANIONS[1:]:
        (source / name).write_text("{}")
    (source / "recipe.yaml").unlink()
    out = tmp_path / "out"
    if first == "peft":
        shutil.copytree(everything(tmp_path / "kinds")["peft"], out)
    else:
        run(source, out, first)
    convert(plan_of(source, second), str(out), second, overwrite=True)
    assert read(out).format == second and set(read_all(out)) == set(state())


@pytest.mark.parametrize("kind", ["single", "sharded", "dcp", "peft"])
def test_other_programs_checkpoints_are_replaced(kind: str, source: Path, tmp_path: Path) -> None:
    place = everything(tmp_path / "kinds")[kind]
    convert(plan_of(source, "hf"), str(place), "hf", overwrite=True)
    assert set(read(place)) == set(state())


def test_a_damaged_sink_of_ours_is_known_by_its_certificate(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(source, out, "dcp")
    (out / ".metadata").write_bytes(b"cut")
    assert convert(plan_of(source, "hf"), str(out), "hf", overwrite=True).digests
    (out / "model.safetensors").write_bytes(b"cut")
    file(out, "mine.safetensors")
    assert "mine.safetensors" in refused(source, out, "hf").what
    (out / "mine.safetensors").unlink()
    (out / CERTIFICATE).write_text("{}")
    assert "model.safetensors" in refused(source, out, "hf").what


def test_a_run_and_a_step_of_one_are_no_sinks(source: Path, tmp_path: Path) -> None:
    from tensorkeep.training.saver import save

    run_folder = tmp_path / "run"
    step = save(run_folder, run_state(1))
    save(run_folder, run_state(2))
    refused(source, run_folder, "hf")
    assert "optimizer.safetensors" in refused(source, step, "hf").what


# -- lone files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to, name", FILES)
def test_a_lone_file_that_is_no_checkpoint_stays(to: str, name: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / name
    for content in (b"years of work", pickle.dumps({"accuracy": [0.5]}), b"\0" * 64):
        out.write_bytes(content)
        assert "not a checkpoint" in refused(source, out, to).what
    out.unlink()
    (tmp_path / "out").mkdir()
    os.mkfifo(out)
    assert "not a checkpoint" in refused_but_for_the_pipe(source, out, to).what


def refused_but_for_the_pipe(source: Path, out: Path, to: str) -> TensorkeepError:
    with pytest.raises(TensorkeepError) as caught:
        convert(plan_of(source, to), str(out), to, overwrite=True)
    assert out.is_fifo()
    return caught.value


@pytest.mark.parametrize("to, name", FILES)
def test_a_lone_checkpoint_is_replaced_whole_or_damaged(to: str, name: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / name
    run(source, out, to)
    out.write_bytes(out.read_bytes()[:50])  # its certificate lies beside
    convert(plan_of(source, to), str(out), to, overwrite=True)
    (tmp_path / f"{name}.{CERTIFICATE}").unlink()
    convert(plan_of(source, to), str(out), to, overwrite=True)  # it reads
    assert set(read_all(out)) == set(state())


def test_a_file_where_the_certificate_goes_stays(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.pth"
    beside = tmp_path / f"out.pth.{CERTIFICATE}"
    for content in ("mine", '{"mine": 1}'):
        beside.write_text(content)
        with pytest.raises(TensorkeepError, match="not a certificate"):
            convert(plan_of(source, "pth"), str(out), "pth")
        assert beside.read_text() == content and not out.exists()


def page_of_a_run(folder: Path) -> str:
    from tensorkeep.commands.report.run import run_page

    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 0.5, "lr": 0.1}) + "\n")
    return run_page(folder)


def page_of_a_diagnosis(_: Path) -> str:
    from tensorkeep.commands.report.diagnosis import page

    return page({"checkpoint": "x" * 5000, "verdict": "ok", "causes": [], "findings": []})


def page_of_a_video(_: Path) -> str:
    from tensorkeep.commands.report.video import video_page

    return video_page("<title>" * 40, 9.0, [])


@pytest.mark.parametrize("make", [page_of_a_run, page_of_a_diagnosis, page_of_a_video])
def test_our_pages_are_replaced_and_other_pages_stay(make: Callable[[Path], str], tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.html", tmp_path / "theirs.html"
    ours.write_text(make(tmp_path))
    theirs.write_text('<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Me</title></head></html>\n')
    refuse_existing(ours, True, PAGE)
    with pytest.raises(TensorkeepError, match="not a page"):
        refuse_existing(theirs, True, PAGE)


found_rows = st.lists(
    st.tuples(
        st.floats(0, 1e5), st.floats(0, 1e3), st.text(max_size=20), st.floats(0, 1).filter(lambda score: score < 0.995)
    ),
    max_size=12,
)


@settings(deadline=None)
@given(found_rows)
def test_our_subtitles_and_detections_are_known_whatever_was_found(
    found: list[tuple[float, float, str, float]],
) -> None:
    import tempfile

    from tensorkeep.detection.predict import write_predictions
    from tensorkeep.detection.results.results import DETECTIONS
    from tensorkeep.detection.results.subtitles import SRT, VTT, NamedDetection, make_cues, to_srt, to_webvtt

    named = [NamedDetection(start, start + length, label, score) for start, length, label, score in found]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "v.srt").write_text(to_srt(make_cues(named)), encoding="utf-8")
        (place / "v.vtt").write_text(to_webvtt(make_cues(named)), encoding="utf-8")
        write_predictions(place / "detections.json", {"v": named}, "a run", pretrained=True)
        for name, kind in (("v.srt", SRT), ("v.vtt", VTT), ("detections.json", DETECTIONS)):
            refuse_existing(place / name, True, kind)


@pytest.mark.parametrize(
    "name, text",
    [
        ("film.srt", "1\n00:00:01,000 --> 00:00:04,000\nI have always depended on\nthe kindness of strangers.\n"),
        ("film.vtt", "WEBVTT\n\n00:01.000 --> 00:04.000\nNever drink liquid nitrogen.\n"),
        ("film.vtt", "WEBVTT\n\n00:00:01.000 --> 00:00:04.000\nChapter 1.50\n"),
        ("detections.json", '{"database": {}}'),
    ],
)
def test_other_people_s_subtitles_and_annotations_stay(name: str, text: str, tmp_path: Path) -> None:
    from tensorkeep.commands.predict import _kind

    (tmp_path / name).write_text(text)
    with pytest.raises(TensorkeepError, match="which is all that --overwrite replaces"):
        refuse_existing(tmp_path / name, True, _kind(name))


def recipe_words(command: str, kind: str, out: Path) -> list[str]:
    source = str(CONFIGS / "adatad_s.py") if command == "import" else next(r.name for r in shipped() if r.kind == kind)
    return ["recipe", command, source, "-o", str(out), "--quiet"]


@pytest.mark.parametrize("command, kind", [("import", "detection"), ("show", "detection"), ("show", "language")])
def test_a_recipe_replaces_recipes_of_its_kind_only(
    command: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "recipe.yaml"
    words = recipe_words(command, kind, out)
    other = next(r.text for r in shipped() if r.kind != kind)
    for theirs in ("services:\n  web:\n    image: x\n", "model: base\nmine: true\n", "\x00\x01", "[", other):
        out.write_text(theirs)
        assert main([*words, "--overwrite"]) == 2 and out.read_text() == theirs
        assert "not a recipe" in capsys.readouterr().err
    out.unlink()
    assert main(words) in (0, 1) and main(words) == 2
    edited = "".join(line for line in out.read_text().splitlines(keepends=True) if not line.startswith("#"))
    out.write_text(edited)
    assert main([*words, "--overwrite"]) in (0, 1) and out.read_text() != edited


@pytest.mark.parametrize("command", ["report", "eval", "convert"])
def test_each_command_refuses_another_s_file(
    command: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page_of_a_run(tmp_path)
    mine = tmp_path / "mine.html"
    mine.write_text("mine")
    words = {
        "report": ["report", str(tmp_path), "-o", str(mine)],
        "convert": ["convert", str(source), str(tmp_path / "mine.html"), "--to", "hf"],
        "eval": evaluation(tmp_path, mine),
    }[command]
    assert main([*words, "--overwrite"]) == 2 and mine.read_text() == "mine"
    assert "--overwrite replaces" in capsys.readouterr().err


def evaluation(folder: Path, picture: Path) -> list[str]:
    truth, found = folder / "truth.json", folder / "found.json"
    segment = {"segment": [0.0, 1.0], "label": "dive"}
    truth.write_text(
        json.dumps({"database": {"v": {"subset": "validation", "duration": 9.0, "annotations": [segment]}}})
    )
    found.write_text(json.dumps({"results": {"v": [{**segment, "score": 0.5}]}}))
    words = ["eval", "detection", "--annotations", str(truth), "--detections", str(found)]
    return [*words, "--picture", str(picture)]


def test_our_picture_is_replaced(tmp_path: Path) -> None:
    words = evaluation(tmp_path, tmp_path / "errors.svg")
    assert main(words) == 0 and main(words) == 2 and main([*words, "--overwrite"]) == 0


def test_a_made_data_set_is_replaced_alone(tmp_path: Path) -> None:
    from tensorkeep.detection.data.synthetic import TINY, make_dataset

    for overwrite in (False, True):
        make_dataset(tmp_path / "data", videos=1, held_out=1, config=TINY, overwrite=overwrite)
    file(tmp_path / "data", "videos/holiday.mp4")
    with pytest.raises(TensorkeepError, match="holiday"):
        make_dataset(tmp_path / "data", videos=1, held_out=1, config=TINY, overwrite=True)
    assert (tmp_path / "data" / "videos" / "holiday.mp4").read_text() == "years of work"


# -- links ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to, name", [("hf", "out"), ("pth", "out.pth")])
@pytest.mark.parametrize("there", [True, False])
def test_a_sink_that_is_a_link_is_refused_and_says_where_it_leads(
    to: str, name: str, there: bool, source: Path, tmp_path: Path
) -> None:
    if there:
        run(source, tmp_path / "elsewhere" / name, to)
    (tmp_path / name).symlink_to(f"elsewhere/{name}")
    assert f"link to elsewhere/{name}" in refused(source, tmp_path / name, to).what


def test_a_sink_that_lies_through_a_link_is_written_and_says_where(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "big_disk").mkdir()
    (tmp_path / "short").symlink_to("big_disk")
    assert main(["convert", str(source), str(tmp_path / "short" / "out"), "--to", "hf"]) == 0
    assert f"in {tmp_path / 'big_disk'}" in capsys.readouterr().err
    assert (tmp_path / "big_disk" / "out" / "model.safetensors").is_file()


def test_links_in_a_replaced_sink_go_and_what_they_lead_to_stays(source: Path, tmp_path: Path) -> None:
    kept = write_hf(tmp_path / "kept")
    before = tree(kept)
    (tmp_path / "out").mkdir()
    for name in before:
        (tmp_path / "out" / name).symlink_to(f"../kept/{name}")
    convert(plan_of(source, "dcp"), str(tmp_path / "out"), "dcp", overwrite=True)
    assert tree(kept) == before and read(tmp_path / "out").format == "dcp"


# -- stores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["thesis.tex", "src/thesis.tex", "optimizer.pt", "other.safetensors"])
def test_a_store_s_folder_with_anything_else_in_it_stays(name: str, source: Path) -> None:
    base = f"memory://overwriting/{name.replace('/', '_')}"
    system, path = fsspec.core.url_to_fs(base)
    run(source, f"{base}/out", "hf")
    system.pipe_file(f"{path}/out/{name}", b"years of work")
    before = {p: system.cat_file(p) for p in system.find(path)}
    with pytest.raises(TensorkeepError, match=name):
        run(source, f"{base}/out", "dcp", overwrite=True)
    assert {p: system.cat_file(p) for p in system.find(path)} == before


def test_a_store_s_lone_file_that_is_no_checkpoint_stays(source: Path) -> None:
    system, path = fsspec.core.url_to_fs("memory://overwriting/lone/out.pth")
    system.pipe_file(path, b"years of work")
    with pytest.raises(TensorkeepError, match="not a checkpoint"):
        run(source, "memory://overwriting/lone/out.pth", "pth", overwrite=True)
    assert system.cat_file(path) == b"years of work"
    system.rm(path)
    for overwrite in (False, True):
        run(source, "memory://overwriting/lone/out.pth", "pth", overwrite=overwrite)


# -- the rule itself --------------------------------------------------------------------------------------------------


def test_what_is_free_needs_no_permission(tmp_path: Path) -> None:
    never = Kind("nothing", lambda path: [path.name])
    (tmp_path / "empty").mkdir()
    for name in ("absent", "empty"):
        refuse_existing(tmp_path / name, False, never)
    (tmp_path / "void").write_bytes(b"")
    refuse_existing(tmp_path / "void", True, lone_file("a script", "#!"))
    refuse_existing(tmp_path / "void", True, CHECKPOINT)


PERMITTED = ("replacing", "replacing_all", "refuse_existing")


def test_whoever_passes_overwrite_on_says_what_may_be_replaced() -> None:
    """Files known by their name alone are a run's own, and say `overwrite=True` or False in so many words."""
    root, seen = Path(__file__).parent.parent / "src" / "tensorkeep", 0
    for path in root.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if not any(f"{called}(" in text for called in PERMITTED):
            continue
        for node in ast.walk(ast.parse(text)):
            name = node.func if isinstance(node, ast.Call) else None
            if not isinstance(node, ast.Call) or not isinstance(name, ast.Name):
                continue
            if name.id not in PERMITTED:
                continue
            given = [*node.args[1:2], *(k.value for k in node.keywords if k.arg == "overwrite")]
            kind = len(node.args) > 2 or any(k.arg == "kind" for k in node.keywords)
            assert kind or isinstance(given[0], ast.Constant), f"{path}:{node.lineno}"
            seen += 1
    assert seen > 20
