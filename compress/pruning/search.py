"""Finds a pruning strategy for one model: the numbers that change its last state least.

For prompts x, h(x) the last token's state after the last layer (and final norm), and a strategy s,

    maximise  mean_x cos( h(x), h_s(x) )

over the shares of the stages, the voters' threshold t, the entropy's weight and the recycling
cell a, at one budget, which every trial keeps exactly (`compress.pruning.feasible`). h(x) is
computed once. No labels are needed. arXiv 2508.05211, section 3.3, algorithm 1: 30 prompts, 50
trials.

Each trial is proposed by a sampler of its own, seeded by the trial's number, from the trials before
it: a search that was interrupted goes on as if it had not been.

Of several ranks each has some of the prompts, and the first one the file. A cosine is that of its
prompt alone, and their sum exact: trials are those of one process, to the bit.

    found = search_strategy(model, samples, keep=0.25, path="trials.jsonl")
    found.strategy.save("strategy.json")
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.errors import CompressError, UsageError, did_you_mean, import_package, unknown
from compress.models.vision import Inputs, on_device
from compress.observer import Observer
from compress.pruning.engine import prune_visual_tokens
from compress.pruning.feasible import FeasibleSet, ratios_of
from compress.pruning.tower import Processor, VisualTokens
from compress.pruning.trials import Trial, TrialFile
from compress.ranks import Ranks
from compress.recipe.pruning import PruneVisualTokens
from compress.recipe.strategy import NEW_NAMES, PruneStrategy
from compress.storage.lease import file_lease

if TYPE_CHECKING:
    from optuna.distributions import FloatDistribution  # of the extra `vision`

SAMPLERS = ("tpe", "gp")
STARTUP = 27  # trials drawn at random before the sampler learns from them, as the authors' code has
# Multiples of the mean attention: at 0.25 nearly every patch votes, at 50 a few of 729; the
# published strategies have 29 to 39 there, and smaller towers need less, hence a log scale.
VOTER_THRESHOLDS = (0.25, 50.0)
# Votes and softmax of the entropies both sum to 1 over a crop, so 1 weighs them the same.
ENTROPY_WEIGHTS = (0.0, 1.0)
# optuna's GP sampler orders its dimensions by name: under these it proposes what it always has.
OPTUNA_NAMES = {new: old for old, new in NEW_NAMES.items()}


class SearchConditions(TypedDict):
    """What a score depends on."""

    model: str
    layers: int
    prompts: int
    images: int
    visual_tokens: int
    dtype: str
    device: str
    variables: list[str]
    sampler: str
    seed: int


@dataclass(frozen=True)
class SearchResult:
    """What a search has found.

    Attributes:
        strategy: the best one.
        score: its mean cosine.
        keep: the budget that all trials keep.
        trials: all of them, in order.
    """

    strategy: PruneStrategy
    score: float
    keep: float
    trials: list[Trial] = field(repr=False)
    conditions: SearchConditions

    def as_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return asdict(self) | {"strategy": self.strategy.model_dump(mode="json")}


def search_strategy(
    model: PreTrainedModel,
    samples: Sequence[Inputs],
    keep: float,
    *,
    start: PruneStrategy | None = None,
    variables: Sequence[str] | None = None,
    trials: int = 50,
    sampler: str = "tpe",
    seed: int = 0,
    path: str | Path | None = None,
    processor: Processor | None = None,
    observer: Observer | None = None,
    ranks: Ranks | None = None,
) -> SearchResult:
    """Searches the strategy that keeps the share `keep` and changes the last state least.

    Args:
        model: as for `prune_visual_tokens`.
        samples: keyword arguments of a forward each, a prompt with images; a batch counts as its
            rows and must be padded on the left.
        keep: share of the visual tokens that stay, averaged over layers.
        start: what is not searched, stages above all; None: `PruneStrategy.for_budget`'s.
        variables: which of ratios, voter_threshold, entropy_weight, cell are searched; None: all
            that the method reads.
        trials: how many in all, those of an earlier search in `path` included.
        sampler: `tpe` or `gp` of optuna.
        seed: of the sampler.
        path: a file of JSON lines for the trials, which the search goes on from; None: none.
        processor: as for `prune_visual_tokens`.
        observer: is told of each sample of this rank, and each trial.
        ranks: share the samples of every trial; each is given all of them, and all end with the
            same result. None: there is one.

    Raises:
        UsageError: nothing to search, a budget that cannot be met, a file of another search, or one
            that another process adds to; ranks that were given different things.
        CompressError: a state is not finite.
    """
    check_search(keep, trials, sampler)
    observer, ranks = observer or Observer(), ranks or Ranks()
    given = [keep, start and start.model_dump(mode="json"), variables, trials, sampler, seed]
    ranks.check_alike(_mark(model, samples, given), "model, samples or settings of the search")
    objective = Objective(model, samples, processor, observer, ranks)
    space = SearchSpace(objective, keep, start, variables)
    settings = {
        "keep": keep,
        "start": space.start.model_dump(mode="json"),
        "variables": list(space.variables),
        "sampler": sampler,
        "seed": seed,
    }
    fingerprint = objective.fingerprint()
    own = path if ranks.first else None
    with nullcontext() if own is None else file_lease(Path(own)):
        file = TrialFile.open(own, settings, fingerprint)
        left = ranks.tell(lambda: [asdict(trial) for trial in file.trials[:trials]])
        done = [Trial(**trial) for trial in left]
        if done:
            observer.resumed(len(done))
        while len(done) < trials:
            parameters = ranks.tell(lambda: _propose(space, done, sampler, seed))
            strategy = space.strategy(parameters)
            score = objective(strategy)
            trial = Trial(len(done), parameters, strategy.model_dump(mode="json"), score)
            file.append(trial)
            done.append(trial)
            observer.trial(len(done), trials, trial.score, _best(done).score)
    best = _best(done)
    return SearchResult(
        strategy=PruneStrategy.from_dict(best.strategy, f"trial {best.trial}"),
        score=best.score,
        keep=keep,
        trials=done,
        conditions={
            "model": type(model).__name__,
            "layers": objective.layers,
            "prompts": objective.prompts,
            "images": len(objective.images),
            "visual_tokens": sum(map(len, objective.images)),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "variables": list(space.variables),
            "sampler": sampler,
            "seed": seed,
        },
    )


def search_as_told(
    section: PruneVisualTokens,
    start: PruneStrategy,
    model: PreTrainedModel,
    samples: Sequence[Inputs],
    path: Path,
    processor: Processor,
    observer: Observer | None = None,
    ranks: Ranks | None = None,
) -> SearchResult:
    """`search_strategy` with the settings of a recipe's `search`; `start`: what is not searched."""
    assert section.search is not None and section.keep is not None
    return search_strategy(
        model,
        samples,
        section.keep,
        start=start,
        variables=section.search.variables,
        trials=section.search.trials,
        sampler=section.search.sampler,
        seed=section.search.seed,
        path=path,
        processor=processor,
        observer=observer,
        ranks=ranks,
    )


