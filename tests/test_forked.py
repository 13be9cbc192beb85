"""A forked program is a process as any other: streams, signals, exit codes, folder, environment and session."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import forked

START = [forked.Popen, subprocess.Popen]  # all that is said here is said of both


@pytest.fixture(autouse=True)
def _light(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(forked.Popen.__init__, "__kwdefaults__", {"terminal": False, "modules": ("json",)})


@pytest.mark.parametrize("popen", START)
def test_streams_words_folder_environment_and_exit_codes(popen: Any, tmp_path: Path) -> None:
    code = (
        "import os, sys; print(sys.argv, os.getcwd(), os.environ.get('TERM'), 'HOME' in os.environ, sys.stdin.read()); "
    )
    code += "print(__name__, sys.path[0] == '', os.getppid(), os.isatty(1), file=sys.stderr); sys.exit(7)"
    pipes = {"stdin": -1, "stdout": -1, "stderr": -1, "text": True}
    environment = {k: v for k, v in os.environ.items() if k != "HOME"} | {"TERM": "odd"}
    with popen([sys.executable, "-c", code, "a", "-b"], cwd=tmp_path, env=environment, **pipes) as process:
        out, err = process.communicate("typed")
    assert out == f"['-c', 'a', '-b'] {tmp_path} odd False typed\n"
    assert err == f"__main__ True {os.getpid()} False\n" and process.returncode == 7


@pytest.mark.parametrize("popen", START)
def test_scripts_modules_and_options(popen: Any, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("import sys, warnings; warnings.warn('x'); print(sys.argv, sys.path[0], __name__)")
    said = []
    for words in (["-W", "error", "own.py", 1], ["-W", "ignore", "own.py", 1], ["-W", "ignore", "-m", "own", 1]):
        process = popen([sys.executable, *map(str, words)], cwd=tmp_path, stdout=-1, stderr=-1, text=True)
        said.append((*process.communicate(), process.returncode))
    assert "UserWarning: x" in said[0][1] and said[0][2] == 1
    assert said[1] == (f"['own.py', '1'] {tmp_path} __main__\n", "", 0)
    assert said[2] == (f"['{tmp_path / 'own.py'}', '1'] {tmp_path} __main__\n", "", 0)


@pytest.mark.parametrize("popen", START)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_it_as_ever(popen: Any, number: int) -> None:
    code = "import time; print(1, flush=True); time.sleep(60)"
    with popen([sys.executable, "-c", code], stdout=-1, stderr=-1) as process:
        assert process.stdout.readline() == b"1\n" and process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        process.send_signal(number)
        assert process.wait(30) == -number
        assert (b"KeyboardInterrupt" in process.stderr.read()) == (number == signal.SIGINT)


@pytest.mark.parametrize("popen", START)
def test_an_error_is_a_traceback_and_a_time_limit_kills(popen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", popen)
    done = subprocess.run([sys.executable, "-c", "1 / 0"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.endswith("ZeroDivisionError: division by zero\n")
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.5)
    done = subprocess.run([sys.executable, "-c", "import atexit; atexit.register(print, 2)"], stdout=-1, text=True)
    assert done.stdout == "2\n"


@pytest.mark.parametrize("popen", START)
def test_a_session_of_its_own_and_no_handle_of_others(popen: Any) -> None:
    code = (
        "import os; print(os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid(), len(os.listdir('/proc/self/fd')))"
    )
    for session in (True, False):
        process = popen([sys.executable, "-c", code], stdout=-1, start_new_session=session)
        assert process.communicate()[0].decode() == f"{session} {session} 4\n"


def test_every_process_draws_numbers_of_its_own() -> None:
    code = "import random, sys; sys.modules['numpy'].random; import numpy; print(random.random(), numpy.random.rand())"
    said = {
        forked.Popen([sys.executable, "-c", code], stdout=-1, modules=("numpy",)).communicate()[0] for _ in range(2)
    }
    assert len({number for line in said for number in line.split()}) == 4


def test_what_is_read_on_import_is_there_on_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another value of a variable that is not free is another process that imports."""
    code = "import os; print(os.getppid(), os.environ.get('SET'))"
    monkeypatch.setattr(forked, "_server", asked := Asked(forked._server))
    for value in ("1", "2", "1"):
        monkeypatch.setenv("SET", value)
        assert forked.run([sys.executable, "-c", code], stdout=-1, text=True).stdout == f"{os.getpid()} {value}\n"
    assert asked.values == ["1", "2", "1"] and len(asked.servers) == 2


class Asked:
    """The servers that were asked, by the value of SET."""

    def __init__(self, real: Any) -> None:
        self.real, self.values, self.servers = real, list[str](), set[int]()

    def __call__(self, environment: Any, modules: Any) -> Any:
        server = self.real(environment, modules)
        self.values.append(dict(environment)["SET"])
        self.servers.add(server.process.pid)
        return server


def test_with_threads_it_is_a_new_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(forked, "_server", None)
    assert forked.run([sys.executable, "-c", "print(2)"], stdout=-1, text=True).stdout == "2\n"
