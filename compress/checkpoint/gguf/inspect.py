"""What GGUF files hold, from their headers alone: as `inspect` lists any checkpoint.

    found = inspect_gguf([Path("exported/model.gguf")])
    found["modules"][0]       # {"name": "blk.0.attn_q", "shape": [64, 64], "bits": 4, ...}

Names and types are llama.cpp's. A block of Q4_0 and its like has one scale; the 256 weights of a
K-quant share one too, with small factors to it for every 16 or 32.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.errors import CheckpointError, UsageError, import_package

# Types whose levels have an offset of their own in each block.
ASYMMETRIC = re.compile(r"Q\d_1|Q[245]_K")
PLAIN = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I8": 8, "I16": 16, "I32": 32, "I64": 64}
PART = re.compile(r"(.+)-\d{5}-of-\d{5}\.gguf")


def inspect_gguf(files: Sequence[Path]) -> dict[str, Any]:
    """{"format", "modules", "bytes"} of the files of one model, as `compress.inspect` has them.

    Raises UsageError without the library gguf and for files of several models, CheckpointError for
    a damaged file.
    """
    names = {part[1] if (part := PART.fullmatch(file.name)) else file.name for file in files}
    if len(names) > 1:
        raise UsageError(
            f"{files[0].parent} has several GGUF models: name one of {', '.join(sorted(names))}"
        )
    modules, quantised, total = [], 0, 0
    for file in files:
        for tensor in _tensors(file):
            kind, nbytes = tensor.tensor_type.name, int(tensor.n_bytes)
            total += nbytes
            scheme = _scheme(kind)
            quantised += nbytes if scheme["symmetric"] is not None else 0
            if len(tensor.shape) >= 2 and tensor.name.endswith(".weight"):
                shape = [int(size) for size in reversed(tensor.shape)]
                name = tensor.name.removesuffix(".weight")
                modules.append({"name": name, "shape": shape, "type": kind, **scheme})
    return {
        "format": "gguf",
        "modules": modules,
        "bytes": {"quantized": quantised, "other": total - quantised, "total": total},
    }


def gguf_chat_template(file: Path) -> bool:
    """Whether a file's metadata hold a chat template. Raises as `inspect_gguf` does."""
    return "tokenizer.chat_template" in _opened(file).fields


def _tensors(file: Path) -> Any:
    return _opened(file).tensors


def _opened(file: Path) -> Any:
    gguf = import_package("gguf", "reading GGUF files")
    try:
        return gguf.GGUFReader(file)
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
        raise CheckpointError(f"{file} is no GGUF file, or damaged: {error}") from error


def _scheme(kind: str) -> dict[str, Any]:
    """Bits, group size and symmetry of a type by its name, such as Q4_0, IQ3_XXS, BF16."""
    import gguf  # slow to import

    if kind in PLAIN:
        return {"bits": PLAIN[kind], "group_size": None, "symmetric": None}
    block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    named = re.match(r"[A-Z]*Q(\d)|[A-Z]+FP(\d)", kind)
    bits = int(named[1] or named[2]) if named else 8 * nbytes / block
    return {"bits": bits, "group_size": block, "symmetric": not ASYMMETRIC.match(kind)}
