"""The data section of a recipe as samples: documents read, tokenized once, cached, and laid out in rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorkeep.errors import TensorkeepError
from tensorkeep.language._flow import StreamedData, begun
from tensorkeep.language.data.chat import Chat, tokenizer_settings
from tensorkeep.language.data.conversations import Conversation, Preference
from tensorkeep.language.data.packing import plan
from tensorkeep.language.data.parts import Part, cached_parts, file_digests, parts_of
from tensorkeep.language.data.preferences import Pairs
from tensorkeep.language.data.samples import LiveConversations, PackedData, as_line
from tensorkeep.language.data.sources import expanded
from tensorkeep.language.data.streaming import Corpus
from tensorkeep.language.data.texts import records_of
from tensorkeep.language.data.tokens import Encoded, in_batches
from tensorkeep.language.recipe import DataConfig, LanguageRecipe
from tensorkeep.training import distributed
from tensorkeep.training.distributed import World
from tensorkeep.training.waiting import first_works

Remark = Callable[[str], None]
_LENGTHS = 8  # of rows, where layers are compiled for each


def cache_of(recipe: LanguageRecipe, run: Path) -> Path:
    """The folder for cached tokens: the one the recipe names, or `cache` in the run."""
    return Path(recipe.data.cache) if recipe.data.cache is not None else run / "cache"


def pad_of(tokenizer: Any) -> int:
    """The id that fills rows up; 0 where the tokenizer names none."""
    pad = tokenizer.pad_token_id
    return int(pad) if isinstance(pad, int) else 0


def multiple_of(recipe: LanguageRecipe) -> int:
    """Return the tokens of which rows get a multiple: where layers are compiled, lengths must be few.

    Packed rows are nearly full, so they are filled up; others get one of eight lengths.

    Args:
        recipe: its `training` and `data` count.
    """
    training, length = recipe.training, recipe.data.length
    by_layer = training.gradient_checkpointing or training.memory is not None or training.memory_limit_gib is not None
    if not (training.compile and by_layer):
        return 1
    return length if recipe.data.packing != "none" else -(-length // _LENGTHS)


def make_data(
    recipe: LanguageRecipe,
    config: DataConfig,
    tokenizer: Any,
    vocabulary: int,
    run: Path,
    world: World,
    remark: Remark,
) -> PackedData | LiveConversations | Pairs | StreamedData:
    """Make the samples of a data section; the first rank fills the token cache, the others wait for it.

    Args:
        recipe: its objective decides what a record is.
        config: the section: the recipe's own, or one for other files.
        tokenizer: of the model.
        vocabulary: number of ids that the model knows.
        run: the run's folder, which holds the cache unless the recipe names another.
        world: this process among its peers.
        remark: is told what was left out, and when a damaged cache is made again.

    Returns:
        `StreamedData` where the section asks for it, `Pairs` (without a reference) for dpo, `LiveConversations` where
        they are augmented, else `PackedData`.

    Raises:
        TensorkeepError: a file cannot be read, a record does not fit the objective, or nothing is left.
    """
    live = config.augmentation is not None and config.augmentation.on
    cut = None if config.streaming and config.packing == "concatenate" else _cut(recipe, config)
    settings = _settings(recipe, config, tokenizer, cut, live)
    files = expanded(config.files)
    if [str(path) for path in files] != [str(Path(name)) for name in config.files] and world.first:
        more = f" and {len(files) - 5} more" if len(files) > 5 else ""
        remark(f"data.files: {len(files)} files: {', '.join(path.name for path in files[:5])}{more}")
    if config.streaming:
        return _streamed(
            recipe, config, TextReader(recipe, config, tokenizer, cut), vocabulary, files, settings, world, remark
        )
    # the first rank reads the files once for their digests; all make tokens, and nobody waits in a collective for them
    digest, parts = first_works(world, lambda: parts_of(files, settings, config.format, remark=remark))
    left = Counter[str]()

    def encoded(part: Part) -> Iterator[Encoded]:
        return _lines(config, part) if live else encode(recipe, config, tokenizer, cut, part, left)

    folder, digests = cache_of(recipe, run), file_digests(settings, parts)
    tokens = cached_parts(folder, digest, parts, encoded, max(vocabulary, 256), remark, world.rank)
    _say_left_out(left, cut, remark)
    if live and config.augmentation is not None:
        drawn = f"{digest} {config.length} {config.augmentation}"
        return LiveConversations(tokens, Chat(tokenizer), config.augmentation, config.length, drawn, digests)
    if recipe.objective == "dpo":
        return Pairs(tokens, None, str(config.length), digests)
    rows = plan(tokens.offsets, config.length, config.packing)
    return PackedData(tokens, rows, f"{config.packing} {config.length}", digests)


def _settings(
    recipe: LanguageRecipe, config: DataConfig, tokenizer: Any, cut: int | None, live: bool
) -> dict[str, Any]:
    """What tokens depend on beside the files."""
    settings = {
        "objective": recipe.objective,
        "format": config.format,
        "cut": config.length if cut else None,
        "bos": config.bos,
        "eos": config.eos,
        **tokenizer_settings(tokenizer),
    }
    return settings | ({"lines": True} if live else {})


@dataclass(frozen=True, eq=False)
class TextReader:
    """Reads records as a recipe says and makes tokens of them, in this process or a worker."""

    recipe: LanguageRecipe
    config: DataConfig
    tokenizer: Any
    cut: int | None

    def records(self, path: Path, begin: int, end: int | None) -> Iterator[Any]:
        """Read the records of a stretch of a file."""
        return records_of(path, self.recipe.objective, self.config.format, begin, end)

    def encode(self, records: Sequence[Any]) -> tuple[list[Encoded], Counter[str]]:
        """Tokenize records; also counts what is left out."""
        left = Counter[str]()
        return list(_encoded(self.recipe, self.config, self.tokenizer, self.cut, records, left)), left


def _streamed(
    recipe: LanguageRecipe,
    config: DataConfig,
    reader: TextReader,
    vocabulary: int,
    files: list[Path],
    settings: dict[str, Any],
    world: World,
    remark: Remark,
) -> StreamedData:
    """Make data that is tokenized while it is read."""
    first, seed = tuple(distributed.gathered(world, files)[0]), recipe.training.seed
    how: dict[str, Any] = {"length": config.length, "packing": config.packing, "buffer": config.shuffle_buffer}

    def corpus(size: int, lanes: int) -> Corpus:
        return Corpus(first, size, lanes, reader, max(vocabulary, 256), config.format, **how, seed=seed)

    return StreamedData(begun(corpus, first, config.format, world), settings | how, world, remark)


def _cut(recipe: LanguageRecipe, config: DataConfig) -> int | None:
    """Tokens a document is cut at: conversations always, texts where each has a row of its own; None: nowhere."""
    return config.length if config.packing == "none" or recipe.objective != "pretrain" else None


def encode(
    recipe: LanguageRecipe, config: DataConfig, tokenizer: Any, cut: int | None, part: Part, left: Counter[str]
) -> Iterator[Encoded]:
    """Tokenize every document of a part; a record without a token that counts is left out, and counted in `left`."""
    found = records_of(part.path, recipe.objective, config.format, part.begin, part.end)
    yield from _encoded(recipe, config, tokenizer, cut, found, left)


def _encoded(
    recipe: LanguageRecipe,
    config: DataConfig,
    tokenizer: Any,
    cut: int | None,
    found: Iterable[Any],
    left: Counter[str],
) -> Iterator[Encoded]:
    """Tokenize records, as `encode` does."""
    if recipe.objective == "pretrain":
        yield from _encode_texts((str(text) for text in found), tokenizer, config.bos, config.eos, cut, left)
        return
    chat = Chat(tokenizer)
    for record in found:
        both = list(record) if isinstance(record, Preference) else [record]
        made = [chat.encode(one) for one in both if isinstance(one, Conversation)]
        short = [Encoded(ids[:cut], marks[:cut]) for ids, marks in made]
        if not all(any((one.marks or [])[1:]) for one in short):
            left["idle"] += 1
            continue
        yield from short


def _say_left_out(left: Counter[str], cut: int | None, remark: Remark) -> None:
    """Say what this process left out of the tokens that it made."""
    if left["idle"]:
        remark(f"{left['idle']} records hold no answer within {cut} tokens: left out")
    if left["lost"]:
        where = f"{left['lost']:,} of {left['tokens']:,} tokens lie beyond a row of {cut} and are left out"
        remark(f"{where}; data.packing: concatenate keeps them")


def _encode_texts(
    texts: Iterable[str], tokenizer: Any, bos: bool, eos: bool, cut: int | None, left: Counter[str]
) -> Iterator[Encoded]:
    """Tokenize texts as `[bos] tokens [eos]`, the tokens cut so that all fits into `cut` (MiniMind's rule)."""
    begin, end = ([_special(tokenizer, name)] if on else [] for name, on in (("bos", bos), ("eos", eos)))
    most = None if cut is None else cut - len(begin) - len(end)
    for batch in in_batches(texts):
        for ids in tokenizer(batch, add_special_tokens=False)["input_ids"]:
            left["tokens"] += len(ids)
            left["lost"] += len(ids[most:] if most is not None else [])
            yield Encoded([*begin, *ids[:most], *end])


def _special(tokenizer: Any, name: str) -> int:
    """The id of the tokenizer's `bos` or `eos` token."""
    found = getattr(tokenizer, f"{name}_token_id")
    if found is None:
        raise TensorkeepError(f"the tokenizer has no {name} token", where=f"data.{name}", hint=f"{name}: false")
    return int(found)


def _lines(config: DataConfig, part: Part) -> Iterator[Encoded]:
    """Conversations as bytes of JSON, kept in place of tokens where every visit renders them anew."""
    for record in records_of(part.path, "sft", config.format, part.begin, part.end):
        if isinstance(record, Conversation):
            yield Encoded(list(as_line(record)))
