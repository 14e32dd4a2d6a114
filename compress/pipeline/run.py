"""The run: a recipe and a model folder go in, a checkpoint that other engines load comes out.

    plan -> calibration data -> search of a pruning strategy, if asked for -> embedding, images
    encoded -> the walk over the decoder layers (`compress.pipeline.layer_walk`)
    -> head -> shards, config, tokenizer, recipe, strategy, provenance -> reload in a fresh process
    and compare logits -> publish -> evaluate -> report and model card

Everything is written below OUT/.modelpress and moved to OUT at the end, config.json last, so OUT
holds a whole checkpoint or none. A run that was killed continues after its last finished layer and
ends with the same bytes.

    result = run(Recipe.load("recipes/demo-lm.yaml"), output="out")
"""

import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from compress.data.activations import activations_on_disk
from compress.data.prompts import CalibrationData, ImagePrompts, probe_prompt, recipe_data
from compress.data.windows import check_token_ids
from compress.errors import CompressError, UsageError
from compress.memory import peak_memory, release_memory
from compress.models.skeleton import Skeleton
from compress.models.vision import vision_at_work, vision_tensors
from compress.observer import Observer
from compress.pipeline.evaluation import check_evaluation, evaluate_recipe
from compress.pipeline.journal import Journal
from compress.pipeline.layer_walk import LayerWalk
from compress.pipeline.output import WORK_FOLDER, assemble, check_output, document, publish
from compress.pipeline.plan import Plan, allocated_plan, make_plan, needs_calibration
from compress.pipeline.provenance import fingerprint, provenance
from compress.pipeline.pruning_forecast import strategy_of
from compress.pipeline.pruning_search import searched_strategy
from compress.pipeline.result import RunResult
from compress.pipeline.stream import CalibrationStream
from compress.pipeline.verify import reload_and_compare, write_probe
from compress.pruning.stages import Stages
from compress.recipe.recipe import Recipe
from compress.recipe.strategy import PruneStrategy
from compress.rotation.rotate import fuse_and_rotate_head, rotate_embedding
from compress.storage.safetensors import save_tensors


