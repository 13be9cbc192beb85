"""Hostile inputs by kind: files that would run code, take memory or time without bound, or are odd enough to crash.

`cases()` names them all; `Case.make(folder, base)` writes one into an empty folder and returns the commands that meet
it. `base` is the folder of a small sound model. Whatever would execute something touches CANARY in the current folder.
"""

from __future__ import annotations

import json
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from tests.hostile_texts import CONFIG_VALUES, JSON_TEXTS, OPENTAD, PICKLES, RECIPES, TEMPLATES

CANARY = "executed"
NAMES = (
    "config.json generation_config.json tokenizer.json tokenizer_config.json special_tokens_map.json "
    "added_tokens.json model.safetensors.index.json tensorkeep.json trainer_state.json preprocessor_config.json"
).split()
FIELDS = (
    "model_type architectures hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "intermediate_size vocab_size rope_theta rope_scaling rope_parameters rms_norm_eps tie_word_embeddings "
    "quantization_config torch_dtype max_position_embeddings attention_bias initializer_range hidden_act eos_token_id "
    "text_config layer_types auto_map transformers_version"
).split()
CONTROL = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202e"
Command = list[str]


class Case(NamedTuple):
    """One hostile input. `make(folder, base)` writes it and returns the commands to run in the folder."""

    kind: str
    name: str
    make: Callable[[Path, Path], list[Command]]


def cases(seed: int = 0) -> Iterator[Case]:
    """Name every case; `seed` decides what is drawn at random."""
    for name, body in PICKLES.items():
        yield Case("pickle", name, lambda d, b, body=body: _pickle(d, body()))
    for protocol in range(6):
        yield Case("code in a pickle", f"protocol {protocol}", lambda d, b, p=protocol: _execute(d, p))
    for name in NAMES:
        for what, text in JSON_TEXTS.items():
            yield Case("JSON", f"{name}: {what}", lambda d, b, n=name, t=text: _companion(d, b, n, t))
    rng = random.Random(seed)
    for field in FIELDS:
        for value in rng.sample(CONFIG_VALUES, 4):
            yield Case("config", f"{field} {str(value)[:20]}", lambda d, b, f=field, v=value: _config(d, b, f, v))
    for name, template in TEMPLATES.items():
        yield Case("chat template", name, lambda d, b, t=template: _template(d, b, t))
    for number in range(20):
        yield Case("tokenizer", str(number), lambda d, b, n=number: _tokenizer(d, b, seed * 100 + n))
    for name, header in HEADERS.items():
        yield Case("safetensors", name, lambda d, b, h=header: _safetensors(d, h))
    for name in ("x.pth", "x.bin", "x.gguf", "x.safetensors", "x/.metadata", "x/adapter_config.json"):
        yield Case("sparse file", name, lambda d, b, n=name: _sparse(d, n))
    for name, build in GGUF.items():
        yield Case("gguf", name, lambda d, b, g=build: _gguf(d, g))
    for name, text in RECIPES.items():
        yield Case("recipe", name, lambda d, b, t=text: _recipe(d, b, t()))
    for name, text in OPENTAD.items():
        yield Case("OpenTAD config", name, lambda d, b, t=text: _opentad(d, t))
    for number in range(30):
        yield Case("damaged", str(number), lambda d, b, n=number: _damaged(d, b, seed * 100 + n))
    for what, text in JSON_TEXTS.items():
        yield Case("document", what, lambda d, b, t=text: _document(d, t))
        yield Case("run", what, lambda d, b, t=text: _run(d, b, t))
    for name in ("a; touch executed", "$(touch executed)", "a\nb", f"x{CONTROL}", "'", "--json", "a b"):
        yield Case("name of a folder", repr(name)[:24], lambda d, b, n=name: _named(d, b, n))
    yield Case("names of tensors", "control codes", _tensor_names)
    for url in (
        "http://user:hunter2@127.0.0.1:1/m.safetensors?sig=hunter2",
        "ftp://user:hunter2@127.0.0.1:1/x",
        "nosuch://u:hunter2@h/x",
    ):
        yield Case("URL", url.partition(":")[0], lambda d, b, u=url: _url(b, u))


# -- commands that meet a checkpoint ----------------------------------------------------------------------------------


