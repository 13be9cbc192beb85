"""Run OpenTAD's engine under our rules, whatever names its tools know it by: average, evaluation, epochs, optimizer.

Nothing here imports OpenTAD. `replacements` wraps the objects it is given, `take_over` puts the wrappers in their
place.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tensorkeep.detection.opentad.averages import ROUNDING
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.names import unwrap
from tensorkeep.integrations import _opentad_files as files
from tensorkeep.integrations._opentad_files import Run
from tensorkeep.training import randomness
from tensorkeep.training.ema import Ema
from tensorkeep.training.live_state import refuse_difference

# what is replaced: OpenTAD's module -> its function or class -> the parameters that it must have
_SIGNATURES = {
    "utils.ema": {
        "ModelEma": "model decay device",
    },
    "utils.checkpoint": {
        "save_checkpoint": "model model_ema optimizer scheduler epoch work_dir",
        "save_best_checkpoint": "model model_ema epoch work_dir",
    },
    "cores.train_engine": {
        "train_one_epoch": "train_loader model optimizer scheduler curr_epoch logger "
        "model_ema clip_grad_l2norm logging_interval scaler",
        "val_one_epoch": "val_loader model logger rank curr_epoch model_ema use_amp",
    },
    "cores.test_engine": {
        "eval_one_epoch": "test_loader model cfg logger rank model_ema use_amp world_size not_eval",
    },
    "cores.optimizer": {
        "build_optimizer": "cfg model logger",
    },
}
EXPECTED = {
    module: {name: tuple(parameters.split()) for name, parameters in names.items()}
    for module, names in _SIGNATURES.items()
}


# -- the names ----------------------------------------------------------------------------------------------------


def replacements(opentad: Mapping[str, ModuleType], run: Run) -> dict[int, tuple[Any, Any]]:
    """Return `id` of OpenTAD's object -> (the object, ours), for all of `EXPECTED`.

    `opentad` are its modules by those names.

    Raises:
        TensorkeepError: one is missing or takes other arguments; then nothing was replaced.
    """
    found: dict[str, Any] = {}
    for module, names in EXPECTED.items():
        for name, parameters in names.items():
            theirs = getattr(opentad[module], name, None)
            taken = () if theirs is None else tuple(inspect.signature(theirs).parameters)
            if taken != parameters:
                what = f"{name} takes ({', '.join(taken)})" if theirs is not None else f"{name} is not there"
                raise TensorkeepError(
                    f"{what}; known is ({', '.join(parameters)}) of OpenTAD at 3dd7b032",
                    where=f"opentad.{module}",
                    hint="take that commit of OpenTAD, or leave tensorkeep out of custom_imports",
                )
            found[name] = theirs
    ours = {
        "ModelEma": functools.partial(Average, run=run),
        "save_checkpoint": functools.partial(files.save_checkpoint, run=run),
        "save_best_checkpoint": files.save_best_checkpoint,
        "build_optimizer": _building(found["build_optimizer"], run),
        "train_one_epoch": _training(found["train_one_epoch"], run),
        "val_one_epoch": _evaluating(found["val_one_epoch"]),
        "eval_one_epoch": _evaluating(found["eval_one_epoch"]),
    }
    return {id(theirs): (theirs, ours[name]) for name, theirs in found.items()}


def take_over(pairs: Mapping[int, tuple[Any, Any]]) -> list[str]:
    """Bind every module's name for one of OpenTAD's objects to ours, `__main__`'s too; return them as `module.name`.

    By identity, so no other object of that name is touched. A name inside a closure or a default argument keeps the old
    object.
    """
    places = []
    modules: dict[str, Any] = dict(sys.modules)  # whatever a program puts there
    for module_name, module in modules.items():
        if not isinstance(module, ModuleType):
            continue
        for name, value in list(vars(module).items()):
            if id(value) in pairs:  # each original is held by its pair, so its id is no other's
                setattr(module, name, pairs[id(value)][1])
                places.append(f"{module_name}.{name}")
    return places


# -- the average --------------------------------------------------------------------------------------------------


class Average:
    """The average of the trained weights, in the place of OpenTAD's `ModelEma`.

    It keeps trainable float tensors alone, by name, in float32. `module.state_dict()` is complete, as OpenTAD loads it
    strictly: the averages among the model's own frozen tensors and buffers, which are not copied and never averaged.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999, device: Any = None, *, run: Run) -> None:
        self.ema, self.model, self.run = Ema(model, decay, device=device), model, run

    @property
    def module(self) -> Average:
        """Itself: OpenTAD asks for `model_ema.module`."""
        return self

    def update(self, model: nn.Module) -> None:
        """Average the model's weights in, after an update."""
        self.ema.update(model)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages among the model's own tensors, by the names of its state dict."""
        return {name: tensor for name, (tensor, _) in self._entries().items()}

    def _entries(self) -> dict[str, tuple[Tensor, str | None]]:
        """Return, by name in a file, the averaged or the model's own tensor, and the average's name where it is one."""
        averages = self.ema.tensors
        names = {id(p): unwrap(n)[0] for n, p in self.model.named_parameters()}
        entries: dict[str, tuple[Tensor, str | None]] = {}
        for stored, value in self.model.state_dict(keep_vars=True).items():
            name = names.get(id(value), "")
            entries[stored] = (averages[name], name) if name in averages else (value.detach(), None)
        return entries

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over `state_dict_ema` of a file, OpenTAD's own included, once the model has its `state_dict`.

        In a file of ours frozen tensors are the model's bitwise; OpenTAD averages what is constant too, and rounds.

        Raises:
            TensorkeepError: K01 for any difference of names and shapes, A04 where a frozen tensor is not the model's:
                the average would be of another base.
        """
        entries, saved = self._entries(), self.run.resumed or {}
        refuse_difference("state_dict_ema", _shapes(self.state_dict()), _shapes(state))
        base, within = {id(t) for t in _base(self.model)}, 0.0 if saved else ROUNDING
        own = self.model.state_dict(keep_vars=True)
        other = [n for n, value in own.items() if id(value) in base and not _same(value.detach(), state[n], within)]
        if other:
            what = f"{len(other)} frozen tensors of the average are not the model's, {other[0]} among them"
            hint = "resume from a file whose two halves belong together"
            raise TensorkeepError(what, where="state_dict_ema", code="A04", hint=hint)
        averages = {name: state[stored] for stored, (_, name) in entries.items() if name is not None}
        self.ema.load_state_dict(averages, int((saved.get("ema") or {}).get("updates", 0)))


def _shapes(state: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: str(list(tensor.shape)) for name, tensor in state.items()}


def _base(model: nn.Module) -> Iterator[Tensor]:
    """Yield what never changes: frozen parameters and the codes of quantized layers."""
    yield from (p for p in model.parameters() if not p.requires_grad)
    for module in model.modules():
        if getattr(module, "frozen_state", False):
            yield from module.buffers()


def _same(own: Tensor, saved: Tensor, within: float) -> bool:
    """Whether two tensors are equal; floats up to `within` of the largest."""
    saved = saved.to(own.device)
    if not within or not own.is_floating_point() or not own.numel():
        return torch.equal(own, saved)
    return bool(((own - saved).abs().max() <= within * own.abs().max()).item())


# -- around OpenTAD's functions ----------------------------------------------------------------------------------


def _evaluating(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap OpenTAD's evaluation so that it runs under our average, which is swapped in place and put back bitwise.

    Random numbers that it draws are not training's: epochs go alike with and without it.
    """
    signature = inspect.signature(theirs)

    @functools.wraps(theirs)
    def evaluate(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        average = bound.arguments.get("model_ema")
        bound.arguments["model_ema"] = None  # OpenTAD would load a state dict there and back
        applied = nullcontext() if average is None else average.ema.applied(bound.arguments["model"])
        with _randomness_kept(), applied:
            return theirs(*bound.args, **bound.kwargs)

    return evaluate


@contextmanager
def _randomness_kept() -> Iterator[None]:
    """Restore the random state when the block ends."""
    before = randomness.capture()
    try:
        yield
    finally:
        randomness.restore(before)


def _building(theirs: Callable[..., Any], run: Run) -> Callable[..., Any]:
    """Wrap the building of OpenTAD's optimizer; both its loading and the model's are then checked.

    Both loads come right after in `tools/train.py`.
    """

    @functools.wraps(theirs)
    def build_optimizer(cfg: Any, model: nn.Module, logger: Any) -> Optimizer:
        optimizer: Optimizer = theirs(cfg, model, logger)
        names = files.group_names(model, optimizer)
        watch: Any = model._register_load_state_dict_pre_hook  # public from torch 2.5 on
        watch(files.keep_kinds, with_module=True)
        optimizer.register_load_state_dict_pre_hook(lambda own, state: files.compare_moments(own, state, names, run))
        logger.info("tensorkeep looks after the average, the checkpoints and the resume of this run")
        return optimizer

    return build_optimizer


def _training(theirs: Callable[..., Any], run: Run) -> Callable[..., Any]:
    """Wrap OpenTAD's epoch; before the first one of a resumed run, put random states and loss scale back."""
    signature = inspect.signature(theirs)

    @functools.wraps(theirs)
    def train_one_epoch(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs).arguments
        run.scaler = bound.get("scaler")
        if run.resumed is not None:
            saved, run.resumed = run.resumed, None
            files.restore_run(saved, run.scaler, bound["logger"])
        return theirs(*args, **kwargs)

    return train_one_epoch
