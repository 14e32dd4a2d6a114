"""Prunes visual tokens of a transformers model while a context is open, with hooks on its modules.

    with compress.prune_visual_tokens(model, strategy) as pruning:
        model.generate(**inputs)
    pruning.stats.as_dict(), pruning.last

Hooks sit on this one model's modules, wrappers round its `generate` and `get_image_features`; they
go when the context closes. The state of a forward belongs to the thread that it runs in, so threads
may share a model: each forward is what it is alone (`random` draws in the order of forwards). A
pruned run equals the full run in which the pruned keys are masked out from their stage on; what is
left keeps its positions.

Stage 0 shortens what enters the language model, a stage before layer k the hidden states, rotary
embeddings and masks of the layers from k on, whose caches are then shorter. What the tower adds to
the stream between later layers (Qwen3-VL's DeepStack) is added here instead, shortened as well.
While decoding, each stage's mask is rebuilt from its own cache length. Text-only prompts run
unpruned and are counted.

Not for: beam search, assisted decoding, static and sliding-window caches, prompts that are
prefilled in pieces. Each is refused.
"""

import warnings
from collections.abc import Callable
from functools import partial
from inspect import signature
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.hooks import RemovableHandle
from transformers import Cache, PreTrainedModel
from transformers.masking_utils import create_causal_mask

from compress.errors import UsageError
from compress.models.vision import Inputs
from compress.pruning.costs import DecoderShape, PruningStats, prompt_stats, without_voters
from compress.pruning.encoding import EncodedImages, ready_features
from compress.pruning.families import tower_of
from compress.pruning.last_token import LastTokenAttention, check_decoder
from compress.pruning.per_thread import PerThread
from compress.pruning.prompt import PrunedPrompt, take, take_positions
from compress.pruning.refusals import check_inputs, checked_generate
from compress.pruning.stages import Stages, seed_of
from compress.pruning.tower import Processor
from compress.recipe.strategy import PruneStrategy

Changed = tuple[tuple, Inputs] | None  # arguments that a hook puts in place of a forward's


def prune_visual_tokens(
    model: PreTrainedModel, strategy: PruneStrategy, processor: Processor | None = None
) -> "VisualTokenPruning":
    """A context in which `model` prunes the visual tokens of its prompts.

    Args:
        model: one of the classes of `compress.pruning.families`, or PEFT's wrapper round one.
        strategy: which tokens stay, and where.
        processor: the model's processor or image processor. Only the entropy term asks it, for the
            pixels' mean and deviation; without it the vision tower's usual ones are assumed.

    Raises:
        UsageError: another model, a tower whose attention cannot be read, a stage too deep.
    """
    return VisualTokenPruning(model, strategy, processor)


class _Step:
    """One forward: the prompt it belongs to, and what the later layers get instead."""

    def __init__(self, prompt: PrunedPrompt | None, inputs: Inputs, prefill: bool):
        self.prompt, self.inputs, self.prefill = prompt, inputs, prefill
        self.override: Inputs = {}
        self.added: dict[int, Tensor] = {}  # [B, S, D] behind layer i, by i
        self.cache: Cache | None = None
        self.appended: Tensor | None = None  # [B, new] mask of the tokens after the prompt
        self.final_positions: Tensor | None = None  # [..., B, 1] of the prompt, once shortened

    def valid(self, prompt: PrunedPrompt, layer: int) -> Tensor:
        """While decoding, which of the slots of `layer` hold a token: [B, S + new] bool."""
        assert self.appended is not None
        return torch.cat([prompt.view(layer).valid, self.appended], dim=1)


