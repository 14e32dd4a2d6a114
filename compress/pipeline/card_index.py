"""The front matter of a model card: what the hub reads of it, figures among them.

front_matter(result, bits)      # the YAML between two lines of ---
"""

import re
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from compress.data.text import HUB_IDS
from compress.eval.report import ERROR, Facts

# Conditions of tasks that an entry of the model index names.
HOW_TASKS = (
    "chat_template",
    "chat_template_name",
    "limit",
    "max_length",
    "gen_kwargs",
    "add_bos_token",
    "activation_bits",
)


def front_matter(result: Facts, bits: Facts) -> str:
    """The YAML that the hub reads. base_model only if it can be a hub id: the hub refuses paths."""
    base = _hub_base(result)
    widths = sorted({row["bits"] for row in bits.get("widths", [])})
    format, said = result.get("format") or "compressed-tensors", result.get("card") or {}
    tags = ["modelpress", *([format] if widths else [])]
    tags += [f"{width}-bit" for width in widths]
    versions = (result.get("provenance") or {}).get("versions") or {}
    calibration = (result.get("recipe") or {}).get("calibration") or {}
    data = HUB_IDS.get(str(calibration.get("dataset"))) if widths and _calibrated(result) else None
    fields: dict[str, Any] = {
        "license": said.get("license"),
        "language": said.get("language"),
        "base_model": base,
        "base_model_relation": "quantized" if base else None,
        "datasets": [data] if data else None,
        "library_name": "gguf" if format == "gguf" else "transformers",
        "pipeline_tag": "image-text-to-text" if result.get("multimodal") else "text-generation",
        "tags": tags,
        "quantized_by": " ".join(filter(None, ["modelpress", versions.get("modelpress")])),
        "model-index": _model_index(result),
    }
    # a line break in a value could end the front matter
    fields = {
        key: " ".join(value.split()) if isinstance(value, str) else value
        for key, value in fields.items()
        if value is not None
    }
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True).strip()


def _calibrated(result: Facts) -> bool:
    """Whether the run has read calibration data: as it noted, else as its recipe says."""
    provenance, recipe = result.get("provenance") or {}, result.get("recipe") or {}
    if "calibration" in provenance:
        return bool(provenance["calibration"])
    return (recipe.get("quantize") or {}).get("method") == "gptq" or bool(recipe.get("allocate"))


def _model_index(result: Facts) -> list[dict[str, Any]] | None:
    """The measured figures as the hub reads them; None where nothing was measured.

    Figures of before an export are this model's only where it is known to hold the same values. Of
    entries that would be told by nothing but their values the newest stands.
    """
    kind = "image-text-to-text" if result.get("multimodal") else "text-generation"
    found: list[dict[str, Any]] = []

    def add(name: str, how: Mapping[str, object], metrics: list[dict[str, Any]]) -> None:
        # Copies: what two entries share would be an anchor in the YAML.
        args = {key: deepcopy(value) for key, value in how.items() if value is not None}
        listed = ", ".join(_argument(key, value) for key, value in args.items())
        data: dict[str, Any] = {
            "type": _plain(name),
            "name": _plain(name) + (f" ({listed})" if listed else ""),
        }
        data |= {"args": args} if args else {}
        if all(entry["dataset"] != data for entry in found):
            found.append({"task": {"type": kind}, "dataset": data, "metrics": metrics})

    same = (result.get("export") or {}).get("differs") == []
    for scores in (result.get("evaluation") or {}, *(result.get("earlier") or [])):
        if scores.get("before_export") and not same:
            continue
        facts = scores.get("conditions") or {}
        for name, metrics in (scores.get("results") or {}).items():
            values = [
                {"type": metric, "value": value}
                for metric, value in metrics.items()
                if not metric.endswith(ERROR) and isinstance(value, int | float)
            ]
            if values:
                how = {key: facts.get(key) for key in HOW_TASKS}
                how["shots"] = (facts.get("shots") or {}).get(name)
                how["system_instruction"] = facts.get("system_instruction") and True
                add(name, how, values)
        text = scores.get("perplexity") or {}
        if isinstance(text.get("value"), int | float):
            said = facts.get("perplexity_dataset", "text")
            name = Path(str(said).removesuffix(" (held out)")).name
            values = [{"type": "perplexity", "value": text["value"]}]
            if kl := scores.get("kl"):
                values.append({"type": "kl_divergence", "value": kl["mean"]})
            how = {key: text.get(key) for key in ("tokens", "length", "stride")}
            how |= {"bos": text.get("bos") or None, "activation_bits": facts.get("activation_bits")}
            add(name, how, values)
    return [{"name": _plain(result["name"]), "results": found}] if found else None


def _argument(key: str, value: object) -> str:
    """What an entry of the model index was measured with, in words."""
    name = key.replace("_", " ")
    if isinstance(value, bool):
        return f"{'with' if value else 'without'} {name}"
    return f"{_plain(value)} {name}" if key in ("shots", "tokens") else f"{name} {_plain(value)}"


def _plain(name: object) -> str:
    """A name as one word of letters, digits and what stands in file names."""
    return re.sub(r"[^\w./-]+", "-", str(name), flags=re.ASCII).strip("-") or "model"


def is_hub_id(name: str) -> bool:
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name))


def _hub_base(result: Facts) -> str | None:
    """The base model's id on the hub; None for one that is a folder, as far as anybody knows."""
    base, local = str(result.get("base_model") or ""), result.get("local_model")
    if local is None:  # an older result, which does not say
        local = not is_hub_id(base) or Path(base).exists()
    whole = is_hub_id(base) or bool(re.fullmatch(r"[\w-][\w.-]*", base))
    return base if whole and not local else None
