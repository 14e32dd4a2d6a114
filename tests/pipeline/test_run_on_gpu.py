"""A run on a CUDA device against the same run on the CPU. Skipped where there is none."""

import pytest
import torch

from support.tiny_checkpoints import WINDOWS, read_tensors, recipe_for, weight_files

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def recipe(checkpoint):
    return recipe_for(
        checkpoint("llama"), rotate="hadamard", quantize={"bits": 4, "group_size": 32}
    )


def errors(result):
    return torch.tensor([m["error"] for layer in result.layers for m in layer["modules"]])


def test_errors_are_those_of_the_cpu(recipe, tmp_path):
    from compress.pipeline.run import run

    on_cpu = run(recipe, tmp_path / "cpu", windows=WINDOWS)
    on_gpu = run(recipe, tmp_path / "cuda", windows=WINDOWS, device="cuda")
    assert torch.allclose(errors(on_gpu), errors(on_cpu), rtol=0.1)
    assert on_gpu.peak_memory["device"] > 0
    # Codes may differ where rounding decides a tie and what follows it; not everywhere.
    cpu, gpu = read_tensors(on_cpu.path), read_tensors(on_gpu.path)
    assert cpu.keys() == gpu.keys()
    same = [torch.equal(cpu[name], gpu[name]) for name in cpu if not name.endswith("_packed")]
    assert sum(same) > len(same) / 2


@pytest.mark.parametrize(
    "other",
    [{}, {"symmetric": False}, {"act_order": True}, {"group_size": "channel"}, {"group_size": 8}],
    ids=str,
)
def test_rounding_by_the_kernel_is_as_good_as_step_by_step(
    other, checkpoint, tmp_path, monkeypatch
):
    from compress.pipeline.run import run

    quantize = {"bits": 4, "group_size": 32} | other
    recipe = recipe_for(checkpoint("llama"), rotate="hadamard", quantize=quantize)
    options = {"windows": WINDOWS, "self_check": False, "device": "cuda"}
    by_kernel = run(recipe, tmp_path / "kernel", **options)
    monkeypatch.setattr("compress.quantization.rounding.has_kernels", lambda _: False)
    step_by_step = run(recipe, tmp_path / "steps", **options)
    assert torch.allclose(errors(by_kernel), errors(step_by_step), rtol=0.05)


def test_the_same_run_gives_the_same_bytes(recipe, press):
    first, second = (press(recipe, device="cuda") for _ in range(2))
    assert weight_files(first) == weight_files(second)


def test_self_check_holds_against_a_reload_on_the_cpu(recipe, tmp_path):
    from compress.pipeline.run import run

    checked = run(recipe, tmp_path / "out", windows=WINDOWS, device="cuda").self_check
    assert checked["relative_error"] <= checked["tolerance"]
