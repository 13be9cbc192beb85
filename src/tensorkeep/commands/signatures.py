"""`tensorkeep verify` by signature and identity: who signed, and whether this is still what they signed."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from tensorkeep.commands.identify import identified, opened
from tensorkeep.commands.merge_recorded import opened_average, trained_again
from tensorkeep.commands.shared import Flag, known_loader
from tensorkeep.errors import TensorkeepError, shown
from tensorkeep.findings import EXIT, Finding, verdict_of
from tensorkeep.formats.names import grouped
from tensorkeep.output import Output

Several = Annotated[tuple[Path, ...], Parameter(negative="", show_default=False)]


@Parameter(name="*")
@dataclass(frozen=True)
class Signed:
    """Whom to believe, and what the model must be.

    Args:
        key: The public key, PEM, of whoever signed.
        certificate: Certificates, PEM, of the authorities that vouch for the signer; may be repeated.
        identity: Who signed with Sigstore (a mail address, a workflow), with --issuer. Or 64 hex digits: the identity
            that the model must have, whoever signed.
        issuer: Who vouches for a Sigstore identity, e.g. https://accounts.google.com.
        trust_config: Authorities and logs of another Sigstore service than the public one, for --identity: a client
            trust configuration, JSON. With it no network is needed.
        statement: The statement, or the folder that it lies in, where it does not lie beside the checkpoint.
        derivation: Check what the statement says the model was made from, and make it again.
        from_: A checkpoint that the model was made from, for --derivation; give all of them.
    """

    key: Path | None = None
    certificate: Several = ()
    identity: str | None = None
    issuer: str | None = None
    trust_config: Path | None = None
    statement: Path | None = None
    derivation: Flag = False
    from_: Annotated[tuple[str, ...], Parameter(name="--from", negative="", show_default=False)] = ()

    @property
    def wanted(self) -> str | None:
        """The identity that the model must have; None where none is demanded."""
        found = self.identity is not None and re.fullmatch("[0-9a-fA-F]+", self.identity)
        return str(self.identity).lower() if found else None

    @property
    def signer(self) -> bool:
        """Whether somebody is to be believed."""
        return self.key is not None or bool(self.certificate) or (self.identity is not None and not self.wanted)

    @property
    def asked(self) -> bool:
        """Whether anything is asked of signatures and identities."""
        more = (self.statement, self.derivation, self.from_, self.issuer, self.trust_config)
        return self.signer or self.wanted is not None or any(m not in (None, False, ()) for m in more)


def verify_signed(out: Output, checkpoint: str, asked: Signed, config: str | None) -> int:
    """Check signature and statement, then compare the checkpoint with it tensor by tensor.

    Args:
        out: what is printed through.
        checkpoint: as the user gave it.
        asked: what is to be believed and demanded.
        config: the config that the user names; None for none.

    Returns:
        The exit code.

    Raises:
        TensorkeepError: no signature, or one that is not to be believed; see `signing.check_signature`.
    """
    from tensorkeep.diagnosis.identity.proofs import digest
    from tensorkeep.diagnosis.identity.statement import Compared, compare_with

    _refuse_half(asked)
    stored, by, trust = _believed(checkpoint, asked)
    if asked.wanted is not None:
        digest(asked.wanted, "the identity", "--identity")
    with opened(out, checkpoint, config) as view:
        model = identified(out, view)
        compared = Compared([], {})
        if stored is not None:
            compared = compare_with(stored.statement, model, view.config)
    findings = list(compared.findings)
    if asked.wanted not in (None, model.identity):
        what = f"its identity is {model.identity}, {asked.wanted} is demanded"
        findings.append(Finding("F03", "error", what))
    made = None
    if asked.derivation and verdict_of(findings) == "ok":
        with contextlib.ExitStack() as stack:
            made = _derived(out, asked, stored, trust, stack)
    verdict = verdict_of(findings)
    if verdict == "ok" and made is not None and not all(link["made_again"] for link in made["links"]):
        verdict = "inconclusive"  # believed, not made again
    told = {
        "checkpoint": checkpoint,
        "verdict": verdict,
        "identity": model.identity,
        "statement": stored.statement.where if stored is not None else None,
        "signed_by": by,
        "parts": compared.parts,
        "not_covered": model.beside if stored is not None else [],
        "not_in_config": model.not_in_config if stored is not None else [],
        "left_out": dict(Counter(model.left_out.values())),
        "derivation": made,
        "findings": [f.to_json() for f in findings],
    }
    if out.json:
        out.document(told)
        return EXIT[verdict]
    _tell(out, checkpoint, told, findings, len(model.leaves))
    return EXIT[verdict]


def _refuse_half(asked: Signed) -> None:
    """Stop where a question is not whole."""
    trusted = [asked.key is not None, bool(asked.certificate), asked.identity is not None and asked.wanted is None]
    if sum(trusted) > 1:
        raise TensorkeepError("one signer can be believed at a time", hint="--key, --certificate or --identity")
    if trusted[2] and not asked.issuer:
        hint = "--issuer https://accounts.google.com, https://github.com/login/oauth, ..."
        raise TensorkeepError("a Sigstore identity needs its issuer", where="--identity", hint=hint)
    if asked.issuer is not None and not trusted[2]:
        raise TensorkeepError("vouches for an identity, and none is given", where="--issuer", hint="--identity WHO")
    if asked.trust_config is not None and not trusted[2]:
        hint = "--identity WHO --issuer URL"
        raise TensorkeepError("is for who signed with Sigstore", where="--trust-config", hint=hint)
    if asked.from_ and not asked.derivation:
        raise TensorkeepError("is for --derivation", where="--from", hint="add --derivation")


def _believed(checkpoint: str, asked: Signed) -> tuple[Any, str | None, Any]:
    """Return the statement, its signature checked where somebody is to be believed, who signed, and who is believed."""
    from tensorkeep.diagnosis.identity.signing import Trust, check_files, check_signature
    from tensorkeep.diagnosis.identity.stored import demanded, find_statement

    if not asked.signer:
        found = find_statement(checkpoint, asked.statement)
        if found is None and (asked.wanted is None or asked.derivation):
            raise TensorkeepError("no statement lies beside it", where=checkpoint, code="F05", hint="--statement FILE")
        return found, None, None
    check_files([path for path in (asked.key, *asked.certificate, asked.trust_config) if path is not None])
    stored = demanded(checkpoint, asked.statement)
    who = None if asked.wanted else asked.identity
    trust = Trust(asked.key, asked.certificate, who, asked.issuer, asked.trust_config)
    return stored, check_signature(stored.data, stored.signature or b"", trust, stored.where), trust


def _derived(out: Output, asked: Signed, stored: Any, trust: Any, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Check what the model was made from, with the checkpoints that the user gives."""
    from tensorkeep.diagnosis.identity.derivation import Source, check_derivation, source_of
    from tensorkeep.diagnosis.identity.identify import identify

    views = [stack.enter_context(opened(out, path)) for path in asked.from_]
    scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tensorkeep-")))
    averages = [opened_average(out, path, scratch / str(at)) for at, path in enumerate(asked.from_)]
    with out.progress() as progress:
        # the statement beside a run is of its trained weights, not of their average
        sources = [Source(v.path, "source", v, identify(v, progress)) for v in averages if v is not None]
        sources += [source_of(view, "source", 1.0, progress) for view in views]
        found = check_derivation(
            stored.statement, sources, trust, progress, {"repair": _repaired, "trained": trained_again}
        )
    return {"links": found.links, "said": found.said}


