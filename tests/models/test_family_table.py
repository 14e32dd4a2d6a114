"""The table of families that people read is the one that the program goes by."""

import json
from pathlib import Path

from compress.cli.main import main
from compress.models.families import ARCHITECTURES, MIXTURES, MULTIMODAL
from compress.models.family_table import family_rows, markdown, sentence
from compress.pruning.families import FAMILIES

ROOT = Path(__file__).parents[2]


def test_a_row_for_every_type():
    assert [row.type for row in family_rows()] == [*ARCHITECTURES, *MIXTURES, *MULTIMODAL]
    assert {row.type for row in family_rows() if row.prune_visual_tokens == "yes"} == {*FAMILIES}


def test_the_documents_have_it():
    assert markdown(family_rows()) in (ROOT / "docs" / "families.md").read_text()
    assert sentence() in (ROOT / "README.md").read_text()


def test_the_command_prints_it(capsys):
    assert main(["families"]) == 0
    printed = capsys.readouterr().out
    assert all(row.models in printed for row in family_rows())
    assert main(["families", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["families"] == [r.as_dict() for r in family_rows()]
    assert main(["families", "--markdown"]) == 0
    assert capsys.readouterr().out == markdown(family_rows())
