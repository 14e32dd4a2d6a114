"""Text corpora by name: for calibration (`train`) and for evaluation (`held_out`).

| name | documents | one stream | source |
|---|---|---|---|
| python-stdlib | modules | yes | this interpreter's sources, no network |
| wikitext2, ptb | the split as one text | yes | hub: train / test |
| c4 | web pages of one shard | no | hub: first train / first validation shard |
| pajama | documents of RedPajama's sample | no | hub: train only |
| FILE.txt | the file | yes | - |
| FILE.jsonl | one object a line, its `text_field`; or conversations, see `chat.py` | yes | - |
| FILE.json, FILE.csv, FILE.parquet | refused: how to make a FILE.jsonl of it | | - |
| any hub id | rows | yes | hub: train / test, or validation where there is no test |

In a corpus that is one stream, documents follow each other behind a blank line and a window may
span several; in the others a window lies inside one document (as GPTQ and RSQ draw them).
A file is the same text in both splits: name two files where leakage matters.

    corpus = load_documents("python-stdlib", "train")
"""

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from compress.data.stdlib import Split, python_stdlib
from compress.errors import CompressError, UsageError, did_you_mean, import_package
from compress.models.config_values import reason_of
from compress.registry import Registry
from compress.storage.files import file_digest

DATASETS: Registry[Callable[[Split], "Corpus"]] = Registry("dataset")
# Where those that come from the hub are.
HUB_IDS = {
    "wikitext2": "Salesforce/wikitext",
    "ptb": "ptb-text-only/ptb_text_only",
    "c4": "allenai/c4",
    "pajama": "togethercomputer/RedPajama-Data-1T-Sample",
}
BLANK_LINE = "\n\n"
Option = str | dict[str, str]  # of `datasets.load_dataset`


class Table(Protocol):
    """A split of a hub dataset."""

    column_names: list[str]

    def __getitem__(self, column: str) -> Sequence[str]: ...


@dataclass(frozen=True)
class Corpus:
    """Documents and how windows are cut from them.

    `texts` may be lazy (a column of a memory-mapped table). `one_stream`: joined with blank lines
    and cut anywhere; otherwise each window lies inside one document.
    """

    name: str
    texts: Sequence[str]
    one_stream: bool


def locate(dataset: str, resolve: Callable[[str], str]) -> str:
    """A dataset of a recipe as somewhere to read it from: its name, a file's path, or a hub id.

    `resolve` looks for files: the recipe's `resolve_path`, which raises RecipeError for a path that
    does not exist and cannot be a hub id. Raises UsageError for a FILE.txt or .jsonl that is not
    there: no hub id ends like that.
    """
    if dataset in DATASETS:
        return dataset
    found = resolve(dataset)
    if Path(found).suffix in (".txt", ".jsonl") and not Path(found).is_file():
        raise UsageError(f"dataset {dataset!r}: no such file")
    return found


def measured_text(dataset: str) -> str:
    """A dataset's name as evaluations give it: with the split, where it has one to hold out.

    A file is the same text whatever is asked of it, calibrated on or measured.
    """
    return dataset if Path(dataset).expanduser().is_file() else f"{dataset} (held out)"


def load_documents(dataset: str, split: Split, text_field: str = "text") -> Corpus:
    """The documents of one split of a name of DATASETS, a FILE.txt, a FILE.jsonl or a hub id.

    `text_field` is the key of a JSON object or the column of a hub dataset that holds the text; the
    named datasets know theirs. Raises UsageError, one line, for what cannot be read.
    """
    if dataset in DATASETS:
        corpus = DATASETS[dataset](split)
    elif Path(dataset).suffix in (".txt", ".jsonl"):
        corpus = _read_file(Path(dataset).expanduser(), text_field)
    elif Path(dataset).is_file():
        raise UsageError(_other_format(Path(dataset)))
    else:
        corpus = _from_hub(dataset, split, text_field)
    if len(corpus.texts) == 0:
        raise UsageError(f"dataset {dataset!r} holds no documents")
    return corpus


