"""Seeds, and the search for a compiler: made once in a process, and again in some tests."""

import pytest
import torch

from compress.kernels.cpu import native


@pytest.fixture(autouse=True)
def seed():
    """The same activations in every run."""
    torch.manual_seed(0)


@pytest.fixture
def fresh():
    """What a test changes about the compiler is seen, and forgotten after it."""
    native._outcome.cache_clear()
    yield
    native._outcome.cache_clear()
    native._operators = None


@pytest.fixture
def uncompiled(monkeypatch, fresh):
    """As on a machine whose user wants no compiler."""
    monkeypatch.setenv("MODELPRESS_NATIVE", "0")
