"""The search: its objective against a plain run, what it promises of every trial, going on."""

import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch

from compress.data.samples import read_samples
from compress.errors import CheckpointError, CompressError, UsageError
from compress.observer import Observer
from compress.pruning.engine import prune_visual_tokens
from compress.pruning.search import Objective, SearchSpace, search_strategy
from compress.recipe.strategy import PruneStrategy
from support.calling import call, last_line, refuses
from support.refusals import refused
from support.tiny_folders import tiny_folder, write_samples
from support.tiny_models import BATCH, LAYERS, SINGLE, masked_run, tiny_inputs, tiny_model

pytest.importorskip("optuna")
STAGES = (0, 1, 3)
START = PruneStrategy(stages=STAGES, ratios=(0.5, 0.5, 0.5))
PYRAMID = PruneStrategy(method="pyramiddrop", stages=(1, 2), ratios=(0.5, 0.5))
TWO = [[4, (20, 40), 3], [(20, 40), 5]]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llava")


@pytest.fixture(scope="module")
def samples(model):
    return [tiny_inputs(model, SINGLE), tiny_inputs(model, TWO)]


def search(model, samples, **options):
    return search_strategy(model, samples, 0.4, **{"start": START, "trials": 6} | options)


@torch.no_grad()
def last_state(model, inputs):
    """By the output that transformers itself calls hidden states."""
    return model(**inputs, output_hidden_states=True).hidden_states[-1][:, -1].double()


class Counter(Observer):
    """Counts what it is told."""

    def __init__(self, stop: int = -1):
        self.samples, self.done, self.found, self.stop = [], [], [], stop

    def sample(self, done, total):
        self.samples.append((done, total))

    def resumed(self, trials):
        self.found.append(trials)

    def trial(self, done, total, score, best):
        self.done.append((done - 1, best, total))
        if done - 1 == self.stop:
            raise KeyboardInterrupt


# ---- the objective ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_score_is_the_cosine_with_a_run_in_which_the_pruned_keys_are_masked(family):
    model = tiny_model(family)
    inputs = tiny_inputs(model, TWO)
    strategy = START.model_copy(update={"voter_threshold": 1.1})
    score = Objective(model, [inputs])(strategy)
    with torch.no_grad(), prune_visual_tokens(model, strategy) as pruning:
        model(**inputs)
    full = last_state(model, inputs)
    with masked_run(model, [pruning.last.kept(layer) for layer in range(LAYERS)]):
        pruned = last_state(model, inputs)
    expected = torch.cosine_similarity(full, pruned, dim=-1).mean()
    assert score == pytest.approx(float(expected), abs=1e-6)
    assert score < 0.999  # else this would hold for any score near 1


def test_keeping_all_scores_one(model, samples):
    everything = PruneStrategy(stages=STAGES, ratios=(1.0, 1.0, 1.0))
    assert Objective(model, samples)(everything) == pytest.approx(1, abs=1e-12)


def test_unpruned_states_are_those_of_the_plain_model_and_computed_once(model, samples):
    objective = Objective(model, samples)
    plain = torch.cat([last_state(model, sample) for sample in samples])
    assert torch.equal(torch.cat([*objective.states.values()]), plain)
    assert [len(image) for image in objective.images] == [36] * 3
    runs = []
    handle = model.model.register_forward_hook(lambda *_: runs.append(1))
    search(model, samples, trials=3)
    handle.remove()
    assert len(runs) == len(samples) * (3 + 1)


def test_prompts_that_cannot_be_scored_are_named(model):
    with refused(UsageError, "sample 1"):
        Objective(model, [tiny_inputs(model), tiny_inputs(model, [[(20, 40), 2], [4]])])
    with refused(UsageError, "sample 0", "left"):
        Objective(model, [tiny_inputs(model, TWO, side="right")])
    with refused(UsageError, "samples", "none"):
        Objective(model, [])
    broken = tiny_model("llava")
    torch.nn.init.constant_(broken.model.language_model.norm.weight, math.inf)
    with refused(CompressError, "sample 0", "torch.float32"):
        Objective(broken, [tiny_inputs(broken)])


