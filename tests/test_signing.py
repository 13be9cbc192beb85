"""Signed statements: verified in every form of the model, by model-signing too; what was changed is named."""

from __future__ import annotations

import datetime
import json
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from safetensors.torch import load_file, save_file

from tensorkeep.cli import main
from tensorkeep.diagnosis.identity.identify import identify
from tensorkeep.diagnosis.identity.proofs import check_proof, prove_tensor
from tensorkeep.diagnosis.identity.signing import Trust, check_signature
from tensorkeep.diagnosis.identity.statement import read_statement
from tensorkeep.errors import TensorkeepError
from tests.helpers import to
from tests.identity_forms import DENSE, state_of
from tests.language_files import save_model
from tests.test_identity import half
from tests.tools import TINY

pytest.importorskip("model_signing.signing")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return half(save_model(tmp_path_factory.mktemp("signed") / "model", "llama", tie_word_embeddings=True))


class Keys:
    """A key of an author, another's, an authority, and certificates of the author: valid, expired, for the future."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca, self.own, self.other = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
        for name, key in (("ca", self.ca), ("own", self.own), ("other", self.other)):
            private = key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            (folder / f"{name}.pem").write_bytes(private)
            public = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            (folder / f"{name}.pub").write_bytes(key.public_key().public_bytes(*public))
        self.certificate("ca.crt", "Authority", self.ca, -3000, 3000, authority=True)
        for name, first, last in (("valid", -10, 10), ("expired", -30, -10), ("future", 10, 30)):
            self.certificate(f"{name}.crt", "Author", self.own, first, last)

    def certificate(self, name: str, who: str, key: Any, first: int, last: int, authority: bool = False) -> None:
        now = datetime.datetime.now(datetime.timezone.utc)
        made = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, who)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Authority")]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + datetime.timedelta(days=first))
            .not_valid_after(now + datetime.timedelta(days=last))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(
                x509.KeyUsage(not authority, False, False, False, False, authority, authority, False, False), True
            )
        )
        if not authority:
            made = made.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), False)
        signed = made.sign(self.ca, hashes.SHA256())
        (self.folder / name).write_bytes(signed.public_bytes(serialization.Encoding.PEM))

    def __truediv__(self, name: str) -> Path:
        return self.folder / name


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(w) for w in words])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def findings(capsys: pytest.CaptureFixture[str], *words: object) -> list[tuple[str, str, list[str]]]:
    code, out, _ = run(capsys, *words, "--json")
    document = json.loads(out)
    assert code == (1 if any(f["severity"] == "error" for f in document["findings"]) else 0)
    return [(f["code"], f["message"], f["tensors"]) for f in document["findings"]]


@pytest.mark.parametrize("form", ["shards", "flame", "torchtitan", "live", "gguf", "three ranks of FSDP"])
def test_what_was_signed_verifies_in_another_form(
    form: str, signed: Path, keys: Keys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = DENSE[form](signed, tmp_path / "other", state_of(signed))
    code, out, err = run(capsys, "verify", other, "--statement", signed, "--key", keys / "own.pub")
    assert code == 0 and out.startswith("verified: ") and err == ""
    assert ("not compared: tokenizer" in out) is (form not in ("shards", "torchtitan"))


def test_a_conversion_carries_the_signature_and_a_cast_does_not(
    signed: Path, keys: Keys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, words in (("dcp", ["--naming", "torchtitan", "--to", "dcp"]), ("a.gguf", ["--to", "gguf"])):
        assert run(capsys, "convert", signed, tmp_path / name, *words)[0] == 0
        code, out, err = run(capsys, "verify", tmp_path / name, "--key", keys / "own.pub")
        assert code == 0 and out.startswith("verified: "), err
    assert run(capsys, "convert", tmp_path / "dcp", tmp_path / "back", "--to", "hf", "--shard-size", "20kB")[0] == 0
    assert run(capsys, "verify", tmp_path / "back", "--key", keys / "own.pub")[0] == 0
    assert run(capsys, "convert", signed, tmp_path / "half", "--to", "hf", "--dtype", "fp16")[0] == 0
    code, out, err = run(capsys, "verify", tmp_path / "half", "--key", keys / "own.pub")
    assert code == 2 and out == "" and "no statement lies beside it" in err


def test_every_changed_byte_is_named(signed: Path, keys: Keys, capsys: pytest.CaptureFixture[str]) -> None:
    ask = ("verify", signed, "--key", keys / "own.pub")
    assert findings(capsys, *ask) == []
    kept = {p.name: p.read_bytes() for p in signed.iterdir()}
    state = load_file(signed / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    state[name].view(torch.uint8)[3, 5] ^= 1
    save_file(state, signed / "model.safetensors", metadata={"format": "pt"})
    ((code, message, tensors),) = findings(capsys, *ask)
    assert (code, tensors) == ("F03", [name]) and "1 tensor changed since the statement" in message
    (signed / "model.safetensors").write_bytes(kept["model.safetensors"])
    changes = {
        "config.json": (b'"hidden_act": "silu"', b'"hidden_act": "gelu"', "hidden_act is 'gelu', was 'silu'"),
        "tokenizer.json": (b'"continuing_subword_prefix": null', b'"continuing_subword_prefix": "x"', "the tokenizer"),
        "tokenizer_config.json": (b'"pad_token": "', b'"pad_token": "x', "tokenizer_config.json: not the tokenizer"),
        "chat_template.jinja": (b"role", b"rule", "chat_template.jinja: not the chat template"),
        "generation_config.json": (b'"bos_token_id": 1', b'"bos_token_id": 3', "generation_config.json: not the gen"),
    }
    for file, (before, after, said) in changes.items():
        assert before in kept[file], file
        (signed / file).write_bytes(kept[file].replace(before, after, 1))
        (found,) = findings(capsys, *ask)
        assert found[0] == "F03" and said in found[1] and found[2] == [file], found
        (signed / file).write_bytes(kept[file])
    (signed / "config.json").write_bytes(kept["config.json"] + b"\n")
    code, out, _ = run(capsys, *ask)
    assert code == 0 and "other bytes that say the same config" in out and "verified: " in out


def test_what_is_added_or_taken_away_is_named(
    model: Path, signed: Path, keys: Keys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ("verify", signed, "--key", keys / "own.pub")
    state = load_file(signed / "model.safetensors")
    gone = state.pop("model.norm.weight")
    save_file(state | {"model.layers.0.extra.weight": gone}, signed / "model.safetensors", metadata={"format": "pt"})
    found = findings(capsys, *ask)
    assert [(f[0], f[2]) for f in found] == [("K01", ["model.norm.weight"]), ("K02", ["model.layers.0.extra.weight"])]
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in ("model.safetensors", "config.json"):
        shutil.copy(model / file, bare / file)
    assert main(["sign", str(bare), "--key", str(keys / "own.pem"), "--quiet"]) == 0
    shutil.copy(model / "chat_template.jinja", bare / "chat_template.jinja")
    ((code, message, _),) = findings(capsys, "verify", bare, "--key", keys / "own.pub")
    assert code == "F03" and "the statement has no chat template" in message


def test_signatures_of_model_signings_own_program_and_ours_verify_both_ways(
    signed: Path, keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    program = [sys.executable, "-m", "model_signing"]
    statement, signature = signed / "identity.json", signed / "identity.sig"
    theirs = [*program, "verify", "key", str(statement), "--signature", str(signature)]
    done = subprocess.run([*theirs, "--public_key", str(keys / "own.pub")], capture_output=True, text=True)
    assert done.returncode == 0 and "succeeded" in done.stdout, done.stderr
    ours = signature.read_bytes()
    signature.unlink()
    made = [*program, "sign", "key", str(statement), "--signature", str(signature), "--private_key"]
    done = subprocess.run([*made, str(keys / "own.pem")], capture_output=True, text=True)
    assert done.returncode == 0 and signature.read_bytes() != ours
    assert run(capsys, "verify", signed, "--key", keys / "own.pub")[0] == 0
    certificate = [str(keys / "own.pem"), "--signing_certificate", str(keys / "valid.crt")]
    certificate += ["--certificate_chain", str(keys / "ca.crt")]
    made = [*program, "sign", "certificate", str(statement), "--signature", str(signature), "--private_key"]
    done = subprocess.run([*made, *certificate], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code, out, _ = run(capsys, "verify", signed, "--certificate", keys / "ca.crt")
    assert code == 0 and "signed by CN=Author" in out


def test_a_certificate_signs_and_one_that_expired_does_not_verify(
    signed: Path, keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sign", signed, "--key", keys / "own.pem", "--overwrite", "--certificate"]
    ask = ("verify", signed, "--certificate", keys / "ca.crt")
    assert run(capsys, *words, keys / "valid.crt")[0] == 0 and run(capsys, *ask)[0] == 0
    for name, said in (("expired", "expired on"), ("future", "is valid from")):
        assert run(capsys, *words, keys / f"{name}.crt")[0] == 0
        code, out, err = run(capsys, *ask)
        assert code == 2 and out == "" and said in err
    assert run(capsys, *words, keys / "ca.crt")[0] == 2  # of another key
    keys.certificate("stray.crt", "Stray", keys.other, -1, 1, authority=True)
    assert run(capsys, *words, keys / "valid.crt")[0] == 0
    code, out, err = run(capsys, "verify", signed, "--certificate", keys / "own.pub")
    assert code == 2 and out == ""
    code, out, err = run(capsys, "verify", signed, "--key", keys / "own.pub")
    assert code == 2 and out == "" and "not what you trust" in err


def broken(signed: Path, keys: Keys, how: str) -> tuple[str, ...]:
    """Break one thing; the words that the verification then takes beside the folder."""
    statement, signature = signed / "identity.json", signed / "identity.sig"
    document = json.loads(statement.read_text())
    bundle = json.loads(signature.read_text())
    key = ("--key", str(keys / "own.pub"))
    if how == "unsigned":
        signature.unlink()
    elif how == "no statement":
        statement.unlink()
    elif how == "wrong key":
        return ("--key", str(keys / "other.pub"))
    elif how == "no key":
        return ("--key", str(keys / "nothing.pub"))
    elif how == "key is none":
        return ("--key", str(keys / "valid.crt"))
    elif how == "statement cut":
        statement.write_bytes(statement.read_bytes()[:-40])
    elif how == "signature cut":
        signature.write_bytes(signature.read_bytes()[:-40])
    elif how == "signature empty":
        signature.write_bytes(b"")
    elif how == "short hash":
        document["predicate"]["tensors"][0]["content"] = "ab" * 20
        statement.write_text(json.dumps(document))
    elif how == "short identity":
        document["subject"][0]["digest"] = {"tensorkeepIdentityV1": "ab" * 16}
        statement.write_text(json.dumps(document))
    elif how == "one space more":
        statement.write_bytes(statement.read_bytes() + b" ")
    elif how == "another payload":
        bundle["dsseEnvelope"]["payload"] = "e30="
        signature.write_text(json.dumps(bundle))
    elif how == "no signatures":
        bundle["dsseEnvelope"]["signatures"] = []
        signature.write_text(json.dumps(bundle))
    elif how == "statement of another tensor":
        document["predicate"]["tensors"][0]["content"] = "ab" * 32
        statement.write_text(json.dumps(document))
    elif how == "short demand":
        return ("--identity", "abcd")
    elif how == "identity without issuer":
        return ("--identity", "me@example.org")
    elif how == "two signers":
        return (*key, "--certificate", str(keys / "ca.crt"))
    return key


KINDS = [
    *(("unsigned", "F05"), ("no statement", "F05"), ("wrong key", "F03"), ("no key", None), ("key is none", "F03")),
    *(("statement cut", "F02"), ("signature cut", "F02"), ("signature empty", "F02"), ("short hash", "F07")),
    *(("short identity", "F07"), ("one space more", "F03"), ("another payload", "F03"), ("no signatures", "F07")),
    *(("statement of another tensor", "F03"), ("short demand", "F07"), ("identity without issuer", None)),
    ("two signers", None),
]


@pytest.mark.parametrize(("how", "code"), KINDS)
def test_what_cannot_be_believed_is_one_error_and_never_verified(
    how: str, code: str | None, signed: Path, keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    words = broken(signed, keys, how)
    exit_code, out, err = run(capsys, "verify", signed, *words)
    assert exit_code == 2 and out == "" and err.count("error:") == 1 and "verified:" not in err
    assert code is None or f"error: {code} " in err, err
    _, out, _ = run(capsys, "verify", signed, *words, "--json")
    assert set(json.loads(out)) == {"schema", "error"}


def test_a_statement_about_another_model_is_refused(
    signed: Path, keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    other = TINY
    code, out, err = run(capsys, "verify", other, "--statement", signed, "--key", keys / "own.pub")
    assert code == 2 and out == "" and "speaks of another model" in err
    wanted = "ab" * 32
    code, out, err = run(capsys, "verify", other, "--identity", wanted)
    assert code == 1 and f"{wanted} is demanded" in out and "ok" not in out


def test_the_certificate_keeps_the_signature_too(
    model: Path, keys: Keys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to(model, tmp_path / "a.pth", "pth")
    shutil.copy(model / "config.json", tmp_path / "config.json")
    place = tmp_path / "a.pth"
    assert run(capsys, "sign", place, "--key", keys / "own.pem")[0] == 0
    assert run(capsys, "sign", place, "--key", keys / "own.pem")[0] == 2  # there is one
    certificate = json.loads((tmp_path / "a.pth.tensorkeep.json").read_text())
    assert certificate["identity"]["signature"]["mediaType"].startswith("application/vnd.dev.sigstore.bundle")
    assert run(capsys, "verify", place)[0] == 0
    (tmp_path / "a.pth.identity.sig").unlink()
    code, out, _ = run(capsys, "verify", place, "--key", keys / "own.pub")
    assert code == 0 and "verified: " in out
    code, out, _ = run(capsys, "verify", place, "--statement", tmp_path / "a.pth.identity.json")
    assert code == 0 and "no signature was checked" in out and "verified" not in out


def test_signing_says_what_it_needs(model: Path, keys: Keys, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        ((), "nothing to sign with"),
        (("--key", keys / "own.pub"), "cannot be signed"),
        (("--key", keys / "none.pem"), "no such file"),
        (("--sigstore", "--certificate", keys / "valid.crt"), "belongs to a key"),
        (("--key", keys / "own.pem", "-o", "statement.txt"), "is a .json file"),
    ):
        code, out, err = run(capsys, "sign", model, *words)
        assert code == 2 and out == "" and said in err
    assert not (model / "identity.json").exists()


def mangled(value: Any, draw: random.Random) -> Any:
    """One member of nested values replaced by something else."""
    if draw.random() < 0.3 or not isinstance(value, dict | list) or not value:
        return draw.choice([None, 3, -1, "x", [], {}, True, 1e30, "00" * 32, "\ud800"])
    if isinstance(value, dict):
        name = draw.choice(sorted(value))
        return {**value, name: mangled(value[name], draw)}
    at = draw.randrange(len(value))
    return [*value[:at], mangled(value[at], draw), *value[at + 1 :]]


def test_a_mangled_statement_bundle_or_proof_is_refused_and_breaks_nothing(signed: Path, keys: Keys) -> None:
    """Where something is accepted, it says the same: fields that nobody compares, such as a hint, may change."""
    draw = random.Random(7)
    statement, signature = ((signed / name).read_bytes() for name in ("identity.json", "identity.sig"))
    proof, read = prove_tensor(identify(signed), "model.norm.weight"), read_statement(statement, "here")
    refused = 0
    for _ in range(150):
        try:
            found = read_statement(json.dumps(mangled(json.loads(statement), draw)).encode(), "here")
            assert (found.identity, found.leaves) == (read.identity, read.leaves)
        except TensorkeepError:
            refused += 1
        try:
            other = mangled(proof, draw)
            assert check_proof(other if isinstance(other, dict) else {})[0] == proof["identity"]
        except TensorkeepError:
            refused += 1
    for _ in range(30):
        bundle = json.dumps(mangled(json.loads(signature), draw)).encode()
        try:
            check_signature(statement, bundle, Trust(key=keys / "own.pub"), "here")
            kept = json.loads(bundle)["dsseEnvelope"]
            assert kept["payload"] == json.loads(signature)["dsseEnvelope"]["payload"]
        except TensorkeepError:
            refused += 1
    assert refused > 250


def test_code_beside_the_weights_is_signed_and_other_files_are_said_not_to_be(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys, folder = Keys(tmp_path), tmp_path / "model"
    shutil.copytree(model, folder)
    (folder / "modeling_x.py").write_text("class E: pass\n")
    assert main(["sign", str(folder), "--key", str(tmp_path / "own.pem")]) == 0
    words = ["verify", str(folder), "--key", str(keys.folder / "own.pub")]
    capsys.readouterr()
    assert main(words) == 0 and "code" in capsys.readouterr().out
    (folder / "notes.bin").write_bytes(b"x")
    assert main(words) == 0 and "not covered by the statement: notes.bin" in capsys.readouterr().out
    (folder / "modeling_x.py").write_text("class E: 1\n")
    assert main(words) == 1 and "F03 modeling_x.py: not the code of the statement" in capsys.readouterr().out
    (folder / "modeling_x.py").write_text("class E: pass\n")
    (folder / "evil.py").write_text("1\n")
    assert main(words) == 1 and "F03 evil.py" in capsys.readouterr().out
    assert main([*words[:3], str(tmp_path / "own.pem")]) == 2
    assert "is a private key" in capsys.readouterr().err
