"""Tiny multimodal checkpoints and samples, written once; tests change only copies of them."""

import pytest
from tiny_folders import tiny_folder, write_samples


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    written = {}

    def folder_of(family="llava"):
        if family not in written:
            written[family] = tiny_folder(
                tmp_path_factory.mktemp(family) / "model", family, noisy=True
            )
        return written[family]

    return folder_of


@pytest.fixture(scope="session")
def samples(tmp_path_factory):
    return write_samples(tmp_path_factory.mktemp("samples") / "data")
