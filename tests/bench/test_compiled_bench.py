"""`bench compiled`: one line for each kernel of a table, with no GPU in the machine."""

import json

import pytest

pytest.importorskip("triton")

from compress.cli.main import main
from compress.kernels.gpu.matmul import MMA_TABLE, TABLE
from support.calling import refuses


def test_the_command_says_what_was_compiled(tmp_path, capsys):
    assert main(["bench", "compiled", "--bits", "4", "--output", str(tmp_path / "out.json")]) == 0
    shown = capsys.readouterr().out
    assert "instructions" in shown
    result = json.loads((tmp_path / "out.json").read_text())
    assert [product["tiles"]["rows"] for product in result["products"]] == [
        tiles.rows for tiles in TABLE
    ]
    for product in result["products"]:
        assert product["spilled"] == 0
        assert 0 < product["registers"] <= 255


def test_older_devices_have_a_table_of_their_own(capsys):
    arguments = ["--capability", "8.9", "--bits", "8", "--group-size", "channel", "--json"]
    assert main(["bench", "compiled", *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["group_size"] is None
    assert [product["tiles"]["rows"] for product in result["products"]] == [
        tiles.rows for tiles in MMA_TABLE
    ]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--capability", "7.0"], ("--capability", "7.0")),
        (["--dtype", "int8"], ("dtype", "'int8'")),
        (["--bits", "5"], ("bits", 5)),
        (["--group-size", "20"], ("group size", 20)),
    ],
)
def test_wrong_options_are_usage_errors(arguments, named, capsys):
    refuses(capsys, ["bench", "compiled", *arguments], *named)
