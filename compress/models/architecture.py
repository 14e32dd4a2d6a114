"""What a model family looks like: where its decoder layers, norms and linears are.

A family is one row of `ARCHITECTURES`. The rows here share one structure, the pre-norm decoder
layer `x += o(attention(norm(x))); x += down(mlp(norm(x)))`, which is all that fusing, rotating and
quantising layer by layer rely on. Names inside a layer are relative to the layer.

    spec = architecture_of(AutoConfig.from_pretrained(path))
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class ArchitectureSpec:
    """Names of the parts of one model family, as its checkpoint and its modules spell them.

    `groups` lists the linears of a decoder layer in the order in which data meets them; the
    linears of one group read the same input, so they share one Hessian.
    """

    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    rotary: str = "model.rotary_emb"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    input_norm: str = "input_layernorm"
    post_norm: str = "post_attention_layernorm"
    attention: str = "self_attn"
    mlp: str = "mlp"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    mlp_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    mlp_out: str = "mlp.down_proj"

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        return ((self.query, self.key, self.value), (self.output,), self.mlp_in, (self.mlp_out,))

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(name for group in self.groups for name in group)


# Llama covers Llama 2 and 3.x; Qwen2 covers Qwen2.5 (q/k/v biases); Qwen3 adds q/k norms, which
# sit behind the projections and so see neither fusion nor rotation.
ARCHITECTURES: dict[str, ArchitectureSpec] = {
    "llama": ArchitectureSpec(),
    "mistral": ArchitectureSpec(),
    "qwen2": ArchitectureSpec(),
    "qwen3": ArchitectureSpec(),
}


def architecture_of(config: "PretrainedConfig") -> ArchitectureSpec:
    """The row of a model's family; a UsageError that lists the supported ones if there is none."""
    if config.model_type not in ARCHITECTURES:
        raise UsageError(
            f"model type {config.model_type!r} is not supported"
            f"{did_you_mean(config.model_type, ARCHITECTURES)}: "
            f"supported are {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[config.model_type]


def head_dim_of(config: "PretrainedConfig") -> int:
    """Width of one attention head: explicit in the config, or hidden size over heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
