"""Writes BLiMP paradigms, files of JSON lines, as a group of tasks for lm-eval: blimp_group.

    python tests/interop/board/blimp.py DATA OUT
    modelpress eval MODEL --include-path OUT --tasks blimp_group --limit 100

DATA is a folder of files as BLiMP has them (CC BY 4.0), one a paradigm. An item is right if the
grammatical sentence is the likelier of the two; the group's figure is the mean of its paradigms.
"""

import sys
from pathlib import Path

import yaml

GROUP = "blimp_group"


def write_tasks(data: Path, out: Path) -> list[str]:
    """A task for each file, and the group; the names of the tasks."""
    out.mkdir(parents=True, exist_ok=True)
    names = []
    for file in sorted(data.glob("*.jsonl")):
        names.append(f"{GROUP}_{file.stem}")
        task = {
            "task": names[-1],
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(file.absolute())}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "",
            "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
            "doc_to_target": 0,
            "num_fewshot": 0,
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1.0},
        }
        (out / f"{names[-1]}.yaml").write_text(yaml.safe_dump(task, sort_keys=False))
    if not names:
        raise SystemExit(f"{data}: expected files of JSON lines, found none")
    group = {
        "group": GROUP,
        "task": names,
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean"}],
        "metadata": {"version": 1.0},
    }
    (out / f"{GROUP}.yaml").write_text(yaml.safe_dump(group, sort_keys=False))
    return names


if __name__ == "__main__":
    print(*write_tasks(Path(sys.argv[1]), Path(sys.argv[2])), sep="\n")
