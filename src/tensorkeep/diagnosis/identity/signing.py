"""Sign a statement and verify its signature with OpenSSF's model-signing: the bundle is one that its own program reads.

What is signed is the statement's file, as model-signing signs any model that is one file. Keys and certificates need no
network; Sigstore's keyless signatures do. model-signing believes a certificate at the time when it became valid, so
that one which has expired since is refused here.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import datetime
import hashlib
import io
import json
import socket
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorkeep.errors import TensorkeepError, printable
from tensorkeep.storage.budget import read_small
from tensorkeep.storage.certificate import parse_json
from tensorkeep.storage.files import explained

LARGEST = 1 << 22  # bytes of a signature
_MEDIA = "application/vnd.dev.sigstore.bundle"
_SERVICE, _PATIENCE = "tuf-repo-cdn.sigstore.dev", 5.0  # where its keys are; seconds
_NEEDED = "pip install 'tensorkeep[signing]'"


@dataclass(frozen=True)
class Signer:
    """Who signs: a private key, a key with its certificate, or an identity that Sigstore vouches for.

    Attributes:
        key: PEM file of an elliptic curve's private key; None for Sigstore.
        password: of the key; None for none.
        certificate: PEM file of the key's certificate; None for none.
        chain: PEM files of the certificates above it.
        token: OIDC token for Sigstore; None to ask in a browser, or take the surrounding job's.
        trust_config: JSON file of another Sigstore service than the public one; None for that.
    """

    key: Path | None = None
    password: str | None = None
    certificate: Path | None = None
    chain: tuple[Path, ...] = ()
    token: str | None = None
    trust_config: Path | None = None


@dataclass(frozen=True)
class Trust:
    """Whom to believe: a public key, certificates of authorities, or an identity at an issuer.

    Attributes:
        key: PEM file of a public key.
        certificates: PEM files of authorities.
        identity: who signed, as Sigstore's certificate says.
        issuer: who vouches for that, a URL.
        trust_config: JSON file with the authorities and logs of that; None for those of Sigstore's public service,
            which are asked for over a network.
    """

    key: Path | None = None
    certificates: tuple[Path, ...] = ()
    identity: str | None = None
    issuer: str | None = None
    trust_config: Path | None = None


def sign(statement: bytes, signer: Signer) -> bytes:
    """Return the signature of a statement: a Sigstore bundle as model-signing writes it.

    Args:
        statement: the statement's bytes.
        signer: who signs.

    Raises:
        TensorkeepError: model-signing is not installed, or the key, the certificate or Sigstore refuses.
    """
    config = _module("signing").Config()
    if signer.key is None and signer.trust_config is None:
        _reached("--key KEY.pem signs without a network")
    with _told("cannot be signed", signer.certificate or signer.key), _files(statement) as (place, bundle):
        for path in (signer.key, signer.certificate, *signer.chain):
            if path is not None:
                read_small(path, LARGEST)
        if signer.key is None:
            service = _service(signer.trust_config, place)
            ambient = signer.token is None
            config.use_sigstore_signer(
                identity_token=signer.token, use_ambient_credentials=ambient, trust_config=service
            )
        elif signer.certificate is None:
            config.use_elliptic_key_signer(
                private_key=signer.key, password=signer.password.encode() if signer.password else None
            )
        else:
            config.use_certificate_signer(
                private_key=signer.key,
                signing_certificate=signer.certificate,
                certificate_chain=signer.chain or (signer.certificate,),  # it takes no empty chain
            )
        config.sign(place, bundle)
        return bundle.read_bytes()


def check_signature(statement: bytes, signature: bytes, trust: Trust, where: object) -> str:
    """Check that a signature is one of this statement, made by whom we trust.

    Args:
        statement: the statement's bytes.
        signature: the bundle's bytes, untrusted.
        trust: whom to believe.
        where: the signature's file, for messages.

    Returns:
        Who signed: "key SHA-256", the certificate's subject, or the identity.

    Raises:
        TensorkeepError: F02 where the bundle is cut short, F07 where it is none or of another kind than what is
            trusted, F03 where it is another's, of another statement, or expired.
    """
    material = _material(signature, where)
    kinds = {"publicKey": trust.key is not None, "x509CertificateChain": bool(trust.certificates)}
    kind = next((k for k in kinds if k in material), "certificate")
    if not kinds.get(kind, trust.identity is not None):
        by = {"publicKey": "a key (--key)", "x509CertificateChain": "a certificate (--certificate)"}
        what = f"was signed with {by.get(kind, 'Sigstore (--identity, --issuer)')}, which is not what you trust"
        raise TensorkeepError(what, where=where, code="F07")
    config = _module("verifying").Config()
    who = _expiry(material, where) if kind == "x509CertificateChain" else str(trust.identity)
    with _told("cannot be believed", where, "F03"), _files(statement) as (place, bundle):
        bundle.write_bytes(signature)
        if trust.key is not None and kind == "publicKey":
            if b"PRIVATE KEY" in read_small(trust.key, LARGEST):
                what, hint = "is a private key: it signs, its public key verifies", "openssl pkey -in KEY -pubout"
                raise TensorkeepError(what, where=trust.key, hint=hint)
            config.use_elliptic_key_verifier(public_key=trust.key)
            who = f"key {_key_hash(trust.key)}"
        elif kind == "x509CertificateChain":
            for path in trust.certificates:
                read_small(path, LARGEST)
            config.use_certificate_verifier(certificate_chain=trust.certificates)
        else:
            if not (trust.identity and trust.issuer):  # to sigstore an empty issuer is any
                what = "a Sigstore identity needs its issuer: without one anybody's word for it would do"
                raise TensorkeepError(what, where="--issuer", hint="--issuer https://accounts.google.com, ...")
            if trust.trust_config is None:
                _reached("signatures by --key and --certificate need no network, nor do those with a --trust-config")
            service = _service(trust.trust_config, place, _logged(material))
            config.use_sigstore_verifier(identity=trust.identity, oidc_issuer=trust.issuer, trust_config=service)
        config.verify(place, bundle)
    _refuse_none(parse_json(signature, where)["dsseEnvelope"], where)
    return who


def _service(given: Path | None, place: Path, when: datetime.datetime | None = None) -> Path | None:
    """Return a trust configuration that is one, as a file that stays as it was read; None for the public service.

    With a time, authorities and logs that were not valid then are left out: sigstore believes them for ever.
    """
    if given is None:
        return None
    from sigstore.models import ClientTrustConfig

    data = read_small(given, LARGEST)
    hint = "a JSON file of the type application/vnd.dev.sigstore.clienttrustconfig.v0.1+json"
    try:
        config = ClientTrustConfig.from_json(data.decode())
        config.trusted_root.get_fulcio_certs()
    except _errors() as error:
        what = f"is no trust configuration: {_short(error)}"
        raise TensorkeepError(what, where=given, code="F07", hint=hint) from None
    copy = place.with_name("trust.json")
    copy.write_bytes(data if when is None else _valid_at(parse_json(data, given), when, given))
    return copy


def _logged(material: dict[str, Any]) -> datetime.datetime | None:
    """Return when the first log entry says that it was made; None where none says it."""
    try:
        seconds = int(material["tlogEntries"][0]["integratedTime"])
        return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc) if seconds > 0 else None
    except (KeyError, IndexError, TypeError, ValueError, OverflowError, OSError):
        return None


def _valid_at(config: Any, when: datetime.datetime, where: Path) -> bytes:
    """Return a trust configuration with the authorities and logs alone that were valid at a time."""
    root = next(config[k] for k in ("trustedRoot", "trusted_root") if k in config)
    named = {"authority": ("certificateAuthorities", "certificate_authorities"), "log": ("tlogs",)}
    for what, names in (named | {"log of certificates": ("ctlogs",)}).items():
        for name in (n for n in names if root.get(n)):
            root[name] = [one for one in root[name] if _covers(one, when)]
            if not root[name]:
                said = f"trusts no {what} that was valid on {when.date()}, when the signature was logged"
                raise TensorkeepError(said, where=where, code="F03", hint="a newer trust configuration")
    return json.dumps(config).encode()


def _covers(one: dict[str, Any], when: datetime.datetime) -> bool:
    """Whether an authority or a log was valid at a time; one that says nothing of it always was."""
    held = one.get("publicKey") or one.get("public_key") or one
    span = held.get("validFor") or held.get("valid_for") or {}
    times = {k: datetime.datetime.fromisoformat(v.replace("Z", "+00:00")) for k, v in span.items() if v}
    return not ("start" in times and when < times["start"]) and not ("end" in times and when > times["end"])


def _key_hash(path: Path) -> str:
    """Return what model-signing calls a public key: SHA-256 of its PEM."""
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_public_key(path.read_bytes())
    form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(*form)).hexdigest()


def _material(signature: bytes, where: object) -> dict[str, Any]:
    """Return what a bundle is to be verified with; its own form is checked first."""
    try:
        document = parse_json(signature, where)
    except TensorkeepError as error:
        raise TensorkeepError(f"{error.what}: cut short?", where=error.where, code="F02", hint="sign again") from None
    given = document if isinstance(document, dict) else {}
    material, envelope = given.get("verificationMaterial"), given.get("dsseEnvelope")
    if not str(given.get("mediaType")).startswith(_MEDIA) or not isinstance(material, dict):
        raise TensorkeepError("is no Sigstore bundle", where=where, code="F07", hint="sign again")
    signatures = envelope.get("signatures") if isinstance(envelope, dict) else None
    if not isinstance(signatures, list) or len(signatures) != 1:
        raise TensorkeepError("does not hold one signature", where=where, code="F07", hint="sign again")
    return material


def _refuse_none(envelope: Any, where: object) -> None:
    """Refuse a signature that names another number of files than one: by what it leaves out, one of none fits any."""
    try:
        said = parse_json(base64.b64decode(envelope["payload"], validate=True), where)
        counts = {len(said["subject"]), len(said.get("predicate", {}).get("resources", [0]))}
    except (TensorkeepError, KeyError, TypeError, AttributeError, ValueError):
        raise TensorkeepError("signs nothing that can be read", where=where, code="F07", hint="sign again") from None
    if counts != {1}:
        raise TensorkeepError("is not a signature of one file", where=where, code="F03", hint="sign again")


def _expiry(material: dict[str, Any], where: object) -> str:
    """Return the subject of the signer's certificate; refuse a chain of which one is not valid today."""
    from cryptography import x509

    try:
        raw = [entry["rawBytes"] for entry in material["x509CertificateChain"]["certificates"]]
        chain = [x509.load_der_x509_certificate(base64.b64decode(one, validate=True)) for one in raw]
        spans = [(c.not_valid_before_utc, c.not_valid_after_utc, c.subject.rfc4514_string()) for c in chain]
        who = spans[0][2]
    except (KeyError, IndexError, TypeError, ValueError, binascii.Error) as error:
        raise TensorkeepError(f"holds no certificate: {_short(error)}", where=where, code="F07") from None
    now = datetime.datetime.now(datetime.timezone.utc)
    for first, last, subject in spans:
        if not first <= now <= last:
            what = f"expired on {last.date()}" if now > last else f"is valid from {first.date()} on"
            whose = "the signer's certificate" if subject == who else "a certificate of its chain"
            raise TensorkeepError(
                f"cannot be believed: {whose} {what} ({subject})",
                where=where,
                code="F03",
                hint="ask its author to sign again",
            )
    return who


