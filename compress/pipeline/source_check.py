"""The check against the source: our 16-bit forward of a model beside that of transformers.

The self-check of a result compares us with ourselves: what we read wrongly is written wrongly and
agrees. Here the untouched source folder runs in plain transformers, and its logits for a short
prompt must be those of our own path (skeleton, names, ties, a layer at a time, norms fused and
weights rotated where the recipe rotates), both in fp32:

    max|a - b| / max|b| <= 1e-4

It comes before anything is quantised. A multimodal model gets a prompt with an image as well.

Memory stays within what `plan` foretells: a model that does not fit there runs in a process of its
own, its decoder's weights on disk but for the module at work (accelerate's offload).

    facts = check_source(inputs, budget=plan.peak_memory["host"])
"""

import gc
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NotRequired, TypedDict

import torch
from torch import Tensor, nn

from compress.data.prompts import probe_prompt
from compress.errors import CheckpointError
from compress.memory import release_memory
from compress.models.config_values import reason_of, without_names
from compress.models.skeleton import Skeleton
from compress.models.vision import Encoded, encode, rows_of, vision_at_work
from compress.pipeline.inputs import RunInputs
from compress.pipeline.memory_forecast import FIXED_MEMORY
from compress.pipeline.script_process import reported
from compress.rotation.model import RotatedModel
from compress.storage.indexed import indexed
from compress.storage.safetensors import read_tensors, save_tensors

SCRIPT = Path(__file__).with_name("source_script.py")
TOLERANCE = 1e-4
TOKENS = 32  # of the text
SMALL = 32 * 2**20  # bytes of a model that may always be whole in memory: lost in the fixed part


class ProbeFacts(TypedDict):
    """How far the logits of one prompt are apart."""

    relative_error: float
    tokens: int


class SourceCheck(TypedDict):
    """What modelpress.json says about the check."""

    skipped: NotRequired[str]  # why; nothing else is there then
    tolerance: NotRequired[float]
    probes: NotRequired[dict[str, ProbeFacts]]  # "text", "image"
    offloaded: NotRequired[bool]  # whether transformers had its weights on disk
    seconds: NotRequired[float]


@torch.no_grad()
def check_source(inputs: RunInputs, budget: int, tolerance: float = TOLERANCE) -> SourceCheck:
    """Compares the two forwards of the recipe's model.

    budget: bytes that the run may take, as the plan foretells.

    Raises CheckpointError if the logits differ by more than `tolerance` (a NaN always does), or if
    transformers cannot run the folder.
    """
    started, skeleton = time.perf_counter(), inputs.skeleton
    probes = _probes(skeleton)
    ours = _our_logits(inputs.rotated_model(), probes)
    release_memory()
    offloaded = _whole(skeleton) > max(budget - FIXED_MEMORY, SMALL)
    theirs = _elsewhere(skeleton, probes) if offloaded else _here(skeleton, probes)
    gc.collect()  # the whole model, whose modules know of one another
    facts: dict[str, ProbeFacts] = {}
    for (name, probe), found, expected in zip(probes.items(), ours, theirs, strict=True):
        error = float((found - expected).abs().max() / expected.abs().max())
        facts[name] = {"relative_error": error, "tokens": probe["input_ids"].numel()}
        if not error <= tolerance:
            raise CheckpointError(
                f"{skeleton.folder}: our 16-bit forward of a prompt ({name}) gives other logits "
                f"than transformers: relative error {error:.3g}, tolerance {tolerance:.3g}. "
                f"Nothing was quantised, since this model is not read as it should be; "
                f"--no-check-source goes on all the same"
            )
    release_memory()
    return {
        "tolerance": tolerance,
        "probes": facts,
        "offloaded": offloaded,
        "seconds": round(time.perf_counter() - started, 2),
    }


# ---- the prompts --------------------------------------------------------------------------------


def _probes(skeleton: Skeleton) -> dict[str, dict[str, Tensor]]:
    """Arguments of a forward, by what stands in the prompt."""
    probes = {"text": {"input_ids": _text(skeleton)}}
    if skeleton.spec.vision is not None:
        image = probe_prompt(skeleton)
        probes["image"] = {k: v for k, v in image.items() if isinstance(v, Tensor)}
    return probes


def _text(skeleton: Skeleton) -> Tensor:
    """Random tokens [1, T], always the same, none of which means an image or an end."""
    context = getattr(skeleton.config, "max_position_embeddings", None) or TOKENS
    special = set(_special_ids(skeleton.model_config.to_dict()))
    usual = [i for i in range(skeleton.config.vocab_size) if i not in special] or [0]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(usual), (1, min(TOKENS, context)), generator=generator)
    return torch.tensor(usual)[drawn]


