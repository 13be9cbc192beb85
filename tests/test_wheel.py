"""The package as people get it: built, checked, installed into a clean environment without torch, and run there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from tensorkeep.cli import COMMANDS

ROOT = Path(__file__).parent.parent
TINY, ADAPTER = ROOT / "examples" / "tiny-llama", ROOT / "examples" / "tiny-adapter"
SHIPPED = ("src", "docs", "examples", "README.md", "README.zh.md", "CHANGELOG.md", "SECURITY.md")
SHIPPED += ("CITATION.cff", "LICENSE")
CONFIG = ROOT / "tests" / "data" / "opentad_configs" / "adatad_s.py"


def said(words: list[object], **options: object) -> subprocess.CompletedProcess[str]:
    """A command's end, both its streams as text."""
    return subprocess.run([str(w) for w in words], capture_output=True, text=True, **options)  # type: ignore[call-overload,no-any-return]


def build(source: Path, out: Path) -> Path:
    """Build wheel and source archive as `.github/workflows/release.yml` does."""
    words = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source]
    done = said(words, env=os.environ | {"SOURCE_DATE_EPOCH": "1700000000"})
    assert done.returncode == 0, done.stderr + done.stdout
    return out


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source archive."""
    out = tmp_path_factory.mktemp("dist")
    return build(ROOT, out)


@pytest.fixture(scope="module")
def clean(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `tensorkeep` of a new environment that holds the wheel and what it depends on, and nothing else."""
    place = tmp_path_factory.mktemp("clean")
    venv.create(place)
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", place / "bin" / "python", "install", "--quiet", "--no-compile"]
    done = said([*pip, "-c", ROOT / "constraints.txt", wheel])
    if done.returncode and ("No matching distribution" in done.stderr or "Connection" in done.stderr):
        pytest.skip(f"no package index can be reached: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return place / "bin" / "tensorkeep"


def test_the_metadata_is_what_an_index_asks_for(built: Path) -> None:
    done = said([sys.executable, "-m", "twine", "check", "--strict", *sorted(built.iterdir())])
    assert done.returncode == 0 and done.stdout.count("PASSED") == 2, done.stdout
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (place,) = (n for n in names if n.endswith("METADATA"))
        fields = Parser().parsestr(archive.read(place).decode())
    assert fields["Keywords"] and len(fields.get_all("Classifier", [])) > 8
    assert {u.split(",")[0] for u in fields.get_all("Project-URL", [])} >= {"Homepage", "Issues", "Changelog"}
    assert "tensorkeep/py.typed" in names and not any(n.startswith(("tests/", "benchmarks/")) for n in names)


def test_another_clone_gives_the_same_bytes(built: Path, tmp_path: Path) -> None:
    again = tmp_path / "another clone"
    again.mkdir()
    for name in (".gitignore", "pyproject.toml", *SHIPPED):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, again / name, copy_function=shutil.copyfile)  # other times
        else:
            shutil.copyfile(ROOT / name, again / name)
    (again / "src" / "tensorkeep" / "cli.py").chmod(0o600)
    (again / "build").mkdir()  # what a clone has from before
    (again / "build" / "left.txt").touch()
    build(again, tmp_path / "dist")
    digests = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
        for folder in (built, tmp_path / "dist")
    ]
    assert digests[0] == digests[1] and len(digests[0]) == 2


def test_what_needs_no_torch_runs_without_it(clean: Path, tmp_path: Path) -> None:
    def run(*words: object) -> str:
        done = said([clean, *words], cwd=tmp_path)
        assert done.returncode == 0, (words, done.stderr)
        return done.stdout

    has_torch = said([clean.parent / "python", "-c", "import torch"])
    assert has_torch.returncode == 1, "the environment is not clean"
    assert json.loads(run("inspect", TINY, "--json"))["parameters"] == 22688
    run("convert", TINY, "dcp", "--to", "dcp", "--naming", "torchtitan")
    assert "bit for bit" in run("diff", TINY, "dcp")
    assert "every digest" in run("verify", "dcp")
    assert "ok" in run("diagnose", "dcp", "--reference", TINY)
    assert "computed twice" in run("merge", TINY, ADAPTER, "merged")
    assert run("explain", "K01").startswith("K01 missing tensor")
    Path(tmp_path / "found.json").write_text(run("diagnose", "dcp", "--json"))
    run("report", "found.json", "-o", "page.html")
    checkup = json.loads(run("doctor", "--json"))
    states = {row["name"]: row["imports"] for row in checkup["packages"]}
    assert states["numpy"] is True and states["torch"] is None and checkup["torch"] is None
    helps = said([clean.parent / "python", "-c", HELPS, *COMMANDS], cwd=tmp_path)
    assert helps.returncode == 0 and helps.stdout.count("Usage: ") == len(COMMANDS), helps.stderr


HELPS = """
import sys
from tensorkeep.cli import main
for command in sys.argv[1:]:
    assert main([*command.split(), "--help"]) == 0, command
"""
NEEDING = {
    "train language": ["train", "language", "recipe.yaml", "--out", "run"],
    "train detection": ["train", "detection", "recipe.yaml", "--out", "run"],
    "eval language": ["eval", "language", TINY],
    "eval detection": ["eval", "detection", "run"],
    "generate": ["generate", TINY, "--prompt", "x"],
    "predict": ["predict", "run", "video.mp4"],
    "features": ["features", "run", "video.mp4", "-o", "features"],
    "demo": ["demo"],
    "recipe import": ["recipe", "import", CONFIG, "-o", "recipe.yaml"],
}


@pytest.mark.parametrize("command", sorted(NEEDING))
def test_what_needs_an_extra_says_which_in_one_line(clean: Path, tmp_path: Path, command: str) -> None:
    done = said([clean, *NEEDING[command]], cwd=tmp_path, env=os.environ | {"COLUMNS": "200"})
    extra = COMMANDS[command] or "torch"
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert done.stderr.count("error:") == 1 and f"hint: pip install 'tensorkeep[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())
