"""`tensorkeep doctor`: what it finds is what is there, broken packages are named, and nobody's secrets are shown."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tensorkeep.cli import main
from tensorkeep.commands.doctor import packages as asked
from tensorkeep.commands.doctor.advice import advise
from tensorkeep.commands.doctor.environment import shown, variables, without_home
from tests.tools import ROOT

SECRETS = {
    "HF_TOKEN": "plainword",
    "AWS_ACCESS_KEY_ID": "plainword",
    "AWS_SECRET_ACCESS_KEY": "plainword/plain+word",
    "WANDB_API_KEY": "plainword",
    "WANDB_APIKEY": "plainword",
    "HTTPS_PROXY": "http://me:plainword@proxy:3128",
    "https_proxy": "me:plain/word@proxy:3128",
    "HF_ENDPOINT": "https://mirror/x?sig=plainword&y=plainword",
    "FSSPEC_S3": '{"key": "plainword"}',
    "TRACKIO_SPACE": "hf_plainwordplainword",
    "TORCH_EXTRA": "--password plainword",
    "WANDB_HEADERS": "plainword",
    "TRACKIO_ROOM": "8f1e2c3d-0a1b-2c3d-4e5f-60718293a4b5",
    "NCCL_CONF": "pl4inwordpl4inwordpl4inwordpl4inword",
}
KEPT = {
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "2",
    "CUDA_VISIBLE_DEVICES": "GPU-8f1e2c3d-0a1b-2c3d-4e5f-60718293a4b5",
    "PYTHONPATH": "/opt/some-long-folder-name-of-2026/lib/python3.11:src",
    "AWS_DEFAULT_REGION": "eu-central-1",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}
CHECKED = {"name", "version", "least", "extra", "imports", "error", "install"}


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    """The document of a doctor with secrets in its environment, and whether it loaded torch itself."""
    code = "import sys; from tensorkeep.cli import main; from tensorkeep.commands.doctor import packages as p; "
    code += "p.PACKAGES = p.PACKAGES[:8]; code = main(['doctor', '--json']); "  # up to torch: the others take seconds
    code += "print(code, [m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | SECRETS, check=True
    )
    printed, last = done.stdout.splitlines()
    assert not re.search(r"plain.?word|pl4in|60718293", printed)
    return {"last": last, **json.loads(printed)}


def test_the_document_says_what_is_there_and_the_process_loads_no_torch(whole: dict[str, Any]) -> None:
    assert whole["last"] == "0 []", [row for row in whole["packages"] if row["imports"] is False]
    rows = {row["name"]: row for row in whole["packages"]}
    assert all(set(row) == CHECKED for row in rows.values()) and rows["safetensors"]["imports"] is True
    assert whole["machine"]["cpus"] == os.cpu_count() and whole["machine"]["memory"] > 0
    assert [disk["free"] > 0 for disk in whole["disks"]] == [True, True]
    assert whole["environment"]["HF_TOKEN"] == "***" and whole["environment"]["https_proxy"] == "***@proxy:3128"


def test_torch_is_described_as_it_describes_itself(whole: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    assert whole["torch"]["version"] == torch.__version__
    assert len(whole["torch"]["gpus"]) == torch.cuda.device_count()
    assert ("gloo" in whole["torch"]["distributed"]) == torch.distributed.is_gloo_available()


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_masked_by_its_name_or_its_looks(name: str) -> None:
    assert variables({name: SECRETS[name]}).keys() == {name}
    text = shown(name, SECRETS[name])
    assert "***" in text and not re.search(r"plain|pl4in|60718293", text)


def test_what_is_no_secret_stays_and_what_does_not_matter_is_left_out() -> None:
    assert variables(KEPT | {"EDITOR": "vi", "MY_APP": "x"}) == dict(sorted(KEPT.items()))
    assert shown("HF_HOME", "a\x1b[2J\nb") == "a\\x1b[2J\\nb"


def test_the_home_folder_s_name_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    given = {"a": ["/home/ann/x:/home/ann", 3], "b": "/home/anna/x /mnt/home/ann"}
    assert without_home(given) == {"a": ["~/x:~", 3], "b": "/home/anna/x /mnt/home/ann"}


def test_what_raises_ends_or_kills_python_is_named_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies = {
        "p_good": "print('noise')",
        "p_raises": "raise OSError('lib.so: cannot\\nopen')",
        "p_exits": "import os; os._exit(3)",
        "p_leaves": "import sys; sys.exit('no')",
        "p_dies": "import os; os.kill(os.getpid(), 11)",
        "p_hangs": "import time; time.sleep(60)",
        "p_last": "",
    }
    for name, body in bodies.items():
        (tmp_path / f"{name}.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(asked, "_SECONDS", 2)
    errors, torch = asked.imported([*bodies, "p_absent"])
    assert errors == {
        "p_good": None,
        "p_raises": "OSError: lib.so: cannot open",
        "p_exits": "ended Python with exit code 3",
        "p_leaves": "SystemExit: no",
        "p_dies": "ended by signal 11",
        "p_hangs": "was not over in 2 s",
        "p_last": None,
        "p_absent": "ModuleNotFoundError: No module named 'p_absent'",
    }
    assert torch is None


def test_a_package_that_is_installed_and_broken_exits_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("works", "broken"):
        (tmp_path / f"{name}-2.0.dist-info").mkdir()
        (tmp_path / f"{name}-2.0.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: 2.0\n")
        (tmp_path / f"{name}.py").write_text("import nowhere_to_be_found" if name == "broken" else "")
    monkeypatch.syspath_prepend(tmp_path)
    rows = [asked.Package("works", "works", "", "3"), asked.Package("absent", "absent", "language")]
    monkeypatch.setattr(asked, "PACKAGES", rows)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "not installed: pip install 'tensorkeep[language]'" in out and "not asked: torch is not there" in out
    assert "advice: works 2.0 is older than 3: pip install --upgrade 'works>=3'" in out
    monkeypatch.setattr(asked, "PACKAGES", [*rows, asked.Package("broken", "broken", "")])
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "cannot be imported: ModuleNotFoundError: No module named 'nowhere_to_be_found'" in out
    assert "1 packages import, 1 installed but broken" in out


TWO_GPUS = """
import sys, types
from types import SimpleNamespace as Of
__version__ = "2.13.0+cu130"
version = Of(cuda="13.0", hip=None)
cuda = Of(is_available=lambda: True, device_count=lambda: 2, nccl=Of(version=lambda: (2, 28, 9)),
          get_device_properties=lambda n: Of(name=f"H200 no {n}", total_memory=150 * 10**9, major=9, minor=0),
          can_device_access_peer=lambda a, b: a != b)
