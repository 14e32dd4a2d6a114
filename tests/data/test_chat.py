"""Conversations: what rows may hold, and whose tokens count in a model's own template."""

import json

import pytest
import torch

from compress.data.chat import Templated, conversation, read_conversation, render
from compress.data.source import CalibrationSource
from compress.data.windows import conversation_windows, conversations_of, doubts, repeated_share
from compress.errors import UsageError
from compress.recipe.sections import Calibration
from support.refusals import refused
from support.tiny_lm import byte_tokenizer

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "More?"},
    {"role": "assistant", "content": "No, thanks."},
]
SHAREGPT = [
    {"from": {"user": "human", "assistant": "gpt"}.get(t["role"], t["role"]), "value": t["content"]}
    for t in TURNS
]
# As ChatML: headers, an end of turn that is the tokenizer's EOS, a line end behind it.
CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m['role'] }}>\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<end>{% endgeneration %}{% else %}{{ m['content'] }}<end>"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
# A prompt that opens a thought, which finished answers do not show.
THINKING = CHATML.replace("<assistant>\n{% endif %}", "<assistant>\n<think>\n{% endif %}")
# The last answer is written otherwise than those before it.
LAST = (
    "{% for m in messages %}<{{ m['role'] }}>\n{% if loop.last and m['role'] == 'assistant' %}"
    "<think></think>{% endif %}{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
ANSWERS = "Yes.<end>No, thanks.<end>"


def tokenizer_with(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def counted(template, turns=TURNS, **options):
    """The text of the tokens that count."""
    tokenizer = tokenizer_with(template)
    chat = Templated.of(tokenizer, turns, "here", assistant=True, **options)
    assert tokenizer.decode(chat.ids) == render(tokenizer, turns, "here", **options)
    return tokenizer.decode([i for i, counts in zip(chat.ids, chat.mask, strict=True) if counts])


# ---- rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [{"messages": TURNS}, {"conversations": SHAREGPT}, {"messages": SHAREGPT},
     {"conversations": TURNS}, {"id": 3, "messages": [
         t | {"content": [{"type": "text", "text": t["content"]}]} for t in TURNS]}],
    ids=["messages", "sharegpt", "mixed", "swapped", "parts"],
)  # fmt: skip
def test_rows_of_both_kinds(row):
    assert conversation(row, "here") == TURNS


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"messages": []}, ["messages", "[]"]),
        ({"messages": "hi"}, ["messages", '"hi"']),
        ({"messages": ["hi"]}, ["messages[0]", '"hi"']),
        ({"messages": [{"content": "hi"}]}, ["messages[0].role", None]),
        ({"messages": [{"role": "usr", "content": "hi"}]}, ["messages[0].role", "'usr'", "'user'"]),
        ({"conversations": [{"from": "gtp", "value": ""}]}, ["conversations[0].from", "'gpt'"]),
        ({"messages": [*TURNS, {"role": "user", "content": 5}]}, ["messages[5].content", 5]),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, ["messages[0].content", "ud800"]),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            ["messages[0].content[0]", "image"],
        ),
    ],
)
def test_a_wrong_row_is_named_by_place_field_and_value(row, named):
    with refused(UsageError, "file.jsonl:7", *named):
        conversation(row, "file.jsonl:7")


def test_a_file_of_one_conversation(tmp_path):
    file = tmp_path / "chat.json"
    for value in (TURNS, {"messages": TURNS}, {"conversations": SHAREGPT}):
        file.write_text(json.dumps(value), encoding="utf-8")
        assert read_conversation(file) == TURNS
    lines = tmp_path / "chat.jsonl"
    lines.write_text("\n".join(map(json.dumps, TURNS)) + "\n\n", encoding="utf-8")
    assert read_conversation(lines) == TURNS
    lines.write_text(json.dumps({"messages": TURNS}), encoding="utf-8")
    assert read_conversation(lines) == TURNS
    for text, named in (("{", "JSON"), ("", "empty"), ('{"role": "x"}', "role")):
        lines.write_text(text, encoding="utf-8")
        with refused(UsageError, lines, named):
            read_conversation(lines)
    lines.write_text(f"{json.dumps({'messages': TURNS})}\n" * 2, encoding="utf-8")
    with refused(UsageError, lines, "one conversation", 2):
        read_conversation(lines)
    with refused(UsageError, tmp_path / "absent.json"):
        read_conversation(tmp_path / "absent.json")


