"""What the commands print, word for word: the command lines of tests/words/ and how their output is written down.

`make words` writes the files again; tests/test_words.py compares them. What varies between machines is masked.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import sys
from pathlib import Path

from tensorkeep.cli import main

ROOT = Path(__file__).resolve().parents[1]
WORDS = ROOT / "tests" / "words"

# in this order, in one folder that starts with llama, adapter and an empty folder
CASES = {
    "inspect": ["inspect llama", "inspect missing", "inspect empty"],
    "convert": ["convert llama dcp --to dcp", "convert llama dcp --to dcp", "convert llama out --to nothing"],
    "diff": ["diff llama dcp", "diff llama missing"],
    "verify": ["verify llama", "verify dcp", "verify missing"],
    "diagnose": ["diagnose llama", "diagnose missing"],
    "repair": ["repair llama repaired", "repair missing repaired --reference llama"],
    "merge": ["merge llama adapter merged", "merge llama missing out", "merge llama adapter out --to-bits 5"],
    "identify": ["identify llama", "identify missing"],
    "explain": ["explain K05", "explain Z99"],
    "prove": [
        "prove llama --tensor model.norm.weight",
        "prove llama --tensor missing.weight",
        "prove missing --tensor a",
    ],
    "sign": ["sign llama", "sign missing"],
    "replay": ["replay missing", "replay missing --steps 1..2"],
    "check": ["check detection missing.yaml"],
    "eval": ["eval language missing", "eval detection missing"],
    "recipe": ["recipe list", "recipe show nothing"],
    "report": ["report missing", "report missing -o page.html", "report compare missing missing2 -o page.html"],
    "train": ["train language missing.yaml", "train language llama --quantize-aware q9"],
    "watch": ["watch missing", "watch llama"],
    "generate": ["generate missing", "generate missing --prompt hello"],
    "annotate": ["annotate missing.csv --videos empty -o annotations.json"],
    "features": ["features missing.mp4", "features missing.mp4 --out features"],
    "predict": ["predict missing missing.mp4"],
    "completion": ["completion nothing"],
}

MASKS = [
    (r"(transformers) \d+(\.\d+)+", r"\1 <version>"),
    (r"\b[0-9a-f]{16,}\b", "<hash>"),
    (r"\b\d+(\.\d+)? ?(ms|s|min)\b", "<time>"),
    (r"\b\d+(\.\d+)? ?(KB|MB|GB|KiB|MiB|GiB|kB)\b", "<size>"),
]


def written(folder: Path) -> dict[str, str]:
    """Run every command line in a folder, and give what each printed.

    Args:
        folder: an empty folder, where the commands run.

    Returns:
        By command: the text of its file in tests/words/.
    """
    shutil.copytree(ROOT / "examples" / "tiny-llama", folder / "llama")
    shutil.copytree(ROOT / "examples" / "tiny-adapter", folder / "adapter")
    (folder / "empty").mkdir()
    before = Path.cwd()
    os.chdir(folder)
    try:
        return {name: "\n".join(_shown(line, folder) for line in lines) for name, lines in CASES.items()}
    finally:
        os.chdir(before)


def _shown(line: str, folder: Path) -> str:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code: object = main(line.split())
        except SystemExit as ended:
            code = ended.code
    parts = [f"$ tensorkeep {line}"]
    for name, stream in (("stdout", out), ("stderr", err)):
        text = stream.getvalue().replace(str(folder), "<folder>")
        for pattern, mask in MASKS:
            text = re.sub(pattern, mask, text)
        parts += [f"--- {name}", *(row.rstrip() for row in text.splitlines())] if text else []
    return "\n".join([*parts, f"--- exit {code}", ""])


if __name__ == "__main__":
    for command, text in written(Path(sys.argv[1]).resolve()).items():
        (WORDS / f"{command}.txt").write_text(text, encoding="utf-8")
