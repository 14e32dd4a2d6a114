"""A question to a model: turns of a conversation and images, as `generate` takes them.

    question = Question.of("What is the capital of France?", system="Be brief.")
    inputs, templated = question_inputs(tokenizer, question, "out")

Where the model has a chat template the question is put into it, and nothing is added to what the
template writes: a BOS, if it writes one, is the only one. Without one, or where the caller says so,
the prompt is continued as it is, with the special tokens that the tokenizer puts before a text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.data.chat import Message, in_parts, read_conversation, render
from compress.data.samples import image_parts, raw_text, text_inputs
from compress.errors import UsageError
from compress.models.vision import Inputs

if TYPE_CHECKING:  # slow to import
    from PIL.Image import Image
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        messages: the turns; the last is a user's, or a tool's.
        images: of the last user's turn.
        chat: whether the chat template is used; None: where there is one.
        turns: whether more than a prompt was given, which only a template has a place for.
    """

    messages: Sequence[Message]
    images: "Sequence[Image]" = ()
    chat: bool | None = None
    turns: bool = False

    @classmethod
    def of(
        cls,
        prompt: str | None,
        system: str | None = None,
        messages: Path | None = None,
        images: "Sequence[Image]" = (),
        chat: bool | None = None,
    ) -> "Question":
        """The prompt behind a file's turns, and the system prompt before them.

        Raises UsageError, which names option, file and value.
        """
        turns = [] if messages is None else read_conversation(messages)
        if system is not None:
            if any(turn["role"] == "system" for turn in turns):
                raise UsageError(f"--system: {messages} has a system prompt already: give one")
            turns = [{"role": "system", "content": system}, *turns]
        if prompt is not None:
            turns = [*turns, {"role": "user", "content": prompt}]
        if turns[-1]["role"] not in ("user", "tool"):
            raise UsageError(
                f"{messages}: the last turn is the {turns[-1]['role']}'s: give a prompt as well, "
                "or end with a user's"
            )
        several = system is not None or messages is not None
        if chat is False and several:
            raise UsageError("--raw: --system and --messages are for a chat template: leave it out")
        return cls(turns, images, chat, several)


def question_inputs(processor: Any, question: Question, name: str) -> tuple[Inputs, bool]:
    """Keyword arguments of a forward, and whether a chat template was used.

    Args:
        processor: the model's tokenizer, of a multimodal model its processor.
        name: of the model, in errors.

    Raises UsageError: no chat template for what needs one, what the template refuses, images for a
    model that takes none, or a prompt without a token.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    multimodal = tokenizer is not processor
    if question.images and not multimodal:
        raise UsageError(f"{name} reads text alone: leave out --image")
    owner = processor if getattr(processor, "chat_template", None) else tokenizer
    has_template = bool(getattr(owner, "chat_template", None))
    if not has_template and (question.chat or question.turns):
        raise UsageError(
            f"{name} has no chat template: give a prompt alone, which is continued as it is (--raw)"
        )
    templated = has_template if question.chat is None else question.chat
    if templated:
        messages = list(question.messages)
        if question.images:
            i = max(i for i, m in enumerate(messages) if m["role"] == "user")
            content = [*image_parts(len(question.images)), *in_parts(messages[i]["content"])]
            messages[i] = messages[i] | {"content": content}
        text = render(owner, messages, name, answer=True, parts=multimodal)
    else:
        text = question.messages[-1]["content"]
    if question.images:
        try:
            text = text if templated else raw_text(processor, text, len(question.images))
            return text_inputs(processor, text, list(question.images)), templated
        except ValueError as error:  # image tokens and images that differ in number
            raise UsageError(f"--prompt: {' '.join(str(error).split())}") from error
    inputs = tokenizer(
        text,
        return_tensors="pt",
        return_token_type_ids=False,
        add_special_tokens=not templated,
    )
    if inputs["input_ids"].shape[1] == 0:
        raise UsageError("--prompt has no tokens: give some text to continue")
    return dict(inputs), templated


def room_for(config: "PretrainedConfig", inputs: Inputs, asked: int) -> int:
    """How many of `asked` new tokens the model's context has room for behind the prompt.

    Raises UsageError where the prompt fills it already.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return asked
    prompt = inputs["input_ids"].shape[1]
    if prompt >= context:
        raise UsageError(
            f"the prompt has {prompt:,} tokens, and the model's context is {context:,}: shorten it"
        )
    return min(asked, context - prompt)
