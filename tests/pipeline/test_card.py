"""The card says what the run found, leaves out what is missing, and its front matter is YAML."""

import ast
import json
import re
import shlex
from itertools import pairwise

import pytest
import yaml

from compress.checkpoint.engines import loading_table
from compress.checkpoint.inspect import inspect
from compress.pipeline.card import bits_summary, model_card

RESULT = {
    "name": "me/tiny-w3",
    "base_model": "maker/tiny",
    "recipe": {
        "rotate": {"kind": "hadamard", "seed": 0},
        "calibration": {"dataset": "wikitext2", "samples": 256, "length": 2048, "seed": 5},
        "quantize": {
            "method": "gptq",
            "bits": 3,
            "symmetric": True,
            "token_importance": {"name": "attention_concentration"},
            "ignore": ["lm_head"],
        },
    },
    "bits": {
        "average": 3.25,
        "symmetric": True,
        "engines": [("vLLM", "with `humming` kernels")],
        "widths": [
            {"bits": 3, "group_size": 128, "modules": 6, "parameters": 3000},
            {"bits": 4, "group_size": 128, "modules": 1, "parameters": 1000},
        ],
    },
    "bytes": {"original": 8_000_000, "quantized": 1_500_000, "other": 500_000, "total": 2_000_000},
    "evaluation": {
        "results": {"demo": {"acc": 0.5, "acc_stderr": 0.02}},
        "perplexity": {"value": 9.31, "value_stderr": 0.2, "line": "perplexity 9.31, no BOS"}
        | {"mean_nll": 2.231, "stderr": 0.02},
        "difference": {
            "results": {"demo": {"acc": {"value": -0.03, "stderr": 0.01}}},
            "mean_nll": {"value": 0.09, "stderr": 0.004},
        },
        "conditions": {"limit": 100},
    },
    "baseline": {
        "results": {"demo": {"acc": 0.53, "acc_stderr": 0.02}},
        "perplexity": {"value": 8.5, "value_stderr": 0.2},
    },
    "provenance": {"versions": {"modelpress": "0.1.0", "torch": "2.13"}, "seed": 0},
}


def front_matter(card: str) -> dict:
    _, text, _ = card.split("---\n", 2)
    return yaml.safe_load(text)


def test_items_that_changed_are_told_where_answers_are_right_or_wrong():
    assert "items that changed" not in model_card(RESULT)
    flips = {"right_to_wrong": 5, "wrong_to_right": 2, "mcnemar_p": 0.4531}
    results = {"demo": {"acc": {"value": -0.03, "stderr": 0.01} | flips}}
    evaluation = RESULT["evaluation"] | {"difference": {"results": results}}
    (row,) = [
        line
        for line in model_card(RESULT | {"evaluation": evaluation}).splitlines()
        if line.startswith("| demo acc")
    ]
    assert row.endswith("| 5 right to wrong, 2 wrong to right (McNemar p 0.4531) |")


def test_front_matter():
    fields = front_matter(model_card(RESULT))
    assert fields["base_model"] == "maker/tiny"
    assert fields["base_model_relation"] == "quantized"
    assert fields["library_name"] == "transformers"
    assert fields["quantized_by"] == "modelpress 0.1.0"
    assert set(fields["tags"]) >= {"modelpress", "compressed-tensors", "3-bit", "4-bit"}


@pytest.mark.parametrize("base", ["/data/models/tiny", "../tiny", "recipes/demo/lm", None])
def test_a_path_is_no_base_model_for_the_hub(base):
    fields = front_matter(model_card(RESULT | {"base_model": base}))
    assert "base_model" not in fields


@pytest.mark.parametrize(
    ("base", "local", "expected"),
    [
        ("models/tiny", True, None),
        ("models/tiny", False, "models/tiny"),
        ("models/tiny", None, "models/tiny"),  # an older result, which does not say
        ("gpt2", False, "gpt2"),
        ("gpt2", True, None),
    ],
)
def test_a_folder_of_the_machine_of_the_run_is_no_base_model(base, local, expected):
    card = model_card(RESULT | {"base_model": base, "local_model": local})
    assert front_matter(card).get("base_model") == expected
    assert ("`tiny`" in card) == (base == "models/tiny" and local is True)


