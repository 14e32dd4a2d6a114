"""Token weights of calibration batches, by a strategy of `importance/tokens.py`.

weigher = TokenWeigher(recipe.quantize.token_importance, batches, counts)
w = weigher.weights(i, x, norm(x), layer, spec, inputs, None)      # [B, T], None: all alike
"""

import sys
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from compress.importance.tokens import LayerContext, token_weights
from compress.models.families import ArchitectureSpec
from compress.models.skeleton import LayerInputs
from compress.recipe.sections import TokenImportance


@runtime_checkable
class Heads(Protocol):
    """What an attention module of transformers says about its heads."""

    head_dim: int
    scaling: float


class TokenWeigher:
    """Weighs the tokens of a layer's batches by one strategy."""

    def __init__(
        self,
        section: TokenImportance,
        batches: list[tuple[Tensor, Tensor]],  # input ids and masks [B, T] of each batch
        token_counts: Tensor,
    ):
        assert section.minimum is not None, "a recipe resolves it"
        self.settings = (section.name, section.minimum, section.maximum, section.power)
        self.batches, self.token_counts = batches, token_counts
        self.masked = not all(bool(mask.all()) for _, mask in batches)

    def weights(
        self,
        i: int,
        x: Tensor,
        normed: Tensor,
        layer: nn.Module,
        spec: ArchitectureSpec,
        inputs: LayerInputs,
        sliding_window: int | None,
    ) -> Tensor | None:
        """w_hat [B, T] of batch i, or None where every token weighs the same."""
        if self.settings[0] == "uniform" and not self.masked:
            return None
        input_ids, mask = (t.to(x.device) for t in self.batches[i])
        context = LayerContext(
            hidden_states=x,
            input_ids=input_ids,
            mask=mask,
            queries_keys=lambda: queries_keys(layer, spec, normed, inputs),
            output=lambda: _output(layer, x, inputs),
            sliding_window=sliding_window,
            token_counts=self.token_counts,
        )
        name, minimum, maximum, power = self.settings
        return token_weights(name, context, minimum, maximum, power)


def queries_keys(
    layer: nn.Module, spec: ArchitectureSpec, normed: Tensor, inputs: LayerInputs
) -> tuple[Tensor, Tensor, float]:
    """Queries [B, h, T, d_h] and keys [B, h_kv, T, d_h] as attention sees them, and its scaling."""
    attention = layer.get_submodule(spec.attention)
    assert isinstance(attention, Heads)
    # The family's own rotary function stands in the module that defines its attention.
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb

    def heads(name: str, norm: str) -> Tensor:
        y = layer.get_submodule(name)(normed)  # [B, T, heads * d_h]
        y = y.view(*y.shape[:2], -1, attention.head_dim)
        if hasattr(attention, norm):  # Qwen3
            y = getattr(attention, norm)(y)
        return y.transpose(1, 2)

    q, k = heads(spec.query, "q_norm"), heads(spec.key, "k_norm")
    q, k = rotate(q, k, *inputs["position_embeddings"])
    return q, k, attention.scaling


def _output(layer: nn.Module, x: Tensor, inputs: LayerInputs) -> Tensor:
    """The whole layer at full precision: [B, T, d]."""
    y = layer(x, **inputs)
    return y[0] if isinstance(y, tuple) else y
