"""Make the detector of a recipe, for training or from a checkpoint: build it, load weights, quantize.

Where the backbone is frozen, checkpoints hold only what trains; the rest is their *base*, which they name by digest.
It comes from the pretrained file again at every start. What no file holds (a random backbone, the frozen projections of
QLoRA adapters) is written once into RUN/base, since random numbers may differ between versions of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from tensorkeep.conversion.naming.opentad import DEQUANTIZED
from tensorkeep.conversion.naming.opentad_recipe import FILE
from tensorkeep.conversion.plan import Plan
from tensorkeep.conversion.planning import make_plan
from tensorkeep.conversion.streams import write_tensor
from tensorkeep.detection.model.config import DetectorConfig, is_added, without_updates
from tensorkeep.detection.model.detector import Detector, read_detector_config
from tensorkeep.detection.model.quantization import quantize_adapters, quantize_backbone
from tensorkeep.detection.model.weights import load_backbone, load_exactly, stored_tensor
from tensorkeep.detection.recipe.schema import DetectionRecipe
from tensorkeep.detection.recipe.text import read_recipe
from tensorkeep.diagnosis.identity.demand import demand, split_demand
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.memory import digest_of
from tensorkeep.formats.view import read
from tensorkeep.storage import run_folder
from tensorkeep.storage.certificate import digest_of_all
from tensorkeep.storage.files import absent
from tensorkeep.storage.placement import replacing, write_bytes
from tensorkeep.storage.record import DTYPES
from tensorkeep.storage.yaml_documents import parse_yaml
from tensorkeep.training import distributed
from tensorkeep.training import saver as checkpoint
from tensorkeep.training.distributed import World
from tensorkeep.training.ema import Ema
from tensorkeep.training.live_state import put_tensors
from tensorkeep.training.randomness import derive
from tensorkeep.training.saver import State
from tensorkeep.training.schema import from_mapping

Remark = Callable[[str], None]
BASE, _FROZEN, RECIPE = "base", "frozen.safetensors", "recipe.yaml"


def make_detector(
    recipe: DetectionRecipe, run: Path | None, world: World | None = None, remark: Remark = lambda _: None
) -> tuple[Detector, dict[str, Any] | None]:
    """Make the detector that a run starts from: random from the recipe's seed, pretrained weights, then quantized.

    The process's random state is left alone.

    Args:
        recipe: the run's recipe.
        run: the run's folder, where frozen weights that no file holds are read or written; None: nowhere.
        world: the processes of the run; the detector is put on its device.
        remark: gets a line about the pretrained weights.

    Returns:
        The detector, and its base `{"digest", "path"}`; None where checkpoints hold all weights.

    Raises:
        TensorkeepError: The pretrained weights are not those that are demanded (F03) or do not fit, or the run's frozen
            weights are gone.
    """
    world = world or World()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(recipe.training.seed, 0))
        detector = Detector(recipe.model)
    source, wanted = split_demand(recipe.training.pretrained or "")
    if source and detector.backbone is not None:
        if wanted is not None:
            distributed.from_first(world, lambda: demand(source, wanted))
        left = load_pretrained(detector, source)
        remark(f"{source}: the backbone's weights, {len(left)} tensors left out" + _few(left))
    elif recipe.model.backbone is not None and recipe.model.backbone.tuning != "all":
        remark(random_backbone(recipe.model.backbone.kind))
    base = _base(detector, recipe, run, world)
    if detector.backbone is not None:
        if recipe.training.quantize_backbone is not None:
            quantize_backbone(detector.backbone, recipe.training.quantize_backbone)
        quantize_adapters(detector.backbone)
    return detector.to(world.device), base


def random_backbone(kind: str) -> str:
    """Say that a frozen backbone has random weights, and where others come from.

    Args:
        kind: of the backbone.
    """
    return (
        f"note: the backbone is frozen at RANDOM weights, since training.pretrained names none (a {kind} file, "
        "transformers' folder of one, or a run whose backbone trained)"
    )


def check_pretrained(recipe: DetectionRecipe) -> str | None:
    """Say whether a recipe's backbone has random weights; its pretrained file is read for names and shapes alone.

    Args:
        recipe: its data are not looked at.

    Returns:
        A line on random weights; None where there is nothing to say.

    Raises:
        TensorkeepError: The pretrained file is not there, or does not fit the backbone.
    """
    backbone = recipe.model.backbone
    if backbone is None:
        return None
    if recipe.training.pretrained is None:
        return random_backbone(backbone.kind) if backbone.tuning != "all" else None
    with torch.device("meta"):
        load_pretrained(Detector(recipe.model), recipe.training.pretrained, shapes_only=True)
    return None


def _few(names: list[str]) -> str:
    """List the first three names in parentheses."""
    return f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""


def load_pretrained(detector: Detector, path: str, shapes_only: bool = False) -> list[str]:
    """Load pretrained weights into the backbone, in place.

    Args:
        detector: one with a backbone.
        path: a VideoMAE file in any of its namings, a detector's file, or a run of ours, whose average is taken where
            it has one.
        shapes_only: compare names and shapes; the detector is on the meta device.

    Returns:
        Names of the file that a backbone has no place for.

    Raises:
        TensorkeepError: A weight is missing or of another shape, or the run's checkpoints hold adapters alone.
    """
    assert detector.backbone is not None
    state = _state_of(Path(path), best=True)
    if state is None:
        view = read(path)
        if not any(name.startswith(("backbone.blocks.", "backbone.layers.")) for name in view):
            return load_backbone(detector.backbone, path, shapes_only=shapes_only)
        tensors: Mapping[str, Tensor] = {name: stored_tensor(view, name, shapes_only) for name in view}
    else:
        if state.base is not None:
            what = "its checkpoints hold adapters alone, not a backbone"
            raise TensorkeepError(what, where=path, hint="name the weights that it was trained on")
        tensors = state.model | {name: t for name, t in state.ema.items() if name in state.model}
    own = {n.removeprefix("backbone."): tensor for n, tensor in tensors.items() if n.startswith("backbone.")}
    load_backbone(detector.backbone, own, str(path))
    return sorted(n for n in tensors if not n.startswith("backbone."))


# -- the base ---------------------------------------------------------------------------------------------------------


def _base(detector: Detector, recipe: DetectionRecipe, run: Path | None, world: World) -> dict[str, Any] | None:
    """Return the base by digest, after the part of it that no file holds was read from or written into RUN/base."""
    backbone = recipe.model.backbone
    if backbone is None or backbone.tuning == "all":
        return None
    frozen = {name: p for name, p in detector.named_parameters() if not p.requires_grad}
    new = {name: p for name, p in frozen.items() if recipe.training.pretrained is None or _is_new(name)}
    if run is not None and new:
        place = run / BASE / _FROZEN
        going = any(distributed.gathered(world, bool(run_folder.steps(run))))  # on any host; nobody writes before
        if going:
            distributed.together(world, lambda: _read_frozen(new, place))
        elif world.makes:
            _write_frozen(new, place)
        distributed.gathered(world, None)
    digest = digest_of_all({name: digest_of(p.detach()) for name, p in frozen.items()})
    return {"digest": digest, "path": split_demand(recipe.training.pretrained or "")[0] or f"{BASE}/{_FROZEN}"}


def _is_new(name: str) -> bool:
    """Return whether a frozen weight of the backbone is in no pretrained file."""
    return is_added(name) or "fc_norm" in name.split(".")


def _read_frozen(new: Mapping[str, torch.nn.Parameter], place: Path) -> None:
    """Read the run's frozen weights back into the detector."""
    if not place.is_file():
        hint = "copy it from where the run was started, with the rest of the run"
        raise TensorkeepError("the frozen weights of the run are gone", where=place, code="F05", hint=hint)
    view = read(place)
    differing = sorted(set(view) ^ set(new))
    if differing:
        what = f"holds other weights than the recipe freezes: {', '.join(differing[:4])} ({len(differing)})"
        raise TensorkeepError(what, where=place, code="K01", hint="resume with the run's own recipe.yaml")
    with torch.no_grad():
        for name, parameter in new.items():
            parameter.copy_(view.tensor(name))