def test_only_data_that_was_read_is_among_the_datasets():
    rtn = RESULT["recipe"] | {"quantize": {"method": "rtn", "bits": 8}}
    for recipe, noted, read in (
        (RESULT["recipe"], {}, True),
        (rtn, {}, False),
        (rtn, {"calibration": None}, False),
        (rtn | {"allocate": {"importance": {"name": "logit_divergence"}}}, {}, True),
        (rtn, {"calibration": {"tokens": 9}}, True),  # read to choose widths
    ):
        fields = front_matter(model_card(RESULT | {"recipe": recipe, "provenance": noted}))
        assert fields.get("datasets") == (["Salesforce/wikitext"] if read else None)


def test_names_cannot_break_the_front_matter():
    hostile = RESULT | {"provenance": {"versions": {"modelpress": "0.1\n---\nlicense: mit"}}}
    assert "license" not in front_matter(model_card(hostile))


@pytest.mark.parametrize(
    "fact",
    [
        "randomised Hadamard matrix",
        "256 windows of 2048 tokens of wikitext2, seed 5",
        "attention concentration",
        "| 3 | 128 | 6 | 3,000 |",
        "3.25 bits per quantised weight",
        "2.00 MB of weights, 1.50 MB of them quantised; 8.00 MB before",
        "| demo acc | 0.500 ± 0.020 | 0.530 ± 0.020 | -0.030 ± 0.010 |",
        "| perplexity | 9.31 ± 0.20 | 8.50 ± 0.20 | – |",
        "| mean NLL (nats per token) | 2.231 ± 0.020 | – | +0.0900 ± 0.0040 |",
        "perplexity 9.31, no BOS",
        "limit: 100",
        'from_pretrained("me/tiny-w3"',
        "versions.torch: 2.13",
        "humming",
        "method: gptq",
    ],
)
def test_every_fact_is_on_the_card(fact):
    assert fact in model_card(RESULT)


@pytest.mark.parametrize("missing", [*RESULT, "everything"])
def test_missing_pieces_are_left_out(missing):
    result = {"name": "x"} if missing == "everything" else dict(RESULT)
    result.pop(missing if missing != "name" else "bytes", None)
    card = model_card(result)
    assert front_matter(card)["library_name"] == "transformers"
    assert "None" not in card
    assert "{" not in card
    assert ("Not evaluated." in card) == (missing in ("evaluation", "everything"))


def test_the_baseline_inside_the_evaluation_is_found():
    nested = RESULT["evaluation"] | {"baseline": RESULT["baseline"]}
    moved = {key: RESULT[key] for key in RESULT if key != "baseline"} | {"evaluation": nested}
    assert model_card(moved) == model_card(RESULT)


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_loads_where(symmetric):
    module = {"shape": [8, 32], "bits": 4, "group_size": 32, "symmetric": symmetric}
    bits = bits_summary([module | {"name": f"model.layers.{i}.mlp.down_proj"} for i in range(2)])
    card = model_card(RESULT | {"bits": bits})
    assert "| vLLM | yes |" in card
    assert ("dequantize=True" in card) == (not symmetric)


def test_the_summary_counts_every_quantised_weight(mixed):
    modules = inspect(mixed.folder)["modules"]
    summary = bits_summary(modules)
    weights = {name: mixed.twin.get_submodule(name).weight.numel() for name in mixed.modules}
    total = sum(mixed.modules[name].bits * count for name, count in weights.items())
    assert summary["average"] == pytest.approx(total / sum(weights.values()))
    assert sum(row["parameters"] for row in summary["widths"]) == sum(weights.values())
    assert sum(row["modules"] for row in summary["widths"]) == len(weights)
    expected = loading_table(dict(sorted(mixed.modules.items())))  # as inspect lists them
    assert summary["engines"] == expected
    assert summary["symmetric"]
    assert bits_summary([])["average"] is None


