"""What the commands print, word for word: the command lines of tests/words/ and how their output is written down.

`make words` writes the files again; tests/test_words.py compares them. What varies between machines is masked.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

from tensorkeep.cli import main
from tests.word_stage import kill, staged

WORDS = Path(__file__).parent / "words"

# in this order, in one folder (word_stage.py): what one case makes, later ones read
CASES = {
    "tensorkeep": [
        "inspct llama",
        "train language.yaml",
        "inspect",
        "inspect llama more",
        "inspect llama --tensor q",
        "inspect llama --tensors",
    ],
    "train": [
        "train language language.yaml --print-recipe",
        "train language language.yaml --out run",
        "train language language.yaml --out run",
        "train language language.yaml --out run --training.updates 6",
        "train language language.yaml --out run --resume never",
        "train language language.yaml --out aware --quantize-aware nf4 --training.updates 2",
        "train detection detection.yaml --out detector",
        "train detection missing.yaml --out detector",
        "train language language.yaml",
        "train language missing.yaml",
        "train language smollm2_qlor --out run",
        "train language run --out run",
        "train language language.yaml --out new --training.update 6",
        "train language language.yaml --quantize-aware q9",
    ],
    "inspect": ["inspect llama", "inspect run", "inspect missing", "inspect lama", "inspect empty", "inspect mine"],
    "convert": [
        "convert llama dcp --to dcp --dry-run",
        "convert llama wide --to hf --dtype fp32 --dry-run",
        "convert llama dcp --to dcp",
        "convert llama dcp --to dcp",
        "convert llama titan --to dcp --for torchtitan",
        "convert llama llama.gguf --to gguf",
        "convert run peft --to peft",
        "convert run whole --to hf",
        "convert llama out --to nothing",
        "convert llama mine --to hf --overwrite",
    ],
    "export": ["convert detector detector.pth --to pth --naming opentad", "convert run average --to peft --ema"],
    "diff": ["diff llama dcp", "diff llama uncertified", "diff llama missing"],
    "verify": ["verify llama", "verify run", "verify damaged", "verify uncertified", "verify missing"],
    "diagnose": ["diagnose llama", "diagnose damaged --reference llama", "diagnose missing"],
    "repair": [
        "repair uncertified repaired --reference llama",
        "repair uncertified repaired --reference llama --take-from-reference '*'",
        "repair damaged again --reference llama",
        "repair llama again --reference llama",
        "repair llama repaired",
        "repair missing repaired --reference llama",
    ],
    "merge": [
        "merge llama adapter merged",
        "merge llama adapter merged",
        "merge base adapter other",
        "merge base run int8 --to-bits int8 --calibrate many.jsonl",
        "merge aware codes --to-bits nf4",
        "merge base run out --to-bits nf4",
        "merge base run out --to-bits nf4 --calibrate texts.jsonl",
        "merge llama missing out",
        "merge llama adapter out --to-bits 5",
    ],
    "identify": ["identify llama", "identify missing"],
    "explain": ["explain K05", "explain K5", "explain Z99"],
    "prove": [
        "prove llama --tensor model.norm.weight",
        "prove llama --tensor model.nrm.weight",
        "prove llama --tensor a",
        "prove missing --tensor a",
    ],
    "sign": ["sign llama --key key.pem", "sign llama", "sign llama --key missing.pem", "sign missing --key key.pem"],
    "verify-signed": [
        "verify llama --key key.pub",
        "verify llama",
        "verify damaged --key key.pub --statement llama/identity.json",
        "verify dcp --key key.pub",
    ],
    "replay": ["replay run --steps 1..2", "replay run --steps 9", "replay missing", "replay missing --steps 1..2"],
    "check": ["check detection detection.yaml", "check detection missing.yaml"],
    "eval": [
        "eval language run",
        "eval language base --data texts.jsonl",
        "eval language base",
        "eval language missing",
        "eval detection detector",
        "eval detection --annotations truth.json --detections found.json --tiou 0.5 0.7",
        "eval detection --annotations truth.json",
        "eval detection missing",
    ],
    "recipe": [
        "recipe list",
        "recipe show own_small",
        "recipe import opentad/adatad_s.py -o imported.yaml",
        "recipe import missing.py -o other.yaml",
        "recipe show nothing",
    ],
    "report": [
        "report run -o page.html",
        "report run -o page.html",
        "report compare run aware -o compare.html",
        "report run aware -o two.html",
        "report missing",
        "report missing -o missing.html",
        "report llama -o missing.html",
        "report compare missing missing2 -o missing.html",
    ],
    "watch": ["watch run", "watch killed", "watch missing", "watch llama"],
    "generate": [
        "generate run --prompt 'Who jumps?' --max-tokens 3",
        "generate base --adapter adapter --prompt hello",
        "generate peft --prompt hello",
        "generate missing",
        "generate missing --prompt hello",
    ],
    "annotate": [
        "annotate times.csv --videos data/videos -o annotations.json",
        "annotate times.csv --videos empty -o other.json",
        "annotate missing.csv --videos empty -o other.json",
    ],
    "features": [
        "features detector data/videos/validation_0000.mp4 -o features",
        "features detector data/videos/validation_0000.mp4 -o features",
        "features detector data/videos -o more",
        "features detector missing.mp4 -o features",
        "features detector empty -o features",
        "features missing.mp4",
        "features missing.mp4 -o features",
    ],
    "predict": [
        "predict detector data/videos/validation_0000.mp4 --out predicted",
        "predict detector data/videos/validation_0000.mp4 --out predicted",
        "predict detector data/videos/broken.mp4 --out other",
        "predict detector",
        "predict missing missing.mp4",
        "predict missing data/videos/validation_0000.mp4",
    ],
    "completion": ["completion bash", "completion nothing"],
    "demo": ["demo convert --out demo", "demo convrt", "demo convert --out mine"],
    "doctor": ["doctor"],
}
# command -> a line whose document of --json has the keys that docs/reference/exit-codes.md names; after the cases
DOCUMENTS = {
    "inspect": "inspect llama",
    "diff": "diff llama uncertified",
    "verify": "verify llama",
    "verify --key": "verify llama --key key.pub",
    "diagnose": "diagnose damaged --reference llama",
    "explain": "explain K05",
    "repair": "repair uncertified json-repaired --reference llama --take-from-reference '*'",
    "convert": "convert llama json-dcp --to dcp",
    "convert --dry-run": "convert llama out --to dcp --dry-run",
    "merge": "merge llama adapter json-merged",
    "merge --to-bits": "merge base run json-int8 --to-bits int8 --calibrate many.jsonl",
    "merge of a quantize-aware run": "merge aware json-codes --to-bits nf4",
    "identify": "identify llama",
    "prove": "prove llama --tensor model.norm.weight -o proof.json",
    "verify PROOF.json": "verify proof.json",
    "sign": "sign llama --key key.pem -o json-identity.json",
    "replay": "replay run --steps 1..2",
    "check detection": "check detection detection.yaml",
    "train": "train language language.yaml --out run",
    "train --print-recipe": "train detection detection.yaml --print-recipe",
    "watch": "watch killed",
    "eval language": "eval language run",
    "eval detection RUN": "eval detection detector",
    "eval detection --errors": "eval detection --annotations truth.json --detections found.json --errors 0.5",
    "recipe list": "recipe list",
    "recipe show": "recipe show own_small",
    "recipe import": "recipe import opentad/adatad_s.py -o json-recipe.yaml",
    "report": "report run -o json-page.html",
    "generate": "generate run --prompt hello --max-tokens 1",
    "annotate": "annotate times.csv --videos data/videos -o json-annotations.json",
    "features": "features detector data/videos/validation_0000.mp4 -o features",
    "predict": "predict detector data/videos/validation_0000.mp4 --out json-predicted",
    "doctor": "doctor",
    "an error": "inspect missing",
}
FIRST_LINES = {
    "completion bash": 3,
    "recipe show own_small": 8,
    "recipe import opentad/adatad_s.py -o imported.yaml": 16,
    "train language language.yaml --print-recipe": 8,
}

MASKS = [
    (r"(transformers|peft|PEFT) \d+(\.\d+)+", r"\1 <version>"),
    (r"\b[0-9a-f]{16,}\b", "<hash>"),
    (r"\b[\d,]+ (tokens|frames)/s", r"<rate> \1/s"),
    (r"\b[\d.]+ a second\b", "<rate> a second"),
    (r"\b\d+(\.\d+)? ?(ms|s|min)\b", "<time>"),
    (r"\b\d+(\.\d+)? ?(KB|MB|GB|KiB|MiB|GiB|kB)\b", "<size>"),
    (r"(?<![\w.])(loss|perplexity|grad norm)( +)\d[\d.e+]*(?![\w/])", r"\1\2<figure>"),
    (r"\b(average_mAP|mAP@[\d.]+) [\d.]+( %)?", r"\1 <figure>"),
    (r"[▁-█]{2,}", "<bars>"),
]
# of one command line: what else depends on arithmetic, which no two processors do alike, or on the machine
OWN_MASKS = {
    "merge base run int8": [
        (r"(?m)(squared: ).*", r"\1<layers>"),
        (r"(?m) {1,4}\d+\.\d+(e-\d+)?(?= {2,}|$| bits)", " <figure>"),
        (r" {1,2}[-\d.]+ %", " <figure> %"),
    ],
    "eval detection detector": [(r" {1,4}\d+\.\d\d\b", " <figure>"), (r"\d+ detections", "<count> detections")],
    "predict detector data/videos/validation": [
        (r"(8\.00 +\d+) +\d+ +\d+ +\d\.\d+", r"\1 <count> <count> <figure>"),
        (r"the best is [\d.e-]+", "the best is <figure>"),
    ],
    "watch killed": [(r"process \d+ of \S+", "process <number> of <host>")],
    "generate run": [(r"\A(?!\d tokens).*\n", "<text>\n")],
    "demo": [(r" +\d+\.\d s ", " <time> ")],
    "doctor": [
        (r"\Atensorkeep .*\n", "tensorkeep <version>, Python <version> (<place>), <platform>\n"),
        (r"(?m)^(  (?:safetensors|numpy) +)\S+ +", r"\1<version> "),
        (r"(?ms)^(machine\n).*?(^\Z|^(?:advice|\d+ packages))", r"\1  <this machine>\n\n\2"),
    ],
}


class Printed(NamedTuple):
    """By command: the text of its file in tests/words/; and the documents of `DOCUMENTS`, as they were printed."""

    words: dict[str, str]
    documents: dict[str, str]


def printed(folder: Path, documents: bool = True) -> Printed:
    """Run every command line in an empty folder, and give what each printed."""
    told: dict[str, str] = {}
    made: dict[str, str] = {}
    with staged(folder):
        for name, lines in CASES.items():
            if name == "watch":
                kill(Path("run"), Path("killed"))
            told[name] = "\n".join(_shown(line, folder) for line in lines)
        made = {name: _run(f"{line} --json")[1] for name, line in DOCUMENTS.items()} if documents else {}
    return Printed(told, made)


def _run(line: str) -> tuple[object, str, str]:
    """Exit code, stdout and stderr of a command line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code: object = main(shlex.split(line))
        except SystemExit as ended:
            code = ended.code
    return code, out.getvalue(), err.getvalue()


def _shown(line: str, folder: Path) -> str:
    """A command line with what it printed, masked."""
    code, out, err = _run(line)
    masks = [mask for start, own in OWN_MASKS.items() if line.startswith(start) for mask in own]
    parts = [f"$ tensorkeep {line}"]
    for name, stream in (("stdout", out), ("stderr", err)):
        text = stream.replace(str(folder), "<folder>")
        for pattern, mask in (*masks, *MASKS):
            text = re.sub(pattern, mask, text)
        rows = [row.rstrip() for row in text.splitlines()]
        if name == "stdout" and (most := FIRST_LINES.get(line)):
            rows = [*rows[:most], "..."]
        parts += [f"--- {name}", *rows] if text else []
    return "\n".join([*parts, f"--- exit {code}", ""])


if __name__ == "__main__":
    for command, text in printed(Path(sys.argv[1]).resolve(), documents=False).words.items():
        (WORDS / f"{command}.txt").write_text(text, encoding="utf-8")
