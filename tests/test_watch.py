"""`train`'s line on a terminal, and `tensorkeep watch`: a run that starts, goes on, ends, dies or is far away."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tensorkeep.cli import main
from tensorkeep.output import fitted, sparkline
from tensorkeep.storage.run_folder import locked
from tensorkeep.training import status
from tests import forked
from tests.terminal import CTRL_C, ROOT, Terminal, shown

PROGRAM = """
import os, sys, time
from dataclasses import replace
from pathlib import Path
import torch
from tensorkeep.output import Output
from tensorkeep.training.job import Loop
from tensorkeep.training.loop import fit
from tests.training import small_job
torch.set_num_threads(1)
job = small_job(evaluate=True)
def slow(model, batch, divisor):
    time.sleep(float(os.environ.get('PAUSE', '0.02')))
    return job.loss(model, batch, divisor)
loop = Loop(updates=40, batch=5, save_every=7, log_every=1, evaluate_every=20)
print(fit(replace(job, loss=slow), Path(sys.argv[1]), loop, say=Output()).reason)
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "train.py"
    path.write_text(PROGRAM)
    return path


@pytest.fixture(scope="module")
def interrupted(program: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Terminal, int]:
    """A run on a terminal of 120 columns that becomes one of 50, stopped by Ctrl-C."""
    run = tmp_path_factory.mktemp("runs") / "one"
    terminal = Terminal([program, run], columns=120, env={"PAUSE": "0.15"}, fork=True)
    terminal.read(lambda text: "saved 7" in text)
    terminal.resize(50)
    before = terminal.text.count("\r\x1b[2K")
    terminal.read(lambda text: text.count("\r\x1b[2K") > before + 3)
    terminal.type(CTRL_C)
    return run, terminal, terminal.close()


def trained(program: Path, run: Path, pause: str) -> forked.Popen:
    """The program under way where stderr is no terminal."""
    env = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "PAUSE": pause}
    return forked.Popen([sys.executable, program, run], stderr=subprocess.PIPE, text=True, env=env)


def unbroken(text: str) -> str:
    """What stands on a page, as if it were one line."""
    return re.sub(r"\x1b\[[?0-9]*[A-Za-z]|\r\n", "", text)


class Killed(NamedTuple):
    """A run that was killed while somebody watched: what `--once` said before, the terminal, `watch`'s exit code."""

    run: Path
    pid: int
    before: tuple[int, dict[str, Any]]
    watching: Terminal
    code: int