def _write_frozen(new: Mapping[str, torch.nn.Parameter], place: Path) -> None:
    """Write the run's frozen weights."""
    place.parent.mkdir(parents=True, exist_ok=True)
    data = save({name: p.detach().cpu().contiguous() for name, p in new.items()})
    with replacing(place, overwrite=True) as temporary:
        write_bytes(temporary, data)


# -- from a checkpoint ------------------------------------------------------------------------------------------------


class Opened(NamedTuple):
    """A trained detector and what it was made of.

    Attributes:
        detector: in evaluation mode.
        recipe: the recipe it belongs to.
        step: update of the run whose weights were taken; None: the weights are of no run of ours.
        averaged: whether the averaged weights were taken.
    """

    detector: Detector
    recipe: DetectionRecipe
    step: int | None
    averaged: bool


def open_detector(
    path: str | Path,
    recipe: str | Path | None = None,
    ema: bool = True,
    best: bool = True,
    world: World | None = None,
    changes: tuple[tuple[str, str], ...] = (),
    remark: Remark = lambda _: None,
) -> Opened:
    """Open a trained detector.

    Args:
        path: a run, a step folder of a run, or a checkpoint from elsewhere (OpenTAD's too).
        recipe: the recipe it belongs to; None: the run's own, while a checkpoint from elsewhere needs one.
        ema: whether the averaged weights are taken, where there are some.
        best: whether a run's best checkpoint is taken; else its newest.
        world: the detector is put on its device; None: the CPU.
        changes: (name, value) pairs to change in the recipe, as on the command line.
        remark: gets a line for each checkpoint that was skipped.

    Returns:
        The detector in evaluation mode, and what it was made of.

    Raises:
        TensorkeepError: There is no checkpoint, or it and the recipe do not fit together (A04: another base).

    Example:
        >>> open_detector("runs/one").detector.training  # doctest: +SKIP
        False
    """
    path, world = Path(path), world or World()
    run = run_of(path)
    state = _state_of(path, best, remark)
    if state is None or run is None:
        return _from_elsewhere(path, recipe, ema, world, changes)
    made = read_recipe(recipe or run / RECIPE, changes)
    detector, base = make_detector(made, run, world)
    then, now = (state.base or {}).get("digest"), (base or {}).get("digest")
    if then != now:
        raise TensorkeepError(
            f"was trained on the base {then}, the recipe gives {now}",
            where=path,
            code="A04",
            hint=f"training.pretrained must name the weights it was trained on, now {made.training.pretrained}",
        )
    put_tensors(detector, state.model, base=base is not None)
    averaged = ema and bool(state.ema)
    if averaged:
        average = Ema(detector)
        average.load_state_dict(state.ema, state.document["ema"]["updates"])
        with torch.no_grad():
            for name, parameter in detector.named_parameters():
                if name in average.tensors:
                    parameter.copy_(average.tensors[name])
    return Opened(detector.eval(), made, int(state.document["step"]), averaged)