# ---- whose tokens -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template", [CHATML, MARKED, THINKING], ids=["plain", "marked", "thinking"]
)
def test_the_assistants_tokens_and_the_end_of_its_turns_count(template):
    assert counted(template) == ANSWERS


def test_a_template_without_an_end_of_turn():
    template = CHATML.replace("<end>", "")
    assert counted(template) == "Yes.\nNo, thanks.\n"


def test_turns_that_change_once_others_follow_are_refused():
    with refused(UsageError, "here", "message 2", "loss_mask"):
        counted(LAST)
    assert counted(LAST, TURNS[:3]) == "<think></think>Yes.<end>"


def test_markers_that_mark_nothing_are_refused():
    template = CHATML + "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    with refused(UsageError, "here", "loss_mask", "markers"):
        counted(template)


def test_a_template_that_refuses(tmp_path):
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    )
    with refused(UsageError, "here", "no system"):
        render(tokenizer_with(template), TURNS, "here")
    with refused(UsageError, "here", "chat template"):
        render(byte_tokenizer(), TURNS, "here")
    for broken in ("{{ 1 / 0 }}", "{{ 10**400 * 1.0 }}", "{{ messages[9]['role'] + 1 }}"):
        with refused(UsageError, "here", "template refuses"):
            render(tokenizer_with(broken), TURNS, "here")


@pytest.mark.parametrize("template", [CHATML, MARKED, THINKING])
def test_a_conversation_that_begins_with_the_assistant(template):
    assert counted(template, TURNS[2:]) == ANSWERS
    assert counted(template, TURNS[2:3]) == "Yes.<end>"


def test_an_opening_that_cannot_be_found_in_the_text():
    upper = CHATML.replace("{{ m['content'] }}", "{{ m['content'] | upper }}")
    with refused(UsageError, "here", "message 0", "loss_mask"):
        counted(upper, TURNS[2:])
    with refused(UsageError, "here", "message 0", "loss_mask"):
        counted(CHATML, [{"role": "assistant", "content": ""}, *TURNS[3:]])


def test_the_column_that_is_filled_is_read():
    assert conversation({"messages": None, "conversations": SHAREGPT}, "here") == TURNS
    assert conversation({"messages": TURNS, "conversations": None}, "here") == TURNS


def test_content_in_parts_for_templates_that_want_them():
    template = CHATML.replace("m['content']", "m['content'][0]['text']")
    assert counted(template, parts=True) == ANSWERS


# ---- windows ------------------------------------------------------------------------------------


def rows_of(*texts, role="assistant"):
    return [
        (f"f:{i}", {"messages": [{"role": "user", "content": "?"}, {"role": role, "content": t}]})
        for i, t in enumerate(texts)
    ]


def windows_of(rows, tokenizer=None, context=None, **settings):
    section = Calibration(**{"loss_mask": "assistant", "length": 64, "samples": 9} | settings)
    return conversation_windows(rows, tokenizer or tokenizer_with(CHATML), section, context)


def test_a_conversation_a_window_padded_behind():
    windows = windows_of(rows_of("one", "three three", "two"))
    tokenizer = tokenizer_with(CHATML)
    assert windows.input_ids.shape == (
        3,
        len(tokenizer("<user>\n?<end>\n<assistant>\nthree three<end>\n").input_ids),
    )
    texts = set()
    for ids, mask in zip(windows.input_ids, windows.mask, strict=True):
        text = tokenizer.decode(ids[mask])
        assert text[0] == "<"  # the first token, which all others attend to
        texts.add(text[1:])
        whole = tokenizer.decode(ids)
        assert whole.startswith("<user>\n?<end>\n<assistant>\n")
        assert set(whole[whole.rindex("\n") + 1 :].split("<end>")) <= {""}  # padding
    assert texts == {"one<end>", "three three<end>", "two<end>"}
    facts = windows.facts()
    assert facts["counted_tokens"] == int(windows.mask.sum()) == 3 + 3 * 1 + 3 + 11 + 3
    assert facts["tokens"] == sum(
        len(tokenizer(f"<user>\n?<end>\n<assistant>\n{t}<end>\n").input_ids)
        for t in ("one", "three three", "two")
    )
    assert (facts["cut"], facts["left_out"]) == (0, 0)


