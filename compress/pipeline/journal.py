"""The journal of an unfinished run: which layers are done, and what the next one needs.

Kept in OUT/.modelpress/ while the layer walk is under way:

    journal.jsonl              a header with the run's fingerprint, then a line per layer
    layer-00012.safetensors    what layer 12 puts into the checkpoint

A line is {"facts": ..., "sha256": of the layer's file, "state": of what the next layer needs}, and
behind a tab a digest of that.

A layer counts as done once its line is in the journal, and the line is written last, when the
layer's tensors, and the activations that the next one needs, are on disk. So a run that is killed
at any moment continues behind the last whole layer and ends with the same bytes.

Policy: a last line that was cut short is a layer that is not done, and is dropped. A journal of
another run (another fingerprint) is a UsageError; a file the journal names and the folder lacks, or
that is no longer what was written, is a CheckpointError.

    journal = Journal(out / ".modelpress", fingerprint)
    for layer in range(journal.open(resume=True), layers):
        journal.record(layer, tensors, {"error": 0.1}, stream.state())
"""

import hashlib
import json
from pathlib import Path
from typing import NotRequired, Required, TypedDict

from torch import Tensor

from compress.errors import CheckpointError, CompressError, UsageError
from compress.pipeline.stream import StreamState
from compress.quantization.token_weights import WeightFacts
from compress.recipe.quantize import Policy
from compress.storage.files import append_line, file_digest, write_text
from compress.storage.safetensors import save_tensors

FORMAT = 2  # of the journal; a later layout gets another number
OWN_FILES = ("journal.jsonl", ".journal.jsonl.*", "layer-*.safetensors", ".layer-*.safetensors.*")


class ModuleFacts(TypedDict):
    """How a linear was quantised, as modelpress.json has it."""

    name: str  # in the result
    bits: int
    group_size: int | None  # None: one scale per output channel
    error: float | None  # sum w ||y - Q x||^2 / sum w ||y||^2, y the target; None without a Hessian
    damping: float | None  # that the Hessian's factorisation needed
    dead_columns: int  # inputs that were zero on every calibration token
    changed: list[float]  # share of codes that each refinement sweep changed
    seconds: float
    rounded_to_nearest: NotRequired[bool]  # it was better than the solver's, by the Hessian
    effective_sample_size: NotRequired[float]  # where it is not the layer's: all tokens alike


class ScarceExpert(TypedDict):
    """An expert that too few calibration tokens reached: which, how many did, what was done."""

    expert: int
    rows: int
    policy: Policy


class LayerFacts(WeightFacts, total=False):
    """What became of a decoder layer, or of the head."""

    layer: Required[int | None]  # None: the head
    modules: Required[list[ModuleFacts]]
    source_layer: int  # where it is another, since layers were left out
    effective_sample_size: float  # averaged over windows; with a Hessian
    tokens_per_window: float
    token_weights: list[float]  # of the first tokens, in the layers that the report shows
    scarce_experts: list[ScarceExpert]
    seconds: float
    ranks: int  # that shared the layer, where there were several
    deterministic: bool  # whether these added up sums as one process does


class Entry(TypedDict):
    """A line of the journal."""

    facts: LayerFacts
    sha256: str
    state: StreamState


