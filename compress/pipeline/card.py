"""The model card: README.md of a checkpoint, as the hub shows it.

What was done, what it cost against 16 bits and under which conditions, which engine loads it, and
what is not known. Facts come from one dict, of which every key but `name` may be missing:

    name         of the model; how the loading examples call it
    base_model   hub id or path of the 16-bit model
    recipe       the resolved recipe, nested
    bits         `bits_summary(inspect(folder)["modules"])`
    bytes        {"original", "quantized", "other", "total"}
    evaluation   as `evaluate_model` returns it
    baseline     {"results", "perplexity"}; absent, `evaluation["baseline"]` is taken
    provenance   versions, seeds, hashes, times, nested
    multimodal   whether it sees images
    pruning      {"strategy", "calibration", "search"}; None: no visual tokens are pruned

    (folder / "README.md").write_text(model_card(result))
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from compress.checkpoint.engines import loading_table
from compress.checkpoint.packed import EMBEDDING
from compress.eval.markup import fence_for, in_code, in_markdown, quoted
from compress.eval.report import (
    NLL,
    Facts,
    Row,
    columns_of,
    flatten,
    format_bytes,
    format_number,
    paired_differences,
)
from compress.recipe.token_importance import TokenImportance
from compress.scheme import Scheme

ROTATIONS = {"hadamard": "a randomised Hadamard matrix", "random": "a random orthogonal matrix"}
PRUNING = {
    "vflowopt": "VFlowOpt (arXiv 2508.05211)",
    "fastv": "FastV (arXiv 2403.06764)",
    "pyramiddrop": "PyramidDrop (arXiv 2410.17247)",
    "visionzip": "VisionZip (arXiv 2412.04467)",
    "divprune": "DivPrune (arXiv 2503.02175)",
    "uniform": "even spacing",
    "random": "chance",
    "pooling": "average pooling",
}
METHODS = {"gptq": "GPTQ (arXiv 2210.17323)", "rtn": "round to nearest"}


def bits_summary(modules: Iterable[Facts]) -> dict[str, Any]:
    """What the card says about widths, from the `modules` that `inspect` lists.

    Returns {"average", "symmetric", "engines": [(engine, how it loads them)], "widths": [{"bits",
    "group_size", "modules", "parameters"}]} over the quantised modules; average is in bits per
    weight, scales not counted.
    """
    modules = list(modules)
    quantised = [module for module in modules if module["symmetric"] is not None]
    schemes: dict[str, Scheme | None] = {module["name"]: None for module in modules}
    for module in quantised:
        schemes[module["name"]] = Scheme(module["bits"], module["group_size"], module["symmetric"])
    tables = {m["name"]: m.get("format", "pack-quantized") for m in quantised if _is_table(m)}
    widths: dict[tuple, dict[str, Any]] = {}
    for module in quantised:
        row = {"bits": module["bits"], "group_size": module["group_size"] or "channel"}
        row = widths.setdefault((*row.values(),), row | {"modules": 0, "parameters": 0})
        row["modules"] += 1
        row["parameters"] += module["shape"][0] * module["shape"][1]
    rows = sorted(widths.values(), key=lambda row: (row["bits"], str(row["group_size"])))
    parameters = sum(row["parameters"] for row in rows)
    total = sum(row["bits"] * row["parameters"] for row in rows)
    return {
        "average": total / parameters if parameters else None,
        "symmetric": all(module["symmetric"] for module in quantised),
        "engines": loading_table(schemes, tables) if quantised else [],
        "widths": rows,
    }


def _is_table(module: Facts) -> bool:
    """Whether it is the embedding, or a head that is stored as one."""
    return module["name"].endswith(EMBEDDING) or "format" in module


def model_card(result: Facts) -> str:
    """README.md as one string: YAML front matter, then Markdown. Keys are at the file's head."""
    loader = FileSystemLoader(Path(__file__).parent)
    page = Environment(  # noqa: S701  Markdown, not HTML: the hub sanitises what it renders
        loader=loader, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    recipe, bits = result.get("recipe") or {}, result.get("bits") or {}
    evaluation = result.get("evaluation") or {}
    baseline = result.get("baseline") or evaluation.get("baseline") or {}
    prompts = ((result.get("provenance") or {}).get("calibration") or {}).get("prompts")
    recipe_text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True).strip()
    text = page.get_template("card.md.jinja").render(
        front_matter=_front_matter(result, bits),
        name=in_markdown(result["name"]),
        quoted=quoted(result["name"]),
        base_model=in_code(result["base_model"]) if result.get("base_model") else None,
        steps=_steps(recipe, prompts) + _pruning_steps(result.get("pruning")),
        multimodal=bool(result.get("multimodal")),
        pruned=bool(result.get("pruning")),
        widths=_width_table(bits),
        average=format_number(bits.get("average")) if bits.get("average") else None,
        sizes=_sizes(result.get("bytes") or {}),
        quality=_quality_table(evaluation, baseline),
        conditions=_conditions(evaluation),
        engines=_table(("engine", "loads it"), *bits.get("engines", [])),
        dequantize=not bits.get("symmetric", True),
        limitations=_limitations(bits, evaluation, result.get("pruning")),
        recipe=recipe_text,
        fence=fence_for(recipe_text),
        provenance=[
            tuple(map(in_markdown, pair)) for pair in flatten(result.get("provenance") or {})
        ],
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _front_matter(result: Facts, bits: Facts) -> str:
    """The YAML that the hub reads. base_model only if it can be a hub id: the hub refuses paths."""
    base = str(result.get("base_model") or "")
    widths = sorted({row["bits"] for row in bits.get("widths", [])})
    tags = ["modelpress", *(["compressed-tensors"] if widths else [])]
    tags += [f"{width}-bit" for width in widths]
    versions = (result.get("provenance") or {}).get("versions") or {}
    fields = {
        "base_model": base if _is_hub_id(base) else None,
        "base_model_relation": "quantized" if _is_hub_id(base) else None,
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text" if result.get("multimodal") else "text-generation",
        "tags": tags,
        "quantized_by": " ".join(filter(None, ["modelpress", versions.get("modelpress")])),
    }
    # a line break in a value could end the front matter
    fields = {
        key: " ".join(value.split()) if isinstance(value, str) else value
        for key, value in fields.items()
        if value is not None
    }
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True).strip()


