"""Packed execution inside transformers: a quantisation config and the quantiser that it selects.

    model = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=compress.ModelpressConfig(packed=True)
    )

works on a folder or hub id that is quantised already, as compressed-tensors `pack-quantized` or
`int-quantized`, or GPTQ. (`compress.load` also reads sections that compressed-tensors itself, which
transformers asks first, knows no longer: act-order "group".) Importing this file registers the two
classes with transformers, by its public functions; it changes nothing in transformers that was
there before.

How weights get in: linears and embeddings that the files hold packed are taken out of the empty
model, so that transformers loads all the rest; then each is read, packed for its device, and put in
its place. A dense copy of a packed weight never exists, and a head that is the packed embedding is
held once. `save_pretrained` writes what was read: the same
tensors, and the same section of config.json.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import CompressedTensorsConfig

from compress.checkpoint.engines import FUSED
from compress.checkpoint.packed import PackedLinears, UnpackableError
from compress.errors import UsageError
from compress.kernels.activations import BITS as ACTIVATION_BITS
from compress.kernels.codes import WIDTHS, Codes, with_bits
from compress.kernels.embedding import QuantEmbedding
from compress.kernels.fused import FusedPart, SharedLinear, fuse_linears
from compress.kernels.linear import QuantLinear
from compress.kernels.reference import dense
from compress.loading.config_merge import MergesWithCheckpoint
from compress.memory import release_memory

METHOD = "modelpress"
# After so many bytes of codes, what packing needed on the way is given back: often enough to stay
# small, rarely enough not to spend the time on faulting pages in again.
RELEASE_BYTES = 1 << 28


@register_quantization_config(METHOD)
class ModelpressConfig(CompressedTensorsConfig, metaclass=MergesWithCheckpoint):
    """How a packed checkpoint is to be loaded.

    packed: keep the linears packed; False expands them to dense ones while loading, exactly, which
    reads GPTQ and asymmetric compressed-tensors without further packages. fuse: run linears that
    read the same input (q/k/v, gate/up) in one launch, where their widths and groups are the same.
    activation_bits, 2 to 8: packed linears round what they read, token by token, and multiply
    integers, which is faster with several tokens and less exact; what is saved does not say so.
    """

    # A CompressedTensorsConfig because transformers copies loading attributes from a few classes.

    def __init__(
        self,
        packed: bool = True,
        fuse: bool = False,
        activation_bits: int | None = None,
        **unused: Any,
    ):
        if not isinstance(packed, bool) or not isinstance(fuse, bool):
            raise UsageError(f"packed and fuse are True or False, found {packed!r} and {fuse!r}")
        if fuse and not packed:
            raise UsageError("fuse=True is for packed linears: leave out packed=False")
        if activation_bits is not None and not packed:
            raise UsageError("activation_bits is for packed linears: leave it out, or packed=False")
        known = type(activation_bits) is int and activation_bits in ACTIVATION_BITS
        if activation_bits is not None and not known:
            raise UsageError(f"activation_bits are 2 to 8, found {activation_bits!r}")
        if unknown := unused.keys() - {"quant_method"}:
            raise UsageError(
                f"ModelpressConfig takes packed, fuse and activation_bits, found {min(unknown)}"
            )
        self.packed, self.fuse, self.activation_bits = packed, fuse, activation_bits
        self.quant_method = METHOD  # type: ignore[assignment]  # registered: no member of the enum
        self.dequantize = not packed
        self.checkpoint: dict[str, Any] = {}  # the section of the model that was loaded

    def get_loading_attributes(self) -> dict[str, Any]:
        """What transformers copies to the checkpoint's own config."""
        return {"quant_method": METHOD} | self.choices()

    def choices(self) -> dict[str, Any]:
        """The arguments of this config."""
        names = ("packed", "fuse", "activation_bits")
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """The section of config.json: of a loaded model, that of its checkpoint."""
        return dict(self.checkpoint) or self.get_loading_attributes()

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: every key counts."""
        return self.to_dict()


class PackedPlaceholder(nn.Module):
    """Where a packed module will be: what it is of, and its bias, which transformers loads."""

    def __init__(self, module: nn.Linear | nn.Embedding):
        super().__init__()
        self.kind, self.dtype = type(module), module.weight.dtype
        self.bias = module.bias if isinstance(module, nn.Linear) else None


@register_quantizer(METHOD)
class ModelpressQuantizer(HfQuantizer):
    """Takes packed linears out of a model before its weights are loaded, and puts them in after."""

    quantization_config: ModelpressConfig
    linears: PackedLinears
    places: dict[str, str]  # name in the files -> name in the model

    def __init__(self, quantization_config: Any, **options: Any):
        choices = ModelpressConfig.choices(quantization_config)  # of a config of any class
        super().__init__(ModelpressConfig(**choices), **options)

    @property
    def is_trainable(self) -> bool:
        """Packed weights have no gradient."""
        return not self.quantization_config.packed

    @property
    def is_compileable(self) -> bool:
        """All products are custom operators; which tensor a fused one was made of is not traced."""
        return not self.quantization_config.fuse

    def is_serializable(self) -> bool:
        """`save_pretrained` writes the tensors that were read."""
        return True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **options: Any
    ) -> None:
        files = [Path(file) for file in checkpoint_files or ()]
        if not files or any(file.suffix != ".safetensors" for file in files):
            raise UnpackableError(
                "packed loading reads safetensors files only, found "
                f"{files[0].name if files else 'a state dict'}"
            )
        with torch.device("cpu"):  # transformers calls this under the meta device
            bits = self.quantization_config.activation_bits
            self.linears = PackedLinears(files[0].parent, bits)
            if self.quantization_config.packed:
                self.linears.check_runs()
            self.places = find_places(model, self.linears)
        for place in self.places.values():
            _put(model, place, PackedPlaceholder(_matrix_in(model, place)))
        taken = set()
        for name, place in self.places.items():
            keys = "|".join(self.linears.formats[name].suffixes)
            taken |= {rf"^{re.escape(spelled)}\.({keys})$" for spelled in (name, place)}
        self._untie(model)
        model._keys_to_ignore_on_load_unexpected = taken | set(
            model._keys_to_ignore_on_load_unexpected or ()
        )
        self.quantization_config.checkpoint = self.linears.section

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **options: Any
    ) -> PreTrainedModel:
        devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
        if len(devices) != 1:
            found = ", ".join(sorted(map(str, devices)))
            raise UnpackableError(
                f"{self.linears.folder}: packed linears run on one device, found {found}: load it "
                f"with a device_map of one device"
            )
        (device,) = devices
        passed = 0
        # A head that an embedding shares its codes with is there first.
        twins = {table: head for head, table in self.linears.twins.items()}
        for name in sorted(self.places, key=lambda name: name in twins):
            place = self.places[name]
            placeholder = model.get_submodule(place)
            assert isinstance(placeholder, PackedPlaceholder)
            if name in twins:
                head = model.get_submodule(self.places[twins[name]])
                _put(model, place, _table_of(head))
                continue
            codes = self.linears.codes(name, device)
            passed += codes.codes.nbytes
            _put(model, place, self._module(name, codes, placeholder))
            del codes
            if passed > RELEASE_BYTES:
                release_memory()
                passed = 0
        if self.quantization_config.fuse:
            fuse_linears(model, FUSED.values())
        release_memory()  # or the process would stay several times as large as its weights
        if not self.quantization_config.packed:
            self.remove_quantization_config(model)
            self._tie_again(model)
        return model

    def _module(self, name: str, codes: Codes, placeholder: PackedPlaceholder) -> nn.Module:
        bits, packed = self.linears.schemes[name].activation_bits, self.quantization_config.packed
        if placeholder.kind is nn.Embedding:
            if packed:
                return QuantEmbedding(codes, placeholder.dtype)
            return dense_embedding(codes, placeholder.dtype)
        if packed:
            codes = codes if codes.bits in WIDTHS else with_bits(codes, 8)
            return QuantLinear(codes, placeholder.bias, placeholder.dtype, bits)
        self._refuse_dense(name)
        return dense_linear(codes, placeholder.bias, placeholder.dtype)

    def _untie(self, model: PreTrainedModel) -> None:
        """Takes weights that are packed from those that transformers ties, now and when asked."""
        packed = {f"{place}.weight" for place in self.places.values()}

        def plain(keys: dict[str, str] | None) -> dict[str, str]:
            return {a: b for a, b in (keys or {}).items() if not packed & {a, b}}

        model.all_tied_weights_keys = plain(model.all_tied_weights_keys)
        model._tied_weights_keys = plain(model._tied_weights_keys)

    def _tie_again(self, model: PreTrainedModel) -> None:
        """Undoes `_untie` for a model that is dense."""
        model.__dict__.pop("_tied_weights_keys", None)
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)

    def _refuse_dense(self, name: str) -> None:
        if self.linears.schemes[name].activation_bits is None:
            return
        chosen = self.linears.activation_bits is not None
        otherwise = "load it without activation_bits" if chosen else "keep it packed"
        raise UnpackableError(
            f"{self.linears.folder}: {name} has quantised activations, which a dense linear would "
            f"leave out: {otherwise}, without packed=False (--dense)"
        )

    def _dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        for name in self.places:
            self._refuse_dense(name)
        dtype = dtype or next(model.parameters()).dtype  # model.dtype may be a name after saving
        for place in self.places.values():
            layer = _packed_in(model, place)
            if isinstance(layer, QuantEmbedding):
                _put(model, place, dense_embedding(layer.codes(), dtype))
            else:
                _put(model, place, dense_linear(layer.codes(), layer.bias, dtype))
        for head, table in self.linears.twins.items():
            shared = _matrix_in(model, self.places[table]).weight
            _matrix_in(model, self.places[head]).weight = shared
        self._tie_again(model)
        for name, module in list(model.named_modules()):
            if isinstance(module, SharedLinear):
                parent, _, leaf = name.rpartition(".")
                delattr(model.get_submodule(parent), leaf)
        return model

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes: packed linears as their files had them."""
        kinds = (QuantLinear, QuantEmbedding, SharedLinear)
        own = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, kinds))
        state = {key: t for key, t in model.state_dict().items() if not key.startswith(own)}
        for name, place in self.places.items():
            layer = _packed_in(model, place)
            tensors = self.linears.tensors(name, layer.codes())
            if name in self.linears.twins:  # else of one memory with the embedding's
                tensors = {key: tensor.clone() for key, tensor in tensors.items()}
            bias = None if isinstance(layer, QuantEmbedding) else layer.bias
            if bias is not None:
                tensors["bias"] = bias
            state |= {f"{place}.{key}": tensor for key, tensor in tensors.items()}
        return state, {}


