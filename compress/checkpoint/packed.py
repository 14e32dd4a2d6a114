"""The packed linears of a checkpoint folder, ours or anybody's, one at a time, as codes and scales.

Reads compressed-tensors `pack-quantized` and `int-quantized` (2 to 8 bits, with inputs as they are
or rounded token by token) and GPTQ in versions 1 and 2 (2, 3, 4 and 8 bits; columns permuted by
act-order too). What a linear is comes from config.json, and must agree with the shapes in the
files' headers.

Policy: all of it is checked before a weight is read, and what cannot be held packed and run to the
letter (another format, activations with fixed scales, a scale that is missing) is an
UnpackableError that names the module. A linear that config.json means to quantise and the files
hold as a plain weight is left to transformers.

    linears = PackedLinears("out")
    linears.check("model.layers.0.mlp.up_proj", (N, K))
    codes = linears.codes("model.layers.0.mlp.up_proj")        # layout.Codes, a byte per weight
    linears.tensors("model.layers.0.mlp.up_proj", codes)       # the file's tensors again
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.checkpoint.compressed_tensors import ModuleScheme, module_schemes
from compress.checkpoint.packed_formats import COMPRESSED_TENSORS, FORMATS
from compress.checkpoint.safetensors_io import CheckpointReader
from compress.errors import CheckpointError, UsageError
from compress.kernels.activations import BITS as ACTIVATION_BITS
from compress.kernels.layout import LEAST_GROUP, WIDTHS, Codes, with_bits

METHODS = ("compressed-tensors", "gptq")
INTEGER_STEP = 32  # inputs of one product of integers
# Tensors that say: these codes are read in another way than ours.
FOREIGN = ("weight_g_idx", "weight_global_scale", "input_scale", "input_zero_point", "output_scale")


class UnpackableError(CheckpointError, UsageError):
    """A checkpoint that was to run packed and cannot: it is damaged, or of another format.

    A CheckpointError by what is wrong, and with the exit code of a UsageError: what was asked for
    is not to be had from that path.
    """


class PackedLinears:
    """The packed linears of a folder; opening it reads config.json and headers only.

    Attributes:
        folder, reader: where it is, its tensors.
        section: `quantization_config` of its config.json.
        method: `compressed-tensors` or `gptq`.
        format: a row of FORMATS.
        schemes: how each packed linear is quantised, by its name in the files.

    Raises UnpackableError for a folder that holds nothing packed, or something else as well;
    CheckpointError for a damaged one.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.section = quantization_section(_read_config(self.folder))
        self.method = str(self.section.get("quant_method"))
        self._refuse_section()
        self.format = FORMATS[_format_of(self.section)]
        self.reader = CheckpointReader(self.folder)
        self.schemes = self._schemes()
        for name, scheme in self.schemes.items():
            self._refuse_scheme(name, scheme)

    def check(self, name: str, shape: tuple[int, int]) -> None:
        """Raises UnpackableError unless the files hold a linear of `shape` [N, K] under `name`."""
        scheme, (N, K) = self.schemes[name], shape
        groups = "one group" if scheme.group_size is None else f"groups of {scheme.group_size}"
        for key, right in self.format.shapes(scheme, shape).items():
            if f"{name}.{key}" not in self.reader:
                if key in self.format.optional:
                    continue
                raise self._error(f"{name} has no {key}: the checkpoint is damaged")
            if (found := self.reader.shape(f"{name}.{key}")) != right:
                raise self._error(
                    f"{name}.{key} has shape {list(found)}, but {scheme.bits} bits in {groups} of "
                    f"a linear [{N}, {K}] take {list(right)}"
                )
        if "weight_shape" in self.format.suffixes:
            stored = self.reader.tensor(f"{name}.weight_shape").tolist()
            if stored != [N, K]:
                raise self._error(
                    f"{name}.weight_shape says {stored}, the model has a linear [{N}, {K}]"
                )

    def codes(self, name: str, device: str | torch.device = "cpu") -> Codes:
        """The codes of one linear on `device`, in a width that kernels run: 5, 6 and 7 bits as 8.

        Raises UnpackableError for inputs permuted across groups in a way that is no act-order,
        CheckpointError for a scale that is no number.
        """
        scheme = self.schemes[name]
        tensors = {
            key: self.reader.tensor(f"{name}.{key}").to(device)
            for key in self.format.suffixes
            if f"{name}.{key}" in self.reader
        }
        try:
            codes = self.format.read(tensors, scheme, name)
        except ValueError as error:
            raise self._error(str(error)) from error
        return codes if codes.bits in WIDTHS else with_bits(codes, 8)

    def tensors(self, name: str, codes: Codes) -> dict[str, Tensor]:
        """The inverse of `codes`: the tensors of the files, on the CPU, by their names inside."""
        written = self.format.write(with_bits(codes.to("cpu"), self.schemes[name].bits))
        return {key: written[key] for key in written if f"{name}.{key}" in self.reader}

    def bias(self, name: str) -> Tensor | None:
        """The bias that the files hold beside a packed linear."""
        return self.reader.tensor(f"{name}.bias") if f"{name}.bias" in self.reader else None

    # ---- refusals -------------------------------------------------------------------------------

    def _error(self, fault: str) -> UnpackableError:
        return UnpackableError(f"{self.folder}: {fault}")

    def _refuse_section(self) -> None:
        if self.method not in METHODS:
            raise self._error(
                f"packed loading reads compressed-tensors and GPTQ, found "
                f"{self.section.get('quant_method')!r}: load it with packed=False"
            )
        if self.method == "gptq":
            found = _format_of(self.section)
            words = self.section.get("pack_dtype", "int32")
            if found not in ("gptq", "gptq_v2") or words != "int32":
                raise self._error(
                    f"packed loading reads GPTQ in the formats gptq and gptq_v2 in 32-bit words, "
                    f"found {found!r} in {words}"
                )
            return
        formats = {_format_of(self.section, group) for group in _groups(self.section)}
        if len(formats) != 1 or not formats <= {*COMPRESSED_TENSORS}:
            raise self._error(
                f"packed loading reads compressed-tensors in the format pack-quantized or "
                f"int-quantized, found {', '.join(sorted(map(str, formats)))}: load it with "
                f"packed=False"
            )
        for number, group in enumerate(_groups(self.section)):
            weights = group.get("weights") or {}
            for key in ("num_bits", "group_size"):
                if not isinstance(weights.get(key, 0) or 0, int):
                    raise self._error(f"config.json gives group {number} {key} {weights[key]!r}")
        for what, found in compressed_tensors_extras(self.section).items():
            if found:
                raise self._error(f"{what} cannot be run packed: load it with packed=False")

    def _schemes(self) -> dict[str, ModuleScheme]:
        main = self.format.main
        packed = self._named(main)
        if main == "weight":  # plain linears have one as well
            packed = [n for n in packed if self.reader.dtype(f"{n}.weight") == torch.int8]
        # a main tensor that is missing leaves its companions
        for suffix in (*self.format.companions, *FOREIGN):
            for name in self._named(suffix):
                if suffix in FOREIGN:
                    what = "act-order" if suffix == "weight_g_idx" else "more than codes and scales"
                    raise self._error(f"{name}.{suffix} is {what}, which cannot be run packed")
                if name not in packed:
                    raise self._error(f"{name} has {suffix} but no {main}: it is not packed")
        if not packed:
            raise self._error("nothing is packed, though config.json says so")
        if self.method == "gptq":
            return {name: self._gptq_scheme(name) for name in packed}
        schemes = module_schemes(self.section, packed)
        for name in packed:
            if name not in schemes:
                raise self._error(f"{name} is packed, but config.json does not say how")
        return schemes

    def _named(self, suffix: str) -> list[str]:
        end = "." + suffix
        return [name.removesuffix(end) for name in self.reader.names if name.endswith(end)]

    def _gptq_scheme(self, name: str) -> ModuleScheme:
        settings = {key: self.section.get(key) for key in ("bits", "group_size", "sym")}
        for pattern, override in (self.section.get("dynamic") or {}).items():
            if re.match(pattern.removeprefix("+:").removeprefix("-:"), name):
                if pattern.startswith("-:"):
                    raise self._error(f"{name} is packed, but `dynamic` leaves it unquantised")
                settings |= {key: override[key] for key in settings if key in override}
                break
        size = settings["group_size"] or -1
        if not isinstance(settings["bits"], int) or not isinstance(size, int):
            raise self._error(
                f"{name}: config.json gives {settings['bits']} bits in groups of {size}"
            )
        return ModuleScheme(settings["bits"], size if size > 0 else None, bool(settings["sym"]))

    def _refuse_scheme(self, name: str, scheme: ModuleScheme) -> None:
        if scheme.bits not in self.format.widths:
            raise self._error(
                f"{name} has {scheme.bits} bits, packed {self.method} runs "
                f"{', '.join(map(str, self.format.widths))}"
            )
        rounded = scheme.activation_bits is not None
        least = INTEGER_STEP if rounded else LEAST_GROUP
        if scheme.group_size is not None and scheme.group_size % least:
            raise self._error(
                f"{name} has groups of {scheme.group_size}{' and quantised activations' * rounded},"
                f" kernels take a multiple of {least} inputs or one group: load it with "
                f"packed=False"
            )
        if scheme.symmetric and f"{name}.weight_zero_point" in self.reader:
            raise self._error(f"{name} has a weight_zero_point, but config.json says symmetric")
        if rounded and not scheme.symmetric:
            raise self._error(
                f"{name} has zero points and quantised activations, which cannot be run packed "
                f"together"
            )