def check_search(keep: float, trials: int, sampler: str) -> None:
    """UsageError for what `search_strategy` refuses, before a model is loaded for it."""
    if not 0 < keep < 1:
        raise UsageError(f"expected a budget between 0 and 1 to search at, found keep {keep}")
    if trials < 1:
        raise UsageError(f"expected at least one trial, found {trials}")
    if sampler not in SAMPLERS:
        raise UsageError(unknown("sampler", sampler, SAMPLERS))
    _optuna()


class Objective:
    """Mean cosine between pruned and unpruned last states; the unpruned run happens here, once.

    Attributes:
        states: [B, D] fp64 of each sample that is this rank's, unpruned; by its number.
        prompts: of all ranks; a sample may be a batch of them.
        images: where the visual tokens of all images of all ranks lie.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        samples: Sequence[Inputs],
        processor: Processor | None = None,
        observer: Observer | None = None,
        ranks: Ranks | None = None,
    ):
        if not samples:
            raise UsageError("expected samples to search with, found none")
        self.model, self.processor, self.ranks = model, processor, ranks or Ranks()
        share = self.ranks.share(len(samples))
        self.samples = {number: on_device(samples[number], model.device) for number in share}
        self.states: dict[int, Tensor] = {}
        images: dict[int, list[VisualTokens]] = {}
        # A strategy that keeps all and reads nothing: the run is the plain one, to the bit.
        everything = PruneStrategy(method="uniform", ratios=(1.0,))
        with prune_visual_tokens(model, everything) as context:
            self.layers = len(context.layers)
            for number, sample in self.samples.items():
                states = self.states[number] = self._last_state(sample, number)
                assert context.last is not None  # the prompt of that forward
                seen = context.last.images
                if len({image.row for image in seen}) < len(states):
                    raise UsageError(f"sample {number} has a prompt without an image: leave it out")
                images[number] = [image.tokens for image in seen]
                if observer:
                    observer.sample(len(self.states), len(self.samples))
        self.prompts = sum(self.ranks.collect(sum(map(len, self.states.values()))))
        self.images = _of_all(images, self.ranks)

    def __call__(self, strategy: PruneStrategy) -> float:
        cosines: list[float] = []
        with prune_visual_tokens(self.model, strategy, self.processor) as pruning:
            pruning.warns = False  # a trial may well go too far
            for number, sample in self.samples.items():
                pruning.draw_for(number)
                states = self._last_state(sample, number)
                cosine = torch.cosine_similarity(states, self.states[number], dim=-1)
                cosines += cosine.tolist()
        found = [value for own in self.ranks.collect(cosines) for value in own]
        return math.fsum(found) / len(found)

    def fingerprint(self) -> list[float]:
        """One number a prompt, about 1 in size, that another model or prompt does not share."""
        found: list[float] = []
        for states in self.states.values():
            width, draw = states.shape[1], torch.Generator().manual_seed(0)
            direction = torch.randn(width, generator=draw).to(states)
            cosine = torch.cosine_similarity(states, direction[None], dim=-1)
            found += (cosine * math.sqrt(width)).tolist()
        return [value for own in self.ranks.collect(found) for value in own]

    @torch.no_grad()
    def _last_state(self, sample: Inputs, number: int) -> Tensor:
        """[B, D] fp64 of one sample, after the final norm; no logits are computed."""
        mask = sample.get("attention_mask")
        if mask is not None and not bool(mask[:, -1].all()):
            raise UsageError(f"sample {number} is padded on the right: pad it on the left")
        state = self.model.model(**sample, use_cache=False).last_hidden_state[:, -1].double()
        if not bool(state.isfinite().all()):
            raise CompressError(
                f"sample {number}: the last state is not finite in {self.model.dtype}: load the "
                "model in a wider type"
            )
        return state


def _mark(model: PreTrainedModel, samples: Sequence[Inputs], given: Sequence[object]) -> str:
    """Tells one search from another: a value of each tensor, all of the samples, and settings."""
    digest = hashlib.sha256(json.dumps(given).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.flatten()[:1].tolist()}".encode())
    for sample in samples:
        for name, value in sample.items():
            digest.update(name.encode())
            if isinstance(value, Tensor):
                digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _of_all(own: Mapping[int, Sequence[VisualTokens]], ranks: Ranks) -> list[VisualTokens]:
    """The images of all ranks, in the order of the samples; `own`: those of this one's, by number.

    Only what tensors say of their tokens.
    """
    named = {
        f"{number}.{image}.{name}": value
        for number, images in own.items()
        for image, tokens in enumerate(images)
        for name, value in vars(tokens).items()
        if isinstance(value, Tensor)
    }
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for place, value in ranks.gather(named).items():
        number, image, name = place.split(".")
        found.setdefault((int(number), int(image)), {})[name] = value
    return [VisualTokens(**found[place]) for place in sorted(found)]


class SearchSpace:
    """What is searched: parameters of the sampler become a strategy that keeps the budget.

    Parameters are `share_s`, where the share after stage s lies between the least and the most that
    the budget allows, `cell` likewise, both in [0, 1]; `voter_threshold` and `entropy_weight` as
    they are.
    """

    def __init__(
        self,
        objective: Objective,
        keep: float,
        start: PruneStrategy | None,
        variables: Sequence[str] | None,
    ):
        layers = objective.layers
        self.start = start or PruneStrategy.for_budget("vflowopt", keep, layers)
        self.start.average_kept(layers)  # refuses a stage beyond the last layer
        self.variables = search_variables(self.start, variables)
        self.feasible = FeasibleSet(
            keep=keep,
            stages=self.start.stages,
            layers=layers,
            images=objective.images,
            protect_newlines=self.start.protect_newlines,
            cell=self.start.cell,
            recycle="cell" in self.variables,
        )
        self.shares: list[float] | None = None  # if they are not searched
        if "ratios" not in self.variables:
            kept = self.start.average_kept(layers)
            if not math.isclose(kept, keep, rel_tol=1e-6):
                raise UsageError(
                    f"the given ratios keep {kept:.4g} on average, not {keep:.4g}: search "
                    "`ratios` too, or give others"
                )
            ratios = self.start.ratios
            self.shares = [math.prod(ratios[: i + 1]) for i in range(len(ratios))]
            self.feasible.check(self.shares)

    def distributions(self) -> "dict[str, FloatDistribution]":
        """optuna's, by parameter; the order is fixed."""
        from optuna.distributions import FloatDistribution  # of the extra `vision`

        found: dict[str, FloatDistribution] = {}
        if "ratios" in self.variables:
            for stage in range(self.feasible.dimensions):
                found[f"share_{stage}"] = FloatDistribution(0, 1)
        if "voter_threshold" in self.variables:
            found["voter_threshold"] = FloatDistribution(*VOTER_THRESHOLDS, log=True)
        if "entropy_weight" in self.variables:
            found["entropy_weight"] = FloatDistribution(*ENTROPY_WEIGHTS)
        if "cell" in self.variables:
            found["cell"] = FloatDistribution(0, 1)
        return found

    def strategy(self, parameters: Mapping[str, float]) -> PruneStrategy:
        """The strategy at a point of the space; it keeps the budget, and fits every sample."""
        settings: dict[str, object] = {}
        shares = self.shares
        if shares is None:
            positions = [parameters[f"share_{s}"] for s in range(self.feasible.dimensions)]
            shares = self.feasible.shares(positions)
            settings["ratios"] = ratios_of(shares)
        if "cell" in self.variables:
            settings["cell"] = self.feasible.cell(parameters["cell"], shares[0])
        as_they_are = ("voter_threshold", "entropy_weight")
        settings |= {name: parameters[name] for name in as_they_are if name in parameters}
        return PruneStrategy(**self.start.model_dump() | settings)