# ---- what was done ------------------------------------------------------------------------------


def steps(card: str) -> str:
    return card[card.index("## What was done") : card.index("## Evaluation")]


def test_a_table_that_is_also_the_head_counts_once():
    table = {"shape": [100, 8], "bits": 8, "group_size": None, "symmetric": True}
    table |= {"name": "model.embed_tokens", "format": "int-quantized"}
    head = table | {"name": "lm_head", "codes_of": "model.embed_tokens"}
    linear = {"name": "model.layers.0.mlp.up_proj", "shape": [100, 8], "bits": 4}
    linear |= {"group_size": 8, "symmetric": True}
    bits = bits_summary([table, head, linear])
    assert bits["average"] == 6
    assert [(row["modules"], row["parameters"]) for row in bits["widths"]] == [(1, 800), (1, 800)]
    done = steps(model_card(RESULT | {"bits": bits}))
    assert "model.embed_tokens (the head too) to 8 bits" in done
    assert "| bits | group size | matrices | weights |" in done
    assert "left out" not in done


def test_the_average_is_that_of_the_plan(packed):
    """Of a head that is the embedding, in int8 and in words."""
    for bits in (8, 4):
        folder = packed(model={"tied": True}, bits=4, embedding={"bits": bits}).folder
        summary = bits_summary(inspect(folder)["modules"])
        facts = json.loads((folder / "modelpress.json").read_text())
        assert summary["average"] == pytest.approx(facts["average_bits"])


@pytest.mark.parametrize(
    ("head", "override", "left"),
    [
        (16, None, "; lm_head was left out."),
        (8, None, "grid.\n"),
        (8, {"match": "re:.*up_proj", "bits": 16}, "; re:.\\*up_proj was left out."),
        (16, {"match": "model.x", "ignore": True}, "; lm_head, model.x were left out."),
        (8, {"match": "re:.*down_proj", "bits": 8}, "grid.\n"),
    ],
)
def test_what_was_left_out_is_not_among_what_was_quantised(head, override, left):
    module = {"shape": [8, 32], "bits": 4, "group_size": 32, "symmetric": True}
    modules = [module | {"name": "model.layers.0.mlp.down_proj"}]
    plain = {"group_size": None, "symmetric": None, "bits": 16}
    modules.append(module | {"name": "lm_head"} | (plain if head == 16 else {"bits": head}))
    quantize = RESULT["recipe"]["quantize"] | {"overrides": [override] if override else []}
    recipe = RESULT["recipe"] | {"quantize": quantize}
    done = steps(model_card(RESULT | {"bits": bits_summary(modules), "recipe": recipe}))
    assert left in done


def test_the_tables_of_a_gguf_file_have_their_usual_names():
    module = {"shape": [8, 32], "bits": 4, "group_size": 32, "symmetric": True, "type": "Q4_0"}
    plain = {"bits": 16, "group_size": None, "symmetric": None}
    table = module | {"name": "token_embd", "bits": 8}
    inside = module | {"name": "blk.0.ffn_up"}
    tied = bits_summary([table, inside], "gguf")
    assert tied["names"] == ["model.embed_tokens", "blk.0.ffn_up", "lm_head"]
    assert tied["average"] == 6
    untied = bits_summary([table, inside, module | {"name": "output"} | plain], "gguf")
    assert "lm_head" not in untied["names"]


CHATS = {"windows": [48, 256], "tokens": 7243, "counted_tokens": 5064, "cut": 4, "left_out": 0}


def calibrated(facts: dict, **section) -> str:
    recipe = RESULT["recipe"] | {"calibration": {"dataset": "/home/me/chats.jsonl"} | section}
    return steps(model_card(RESULT | {"recipe": recipe, "provenance": {"calibration": facts}}))


