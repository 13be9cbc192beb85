"""Faults of names: tensors missing, too many, or called otherwise (K), and ties (T)."""

from __future__ import annotations

import numpy as np

from tests.fault_kinds.change import Change, kind, some
from tests.specimens import FP32, LAYER, Specimen

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FILES = ("hf", "dcp", "pth")


def without(m: Specimen, names: list[str]) -> Change | None:
    return Change({n: t for n, t in m.tensors.items() if n not in names}, names) if names else None


def renamed(m: Specimen, rename: dict[str, str] | str) -> dict[str, np.ndarray]:
    if isinstance(rename, str):
        return {f"{rename}{n}": t for n, t in m.tensors.items()}
    return {rename.get(n, n): t for n, t in m.tensors.items()}


@kind("K01")
def missing_tensor(m: Specimen, rng: np.random.Generator) -> Change | None:
    return without(m, some(rng, [n for n in m.tensors if LAYER.match(n)]))


@kind("K01")
def missing_few(m: Specimen, rng: np.random.Generator) -> Change | None:
    return without(m, some(rng, m.matrices, 2, 5))


@kind("K01")
def missing_layer(m: Specimen, rng: np.random.Generator) -> Change | None:
    return without(m, m.of_layer(int(rng.choice([m.layers - 1, rng.integers(0, m.layers)]))))


@kind("K01")
def missing_norms(m: Specimen, rng: np.random.Generator) -> Change | None:
    return without(m, m.norms)


@kind("K01")
def missing_head(m: Specimen, rng: np.random.Generator) -> Change | None:
    return without(m, [n for n in m.tensors if n in (HEAD, "classifier.weight")])


@kind("K01")
def missing_biases(m: Specimen, rng: np.random.Generator) -> Change | None:
    return without(m, [n for n in m.tensors if n.endswith("_proj.bias") or n.endswith("query.bias")])


@kind("K02")
def unexpected_buffer(m: Specimen, rng: np.random.Generator) -> Change | None:
    if not m.language:
        return None
    frequencies = (1 / 10000 ** (np.arange(0, m.head_dim, 2) / m.head_dim)).astype(FP32)
    layers = [0] if rng.random() < 0.5 else range(m.layers)
    added = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": frequencies for n in layers}
    return Change({**m.tensors, **added}, list(added))


@kind("K02")
def unexpected_layer(m: Specimen, rng: np.random.Generator) -> Change | None:
    last = m.layers - 1
    copies = {f"{f['before']}{m.layers}.{f['rest']}": m.tensors[n] for n in m.of_layer(last) if (f := LAYER.match(n))}
    return Change({**m.tensors, **copies}, list(copies))


@kind("K02")
def unexpected_tensor(m: Specimen, rng: np.random.Generator) -> Change | None:
    name = str(rng.choice(["model.visual_token.weight", "value_head.weight", "model.layers.0.mlp.extra.weight"]))
    return Change({**m.tensors, name: rng.normal(0, 0.1, (16, 16)).astype(FP32)}, [name])


@kind("K03")
def wrapper_in_front(m: Specimen, rng: np.random.Generator) -> Change | None:
    prefix = str(
        rng.choice(["module.", "_orig_mod.", "base_model.model.", "module._orig_mod.", "_fsdp_wrapped_module."])
    )
    return Change(renamed(m, prefix), forms=FILES, note=prefix)


@kind("K03")
def wrapper_in_the_middle(m: Specimen, rng: np.random.Generator) -> Change | None:
    word = str(rng.choice(["_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"]))
    rename = {n: f"{f['before']}{f['n']}.{word}.{f['rest']}" for n in m.tensors if (f := LAYER.match(n))}
    return Change(renamed(m, rename), forms=FILES, note=word)


@kind("K04")
def nested_root(m: Specimen, rng: np.random.Generator) -> Change | None:
    return Change(m.tensors, forms=("dcp-nested", "pth-nested"))


