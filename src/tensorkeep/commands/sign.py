"""`tensorkeep sign`: a signed statement of what a model is, which every format of it can be verified with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from tensorkeep.commands.identify import identified, opened
from tensorkeep.commands.shared import Flag, Say
from tensorkeep.errors import TensorkeepError, word
from tensorkeep.formats.view import StateView, read
from tensorkeep.output import Output
from tensorkeep.storage.files import absent, local_path
from tensorkeep.storage.yaml_documents import read_yaml

PASSWORD = "TENSORKEEP_KEY_PASSWORD"
Source = tuple[StateView, str, float]  # a checkpoint that something is made from, its role, and its weight
Recorder = Callable[[Output, str], None]


def sign(
    checkpoint: str,
    /,
    *,
    key: Path | None = None,
    certificate: Path | None = None,
    chain: Annotated[tuple[Path, ...], Parameter(negative="", show_default=False)] = (),
    sigstore: Flag = False,
    trust_config: Path | None = None,
    name: str | None = None,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    config: str | None = None,
    overwrite: Flag = False,
    say: Say = Say(),
) -> int:
    """Sign what a model is: its identity, every tensor's hash, config, tokenizer, and what it was made from.

    The statement lies beside the checkpoint (identity.json), its signature beside that (identity.sig) and in the
    checkpoint's certificate. It is a Sigstore bundle that OpenSSF's model-signing reads and writes:
    docs/reference/identity.md.

    Args:
        checkpoint: A file, a folder or a run.
        key: A private key of an elliptic curve, PEM. Its password, if any, is read from TENSORKEEP_KEY_PASSWORD.
        certificate: The key's certificate, PEM; verified with those of its authority.
        chain: Certificates between it and the authority; may be repeated.
        sigstore: Sign as yourself with Sigstore's public service, which needs a network and a browser, or a CI job's
            own token. What is signed becomes public there.
        trust_config: Sign with another Sigstore service than the public one: a client trust configuration, JSON.
        name: What the model is called in the statement. Default: its file's or folder's name.
        out: Write the statement here (.json), the signature beside it. Needed where the checkpoint is no local path.
        config: A config.json, or a folder with one, where the checkpoint brings none and it matters.
        overwrite: Replace an earlier statement and signature.
    """
    from tensorkeep.diagnosis.identity.statement import state
    from tensorkeep.diagnosis.identity.stored import find_statement, write_statement

    output = say.output()
    signer = signer_of(key, certificate, chain, sigstore, trust_config)
    if out is not None and out.suffix != ".json":
        raise TensorkeepError("a statement is a .json file", where=out, hint=f"-o {word(out.with_suffix('.json'))}")
    local = "://" not in checkpoint and local_path(checkpoint).exists()
    if not local and out is None:
        hint = "check the path; for the Hub or a URL add -o FILE.json"
        remote = TensorkeepError("is no local path", where=checkpoint, hint=hint)
        raise remote if "/" in checkpoint else absent(checkpoint)
    with opened(output, checkpoint, config) as view:
        model = identified(output, view)
    _refuse_other_weights(model, checkpoint)
    earlier = find_statement(checkpoint) if local and overwrite else None
    derivation = earlier.statement.derivation if earlier and earlier.statement.identity == model.identity else None
    if derivation is None and local:
        derivation = _training(output, checkpoint, model)
    data = state(model, name or Path(checkpoint).resolve().name, derivation)
    place = write_statement(data, _signed(data, signer), checkpoint, out, overwrite)
    if say.json:
        output.document({"path": checkpoint, "identity": model.identity, "statement": str(place), "parts": model.parts})
    parts = "".join(f", {k.replace('_', ' ')}" for k in model.parts)
    output.line(f"{place}: {model.identity} signed ({len(model.leaves)} tensors{parts})")
    return 0


def _refuse_other_weights(model: Any, checkpoint: str) -> None:
    """Refuse a folder of which transformers would load weights that a statement would not be of."""
    if model.instead:
        what = f"transformers would load {model.instead[0]} too or instead: the statement would be of other weights"
        raise TensorkeepError(what, where=checkpoint, code="F07", hint="take it out of the folder")


def _training(out: Output, checkpoint: str, model: Any) -> dict[str, Any] | None:
    """Return what a run was trained from: the checkpoint that its recipe names, and the recipe; None of others."""
    from tensorkeep.commands.export import RECIPE, run_at
    from tensorkeep.diagnosis.identity.demand import split_demand
    from tensorkeep.diagnosis.identity.derivation import derived, source_of

    run = run_at(checkpoint)
    if run is None:
        return None
    recipe = read_yaml(run.folder / RECIPE)
    start = recipe.get("training", {}).get("pretrained") if run.detection else recipe.get("model")
    if not isinstance(start, str):
        out.remark("note: the run began from nothing: the statement names no checkpoint that it was trained from")
        return None
    try:
        with out.progress() as progress:
            source = source_of(read(split_demand(start)[0]), "base" if run.adapter else "start", 1.0, progress)
    except TensorkeepError as error:
        out.remark(f"note: the statement does not say what it was trained from: {error.line}")
        return None
    return derived("train", [source], model, recipe)


@Parameter(name="*")
@dataclass(frozen=True)
class Recorded:
    """What a command leaves beside what it made.

    Args:
        identify: Leave a statement beside it too: its identity, every tensor's hash, and what it was made from.
        sign_key: Sign that statement with this private key, PEM; its password is read from TENSORKEEP_KEY_PASSWORD.
    """

    identify: Flag = False
    sign_key: Path | None = None

    @property
    def wanted(self) -> bool:
        """Whether a statement is asked for."""
        return self.identify or self.sign_key is not None

    def of(self, made: str, sources: Iterable[Source], **recipe: Any) -> Recorder:
        """Return what leaves the statement once the sink is there; nothing is done where none is asked for.

        Args:
            made: the command.
            sources: what it makes something from.
            recipe: the settings that decide its values.

        Returns:
            A function of where to say it and of the sink.
        """
        if not self.wanted:
            return lambda _out, _sink: None
        signer = signer_of(self.sign_key, None, (), False) if self.sign_key is not None else None
        return lambda out, sink: _record(out, sink, made, list(sources), recipe, signer)


def _record(out: Output, sink: str, made: str, sources: list[Source], recipe: dict[str, Any], signer: Any) -> None:
    """Leave a statement beside what was just made: what it is, what it was made from; signed where there is a key."""
    from tensorkeep.diagnosis.identity.derivation import derived, source_of
    from tensorkeep.diagnosis.identity.statement import state
    from tensorkeep.diagnosis.identity.stored import write_statement

    with out.progress() as progress:
        found = [source_of(view, role, weight, progress) for view, role, weight in sources]
    model = identified(out, read(sink))
    data = state(model, Path(sink).resolve().name, derived(made, found, model, recipe))
    place = write_statement(data, _signed(data, signer) if signer is not None else None, sink, overwrite=True)
    signed = "signed" if signer is not None else "not signed"
    out.remark(f"{place}: {model.identity}, {signed}, made from {' + '.join(s.model.identity[:16] for s in found)}")


def carry_statement(out: Output, plan: Any, sink: str) -> None:
    """Put the statement beside a checkpoint, and its signature, beside what it was converted into as it is.

    Nothing is carried where values were cast, tensors were dropped by the user, or sources were combined.

    Args:
        out: is told.
        plan: what was carried out.
        sink: where to.
    """
    from tensorkeep.conversion.plan import BY_USER
    from tensorkeep.diagnosis.identity.stored import find_statement, write_statement

    cast = [step for step in plan.steps if "cast" in step.actions]
    if plan.naming == "gguf" and any("cast" not in s.actions and s.sink is not None for s in plan.steps):
        cast = [step for step in cast if step.sink is None or step.sink.dtype != "F32"]  # vectors are stored wider
    if (
        cast
        or any(step.reason == BY_USER for step in plan.steps)
        or len(plan.sources) != 1
        or "://" in sink.removeprefix("file://")
    ):
        return
    try:
        stored = find_statement(plan.sources[0].path)
        if stored is not None:
            place = write_statement(stored.data, stored.signature, sink, overwrite=True)
            out.remark(f"note: {place}: the statement beside the source, which holds for the same tensors")
    except TensorkeepError as error:
        out.remark(f"note: the statement beside the source was left behind: {error.line}")


def signer_of(
    key: Path | None,
    certificate: Path | None,
    chain: tuple[Path, ...],
    sigstore: bool,
    trust_config: Path | None = None,
) -> Any:
    """Return who signs; the files must be there before anything is read for them."""
    from tensorkeep.diagnosis.identity.signing import Signer, check_files

    if (key is None) is not sigstore:
        raise TensorkeepError(
            "nothing to sign with is named",
            hint="add --key KEY.pem (openssl ecparam -name prime256v1 -genkey -out KEY.pem), or --sigstore",
        )
    if key is None and (certificate is not None or chain):
        raise TensorkeepError("a certificate belongs to a key", where="--certificate", hint="--key KEY.pem")
    if key is not None and trust_config is not None:
        raise TensorkeepError("is for --sigstore", where="--trust-config", hint="--sigstore --trust-config FILE.json")
    check_files([path for path in (key, certificate, *chain, trust_config) if path is not None])
    return Signer(key, os.environ.get(PASSWORD), certificate, chain, trust_config=trust_config)


def _signed(data: bytes, signer: Any) -> bytes:
    from tensorkeep.diagnosis.identity.signing import sign as run

    made: bytes = run(data, signer)
    return made