@pytest.fixture(scope="module")
def killed(program: Path, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    run = tmp_path_factory.mktemp("killed") / "one"
    with trained(program, run, "0.25") as training:
        while not (run / "checkpoints" / "step-000007").exists():
            assert training.poll() is None
            time.sleep(0.02)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            code = main(["watch", str(run), "--json", "--once"])
        watching = Terminal(["-m", "tensorkeep", "watch", run], columns=70)
        watching.read(lambda text: f"running (process {training.pid} of " in unbroken(text))
        while len((run / "metrics.jsonl").read_text().splitlines()) < 10:  # two steps past the checkpoint are proven
            time.sleep(0.02)
        training.kill()
    return Killed(run, training.pid, (code, json.loads(said.getvalue())), watching, watching.close())


@pytest.fixture(scope="module")
def done(program: Path, killed: Killed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, gone on with from its checkpoint and to its end."""
    run = tmp_path_factory.mktemp("done") / "one"
    shutil.copytree(killed.run, run)
    with trained(program, run, "0.01") as training:
        assert training.stderr is not None
        (run / "said").write_text(training.stderr.read())
    assert training.returncode == 0
    return run


def asked(capsys: pytest.CaptureFixture[str], run: Path, *words: str) -> tuple[int, dict[str, Any]]:
    """What `watch --json` answers, and its exit code."""
    capsys.readouterr()
    code = main(["watch", str(run), "--json", *words])
    return code, json.loads(capsys.readouterr().out)


# -- train on a terminal ----------------------------------------------------------------------------------------------


def test_a_terminal_shows_one_line_that_fits_and_ctrl_c_leaves_it_whole(
    interrupted: tuple[Path, Terminal, int],
) -> None:
    _, terminal, code = interrupted
    drawn = [line.partition("\r\n")[0] for line in terminal.text.split("\r\x1b[2K") if line.startswith("step ")]
    last = max(n for n, line in enumerate(drawn) if len(line) > 50)
    figures = r"step \d+/40  \d+ s left  loss \d\.\d{4}  [▁▂▃▄▅▆▇█]+  [\d,]+ samples/s  [\d.]+ GiB memory  "
    assert re.match(figures, drawn[3]) and any("saved 7" in line for line in drawn[: last + 1])
    assert all(len(line) < 120 for line in drawn) and len(drawn) > last + 2
    assert all(len(line.removesuffix("^C")) < 50 for line in drawn[last + 1 :])
    assert code == 0 and shown(terminal.text)[-2:] == ["interrupted", ""]


SHOWS = """
from tensorkeep.output import Output
status = Output().status()
status.show("loss 2.5", 1, 9, lambda: ["short"])
Output().remark("a note")
status.show("loss 1.5", 9, 9, lambda: ["short"])
status.close()
"""
PLAIN = "step 1/9  loss 2.5\r\na note\r\nstep 9/9  loss 1.5\r\n"
DRAWN = "\r\x1b[2Kstep 1/9  short\r\x1b[2Ka note\r\n\r\x1b[2Kstep 9/9  short\r\n"


@pytest.mark.parametrize(
    ("env", "wanted"),
    [({"TERM": "dumb"}, PLAIN), ({"CI": "true"}, PLAIN), ({"CI": "false"}, DRAWN), ({"NO_COLOR": "1"}, DRAWN)],
)
def test_a_terminal_that_cannot_redraw_gets_plain_lines(env: dict[str, str], wanted: str) -> None:
    terminal = Terminal(["-c", SHOWS], env=env)
    assert terminal.close() == 0 and terminal.text == wanted  # with NO_COLOR too: the line has no colour


def test_where_stderr_is_no_terminal_lines_are_plain_and_the_resume_is_proven(done: Path) -> None:
    said = (done / "said").read_text()
    assert "\x1b" not in said and "\r" not in said and "resumed from step-000007 at step 7, exact\n" in said
    assert "exact resume confirmed for steps 8" in said
    assert re.search(r"^step 40/40  loss \d\.\d{4}  lr 1.00e-02  grad norm [\d.]+  [\d,]+ samples/s$", said, re.M)


def test_parts_that_find_no_room_are_left_out_and_bars_are_means() -> None:
    assert fitted(["step 1/9", "loss 2.5", "a long part", "lr"], 22) == "step 1/9  loss 2.5  lr"
    assert fitted(["step 100/900"], 7) == "step 10" and fitted(["step", "x"], 0) == "s"
    nowhere = Path(os.devnull)
    with nowhere.open("w", encoding="utf-8") as wide, nowhere.open("w", encoding="ascii") as plain:
        assert sparkline([4, 4, 0, 0, 2, 2], 3, wide) == "█▁▅" and sparkline([1, 1], 5, wide) == "▁▁"
        assert sparkline([1], 5, wide) == "" and sparkline([1, 2], 5, plain) == ""


# -- watch ------------------------------------------------------------------------------------------------------------


def test_a_run_that_ended_is_told_with_its_proof(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = asked(capsys, done)
    rows = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    assert code == 0 and (told["state"], told["alive"], told["step"], told["updates"]) == ("done", False, 40, 40)
    assert told["row"] == [row for row in rows if "evaluation" not in row][-1] and told["checkpoint"] == 40
    assert told["evaluation"] == {"step": 40, **rows[-1]["evaluation"]} and told["damaged_lines"] == 0
    steps = (told["proof"] or {"steps": []})["steps"]  # as many as the run had made when it was killed, two at most
    assert told["proof"] == ({"steps": steps, "equal": True} if steps else None) and steps in ([], [8], [8, 9])
    assert told["resumed"] == {"step": 7, "level": "exact"}
    assert told["memory"] > 1e6 and told["rate"]["unit"] == "samples/s" and told["rate"]["value"] > 0
    assert main(["watch", str(done)]) == 0
    text = capsys.readouterr()
    assert text.err == "" and text.out.startswith(f"{done}: done\nstep 40/40  100 %\nloss ")
    again = "step 8" if len(steps) == 1 else "steps 8, 9"
    assert f"resumed from step 7, exact; {again} made again: losses equal, bit for bit\n" in text.out


def test_an_interrupted_run_says_what_goes_on(
    interrupted: tuple[Path, Terminal, int], capsys: pytest.CaptureFixture[str]
) -> None:
    code, told = asked(capsys, interrupted[0])
    assert code == 0 and told["state"] == "interrupted" and told["step"] == told["checkpoint"]
    assert main(["watch", str(interrupted[0])]) == 0
    assert f"hint: the same train command goes on from step {told['step']}" in capsys.readouterr().out


def test_a_killed_run_is_followed_to_its_death(killed: Killed) -> None:
    code, told = killed.before
    assert code == 0 and (told["state"], told["alive"], told["pid"]) == ("running", True, killed.pid)
    assert told["step"] >= 1 and told["updates"] == 40 and told["seconds_left"] > 0
    pages, _, after = killed.watching.text.partition("\x1b[?1049l")
    assert pages.startswith("\x1b[?1049h") and "\x1b[?25h" in pages[-20:]  # the cursor is back
    assert all(len(line) <= 70 for line in re.sub(r"\x1b\[[?0-9]*[A-Za-z]", "", pages).split("\r\n"))
    assert killed.code == 1 and after.startswith(f"{killed.run}: dead: process {killed.pid} of ")
    assert after.endswith("\r\nhint: the same train command goes on from step 7\r\n")


def test_ctrl_c_leaves_the_watching_terminal_as_it_was(done: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(done, run)
    (run / "status.json").write_text(json.dumps(_status(done, state="running", boot="another", updated=time.time())))
    terminal = Terminal(["-m", "tensorkeep", "watch", run])
    terminal.read(lambda text: "running (process" in unbroken(text))
    terminal.type(CTRL_C)
    assert terminal.close() == 130 and terminal.text.endswith("\x1b[?25h\x1b[?7h\x1b[?1049linterrupted\r\n")


def _status(run: Path, **other: Any) -> dict[str, Any]:
    return {**json.loads((run / "status.json").read_text()), **other}


@pytest.fixture
def held(done: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the run that another process holds the lock of."""
    run = tmp_path / "held"
    shutil.copytree(done, run)
    code = "import sys; from pathlib import Path; from tensorkeep.storage.run_folder import locked\n"
    code += "with locked(Path(sys.argv[1])): print(1, flush=True); sys.stdin.read()"
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    words = [sys.executable, "-c", code, str(run)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as other:
        assert other.stdout is not None and other.stdout.readline() == b"1\n"
        yield run
        other.send_signal(signal.SIGKILL)


def test_whoever_holds_the_lock_lives_and_before_its_first_word_it_starts(
    held: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked(capsys, held, "--once")[1]["state"] == "starting"  # what stands there is of the start before
    (held / "status.json").write_text(json.dumps(_status(held, state="running", boot="another", updated=1.0)))
    code, told = asked(capsys, held, "--once")
    assert code == 0 and told["state"] == "running" and told["alive"] is True  # however old its last sign is
    (held / "status.json").unlink()
    (held / "metrics.jsonl").unlink()
    code, told = asked(capsys, held, "--once")
    assert (code, told["state"], told["step"]) == (0, "starting", None)


def test_looking_gives_no_lock_up(tmp_path: Path) -> None:
    with locked(tmp_path):
        assert status.holder(tmp_path) == os.getpid()
        code = "import sys; from pathlib import Path; from tensorkeep.training.status import holder\n"
        env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
        words = [sys.executable, "-c", code + "print(holder(Path(sys.argv[1])))", str(tmp_path)]
        for _ in range(2):
            assert int(subprocess.check_output(words, env=env)) == os.getpid()
    assert status.holder(tmp_path) is None


@pytest.mark.parametrize(
    ("changes", "age", "state", "code"),
    [
        ({"state": "running", "boot": "another"}, 30, "running", 0),
        ({"state": "running", "boot": "another"}, 300, "silent", 3),
        ({"state": "running"}, 5, "dead", 1),
        ({"state": "failed", "error": {"code": "V01", "message": "the loss is nan", "hint": "x"}}, 5, "failed", 1),
        ({"state": "stopped early"}, 300, "stopped early", 0),
        ({"state": "what\x1b[2J"}, 5, "unknown", 3),
        ({"updates": "many"}, 5, "unknown", 3),
        (None, 5, "unknown", 3),
    ],
)  # fmt: skip
def test_a_folder_of_any_machine_is_judged_by_its_files(
    changes: dict[str, Any] | None, age: float, state: str, code: int, done: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run, then = tmp_path / "run", time.time() - age
    shutil.copytree(done, run)
    if changes is None:
        (run / "status.json").unlink()
    else:
        (run / "status.json").write_text(json.dumps(_status(done, updated=then, **changes)))
    for name in ("metrics.jsonl", "status.json"):
        if (run / name).exists():
            os.utime(run / name, (then, then))
    for folder in (run, run / "checkpoints"):
        folder.chmod(0o555)
    got, told = asked(capsys, run, "--once")
    assert (told["state"], got) == (state, code)
    assert main(["watch", str(run), "--once"]) == code
    text = capsys.readouterr().out
    assert "\x1b" not in text and text.startswith(f"{run}: ")
    for folder in (run, run / "checkpoints"):
        folder.chmod(0o755)


def test_torn_and_foreign_lines_are_counted_and_passed_over(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(done, run)
    rows = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    bad = [
        b"\x00\xff\n",
        b'{"step": true}\n',
        b"[1]\n",
        b'{"step": 1e3}\n',
        b'{"step": 41, "loss": NaN, "seconds": "x"}\n',
    ]
    (run / "metrics.jsonl").write_bytes(b"".join([*rows, *bad, rows[0][:20]]))
    code, told = asked(capsys, run)
    assert code == 0 and told["damaged_lines"] == 4 and told["step"] == 41 and told["row"]["loss"] is None
    assert main(["watch", str(run)]) == 0
    assert "warning: 4 lines of metrics.jsonl cannot be read as rows" in capsys.readouterr().out


@pytest.mark.parametrize("make", [None, "folder", "file"])
def test_where_no_run_is_it_says_so(make: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "there"
    if make == "folder":
        place.mkdir()
    elif make == "file":
        place.touch()
    assert main(["watch", str(place)]) == 2
    said = capsys.readouterr().err
    assert said.count("error:") == 1 and "hint: name the folder of `tensorkeep train --out RUN`" in said


def test_a_failure_is_told_in_the_words_of_the_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tensorkeep.errors import TensorkeepError
    from tensorkeep.training.job import Loop
    from tensorkeep.training.loop import fit
    from tests.training import small_job

    job, loop = small_job(), Loop(updates=4, batch=5, log_every=1)
    job.loss = lambda model, batch, divisor: {"loss": (model(batch["x"]) * float("nan")).sum()}
    with pytest.raises(TensorkeepError) as caught:
        fit(job, tmp_path / "run", loop)
    code, told = asked(capsys, tmp_path / "run")
    assert code == 1 and told["error"] == {"code": "V01", "message": caught.value.line, "hint": caught.value.hint}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "status.json").write_text('{"mine": 1}')
    fit(small_job(), tmp_path / "mine", loop)
    assert (tmp_path / "mine" / "status.json").read_text() == '{"mine": 1}'