def _reads(path: str, base: Path) -> list[Command]:
    """Every command that opens a checkpoint."""
    return [
        ["inspect", path],
        ["verify", path],
        ["diagnose", path],
        ["diagnose", path, "--reference", str(base)],
        ["diff", path, str(base)],
        ["identify", path],
        ["convert", path, "out-pth", "--to", "pth"],
        ["convert", path, "out-hf", "--to", "hf"],
        ["repair", path, "out-repaired", "--reference", str(base)],
        ["merge", str(base), path, "out-merged"],
        ["generate", path, "--prompt", "a", "--max-tokens", "1"],
    ]


# -- makers -----------------------------------------------------------------------------------------------------------


def _pickle(folder: Path, body: bytes) -> list[Command]:
    with zipfile.ZipFile(folder / "x.pth", "w") as file:
        file.writestr("m/data.pkl", b"\x80\x02" + body + b".")
    return [["inspect", "x.pth"], ["verify", "x.pth"], ["diagnose", "x.pth"], ["convert", "x.pth", "o", "--to", "hf"]]


class _Touches:
    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (f"touch {CANARY}",)


def _execute(folder: Path, protocol: int) -> list[Command]:
    with zipfile.ZipFile(folder / "x.pth", "w") as file:
        file.writestr("m/data.pkl", pickle.dumps({"a": _Touches()}, protocol))
    (folder / "old.pth").write_bytes(pickle.dumps(_Touches(), protocol))
    (folder / "dcp").mkdir()
    (folder / "dcp" / ".metadata").write_bytes(pickle.dumps(_Touches(), protocol))
    return [
        [c, p] for p in ("x.pth", "old.pth", "dcp") for c in ("inspect", "verify", "diagnose", "generate --prompt a")
    ]


def _copy(base: Path, folder: Path) -> Path:
    """A copy of the base to spoil, called sick."""
    return Path(shutil.copytree(base, folder / "sick"))


