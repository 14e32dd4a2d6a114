"""The journal of an unfinished run: which layers are done, and what the next one needs.

Kept in OUT/.modelpress/ while the layer walk is under way:

    journal.jsonl              a header with the run's fingerprint, then a line per layer
    layer-00012.safetensors    what layer 12 puts into the checkpoint

A layer counts as done once its line is in the journal, and the line is written last, when the
layer's tensors, and the activations that the next one needs, are on disk. So a run that is killed
at any moment continues behind the last whole layer and ends with the same bytes.

Policy: a last line that was cut short is a layer that is not done, and is dropped. A journal of
another run (another fingerprint) is a UsageError; a file the journal names and the folder lacks is
a CheckpointError.

    journal = Journal(out / ".modelpress", fingerprint)
    for layer in range(journal.open(resume=True), layers):
        journal.record(layer, tensors, {"error": 0.1})
"""

import json
from pathlib import Path
from typing import NotRequired, TypedDict

from torch import Tensor

from compress.errors import CheckpointError, UsageError
from compress.storage.files import append_line, write_text
from compress.storage.safetensors import read_header, save_tensors

FORMAT = 1  # of the journal; a later layout gets another number
OWN_FILES = ("journal.jsonl*", "layer-*.safetensors*")


class ModuleFacts(TypedDict):
    """How a linear was quantised, as modelpress.json has it."""

    name: str  # in the result
    bits: int
    group_size: int | None  # None: one scale per output channel
    error: float | None  # tr((W-Q) H (W-Q)^T) / tr(W H W^T); None without a Hessian
    damping: float | None  # that the Hessian's factorisation needed
    dead_columns: int  # inputs that were zero on every calibration token
    changed: list[float]  # share of codes that each refinement sweep changed
    seconds: float


class LayerFacts(TypedDict):
    """What became of a decoder layer, or of the head."""

    layer: int | None  # None: the head
    modules: list[ModuleFacts]
    source_layer: NotRequired[int]  # where it is another, since layers were left out
    effective_sample_size: NotRequired[float]  # averaged over windows; with a Hessian
    tokens_per_window: NotRequired[float]
    seconds: NotRequired[float]


class Journal:
    """The state of one run in one folder. Layers are recorded in order, from 0.

    fingerprint: any string that is equal exactly for runs that would give the same bytes (a hash
    of the recipe, the model and the calibration data).
    """

    def __init__(self, folder: str | Path, fingerprint: str):
        self.folder = Path(folder)
        self.path = self.folder / "journal.jsonl"
        self.fingerprint = fingerprint
        self._facts: list[LayerFacts] = []

    def open(self, resume: bool, replace: bool = False) -> int:
        """Starts afresh or continues; returns the number of layers that are done.

        `replace`: an unfinished run of something else is thrown away, not an error.

        Raises UsageError if there is a journal of another run and `resume` is asked for, and
        CheckpointError if the journal names a file that is not there.
        """
        header, entries, whole = self._read()
        if not resume or not entries:
            return self._start()
        if header != self._header():
            if replace:
                return self._start()
            raise UsageError(
                f"{self.folder} holds an unfinished run with another recipe, model or data: "
                f"continue it with what it was started with, or start again with --no-resume "
                f"or --overwrite"
            )
        self._facts = entries
        for layer in range(len(entries)):
            self._require(self._layer_file(layer))
        with self.path.open("r+b") as file:
            file.truncate(whole)
        return len(entries)

    def record(self, layer: int, tensors: dict[str, Tensor], facts: LayerFacts) -> None:
        """Puts a finished layer on disk: its tensors, then its facts."""
        assert layer == len(self._facts), f"layer {layer} recorded after {len(self._facts)} layers"
        save_tensors(self._layer_file(layer), tensors)
        line = json.dumps(facts, sort_keys=True)
        append_line(self.path, line)
        self._facts.append(json.loads(line))

    def facts(self) -> list[LayerFacts]:
        """The facts of every finished layer, in order."""
        return list(self._facts)

    def part_files(self) -> list[Path]:
        """The tensors of every finished layer, in order; `merge_shards` takes them."""
        return [self._layer_file(layer) for layer in range(len(self._facts))]

    def clear(self) -> None:
        """Removes the journal's files, and its folder if nothing else is in it."""
        self._facts = []
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

    def _read(self) -> tuple[dict[str, object] | None, list[LayerFacts], int]:
        """Header (None without a journal), entries, and the length of what is whole in bytes."""
        if not self.path.is_file():
            return None, [], 0
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1  # a line without its end was cut short
        try:
            header, *entries = [json.loads(line) for line in data[:whole].splitlines()]
        except ValueError:
            raise CheckpointError(
                f"{self.path} is damaged: start again with --no-resume or --overwrite"
            ) from None
        return header, entries, whole

    def _layer_file(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05d}.safetensors"

    def _require(self, path: Path) -> None:
        if not path.is_file():
            raise CheckpointError(
                f"{self.path} counts on {path.name}, which is missing: start again with "
                f"--no-resume or --overwrite"
            )
        read_header(path)
