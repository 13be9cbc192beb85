"""Parity of quantized weights, adapters and merges: `python -m tests.parity.qlora DIR`, one line a case.

DIR is a set, or holds sets: `base/` (a small fp32 Llama), `adapter_*/` as PEFT wrote them, `quant_*/` as bitsandbytes
quantized the base, `dequant_*.safetensors` with the true values, `io.safetensors` with token ids and logits, and
`damaged/` with files whose names say what was done to them. Shapes are whatever they are: nothing here assumes that a
block size divides them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from tensorkeep.adapters.merging import merge
from tensorkeep.adapters.planning import open_adapters, plan_merge
from tensorkeep.conversion.execution import convert
from tensorkeep.conversion.planning import make_plan
from tensorkeep.conversion.proof import read_certificate
from tensorkeep.diagnosis.diagnosis import diagnose
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import StateView, read
from tensorkeep.quantization import encoding as quant_encoding
from tensorkeep.quantization import stored as quantized
from tests.parity.outcome import Outcome, bitwise, guarded, load_model, natural_key, tensors

BASE, ADAPTED = 1e-6, 2e-6  # relative, by the Frobenius norm
CODES = {
    "packed_of_A_absmax_of_B": "Q02",
    "of_packed_bytes": "Q03",
    "quant_state_filtered_out": "Q01",
    "absmax_transposed": "Q06",
}
Logits = Mapping[str, torch.Tensor]


def cases(folder: Path, work: Path) -> Iterator[Outcome]:
    """Every case of a set of fixtures, or of the sets in a folder."""
    sets = (
        [folder]
        if (folder / "base").is_dir()
        else sorted((p for p in folder.iterdir() if (p / "base").is_dir()), key=natural_key)
    )
    for place in sets:
        name = place.name
        expected = load_file(place / "io.safetensors")
        adapters = sorted(place.glob("adapter_*/"), key=natural_key)
        yield from guarded(f"{name} base", lambda p=place, n=name, e=expected: base_cases(p, n, e))
        for stored in sorted(place.glob("quant_*/"), key=natural_key):
            yield from guarded(
                f"{name} {stored.name}", lambda p=place, s=stored, n=name, e=expected: quant_cases(p, s, n, e)
            )
        for adapter in adapters:
            yield from guarded(
                f"{name} {adapter.name}",
                lambda p=place, a=adapter, n=name, e=expected: adapter_cases(p, a, n, e, work / n),
            )
        for file in sorted((place / "damaged").glob("*.safetensors"), key=natural_key):
            yield from guarded(
                f"{name} {file.stem}", lambda p=place, f=file, n=name, a=adapters: damaged_cases(p, f, n, a)
            )


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """|ours - theirs| / |theirs|; infinite for other shapes."""
    if ours.shape != theirs.shape:
        return float("inf")
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-30))


def logits(model: Any, expected: Logits) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=expected["input_ids"]).logits.float()


def plain_model(place: Path, values: Mapping[str, torch.Tensor] | None = None) -> Any:
    """The base's model in fp32, some of its weights replaced by name; every name must exist."""
    model = load_model(place / "base")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in (values or {}).items():
            parameters[name].copy_(value)
    return model


def dequantized(view: StateView) -> dict[str, torch.Tensor]:
    return {n: torch.from_numpy(quantized.dequantize(view, n, w)) for n, w in quantized.find_quantized(view).items()}


# -- weights ----------------------------------------------------------------------------------------------------------


def base_cases(place: Path, name: str, expected: Logits) -> Iterator[Outcome]:
    yield Outcome(
        f"{name} base, logits", relative(logits(plain_model(place), expected), expected["logits.base.fp32"]), BASE
    )


def quant_cases(place: Path, stored: Path, name: str, expected: Logits) -> Iterator[Outcome]:
    """One quantized form of the base: its true values, what our encoder makes of the base, the logits."""
    kind, view, base = stored.name.removeprefix("quant_"), read(stored), read(place / "base")
    found = quantized.find_quantized(view)
    values = dequantized(view)
    yield bitwise(f"{name} {kind}, dequantized", values, load_file(place / f"dequant_{kind}.safetensors"))
    sent = {}
    for weight in found.values():
        how = quant_encoding.Encoding(
            weight.kind, weight.block if isinstance(weight.block, int) else 64, weight.nested is not None
        )
        sent[weight.name] = torch.from_numpy(quant_encoding.through(base.array(weight.name).astype(np.float32), how))
    yield bitwise(f"{name} {kind}, the base quantized here", sent, values)
    yield Outcome(
        f"{name} {kind}, logits",
        relative(logits(plain_model(place, values), expected), expected[f"logits.base.{kind}"]),
        BASE,
    )


# -- adapters ---------------------------------------------------------------------------------------------------------


