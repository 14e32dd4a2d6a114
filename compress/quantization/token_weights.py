"""Token weights of calibration batches, by a strategy of `importance/tokens.py`.

weigher = TokenWeigher(recipe.quantize.token_importance, batches, counts)
w = weigher.weights(i, x, norm(x), layer, spec, inputs)            # [B, T], None: all alike
weigher.facts()                                            # of the weights since the last call
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypedDict

import torch
from torch import Tensor, nn

from compress.importance.tokens import LayerContext
from compress.importance.weighting import TokenSettings, TokenWeights, mean_one, token_weights
from compress.models.attention import seen_by
from compress.models.family_specs import LayerSpec
from compress.models.own_forward import LayerInputs
from compress.models.skeleton import linear_in
from compress.recipe.token_importance import TokenImportance


class NoMapError(Exception):
    """A layer has no map of what attends to what."""


class WeightFacts(TypedDict, total=False):
    """What was done to the weights of a layer, as modelpress.json has it; only what was asked for,
    and windows with equal scores where there are any."""

    sinks_per_window: float
    capped_per_window: float  # tokens at the cap
    uniform_share: float  # of equal weights in the mixture, averaged over windows
    flat_windows: int  # whose tokens all scored the same, and weigh the same
    windows_without_map: int  # in a layer without attention: their tokens weigh the same


class TokenWeigher:
    """Weighs the tokens of a layer's batches by one strategy."""

    def __init__(
        self,
        section: TokenImportance,
        batches: list[tuple[Tensor, Tensor]],  # input ids and masks [B, T] of each batch
        token_counts: Tensor,
        masked: bool | None = None,  # whether some tokens of all batches do not count
    ):
        assert section.minimum is not None, "a recipe resolves it"
        self.section = section
        self.settings = TokenSettings(**section.model_dump(exclude={"modules"}))
        self.batches, self.token_counts = batches, token_counts
        self._sums: dict[str, float] = {}
        self.unmapped = 0
        own = not all(bool(mask.all()) for _, mask in batches)
        self.masked = own if masked is None else masked

    def weights(
        self,
        i: int,
        x: Tensor,
        normed: Tensor,
        layer: nn.Module,
        spec: LayerSpec,
        inputs: LayerInputs,
    ) -> Tensor | None:
        """w_hat [B, T] of batch i, or None where every token weighs the same."""
        if self.settings.name == "uniform":
            return self.uniform(i, x)
        input_ids, mask = (t.to(x.device) for t in self.batches[i])
        sliding_window, seen = keys_seen(inputs)
        context = LayerContext(
            hidden_states=x,
            input_ids=input_ids,
            mask=mask,
            queries_keys=lambda: queries_keys(layer, spec, normed, inputs),
            output=lambda: _output(layer, x, inputs),
            sliding_window=sliding_window,
            token_counts=self.token_counts,
            softcap=spec.softcap,
            seen=seen,
            sinks=None if spec.sinks is None else layer.get_parameter(spec.sinks),
        )
        try:
            found = token_weights(self.settings, context)
        except NoMapError:
            self.unmapped += len(mask)
            return self.uniform(i, x)
        self._add(found)
        return found.w

    def uniform(self, i: int, x: Tensor) -> Tensor | None:
        """The weights [B, T] of batch i, on x's device, where all tokens that count are alike."""
        if not self.masked:
            return None
        mask = self.batches[i][1].to(x.device)
        return mean_one(mask.float(), mask)

    def parts(self, prefix: str, group: tuple[str, ...]) -> list[tuple[tuple[str, ...], bool]]:
        """A group of linears in up to two parts: whether the weights are for them, and which.

        `prefix`: what stands before their names in the model.
        """
        applies = {name: self.section.applies_to(prefix + name) for name in group}
        kinds = dict.fromkeys(applies.values())
        return [(tuple(n for n in group if applies[n] is kind), kind) for kind in kinds]

    def _add(self, found: TokenWeights) -> None:
        parts = {
            "windows": len(found.w),
            "flat": int(found.flat.sum()),
            "sinks": int(found.sinks.sum()),
            "capped": int(found.capped.sum()),
            "uniform": float(found.uniform_share.sum()),
        }
        self._sums = {name: self._sums.get(name, 0) + value for name, value in parts.items()}

    def taken(self) -> dict[str, float]:
        """Sums of what was done since the last call, for `put` elsewhere."""
        sums, self._sums = self._sums | {"unmapped": self.unmapped}, {}
        self.unmapped = 0
        return sums

    def put(self, sums: dict[str, float]) -> None:
        """Adds what another has done to what this one has."""
        for name, value in sums.items():
            if name == "unmapped":
                self.unmapped += int(value)
            else:
                self._sums[name] = self._sums.get(name, 0) + value

    def facts(self) -> WeightFacts:
        """What was done to the weights that were given since the last call."""
        sums, self._sums = self._sums, {}
        facts: WeightFacts = {}
        unmapped, self.unmapped = self.unmapped, 0
        if unmapped:
            facts["windows_without_map"] = unmapped
        if not sums:
            return facts
        if self.settings.sinks != "keep":
            facts["sinks_per_window"] = round(sums["sinks"] / sums["windows"], 3)
        if self.settings.weight_cap is not None:
            facts["capped_per_window"] = round(sums["capped"] / sums["windows"], 3)
        if self.settings.sample_size_floor is not None:
            facts["uniform_share"] = round(sums["uniform"] / sums["windows"], 6)
        if sums["flat"]:
            facts["flat_windows"] = int(sums["flat"])
        return facts


