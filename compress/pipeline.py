"""The run: a recipe and a model folder go in, a checkpoint that other engines load comes out.

    plan -> calibration windows -> embedding -> for each decoder layer, one at a time:
        read, fuse norms, rotate -> token weights -> Hessians -> solve -> pack -> part file, journal
    -> head -> shards, config, tokenizer, recipe, provenance -> reload in a fresh process and
    compare logits -> publish -> evaluate -> report and model card

Everything is written below OUT/.modelpress and moved to OUT at the end, config.json last, so OUT
holds a whole checkpoint or none. A run that was killed continues after its last finished layer and
ends with the same bytes.

    result = run(Recipe.load("recipes/demo-lm.yaml"), output="out")
"""

import time
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from compress.calibration.activations import ActivationStore, activations_on_disk
from compress.calibration.windows import CalibrationWindows, check_token_ids, recipe_windows
from compress.checkpoint.compressed_tensors import compress_module
from compress.checkpoint.journal import Journal
from compress.checkpoint.output import WORK_FOLDER, assemble, check_output, document, publish
from compress.checkpoint.safetensors_io import save_tensors
from compress.checkpoint.verify import reload_and_compare, write_probe
from compress.errors import CompressError, UsageError
from compress.evaluation import check_evaluation, evaluate_recipe
from compress.importance.tokens import count_tokens, effective_sample_size
from compress.memory import peak_memory, release_memory
from compress.models.skeleton import Skeleton
from compress.planning import (
    TOKENS_PER_BATCH,
    Plan,
    allocated_plan,
    make_plan,
    needs_calibration,
    storage_dtype,
)
from compress.provenance import fingerprint, provenance
from compress.quantization.hessian import Hessian
from compress.quantization.layer import TokenWeigher, run_layer, solve_group
from compress.quantization.solvers import SOLVERS, SolverSettings
from compress.recipe import Recipe
from compress.result import Observer, RunResult
from compress.rotation.rotate import (
    fuse_and_rotate_head,
    fuse_and_rotate_layer,
    head_rotation,
    make_rotation,
    rotate_embedding,
)


def run(
    recipe: Recipe,
    output: str | Path,
    *,
    device: str = "cpu",
    resume: bool = True,
    overwrite: bool = False,
    windows: CalibrationWindows | None = None,
    self_check: bool = True,
    observer: Observer | None = None,
) -> RunResult:
    """Compresses a model as the recipe says and writes it to the folder `output`.

    Args:
        device: where layers are computed, `cpu` or `cuda`.
        resume: continue a run of the same recipe, model and versions that was killed.
        overwrite: replace a checkpoint in `output`; it stays whole until the new one is.
        windows: calibration windows of your own, with a mask of the tokens that count, instead of
            the recipe's dataset.
        self_check: reload the result in a fresh process and compare logits before publishing it.

    Raises:
        UsageError: the recipe does not fit the model, or `output` holds something else.
        CompressError: a damaged checkpoint, a Hessian that cannot be factored, a failed self-check.
    """
    observer = observer or Observer()
    check_output(Path(output), overwrite)
    check_device(device)
    check_evaluation(recipe)
    observer.stage("plan")
    skeleton = Skeleton.open(recipe.model_location(), recipe.model.revision)
    if skeleton.folder.resolve() == Path(output).resolve():
        raise UsageError(f"output {output} is the model itself: choose another --output")
    plan = make_plan(recipe, skeleton)
    if plan.problems:
        more = f" (and {len(plan.problems) - 1} more: see `plan`)" if len(plan.problems) > 1 else ""
        raise UsageError(plan.problems[0] + more)
    started = time.perf_counter()
    if windows is None:
        observer.stage("calibration data")
        windows = recipe_windows(recipe, skeleton, needs_calibration(recipe))
    check_token_ids(windows, skeleton.config.vocab_size)
    mark = fingerprint(recipe, skeleton, windows, device)
    if recipe.allocate is not None:
        Journal(Path(output) / WORK_FOLDER, mark).open(resume, replace=overwrite)  # or refuse now
        plan = allocated_plan(
            recipe, skeleton, windows, Path(output) / WORK_FOLDER,
            identity=mark, resume=resume, device=device, observer=observer,
        )  # fmt: skip
    job = Job(recipe, skeleton, plan, Path(output), device, observer)
    job.started = started  # so that drawing the windows, and the scores, count
    try:
        with torch.no_grad():
            job.open(resume, overwrite, windows, mark)
            for note in plan.notes:
                job.warn(note)
            job.walk()
            job.finish_tensors()
            checked = job.assemble(self_check)
    except OSError as error:
        raise CompressError(f"{error.filename or output}: {error.strerror or error}") from error
    result = RunResult(
        path=job.output,
        plan=plan,
        metrics={},
        layers=job.facts,
        seconds=job.seconds,
        peak_memory=peak_memory(device),
        self_check=checked,
        warnings=job.warnings,
    )
    job.evaluate(result)
    job.document(result)
    return result


