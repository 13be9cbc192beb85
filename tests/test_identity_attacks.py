"""What was made to look like a signed model, or like a training that was made again, is told from it."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from safetensors.torch import load_file, save_file

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import read
from tests.gguf_files import rewritten
from tests.helpers import refused, to
from tests.language_files import save_model
from tests.test_identity import half
from tests.test_replay import ADAPTER, recipe
from tests.test_signing import Keys, run

pytest.importorskip("model_signing.signing")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return half(save_model(tmp_path_factory.mktemp("model") / "model", "llama", tie_word_embeddings=True))


# -- two models in one archive: torch reads the first, Python the second ---------------------------------------------


def _archives(folder: Path) -> tuple[bytes, bytes]:
    """An archive of ones, and one of other values; both are as long, with their entries at the same places."""
    for name, values in (("evil", torch.ones(8)), ("good", torch.arange(8.0))):
        torch.save({"w": values}, folder / f"{name}.pth")
    evil, good = ((folder / f"{name}.pth").read_bytes() for name in ("evil", "good"))
    assert len(evil) == len(good)
    return evil, good


def _moved(good: bytes, by: int) -> bytes:
    """An archive whose every place is right behind `by` bytes, but that of the directory that torch looks for."""
    data = bytearray(good)
    end = len(data) - 22
    wide = end - 20 - 56
    size, at = struct.unpack("<QQ", data[wide + 40 : wide + 56])
    struct.pack_into("<Q", data, wide + 48, at + by)
    (narrow,) = struct.unpack("<I", data[end + 16 : end + 20])
    struct.pack_into("<I", data, end + 16, narrow if narrow == 0xFFFFFFFF else narrow + by)
    last = at + size
    while at < last:
        name, extra, comment = struct.unpack("<HHH", data[at + 28 : at + 34])
        (place,) = struct.unpack("<I", data[at + 42 : at + 46])
        struct.pack_into("<I", data, at + 42, place + by)
        at += 46 + name + extra + comment
    return bytes(data)


@pytest.mark.parametrize("how", ["put before it", "put before it, every place set right"])
def test_an_archive_with_another_one_in_front_which_torch_would_read_is_refused(how: str, tmp_path: Path) -> None:
    evil, good = _archives(tmp_path)
    place = tmp_path / "model.pth"
    place.write_bytes(evil + (good if how == "put before it" else _moved(good, len(evil))))
    assert torch.load(place, weights_only=True)["w"].tolist() == [1.0] * 8
    with refused("F07", "its end names the directory of another archive"):
        read(place)
    place.write_bytes(good)
    assert read(place).tensor("w").tolist() == torch.load(place, weights_only=True)["w"].tolist()


@pytest.mark.parametrize("more", [b"abc", b"PK\5\6" + bytes(18)])
def test_an_archive_with_bytes_behind_its_end_is_refused(more: bytes, tmp_path: Path) -> None:
    place, (_, good) = tmp_path / "model.pth", _archives(tmp_path)
    place.write_bytes(good[:-2] + len(more).to_bytes(2, "little") + more)
    with pytest.raises(TensorkeepError) as caught:
        read(place)
    assert caught.value.code in ("F02", "F07")


def test_entries_that_differ_in_case_alone_are_refused(tmp_path: Path) -> None:
    import zipfile

    _archives(tmp_path)
    with zipfile.ZipFile(tmp_path / "good.pth") as held, zipfile.ZipFile(tmp_path / "two.pth", "w") as made:
        for info in held.infolist():
            made.writestr(info.filename, held.read(info))
        made.writestr("good/DATA/0", bytes(32))
    with refused("F07", "'good/DATA/0' occurs twice"):
        read(tmp_path / "two.pth")


# -- certificates ----------------------------------------------------------------------------------------------------


def _chain(keys: Keys, expired: int | None, links: int = 10) -> list[Path]:
    """Certificates of authorities from the root down, then the author's; one of them may have expired yesterday."""
    now = datetime.datetime.now(datetime.timezone.utc)
    own = [ec.generate_private_key(ec.SECP256R1()) for _ in range(links)]
    made: list[Path] = []
    for at, key in enumerate([*own, keys.own]):
        name, by = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"link {n}")]) for n in (at, max(at - 1, 0)))
        first, last = (-9, -1) if at == expired else (-5, 5)
        usage = x509.KeyUsage(at == links, False, False, False, False, at < links, at < links, False, False)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(by)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + datetime.timedelta(days=first))
            .not_valid_after(now + datetime.timedelta(days=last))
            .add_extension(x509.BasicConstraints(ca=at < links, path_length=None), critical=True)
            .add_extension(usage, critical=True)
        )
        signer = own[max(at - 1, 0)]
        made.append(keys.folder / f"link{at}.crt")
        made[-1].write_bytes(builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    return made


def test_a_chain_of_ten_links_is_verified_and_one_of_which_a_link_has_expired_is_not(
    signed: Path, keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    """model-signing verifies a chain at the time that the signer's certificate began, which nobody vouches for."""
    for expired, code in ((None, 0), (4, 2)):
        root, *between, leaf = _chain(keys, expired)
        words = [word for path in between for word in ("--chain", path)]
        asked = ["sign", signed, "--key", keys / "own.pem", "--certificate", leaf, *words, "--overwrite"]
        assert run(capsys, *asked)[0] == 0
        found, out, err = run(capsys, "verify", signed, "--certificate", root)
        assert found == code and ("verified" in out) is (code == 0), err
    assert "F03" in err and "a certificate of its chain expired on" in err and "(CN=link 4)" in err


def test_a_key_of_another_kind_is_said_to_be_one(
    signed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from cryptography.hazmat.primitives.asymmetric import ed25519

    public = ed25519.Ed25519PrivateKey.generate().public_key()
    form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    (tmp_path / "other.pub").write_bytes(public.public_bytes(*form))
    code, out, err = run(capsys, "verify", signed, "--key", tmp_path / "other.pub")
    assert code == 2 and out == "" and "the key is of no elliptic curve" in err


# -- beside the weights ----------------------------------------------------------------------------------------------


def test_a_generation_config_that_was_taken_away_is_found(
    signed: Path, keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers would make another of the config, with other ends of a text and no sampling."""
    (signed / "generation_config.json").unlink()
    code, out, _ = run(capsys, "verify", signed, "--key", keys / "own.pub")
    assert code == 1 and "error: F05 generation_config.json of the statement is not there" in out


@pytest.mark.parametrize("name", ["__evil", ".hidden", "x.py"])
def test_every_folder_but_those_of_tools_is_named(
    name: str, signed: Path, keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (name, ".git", ".cache", "__pycache__"):
        (signed / folder).mkdir()
    code, out, _ = run(capsys, "verify", signed, "--key", keys / "own.pub")
    assert code == 0 and f"not covered by the statement: {name}/\n" in out


def test_what_lies_beside_weights_without_a_config_is_named(
    signed: Path, keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    (signed / "config.json").unlink()
    (signed / "evil.py").write_text("1\n")
    code, out, _ = run(capsys, "verify", signed, "--key", keys / "own.pub")
    assert code == 0 and "not compared: config" in out and "not covered by the statement: evil.py" in out


def link_to_itself(place: Path) -> None:
    place.unlink()
    place.symlink_to(place)


ODD: dict[str, Callable[[Path], Any]] = {
    "a fifo as code": lambda f: os.mkfifo(f / "x.py"),
    "code that is not there": lambda f: (f / "x.py").symlink_to("/nowhere/x.py"),
    "a config that is a link to itself": lambda f: link_to_itself(f / "config.json"),
    "a number of 6000 digits": lambda f: (f / "config.json").write_text('{"a": ' + "9" * 6000 + "}"),
    "text in two words": lambda f: (f / "config.json").write_bytes((f / "config.json").read_text().encode("utf-16")),
    "half a letter": lambda f: (f / "config.json").write_text('{"model_type": "llama", "a": "\\ud800"}'),
}


@pytest.mark.parametrize("how", ODD)
def test_what_can_not_be_read_is_one_error(
    how: str, signed: Path, keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    ODD[how](signed)
    code, out, err = run(capsys, "verify", signed, "--key", keys / "own.pub")
    assert code == 2 and out == "" and err.count("error:") == 1, err


def test_a_tied_head_of_other_values_and_one_of_another_dtype_are_found(
    signed: Path, keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    held = load_file(signed / "model.safetensors")
    embedding = held["model.embed_tokens.weight"]
    changed = embedding.clone()
    changed[0, 0] += 1
    for head, code in ((embedding.clone(), 0), (changed, 1), (embedding.half(), 1)):
        save_file({**held, "lm_head.weight": head}, signed / "model.safetensors", {"format": "pt"})
        found, out, _ = run(capsys, "verify", signed, "--key", keys / "own.pub")
        assert found == code and (code == 0 or "K02 1 tensors are not in the statement: lm_head.weight" in out)


# -- GGUF ------------------------------------------------------------------------------------------------------------


def test_metadata_that_no_config_has_is_named_and_factors_that_none_can_say_are_refused(
    signed: Path, keys: Keys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to(signed, tmp_path / "a.gguf", "gguf")
    ask = ["--statement", signed, "--key", keys / "own.pub"]
    code, out, _ = run(capsys, "verify", tmp_path / "a.gguf", *ask)
    assert code == 0 and "that no config has" not in out
    more = {"llama.attention.causal": (False, gguf.GGUFValueType.BOOL)}
    rewritten(tmp_path / "a.gguf", tmp_path / "b.gguf", more)
    code, out, _ = run(capsys, "verify", tmp_path / "b.gguf", *ask)
    assert code == 0 and "metadata that no config has, so not compared: llama.attention.causal" in out
    for name in ("rope_freqs.weight", "rope_factors_long.weight"):
        rewritten(tmp_path / "a.gguf", tmp_path / "c.gguf", {}, {name: np.full(8, 9, np.float32)})
        code, out, err = run(capsys, "verify", tmp_path / "c.gguf", *ask)
        assert code == 3 and "verified" not in out and "no identity" in err


# -- replay ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tensorkeep.cli import main

    place, threads = tmp_path_factory.mktemp("run"), torch.get_num_threads()
    torch.set_num_threads(1)
    base = save_model(place / "base", "llama")
    words = ["train", "language", recipe(place, base, adapter=ADAPTER), "--out", place / "run", "--quiet"]
    assert main([str(w) for w in words]) == 0
    torch.set_num_threads(threads)
    return place / "run"


@pytest.mark.parametrize("loss", [5.0, None, "abc", ["0x1p0"]])
def test_a_noted_loss_that_is_no_loss_differs(
    loss: Any, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    proof = copy / "checkpoints" / "proof.jsonl"
    *rows, last = [json.loads(line) for line in proof.read_text().splitlines()]
    proof.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {**last, "loss": loss}]))
    code, out, _ = run(capsys, "replay", copy, "--steps", "5..6")
    assert code == 1 and f"step {last['step']}, loss of proof.jsonl: was " in out and "differs: 1 of" in out


def test_what_was_not_compared_of_a_replay_is_said(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    (copy / "checkpoints" / "proof.jsonl").write_text('[1]\n{"step": "6", "loss": "0x1p0"}\n')
    (copy / "metrics.jsonl").unlink()
    code, out, _ = run(capsys, "replay", copy, "--steps", "5..6")
    assert code == 0 and "proof.jsonl: 2 lines at its end are no rows, so not compared" in out
    assert "nothing was noted of 1 of 2 steps: 5" in out and "(1 comparisons, of 1 steps)" in out
