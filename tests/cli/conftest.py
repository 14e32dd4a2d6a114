"""What the tests of the command line share."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def offline() -> Iterator[None]:
    """No name is looked up on the hub."""
    import datasets.config
    import huggingface_hub.constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield
