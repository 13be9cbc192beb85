"""OpenTAD's unmodified `tools/train.py` and `tools/test.py` under `tensorkeep.integrations.opentad`, on a CPU.

`python -m tests.parity.opentad_guest OPENTAD PYTHON DIR [--learn]`: its checkout, the interpreter of its environment,
and a new folder for synthetic videos and the runs. One line a case, PASS or FAIL; exit code 1 where any fails.
The last cases are controls: the same runs of OpenTAD without us. `--learn` adds 2,100 updates (10 minutes).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from tensorkeep.conversion.naming.opentad import from_hf
from tensorkeep.detection.data.synthetic import SyntheticConfig, make_dataset
from tensorkeep.detection.model.config import VitConfig
from tensorkeep.detection.model.vit import VisionTransformer
from tensorkeep.detection.results.evaluation import evaluate_files
from tensorkeep.diagnosis.verification import verify
from tensorkeep.formats.view import read
from tensorkeep.quantization.linear import QuantLinear
from tensorkeep.storage.files import left_over
from tests.parity.opentad_guest.runs import HERE, OURS, Guest, checkpoint, configured, different, run

TRAIN, TEST = "tools/train.py", "tools/test.py"
QLORA = 'dict(type="VisionTransformerQLoRA", lora_r=8)'
EIGHT = 'dict(type="VisionTransformerQLoRA", lora_r=8, quantize_bits=8, quantize_backbone=True)'
PLAIN = 'dict(type="VisionTransformerQLoRA", use_plain_adapter=True)'
STOCK = 'dict(type="VisionTransformerAdapter")'
BNB = 'dict(type="VisionTransformerBnb", adapter_mlp_ratio=1.0)'  # bitsandbytes' CPU kernel asks for sides of 64
SAME_AS_BNB = 'dict(type="VisionTransformerQLoRA", lora_r=8, lora_alpha=8, adapter_mlp_ratio=1.0)'
EVALUATED = "Average-mAP"
SHORT = ("--cfg-options", "workflow.end_epoch=2")
Case = tuple[str, bool, str]


def trained_and_resumed(guest: Guest) -> Iterator[Case]:
    """QLoRA adapters in 4 bits through training, evaluation, SIGKILL and resume."""
    whole = run(guest, TRAIN, configured(guest, "whole", QLORA))
    count, figures = whole.log.count(EVALUATED), re.findall(r"\[Val\].*Loss=([\d.]+)", whole.log)
    yield (
        "trains and evaluates under the average each epoch",
        whole.code == 0 and count == 4,
        f"validation losses {figures}",
    )
    last = checkpoint(guest, "whole", 3)
    findings, view, certified = verify(last)
    size = 0 if view is None else len(view)
    yield (
        "the file is what its certificate says",
        certified and not findings,
        f"{size} tensors, {last.stat().st_size} bytes",
    )

    config = configured(guest, "unwatched", QLORA)
    off = ("workflow.val_eval_interval=-1", "workflow.val_loss_interval=-1")
    run(guest, TRAIN, config, "--cfg-options", *off)
    odd = different(last, checkpoint(guest, "unwatched", 3))
    yield "without evaluations training is bitwise the same", not odd, told(odd)

    config = configured(guest, "killed", QLORA)
    killed = run(guest, TRAIN, config, kill=lambda log: "[002][00001/" in log)
    at = checkpoint(guest, "killed", 1)
    odd = different(checkpoint(guest, "whole", 1), at)
    yield "SIGKILL in the third epoch leaves the second's file", killed.code == -9 and not odd, told(odd)
    resumed = run(guest, TRAIN, config, "--resume", at)
    odd = different(last, checkpoint(guest, "killed", 3))
    yield (
        "resumed: weights, average, moments, schedule, random states bitwise",
        resumed.code == 0 and not odd,
        told(odd),
    )

    config = configured(guest, "torn", QLORA)
    folder = checkpoint(guest, "torn", 1).parent
    killed = run(guest, TRAIN, config, kill=lambda log: folder.is_dir() and any(folder.glob(".epoch_1.pth.*")))
    torn, there = left_over(folder), checkpoint(guest, "torn", 1).exists()
    resumed = run(guest, TRAIN, config, "--resume", checkpoint(guest, "torn", 0))
    odd = different(last, checkpoint(guest, "torn", 3))
    fine = killed.code == -9 and bool(torn) and not there and resumed.code == 0 and not odd and not left_over(folder)
    yield (
        "SIGKILL inside a save: no half file, the next run clears up, ends bitwise",
        fine,
        f"{len(torn)} torn, {told(odd)}",
    )

    tested = run(guest, TEST, configured(guest, "tested", QLORA), "--checkpoint", last)
    same = results(guest, "whole") == results(guest, "tested")
    yield (
        "tools/test.py with the file gives what was evaluated in training",
        tested.code == 0 and same,
        tested.complaint,
    )
    probed = run(guest, str(HERE / "probe.py"), guest.folder / "whole" / "config.py", last)
    found = re.search(r"PROBE (.*)", probed.log)
    figure = json.loads(found[1]) if found else {"logits": 1.0, "offsets": 1.0}
    close = max(figure["logits"], figure["offsets"]) < 1e-5
    yield "our own detector with the saved average gives the same", close, found[1] if found else probed.complaint

    spoil(at)
    refused = run(guest, TRAIN, guest.folder / "killed" / "config.py", "--resume", at)
    yield (
        "a damaged file is refused before torch reads it",
        refused.code == 1 and "F03" in refused.log,
        first_error(refused.log),
    )


def other_forms(guest: Guest) -> Iterator[Case]:
    """8 bits over a quantized pretrained backbone, and the plain adapter: trained, resumed, compared."""
    pretrained = guest.folder / "pretrained.pth"
    vit = VisionTransformer(VitConfig(image_size=32, embed_dim=64, depth=2, heads=2, mlp_dim=256))
    floats = {f"backbone.{n}": t for n, t in vit.state_dict().items()}
    torch.save({"state_dict": {from_hf(n, backbone_only=True): t for n, t in floats.items()}}, pretrained)
    for name, backbone, pretrain in (("eight", EIGHT, repr(str(pretrained))), ("plain", PLAIN, "None")):
        config = configured(guest, name, backbone, pretrain=pretrain)
        whole = run(guest, TRAIN, config, *SHORT)
        first = configured(guest, f"{name}_again", backbone, pretrain=pretrain)
        resumed = run(guest, TRAIN, first, "--resume", checkpoint(guest, name, 0), *SHORT)
        odd = different(checkpoint(guest, name, 1), checkpoint(guest, f"{name}_again", 1))
        fine = whole.code == resumed.code == 0 and whole.log.count(EVALUATED) == 2 and not odd
        yield f"form {name}: evaluates, resumes bitwise", fine, told(odd) if not resumed.code else resumed.complaint
    view = read(checkpoint(guest, "eight", 1))
    stored = "state_dict.module.backbone.model.backbone.blocks.1.mlp.layers.0.0.weight"
    codes = QuantLinear.of(vit.blocks[1].mlp.fc1, "int8").weight  # type: ignore[union-attr, arg-type]
    yield (
        "pretrained floats became codes as they were loaded",
        torch.equal(view.tensor(stored), codes),
        view[stored].dtype,
    )


def to_and_fro(guest: Guest) -> Iterator[Case]:
    """Files between OpenTAD with and without us, and what OpenTAD alone makes of the same."""
    stock = run(guest, TRAIN, configured(guest, "stock", STOCK, []))
    into = configured(guest, "stock_in", STOCK)
    taken = run(guest, TRAIN, into, "--resume", checkpoint(guest, "stock", 1))
    said = "R01 the file is OpenTAD's own" in taken.log
    yield "OpenTAD's own file goes on under us", stock.code == taken.code == 0 and said, taken.complaint
    back = run(guest, TRAIN, configured(guest, "stock_back", STOCK, []), "--resume", checkpoint(guest, "stock_in", 2))
    yield "our file goes on in OpenTAD without us", back.code == 0, back.complaint
    tried = run(guest, TRAIN, configured(guest, "bnb", BNB, [OURS, "bnb_backbone"]), *SHORT)
    count = tried.log.count(EVALUATED)
    yield "bitsandbytes adapters evaluate under our average", tried.code == 0 and count == 2, tried.complaint

    config = configured(guest, "bnb_ours", SAME_AS_BNB)
    tested = run(guest, TEST, config, "--checkpoint", checkpoint(guest, "bnb", 1))
    same = tested.code == 0 and results(guest, "bnb") == results(guest, "bnb_ours")
    yield "their file loads strictly into our backbone and detects the same", same, tested.complaint

    alone = run(guest, TRAIN, configured(guest, "bnb_alone", BNB, ["bnb_backbone"]), *SHORT)
    failed = alone.code == 1 and "Unexpected key(s) in state_dict" in alone.log
    yield "control: without us they fail at the first validation", failed, first_error(alone.log)
    again = run(guest, TRAIN, configured(guest, "stock_again", STOCK, []), "--resume", checkpoint(guest, "stock", 1))
    odd = different(checkpoint(guest, "stock", 3), checkpoint(guest, "stock_again", 3))
    yield "control: OpenTAD's own resume is another run", again.code == 0 and len(odd) > 0, told(odd)


def learned(guest: Guest) -> Iterator[Case]:
    """Long enough for an average that detects: OpenTAD's figures for it against ours for its detections."""
    often = ("workflow.val_eval_interval=700", "workflow.checkpoint_interval=700", "workflow.val_loss_interval=-1")
    length = ("workflow.end_epoch=700", "scheduler.max_epoch=700")
    ended = run(guest, TRAIN, configured(guest, "learned", QLORA), "--cfg-options", *often, *length)
    theirs = [float(figure) for figure in re.findall(r"mAP at tIoU [\d.]+ is +([\d.]+)%", ended.log)]
    found = guest.folder / "learned" / "gpu1_id0" / "result_detection.json"
    ours = evaluate_files(guest.folder / "data" / "annotations.json", found, thresholds=[0.3, 0.4, 0.5, 0.6, 0.7])
    same = [round(100 * float(figure), 2) for figure in ours.map] == theirs
    yield "the average detects, and both score it alike", same and ours.average > 0.05, f"mAP {theirs} %"


def told(odd: list[str]) -> str:
    return f"{len(odd)} differ, {odd[0]} first" if odd else "all equal"


def first_error(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if re.search(r"Error\b.*:|Unexpected key", line)]
    return lines[-1][:200] if lines else ""


def results(guest: Guest, name: str) -> object:
    return json.loads((guest.folder / name / "gpu1_id0" / "result_detection.json").read_text())


def spoil(path: Path) -> None:
    """Flip one bit in the middle of a weight."""
    block = read(path)["state_dict.module.rpn_head.cls_head.weight"].blocks[0]
    data = bytearray(path.read_bytes())
    data[block.start + 2] ^= 1
    path.write_bytes(data)


def main(argv: list[str]) -> int:
    learn = argv[3:] == ["--learn"]
    if len(argv) != 3 + learn or not (Path(argv[0]) / TRAIN).is_file():
        print("usage: python -m tests.parity.opentad_guest OPENTAD PYTHON DIR [--learn]", file=sys.stderr)
        return 2
    guest = Guest(Path(argv[0]).resolve(), Path(argv[1]).absolute(), Path(argv[2]).resolve())
    shape = SyntheticConfig(size=32, seconds=(9.0, 11.0), actions=(2, 3))
    make_dataset(guest.folder / "data", videos=6, held_out=2, config=shape)
    parts: tuple[Callable[[Guest], Iterator[Case]], ...] = (trained_and_resumed, other_forms, to_and_fro)
    parts += (learned,) if learn else ()
    failed = 0
    for name, passed, said in (case for part in parts for case in part(guest)):
        failed += not passed
        print(f"{'PASS' if passed else 'FAIL'} {name}: {said}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
