"""The rules of programs that are asked themselves: transformers and PEFT, of names, shapes, ties, codes and headers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from tensorkeep.conversion import fit
from tensorkeep.conversion.fit import Misfit, Offer
from tensorkeep.conversion.plan import Plan
from tensorkeep.conversion.planned import planned
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats import table as formats
from tensorkeep.formats.names import grouped
from tensorkeep.formats.view import StateView
from tensorkeep.quantization.bare import SCALED_METHODS, fills_range, without_scales
from tensorkeep.quantization.stored import FLOAT8, QuantizedWeight, find_quantized, members
from tensorkeep.storage.certificate import parse_json
from tensorkeep.storage.record import DTYPES

Shapes = Mapping[str, tuple[int, ...]]
_LOOKED_AT = 3  # fp8 weights of a file that were scaled were all scaled


@dataclass(frozen=True)
class Programs:
    """What the installed programs say of names and shapes; None where one is not installed.

    Args:
        versions: the installed version of each program, by its word.
        loads: transformers: what its `from_pretrained` reports of tensors.
        quantizes: transformers: the modules that it builds for codes by a config's quantization_config; None where it
            cannot say.
        holds: transformers: the tensors that a loaded model's `state_dict()` has; None where it cannot say.
        adapts: PEFT: what its loader reports, by the adapter's config and its tensors.
        detects: the tensors of the detector with these shapes, by our names; None where no shape tells.
    """

    versions: Mapping[str, str] = field(default_factory=dict)
    loads: fit.Asker | None = None
    quantizes: Callable[[Mapping[str, Any]], Collection[str] | None] | None = None
    holds: Callable[[Mapping[str, Any]], Mapping[str, Offer] | None] | None = None
    adapts: Callable[[Mapping[str, Any], Mapping[str, Offer]], Misfit | None] | None = None
    detects: Callable[[Shapes], Shapes | None] | None = None


NONE = Programs()


@dataclass(frozen=True)
class Proof:
    """What is known of a planned output beside that its bytes are the plan's.

    Args:
        target: the program whose rules found nothing to say; None where none was applied.
        version: the program's version that was asked, or that the rules are of.
        checked: what was compared.
        on: what else the program needs for that.
        why: why no program's rules were applied.
        objection: what the rules found, of a program that nobody declared.
    """

    target: str | None = None
    version: str = ""
    checked: tuple[str, ...] = ()
    on: str = ""
    why: str = ""
    objection: str = ""

    @property
    def line(self) -> str:
        """The proof for people, as the end of a sentence."""
        if self.target is None:
            return f"bytes equal to the plan; {self.objection or f'loading not checked: {self.why}'}"
        return f"proven: loads in {' '.join(w for w in (self.target, self.version) if w)}{self.on}"

    def to_json(self) -> dict[str, Any]:
        """The proof as plain data, for `--json`; `bytes` is what every sink was compared for."""
        return {
            "bytes": True,
            "target": self.target,
            "version": self.version or None,
            "checked": list(self.checked),
            "not_checked": self.why or None,
            "objection": self.objection or None,
        }


@dataclass(frozen=True)
class Sink:
    """A planned output, and who is asked about it.

    Args:
        plan: what will be written.
        to: the format.
        name: the file's or folder's name.
        word: the program, a key of `targets.TARGETS`.
        programs: what the installed programs say.
    """

    plan: Plan
    to: str
    name: str
    word: str
    programs: Programs

    @property
    def version(self) -> str:
        """The program's installed version; empty where it is not installed."""
        return self.programs.versions.get(self.word, "")

    @property
    def offers(self) -> dict[str, Offer]:
        """The tensors that will be written."""
        return {t.name: Offer(t.dtype, t.shape) for t in self.plan.tensors}

    @property
    def config(self) -> dict[str, Any] | None:
        """The config.json that will lie beside the weights, or that describes them."""
        return self.plan.config

    @property
    def single(self) -> bool:
        """Whether the output is one file."""
        return formats.names_a_file(self.to, self.name)


Rule = Callable[[Sink], Proof]


def compared(sink: Sink, asked: Shapes, offers: Mapping[str, Offer] | None = None, hint: str | None = None) -> None:
    """Stop unless the tensors are exactly those that the program asks for.

    Raises:
        TensorkeepError: K01, K02 or S01, with the first name.
    """
    have = sink.offers if offers is None else offers
    refuse(
        sink,
        Misfit(
            sink.word,
            len(asked),
            tuple(n for n in asked if n not in have),
            tuple(n for n in have if n not in asked),
            {n: (o.shape, asked[n]) for n, o in have.items() if n in asked and tuple(asked[n]) != tuple(o.shape)},
        ),
        hint,
    )


