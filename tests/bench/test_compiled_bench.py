"""`bench compiled`: one line for each kernel of a table, with no GPU in the machine."""

import json

import pytest

pytest.importorskip("triton")

from compress.cli.main import main
from compress.kernels.gpu.matmul import MMA_TABLE, TABLE


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
    ("arguments", "message"),
    [
        (["--capability", "7.0"], "--capability: expected 8.0, 8.6, 8.9, 9.0, 10.0, 12.0, found"),
        (["--dtype", "int8"], "dtype: expected fp16, bf16, fp32, found 'int8'"),
        (["--bits", "5"], "bits: kernels take 2, 3, 4 and 8, found 5"),
        (["--group-size", "24"], "group size: expected a multiple of 16"),
    ],
)
def test_wrong_options_are_usage_errors(arguments, message, capsys):
    assert main(["bench", "compiled", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
