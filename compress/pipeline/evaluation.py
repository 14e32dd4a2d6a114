"""Measuring a checkpoint: what `modelpress eval` and a recipe's `evaluate` section do.

Loads the model, and the 16-bit baseline beside it, tokenises the text once, and hands all of it to
`compress.eval`, which knows nothing of checkpoints. On a CPU both models compute in fp32 whatever
they are stored in: bf16 products are slower there, and their rounding would be noise in the
comparison; on a GPU they compute in the checkpoint's dtype, as they are served. Quantised linears
run packed or dense, whichever is faster here, and the conditions say which. A model that prunes
visual tokens is measured pruning, its baseline never does.

    evaluate("out", tasks=["demo_code"], perplexity="python-stdlib", baseline="recipes/demo/lm")
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import UsageError

if TYPE_CHECKING:
    from compress.recipe.recipe import Recipe


def evaluate(
    model: str | Path,
    *,
    tasks: Sequence[str] = (),
    include_path: str | Path | Sequence[str | Path] | None = None,
    perplexity: str | None = None,
    length: int = 512,
    stride: int | None = None,
    bos: bool = False,
    tokens: int | None = None,
    per_document: bool = False,
    text_field: str = "text",
    baseline: str | Path | None = None,
    limit: int | float | None = None,
    batch_size: int = 8,
    num_fewshot: int | None = None,
    dense: bool | None = None,
    activation_bits: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    pictures: str | Path | None = None,
) -> dict[str, Any]:
    """Tasks, perplexity and divergence of a checkpoint: the dict of `compress.eval.evaluate`.

    If the model prunes visual tokens, `pruning` says what that saved.

    Args:
        model, baseline: folders or hub ids; the baseline is measured in the same call.
        tasks, include_path, limit, num_fewshot, seed: of lm-eval.
        perplexity: a dataset's name, FILE.txt, FILE.jsonl or hub id; its held-out part is read.
        length, stride: tokens of a window and from one window to the next; None: no overlap.
        bos: put the tokenizer's BOS in front of each window.
        tokens: only the first so many tokens of the text.
        per_document: each document on its own, cut to `length`, instead of one stream.
        dense: whether the model's quantised linears are expanded instead of running packed; None:
            whichever is faster on this device.
        activation_bits: to which packed linears round what they read, token by token.
        pictures: a folder for pictures of kept, pruned and recycled patches.

    Raises:
        UsageError: nothing to evaluate, no such model, task or dataset, or no BOS token.
        CheckpointError: a damaged checkpoint.
    """
    evaluator = Evaluator(
        tasks=tasks, include_path=include_path, perplexity=perplexity, length=length,
        stride=stride, bos=bos, tokens=tokens, per_document=per_document, text_field=text_field,
        baseline=baseline, limit=limit, batch_size=batch_size, num_fewshot=num_fewshot, seed=seed,
        device=device,
    )  # fmt: skip
    drawn = None if pictures is None else Path(pictures)
    return evaluator.measure(model, dense=dense, activation_bits=activation_bits, pictures=drawn)


class Evaluator:
    """`evaluate` for several models: the text and the baseline are read and measured once."""

    def __init__(
        self,
        *,
        tasks: Sequence[str],
        perplexity: str | None,
        baseline: str | Path | None,
        device: str,
        tokens: int | None = None,
        per_document: bool = False,
        text_field: str = "text",
        bos: bool = False,
        length: int = 512,
        stride: int | None = None,
        **settings: Any,
    ):
        if not tasks and perplexity is None:
            raise UsageError("nothing to evaluate: give tasks, a perplexity dataset, or both")
        check_tasks(tasks, settings.get("include_path"))
        self.device, self.baseline_path, self.dataset = device, baseline, perplexity
        self.settings = settings | {"tasks": tasks}
        self.windows = {"length": length, "stride": stride}
        self.bos, self.reading = bos, (text_field, tokens, per_document)
        self._baseline: Any = None
        self._baseline_linears: str | None = None
        self._text: dict[str, Any] | None = None

    @classmethod
    def of_recipe(cls, recipe: "Recipe", baseline: str | Path, device: str) -> "Evaluator":
        """As the recipe's `evaluate` section says."""
        section = recipe.evaluate
        assert section is not None
        text: dict[str, Any] = {"perplexity": None}
        if section.perplexity is not None:
            text = section.perplexity.model_dump()
            from compress.data.text import locate

            text["perplexity"] = locate(recipe, text.pop("dataset"))
        return cls(
            tasks=section.tasks, limit=section.limit, batch_size=section.batch_size,
            seed=section.seed,
            baseline=baseline if section.baseline else None, device=device, **text,
        )  # fmt: skip

    def measure(
        self,
        model: str | Path,
        *,
        dense: bool | None = None,
        activation_bits: int | None = None,
        seed: int | None = None,
        pictures: Path | None = None,
    ) -> dict[str, Any]:
        """The figures of one checkpoint, beside the baseline's.

        Args:
            dense: whether its quantised linears are expanded; None: if that is faster here.
            activation_bits: to which packed linears round what they read.
            seed: instead of the evaluator's.
            pictures: a folder for pictures of what was pruned, if the model prunes visual tokens.
        """
        from compress.loading.load import fastest_packing, load

        packed = not dense
        if dense is None:
            packed = fastest_packing(model, self.device, activation_bits)
        loaded, processor = load(
            model, self.device, self._dtype(), packed=packed, activation_bits=activation_bits
        )
        scores = self.measure_loaded(loaded, processor, str(model), seed=seed, pictures=pictures)
        if activation_bits is not None:
            scores["conditions"]["activation_bits"] = activation_bits
        return scores

    def measure_loaded(
        self,
        model: Any,
        processor: Any,
        name: str,
        *,
        seed: int | None = None,
        pictures: Path | None = None,
    ) -> dict[str, Any]:
        """The figures of a model that `compress.load` gave; `name` says in the conditions which.

        If it prunes visual tokens, `pruning` has what that saved in this very measurement.
        """
        from compress.eval.evaluate import Baseline, evaluate_model
        from compress.loading.load import fastest_packing, load
        from compress.pruning.pictures import watching

        if self._text is None:
            self._text = self._read_text(getattr(processor, "tokenizer", processor))
        if self._baseline is None and self.baseline_path is not None:
            packed = fastest_packing(self.baseline_path, self.device)
            reference, _ = load(
                self.baseline_path, self.device, self._dtype(), prune=False, packed=packed
            )
            self._baseline, self._baseline_linears = Baseline(reference), linears_of(reference)
        settings = self.settings if seed is None else self.settings | {"seed": seed}
        with watching(model) as watched:
            scores = evaluate_model(
                model, processor, baseline=self._baseline, **self._text, **settings
            )
        if watched is not None:
            scores["pruning"] = watched.figures()
            if pictures is not None:
                scores["pruning"]["pictures"] = watched.draw(pictures, processor)
        conditions = {
            "model": name,
            "baseline": None if self.baseline_path is None else str(self.baseline_path),
            "device": self.device,
            "dtype": str(model.dtype).removeprefix("torch."),
            "linears": linears_of(model),
        }
        if self._baseline_linears is not None:
            conditions["baseline_linears"] = self._baseline_linears
        if self.dataset is not None:
            conditions["perplexity_dataset"] = f"{self.dataset} (held out)"
        scores["conditions"] = conditions | scores.get("conditions", {})
        return scores

    def _dtype(self) -> Any:
        import torch

        return None if self.device.startswith("cuda") else torch.float32

    def _read_text(self, tokenizer: Any) -> dict[str, Any]:
        """The held-out text as ids, one stream or a list a document, and its windows."""
        if self.dataset is None:
            return {}
        if self.bos and tokenizer.bos_token_id is None:
            raise UsageError("bos was asked for, but this model's tokenizer has no BOS token")
        from compress.data.text import load_documents
        from compress.data.windows import encode, token_stream

        text_field, tokens, per_document = self.reading
        corpus = load_documents(self.dataset, "held_out", text_field)
        windows = self.windows | {"bos": tokenizer.bos_token_id if self.bos else None}
        if not per_document:
            return windows | {"text_ids": token_stream(corpus, tokenizer, tokens)}
        documents: list[list[int]] = []
        total = 0
        for ids in encode(tokenizer, list(corpus.texts)):
            if tokens is not None and total >= tokens:
                break
            documents.append(ids)
            total += len(ids)
        return windows | {"documents": documents}


