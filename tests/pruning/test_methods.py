"""The methods on one image: exact counts for all, and what each is meant to prefer."""

import pytest
import torch
from torch.nn.functional import avg_pool2d, normalize

from compress.errors import UsageError
from compress.pruning import baselines
from compress.pruning.baselines import block_grid, share_out
from compress.pruning.crop_towers import anyres_places
from compress.pruning.engine import prune_visual_tokens
from compress.pruning.methods import PRUNING_METHODS, Candidates, keep_highest
from compress.pruning.tower import VisualTokens
from compress.recipe.strategy import METHODS, PruneStrategy
from support.refusals import refused
from support.tiny_models import tiny_inputs, tiny_model

HEIGHT, WIDTH, D = 6, 8, 16
N = HEIGHT * WIDTH


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def candidates(newlines=False, stage=0, **tokens):
    """An image of 6 x 8 tokens; with newlines, a 2 x 2 overview and 6 rows of 7 and a newline."""
    index = torch.arange(N)
    place = (torch.zeros(N, dtype=torch.long), index // WIDTH, index % WIDTH)
    if newlines:
        flags = torch.zeros(4 + N, dtype=torch.bool)
        flags[4:] = index % WIDTH == WIDTH - 1
        place = anyres_places(flags, side=2, several=True)
    n = len(place[0])
    signals = {"importance": torch.rand(n), "attention": torch.rand(n), "keys": torch.randn(n, D)}
    visual = VisualTokens(*place, **signals | tokens)
    return Candidates(
        features=torch.randn(n, D),
        tokens=visual,
        protected=visual.newline.clone(),
        stage=stage,
        generator=torch.Generator().manual_seed(3),
        language_attention=torch.rand(n),
    )


def method(name, **settings):
    stages = (1,) if name in ("fastv", "pyramiddrop") else (0,)
    return PRUNING_METHODS[name](PruneStrategy(method=name, stages=stages, **settings))


def test_every_method_of_a_strategy_exists():
    assert set(PRUNING_METHODS) == set(METHODS)


@pytest.mark.parametrize("newlines", ["none", "protected", "pruned"])
@pytest.mark.parametrize("name", [*METHODS, "recycling"])
def test_every_count_is_met_exactly_and_protected_tokens_stay(name, newlines):
    chooser = method("vflowopt", cell=4.0) if name == "recycling" else method(name)
    image = candidates(newlines != "none")
    if newlines == "pruned":
        image.protected.fill_(False)
    least = int(image.protected.sum()) + (8 if name == "recycling" else 1)
    for count in range(least, len(image.protected)):
        selection = chooser.select(image, count)
        assert selection.kept.shape == (count,)
        assert (selection.kept.diff() > 0).all()
        kept = torch.zeros_like(image.protected)
        kept[selection.kept] = True
        assert kept[image.protected].all()
        assert kept[selection.merged].all()
        assert not image.protected[selection.merged].any()
        if selection.values is not None:
            assert selection.values.shape == (len(selection.merged), D)
    too_few = int(image.protected.sum()) - 1
    if newlines == "protected":
        with refused(UsageError, "6 newline", "protect_newlines"):
            chooser.select(image, too_few)


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_gives_the_same_choice_and_only_random_another(name):
    image = candidates()
    first, other = (method(name).select(image, 13).kept for _ in range(2))
    assert torch.equal(first, other) == (name != "random")
    image.generator.manual_seed(3)
    assert torch.equal(first, method(name).select(image, 13).kept)


def test_of_equal_scores_the_first_stay():
    nothing = torch.zeros(5, dtype=torch.bool)
    assert keep_highest(torch.tensor([1.0, 2, 1, 1, 2]), 3, nothing).tolist() == [0, 1, 4]


def test_vflowopt_keeps_the_most_important_and_recycles_only_at_the_first_stage():
    image = candidates()
    kept = method("vflowopt", cell=4.0).select(candidates(stage=1), 20)
    assert kept.values is None
    selection = method("vflowopt").select(image, 20)
    best = image.tokens.importance.topk(20).indices.sort().values
    assert torch.equal(selection.kept, best)


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop"])
def test_language_methods_keep_what_the_last_token_attends_to(name):
    image = candidates()
    best = image.language_attention.topk(9).indices.sort().values
    assert torch.equal(method(name).select(image, 9).kept, best)


def test_uniform_is_evenly_spaced_and_symmetric():
    kept = method("uniform").select(candidates(), 12).kept
    assert set(kept.diff().tolist()) == {4}
    gaps = method("uniform").select(candidates(), 7).kept.diff()
    assert int(gaps.max() - gaps.min()) <= 1


def test_pooling_equals_average_pooling_where_blocks_divide_the_grid():
    image = candidates()
    selection = method("pooling").select(image, N // 4)
    blocks = avg_pool2d(image.features.T.view(D, HEIGHT, WIDTH), 2)
    for place, value in zip(selection.merged.tolist(), selection.values, strict=True):
        row, column = divmod(place, WIDTH)
        torch.testing.assert_close(value, blocks[:, row // 2, column // 2])


@pytest.mark.parametrize(("height", "width"), [(1, 9), (6, 8), (7, 3)])
def test_grids_are_cut_into_any_number_of_non_empty_blocks(height, width):
    index = torch.arange(height * width)
    for blocks in range(1, height * width + 1):
        number = block_grid(index // width, index % width, blocks)
        assert sorted(number.unique().tolist()) == list(range(blocks))


def test_shares_are_proportional_and_add_up():
    assert share_out(10, [36, 36, 72]) == [3, 2, 5]
    for count in range(20):
        assert sum(share_out(count, [5, 11, 7])) == count


def test_visionzip_keeps_the_dominant_and_merges_the_rest_by_key():
    """Two kinds of keys among the rest: each contextual token is the mean of its own kind."""
    image = candidates()
    kind = torch.arange(N) % 2
    keys = torch.eye(D)[kind]
    image = candidates(keys=keys, attention=torch.arange(N, 0, -1).float())
    count = 13  # 2 contextual ones, at every 18th of the rest
    assert round(count * baselines.CONTEXTUAL_SHARE) == 2
    image.tokens.keys[11 + 18] = torch.eye(D)[1 - kind[11]]  # the second target, of the other kind
    selection = method("visionzip").select(image, count)
    assert selection.kept[:11].tolist() == list(range(11))
    labels = image.tokens.keys[:, 0]
    for place, value in zip(selection.merged.tolist(), selection.values, strict=True):
        members = [i for i in range(11, N) if labels[i] == labels[place]]
        torch.testing.assert_close(value, image.features[members].mean(0))


def test_visionzip_keeps_each_contextual_token_in_its_own_group():
    """Keys that are all alike: the first takes in the rest, the second is left as it was."""
    image = candidates(keys=torch.ones(N, D), attention=torch.arange(N, 0, -1).float())
    selection = method("visionzip").select(image, 13)
    first, second = selection.merged.tolist()
    others = [i for i in range(11, N) if i != second]
    torch.testing.assert_close(selection.values[0], image.features[others].mean(0))
    torch.testing.assert_close(selection.values[1], image.features[second])
    assert first == 11 and selection.kept.tolist() == [*range(11), first, second]


def test_divprune_equals_the_greedy_definition():
    image = candidates()
    unit = normalize(image.features, dim=-1)
    distance = 1 - unit @ unit.T
    first = (distance + 9 * torch.eye(N)).min(1).values.argmax()
    chosen = [int(first)]
    while len(chosen) < 10:
        gaps = [-1.0 if i in chosen else float(distance[i, chosen].min()) for i in range(N)]
        chosen.append(gaps.index(max(gaps)))
    assert method("divprune").select(image, 10).kept.tolist() == sorted(chosen)


def test_divprune_drops_duplicates_first():
    image = candidates()
    image.features[N // 2 :] = image.features[: N // 2]
    kept = method("divprune").select(image, N // 2).kept
    assert len({i % (N // 2) for i in kept.tolist()}) == N // 2


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen2_vl"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_last_token_attention_is_that_of_the_eager_kernel(family, side):
    model = tiny_model(family, "eager")
    rows = [[3, (20, 40), 5], [2, (24, 24), 9]]
    inputs = tiny_inputs(model, rows, side)
    strategy = PruneStrategy(method="fastv", stages=(2,), ratios=(0.3,))
    with prune_visual_tokens(model, strategy) as pruning:
        tap = pruning.attention[2]
        seen = []
        scores = tap.scores
        tap.scores = lambda valid: seen.append(scores(valid)) or seen[0]
        model(**inputs)
    weights = model(**inputs, output_attentions=True).attentions[1].mean(1)  # [B, L, L]
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        last = int(mask.nonzero()[-1])
        torch.testing.assert_close(seen[0][row][mask], weights[row, last][mask])
