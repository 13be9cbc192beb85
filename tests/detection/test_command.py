"""`tensorkeep eval detection`: exit codes, the document, the table, and that no torch is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tensorkeep.cli import main
from tensorkeep.detection import __all__ as public
from tests import forked

TRUTH = {
    "database": {
        "a": {
            "subset": "test",
            "duration": 20.0,
            "annotations": [{"segment": [1, 5], "label": "dive"}, {"segment": [9, 9], "label": "dive"}],
        },
        "b": {"subset": "test", "duration": 10.0, "annotations": [{"segment": [2, 6], "label": "jump"}]},
        "c": {"subset": "train", "duration": 10.0, "annotations": [{"segment": [2, 6], "label": "jump"}]},
    }
}
FOUND = {
    "results": {
        "a": [{"segment": [1, 5], "label": "dive", "score": 0.9}, {"segment": [8, 12], "label": "jump", "score": 0.8}],
        "b": [{"segment": [2, 4.4], "label": "jump", "score": 0.7}],
    }
}


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    for name, document in (("gt.json", TRUTH), ("found.json", FOUND)):
        (tmp_path / name).write_text(json.dumps(document))
    return ["--annotations", str(tmp_path / "gt.json"), "--detections", str(tmp_path / "found.json")]


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["eval", "detection", *words])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_the_table_names_protocol_and_subset_and_what_is_odd(
    files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, *files, "--tiou", "0.5", "0.7", "--protocol", "opentad")
    assert code == 0 and "protocol opentad, subset test" in out
    rows = [line.split() for line in out.splitlines()]
    assert ["dive", "1", "100.00", "100.00", "100.00"] in rows and ["jump", "1", "50.00", "0.00", "25.00"] in rows
    assert ["mAP", "2", "75.00", "50.00", "62.50"] in rows
    assert "zero length (1), first a" in err


def test_the_document_has_every_figure(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "errors.svg"
    code, out, _ = run(capsys, *files, "--protocol", "thumos14", "--json", "--errors", "0.5", "--picture", str(picture))
    document = json.loads(out)
    assert code == 0 and document["schema"] == 1 and document["protocol"] == "thumos14"
    assert document["tiou"] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7] and len(document["mAP"]) == 7
    assert set(document["AP"]) == {"dive", "jump"} and document["errors"]["tiou"] == 0.5
    assert picture.read_text().startswith("<svg")
    assert run(capsys, *files, "--picture", str(picture))[0] == 2  # an existing file stays
    assert run(capsys, *files, "--picture", str(picture), "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--subset", "tset"], "did you mean test?"),
        (["--tiou", "1.5"], "(0, 1]"),
        (["--protocol", "voc"], "protocol"),
        (["--blocked", "/nowhere/blocked.json"], "/nowhere/blocked.json"),
    ],
)
def test_bad_input_is_one_line_and_a_hint(
    files: list[str], capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    code, _, err = run(capsys, *files, *words)
    assert code == 2 and said in err and err.startswith("error:") and "Traceback" not in err


def test_evaluation_loads_no_torch(files: list[str]) -> None:
    program = (
        f"import sys; from tensorkeep.cli import main; main(['eval', 'detection', *{files!r}]); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0


def test_public_names_are_found_without_loading_torch() -> None:
    program = (
        "import sys, tensorkeep.detection as d\nd.evaluate_files, d.read_annotations; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    program = (
        f"import tensorkeep.detection as d; assert d.__all__ == {public!r} and all(getattr(d, n) for n in d.__all__)"
    )
    done = forked.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
