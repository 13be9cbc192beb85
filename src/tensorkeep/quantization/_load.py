"""One load of a checkpoint into a model with quantized linears: planned as a whole, then carried out or refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from tensorkeep.errors import TensorkeepError, near_misses
from tensorkeep.formats.memory import TensorView, digest_of, raw_bytes, rows_of, tensor_of
from tensorkeep.formats.names import matches, unwrap
from tensorkeep.formats.view import StateView
from tensorkeep.quantization import stored as quantized
from tensorkeep.quantization._ahead import Ahead, Arrived, reads_ahead
from tensorkeep.quantization._load_plan import Loaded, Repair, Settings, Step, joined, meta_buffers, repair_all
from tensorkeep.quantization.description import QuantizedWeight
from tensorkeep.quantization.linear import HELD, QuantLinear
from tensorkeep.quantization.linear_layers import sizes, stacked_parameters, turned
from tensorkeep.quantization.packed import WEIGHT_DIGEST, Packed, averaged_blocks, pack
from tensorkeep.quantization.reading import read_packed
from tensorkeep.quantization.replacing import (
    check_patterns,
    over,
    quantizable,
    replace_modules,
    selected,
    tied_parameters,
)
from tensorkeep.storage.certificate import digest_of_all
from tensorkeep.storage.record import DTYPES, FROM_TORCH

# dtype in the file, dtype in the model: casts that lose nothing
_LOSSLESS_CASTS = {("BF16", "F32"), ("F16", "F32"), ("BF16", "F64"), ("F16", "F64"), ("F32", "F64")}


class Load:
    """One load: planned as a whole, refused with every problem named, or carried out."""

    def __init__(
        self,
        model: nn.Module,
        view: StateView,
        settings: Settings | None,
        absent: tuple[str, ...],
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        quantize_stack: Callable[..., Any] | None = None,
    ) -> None:
        self.quantize_stack = quantize_stack
        self.model, self.view, self.settings, self.absent = model, view, settings, absent
        self.device, self.dtype = device, dtype
        self.stored = {unwrap(name)[0]: name for name in view}
        self.weights = {unwrap(name)[0]: weight for name, weight in quantized.find_quantized(view).items()}
        self.problems: list[tuple[str, str]] = []
        self.steps: list[Step] = []
        self.result = Loaded()
        self._take: Callable[[str], Arrived] = self._read
        self._later: Callable[[Packed], Future[bytes]] | None = None  # takes digests beside the load
        self._digests: list[tuple[Any, Future[bytes]]] = []
        self.pieces: dict[str, list[list[str]]] = {}  # stack -> names of each expert's weights, which stay codes

    def run(self, repair: Repair | None, device: torch.device | None) -> Loaded:
        """Plan, refuse or carry out; `repair` recomputes buffers that no file holds."""
        taken = self._plan_linears() | self._plan_stacks()
        self._plan_rest(taken)
        self._find_unexpected()
        empty = meta_buffers(self.model)
        if empty and repair is None:
            self.problems += [
                ("B01", f"{name} is on meta and in no file: pass repair=tensorkeep.repair_buffers") for name in empty
            ]
        self._refuse()
        repair_all(self.model, empty, repair, device)
        digests: dict[str, str] = {}
        # biases first: a linear that is replaced takes along the one it has
        steps = sorted(self.steps, key=lambda s: s.how not in ("copy", "same"))
        with self._reading(steps):
            for step in steps:
                digests |= self._carry_out(step)
        self.result.base_digest = digest_of_all(digests) if len(digests) == len(self.view) else None
        return self.result

    # -- planning -------------------------------------------------------------------------------------------------

    def _plan_linears(self) -> set[str]:
        """Plan the quantized linears, and dense ones that are to be; return the names of their weights."""
        linears = {
            unwrap(n)[0]: m for n, m in self.model.named_modules() if isinstance(m, QuantLinear) or quantizable(m)
        }
        tied = tied_parameters(self.model)
        if self.settings is not None:
            check_patterns(linears, self.settings.include, "include")
        taken = set()
        for name, linear in linears.items():
            weight = f"{name}.weight" if name else "weight"
            wanted = self.settings is not None and selected(name, self.settings.include, self.settings.exclude)
            held, codes = isinstance(linear, QuantLinear), weight in self.weights
            if codes and id(linear.weight) in tied:
                self._problem(
                    "Q06", weight, "is quantized in the file and tied to another module's weight in the model"
                )
            elif codes:
                self._plan_codes(name, weight, linear)
            elif weight in self.stored and (held or (wanted and id(linear.weight) not in tied)):
                self._plan_floats(name, weight, linear)
            elif held and not matches(weight, self.absent):
                self._problem("K01", weight, "is not in the file")
            elif not held:
                continue
            taken.add(weight)
        return taken

    def _plan_stacks(self) -> set[str]:
        """Plan the parameters that stack experts and are to be quantized; return their names."""
        taken: set[str] = set()
        for path, module, key in stacked_parameters(self.model):
            name = unwrap(f"{path}.{key}" if path else key)[0]
            if self.quantize_stack is not None and f"{name}.0.0.weight" in self.weights:
                self._plan_pieces(name, module, key)
                taken.add(name)
                continue
            how = self.settings if self.quantize_stack is not None else None
            wanted = how is not None and selected(name, how.include, how.exclude)
            if not wanted or name not in self.stored or name in self.weights:
                continue
            record, shape = self.view[self.stored[name]], tuple(module.get_parameter(key).shape)
            if record.shape != shape:
                self._problem("S01", name, f"is {list(record.shape)} in the file, {list(shape)} in the model")
            else:
                self.steps.append(Step(name, self.stored[name], "stack", ((module, key),)))
            taken.add(name)
        return taken

    def _plan_pieces(self, name: str, module: nn.Module, key: str) -> None:
        """Plan a stack whose experts' matrices the view holds as codes, in one piece or several: NAME.EXPERT.PIECE."""
        for expert in range(module.get_parameter(key).shape[0]):
            own = itertools.takewhile(
                lambda n: n in self.weights, (f"{name}.{expert}.{i}.weight" for i in itertools.count())
            )
            self.pieces.setdefault(name, []).append(list(own))
        self.steps.append(Step(name, self.weights[self.pieces[name][0][0]].name, "join", ((module, key),)))

    def _plan_codes(self, name: str, weight: str, linear: Any) -> None:
        """Plan a weight that is quantized in the file."""
        try:
            packed = read_packed(self._part(weight), sizes(linear))
        except TensorkeepError as error:
            self._problem(error.code or "Q06", weight, error.what.removeprefix("layer.weight: "))
            return
        if weight.removesuffix("weight") + WEIGHT_DIGEST not in self.stored:
            self.result.unproven.append(name)
            lost = averaged_blocks(packed)
            if lost:
                self._problem(
                    "Q03", weight, f"was averaged or altered: {lost} blocks of codes lost their largest element"
                )
                return
        self.steps.append(Step(name, self.weights[weight].name, "take", ((linear, "weight"),)))

    def _plan_floats(self, name: str, weight: str, linear: Any) -> None:
        """Plan a weight that is float in the file and to be quantized."""
        record, shape = self.view[self.stored[weight]], sizes(linear)
        shape = shape[::-1] if turned(linear) else shape
        if self.settings is None:
            self._problem(
                "Q01", weight, f"is {record.dtype} in the file and quantized in the model: load_quantizing quantizes it"
            )
        elif record.shape != shape:
            self._problem("S01", weight, f"is {list(record.shape)} in the file, {list(shape)} in the model")
        else:
            self.steps.append(Step(name, self.stored[weight], "pack", ((linear, "weight"),)))

    def _plan_rest(self, taken: set[str]) -> None:
        """Plan every other parameter and persistent buffer; tied ones need one name in the file."""
        places: dict[int, list[tuple[str, nn.Module, str]]] = {}
        for path, module in self.model.named_modules():
            for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
                name = unwrap(f"{path}.{key}" if path else key)[0]
                apart = isinstance(module, QuantLinear) and key in HELD
                if (
                    tensor is not None
                    and not apart
                    and name not in taken
                    and key not in module._non_persistent_buffers_set
                ):
                    places.setdefault(id(tensor), []).append((name, module, key))
        for same in places.values():
            present = [name for name, _, _ in same if name in self.stored and name not in self.weights]
            if not present:
                if not all(matches(name, self.absent) for name, _, _ in same):
                    self._problem("K01", same[0][0], "is not in the file")
                continue
            target = getattr(same[0][1], same[0][2])
            for name in present:
                self._check_plain(name, target)
            stored = [self.stored[name] for name in present]
            if len(stored) > 1 and len({self.view.digest(s) for s in stored}) > 1:
                self._problem(
                    "T01", present[0], f"is one tensor with {present[1]} in the model and another in the file"
                )
            self.steps += [
                Step(n, s, "copy" if i == 0 else "same", tuple((m, k) for _, m, k in same))
                for i, (n, s) in enumerate(zip(present, stored))
            ]

    def _check_plain(self, name: str, target: Tensor) -> None:
        """Compare shape and dtype of a float tensor with the model's."""
        record, here = self.view[self.stored[name]], FROM_TORCH.get(str(target.dtype).removeprefix("torch."))
        if record.shape != tuple(target.shape):
            self._problem("S01", name, f"is {list(record.shape)} in the file, {list(target.shape)} in the model")
        elif not target.is_meta and record.dtype != here and (record.dtype, here) not in _LOSSLESS_CASTS:
            self._problem("S04", name, f"is {record.dtype} in the file, {here} in the model, which would lose values")
        elif target.is_meta and DTYPES[record.dtype].floating != target.is_floating_point():
            self._problem("S04", name, f"is {record.dtype} in the file, {here} in the model")

    def _find_unexpected(self) -> None:
        """Note every tensor of the file that nothing in the model takes."""
        used = {step.stored for step in self.steps}
        used |= {self.weights[n].name for found in self.pieces.values() for own in found for n in own}
        bad = {name for _, line in self.problems for name in [line.split(" ", 1)[0]]}
        for name, weight in self.weights.items():
            if weight.name in used or name in bad:
                used |= set(weight.stored)
        digests = {
            s
            for clean, s in self.stored.items()
            if clean.rpartition(".")[2] == WEIGHT_DIGEST
            and clean.removesuffix(WEIGHT_DIGEST) + "weight" in self.weights
        }
        for clean, stored in self.stored.items():
            if stored not in used and stored not in digests and clean not in bad:
                self._problem("K02", clean, "is in the file and not in the model")

    def _problem(self, code: str, name: str, what: str) -> None:
        """Note what is wrong with one tensor."""
        self.problems.append((code, f"{name} {what}"))

    def _refuse(self) -> None:
        """Raise one error about all problems, the gravest first."""
        if not self.problems:
            return
        order = ("Q01", "Q02", "Q03", "Q06", "T01", "S01", "S04", "B01", "K01", "K02")
        self.problems.sort(key=lambda p: order.index(p[0]) if p[0] in order else 0)
        code, first = self.problems[0]
        rest = "; ".join(line for _, line in self.problems[1:5])
        more = f"; {rest}" + (f" ... ({len(self.problems)} in all)" if len(self.problems) > 5 else "") if rest else ""
        missing = [line.split(" ", 1)[0] for c, line in self.problems if c == "K01"]
        hint = near_misses(missing[0], self.stored) if missing else ""
        raise TensorkeepError(
            first + more,
            where=self.view.path,
            code=code,
            hint=hint or "nothing was loaded; tensorkeep inspect lists what the file holds",
            tensors=[line.split(" ", 1)[0] for _, line in self.problems],
        )

    def _part(self, weight: str) -> Mapping[str, Tensor]:
        """Return the tensors of one quantized weight under the names that `read_packed` asks for."""
        found: QuantizedWeight = self.weights[weight]
        module, digest = weight.removesuffix("weight"), self.stored.get(weight.removesuffix("weight") + WEIGHT_DIGEST)
        stored = [found.name, *found.parts.values(), *([digest] if digest else [])]
        return {f"layer.{unwrap(s)[0][len(module) :]}": tensor_of(self.view, s) for s in stored if s in self.view}

    # -- copying --------------------------------------------------------------------------------------------------

    def _read(self, stored: str) -> Arrived:
        """Read a tensor onto the CPU."""
        tensor = tensor_of(self.view, stored)
        return Arrived(tensor, digest_of(tensor))

    @contextmanager
    def _reading(self, steps: Sequence[Step]) -> Iterator[None]:
        """Within it the tensors of these steps come in their order, read ahead where that is of use."""
        names = [step.stored for step in steps if step.how in ("copy", "pack")]
        if not reads_ahead(self.view, names, self.device):
            yield
            return
        assert self.device is not None
        ahead = Ahead(self.view, names, [step.stored for step in steps if step.how == "copy"], self.device)
        try:
            self._take, self._later = ahead.take, ahead.digest
            yield
            for linear, digest in self._digests:
                linear._buffers[WEIGHT_DIGEST].copy_(torch.frombuffer(bytearray(digest.result()), dtype=torch.uint8))
        finally:
            ahead.close()

    @torch.no_grad()
    def _carry_out(self, step: Step) -> dict[str, str]:
        """Do one step; return the digests of the stored tensors that it read."""
        if step.how == "same":
            return {step.stored: self.view.digest(step.stored)}
        if step.how == "copy":
            tensor, digest = self._take(step.stored)
            digests = {step.stored: digest}
            self._put(tensor, step.places)
            self.result.copied.append(step.name)
            return digests
        if step.how == "stack":
            return {step.stored: self._quantize_stack(step)}
        if step.how == "join":
            return self._join_stack(step)
        linear: Any = step.places[0][0]
        device = self.device or (torch.device("cpu") if linear.weight.is_meta else linear.weight.device)
        if step.how == "take":
            tensors = self._part(f"{step.name}.weight" if step.name else "weight")
            packed = read_packed(tensors, None)
            digests = {
                self.stored[(f"{step.name}." if step.name else "") + n[6:]]: digest_of(t) for n, t in tensors.items()
            }
            packed = Packed(
                packed.layout,
                {r: t.to(device, copy=isinstance(self.view, TensorView)) for r, t in packed.tensors.items()},
            )
        else:
            assert self.settings is not None
            tensor, digest = self._take(step.stored)
            digests = {step.stored: digest}
            tensor = tensor.T if turned(linear) else tensor
            packed = pack(tensor.to(device), self.settings.kind, self.settings.double, self.settings.block, step.name)
        later = self._later(packed) if self._later is not None else None  # until then its place holds zeros
        unknown = bytes(16) if later is not None else None
        if isinstance(linear, QuantLinear):
            linear.fill(packed, unknown)
        else:
            linear, before = over(linear, QuantLinear.instead_of(linear, packed, unknown)), linear
            replace_modules(self.model, {before: linear})
        if later is not None:
            self._digests.append((linear, later))
        self.result.quantized.append(step.name)
        return digests

    def _quantize_stack(self, step: Step) -> str:
        """Quantize a stack of experts, one of them in memory at a time; return the digest of what was read."""
        import xxhash

        assert self.settings is not None and self.quantize_stack is not None
        module, key = step.places[0]
        parameter, state = module.get_parameter(key), xxhash.xxh3_128()
        device = self.device or (torch.device("cpu") if parameter.is_meta else parameter.device)

        def matrices() -> Iterator[Tensor]:
            for expert in range(parameter.shape[0]):
                matrix = rows_of(self.view, step.stored, expert)
                state.update(raw_bytes(matrix))
                yield matrix.to(device)

        settings = self.settings
        self.quantize_stack(module, key, settings.kind, settings.double, settings.block, step.name, matrices())
        self.result.quantized.append(step.name)
        return state.hexdigest()

    def _join_stack(self, step: Step) -> dict[str, str]:
        """Take over the codes of a stack's experts; return the digests of what was read."""
        assert self.quantize_stack is not None
        digests: dict[str, str] = {}
        module, key = step.places[0]

        def experts() -> Iterator[Packed]:
            for own in self.pieces[step.name]:
                parts = [self._part(n) for n in own]
                for name, part in zip(own, parts):
                    module = name.removesuffix("weight")
                    digests.update({self.stored[module + n[6:]]: digest_of(t) for n, t in part.items()})
                made = joined([read_packed(p, None) for p in parts], step.name)
                yield Packed(made.layout, {r: t.to(self.device or "cpu") for r, t in made.tensors.items()})

        self.quantize_stack(module, key, "nf4", True, 64, step.name, experts())
        self.result.quantized.append(step.name)
        return digests

    def _put(self, tensor: Tensor, places: Sequence[tuple[nn.Module, str]]) -> None:
        """Copy a tensor into its parameter or buffer, or put it there where that is on meta."""
        target = cast(Tensor, getattr(places[0][0], places[0][1]))
        if not target.is_meta:
            target.copy_(tensor)
            return
        made = tensor.to(self.device or "cpu", self.dtype if self.dtype and tensor.is_floating_point() else None)
        made = made.clone() if made is tensor and isinstance(self.view, TensorView) else made
        if isinstance(target, nn.Parameter):
            made = nn.Parameter(made, requires_grad=target.requires_grad and made.is_floating_point())
        for module, key in places:
            setattr(module, key, made)