def refuse(sink: Sink, found: Misfit, hint: str | None = None) -> None:
    """Stop where a program's loader would have something to say of the tensors.

    Raises:
        TensorkeepError: K01 missing, K02 not expected, S01 of another shape.
    """
    if not found.count:
        return
    said = [
        (found.missing, "K01", f"{sink.word} would miss"),
        (found.unexpected, "K02", f"{sink.word} has no place for"),
        (tuple(found.mismatched), "S01", f"{sink.word} asks for another shape of"),
    ]
    parts = [f"{what} {', '.join(grouped(names)[:3])} ({len(names)})" for names, _, what in said if names]
    code = next(code for names, code, _ in said if names)
    if found.mismatched:
        name, (mine, theirs) = next(iter(found.mismatched.items()))
        parts[-1] += f", {name}: {list(mine)}, asked is {list(theirs)}"
    raise TensorkeepError(
        "; ".join(parts),
        where=sink.plan.sources[0].path,
        code=code,
        hint=hint or "--drop leaves tensors out, --config gives another model's config.json",
    )


# -- transformers ----------------------------------------------------------------------------------------------------


def by_loader(sink: Sink) -> Proof:
    """transformers' `from_pretrained` of an hf folder."""
    if sink.single:
        return Proof(why="transformers loads folders, and no config.json lies beside one file")
    config = sink.config
    if config is None or all(c.name != "config.json" for c in sink.plan.companions):
        return Proof(why="no config.json says which model it is")
    if sink.programs.loads is None:
        return Proof(why="transformers is not installed")
    if sink.plan.header:
        return Proof(why=f"{len(sink.plan.header)} entries of the safetensors header, which nobody here reads")
    offers, codes, why = _plain(sink, config)
    if why:
        return Proof(why=why)
    found = sink.programs.loads({k: v for k, v in config.items() if k != "quantization_config"}, offers)
    if found is None:
        return Proof(why=f"transformers {sink.version} builds no model from this config.json alone")
    refuse(sink, found)
    checked = ("names", "shapes", "ties", "dtypes", "header", *(["quantization_config"] if codes else []))
    return Proof("transformers", sink.version, checked)


def _plain(sink: Sink, config: Mapping[str, Any]) -> tuple[dict[str, Offer], bool, str]:
    """Return the tensors with each quantized weight as what it stands for, whether there are some, or why not."""
    weights = find_quantized(planned(sink.plan, sink.to))
    settings = config.get("quantization_config")
    if not isinstance(settings, dict):
        _refuse_codes(sink, weights)
        return sink.offers, False, ""
    flawed = [p for w in weights.values() for p in w.problems]
    if flawed:
        raise TensorkeepError(flawed[0].message, where=sink.plan.sources[0].path, code=flawed[0].code)
    _refuse_bare(sink, settings.get("quant_method") in SCALED_METHODS)
    method = settings.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in settings else "unnamed")
    asked = sink.programs.quantizes(config) if sink.programs.quantizes and method == "bitsandbytes" else None
    if asked is None:
        return {}, True, f"how transformers reads {method} codes is not known here"
    _refuse_misplaced(sink, weights, asked, settings)
    aside = set(members(weights))
    offers = {n: o for n, o in sink.offers.items() if n not in weights and n not in aside}
    offers |= {w.stands_for: Offer("BF16", w.shape or ()) for w in weights.values()}
    return offers, True, ""


def _refuse_codes(sink: Sink, weights: Mapping[str, QuantizedWeight]) -> None:
    """Stop where integers or codes lie under a weight's name and no config says what they stand for (Q01)."""
    wide = {n: o for n, o in sink.offers.items() if not DTYPES[o.dtype].floating}
    mask = {n for n, o in wide.items() if o.dtype == "BOOL" and n.endswith(".bias") and len(o.shape) > 1}  # is no code
    whole = [n for n in wide if n.endswith((".weight", ".bias")) and n not in mask]
    packed = [*(n for n, w in weights.items() if w.parts), *whole]
    if packed:
        raise TensorkeepError(
            f"{packed[0]} (of {len(packed)}) holds codes or integers, and config.json has no "
            "quantization_config: transformers would take them for weights",
            where=sink.plan.sources[0].path,
            code="Q01",
            hint="give a config.json that has it: --config FOLDER",
        )
    _refuse_bare(sink)