class VisualTokenPruning:
    """The context of `prune_visual_tokens`: `stats` over all prompts, `last` the latest one."""

    def __init__(
        self, model: PreTrainedModel, strategy: PruneStrategy, processor: Processor | None = None
    ):
        self._wrappers, model = unwrapped(model)
        tower = tower_of(model)
        self.model, self.strategy = model, strategy
        self.base, self.text = model.model, model.model.get_decoder()
        self.layers = self.text.layers
        check_decoder(self.text)
        strategy.average_kept(len(self.layers))  # refuses a stage beyond the last layer
        self.stages = Stages(strategy, len(self.layers))
        self.tap = self.stages.tap(self.base, tower, processor)
        self.attention = {
            layer: LastTokenAttention(self.layers[layer - 1].self_attn)
            for layer in strategy.stages
            if strategy.ranks_by_language_attention
        }
        self.shape = DecoderShape.of(self.text.config, self.text.dtype.itemsize)
        self.image_token = model.config.image_token_id
        self.stats = PruningStats()
        self.warns = True  # once, of images in which no patch votes
        self._last: PrunedPrompt | None = None
        self._own = PerThread[PrunedPrompt | None](lambda: None)
        self._handles: list[RemovableHandle] = []

    @property
    def last(self) -> PrunedPrompt | None:
        """The latest prompt of this thread; where it had none, the latest of all."""
        return self._own.value or self._last

    @last.setter
    def last(self, prompt: PrunedPrompt | None) -> None:
        self._own.value = self._last = prompt

    def __enter__(self) -> "VisualTokenPruning":
        if "generate" in vars(self.model):
            raise UsageError("this model's visual tokens are already pruned: leave that context")
        self._now = PerThread[_Step | None](lambda: None)
        self.encoded = EncodedImages(self.tap)
        # By cache, so that generations on one model may take turns.
        self._prompts: WeakKeyDictionary[Cache, PrunedPrompt] = WeakKeyDictionary()
        self._final: WeakKeyDictionary[Cache, Tensor] = WeakKeyDictionary()  # last position ids
        self._generator = torch.Generator().manual_seed(self.strategy.seed)
        self._handles = self.tap.install()
        before = partial(self._hook, with_kwargs=True)
        # An adapter's wrapper calls the forward of what it holds, and no hook of it.
        for module in (self.model, *self._wrappers):
            before(module, self._before_head)
        self._adapted = _adapters(self.model)
        before(self.base, self._before_model)
        before(self.text, self._before_text)
        for number, layer in enumerate(self.layers):
            before(layer, partial(self._before_layer, number))
        for tap in self.attention.values():
            self._handles += tap.install()
        self._handles.append(self.base.register_forward_hook(self._after_model))
        self.base.get_image_features = self.encoded.noting(self.base.get_image_features)
        generate = checked_generate(self.model, self._unpruned_length)
        self.model.generate = generate  # type: ignore[assignment]  # torch allows modules only
        return self

    def draw_for(self, number: int) -> None:
        """What is drawn for the next prompt depends on the strategy's seed and this number."""
        self._generator.manual_seed(seed_of(self.strategy.seed, number))

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        del self.model.generate, self.base.get_image_features  # the classes' own are there again
        self._now, self.encoded = PerThread(lambda: None), EncodedImages(self.tap)  # lets go

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        # The copy would hold this model's hooks, and answer for this model.
        raise UsageError(
            "a model cannot be copied while its visual tokens are pruned: leave the context, or "
            "call stop_pruning, first"
        )

    def _hook(self, module: nn.Module, hook: Callable[..., Changed], **options: bool) -> None:
        self._handles.append(module.register_forward_pre_hook(hook, **options))

    def _before_head(self, module: nn.Module, args: tuple, kwargs: Inputs) -> None:
        if kwargs.get("labels") is not None:
            raise UsageError(
                "a pruned prompt has fewer logits than labels: compute the loss outside, with "
                "pruning.last.kept(layer) of the last layer"
            )

    def _before_model(self, module: nn.Module, args: tuple, kwargs: Inputs) -> Changed:
        """Finds out what this forward is: a new prompt, or the next tokens of one."""
        names = list(signature(type(module).forward).parameters)[1:]
        inputs = dict(zip(names, args, strict=False)) | kwargs
        self._now.value = None
        if _adapters(self.model) != self._adapted:
            raise UsageError(
                "adapters were added to the model, or taken off it, while its visual tokens were "
                "pruned: leave the context, or call stop_pruning, and prune anew"
            )
        check_inputs(inputs)
        cache: Cache | None = inputs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        if cache is None or past == 0:
            self.encoded.begin(inputs)
            self._now.value = _Step(None, inputs, prefill=True)
            return None
        if cache not in self._prompts:
            raise UsageError(
                "the cache was not filled in this context: begin with the whole prompt and an "
                "empty cache"
            )
        if ready_features(inputs) is not None or inputs.get("pixel_values") is not None:
            raise UsageError(
                "images after the first forward: give the prompt with all its images at once"
            )
        prompt = self._prompts[cache]
        self._now.value = step = _Step(prompt, inputs, prefill=False)
        view = prompt.view(0)
        new = past + inputs["input_ids"].shape[1] - view.index.shape[1]
        step.appended = _appended_mask(inputs.get("attention_mask"), prompt, new)
        final = self._final.get(cache)
        if final is None or (
            inputs.get("position_ids") is not None and self.strategy.positions == "original"
        ):
            return None
        count = inputs["input_ids"].shape[1]
        inputs["position_ids"] = final + torch.arange(new - count + 1, new + 1, device=final.device)
        return (), inputs

    def _unpruned_length(self, cache: Cache | None) -> int | None:
        """Tokens that a cache stands for, if a stage before the first layer made it shorter."""
        if cache is None or cache not in self._prompts:
            return None
        prompt, past = self._prompts[cache], int(cache.get_seq_length())
        pruned = prompt.length - prompt.view(0).index.shape[1]
        return past + pruned if past and pruned else None

    def _before_text(self, module: nn.Module, args: tuple, kwargs: Inputs) -> Changed:
        """Opens a new prompt and applies stage 0; while decoding, replaces the mask."""
        step = self._now.value
        if step is None:
            return None
        if step.prefill:
            step.prompt = self._open(step.inputs, kwargs["inputs_embeds"])
            changes = self._taken(step, kwargs) | self._stage_0(step, step.prompt, kwargs)
            return (args, kwargs | changes) if changes else None
        if step.prompt is not None and self._pruned_at_0(step.prompt):
            mask = step.valid(step.prompt, 0).long()
            return args, kwargs | {"attention_mask": mask}
        return None

    def _taken(self, step: _Step, kwargs: Inputs) -> Inputs:
        """Takes over what the language model would add between layers to visual tokens."""
        features = kwargs.get("deepstack_visual_embeds")
        if features is None:
            return {}
        places, embeds = kwargs["visual_pos_masks"], kwargs["inputs_embeds"]
        for number, values in enumerate(features):
            whole = torch.zeros_like(embeds)
            whole[places] = values.to(embeds)
            step.added[number] = whole
        return {"deepstack_visual_embeds": None, "visual_pos_masks": None}

    def _stage_0(self, step: _Step, prompt: PrunedPrompt, kwargs: Inputs) -> Inputs:
        """What the language model gets instead, if a stage before it prunes anything."""
        if 0 not in self.stages.numbers:
            return {}
        hidden, order = self._narrow(step, prompt, 0, kwargs["inputs_embeds"])
        if order is None:
            return {}
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(prompt.length, device=hidden.device)[None]
        step.final_positions = positions[..., -1:]
        positions = self.stages.positions(prompt, 0, positions, order)
        if self.strategy.positions == "renumbered":
            step.final_positions = positions[..., -1:]
        # Always a mask: without one, gaps in the positions would read as packed sequences.
        mask = prompt.view(0).valid.long()
        return {"inputs_embeds": hidden, "position_ids": positions, "attention_mask": mask}

    def _before_layer(self, number: int, module: nn.Module, args: tuple, kwargs: Inputs) -> Changed:
        """Applies the stage before this layer; the layers after it get its masks and positions."""
        step = self._now.value
        if step is None or step.prompt is None:
            return None
        step.cache = kwargs.get("past_key_values")
        prompt = step.prompt
        hidden = args[0] if args else kwargs["hidden_states"]
        if (added := step.added.pop(number - 1, None)) is not None:
            hidden = hidden + added.to(hidden)
        if number > 0 and number in self.stages.numbers:
            if step.prefill:
                arguments = kwargs | step.override
                hidden, order = self._narrow(step, prompt, number, hidden)
                if order is not None:
                    step.override = self._shortened(prompt, number, hidden, order, arguments)
            elif prompt.view(number).layer == number:
                mask = self._mask(hidden, step.valid(prompt, number), step.cache, number)
                step.override = {"attention_mask": mask}
        kwargs = kwargs | step.override
        if step.prefill and number + 1 in self.attention:
            self.attention[number + 1].turned(kwargs["position_embeddings"])
        if args:
            return (hidden, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": hidden}

    def _after_model(self, module: nn.Module, args: tuple, output: object) -> None:
        """Remembers the prompt by its cache, and what it cost."""
        step, self._now.value = self._now.value, None
        if step is None or not step.prefill or step.prompt is None:
            return
        self.last = step.prompt
        if step.cache is not None:
            self._prompts[step.cache] = step.prompt
            self._final.pop(step.cache, None)  # of an earlier prompt, if the cache was reset
            if step.final_positions is not None:
                self._final[step.cache] = step.final_positions
        self.stats.prompts.append(prompt_stats(self.shape, step.prompt))
        images = self.stats.prompts[-1].images
        if (crops := sum(image.empty_voters for image in images)) and self.warns:
            self.warns = False  # the stats count them all
            warnings.warn(without_voters(crops, len(images), self.strategy), stacklevel=2)

    def _open(self, inputs: Inputs, embeds: Tensor) -> PrunedPrompt:
        """The prompt with its images, nothing pruned yet."""
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
        mask = mask.to(embeds.device).bool()
        return PrunedPrompt(mask, self.encoded.placed(inputs, self.image_token))

    def _narrow(
        self, step: _Step, prompt: PrunedPrompt, layer: int, hidden: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Selects in every image; the hidden states [B, S', D] that stay, and their slots."""
        scores = None
        if layer in self.attention and prompt.images:
            scores = self.attention[layer].scores(prompt.views[-1].valid)  # [B, S]
        return self.stages.narrow(prompt, layer, hidden, self._generator, scores, step.added)

    def _shortened(
        self, prompt: PrunedPrompt, layer: int, hidden: Tensor, order: Tensor, arguments: Inputs
    ) -> Inputs:
        """What the layers from `layer` on get of the prefill's keyword arguments."""
        positions = arguments.get("position_ids")
        return {
            "attention_mask": self._mask(
                hidden, prompt.view(layer).valid, arguments.get("past_key_values"), layer
            ),
            "position_embeddings": tuple(take(x, order) for x in arguments["position_embeddings"]),
            "position_ids": None if positions is None else take_positions(positions, order),
        }

    def _mask(
        self, hidden: Tensor, valid: Tensor, cache: Cache | None, layer: int
    ) -> Tensor | BlockMask | None:
        """The attention mask of `layer`, in the form that the model's attention kernel wants."""
        return create_causal_mask(
            config=self.text.config,
            inputs_embeds=hidden,
            attention_mask=valid.long(),
            past_key_values=cache,
            layer_idx=layer,
        )

    @staticmethod
    def _pruned_at_0(prompt: PrunedPrompt) -> bool:
        return prompt.view(0).index.shape[1] != prompt.length or any(
            image.kept_at(0) < len(image.tokens) for image in prompt.images
        )


def unwrapped(model: PreTrainedModel) -> tuple[list[nn.Module], PreTrainedModel]:
    """PEFT's modules round a model, none for a model as it is, and the model itself."""
    inside = getattr(model, "get_base_model", None)
    if inside is None:
        return [], model
    found = inside()
    return [module for module in (model, model.base_model) if module is not found], found


def _adapters(model: PreTrainedModel) -> frozenset[str]:
    """The names of the adapters that PEFT has put into a model."""
    return frozenset(getattr(model, "peft_config", None) or ())


def _appended_mask(mask: Tensor | None, prompt: PrunedPrompt, new: int) -> Tensor:
    """Bool [B, new] of the tokens after the prompt, from a mask of the unpruned length if given."""
    if mask is not None and mask.shape[1] == prompt.length + new:
        return mask[:, prompt.length :].to(prompt.mask.device).bool()
    return prompt.mask.new_ones(prompt.mask.shape[0], new)
