"""Conversations: read from rows, put into a model's chat template, and who wrote which token.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}

The template writes all special tokens, BOS among them: its text is tokenised without any more. The
tokens of the assistant are those between the template's `{% generation %}` markers. Where it has
none, they are found by rendering the conversation up to a turn: what the whole has behind the
prompt for an answer, and up to the end of that answer, is the assistant's. That needs a template
that writes a turn alike whatever follows; one that does not is refused, for no token could be told
apart.

    messages = conversation(row, "chat.jsonl:1")
    chat = Templated.of(tokenizer, messages, "chat.jsonl:1", assistant=True)
    chat.ids, chat.mask
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from compress.data.text import check_characters
from compress.errors import UsageError, unknown
from compress.models.config_values import STUMBLES, reason_of

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedTokenizerBase

KEYS = ("messages", "conversations")
# Of ShareGPT's `from`, and of those who write `role`.
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")

REFUSALS: tuple[type[Exception], ...] = (TemplateError, ValueError, OverflowError, *STUMBLES)

Message = dict[str, Any]  # role, content, and what else its template reads


def conversation(row: Mapping[str, Any], place: str) -> list[Message]:
    """The messages of a row, in the names that templates know.

    Raises UsageError, which names place, field and value.
    """
    key = next((key for key in KEYS if row.get(key) is not None), KEYS[0])
    turns = row.get(key)
    if not isinstance(turns, list) or not turns:
        raise UsageError(f"{place}: {key}: expected a list of messages, found {_shown(turns)}")
    return [_message(turn, f"{place}: {key}[{i}]") for i, turn in enumerate(turns)]


def _message(turn: object, place: str) -> Message:
    if not isinstance(turn, Mapping):
        raise UsageError(f'{place}: expected {{"role": ..., "content": ...}}, found {_shown(turn)}')
    names = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
    role, content = turn.get(names[0]), turn.get(names[1])
    if not isinstance(role, str) or role not in ROLES:
        raise UsageError(f"{place}.{names[0]}: {unknown('role', role, ROLES)}")
    if isinstance(content, list):
        content = _joined(content, f"{place}.{names[1]}")
    if content is None and "tool_calls" in turn:
        content = ""
    if not isinstance(content, str):
        raise UsageError(f"{place}.{names[1]}: expected a text, found {_shown(content)}")
    check_characters(content, f"{place}.{names[1]}")
    others = {k: v for k, v in turn.items() if k not in names and v is not None}
    return {"role": ROLES[role], "content": content} | others


def _joined(parts: Sequence[object], place: str) -> str:
    """A content in parts, all of which must be text."""
    texts = []
    for i, part in enumerate(parts):
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            raise UsageError(f"{place}[{i}]: expected a part of text, found {_shown(part)}")
        texts.append(text)
    return "".join(texts)


def read_conversation(path: Path) -> list[Message]:
    """A file's one conversation: JSON (a list of messages, or a row), or a message a line.

    Raises UsageError, which names file, line and field.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as JSON: {reason_of(error)}") from error
    lines = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if path.suffix == ".jsonl":
        rows = [_parsed(line, f"{path}:{n}") for n, line in lines]
        if len(rows) == 1 and isinstance(rows[0], Mapping) and not rows[0].keys().isdisjoint(KEYS):
            return conversation(rows[0], f"{path}:{lines[0][0]}")
        if not rows:
            raise UsageError(f"{path}: expected a message a line, found an empty file")
        if isinstance(rows[0], Mapping) and not rows[0].keys().isdisjoint(KEYS):
            raise UsageError(
                f"{path}: expected one conversation, a message a line, found {len(rows)}: keep one "
                f"of its lines"
            )
        return [_message(row, f"{path}:{n}") for row, (n, _) in zip(rows, lines, strict=True)]
    value = _parsed(text, str(path))
    return conversation(value if isinstance(value, Mapping) else {KEYS[0]: value}, str(path))


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{place}: not valid JSON: {error}") from error


def _shown(value: object) -> str:
    return json.dumps(value, default=str)[:60]


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    place: str,
    *,
    answer: bool = False,
    parts: bool = False,
) -> str:
    """The conversation in the template of a tokenizer or processor.

    Args:
        answer: whether the prompt for the assistant's next turn stands behind it.
        parts: whether the template wants contents as lists, as those of multimodal models do.

    Raises UsageError where there is no template, and for what it refuses.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(f"{place}: this model's tokenizer has no chat template")
    return _applied(tokenizer, messages, place, parts, tokenize=False, add_generation_prompt=answer)


def _applied(
    tokenizer: Any, messages: Sequence[Message], place: str, parts: bool, **options: bool
) -> Any:
    """`apply_chat_template`; UsageError for what the template refuses."""
    if parts:
        messages = [m | {"content": in_parts(m["content"])} for m in messages]
    try:
        return tokenizer.apply_chat_template(list(messages), **options)
    except REFUSALS as error:
        raise UsageError(
            f"{place}: the model's chat template refuses this conversation: {reason_of(error)}"
        ) from error


def in_parts(content: Any) -> list[Message]:
    """A content as the templates of multimodal models want it."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


