"""A model without its weights, whose decoder layers are opened one at a time.

The skeleton is built on the meta device from the config; a layer gets its tensors from the
safetensors files when its turn comes, and gives them back when it is done. Memory is that of one
layer, whatever the depth. Tensors go by their modules' names, however the checkpoint spells them.

    skeleton = Skeleton.open("path/or/hub-id")
    tensors = skeleton.read_layer(0)               # {"self_attn.q_proj.weight": ..., ...}
    with skeleton.layer(0, tensors) as layer:
        y = layer(x, **skeleton.layer_inputs(0, x))
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from compress.errors import CheckpointError, UsageError
from compress.memory import moved, uncollected
from compress.models.config_values import check_extent, check_tokenizer, reason_of
from compress.models.experts import OpenedExperts, ReadExpert, open_experts
from compress.models.families import architecture_of, experts_of, head_dim_of
from compress.models.family_specs import ArchitectureSpec
from compress.models.fused import MXFP4, PartedReader, Whole, wholes_of
from compress.models.meta import WithoutNumbers
from compress.models.own_forward import LayerInputs, Told, finished, handed_on
from compress.models.pretrained import load_config, local_folder, processor_reader
from compress.models.stored import (
    LeftOver,
    left_over,
    names_of,
    refuse_adapter,
    refuse_packed,
)
from compress.models.structure import embedding_scale, look, uniform_scale, with_rotary
from compress.storage.absent import AbsentWeights, holds_all_weights, holds_weights
from compress.storage.files import read_json
from compress.storage.safetensors import CheckpointReader

if TYPE_CHECKING:  # slow to import
    from transformers import (
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
    )

LENGTHS = 4  # of sequences whose tables and masks are kept
ASSUMED_DTYPE = torch.bfloat16  # where neither files nor config.json say one


def linear_in(parent: nn.Module, name: str) -> nn.Linear:
    """The linear of that name inside a layer or a model."""
    module = parent.get_submodule(name)
    assert isinstance(module, nn.Linear), f"{name} is a {type(module).__name__}, not a linear"
    return module


def empty_model(config: "PretrainedConfig", multimodal: bool = False) -> "PreTrainedModel":
    """The model that a config describes, its parameters on the meta device.

    Raises what transformers raises for values that do not go together.
    """
    from accelerate import init_empty_weights  # slow to import
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText  # slow

    kind = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    # Buffers (rotary frequencies) stay real: they come from the config, not from the file.
    with WithoutNumbers(), init_empty_weights(include_buffers=False):
        # sdpa, or what a family has that is computed otherwise, as with soft caps
        model = kind.from_config(config, dtype=torch.float32, trust_remote_code=False)
    if (experts := experts_of(config.model_type)) is not None:
        open_experts(model, experts)
    return model.eval().requires_grad_(False)


def declared_dtype(config: "PretrainedConfig") -> torch.dtype | None:
    """The dtype that a config.json names for its weights, in the whole or for its decoder."""
    for part in (config, config.get_text_config()):
        found = getattr(part, "dtype", None)
        if isinstance(found, str):
            found = getattr(torch, found, None)
        if isinstance(found, torch.dtype) and found.is_floating_point:
            return found
    return None


class Skeleton:
    """Config, tokenizer, tensor reader and an empty model of one checkpoint.

    `config` is the decoder's; a multimodal model's own, with the decoder's inside, is
    `model_config`. `tied`: embedding and head are one tensor, `said_tied`: config.json says so.
    `said_dtype`: the one that config.json names. `left`: what the files hold beyond the model's
    parameters. `absent`: no file holds weights, and the config alone says what there is; only a
    plan opens such a folder.

    Raises UsageError for a family that is not supported, for a checkpoint that is packed and for an
    adapter; CheckpointError for files that are missing or damaged.
    """

    @uncollected()
    def __init__(self, folder: Path, absent: bool = False):
        self.folder, self.absent = folder, absent
        refuse_adapter(folder)
        self.model_config = load_config(folder)
        self.said_dtype = declared_dtype(self.model_config)  # before a model of it changes that
        self.spec = architecture_of(self.model_config)
        self.config = self.model_config.get_text_config()
        file = folder / "config.json"
        if not absent:
            refuse_packed(folder, self.packing)
            check_extent(read_json(file) or {}, CheckpointReader(folder), file)
        try:
            self.model = empty_model(self.model_config, self.spec.vision is not None)
        except Exception as error:  # what a wrong value sets off is of any kind
            raise UsageError(f"{file} describes no model: {reason_of(error)}") from error
        self.spec = with_rotary(self.model, self.spec)
        self.num_layers: int = self.config.num_hidden_layers
        self.parameters = {name for name, _ in self.model.named_parameters()}
        self.wholes = self._wholes()
        self.reader, self.left = self._described() if absent else self._stored()
        self.head_dim = head_dim_of(self.config)
        self._recorded: dict[tuple[int, torch.device, torch.dtype], list[LayerInputs]] = {}
        self.spec = self._looked_at()
        self.buffers = self.layer_buffers()
        self.left.buffers[:] = [name for name in self.left.buffers if name not in self.buffers]
        # Tied means, as in transformers: the config says so, and the file has one of the two
        # tensors or equal ones.
        self.said_tied = bool(self.model_config.tie_word_embeddings)
        self.tied = self.said_tied and self._one_table()
        self._check_names()

    @classmethod
    def open(cls, location: str | Path, revision: str | None = None) -> "Skeleton":
        return cls(local_folder(location, revision))

    def _looked_at(self) -> ArchitectureSpec:
        """How the decoder layers are built; UsageError for what is not understood."""
        spec, kind = self.spec, self.model_config.model_type
        ids = torch.arange(2)
        try:
            x = torch.ones(1, 2, self.config.hidden_size, dtype=torch.float64)
            x[..., ::2], x[:, 1] = 3.0, 0.5  # or a norm would look like a number
            own = embedding_scale(self.model.get_submodule(spec.embedding), ids)
            scale = own * uniform_scale(handed_on(self.model, spec, x).first, x)
            found = look(self.model, spec, self.config.hidden_size, self.layer_inputs)
        except UsageError as error:
            raise UsageError(
                f"this {kind!r} is built in a way that is not known: {error}"
            ) from error
        except Exception as error:  # what a wrong value sets off is of any kind
            raise UsageError(
                f"{self.folder / 'config.json'} describes no model: {reason_of(error)}"
            ) from error
        finally:
            self._recorded.clear()
        return replace(found, embedding_scale=scale, scaled_by_module=own != 1.0)

    @classmethod
    def foretell(cls, location: str | Path, revision: str | None = None) -> "Skeleton":
        """The same for a plan, to which a folder without weights will do, or a hub model's config.

        Weights of a hub model are looked at where they have been fetched, but not fetched.
        """
        if Path(location).is_dir():
            return cls(Path(location), absent=not holds_weights(Path(location)))
        folder = local_folder(location, revision, weights=False)
        return cls(folder, absent=not holds_all_weights(folder))

    def _stored(self) -> tuple[CheckpointReader, LeftOver]:
        """The tensors of the files by the names of the modules, and what is beyond those."""
        names = names_of(self.model, f"{self.model.base_model_prefix}.", self.spec.module_name)
        places = {index: f"{self.spec.layers}.{index}." for index in self.wholes}
        wholes = [
            whole.inside(places[index]) for index, found in self.wholes.items() for whole in found
        ]
        reader = PartedReader(self.folder, names, wholes)
        for index, found in self.wholes.items():
            ways = [reader.wholes[places[index] + whole.name].transposed for whole in found]
            found[:] = [replace(w, transposed=way) for w, way in zip(found, ways, strict=True)]
        return reader, left_over(reader, self.model)

    @property
    def packing(self) -> str | None:
        """The method of a `quantization_config` that is read: its weights are opened in 16 bits."""
        experts = experts_of(self.model_config.model_type)
        return MXFP4 if experts is not None and experts.mxfp4 else None

    def _wholes(self) -> dict[int, list[Whole]]:
        """The tensors of all experts of a layer, by layer, by their names inside it."""
        layers = self.model.get_submodule(self.spec.layers)
        experts = experts_of(self.model_config.model_type)
        if experts is None or experts.files is None:
            return {}
        return {index: wholes_of(layer) for index, layer in enumerate(layers.children())}

    def written_wholes(self, index: int, packed: bool) -> list[Whole]:
        """The tensors of all experts of a layer in a result, by their names inside the layer.

        `packed`: whether anything in it is. They are written where none of their parts is packed.
        """
        return [w for w in self.wholes.get(index, ()) if not (packed and w.names.parted)]

    def _described(self) -> tuple[CheckpointReader, LeftOver]:
        """The tensors that files of this config would hold, in the dtype that it names."""
        dtype = self.said_dtype or ASSUMED_DTYPE
        parameters = dict(self.model.named_parameters())
        if self.model_config.tie_word_embeddings:
            parameters.pop(f"{self.spec.head}.weight", None)
        shapes = {name: (dtype, tuple(p.shape)) for name, p in parameters.items()}
        return AbsentWeights(self.folder, shapes), LeftOver([], [])

    @property
    def table(self) -> str:
        """The module whose weight is the embedding: of a tied model the one that the file has."""
        spec = self.spec
        lost = self.tied and f"{spec.embedding}.weight" not in self.reader
        return spec.head if lost else spec.embedding

    def _one_table(self) -> bool:
        """Whether the file has not two different tensors for embedding and head."""
        names = [f"{self.spec.embedding}.weight", f"{self.spec.head}.weight"]
        both = all(name in self.reader for name in names)
        return not both or self.reader.equal(*names)

    def _check_names(self) -> None:
        """Every parameter of the model must be in the file, with its shape, before work starts."""
        if self.absent:
            return  # its names are those of the parameters
        tied = (f"{self.spec.embedding}.weight", f"{self.spec.head}.weight")
        for name, parameter in self.model.named_parameters():
            if self.tied and name in tied:
                name = f"{self.table}.weight"
            if name not in self.reader:
                raise CheckpointError(f"{self.folder} lacks the tensor {name!r}")
            if self.reader.shape(name) != tuple(parameter.shape):
                raise CheckpointError(
                    f"tensor {name!r} in {self.folder} has shape {self.reader.shape(name)}, "
                    f"expected {tuple(parameter.shape)} from config.json"
                )

    @property
    def base(self) -> "PreTrainedModel":
        """The model without its head: of a multimodal one, vision and language model."""
        return cast("PreTrainedModel", self.model.get_submodule(self.spec.base))

    @property
    def dtype(self) -> torch.dtype:
        """The checkpoint's own floating-point type: that of its embedding."""
        return self.reader.dtype(f"{self.table}.weight")

    def stored_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype of a tensor in an output of `dtype`: fp32 where its family insists on it.

        What a router adds to its scores tells experts apart by less than 16 bits can say.
        """
        kept = getattr(self.model, "_keep_in_fp32_modules_strict", None) or ()
        inside = name.startswith(f"{self.spec.layers}.")
        exact = inside and any(part in name for part in kept)
        return torch.float32 if exact else dtype

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The checkpoint's tokenizer; UsageError if the folder has none."""
        from transformers import AutoTokenizer  # slow to import

        check_tokenizer(self.folder)
        try:
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        except Exception as error:  # tokenizers raises the base class itself
            raise UsageError(
                f"{self.folder} has no tokenizer that transformers reads: {reason_of(error)}"
            ) from error

    def processor(self) -> "ProcessorMixin":
        """A multimodal checkpoint's processor; UsageError if the folder has none."""
        check_tokenizer(self.folder)
        try:
            return processor_reader(self.model_config)(self.folder, trust_remote_code=False)
        except Exception as error:  # as above
            raise UsageError(
                f"{self.folder} has no processor that transformers reads: {reason_of(error)}"
            ) from error

    def linear_names(self) -> list[str]:
        """Full names of the linears that can be quantised, in the order of the data flow."""
        spec, layers = self.spec, range(self.num_layers)
        inside = [f"{spec.layers}.{i}.{name}" for i in layers for name in spec.layer(i).linears]
        return [*inside, spec.head]

    def vision_names(self) -> list[str]:
        """The parameters of vision tower and projector; none in a text model."""
        if self.spec.vision is None:
            return []
        decoder = self.spec.layers.rpartition(".")[0] + "."
        own = (decoder, f"{self.spec.head}.")
        names = [name for name, _ in self.model.named_parameters()]
        return [name for name in names if not name.startswith(own)]

    def layer_buffers(self) -> dict[str, Tensor]:
        """The buffers of decoder layers that the file has, by their full names; without values."""
        layers = self.model.get_submodule(self.spec.layers)
        return {
            name: tensor
            for place, module in layers.named_modules(prefix=self.spec.layers)
            for key, tensor in module._buffers.items()
            if tensor is not None and key not in module._non_persistent_buffers_set
            if (name := f"{place}.{key}") in self.reader
        }

    def layer_tensors(self, index: int) -> list[str]:
        """The names inside a decoder layer of its parameters, and of buffers that the file has."""
        prefix = f"{self.spec.layers}.{index}."
        layer = self.model.get_submodule(prefix.removesuffix("."))
        names = {name for name, _ in layer.named_parameters()}
        buffers = {n.removeprefix(prefix) for n in self.buffers if n.startswith(prefix)}
        return sorted(names | buffers)

    def read_layer(self, index: int, experts: bool = True) -> dict[str, Tensor]:
        """The tensors of one decoder layer, by their names inside it, in the checkpoint's dtype.

        `experts`: whether with those of its experts, which `read_expert` reads one at a time.
        """
        prefix, names = f"{self.spec.layers}.{index}.", self.layer_tensors(index)
        if not experts and (found := self.spec.layer(index).experts):
            names = [name for name in names if not name.startswith(f"{found.module}.")]
        return {name: self.reader.tensor(prefix + name) for name in names}

    def read_expert(self, index: int, number: int) -> dict[str, Tensor]:
        """The tensors of one expert of a layer, by their names inside the layer."""
        experts = self.spec.layer(index).experts
        assert experts is not None, "a layer without experts"
        prefix = f"{self.spec.layers}.{index}."
        linears = (*experts.inner(number), experts.outer(number))
        names = [f"{linear}.{key}" for linear in linears for key in ("weight", "bias")]
        return {n: self.reader.tensor(prefix + n) for n in names if prefix + n in self.parameters}

    def read(self, module: str) -> Tensor:
        """The weight of one module outside the layers."""
        return self.reader.tensor(f"{module}.weight")

    def read_all(self, module: str) -> dict[str, Tensor]:
        """The parameters of one module outside the layers, by their names inside it."""
        names = [name for name, _ in self.model.get_submodule(module).named_parameters()]
        return {name: self.reader.tensor(f"{module}.{name}") for name in names}

    @contextmanager
    def layer(
        self,
        index: int,
        tensors: dict[str, Tensor],
        device: str = "cpu",
        expert: ReadExpert | None = None,
    ) -> Iterator[nn.Module]:
        """The decoder layer `index` with these tensors in fp32; empty again on leaving.

        `expert`: number -> the tensors of an expert by their names inside the layer; its experts
        are then read when they are at work, and none of theirs is in `tensors`.
        """
        layer = self.model.get_submodule(f"{self.spec.layers}.{index}")
        on_device = {n: moved(t, device) for n, t in tensors.items()}
        lost = {name for name, _ in layer.named_parameters()} - {*tensors}
        opened = None
        if expert is not None and (found := self.spec.layer(index).experts):
            lost = {name for name in lost if not name.startswith(f"{found.module}.")}
            opened = cast(OpenedExperts, layer.get_submodule(found.module))

            def read(number: int) -> dict[str, Tensor]:
                inside = expert(number).items()
                place = f"{found.module}.{number}."
                return {n.removeprefix(place): moved(t, device) for n, t in inside}

            opened.read = read
        if lost or not {*tensors} <= {*layer.state_dict()}:
            raise CheckpointError(f"layer {index} does not have these tensors, or lacks {lost}")
        buffers = [(module, {**module._buffers}) for module in layer.modules() if module._buffers]
        for module, before in buffers:
            module._buffers = {n: b if b is None else b.to(device) for n, b in before.items()}
        layer.load_state_dict(on_device, strict=False, assign=True)
        del tensors, on_device  # or what is replaced in the layer would live as long as it does
        try:
            yield layer.requires_grad_(False)
        finally:
            if opened is not None:
                opened.read = None
            layer.to("meta")
            for module, before in buffers:
                module._buffers = before

    def layer_inputs(self, index: int, x: Tensor, told: Told | None = None) -> LayerInputs:
        """What the family's own forward hands on to a decoder layer for x [B, T, d].

        Rotary tables, a mask (None: plain causal attention) and what else it has. `told`: what the
        language model is told of a prompt with images, B = 1; None: x is text.
        """
        if told is not None:
            return handed_on(self.model, self.spec, x, told).inputs[index]
        key = (x.shape[1], x.device, x.dtype)
        if key not in self._recorded:
            while len(self._recorded) >= LENGTHS:
                del self._recorded[next(iter(self._recorded))]
            self._recorded[key] = handed_on(self.model, self.spec, x[:1]).inputs
        return self._recorded[key][index]

    def scaled(self, rows: Tensor) -> Tensor:
        """Rows of the embedding [..., d] as the first layer gets them."""
        scale = self.spec.embedding_scale
        return rows if scale == 1.0 else rows * scale

    def finished(self, logits: Tensor) -> Tensor:
        """The head's products [..., V] as the model gives them: scaled, or bent under a cap."""
        return finished(self.model, self.spec, logits)