def _module(name: str) -> Any:
    """Return a module of model-signing, or say how to get it."""
    import importlib

    try:
        return importlib.import_module(f"model_signing.{name}")
    except ImportError as error:
        raise TensorkeepError(f"signatures need model-signing: {_short(error)}", hint=_NEEDED) from None


def _reached(hint: str) -> None:
    """Stop at once where Sigstore's service cannot be reached; its own client tries again for a quarter of a minute.

    Behind a proxy the client alone knows the way, and is asked.
    """
    if not {"https", "all"}.isdisjoint(urllib.request.getproxies()):
        return
    try:
        socket.create_connection((_SERVICE, 443), timeout=_PATIENCE).close()
    except OSError as error:
        what = f"Sigstore needs a network, and {_SERVICE} cannot be reached: {_short(error)}"
        raise TensorkeepError(what, where="--sigstore" if "signs" in hint else "--identity", hint=hint) from None


@contextlib.contextmanager
def _files(statement: bytes) -> Iterator[tuple[Path, Path]]:
    """Give model-signing the bytes that were read, not files that may change meanwhile."""
    with tempfile.TemporaryDirectory(prefix="tensorkeep-") as folder:
        place = Path(folder) / "identity.json"
        with explained(place):
            place.write_bytes(statement)
        yield place, Path(folder) / "identity.sig"


