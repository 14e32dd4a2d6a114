"""The run: a recipe and a model folder go in, a checkpoint that other engines load comes out.

    plan -> calibration data -> check against the source (`source_check`)
    -> search of a pruning strategy, if asked for -> embedding, images encoded
    -> the walk over the decoder layers (`layer_walk`)
    -> head -> shards, config, tokenizer, recipe, strategy, provenance -> reload in a fresh process
    and compare logits -> report and model card -> publish -> evaluate -> report and card again

Started by torchrun, the ranks share the scores of `allocate`, the walk and a quantised head. All
else the first one does alone: it holds the lease, writes, checks, measures and tells.

Everything is written below OUT/.modelpress and moved to OUT at the end, config.json last, so OUT
holds a whole checkpoint or none; one process at a time may do that. A run that was killed continues
after its last finished layer, or what came behind, and ends with the same bytes.

    result = run("demo-lm", output="out")
"""

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from compress.checkpoint.engines import mixes_asymmetric
from compress.checkpoint.packed_formats import FORMATS, codes_of_signed
from compress.data.activations import activations_on_disk
from compress.data.prompts import (
    CalibrationData,
    calibration_data,
    probe_prompt,
)
from compress.data.samples import read_samples
from compress.data.text import locate
from compress.data.windows import CalibrationWindows, check_token_ids, doubts
from compress.errors import CompressError, UsageError
from compress.eval.windows import scored_at_once
from compress.kernels.codes import Codes
from compress.kernels.embedding import QuantEmbedding
from compress.loading.load import load
from compress.memory import chosen_device, fp32_products, peak_memory, release_memory
from compress.models.pretrained import local_folder
from compress.models.vision import Lookup, rows_of, vision_at_work
from compress.observer import Observer
from compress.pipeline.evaluation import check_evaluation
from compress.pipeline.finish import RunLog, left_by, measure, publish_result, restored
from compress.pipeline.head_products import products
from compress.pipeline.inputs import RunInputs
from compress.pipeline.journal import Entry, Journal
from compress.pipeline.layer_walk import LayerWalk
from compress.pipeline.notebook import observer_here
from compress.pipeline.one_run import check_ranks, held
from compress.pipeline.output import assemble
from compress.pipeline.plan import Plan, allocated_plan, make_plan
from compress.pipeline.provenance import fingerprint, slow_without_kernels
from compress.pipeline.pruning_forecast import strategy_of
from compress.pipeline.result import RunResult
from compress.pipeline.source_check import SourceCheck, check_source
from compress.pipeline.stream import CalibrationStream
from compress.pipeline.verify import reload_and_compare, reload_memory, write_probe
from compress.pruning.costs import without_voters
from compress.pruning.search import search_as_told
from compress.pruning.stages import Stages
from compress.quantization.tables import round_table
from compress.ranks import Ranks, together
from compress.recipe.recipe import Recipe
from compress.recipe.strategy import PruneStrategy
from compress.rotation.table import Table
from compress.scheme import PlannedModule
from compress.storage.files import read_json, write_json
from compress.storage.lease import WORK_FOLDER
from compress.storage.output_folder import FINAL, refuse, withdraw
from compress.storage.safetensors import read_tensors, save_tensors

SOURCE_FILE = "source-check.json"  # in the work folder: that the source was checked