def linears_of(model: Any) -> str:
    """`packed` where linears of a loaded model are, else `dense`."""
    from compress.kernels.linear import QuantLinear

    return "packed" if any(isinstance(m, QuantLinear) for m in model.modules()) else "dense"


def evaluate_recipe(
    recipe: "Recipe", model: str | Path, baseline: str | Path, device: str = "cpu"
) -> dict[str, Any]:
    """What the recipe's `evaluate` section asks for; {} where it asks for nothing."""
    section = recipe.evaluate
    if section is None or not (section.tasks or section.perplexity):
        return {}
    return Evaluator.of_recipe(recipe, baseline, device).measure(
        model, pictures=Path(model) / "eval"
    )


def check_tasks(
    tasks: Sequence[str], include_path: str | Path | Sequence[str | Path] | None = None
) -> None:
    """UsageError if lm-eval is not there or does not know one of the tasks."""
    if not tasks:
        return
    from compress.eval.harness import find_tasks, import_harness

    import_harness()
    find_tasks(tasks, include_path)


def check_evaluation(recipe: "Recipe") -> None:
    """UsageError for what an evaluation would trip over: before a long run, not after it."""
    section = recipe.evaluate
    if section is None:
        return
    check_tasks(section.tasks)
    if section.perplexity is not None:
        from compress.data.text import load_documents, locate

        p = section.perplexity
        load_documents(locate(recipe, p.dataset), "held_out", p.text_field)