@dataclass(frozen=True)
class Templated:
    """A conversation as token ids, and which of them count."""

    ids: list[int]
    mask: list[bool]

    @classmethod
    def of(
        cls,
        tokenizer: "PreTrainedTokenizerBase",
        messages: Sequence[Message],
        place: str,
        *,
        assistant: bool = False,
        parts: bool = False,
    ) -> "Templated":
        """Of a whole conversation; with `assistant`, its tokens alone count.

        Raises UsageError as `render` does, and where the assistant's tokens cannot be told.
        """
        text = render(tokenizer, messages, place, parts=parts)
        if not assistant:
            ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            return cls(ids, [True] * len(ids))
        if not tokenizer.is_fast:
            raise UsageError(
                f"{place}: calibration.loss_mask: assistant needs a tokenizer that says where each "
                "token stands in the text (tokenizer.json), which this model has not"
            )
        if MARKER.search(_template(tokenizer)):
            options = {"return_dict": True, "return_assistant_tokens_mask": True}
            marked = _applied(tokenizer, messages, place, parts, tokenize=True, **options)
            mask = [bool(m) for m in marked["assistant_masks"]]
            if not any(mask) and any(m["role"] == "assistant" and m["content"] for m in messages):
                raise UsageError(
                    f"{place}: calibration.loss_mask: the chat template's generation markers mark "
                    "nothing of the assistant's: use loss_mask: all"
                )
            return cls(list(marked["input_ids"]), mask)
        spans = _spans(tokenizer, messages, text, place, parts)
        encoded = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        starts = [start for start, _ in encoded["offset_mapping"]]
        mask = [any(first <= start < last for first, last in spans) for start in starts]
        return cls(encoded["input_ids"], mask)


def _template(tokenizer: Any) -> str:
    """The template that is applied where none is named."""
    template = tokenizer.chat_template
    return template.get("default", "") if isinstance(template, Mapping) else template


def _spans(
    tokenizer: Any, messages: Sequence[Message], text: str, place: str, parts: bool
) -> list[tuple[int, int]]:
    """Where in the rendered text each answer of the assistant's begins and ends."""
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        turn = f"{place}: message {i}"
        if i == 0:
            spans.append(_opening(tokenizer, message, text, turn, parts))
            continue
        before = render(tokenizer, messages[:i], turn, parts=parts)
        asked = render(tokenizer, messages[:i], turn, answer=True, parts=parts)
        after = render(tokenizer, messages[: i + 1], turn, parts=parts)
        # A prompt that opens a thought, which a finished answer has not, counts up to there.
        first = _common(asked, text)
        if not text.startswith(before) or first < len(before) or not text.startswith(after):
            raise UsageError(
                f"{turn}: calibration.loss_mask: the chat template writes this turn otherwise once "
                "others follow, and has no generation markers: use conversations of one answer, or "
                "loss_mask: all"
            )
        spans.append((first, _end(tokenizer, text, first, len(after))))
    return spans


def _opening(
    tokenizer: Any, message: Message, text: str, place: str, parts: bool
) -> tuple[int, int]:
    """The same of an answer that nobody asked for: what it says, and the end of its turn."""
    said = message["content"].strip()
    after = render(tokenizer, [message], place, parts=parts)
    first = text.find(said) if said else -1
    if first < 0 or not text.startswith(after):
        raise UsageError(
            f"{place}: calibration.loss_mask: the conversation begins with the assistant, and "
            "where the chat template puts that cannot be told: begin it with a user's turn, or "
            "use loss_mask: all"
        )
    return first, _end(tokenizer, text, first, len(after))


def _end(tokenizer: Any, text: str, first: int, last: int) -> int:
    """Where an answer ends that begins at `first`, in a turn that ends at `last`."""
    eos = tokenizer.eos_token
    if eos and (ends := text.rfind(eos, first, last)) >= 0:
        return ends + len(eos)  # what the template writes behind it is not the assistant's
    return last


def _common(a: str, b: str) -> int:
    """How many characters two texts begin alike with."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