def load_rows(
    dataset: str, split: Split, text_field: str, keys: Sequence[str]
) -> Sequence[tuple[str, object]] | None:
    """The rows of a FILE.jsonl or a hub dataset, each with its place; None where they are text.

    They are rows if `text_field` is one of `keys`, or if it is not there and one of `keys` is: in
    a file, of its first row. Raises UsageError, one line, for what cannot be read.
    """
    if Path(dataset).suffix == ".jsonl":
        lines = _lines(Path(dataset).expanduser())
        first = _row(*lines[0]) if lines else {}
        if not _are_rows(first, text_field, keys):
            if first and text_field not in first:
                raise UsageError(
                    f"{lines[0][0]}: neither text in field {text_field!r} nor {' or '.join(keys)}: "
                    f"found {', '.join(first)}{_meant((text_field, *keys), first)}"
                )
            return None
        return [(place, _row(place, line)) for place, line in lines]
    if Path(dataset).is_file():
        return None
    table = _split(dataset, split)
    if not _are_rows(table.column_names, text_field, keys):
        return None
    return HubRows(dataset, table)


@dataclass(frozen=True)
class HubRows(Sequence[tuple[str, object]]):
    """The rows of a hub dataset with their places, read one by one."""

    dataset: str
    table: Any

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: Any) -> Any:
        return f"{self.dataset}[{i}]", self.table[i]


def _meant(wanted: Sequence[str], found: Iterable[str]) -> str:
    """The first of `wanted` that one of `found` is a misspelling of, in words."""
    return next((hint for name in found if (hint := did_you_mean(name, wanted))), "")


def _are_rows(names: Collection[str], text_field: str, keys: Sequence[str]) -> bool:
    found = any(key in names for key in keys)
    return found and (text_field in keys or text_field not in names)


def content_digests(datasets: Sequence[str]) -> dict[str, str]:
    """The sha256 of each dataset that is a file here; the others are known by their names alone."""
    files = [dataset for dataset in datasets if Path(dataset).is_file()]
    return {file: file_digest(Path(file)) for file in files}


@DATASETS.register("python-stdlib")
def _python_stdlib(split: Split) -> Corpus:
    return Corpus("python-stdlib", python_stdlib(split), one_stream=True)


@DATASETS.register("wikitext2")
def _wikitext2(split: Split) -> Corpus:
    column = _hub_column(
        "wikitext2",
        HUB_IDS["wikitext2"],
        "text",
        name="wikitext-2-raw-v1",
        split="train" if split == "train" else "test",
    )
    # Its rows are lines: joined into one text first, so that perplexities match published ones.
    return Corpus("wikitext2", [BLANK_LINE.join(column)], one_stream=True)


@DATASETS.register("ptb")
def _ptb(split: Split) -> Corpus:
    column = _hub_column(
        "ptb",
        HUB_IDS["ptb"],
        "sentence",
        name="penn_treebank",
        split="train" if split == "train" else "test",
        revision="refs/convert/parquet",  # main holds a loading script, which `datasets` 4 refuses
    )
    return Corpus("ptb", [BLANK_LINE.join(column)], one_stream=True)


@DATASETS.register("c4")
def _c4(split: Split) -> Corpus:
    part = "train" if split == "train" else "validation"
    shard = {"train": "en/c4-train.00000-of-01024", "validation": "en/c4-validation.00000-of-00008"}
    column = _hub_column(
        "c4", HUB_IDS["c4"], "text", data_files={part: f"{shard[part]}.json.gz"}, split=part
    )
    return Corpus("c4", column, one_stream=False)


@DATASETS.register("pajama")
def _pajama(split: Split) -> Corpus:
    if split == "held_out":
        raise UsageError("dataset 'pajama' has no held-out part: evaluate on another one")
    column = _hub_column(
        "pajama",
        HUB_IDS["pajama"],
        "text",
        split="train",
        revision="refs/convert/parquet",
    )
    return Corpus("pajama", column, one_stream=False)


def _other_format(path: Path) -> str:
    """What to do with a file that is neither text nor JSON lines."""
    remedies = {
        ".json": "write each of its objects on a line of its own, as FILE.jsonl",
        ".csv": "write its text column as FILE.jsonl (pandas: read_csv, to_json(orient='records', "
        "lines=True))",
        ".parquet": "write its text column as FILE.jsonl (pandas: read_parquet, "
        "to_json(orient='records', lines=True))",
    }
    remedy = remedies.get(path.suffix, "write it as one of these")
    return (
        f"dataset {path} is a {path.suffix or 'nameless'} file: expected .txt or .jsonl; {remedy}"
    )