def check_device(device: str) -> None:
    """UsageError for a device that torch does not know or does not see."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {device!r} cannot be used here: {reason}") from error


class Job:
    """One run's state: what is open, where it writes, and what it has seen."""

    def __init__(
        self,
        recipe: Recipe,
        skeleton: Skeleton,
        plan: Plan,
        output: Path,
        device: str,
        observer: Observer,
    ):
        self.recipe, self.skeleton, self.plan = recipe, skeleton, plan
        self.output, self.device, self.observer = output, device, observer
        self.spec = skeleton.spec
        self.work = output / WORK_FOLDER
        self.dtype = storage_dtype(recipe, skeleton)
        self.solver = self._solver()
        self.residual = make_rotation(
            recipe.rotate.kind, skeleton.config.hidden_size, recipe.rotate.seed
        )
        self.heads = head_rotation(recipe.rotate.kind, skeleton.head_dim, recipe.rotate.seed)
        self.warnings: list[str] = []
        self.facts: list[dict[str, Any]] = []
        self.seconds: dict[str, float] = {}
        self.started = time.perf_counter()

    def _solver(self) -> Any:
        q = self.recipe.quantize
        if q.method == "none":
            return None
        settings = SolverSettings(q.clip_search, q.refine_sweeps, q.damping, q.act_order)
        return SOLVERS[q.method](settings)

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        self.observer.warning(text)

    def _lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.started
        self.started = now

    # ---- set up ---------------------------------------------------------------------------------

    def open(self, resume: bool, overwrite: bool, windows: CalibrationWindows, mark: str) -> None:
        """Opens the journal and puts the first layer's inputs in place."""
        self.windows = windows
        self.journal = Journal(self.work, mark)
        self.done = self.journal.open(resume, replace=overwrite)
        self.facts = self.journal.facts()
        for module in (module for layer in self.facts for module in layer["modules"]):
            self._report_oddities(module)
        T = self.windows.input_ids.shape[1]
        size = max(1, TOKENS_PER_BATCH // T)
        self.batches = list(
            zip(self.windows.input_ids.split(size), self.windows.mask.split(size), strict=True)
        )
        hidden = self.skeleton.config.hidden_size
        widest = max(module.shape[1] for module in self.plan.modules) if self.plan.modules else 0
        tokens = self.windows.input_ids.numel()
        offload = self.recipe.calibration.offload
        on_disk = activations_on_disk(offload, tokens * (hidden + widest) * 4)
        self.folder = self.work / "activations"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.on_disk = on_disk
        if self.done == 0:
            self._embed(hidden)
        else:
            shapes = [torch.Size([*ids.shape, hidden]) for ids, _ in self.batches]
            found = ActivationStore.found(*self._place(self.done), shapes)
            self.x = found if on_disk else found.in_memory()
        self._lap("calibration")

    def _embed(self, hidden: int) -> None:
        """Writes the embedding and looks up the calibration tokens in it."""
        embedding = self.skeleton.read(self.spec.embedding)
        if self.residual is not None:
            embedding = rotate_embedding(embedding, self.residual, dtype=self.dtype)
        name = f"{self.spec.embedding}.weight"
        embedding = self._stored(name, embedding)
        save_tensors(self.work / "embedding.safetensors", {name: embedding})
        self.x = ActivationStore(*(self._place(0) if self.on_disk else ()))
        for ids, _ in self.batches:
            self.x.append(embedding[ids].float())

    def _stored(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor in the dtype of the checkpoint, where its values must fit."""
        stored = tensor.to(self.dtype)
        if not stored.isfinite().all():
            raise CompressError(
                f"{name}: its values (up to {tensor.abs().max():.3g}) do not fit in "
                f"{str(self.dtype).removeprefix('torch.')}: choose another model.dtype"
            )
        return stored

    def _place(self, layer: int) -> tuple[Path, str]:
        """Where the inputs of a layer lie. Two sets of files take turns, so that those of a layer
        stay until the next one's are whole, and files are written over rather than made anew."""
        return self.folder, f"inputs-{layer % 2}"

    # ---- the walk -------------------------------------------------------------------------------

    def walk(self) -> None:
        """All decoder layers, from the first that the journal does not have."""
        q = self.recipe.quantize
        t = q.token_importance
        vocabulary = self.skeleton.config.vocab_size
        self.weigher = TokenWeigher(
            t.name, t.minimum, t.maximum, t.power, self.batches,
            count_tokens(self.windows.input_ids, self.windows.mask, vocabulary),
        )  # fmt: skip
        total = len(self.plan.layers)
        self.observer.stage("layers")
        for index in range(self.done, total):
            self.observer.layers(index, total)
            started = time.perf_counter()
            tensors, facts = self._layer(index)
            facts["seconds"] = round(time.perf_counter() - started, 3)
            self.x.dump(*self._place(index + 1))
            self.journal.record(index, tensors, facts)
            self.facts.append(facts)
        self.observer.layers(total, total)
        self._lap("layers")

    def _layer(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Quantises layer `index` of the result and moves the activations through it."""
        skeleton, spec = self.skeleton, self.spec
        prefix = f"{spec.layers}.{index}."
        schemes = {n: self.plan.schemes[prefix + n] for n in spec.linears}
        source = self.plan.layers[index]
        weights = self._weights(source, schemes)
        written = {
            prefix + name: tensor.to(self.dtype)
            for name, tensor in weights.items()
            if schemes.get(name.removesuffix(".weight")) is None
        }
        modules: list[dict[str, Any]] = []
        sizes: list[float] = []
        calibrated = self.solver is not None and self.solver.needs_hessian
        with skeleton.layer(source, weights, self.device) as layer:
            del weights

            def weigh(i: int, x: Tensor, normed: Tensor) -> Tensor | None:
                if not calibrated:
                    return None
                inputs = skeleton.layer_inputs(source, x)
                window = skeleton.sliding_window(source)
                w = self.weigher.weights(i, x, normed, layer, spec, inputs, window)
                tokens = self.batches[i][1].sum(-1).double().mean().item()
                sizes.append(tokens if w is None else effective_sample_size(w))
                return w

            def quantise(group: tuple[str, ...], H: Hessian | None) -> None:
                written.update(self._solve(prefix, layer, group, schemes, H, modules))
                # Memory peaks in the MLP: before it and in its middle, what is free goes back.
                # Doing so more often costs more in page faults than it saves.
                if group in ((spec.output,), spec.mlp_in):
                    release_memory()

            y = ActivationStore(*self._place(index + 1)) if self.on_disk else self.x
            work = ActivationStore(*((self.folder, "work") if self.on_disk else ()))
            run_layer(
                layer, spec, lambda x: skeleton.layer_inputs(source, x), self.x, y, work,
                quantise=quantise,
                needs_hessian=lambda group: self._needs_hessian(group, schemes),
                weigh=weigh,
                device=self.device,
            )  # fmt: skip
            self.x = y
        facts = {"layer": index, "modules": modules}
        if source != index:
            facts["source_layer"] = source
        if sizes:
            facts["effective_sample_size"] = round(sum(sizes) / len(sizes), 1)
            facts["tokens_per_window"] = self.windows.input_ids.shape[1]
        return written, facts

    def _weights(self, index: int, schemes: dict[str, Any]) -> dict[str, Tensor]:
        """The layer's tensors in fp32, rotated; those left unquantised as they will be stored."""
        tensors = self.skeleton.read_layer(index)
        if self.residual is not None:
            tensors = fuse_and_rotate_layer(
                tensors, self.spec, self.residual, self.heads, self.skeleton.head_dim
            )
        for name in list(tensors):
            tensor = tensors.pop(name)
            if schemes.get(name.removesuffix(".weight")) is None:
                tensor = self._stored(f"{self.spec.layers}.{index}.{name}", tensor)
            tensors[name] = tensor.float()
        return tensors

    def _needs_hessian(self, group: tuple[str, ...], schemes: dict[str, Any]) -> bool:
        return bool(
            self.solver
            and self.solver.needs_hessian
            and any(schemes[name] is not None for name in group)
        )

    def _solve(
        self,
        prefix: str,
        layer: nn.Module,
        group: tuple[str, ...],
        schemes: dict[str, Any],
        H: Hessian | None,
        modules: list[dict[str, Any]],
    ) -> dict[str, Tensor]:
        """Quantises the linears of one group in place; their packed tensors, and facts."""
        started = time.perf_counter()
        try:
            solved = solve_group(layer, group, schemes, self.solver, H, self.dtype)
        except CompressError as error:
            raise CompressError(f"{prefix}{group[0]}: {error}") from error
        tensors: dict[str, Tensor] = {}
        for name, linear in solved.items():
            bits = schemes[name].bits
            scale = self._stored(f"{prefix}{name}.weight_scale", linear.scale)
            packed = compress_module(linear.codes, scale, linear.zero, bits)
            tensors |= {f"{prefix}{name}.{key}": tensor for key, tensor in packed.items()}
        seconds = time.perf_counter() - started
        for name, linear in solved.items():
            facts = {
                "name": prefix + name,
                "bits": schemes[name].bits,
                "group_size": schemes[name].group_size,
                "error": linear.relative_error(),
                "damping": linear.damping,
                "dead_columns": linear.dead_columns,
                "changed": [round(share, 6) for share in linear.changed],
                "seconds": round(seconds / len(solved), 3),
            }
            modules.append(facts)
            self.observer.module(facts["name"], facts)
            self._report_oddities(facts)
        return tensors

    def _report_oddities(self, facts: dict[str, Any]) -> None:
        damping = self.recipe.quantize.damping
        if facts["damping"] is not None and facts["damping"] > damping:
            self.warn(f"{facts['name']}: damping was raised from {damping} to {facts['damping']}")
        if facts["dead_columns"]:
            self.warn(f"{facts['name']}: {facts['dead_columns']} inputs were always zero")

    # ---- what stands outside the layers ---------------------------------------------------------

    def finish_tensors(self) -> None:
        """Final norm and head, and the probe for the self-check: the logits of the first window."""
        self.observer.stage("head")
        spec, skeleton = self.spec, self.skeleton
        gamma = skeleton.read(spec.final_norm)
        head = skeleton.read(spec.embedding if skeleton.tied else spec.head)
        scheme = self.plan.schemes[spec.head]
        if self.residual is not None:
            wide = torch.float32 if scheme else self.dtype
            head = fuse_and_rotate_head(head, gamma, self.residual, dtype=wide)
            gamma = torch.ones_like(gamma)
        gamma = self._stored(f"{spec.final_norm}.weight", gamma)
        norm = skeleton.model.get_submodule(spec.final_norm)
        norm.load_state_dict({"weight": gamma.to(self.device, torch.float32)}, assign=True)
        tensors = {f"{spec.final_norm}.weight": gamma}
        if scheme is not None:
            head, packed = self._solve_head(head.float(), norm, scheme)
            tensors.update(packed)
        elif not skeleton.tied or self.plan.untied:
            name = f"{spec.head}.weight"
            head = tensors[name] = self._stored(name, head)
        else:
            head = head.to(self.dtype)
        save_tensors(self.work / "head.safetensors", tensors)
        ids = self.windows.input_ids[:1]
        logits = norm(self.x[0][:1].to(self.device)) @ head.float().to(self.device).T
        write_probe(self.work / "probe.safetensors", ids, logits.cpu())
        norm.to("meta")
        self._lap("head")

    def _solve_head(
        self, weight: Tensor, norm: nn.Module, scheme: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Quantises the head like any other linear; its input is the final norm's output."""
        name = self.spec.head
        holder = nn.Module()
        setattr(holder, name, nn.Linear(*weight.shape[::-1], bias=False, device="meta"))
        getattr(holder, name).weight = nn.Parameter(weight.to(self.device), requires_grad=False)
        H = None
        if self.solver.needs_hessian:
            H = Hessian(weight.shape[1], self.device)
            for i, (_, mask) in enumerate(self.batches):
                H.add_batch(norm(self.x[i].to(self.device)), mask.to(self.device).float())
        modules: list[dict[str, Any]] = []
        packed = self._solve("", holder, (name,), {name: scheme}, H, modules)
        self.facts.append({"layer": None, "modules": modules, "seconds": modules[0]["seconds"]})
        return getattr(holder, name).weight, packed

    # ---- writing and measuring ------------------------------------------------------------------

    def assemble(self, self_check: bool) -> dict[str, Any]:
        """Shards, config, tokenizer and recipe in OUT/.modelpress/final; then the self-check."""
        self.observer.stage("writing")
        parts = [
            self.work / "embedding.safetensors",
            *self.journal.part_files(),
            self.work / "head.safetensors",
        ]
        final = self.work / "final"
        assemble(final, parts, self.recipe, self.skeleton, self.plan, self.dtype)
        self._lap("writing")
        checked: dict[str, Any] = {}
        if self_check and self._fits_self_check():
            self.observer.stage("self-check")
            checked = reload_and_compare(final, self.work / "probe.safetensors")
            self._lap("self_check")
        publish(final, self.output)
        return checked

    def _fits_self_check(self) -> bool:
        """The check holds the whole model in fp32, which the run itself never does."""
        needed = 4 * sum(p.numel() for p in self.skeleton.model.parameters())
        free = psutil.virtual_memory().available
        if needed > free:
            self.warn(
                f"no self-check: reloading takes {needed / 1e9:.1f} GB of memory, "
                f"{free / 1e9:.1f} GB are free"
            )
        return needed <= free

    def evaluate(self, result: RunResult) -> None:
        """Measures the published checkpoint. It stays whatever becomes of its evaluation."""
        if self.recipe.evaluate is None:
            return
        self.observer.stage("evaluation")
        try:
            result.metrics = evaluate_recipe(
                self.recipe, self.output, self.skeleton.folder, self.device
            )
        except BaseException:  # an interrupt as well
            self.document(result)
            self.warn(f"the checkpoint in {self.output} is complete; its evaluation failed")
            raise
        finally:
            self._lap("evaluation")

    def document(self, result: RunResult) -> None:
        """modelpress.json, the report and the model card."""
        windows = self.windows if needs_calibration(self.recipe) else None
        facts = provenance(result, self.recipe, self.skeleton, windows, self.device)
        document(result, self.recipe, facts)
