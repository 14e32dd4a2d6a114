"""The output folder of a run: put together beside its final place, checked, moved, documented.

    config.json, generation_config.json       the source's, plus quantization_config
    tokenizer, processor, licence, ...        the source's: all but weights, and what is above
    pruning.json         how visual tokens are pruned, if they are; also a key of config.json
    model-0000k-of-0000n.safetensors, model.safetensors.index.json
    recipe.yaml          every default spelled out, so that the same bytes can be made again
    modelpress.json      where it came from, what was done, what it took
    report.html, README.md, eval/results.json

Policy: until the weights are whole and have been reloaded, everything lives in OUT/.modelpress, and
is then published together with what describes it. An evaluation comes after that, and the documents
are written again with its figures.

    assemble(final, parts, inputs, plan); document(final, final, result, recipe, provenance)
    publish(final, output)
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from compress.checkpoint.compressed_tensors import quantization_config
from compress.checkpoint.packed_formats import FORMATS
from compress.errors import CompressError
from compress.models.skeleton import Skeleton
from compress.pipeline.description import describe, merged, write_results
from compress.pipeline.inputs import RunInputs
from compress.pipeline.kept_layers import shorten
from compress.pipeline.plan import Plan
from compress.pipeline.result import RunResult
from compress.pruning.saved import save_strategy
from compress.recipe.recipe import Recipe
from compress.recipe.strategy import PruneStrategy
from compress.storage.companions import copy_companions
from compress.storage.files import parse_size, write_json
from compress.storage.output_folder import files_below
from compress.storage.safetensors import CheckpointReader, merge_shards


def assemble(
    final: Path,
    parts: list[Path],
    inputs: RunInputs,
    plan: Plan,
    strategy: PruneStrategy | None = None,
) -> None:
    """Writes the checkpoint to the folder `final` from the tensors in `parts`.

    `strategy`: how it prunes visual tokens, in the place of one that the source had.

    Raises:
        CompressError: a planned module is missing, or the bytes are not those planned.
    """
    shutil.rmtree(final, ignore_errors=True)
    final.mkdir()
    recipe, skeleton = inputs.recipe, inputs.skeleton
    merge_shards(parts, final, parse_size(recipe.save.shard_size))
    config = checkpoint_config(skeleton, plan, inputs.dtype)
    write_json(final / "config.json", config)
    copy_companions(skeleton.folder, final)
    if strategy is not None:
        save_strategy(strategy, final)
    (final / "recipe.yaml").write_text(recipe.dump(), encoding="utf-8")
    _check_counts(final, plan)


def checkpoint_config(skeleton: Skeleton, plan: Plan, dtype: torch.dtype) -> dict[str, Any]:
    """The source's config.json with what the run has changed."""
    config = json.loads((skeleton.folder / "config.json").read_text())
    dtype_key = "torch_dtype" if "torch_dtype" in config else "dtype"
    # Another class, of a base model for one, would be loaded without its head.
    config["architectures"] = [type(skeleton.model).__name__]
    config[dtype_key] = str(dtype).removeprefix("torch.")
    # Of a multimodal model; the older Qwen2-VL files have the decoder's keys at the top.
    inner = [part for part in config.values() if isinstance(part, dict) and "model_type" in part]
    for part in inner:  # or one that is not named here would be loaded in another type
        part |= {key: config[dtype_key] for key in ("dtype", "torch_dtype") if key in part}
    decoder = config.get("text_config", config)
    one_table = skeleton.tied and not plan.untied
    said = [part.get("tie_word_embeddings") for part in (config, decoder)]
    if not one_table and (skeleton.said_tied or any(said)):  # engines look in either place
        config["tie_word_embeddings"] = decoder["tie_word_embeddings"] = False
    if len(plan.layers) < skeleton.num_layers:
        shorten(decoder, skeleton, plan.layers)
    if any(module.twin for module in plan.modules):
        # Which some files leave to their family's default.
        config["tie_word_embeddings"] = decoder["tie_word_embeddings"] = True
    config.pop("quantization_config", None)  # of MXFP4, which was opened
    if plan.modules:
        modules = {module.name: module.scheme for module in plan.modules}
        ignored = [name for name in plan.schemes if name not in modules]
        ignored += _routers(skeleton, plan)
        if vision := skeleton.spec.vision:
            # Engines put a prefix before the head of a language model inside another.
            head = skeleton.spec.head
            ignored = [f"re:.*{name}$" if name == head else name for name in ignored]
            ignored += vision.ignored
        # By its class it would be the position embedding of a vision tower too.
        by_class = None if skeleton.spec.vision else skeleton.spec.embedding
        config["quantization_config"] = quantization_config(
            modules, ignored, plan.table_formats, by_class
        )
    return config


def _routers(skeleton: Skeleton, plan: Plan) -> list[str]:
    """What sends tokens to experts, by the names in the result; to engines those are linears."""
    spec, kinds = skeleton.spec, [skeleton.spec.layer(source) for source in plan.layers]
    experts = [(index, kind.experts) for index, kind in enumerate(kinds) if kind.experts]
    named = [f"{spec.layers}.{index}.{name}" for index, e in experts for name in e.routers]
    # Where transformers calls it otherwise than files do, it looks for its own name.
    own = {e.names.renamed[0] for _, e in experts if e.names.renamed}
    return named + [rf"re:.*\.{name}$" for name in sorted(own)]


def _check_counts(folder: Path, plan: Plan) -> None:
    """Every planned module must be in the file, packed, and the bytes must be the plan's."""
    reader = CheckpointReader(folder)
    places = {m.name: f"{m.twin or m.name}.{FORMATS[m.format].main}" for m in plan.modules}
    lost = [name for name, place in places.items() if place not in reader]
    if lost:
        raise CompressError(f"{len(lost)} modules were planned but not written: {lost[0]}, ...")
    if reader.nbytes() != plan.bytes["total"]:
        raise CompressError(
            f"the tensors take {reader.nbytes():,} bytes, {plan.bytes['total']:,} planned"
        )


def document(
    folder: Path, weights: Path, result: RunResult, recipe: Recipe, provenance: dict[str, Any]
) -> None:
    """Writes recipe.yaml, modelpress.json, the card, the report and, if any, the evaluation.

    Args:
        folder: where they go.
        weights: the checkpoint that they are about.
    """
    (folder / "recipe.yaml").write_text(recipe.dump(), encoding="utf-8")
    history = provenance | {"multimodal": result.plan.multimodal}
    if result.metrics:
        write_results(folder, result.metrics)
        history["evaluations"] = merged(result.metrics, [])
    name = result.path.resolve().name
    history = describe(folder, weights, history, name, recipe.model_dump())
    files = {*provenance.get("files", []), *files_below(folder), "modelpress.json"}
    write_json(folder / "modelpress.json", history | {"files": sorted(files)})
