"""A device, as planning sees it: what it computes, moves and holds."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Device:
    """One kind of device. Rates are peaks from `source`; `efficiency` says what part of them is reached.

    - `flops_per_second`: by the name of a dtype ("float32", "bfloat16", "float16", "float8"), dense, without
      sparsity.
    - `memory_bytes`: all of its memory; `reserved_bytes` of it go to the driver's context and to what the
      allocator can't use.
    - `efficiency`: the share of `flops_per_second` that large matrix products reach, 0 to 1.
    """

    name: str
    flops_per_second: Mapping[str, float]
    memory_bytes: float
    memory_bytes_per_second: float
    reserved_bytes: float
    efficiency: float
    source: str
