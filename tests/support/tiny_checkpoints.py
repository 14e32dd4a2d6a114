"""Tiny random checkpoints of every supported family, as folders on disk, and how to read results.

folder = write_checkpoint(tmp_path / "qwen2", "qwen2", tied=False)
recipe = recipe_for(folder, quantize={"bits": 3, "group_size": 32})
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from compress.data.windows import CalibrationWindows
from compress.models.skeleton import Skeleton, linear_in
from compress.recipe.recipe import Recipe

VOCABULARY = 260  # 256 bytes, BOS, EOS, and two rows that no tokenizer gives
LAYERS = 2
HIDDEN = 64
WINDOW = 8  # of the sliding layers, shorter than every test's sequence

# Each family with what sets it apart; all have grouped queries.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-biased": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama3": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "mistral": {  # attention is wider than the residual stream: 6 * 16 > 64
        "model_type": "mistral",
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 16,
        "sliding_window": WINDOW,
    },
    "qwen2": {"model_type": "qwen2"},  # q, k and v have biases
    "qwen2-sliding": {  # layer 0 sees all, layer 1 a window
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "num_key_value_heads": 1},  # q and k norms
}


def tiny_model(
    family: str, tied: bool = False, layers: int = LAYERS, seed: int = 0, **changes: Any
) -> torch.nn.Module:
    """A model in fp32 whose every parameter is random: norms far from 1, biases from 0.

    Embeddings are mixtures of a few directions, so that the inputs of linears are correlated, and
    have a mean.
    """
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "bos_token_id": 256,
        "eos_token_id": 257,
    } | FAMILIES[family]
    settings |= changes
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            values = randn(len(parameter), 6) @ randn(6, parameter.shape[1]) / 6**0.5
            values += 0.3 * randn(*parameter.shape) + 0.2
        elif name.endswith("norm.weight"):
            values = 0.5 + randn(*parameter.shape).abs()
        elif parameter.dim() == 2:
            values = randn(*parameter.shape) / parameter.shape[1] ** 0.5
        else:
            values = 0.3 * randn(*parameter.shape)
        parameter.data.copy_(values)
    return model


def write_checkpoint(
    folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **model: Any
) -> Path:
    """A folder as a person would have it: weights, config, tokenizer."""
    tiny_model(family, **model).to(dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer(first: int = 0) -> PreTrainedTokenizerFast:
    """One token a byte, BOS and EOS behind them; ids below `first` are never given."""
    unused = [f"<{i}>" for i in range(first)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate([*unused, *alphabet, "<s>", "</s>"])}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = dict(zip(("bos_token", "eos_token"), ("<s>", "</s>"), strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **special)


def write_text(path: Path, documents: int = 12) -> Path:
    """A jsonl of sentences of made-up words, the same every time."""
    draw = np.random.default_rng(0)
    words = ["".join(draw.choice([*"aeiourstln"], draw.integers(2, 8))) for _ in range(60)]
    texts = [" ".join(draw.choice(words, 60)) for _ in range(documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def random_ids(windows: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (windows, length), generator=generator)


def all_count(ids: Tensor) -> CalibrationWindows:
    """Windows of these tokens, none of them masked."""
    return CalibrationWindows(ids, torch.ones_like(ids, dtype=torch.bool))


WINDOWS = all_count(random_ids(6, 24))


def recipe_for(model: Path, dataset: Path | None = None, /, **sections: Any) -> Recipe:
    """Per default: no rotation, GPTQ with uniform tokens, 4 bits in groups of 32."""
    sections = {"rotate": "none"} | sections
    quantize = {"bits": 4, "group_size": 32, "token_importance": "uniform"}
    calibration = {"samples": 6, "length": 24} | ({"dataset": str(dataset)} if dataset else {})
    sections["quantize"] = quantize | sections.get("quantize", {})
    sections["calibration"] = calibration | sections.get("calibration", {})
    return Recipe.from_dict({"model": str(model)} | sections)


def change_config(folder: Path, **changes: Any) -> None:
    """Sets keys of a folder's config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


# ---- results ------------------------------------------------------------------------------------


def weight_files(folder: Path) -> dict[str, str]:
    """The sha256 of every safetensors file and index."""
    files = sorted(folder.glob("*.safetensors*"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def every_file(folder: Path) -> dict[str, bytes]:
    """All bytes below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by the safetensors library."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` unsigned numbers of each row of a dense little-endian bit stream."""
    octets = np.ascontiguousarray(words.numpy()).view(np.uint8)  # [N, 4 * words]
    stream = np.unpackbits(octets, axis=1, bitorder="little")[:, : count * bits]
    digits = stream.reshape(len(octets), count, bits).astype(np.int64)
    return torch.from_numpy(digits @ (1 << np.arange(bits)))


def dequantised(tensors: dict[str, Tensor], bits: dict[str, int]) -> dict[str, Tensor]:
    """The checkpoint as plain fp32 weights, by the documented layout alone.

    bits: the width of each quantised module.
    """
    parts = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
    plain = {n: t.float() for n, t in tensors.items() if n.rpartition(".")[2] not in parts}
    for module, width in bits.items():
        packed, scale, shape = (tensors[f"{module}.{part}"] for part in parts[:3])
        N, K = shape.tolist()
        codes = (unpack(packed, width, K) - 2 ** (width - 1)).view(N, scale.shape[1], -1)
        if f"{module}.{parts[3]}" in tensors:
            zero = unpack(tensors[f"{module}.{parts[3]}"].T.contiguous(), width, N).T
            codes = codes - (zero - 2 ** (width - 1)).unsqueeze(-1)
        plain[f"{module}.weight"] = (codes * scale.float().unsqueeze(-1)).view(N, K)
    return plain


def widths_of(recipe: Recipe, folder) -> dict[str, int]:
    """The width that the recipe gives to each quantised linear."""
    skeleton = Skeleton(folder)
    schemes = {
        name: recipe.quantize.scheme_for(name, linear_in(skeleton.model, name).in_features)
        for name in skeleton.linear_names()
    }
    return {name: scheme.bits for name, scheme in schemes.items() if scheme}


def load_whole(folder: Path, **options: Any) -> torch.nn.Module:
    """Plain transformers in fp32; fails if a key is missing, left over or of another shape."""
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **options
    )
    assert not any(loading.values()), loading
    return model.eval()


@torch.no_grad()
def logits_of(model: torch.nn.Module | Path, ids: Tensor | None = None) -> Tensor:
    """Logits [B, T, V] of a model or a folder on two sequences, longer than sliding windows."""
    model = load_whole(model) if isinstance(model, Path) else model
    return model(input_ids=random_ids(2, 3 * WINDOW, seed=5) if ids is None else ids).logits


def relative_error(found: Tensor, expected: Tensor) -> float:
    """max |found - expected| / max |expected|."""
    return float((found - expected).abs().max() / expected.abs().max())
