"""The kernels on a GPU, at the sizes they are for: right, capturable, tunable. Skipped without."""

import json
from dataclasses import replace

import pytest
import torch

from support.weights import random_weight, relative_error

pytest.importorskip("triton")

from compress.kernels.activations import integer_matmul, quantize_tokens
from compress.kernels.cpu.products import pack_integers
from compress.kernels.gpu import tuning
from compress.kernels.gpu.hadamard import hadamard_
from compress.kernels.gpu.layout import pack_kernel
from compress.kernels.gpu.matmul import quantized_matmul, tiled_matmul
from compress.kernels.linear import QuantLinear
from compress.kernels.reference import reference_matmul
from compress.quantization.rounding import round_eagerly, round_in_order

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
N, K = 1024, 4096
ROWS = [1, 2, 16, 17, 64, 100, 256, 300, 600]


def normal(*shape, dtype=torch.float16):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_products_of_every_dispatch(bits, dtype):
    """fp32 sums: what is left is one rounding of the result, or of the weight beyond 32 rows."""
    weight = random_weight(N, K, bits, 128, bits != 4, dtype)
    packed, bias = pack_kernel(weight).to("cuda"), normal(N, dtype=dtype)
    for M in ROWS:
        x = normal(M, K, dtype=dtype)
        y = quantized_matmul(x.cuda(), packed, bias.cuda()).cpu()
        limit = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
        assert relative_error(y, reference_matmul(x, weight, bias)) < limit, M


def test_a_graph_replays_with_new_inputs():
    weight = random_weight(N, K, 4, 128)
    packed, x = pack_kernel(weight).to("cuda"), normal(1, K).cuda()
    quantized_matmul(x, packed)  # compiled before it is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = quantized_matmul(x, packed)
    other = normal(2, K)[1:]
    x.copy_(other)
    graph.replay()
    assert relative_error(y.cpu(), reference_matmul(other, weight)) < 2**-10


def test_torch_compile_keeps_the_layer_whole():
    layer = QuantLinear(random_weight(N, K, 3, 128).to("cuda"), None, torch.float16)
    x = normal(2, 5, K).cuda()
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))


def test_every_candidate_of_tuning_is_right():
    """What tuning may choose computes the same; tiles too large for the device say so."""
    weight = random_weight(300, 1024, 4, 128)
    packed = pack_kernel(weight).to("cuda")
    for tiles in tuning.CANDIDATES:
        x = normal(tiles.rows, 1024)
        try:
            y = tiled_matmul(x.cuda(), packed, None, tiles)
        except Exception as error:
            assert "out of resource" in str(error), tiles
            continue
        assert relative_error(y.cpu(), reference_matmul(x, weight)) < 2**-10, tiles


@pytest.mark.parametrize("size", [4096, 32768])
def test_hadamard_of_the_largest_sizes_is_its_own_inverse(size):
    x = normal(8, size, dtype=torch.float32)
    assert torch.allclose(hadamard_(hadamard_(x.cuda())).cpu(), x, atol=1e-5)


@pytest.mark.parametrize("group_size", [128, None])
def test_integer_products_are_those_of_the_cpu(group_size):
    weight, x = random_weight(N, K, 4, group_size), normal(40, K)
    values, scale = quantize_tokens(x, 4, ())
    on_gpu, gpu_scale = quantize_tokens(x.cuda(), 4, ())
    # another order of the same fp32 sums moves a value next to a tie by one step
    assert (on_gpu.cpu() - values).abs().max() <= 1
    assert (on_gpu.cpu() != values).float().mean() < 1e-3
    assert torch.allclose(gpu_scale.cpu(), scale, rtol=1e-5)
    y = integer_matmul(values, scale, pack_integers(weight), dtype=torch.float32)
    packed = replace(pack_kernel(weight)).to("cuda")
    again = integer_matmul(values.cuda(), scale.cuda(), packed, dtype=torch.float32)
    assert relative_error(again.cpu(), y.double()) < 1e-6


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"), [(8, None, True), (4, 128, True), (4, 128, False)]
)
def test_rounded_activations_are_those_of_the_cpu(bits, group_size, symmetric):
    layer = QuantLinear(random_weight(N, K, bits, group_size, symmetric), None, torch.float16, 8)
    x = normal(40, K)
    expected = layer(x)
    found = layer.to("cuda")(x.cuda()).cpu()
    # the last bit of a token's largest value decides between two integers
    assert relative_error(found, expected.double()) < 2e-3


@pytest.mark.parametrize(("B", "N"), [(128, 4096), (256, 14336), (24, 1000)])
@pytest.mark.parametrize("scaled", [False, True])
def test_columns_rounded_in_order_are_those_of_the_cpu(B, N, scaled):
    base, coupling = 3 * normal(B, N, dtype=torch.float32), normal(B, B, dtype=torch.float32)
    coupling /= 4 * B**0.5
    scale = normal(B, N + 1, dtype=torch.float32)[:, 1:].exp().contiguous() if scaled else None
    low = -torch.arange(N).remainder(8).float()
    expected = round_eagerly(base.clone(), coupling, low, low + 7, scale)
    given = [x if x is None else x.cuda() for x in (base, coupling, low, low + 7, scale)]
    found = round_in_order(*given).cpu()
    # another order of the same fp32 sums moves a level next to a tie, and some that follow it
    assert (found != expected).float().mean() < 1e-2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_than_the_current_one():
    weight, x = random_weight(N, K, 4, 128), normal(1, K)
    y = quantized_matmul(x.to("cuda:1"), pack_kernel(weight).to("cuda:1"))
    assert y.device == torch.device("cuda:1")
    assert relative_error(y.cpu(), reference_matmul(x, weight)) < 2**-10


def test_the_benchmark_measures_and_tunes(tmp_path, monkeypatch):
    from compress.bench.kernels import bench_kernels, tune_kernels
    from compress.bench.settings import KernelBench

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning.forget()
    bench = KernelBench(
        shapes=((512, 512),), rows=(1, 16), bits=(4,), rounds=3, device="cuda", dtype="bf16"
    )
    result = bench_kernels(bench)
    names = {"packed", "dense bf16", "dense fp16", "tinygemm int4"}
    for row in result["rows"]:
        assert names <= row["seconds"].keys()
        assert max(row["error"].values()) < 2**-6
    assert result["conditions"]["device"] == torch.cuda.get_device_name()
    tuned = tune_kernels(bench)
    assert all(entry["seconds"] <= entry["before"] for entry in tuned["entries"])
    assert json.loads(tuning.path().read_text())["entries"].keys() == {
        entry["key"] for entry in tuned["entries"]
    }
    tuning.forget()
