"""What drawing windows of text takes of memory: the tokenizer, the text, and its tokens.

text_memory(inputs)

Documents go to the tokenizer in batches, each document whole. What it holds of one on the way, by
byte of text, and what it gives back for a batch were measured with tokenizers 0.22 and vocabularies
of 260 and 49,152 tokens, on prose and on source code. Nothing of it is there any more when layers
are.
"""

import math
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from compress.data.stdlib import stdlib_files
from compress.data.text import HUB_IDS
from compress.data.windows import BATCH
from compress.pipeline.inputs import RunInputs

DATASETS_MEMORY = 85 * 10**6  # the library of that name, imported
TOKENIZER = 15  # bytes for one of tokenizer.json
ENTRY = 1000  # bytes for a token of the vocabulary, where there is no such file
ON_THE_WAY = 138  # bytes for one of a document that is split and merged
GIVEN_BACK = (
    112  # bytes for a token of a batch: what the library says of it, and a number in a list
)
ONE_TEXT = {"wikitext2": 10_900_000, "ptb": 5_100_000}  # of the hub, in a single document
DOCUMENT = 50_000  # bytes of one of another dataset of the hub, which no file here tells


def library_memory(inputs: RunInputs) -> int:
    """Bytes of what is imported to read a text, and stays."""
    return DATASETS_MEMORY if _of_hub(inputs.source.location) else 0


def text_memory(inputs: RunInputs) -> int:
    """Bytes, all of them free again when the windows are drawn."""
    file = inputs.skeleton.folder / "tokenizer.json"
    vocabulary = inputs.skeleton.config.vocab_size
    tokenizer = TOKENIZER * file.stat().st_size if file.is_file() else ENTRY * vocabulary
    held, batch, largest = _extent(inputs.source.location)
    # A byte a token of the least vocabulary, 3.6 of one of 32,000, 4.5 of one of 128,000.
    tokens = 1 / max(1.0, math.log2(max(vocabulary, 1) / 128) / 2.2)  # in a byte
    read = held * (1 + 8 * tokens) + batch * GIVEN_BACK * tokens + largest * ON_THE_WAY
    return tokenizer + round(read)


def _of_hub(location: str) -> bool:
    return location in HUB_IDS or (location != "python-stdlib" and not Path(location).is_file())


def _extent(location: str) -> tuple[int, int, int]:
    """Bytes of the whole text, of the largest batch of documents, and of the largest of these."""
    if location == "python-stdlib":
        return _stdlib_extent()
    if location in ONE_TEXT:
        return (ONE_TEXT[location],) * 3
    if not Path(location).is_file():
        return 0, BATCH * DOCUMENT // 10, DOCUMENT
    if Path(location).suffix == ".jsonl":
        with Path(location).open("rb") as file:
            total, batch, largest = _extent_of(map(len, file))
        return 2 * total, batch, largest  # lines, and what they hold
    return (Path(location).stat().st_size,) * 3


@cache
def _stdlib_extent() -> tuple[int, int, int]:
    return _extent_of(file.stat().st_size for file in stdlib_files("train"))


def _extent_of(sizes: Iterable[int]) -> tuple[int, int, int]:
    total = batch = largest = inside = 0
    for number, size in enumerate(sizes):
        inside = size if number % BATCH == 0 else inside + size
        total, batch, largest = total + size, max(batch, inside), max(largest, size)
    return total, batch, largest
