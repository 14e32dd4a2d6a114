"""`modelpress bench pruning`: what pruned visual tokens save in prefill, decoding and cache.

On a checkpoint, or on a random LLaVA whose vision tower is small and whose language model is wide,
one prompt with one image is prefilled and decoded at several shares of kept tokens. Measured beside
predicted (`compress.pruning.costs`):

    prefill   seconds of one forward: tower, choice of tokens, language model, last token's logits;
              floor: the FLOPs of tower, language model and head at this machine's product rate
    decode    seconds per token with the cache that the prefill left;
              floor: bytes of the language model's weights and of the cache, at the rate of a copy
    KV bytes  counted in the cache's tensors; predicted from the tokens of each layer

The shares take turns, so that a machine that slows down slows all of them down.

    bench_pruning(PruningBench(keep=(1.0, 0.1)))
"""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import transformers as hf
from rich.table import Table
from torch import Tensor

from compress.bench.clock import DTYPES, Clock, Stopwatch, copy_bandwidth, product_rate, spread
from compress.bench.report import Report, spread_cell, table_of
from compress.bench.settings import PruningBench
from compress.data.samples import prompt_inputs
from compress.errors import CompressError, UsageError
from compress.eval.report import format_bytes
from compress.loading.load import load
from compress.pruning.costs import kv_bytes, prefill_flops
from compress.pruning.engine import prune_visual_tokens
from compress.pruning.families import tower_of
from compress.recipe.strategy import PruneStrategy

IMAGE_TOKEN = 3  # of the random model, whose vocabulary means nothing
PATCH, HEAD_SIZE, TOWER_WIDTH, TOWER_LAYERS = 8, 64, 64, 2
PROMPT = "Describe the image."  # given to a checkpoint


def check(bench: PruningBench) -> None:
    """UsageError for values that make no model or no measurement."""
    if not bench.keep or not all(0 < keep <= 1 for keep in bench.keep):
        raise UsageError(f"keep: expected shares in (0, 1], found {list(bench.keep)}")
    if bench.model is None and bench.dense:
        raise UsageError("a random model has no quantised linears: leave out --dense")
    if bench.model is None and bench.width % HEAD_SIZE:
        raise UsageError(
            f"width {bench.width}: expected a multiple of {HEAD_SIZE}, the size of a head"
        )
    if bench.model is None and round(bench.visual_tokens**0.5) ** 2 != bench.visual_tokens:
        raise UsageError(
            f"visual tokens {bench.visual_tokens}: expected a square number such as 1024"
        )


def random_llava(bench: PruningBench) -> hf.LlavaForConditionalGeneration:
    """A LLaVA with random weights: SigLIP tower, Llama with half as many key-value heads.

    In fp32, on a GPU in bf16, as checkpoints are.
    """
    dtype = torch.bfloat16 if bench.device.startswith("cuda") else torch.float32
    torch.manual_seed(bench.seed)
    heads = bench.width // HEAD_SIZE
    config = hf.LlavaConfig(
        vision_config=hf.SiglipVisionConfig(
            hidden_size=TOWER_WIDTH,
            intermediate_size=4 * TOWER_WIDTH,
            num_hidden_layers=TOWER_LAYERS,
            num_attention_heads=1,
            image_size=PATCH * round(bench.visual_tokens**0.5),
            patch_size=PATCH,
            vision_use_head=False,
        ),
        text_config=hf.LlamaConfig(
            vocab_size=bench.vocabulary,
            hidden_size=bench.width,
            intermediate_size=bench.width * 11 // 4,
            num_hidden_layers=bench.layers,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 2),
            max_position_embeddings=bench.visual_tokens + bench.text_tokens + bench.new_tokens,
            bos_token_id=None,
            eos_token_id=None,
        ),
        image_token_index=IMAGE_TOKEN,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    with torch.device(bench.device):
        return hf.AutoModelForImageTextToText.from_config(
            config, dtype=dtype, trust_remote_code=False
        ).eval()