def _write(path: Path, text: str | bytes | int) -> None:
    """Text, bytes, or so many bytes that take no room on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(text, int):
        with path.open("wb") as file:
            file.truncate(text)
    else:
        path.write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)


def _companion(folder: Path, base: Path, name: str, text: str | bytes | int) -> list[Command]:
    _write(_copy(base, folder) / name, text)
    return _reads("sick", base)


def _config(folder: Path, base: Path, field: str, value: Any) -> list[Command]:
    path = _copy(base, folder) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    return _reads("sick", base)


def _template(folder: Path, base: Path, template: str) -> list[Command]:
    _write(_copy(base, folder) / "chat_template.jinja", template)
    return [["generate", "sick", "--prompt", "a", "--max-tokens", "1"]]


def _tokenizer(folder: Path, base: Path, seed: int) -> list[Command]:
    """One value somewhere in tokenizer.json or tokenizer_config.json becomes another."""
    rng = random.Random(seed)
    path = _copy(base, folder) / rng.choice(["tokenizer.json", "tokenizer_config.json"])
    document = json.loads(path.read_text())
    holder = document
    for _ in range(rng.randint(1, 4)):
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = rng.choice(keys)
        if not isinstance(holder[key], dict | list) or not holder[key] or rng.random() < 0.3:
            break
        holder = holder[key]
    else:
        key = rng.choice(list(holder) if isinstance(holder, dict) else list(range(len(holder))))
    holder[key] = rng.choice([None, -1, 10**9, 10**30, "x", [], {}, 1.5, True, "\ud800", "a" * 10**6])
    path.write_text(json.dumps(document))
    return [["inspect", "sick"], ["diagnose", "sick"], ["generate", "sick", "--prompt", "a", "--max-tokens", "1"]]


def _header(text: str | bytes, data: bytes = b"") -> bytes:
    text = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(text)) + text + data


def _entry(shape: list[int], start: int = 0, end: int = 0, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HEADERS: dict[str, Callable[[], bytes]] = {
    "metadata": lambda: _header(json.dumps({"__metadata__": {str(i): "x" for i in range(60_000)}})),
    "deep": lambda: _header("[" * 500_000),
    "many empty": lambda: _header(json.dumps({f"t{i}": _entry([0]) for i in range(15_000)})),
    "experts": lambda: _header(
        json.dumps({f"model.layers.0.mlp.experts.{w}": _entry([10**12, 0, 4]) for w in ("gate_up_proj", "down_proj")})
    ),
    "rows of nothing": lambda: _header(
        json.dumps({f"model.layers.{i}.mlp.w.weight": _entry([2**61, 0]) for i in range(9)})
    ),
    "overflow": lambda: _header(json.dumps({"a": _entry([2**32, 2**32], 0, 0)})),
    "half": lambda: _header(json.dumps({"a": _entry([4], 0, 16), "b": _entry([4], 8, 24)}), bytes(24)),
    "names": lambda: _header(
        json.dumps({f"a{CONTROL}{i}": _entry([1], 4 * i, 4 * i + 4) for i in range(9)}), bytes(36)
    ),
    "layers": lambda: _header(json.dumps({f"model.layers.{10**i}.w": _entry([0]) for i in range(300)})),
    "length": lambda: struct.pack("<Q", 2**63) + b"{}",
    "brackets": lambda: _header("{" + ",".join(f'"{i}":[[],[],[],{{}}]' for i in range(50_000)) + "}"),
}


def _safetensors(folder: Path, header: Callable[[], bytes]) -> list[Command]:
    (folder / "x.safetensors").write_bytes(header())
    shutil.copy(folder / "x.safetensors", folder / "y.safetensors")
    commands = [["inspect"], ["verify"], ["diagnose"]]
    found = [[*c, "x.safetensors"] for c in commands] + [["diff", "x.safetensors", "y.safetensors"]]
    found += [["diagnose", "x.safetensors", "--reference", "y.safetensors"]]
    return found + [["convert", "x.safetensors", f"o-{t}", "--to", t] for t in ("hf", "pth", "dcp")]


def _sparse(folder: Path, name: str) -> list[Command]:
    """6 GB that take no room on the disk, behind a sound beginning."""
    _write(folder / name, 6 << 30)
    path = name.partition("/")[0]
    if "/" in name:
        save_file({"base_model.model.q.lora_A.weight": torch.ones(2, 2)}, folder / path / "adapter_model.safetensors")
    with (folder / name).open("r+b") as file:
        file.write({"x.gguf": b"GGUF\x03\0\0\0", "x.pth": b"PK\x03\x04", "x.bin": b"\x80\x02"}.get(name, b"{"))
    return [["inspect", path], ["verify", path], ["diagnose", path], ["convert", path, "o", "--to", "pth"]]


def _text(value: str | bytes) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def _pairs(pairs: list[tuple[str, int, bytes]], tensors: int = 0, keys: int | None = None) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, tensors, len(pairs) if keys is None else keys)
    return head + b"".join(_text(name) + struct.pack("<I", kind) + value for name, kind, value in pairs)


def _vocabulary(tokens: list[str], model: str = "llama", extra: list[tuple[str, int, bytes]] | None = None) -> bytes:
    strings = struct.pack("<IQ", 8, len(tokens)) + b"".join(_text(t) for t in tokens)
    scores = struct.pack("<IQ", 6, len(tokens)) + bytes(4 * len(tokens))
    pairs = [("general.architecture", 8, _text("llama")), ("tokenizer.ggml.model", 8, _text(model))]
    pairs += [("tokenizer.ggml.tokens", 9, strings), ("tokenizer.ggml.scores", 9, scores), *(extra or [])]
    return _pairs(pairs)


GGUF: dict[str, Callable[[], bytes]] = {
    "nested vocabulary": lambda: _vocabulary(["a" * (i + 1) for i in range(1024)]),
    "two letters": lambda: _vocabulary([format(i, "b").replace("0", "a").replace("1", "b") for i in range(1, 30_000)]),
    "long token": lambda: _vocabulary(["a" * 900_000, "b"]),
    "merges": lambda: _vocabulary(
        ["a", "aa"], "gpt2", [("tokenizer.ggml.merges", 9, struct.pack("<IQ", 8, 50_000) + _text("a a") * 50_000)]
    ),
    "layers": lambda: _pairs(
        [("general.architecture", 8, _text("llama")), *((f"llama.{k}", 10, struct.pack("<Q", 2**40)) for k in _COUNTS)]
    ),
    "counts": lambda: _pairs([], tensors=2**63, keys=2**63),
    "array": lambda: _pairs([("a", 9, struct.pack("<IQ", 0, 2**62))]),
    "arrays": lambda: _pairs([(f"a{i}", 9, struct.pack("<IQ", 0, 8000) + bytes(8000)) for i in range(120)]),
    "strings": lambda: _pairs([("a", 9, struct.pack("<IQ", 8, 120_000) + bytes(8 * 120_000))]),
    "control codes": lambda: _pairs([("general.architecture", 8, _text(CONTROL)), (f"k{CONTROL}", 8, _text(CONTROL))]),
    "template": lambda: _vocabulary(["a"], extra=[("tokenizer.chat_template", 8, _text("{{ 'a' * 10**11 }}"))]),
}
_COUNTS = (
    "block_count",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "expert_count",
    "context_length",
)


def _gguf(folder: Path, build: Callable[[], bytes]) -> list[Command]:
    (folder / "x.gguf").write_bytes(build())
    commands = [
        ["inspect", "x.gguf"],
        ["verify", "x.gguf"],
        ["diagnose", "x.gguf"],
        ["convert", "x.gguf", "o", "--to", "hf"],
    ]
    return [*commands, ["generate", "x.gguf", "--prompt", "a", "--max-tokens", "1"]]


def _recipe(folder: Path, base: Path, text: str | bytes) -> list[Command]:
    _write(folder / "recipe.yaml", text)
    run = _copy(base, folder)
    _write(run / "recipe.yaml", text)
    commands = [["train", kind, "recipe.yaml", "--out", "run", "--print-recipe"] for kind in ("language", "detection")]
    return [*commands, ["diagnose", "sick"], ["inspect", "sick"], ["convert", "sick", "o", "--to", "pth"]]


def _opentad(folder: Path, text: str) -> list[Command]:
    _write(folder / "config.py", text)
    return [["recipe", "import", "config.py", "--out", "recipe.yaml"]]


def _damaged(folder: Path, base: Path, seed: int) -> list[Command]:
    """A copy of the base of which one file lost its end, or has some bytes changed."""
    rng = random.Random(seed)
    path = rng.choice(sorted(p for p in _copy(base, folder).iterdir() if p.is_file()))
    data = bytearray(path.read_bytes())
    if rng.random() < 0.4:
        del data[rng.randrange(len(data)) :]
    else:
        for _ in range(rng.choice([1, 8, 64])):
            data[rng.randrange(min(len(data), 4096))] = rng.randrange(256)
    path.write_bytes(data)
    return _reads("sick", base)


def _document(folder: Path, text: str | bytes | int) -> list[Command]:
    _write(folder / "x.json", text)
    return [
        ["report", "x.json", "--out", "page.html"],
        ["eval", "detection", "--annotations", "x.json", "--detections", "x.json"],
        ["inspect", "x.json"],
    ]


def _run(folder: Path, base: Path, text: str | bytes | int) -> list[Command]:
    """A run's folder whose files hold this text."""
    step = folder / "run" / "checkpoints" / "step-000002"
    shutil.copytree(base, step)
    shutil.copy(base / "config.json", folder / "run")
    for name in ("manifest.json", "state.json"):
        _write(step / name, text)
    for name in ("recipe.yaml", "metrics.jsonl", "trackers.json"):
        _write(folder / "run" / name, text)
    commands = [["inspect", "run"], ["verify", "run"], ["diagnose", "run"], ["report", "run", "--out", "page.html"]]
    commands += [["generate", "run", "--prompt", "a"], ["eval", "language", "run"], ["eval", "detection", "run"]]
    return [
        *commands,
        ["train", "language", "run/recipe.yaml", "--out", "run"],
        ["predict", "run", "x.mp4", "--out", "o"],
        ["features", "run", "x.mp4", "--out", "o"],
    ]


def _named(folder: Path, base: Path, name: str) -> list[Command]:
    shutil.copytree(base, folder / name)
    return [[*c[:1], "--", *c[1:]] if name.startswith("-") else c for c in _reads(name, base)[:8]]


def _tensor_names(folder: Path, base: Path) -> list[Command]:
    sick = _copy(base, folder)
    tensors = load_file(sick / "model.safetensors")
    some = next(iter(tensors))
    save_file({**tensors, f"model.{CONTROL}": tensors[some].clone()}, sick / "model.safetensors", {"format": "pt"})
    return _reads("sick", base)


def _url(base: Path, url: str) -> list[Command]:
    return [["inspect", url], ["diagnose", url], ["convert", str(base), url, "--to", "hf"], ["diff", url, str(base)]]
