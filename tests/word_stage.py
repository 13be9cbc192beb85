"""The folder in which the commands of tests/words/ run: small models, texts, videos, a damaged copy, a dead run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tensorkeep.commands.demo import story
from tensorkeep.commands.doctor import packages
from tests import language_files
from tests.detection import runs
from tests.detection.test_command import FOUND, TRUTH
from tests.tools import ROOT, flip_a_byte

TABLE = "video,start,end,label\n" + "".join(
    f"training_000{n},{at},{at + 1},{label}\n" for n in range(3) for at, label in ((0.5, "slide"), (2, "blink"))
)


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[None]:
    """Put everything into an empty folder, and work in it.

    The demo's model is a tiny one there, and `doctor` asks for three packages: the real ones take a minute.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("CI", "TENSORKEEP_DEBUG", "HF_HUB_OFFLINE", *(v for v in os.environ if v.startswith("AWS_"))):
            patch.delenv(name, raising=False)
        losses = iter([2.973821, 2.973821, 2.973821, 5.417093])  # a tiny model's say nothing
        patch.setattr(story, "smollm2", lambda: Path("base"))
        patch.setattr(story, "loss", lambda model, ids: next(losses))
        few = [p for p in packages.PACKAGES if p.name in ("safetensors", "numpy")]
        absent = packages.Package("nothing-of-this-name", "nothing_of_this_name", "track")
        patch.setattr(packages, "PACKAGES", (*few, absent))
        _checkpoints()
        _trainings()
        _keys()
        yield


def _checkpoints() -> None:
    for name in ("tiny-llama", "tiny-adapter"):
        shutil.copytree(ROOT / "examples" / name, name.removeprefix("tiny-"))
    for name in ("damaged", "uncertified"):
        shutil.copytree("llama", name)
        flip_a_byte(Path(name, "model.safetensors"), -3)
    Path("uncertified", "tensorkeep.json").unlink()
    Path("empty").mkdir()
    Path("mine").mkdir()
    Path("mine", "thesis.txt").write_text("mine")
    shutil.copytree(ROOT / "tests" / "data" / "opentad_configs", "opentad")


def _trainings() -> None:
    language_files.save_model(Path("base"), "llama")
    language_files.texts(Path("texts.jsonl"))
    language_files.texts(Path("many.jsonl"), 400)
    recipe: dict[str, Any] = {
        "version": 2,
        "model": "base",
        "adapter": {"lora_r": 4, "targets": ["q_proj", "v_proj"]},
        "data": {"files": ["texts.jsonl"], "length": 32, "packing": "concatenate"},
        "evaluation": {"files": ["texts.jsonl"]},
        "training": {"updates": 4, "batch_size": 4, "log_every": 1, "save_every": 2, "keep_last": 9},
        "optimizer": {"lr": 1e-3},
    }
    Path("language.yaml").write_text(yaml.safe_dump(recipe))
    runs.dataset(Path("data"), videos=3, held_out=1)
    detector = runs.document(Path("data"))
    detector["training"] |= {"epochs": 2, "evaluate_every": 2}
    Path("detection.yaml").write_text(yaml.safe_dump(detector))
    (Path("data") / "videos" / "broken.mp4").write_bytes(b"no video")
    Path("times.csv").write_text(TABLE)
    for name, document in (("truth.json", TRUTH), ("found.json", FOUND)):
        Path(name).write_text(json.dumps(document))


def _keys() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    Path("key.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    Path("key.pub").write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))


def kill(run: Path, killed: Path) -> None:
    """A copy of a run whose process was killed at step 3, after its checkpoint of step 2, says its status."""
    shutil.copytree(run, killed)
    shutil.rmtree(killed / "checkpoints" / "step-000004")
    rows = (killed / "metrics.jsonl").read_text().splitlines(keepends=True)
    (killed / "metrics.jsonl").write_text("".join(row for row in rows if json.loads(row)["step"] < 4))
    status = json.loads((killed / "status.json").read_text())
    status |= {"state": "running", "step": 3, "pid": 2**22 + 1, "doing": None}
    (killed / "status.json").write_text(json.dumps(status))
