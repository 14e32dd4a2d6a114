"""The model card: README.md of a checkpoint, as the hub shows it.

What was done, what it cost against 16 bits and under which conditions, which engine loads it, and
what is not known. Facts come from one dict, of which every key but `name` may be missing:

    name         of the model; how the loading examples call it
    base_model   hub id or path of the 16-bit model
    local_model  whether the base model is a folder of whoever made this one; None: nobody knows
    card         what only a person knows: {"license", "language"}
    format       compressed-tensors, gptq or gguf
    files        of a GGUF model
    notes        of an export: what is known of engines that will not load it
    export       of an export: {"differs": [what it does not hold as the checkpoint that was
                 exported did]}; None in its place: nobody has written that down
    chat         whether it has a chat template
    recipe       the resolved recipe, nested
    bits         `bits_summary(inspect(folder)["modules"])`
    bytes        {"original", "quantized", "other", "total"}
    evaluation   as `evaluate_model` returns it; `earlier`: others, under other conditions;
                 `before_export`, the format of the checkpoint that was measured in its place
    baseline     {"results", "perplexity"}; absent, `evaluation["baseline"]` is taken
    provenance   versions, seeds, hashes, times, nested
    multimodal   whether it sees images
    pruning      {"strategy", "calibration", "search"}; None: no visual tokens are pruned

    (folder / "README.md").write_text(model_card(result))
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from compress.checkpoint.engines import (
    EXPERTS,
    HEAD,
    evidence,
    gguf_table,
    gptq_table,
    loading_table,
    place_in_layers,
)
from compress.checkpoint.packed import EMBEDDING
from compress.eval.markup import fence_for, in_code, in_markdown, in_shell, quoted
from compress.eval.report import (
    NLL,
    Facts,
    Row,
    columns_of,
    conditions_of,
    flatten,
    format_bytes,
    format_difference,
    format_number,
    measured_before,
    not_seen,
    paired_differences,
    told_apart,
    warnings_of,
)
from compress.eval.tables import position_lines
from compress.pipeline.card_index import front_matter, is_hub_id
from compress.pipeline.card_steps import base_name, method_steps, pruning_steps, public
from compress.scheme import Scheme

ACCURACIES = ("acc", "acc_norm", "exact_match")  # of which a share is left
QUESTION = "What is the capital of France?"
GGUF_TABLES = {"token_embd": "model.embed_tokens", "output": HEAD}  # llama.cpp's names


def bits_summary(
    modules: Iterable[Facts], format: str = "compressed-tensors", kind: str = ""
) -> dict[str, Any]:
    """What the card says about widths, from the `modules` and the `format` that `inspect` lists.

    `kind`: the `model_type` of config.json.

    Returns {"average", "symmetric", "engines": [(engine, how it loads them)], "widths": [{"bits",
    "group_size", "modules", "parameters"}], "names", "tables": {name: bits}} over the quantised
    modules; average is in bits per weight, scales not counted. A head that is the embedding counts
    once. `names` are transformers', and so are those of `tables`, the embedding and the head.
    """
    modules = list(modules)
    quantised = [module for module in modules if module["symmetric"] is not None]
    named = _in_transformers(quantised, modules) if format == "gguf" else quantised
    shared = {module["codes_of"] for module in named if "codes_of" in module}
    schemes: dict[str, Scheme | None] = {module["name"]: None for module in modules}
    for module in quantised:
        schemes[module["name"]] = Scheme(module["bits"], module["group_size"], module["symmetric"])
    tables = {m["name"]: m.get("format", "pack-quantized") for m in quantised if _is_table(m)}
    widths: dict[tuple, dict[str, Any]] = {}
    for module in quantised:
        if "codes_of" in module:  # the codes of another module, which the file holds once
            continue
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
        "engines": _engines(format, schemes, tables, kind) if quantised else [],
        "widths": rows,
        "names": [module["name"] for module in named],
        "tables": {
            module["name"] + " (the head too)" * (module["name"] in shared): module["bits"]
            for module in named
            if module["name"].rpartition(".")[2] in (EMBEDDING, HEAD) and "codes_of" not in module
        },
    }


def _in_transformers(quantised: Sequence[Facts], modules: Sequence[Facts]) -> list[Facts]:
    """The quantised modules of a GGUF file, its tables by transformers' names; the head as well
    where llama.cpp takes the embedding for it."""
    found: list[Facts] = [
        {**module, "name": GGUF_TABLES.get(module["name"], module["name"])} for module in quantised
    ]
    if not any(GGUF_TABLES.get(module["name"]) == HEAD for module in modules):
        tables = [m for m in found if m["name"].endswith(EMBEDDING)]
        found += [{**m, "name": HEAD, "codes_of": m["name"]} for m in tables]
    return found


def _engines(
    format: str, schemes: Mapping[str, Scheme | None], tables: Mapping[str, str], kind: str
) -> list[tuple[str, str]]:
    """(engine, how it loads) a checkpoint of this format; none of formats that are not ours."""
    if format == "gguf":
        return gguf_table(filter(None, schemes.values()))
    if format == "gptq":
        inside = {name: s for name, s in schemes.items() if place_in_layers(name)}
        plain = [name for name, scheme in inside.items() if scheme is None]
        quantised = {name: scheme for name, scheme in schemes.items() if scheme is not None}
        return gptq_table(quantised, plain)
    return loading_table(schemes, tables, kind) if format == "compressed-tensors" else []


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
    provenance = result.get("provenance") or {}
    recipe_text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True).strip()
    text = page.get_template("card.md.jinja").render(
        front_matter=front_matter(result, bits),
        name=in_markdown(result["name"]),
        quoted=quoted(result["name"]),
        base_model=in_code(base_name(result)) if result.get("base_model") else None,
        steps=[
            *method_steps(recipe, provenance.get("calibration") or {}, bits),
            *pruning_steps(result.get("pruning")),
        ],
        chat=bool(result.get("chat")),
        messages=_messages(bool(result.get("multimodal"))),
        question=QUESTION,
        in_shell=in_shell(result["name"]),
        from_hub=in_shell(f"hf.co/{result['name']}"),
        request=_request(str(result["name"])),
        before_export=in_markdown(measured_before(result)),
        multimodal=bool(result.get("multimodal")),
        pruned=bool(result.get("pruning")),
        mixed=any(EXPERTS in name for name in bits.get("names") or []),
        notes=[in_markdown(note) for note in result.get("notes") or []],
        widths=_width_table(bits),
        average=format_number(bits.get("average")) if bits.get("average") else None,
        sizes=_sizes(result.get("bytes") or {}),
        measured=[
            (in_markdown(told_apart(scores)), _quality(scores, of), _conditions(scores))
            for scores, of in (
                (evaluation, baseline),
                *((each, each.get("baseline") or {}) for each in result.get("earlier") or []),
            )
            if scores
        ],
        engines=_table(
            ("engine", "loads it", "known from"),
            *((engine, how, evidence(engine)) for engine, how in bits.get("engines", [])),
        ),
        loads=_loads(bits.get("engines", [])),
        half="--dtype float16" in dict(bits.get("engines", [])).get("vLLM", ""),
        format=result.get("format") or "compressed-tensors",
        file=quoted((result.get("files") or ["model.gguf"])[0]),
        repository=in_code(f"hf.co/{result['name']}") if is_hub_id(str(result["name"])) else None,
        dequantize=not bits.get("symmetric", True),
        limitations=_limitations(bits, evaluation, result.get("pruning")),
        recipe=recipe_text,
        fence=fence_for(recipe_text),
        provenance=[
            (in_markdown(key), in_markdown(public(value)))
            for key, value in (
                *flatten({k: v for k, v in provenance.items() if k != "warnings"}),
                *(("warning", warning) for warning in provenance.get("warnings") or []),
            )
        ],
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _loads(engines: Sequence[tuple[str, str]]) -> dict[str, bool]:
    """Which engines load the files, perhaps with more than themselves; those not told of do."""
    said = {engine.partition(",")[0]: not how.startswith("no") for engine, how in engines}
    return {engine: said.get(engine, True) for engine in ("transformers", "vLLM", "GPTQModel")}


def _messages(multimodal: bool) -> str:
    """A question to a chat model, as a Python literal."""
    if not multimodal:
        return json.dumps([{"role": "user", "content": QUESTION}])
    picture = {"type": "image", "path": "picture.png"}
    text = {"type": "text", "text": "What is in this picture?"}
    return json.dumps([{"role": "user", "content": [picture, text]}])


def _request(name: str) -> str:
    """The same as a request to a server, as one word of a shell."""
    messages = [{"role": "user", "content": QUESTION}]
    return in_shell(json.dumps({"model": name, "messages": messages}))


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
    return _table(("bits", "group size", "matrices", "weights"), *rows)


def _sizes(sizes: Facts) -> str:
    total, original = sizes.get("total"), sizes.get("original")
    if not total:
        return ""
    text = f"{format_bytes(total)} of weights"
    if sizes.get("quantized"):
        text += f", {format_bytes(sizes['quantized'])} of them quantised"
    return f"{text}; {format_bytes(original)} before" if original else text


def _quality(evaluation: Facts, baseline: Facts) -> str:
    """What was measured, and below it the same by position if that was asked for."""
    table, stretches = _quality_table(evaluation, baseline), evaluation.get("by_position")
    return f"{table}\n\n{_table(*map(tuple, position_lines(stretches)))}" if stretches else table


def _quality_table(evaluation: Facts, baseline: Facts) -> str:
    """A row a metric: this model, or what it was exported from, 16 bits, and the paired difference
    where there is one."""
    if not evaluation:
        return ""
    ours, theirs = Row.of("", evaluation), Row.of("", baseline)
    for part, row in ((evaluation, ours), (baseline, theirs)):
        if (text := part.get("perplexity") or {}).get("mean_nll") is not None:
            row.put(NLL, text["mean_nll"], text.get("stderr"))
    paired = paired_differences(evaluation)
    ours_is = "before export" if evaluation.get("before_export") else "this model"
    rows = [("metric", ours_is, "16 bits", "difference", "recovery", "items that changed")]
    for column in columns_of([ours, theirs]):
        estimate = paired.get(column, {})
        gap = format_difference(estimate.get("value"), estimate.get("stderr"))
        kept, flips = _kept(column, theirs, estimate), _flips(estimate)
        rows.append((column, ours.cell(column), theirs.cell(column), gap, kept, flips))
    # The last two columns only where there is something in them.
    filled = [i for i in range(len(rows[0])) if i < 4 or any(row[i] for row in rows[1:])]
    return _table(*(tuple(row[i] for i in filled) for row in rows))


def _flips(estimate: Facts) -> str:
    """How many items changed each way, and McNemar's p; "" where answers are not right or wrong."""
    if estimate.get("mcnemar_p") is None:
        return ""
    lost, gained = estimate["right_to_wrong"], estimate["wrong_to_right"]
    p = format_number(estimate["mcnemar_p"])
    return f"{lost} right to wrong, {gained} wrong to right (McNemar p {p})"


def _kept(column: str, theirs: Row, estimate: Facts) -> str:
    """The share of the 16-bit accuracy that is left, in per cent, with the difference's error."""
    before, change = theirs.values.get(column), estimate.get("value")
    if column.split(" ")[-1] not in ACCURACIES or not before or change is None:
        return ""
    error = estimate.get("stderr")
    share = format_number(100 * (1 + change / before), 100 * error / before if error else None)
    unseen = not_seen(estimate)
    return f"{share} %" + (f", {unseen}" if unseen else "")


def _conditions(evaluation: Facts) -> list[str]:
    lines = [(evaluation.get(part) or {}).get("line") for part in ("perplexity", "kl")]
    lines += [
        f"{in_markdown(key)}: {in_markdown(public(value))}"
        for key, value in conditions_of(evaluation)
        if key != "model"
    ]
    lines += [f"lm-eval warned: {in_markdown(said)}" for said in warnings_of(evaluation)]
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
        lines.append("Only what the tables above list was measured.")
    else:
        lines.append("Nothing was measured after quantising.")
    return lines
