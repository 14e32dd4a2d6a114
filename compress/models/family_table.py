"""The table of families for people: what each can be put through. Imports no torch.

print(markdown(family_rows()))
"""

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from compress.models.families import (
    ARCHITECTURES,
    CHUNKS,
    LINEAR,
    MIXTURES,
    MULTIMODAL,
    TOGETHER,
    WINDOWS,
)
from compress.models.family_specs import AFTER, MEAN


@dataclass(frozen=True)
class FamilyRow:
    """One model type.

    Attributes:
        type: the `model_type` of config.json.
        models: what people know it by.
        quantize: the methods that there are for it.
        rotate: "yes", or why not in a word.
        token_importance: the layers whose tokens are weighed by attention; in others they weigh
            the same.
        prune_visual_tokens: "yes", why not in a word, or "-" for text.
        since: the oldest transformers that is known to have it, of those that are supported.
    """

    type: str
    models: str
    quantize: str
    rotate: str
    token_importance: str
    prune_visual_tokens: str
    since: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


HEADINGS = ("type", "models", "quantize", "rotate", "weighs tokens", "prunes images", "since")
METHODS = "rtn, gptq"
ROTATES = {None: "yes", MEAN: "no: LayerNorm", AFTER: "no: post-norms"}
PRUNES = {
    None: "yes",
    CHUNKS: "no: chunks",
    WINDOWS: "no: windows",
    LINEAR: "no: linear attention",
    TOGETHER: "no: image seen whole",
}


def family_rows() -> list[FamilyRow]:
    """Dense decoders, those with experts, then multimodal families."""
    rows = []
    for kind, row in (ARCHITECTURES | MIXTURES).items():
        rotate = ROTATES[row.unrotatable]
        rows.append(FamilyRow(kind, row.models, METHODS, rotate, row.weighs, "-", row.since))
    for kind, seeing in MULTIMODAL.items():
        can = ROTATES[seeing.unrotatable], seeing.weighs, PRUNES[seeing.unprunable]
        rows.append(FamilyRow(kind, seeing.models, METHODS, *can, seeing.since))
    return rows


def markdown(rows: Sequence[FamilyRow]) -> str:
    """The table as the documents have it."""
    cells = [HEADINGS, ("---",) * len(HEADINGS)]
    cells += [(f"`{row.type}`", *list(row.as_dict().values())[1:]) for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def sentence() -> str:
    """The types in two lines, as the README has them."""
    tables = (ARCHITECTURES, MIXTURES, MULTIMODAL)
    dense, mixed, seeing = (", ".join(f"`{kind}`" for kind in kinds) for kinds in tables)
    text = (
        f"{len(ARCHITECTURES)} dense decoders: {dense}; "
        f"{len(MIXTURES)} decoders with experts: {mixed}; "
        f"{len(MULTIMODAL)} multimodal types: {seeing}, "
        f"whose vision tower and projector stay in 16 bits. Which of them rotate, and what was "
        f"tried and left out: [docs/families.md](docs/families.md), or `modelpress families`."
    )
    return textwrap.fill(text, 104, break_long_words=False, break_on_hyphens=False) + "\n"
