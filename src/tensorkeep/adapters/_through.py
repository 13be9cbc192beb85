"""Say which tensors of a float base an adapter was trained on in 4 or 8 bits, and how those lay in memory then."""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.adapters._joined import Joined, Matrix
from tensorkeep.adapters._matching import MergeBase
from tensorkeep.adapters._places import ask_names, pieces_of
from tensorkeep.adapters.terms import Piece
from tensorkeep.conversion.dequantizing import turned
from tensorkeep.conversion.model_names import ModelNames
from tensorkeep.conversion.row_maps import Run
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.names import matches
from tensorkeep.quantization.encoding import EXCLUDED, Encoding, Forms
from tensorkeep.storage.record import DTYPES


def sent_through(state: MergeBase, forms: Forms) -> tuple[dict[str, Encoding], dict[str, list[Joined]]]:
    """Return which weights loading quantizes and how: those listed, or every matrix but heads and embeddings.

    Args:
        state: the base, as floats.
        forms: what the adapter says.

    Returns:
        hf name -> encoding, of matrices that lie in the file as in memory; hf name -> matrices in memory that its rows
        are pieces of, of the others.

    Raises:
        TensorkeepError: A04 where experts were quantized, and nothing says how the file's make up those in memory.
    """
    names = ask_names(state) if forms.modules else None
    groups = dict(_matrices(state, names, forms)) if names is not None else {}
    joined: dict[str, list[Joined]] = {}
    for matrix in (m for found in groups.values() for m in found):
        for piece in matrix.pieces:
            joined.setdefault(piece.stored, []).append(Joined(piece, matrix))
    layers, through = dict(forms.layers), {}
    for name, item in state.hf_tensors.items():
        module, _, last = name.rpartition(".")
        whole = len(item.parts) == 1 and item.parts[0].rows is None
        if item.parts[0].name in state.coded or item.tied_to in state.hf_tensors:  # as its partner
            continue
        if name in joined or last != "weight" or len(item.shape) != 2 or not DTYPES[item.dtype].floating or not whole:
            continue
        chosen = matches(module, forms.modules) if forms.modules else not matches(module, EXCLUDED)
        kind = layers.get(module, forms.usual if chosen else None)
        if kind is None:
            continue
        if turned(state.config, name):
            rows, columns = item.shape
            piece = Piece(item.parts[0].name, 0, None, range(rows))
            joined[name] = [Joined(piece, Matrix((rows, columns), True, (piece,), kind))]
        else:
            through[name] = kind
    return through, _as_stored(state, joined)


def _matrices(state: MergeBase, names: ModelNames, forms: Forms) -> Iterator[tuple[str, list[Matrix]]]:
    """Yield the quantized matrices of each live tensor that files hold in another way, by hf names."""
    layers = dict(forms.layers)
    for name, shape in names.live.items():
        module = name.removesuffix(".weight")
        kind = layers.get(module, forms.usual if matches(module, forms.modules) else None)
        if kind is None or len(shape) not in (2, 3) or (names.runs(name) == (Run(name),) and len(shape) == 2):
            continue
        if name in names.odd:
            raise TensorkeepError(
                f"{name} was quantized, and files hold it in a way that rows do not describe",
                where=state.view.path,
                code="A04",
                hint="quantize_backbone: null, or merge onto the float weights: --onto original",
            )
        inward, (rows, columns) = name in names.inward, shape[-2:]
        pieces = pieces_of(state, names, name)
        if not pieces or all(state.hf_tensors[p.stored].parts[0].name in state.coded for p in pieces):
            continue
        by_expert: dict[int | None, list[Piece]] = {}
        for piece in pieces:
            by_expert.setdefault(piece.expert, []).append(piece)
        yield name, [Matrix((rows, columns), inward, tuple(found), kind) for found in by_expert.values()]


def _as_stored(state: MergeBase, joined: dict[str, list[Joined]]) -> dict[str, list[Joined]]:
    """Return shares in order, their pieces by stored name."""

    def own(piece: Piece) -> Piece:
        parts = state.hf_tensors[piece.stored].parts if piece.stored in state.hf_tensors else ()
        if parts and (len(parts) != 1 or parts[0].rows is not None or parts[0].permutes):
            raise TensorkeepError(
                f"{piece.stored} was quantized with others, and lies otherwise than in an hf folder",
                where=state.view.path,
                code="A04",
                hint="convert the base to hf first: tensorkeep convert BASE OUT --to hf",
            )
        return piece._replace(stored=parts[0].name) if parts else piece

    out = {}
    for name, shares in joined.items():
        made = [Joined(own(s.piece), s.matrix._replace(pieces=tuple(map(own, s.matrix.pieces)))) for s in shares]
        out[name] = sorted(made, key=lambda s: s.rows)
    return out