def random_prompt(bench: PruningBench) -> dict[str, Tensor]:
    """Inputs of the random model: the image's placeholders, then words."""
    generator = torch.Generator().manual_seed(bench.seed)
    side = PATCH * round(bench.visual_tokens**0.5)
    count = (bench.text_tokens,)
    words = torch.randint(IMAGE_TOKEN + 1, bench.vocabulary, count, generator=generator)
    ids = torch.cat([torch.full((bench.visual_tokens,), IMAGE_TOKEN), words])[None]
    pixels = torch.randn(1, 3, side, side, generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return {name: value.to(bench.device) for name, value in inputs.items()}


def bench_pruning(bench: PruningBench) -> Report:
    """Runs the benchmark; reports its figures and conditions (seconds, bytes, FLOPs).

    Raises:
        UsageError: a budget that cannot be met, sizes that make no model.
        CompressError: the cache does not have the predicted size.
    """
    check(bench)
    model, processor, inputs = _subject(bench)
    depth = len(model.model.get_decoder().layers)
    strategies = {keep: PruneStrategy.for_budget(bench.method, keep, depth) for keep in bench.keep}
    clock = Clock(bench.device)
    before = _rates(clock, model.dtype)
    runs: dict[float, list[dict[str, Any]]] = {keep: [] for keep in bench.keep}
    towers = []
    for round_ in range(bench.repeats + 1):  # the first warms up
        tower = _seconds(lambda: model.model.get_image_features(**_image_part(inputs)), bench)
        for keep, strategy in strategies.items():
            run = _one_run(model, processor, inputs, strategy, bench)
            if round_:
                runs[keep].append(run)
        if round_:
            towers.append(tower)
    after = _rates(clock, model.dtype)
    rates = {name: max(before[name], after[name]) for name in before}
    rows = [_row(keep, runs[keep], model, rates) for keep in bench.keep]
    for row in rows:
        if row["kv_bytes"] != row["kv_bytes_predicted"]:
            raise CompressError(
                f"keep {row['keep']}: the cache holds {row['kv_bytes']:,} bytes, predicted were "
                f"{row['kv_bytes_predicted']:,}"
            )
    _add_speedups(rows)
    conditions = asdict(bench) | {
        "prompt_tokens": inputs["input_ids"].shape[1],
        "visual_tokens": runs[bench.keep[0]][0]["visual_tokens"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rates": rates,
        "rates_before": before,
        "rates_after": after,
    }
    values = {"rows": rows, "tower": spread(towers), "conditions": conditions}
    return Report(values, pruning_bench_table)


def _subject(
    bench: PruningBench,
) -> tuple[hf.PreTrainedModel, hf.ProcessorMixin | None, dict[str, Tensor]]:
    """The model, its processor if it has one, and a prompt with one image."""
    if bench.model is None:
        random = random_llava(bench)
        prompt = random_prompt(bench)
        return random, None, prompt | {"pixel_values": prompt["pixel_values"].to(random.dtype)}
    from PIL import Image  # of the extra `vision`

    dtype = None if bench.device.startswith("cuda") else torch.float32
    packed = False if bench.dense else None
    model, processor = load(bench.model, bench.device, dtype, prune=False, packed=packed)
    tower_of(model)
    assert isinstance(processor, hf.ProcessorMixin)  # as of every multimodal model
    draw = np.random.default_rng(bench.seed)
    picture = Image.fromarray(draw.integers(0, 256, (bench.image, bench.image, 3), dtype=np.uint8))
    inputs = prompt_inputs(processor, PROMPT, [picture])
    placed = {
        name: value.to(bench.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }
    return model, processor, placed


def _image_part(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    names = ("pixel_values", "image_sizes", "image_grid_thw")
    return {name: inputs[name] for name in names if name in inputs}


@torch.no_grad()
def _seconds(call: Callable[[], object], bench: PruningBench) -> float:
    with Stopwatch(bench.device) as watch:
        call()
    return watch.seconds


@torch.no_grad()
def _one_run(
    model: hf.PreTrainedModel,
    processor: hf.ProcessorMixin | None,
    inputs: dict[str, Tensor],
    strategy: PruneStrategy,
    bench: PruningBench,
) -> dict[str, Any]:
    """One prefill and `new_tokens` greedy steps; 1.0 kept runs through the same hooks."""
    cache = hf.DynamicCache(config=model.config.get_text_config())
    with prune_visual_tokens(model, strategy, processor) as pruning:
        output: Any = None

        def prefill() -> None:
            nonlocal output
            output = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)

        prefill_seconds = _seconds(prefill, bench)
        measured = sum(
            getattr(layer, part).nbytes for layer in cache.layers for part in ("keys", "values")
        )
        mask, steps = inputs["attention_mask"], []
        for _ in range(bench.new_tokens):
            token = output.logits[:, -1:].argmax(-1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)

            def step(token: Tensor = token, mask: Tensor = mask) -> None:
                nonlocal output
                output = model(
                    input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True
                )

            steps.append(_seconds(step, bench))
        stats = pruning.stats.prompts[0]
    return {
        "prefill": prefill_seconds,
        "decode": statistics.median(steps),
        "kv_bytes": measured,
        "kv_bytes_predicted": kv_bytes(stats.shape, stats.slots),
        "flops": sum(prefill_flops(stats.shape, row) for row in stats.tokens),
        "visual_tokens": sum(image.tokens for image in stats.images),
        "average_kept": pruning.stats.average_kept,
    }


def _row(
    keep: float, runs: list[dict[str, Any]], model: hf.PreTrainedModel, rates: dict[str, float]
) -> dict[str, Any]:
    """Medians and spread of one share, beside what is predicted and the floors."""
    first = runs[0]
    text = model.model.get_decoder()
    weights = sum(p.numel() * p.element_size() for p in text.layers.parameters())
    weights += sum(p.numel() * p.element_size() for p in model.lm_head.parameters())
    head = 2 * sum(p.numel() for p in model.lm_head.parameters())
    flops = first["flops"] + tower_flops(model, first["visual_tokens"]) + head
    decode_floor = (weights + first["kv_bytes_predicted"]) / rates["bytes_per_second"]
    return {
        "keep": keep,
        **{name: first[name] for name in ("average_kept", "kv_bytes", "kv_bytes_predicted")},
        "flops": first["flops"],
        "prefill": spread([run["prefill"] for run in runs]),
        "prefill_floor": flops / rates["flops_per_second"],
        "decode": spread([run["decode"] for run in runs]),
        "decode_floor": decode_floor,
    }


def tower_flops(model: hf.PreTrainedModel, visual_tokens: int) -> int:
    """FLOPs of vision tower and projector by their linears, 2 a weight and token.

    Every linear is counted at the number of visual tokens, and no attention: what is left out makes
    the floor lower, as a floor may be.
    """
    text = {id(p) for p in model.model.get_decoder().parameters()}
    head = {id(p) for p in model.lm_head.parameters()}
    weights = sum(
        m.weight.numel()
        for m in model.modules()
        if isinstance(m, torch.nn.Linear) and id(m.weight) not in text | head
    )
    return 2 * weights * visual_tokens


def _add_speedups(rows: list[dict[str, Any]]) -> None:
    """How much faster and smaller than 1.0 kept, if that is among the rows."""
    whole = next((row for row in rows if row["keep"] == 1), None)
    if whole is None:
        return
    for row in rows:
        row["prefill_speedup"] = whole["prefill"]["median"] / row["prefill"]["median"]
        row["flops_ratio"] = whole["flops"] / row["flops"]
        row["decode_speedup"] = whole["decode"]["median"] / row["decode"]["median"]
        row["kv_ratio"] = whole["kv_bytes"] / row["kv_bytes"]


def _rates(clock: Clock, dtype: torch.dtype) -> dict[str, float]:
    """What the machine does of a model's products, and of copies."""
    name = next(name for name, value in DTYPES.items() if value == dtype)
    return {
        "flops_per_second": product_rate(clock, name)[name],
        "bytes_per_second": copy_bandwidth(clock),
    }


def pruning_bench_table(result: Mapping[str, Any]) -> Table:
    """A column for each share of kept tokens."""
    conditions, rows, tower = result["conditions"], result["rows"], result["tower"]
    subject = conditions["model"] or (
        f"random LLaVA, width {conditions['width']}, {conditions['layers']} layers"
    )
    rates = conditions["rates"]
    caption = (
        f"{subject}; {conditions['parameters'] / 1e6:.1f}M parameters in "
        f"{conditions['dtype']}; {conditions['visual_tokens']} visual of "
        f"{conditions['prompt_tokens']} prompt tokens; {conditions['method']}; median "
        f"(minimum to maximum) of {conditions['repeats']}; tower {tower['median']:.3f} s of each "
        f"prefill; {rates['flops_per_second'] / 1e9:.1f} GFLOP/s, "
        f"{rates['bytes_per_second'] / 1e9:.1f} GB/s; {conditions['threads']} threads, torch "
        f"{conditions['torch']}, {conditions['device']}"
    )
    shares = (f"{100 * row['keep']:g} %" for row in rows)
    table = table_of(caption, shares, names="visual tokens kept")

    def line(name: str, cell: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(name, *map(cell, rows))

    line("prefill, s", lambda r: spread_cell(r["prefill"]))
    line("  floor", lambda r: f"{r['prefill_floor']:.3f}")
    line("decode, ms per token", lambda r: spread_cell(r["decode"], 1e3))
    line("  floor", lambda r: f"{1e3 * r['decode_floor']:.1f}")
    line("KV cache", lambda r: format_bytes(r["kv_bytes"]))
    line("  predicted", lambda r: format_bytes(r["kv_bytes_predicted"]))
    line("GFLOPs of the language model", lambda r: f"{r['flops'] / 1e9:.1f}")
    if "prefill_speedup" in rows[0]:
        line("prefill faster by", lambda r: f"{r['prefill_speedup']:.2f} x")
        line("  fewer FLOPs by", lambda r: f"{r['flops_ratio']:.2f} x")
        line("decode faster by", lambda r: f"{r['decode_speedup']:.2f} x")
        line("cache smaller by", lambda r: f"{r['kv_ratio']:.2f} x")
    return table