def _refuse_bare(sink: Sink, scaled: bool = False) -> None:
    """Stop where fp8 codes lie without their scales (Q01); plain casts to fp8, whose values are small, may pass.

    Args:
        sink: what is planned.
        scaled: whether the config says that they had some.
    """
    for index, view in enumerate(sink.plan.sources):
        written = {p.name for s in sink.plan.steps if s.sink is not None for p in s.parts if p.source == index}
        bare = [n for n in without_scales(view, find_quantized(view)) if n in written] if _float8(view) else []
        if (bare and scaled) or any(fills_range(view, n) for n in bare[:_LOOKED_AT]):
            raise TensorkeepError(
                f"{bare[0]} (of {len(bare)}) holds fp8 codes whose scales are not in the file: transformers would take "
                "the codes for weights",
                where=view.path,
                code="Q01",
                hint="get the file again, with its scales; --to safetensors or pth copies it as it is",
            )


def _float8(view: StateView) -> bool:
    """Whether a checkpoint stores fp8."""
    return any(r.dtype in FLOAT8 for r in view.values())


def _refuse_misplaced(
    sink: Sink, weights: Mapping[str, QuantizedWeight], asked: Collection[str], settings: Mapping[str, Any]
) -> None:
    """Stop where codes lie under other modules than transformers builds for them, or are of another kind (Q01)."""
    held = {w.stands_for.removesuffix(".weight") for w in weights.values()}
    where = sink.plan.sources[0].path
    if odd := sorted(held - set(asked)):
        raise TensorkeepError(
            f"{odd[0]} (of {len(odd)}) holds codes where quantization_config lets transformers build plain layers",
            where=where,
            code="Q01",
            hint="take these modules out of llm_int8_skip_modules in config.json",
        )
    if bare := sorted(set(asked) - held):
        raise TensorkeepError(
            f"{bare[0]} (of {len(bare)}) holds floats where quantization_config lets transformers build layers of "
            "codes: it loads without a word and fails when it runs",
            where=where,
            code="Q01",
            hint="name these modules under llm_int8_skip_modules in config.json",
        )
    kinds = ("nf4", "fp4") if settings.get("load_in_4bit") else ("int8",)
    if wrong := [w for w in weights.values() if w.kind not in kinds]:
        what = f"{wrong[0].name} holds {wrong[0].kind} codes, quantization_config says {' or '.join(kinds)}"
        raise TensorkeepError(what, where=where, code="Q01", hint="give the config.json of these weights: --config")


def by_state_dict(sink: Sink) -> Proof:
    """What `model.state_dict()` of a loaded transformers model asks of DCP or of a strict `load_state_dict`."""
    needs = "transformers is not installed" if sink.programs.holds is None else ""
    needs = needs or ("no config.json says which model it is" if sink.config is None else "")
    if needs or sink.config is None or sink.programs.holds is None:
        return Proof(why=needs)
    if "quantization_config" in sink.config:
        return Proof(why="what a quantized model's state dict asks for is not known here")
    held = sink.programs.holds(sink.config)
    library = sink.programs.versions.get("transformers", "")
    if held is None:
        return Proof(why=f"transformers {library} builds no model from this config.json alone")
    elsewhere = "--to hf: from_pretrained reads files under these names, whatever they are called in memory"
    compared(sink, {n: o.shape for n, o in held.items()}, hint=elsewhere)
    _refuse_codes(sink, {})
    below = f" below {sink.plan.root}" if sink.plan.root else ""
    checked = ("names", "shapes", "ties", "dtypes")
    if sink.word == "transformers":
        return Proof("transformers", library, checked, f" into model.state_dict(){below}")
    return Proof(sink.word, "", checked, f", asked as the state dict{below} of transformers {library}")


# -- PEFT ------------------------------------------------------------------------------------------------------------


def by_adapter_folder(sink: Sink) -> Proof:
    """PEFT's loader of an adapter folder: put on modules of the adapter's own names and shapes."""
    document = next((c for c in sink.plan.companions if c.name == "adapter_config.json"), None)
    config = parse_json(document.data, document.where) if document is not None else None
    if not isinstance(config, dict):
        raise TensorkeepError("has no adapter_config.json", where=sink.plan.sources[0].path, code="A01")
    if sink.programs.adapts is None:
        return Proof(why="peft is not installed")
    found = sink.programs.adapts(config, sink.offers)
    if found is None:
        return Proof(why=f"peft {sink.version} was not asked about {config.get('peft_type')} with these tensors")
    refuse(sink, found)
    return Proof("peft", sink.version, ("names", "shapes", "ranks", "target_modules"), " on a base with its modules")