def find_places(model: PreTrainedModel, linears: PackedLinears) -> dict[str, str]:
    """The linear or embedding of the model for each packed one of the files, by name.

    Raises UnpackableError for a module that the model does not have as a plain one of the right
    shape with a weight of its own, and for a bias that it has no place for.
    """
    modules = dict(model.named_modules())
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    rename = _renamer(model)
    places = {}
    shared = {*linears.twins, *linears.twins.values()}
    for name in linears.schemes:
        place = name if isinstance(modules.get(name), nn.Linear) else rename(name)
        module = modules.get(place)
        if type(module) is not nn.Linear and type(module) is not nn.Embedding:
            found = "nothing of that name" if module is None else f"a {type(module).__name__}"
            raise UnpackableError(
                f"{linears.folder}: {name} is packed, but the model has {found}, not a plain "
                f"linear or embedding: {linears.remedy}"
            )
        if f"{place}.weight" in tied and name not in shared:
            raise UnpackableError(
                f"{linears.folder}: {name} is packed, but config.json ties its weight to another: "
                f"set tie_word_embeddings to false"
            )
        linears.check(name, (module.weight.shape[0], module.weight.shape[1]))
        bias = linears.bias(name)  # a NaN in it is told here, wherever it is read later
        # zeros, as old GPTQ writers leave them, say nothing
        if bias is not None and getattr(module, "bias", None) is None and bias.any():
            raise UnpackableError(
                f"{linears.folder}: {name} has a bias, the model's linear has none"
            )
        places[name] = place
    return places


