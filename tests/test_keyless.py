"""Keyless signatures are verified without a network by a trust configuration; what is not so is one error."""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tensorkeep.diagnosis.identity.signing import Signer, Trust, check_signature, sign
from tests.helpers import refused
from tests.keyless_service import ISSUER, WHO, Service, canonical, served, text
from tests.test_signing import Keys, run
from tests.tools import TINY

pytest.importorskip("model_signing.signing")
NOW = datetime.datetime.now(datetime.timezone.utc)
LONG_AGO = datetime.datetime(2021, 5, 1, tzinfo=datetime.timezone.utc)
WORKFLOW = "https://example.org/model/.ci/release.yml@refs/heads/main"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but this machine itself can be reached."""
    connect = socket.socket.connect

    def local(self: socket.socket, address: Any) -> None:
        assert address[0] == "127.0.0.1", f"the network was asked: {address}"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def service() -> Service:
    return Service()


def payload_of(statement: bytes, keys: Keys) -> bytes:
    """What model-signing signs of a statement, whoever signs it."""
    return base64.b64decode(json.loads(sign(statement, Signer(key=keys / "own.pem")))["dsseEnvelope"]["payload"])


@pytest.fixture
def signed(service: Service, keys: Keys, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A model with its statement and the keyless signature of it; what is to be trusted lies beside the folder."""
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    assert run(capsys, "sign", folder, "--key", keys / "own.pem")[0] == 0
    payload = json.loads((folder / "identity.sig").read_text())["dsseEnvelope"]["payload"]
    (folder / "identity.sig").write_text(json.dumps(service.bundle(base64.b64decode(payload))))
    service.write_trust(tmp_path / "trust.json")
    return folder


def ask(folder: Path, who: str = WHO, issuer: str = ISSUER, trust: str = "trust.json") -> list[object]:
    words = ["verify", folder, "--identity", who, "--issuer", issuer]
    return [*words, "--trust-config", folder.parent / trust]


def test_a_keyless_signature_is_verified_here_and_by_model_signings_own_program(
    signed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, *ask(signed))
    assert (code, err) == (0, "") and out.startswith("verified: ") and f"is signed by {WHO}: 20 tensors" in out
    assert json.loads(run(capsys, *ask(signed), "--json")[1])["signed_by"] == WHO
    program = [sys.executable, "-m", "model_signing", "verify", "sigstore", str(signed / "identity.json")]
    program += ["--signature", str(signed / "identity.sig"), "--identity_provider", ISSUER]
    program += ["--trust_config", str(signed.parent / "trust.json"), "--identity"]
    for who, code, said in ((WHO, 0, "succeeded"), ("other@example.org", 1, "SANs do not match")):
        done = subprocess.run([*program, who], capture_output=True, text=True)
        assert done.returncode == code and said in done.stdout + done.stderr, done.stderr


def test_a_changed_tensor_is_named_and_another_form_is_verified(
    signed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "convert", signed, signed.parent / "dcp", "--to", "dcp")[0] == 0
    code, out, _ = run(capsys, *ask(signed.parent / "dcp"))
    assert code == 0 and out.startswith("verified: ")
    weights = signed / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    code, out, _ = run(capsys, *ask(signed))
    assert code == 1 and "1 tensor changed since the statement" in out and "verified" not in out


def test_a_certificate_that_has_expired_since_is_believed_for_the_time_of_the_log(
    service: Service, keys: Keys, tmp_path: Path
) -> None:
    trust = service.write_trust(tmp_path / "trust.json")
    bundle = service.bundle(payload_of(b"{}", keys), LONG_AGO, late=9, who=WORKFLOW)
    believed = Trust(identity=WORKFLOW, issuer=ISSUER, trust_config=trust)
    assert check_signature(b"{}", json.dumps(bundle).encode(), believed, "here") == WORKFLOW


