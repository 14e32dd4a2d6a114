"""The GGUF file of llama.cpp: a packed checkpoint, its settings and its tokenizer in one file.

Codes keep their values; `gguf_blocks` says how they lie in blocks. Each tensor has a type of its
own, so widths may be mixed:

    2 bits   Q2_K    groups of a multiple of 256        5 bits   Q5_0    of 32, symmetric
    3 bits   Q3_K    of 256, symmetric                  6 bits   Q6_K    of 256, symmetric
    4 bits   Q4_0    of 32, symmetric                   8 bits   Q8_0    of 32, symmetric
             Q4_K    of 256, or Q4_1 where fp16 holds the offsets: asymmetric

One scale a row is a group of all columns. What has no type of its width is refused, or with
`requantise` stored in the smallest wider type that holds the same values; where none does, the
values are rounded anew to Q8_0 or fp16. Notes and metadata say which modules that were.

The embedding and the head, where they are not quantised, are rounded to Q8_0 as llama.cpp does, or
with `keep_embeddings` stay as they are. Other matrices keep their dtype, vectors become fp32:
llama.cpp adds and scales in it. Its Llama turns neighbouring pairs of a head's rows where
transformers turns rows half a head apart, so rows of q and k change places. Written by the library
`gguf`: pip install gguf.

    export("out", "gguf", "out-gguf")                 # out-gguf/model.gguf
"""

import os
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from compress.checkpoint.gguf.blocks import BLOCK_TYPES, SMALL, SUPER, exact_type, pack
from compress.checkpoint.gguf.settings import add_settings, checked_family, rope_factors
from compress.checkpoint.gguf.vocabulary import Vocabulary, read_vocabulary
from compress.checkpoint.packed import PackedLinears
from compress.checkpoint.packed_formats import with_fp16_scales
from compress.errors import CheckpointError, UsageError, import_package
from compress.kernels.codes import Codes
from compress.kernels.reference import dequantize
from compress.models.config_values import (
    check_config,
    check_extent,
    check_tokenizer,
    reason_of,
)
from compress.models.families import head_dim_of
from compress.models.pretrained import guarded
from compress.models.skeleton import empty_model
from compress.scheme import Scheme

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PretrainedConfig

FILE = "model.gguf"
SCALE_BITS = 16
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
EMBEDDING, HEAD, ROPE_FACTORS = "model.embed_tokens.weight", "lm_head", "rope_freqs.weight"