def _is_hub_id(name: str) -> bool:
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)) and not Path(name).exists()


def _steps(recipe: Facts, prompts: int | None) -> list[str]:
    """What was done, in order, as the recipe says it. `prompts`: how many with images, if any."""
    quantize = recipe.get("quantize") or {}
    rotate = (recipe.get("rotate") or {}).get("kind", "none")
    method = quantize.get("method", "none")
    steps = []
    if rotate != "none":
        steps.append(
            f"The weights were rotated by {ROTATIONS.get(rotate, rotate)}, folded into them "
            f"offline: nothing is rotated at inference."
        )
    if method == "gptq":
        calibration = recipe.get("calibration") or {}
        windows, length = (calibration.get(key, "?") for key in ("samples", "length"))
        size = f"{windows} windows of {length} tokens"
        if prompts:
            size = f"{prompts} prompts with images"
        steps.append(
            f"Calibration on {size} of {in_markdown(calibration.get('dataset', '?'))}, seed "
            f"{calibration.get('seed', 0)}."
        )
        importance = quantize.get("token_importance") or {}
        if importance.get("name", "uniform") != "uniform":
            options = TokenImportance(**importance).options
            listed = "".join(f", {key} {in_markdown(value)}" for key, value in options.items())
            steps.append(
                f"Tokens were weighted by {importance['name'].replace('_', ' ')}{listed} "
                f"(RSQ, arXiv 2503.01820)."
            )
    if method != "none":
        grid = "symmetric" if quantize.get("symmetric", True) else "asymmetric"
        left = in_markdown(", ".join(quantize.get("ignore") or []) or "nothing")
        steps.append(
            f"The linear layers were quantised with {METHODS.get(method, method)} on a {grid} "
            f"grid; {left} was left out."
        )
    return steps


