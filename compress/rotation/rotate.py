"""Norm fusion and offline rotation of a decoder layer: same logits, weights without outliers.

The residual stream x becomes x Q for one orthogonal Q (R1), and each value head v becomes v R (R2).
A norm without weights commutes with Q, because |x Q| = |x|; so its weight gamma moves into the
linears behind it first. With PyTorch's W: [out, in] and y = x W^T:

    fusion   q, k, v        W <- W diag(gamma_input)      gate, up  W <- W diag(gamma_post)
             head           W <- W diag(gamma_final)      all these gammas <- 1
    R1       embedding, q, k, v, gate, up, head           W <- W Q
             o, down, vision projector                    W <- Q^T W,  b <- Q^T b
    R2       v, rows of each KV head                      W <- R^T W,  b <- R^T b
             o, columns of each query head                W <- W R

R is the same for every head, so a query head may read any KV head (grouped-query attention), and
attention, linear in v, carries v R through to o, where R R^T = I. Nothing is left to do at run
time: the result is a plain checkpoint. Embedding and head must be untied first (the head carries
gamma_final, the embedding does not). The mean of the embeddings is never removed: RMSNorm, unlike
LayerNorm, is not invariant to it.

All products are in fp64 and returned as fp64, the caller casts; tensors that a function does not
touch are passed through as they are, and inputs are never changed in place.

Sources: SliceGPT (arXiv 2401.15024), on computational invariance, for fusion; QuaRot (arXiv
2404.00456) for R1; SpinQuant (arXiv 2405.16406) for the names and the per-head R2; RSQ (arXiv
2503.01820), which takes its rotations from QuaRot.

    residual = make_rotation("hadamard", config.hidden_size, seed=0)
    heads = head_rotation("hadamard", head_dim_of(config), seed=0)
    tensors = fuse_and_rotate_layer(tensors, spec, residual, heads, head_dim_of(config))
"""

import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from compress.errors import CheckpointError, CompressError
from compress.models.family_specs import ExpertsSpec, LayerSpec, VisionSpec
from compress.registry import Registry
from compress.rotation.hadamard import HadamardTransform

# Each takes the size and the seed of its random numbers.
ROTATIONS: Registry[Callable[..., "Rotation | None"]] = Registry("rotation")

# Numbers of an embedding or head rotated at once: 32 MiB in fp64, and a few such on the way, where
# the whole table of a 150,000-word model would be 10 GiB.
VALUES_AT_ONCE = 2**22