def run(
    recipe: Recipe | str | Path | Mapping[str, object],
    output: str | Path,
    *,
    model: str | Path | None = None,
    device: str = "cpu",
    resume: bool = True,
    overwrite: bool = False,
    windows: CalibrationData | None = None,
    self_check: bool = True,
    check_source: bool = True,
    deterministic: bool = False,
    observer: Observer | None = None,
) -> RunResult:
    """Compresses a model as the recipe says and writes it to the folder `output`.

    Args:
        recipe: a recipe, the name of a shipped one (`rsq-w4`), a file, or a dict as YAML has it.
        model: a folder or hub id instead of the recipe's.
        device: where layers are computed, `cpu`, `cuda` or `auto`: a GPU where there is one.
        resume: continue a run of the same recipe, model and versions that was killed.
        overwrite: replace a checkpoint in `output`; it stays whole until the new one is.
        windows: calibration data of your own instead of the recipe's dataset: windows of text, with
            a mask of the tokens that count, or prompts with images.
        self_check: reload the result in a fresh process and compare logits before publishing it.
        check_source: compare our 16-bit forward of the model with that of transformers first.
        deterministic: several ranks give the bytes of one process with as many threads. Without,
            sums are added up in another order.

    Of several ranks, those behind the first return as soon as the weights are written, with a
    result that has no figures.

    Raises:
        UsageError: the recipe does not fit the model, or `output` holds something else, or
            another process writes to it.
        CompressError: a damaged checkpoint, a Hessian that cannot be factored, a failed check.
    """
    recipe, output = Recipe.of(recipe, model), Path(output)
    log = RunLog(observer or observer_here())
    device = chosen_device(device)
    with (
        together(device, deterministic=deterministic) as ranks,
        held(output, overwrite, ranks) as abandoned,
    ):
        if ranks.first:  # a wrong name of a model is told before anything else
            local_folder(recipe.model_location(), recipe.model.revision, weights=False)
            if recipe.calibrates and windows is None:
                locate(recipe.calibration.dataset, recipe.resolve_path)
        if recipe.evaluate is not None and ranks.first:
            check_evaluation(recipe.evaluate, recipe.resolve_path)
        log.observer.stage("plan")
        inputs = RunInputs.open(recipe, device, given=windows is not None)
        if inputs.skeleton.folder.resolve() == output.resolve():
            raise UsageError(f"output {output} is the model itself: choose another --output")
        plan = make_plan(inputs)
        _refuse_problems(plan)
        for doubt in slow_without_kernels(inputs, plan):
            log.warn(doubt)
        data = windows
        if data is None:
            log.observer.stage("calibration data")
            data = calibration_data(inputs.source, inputs.skeleton)
            release_memory()  # of the whole text
        check_token_ids(data.parts, inputs.skeleton.config.vocab_size)
        mark = fingerprint(inputs, data)
        check_ranks(inputs, data, mark, ranks)
        try:
            left = ranks.tell(lambda: abandoned and resume and left_by(output, mark))
            if left and ranks.first:
                result = restored(output, inputs, mark, log)
            elif left:
                result = _result(output, plan, inputs, log)
            else:
                if ranks.first and (output / "config.json").exists() and not overwrite:
                    refuse(output, "config.json")
                checks = self_check, check_source
                result = _compressed(
                    inputs, plan, data, mark, output, resume, overwrite, checks, ranks, log
                )
                if ranks.first:
                    publish_result(result, inputs, data, mark)
        except OSError as error:
            raise CompressError(f"{error.filename or output}: {error.strerror or error}") from error
        if ranks.first:
            measure(result, inputs, data, mark, log)
    return result


@fp32_products()
def _compressed(
    inputs: RunInputs,
    plan: Plan,
    data: CalibrationData,
    mark: str,
    output: Path,
    resume: bool,
    overwrite: bool,
    checks: tuple[bool, bool],
    ranks: Ranks,
    log: RunLog,
) -> RunResult:
    """The checkpoint in OUT/.modelpress/final; `checks`: whether to reload it, and the source's.

    What the first rank does alone, the others wait for in `tell`.
    """
    self_check, source_checked = checks
    journal = Journal(output / WORK_FOLDER, mark)

    def opened() -> list[Entry]:
        journal.open(resume, replace=overwrite)
        withdraw(output)  # of another run, whose journal is gone by now
        return journal.entries()

    journal.follow(ranks.tell(opened))
    done = len(journal.entries())
    agreed = ranks.tell(lambda: settle_source(inputs, plan, journal, source_checked, log))
    if inputs.recipe.allocate is not None:
        plan = _allocated(inputs, data, journal, resume, log, ranks)
    with torch.no_grad():
        # Only pictures are pruned in calibration, and those by one process.
        pruning = settle_pruning(inputs, plan, journal, resume, log) if ranks.first else Pruning()
        ranks.tell(lambda: None)
        job = Job(inputs, plan, data, journal, pruning, log, ranks)
        job.start(done)
        for note in plan.notes:
            if plan.pruning is None or note != plan.pruning["summary"]:
                log.warn(note)
        for doubt in job.doubts():
            log.warn(doubt)
        job.walk(done)
        job.finish_tensors()
        for doubt in job.pruning_doubts():
            log.warn(doubt)
        result = _result(output, plan, inputs, log)
        if ranks.first:
            result.layers, result.source_check = job.layers.facts, agreed
            result.pruning = job.pruning_facts()
            result.self_check = job.assemble(self_check)
    return replace(result, peak_memory=peak_memory(inputs.device))


