"""Checkpoints that several tests read."""

import pytest
from tiny_quantised import MIXED, Quantised, write_quantised


@pytest.fixture(scope="session")
def mixed(tmp_path_factory) -> Quantised:
    """Widths 2, 3, 4 and 8 in groups of 32 and per channel. Tests must not change the folder."""
    return write_quantised(tmp_path_factory.mktemp("mixed"), MIXED)
