"""Set-up of every test: no network, one thread, as each rank has, and an empty folder for measurements."""

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

from forked import ranks_begin_by

torch.set_num_threads(1)


# How processes begin, end and print is what these are about, or what they hold in memory.
_BEGUN_IN_THE_ORDINARY_WAY = {
    "test_checkpoint_command",
    "test_deferred_pipeline",
    "test_host_memory",
    "test_out_of_memory",
    "test_pages",
    "test_restarts",
    "test_training_run",
}


@pytest.fixture(autouse=True, scope="module")
def _ranks_begin_at_once(request):
    with ranks_begin_by("spawn" if request.path.stem in _BEGUN_IN_THE_ORDINARY_WAY else "forkserver"):
        yield


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