def _special_ids(config: Mapping[str, object]) -> Iterator[int]:
    """The values of all keys such as `image_token_id` and `image_token_index`."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _special_ids(value)
        elif str(key).endswith(("_token_id", "_token_index")):
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int):
                    yield number


# ---- our forward --------------------------------------------------------------------------------


def _our_logits(model: RotatedModel, probes: Mapping[str, dict[str, Tensor]]) -> list[Tensor]:
    """Logits [B, T, V] of each probe, every layer opened once."""
    encoded = [_embedded(model, probe) for probe in probes.values()]
    states = [part.embeds.to(model.device) for part in encoded]
    release_memory()
    for index in range(model.skeleton.num_layers):
        with model.layer(index) as layer:
            states = [
                _through(model, layer, index, x, part)
                for x, part in zip(states, encoded, strict=True)
            ]
        release_memory()
        # Squares, because the next norm takes them.
        if not all(bool(x.square().sum(-1).isfinite().all()) for x in states):
            raise CheckpointError(
                f"{model.skeleton.folder}: {model.spec.layers}.{index}.* gives values that "
                f"overflow fp32: the checkpoint is damaged"
            )
    with model.logits() as head:
        return [head(x).float().cpu() for x in states]


def _through(
    model: RotatedModel, layer: nn.Module, index: int, x: Tensor, prompt: Encoded
) -> Tensor:
    """A prompt's x behind a layer, with what its family adds there."""
    y = model.forward(layer, index, x, prompt.told)
    return prompt.added[index].to(y) if index in prompt.added else y


def _embedded(model: RotatedModel, probe: dict[str, Tensor]) -> Encoded:
    table = model.embedding().dense(torch.float32)
    if len(probe) == 1:
        return Encoded(model.skeleton.scaled(table[probe["input_ids"]].float()), None)
    with vision_at_work(model.skeleton, model.vision_tensors(rounded=False), model.device):
        return encode(model.skeleton, probe, rows_of(table), model.device)


# ---- the forward of transformers ----------------------------------------------------------------


def _whole(skeleton: Skeleton) -> int:
    """Bytes of the model in fp32, beside its files."""
    numbers = sum(parameter.numel() for parameter in skeleton.model.parameters())
    return 4 * numbers + skeleton.reader.nbytes()


def _kind(skeleton: Skeleton) -> str:
    return "AutoModelForCausalLM" if skeleton.spec.vision is None else "AutoModelForImageTextToText"


def _places(skeleton: Skeleton) -> dict[str, str]:
    """Where weights are kept: on disk those of embedding, decoder layers and head.

    A tower stays in memory, as it does in a run: accelerate cannot offload all that is in some.
    """
    spec = skeleton.spec
    on_disk = (spec.embedding, spec.layers, spec.head)
    around = {name.rpartition(".")[0] for name in on_disk}
    around |= {name.rpartition(".")[0] for name in around} | {""}
    places = dict.fromkeys(on_disk, "disk")
    for parent in sorted(around):
        module = skeleton.model.get_submodule(parent)
        inside = [*module._parameters, *module._buffers, *module._modules]
        for name in (f"{parent}.{child}".removeprefix(".") for child in inside):
            if name not in around:
                places.setdefault(name, "cpu")
    return places


def _here(skeleton: Skeleton, probes: Mapping[str, dict[str, Tensor]]) -> list[Tensor]:
    """Logits in this process."""
    from compress.pipeline.source_script import source_logits  # imports transformers

    try:
        with indexed(skeleton.folder) as place:
            return source_logits(str(place), _kind(skeleton), list(probes.values()))
    except (ValueError, RuntimeError, OSError, KeyError, ImportError) as error:
        raise _fails(skeleton, reason_of(error)) from error


def _elsewhere(skeleton: Skeleton, probes: Mapping[str, dict[str, Tensor]]) -> list[Tensor]:
    """Logits of a process that holds one module's weights at a time."""
    with (
        indexed(skeleton.folder) as place,
        tempfile.TemporaryDirectory(prefix="modelpress-") as temporary,
    ):
        files = [Path(temporary, f"{name}.safetensors") for name in probes]
        for file, probe in zip(files, probes.values(), strict=True):
            save_tensors(file, probe)
        arguments = [str(place.resolve()), _kind(skeleton), "--probes", *map(str, files)]
        arguments += ["--places", json.dumps(_places(skeleton))]
        arguments += ["--offload", str(Path(temporary, "offload"))]
        report = reported(SCRIPT, arguments)
        if "failure" in report:
            raise _fails(skeleton, without_names(report["failure"]))
        return [read_tensors(file)["logits"] for file in files]


def _fails(skeleton: Skeleton, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{skeleton.folder} does not run in transformers, so nothing says that it is read as it "
        f"should be: {reason[:300]}; --no-check-source goes on all the same"
    )