# ---- the search ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_every_trial_keeps_the_budget_and_the_best_is_returned(model, samples, sampler):
    found = search(model, samples, sampler=sampler, trials=13)  # past the ten random ones
    assert [trial.trial for trial in found.trials] == list(range(13))
    for trial in found.trials:
        strategy = PruneStrategy.from_dict(trial.strategy)
        assert strategy.average_kept(LAYERS) == pytest.approx(0.4, abs=1e-12)
    assert found.score == max(trial.score for trial in found.trials)
    assert len({trial.score for trial in found.trials}) > 5
    assert Objective(model, samples)(found.strategy) == found.score
    assert json.loads(json.dumps(found.as_dict()))["score"] == found.score


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision", "qwen2_vl"])
def test_corners_of_the_space_run_on_every_kind_of_image(family):
    """Newlines that must stay, several grids, images of different sizes; cells at their least."""
    model = tiny_model(family)
    inputs = tiny_inputs(model, BATCH[:2])
    found = space(model, [inputs])
    for corner in itertools.product((0.0, 1.0), repeat=3):
        shares = dict(zip(("share_0", "share_1", "cell"), corner, strict=True))
        strategy = found.strategy({"voter_threshold": 1.1, "entropy_weight": 0.5} | shares)
        with torch.no_grad(), prune_visual_tokens(model, strategy) as pruning:
            model(**inputs)
        for image in pruning.stats.images:
            assert sum(image.kept) / LAYERS == pytest.approx(0.4 * image.tokens, abs=0.5)
        assert sum(image.merged for image in pruning.stats.images) > 0 or shares["share_0"] == 1


def test_same_seed_same_search_another_seed_another(model, samples):
    one, two, three = (search(model, samples, seed=seed) for seed in (0, 0, 1))
    assert one == two
    assert one.trials[0].parameters != three.trials[0].parameters


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_an_interrupted_search_ends_as_one_that_was_not(model, samples, sampler, tmp_path):
    options = {"sampler": sampler, "trials": 12}
    whole = search(model, samples, path=tmp_path / "whole.jsonl", **options)
    path = tmp_path / "t.jsonl"
    with pytest.raises(KeyboardInterrupt):
        search(model, samples, path=path, observer=Counter(stop=10), **options)
    path.write_text(path.read_text() + '{"trial": 11, "para')  # killed while writing
    counter = Counter()
    assert search(model, samples, path=path, observer=counter, **options) == whole
    assert counter.found == [11] and [number for number, *_ in counter.done] == [11]
    assert path.read_text() == (tmp_path / "whole.jsonl").read_text()
    # Fewer than there are: those of the shorter search, and no new one.
    assert search(model, samples, path=path, sampler=sampler, trials=4).trials == whole.trials[:4]


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_trials_of_earlier_versions_are_gone_on_from_and_written_anew(
    model, samples, sampler, tmp_path
):
    path = tmp_path / "t.jsonl"
    options = {"sampler": sampler, "path": path}
    whole = search(model, samples, trials=4, **options)
    today = path.read_text()
    start = "".join(today.splitlines(keepends=True)[:3])
    start = re.sub(r', "sha256": "\w+"', "", start)
    for old, new in (("threshold", "voter_threshold"), ("alpha", "entropy_weight")):
        start = start.replace(f'"{new}"', f'"{old}"')
    path.write_text(start)
    counter = Counter()
    assert search(model, samples, trials=4, observer=counter, **options) == whole
    assert counter.found == [2]
    assert path.read_text() == today


@pytest.mark.parametrize("key", ["score", "share_0", "entropy_weight"])
def test_a_trial_that_was_damaged_is_noticed(model, samples, tmp_path, key):
    path = tmp_path / "t.jsonl"
    search(model, samples, path=path, trials=3)
    lines = path.read_text().splitlines(keepends=True)
    digit = re.search(rf'"{key}": 0\.\d*(\d)', lines[2])
    flipped = str((int(digit[1]) + 1) % 10)
    lines[2] = lines[2][: digit.start(1)] + flipped + lines[2][digit.end(1) :]
    path.write_text("".join(lines))
    with refused(CheckpointError, f"{path}:3:"):
        search(model, samples, path=path, trials=4)
    assert path.read_text() == "".join(lines)


def test_observer_sees_samples_trials_and_the_best_so_far(model, samples):
    counter = Counter()
    found = search(model, samples, observer=counter)
    assert counter.samples == [(1, 2), (2, 2)]
    best = [max(trial.score for trial in found.trials[: i + 1]) for i in range(6)]
    assert counter.done == [(i, best[i], 6) for i in range(6)]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 1}, ("seed 0", 1)),
        ({"sampler": "gp"}, ("sampler tpe", "gp")),
        ({"variables": ["ratios"]}, ("variables", ["ratios"])),
        ({"start": PruneStrategy(stages=(0, 2), ratios=(0.5, 0.5))}, ("start", "[0, 2]")),
    ],
)
def test_trials_of_another_search_are_refused(model, samples, tmp_path, changed, named):
    path = tmp_path / "t.jsonl"
    search(model, samples, path=path, trials=1)
    before = path.read_text()
    with refused(UsageError, path, *named):
        search(model, samples, path=path, **changed)
    assert path.read_text() == before


