"""The packed linears of a checkpoint folder, ours or anybody's, one at a time, as codes and scales.

Reads compressed-tensors `pack-quantized` and `int-quantized` (2 to 8 bits, with inputs as they are
or rounded token by token) and GPTQ in versions 1 and 2 (2, 3, 4 and 8 bits), all of them also with
columns that act-order has permuted. What a linear is comes from config.json, and must agree with
the shapes in the files' headers.

Policy: all of it is checked before a weight is read, and what cannot be held as codes to the letter
(another format, activations with fixed scales, a scale that is missing) is an UnpackableError that
names the module. A linear that config.json means to quantise and the files hold as a plain weight
is left to transformers. Kernels run less than files hold: whoever means to run a checkpoint asks
`check_runs` as well.

    linears = PackedLinears("out")
    linears.check("model.layers.0.mlp.up_proj", (N, K))
    codes = linears.codes("model.layers.0.mlp.up_proj")        # Codes, a byte per weight
    linears.tensors("model.layers.0.mlp.up_proj", codes)       # the file's tensors again
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from compress.checkpoint.compressed_tensors import module_schemes
from compress.checkpoint.packed_formats import FORMATS, PackedFormat, by_input
from compress.checkpoint.quantization_config import (
    INTEGERS,
    METHODS,
    checked_section,
    extras,
    format_of,
    gptq_scheme,
    groups_of,
    is_tied,
    needs_own_reader,
    read_config,
)
from compress.errors import CheckpointError, UsageError
from compress.kernels.codes import LEAST_GROUP, Codes, with_bits
from compress.scheme import Scheme
from compress.storage.safetensors import CheckpointReader

INTEGER_STEP = 32  # inputs of one product of integers
WIDEST_SHIFTED = 4  # bits of codes whose zero points go with quantised activations
EMBEDDING, HEAD = "embed_tokens", "lm_head"  # last parts of their names, in every family
# Tensors that say: these codes are read in another way than ours.
FOREIGN = ("weight_global_scale", "input_scale", "input_zero_point", "output_scale")
LOAD_DENSE = "load it with packed=False (--dense)"
NOT_EVEN_DENSE = "it cannot be loaded dense either, serve it with vLLM"


class UnpackableError(CheckpointError, UsageError):
    """A checkpoint that was to run packed and cannot: it is damaged, or of another format.

    A CheckpointError by what is wrong, and with the exit code of a UsageError: what was asked for
    is not to be had from that path.
    """


def refuse_scale_dtype(reader: CheckpointReader, name: str) -> None:
    """CheckpointError for scales that are no floating-point numbers of 16 bits or more."""
    dtype = reader.dtype(name)
    if not dtype.is_floating_point or dtype.itemsize < 2:
        found = str(dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{reader.folder}: {name} has dtype {found}, expected a floating-point scale of 16 "
            f"bits or more: the checkpoint is damaged, or of another format"
        )


def check_scale(reader: CheckpointReader, name: str) -> None:
    """CheckpointError for scales that could not be used, whatever their codes are.

    No number that stands for a scale, and below 0 beside zero points; reads them.
    """
    refuse_scale_dtype(reader, name)
    scale = reader.tensor(name)
    if f"{name.removesuffix('_scale')}_zero_point" in reader:
        _refuse_negative(scale, f"{reader.folder}: {name}")


def _refuse_negative(scale: Tensor, what: str) -> None:
    if bool((scale < 0).any()):
        raise CheckpointError(
            f"{what} holds {int((scale < 0).sum()):,} negative scales beside zero points: the "
            f"checkpoint is damaged"
        )


def _refuse_scales(weight: Codes, what: str) -> None:
    """CheckpointError for scales that no writer gives: `what` names them.

    Symmetric grids turn their longer side round by a negative scale; with zero points there is
    nothing to turn. A scale of 0 is that of a group in which nothing but zeros was.
    """
    if weight.zero is not None:
        _refuse_negative(weight.scale, what)
    none = weight.scale == 0
    if bool(none.any()):
        lost = by_input(none, weight) & (weight.codes != by_input(weight.zero_points(), weight))
        if bool(lost.any()):
            raise CheckpointError(
                f"{what} holds a scale of 0 for {int(lost.sum()):,} codes that are not: the "
                f"checkpoint is damaged"
            )


class PackedLinears:
    """The packed linears of a folder; opening it reads config.json and headers only.

    activation_bits: rounds the inputs of every linear to so many bits, token by token, whatever
    the checkpoint says of them; None is as it says.

    Attributes:
        folder, config, reader: where it is, its config.json, its tensors.
        section: `quantization_config` of its config.json.
        method: `compressed-tensors` or `gptq`.
        formats: the row of FORMATS of each packed module, by its name in the files.
        twins: modules whose codes are those of another: a head tied to a packed embedding.
        schemes: how each packed linear is quantised, by its name in the files.
        remedy: what to do with a folder that is refused.

    Raises UnpackableError for a folder that holds nothing packed, or something else as well, and
    for activation_bits that its weights do not go with; CheckpointError for a damaged one.
    """

    def __init__(self, folder: str | Path, activation_bits: int | None = None):
        self.folder = Path(folder)
        self.activation_bits = activation_bits
        self.config = read_config(self.folder)
        self.section = checked_section(self.config, self.folder / "config.json")
        self.method = str(self.section.get("quant_method"))
        self.remedy = NOT_EVEN_DENSE if needs_own_reader(self.section) else LOAD_DENSE
        self._refuse_section()
        self.reader = CheckpointReader(self.folder)
        self.twins: dict[str, str] = {}
        self.formats = self._formats()
        self.schemes = {name: self._rounded(name, s) for name, s in self._schemes().items()}
        for name, scheme in self.schemes.items():
            self._refuse_scheme(name, scheme)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """N and K of each linear, as the files of compressed-tensors say them.

        Raises UnpackableError where a linear's tensors do not have the shapes that they ask for.
        """
        shapes: dict[str, tuple[int, int]] = {}
        for name in self.schemes:
            if "weight_shape" not in self.formats[name].suffixes:
                N, K = self.reader.shape(f"{self.twins.get(name, name)}.weight")
                self.check(name, (N, K))
                shapes[name] = (N, K)
                continue
            stored = self.reader.tensor(f"{name}.weight_shape")
            if stored.shape != (2,):
                raise self._error(f"{name}.weight_shape has shape {list(stored.shape)}, not [2]")
            N, K = stored.tolist()
            self.check(name, (N, K))
            shapes[name] = (N, K)
        return shapes

    @property
    def runs(self) -> bool:
        """Whether kernels run all linears."""
        try:
            self.check_runs()
        except UnpackableError:
            return False
        return True

    def check_runs(self) -> None:
        """Raises UnpackableError for a linear that kernels do not run."""
        for name, scheme in self.schemes.items():
            rounded = scheme.activation_bits is not None
            chosen = self.activation_bits is not None
            dense = self.remedy if rounded else LOAD_DENSE
            remedy = "leave out activation_bits" if chosen else dense
            least = INTEGER_STEP if rounded else LEAST_GROUP
            if scheme.group_size is not None and scheme.group_size % least:
                also = " and quantised activations" if rounded else ""
                raise self._error(
                    f"{name} has groups of {scheme.group_size}{also}, kernels take a multiple of "
                    f"{least} inputs or one group: {remedy}"
                )
            if rounded and not scheme.symmetric and scheme.bits > WIDEST_SHIFTED:
                raise self._error(
                    f"{name} has {scheme.bits} bits with zero points and quantised activations, "
                    f"which run packed together only up to {WIDEST_SHIFTED} bits: {remedy}"
                )

    def check(self, name: str, shape: tuple[int, int]) -> None:
        """Raises UnpackableError unless the files hold a linear of `shape` [N, K] under `name`."""
        scheme, (N, K), format = self.schemes[name], shape, self.formats[name]
        groups = "one group" if scheme.group_size is None else f"groups of {scheme.group_size}"
        for key, right in format.shapes(scheme, shape).items():
            if (stored_name := self._place(name, key)) not in self.reader:
                ordered = scheme.act_order and scheme.group_size is not None
                if key == format.g_idx and not ordered:
                    continue
                why = ", though config.json says act-order" if key == format.g_idx else ""
                raise self._error(f"{name} has no {key}{why}: the checkpoint is damaged")
            found = self.reader.shape(stored_name)
            alone = right == (1,) and math.prod(found) == 1  # however many axes it has
            if key == format.scale:
                refuse_scale_dtype(self.reader, f"{name}.{key}")
            if found != right and not alone:
                raise self._error(
                    f"{name}.{key} has shape {list(found)}, but {scheme.bits} bits in {groups} of "
                    f"a linear [{N}, {K}] take {list(right)}"
                )
        if "weight_shape" in format.suffixes:
            stored = self.reader.tensor(f"{name}.weight_shape").tolist()
            if stored != [N, K]:
                raise self._error(
                    f"{name}.weight_shape says {stored}, the model has a linear [{N}, {K}]"
                )

    def codes(self, name: str, device: str | torch.device = "cpu") -> Codes:
        """The codes of one linear on `device`, whose shapes have been checked.

        Raises UnpackableError for inputs permuted across groups in a way that is no act-order,
        CheckpointError for a scale that no writer of codes gives.
        """
        scheme, format = self.schemes[name], self.formats[name]
        tensors = {
            key: self.reader.tensor(stored).to(device)
            for key in format.suffixes
            if (stored := self._place(name, key)) in self.reader
        }
        try:
            codes = format.read(tensors, scheme, name)
        except ValueError as error:
            raise self._error(str(error)) from error
        _refuse_scales(codes, f"{self.folder}: {name}.{format.scale}")
        return codes

    def _place(self, name: str, key: str) -> str:
        """The tensor of the files that a module reads: of a twin, the codes of the other one."""
        twin = self.twins.get(name) if key == self.formats[name].main else None
        return f"{twin or name}.{key}"

    def tensors(self, name: str, codes: Codes) -> dict[str, Tensor]:
        """The inverse of `codes`, in any width: the tensors of the files, by their names inside.

        They are on the CPU.
        """
        scheme, format = self.schemes[name], self.formats[name]
        written = format.write(with_bits(codes.to("cpu"), scheme.bits), scheme)
        tensors = {}
        for key in format.suffixes:
            stored = f"{name}.{key}"
            if stored not in self.reader:
                continue
            if key in written:
                as_stored = written[key].view(self.reader.shape(stored))
                tensors[key] = as_stored.to(self.reader.dtype(stored))
            else:  # codes do not tell how a file says that groups follow each other
                tensors[key] = self.reader.tensor(stored)
        return tensors

    def bias(self, name: str) -> Tensor | None:
        """The bias that the files hold beside a packed linear.

        Raises CheckpointError if it holds a NaN or an infinity.
        """
        return self.reader.tensor(f"{name}.bias") if f"{name}.bias" in self.reader else None

    # ---- refusals -------------------------------------------------------------------------------

    def _error(self, fault: str) -> UnpackableError:
        return UnpackableError(f"{self.folder}: {fault}")

    def _refuse_section(self) -> None:
        if self.method not in METHODS:
            raise self._error(
                f"packed loading reads compressed-tensors and GPTQ, found "
                f"{self.section.get('quant_method')!r}: {self.remedy}"
            )
        if self.method == "gptq":
            found = format_of(self.section)
            words = self.section.get("pack_dtype") or "int32"
            if found not in ("gptq", "gptq_v2") or words != "int32":
                raise self._error(
                    f"packed loading reads GPTQ in the formats gptq and gptq_v2 in 32-bit words, "
                    f"found {found!r} in {words}"
                )
            return
        formats = {format_of(self.section, group) for group in groups_of(self.section)}
        if not formats or not formats <= {*INTEGERS}:
            raise self._error(
                f"packed loading reads compressed-tensors in the format pack-quantized or "
                f"int-quantized, found {', '.join(sorted(formats)) or 'no config group'}: "
                f"{self.remedy}"
            )
        for what, present in extras(self.section).items():
            if present:
                raise self._error(f"{what} cannot be run packed: {self.remedy}")

    def _formats(self) -> dict[str, PackedFormat]:
        """The format of each packed module, by its tensors; `twins` are found on the way."""
        said = {format_of(self.section)}
        if self.method != "gptq":
            said = {format_of(self.section, group) for group in groups_of(self.section)}
        formats: dict[str, PackedFormat] = {}
        for format in (FORMATS[key] for key in sorted(said)):
            packed = self._named(format.main)
            if format.main == "weight":  # plain linears have one as well
                packed = [n for n in packed if self.reader.dtype(f"{n}.weight") == torch.int8]
            formats |= dict.fromkeys(packed, format)
        # a main tensor that is missing leaves its companions
        companions = dict.fromkeys(key for name in sorted(said) for key in FORMATS[name].companions)
        for suffix in (*companions, *FOREIGN):
            for name in self._named(suffix):
                if suffix in FOREIGN:
                    raise self._error(
                        f"{name}.{suffix} is more than codes and scales, which cannot be run packed"
                    )
                if name in formats:
                    continue
                twin = self._twin(name, formats) if suffix == "weight_scale" else None
                if twin is None:
                    mains = " or ".join(sorted(FORMATS[key].main for key in said))
                    raise self._error(f"{name} has {suffix} but no {mains}: it is not packed")
                self.twins[name], formats[name] = twin, formats[twin]
        if not formats:
            raise self._error("nothing is packed, though config.json says so")
        return formats

    def _twin(self, name: str, formats: Mapping[str, PackedFormat]) -> str | None:
        """The packed embedding whose codes a tied head, of scales alone, multiplies by."""
        if name.rpartition(".")[2] != HEAD or not is_tied(self.config):
            return None
        for other, format in formats.items():
            scales = f"{name}.weight_scale", f"{other}.weight_scale"
            table = other.rpartition(".")[2] == EMBEDDING and format.main == "weight"
            if table and scales[1] in self.reader and self.reader.equal(*scales):
                return other
        return None

    def _schemes(self) -> dict[str, Scheme]:
        if self.method == "gptq":
            found = {name: gptq_scheme(self.section, name) for name in self.formats}
            for name, scheme in found.items():
                if scheme is None:
                    raise self._error(f"{name} is packed, but `dynamic` leaves it unquantised")
            return {name: scheme for name, scheme in found.items() if scheme is not None}
        schemes = module_schemes(self.section, self.formats)
        for name in self.formats:
            if name not in schemes:
                raise self._error(f"{name} is packed, but config.json does not say how")
        return schemes

    def _named(self, suffix: str) -> list[str]:
        end = "." + suffix
        return [name.removesuffix(end) for name in self.reader.names if name.endswith(end)]

    def _rounded(self, name: str, scheme: Scheme) -> Scheme:
        """The scheme with the activations that were asked for."""
        wanted, own = self.activation_bits, scheme.activation_bits
        if wanted is None:
            return scheme
        if own not in (None, wanted):
            raise self._error(f"{name} has activations of {own} bits: leave out activation_bits")
        return replace(scheme, activation_bits=wanted)

    def _refuse_scheme(self, name: str, scheme: Scheme) -> None:
        widths = self.formats[name].widths
        if scheme.bits not in widths:
            raise self._error(
                f"{name} has {scheme.bits} bits, packed {self.method} runs "
                f"{', '.join(map(str, widths))}"
            )
        if scheme.symmetric and f"{name}.weight_zero_point" in self.reader:
            raise self._error(f"{name} has a weight_zero_point, but config.json says symmetric")
