"""A bill of materials of a model (CycloneDX 1.6): what it is, which files hold it, what it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensorkeep.diagnosis.identity.identify import ModelIdentity


def bill(
    model: ModelIdentity, name: str, config: Mapping[str, Any] | None, derivation: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the bill of materials of a model.

    Args:
        model: from `identify`.
        name: what the model is called.
        config: of the checkpoint; None without one.
        derivation: what its statement says it was made from; None where nothing does.

    Returns:
        A CycloneDX document; it holds no time and no serial number, so that equal models give equal documents.
    """
    said = config or {}
    whole: dict[str, Any] = {"type": "machine-learning-model", "bom-ref": f"identity:{model.identity}", "name": name}
    whole |= {"version": model.identity[:16], "properties": _properties(model)}
    architectures = said.get("architectures")
    parameters = {
        "architectureFamily": said.get("model_type"),
        "modelArchitecture": architectures[0] if isinstance(architectures, list) and architectures else None,
    }
    parameters = {k: v for k, v in parameters.items() if isinstance(v, str)}
    if parameters:
        whole["modelCard"] = {"modelParameters": parameters}
    sources = (derivation or {}).get("from")
    ancestors = [_ancestor(entry) for entry in sources or () if isinstance(entry, Mapping)]
    if ancestors:
        whole["pedigree"] = {"ancestors": ancestors, "notes": f"{(derivation or {}).get('made')} by tensorkeep"}
    files = [
        {
            "type": "file",
            "bom-ref": f"file:{file}",
            "name": file,
            "hashes": [{"alg": "SHA-256", "content": content}],
        }
        for file, content in sorted(model.files.items())
    ]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": whole},
        "components": files,
        "dependencies": [{"ref": whole["bom-ref"], "dependsOn": [f["bom-ref"] for f in files]}],
    }


def _properties(model: ModelIdentity) -> list[dict[str, str]]:
    """Return what CycloneDX has no member for."""
    found = {"identity": model.identity, "tensors": str(len(model.leaves)), "bytes": str(model.nbytes)}
    found |= {f"part:{kind}": value for kind, value in model.parts.items()}
    return [{"name": f"tensorkeep:{key}", "value": value} for key, value in found.items()]


def _ancestor(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return a source as a component that the model comes from."""
    identity, role = str(entry.get("identity")), str(entry.get("role"))
    made = {"type": "machine-learning-model", "name": role, "version": identity[:16]}
    return made | {"properties": [{"name": "tensorkeep:identity", "value": identity}]}
