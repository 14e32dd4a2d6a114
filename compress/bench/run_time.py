"""`modelpress plan --time`: how long a run's layers will take here, from pieces of their work.

Each kind of work is done once, in the shapes of the model and by the code that a run has, and
counted up:

    products      1,024 tokens through each linear that calibration data passes
    attention     of as many tokens; and its maps, where attention concentration weighs tokens
    hessians      of as many tokens, of each input that several linears may share
    solves        factor, column loop, sweeps and rounding to nearest: so many rows of each group
    between       norms, activations and sums of the residual stream

What would take seconds by itself is done smaller: fewer rows or columns, at the same rate.

    forecast = time_forecast(RunInputs.foretell(recipe))
    forecast.seconds, forecast.parts["solves"]

Not in it: reading, rotating and writing weights, checks of the source and the result, scores of
`allocate`, search of a pruning strategy, downloads and evaluation.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch.nn import functional

from compress.bench.clock import Stopwatch
from compress.data.activations import TOKENS_PER_BATCH
from compress.importance.tokens import attention_concentration
from compress.kernels.cpu import native
from compress.models.families import experts_per_token, head_dim_of
from compress.models.family_specs import LayerSpec
from compress.pipeline.inputs import RunInputs
from compress.pipeline.pruning_forecast import calibration_tokens
from compress.quantization.grid import UniformGrid
from compress.quantization.hessian import Hessian
from compress.quantization.solvers import Solver, Target, make_solver, rows_at_a_time
from compress.scheme import Scheme

MOST_COLUMNS = 2048  # of a Hessian that is made and factored; larger ones are reckoned from it
MOST_WEIGHTS = 1 << 22  # of a product
MOST_WORK = 1 << 30  # rows x columns^2 of a solve
REPEATS = 3  # of what takes less than half a second


@dataclass(frozen=True)
class TimeForecast:
    """Seconds of a run's layers and head, by kind of work, and what it took to find out."""

    seconds: float
    parts: dict[str, float]
    measuring: float

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def time_forecast(inputs: RunInputs) -> TimeForecast:
    """Does each kind of work once, a few seconds in all, on the device of the run."""
    with Stopwatch(inputs.device) as watch, torch.inference_mode():
        parts = _Pieces(inputs).parts()
    return TimeForecast(sum(parts.values()), parts, watch.seconds)


