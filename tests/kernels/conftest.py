"""Tests of kernels call the registered operators."""

import importlib.util

import pytest

from autopart.kernels import table  # noqa: F401  brings in the kernels
from autopart.kernels.launch import register_operators


@pytest.fixture(autouse=True)
def _registered() -> None:
    if importlib.util.find_spec("triton"):
        register_operators()