def _result(output: Path, plan: Plan, inputs: RunInputs, log: RunLog) -> RunResult:
    """A result whose figures are not there."""
    return RunResult(
        path=output,
        plan=plan,
        metrics={},
        layers=[],
        seconds=log.seconds,
        peak_memory=peak_memory(inputs.device),
        self_check={},
        warnings=log.warnings,
    )


def _refuse_problems(plan: Plan) -> None:
    if plan.problems:
        more = len(plan.problems) - 1
        raise UsageError(plan.problems[0] + (f" (and {more} more: see `plan`)" if more else ""))


def _allocated(
    inputs: RunInputs,
    data: CalibrationData,
    journal: Journal,
    resume: bool,
    log: RunLog,
    ranks: Ranks,
) -> Plan:
    """The plan with the widths that the layers are given."""
    plan = allocated_plan(
        inputs,
        data,
        journal.folder,
        identity=journal.fingerprint,
        resume=resume,
        observer=log.observer,
        ranks=ranks,
    )
    _refuse_problems(plan)  # of the layers that are left
    return plan


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
    # Kept in the work folder: a run that was killed goes on searching where it was.
    trials = journal.folder / f"pruning-{journal.fingerprint[:16]}.jsonl"
    if not resume:
        trials.unlink(missing_ok=True)
    model, processor = load(skeleton.folder, device=inputs.device, prune=False)
    samples, seed = section.search.samples, section.search.seed
    prompts = read_samples(inputs.source.location, processor, samples, seed)
    found = search_as_told(section, strategy, model, prompts, trials, processor, log.observer)
    del model
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
        log: RunLog,
        ranks: Ranks | None = None,
    ):
        self.inputs, self.skeleton, self.spec = inputs, inputs.skeleton, inputs.skeleton.spec
        self.plan, self.data, self.pruning = plan, data, pruning
        self.journal, self.work, self.log = journal, journal.folder, log
        self.ranks = ranks or Ranks()
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
            processor = self.skeleton.processor()
        if self.spec.vision is not None and self.ranks.first:
            probe = probe_prompt(self.skeleton)
        depth, strategy = len(self.plan.layers), self.pruning.strategy
        hidden = self.skeleton.config.hidden_size
        widest = max((module.shape[1] for module in self.plan.modules), default=0)
        full_precision = self.inputs.recipe.quantize.target.name == "full_precision"
        nbytes = self.data.tokens * (hidden * (2 if full_precision else 1) + widest) * 4
        return CalibrationStream(
            self.skeleton,
            self.data,
            None if strategy is None else Stages(strategy, depth),
            self.work / "activations",
            activations_on_disk(self.inputs.source.settings.offload, nbytes),
            full_precision=full_precision,
            probe=probe,
            processor=processor,
            device=self.inputs.device,
            ranks=self.ranks,
        )

    def start(self, done: int) -> None:
        """Puts the inputs of the first layer that is not `done` in place."""
        if self.ranks.first:  # again, where a run goes on: what an earlier process left of it
            self._write_embedding()  # is not in the journal
        self.ranks.tell(lambda: None)
        if done == 0:
            rounded = self.plan.module(self.spec.embedding) is not None
            exact = (lambda: rows_of(self._dense_table())) if rounded else None
            self.stream.embed(self._vision_at_work, self._table, exact)
        else:
            state = self.journal.state()
            self.stream.restore(done, self._vision_at_work, self._table, state)
        release_memory()  # of the embedding
        self.log.lap("calibration")

    def _table(self) -> Lookup:
        """The embedding as it is written."""
        if self.plan.module(self.spec.embedding):
            return QuantEmbedding(self._embedding_codes(), torch.float32)
        return rows_of(self._dense_table())

    def _dense_table(self) -> Tensor:
        name = f"{self.spec.embedding}.weight"
        return self.model.stored(name, self.model.embedding().dense(self.model.dtype))

    def _embedding_codes(self) -> Codes:
        """The codes of a quantised embedding, from the file that it was written to."""
        planned = self.plan.module(self.spec.embedding)
        assert planned is not None
        tensors = {n.rpartition(".")[2]: t for n, t in read_tensors(self.parts[0]).items()}
        return FORMATS[planned.format].read(tensors, planned.scheme, planned.name)

    def _packed_table(self, planned: PlannedModule) -> dict[str, Tensor]:
        """The embedding, rounded: the tensors of the file."""
        started = time.perf_counter()
        name = planned.name
        linear = round_table(self.model.embedding(), planned.scheme, self.model.dtype)
        scale = self.model.stored(f"{name}.weight_scale", linear.scale)
        codes = codes_of_signed(linear.codes, scale, linear.zero, planned.scheme)
        packed = FORMATS[planned.format].write(codes, planned.scheme)
        self.layers.note_table(planned, time.perf_counter() - started)
        return {f"{name}.{key}": tensor for key, tensor in packed.items()}

    def _vision_at_work(self) -> AbstractContextManager[None]:
        return vision_at_work(self.skeleton, self.model.vision_tensors(), self.model.device)

    def _write_embedding(self) -> None:
        """Writes what stands before the decoder layers.

        A tower's tensors keep the names of the source's file, since engines differ in what they
        call the modules.
        """
        planned = self.plan.module(self.spec.embedding)
        if planned is not None:
            save_tensors(self.parts[0], self._packed_table(planned))
        else:
            save_tensors(self.parts[0], {f"{self.spec.embedding}.weight": self._dense_table()})
        if self.spec.vision is not None:
            written, tensors = self.skeleton.reader.written_name, self.model.vision_tensors()
            save_tensors(self.parts[1], {written(n): t for n, t in tensors.items()})

    # ---- the walk, and what stands behind the layers --------------------------------------------

    def walk(self, done: int) -> None:
        """All decoder layers, from the first that the journal does not have."""
        self.layers.run(done)
        self.log.lap("layers")

    def finish_tensors(self) -> None:
        """Final norm and head, and the probe for the self-check: logits of a prompt.

        A head that is solved is solved by all ranks.
        """
        self.log.observer.stage("head")
        spec, model, device = self.spec, self.model, self.model.device
        planned, name = self.plan.module(spec.head), f"{spec.head}.weight"
        head: Table | Codes | Tensor | None
        head, gammas = model.head()
        for key, gamma in gammas.items():
            gammas[key] = model.stored(f"{spec.final_norm}.{key}", gamma)
        tensors = {f"{spec.final_norm}.{key}": gamma for key, gamma in gammas.items()}
        if (bias := model.head_bias()) is not None:
            bias = tensors[f"{spec.head}.bias"] = model.stored(f"{spec.head}.bias", bias)
        with model.final_norm(gammas) as norm:
            if planned is not None and self.plan.shared:  # then nothing is rotated
                head, packed = self._shared_head(planned)
                tensors |= packed
            elif planned is not None:
                head, packed = self.layers.solve_head(head, norm, planned.scheme)
                tensors |= packed
            elif self.plan.untied or not self.skeleton.tied:
                head = tensors[name] = model.stored(name, head.dense(model.dtype))
            if not self.ranks.first:
                return
            assert head is not None, "the first rank has what it writes"
            save_tensors(self.work / "head.safetensors", tensors)
            inputs, x = self._probe()
            logits = model.finished(products(head, norm(x.to(device)), model.dtype), bias)
        write_probe(self.work / "probe.safetensors", inputs, logits.cpu())
        self.log.lap("head")

    def _shared_head(self, planned: PlannedModule) -> tuple[Codes, dict[str, Tensor]]:
        """A head with the embedding's codes: these, and its own tensors of the file."""
        codes, format = self._embedding_codes(), FORMATS[planned.format]
        packed = format.write(codes, planned.scheme)
        if planned.twin:
            del packed[format.main]
        tensors = {f"{planned.name}.{key}": tensor for key, tensor in packed.items()}
        return codes, tensors

    def _probe(self) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs of a forward and the last layer's output for them, [1, T, d]."""
        stream = self.stream
        if stream.probe is None:
            ids, x = stream.batches[0][0][:1], stream.x[0][:1]
            some = slice(scored_at_once(self.skeleton.config.vocab_size))
            return {"input_ids": ids[:, some]}, x[:, some]
        inputs = {k: v for k, v in stream.probe.items() if isinstance(v, Tensor)}
        return inputs, stream.x[len(stream.batches)]

    # ---- writing and measuring ------------------------------------------------------------------

    def assemble(self, self_check: bool) -> dict[str, Any]:
        """Shards, config, tokenizer and recipe in OUT/.modelpress/final; then the self-check."""
        self.log.observer.stage("writing")
        parts = [*self.parts, *self.journal.part_files(), self.work / "head.safetensors"]
        final = self.work / FINAL
        assemble(final, parts, self.inputs, self.plan, self.pruning.strategy)
        self.log.lap("writing")
        checked: dict[str, Any] = {}
        if not self_check:
            self.log.warn("the result was not loaded again to be checked: --no-self-check")
        elif self._fits_self_check():
            self.log.observer.stage("self-check")
            checked = reload_and_compare(final, self.work / "probe.safetensors")
            self.log.lap("self_check")
        return checked

    def _fits_self_check(self) -> bool:
        """Whether transformers can reload the result here."""
        schemes = {scheme for scheme in self.plan.schemes.values() if scheme is not None}
        if mixes_asymmetric(schemes):
            self.log.warn(
                "no self-check: transformers cannot load asymmetric modules of several widths or "
                "group sizes (compress.load does)"
            )
            return False
        needed = reload_memory(self.skeleton, self.plan.schemes)
        free = psutil.virtual_memory().available
        if needed > free:
            self.log.warn(
                f"no self-check: reloading takes {needed / 1e9:.1f} GB of memory, "
                f"{free / 1e9:.1f} GB are free"
            )
        return needed <= free

    def doubts(self) -> list[str]:
        """What the calibration data leave open; none where no Hessian is made of windows."""
        recipe, config = self.inputs.recipe, self.skeleton.config
        if recipe.quantize.method != "gptq" or not isinstance(self.data, CalibrationWindows):
            return []
        expansion = self.inputs.source.settings.expansion
        return doubts(self.data, expansion, config.hidden_size, config.vocab_size)

    def pruning_doubts(self) -> list[str]:
        """What is doubtful about the pruned calibration prompts, for a person."""
        strategy, stats = self.pruning.strategy, self.stream.pruning_stats(1)
        if strategy is None or stats is None or not stats["crops_without_voters"]:
            return []
        return [without_voters(stats["crops_without_voters"], stats["images"], strategy)]

    def pruning_facts(self) -> dict[str, Any] | None:
        """What modelpress.json says about pruned visual tokens."""
        if self.pruning.strategy is None:
            return None
        return {
            "strategy": self.pruning.strategy.model_dump(mode="json"),
            "calibration": self.stream.pruning_stats(self.model.dtype.itemsize),
            "search": self.pruning.search,
        }