def search_variables(start: PruneStrategy, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """The variables that are searched, in a fixed order; `wanted` None: all that can be.

    Raises UsageError if one of `wanted` cannot be searched, or there is nothing to search.
    """
    possible = [
        name
        for name, there in {
            "ratios": len(start.stages) > 1,
            "voter_threshold": start.method == "vflowopt" and start.voter_quantile is None,
            "entropy_weight": start.method == "vflowopt",
            "cell": start.method == "vflowopt" and start.stages[0] == 0,
        }.items()
        if there
    ]
    stages = f"{start.method} with stages {list(start.stages)}"
    for name in wanted or ():
        if name not in possible:
            near = did_you_mean(name, possible)
            raise UsageError(
                f"{name!r} cannot be searched for {stages}{near}: expected one of "
                f"{', '.join(possible) or 'none'}"
            )
    chosen = tuple(name for name in possible if wanted is None or name in wanted)
    if not chosen:
        raise UsageError(f"nothing to search for {stages}: give more stages, or another method")
    return chosen


def _propose(
    space: SearchSpace, done: Sequence[Trial], sampler: str, seed: int
) -> dict[str, float]:
    """The next parameters: they depend on the trials so far, the seed and the trial's number."""
    optuna = _optuna()
    # A seed each: a sampler that has drawn before cannot be had again when a search is resumed.
    number = int(np.random.SeedSequence([seed, len(done)]).generate_state(1)[0])
    kind = {"tpe": optuna.samplers.TPESampler, "gp": optuna.samplers.GPSampler}[sampler]
    names = {name: OPTUNA_NAMES.get(name, name) for name in space.distributions()}
    distributions = {names[name]: value for name, value in space.distributions().items()}
    with _quiet(optuna):
        study = optuna.create_study(
            direction="maximize", sampler=kind(seed=number, n_startup_trials=STARTUP)
        )
        for trial in done:
            study.add_trial(
                optuna.trial.create_trial(
                    params={names[name]: value for name, value in trial.parameters.items()},
                    distributions=distributions,
                    value=trial.score,
                )
            )
        proposed = study.ask(distributions).params
    return {name: proposed[theirs] for name, theirs in names.items()}


def _best(trials: Sequence[Trial]) -> Trial:
    return max(trials, key=lambda trial: (trial.score, -trial.trial))


def _optuna() -> ModuleType:
    return import_package("optuna", "the search")


@contextmanager
def _quiet(optuna: ModuleType) -> Iterator[None]:
    """Without what optuna logs: new studies, and a package that would make `gp` faster."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