def test_trials_of_other_data_or_another_model_are_refused(model, samples, tmp_path):
    path = tmp_path / "t.jsonl"
    search(model, samples, path=path, trials=1)
    other = tiny_model("llava")
    other.model.language_model.layers[0].mlp.down_proj.weight.data.neg_()
    for case in ((model, samples[:1]), (model, samples[::-1]), (other, samples)):
        with refused(UsageError, path, "model", "samples"):
            search(*case, path=path)


@pytest.mark.parametrize(
    ("text", "place"), [("{}\n", ""), ("[1]\n", ":1: "), ("nonsense\n", ":1: ")]
)
def test_files_that_hold_no_trials_are_left_alone(model, samples, tmp_path, text, place):
    path = tmp_path / "t.jsonl"
    path.write_text(text)
    with refused(CheckpointError, f"{path}{place}"):
        search(model, samples, path=path)
    assert path.read_text() == text


# ---- what is searched ---------------------------------------------------------------------------


def space(model, samples, keep=0.4, start=START, variables=None):
    return SearchSpace(Objective(model, samples), keep, start, variables)


def test_only_what_is_named_is_searched(model, samples):
    found = space(model, samples, variables=["voter_threshold", "ratios"])
    assert list(found.distributions()) == ["share_0", "share_1", "voter_threshold"]
    strategy = found.strategy({"share_0": 0.3, "share_1": 0.7, "voter_threshold": 3.0})
    rest = {"method", "stages", "entropy_weight", "cell", "vote", "positions", "protect_newlines"}
    assert strategy.model_dump(include=rest) == START.model_dump(include=rest)
    assert strategy.voter_threshold == 3 and strategy.ratios != START.ratios


def test_every_variable_decides_something(model, samples):
    found = space(model, samples)
    middle = dict.fromkeys(found.distributions(), 0.5)
    for name in middle:
        assert found.strategy(middle | {name: 0.6}) != found.strategy(middle)


def test_given_ratios_must_keep_the_budget(model, samples):
    kept = PruneStrategy(stages=STAGES, ratios=(0.75, 0.8, 0.75))  # (0.75 + 2 * 0.6 + 0.45) / 4
    found = space(model, samples, 0.6, kept, ["voter_threshold"])
    assert found.strategy({"voter_threshold": 2.0}).ratios == kept.ratios
    with refused(UsageError, "ratios", 0.6, 0.4):
        space(model, samples, 0.4, kept, ["voter_threshold"])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"variables": ["voter_treshold"]}, ("'voter_treshold'", "'voter_threshold'")),
        ({"start": PruneStrategy(method="random"), "keep": 0.5}, ("random", [0])),
        ({"start": PruneStrategy(stages=(9,)), "keep": 0.5}, ("layer 9", "4 layers")),
        ({"keep": 0.001}, ([0, 1, 3], "keep 0.001")),
        ({"start": PYRAMID, "variables": ["cell"]}, ("'cell'", "pyramiddrop", [1, 2], "ratios")),
    ],
)
def test_searches_that_cannot_be_are_one_line(model, samples, options, named):
    with refused(UsageError, *named):
        space(model, samples, **options)


@pytest.mark.parametrize("changed", [{"keep": 1.0}, {"keep": 0.0}, {"trials": 0}, {"sampler": "x"}])
def test_settings_out_of_range_are_refused_before_the_model_runs(changed):
    with refused(UsageError, *map(str, changed.values())):
        search_strategy(None, [], **{"keep": 0.4} | changed)


def test_baselines_search_their_ratios(model, samples):
    found = search(model, samples, start=PYRAMID, trials=2)
    assert list(found.trials[0].parameters) == ["share_0"]
    assert found.strategy.average_kept(LAYERS) == pytest.approx(0.4)


# ---- the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("vlm") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_samples(tmp_path_factory.mktemp("data"))


def command(folder, data, *options):
    given = ["--data", data, "--keep", 0.5, "--samples", 3, "--trials", 3]
    return ["search-pruning", folder, *given, *options]