distributed = Of(is_available=lambda: True, is_nccl_available=lambda: True, is_gloo_available=lambda: True,
                 is_mpi_available=lambda: False)
backends = Of()
"""


def test_several_gpus_and_nccl_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "torch.py").write_text(TWO_GPUS)  # in torch's place: the machine of the tests has no GPU
    (tmp_path / "torch-2.13.0.dist-info").mkdir()
    (tmp_path / "torch-2.13.0.dist-info" / "METADATA").write_text("Name: torch\nVersion: 2.13.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(asked, "PACKAGES", [asked.Package("torch", "torch", "torch", "2.4")])
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "torch is built for CUDA 13.0" in shown
    assert "GPU 1              H200 no 1, 139.7 GiB, capability 9.0" in shown
    assert "direct (peer) access" in shown and "nccl 2.28.9, gloo" in shown


def test_the_table_of_packages_is_what_the_extras_ask_for() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    stated = {"": project["dependencies"], **project["optional-dependencies"]}
    wanted = set()
    for extra in set(stated) - {"dev", "docs", "demo"}:  # of the developers; the demo's model is data
        for line in stated[extra]:
            name, least = re.fullmatch(r"([\w.-]+)(?:\[.*\])?(?:>=([\d.]+))?", line).groups()  # type: ignore[union-attr]
            wanted |= {(name, extra, least or "")} if name != "tensorkeep" else set()
    assert {(p.name, p.extra, p.least) for p in asked.PACKAGES if p.extra is not None} == wanted


def test_advice_names_what_does_not_work_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "driver").write_text("")
    monkeypatch.setattr("tensorkeep.commands.doctor.advice._DRIVER", tmp_path / "driver")
    gpu = {"index": 0, "name": "x", "memory": 1, "capability": "9.0"}
    found: dict[str, Any] = {
        "packages": [
            {"name": "s3fs", "version": "2026.9.0", "least": "2024.6", "imports": True},
            {"name": "fsspec", "version": "2026.9.0", "least": "2024.6", "imports": True},
            {"name": "torch", "version": "2.13.0+cu130", "least": "2.4", "imports": True},
        ],
        "torch": {"version": "2.13.0", "build": "CUDA 13.0", "gpus": [gpu, gpu], "distributed": ["nccl 2.28", "gloo"]},
        "machine": {"open_files": {"soft": 20000, "hard": "no limit"}},
        "disks": [{"name": "working folder", "path": ".", "free": 10**10}],
        "environment": {},
    }
    assert advise(found) == []
    found["packages"][1]["version"] = "2025.1.0"
    found["torch"] |= {"version": "2.5.1", "distributed": ["gloo"]}
    found["machine"]["open_files"]["soft"] = 256
    found["disks"][0]["free"] = 10**6
    said = advise(found)
    assert [line.split()[0] for line in said] == ["s3fs", "torch", "training.parallel:", "only", "1.0"]
    found["torch"]["gpus"] = []
    assert any("NVIDIA driver" in line for line in advise(found))
    found["environment"]["CUDA_VISIBLE_DEVICES"] = ""
    assert any("hides every GPU" in line for line in advise(found))