def dense_linear(codes: Codes, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    """The linear that the codes stand for, with a dense weight [N, K] rounded once to `dtype`."""
    N, K = codes.codes.shape
    linear = nn.Linear(K, N, bias is not None, device="meta")
    linear.weight = nn.Parameter(dense(codes, dtype))
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(dtype))
    return linear


def dense_embedding(codes: Codes, dtype: torch.dtype) -> nn.Embedding:
    """The table [V, d] that the codes stand for, each value rounded once to `dtype`."""
    V, d = codes.codes.shape
    table = nn.Embedding(V, d, device="meta")
    table.weight = nn.Parameter(dense(codes, dtype))
    return table


def _table_of(head: nn.Module) -> nn.Module:
    """The embedding that has its rows from a head, packed or dense."""
    if isinstance(head, QuantLinear):
        return QuantEmbedding.of(head)
    assert isinstance(head, nn.Linear)
    table = nn.Embedding(head.out_features, head.in_features, device="meta")
    table.weight = head.weight
    return table


def _matrix_in(model: nn.Module, place: str) -> nn.Linear | nn.Embedding:
    module = model.get_submodule(place)
    assert isinstance(module, nn.Linear | nn.Embedding), f"{place} is a {type(module).__name__}"
    return module


def _renamer(model: PreTrainedModel) -> Callable[[str], str]:
    """What transformers calls a module that the files have under another, perhaps older, name."""
    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    state = model.state_dict()

    def rename(name: str) -> str:
        key = f"{name}.weight"
        key, _ = rename_source_key(key, renamings, [], model.base_model_prefix, state)
        return key.removesuffix(".weight")

    return rename


def _packed_in(model: nn.Module, place: str) -> QuantLinear | QuantEmbedding | FusedPart:
    layer = model.get_submodule(place)
    assert isinstance(layer, QuantLinear | QuantEmbedding | FusedPart), f"{place} is not packed"
    return layer


def _put(model: nn.Module, place: str, module: nn.Module) -> None:
    parent, _, leaf = place.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
