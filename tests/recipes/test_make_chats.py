"""Conversations of docstrings: asked once, answered by the source, the same every time."""

import json
import subprocess
import sys

from compress.recipes.demo.make_chats import LONGEST, SHORTEST, answers, make_chats

SOURCE = f'''
def asked():
    """{"It does this. " * 20}

        And that.
    """

def short():
    """No."""

def _private():
    """{"Nobody asks. " * 20}"""
'''


def test_docstrings_are_answers():
    ((question, answer),) = answers(SOURCE, "package.module")
    assert question == "What does `package.module.asked` of Python do?"
    assert answer.endswith("\n\nAnd that.") and answer.startswith("It does this.")


def test_the_same_seed_gives_the_same_conversations():
    rows = make_chats(40, 0)
    assert rows == make_chats(60, 0)[:40] != make_chats(40, 1)
    assert len({row["messages"][0]["content"] for row in rows}) == 40
    for row in rows:
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert SHORTEST <= len(assistant["content"]) <= LONGEST


def test_the_script_writes_rows_that_calibrate(tmp_path):
    command = [sys.executable, "-m", "compress.recipes.demo.make_chats", "chats.jsonl"]
    subprocess.run([*command, "--count", "3"], cwd=tmp_path, check=True, capture_output=True)
    rows = [json.loads(line) for line in (tmp_path / "chats.jsonl").read_text().splitlines()]
    assert rows == make_chats(3, 0)
