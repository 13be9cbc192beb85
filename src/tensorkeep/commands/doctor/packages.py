"""Which packages are installed, whether they can be imported, and what torch finds: asked in a process of its own.

A broken package may end or hang the process that imports it. So all are imported by a child, which says of each how it
went; the one during which the child ends or does not answer is named, and another child goes on behind it.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from tensorkeep.errors import printable
from tensorkeep.storage.files import Progress

_SECONDS = 120  # for all the imports of one child, on slow disks too


@dataclass(frozen=True)
class Package:
    """A package that tensorkeep uses.

    Attributes:
        name: as pip knows it.
        module: what is imported to see whether it works.
        extra: the extra that brings it; "" for what tensorkeep always needs, None for what stands in no extra.
        least: the oldest version that works.
    """

    name: str
    module: str
    extra: str | None
    least: str = ""

    @property
    def install(self) -> str:
        """The command that installs it."""
        if self.extra is None:
            return f"pip install {self.name}"
        return f"pip install 'tensorkeep[{self.extra}]'" if self.extra else "pip install tensorkeep"


PACKAGES = (
    Package("safetensors", "safetensors", "", "0.5"),
    Package("numpy", "numpy", "", "1.26"),
    Package("ml_dtypes", "ml_dtypes", "", "0.5"),
    Package("xxhash", "xxhash", "", "3.4"),
    Package("cyclopts", "cyclopts", "", "4.1"),
    Package("rich", "rich", "", "13"),
    Package("pyyaml", "yaml", "", "6"),
    Package("torch", "torch", "torch", "2.5"),
    Package("transformers", "transformers", "language", "4.51"),
    Package("tokenizers", "tokenizers", "language", "0.20"),
    Package("peft", "peft", "language", "0.17"),
    Package("gguf", "gguf", "language", "0.17"),
    Package("av", "av", "detection", "17.1"),
    Package("bitsandbytes", "bitsandbytes", "quant", "0.45"),
    Package("pyarrow", "pyarrow", "tables", "15"),
    Package("model-signing", "model_signing", "signing", "1.1"),
    Package("pyopenssl", "OpenSSL", "signing", "24"),
    Package("fsspec", "fsspec", "remote", "2024.6"),
    Package("s3fs", "s3fs", "remote", "2024.6"),
    Package("tensorboard", "tensorboard", "track"),
    Package("wandb", "wandb", "track"),
    Package("trackio", "trackio", "track"),
    Package("accelerate", "accelerate", None, "1"),
    Package("pytorch-lightning", "pytorch_lightning", None, "2.4"),
    Package("huggingface_hub", "huggingface_hub", None),
)

# the child: its own stdout is kept for answers, what the packages print goes nowhere
_CHILD = r"""
import importlib, json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
paths, modules = json.loads(sys.argv[1])
sys.path[:] = paths
def say(**answer):
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
def torch_finds(torch):
    gpus = []
    if torch.cuda.is_available():
        for n in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(n)
            gpus.append({"index": n, "name": p.name, "memory": p.total_memory, "capability": f"{p.major}.{p.minor}"})
    hip = getattr(torch.version, "hip", None)
    build = f"ROCm {hip}" if hip else f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    ways, dist = [], torch.distributed
    if dist.is_available():
        if dist.is_nccl_available():
            version = torch.cuda.nccl.version()
            ways.append("nccl " + (".".join(map(str, version)) if isinstance(version, tuple) else str(version)))
        ways += ["gloo"] if dist.is_gloo_available() else []
        ways += ["mpi"] if dist.is_mpi_available() else []
    peer = len(gpus) > 1 and all(torch.cuda.can_device_access_peer(0, n) for n in range(1, len(gpus)))
    mps = getattr(torch.backends, "mps", None)
    return {"version": torch.__version__, "build": build, "gpus": gpus, "peer_access": peer, "distributed": ways,
            "mps": bool(mps and mps.is_available())}
for module in modules:
    say(begins=module)
    try:
        found = importlib.import_module(module)
    except BaseException as error:
        say(module=module, error=f"{type(error).__name__}: {error}")
        continue
    say(module=module, error=None)
    if module == "torch":
        try:
            say(torch=torch_finds(found))
        except BaseException as error:
            say(module=module, error=f"cannot be asked for devices: {type(error).__name__}: {error}")
say(ended=True)
"""


def every_package(
    progress: Progress = lambda what, done, total: None,
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Return a row for every package, and what torch finds; None where torch is not there or does not work."""
    versions = {package: _version(package) for package in PACKAGES}
    errors, torch = imported([p.module for p, version in versions.items() if version is not None], progress)
    rows = [
        {
            "name": package.name,
            "version": version,
            "least": package.least or None,
            "extra": package.extra,
            "imports": None if version is None else errors[package.module] is None,
            "error": errors.get(package.module),
            "install": package.install,
        }
        for package, version in versions.items()
    ]
    return rows, torch


def _version(package: Package) -> str | None:
    """Return the version that is installed; None where none is."""
    try:
        return str(metadata.version(package.name))
    except metadata.PackageNotFoundError:
        return None


def imported(
    modules: list[str], progress: Progress = lambda what, done, total: None
) -> tuple[dict[str, str | None], dict[str, Any] | None]:
    """Import modules in a process of their own and return what went wrong with each, and what torch finds.

    Args:
        modules: the modules, in the order in which they are imported.
        progress: is told how many are imported.

    Returns:
        module -> the error in one line, None where it imports; torch's devices, None where it was not imported.
    """
    errors: dict[str, str | None] = {}
    torch: dict[str, Any] | None = None
    while left := [m for m in modules if m not in errors]:
        answers, how = _child(left, lambda name: progress("import", modules.index(name), len(modules)))
        begun = None
        for answer in answers:
            begun = answer.get("begins", begun)
            torch = answer.get("torch", torch)
            if "module" in answer:
                error = answer["error"]
                errors[answer["module"]] = None if error is None else printable(" ".join(error.split()), 300)
        if not answers or "ended" not in answers[-1]:
            errors[begun or left[0]] = how
    return errors, torch


def _child(modules: list[str], begun: Callable[[str], None]) -> tuple[list[dict[str, Any]], str]:
    """Run one child; return its answers and how it ended, for where it did not get to its end."""
    words = [sys.executable, "-W", "ignore", "-c", _CHILD, json.dumps([sys.path, modules])]
    answers: list[dict[str, Any]] = []
    late = threading.Event()
    with subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child, _killed_after(_SECONDS, child, late):  # fmt: skip
        for line in child.stdout or ():
            if line.endswith(b"\n"):
                answers.append(json.loads(line.decode()))
                if (name := answers[-1].get("begins")) is not None:
                    begun(name)
    code = child.returncode
    how = f"ended by signal {-code}" if code < 0 else f"ended Python with exit code {code}"
    return answers, f"was not over in {_SECONDS} s" if late.is_set() else how


@contextlib.contextmanager
def _killed_after(seconds: float, child: subprocess.Popen[bytes], late: threading.Event) -> Iterator[None]:
    """Kill a child that is not over in time, and say so by `late`; or where the body ends early."""

    def kill() -> None:
        late.set()
        child.kill()

    timer = threading.Timer(seconds, kill)
    timer.start()
    try:
        yield
    except BaseException:
        child.kill()
        raise
    finally:
        timer.cancel()