class _Pieces:
    """Pieces of a run's work, each timed when it is first asked for."""

    def __init__(self, inputs: RunInputs):
        self.inputs, self.recipe = inputs, inputs.recipe
        self.device, self.config = inputs.device, inputs.skeleton.config
        self.solver: Solver | None = make_solver(self.recipe.quantize)
        self.known: dict[tuple[object, ...], float] = {}
        self.generator = torch.Generator(self.device).manual_seed(0)
        used = inputs.source.used
        self.tokens = calibration_tokens(inputs.source, inputs.skeleton) if used else 0
        self.batches = self.tokens / TOKENS_PER_BATCH
        self.drifts = self.recipe.quantize.target.name == "full_precision"
        if self.solver is not None and self.device == "cpu":
            native.kernels()  # which takes seconds where they are not compiled yet

    def parts(self) -> dict[str, float]:
        """Seconds by kind of work, over all layers and the head."""
        skeleton, total = self.inputs.skeleton, defaultdict[str, float](float)
        parameters = dict(skeleton.model.named_parameters(remove_duplicate=False))
        for index in range(skeleton.num_layers):
            kind, prefix = skeleton.spec.layer(index), f"{skeleton.spec.layers}.{index}."
            shapes = {n: parameters[f"{prefix}{n}.weight"].shape for n in kind.linears}
            schemes = {
                name: self.recipe.quantize.scheme_for(prefix + name, shape[1])
                for name, shape in shapes.items()
            }
            for name, seconds in self._layer(kind, shapes, schemes).items():
                total[name] += seconds
        if self.recipe.quantize.head is not None and not self._shares_table():
            rows, columns = parameters[f"{skeleton.spec.head}.weight"].shape
            scheme = self.recipe.quantize.head.scheme(columns)
            if self.solver is not None and self.solver.needs_hessian:
                total["hessians"] += self.batches * self._hessian(columns)
                total["solves"] += self._factor(columns)
            total["solves"] += self._solve(rows, columns, scheme)
        return dict(total)

    def _shares_table(self) -> bool:
        """Whether the head is the embedding, which is rounded to nearest."""
        return self.recipe.rotate.kind == "none" and self.config.tie_word_embeddings

    def _layer(
        self,
        kind: LayerSpec,
        shapes: dict[str, torch.Size],
        schemes: dict[str, Scheme | None],
    ) -> dict[str, float]:
        found = defaultdict[str, float](float)
        experts = set(kind.experts.groups) if kind.experts else set()
        chosen = experts_per_token(self.config)
        passes = 2 if self.drifts else 1
        for group in kind.groups:
            share = chosen / kind.experts.count if kind.experts and group in experts else 1.0
            batches = self.batches * share
            columns = shapes[group[0]][1]
            for name in group:
                found["products"] += passes * batches * self._product(*shapes[name])
            stacks: Counter[Scheme] = Counter()
            for name in group:
                if (scheme := schemes[name]) is not None:
                    stacks[scheme] += shapes[name][0]
            if not stacks or self.solver is None:
                continue
            if self.solver.needs_hessian:
                found["hessians"] += batches * self._hessian(columns)
                found["solves"] += self._factor(columns)
            for scheme, rows in stacks.items():
                found["solves"] += self._solve(rows, columns, scheme)
        if self.tokens:
            wide = shapes[kind.mlp_out][1] if kind.mlp_out else shapes[kind.output][1]
            found["attention"] += self.batches * self._attention(passes)
            found["between"] += passes * self.batches * self._between(wide)
        return found

    # ---- the pieces ---------------------------------------------------------------------------

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, generator=self.generator)

    def _timed(self, key: tuple[object, ...], prepare: Callable[[], Callable[[], object]]) -> float:
        """Seconds of what `prepare` gives; of this key only once."""
        if key not in self.known:
            work, taken = prepare(), []
            for _ in range(REPEATS):
                with Stopwatch(self.device) as watch:
                    work()
                taken.append(watch.seconds)
                if watch.seconds > 0.5:
                    break
            self.known[key] = min(taken)
        return self.known[key]

    def _product(self, rows: int, columns: int) -> float:
        """Of a batch and a linear."""
        if not self.tokens:
            return 0.0
        done = min(rows, max(1, MOST_WEIGHTS // columns))

        def prepare() -> Callable[[], object]:
            x, W = self._random(TOKENS_PER_BATCH, columns), self._random(done, columns)
            return lambda: functional.linear(x, W)

        return self._timed(("product", done, columns), prepare) * rows / done

    def _hessian(self, columns: int) -> float:
        """Of a batch; with the drift from the 16-bit model, where that is the target."""
        done = min(columns, MOST_COLUMNS)

        def prepare() -> Callable[[], object]:
            H = Hessian(done, self.device, self.drifts)
            x = self._random(1, TOKENS_PER_BATCH, done)
            x0 = x + 0.01 if self.drifts else None
            weights = torch.ones(1, TOKENS_PER_BATCH, device=self.device)
            return lambda: H.add_batch(x, weights, x0)

        return self._timed(("hessian", done), prepare) * (columns / done) ** 2

    def _matrix(self, columns: int) -> torch.Tensor:
        x = self._random(columns + columns // 8 + 1, columns)
        x *= torch.logspace(0, -1.5, columns, device=self.device)  # some inputs are larger
        return x.T @ x

    def _factor(self, columns: int) -> float:
        """Of the Hessian of a group."""
        done, solver = min(columns, MOST_COLUMNS), self.solver
        assert solver is not None

        def prepare() -> Callable[[], object]:
            H = self._matrix(done)
            return lambda: solver.prepare(H.clone())

        return self._timed(("factor", done), prepare) * (columns / done) ** 3

    def _solve(self, rows: int, columns: int, scheme: Scheme) -> float:
        """Of a stack of rows, and their rounding to nearest."""
        solver = self.solver
        if solver is None:
            return 0.0
        width = min(columns, MOST_COLUMNS)
        some = min(rows_at_a_time(rows, columns, self.inputs.device.partition(":")[0]), rows)
        done = min(some, max(1, MOST_WORK // width**2))

        def prepare() -> Callable[[], object]:
            W, size = self._random(done, width), scheme.group_size
            size = size if size is None or width % size == 0 else None
            grid = UniformGrid(scheme.bits, scheme.symmetric, self.inputs.dtype)
            statistics = solver.prepare(self._matrix(width)) if solver.needs_hessian else None
            drift = self._random(width, width), self._matrix(width)

            def solve() -> None:
                target = Target.of(W, *drift) if self.drifts else None
                solver.solve(W, statistics, grid, size, target)
                solver.alternative(W, statistics, grid, size, target)

            return solve

        power = 2 if solver.needs_hessian else 1
        key = ("solve", done, width, scheme.bits, scheme.symmetric, scheme.group_size)
        return self._timed(key, prepare) * rows / done * (columns / width) ** power

    def _attention(self, passes: int) -> float:
        """Of a batch, `passes` times, and once its maps where these weigh tokens."""
        config, length = self.config, self.recipe.calibration.length
        windows, size = max(1, TOKENS_PER_BATCH // length), head_dim_of(config)
        heads = config.num_attention_heads
        kv = getattr(config, "num_key_value_heads", None) or heads

        def operands() -> tuple[torch.Tensor, torch.Tensor]:
            q = self._random(windows, heads, length, size)
            return q, self._random(windows, kv, length, size)

        def attention() -> Callable[[], object]:
            q, k = operands()
            k = k.repeat_interleave(heads // kv, dim=1)
            return lambda: functional.scaled_dot_product_attention(q, k, k, is_causal=True)

        def maps() -> Callable[[], object]:
            q, k = operands()
            return lambda: attention_concentration(q, k, 1 / math.sqrt(size))

        share = TOKENS_PER_BATCH / (windows * length)
        seconds = passes * self._timed(("attention",), attention)
        if self._weighs_by_maps():
            seconds += self._timed(("maps",), maps)
        return share * seconds

    def _weighs_by_maps(self) -> bool:
        importance = self.recipe.quantize.token_importance
        return importance.name == "attention_concentration" and self.recipe.calibrates

    def _between(self, wide: int) -> float:
        """Of a batch: two norms, an activation as wide as the MLP, two sums."""
        hidden = self.config.hidden_size

        def prepare() -> Callable[[], object]:
            x, gain = self._random(TOKENS_PER_BATCH, hidden), self._random(hidden)
            gate, up = self._random(TOKENS_PER_BATCH, wide), self._random(TOKENS_PER_BATCH, wide)

            def work() -> None:
                for _ in range(2):
                    x.add(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * gain)
                functional.silu(gate).mul_(up)

            return work

        return self._timed(("between", wide), prepare)
