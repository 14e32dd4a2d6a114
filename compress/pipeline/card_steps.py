"""What was done to a model, step by step, in the words of its card.

method_steps(recipe, calibration, bits)     # ["The weights were rotated by ...", ...]
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from compress.eval.markup import in_markdown
from compress.eval.report import Facts
from compress.recipe.sections import matches
from compress.recipe.token_importance import TokenImportance

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


def public(value: str) -> str:
    """A path as the name of what lies there: where somebody keeps files is for nobody else."""
    return Path(value).name if Path(value).is_absolute() else value


def base_name(result: Facts) -> str:
    """How the card calls the base model: a folder by its bare name."""
    base = str(result["base_model"])
    return Path(base).name or base if result.get("local_model") else public(base)


def method_steps(recipe: Facts, calibrated: Facts, bits: Facts) -> list[str]:
    """What was done, in order, as the recipe says it.

    calibrated: what is known of the calibration data. bits: as `bits_summary` returns it.
    """
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
        steps.append(_calibration_step(recipe.get("calibration") or {}, calibrated))
        importance = quantize.get("token_importance") or {}
        if importance.get("name", "uniform") != "uniform":
            options = TokenImportance(**importance).options
            listed = "".join(f", {key} {in_markdown(value)}" for key, value in options.items())
            steps.append(
                f"Tokens were weighted by {importance['name'].replace('_', ' ')}{listed} "
                f"(RSQ, arXiv 2503.01820)."
            )
        target = quantize.get("target") or {}
        if target.get("name") == "full_precision":
            steps.append(
                f"Each layer's weights were fitted to what the 16-bit model has at that place "
                f"(target full_precision, strength {target.get('strength')}), not only to what "
                f"the layers quantised before it pass on."
            )
    if allocate := recipe.get("allocate"):
        importance = allocate.get("importance") or {}
        name = importance.get("name", "?") if isinstance(importance, Mapping) else importance
        by = f"{in_markdown(name).replace('_', ' ')} ({allocate.get('method')})"
        how = "Layers were left out" if allocate.get("method") == "remove" else "Widths were chosen"
        steps.append(f"{how} by the importance of each {allocate.get('unit', 'layer')}: {by}.")
    if method != "none":
        grid = "symmetric" if quantize.get("symmetric", True) else "asymmetric"
        done = METHODS.get(method, method)
        text = f"The linear layers were quantised with {done} on a {grid} grid"
        left = _left_out(quantize, bits.get("names") or [])
        if left:
            were = "was" if len(left) == 1 else "were"
            text += f"; {in_markdown(', '.join(left))} {were} left out"
        steps.append(text + ".")
    if tables := bits.get("tables"):
        listed = ", ".join(f"{in_markdown(name)} to {bits:g} bits" for name, bits in tables.items())
        steps.append(f"Tables of the vocabulary were quantised as well: {listed}.")
    return steps


def _calibration_step(calibration: Facts, found: Facts) -> str:
    """What was read to calibrate: windows, conversations, or prompts with images."""
    dataset = in_markdown(public(str(calibration.get("dataset", "?"))))
    seed = f"seed {calibration.get('seed', 0)}"
    if prompts := found.get("prompts"):
        return f"Calibration on {prompts} prompts with images of {dataset}, {seed}."
    if "cut" not in found:
        windows, length = (calibration.get(key, "?") for key in ("samples", "length"))
        return f"Calibration on {windows} windows of {length} tokens of {dataset}, {seed}."
    (count, length), cut = found["windows"], found["cut"]
    tokens, counted = found["tokens"], found["counted_tokens"]
    text = f"Calibration on {count} conversations of {dataset}, {seed}: {tokens:,} tokens"
    if counted == tokens:
        text += ", all of which count"
    elif calibration.get("loss_mask") == "assistant":
        text += (
            f", of which {counted:,} count: those of the assistant and the first of each "
            "conversation (loss_mask assistant)"
        )
    else:
        text += f", of which {counted:,} count"
    return text + (f"; {cut} were cut to {length} tokens." if cut else ".")


def _left_out(quantize: Facts, names: Sequence[str]) -> list[str]:
    """The patterns of what stayed in 16 bits: none that a quantised module has matched."""
    patterns = [*(quantize.get("ignore") or [])]
    patterns += [
        override["match"]
        for override in quantize.get("overrides") or []
        if override.get("ignore") or override.get("bits") == 16
    ]
    return [p for p in patterns if not any(matches(p, name) for name in names)]


def pruning_steps(pruning: Facts | None) -> list[str]:
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
