"""A Sigstore service of our own, without a network: authority, certificate log, signature log, trust configuration.

Every byte is made here from RFC 5280, RFC 6962 and the bundle's description: nothing of the verifier judges itself.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import hashlib
import json
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

WHO, ISSUER = "author@example.org", "https://accounts.example.org"
ORIGIN = "log.example.org - 1"
_OIDC_ISSUERS = [ObjectIdentifier(f"1.3.6.1.4.1.57264.1.{n}") for n in (1, 8)]  # plain text, and as DER
_TIMESTAMPS = ObjectIdentifier("1.3.6.1.4.1.11129.2.4.2")
_DER, _SPKI = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
_SHA = ec.ECDSA(hashes.SHA256())
_BEGAN = datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc)
TYPE = "application/vnd.in-toto+json"
Key = ec.EllipticCurvePrivateKey


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def public(key: Key) -> bytes:
    return key.public_key().public_bytes(_DER, _SPKI)


def of_key(key: Key) -> bytes:
    """The name of a log: SHA-256 of its public key."""
    return hashlib.sha256(public(key)).digest()


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()


def root_of(leaves: list[bytes]) -> bytes:
    """The root of RFC 6962's tree."""
    if len(leaves) == 1:
        return leaves[0]
    half = 1 << (len(leaves) - 1).bit_length() - 1
    return node(root_of(leaves[:half]), root_of(leaves[half:]))


def path_of(leaves: list[bytes], at: int) -> list[bytes]:
    """The audit path of RFC 6962 from a leaf up."""
    if len(leaves) == 1:
        return []
    half = 1 << (len(leaves) - 1).bit_length() - 1
    if at < half:
        return [*path_of(leaves[:half], at), root_of(leaves[half:])]
    return [*path_of(leaves[half:], at - half), root_of(leaves[:half])]


