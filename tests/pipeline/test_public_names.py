"""Local paths are found wherever they are said, and what only looks like one stays."""

import pytest

from compress.pipeline.public_names import PublicNames, is_local, is_relative

MODEL = "/data/models/tiny"


def public(text, models=(MODEL,), base="maker/tiny", known=()):
    names = PublicNames(models, base)
    names.learn([text, *known])
    return names.within(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (MODEL, "maker/tiny"),
        (f"{MODEL}/", "maker/tiny"),
        (f"pretrained={MODEL}, 2 times", "pretrained=maker/tiny, 2 times"),
        (f"{MODEL}-2", "tiny-2"),
        (f"{MODEL}/config.json: odd", "config.json: odd"),
        ("/home/emb/eval.txt (held out)", "eval.txt (held out)"),
        ("/home/emb/eval.txt:3: odd", "eval.txt:3: odd"),
        ("see '/home/al/x.txt', (/home/al/y.txt)", "see 'x.txt', (y.txt)"),
        ("file:///home/al/x.txt", "x.txt"),
        ("~/models/x", "x"),
        ("../texts/own.jsonl", "own.jsonl"),
        ("C:\\Users\\al\\texts\\own.jsonl", "own.jsonl"),
        ("read C:\\Users\\al\\own.jsonl twice", "read own.jsonl twice"),
        ("/root/.cache/huggingface/hub/models--maker--big/snapshots/0a1b", "maker/big"),
        ("/x/datasets--me--text/snapshots/0a1b/a/train.jsonl", "train.jsonl"),
    ],
)
def test_a_local_path_gets_a_name_that_others_know(text, expected):
    assert public(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "wikitext2", "maker/tiny", "recipes/demo/lm", "/no_think", "/", "and/or/both", "12 / 50",
        "https://a.b/c/d", "see http://a.b/c.", "re:.*/x", "re:.*mlp.*", "</s>/a/b", "a</b>",
        "0.5", "", "model.layers.0", "//x/y", "{% if a %}/b{% endif %}", "3/4 of it", "a\n/b",
    ],
)  # fmt: skip
def test_what_is_no_path_stays(text):
    assert public(text) == text


def test_a_path_is_found_in_keys_and_lists_and_counted():
    names = PublicNames([MODEL], "maker/tiny")
    value = {"warnings": {f"{MODEL} is odd": 2}, "files": ["/a/b/c.txt", "d"], "n": 3, "x": None}
    kept = {"pictures": ["/a/b/c.png"]}
    names.learn(value)
    assert (
        names.within(value | kept, keep=("pictures",))
        == {
            "warnings": {"maker/tiny is odd": 2},
            "files": ["c.txt", "d"],
            "n": 3,
            "x": None,
        }
        | kept
    )
    assert names.count == 2


def test_spaces_in_a_path_that_is_known_are_part_of_it(tmp_path):
    path = tmp_path / "my models" / "tiny"
    path.mkdir(parents=True)
    assert is_local(str(path))
    text = f"pretrained={path} is odd"
    assert public(text, models=[str(path)], known=[str(path)]) == "pretrained=maker/tiny is odd"


def test_the_model_is_known_by_any_spelling(tmp_path, monkeypatch):
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "models" / "tiny")
    monkeypatch.chdir(tmp_path)
    for spelled in ("models/tiny", "./models/tiny", str(tmp_path / "link")):
        assert public(str(tmp_path / "models" / "tiny"), models=[spelled]) == "maker/tiny"
    assert public(MODEL, base=None) == "tiny"
    assert public(MODEL, base="/data/models/tiny") == "tiny"  # a path is no public name


def test_a_relative_path_is_known_by_its_key_or_by_note():
    names = PublicNames(["models/tiny"], "maker/tiny", ["me/w4"])
    value = {
        "calibration": {"dataset": "priv/acme/chats.jsonl"},
        "conditions": {"baseline": "priv/lm", "perplexity_dataset": "priv/held.txt (held out)"},
        "warnings": ["priv/lm/a.json is odd, priv/lm-2 is not, nor /x/priv/held.txt"],
        "local": ["models/tiny", "priv/lm", "me/w4", "bare.txt"],
        "model": {"path": "models/tiny"},
    }
    names.learn(value)
    assert names.within(value) == {
        "calibration": {"dataset": "chats.jsonl"},
        "conditions": {"baseline": "lm", "perplexity_dataset": "held.txt (held out)"},
        "warnings": ["lm/a.json is odd, priv/lm-2 is not, nor held.txt"],
        "local": ["maker/tiny", "lm", "me/w4", "bare.txt"],
        "model": {"path": "maker/tiny"},
    }
    assert names.count == 8
    assert names.known_in("Made of priv/lm, see x/priv/lm.") == "Made of lm, see x/priv/lm."


@pytest.mark.parametrize("key", ["dataset", "baseline", "path", "perplexity"])
@pytest.mark.parametrize(
    "name", ["maker/tiny", "wikitext2", "held.txt", "recipes/demo/lm", "https://a.b/c/d.txt"]
)
def test_a_name_of_the_hub_stays_whatever_its_key(key, name):
    names = PublicNames([], None)
    names.learn({key: name})
    assert names.within({key: name}) == {key: name} and not names.count


def test_a_relative_path_that_lies_here_is_none_of_the_hub(tmp_path, monkeypatch):
    (tmp_path / "priv" / "lm").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert is_relative("priv/lm") and not is_relative("priv/other")


def test_folders_of_lm_eval_are_named_anew():
    names = PublicNames([MODEL], "maker/tiny")
    names.learn([MODEL, "/home/al/other"])
    assert names.file_name("eval/__data__models__tiny/r.json") == "eval/maker__tiny/r.json"
    assert names.file_name("eval/__home__al__other/r.json") == "eval/other/r.json"
    assert names.file_name("eval/out/r.json") == "eval/out/r.json"
