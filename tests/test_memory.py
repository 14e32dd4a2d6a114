"""Memory of a process: each test looks at a fresh one, which holds nothing else."""

import gc
import json
import platform
import subprocess
import sys
import textwrap

import pytest

from compress import memory

MB = 10**6
on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")


def child(code: str) -> dict[str, float]:
    """What a fresh process prints, in MB; it has `peak()` and `resident()`, and no torch."""
    head = """
        import json, sys
        import psutil
        from compress.memory import peak_memory, release_memory

        def peak():
            return peak_memory("cpu")["host"] / 1e6

        def resident():
            return psutil.Process().memory_info().rss / 1e6

    """
    tail = '\nassert "torch" not in sys.modules'
    program = textwrap.dedent(head) + textwrap.dedent(code) + tail
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names an x86 processor")
@pytest.mark.parametrize(
    ("capability", "bf16", "fast"),
    [
        ("AVX2", True, False),
        ("AVX512", False, False),
        ("AVX512", True, True),
        ("DEFAULT", True, False),
    ],
)
def test_bf16_is_fast_where_a_processor_multiplies_it(monkeypatch, capability, bf16, fast):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: bf16)
    assert memory.multiplies_16_bits("cpu") is fast
    assert memory.multiplies_16_bits("cuda:1")


def test_the_peak_counts_what_was_held_and_stays_when_it_is_gone():
    found = child("""
        before = peak()
        block = bytearray(80_000_000)
        held = peak()
        del block
        after, now = peak(), resident()
        print(json.dumps({"before": before, "held": held, "after": after, "now": now}))
    """)
    assert found["held"] - found["before"] == pytest.approx(80, abs=5)
    assert found["after"] == pytest.approx(found["held"], abs=1)  # the kernel counts in batches
    assert found["now"] < found["held"] - 70
    assert 5 < found["before"] < 80


def test_a_process_does_not_start_with_its_parents_peak():
    block = bytearray(150 * MB)
    mine = memory.peak_memory("cpu")["host"] / MB
    assert mine > len(block) / MB
    assert child("print(json.dumps({'peak': peak()}))")["peak"] < 100


def test_a_cpu_holds_nothing_on_a_device():
    assert memory.peak_memory("cpu")["device"] == 0


@on_glibc
def test_what_is_free_on_the_heap_goes_back_to_the_system():
    """Blocks too small for pages of their own, below one that stays."""
    found = child("""
        blocks = [bytearray(60_000) for _ in range(2000)]
        last = bytearray(60_000)
        full = resident()
        del blocks
        freed = resident()
        release_memory()
        print(json.dumps({"full": full, "freed": freed, "released": resident()}))
    """)
    assert found["freed"] > found["full"] - 20  # or there would be nothing to test
    assert found["released"] < found["full"] - 100


@pytest.mark.parametrize("symbols", [(), ("free",)], ids=["another system", "another C library"])
def test_where_nothing_can_be_given_back_it_does_nothing(monkeypatch, symbols):
    if symbols:
        library = type("Library", (), dict.fromkeys(symbols))
        monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: library)
    else:
        monkeypatch.setattr(memory.sys, "platform", "darwin")
    memory._trim.cache_clear()
    try:
        assert memory._trim() is None
        assert memory.release_memory() is None
    finally:
        memory._trim.cache_clear()


@pytest.mark.parametrize("before", [True, False])
def test_garbage_is_collected_afterwards_as_before(before):
    """Within another such block, after an error, and where the caller has no collection."""
    was = gc.isenabled()
    try:
        (gc.enable if before else gc.disable)()
        with pytest.raises(ValueError, match="odd"), memory.uncollected():
            with memory.uncollected():
                assert not gc.isenabled()
            assert not gc.isenabled()
            raise ValueError("odd")
        assert gc.isenabled() is before
    finally:
        (gc.enable if was else gc.disable)()


def test_products_are_in_fp32_within_whatever_was_set():
    """And as they were set afterwards, even where something fails."""
    import torch

    places = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "tf32"
        with pytest.raises(KeyError), memory.fp32_products():
            assert [place.fp32_precision for place in places] == ["ieee"] * 2
            raise KeyError
        assert [place.fp32_precision for place in places] == ["tf32"] * 2
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision
    with memory.fp32_products():  # where nobody has set anything, the older name agrees
        assert torch.get_float32_matmul_precision() == "highest"


def test_what_is_moved_is_in_fp32_and_not_copied_where_it_is_already():
    import torch

    x = torch.randn(3, 4)
    assert memory.moved(x, "cpu") is x
    for dtype in (torch.bfloat16, torch.float64):
        assert torch.equal(memory.moved(x.to(dtype), "cpu"), x.to(dtype).float())


@pytest.mark.gpu
def test_what_is_moved_to_a_gpu_is_what_it_was():
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.randn(1000, 1000).to(dtype)
        found = [memory.moved(x + i, "cuda") for i in range(5)]  # more than one under way
        assert all(torch.equal(y.cpu(), (x + i).float()) for i, y in enumerate(found))
