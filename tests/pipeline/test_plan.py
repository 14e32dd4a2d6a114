"""The plan: its bytes are those of the files that a run writes, and it reads no weight."""

import re

import pytest
import torch
from safetensors import safe_open

import compress
from compress.checkpoint.inspect import inspect
from compress.errors import CheckpointError, UsageError
from compress.models.skeleton import Skeleton
from compress.pipeline.inputs import RunInputs
from compress.pipeline.memory_forecast import CONTEXT, EXPERT_MEMORY, FIXED_MEMORY, ROW_COPIES
from compress.pipeline.plan import make_plan
from compress.pipeline.run import run
from support.moe_families import write_mixture
from support.refusals import check_line, refused
from support.tiny_checkpoints import LAYERS, WINDOWS, recipe_for, write_checkpoint


def plan_of(folder, **sections):
    return make_plan(RunInputs.of(recipe_for(folder, **sections), Skeleton(folder)))


def bytes_of(folder) -> dict[str, int]:
    """Tensor bytes of a checkpoint by the safetensors library: of packed weights, of all else."""
    sizes = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            sizes |= {n: opened.get_tensor(n).nbytes for n in opened.keys()}  # noqa: SIM118
    packed = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
    quantised = sum(size for n, size in sizes.items() if n.rpartition(".")[2] in packed)
    total = sum(sizes.values())
    return {"quantized": quantised, "other": total - quantised, "total": total}


# ---- bytes --------------------------------------------------------------------------------------