def adapter_cases(place: Path, adapter: Path, name: str, expected: Logits, work: Path) -> Iterator[Outcome]:
    """One adapter: read and written, put onto every form of the base, merged into every form of it."""
    label, out = f"{name} {adapter.name}", work / adapter.name
    convert(make_plan([read(adapter)], "peft"), str(out / "peft"), "peft")
    yield bitwise(f"{label} to peft", tensors(read(out / "peft")), load_file(adapter / "adapter_model.safetensors"))
    configs = [json.loads((p / "adapter_config.json").read_text()) for p in (adapter, out / "peft")]
    odd = sorted(k for k in {*configs[0], *configs[1]} if configs[0].get(k) != configs[1].get(k))
    yield Outcome(f"{label} to peft, its config", len(odd), 0, f"fields differ: {', '.join(odd[:4])}" if odd else "")
    forms = {"fp32": place / "base"} | {p.name.removeprefix("quant_"): p for p in sorted(place.glob("quant_*/"))}
    for kind, stored in forms.items():
        yield from guarded(
            f"{label} on {kind}", lambda k=kind, s=stored: merge_cases(place, adapter, label, k, s, expected, out)
        )


def merge_cases(
    place: Path, adapter: Path, label: str, kind: str, stored: Path, expected: Logits, out: Path
) -> Iterator[Outcome]:
    """PEFT with the folder we wrote against the fixture; our merge against both, and its certificate."""
    from peft import PeftModel

    stem = f"logits.{adapter.name.removeprefix('adapter_')}"
    values = dequantized(read(stored)) if kind != "fp32" else {}
    model = PeftModel.from_pretrained(plain_model(place, values), str(out / "peft")).eval()
    adapted = logits(model, expected)
    if f"{stem}.adapted.{kind}" in expected:
        yield Outcome(
            f"{label} on {kind}, adapted logits", relative(adapted, expected[f"{stem}.adapted.{kind}"]), ADAPTED
        )
    job = plan_merge(read(stored), open_adapters([(read(adapter), 1.0)]), dtype="F32")
    merge(job, str(out / kind))
    made = load_model(out / kind)
    merged = logits(made, expected)
    key = f"{stem}.merged.fp32" if kind == "fp32" else f"{stem}.dequant_merged.{kind}"
    if key in expected:
        yield Outcome(f"{label} on {kind}, merged logits", relative(merged, expected[key]), ADAPTED)
    yield Outcome(f"{label} on {kind}, merged against adapted", relative(merged, adapted), ADAPTED)
    lossy = expected.get(f"{stem}.peft_requant_merged.{kind}")
    if lossy is not None:
        gap = relative(merged, adapted) / max(relative(lossy, adapted), 1e-30)
        yield Outcome(
            f"{label} on {kind}, error against requantizing", gap, 1e-3, "of the error of a requantizing merge"
        )
    golden = place / "merged_lora.safetensors"
    if kind == "fp32" and adapter.name == "adapter_lora" and golden.exists():
        theirs, ours = load_file(golden), dict(tensors(read(out / kind)))
        worst = max(relative(ours.get(n, torch.zeros(0)), t) for n, t in theirs.items())
        yield Outcome(f"{label} on {kind}, merged weights", worst, BASE, f"the worst of {len(theirs)}")
    said = (read_certificate(read(out / kind)) or {}).get("merge", {})
    listed = [a["digest"] for a in said.get("adapters", [])] == [s.digest for s in job.sources]
    yield Outcome(f"{label} on {kind}, certificate", float(not listed or len(said["terms"]) != len(job.terms)), 0)


# -- damaged files ----------------------------------------------------------------------------------------------------


def damaged_cases(place: Path, file: Path, name: str, adapters: list[Path]) -> Iterator[Outcome]:
    """A damaged file is named with the base as reference, not called sound without one, and not silently merged."""
    code = next((c for word, c in CODES.items() if word in file.stem), None)
    label = f"{name} damaged {file.stem}"
    if code is None:
        yield Outcome(label, float("inf"), 0, "no code is known for this file")
        return
    document = diagnose(str(file), str(place / "base")).to_json()
    yield Outcome(
        f"{label} is {code}",
        float(code not in document["causes"]),
        0,
        f"causes {' '.join(document['causes']) or 'none'}",
    )
    verdict = diagnose(str(file)).to_json()["verdict"]
    wanted = ("inconclusive", "findings") if code in ("Q02", "Q03") else ("findings",)
    yield Outcome(f"{label} without a reference", float(verdict not in wanted), 0, verdict)
    if code in ("Q01", "Q06") and adapters:
        try:
            plan_merge(read(file), open_adapters([(read(adapters[0]), 1.0)]))
            yield Outcome(f"{label} is not merged onto", 1, 0, "it was planned")
        except TensorkeepError as error:
            yield Outcome(f"{label} is not merged onto", float(error.code != code), 0, error.line[-90:])