def _pruning_steps(pruning: Facts | None) -> list[str]:
    """How visual tokens are pruned, and what that did to the calibration prompts."""
    if not pruning:
        return []
    strategy, seen = pruning["strategy"], pruning.get("calibration")
    name = PRUNING.get(strategy["method"], strategy["method"])
    stages = ", ".join(map(str, strategy["stages"]))
    ratios = ", ".join(f"{ratio:.3g}" for ratio in strategy["ratios"])
    steps = [
        f"Visual tokens are pruned by {name} before decoder layers {stages} (0: before all of "
        f"them); {ratios} of those that are there stay."
    ]
    if search := pruning.get("search"):
        conditions = search["conditions"]
        steps.append(
            f"That strategy was the best of {search['trials']} on {conditions['prompts']} "
            f"prompts: mean cosine {search['score']:.4f} to the unpruned last state."
        )
    if seen:
        flops = seen["prefill_flops"] / seen["prefill_flops_unpruned"]
        cache = seen["kv_bytes"] / seen["kv_bytes_unpruned"]
        steps.append(
            f"Of the {seen['prompts']} calibration prompts {seen['average_kept']:.1%} of the "
            f"visual tokens were kept, averaged over layers: {flops:.1%} of the prefill FLOPs, "
            f"{cache:.1%} of the KV cache. The Hessians are those of what was kept."
        )
    return steps


def _table(*rows: tuple) -> str:
    """A Markdown table whose first row is the head; empty without any other row."""
    lines = ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    return "\n".join(lines) if len(rows) > 1 else ""


def _cell(value: object) -> str:
    """A cell: our own Markdown stays, a bar would be the next cell."""
    return re.sub(r"(?<!\\)\|", r"\\|", " ".join(format_number(value).split()))


def _width_table(bits: Facts) -> str:
    columns = ("bits", "group_size", "modules", "parameters")
    rows = (tuple(row[column] for column in columns) for row in bits.get("widths", []))
    return _table(("bits", "group size", "linear layers", "weights"), *rows)


def _sizes(sizes: Facts) -> str:
    total, original = sizes.get("total"), sizes.get("original")
    if not total:
        return ""
    text = f"{format_bytes(total)} of weights"
    if sizes.get("quantized"):
        text += f", {format_bytes(sizes['quantized'])} of them quantised"
    return f"{text}; {format_bytes(original)} before" if original else text


def _quality_table(evaluation: Facts, baseline: Facts) -> str:
    """A row a metric: this model, 16 bits, and the paired difference where there is one."""
    if not evaluation:
        return ""
    ours, theirs = Row.of("", evaluation), Row.of("", baseline)
    for part, row in ((evaluation, ours), (baseline, theirs)):
        if (text := part.get("perplexity") or {}).get("mean_nll") is not None:
            row.put(NLL, text["mean_nll"], text.get("stderr"))
    paired = paired_differences(evaluation)
    rows = []
    for column in columns_of([ours, theirs]):
        estimate = paired.get(column, {})
        gap = format_number(estimate.get("value"), estimate.get("stderr"))
        rows.append((column, ours.cell(column), theirs.cell(column), gap))
    return _table(("metric", "this model", "16 bits", "difference"), *rows)


def _conditions(evaluation: Facts) -> list[str]:
    lines = [(evaluation.get(part) or {}).get("line") for part in ("perplexity", "kl")]
    lines += [
        f"{in_markdown(key)}: {in_markdown(value)}"
        for key, value in flatten(evaluation.get("conditions") or {})
    ]
    return [line for line in lines if line]


def _limitations(bits: Facts, evaluation: Facts, pruning: Facts | None) -> list[str]:
    lines = ["What the base model gets wrong, this model gets wrong as well; its licence applies."]
    low = [row["bits"] for row in bits.get("widths", []) if row["bits"] <= 3]
    if low:
        lines.append(
            f"{min(low)}-bit weights lose accuracy that one benchmark need not show: measure your "
            f"own task before you rely on it."
        )
    if pruning:
        lines.append(
            "Visual tokens are pruned where modelpress loads the model; other engines load the "
            "same weights and show their language model every visual token."
        )
    if evaluation:
        lines.append("Only what the table above lists was measured.")
    else:
        lines.append("Nothing was measured after quantising.")
    return lines
