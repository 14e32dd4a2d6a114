"""The excerpt of the calibration text with token weights: what is kept, and who gets to see it."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from compress.pipeline.publishing import push
from compress.pipeline.token_sample import LENGTH, layers_shown, may_be_quoted, pieces
from support.tiny_checkpoints import recipe_for, write_text


def byte_level() -> PreTrainedTokenizerFast:
    """A token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


def test_pieces_are_the_text_and_a_character_stands_with_its_last_byte():
    tokenizer = byte_level()
    for text in ("plain text", "naïve — 中文 🙂 end", "  two\n\n\tlines"):
        ids = tokenizer.encode(text)
        found = pieces(tokenizer, ids)
        assert len(found) == len(ids) and "".join(found) == text
    assert pieces(tokenizer, tokenizer.encode("aïb")) == ["a", "", "ï", "b"]


@pytest.mark.parametrize(
    ("count", "shown"), [(1, {0}), (2, {0, 1}), (3, {0, 1, 2}), (12, {2, 6, 9}), (30, {5, 15, 24})]
)
def test_an_early_a_middle_and_a_late_layer_are_shown(count, shown):
    assert layers_shown(count) == shown


DOCUMENTS = ("README.md", "report.html", "modelpress.json")


@pytest.fixture
def weighted(checkpoint, tmp_path, press):
    text = write_text(tmp_path / "own.jsonl")
    weights = {"token_importance": "attention_concentration", "bits": 4}
    return press(recipe_for(checkpoint(), text, quantize=weights), None)


def test_a_run_with_token_weights_keeps_a_sample(weighted):
    history = json.loads((weighted / "modelpress.json").read_text())
    tokens = history["token_sample"]["tokens"]
    _, length = history["calibration"]["windows"]
    assert len(tokens) == min(LENGTH, length)
    for layer in history["layers"]:
        if layer["layer"] is not None:
            assert len(layer["token_weights"]) == len(tokens)
            if len(tokens) == length:  # of the whole window
                assert sum(layer["token_weights"]) / length == pytest.approx(1, abs=0.01)
    assert (weighted / "report.html").read_text().count("<span style=") == 2 * len(tokens)
    assert "token_sample" not in (weighted / "README.md").read_text()


def test_a_run_that_weighs_all_alike_has_none(checkpoint, text, press):
    for section in ({"method": "gptq", "token_importance": "uniform"}, {"method": "rtn"}):
        folder = press(recipe_for(checkpoint(), text, quantize=section | {"bits": 4}), None)
        history = json.loads((folder / "modelpress.json").read_text())
        assert "token_sample" not in history
        assert not any("token_weights" in layer for layer in history["layers"])


def test_what_is_pushed_does_not_quote_a_text_of_ones_own(weighted, monkeypatch):
    sent = {}

    def upload(folder, *_, **options):
        sent.update({name: (folder / name).read_text() for name in DOCUMENTS})
        return {}

    monkeypatch.setattr("compress.checkpoint.hub.upload", upload)
    quoted = "<span style="
    for by_hand in (False, True):
        if by_hand:
            (weighted / "README.md").write_text("edited by hand")
        report = push(weighted, "me/model")
        assert (report["unquoted"], report["card_edited"]) == (True, by_hand)
        assert quoted not in sent["report.html"]
        assert "token_sample" not in json.loads(sent["modelpress.json"])
        assert quoted in (weighted / "report.html").read_text()  # it is nobody else's here
    assert sent["README.md"] == "edited by hand" == (weighted / "README.md").read_text()


def test_texts_that_anybody_has_may_be_quoted():
    for name, quoted in (("wikitext2", True), ("python-stdlib", True), ("me/chats", False)):
        assert may_be_quoted({"calibration": {"dataset": name}}) is quoted
    assert not may_be_quoted({})