def test_conversations_are_counted_as_such():
    done = calibrated(CHATS, loss_mask="assistant", samples=64, length=256)
    assert "Calibration on 48 conversations of chats.jsonl" in done
    assert "7,243 tokens, of which 5,064 count: those of the assistant and the first of" in done
    assert "each conversation (loss_mask assistant)" in done
    assert "4 were cut to 256 tokens" in done
    done = calibrated(CHATS | {"counted_tokens": 7243, "cut": 0}, loss_mask="all")
    assert "7,243 tokens, all of which count." in done
    assert "3 prompts with images" in calibrated({"prompts": 3, "tokens": 9})


def test_the_card_says_what_the_recipe_is_about():
    assert "full_precision" not in steps(model_card(RESULT))
    target = {"name": "full_precision", "strength": 0.5}
    allocate = {"importance": {"name": "logit_divergence"}, "method": "knapsack", "unit": "layer"}
    quantize = RESULT["recipe"]["quantize"] | {"target": target}
    recipe = RESULT["recipe"] | {"quantize": quantize, "allocate": allocate}
    done = steps(model_card(RESULT | {"recipe": recipe}))
    for fact in ("target full_precision, strength 0.5", "logit divergence (knapsack)"):
        assert done.count(fact) == 1
    assert "Hadamard" in done and "attention concentration" in done


# ---- figures ------------------------------------------------------------------------------------

FLIPS = {"right_to_wrong": 1, "wrong_to_right": 3, "mcnemar_p": 0.5, "count": 50}


@pytest.mark.parametrize(
    ("value", "stderr", "unseen"),
    [(0.04, 0.028, True), (-0.04, 0.028, True), (-0.1, 0.028, False), (0.1, 0.028, False),
     (0.0, 0.0, True), (0.04, None, False)],
)  # fmt: skip
def test_a_recovery_whose_interval_reaches_all_of_it_is_no_gain(value, stderr, unseen):
    results = {"demo": {"acc": {"value": value, "stderr": stderr} | FLIPS}}
    card = model_card(
        RESULT | {"evaluation": RESULT["evaluation"] | {"difference": {"results": results}}}
    )
    assert ("%, no difference seen at 50 items |" in card) == unseen
    assert ("| +0.0" in card or "| +0.1" in card) == (value > 0)


def test_the_index_says_how_entries_of_one_task_differ():
    asked = {"chat_template": True, "limit": 50, "shots": {"demo": 5}, "system_instruction": "Be"}
    chat = RESULT["evaluation"] | {"conditions": asked}
    plain = RESULT["evaluation"] | {"conditions": {"chat_template": False, "shots": {"demo": 0}}}
    card = model_card(RESULT | {"evaluation": chat, "earlier": [plain]})
    entries = [e["dataset"] for e in front_matter(card)["model-index"][0]["results"]]
    first, second = (entry for entry in entries if entry["type"] == "demo")
    told = "demo (with chat template, limit 50, 5 shots, with system instruction)"
    assert first["name"] == told
    assert first["args"] == asked | {"shots": 5, "system_instruction": True}
    assert second["name"] == "demo (without chat template, 0 shots)"
    assert "&id" not in card
    # And so do the tables, before anything is unfolded.
    assert "With chat template, system prompt “Be”, 5 shots, limit 50:" in card


def test_what_was_measured_twice_alike_is_in_the_index_once():
    asked = {"limit": 6, "shots": {"demo": 0}, "perplexity_dataset": "wikitext2"}
    beside = RESULT["evaluation"] | {"conditions": asked, "baseline": RESULT["baseline"]}
    newer = {"results": {"demo": {"acc": 0.75}}, "conditions": asked}
    newer |= {"perplexity": {"value": 9.0}}

    def entries(**changed):
        earlier = beside | {"conditions": asked | changed}
        card = model_card(RESULT | {"evaluation": newer, "earlier": [earlier]})
        return front_matter(card)["model-index"][0]["results"]

    assert [entry["metrics"][0]["value"] for entry in entries()] == [0.75, 9.0]
    kwargs = {"temperature": 1}
    told = [entry["dataset"]["args"].get("gen_kwargs") for entry in entries(gen_kwargs=kwargs)[::2]]
    assert told == [None, kwargs]
    assert len(entries(limit=7)) == 3
    assert len(entries(activation_bits=8)) == len(entries(activation_bits=8, limit=7)) == 4


