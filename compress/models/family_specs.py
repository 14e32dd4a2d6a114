"""How the parts of a model are described: layers, experts, vision, and where each of them is.

A `LayerSpec` is what `structure.py` finds of a decoder layer, or what a row of `families.py` says;
its defaults are the pre-norm layer `x += o(attention(norm(x))); x += down(mlp(norm(x)))`. Names
inside a layer are relative to it.

    ArchitectureSpec().layer(0).unrotatable     # None: RMSNorm in front of everything that reads
"""

import re
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class VisionSpec:
    """The part of a multimodal model before its language model; it is never quantised.

    Attributes:
        projectors: the linears whose outputs enter the residual stream; `*` is any number.
        vectors: parameters [..., d] whose rows, or mixtures of them, enter it as they are.
        ignored: patterns of the linears of this part, as `quantization_config` names them; engines
            spell what lies inside a vision tower differently.
        spellings: expression -> replacement, applied in order: from the names of checkpoints,
            old and new, to those of the modules.
    """

    projectors: tuple[str, ...]
    vectors: tuple[str, ...]
    ignored: tuple[str, ...]
    spellings: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class ExpertNames:
    """What files call an expert's linears, and the block of a layer that holds the experts.

    Attributes:
        block: None where it is the name that transformers' module has.
        router: the child of the router in which files have its weights, or None.
        renamed: what transformers' block and what files call the router, where these differ.
        beside: the child of the router that files have beside it, in the block, or None.
        files: the two tensors, in the block, that hold all experts of a layer where files have no
            matrices of each; those of biases end in `_bias`.
        transposed: whether those are [E, K, N]; None where their shape says.
        interleaved: whether they have gate and up in turns.
        mxfp4: whether there are files with codes of 4 bits in their place, which are read too.
        scaled_input: whether the router's weight multiplies what an expert reads, and not what it
            gives.
        parted: whether transformers looks for each expert by itself, in 16 bits too, where a folder
            has anything that is quantised.
    """

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    block: str | None = None
    router: str | None = None
    beside: str | None = None
    renamed: tuple[str, str] | None = None
    files: tuple[str, str] | None = None
    transposed: bool | None = False
    interleaved: bool = False
    mxfp4: bool = False
    scaled_input: bool = False
    parted: bool = False

    @property
    def linears(self) -> tuple[str, str, str]:
        return self.gate, self.up, self.down

    @property
    def fused(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The linears in each of two tensors."""
        return (self.gate, self.up), (self.down,)


@dataclass(frozen=True)
class ExpertsSpec:
    """The experts of a layer, which get the tokens that a router gives them.

    Attributes:
        module: holds them, by number.
        routers: modules that read what the MLP is given and whose weights stay in 16 bits: the
            router, and the gate of a shared expert.
    """

    module: str
    count: int
    names: ExpertNames
    routers: tuple[str, ...]

    def inner(self, number: int) -> tuple[str, ...]:
        """gate and up of an expert."""
        place = f"{self.module}.{number}"
        return f"{place}.{self.names.gate}", f"{place}.{self.names.up}"

    def outer(self, number: int) -> str:
        """down of an expert."""
        return f"{self.module}.{number}.{self.names.down}"

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        numbers = range(self.count)
        return tuple(group for e in numbers for group in (self.inner(e), (self.outer(e),)))


@dataclass(frozen=True)
class LayerSpec:
    """How one decoder layer is built. The layers of a model may differ.

        x += scale_attention * after(out(attention(norm(x))))
        x += scale_mlp * after(down(mlp(norm(x))))           of the first x where it is `parallel`

    Attributes:
        input_norm, post_norm: before attention and MLP; the same one where both read its output,
            None where there is none.
        attention_after, mlp_after: norms of what is added to the stream, or None.
        attention_in: the linears that read what attention is given, q, k and v mostly.
        between: groups of linears between those and `output`, as in latent attention (MLA).
        value: the linear whose rows from `value_start` on are the value heads; None where heads
            cannot be rotated, as where something stands between them and `output`.
        mlp_in, mlp_out: the linears that read what the MLP is given, and the one that ends it. Of a
            layer with `experts`, those of its shared expert; () and "" where there is none.
        experts: what the MLP has beside that, or None.
        scales: what the two additions are multiplied by.
        parallel: attention and MLP are both of the layer's input.
        gain: a norm multiplies by `gain + weight`: 0 or 1.
        norms: "rms", "layer" (which subtracts the mean), or "other".
        attends: whether there is an attention map; not in linear attention, nor a convolution.
        softcap: of attention's logits, or None.
        sinks: the parameter whose numbers are in each head's softmax beside the logits, or None.
    """

    input_norm: str | None = "input_layernorm"
    post_norm: str | None = "post_attention_layernorm"
    attention_after: str | None = None
    mlp_after: str | None = None
    attention: str = "self_attn"
    mlp: str = "mlp"
    attention_in: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    between: tuple[tuple[str, ...], ...] = ()
    value: str | None = "self_attn.v_proj"
    value_start: int = 0
    output: str = "self_attn.o_proj"
    mlp_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    mlp_out: str = "mlp.down_proj"
    experts: ExpertsSpec | None = None
    scales: tuple[float, float] = (1.0, 1.0)
    parallel: bool = False
    gain: float = 0.0
    norms: str = "rms"
    attends: bool = True
    softcap: float | None = None
    sinks: str | None = None

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The linears in the order in which data meets them; those of one group read the same
        input, so they share one Hessian."""
        dense = (self.mlp_in, (self.mlp_out,)) if self.mlp_out else ()
        routed = self.experts.groups if self.experts else ()
        return (self.attention_in, *self.between, (self.output,), *dense, *routed)

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(name for group in self.groups for name in group)

    @property
    def resting(self) -> "LayerSpec":
        """The layer without its experts, but with their routers."""
        return replace(self, experts=replace(self.experts, count=0)) if self.experts else self

    @property
    def post_norm_readers(self) -> tuple[str, ...]:
        """All modules with weights for what the MLP is given."""
        if self.experts is None:
            return self.mlp_in
        inner = [name for e in range(self.experts.count) for name in self.experts.inner(e)]
        return (*self.experts.routers, *self.mlp_in, *inner)

    @property
    def stream_writers(self) -> tuple[str, ...]:
        """The linears whose outputs are added to the residual stream."""
        routed = [self.experts.outer(e) for e in range(self.experts.count)] if self.experts else ()
        return tuple(name for name in (self.output, self.mlp_out, *routed) if name)

    @property
    def unrotatable(self) -> str | None:
        """Why a rotation of the residual stream would change what the layer computes, or None."""
        if self.norms == "layer":
            return MEAN
        if self.attention_after or self.mlp_after:
            return AFTER
        return None if self.norms == "rms" else OTHER


# Why a stream stays as it is: x Q has another mean, and other channels, than x.
MEAN = "its norms subtract the mean (LayerNorm)"
AFTER = "it has norms on what its layers add to the residual stream, with a gain for each channel"
OTHER = "its norms are not RMSNorm"


@dataclass(frozen=True)
class ArchitectureSpec:
    """Names of the parts of one model, as its checkpoint and its modules spell them.

    Attributes:
        base: all but the head; "" where no module is that, and the whole model takes embeddings.
        kinds: how each decoder layer is built; one for all where it is one.
        embedding_scale: what rows of the embedding are multiplied by, and `scaled_by_module`
            whether the embedding's own module does so.
        final_gain: the same as `LayerSpec.gain`, of the norm before the head.
    """

    base: str = "model"
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    rotary: str = "model.rotary_emb"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    kinds: tuple[LayerSpec, ...] = (LayerSpec(),)
    embedding_scale: float = 1.0
    scaled_by_module: bool = False
    final_gain: float = 0.0
    vision: VisionSpec | None = None

    def layer(self, index: int) -> LayerSpec:
        """How a decoder layer is built."""
        return self.kinds[0] if len(self.kinds) == 1 else self.kinds[index]

    def module_name(self, tensor: str) -> str:
        """The name that the model's modules give a tensor of a checkpoint."""
        for pattern, replacement in self.vision.spellings if self.vision else ():
            tensor = re.sub(pattern, replacement, tensor)
        return tensor

    @property
    def unrotatable(self) -> str | None:
        """Why the residual stream cannot be rotated, or None."""
        return next((why for kind in self.kinds if (why := kind.unrotatable)), None)