def _read_file(path: Path, text_field: str) -> Corpus:
    if path.suffix == ".txt":
        text = _text(path)
        return Corpus(str(path), [text] if text.strip() else [], one_stream=True)
    documents = [_document(place, line, text_field) for place, line in _lines(path)]
    return Corpus(str(path), documents, one_stream=True)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"dataset {path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"dataset {path} cannot be read as UTF-8 text: {error}") from error


def _lines(path: Path) -> list[tuple[str, str]]:
    """The lines that are not empty, with their places.

    Not splitlines: a JSON string may hold U+2028 and its like unescaped.
    """
    lines = enumerate(_text(path).split("\n"), start=1)
    return [(f"{path}:{n}", line) for n, line in lines if line.strip()]


def _row(place: str, line: str) -> dict[str, Any]:
    """The object of one JSON line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{place}: not valid JSON: {error}") from error
    if not isinstance(row, dict):
        whole = "; a whole array is no file of JSON lines" if isinstance(row, list) else ""
        raise UsageError(f"{place}: expected an object, found {json.dumps(row)[:60]}{whole}")
    return row


def _document(place: str, line: str, text_field: str) -> str:
    """The text of one JSON line."""
    row = _row(place, line)
    if text_field in row and not isinstance(row[text_field], str):
        found = json.dumps(row[text_field])[:60]
        raise UsageError(f"{place}: {text_field}: expected a text, found {found}")
    if text_field not in row:
        raise UsageError(
            f"{place}: no text in field {text_field!r}{did_you_mean(text_field, row)}: "
            f"found {', '.join(row) or 'no fields'}; name it with text_field"
        )
    check_characters(row[text_field], f"{place}: {text_field}")
    return row[text_field]


def check_characters(text: str, place: str) -> None:
    """UsageError for half of a surrogate pair (`\\ud800` in JSON), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise UsageError(
            f"{place}: expected text, found {half} at character {error.start}, which is half of a "
            f"surrogate pair and no character"
        ) from None


def _from_hub(dataset: str, split: Split, text_field: str) -> Corpus:
    """A dataset by its hub id, in its default configuration."""
    return Corpus(dataset, _column(dataset, _split(dataset, split), text_field), one_stream=True)


def _split(dataset: str, split: Split) -> Any:
    """The table of a hub dataset's split, in its default configuration."""
    table = _hub_table(dataset, dataset)
    wanted = ("train",) if split == "train" else ("test", "validation")
    part = next((name for name in wanted if name in table), None)
    if part is None:
        raise UsageError(
            f"dataset {dataset!r}: no split {' or '.join(wanted)}: found {', '.join(table)}"
        )
    return table[part]


def _hub_column(dataset: str, hub_id: str, field: str, **options: Option) -> Sequence[str]:
    return _column(dataset, _hub_table(dataset, hub_id, **options), field)


def _column(dataset: str, table: Table, field: str) -> Sequence[str]:
    if field not in table.column_names:
        raise UsageError(
            f"dataset {dataset!r}: no column {field!r}{did_you_mean(field, table.column_names)}: "
            f"found {', '.join(table.column_names)}; name it with text_field"
        )
    return table[field]


def _hub_table(dataset: str, hub_id: str, **options: Option) -> Any:
    """`datasets.load_dataset`, with every way it can fail turned into one line."""
    datasets = import_package("datasets", f"dataset {dataset!r}")
    try:
        return datasets.load_dataset(hub_id, **options)
    except Exception as error:  # the network, the hub and the parsers each raise their own kinds
        near = "" if dataset in DATASETS else did_you_mean(dataset, DATASETS)
        raise CompressError(
            f"dataset {dataset!r} ({hub_id}) could not be read: {reason_of(error)}: "
            f"check the name{near} and the network, "
            "or use python-stdlib, FILE.txt or FILE.jsonl"
        ) from error