@kind("K04")
def root_in_names(m: Specimen, rng: np.random.Generator) -> Change | None:
    return Change(renamed(m, "model."), forms=("hf", "hf-sharded", "dcp")) if m.language else None


@kind("K05")
def no_name_in_common(m: Specimen, rng: np.random.Generator) -> Change | None:
    return Change({f"net.stage.{i}.blob": t for i, t in enumerate(m.tensors.values())}, forms=FILES)


@kind("K05")
def empty(m: Specimen, rng: np.random.Generator) -> Change | None:
    return Change({}, forms=("hf", "dcp"), also=("K01",))


@kind("K07")
def dropped_by_torchtitan(m: Specimen, rng: np.random.Generator) -> Change | None:
    biases = [n for n in m.tensors if n.endswith("_proj.bias")]
    return Change(m.tensors, biases, forms=("hf",), target="torchtitan") if biases and m.language else None


@kind("K07")
def tied_head_dropped_by_torchtitan(m: Specimen, rng: np.random.Generator) -> Change | None:
    if not m.tied or m.config["model_type"] not in ("llama", "qwen3"):
        return None
    head = (m.tensors[EMBEDDING].astype(FP32) * 1.5 + 0.01).astype(m.tensors[EMBEDDING].dtype)
    return Change(
        {**m.tensors, HEAD: head},
        None,
        codes=("K07", "T01"),
        forms=("hf",),
        target="torchtitan",
        also=("T01", "K07", "K02", "V06"),
    )


@kind("K08")
def optimizer_only(m: Specimen, rng: np.random.Generator) -> Change | None:
    state = {}
    for name, tensor in m.tensors.items():
        state[f"optimizer.state.{name}.exp_avg"] = (tensor.astype(FP32) * 1e-4).astype(FP32)
        state[f"optimizer.state.{name}.exp_avg_sq"] = np.square(tensor.astype(FP32)) * np.float32(1e-8)
    return Change(state, forms=("dcp", "pth"))


@kind("K08")
def flat_parameters(m: Specimen, rng: np.random.Generator) -> Change | None:
    flat = {}
    for layer in range(m.layers):
        parts = [m.tensors[n].astype(FP32).ravel() for n in m.of_layer(layer)]
        flat[f"_fsdp_wrapped_module.model.layers.{layer}._fsdp_wrapped_module._flat_param"] = np.concatenate(parts)
    rest = [t.astype(FP32).ravel() for n, t in m.tensors.items() if not LAYER.match(n)]
    flat["_fsdp_wrapped_module._flat_param"] = np.concatenate(rest)
    return Change(flat, forms=FILES)


@kind("K08")
def ema_only(m: Specimen, rng: np.random.Generator) -> Change | None:
    root = str(rng.choice(["ema.", "model_ema.", "state_dict_ema."]))
    return Change(renamed(m, root), forms=("dcp", "pth", "hf"), note=root)


# -- ties -----------------------------------------------------------------------------------------------------------


@kind("T01")
def tied_stored_apart(m: Specimen, rng: np.random.Generator) -> Change | None:
    if not m.tied or not m.language:
        return None
    old = m.tensors[EMBEDDING].astype(FP32)
    moved = (
        old * 1.01 + rng.normal(0, 0.05 * old.std(), old.shape)
        if rng.random() < 0.5
        else rng.normal(0, 0.02, old.shape)
    )
    return Change({**m.tensors, HEAD: moved.astype(m.tensors[EMBEDDING].dtype)})


@kind("T02")
def head_overwritten(m: Specimen, rng: np.random.Generator) -> Change | None:
    if m.tied or not m.language:
        return None
    return Change({**m.tensors, HEAD: m.tensors[EMBEDDING]}, [HEAD])


@kind("T02")
def embedding_overwritten(m: Specimen, rng: np.random.Generator) -> Change | None:
    if m.tied or not m.language:
        return None
    return Change({**m.tensors, EMBEDDING: m.tensors[HEAD]}, [EMBEDDING])