def run_of(path: Path) -> Path | None:
    """Return the run that a path means: itself, or the one that a step folder lies in; None where there is none."""
    for place in (path, path.parent.parent):
        if (place / run_folder.CHECKPOINTS).is_dir() and (place / RECIPE).is_file():
            return place
    return None


def _state_of(path: Path, best: bool, remark: Remark = lambda _: None) -> State | None:
    """Load the checkpoint that a path means; None where it is none of ours."""
    run = run_of(path)
    if run is None:
        return None
    if path.resolve() != run.resolve():
        return checkpoint.load(path)
    step = checkpoint.best(run) if best else None
    if step is not None:
        return checkpoint.load(run_folder.folder_of(run, step))
    found = checkpoint.newest(run)
    if found is None:
        raise TensorkeepError("the run holds no checkpoint", where=run, hint="train it first")
    for finding in found[2]:
        remark(f"skipped: {finding.code} {finding.message}")
    return found[0]


def _from_elsewhere(
    path: Path, recipe: str | Path | None, ema: bool, world: World, changes: tuple[tuple[str, str], ...]
) -> Opened:
    """Open a checkpoint that is no run of ours."""
    if not path.exists():
        raise absent(path)
    if recipe is None:
        hint = "add --recipe RECIPE.yaml, the recipe it was trained with (`tensorkeep recipe import` makes one)"
        raise TensorkeepError("is not a run of tensorkeep, and no recipe is named", where=path, hint=hint)
    made = read_recipe(recipe, changes)
    view = read(path)
    averaged = ema and any(name.split(".")[0] == "state_dict_ema" for name in view)
    detector = load_detector(path, recipe, average=averaged)
    codes = made.training.quantize_backbone if DEQUANTIZED not in view.entries else None  # they are on its grid already
    if detector.backbone is not None and codes is not None:
        quantize_backbone(detector.backbone, codes)
    return Opened(detector.to(world.device).eval(), made, None, averaged)


