"""Which image patches matter: ViT attention received from the voters, plus grey-level entropy.

A is the head-averaged attention of one ViT layer over the N patches of a crop, A_ij from i to j:

    r_j = mean_i A_ij                       attention received
    K   = { j : r_j > t * mean(r) }         the voters: background patches have no say
          or the share 1 - quantile of the patches with the highest r, at least one
    I_j = mean_{k in K} A_kj  +  alpha * softmax(H)_j       (the paper sums over K: vote="sum")
    H_j = - sum_v p_v log2 p_v              entropy of the patch's 256 grey levels, in bits

The mean keeps alpha free of scale: |K| differs from crop to crop. An empty K falls back to r and is
counted. A is never held whole: queries are taken in blocks, and only the voters' rows twice.
Yang et al., "VFlowOpt", arXiv 2508.05211, section 3.1, equations 1 to 4.

    scores, empty = voted_attention(q, k, scaling, threshold=5.0)
"""

import torch
from torch import Tensor

GREY_LEVELS = 256
# Attention weights held at a time; 64 MiB in fp32.
BLOCK_ELEMENTS = 1 << 24


def received_attention(q: Tensor, k: Tensor, scaling: float, weights: Tensor) -> Tensor:
    """Attention that each key receives, heads averaged: sum_i weights_i A_ij, [C, N_k] fp32.

    Args:
        q, k: queries [C, h, N_q, d] and keys [C, h, N_k, d] of C crops, after any rotary embedding.
        scaling: factor of the dot product, usually d**-0.5.
        weights: [C, N_q], the weight of each query.
    """
    q, k = q.float() * scaling, k.float().transpose(-1, -2)  # k [C, h, d, N_k]
    crops, heads, queries, _ = q.shape
    block = max(1, BLOCK_ELEMENTS // (crops * heads * k.shape[-1]))
    total = q.new_zeros(crops, k.shape[-1])
    for start in range(0, queries, block):
        rows = slice(start, start + block)
        A = (q[:, :, rows] @ k).softmax(dim=-1).mean(dim=1)  # [C, block, N_k]
        total += torch.einsum("cq,cqk->ck", weights[:, rows].float(), A)
    return total


def voted_attention(
    q: Tensor,
    k: Tensor,
    scaling: float,
    *,
    threshold: float,
    quantile: float | None = None,
    vote: str = "mean",
    prefix: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention received from the voters alone, and which crops had none.

    Args:
        q, k: [C, h, prefix + N, d].
        threshold: t; 0 lets every patch vote.
        quantile: in [0, 1), in the place of t: every patch votes that receives at least what the
            lowest of the highest (1 - quantile) N does; of 0 all.
        vote: `mean` over the voters, or `sum`.
        prefix: tokens before the patches (a CLS token): they neither vote nor are scored.

    Returns:
        Scores [C, N] fp32, and bool [C], True where no patch reached the threshold and plain
        received attention took its place.
    """
    q = q[:, :, prefix:]
    patches = q.shape[2]
    ones = torch.ones(q.shape[0], patches, device=q.device)
    received = received_attention(q, k, scaling, ones / patches)[:, prefix:]
    if quantile is None:
        voters = received > threshold * received.mean(dim=1, keepdim=True)  # [C, N]
    else:
        count = max(1, round((1 - quantile) * patches))
        voters = received >= received.topk(count, dim=1).values[:, -1:]
    counts = voters.sum(dim=1)
    empty = counts == 0
    most = int(counts.max())
    if most == 0:
        return (received * patches if vote == "sum" else received), empty
    # Only the voters' rows are computed again: a stable order puts each crop's voters first.
    order = voters.int().argsort(dim=1, descending=True, stable=True)[:, :most]  # [C, most]
    rows = order[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
    weights = voters.gather(1, order).float()
    if vote == "mean":
        weights = weights / counts.clamp(min=1)[:, None]
        plain = received
    else:
        plain = received * patches
    scores = received_attention(q.gather(2, rows), k, scaling, weights)[:, prefix:]
    return torch.where(empty[:, None], plain, scores), empty


def grey_levels(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """8-bit grey of normalised pixels [..., 3, height, width]: mean of RGB, int64 in 0..255.

    `mean` and `std` [3] are those of the image processor: pixels * std + mean lies in [0, 1].
    """
    # In fp32 also for 16-bit pixels: a rounded mean would shift all of them.
    mean, std = (x.to(pixels.device, torch.float32).view(3, 1, 1) for x in (mean, std))
    restored = pixels.float() * std + mean
    levels = (restored * (GREY_LEVELS - 1)).round().clamp(0, GREY_LEVELS - 1)
    return levels.mean(dim=-3).round().long()


def patch_entropy(levels: Tensor) -> Tensor:
    """Entropy in bits of each patch's grey levels: [..., pixels] int64 -> [...] fp32, 0 to 8."""
    counts = torch.zeros(*levels.shape[:-1], GREY_LEVELS, device=levels.device)
    counts.scatter_add_(-1, levels, torch.ones_like(levels, dtype=counts.dtype))
    p = counts / levels.shape[-1]
    return -torch.xlogy(p, p).sum(dim=-1) / torch.log(torch.tensor(2.0))


def cut_patches(levels: Tensor, patch_size: int) -> Tensor:
    """Grey crops [C, height, width] -> patches in raster order, [C, N, patch_size**2].

    Pixels beyond the last whole patch are left out, as the patch embedding leaves them out.
    """
    patches = levels.unfold(1, patch_size, patch_size).unfold(2, patch_size, patch_size)
    return patches.flatten(3).flatten(1, 2)


def add_entropy(scores: Tensor, entropy: Tensor, alpha: float) -> Tensor:
    """I = scores + alpha * softmax(entropy) over the patches of each crop; both [C, N]."""
    return scores + alpha * entropy.softmax(dim=-1)