def keys_seen(inputs: LayerInputs) -> tuple[int | None, Tensor | None]:
    """What the queries of a layer see, by its mask: of the keys before them, or otherwise.

    The number of keys that a window holds, the query's own included, or None; and which keys each
    query sees [1, T, T], where that is neither all nor a window's before it: as within an image, or
    where attention is in chunks.
    """
    mask = inputs["attention_mask"]
    if mask is None:
        return None, None
    seen = (mask if mask.dtype is torch.bool else mask == 0)[:, 0]  # or a large negative number
    width = int(seen[0, -1].sum())
    before = torch.ones(seen.shape[1:], dtype=torch.bool, device=seen.device).tril()
    if not bool((seen == before.triu(1 - width)).all()):
        return None, seen
    return (width if width < seen.shape[-1] else None), None


def queries_keys(
    layer: nn.Module, spec: LayerSpec, normed: Tensor, inputs: LayerInputs
) -> tuple[Tensor, Tensor, float]:
    """Queries [B, h, T, d_h] and keys [B, h_kv, T, d_h] as attention sees them, and its scaling.

    Raises NoMapError for a layer that does not attend.
    """
    if not spec.attends:
        raise NoMapError
    with _without_values(layer, spec):
        seen = seen_by(layer.get_submodule(spec.attention), normed, inputs)
    if seen is None:
        raise NoMapError
    return seen.query, seen.key, seen.scaling


@contextmanager
def _without_values(layer: nn.Module, spec: LayerSpec) -> Iterator[None]:
    """The layer with values of zero, which a map does not depend on; with its own if q, k and v are
    one linear."""
    if spec.value is None or spec.value_start:
        yield
        return
    values = linear_in(layer, spec.value)
    layer.set_submodule(spec.value, _Zeros(values.out_features))
    try:
        yield
    finally:
        layer.set_submodule(spec.value, values)


class _Zeros(nn.Module):
    def __init__(self, out_features: int):
        super().__init__()
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)


def _output(layer: nn.Module, x: Tensor, inputs: LayerInputs) -> Tensor:
    """The whole layer at full precision: [B, T, d]."""
    y = layer(x, **inputs)
    return y[0] if isinstance(y, tuple) else y