def load_detector(path: str | Path, recipe: str | Path | None = None, average: bool = False) -> Detector:
    """Load the detector of a checkpoint of any format and naming, OpenTAD's included.

    Args:
        path: the checkpoint.
        recipe: tells the detector's shape; None: the `recipe.yaml` beside the weights does, or else their shapes.
        average: whether the average of an OpenTAD checkpoint is taken, which is what OpenTAD evaluates.

    Returns:
        The detector on the CPU, in evaluation mode.

    Raises:
        TensorkeepError: The checkpoint cannot be read, or does not fit the recipe.

    Example:
        >>> detector = load_detector("epoch_59.pth", "adatad_thumos_videomae_s.yaml", average=True)  # doctest: +SKIP
    """
    plan = make_plan([read(path)], "hf", drop=["^state_dict"] if average else [])
    config = read_detector_config(recipe) if recipe is not None else _own_config(plan, str(path))
    if not any(tensor.name.endswith(".lora_A") for tensor in plan.tensors):
        config = without_updates(config)  # a checkpoint that was made whole has them in its linears
    detector = Detector(config)
    load_exactly(detector, _tensors(plan), str(path))
    return detector.eval()


def _own_config(plan: Plan, where: str) -> DetectorConfig:
    """Return the shape that the plan's own recipe gives: the one beside the weights, or made from their shapes."""
    found = next((c for c in plan.companions if c.name == FILE), None)
    if found is None:
        raise TensorkeepError(
            "no recipe.yaml lies beside the weights", where=where, hint="give the recipe they were trained with"
        )
    document = parse_yaml(found.data, found.where)
    section = document.get("model") if isinstance(document, Mapping) else None
    return from_mapping(DetectorConfig, {} if section is None else section, f"{found.where}: model")


def _tensors(plan: Plan) -> dict[str, Tensor]:
    """Make every tensor of the plan in memory."""
    made: dict[str, Tensor] = {}
    for step in plan.steps:
        if step.sink is None:
            continue
        dtype = getattr(torch, str(DTYPES[step.sink.dtype].torch), None)
        if dtype is None:
            raise TensorkeepError(f"torch has no dtype for {step.sink.dtype}", where=step.sink.name)
        data = bytearray()
        write_tensor(step, plan.sources, data.extend)
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        made[step.sink.name] = flat.reshape(step.sink.shape)
    return made
