"""Tuned tiles: found again as they were saved, and never in the way when the file is damaged."""

import json
import warnings
from dataclasses import replace

import pytest

from compress.kernels.gpu import tuning
from compress.kernels.gpu.tuning import Tiles, bucket, candidates

TILES = Tiles(rows=16, block_m=16, block_n=64, warps=4, stages=3, split=None)
SCHEME = ("Some GPU", 4096, 14336, 4, 128)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning.forget()
    yield tmp_path
    tuning.forget()


def test_what_was_saved_is_found_by_every_part_of_its_key():
    tuning.save({tuning.key(*SCHEME, 16): TILES})
    assert tuning.find(*SCHEME, 16) == TILES
    for other in (
        ("Other GPU", *SCHEME[1:], 16),
        ("Some GPU", 4096, 4096, 4, 128, 16),
        ("Some GPU", 14336, 4096, 4, 128, 16),
        ("Some GPU", 4096, 14336, 3, 128, 16),
        ("Some GPU", 4096, 14336, 4, None, 16),
        (*SCHEME, 32),
    ):
        assert tuning.find(*other) is None


def test_saving_keeps_other_entries_and_replaces_the_same():
    tuning.save({"one": TILES, "two": TILES})
    tuning.save({"two": replace(TILES, warps=8)})
    assert tuning.contents().entries == {"one": TILES, "two": replace(TILES, warps=8)}


def test_without_a_file_nothing_is_tuned_or_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.find(*SCHEME, 1) is None
    assert not tuning.path().exists()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"version": 7, "entries": {}}', "3", '{"a": 1}']
)
def test_a_broken_file_is_left_aside_with_one_warning(content):
    tuning.path().parent.mkdir()
    tuning.path().write_text(content)
    with pytest.warns(RuntimeWarning, match="is left aside, kernels run untuned") as caught:
        assert tuning.find(*SCHEME, 1) is None
        assert tuning.find(*SCHEME, 2) is None
    assert len(caught) == 1
    assert tuning.contents().ignored == 1
    with pytest.warns(RuntimeWarning):
        tuning.save({"one": TILES})  # tuning again mends it
    assert tuning.contents().entries == {"one": TILES}


@pytest.mark.parametrize(
    "wrong",
    [
        {"block_n": 48},
        {"warps": "4"},
        {"stages": True},
        {"rows": None},
        {"split": -1},
        {"block_m": 1},
        {"more": 1},
    ],
)
def test_an_entry_that_holds_no_tiles_is_counted_and_the_rest_is_used(wrong):
    tuning.save({"good": TILES, "bad": TILES})
    document = json.loads(tuning.path().read_text())
    document["entries"]["bad"] |= wrong
    tuning.path().write_text(json.dumps(document))
    with pytest.warns(RuntimeWarning, match="1 of 2 entries hold no tiles"):
        assert tuning.contents().entries == {"good": TILES}
    assert tuning.contents().ignored == 1


@pytest.mark.parametrize(("rows", "expected"), [(1, 1), (2, 2), (3, 4), (16, 16), (17, 32)])
def test_buckets_are_powers_of_two(rows, expected):
    assert bucket(rows) == expected


@pytest.mark.parametrize("rows", [1, 8, 16, 64, 256, 512])
def test_candidates_of_every_bucket_may_stand_in_the_file(rows):
    found = candidates(rows)
    assert len(set(found)) == len(found) > 1
    tuning.save({str(i): tiles for i, tiles in enumerate(found)})
    assert set(tuning.contents().entries.values()) == set(found)


@pytest.mark.parametrize("device", ["NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA GH200 480GB"])
def test_tiles_come_with_the_project_and_measured_ones_before_them(device):
    product = (device, 4096, 4096, 4, 128, 1)
    assert tuning.find(*product) in tuning.shipped().values()
    assert tuning.find(*product[:-1], 64) is None  # beyond 32 rows the table holds
    tuning.save({tuning.key(*product): TILES})
    assert tuning.find(*product) == TILES


def test_other_devices_have_none():
    assert tuning.find("NVIDIA A100-SXM4-80GB", 4096, 4096, 4, 128, 1) is None


def test_beyond_the_largest_bucket_there_are_none():
    assert candidates(1024) == ()