def _repaired(sources: Any, recipe: Any, progress: Any) -> Any:
    """Repair again, into a temporary folder, and identify what comes of it."""
    from tensorkeep.diagnosis.identity.identify import identify
    from tensorkeep.diagnosis.repairs import repair

    broken, reference = sources[0].path, sources[-1].path
    taken, target = recipe.get("take_from_reference"), recipe.get("for")
    if not isinstance(taken, list) or not all(isinstance(t, str) for t in taken) or not isinstance(target, str | None):
        raise TensorkeepError(f"was repaired with {shown(recipe)}", where=broken, code="F07")
    known_loader(target)
    with tempfile.TemporaryDirectory(prefix="tensorkeep-") as folder:
        out = str(Path(folder) / Path(broken).name)
        where: Any = target
        repair(broken, out, reference, where, False, progress, taken, bool(recipe.get("yes")))
        return identify(out, progress)


def _tell(out: Output, checkpoint: str, told: dict[str, Any], findings: list[Finding], tensors: int) -> None:
    """Say for people what was verified, and what was not."""
    for finding in findings:
        out.line(f"{finding.severity}: {finding.code} {finding.message}")
        if finding.severity == "error" and len(finding.tensors) > 1:
            out.line(f"  {', '.join(grouped(finding.tensors)[:8])}")
    if told["verdict"] == "findings":
        return
    by = told["signed_by"]
    equal = [k.replace("_", " ") for k, how in told["parts"].items() if how in ("equal", "fields")]
    held = ", ".join([f"{tensors} tensors", *equal])
    if by is not None:
        word = "signed" if told["verdict"] == "inconclusive" else "verified"
        out.line(f"{word}: {told['identity']} is signed by {shown(by, 200)[1:-1]}: {held}")
    elif told["statement"] is not None:
        out.line(f"ok: {told['identity']} is what the statement says: {held}; no signature was checked")
    else:
        out.line(f"ok: its identity is {told['identity']}, as demanded")
    absent = [k.replace("_", " ") for k, how in told["parts"].items() if how == "absent"]
    if absent:
        out.line(f"not in this checkpoint, so not compared: {', '.join(absent)}")
    if told["not_covered"]:
        out.line(f"beside it, and not covered by the statement: {', '.join(told['not_covered'][:8])}")
    for why, count in told["left_out"].items():
        out.line(f"{count} tensors of it do not count: {why}")
    if told["parts"].get("config") == "fields":
        out.line("config: made of this file's metadata; the fields that both have were compared")
    if told["not_in_config"]:
        out.line(f"metadata that no config has, so not compared: {', '.join(told['not_in_config'][:8])}")
    if told["derivation"] is not None:
        for line in told["derivation"]["said"]:
            out.line(line)
    if told["verdict"] == "inconclusive":
        out.line("inconclusive: not every link was made again")
