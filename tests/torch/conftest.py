"""Skips this folder, by name, where PyTorch and transformers are not installed."""

import importlib.util
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items):
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.torch)
            if missing:
                item.add_marker(pytest.mark.skip(reason=f"{' and '.join(missing)} not installed"))
