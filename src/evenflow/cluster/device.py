"""A device, as planning sees it: what it computes, moves and holds."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from evenflow.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Device:
    """One kind of device. Rates are peaks from `source`; `efficiency` says what part of them is reached.

    - `flops_per_second`: by the name of a dtype ("float32", "bfloat16", "float16", "float8"), dense, without
      sparsity.
    - `memory_bytes`: all of its memory; `reserved_bytes` of it go to the driver's context and to what the
      allocator can't use.
    - `efficiency`: the share of `flops_per_second` that large matrix products reach, 0 to 1.
    - `kernel_seconds`: what a kernel costs however little it does.
    - `communicator_bytes`: what a way for tensors to another device takes; there is one for each direction.

    Raises `ConfigError`, naming all that is wrong: a rate or a memory that is not above 0, an efficiency
    outside 0 to 1, more memory reserved than there is.

    >>> Device("toy", {"float32": 1e12}, 2**30, 1e11, 0, efficiency=1.5, source="made up")
    Traceback (most recent call last):
    ...
    evenflow.errors.ConfigError: device toy: efficiency = 1.5 must be above 0 and at most 1
    """

    name: str
    flops_per_second: Mapping[str, float]
    memory_bytes: float
    memory_bytes_per_second: float
    reserved_bytes: float
    efficiency: float
    source: str
    kernel_seconds: float = 0.0
    communicator_bytes: float = 0.0

    def __post_init__(self) -> None:
        rates = {
            **{f"flops_per_second of {dtype}": rate for dtype, rate in self.flops_per_second.items()},
            "memory_bytes": self.memory_bytes,
            "memory_bytes_per_second": self.memory_bytes_per_second,
        }
        faults = [
            f"{what} = {value:g} must be above 0 and finite"
            for what, value in rates.items()
            if not 0 < value < math.inf
        ]
        if not self.flops_per_second:
            faults.append("flops_per_second is empty: give the rate of at least one dtype")
        if not 0 < self.efficiency <= 1:
            faults.append(f"efficiency = {self.efficiency:g} must be above 0 and at most 1")
        if not 0 <= self.reserved_bytes < self.memory_bytes:
            faults.append(
                f"reserved_bytes = {self.reserved_bytes:g} must be at least 0, and less than memory_bytes = "
                f"{self.memory_bytes:g}"
            )
        if not 0 <= self.kernel_seconds < math.inf:
            faults.append(f"kernel_seconds = {self.kernel_seconds:g} must be at least 0 and finite")
        if not 0 <= self.communicator_bytes < math.inf:
            faults.append(f"communicator_bytes = {self.communicator_bytes:g} must be at least 0 and finite")
        if faults:
            raise ConfigError(f"device {self.name}: {'; '.join(faults)}")

    @property
    def room_bytes(self) -> float:
        """What there is for tensors: its memory, less what it reserves."""
        return self.memory_bytes - self.reserved_bytes

    def same_kind(self, other: "Device") -> bool:
        """Whether the two differ in their memory at most.

        >>> toy = Device("toy", {"float32": 1e12}, 2**30, 1e11, 0, 0.5, "made up")
        >>> toy.same_kind(replace(toy, memory_bytes=2**31)), toy.same_kind(replace(toy, efficiency=0.6))
        (True, False)
        """
        return all(
            getattr(self, field.name) == getattr(other, field.name)
            for field in fields(self)
            if field.name != "memory_bytes"
        )

    def peak(self, dtype: str) -> float:
        """Return the floating point operations per second in a dtype; `ConfigError` where it has no rate.

        >>> Device("toy", {"float32": 1e12}, 2**30, 1e11, 0, 0.5, "made up").peak("float32")
        1000000000000.0
        """
        if dtype not in self.flops_per_second:
            raise ConfigError(
                f"device {self.name} has no rate for {dtype}; it has {', '.join(self.flops_per_second)}: "
                "choose one of these, or give the device a rate of its own in the cluster file"
            )
        return self.flops_per_second[dtype]


def calibrated(device: Device, *, flops: float, seconds: float, dtype: str) -> Device:
    """Return the device with the efficiency of a measurement: such matrix products took that long.

    Raises `ConfigError` for a measurement faster than the device's peak, and for one of no work or no time.

    >>> toy = Device("toy", {"float32": 1e12}, 2**30, 1e11, 0, 0.5, "made up")
    >>> calibrated(toy, flops=6e12, seconds=8.0, dtype="float32").efficiency
    0.75
    """
    if not (0 < flops < math.inf and 0 < seconds < math.inf):
        raise ConfigError(
            f"device {device.name} cannot be calibrated with {flops:g} operations in {seconds:g} s: measure "
            "work that takes time"
        )
    efficiency = flops / seconds / device.peak(dtype)
    if efficiency > 1:
        raise ConfigError(
            f"device {device.name} cannot be calibrated: {flops:g} operations in {seconds:g} s are "
            f"{efficiency:.2f} times its peak of {device.peak(dtype):g} a second in {dtype}; see that the "
            "clock waits for the device (torch.cuda.synchronize), and that the dtype is the right one"
        )
    return replace(device, efficiency=efficiency)
