"""Set-up of every test: no network, one thread, as each rank has, and a folder of its own for measurements."""

import atexit
import os
import shutil
import tempfile

# Before anything imports transformers or torch.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"
if "EVENFLOW_CACHE" not in os.environ:
    os.environ["EVENFLOW_CACHE"] = tempfile.mkdtemp(prefix="evenflow_tests_")
    atexit.register(shutil.rmtree, os.environ["EVENFLOW_CACHE"], ignore_errors=True)

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_random_numbers_in_every_test():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