class GgufFormat:
    """Writes a packed checkpoint as GGUF; see the file's head."""

    name = "gguf"
    companions = False  # settings and tokenizer are inside the file
    options = frozenset({"requantise", "keep_embeddings"})

    def __init__(
        self, source: PackedLinears, requantise: bool = False, keep_embeddings: bool = False
    ):
        self.source = source
        self.requantise, self.keep_embeddings = requantise, keep_embeddings

    def check(self) -> list[str]:
        """Notes, a line each; UsageError for what GGUF or llama.cpp cannot hold."""
        import_package("gguf", "GGUF export")
        from transformers import AutoConfig  # takes seconds, which other formats need not wait

        folder, file = self.source.folder, self.source.folder / "config.json"
        check_config(self.source.config, file)
        check_tokenizer(folder)
        check_extent(self.source.config, self.source.reader, file)
        self.config: PretrainedConfig = guarded(folder, AutoConfig.from_pretrained)
        self.family = checked_family(self.config)
        self._check_shapes()
        self.names = self._names()
        table = EMBEDDING.removesuffix(".weight")
        rows = self.source.shapes.get(table) or self.source.reader.shape(EMBEDDING)
        self.vocabulary: Vocabulary = read_vocabulary(self.source.folder, rows[0])
        self.types: dict[str, str] = {}
        self.wider: list[str] = []
        self.changed: dict[str, float] = {}  # module -> relative error
        self.rounded: list[str] = []  # tables of 16 bits, to Q8_0
        for name in self.source.schemes:
            if name not in self.source.twins:
                self.types[name] = self._type_of(name)
        self.layout = {name: self._layout(source) for name, source in self.names.items()}
        self.differs = [f"{name} was rounded to {self.types[name]}" for name in self.changed]
        self.differs += [f"{name} was rounded to Q8_0" for name in self.rounded]
        return self._notes()

    def _check_shapes(self) -> None:
        """CheckpointError for tensors that are not those of the model in config.json."""
        folder, reader = self.source.folder, self.source.reader
        try:
            model = empty_model(self.config)
        except Exception as error:  # what a wrong value sets off is of any kind
            reason = reason_of(error)
            raise CheckpointError(
                f"{folder / 'config.json'} describes no model: {reason}"
            ) from error
        for name, parameter in model.named_parameters():
            module = name.removesuffix(".weight")
            packed = name != module and module in self.source.schemes
            if name not in reader and not packed:
                if name == f"{HEAD}.weight" and self.config.tie_word_embeddings:
                    continue
                raise CheckpointError(f"{folder} lacks the tensor {name!r}")
            found = self.source.shapes[module] if packed else reader.shape(name)
            if found != tuple(parameter.shape):
                raise CheckpointError(
                    f"tensor {name!r} in {folder} has shape {list(found)}, expected "
                    f"{list(parameter.shape)} from config.json"
                )

    # ---- what goes where ------------------------------------------------------------------------

    def _names(self) -> dict[str, str]:
        """The name of each tensor there -> the tensor or the module (`X.weight`) here."""
        import gguf  # slow to import

        architectures = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
        mapping = gguf.get_tensor_name_map(
            architectures[self.family.architecture], self.config.num_hidden_layers
        )
        names: dict[str, str] = {}
        for tensor in self.source.reader.names:
            module, _, key = tensor.rpartition(".")
            if key == "inv_freq" or (tensor == f"{HEAD}.weight" and self._head_is_embedding()):
                continue  # neither is read by transformers
            if module in self.source.twins:
                continue  # the embedding's, which llama.cpp takes where there is no head
            if module in self.source.schemes and key in self.source.formats[module].suffixes:
                tensor = f"{module}.weight"
            found = mapping.get_name(tensor, try_suffixes=(".weight", ".bias"))
            allowed, leaf = self.family.biases, module.rpartition(".")[2]
            unread = key == "bias" and allowed is not None and leaf not in allowed
            if found is None or unread:
                raise UsageError(
                    f"llama.cpp has no place for {tensor} in a {self.config.model_type}: export to "
                    f"another format"
                )
            names[found] = tensor
        return names

    def _head_is_embedding(self) -> bool:
        """Whether the head is a copy of the embedding: one of its own is used, whatever is said."""
        reader = self.source.reader
        head, table = f"{HEAD}.weight", EMBEDDING
        both = head in reader and table in reader
        return both and self.config.tie_word_embeddings and reader.equal(head, table)

    def _type_of(self, name: str) -> str:
        """The GGUF type of a quantised module."""
        scheme, (_, K) = self.source.schemes[name], self.source.shapes[name]
        size = scheme.group_size or K
        weight = None if scheme.symmetric else self.source.codes(name)
        own = [kind for kind in BLOCK_TYPES.values() if kind.bits == scheme.bits]
        if kind := exact_type(scheme.bits, size, weight, own):
            return kind.name
        wider = exact_type(scheme.bits, size, weight, BLOCK_TYPES.values())
        nearest = wider.name if wider else ("F16" if K % SMALL else "Q8_0")
        if not self.requantise:
            how = f"{scheme.bits} bits in groups of {size}"
            how += "" if scheme.symmetric else ", asymmetric"
            cost = f"exact, {wider.bits_per_weight:g} bits a weight" if wider else "rounded anew"
            raise UsageError(
                f"no GGUF type of its width holds {name} ({how}): quantise it "
                f"{_remedy(scheme, K)}, or allow {nearest} ({cost}; --requantise)"
            )
        if wider:
            self.wider.append(name)
        else:
            exact = _dense(self.source.codes(name))
            error = _values(_rounded(exact, nearest), nearest) - exact.numpy()
            self.changed[name] = float(np.linalg.norm(error) / max(exact.norm(), 1e-30))
        return nearest

    def _notes(self) -> list[str]:
        notes = []
        if self.changed:
            first, worst = next(iter(self.changed)), max(self.changed.values())
            notes.append(
                f"{len(self.changed)} of {len(self.types)} modules were re-quantised, the first "
                f"{first} to {self.types[first]}: their weights moved by up to {worst:.1e}"
            )
        if self.wider:
            first = self.wider[0]
            notes.append(
                f"{len(self.wider)} of {len(self.types)} modules are stored in a wider type, the "
                f"first {first} as {self.types[first]}: the values are the same, the file is larger"
            )
        if self.changed or self.wider:
            before, after = self._bits_per_weight()
            notes.append(
                f"{after:.3g} bits a weight, scales included, where the checkpoint has {before:.3g}"
            )
        if self.rounded:
            notes.append(
                f"{' and '.join(self.rounded)} rounded to Q8_0, as llama.cpp does: "
                f"--keep-embeddings leaves them in 16 bits"
            )
        window = getattr(self.config, "sliding_window", None)
        if window and window < self.config.max_position_embeddings:
            notes.append(
                f"llama.cpp does not slide the window of {window:,} tokens: behind it, output "
                f"differs from that of other engines"
            )
        return notes

    def _bits_per_weight(self) -> tuple[float, float]:
        """Of what was quantised, with its scales: in the checkpoint, and in the file."""
        weights, before, after = 0, 0.0, 0.0
        for name, kind in self.types.items():
            scheme, (N, K) = self.source.schemes[name], self.source.shapes[name]
            stored = BLOCK_TYPES[kind].bits_per_weight if kind in BLOCK_TYPES else 16
            fields = SCALE_BITS + (0 if scheme.symmetric else scheme.bits)
            weights += N * K
            before += N * K * (scheme.bits + fields / (scheme.group_size or K))
            after += N * K * stored
        return before / weights, after / weights

    # ---- writing --------------------------------------------------------------------------------

    def write(self, folder: Path, shard_bytes: int) -> dict[str, int]:
        """folder/model.gguf, or model-0000k-of-0000n.gguf if that passes `shard_bytes`."""
        import gguf  # slow to import

        sizes = {"quantized": 0, "other": 0}
        layout = {}  # name -> type, shape in bytes
        for name, (kind, shape) in self.layout.items():
            block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
            layout[name] = (kind, (*shape[:-1], shape[-1] // block * nbytes))
            module = self.names[name].removesuffix(".weight")
            part = "quantized" if module in self.types else "other"
            sizes[part] += int(np.prod(layout[name][1]))
        factors = rope_factors(self.config)
        if factors is not None:
            layout[ROPE_FACTORS] = ("F32", (factors.nbytes,))
            sizes["other"] += factors.nbytes
        split = shard_bytes if sum(sizes.values()) > shard_bytes else 0
        writer = gguf.GGUFWriter(folder / FILE, self.family.architecture, split_max_size=split)
        self._add_metadata(writer)
        for name, (kind, shape) in layout.items():
            writer.add_tensor_info(
                name,
                shape,
                np.dtype(np.uint8),
                int(np.prod(shape)),
                gguf.GGMLQuantizationType[kind],
            )
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name in layout:
                source = self.names.get(name)
                data = self._data(source) if source else factors
                assert data is not None
                writer.write_tensor_data(data)
            for file in writer.fout or ():
                file.flush()
                os.fsync(file.fileno())
        finally:
            writer.close()
        return sizes

    def _layout(self, source: str) -> tuple[str, tuple[int, ...]]:
        """The type of a tensor in the file, and its shape in weights."""
        module = source.removesuffix(".weight")
        if module in self.types:
            return self.types[module], self.source.shapes[module]
        shape, dtype = self.source.reader.shape(source), self.source.reader.dtype(source)
        if dtype not in DTYPES:
            raise UsageError(f"{source} is {dtype}: GGUF takes float32, float16 and bfloat16 here")
        tables = (EMBEDDING, f"{HEAD}.weight")
        if source in tables and shape[1] % SMALL == 0 and not self.keep_embeddings:
            self.rounded.append(module)
            return "Q8_0", shape
        return "F32" if len(shape) == 1 else DTYPES[dtype], shape

    def _data(self, source: str) -> np.ndarray:
        """The bytes of a tensor as they are written, rows along the first axis."""
        module_name = source.removesuffix(".weight")
        rows = self._row_order(source)
        if module_name not in self.types:
            tensor = self.source.reader.tensor(source)
            if module_name in self.rounded:
                return _rounded(tensor.float(), "Q8_0")
            tensor = tensor.float() if tensor.dim() == 1 else tensor
            return (tensor if rows is None else tensor[rows]).contiguous().view(torch.uint8).numpy()
        weight, kind = self.source.codes(module_name), self.types[module_name]
        if rows is not None:
            zero = None if weight.zero is None else weight.zero[rows]
            weight = replace(weight, codes=weight.codes[rows], scale=weight.scale[rows], zero=zero)
        if module_name in self.changed:
            return _rounded(_dense(weight), kind)
        return pack(weight, BLOCK_TYPES[kind])

    def _row_order(self, source: str) -> Tensor | None:
        """Where llama.cpp's Llama looks for the rows of q and k; None: where they are."""
        config = self.config
        linear = source.split(".")[-2]
        if not self.family.pairs or linear not in ("q_proj", "k_proj"):
            return None
        heads = config.num_key_value_heads if linear == "k_proj" else config.num_attention_heads
        rows = torch.arange(heads * head_dim_of(config))
        return rows.view(heads, 2, -1).transpose(1, 2).flatten()

    def _add_metadata(self, writer: "GGUFWriter") -> None:
        """Settings of the model, the tokenizer, and who made the file."""
        import gguf  # slow to import

        writer.add_quantized_by(f"modelpress {version('modelpress')}")
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(_file_type(self._weights_per_type()))
        writer.add_array("modelpress.requantised", list(self.changed))  # an empty one is left out
        add_settings(writer, self.config)
        writer.add_vocab_size(len(self.vocabulary.tokens))
        self.vocabulary.add_to(writer)

    def _weights_per_type(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for name, kind in self.types.items():
            counts[kind] = counts.get(kind, 0) + int(np.prod(self.source.shapes[name]))
        return counts


# ---- parts --------------------------------------------------------------------------------------


def _remedy(scheme: Scheme, K: int) -> str:
    """How to quantise a module of K columns so that a type of its width holds it, if one can."""
    own = [kind for kind in BLOCK_TYPES.values() if kind.bits == scheme.bits]
    offsets = any(kind.offset and kind.size == SUPER for kind in own)
    if not scheme.symmetric and offsets and K % SUPER == 0:
        return f"in groups of a multiple of {SUPER}"
    if kind := exact_type(scheme.bits, K, None, own):
        how = f"in groups of a multiple of {kind.size}"
        return how if scheme.symmetric else f"symmetrically, {how}"
    return "with 4 or 8 bits, symmetrically" if K % SMALL == 0 else "not at all"


def _dense(weight: Codes) -> Tensor:
    """The weight [N, K] in fp32, with scales rounded to fp16."""
    return dequantize(with_fp16_scales(weight)).float()


def _rounded(weight: Tensor, kind: str) -> np.ndarray:
    """fp32 values [N, K] rounded to a type, as bytes."""
    import gguf  # slow to import

    data = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind])
    return data.view(np.uint8)


def _values(data: np.ndarray, kind: str) -> np.ndarray:
    import gguf  # slow to import

    return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])


def _file_type(weights: dict[str, int]) -> int:
    """What llama.cpp shows as the type of the file: that of most quantised weights."""
    import gguf  # slow to import

    kind = max(weights, key=lambda name: weights[name])
    known = gguf.LlamaFileType.__members__
    return next(
        (known[f"MOSTLY_{kind}{end}"] for end in ("", "_S") if f"MOSTLY_{kind}{end}" in known),
        gguf.LlamaFileType.GUESSED,
    )