def run(
    recipe: Recipe,
    output: str | Path,
    *,
    device: str = "cpu",
    resume: bool = True,
    overwrite: bool = False,
    windows: CalibrationData | None = None,
    self_check: bool = True,
    observer: Observer | None = None,
) -> RunResult:
    """Compresses a model as the recipe says and writes it to the folder `output`.

    Args:
        device: where layers are computed, `cpu` or `cuda`.
        resume: continue a run of the same recipe, model and versions that was killed.
        overwrite: replace a checkpoint in `output`; it stays whole until the new one is.
        windows: calibration data of your own instead of the recipe's dataset: windows of text, with
            a mask of the tokens that count, or prompts with images.
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
    data = windows
    if data is None:
        observer.stage("calibration data")
        data = recipe_data(recipe, skeleton, needs_calibration(recipe))
    check_token_ids(data.parts, skeleton.config.vocab_size)
    mark = fingerprint(recipe, skeleton, data, device)
    if recipe.allocate is not None:
        Journal(Path(output) / WORK_FOLDER, mark).open(resume, replace=overwrite)  # or refuse now
        plan = allocated_plan(
            recipe, skeleton, data, Path(output) / WORK_FOLDER,
            identity=mark, resume=resume, device=device, observer=observer,
        )  # fmt: skip
    job = Job(recipe, skeleton, plan, Path(output), device, observer)
    job.started = started  # so that drawing the windows, and the scores, count
    try:
        with torch.no_grad():
            job.open(resume, overwrite, data, mark)
            for note in plan.notes:
                if plan.pruning is None or note != plan.pruning["summary"]:
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
        layers=job.layers.facts,
        seconds=job.seconds,
        peak_memory=peak_memory(device),
        self_check=checked,
        pruning=job.pruning(),
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
        self.strategy: PruneStrategy | None = None
        self.search: dict[str, Any] | None = None
        self.warnings: list[str] = []
        self.seconds: dict[str, float] = {}
        self.started = time.perf_counter()

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        self.observer.warning(text)

    def _lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.started
        self.started = now

    # ---- set up ---------------------------------------------------------------------------------

    def open(self, resume: bool, overwrite: bool, data: CalibrationData, mark: str) -> None:
        """Opens the journal, settles the strategy and puts the first layer's inputs in place."""
        recipe, skeleton = self.recipe, self.skeleton
        self.data = data
        journal = Journal(self.work, mark)
        self.done = journal.open(resume, replace=overwrite)
        self.parts = [self.work / "embedding.safetensors"]
        probe = processor = None
        if skeleton.spec.vision is not None:
            self._settle_strategy(mark, resume)
            probe, processor = probe_prompt(skeleton), skeleton.processor()
            self.parts.append(self.work / "vision.safetensors")
        depth = len(self.plan.layers)
        stages = None if self.strategy is None else Stages(self.strategy, depth)
        hidden = skeleton.config.hidden_size
        widest = max(module.shape[1] for module in self.plan.modules) if self.plan.modules else 0
        nbytes = data.tokens * (hidden + widest) * 4
        self.stream = CalibrationStream(
            skeleton, data, stages, self.work / "activations",
            activations_on_disk(recipe.calibration.offload, nbytes),
            probe=probe, processor=processor, device=self.device,
        )  # fmt: skip
        self.layers = LayerWalk(
            recipe, skeleton, self.plan, self.stream, journal, self.device, self.observer, self.warn
        )
        self.journal, self.dtype = journal, self.layers.dtype
        if self.done == 0:
            self._write_embedding()
            self.stream.embed(self._vision_at_work, self._table)
        else:
            self.stream.restore(self.done, self._vision_at_work, self._table)
        self._lap("calibration")

    def _settle_strategy(self, mark: str, resume: bool) -> None:
        """The recipe's strategy, the one saved with the model, or what a search finds."""
        self.strategy = strategy_of(self.recipe, self.skeleton, len(self.plan.layers))
        pruning = self.recipe.prune_visual_tokens
        if pruning is not None and pruning.search is not None:
            assert self.strategy is not None
            self._lap("calibration")
            self.observer.stage("pruning search")
            found = searched_strategy(
                self.recipe, self.skeleton, self.strategy, self.work, mark, resume, self.device,
                self.observer,
            )  # fmt: skip
            release_memory()  # of the whole model
            self.strategy = found.strategy
            self.search = {
                "score": found.score,
                "keep": found.keep,
                "trials": len(found.trials),
                "conditions": found.conditions,
            }
            self._lap("pruning search")

    def _table(self) -> Tensor:
        """The embedding as it is written."""
        name = f"{self.spec.embedding}.weight"
        embedding = self.skeleton.read(self.spec.embedding)
        if self.layers.residual is not None:
            embedding = rotate_embedding(embedding, self.layers.residual, dtype=self.dtype)
        return self.layers.stored(name, embedding)

    def _vision(self) -> dict[str, Tensor]:
        """Vision tower and projector as they are written, by their modules' names."""
        return vision_tensors(self.skeleton, self.layers.residual, self.layers.stored)

    def _vision_at_work(self) -> AbstractContextManager[None]:
        return vision_at_work(self.skeleton, self._vision(), self.device)

    def _write_embedding(self) -> None:
        """What stands before the decoder layers. A tower's tensors keep the names of the source's
        file, since engines differ in what they call the modules."""
        save_tensors(self.parts[0], {f"{self.spec.embedding}.weight": self._table()})
        if self.spec.vision is not None:
            written = self.skeleton.reader.written_name
            save_tensors(self.parts[1], {written(n): t for n, t in self._vision().items()})

    # ---- the walk, and what stands behind the layers --------------------------------------------

    def walk(self) -> None:
        """All decoder layers, from the first that the journal does not have."""
        self.layers.run(self.done)
        self._lap("layers")

    def finish_tensors(self) -> None:
        """Final norm and head, and the probe for the self-check: logits of a prompt."""
        self.observer.stage("head")
        spec, skeleton, residual = self.spec, self.skeleton, self.layers.residual
        stored = self.layers.stored
        gamma = skeleton.read(spec.final_norm)
        head = skeleton.read(spec.embedding if skeleton.tied else spec.head)
        scheme = self.plan.schemes[spec.head]
        if residual is not None:
            wide = torch.float32 if scheme else self.dtype
            head = fuse_and_rotate_head(head, gamma, residual, dtype=wide)
            gamma = torch.ones_like(gamma)
        gamma = stored(f"{spec.final_norm}.weight", gamma)
        norm = skeleton.model.get_submodule(spec.final_norm)
        norm.load_state_dict({"weight": gamma.to(self.device, torch.float32)}, assign=True)
        tensors = {f"{spec.final_norm}.weight": gamma}
        if scheme is not None:
            head, packed = self.layers.solve_head(head.float(), norm, scheme)
            tensors.update(packed)
        elif not skeleton.tied or self.plan.untied:
            name = f"{spec.head}.weight"
            head = tensors[name] = stored(name, head)
        else:
            head = head.to(self.dtype)
        save_tensors(self.work / "head.safetensors", tensors)
        inputs, x = self._probe()
        logits = norm(x.to(self.device)) @ head.float().to(self.device).T
        write_probe(self.work / "probe.safetensors", inputs, logits.cpu())
        norm.to("meta")
        self._lap("head")

    def _probe(self) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs of a forward and the last layer's output for them, [1, T, d]."""
        stream = self.stream
        if stream.probe is None:
            return {"input_ids": stream.batches[0][0][:1]}, stream.x[0][:1]
        inputs = {k: v for k, v in stream.probe.items() if isinstance(v, Tensor)}
        return inputs, stream.x[len(stream.batches)]

    # ---- writing and measuring ------------------------------------------------------------------

    def assemble(self, self_check: bool) -> dict[str, Any]:
        """Shards, config, tokenizer and recipe in OUT/.modelpress/final; then the self-check."""
        self.observer.stage("writing")
        parts = [*self.parts, *self.journal.part_files(), self.work / "head.safetensors"]
        final = self.work / "final"
        assemble(final, parts, self.recipe, self.skeleton, self.plan, self.dtype, self.strategy)
        self._lap("writing")
        checked: dict[str, Any] = {}
        if self_check and self._fits_self_check():
            self.observer.stage("self-check")
            checked = reload_and_compare(final, self.work / "probe.safetensors")
            self._lap("self_check")
        publish(final, self.output)
        return checked

    def _fits_self_check(self) -> bool:
        """The check reloads in transformers, which holds the whole model in fp32, as the run itself
        never does."""
        schemes = {scheme for scheme in self.plan.schemes.values() if scheme is not None}
        if len(schemes) > 1 and not all(scheme.symmetric for scheme in schemes):
            self.warn(
                "no self-check: transformers cannot load asymmetric modules of several widths or "
                "group sizes (compress.load does)"
            )
            return False
        needed = 4 * sum(p.numel() for p in self.skeleton.model.parameters())
        free = psutil.virtual_memory().available
        if needed > free:
            self.warn(
                f"no self-check: reloading takes {needed / 1e9:.1f} GB of memory, "
                f"{free / 1e9:.1f} GB are free"
            )
        return needed <= free

    def pruning(self) -> dict[str, Any] | None:
        """What modelpress.json says about pruned visual tokens."""
        if self.strategy is None:
            return None
        return {
            "strategy": self.strategy.model_dump(mode="json"),
            "calibration": self.stream.pruning_stats(self.dtype.itemsize),
            "search": self.search,
        }

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
        used = needs_calibration(self.recipe) or isinstance(self.data, ImagePrompts)
        data = self.data if used else None
        facts = provenance(result, self.recipe, self.skeleton, data, self.device)
        document(result, self.recipe, facts)