class Rotation(ABC):
    """An orthogonal matrix Q: [size, size], known by what it does to weights. All in fp64."""

    size: int

    @abstractmethod
    def _times(self, W: Tensor) -> Tensor:
        """W @ Q for an fp64 W: [..., size]."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """Q itself: fp64 [size, size], on the CPU."""

    def right(self, W: Tensor) -> Tensor:
        """W @ Q for W: [..., size], as fp64; CompressError if the last axis has another size."""
        if W.shape[-1] != self.size:
            raise CompressError(
                f"a rotation of size {self.size} expected a last axis of {self.size}, "
                f"found shape {list(W.shape)}"
            )
        return self._times(W.double())

    def left_transposed(self, W: Tensor) -> Tensor:
        """Q^T @ W for W: [size, ...], a matrix or a bias, as fp64."""
        # Q^T W = (W^T Q)^T; movedim leaves a bias [size] as it is. Contiguous, as files need it.
        return self.right(W.movedim(0, -1)).movedim(-1, 0).contiguous()


@ROTATIONS.register("hadamard")
class HadamardRotation(Rotation):
    """Q = diag(signs) H / sqrt(size), with random signs from `seed`; no signs if it is None.

    H is block-diagonal for the few sizes without a known Hadamard matrix (`transform.blocks` > 1).
    Raises UsageError for an odd size. QuaRot calls it a randomised Hadamard matrix.
    """

    def __init__(self, size: int, seed: int | None):
        self.size = size
        self.transform = HadamardTransform(size)
        if seed is None:
            self.signs = torch.ones(size, dtype=torch.float64)
        else:
            generator = torch.Generator().manual_seed(seed)
            self.signs = 1.0 - 2.0 * torch.randint(0, 2, (size,), generator=generator).double()

    def _times(self, W: Tensor) -> Tensor:
        return self.transform.apply_transposed(W * self.signs.to(W.device))

    def matrix(self) -> Tensor:
        return self.signs[:, None] * self.transform.matrix()


@ROTATIONS.register("random")
class RandomRotation(Rotation):
    """Q uniform over the orthogonal matrices: QR of a Gaussian, columns signed by diag(R).

    Without the signs QR would favour some matrices (Mezzadri, arXiv math-ph/0609050).
    """

    def __init__(self, size: int, seed: int):
        self.size = size
        generator = torch.Generator().manual_seed(seed)
        gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
        Q, R = torch.linalg.qr(gaussian)
        self._matrix = Q * R.diagonal().sign()

    def _times(self, W: Tensor) -> Tensor:
        return W @ self._matrix.to(W.device)

    def matrix(self) -> Tensor:
        return self._matrix.clone()


@ROTATIONS.register("none")
def no_rotation(size: int, seed: int) -> None:
    """The absence of a rotation, so that a recipe can name it."""


def make_rotation(kind: str, size: int, seed: int) -> Rotation | None:
    """The rotation `kind` of the residual stream; None for `none`.

    Raises UsageError for an unknown kind, and for kind `hadamard` with an odd size.
    """
    return ROTATIONS[kind](size, seed)


def head_rotation(kind: str, head_dim: int, seed: int) -> Rotation | None:
    """R2 for one head: a plain Hadamard without signs, or a random orthogonal matrix.

    None where there is none to apply; `head_rotation_skipped` then says why.
    """
    if head_rotation_skipped(kind, head_dim):
        return None
    return ROTATIONS[kind](head_dim, None if kind == "hadamard" else seed)


def head_rotation_skipped(kind: str, head_dim: int) -> str | None:
    """Why the heads stay unrotated although `kind` asks for it, as a line for the report, or None.

    An odd head dimension has no Hadamard matrix; leaving R2 out keeps the model exact.
    """
    if kind == "hadamard" and head_dim % 2:
        return f"value heads not rotated: no Hadamard matrix of odd head dimension {head_dim}"
    return None


def _tensor(tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise CheckpointError(
            f"there is no tensor {name!r}: expected it for this model family, "
            f"found {', '.join(sorted(tensors)) or 'none'}"
        )
    return tensors[name]


def _readers(spec: LayerSpec) -> dict[str, tuple[str, ...]]:
    """The linears that read each norm's output; CompressError for norms of another kind."""
    if why := spec.unrotatable:
        raise CompressError(f"the residual stream cannot be rotated: {why}")
    readers: dict[str, tuple[str, ...]] = {}
    pairs = (spec.input_norm, spec.attention_in), (spec.post_norm, spec.post_norm_readers)
    for norm, linears in pairs:
        assert norm is not None, "a layer without norms in front has them behind"
        readers[norm] = readers.get(norm, ()) + linears
    return readers


def effective(gamma: Tensor, gain: float) -> Tensor:
    """What a norm of weight gamma multiplies by."""
    return gamma if gain == 0.0 else gamma.double() + gain


def fused_gamma(gamma: Tensor, gain: float) -> Tensor:
    """The weight of a norm that multiplies by 1."""
    return torch.full_like(gamma, 1.0 - gain)


def fuse_norms_into_layer(tensors: dict[str, Tensor], spec: LayerSpec) -> dict[str, Tensor]:
    """Moves both norm weights of a decoder layer into the linears behind them.

    Names are relative to the layer. Returns a new dict: q, k, v, gate and up in fp64, the two norms
    such that they multiply by 1, in their dtype, all else untouched. CheckpointError for a missing
    tensor.
    """
    fused = dict(tensors)
    for norm, linears in _readers(spec).items():
        gamma = _tensor(tensors, f"{norm}.weight")
        for linear in linears:
            name = f"{linear}.weight"
            fused[name] = _tensor(tensors, name).double() * effective(gamma, spec.gain).double()
        fused[f"{norm}.weight"] = fused_gamma(gamma, spec.gain)
    return fused


def rotate_layer(
    tensors: dict[str, Tensor],
    spec: LayerSpec,
    residual: Rotation | None,
    heads: Rotation | None,
    head_dim: int,
) -> dict[str, Tensor]:
    """Applies R1 (`residual`) and R2 (`heads`, of size `head_dim`); either may be None.

    Names are relative to the layer. Returns a new dict: rotated tensors in fp64, all else
    untouched; value heads only where the layer has such. CheckpointError for a missing tensor;
    CompressError if a norm weight is not fused yet, or a shape does not fit.
    """
    rotated = dict(tensors)
    if residual is not None:
        _rotate_residual(rotated, spec, residual)
    if heads is not None and spec.value is not None:
        if heads.size != head_dim:
            raise CompressError(
                f"head rotation has size {heads.size}, expected the head dimension {head_dim}"
            )
        _rotate_heads(rotated, spec, heads)
    return rotated


def _rotate_residual(tensors: dict[str, Tensor], spec: LayerSpec, Q: Rotation) -> None:
    """R1, in place on the dict."""
    for norm, readers in _readers(spec).items():
        gamma = _tensor(tensors, f"{norm}.weight")
        if not torch.equal(gamma, fused_gamma(gamma, spec.gain)):
            raise CompressError(
                f"the weight of {norm!r} is not all ones, so the rotation would change the model: "
                "fuse the norms first (fuse_norms_into_layer)"
            )
        for linear in readers:
            name = f"{linear}.weight"
            tensors[name] = Q.right(_tensor(tensors, name))
    for linear in spec.stream_writers:
        name = f"{linear}.weight"
        tensors[name] = Q.left_transposed(_tensor(tensors, name))
        if f"{linear}.bias" in tensors:
            tensors[f"{linear}.bias"] = Q.left_transposed(tensors[f"{linear}.bias"])


def _rotate_heads(tensors: dict[str, Tensor], spec: LayerSpec, R: Rotation) -> None:
    """R2, in place on the dict. The last axis of what is rotated is split into heads."""

    def per_head(W: Tensor, name: str) -> Tensor:  # [..., heads * size] -> same
        if W.shape[-1] % R.size:
            raise CompressError(
                f"{name!r} has {W.shape[-1]} attention channels, "
                f"expected a multiple of the head dimension {R.size}"
            )
        return R.right(W.unflatten(-1, (-1, R.size))).flatten(-2)

    def values(tensor: Tensor, name: str) -> Tensor:  # [rows, ...]: those of the value heads
        turned = per_head(tensor[spec.value_start :].movedim(0, -1), name).movedim(-1, 0)
        rest = tensor[: spec.value_start].double()
        return torch.cat([rest, turned]) if len(rest) else turned.contiguous()

    output, value, bias = f"{spec.output}.weight", f"{spec.value}.weight", f"{spec.value}.bias"
    tensors[output] = per_head(_tensor(tensors, output), output)
    tensors[value] = values(_tensor(tensors, value), value)
    if bias in tensors:
        tensors[bias] = values(tensors[bias], bias)


def fuse_and_rotate_layer(
    tensors: dict[str, Tensor],
    spec: LayerSpec,
    residual: Rotation | None,
    heads: Rotation | None,
    head_dim: int,
) -> dict[str, Tensor]:
    """`fuse_norms_into_layer`, then `rotate_layer`; same contract."""
    fused = fuse_norms_into_layer(tensors, spec)
    return rotate_layer(fused, spec, residual, heads, head_dim)


def fuse_and_rotate_expert(
    tensors: dict[str, Tensor],
    experts: ExpertsSpec,
    number: int,
    factor: Tensor,
    residual: Rotation | None,
) -> dict[str, Tensor]:
    """The same for one expert alone, in a layer whose norm multiplies its input by `factor` [d].

    Names are relative to the layer. Returns a new dict, weights in fp64.
    """
    rotated = dict(tensors)
    for linear in experts.inner(number):
        fused = _tensor(tensors, f"{linear}.weight").double() * factor.double()
        rotated[f"{linear}.weight"] = fused if residual is None else residual.right(fused)
    if residual is not None:
        for key in ("weight", "bias"):
            if (name := f"{experts.outer(number)}.{key}") in tensors:
                rotated[name] = residual.left_transposed(tensors[name])
    return rotated


def fuse_and_rotate_head(
    weight: Tensor,
    gamma: Tensor,
    residual: Rotation | None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """W diag(gamma_final) Q for the head's W: [vocabulary, hidden], gamma: [hidden].

    The final norm must become ones. Products in fp64, returned as `dtype`.
    """
    rows = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    step = max(1, VALUES_AT_ONCE // weight.shape[1])
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        fused = weight[part].double() * gamma.double()
        rows[part] = fused if residual is None else residual.right(fused)
    return rows


def rotate_embedding(
    weight: Tensor, residual: Rotation | None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """E Q for the table E: [vocabulary, hidden]; products in fp64, returned as `dtype`."""
    return fuse_and_rotate_head(weight, weight.new_ones(weight.shape[-1]), residual, dtype)


def rotate_vision(
    tensors: dict[str, Tensor], vision: VisionSpec, residual: Rotation
) -> dict[str, Tensor]:
    """R1 where visual tokens enter the residual stream: their projectors' last linears, newlines.

    Names are full. Returns a new dict: rotated tensors in fp64, all else untouched. CheckpointError
    for a missing tensor.
    """
    rotated = dict(tensors)
    for linear in vision.projectors:
        found = fnmatch.filter(tensors, f"{linear}.weight")
        for weight in found or [f"{linear}.weight"]:
            rotated[weight] = residual.left_transposed(_tensor(tensors, weight))
            bias = f"{weight.removesuffix('.weight')}.bias"
            if bias in tensors:  # a projector may have none
                rotated[bias] = residual.left_transposed(tensors[bias])
    for name in vision.vectors:
        rotated[name] = residual.right(_tensor(tensors, name)).contiguous()
    return rotated
