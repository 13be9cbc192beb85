"""Keyless signatures: a recorded one is checked for signer and issuer; without a network there is one error at once."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from tensorkeep.diagnosis.identity.signing import Signer, Trust, check_signature, sign
from tensorkeep.errors import TensorkeepError
from tests.helpers import refused
from tests.test_signing import run
from tests.tools import TINY

pytest.importorskip("model_signing.signing")
sigstore = pytest.importorskip("sigstore")
BUNDLE = (Path(__file__).parent / "data/sigstore/staging.sigstore.json").read_bytes()
REPOSITORY = "https://github.com/sigstore-conformance/extremely-dangerous-public-oidc-beacon"
WHO = f"{REPOSITORY}/.github/workflows/extremely-dangerous-oidc-beacon.yml@refs/heads/main"
ISSUER = "https://token.actions.githubusercontent.com"


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trusted root that sigstore carries of the staging service stands for what the service would send."""
    from sigstore.models import ClientTrustConfig, TrustedRoot

    (store,) = (p for p in (Path(sigstore.__file__).parent / "_store").iterdir() if "sigstage" in p.name)
    root = TrustedRoot.from_file(str(store / "trusted_root.json"))
    monkeypatch.setattr(ClientTrustConfig, "production", lambda *_, **__: type("Config", (), {"trusted_root": root}))
    monkeypatch.setattr("tensorkeep.diagnosis.identity.signing._reached", lambda _: None)


def refuse(*_: object, **__: object) -> Any:
    raise socket.gaierror(-2, "Name or service not known")


@pytest.mark.parametrize(
    ("who", "issuer", "said"),
    [
        (f"{WHO}x", ISSUER, "SANs do not match"),
        ("me@example.org", ISSUER, "SANs do not match"),
        (WHO, "https://accounts.google.com", "OIDCIssuer does not match"),
    ],
)
@pytest.mark.usefixtures("recorded")
def test_another_signer_or_issuer_of_a_real_signature_is_refused(who: str, issuer: str, said: str) -> None:
    with refused("F03", "cannot be believed", said):
        check_signature(b"{}", BUNDLE, Trust(identity=who, issuer=issuer), "here")


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("issuer", ["", None])
def test_no_issuer_is_not_any_issuer(issuer: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with refused(None, "needs its issuer"):
        check_signature(b"{}", BUNDLE, Trust(identity=WHO, issuer=issuer), "here")
    code, out, err = run(capsys, "verify", TINY, "--identity", WHO, "--issuer", issuer or "")
    assert code == 2 and out == "" and "needs its issuer" in err


@pytest.mark.usefixtures("recorded")
def test_a_real_signature_of_the_right_signer_is_believed_for_what_it_signs_and_nothing_else() -> None:
    """It is over no statement of ours: certificate, log, identity and issuer hold, the payload does not."""
    with pytest.raises(TensorkeepError) as caught:
        check_signature(b"{}", BUNDLE, Trust(identity=WHO, issuer=ISSUER), "here")
    assert caught.value.code == "F03" and "Predicate type mismatch" in str(caught.value)
    document = json.loads(BUNDLE)
    payload = document["dsseEnvelope"]["payload"]
    document["dsseEnvelope"]["payload"] = payload[:40] + ("A" if payload[40] != "A" else "B") + payload[41:]
    with refused("F03", "cannot be believed"):
        check_signature(b"{}", json.dumps(document).encode(), Trust(identity=WHO, issuer=ISSUER), "here")


def test_without_a_network_signing_and_verifying_are_one_error_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "create_connection", refuse)
    began = time.perf_counter()
    for work in (
        lambda: sign(b"{}", Signer()),
        lambda: check_signature(b"{}", BUNDLE, Trust(identity=WHO, issuer=ISSUER), "here"),
    ):
        with refused(None, "needs a network", "cannot be reached"):
            work()
    code, out, err = run(capsys, "sign", TINY, "--sigstore", "-o", tmp_path / "statement.json")
    assert code == 2 and out == "" and err.count("error:") == 1 and "needs a network" in err
    assert time.perf_counter() - began < 5 and not (tmp_path / "statement.json").exists()
