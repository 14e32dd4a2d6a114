"""Cuts a WikiText file into calibration text and measured text, and draws the calibration windows.

    python tests/interop/board/cut.py TEXT MODEL OUT

writes OUT/calibration.txt and OUT/measured.txt, which joined are TEXT, and OUT/windows.json: the
token ids [64, 512] that a recipe with `calibration: {dataset: OUT/calibration.txt, samples: 64,
length: 512, seed: 0}` reads, so that every program is given the same. OUT/windows.txt is these
windows as text, for a program that reads nothing else. It runs in the project's environment.

The cut is at the first heading, of an article or of a part of one, behind 60 % of the characters:
in WikiText-2's validation split inside an article, whose first parts are calibration text and whose
last part is measured.
"""

import argparse
import json
import re
from pathlib import Path

from transformers import AutoTokenizer

from compress.data.text import load_documents
from compress.data.windows import draw_windows

HEADING = re.compile(r"\n \n = ")  # with the blank line in front of it
SHARE = 0.6
SAMPLES, LENGTH = 64, 512


def cut(text: str) -> tuple[str, str]:
    """Calibration text and measured text."""
    found = HEADING.search(text, int(SHARE * len(text)))
    if found is None:
        raise SystemExit(f"no heading behind {SHARE:.0%} of the text")
    return text[: found.start()], text[found.start() :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("model", type=Path, help="whose tokenizer cuts the windows")
    parser.add_argument("out", type=Path)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    names = asked.out / "calibration.txt", asked.out / "measured.txt"
    for file, part in zip(names, cut(asked.text.read_text(encoding="utf-8")), strict=True):
        file.write_text(part, encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    windows = draw_windows(load_documents(str(names[0]), "train"), tokenizer, SAMPLES, LENGTH)
    rows = windows.input_ids.tolist()
    (asked.out / "windows.json").write_text(json.dumps(rows) + "\n")
    text = "".join(tokenizer.decode(row) for row in rows)
    (asked.out / "windows.txt").write_text(text, encoding="utf-8")
    again = len(tokenizer(text, verbose=False)["input_ids"])
    print(f"{len(rows)} windows of {LENGTH} tokens; as one text {again} tokens")


if __name__ == "__main__":
    main()