def test_all_tokens_but_the_padding_count_without_a_loss_mask():
    windows = windows_of(rows_of("one", "three three"), loss_mask="all")
    assert windows.facts()["counted_tokens"] == windows.facts()["tokens"]
    assert not windows.mask.all()


def test_what_is_cut_and_what_is_left_out_is_counted_and_said():
    rows = rows_of("a" * 90, "b") + rows_of("no answer", role="user")
    windows = windows_of(rows)
    assert windows.facts() | {"cut": 1, "left_out": 1} == windows.facts()
    said = "\n".join(doubts(windows, 1, 4, 257))
    assert "1 of 2 conversations" in said and "1 conversations were left out" in said
    assert f"2 conversations are all there are, {windows.facts()['fewer']} fewer" in said
    with refused(UsageError, "calibration.length", 8, "loss_mask"):
        windows_of(rows, length=8)


def test_the_seed_draws_the_conversations():
    rows = rows_of(*"abcdefgh")
    first, again = (windows_of(rows, samples=4, seed=1) for _ in range(2))
    assert torch.equal(first.input_ids, again.input_ids)
    assert not torch.equal(first.input_ids, windows_of(rows, samples=4, seed=2).input_ids)
    assert len(first) == 4


def test_bos_is_written_once():
    tokenizer = tokenizer_with(CHATML)
    assert windows_of(rows_of("a"), tokenizer, bos=True).input_ids[0, :2].tolist().count(256) == 1
    own = tokenizer_with("<end>" + CHATML)
    ids = windows_of(rows_of("a"), own, bos=True).input_ids[0]
    assert ids[0] == 256 and ids[1] != 256
    assert windows_of(rows_of("a"), own).input_ids[0].tolist() == ids.tolist()


def test_what_conversations_cannot_be():
    with refused(UsageError, "calibration.expansion"):
        windows_of(rows_of("a"), expansion=2)
    with refused(UsageError, "calibration.length", 64, 32):
        windows_of(rows_of("a"), context=32)
    with refused(UsageError, "f:0", "messages"):
        windows_of([("f:0", 3)])


def test_padding_and_prompts_are_no_text_that_repeats_itself():
    mask = torch.zeros(4, 99, dtype=torch.bool)
    ids = torch.zeros(4, 99, dtype=torch.int64)
    ids[:, :40] = torch.arange(160).view(4, 40)
    mask[:, :40] = True
    assert repeated_share(ids) > 0.3
    assert repeated_share(ids, mask) == 0
    assert repeated_share(ids, torch.zeros_like(mask)) == 0


# ---- which datasets are conversations -----------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "settings", "chats"),
    [
        ({"messages": TURNS}, {}, True),
        ({"conversations": SHAREGPT}, {}, True),
        ({"text": "t", "messages": TURNS}, {}, False),
        ({"text": "t", "messages": TURNS}, {"text_field": "messages"}, True),
        ({"text": "t"}, {}, False),
        ({"body": "t", "messages": TURNS}, {"text_field": "body"}, False),
    ],
)
def test_text_wins_unless_the_conversations_are_named(tmp_path, row, settings, chats):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")

    def source(**more):
        section = Calibration(dataset=str(file), **settings, **more)
        return CalibrationSource(section, str, used=True, sees=False)

    assert (conversations_of(source()) is not None) == chats
    if not chats:
        with refused(UsageError, "calibration.loss_mask", "text_field", file):
            conversations_of(source(loss_mask="assistant"))


def test_hub_datasets_of_conversations(monkeypatch, tmp_path):
    import sys
    from types import SimpleNamespace

    class Table(list):
        column_names = ("id", "conversations")

    table = Table([{"id": i, "conversations": SHAREGPT} for i in range(3)])
    package = SimpleNamespace(load_dataset=lambda *_, **__: {"train": table})
    monkeypatch.setitem(sys.modules, "datasets", package)
    section = Calibration(dataset="me/chats", loss_mask="assistant")
    rows = conversations_of(CalibrationSource(section, str, used=True, sees=False))
    assert len(rows) == 3
    place, row = rows[1]
    assert place == "me/chats[1]"
    assert conversation(row, place) == TURNS
    notes = tmp_path / "notes.txt"
    notes.write_text("a text")
    for name in ("python-stdlib", str(notes)):
        section = Calibration(dataset=name, loss_mask="assistant")
        with refused(UsageError, "calibration.loss_mask", name):
            conversations_of(CalibrationSource(section, str, used=True, sees=False))
