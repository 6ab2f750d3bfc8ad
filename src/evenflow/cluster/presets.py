"""Devices that one can buy, from their makers' data sheets.

Rates are dense: where a data sheet counts sparse matrices, half of it. float32 is without TF32, as torch
computes by default; 16-bit types add up in 32 bits. Memory is what nvidia-smi shows, a little less than what
the card is called after. A gibibyte of it is set aside for the driver's context and for what the allocator
cannot use, a kernel costs 5 µs, and a communicator of NCCL between two GPUs takes 64 MiB, its buffers of 4
MiB in 16 channels: all three are assumed.

An efficiency makes the planner say of a published run, with the degrees of that run, the speed that was
published. Communication and recomputation, which the planner counts, are not in it:

- A100: three runs of torchtitan on 64 (docs/performance.md; sharded over all): 2,162 tokens a second on each
  of Llama 2 13B without recomputation, 331 of Llama 3 70B with all recomputed, and 2,973 of Llama 3 8B. They
  need 0.68, 0.74 and 0.73.
- H100: Llama 3.1 8B on 8 of torchtitan's (benchmarks/llama3_h100_202412_torchtitan.md): 6,667. These had
  slower memory and no more than 500 W, so that others are likely to be faster.

The last two runs recompute some operations. That cost 13.6 % of the time of Llama 2 13B in the first table,
and is taken to cost as much here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from evenflow.cluster.device import Device
from evenflow.cluster.names import nearest, normal
from evenflow.errors import ConfigError

_MIB, _GIB, _TERA = 2**20, 2**30, 1e12
COMMUNICATOR_BYTES = 64.0 * _MIB  # of a GPU


@dataclass(frozen=True, slots=True)
class _Preset:
    """A device, the link between those of one host as they are usually sold, and its other names.

    The names that drivers give are among them.
    """

    device: Device
    link: str
    aliases: tuple[str, ...]


def _gpu(
    name: str,
    *aliases: str,
    teraflops: Mapping[str, float],
    memory_mib: int,
    gigabytes_per_second: float,
    efficiency: float,
    link: str,
    source: str,
) -> _Preset:
    device = Device(
        name,
        MappingProxyType({dtype: rate * _TERA for dtype, rate in teraflops.items()}),
        memory_bytes=float(memory_mib * _MIB),
        memory_bytes_per_second=gigabytes_per_second * 1e9,
        reserved_bytes=float(_GIB),
        efficiency=efficiency,
        source=source,
        kernel_seconds=5e-6,
        communicator_bytes=COMMUNICATOR_BYTES,
    )
    return _Preset(device, link, aliases)


_HOPPER = {"float32": 66.9, "bfloat16": 989.4, "float16": 989.4, "float8": 1978.9}
_AMPERE = {"float32": 19.5, "bfloat16": 312.0, "float16": 312.0}

_PRESETS = (
    _gpu(
        *("H100", "H100 SXM", "H100 SXM5", "H100 80GB HBM3"),
        teraflops=_HOPPER,
        memory_mib=81_559,
        gigabytes_per_second=3_350,
        efficiency=0.535,
        link="NVLink 4",
        source="NVIDIA H100 data sheet, SXM; efficiency by torchtitan, Llama 3.1 8B",
    ),
    _gpu(
        *("H200", "H200 SXM", "H200 SXM5"),
        teraflops=_HOPPER,
        memory_mib=143_771,
        gigabytes_per_second=4_800,
        efficiency=0.535,
        link="NVLink 4",
        source="NVIDIA H200 data sheet, SXM; efficiency assumed: that of the H100",
    ),
    _gpu(
        *("A100 80GB", "A100", "A100 SXM", "A100 80GB SXM", "A100 SXM4 80GB"),
        teraflops=_AMPERE,
        memory_mib=81_920,
        gigabytes_per_second=2_039,
        efficiency=0.715,
        link="NVLink 3",
        source="NVIDIA A100 data sheet, SXM 80 GB; efficiency by torchtitan, Llama 2 and 3",
    ),
    _gpu(
        *("A100 40GB", "A100 40GB SXM", "A100 SXM4 40GB"),
        teraflops=_AMPERE,
        memory_mib=40_960,
        gigabytes_per_second=1_555,
        efficiency=0.715,
        link="NVLink 3",
        source="NVIDIA A100 data sheet, SXM 40 GB; efficiency assumed: that of the A100 80GB",
    ),
    _gpu(
        "L40S",
        teraflops={"float32": 91.6, "bfloat16": 362.05, "float16": 362.05, "float8": 733.0},
        memory_mib=46_068,
        gigabytes_per_second=864,
        efficiency=0.5,
        link="PCIe 4.0 x16",
        source="NVIDIA L40S data sheet; efficiency assumed",
    ),
    _gpu(
        *("RTX 4090", "4090"),
        teraflops={"float32": 82.6, "bfloat16": 165.2, "float16": 165.2, "float8": 330.3},
        memory_mib=24_564,
        gigabytes_per_second=1_008,
        efficiency=0.6,
        link="PCIe 4.0 x16",
        source="NVIDIA Ada GPU architecture whitepaper, appendix A; efficiency assumed",
    ),
    _gpu(
        *("RTX 3090", "3090"),
        teraflops={"float32": 35.6, "bfloat16": 71.0, "float16": 71.0},
        memory_mib=24_576,
        gigabytes_per_second=936,
        efficiency=0.715,
        link="PCIe 4.0 x16",
        source="NVIDIA Ampere GA102 whitepaper, appendix A; efficiency assumed: that of the A100",
    ),
    _Preset(
        Device(
            "CPU core",
            MappingProxyType({"float32": 96e9}),
            memory_bytes=4.0 * _GIB,
            memory_bytes_per_second=10e9,
            reserved_bytes=0.5 * _GIB,
            efficiency=0.6,
            source="assumed: 3 GHz, two AVX2 multiply-adds a cycle; 4 GiB a core; calibrate it",
            kernel_seconds=5e-6,
        ),
        link="shared memory",
        aliases=("CPU",),
    ),
)

PRESETS: Mapping[str, Device] = MappingProxyType({each.device.name: each.device for each in _PRESETS})
USUAL_LINK: Mapping[str, str] = MappingProxyType({each.device.name: each.link for each in _PRESETS})
_BY_NORMAL = {normal(name): each.device for each in _PRESETS for name in (each.device.name, *each.aliases)}


def device_called(name: str, own: Mapping[str, Device] = MappingProxyType({})) -> Device:
    """Return a device by its name, one's own ones first; `ConfigError` suggests another for an unknown name.

    >>> device_called("rtx4090").name, device_called("NVIDIA H100 80GB HBM3").name
    ('RTX 4090', 'H100')
    """
    device = own.get(name, _BY_NORMAL.get(normal(name)))
    if device is None:
        raise ConfigError(
            f"unknown device {name!r}{nearest(name, [*own, *PRESETS])}; describe another in a cluster file, "
            "under [devices.NAME]"
        )
    return device