class Journal:
    """The state of one run in one folder. Layers are recorded in order, from 0.

    fingerprint: any string that is equal exactly for runs that would give the same bytes (a hash
    of the recipe, the model and the calibration data).
    """

    def __init__(self, folder: str | Path, fingerprint: str):
        self.folder = Path(folder)
        self.path = self.folder / "journal.jsonl"
        self.fingerprint = fingerprint
        self._entries: list[Entry] = []

    def open(self, resume: bool, replace: bool = False) -> int:
        """Starts afresh or continues; returns the number of layers that are done.

        `replace`: an unfinished run of something else, or a damaged one, is thrown away.

        Raises UsageError if there is a journal of another run and `resume` is asked for, and
        CheckpointError if the journal names a file that is not there, or was changed since.
        """
        if not resume:
            return self._start()
        try:
            return self._continue()
        except CompressError:
            if not replace:
                raise
            return self._start()

    def _continue(self) -> int:
        header, entries, whole = self._read()
        if not entries:
            return self._start()
        if header != self._header():
            raise UsageError(
                f"{self.folder} holds an unfinished run with another recipe, model or data: "
                f"continue it with what it was started with, or start again with --no-resume "
                f"or --overwrite"
            )
        for layer, entry in enumerate(entries):
            self._require(self._layer_file(layer), entry)
        self._entries = entries
        with self.path.open("r+b") as file:
            file.truncate(whole)
        return len(entries)

    def record(
        self, layer: int, tensors: dict[str, Tensor], facts: LayerFacts, state: StreamState
    ) -> None:
        """Puts a finished layer on disk: its tensors, then its facts.

        `state`: of what the next layer needs, which is on disk already.
        """
        done = len(self._entries)
        assert layer == done, f"layer {layer} recorded after {done} layers"
        part = self._layer_file(layer)
        save_tensors(part, tensors)
        entry: Entry = {"facts": facts, "sha256": file_digest(part), "state": state}
        line = _line(entry)
        append_line(self.path, line.removesuffix("\n"))
        self._entries.append(_entry(line))

    def entries(self) -> list[Entry]:
        """What the journal holds of every finished layer, for another process to `follow`."""
        return self._entries

    def follow(self, entries: list[Entry]) -> None:
        """Reads for another process, which keeps the journal and has told its entries."""
        self._entries = entries

    def facts(self) -> list[LayerFacts]:
        """The facts of every finished layer, in order."""
        return [entry["facts"] for entry in self._entries]

    def state(self) -> StreamState:
        """Of what the layer behind the last finished one needs."""
        return self._entries[-1]["state"]

    def part_files(self) -> list[Path]:
        """The tensors of every finished layer, in order; `merge_shards` takes them."""
        return [self._layer_file(layer) for layer in range(len(self._entries))]

    def clear(self) -> None:
        """Removes the journal's files, and its folder if nothing else is in it."""
        self._entries = []
        for pattern in OWN_FILES:
            for path in sorted(self.folder.glob(pattern)):  # the journal goes first
                path.unlink()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    # ---- files ----------------------------------------------------------------------------------

    def _header(self) -> dict[str, object]:
        return {"format": FORMAT, "fingerprint": self.fingerprint}

    def _start(self) -> int:
        self.clear()
        write_text(self.path, json.dumps(self._header()) + "\n")
        return 0

    def _read(self) -> tuple[dict[str, object] | None, list[Entry], int]:
        """Header (None without a journal), entries, and the length of what is whole in bytes."""
        if not self.path.is_file():
            return None, [], 0
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1  # a line without its end was cut short
        try:
            header, *entries = data[:whole].decode().splitlines()
            return json.loads(header), [_entry(line) for line in entries], whole
        except ValueError:
            raise CheckpointError(
                f"{self.path} is damaged: start again with --no-resume or --overwrite"
            ) from None

    def _layer_file(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05d}.safetensors"

    def _require(self, path: Path, entry: Entry) -> None:
        fault = "" if path.is_file() else "is missing"
        if not fault and file_digest(path) != entry["sha256"]:
            fault = "is not what was written"
        if fault:
            raise CheckpointError(
                f"{self.path} counts on {path.name}, which {fault}: start again with --no-resume "
                "or --overwrite"
            )


def _line(entry: Entry) -> str:
    text = json.dumps(entry, sort_keys=True)
    return f"{text}\t{_digest(text)}\n"


def _entry(line: str) -> Entry:
    """What `_line` wrote; ValueError for anything else."""
    text, _, digest = line.rstrip("\n").partition("\t")
    if digest != _digest(text):
        raise ValueError("not the line that was written")
    return json.loads(text)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