def test_conditions_are_no_dump():
    said = {"limit": None, "warnings": {}, "samples": {"demo": 9}}
    card = model_card(RESULT | {"evaluation": RESULT["evaluation"] | {"conditions": said}})
    assert "- samples.demo: 9\n" in card
    assert "limit" not in card and "warnings" not in card and "{" not in card
    said = {"warnings": {"model w4 is odd": 3}}
    provenance = {"warnings": ["4 were cut", "mind"]}
    card = model_card(
        RESULT
        | {"evaluation": RESULT["evaluation"] | {"conditions": said}, "provenance": provenance}
    )
    assert "- lm-eval warned: model w4 is odd (3 times)\n" in card
    assert "- warning: 4 were cut\n- warning: mind\n" in card


@pytest.mark.parametrize("differs", [[], ["model.embed_tokens was rounded to bfloat16"], None])
def test_an_export_says_what_was_measured(differs):
    inherited = RESULT["evaluation"] | {"before_export": "compressed-tensors"}
    card = model_card(RESULT | {"evaluation": inherited, "export": {"differs": differs}})
    assert "| metric | before export | 16 bits |" in card and "this model |" not in card
    assert "measured on the compressed-tensors checkpoint" in card
    assert ("model-index" in front_matter(card)) == (differs == [])
    if differs:
        assert f"do not hold the same values: {differs[0]}" in card
    own = RESULT["evaluation"] | {"conditions": {"limit": 7}}  # measured on the export itself
    both = RESULT | {"evaluation": own, "earlier": [inherited], "export": {"differs": differs}}
    card = model_card(both)
    assert "| this model | 16 bits |" in card and "| before export | 16 bits |" in card
    entries = front_matter(card)["model-index"][0]["results"]
    # The task was put otherwise; of the text, which was measured alike, the newer figure stands.
    assert len(entries) == (3 if differs == [] else 2)


# ---- how it is used -----------------------------------------------------------------------------

QUESTION = "What is the capital of France?"


def test_a_chat_model_is_asked_a_question():
    card = model_card(RESULT | {"chat": True, "bits": {}})
    assert "Once upon a time" not in card
    for block in python_blocks(card):
        ast.parse(block)
        assert "apply_chat_template(" in block and QUESTION in block
    assert len(python_blocks(card)) == 2
    commands = card[card.index("vllm serve") :].split("```")[0].replace("\\\n", " ")
    serve, curl = map(shlex.split, commands.strip().splitlines())
    assert serve == ["vllm", "serve", "me/tiny-w3"]
    asked = json.loads(curl[curl.index("-d") + 1])
    assert asked["model"] == "me/tiny-w3" and asked["messages"][0]["content"] == QUESTION
    gguf = RESULT | {"chat": True, "format": "gguf", "bits": {}}
    card = model_card(gguf)
    assert f'llama-cli -hf me/tiny-w3 -st -p "{QUESTION}"' in card
    assert f'ollama run hf.co/me/tiny-w3 "{QUESTION}"' in card
    assert f'llama-cli -m "model.gguf" -st -p "{QUESTION}"' in model_card(gguf | {"name": "tiny"})
    assert "picture.png" in model_card(RESULT | {"chat": True, "multimodal": True})
    assert QUESTION not in model_card(RESULT)


@pytest.mark.parametrize("name", ["me/_w8_x_", "me/a_b.c", "mé/w8"])
def test_commands_for_a_gguf_file_have_the_name_as_it_is(name):
    card = model_card(RESULT | {"format": "gguf", "files": ["model.gguf"], "name": name})
    block = card[card.index("llama-cli") :].split("\n```")[0]
    llama, ollama = map(shlex.split, block.splitlines())
    assert (llama[2], ollama[2]) == (name, f"hf.co/{name}")


