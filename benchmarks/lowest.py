"""The oldest versions that pyproject.toml allows, installed under one Python, and the tests that they must pass.

    pip install uv
    python -m benchmarks.lowest python3.10 --place build/lowest                # builds the environment, runs TESTS
    python -m benchmarks.lowest python3.10 --place build/lowest tests/test_gguf.py   # other tests; a built one is kept

What tensorkeep asks for itself comes in its lowest version (uv's `lowest-direct`), what these ask for in turn in the
newest that fits. torch of the package index brings CUDA's libraries for Linux, some 3 GB. The package is installed as
a wheel is, not from the source; the tests are those of this checkout.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXTRAS = "language,detection,quant,tables,signing,remote"
TESTS = """
tests/test_files.py tests/test_gguf.py tests/test_gguf_writing.py tests/test_identity.py tests/test_checkpoint.py
tests/test_merging.py tests/test_merging_peft.py tests/test_exports.py tests/test_lora.py tests/test_quantize.py
tests/test_language_recipe.py tests/test_language_data.py tests/test_commands_train.py tests/test_train.py
tests/test_kill.py tests/test_signing.py tests/detection
""".split()


def build(uv: str, python: str, place: Path) -> None:
    """A new environment with the lowest versions; what tests need, and triton 3.1 without asking, is the newest."""
    subprocess.run([uv, "venv", "--quiet", "--python", python, place], check=True)
    install = [uv, "pip", "install", "--quiet", "--python", place]
    subprocess.run([*install, "--resolution", "lowest-direct", f"{ROOT}[{EXTRAS}]"], check=True)
    subprocess.run([*install, "pytest", "hypothesis", "setuptools"], check=True)


def main() -> None:
    """Build, say what came in, run the tests, and leave with their exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("python", help="an interpreter, by name or path")
    parser.add_argument("tests", nargs="*", default=TESTS, help="files of tests")
    parser.add_argument("--place", type=Path, required=True, help="the environment's folder")
    given = parser.parse_args()
    uv = shutil.which("uv") or str(Path(sys.executable).parent / "uv")
    if not given.place.exists():
        build(uv, given.python, given.place)
    own = given.place.resolve() / "bin" / "python"
    subprocess.run([own, "-m", "tensorkeep", "doctor"], check=False)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    words = [own, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *given.tests]
    sys.exit(subprocess.run(words, cwd=ROOT, env=env).returncode)


if __name__ == "__main__":
    main()
