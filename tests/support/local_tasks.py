"""Tasks of three kinds for lm-eval that need no network, and a chat template to ask them in."""

from pathlib import Path

ROWS = [
    {"question": "What is 1 + 1?", "choices": ["two", "three"], "answer": 0},
    {"question": "Which is a colour?", "choices": ["seven", "red"], "answer": 1},
    {"question": "What barks?", "choices": ["a dog", "a stone"], "answer": 0},
    {"question": "What is wet?", "choices": ["sand", "water"], "answer": 1},
]
SHARED = """
custom_dataset: !function utils.rows
test_split: test
fewshot_split: test
fewshot_config: {sampler: first_n}
"""
KINDS = {
    "local_choice": """
output_type: multiple_choice
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "local_answer": """
output_type: generate_until
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "local_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{choices}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
}
# Writes BOS itself, and takes a system prompt.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def write_tasks(folder: Path) -> Path:
    """`local_choice`, `local_answer`, `local_text` and the group `local_all` of them."""
    folder.mkdir(parents=True, exist_ok=True)
    # Not a file of JSON lines: `datasets` takes half a second for each.
    text = f"from datasets import Dataset\nROWS = {ROWS!r}\n"
    text += "def rows(**_):\n    return {'test': Dataset.from_list(ROWS)}\n"
    (folder / "utils.py").write_text(text, encoding="utf-8")
    for name, definition in KINDS.items():
        text = f"task: {name}\n" + SHARED + definition
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    group = "group: local_all\ntask: [local_choice, local_answer, local_text]\n"
    (folder / "all.yaml").write_text(group, encoding="utf-8")
    return folder
