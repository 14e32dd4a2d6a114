"""The run: a recipe and a model folder go in, a checkpoint that other engines load comes out.

    plan -> calibration data -> check against the source (`source_check`)
    -> search of a pruning strategy, if asked for -> embedding, images encoded
    -> the walk over the decoder layers (`layer_walk`)
    -> head -> shards, config, tokenizer, recipe, strategy, provenance -> reload in a fresh process
    and compare logits -> publish -> evaluate -> report and model card

Everything is written below OUT/.modelpress and moved to OUT at the end, config.json last, so OUT
holds a whole checkpoint or none. A run that was killed continues after its last finished layer and
ends with the same bytes.

    result = run(Recipe.load("recipes/demo-lm.yaml"), output="out")
"""

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from compress.data.activations import activations_on_disk
from compress.data.prompts import CalibrationData, ImagePrompts, calibration_data, probe_prompt
from compress.data.windows import check_token_ids
from compress.errors import CompressError, UsageError
from compress.memory import check_device, peak_memory, release_memory
from compress.models.vision import vision_at_work
from compress.observer import Observer
from compress.pipeline.evaluation import check_evaluation, evaluate_recipe
from compress.pipeline.inputs import RunInputs
from compress.pipeline.journal import Journal
from compress.pipeline.layer_walk import LayerWalk
from compress.pipeline.output import assemble, document
from compress.pipeline.plan import Plan, allocated_plan, make_plan
from compress.pipeline.provenance import fingerprint, provenance
from compress.pipeline.pruning_forecast import strategy_of
from compress.pipeline.pruning_search import searched_strategy
from compress.pipeline.result import RunResult
from compress.pipeline.source_check import SourceCheck, check_source
from compress.pipeline.stream import CalibrationStream
from compress.pipeline.verify import reload_and_compare, write_probe
from compress.pruning.stages import Stages
from compress.recipe.recipe import Recipe
from compress.recipe.strategy import PruneStrategy
from compress.storage.files import read_json, write_json
from compress.storage.output_folder import WORK_FOLDER, check_output, publish
from compress.storage.safetensors import save_tensors

SOURCE_FILE = "source-check.json"  # in the work folder: that the source was checked