def entry(bundle: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = bundle["verificationMaterial"]["tlogEntries"][0]
    return found


def another_time(bundle: dict[str, Any]) -> None:
    entry(bundle)["integratedTime"] = str(int(entry(bundle)["integratedTime"]) + 1)


def another_body(bundle: dict[str, Any]) -> None:
    body = json.loads(base64.b64decode(entry(bundle)["canonicalizedBody"]))
    body["spec"]["payloadHash"]["value"] = "ab" * 32
    entry(bundle)["canonicalizedBody"] = text(canonical(body))


def another_checkpoint(bundle: dict[str, Any]) -> None:
    held = entry(bundle)["inclusionProof"]["checkpoint"]
    held["envelope"] = held["envelope"].replace("\n11\n", "\n12\n")


def another_payload(bundle: dict[str, Any]) -> None:
    payload = bytearray(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    payload[-5] ^= 1
    bundle["dsseEnvelope"]["payload"] = text(bytes(payload))


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "entry of another time": (another_time, "vouches for its log entry at that time"),
    "entry of another body": (another_body, "is not the one that the inclusion proof is of"),
    "checkpoint of another size": (another_checkpoint, "signed the checkpoint of its inclusion proof"),
    "root of another tree": (
        lambda b: entry(b)["inclusionProof"].update(rootHash=text(b"0" * 32)),
        "is not the one that the inclusion proof is of",
    ),
    "a hash too few": (lambda b: entry(b)["inclusionProof"]["hashes"].pop(), "inclusion proof has wrong size"),
    "no inclusion proof": (lambda b: entry(b).pop("inclusionProof"), "its log entry has no inclusion proof"),
    "no checkpoint": (lambda b: entry(b)["inclusionProof"].pop("checkpoint"), "no inclusion proof with a signed"),
    "no promise": (lambda b: entry(b).pop("inclusionPromise"), "must contain an inclusion promise"),
    "no log entry": (lambda b: b["verificationMaterial"].update(tlogEntries=[]), "expected exactly one log entry"),
    "payload of others": (another_payload, "DSSE: invalid signature"),
}


@pytest.mark.parametrize("how", CHANGES)
def test_a_tampered_log_entry_or_envelope_is_one_error(
    how: str, signed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, said = CHANGES[how]
    bundle = json.loads((signed / "identity.sig").read_text())
    change(bundle)
    (signed / "identity.sig").write_text(json.dumps(bundle))
    refused_by_the_command(capsys, ask(signed), said)


def refused_by_the_command(capsys: pytest.CaptureFixture[str], words: list[object], said: str) -> None:
    code, out, err = run(capsys, *words)
    assert code == 2 and out == "" and err.count("error: F03 ") == 1 and said in err, err


def test_another_signer_issuer_service_or_model_is_one_error(
    signed: Path, service: Service, keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    Service().write_trust(signed.parent / "other.json")
    for words, said in (
        (ask(signed, who="other@example.org"), "SANs do not match other@example.org"),
        (ask(signed, issuer="https://accounts.google.com"), "OIDCIssuer does not match"),
        (ask(signed, trust="other.json"), "its certificate is of no authority that is trusted"),
    ):
        refused_by_the_command(capsys, words, said)
    statement = json.loads((signed / "identity.json").read_text())
    statement["subject"][0]["name"] = "another"
    payload = payload_of(json.dumps(statement).encode(), keys)
    (signed / "identity.sig").write_text(json.dumps(service.bundle(payload)))
    refused_by_the_command(capsys, ask(signed), "it is a signature of another statement")


CERTIFICATES: dict[str, tuple[dict[str, Any], str]] = {
    "expired when it was logged": ({"late": 11}, "was not valid at the time that the log vouches for"),
    "logged before it was valid": ({"late": -1}, "was not valid at the time that the log vouches for"),
    "of no issuer": ({"issuer": None}, "does not contain OIDCIssuer"),
    "of no identity": ({"who": None}, "missing required extension"),
    "in no certificate log": ({"logged": False}, "does not contain a signed certificate timestamp"),
    "of a server": ({"usage": "server"}, "does not contain `code signing`"),
}


@pytest.mark.parametrize("how", CERTIFICATES)
def test_a_certificate_that_is_not_what_a_signer_gets_is_one_error(
    how: str, service: Service, keys: Keys, tmp_path: Path
) -> None:
    from cryptography.x509.oid import ExtendedKeyUsageOID

    made, said = CERTIFICATES[how]
    if "usage" in made:
        made = {"usage": ExtendedKeyUsageOID.SERVER_AUTH}
    believed = Trust(identity=WHO, issuer=ISSUER, trust_config=service.write_trust(tmp_path / "trust.json"))
    bundle = json.dumps(service.bundle(payload_of(b"{}", keys), **made)).encode()
    with refused("F03", "cannot be believed", said):
        check_signature(b"{}", bundle, believed, "here")


@pytest.mark.parametrize("log", ["tlogs", "ctlogs"])
def test_logs_of_another_service_are_not_believed(log: str, service: Service, keys: Keys, tmp_path: Path) -> None:
    trust = service.trust()
    trust["trustedRoot"][log] = Service().trust()["trustedRoot"][log]
    (tmp_path / "trust.json").write_text(json.dumps(trust))
    bundle = json.dumps(service.bundle(payload_of(b"{}", keys))).encode()
    with refused("F03", "no log that is trusted"):
        check_signature(b"{}", bundle, Trust(None, (), WHO, ISSUER, tmp_path / "trust.json"), "here")


def test_an_entry_of_another_signature_that_the_log_does_hold_is_refused(
    service: Service, keys: Keys, tmp_path: Path
) -> None:
    """Proof, checkpoint and promise are whole; they are of what somebody else signed."""
    believed = Trust(identity=WHO, issuer=ISSUER, trust_config=service.write_trust(tmp_path / "trust.json"))
    one, other = (service.bundle(payload_of(data, keys)) for data in (b"{}", b"[]"))
    one["verificationMaterial"]["tlogEntries"] = other["verificationMaterial"]["tlogEntries"]
    with refused("F03", "log entry payload hash does not match"):
        check_signature(b"{}", json.dumps(one).encode(), believed, "here")
    again = service.bundle(payload_of(b"{}", keys))
    again["verificationMaterial"]["tlogEntries"] = service.bundle(payload_of(b"{}", keys))["verificationMaterial"][
        "tlogEntries"
    ]
    with refused("F03", "log entry signatures do not match"):
        check_signature(b"{}", json.dumps(again).encode(), believed, "here")


ENDED: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "authority": lambda root: root["certificateAuthorities"][0],  # type: ignore[no-any-return]
    "log": lambda root: root["tlogs"][0]["publicKey"],  # type: ignore[no-any-return]
    "log of certificates": lambda root: root["ctlogs"][0]["publicKey"],  # type: ignore[no-any-return]
}


@pytest.mark.parametrize("what", ENDED)
def test_an_authority_or_a_log_is_believed_for_the_time_that_it_was_valid(
    what: str, service: Service, keys: Keys, tmp_path: Path
) -> None:
    """sigstore itself believes it for ever: who took a key that is not used any more could sign with it today."""
    trust, place = service.trust(), tmp_path / "trust.json"
    ENDED[what](trust["trustedRoot"])["validFor"] = {"start": "2020-01-01T00:00:00Z", "end": "2021-06-01T00:00:00Z"}
    place.write_text(json.dumps(trust))
    believed = Trust(identity=WHO, issuer=ISSUER, trust_config=place)
    then, now = (json.dumps(service.bundle(payload_of(b"{}", keys), when)).encode() for when in (LONG_AGO, None))
    assert check_signature(b"{}", then, believed, "here") == WHO
    with refused("F03", f"trusts no {what} that was valid on {NOW.date()}"):
        check_signature(b"{}", now, believed, "here")


def test_a_signature_of_no_file_is_none_of_this_one(service: Service, keys: Keys, tmp_path: Path) -> None:
    """What a signature leaves out is in it: one that leaves out all would be a signature of every statement."""
    said = json.loads(payload_of(b"{}", keys))
    said["predicate"]["serialization"]["ignore_paths"] = ["."]
    said["predicate"]["resources"], said["subject"][0]["digest"]["sha256"] = [], hashlib.sha256().hexdigest()
    believed = Trust(identity=WHO, issuer=ISSUER, trust_config=service.write_trust(tmp_path / "trust.json"))
    with refused("F03", "is not a signature of one file"):
        check_signature(b"{}", json.dumps(service.bundle(json.dumps(said).encode())).encode(), believed, "here")


def test_what_is_no_trust_configuration_is_said(signed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = signed.parent / "trust.json"
    whole = place.read_text()
    for data in (whole[:-9], "{}", "\udcff", json.dumps(json.loads(whole)["trustedRoot"]), "[" * 100_000):
        place.write_bytes(data.encode(errors="surrogateescape"))
        code, out, err = run(capsys, *ask(signed))
        assert code == 2 and out == "" and err.count("error: F07 ") == 1 and "is no trust configuration" in err, err
    place.unlink()
    code, out, err = run(capsys, *ask(signed))
    assert code == 2 and out == "" and "no such file" in err
    place.write_text(whole)
    for words in (["--key", "own.pub"], ["--identity", "ab" * 32], []):
        code, out, err = run(capsys, "verify", signed, *words, "--trust-config", place)
        assert code == 2 and out == "" and "--trust-config: is for who signed with Sigstore" in err
    code, _, err = run(capsys, "sign", signed, "--key", "own.pem", "--trust-config", place)
    assert code == 2 and "--trust-config: is for --sigstore" in err


def test_one_signs_as_oneself_with_a_service_of_ones_own_and_is_verified(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A CI job's own token, a certificate for it, an entry of the log: everything over HTTP, on this machine."""
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    with served(service) as url:
        for name, value in (("GITHUB_ACTIONS", "1"), ("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "x")):
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_URL", f"{url}/token?api=1")
        trust = service.write_trust(tmp_path / "trust.json", url)
        code, _, err = run(capsys, "sign", folder, "--sigstore", "--trust-config", trust)
        assert code == 0, err
    bundle = json.loads((folder / "identity.sig").read_text())
    assert bundle["mediaType"] == "application/vnd.dev.sigstore.bundle.v0.3+json"
    code, out, err = run(capsys, *ask(folder))
    assert code == 0 and out.startswith("verified: ") and f"is signed by {WHO}" in out, err
    with served(Service(), refuses=True) as url:
        monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_URL", f"{url}/token?api=1")
        service.write_trust(trust, url)
        code, out, err = run(capsys, "sign", folder, "--sigstore", "--trust-config", trust, "--overwrite")
    assert code == 2 and out == "" and err.count("error:") == 1 and "cannot be signed" in err
    code, out, err = run(capsys, "sign", folder, "--sigstore", "--trust-config", trust, "--overwrite")  # nobody answers
    assert code == 2 and out == "" and err.count("error:") == 1 and "cannot be signed" in err