def test_command_writes_a_strategy_and_goes_on(folder, data, empty_folder, capsys):
    assert call(*command(folder, data, "--stages", "0,2", "--output", "found.json", "--json")) == 0
    output = capsys.readouterr()
    found = json.loads(output.out)
    strategy = PruneStrategy.load("found.json")
    assert PruneStrategy.from_dict(found["strategy"]) == strategy
    assert strategy.stages == (0, 2)
    assert strategy.average_kept(LAYERS) == pytest.approx(0.5)
    assert len(found["trials"]) == 3 and found["conditions"]["prompts"] == 3
    assert "trial 3/3" in output.err
    assert call(*command(folder, data, "--stages", "0,2", "--output", "found.json")) == 0
    output = capsys.readouterr()
    assert "trial 3" in output.err and "trial 3/3" not in output.err
    assert f"{found['score']:.6f} over 3 prompts" in output.out
    again = ["--start", "found.json", "--output", "found.json"]
    refuses(capsys, command(folder, data, *again), "start", read=last_line)
    again += ["--no-resume", "--json"]
    for variables in ("voter_threshold,entropy_weight", "threshold,alpha"):  # the old names too
        assert call(*command(folder, data, *again, "--variables", variables)) == 0
        conditions = json.loads(capsys.readouterr().out)["conditions"]
        assert conditions["variables"] == ["voter_threshold", "entropy_weight"]
        assert PruneStrategy.load("found.json").ratios == strategy.ratios


def test_command_takes_the_demo_scenes(folder, empty_folder, capsys):
    assert call(*command(folder, "demo-scenes", "--stages", "0,2", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["conditions"]["prompts"] == 3


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--sampler", "tpee"], ("'tpee'", "'tpe'")),
        (["--stages", "0,x"], ("--stages", "'0,x'")),
        (["--stages", "2,1"], ("--stages", "'2,1'")),
        (["--stages=-1,1"], ("--stages", "'-1,1'")),
        (["--keep", "2"], ("keep 2.0",)),
        (["--data", "none.jsonl"], ("--data", "none.jsonl")),
    ],
)
def test_wrong_commands_are_one_line(folder, data, empty_folder, capsys, options, named):
    refuses(capsys, command(folder, data, *options), *named, read=last_line)
    assert not list(Path().glob("*.json*"))


def test_a_text_model_is_refused(checkpoint, data, empty_folder, capsys):
    refuses(capsys, command(checkpoint(), data), "'llama'", read=last_line)


# ---- samples ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processor(folder):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)


def ids(samples):
    return [sample["input_ids"][0].tolist() for sample in samples]


def test_samples_are_a_seeded_choice_in_the_order_of_the_file(processor, data):
    everything = ids(read_samples(data, processor, 10))
    assert [row[-3:] for row in everything] == [[n + 10, 11, 12] for n in range(4)]
    chosen = [ids(read_samples(data, processor, 2, seed=seed)) for seed in range(8)]
    assert chosen[0] == ids(read_samples(data, processor, 2, seed=0))
    assert len({str(rows) for rows in chosen}) > 1
    assert all(rows == [row for row in everything if row in rows] for rows in chosen)


def test_every_image_has_a_placeholder_in_the_prompt(processor, data):
    path = data.with_name("two.jsonl")
    pair = {"image": ["pictures/0.png", "pictures/1.png"], "prompt": "w5"}
    placed = {"image": "pictures/0.png", "prompt": "w7 <image> w8"}
    path.write_text(json.dumps(pair) + "\n\n" + json.dumps(placed) + "\n")
    two, one = read_samples(path, processor, 5)
    assert ids([two, one]) == [[90] * 72 + [5], [7] + [90] * 36 + [8]]
    assert two["pixel_values"].shape[0] == 2


def test_a_chat_template_makes_a_turn(tmp_path, data):
    from transformers import AutoProcessor

    template = (
        "w20 {% for part in messages[0]['content'] %}{{ '<image> ' if part['type'] == 'image' "
        "else part['text'] }}{% endfor %}{% if add_generation_prompt %} w21{% endif %}"
    )
    processor = AutoProcessor.from_pretrained(tiny_folder(tmp_path / "m", chat_template=template))
    rows = ids(read_samples(data, processor, 1, seed=0))
    assert rows[0][0] == 20 and rows[0][1:37] == [90] * 36 and rows[0][-3:] == [11, 12, 21]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "JSON"),
        ('{"image": "pictures/0.png"}', '"prompt"'),
        ('{"image": 3, "prompt": "w5"}', "found 3"),
        ('{"image": [], "prompt": "w5"}', "found []"),
        ('{"image": "pictures/0.png", "prompt": "<image> <image>"}', "found 2"),
        ('{"image": ["pictures/0.png", "pictures/1.png"], "prompt": "<image>"}', "found 1"),
        ('{"image": "gone.png", "prompt": "w5"}', "image gone.png"),
        ('{"image": "samples.jsonl", "prompt": "w5"}', "image samples.jsonl"),
    ],
)
def test_wrong_lines_are_named(processor, data, line, named):
    path = data.with_name("wrong.jsonl")
    path.write_text('{"image": "pictures/0.png", "prompt": "w5"}\n' + line + "\n")
    with refused(UsageError, f"{path}:2: ", named):
        read_samples(path, processor, 5)