def run(
    recipe: Recipe,
    output: str | Path,
    *,
    device: str = "cpu",
    resume: bool = True,
    overwrite: bool = False,
    windows: CalibrationData | None = None,
    self_check: bool = True,
    check_source: bool = True,
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
        check_source: compare our 16-bit forward of the model with that of transformers first.

    Raises:
        UsageError: the recipe does not fit the model, or `output` holds something else.
        CompressError: a damaged checkpoint, a Hessian that cannot be factored, a failed check.
    """
    output = Path(output)
    observer = observer or Observer()
    check_output(output, overwrite)
    check_device(device)
    check_evaluation(recipe)
    observer.stage("plan")
    inputs = RunInputs.open(recipe, device)
    if inputs.skeleton.folder.resolve() == output.resolve():
        raise UsageError(f"output {output} is the model itself: choose another --output")
    plan = make_plan(inputs)
    if plan.problems:
        more = f" (and {len(plan.problems) - 1} more: see `plan`)" if len(plan.problems) > 1 else ""
        raise UsageError(plan.problems[0] + more)
    log = RunLog(observer)
    data = windows
    if data is None:
        observer.stage("calibration data")
        data = calibration_data(inputs.source, inputs.skeleton)
    check_token_ids(data.parts, inputs.skeleton.config.vocab_size)
    mark = fingerprint(inputs, data)
    journal = Journal(output / WORK_FOLDER, mark)
    try:
        done = journal.open(resume, replace=overwrite)
        agreed = settle_source(inputs, plan, journal, check_source, log)
        if recipe.allocate is not None:
            plan = allocated_plan(
                inputs, data, journal.folder, identity=mark, resume=resume, observer=observer
            )
        with torch.no_grad():
            pruning = settle_pruning(inputs, plan, journal, resume, log)
            job = Job(inputs, plan, data, journal, pruning, output, log)
            job.start(done)
            for note in plan.notes:
                if plan.pruning is None or note != plan.pruning["summary"]:
                    log.warn(note)
            job.walk(done)
            job.finish_tensors()
            checked = job.assemble(self_check)
    except OSError as error:
        raise CompressError(f"{error.filename or output}: {error.strerror or error}") from error
    result = RunResult(
        path=output,
        plan=plan,
        metrics={},
        layers=job.layers.facts,
        seconds=log.seconds,
        peak_memory=peak_memory(device),
        self_check=checked,
        source_check=agreed,
        pruning=job.pruning_facts(),
        warnings=log.warnings,
    )
    job.evaluate(result)
    job.document(result)
    return result


class RunLog:
    """What a run notes about itself: seconds by stage, and all that was out of the ordinary."""

    def __init__(self, observer: Observer):
        self.observer = observer
        self.warnings: list[str] = []
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        self.observer.warning(text)

    def lap(self, name: str) -> None:
        """Counts the time since the last lap to the stage `name`."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._started
        self._started = now


def settle_source(
    inputs: RunInputs, plan: Plan, journal: Journal, wanted: bool, log: RunLog
) -> SourceCheck:
    """Checks the model against its source, once in the life of a run, or says that nobody did."""
    if not wanted:
        log.warn("the model was not checked against transformers: --no-check-source")
        return {"skipped": "--no-check-source"}
    file = journal.folder / SOURCE_FILE
    known = read_json(file) or {}
    if known.get("fingerprint") == journal.fingerprint:
        return known["facts"]
    log.lap("calibration")
    log.observer.stage("source check")
    facts = check_source(inputs, plan.peak_memory["host"])
    log.lap("source_check")
    write_json(file, {"fingerprint": journal.fingerprint, "facts": facts})
    return facts


@dataclass(frozen=True)
class Pruning:
    """How the result prunes visual tokens, None for not at all, and how that was searched."""

    strategy: PruneStrategy | None = None
    search: dict[str, Any] | None = None


def settle_pruning(
    inputs: RunInputs, plan: Plan, journal: Journal, resume: bool, log: RunLog
) -> Pruning:
    """The recipe's strategy, the one saved with the model, or what a search finds."""
    section, skeleton = inputs.recipe.prune_visual_tokens, inputs.skeleton
    strategy = strategy_of(section, skeleton, len(plan.layers))
    if section is None or section.search is None:
        return Pruning(strategy)
    assert strategy is not None
    log.lap("calibration")
    log.observer.stage("pruning search")
    found = searched_strategy(
        section,
        inputs.source,
        skeleton.folder,
        strategy,
        journal.folder,
        journal.fingerprint,
        resume,
        inputs.device,
        log.observer,
    )
    release_memory()  # of the whole model
    log.lap("pruning search")
    facts = {
        "score": found.score,
        "keep": found.keep,
        "trials": len(found.trials),
        "conditions": found.conditions,
    }
    return Pruning(found.strategy, facts)


class Job:
    """One run from its first tensor to its report: what it reads, where it writes."""

    def __init__(
        self,
        inputs: RunInputs,
        plan: Plan,
        data: CalibrationData,
        journal: Journal,
        pruning: Pruning,
        output: Path,
        log: RunLog,
    ):
        self.inputs, self.skeleton, self.spec = inputs, inputs.skeleton, inputs.skeleton.spec
        self.plan, self.data, self.pruning = plan, data, pruning
        self.journal, self.work, self.output, self.log = journal, journal.folder, output, log
        self.model = inputs.rotated_model()
        self.stream = self._stream()
        self.layers = LayerWalk(
            inputs.recipe.quantize, self.model, plan, self.stream, journal, log.observer, log.warn
        )
        self.parts = [self.work / "embedding.safetensors"]
        if self.spec.vision is not None:
            self.parts.append(self.work / "vision.safetensors")

    # ---- set up ---------------------------------------------------------------------------------

    def _stream(self) -> CalibrationStream:
        probe = processor = None
        if self.spec.vision is not None:
            probe, processor = probe_prompt(self.skeleton), self.skeleton.processor()
        depth, strategy = len(self.plan.layers), self.pruning.strategy
        hidden = self.skeleton.config.hidden_size
        widest = max((module.shape[1] for module in self.plan.modules), default=0)
        nbytes = self.data.tokens * (hidden + widest) * 4
        return CalibrationStream(
            self.skeleton,
            self.data,
            None if strategy is None else Stages(strategy, depth),
            self.work / "activations",
            activations_on_disk(self.inputs.source.settings.offload, nbytes),
            probe=probe,
            processor=processor,
            device=self.inputs.device,
        )

    def start(self, done: int) -> None:
        """Puts the inputs of the first layer that is not `done` in place."""
        if done == 0:
            self._write_embedding()
            self.stream.embed(self._vision_at_work, self._table)
        else:
            self.stream.restore(done, self._vision_at_work, self._table)
        self.log.lap("calibration")

    def _table(self) -> Tensor:
        """The embedding as it is written."""
        name = f"{self.spec.embedding}.weight"
        return self.model.stored(name, self.model.embedding(self.model.dtype))

    def _vision_at_work(self) -> AbstractContextManager[None]:
        return vision_at_work(self.skeleton, self.model.vision_tensors(), self.model.device)

    def _write_embedding(self) -> None:
        """Writes what stands before the decoder layers.

        A tower's tensors keep the names of the source's file, since engines differ in what they
        call the modules.
        """
        save_tensors(self.parts[0], {f"{self.spec.embedding}.weight": self._table()})
        if self.spec.vision is not None:
            written, tensors = self.skeleton.reader.written_name, self.model.vision_tensors()
            save_tensors(self.parts[1], {written(n): t for n, t in tensors.items()})

    # ---- the walk, and what stands behind the layers --------------------------------------------

    def walk(self, done: int) -> None:
        """All decoder layers, from the first that the journal does not have."""
        self.layers.run(done)
        self.log.lap("layers")

    def finish_tensors(self) -> None:
        """Final norm and head, and the probe for the self-check: logits of a prompt."""
        self.log.observer.stage("head")
        spec, model, device = self.spec, self.model, self.model.device
        scheme = self.plan.schemes[spec.head]
        head, gamma = model.head(torch.float32 if scheme else model.dtype)
        gamma = model.stored(f"{spec.final_norm}.weight", gamma)
        tensors = {f"{spec.final_norm}.weight": gamma}
        with model.final_norm(gamma) as norm:
            if scheme is not None:
                head, packed = self.layers.solve_head(head.float(), norm, scheme)
                tensors.update(packed)
            elif not self.skeleton.tied or self.plan.untied:
                name = f"{spec.head}.weight"
                head = tensors[name] = model.stored(name, head)
            else:
                head = head.to(model.dtype)
            save_tensors(self.work / "head.safetensors", tensors)
            inputs, x = self._probe()
            logits = norm(x.to(device)) @ head.float().to(device).T
        write_probe(self.work / "probe.safetensors", inputs, logits.cpu())
        self.log.lap("head")

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
        self.log.observer.stage("writing")
        parts = [*self.parts, *self.journal.part_files(), self.work / "head.safetensors"]
        final = self.work / "final"
        assemble(final, parts, self.inputs, self.plan, self.pruning.strategy)
        self.log.lap("writing")
        checked: dict[str, Any] = {}
        if self_check and self._fits_self_check():
            self.log.observer.stage("self-check")
            checked = reload_and_compare(final, self.work / "probe.safetensors")
            self.log.lap("self_check")
        publish(final, self.output)
        return checked

    def _fits_self_check(self) -> bool:
        """Whether transformers can reload the result here: it holds the whole model in fp32."""
        schemes = {scheme for scheme in self.plan.schemes.values() if scheme is not None}
        if len(schemes) > 1 and not all(scheme.symmetric for scheme in schemes):
            self.log.warn(
                "no self-check: transformers cannot load asymmetric modules of several widths or "
                "group sizes (compress.load does)"
            )
            return False
        needed = 4 * sum(p.numel() for p in self.skeleton.model.parameters())
        free = psutil.virtual_memory().available
        if needed > free:
            self.log.warn(
                f"no self-check: reloading takes {needed / 1e9:.1f} GB of memory, "
                f"{free / 1e9:.1f} GB are free"
            )
        return needed <= free

    def pruning_facts(self) -> dict[str, Any] | None:
        """What modelpress.json says about pruned visual tokens."""
        if self.pruning.strategy is None:
            return None
        return {
            "strategy": self.pruning.strategy.model_dump(mode="json"),
            "calibration": self.stream.pruning_stats(self.model.dtype.itemsize),
            "search": self.pruning.search,
        }

    def evaluate(self, result: RunResult) -> None:
        """Measures the published checkpoint. It stays whatever becomes of its evaluation."""
        recipe = self.inputs.recipe
        if recipe.evaluate is None:
            return
        self.log.observer.stage("evaluation")
        try:
            result.metrics = evaluate_recipe(
                recipe, self.output, self.skeleton.folder, self.model.device
            )
        except BaseException:  # an interrupt as well
            self.document(result)
            self.log.warn(f"the checkpoint in {self.output} is complete; its evaluation failed")
            raise
        finally:
            self.log.lap("evaluation")

    def document(self, result: RunResult) -> None:
        """modelpress.json, the report and the model card."""
        used = self.inputs.source.used or isinstance(self.data, ImagePrompts)
        facts = provenance(result, self.inputs, self.data if used else None)
        document(result, self.inputs.recipe, facts)
