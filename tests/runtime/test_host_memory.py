"""Freed memory stays with the process, so that the next tensor of its size costs no page faults."""

import platform
import resource

import pytest
import torch

from evenflow.launcher import launch
from evenflow.runtime.notes.host_memory import keep_freed_memory


def by_default_and_kept() -> tuple[int, int]:
    by_default = faults_of_large_tensors()
    assert keep_freed_memory()
    return by_default, faults_of_large_tensors()


def faults_of_large_tensors() -> int:
    torch.zeros(3, 2**23)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        tensors = [torch.zeros(2**23) for _ in range(3)]  # of 32 MiB
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has other rules")
def test_freed_memory_is_used_again():
    ((by_default, kept),) = launch(by_default_and_kept, nproc=1)
    assert kept < by_default / 4