class Service:
    """An authority with a certificate below it, a log of certificates and a log of signatures."""

    def __init__(self) -> None:
        keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(4)]
        self.root, self.middle, self.certificates, self.log = keys
        names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, n)]) for n in ("root", "middle")]
        self.name = names[1]
        self.chain = [
            self._authority(names[1], self.middle, names[0], self.root, 0),
            self._authority(names[0], self.root, names[0], self.root, 1),
        ]

    def _authority(self, name: x509.Name, key: Key, by: x509.Name, signer: Key, below: int) -> x509.Certificate:
        made = _begun(name, key.public_key(), by, signer, _BEGAN, _BEGAN + datetime.timedelta(days=36500))
        made = made.add_extension(x509.BasicConstraints(ca=True, path_length=below), critical=True)
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        return made.add_extension(usage, critical=True).sign(signer, hashes.SHA256())

    def leaf(
        self,
        key: ec.EllipticCurvePublicKey,
        first: datetime.datetime,
        minutes: int = 10,
        who: str | None = WHO,
        issuer: str | None = ISSUER,
        logged: bool = True,
        usage: ObjectIdentifier = ExtendedKeyUsageOID.CODE_SIGNING,
    ) -> x509.Certificate:
        """A short-lived certificate of whoever has the key, with the promise of the certificate log in it."""
        last = first + datetime.timedelta(minutes=minutes)
        made = _begun(x509.Name([]), key, self.name, self.middle, first, last)
        signs = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
        made = made.add_extension(signs, critical=True).add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        if who is not None:
            given = x509.UniformResourceIdentifier(who) if "://" in who else x509.RFC822Name(who)
            made = made.add_extension(x509.SubjectAlternativeName([given]), critical=True)
        if issuer is not None:
            plain = issuer.encode()
            for name, value in zip(_OIDC_ISSUERS, (plain, b"\x0c" + bytes([len(plain)]) + plain)):
                made = made.add_extension(x509.UnrecognizedExtension(name, value), critical=False)
        if logged:
            before = made.sign(self.middle, hashes.SHA256()).tbs_certificate_bytes
            promise = x509.UnrecognizedExtension(_TIMESTAMPS, self._promised(before, first))
            made = made.add_extension(promise, critical=False)
        return made.sign(self.middle, hashes.SHA256())

    def _promised(self, certificate: bytes, when: datetime.datetime) -> bytes:
        """The signed certificate timestamp of RFC 6962 over a certificate without it, as its extension holds it."""
        at = int(when.timestamp() * 1000)
        entry = of_key(self.middle) + len(certificate).to_bytes(3, "big") + certificate
        signature = self.certificates.sign(struct.pack("!BBQH", 0, 0, at, 1) + entry + b"\0\0", _SHA)
        one = b"\0" + of_key(self.certificates) + struct.pack("!QH", at, 0) + b"\4\3"
        one += struct.pack("!H", len(signature)) + signature
        listed = struct.pack("!HH", len(one) + 2, len(one)) + one
        assert len(listed) < 256
        return b"\x04" + (bytes([len(listed)]) if len(listed) < 128 else bytes([0x81, len(listed)])) + listed

    def entry(self, body: bytes, when: datetime.datetime, at: int = 5, size: int = 11) -> dict[str, Any]:
        """An entry of the signature log: inclusion proof, signed checkpoint, signed promise."""
        leaves = [hashlib.sha256(b"\0" + (body if n == at else b"%d" % n)).digest() for n in range(size)]
        root, log = root_of(leaves), of_key(self.log)
        note = f"{ORIGIN}\n{size}\n{text(root)}\n"
        signed = text(log[:4] + self.log.sign(note.encode(), _SHA))
        time = int(when.timestamp())
        promised = {"body": text(body), "integratedTime": time, "logID": log.hex(), "logIndex": at}
        return {
            "logIndex": str(at),
            "logId": {"keyId": text(log)},
            "kindVersion": {"kind": "dsse", "version": "0.0.1"},
            "integratedTime": str(time),
            "inclusionPromise": {"signedEntryTimestamp": text(self.log.sign(canonical(promised), _SHA))},
            "inclusionProof": {
                "logIndex": str(at),
                "rootHash": text(root),
                "treeSize": str(size),
                "hashes": [text(h) for h in path_of(leaves, at)],
                "checkpoint": {"envelope": f"{note}\n\u2014 {ORIGIN.split()[0]} {signed}\n"},
            },
            "canonicalizedBody": text(body),
        }

    def bundle(
        self, payload: bytes, signed: datetime.datetime | None = None, late: int = 1, **certificate: Any
    ) -> dict[str, Any]:
        """A keyless signature of a payload, as a bundle of version 0.3; logged `late` minutes after the certificate."""
        first = signed or datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(minutes=5)
        key = ec.generate_private_key(ec.SECP256R1())
        leaf = self.leaf(key.public_key(), first, **certificate)
        signature = key.sign(b"DSSEv1 %d %s %d %s" % (len(TYPE), TYPE.encode(), len(payload), payload), _SHA)
        envelope = {"payload": text(payload), "payloadType": TYPE, "signatures": [{"sig": text(signature)}]}
        body = logged(envelope, leaf)
        return {
            "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
            "verificationMaterial": {
                "certificate": {"rawBytes": text(leaf.public_bytes(_DER))},
                "tlogEntries": [self.entry(body, first + datetime.timedelta(minutes=late))],
            },
            "dsseEnvelope": envelope,
        }

    def trust(self, url: str = "https://example.org") -> dict[str, Any]:
        """The client trust configuration: whose certificates and logs are believed, and where one signs."""
        always = {"start": "2020-01-01T00:00:00Z"}
        logs = [
            {
                "baseUrl": url,
                "hashAlgorithm": "SHA2_256",
                "publicKey": {"rawBytes": text(public(k)), "keyDetails": "PKIX_ECDSA_P256_SHA_256", "validFor": always},
                "logId": {"keyId": text(of_key(k))},
            }
            for k in (self.log, self.certificates)
        ]
        authority = {
            "subject": {"organization": "example.org", "commonName": "middle"},
            "uri": url,
            "certChain": {"certificates": [{"rawBytes": text(c.public_bytes(_DER))} for c in self.chain]},
            "validFor": always,
        }
        service = [{"url": url, "majorApiVersion": 1, "validFor": always, "operator": "example.org"}]
        return {
            "mediaType": "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json",
            "trustedRoot": {
                "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
                "tlogs": logs[:1],
                "certificateAuthorities": [authority],
                "ctlogs": logs[1:],
                "timestampAuthorities": [],
            },
            "signingConfig": {
                "mediaType": "application/vnd.dev.sigstore.signingconfig.v0.2+json",
                "caUrls": service,
                "oidcUrls": service,
                "rekorTlogUrls": service,
                "tsaUrls": [],
                "rekorTlogConfig": {"selector": "ANY"},
                "tsaConfig": {"selector": "ANY"},
            },
        }

    def write_trust(self, place: Path, url: str = "https://example.org") -> Path:
        place.write_text(json.dumps(self.trust(url)))
        return place


