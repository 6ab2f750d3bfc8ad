"""Freed memory stays with the process, so that the next tensor of its size costs no page faults."""

import platform
import resource

import pytest
import torch

from evenflow.launcher import launch
from evenflow.runtime.host_memory import keep_freed_memory


def faults_of_large_tensors(keep: bool) -> int:
    if keep:
        assert keep_freed_memory()
    torch.zeros(3, 2**23)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        tensors = [torch.zeros(2**23) for _ in range(3)]  # of 32 MiB
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has other rules")
def test_freed_memory_is_used_again():
    by_default, kept = (launch(faults_of_large_tensors, keep, nproc=1)[0] for keep in (False, True))
    assert kept < by_default / 4
