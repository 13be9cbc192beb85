"""`tensorkeep verify`: whether a checkpoint is complete and undamaged."""

from __future__ import annotations

from pathlib import Path

from tensorkeep.commands.shared import Say
from tensorkeep.commands.signatures import Signed, verify_signed
from tensorkeep.errors import TensorkeepError
from tensorkeep.findings import EXIT, verdict_of
from tensorkeep.formats import table as formats
from tensorkeep.formats.names import grouped
from tensorkeep.formats.view import StateView
from tensorkeep.output import Output, size
from tensorkeep.storage.files import local_path


def verify(
    checkpoint: str,
    /,
    *,
    signed: Signed = Signed(),
    proof: Path | None = None,
    config: str | None = None,
    say: Say = Say(),
) -> int:
    """Check that a checkpoint is complete and undamaged: structure, digests, checksums.

    Digests are compared with those of its certificate, manifest or seal, where one lies beside it; formats with
    checksums of their own are compared with these. Exit code 1 when something is wrong.

    With --key, --certificate or --identity its signature is checked instead, and every tensor, config and tokenizer is
    compared with what was signed, in whatever format, naming and sharding the checkpoint is now.

    Args:
        checkpoint: A file, a folder or a run; or an inclusion proof, which is then checked alone.
        proof: Compare one tensor with this inclusion proof, of `tensorkeep prove`, and check nothing else.
        config: A config.json, or a folder with one, where an identity is taken and the checkpoint brings none.
    """
    from tensorkeep.diagnosis.identity.proofs import read_proof
    from tensorkeep.diagnosis.identity.statement import places
    from tensorkeep.diagnosis.verification import verify as run

    out = say.output()
    if proof is not None or read_proof(checkpoint) is not None:
        return _proof(out, checkpoint if proof is not None else None, str(proof or checkpoint))
    if signed.asked:
        return verify_signed(out, checkpoint, signed, config)
    with out.progress() as progress:
        findings, view, certified = run(checkpoint, progress)
    if "://" not in checkpoint and places(local_path(checkpoint))[0].is_file():
        out.remark("note: a signed identity lies beside it; check its signature too: --key, --certificate, --identity")
    verdict = verdict_of(findings)
    if say.json:
        out.document(
            {
                "checkpoint": checkpoint,
                "verdict": verdict,
                "certificate": certified,
                "tensors": len(view) if view is not None else 0,
                "findings": [f.to_json() for f in findings],
            }
        )
        return EXIT[verdict]
    for finding in findings:
        out.line(f"{finding.severity}: {finding.code} {finding.message}")
        if finding.tensors:
            out.line(f"  {', '.join(grouped(finding.tensors)[:6])}")
        if finding.fix:
            out.line(f"  fix: {finding.fix}")
    if view is None and verdict == "ok":
        out.line(f"ok: every byte is there; {_proven(checkpoint)}")
    elif view is not None and verdict == "ok":
        content = _proven(checkpoint) if certified else _unproven(view)
        out.line(f"ok: {len(view)} tensors, {size(sum(r.nbytes for r in view.values()))}, complete; {content}")
    return EXIT[verdict]


def _proof(out: Output, checkpoint: str | None, path: str) -> int:
    """Check an inclusion proof, and the tensor of a checkpoint that it is about."""
    from tensorkeep.commands.identify import opened
    from tensorkeep.diagnosis.identity.proofs import check_proof, check_tensor, read_proof

    document = read_proof(path)
    if document is None:
        raise TensorkeepError(
            "is no inclusion proof", where=path, code="F07", hint="tensorkeep prove CKPT --tensor NAME"
        )
    identity, name, leaf = check_proof(document, path)
    same = True
    if checkpoint is not None:
        with opened(out, checkpoint) as view:
            same = check_tensor(view, name, leaf)
    told = {"checkpoint": checkpoint, "proof": path, "identity": identity, "tensor": leaf.to_json(name), "equal": same}
    if out.json:
        out.document(told | {"verdict": "ok" if same else "findings"})
    elif same:
        holds = f"{checkpoint} holds it" if checkpoint is not None else "no checkpoint was looked at"
        out.line(f"ok: {name} ({leaf.dtype} {list(leaf.shape)}) is part of {identity}; {holds}")
    else:
        out.line(f"error: F03 {checkpoint}: {name} is not the tensor that the proof shows to be part of {identity}")
    return 0 if same else 1


def _proven(checkpoint: str) -> str:
    place = Path(checkpoint)
    if (place / "manifest.json").is_file() or (place / "checkpoints").is_dir():
        return "every digest matches the manifest"
    from tensorkeep.formats.saves import saves_in
    from tensorkeep.formats.seals import is_sealed

    sealed = "://" not in checkpoint and any(is_sealed(save.path) for save in saves_in(checkpoint))
    return f"every digest matches the {'seal' if sealed else 'certificate'}"


def _unproven(view: StateView) -> str:
    if formats.fact(view.format, "CHECKSUMS"):
        return "every byte fits the file's own CRC-32 (no certificate)"
    return "no certificate, so the values themselves cannot be checked"