@pytest.mark.parametrize("name", ["a'; rm -rf x; '", "$(x)", "a b", "`x`", "a\nb"])
def test_a_name_is_one_word_of_a_shell(name):
    card = model_card(RESULT | {"chat": True, "bits": {}, "name": name})
    commands = card[card.index("vllm serve") :].split("\n```")[0].replace("\\\n", " ")
    serve, curl = map(shlex.split, commands.splitlines())
    assert serve[2:] == [" ".join(name.split())]
    assert json.loads(curl[-1])["model"] == name


BY_POSITION = [
    {"first": 1, "last": 63, "tokens": 2016, "perplexity": 22.5, "baseline": 20.25}
    | {"difference": {"value": 0.105, "stderr": 0.02}, "kl": {"value": 0.0625, "stderr": 0.003}},
    {"first": 64, "last": 127, "tokens": 2048, "perplexity": 14.5, "baseline": 13.25}
    | {"difference": {"value": 0.09, "stderr": 0.02}, "kl": {"value": 0.05, "stderr": 0.003}},
]


def test_what_was_measured_by_position_is_a_table_of_its_own():
    assert "tokens in front" not in model_card(RESULT)
    evaluation = RESULT["evaluation"] | {"by_position": BY_POSITION}
    card = model_card(RESULT | {"evaluation": evaluation})
    heads = "| tokens in front | predictions | perplexity | 16 bits | NLL above it | KL |"
    before, lines = card.split(heads)
    assert before.endswith("|\n\n")  # behind the table of the whole
    assert lines.splitlines()[2:4] == [
        "| 1 – 63 | 2,016 | 22.5 | 20.25 | +0.105 ± 0.020 | 0.0625 ± 0.0030 |",
        "| 64 – 127 | 2,048 | 14.5 | 13.25 | +0.090 ± 0.020 | 0.0500 ± 0.0030 |",
    ]


@pytest.mark.parametrize("stretches", [[], BY_POSITION])
def test_a_blank_line_ends_every_table(stretches):
    """Markdown takes the line below a table's last row for another row."""
    evaluation = RESULT["evaluation"] | {"by_position": stretches}
    lines = model_card(RESULT | {"evaluation": evaluation}).splitlines()
    for row, below in pairwise(lines):
        if row.startswith("|"):
            assert below.startswith("|") or not below.strip()


# ---- names that are markup ----------------------------------------------------------------------

HOSTILE = [
    'm"); import os; os.system("x', "a\\", "a\nb", "# head", "`code`", "a``b`", "<img src=x>",
    "[text](http://x.y)", "![x](y)", "a|b", "*bold*", "_it_", "$x$", "<!-- x", "&lt;", "```",
    "www.x.y", "a\u202eb", "a\x1b[31mb", "---", "{{ 7 * 7 }}", "'''", "a\u2028b",
]  # fmt: skip


def python_blocks(card: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", card, flags=re.S | re.M)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_stays_text(name):
    recipe = RESULT["recipe"] | {"calibration": {"dataset": name}, "name": name}
    provenance = {"folder": name, name: 1}
    card = model_card(RESULT | {"name": name, "base_model": name, "recipe": recipe,
                                "provenance": provenance})  # fmt: skip
    plain = model_card(RESULT)
    assert front_matter(card)["library_name"] == "transformers"
    # the same headings, code blocks and table rows as for a plain name
    for mark in (r"^## .*$", r"^```python$", r"^\| .* \|$", r"^# "):
        count = [len(re.findall(mark, text, flags=re.M)) for text in (card, plain)]
        assert count[0] == count[1], mark
    seen = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(name.split()))
    for block in python_blocks(card):
        texts = [n.value for n in ast.walk(ast.parse(block)) if isinstance(n, ast.Constant)]
        assert seen in texts
        assert "os" not in [n.id for n in ast.walk(ast.parse(block)) if isinstance(n, ast.Name)]
    prose = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", card, flags=re.S)  # without code
    assert not re.search(r"<(img|!--)|(?<!\\)\]\(http|\x1b|\u202e", prose)


def test_usual_names_are_not_touched():
    card = model_card(RESULT)
    assert "# me/tiny-w3" in card and "`maker/tiny`" in card
    assert 'from_pretrained("me/tiny-w3"' in card