@contextlib.contextmanager
def _told(what: str, where: object, code: str | None = None) -> Iterator[None]:
    """Turn whatever model-signing raises into our error; what it prints is not shown."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except TensorkeepError:
        raise
    except _errors() as error:
        raise TensorkeepError(f"{what}: {_reason(error)}", where=where, code=code) from None


# errors that have no class in common with the others, and no place that is promised
_OTHERS = {
    "id": ("IdentityError",),
    "rfc3161_client": ("VerificationError",),
    "sigstore.oidc": ("ExpiredIdentity", "IssuerError"),
    "sigstore._internal.fulcio.client": ("ExpiredCertificate", "FulcioClientError"),
    "sigstore._internal.rekor": ("RekorClientError",),
    "sigstore._internal.timestamp": ("TimestampError",),
}


def _errors() -> tuple[type[BaseException], ...]:
    """Return what cryptography, OpenSSL and sigstore raise for bytes, keys and certificates that they refuse."""
    from cryptography.exceptions import InvalidKey, InvalidSignature, UnsupportedAlgorithm
    from OpenSSL.crypto import Error, X509StoreContextError
    from sigstore.errors import Error as SigstoreError
    from sigstore.oidc import IdentityError

    usual = (ValueError, TypeError, LookupError, AttributeError, OSError, RuntimeError)
    crypto = (InvalidKey, InvalidSignature, UnsupportedAlgorithm, Error, X509StoreContextError)
    loaded = [(sys.modules.get(module), name) for module, names in _OTHERS.items() for name in names]
    # what is not loaded is not raised
    others = [getattr(module, name) for module, name in loaded if hasattr(module, name)]
    return (*usual, *crypto, SigstoreError, IdentityError, *others)


def _reason(error: BaseException) -> str:
    """Say why model-signing refused, in words."""
    said, name = str(error), type(error).__name__
    if name == "InvalidSignature":
        return "the signature is not this key's over these bytes"
    if "password" in said.lower():
        return "the key needs its password (TENSORKEEP_KEY_PASSWORD)"
    words = next((words for part, words in _WORDS.items() if part in said), None)
    return words or _short(error) or name


# a part of what model-signing or sigstore says -> what it means
_WORDS = {
    "Signature mismatch": "it is a signature of another statement",
    "Key mismatch": "it was signed with another key",
    "has no attribute 'curve'": "the key is of no elliptic curve: P-256, P-384 and P-521 sign",
    "cert is not valid at validation time": "its certificate was not valid at the time that the log vouches for",
    "candidates exhausted": "its certificate is of no authority that is trusted",
    "inclusionProof\n  Field required": "its log entry has no inclusion proof",
    "must contain inclusion proof": "its log entry has no inclusion proof with a signed checkpoint",
    "inclusion proof contains invalid root hash": "its log entry is not the one that the inclusion proof is of",
    "checkpoint: ": "no log that is trusted signed the checkpoint of its inclusion proof",
    "SET: invalid inclusion promise": "no log that is trusted vouches for its log entry at that time",
    "SCT verify failed": "no log that is trusted holds its certificate",
}


def _short(error: object) -> str:
    return printable(str(error), 200)


def check_files(paths: Sequence[Path]) -> None:
    """Refuse keys and certificates that are not there, before a checkpoint is read for them.

    Args:
        paths: the files.

    Raises:
        TensorkeepError: one does not exist or is too large to be a key.
    """
    for path in paths:
        read_small(path, LARGEST)
