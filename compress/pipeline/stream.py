"""The calibration tokens on their way through the decoder layers, one layer at a time.

Holds what a layer needs of each batch: hidden states (in memory or on disk), position ids, and
which tokens count; of several ranks, each has its own batches. Prompts with images are encoded at
the start; where visual tokens are pruned, each stage of the strategy shortens the prompts before
its layer, so that pruned tokens are neither attended to nor counted in any Hessian, and recycled
ones are.

A multimodal model's stream ends with a probe: a prompt that is never pruned and never counts, whose
logits any engine can check.

    stream = CalibrationStream(skeleton, data, stages, folder, on_disk=False)
    stream.embed(encoder, table); ...; stream.advance(y, layer=1)
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict

import torch
from torch import Tensor

from compress.data.activations import TOKENS_PER_BATCH, ActivationStore
from compress.data.prompts import CalibrationData, ImagePrompts
from compress.errors import CheckpointError, UsageError
from compress.models.own_forward import LayerInputs, Told
from compress.models.skeleton import Skeleton
from compress.models.vision import Added, Encoded, EncodesImages, Inputs, Lookup, encode
from compress.pruning.costs import CostTotals, DecoderShape, PruningStats, prompt_stats
from compress.pruning.encoding import EncodedImages
from compress.pruning.families import tower_for
from compress.pruning.prompt import PromptImage, PrunedPrompt, take
from compress.pruning.stages import Stages, seed_of
from compress.ranks import Ranks
from compress.storage.files import file_digest
from compress.storage.safetensors import read_tensors, save_tensors

if TYPE_CHECKING:  # slow to import
    from transformers import ProcessorMixin

Table = Callable[[], Lookup]  # reads the embedding
# Opens the vision tower for as long as images are encoded.
Encoder = Callable[[], AbstractContextManager[None]]


class StreamState(TypedDict):
    """What is known of the files that the next layer needs."""

    inputs: list[int]  # the checksum of each batch
    full_precision: NotRequired[list[int]]  # the same of the 16-bit model's
    stages: dict[str, str]  # the digest of each file beside them, as which visual tokens are left


class CalibrationStream:
    """The batches, and where they are.

    Attributes:
        batches: ids and mask [B, T] of the tokens that are still there, without the probe's.
        numbers: which of all ranks' batches these are, with the probe's.
        x: the inputs of the next layer, [B, T, d] each; the probe's last.
        told, added: what the family tells its language model of a batch, None for text, and what it
            adds to the stream behind layers; the probe's last.
        x0: those of the 16-bit model, for every batch but the probe; None where nobody asks.
        probe: what the probe is made of, None for a text model.
        scores: attention of prompts' last tokens [1, T] in the layer that has just run, by batch.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        data: CalibrationData,
        stages: Stages | None,
        folder: Path,
        on_disk: bool,
        *,
        full_precision: bool = False,
        probe: Inputs | None = None,
        processor: "ProcessorMixin | None" = None,
        device: str = "cpu",
        ranks: Ranks | None = None,
    ):
        self.ranks = ranks or Ranks()
        self.skeleton, self.data, self.stages = skeleton, data, stages
        self.folder, self.on_disk, self.device = folder, on_disk, device
        self.probe, self.processor = probe, processor
        batches = data.batches(TOKENS_PER_BATCH)
        self.share = self.ranks.share(len(batches))
        self.batches = batches[self.share.start : self.share.stop]
        self.numbers = [*self.share, *([] if probe is None else [len(batches)])]
        self.told: list[Told | None] = []
        self.added: list[dict[int, Added]] = []
        self.prompts: dict[int, PrunedPrompt] = {}  # of batches with images, if any are pruned
        self.scores: dict[int, Tensor] = {}
        self._left: dict[str, str] = {}  # digests of what the stages have noted
        self.x = ActivationStore()
        self.x0 = ActivationStore() if full_precision else None
        if full_precision and stages is not None and isinstance(data, ImagePrompts):
            raise UsageError(
                "quantize.target: full_precision needs every token in both models, and "
                "prune_visual_tokens prunes the calibration prompts: use quantized, or text"
            )
        folder.mkdir(parents=True, exist_ok=True)

    # ---- the start ------------------------------------------------------------------------------

    def embed(self, encoder: Encoder, table: Table, exact: Table | None = None) -> None:
        """Puts the first layer's inputs in place.

        `exact`: reads the embedding of the 16-bit model, where it is another.
        """
        self.x = self._store(self.place(0))
        if self.x0 is not None:
            self.x0 = self._store(self.twin_place(0))
        self.told, self.added = [], []
        for i, encoded in enumerate(self._encoded(encoder, table())):
            self.told.append(encoded.told)
            self.added.append(encoded.added)
            self.x.append(encoded.embeds)
            if self.x0 is not None and exact is None and i < len(self.batches):
                self.x0.append(encoded.embeds)
        if self.x0 is not None and exact is not None:
            for _, encoded in zip(self.batches, self._encoded(encoder, exact()), strict=False):
                self.x0.append(encoded.embeds)
        self._narrow(0)

    def restore(self, layer: int, encoder: Encoder, table: Table, state: StreamState) -> None:
        """Puts the inputs of `layer` in place, which an earlier process has written.

        `state`: as that process had it. Raises CheckpointError if they are not there, or changed.
        """
        self._left = dict(state["stages"])
        d = self.skeleton.config.hidden_size
        lengths = [ids.shape for ids, _ in self.batches]
        self.told, self.added = [None] * len(lengths), [{} for _ in lengths]
        if self.probe is not None or isinstance(self.data, ImagePrompts):
            # Images are encoded again, for their places and importances.
            again = [(e.told, e.added) for e in self._encoded(encoder, table())]
            self.told, self.added = [told for told, _ in again], [added for _, added in again]
        if self.probe is not None:
            lengths.append(self.probe["input_ids"].shape)
        for stage in sorted(self.stages.numbers if self.stages and self.prompts else ()):
            if stage <= layer:
                self._narrow_again(stage)
        lengths[: len(self.batches)] = [ids.shape for ids, _ in self.batches]
        shapes = [torch.Size([*length, d]) for length in lengths]
        self.x = self._found(self.place(layer), shapes, state["inputs"])
        if self.x0 is not None:
            shapes = shapes[: len(self.batches)]
            self.x0 = self._found(self.twin_place(layer), shapes, state["full_precision"])

    def _found(
        self, place: tuple[Path, str], shapes: list[torch.Size], sums: list[int]
    ) -> ActivationStore:
        own = [sums[number] for number in self.numbers[: len(shapes)]]
        found = ActivationStore.found(*place, shapes, own, self.numbers)
        return found if self.on_disk else found.in_memory()

    def _encoded(self, encoder: Encoder, lookup: Lookup) -> Iterator[Encoded]:
        """The embeddings of every batch, and of the probe."""
        images = isinstance(self.data, ImagePrompts)
        if not images:
            for ids, _ in self.batches:
                yield Encoded(self.skeleton.scaled(lookup(ids)), None)
        if self.probe is None and not (images and self.batches):
            return
        with encoder():
            if isinstance(self.data, ImagePrompts):
                for i, number in enumerate(self.share):
                    yield self._encode(i, self.data.inputs[number], lookup)
            if self.probe is not None:
                yield encode(self.skeleton, self.probe, lookup, self.device)

    def _encode(self, i: int, inputs: Inputs, lookup: Lookup) -> Encoded:
        if self.stages is None:
            return encode(self.skeleton, inputs, lookup, self.device)
        base, config = self.skeleton.base, self.skeleton.model_config
        assert isinstance(base, EncodesImages)
        tap = self.stages.tap(base, tower_for(config.model_type), self.processor)
        images = EncodedImages(tap)
        handles = tap.install()
        base.get_image_features = images.noting(base.get_image_features)
        try:
            encoded = encode(self.skeleton, inputs, lookup, self.device)
        finally:
            del base.get_image_features  # the class's own is there again
            for handle in handles:
                handle.remove()
        _, mask = self.batches[i]
        self.prompts[i] = PrunedPrompt(mask, _on_cpu(images.placed(inputs, config.image_token_id)))
        return encoded

    # ---- from layer to layer --------------------------------------------------------------------

    def place(self, layer: int) -> tuple[Path, str]:
        """Where the inputs of a layer lie. Two sets of files take turns, so that those of a layer
        stay until the next one's are whole, and files are written over rather than made anew."""
        return self.folder, f"inputs-{layer % 2}"

    def twin_place(self, layer: int) -> tuple[Path, str]:
        """The same of the 16-bit model."""
        return self.folder, f"full-precision-{layer % 2}"

    def outputs(self, layer: int) -> ActivationStore:
        """Where the outputs of `layer` go."""
        return self._store(self.place(layer + 1)) if self.on_disk else self.x

    def twin_outputs(self, layer: int) -> ActivationStore | None:
        """The same of the 16-bit model."""
        if self.x0 is None or not self.on_disk:
            return self.x0
        return self._store(self.twin_place(layer + 1))

    def scratch(self) -> ActivationStore:
        """An empty store for what waits inside a layer."""
        return ActivationStore(
            self.folder if self.on_disk else None, "work", self.numbers, summed=False
        )

    def spool(self) -> Path | None:
        """Where activations go that wait; None: they stay in memory."""
        return self.folder if self.on_disk else None

    def _store(self, place: tuple[Path, str]) -> ActivationStore:
        """An empty store: there, or in memory."""
        folder, name = place
        return ActivationStore(folder if self.on_disk else None, name, self.numbers)

    def layer_inputs(self, source: int, i: int, x: Tensor) -> LayerInputs:
        """What the decoder layer `source` of the model needs beside batch i."""
        return self.skeleton.layer_inputs(source, x, self.told[i])

    def advance(self, y: ActivationStore, layer: int, y0: ActivationStore | None = None) -> None:
        """Makes `y` the inputs of `layer`, shortened by the stage there, and puts them on disk.

        `y0`: the same of the 16-bit model.
        """
        self.x, self.x0 = y, y0
        for i, added in enumerate(self.added):
            if (behind := added.pop(layer - 1, None)) is not None:
                for store in filter(None, (self.x, self.x0 if i < len(self.batches) else None)):
                    store[i] = behind.to(store[i])
        self._narrow(layer)
        self.x.dump(*self.place(layer))
        if self.x0 is not None:
            self.x0.dump(*self.twin_place(layer))

    def state(self) -> StreamState:
        """What a resumed run checks the files against that it finds: those of all ranks."""
        state: StreamState = {"inputs": self._sums(self.x), "stages": dict(self._left)}
        if self.x0 is not None:
            state["full_precision"] = self._sums(self.x0)
        return state

    def _sums(self, store: ActivationStore) -> list[int]:
        """The checksum of every rank's batches, in their order."""
        own = dict(zip(map(str, self.numbers), store.sums, strict=False))
        found = {int(n): s for sums in self.ranks.collect(own) for n, s in sums.items()}
        return [found[number] for number in sorted(found)]

    def note(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keeps tensors beside the activations; `state` has the digest of the file."""
        save_tensors(self.folder / name, tensors)
        self._left[name] = file_digest(self.folder / name)

    def noted(self, name: str) -> dict[str, Tensor]:
        """What an earlier process has kept, checked; CheckpointError if it is not there."""
        file = self.folder / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: start again with --no-resume")
        if self._left.get(name) != file_digest(file):
            raise CheckpointError(f"{file} is not what was written: start again with --no-resume")
        return read_tensors(file)

    def ranks_before(self, layer: int) -> bool:
        """Whether the stage before `layer` asks what the layer before it attends to."""
        stages = self.stages
        if stages is None or not self.prompts or layer not in stages.numbers:
            return False
        return stages.strategy.ranks_by_language_attention

    def _narrow(self, layer: int) -> None:
        """Applies the stage before `layer`, and notes which tokens are left, for a resumed run."""
        if self.stages is None or not self.prompts or layer not in self.stages.numbers:
            return
        left: dict[str, Tensor] = {}
        for i, prompt in self.prompts.items():
            generator = torch.Generator().manual_seed(self._seed(i, layer))
            scores = self.scores.get(i)
            added = {k: x.whole(self.x[i].shape) for k, x in self.added[i].items()}
            hidden, order = self.stages.narrow(
                prompt,
                layer,
                self.x[i].cpu(),
                generator,
                None if scores is None else scores.cpu(),
                added,
            )
            self.added[i] = {k: Added.of(x) for k, x in added.items()}
            for k, x in self.added[i].items():
                left |= {f"{i}.added.{k}.slots": x.slots, f"{i}.added.{k}.values": x.values}
            if order is not None:
                self._shorten(i, layer, order)
            self.x[i] = hidden
            for j, image in enumerate(prompt.images):
                left[f"{i}.{j}.alive"] = image.alive
                if image.merged is not None:
                    left[f"{i}.{j}.merged"] = image.merged
        self.scores = {}
        self.note(self._left_file(layer), left)

    def _narrow_again(self, layer: int) -> None:
        """The stage before `layer` as an earlier process has decided it."""
        assert self.stages is not None
        left = self.noted(self._left_file(layer))
        for i, prompt in self.prompts.items():
            for j, image in enumerate(prompt.images):
                image.alive = left[f"{i}.{j}.alive"]
                image.merged = left.get(f"{i}.{j}.merged")
                image.kept.append((layer, len(image.alive)))
            for k in self.added[i]:
                parts = (left[f"{i}.added.{k}.{part}"] for part in ("slots", "values"))
                if k >= layer:  # what comes before was added before
                    self.added[i][k] = Added(*parts)
            order = prompt.narrow(layer)
            if order is not None:
                self._shorten(i, layer, order)

    def _shorten(self, i: int, layer: int, order: Tensor) -> None:
        """Batch i without the tokens that are not in `order` [1, T']."""
        assert self.stages is not None
        ids, mask = self.batches[i]
        told = self.told[i] or {}
        positions = told.get("position_ids", torch.arange(ids.shape[1])[None])
        # Always a mask: without one, gaps in the positions would read as packed sequences.
        self.told[i] = {
            "position_ids": self.stages.positions(self.prompts[i], layer, positions, order),
            "attention_mask": torch.ones(order.shape, dtype=torch.long),
        }
        self.batches[i] = take(ids, order), take(mask, order)

    def _left_file(self, layer: int) -> str:
        return f"visual-{layer:05d}.safetensors"

    def _seed(self, i: int, layer: int) -> int:
        """The seed of one prompt at one stage, so that a resumed run draws the same numbers."""
        assert self.stages is not None
        return seed_of(self.stages.strategy.seed, self.numbers[i], layer)

    # ---- the end --------------------------------------------------------------------------------

    def pruning_stats(self, element_bytes: int) -> CostTotals | None:
        """What was kept of the calibration prompts, and their costs; None if none was pruned."""
        if not self.prompts:
            return None
        shape = DecoderShape.of(self.skeleton.config, element_bytes)
        return PruningStats([prompt_stats(shape, p) for p in self.prompts.values()]).as_dict()


def _on_cpu(images: list[PromptImage]) -> list[PromptImage]:
    """Moves what is known of the images' tokens to the CPU, where prompts are shortened."""
    for image in images:
        image.tokens = image.tokens.each(Tensor.cpu)
        image.positions, image.alive = image.positions.cpu(), image.alive.cpu()
    return images
