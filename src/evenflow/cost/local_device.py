"""The device that this process computes on, as planning sees it."""

import os
from dataclasses import replace

import torch

from evenflow.cluster.device import Device
from evenflow.cluster.presets import COMMUNICATOR_BYTES, PRESETS, device_called
from evenflow.cost.clock import timed
from evenflow.errors import ConfigError


def local_device(device: torch.device, name: str, *, num_sharing: int) -> Device:
    """Return what is known of a device: a preset, or what is measured of its speed and found of its memory.

    `num_sharing` ranks share the memory of a CPU's host.

    >>> local_device(torch.device("cpu"), "mine", num_sharing=1).memory_bytes > 2**30
    True
    """
    memory = memory_bytes_of(device) / (num_sharing if device.type == "cpu" else 1)
    found = device_found(name, memory, flops_per_second_of(device))
    return found if device.type == "cpu" else replace(found, communicator_bytes=COMMUNICATOR_BYTES)


def device_found(name: str, memory_bytes: float, flops_per_second: float) -> Device:
    """Return a device of that name: the preset if it is one, else with the rate that was measured."""
    try:
        preset = device_called(name)
    except ConfigError:
        preset = PRESETS["CPU core"]
    if preset.name != "CPU core":
        return preset
    return Device(
        name,
        {"float32": flops_per_second},
        memory_bytes=memory_bytes,
        memory_bytes_per_second=preset.memory_bytes_per_second,
        reserved_bytes=0.0,
        efficiency=1.0,
        source="the rate was measured here; the memory's speed is assumed",
        kernel_seconds=preset.kernel_seconds,
    )


def memory_bytes_of(device: torch.device) -> float:
    """All memory of a GPU, or of the host."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def flops_per_second_of(device: torch.device) -> float:
    """What a product of matrices in float32 reaches, with as many threads as torch has."""
    size = 8192 if device.type == "cuda" else 512
    matrix = torch.ones(size, size, device=device)
    best = min(timed(lambda: torch.mm(matrix, matrix), device)[0] for _ in range(4))
    return 2.0 * size**3 / best
