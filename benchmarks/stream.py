"""A corpus tokenized beforehand, and while it is read (`data.streaming`): tokens a second, memory, and 100 GB on paper.

    python -m benchmarks.stream [--tokenizer FOLDER] [--megabytes 64] [--folder DIR]

The texts are the documentation and source of this package, mixed and repeated up to the size, as JSON lines; the
tokenizer a byte-level BPE of 16,384 tokens made of them. *cache*: the token cache is made, by one process. *stream*:
rows of 2048 tokens (`concatenate`, a buffer of 1,000 documents) are taken as a run takes them, with so many workers.
*first row*: until the first is there. *resume*: the same at the position of the last row. *two ranks*: the tokens that
each of two ranks tokenized beside those it was given. Memory is anonymous memory of process and workers above the
start. CPU seconds count the process and, once they have ended, its workers.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import anonymous, versions

LENGTH = 2048


def write(path: Path, size: int) -> None:
    """Write texts as JSON lines, at least `size` bytes."""
    root = Path(__file__).parent.parent
    found = [p.read_text() for p in (*root.glob("docs/**/*.md"), *root.glob("src/**/*.py"))]
    pieces = [text[at : at + 3000] for text in found for at in range(0, len(text), 3000)]
    chance, held = random.Random(0), 0
    with path.open("w") as file:
        while held < size:
            held += file.write(json.dumps({"text": chance.choice(pieces) + chance.choice(pieces)}) + "\n")


def tokenizer_at(place: str | None, file: Path) -> Any:
    """The tokenizer of a folder, or a byte-level BPE of 16,384 tokens made of the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if place is not None:
        return PreTrainedTokenizerFast.from_pretrained(place)
    made: Any = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1 << 14, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    with file.open() as lines:
        made.train_from_iterator((json.loads(line)["text"] for line, _ in zip(lines, range(1000))), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")


def recipe(file: Path, streaming: bool, workers: int) -> Any:
    """A recipe whose data section is measured."""
    from tensorkeep.language.recipe_text import language_recipe

    data = {
        "files": str(file),
        "length": LENGTH,
        "packing": "concatenate",
        "streaming": streaming,
        "shuffle_buffer": 1000,
    }
    training = {"updates": 1, "batch_size": 8, "workers": workers}
    return language_recipe({"version": 2, "model": "none", "data": data, "training": training})


def cpu() -> float:
    """CPU seconds of this process and of the children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


class Family:
    """Samples the anonymous memory of this process and its children."""

    def __init__(self) -> None:
        self.before = self.peak = anonymous(os.getpid())
        self.going = True
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _look(self) -> None:
        while self.going:
            own = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
            total = anonymous(os.getpid())
            for child in own:
                try:
                    total += anonymous(int(child))
                except (OSError, StopIteration):
                    continue
            self.peak = max(self.peak, total)
            time.sleep(0.05)

    def end(self) -> int:
        self.going = False
        self.thread.join()
        return self.peak - self.before


def made(file: Path, tokenizer: Any, run: Path, streaming: bool, workers: int) -> Any:
    from tensorkeep.language._data import make_data
    from tensorkeep.training.distributed import World

    asked = recipe(file, streaming, workers)
    return make_data(asked, asked.data, tokenizer, len(tokenizer), run, World(), lambda _: None)


def stream(file: Path, tokenizer: Any, run: Path, workers: int, rows: int) -> tuple[list[str], Any]:
    """Take rows of a stream, then the first ones at its end."""
    from tensorkeep.training.batches import Positions

    data, watch = made(file, tokenizer, run, True, workers), Family()
    begun, spent = time.perf_counter(), cpu()
    flow = data.rows(Positions(0, rows // 8, 8, 0, 1), workers)
    tokens = len(next(flow)["input_ids"])
    first = time.perf_counter() - begun
    tokens += sum(len(row["input_ids"]) for row in flow)
    seconds, flow = time.perf_counter() - begun, None  # its workers end
    spent = cpu() - spent
    data.note(rows)
    state, begun = data.state_at(rows), time.perf_counter()
    again = made(file, tokenizer, run, True, workers)
    again.go_to(state)
    next(again.rows(Positions(rows, 1, 8, 0, 1), workers))
    resumed = time.perf_counter() - begun
    rate = tokens / seconds
    return [
        f"{tokens / spent / 1e6:.2f}",
        f"{rate / 1e6:.2f}",
        f"{first:.1f}",
        f"{resumed:.1f}",
        f"{watch.end() / 1e6:.0f}",
    ], rate


def two_ranks(file: Path, tokenizer: Any, run: Path, rows: int) -> list[float]:
    """How many tokens each of two ranks makes for every token that it is given."""
    from collections import Counter

    from tensorkeep.language._data import TextReader
    from tensorkeep.training.batches import Positions

    out = []
    for rank in range(2):
        data, count = made(file, tokenizer, run, True, 0), Counter[str]()
        real = TextReader.encode

        def counting(self: Any, records: Any, real: Any = real, count: Any = count) -> Any:
            found = real(self, records)
            count["made"] += sum(len(one.ids) for one in found[0])
            return found

        TextReader.encode = counting  # type: ignore[method-assign]
        given = sum(len(r["input_ids"]) for r in data.rows(Positions(0, rows // 8, 8, rank, 2), 0))
        TextReader.encode = real  # type: ignore[method-assign]
        out.append(count["made"] / given)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer")
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        file = Path(place) / "a.jsonl"
        write(file, options.megabytes << 20)
        size, tokenizer = file.stat().st_size, tokenizer_at(options.tokenizer, file)
        begun, spent, watch = time.perf_counter(), cpu(), Family()
        data = made(file, tokenizer, Path(place) / "run", False, 0)
        seconds, spent, tokens = time.perf_counter() - begun, cpu() - spent, len(data.tokens.ids)
        print(versions("torch", "tokenizers"), f"{size / 1e6:.0f} MB, {size / tokens:.2f} bytes a token", sep="; ")
        head = ("way", "M tokens a CPU second", "M tokens/s", "first row s", "resume s", "memory MB")
        print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
        rates = f"{tokens / spent / 1e6:.2f} | {tokens / seconds / 1e6:.2f}"
        print(f"| cache | {rates} | {seconds:.1f} | | {watch.end() / 1e6:.0f} |", flush=True)
        rows = min(tokens // LENGTH, 4096) // 8 * 8
        for workers in (0, 1, 2):
            cells, _ = stream(file, tokenizer, Path(place) / "run", workers, rows)
            print(f"| stream, {workers} workers | {' | '.join(cells)} |", flush=True)
        ratios = ", ".join(f"{r:.2f}" for r in two_ranks(file, tokenizer, Path(place) / "run", rows // 2))
        print(f"two ranks: {ratios} tokens made for each that is given (the buffer of one start included)")
        hundred = 100e9 / (size / tokens)
        bytes_ = hundred * (2 if len(tokenizer) <= 1 << 16 else 4) / 1e9
        print(
            f"100 GB on paper: {hundred / 1e9:.0f} G tokens, {hundred / (tokens / spent) / 3600:.1f} hours of one core;"
        )
        print(f"the cache is {bytes_:.0f} GB, a stream keeps nothing on the disk")


if __name__ == "__main__":
    main()