DOWN = {"match": "re:.*down_proj$"}
SCHEMES = {
    "2 bits": {"bits": 2, "group_size": 32},
    "3 bits": {"bits": 3, "group_size": 64},
    "4 bits": {"bits": 4, "group_size": 64},
    "5 bits": {"bits": 5, "group_size": 32},
    "auto": {"bits": 3, "group_size": "auto"},
    "groups of 16": {"bits": 4, "group_size": 16},
    "8 bits": {"bits": 8, "group_size": "channel"},
    "3 bits a row": {"bits": 3, "group_size": "channel"},
    "asymmetric": {"bits": 3, "group_size": 32, "symmetric": False},
    "asymmetric rows": {"bits": 4, "group_size": "channel", "symmetric": False},
    "overrides": {"bits": 3, "overrides": [DOWN | {"bits": 8, "group_size": "channel"}]},
    "one ignored": {"bits": 4, "overrides": [DOWN | {"ignore": True}]},
    "head too": {"bits": 4, "ignore": []},
    "none": {"method": "none"},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("rotate", ["none", "hadamard"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_bytes_are_those_of_the_files(checkpoint, tmp_path, scheme, rotate, tied):
    recipe = recipe_for(
        checkpoint(tied=tied, dtype=torch.bfloat16),
        rotate=rotate,
        quantize={"method": "rtn"} | SCHEMES[scheme],
    )
    result = run(recipe, tmp_path / "out", self_check=False)
    assert result.plan.bytes == bytes_of(tmp_path / "out")
    assert result.plan.file_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("family", ["llama-biased", "mistral", "qwen2", "qwen3"])
def test_bytes_count_biases_norms_and_wide_attention(checkpoint, tmp_path, family):
    recipe = recipe_for(checkpoint(family), quantize={"method": "rtn"})
    result = run(recipe, tmp_path / "out", self_check=False)
    assert result.plan.bytes == bytes_of(tmp_path / "out")
    assert inspect(tmp_path / "out")["bytes"] == result.plan.bytes


def test_bytes_by_hand(checkpoint):
    """A weight [64, 64] in groups of 32, 3 bits, bf16: 6 words, 2 scales a row; its shape."""
    plan = plan_of(
        checkpoint(dtype=torch.bfloat16),
        quantize={"bits": 3, "ignore": ["lm_head", "re:(?!model.layers.0.self_attn.o_proj)"]},
    )
    assert [m.name for m in plan.modules] == ["model.layers.0.self_attn.o_proj"]
    assert plan.bytes["quantized"] == 64 * (6 * 4 + 2 * 2) + 16


def test_average_bits_are_weighted_by_the_weights(checkpoint):
    """down_proj has 64 * 128 of a layer's 64 * (64 + 2 * 32 + 64 + 3 * 128) weights."""
    folder = checkpoint()
    plan = plan_of(folder, quantize={"bits": 3, "overrides": [DOWN | {"bits": 8}]})
    assert plan.average_bits == pytest.approx(3 + 5 * 128 / (64 + 64 + 64 + 3 * 128))
    assert plan_of(folder, quantize={"bits": 5}).average_bits == 5
    assert plan_of(folder, quantize={"method": "none"}).average_bits == 0


def test_modules_are_listed_with_their_scheme(checkpoint):
    plan = plan_of(
        checkpoint("qwen3"),
        quantize={
            "bits": 3,
            "group_size": 64,
            "overrides": [{"match": "model.layers.1.mlp.up_proj", "group_size": "channel"}],
        },
    )
    assert len(plan.modules) == 7 * LAYERS
    modules = {module["name"]: module for module in plan.as_dict()["modules"]}
    assert modules["model.layers.0.self_attn.q_proj"] == {
        "name": "model.layers.0.self_attn.q_proj",
        "shape": (128, 64),
        "bits": 3,
        "group_size": 64,
        "score": None,
    }
    assert modules["model.layers.1.mlp.up_proj"]["group_size"] is None
    assert "lm_head" not in modules


# ---- no weight is read --------------------------------------------------------------------------


@pytest.fixture
def unreadable(tmp_path):
    """A checkpoint of whole headers whose data is all NaN: reading any tensor is an error."""
    folder = write_checkpoint(tmp_path / "unreadable")
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start:] = b"\xff" * (len(data) - start)
    file.write_bytes(data)
    with refused(CheckpointError, "model.layers.0.input_layernorm.weight", "NaN"):
        Skeleton(folder).read_layer(0)
    return folder


def test_planning_reads_headers_only(checkpoint, unreadable):
    sections = {"rotate": "hadamard", "quantize": {"bits": 3}}
    assert plan_of(unreadable, **sections).bytes == plan_of(checkpoint(), **sections).bytes


STRIDE = {"dataset": "python-stdlib", "length": 32, "stride": 32, "bos": True}
PROBLEMS = [
    ({"quantize": {"group_size": 128}}, ("quantize.group_size: ", 128, 64, "q_proj", "11 more")),
    (
        {"quantize": {"overrides": [DOWN | {"group_size": 256}]}},
        ("quantize.overrides[0].group_size: ", 256, 128, "down_proj", "1 more"),
    ),
    ({"quantize": {"ignore": ["lm_haed"]}}, ("quantize: ", "'lm_haed'", "'lm_head'")),
    ({"quantize": {"overrides": [{"match": "re:.*experts", "bits": 8}]}}, ("'re:.*experts'",)),
    ({"quantize": {"ignore": ["re:.*"]}}, ("quantize: ", "ignored")),
    ({"calibration": {"length": 65}}, ("calibration.length: ", 65, 64)),
    (
        {"evaluate": {"perplexity": {"dataset": "python-stdlib", "stride": 65}}},
        ("evaluate.perplexity.stride: ", 65, 64),
    ),
    (
        {"evaluate": {"perplexity": STRIDE}},
        ("evaluate.perplexity.stride: ", 32, 31),
    ),
]


@pytest.mark.parametrize("sections, named", PROBLEMS)
def test_problems_are_found_and_stop_the_run_before_any_weight_is_read(
    unreadable, tmp_path, sections, named
):
    (problem,) = plan_of(unreadable, **sections).problems
    output = tmp_path / "out"
    with refused(UsageError, *named) as caught:
        run(recipe_for(unreadable, **sections), output, windows=WINDOWS, self_check=False)
    assert str(caught.value) == problem
    assert not output.exists()


def test_a_group_size_that_fits_is_suggested(checkpoint):
    (problem,) = plan_of(checkpoint(), quantize={"group_size": 128}).problems
    suggested = re.search(r"give --set quantize.group_size=(.*)$", problem)[1].split(" or ")
    assert suggested == ["auto", "64", "32", "16", "channel"]
    for size in suggested:
        size = int(size) if size.isdigit() else size
        assert not plan_of(checkpoint(), quantize={"group_size": size}).problems


def test_a_sound_recipe_has_no_problems_and_rtn_needs_no_context(checkpoint):
    assert not plan_of(checkpoint()).problems
    rtn = {"quantize": {"method": "rtn"}, "calibration": {"length": 4096}}
    assert not plan_of(checkpoint(), **rtn).problems


# ---- notes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sections, tied, expected",
    [
        ({"rotate": "hadamard"}, True, True),
        ({"quantize": {"ignore": []}}, True, True),
        ({}, True, False),
        ({"rotate": "hadamard"}, False, False),
    ],
)
def test_untying_is_announced(checkpoint, sections, tied, expected):
    plan = plan_of(checkpoint(tied=tied), **sections)
    assert plan.untied is expected
    assert any("untied" in note for note in plan.notes) is expected


def test_linears_that_engines_fuse_are_noted_where_their_schemes_differ(checkpoint):
    one = {"overrides": [{"match": "re:.*k_proj", "bits": 8}]}
    all_three = {"overrides": [{"match": "re:.*[qkv]_proj", "bits": 8}]}
    notes = ["\n".join(plan_of(checkpoint(), quantize=q).notes) for q in (one, all_three)]
    assert ["k_proj" in note for note in notes] == [True, False]


# ---- memory -------------------------------------------------------------------------------------


@pytest.fixture
def host_memory(text):
    """Of a plan that calibrates on little text."""

    def memory(folder, allocate=None, **calibration) -> int:
        sections = {} if allocate is None else {"allocate": allocate}
        calibration = {"dataset": str(text)} | calibration
        return plan_of(folder, calibration=calibration, **sections).peak_memory["host"]

    return memory


def test_peak_memory_of_a_tiny_model_is_little_more_than_the_libraries(checkpoint, host_memory):
    assert FIXED_MEMORY < host_memory(checkpoint()) < FIXED_MEMORY + 15e6


def test_a_vocabulary_counts_as_written_with_some_rows_and_the_logits_of_a_probe(
    tmp_path, host_memory
):
    """150,000 x 64 in bf16, 2^22 of them in fp32 as well; 64 tokens of logits; no text is read."""
    folder = write_checkpoint(tmp_path / "large", dtype=torch.bfloat16, vocab_size=150_000)
    plan = plan_of(folder, quantize={"method": "rtn"})
    taken = plan.peak_memory["host"] - FIXED_MEMORY
    assert taken == 150_000 * 64 * 2 + 2**22 * (2 + 4) + 64 * 150_000 * 4
    # as many tokens as 2^24 logits hold, however long a window is
    assert host_memory(folder, offload="disk", length=64, samples=9) == FIXED_MEMORY + taken


def test_a_layer_counts_in_fp32_and_as_written_with_the_largest_group(tmp_path):
    """RTN, bf16: gate and up are one stack in fp32, their codes, in parts and whole, and their rows
    several times; and a quarter of that is holes in the heap."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "layers": 1}
    plan = plan_of(
        write_checkpoint(tmp_path / "wide", dtype=torch.bfloat16, **sizes),
        quantize={"method": "rtn"},
    )
    layer, group = 256 * (256 + 2 * 128 + 256 + 3 * 1024), 2 * 1024 * 256
    written = layer // 2 + layer // 32 * 2
    most = layer * 4 + written + group * (4 + 2 + 4 * ROW_COPIES)
    assert plan.peak_memory["host"] == FIXED_MEMORY + most + most // 4


def test_a_gpu_is_promised_what_is_computed_there(tmp_path):
    """A layer in fp32, and a group being solved; none is needed on a CPU."""
    folder = write_checkpoint(tmp_path / "model", dtype=torch.bfloat16, hidden_size=256)
    plans = {
        device: make_plan(RunInputs.foretell(recipe_for(folder), device))
        for device in ("cpu", "cuda", "cuda:1")
    }
    needed = {device: plan.peak_memory["device"] for device, plan in plans.items()}
    assert needed["cpu"] == 0
    assert needed["cuda"] == needed["cuda:1"]
    layer = sum(m.weights for m in plans["cpu"].modules) // len(plans["cpu"].layers)
    assert CONTEXT + 4 * layer < needed["cuda"] < CONTEXT + 16 * layer + 30e6


def test_windows_that_a_program_has_are_no_text_to_be_read(checkpoint, monkeypatch, tmp_path):
    """Nor is that text's memory what the check of the source may take."""
    recipe, budgets = recipe_for(checkpoint()), []
    monkeypatch.setattr(
        "compress.pipeline.run.check_source",
        lambda inputs, budget: budgets.append(budget) or {"skipped": "by a test"},
    )
    run(recipe, tmp_path / "out", windows=WINDOWS, self_check=False)
    assert budgets[0] < FIXED_MEMORY + 15e6
    assert compress.plan(recipe).peak_memory["host"] > 2 * budgets[0]  # python-stdlib


def test_activations_count_where_they_are_kept(checkpoint, host_memory):
    """Twice the samples cost their hidden states and their widest inputs, unless on disk."""
    folder, tokens = checkpoint(), 4000 * 64
    memory = {
        (offload, samples): host_memory(folder, samples=samples, length=64, offload=offload)
        for offload in ("ram", "disk")
        for samples in (4000, 8000)
    }
    assert memory["ram", 8000] - memory["ram", 4000] == tokens * (64 + 128) * 4
    assert memory["disk", 8000] == memory["disk", 4000] < memory["ram", 4000]


def test_activations_of_every_unit_at_every_width_count(checkpoint, host_memory):
    """Two layers at two widths, and the model itself: five activations travel along."""
    section = {"importance": "logit_divergence", "method": "knapsack", "average_bits": 3}
    memory = {
        (offload, samples): host_memory(
            checkpoint(), section | {"widths": [4, 2], "samples": samples},
            samples=8000, length=64, offload=offload,
        )
        for offload in ("ram", "disk")
        for samples in (6000, 8000)
    }  # fmt: skip
    assert memory["ram", 8000] - memory["ram", 6000] == 5 * 2000 * 64 * 64 * 4
    assert memory["disk", 8000] == memory["disk", 6000] < memory["ram", 6000]
    cheap = section | {"importance": "weight_error", "samples": 8000, "widths": [4, 2]}
    assert host_memory(checkpoint(), cheap, samples=8000, length=64, offload="ram") == host_memory(
        checkpoint(), samples=8000, length=64, offload="ram"
    )


def test_memory_does_not_grow_with_depth(tmp_path, host_memory):
    folders = [write_checkpoint(tmp_path / str(n), layers=n) for n in (1, 4)]
    assert host_memory(folders[0]) == host_memory(folders[1])


def test_memory_grows_with_experts_by_what_is_written_of_them(tmp_path, text):
    """4 bits in groups of 16 and a scale in fp32 each, and what is known of each expert; one of
    them is there at a time. A quarter more is holes in the heap."""
    folders = [
        write_mixture(tmp_path / str(n), "qwen3_moe", num_experts=n, num_experts_per_tok=2)
        for n in (4, 12)
    ]
    sections = {"quantize": {"group_size": 16}, "calibration": {"dataset": str(text)}}
    few, many = (plan_of(f, **sections).peak_memory["host"] for f in folders)
    weights = 3 * 32 * 32
    written = 8 * (weights // 2 + weights // 16 * 4)
    known = 2 * 8 * EXPERT_MEMORY
    assert many - few == pytest.approx(known + 1.25 * written, abs=1)
    sections["quantize"] |= {"experts": {"policy": "shared_hessian"}}
    shared = plan_of(folders[0], **sections).peak_memory["host"]
    assert shared - few == pytest.approx(1.25 * 4 * 32**2, abs=1)


def test_text_counts_where_it_is_more_than_the_model(checkpoint, tmp_path, host_memory):
    """Twice the text of a document needs twice the memory, in short lines far less."""
    file, memory = tmp_path / "long.txt", []
    for size in (2_000_000, 4_000_000):
        file.write_text("a word " * (size // 7))
        memory.append(host_memory(checkpoint(), dataset=str(file)) - FIXED_MEMORY)
    assert memory[1] / memory[0] == pytest.approx(2, rel=0.01)
    lines = tmp_path / "long.jsonl"
    lines.write_text('{"text": "a word a word a word"}\n' * 100_000)
    assert host_memory(checkpoint(), dataset=str(lines)) - FIXED_MEMORY < memory[0] / 5


def test_what_a_pattern_of_ignore_matches_is_listed(checkpoint):
    plan = plan_of(checkpoint(), quantize={"ignore": ["lm_head", "re:model.layers.1.*up_proj"]})
    assert plan.ignored == {
        "lm_head": ["lm_head"],
        "re:model.layers.1.*up_proj": ["model.layers.1.mlp.up_proj"],
    }
    (note,) = [note for note in plan.notes if "quantize.ignore" in note]
    check_line(note, "'re:model.layers.1.*up_proj'", "1", "model.layers.1.mlp.up_proj")
    assert plan.as_dict()["ignored"] == plan.ignored


def test_a_pattern_that_matches_more_layers_than_meant_shows_it(checkpoint):
    folder = checkpoint(layers=12)
    plan = plan_of(folder, quantize={"ignore": ["lm_head", "re:model.layers.1.*"]})
    found = plan.ignored["re:model.layers.1.*"]
    assert {name.split(".")[2] for name in found} == {"1", "10", "11"}
    (note,) = [note for note in plan.notes if "quantize.ignore" in note]
    check_line(note, len(found), found[0], found[-1])


@pytest.mark.parametrize("key, value", [("policy", "rtn"), ("least_rows", 8)])
def test_options_of_experts_need_experts(checkpoint, key, value):
    (problem,) = plan_of(checkpoint(), quantize={"experts": {key: value}}).problems
    check_line(problem, "quantize.experts: ", "'llama'")


def test_text_that_is_calibrated_on_and_measured_is_noted(checkpoint, tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("some text " * 99, encoding="utf-8")
    calibration = {"dataset": str(tmp_path / "a.txt"), "samples": 2, "length": 16}

    def notes(measured, **sections):
        evaluate = {"perplexity": {"dataset": str(tmp_path / measured)}}
        planned = plan_of(checkpoint(), calibration=calibration, evaluate=evaluate, **sections)
        return [note for note in planned.notes if "calibrated on as well" in note]

    (note,) = notes("a.txt")
    check_line(note, tmp_path / "a.txt", "evaluate.perplexity.dataset")
    assert not notes("b.txt")
    assert not notes("a.txt", quantize={"method": "rtn"})


def test_an_evaluation_that_takes_more_memory_than_the_run_is_noted(checkpoint):
    """With what a smaller batch of windows would take; no note where it does not."""
    measured = {"perplexity": {"dataset": "python-stdlib", "length": 512}, "batch_size": 10_000}

    def notes(**changes):
        recipe = recipe_for(checkpoint(), evaluate=measured | changes)
        return [note for note in compress.plan(recipe).notes if "the evaluation" in note]

    (note,) = notes()
    assert "GB: " in note and note.endswith("MB with --set evaluate.batch_size=1")
    assert notes(batch_size=1) == []
    few = measured["perplexity"] | {"tokens": 600}
    assert notes(perplexity=few) == []