def compressed_tensors_extras(section: dict[str, Any]) -> dict[str, bool]:
    """What a compressed-tensors section asks for beyond integer weights in groups or channels."""
    groups = _groups(section)
    weights = [group.get("weights") or {} for group in groups]
    transforms = (section.get("transform_config") or {}).get("config_groups") or {}
    applied = [part for scheme in transforms.values() for part in scheme.get("apply", [])]
    return {
        # rotations at weight_input and weight_output are folded into the weights already
        "online rotations": any(
            not str(part.get("location", "")).startswith("weight") for part in applied
        ),
        "a quantised KV cache": bool(section.get("kv_cache_scheme")),
        "sparse weights": (section.get("sparsity_config") or {}).get("format", "dense") != "dense",
        "quantised activations other than integers with a scale for each token": any(
            not _rounded_by_token(group.get("input_activations")) or group.get("output_activations")
            for group in groups
        ),
        "weights other than integers in groups": any(
            w.get("type") != "int" or w.get("strategy") not in ("group", "channel") for w in weights
        ),
    }


def _rounded_by_token(activations: dict[str, Any] | None) -> bool:
    """Whether inputs stay as they are, or are rounded as `quantize_tokens` rounds them."""
    if not activations:
        return True
    wanted = {"type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    usual = {"type": "int", "symmetric": True, "dynamic": False}  # where a file says nothing
    found = {key: activations.get(key, usual.get(key)) for key in wanted}
    bits = activations.get("num_bits")
    return found == wanted and isinstance(bits, int) and bits in ACTIVATION_BITS


def quantization_section(config: dict[str, Any]) -> dict[str, Any]:
    """`quantization_config` of a config.json; a multimodal one may have it in its text part."""
    text = config.get("text_config") or {}
    return config.get("quantization_config") or text.get("quantization_config") or {}


def needs_own_reader(section: dict[str, Any]) -> bool:
    """Whether transformers alone does not load such weights as dense ones, and `codes` does.

    GPTQ, for which it wants two more packages; and asymmetric compressed-tensors, of which it
    loads one scheme only.
    """
    if section.get("quant_method") == "gptq":
        return True
    weights = [group["weights"] for group in _groups(section) if group.get("weights")]
    packed = {_format_of(section, group) for group in _groups(section)} <= {"pack-quantized"}
    asymmetric = not all(w.get("symmetric", True) for w in weights)
    return section.get("quant_method") == "compressed-tensors" and packed and asymmetric


def is_packed(section: dict[str, Any]) -> bool:
    """Whether the section is of a format that `PackedLinears` reads and kernels run.

    Codes in int8 only where activations are rounded by token: of others nothing would be gained.
    """
    method, groups = section.get("quant_method"), _groups(section)
    if method != "compressed-tensors":
        return method == "gptq"
    formats = {_format_of(section, group) for group in groups}
    if formats == {"int-quantized"}:
        return all(
            group.get("input_activations") and _rounded_by_token(group["input_activations"])
            for group in groups
        )
    return formats == {"pack-quantized"}


def _groups(section: dict[str, Any]) -> list[dict[str, Any]]:
    return list((section.get("config_groups") or {}).values())


def must_be_compressed(section: dict[str, Any]) -> bool:
    """Whether transformers would take int8 codes for weights: it goes by quantization_status."""
    formats = {_format_of(section, group) for group in _groups(section)}
    status = section.get("quantization_status")
    return (
        section.get("quant_method") == "compressed-tensors"
        and "int-quantized" in formats
        and status != "compressed"
    )


def _format_of(section: dict[str, Any], group: dict[str, Any] | None = None) -> str:
    """The row of FORMATS for a section, or for one of its groups."""
    if section.get("quant_method") == "gptq":
        return str(section.get("checkpoint_format") or section.get("format") or "gptq")
    group = group or next(iter(_groups(section)), {})
    return str(group.get("format") or section.get("format"))


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no config.json: it is not a model folder") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    return content if isinstance(content, dict) else {}