def logged(envelope: dict[str, Any], leaf: x509.Certificate) -> bytes:
    """What the signature log keeps of an envelope: the hash of its payload, its signature, and who verifies it."""
    payload = hashlib.sha256(base64.b64decode(envelope["payload"])).hexdigest()
    verifier = text(leaf.public_bytes(serialization.Encoding.PEM))
    spec = {
        "envelopeHash": {"algorithm": "sha256", "value": hashlib.sha256(canonical(envelope)).hexdigest()},
        "payloadHash": {"algorithm": "sha256", "value": payload},
        "signatures": [{"signature": s["sig"], "verifier": verifier} for s in envelope["signatures"]],
    }
    return canonical({"apiVersion": "0.0.1", "kind": "dsse", "spec": spec})


def _begun(
    name: x509.Name, key: Any, by: x509.Name, signer: Key, first: datetime.datetime, last: datetime.datetime
) -> x509.CertificateBuilder:
    """A certificate with the extensions that every one has."""
    above = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(by)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(first)
        .not_valid_after(last)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(above, critical=False)
    )


def token(who: str = WHO, issuer: str = ISSUER) -> str:
    """An identity token that says who somebody is; nobody here checks its signature."""
    now = int(datetime.datetime.now(datetime.timezone.utc).timestamp())
    claims = {"iss": issuer, "sub": who, "aud": "sigstore", "iat": now - 5, "exp": now + 300}
    parts = [base64.urlsafe_b64encode(canonical(p)).rstrip(b"=").decode() for p in ({"alg": "none"}, claims)]
    return ".".join([*parts, "AA"])


@contextlib.contextmanager
def served(service: Service, refuses: bool = False) -> Iterator[str]:
    """The service on this machine: hands out tokens and certificates, and logs signatures."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def answer(self, document: Any, status: int = 200) -> None:
            body = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            configured = {f"{name}_endpoint": f"{url}/{name}" for name in ("authorization", "token")}
            self.answer({"value": token()} if self.path.startswith("/token") else configured)

        def do_POST(self) -> None:
            given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if refuses:
                self.answer({"message": "no"}, 403)
            elif self.path.endswith("signingCert"):
                asked = x509.load_pem_x509_csr(base64.b64decode(given["certificateSigningRequest"]))
                now = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)
                chain = [service.leaf(asked.public_key(), now), *service.chain]
                pem = [c.public_bytes(serialization.Encoding.PEM).decode() for c in chain]
                self.answer({"signedCertificateEmbeddedSct": {"chain": {"certificates": pem}}})
            else:
                proposed = given["spec"]["proposedContent"]
                leaf = x509.load_pem_x509_certificate(base64.b64decode(proposed["verifiers"][0]))
                body = logged(json.loads(proposed["envelope"]), leaf)
                self.answer({"a": as_answered(service.entry(body, datetime.datetime.now(datetime.timezone.utc)))}, 201)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield url
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def as_answered(entry: dict[str, Any]) -> dict[str, Any]:
    """A log entry as the log's own interface spells it, in hex where a bundle has base64."""

    def inhex(value: str) -> str:
        return base64.b64decode(value).hex()

    proof = entry["inclusionProof"]
    verified = {
        "signedEntryTimestamp": entry["inclusionPromise"]["signedEntryTimestamp"],
        "inclusionProof": {
            "logIndex": int(proof["logIndex"]),
            "treeSize": int(proof["treeSize"]),
            "rootHash": inhex(proof["rootHash"]),
            "hashes": [inhex(h) for h in proof["hashes"]],
            "checkpoint": proof["checkpoint"]["envelope"],
        },
    }
    return {
        "body": entry["canonicalizedBody"],
        "integratedTime": int(entry["integratedTime"]),
        "logID": inhex(entry["logId"]["keyId"]),
        "logIndex": int(entry["logIndex"]),
        "verification": verified,
    }
