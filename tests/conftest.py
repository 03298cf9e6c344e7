"""Settings of the whole test suite, made before anything imports torch or transformers."""

import os

import pytest

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Skip gpu tests without a GPU; keep the tests that start processes on one worker, and those of a file, which share
    what they plan and trace."""
    import torch

    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    processes = item.get_closest_marker("processes")
    item.add_marker(pytest.mark.xdist_group("processes" if processes else item.path.stem))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests that start processes come first: they are the longest group, which is to leave no worker idle."""
    items.sort(key=lambda item: item.get_closest_marker("processes") is None)
