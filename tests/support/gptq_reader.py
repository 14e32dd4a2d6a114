"""A reader of the GPTQ layout written from its description, one number at a time."""

import torch


def fields(words, bits, count):
    """`count` numbers of `bits` bits from a list of 32-bit words, as one long little-endian int."""
    stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return [(stream >> (bits * i)) & (2**bits - 1) for i in range(count)]


def read_naively(tensors, bits, version):
    """The weight [N, K] in fp32, one number at a time."""
    K, N = len(tensors["g_idx"]), tensors["scales"].shape[1]
    assert tensors["qweight"].dtype == tensors["qzeros"].dtype == torch.int32
    assert tensors["scales"].dtype == torch.float16
    columns = [fields(tensors["qweight"][:, n].tolist(), bits, K) for n in range(N)]
    zeros = [fields(row.tolist(), bits, N) for row in tensors["qzeros"]]
    scales = tensors["scales"].float()
    weight = torch.empty(N, K)
    for n in range(N):
        for k, g in enumerate(tensors["g_idx"].tolist()):
            zero = (zeros[g][n] + (version == 1)) % 2**bits
            weight[n, k] = (columns[n][k] - zero) * scales[g, n]
    return weight
