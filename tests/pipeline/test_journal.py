"""A run that is stopped anywhere continues and ends with the bytes of a run that never was."""

import pytest
import torch

from compress.errors import CheckpointError, CompressError, UsageError
from compress.pipeline.journal import Journal
from compress.storage.safetensors import merge_shards
from support.refusals import refused

LAYERS = 3
STATE = {"inputs": [1, 2], "stages": {}}


def walk(folder, fingerprint="run", layers=LAYERS) -> tuple[Journal, int]:
    """A walk whose every layer depends on what the one before has left in its facts."""
    journal = Journal(folder, fingerprint)
    first = journal.open(resume=True)
    for layer in range(first, layers):
        before = journal.facts()[-1]["hidden"] if layer else [0.0, 1.0, 2.0, 3.0]
        weight = torch.sin(torch.tensor(before) * (layer + 1))
        hidden = torch.tensor(before) + weight.cumsum(0)
        facts = {"sum": layer, "hidden": hidden.tolist()}
        journal.record(layer, {f"layers.{layer}.w": weight}, facts, STATE)
    return journal, first


def result(journal, folder) -> bytes:
    (path,) = merge_shards(journal.part_files(), folder, 10**9)
    return path.read_bytes()


@pytest.fixture
def expected(tmp_path):
    journal, _ = walk(tmp_path / "whole")
    return result(journal, tmp_path / "whole-out")


def test_stopped_at_any_write(tmp_path, expected, monkeypatch):
    """Stops the walk at its 1st, 2nd, 3rd... flush to disk, whatever was being written."""
    import os

    fsync, resumed = os.fsync, set()
    for stop in range(1, 100):
        left = stop

        def interrupted(descriptor):
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            fsync(descriptor)

        folder = tmp_path / str(stop) / ".modelpress"
        monkeypatch.setattr("os.fsync", interrupted)
        try:
            walk(folder)
        except KeyboardInterrupt:
            pass
        else:
            break
        finally:
            monkeypatch.setattr("os.fsync", fsync)
        journal, first = walk(folder)
        resumed.add(first)
        assert result(journal, tmp_path / str(stop)) == expected
        assert [facts["sum"] for facts in journal.facts()] == list(range(LAYERS))
    assert resumed == set(range(LAYERS + 1))  # every layer was a place to continue at


def test_a_line_cut_short_is_a_layer_not_done(tmp_path, expected):
    journal, _ = walk(tmp_path / "run", layers=2)
    data = journal.path.read_bytes()
    journal.path.write_bytes(data + b'{"sum": 2')
    journal, first = walk(tmp_path / "run")
    assert first == 2
    assert result(journal, tmp_path / "out") == expected
    assert len(journal.path.read_text().splitlines()) == 1 + LAYERS


def test_another_fingerprint_is_refused_with_the_remedy(tmp_path):
    walk(tmp_path, "one")
    with refused(UsageError, tmp_path, "--no-resume", "--overwrite"):
        walk(tmp_path, "another")
    assert walk(tmp_path, "one")[1] == LAYERS  # refusing changed nothing


def test_no_resume_starts_afresh(tmp_path):
    walk(tmp_path, "one")
    journal = Journal(tmp_path, "another")
    assert journal.open(resume=False) == 0
    assert journal.part_files() == []
    assert [path.name for path in tmp_path.iterdir()] == ["journal.jsonl"]


def test_replacing_throws_another_run_away_and_continues_its_own(tmp_path):
    walk(tmp_path, "one")
    assert Journal(tmp_path, "one").open(resume=True, replace=True) == LAYERS
    journal = Journal(tmp_path, "another")
    assert journal.open(resume=True, replace=True) == 0
    assert journal.facts() == journal.part_files() == []
    assert [path.name for path in tmp_path.iterdir()] == ["journal.jsonl"]
    journal.record(0, {"w": torch.ones(2)}, {}, STATE)
    assert Journal(tmp_path, "another").open(resume=True) == 1


@pytest.mark.parametrize("cut_short", [False, True])
def test_another_run_without_a_finished_layer_is_nothing_to_lose(tmp_path, cut_short):
    journal, _ = walk(tmp_path, "one", layers=0)
    if cut_short:
        with journal.path.open("ab") as file:
            file.write(b'{"sum": 0')
    assert walk(tmp_path, "another")[1] == 0
    assert walk(tmp_path, "another")[1] == LAYERS


@pytest.mark.parametrize("name", ["layer-00000.safetensors", "layer-00002.safetensors"])
def test_a_lost_file_is_named(tmp_path, name):
    walk(tmp_path)
    (tmp_path / name).unlink()
    with refused(CheckpointError, name, "--no-resume"):
        walk(tmp_path)


def flip(path, offset) -> None:
    """Changes one bit."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("offset", [9, 100, -20, -2])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_one_changed_bit_in_a_finished_layer_is_noticed(tmp_path, layer, offset):
    journal, _ = walk(tmp_path)
    flip(journal.part_files()[layer], offset)
    with refused(CheckpointError, f"layer-0000{layer}.safetensors", "--no-resume"):
        walk(tmp_path)


@pytest.mark.parametrize("offset", [3, 120, 200, -3])
def test_one_changed_bit_in_the_journal_is_noticed(tmp_path, offset):
    """In the header it is another run's, or no JSON; in a line, no line that was written."""
    journal, _ = walk(tmp_path)
    flip(journal.path, offset)
    with pytest.raises(CompressError, match=r"is damaged|another recipe"):
        walk(tmp_path)


DAMAGES = {
    "no JSON": lambda journal: journal.path.write_text("{]\n"),
    "no text": lambda journal: journal.path.write_bytes(b"\xff\n"),
    "empty": lambda journal: journal.path.write_bytes(b""),
    "a bit": lambda journal: flip(journal.path, 120),
    "a layer's bit": lambda journal: flip(journal.part_files()[1], -1),
    "a layer is gone": lambda journal: journal.part_files()[0].unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_named_and_the_advice_works(tmp_path, damage):
    for advice in ({"resume": False}, {"resume": True, "replace": True}):
        journal, _ = walk(tmp_path)
        DAMAGES[damage](journal)
        with pytest.raises(CheckpointError, match=r"journal\.jsonl.*--no-resume or --overwrite"):
            walk(tmp_path)
        assert Journal(tmp_path, "run").open(**advice) == 0


def test_layers_are_recorded_in_order(tmp_path):
    journal, _ = walk(tmp_path)
    with pytest.raises(AssertionError, match="layer 1 recorded after 3"):
        journal.record(1, {}, {}, STATE)


def test_facts_come_back_as_they_were_recorded(tmp_path):
    journal = Journal(tmp_path, "run")
    journal.open(resume=True)
    facts = {"error": 0.1, "bits": {"q": 3}, "notes": ["damped"]}
    journal.record(0, {"w": torch.ones(2, dtype=torch.bfloat16)}, facts, STATE)
    again = Journal(tmp_path, "run")
    assert again.open(resume=True) == 1
    assert again.facts() == journal.facts() == [facts]
    assert again.state() == journal.state() == STATE


def test_clear_leaves_nothing_of_its_own_and_nothing_else_is_touched(tmp_path):
    journal, _ = walk(tmp_path / "run")
    (tmp_path / "run/.layer-00009.safetensors.0123456789abcdef.tmp").write_bytes(b"")
    (tmp_path / "run/mine.txt").write_text("kept")
    journal.clear()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]
    (tmp_path / "run/mine.txt").unlink()
    journal.clear()
    assert not (tmp_path / "run").exists()
    journal.clear()  # nothing there is fine
