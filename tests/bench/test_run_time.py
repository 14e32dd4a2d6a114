"""The forecast of a run's time: which work is counted, and how it grows; not how long it is."""

from pathlib import Path

import pytest

import compress
from compress.bench import run_time
from compress.bench.run_time import _Pieces, time_forecast
from compress.pipeline.inputs import RunInputs
from compress.recipe.recipe import Recipe
from support.calling import modelpress
from support.moe_families import write_mixture

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
PARTS = {"products", "hessians", "solves", "attention", "between"}


@pytest.fixture
def steady(monkeypatch):
    """Each piece takes a second, however large; what was asked for is listed."""
    asked = []

    def timed(self, key, prepare):
        if key not in self.known:
            prepare()()  # it runs
            asked.append(key)
            self.known[key] = 1.0
        return self.known[key]

    monkeypatch.setattr(_Pieces, "_timed", timed)
    return asked


def forecast(recipe="demo-gptq", **changes):
    settings = Recipe.of(recipe).model_dump(mode="json", exclude_defaults=True)
    for section, values in changes.items():
        settings.setdefault(section, {}).update(values)
    settings["model"] = Recipe.of(recipe).model_location()
    return time_forecast(RunInputs.foretell(Recipe.of(settings)))


def test_all_work_of_layers_is_counted_and_each_shape_is_done_once(steady):
    found = forecast()
    assert set(found.parts) == PARTS
    assert found.seconds == pytest.approx(sum(found.parts.values()))
    assert len(steady) == len(set(steady))
    # 6 layers, 4 inputs each of which 512 wide in one: a factor each, and q, k, v as one stack
    assert found.parts["solves"] == pytest.approx(6 * (4 + 4))


def test_time_grows_with_tokens_but_for_the_solves(steady):
    once, twice = (forecast(calibration={"samples": samples}) for samples in (64, 128))
    assert twice.parts["solves"] == once.parts["solves"]
    for name in PARTS - {"solves"}:
        assert twice.parts[name] == pytest.approx(2 * once.parts[name])


def test_rounding_to_nearest_reads_no_tokens(steady):
    found = forecast("demo-rtn")
    assert found.parts["solves"] > 0
    assert sum(found.parts.values()) == found.parts["solves"]


def test_maps_are_made_where_they_weigh_tokens(steady):
    plain, weighed = forecast("demo-quarot"), forecast("demo-lm")
    assert weighed.parts["attention"] == pytest.approx(2 * plain.parts["attention"])
    assert ("maps",) in steady


def test_the_16_bit_target_passes_everything_twice(steady):
    plain = forecast()
    aimed = forecast(quantize={"target": "full_precision"})
    assert aimed.parts["products"] == pytest.approx(2 * plain.parts["products"])


def test_large_shapes_are_done_smaller(steady, monkeypatch):
    monkeypatch.setattr(run_time, "MOST_COLUMNS", 256)
    monkeypatch.setattr(run_time, "MOST_WEIGHTS", 1 << 12)
    monkeypatch.setattr(run_time, "MOST_WORK", 1 << 16)
    found = forecast()
    assert max(key[1] for key in steady if key[0] == "hessian") == 256
    factors = 6 * (3 + (512 / 256) ** 3)
    assert found.parts["solves"] > factors


def test_experts_see_the_tokens_that_are_routed_to_them(steady, tmp_path):
    folder = write_mixture(tmp_path, "mixtral")
    recipe = {
        "model": str(folder),
        "calibration": {"dataset": "python-stdlib", "samples": 8, "length": 128},
        "quantize": {"bits": 4, "group_size": 32},
    }
    found = time_forecast(RunInputs.foretell(Recipe.of(recipe)))
    assert set(found.parts) == PARTS


@pytest.mark.parametrize("name", ["DeepSeek-V3", "gpt-oss-20b", "gemma-3-4b", "Qwen3-VL-8B"])
def test_structures_of_other_kinds(monkeypatch, tmp_path, name):
    """Latent attention, experts with biases, post-norms, a vision tower; by config.json alone."""
    monkeypatch.setattr(_Pieces, "_timed", lambda self, key, prepare: 1.0)
    (tmp_path / "config.json").write_bytes((CONFIGS / f"{name}.json").read_bytes())
    calibration = {"dataset": "python-stdlib", "samples": 4, "length": 512}
    recipe = {"model": str(tmp_path), "calibration": calibration, "quantize": {"method": "rsq"}}
    found = time_forecast(RunInputs.foretell(Recipe.of(recipe)))
    assert set(found.parts) == PARTS and min(found.parts.values()) > 0


def test_a_plan_has_it_where_it_is_asked_for():
    assert compress.plan("demo-rtn").time is None
    planned = compress.plan("demo-rtn", time=True)
    assert planned.time["seconds"] > 0 and planned.time["measuring"] > 0
    assert planned.as_dict()["time"] == planned.time


def test_the_command_says_what_is_left_out():
    said = " ".join(modelpress("plan", "demo-rtn", "--time").stdout.split())
    assert "time " in said and "on this machine (solves" in said and "on top" in said
