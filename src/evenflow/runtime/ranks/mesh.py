"""Mesh: the processes of a run as a grid of pipelines, data ranks and tensor ranks.

Every process is one rank of a *pipeline* (it holds some of the stages), one of the *data* ranks (replicas
that hold the same stages and take other microbatches) and one of the *tensor* ranks (that share each layer).
Tensor ranks talk most, so they are numbered next to each other, then data ranks, then those of a pipeline:
torchrun numbers the processes of one host in a row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from evenflow.errors import ConfigError
from evenflow.ir.placement import Placement
from evenflow.runtime.ranks.world import ProcessGroupWorld, SingleProcess, World

AXES = ("pp", "dp", "tp")  # in this order ranks are numbered, the last one running fastest


@dataclass(frozen=True, slots=True)
class Mesh:
    """This process's place among all. `world`: all processes; the rest: those that differ in one coordinate.

    `devices` is torch's own mesh, where there are several kinds of ranks.
    """

    world: World
    pipeline: World
    data: World
    tensor: World
    devices: DeviceMesh | None = None

    @property
    def is_whole(self) -> bool:
        """Whether all processes are ranks of one pipeline."""
        return self.pipeline.size == self.world.size

    @property
    def is_first_of_replicas(self) -> bool:
        """Whether of all processes with the same stages this one speaks for what they hold alike."""
        return self.data.rank == 0 and self.tensor.rank == 0

    def pipeline_rank(self, process: int) -> int:
        """A process's place in its pipeline."""
        return process // (self.data.size * self.tensor.size)

    def stages_of(self, process: int, placement: Placement) -> Sequence[int]:
        """The stages that a process holds: those of its rank, or all where its pipeline has one process."""
        if self.pipeline.size == 1:
            return range(placement.num_stages)
        return placement.stages_on(self.pipeline_rank(process))

    def share(self, num_microbatches: int, process: int | None = None) -> range:
        """The microbatches of a step that a process works on, by default this one.

        >>> mesh_of(SingleProcess(), None).share(3)
        range(0, 3)
        """
        number = self.world.rank if process is None else process
        at, of = number // self.tensor.size % self.data.size, self.data.size
        return range(num_microbatches * at // of, num_microbatches * (at + 1) // of)

    def longest_share(self, num_microbatches: int) -> int:
        """How many microbatches the data rank with the most works on."""
        return -(-num_microbatches // self.data.size)

    def check_carried(self, device: torch.device, what: str) -> None:
        """Raise `ConfigError` where the ranks' collectives do not carry tensors of such a device."""
        if device.type != self.world.device.type:
            raise ConfigError(
                f"{what} needs a GPU for each process, and NCCL between them: here tensors go over Gloo and "
                "the host, because processes share a GPU or the group was made for Gloo alone"
            )


def mesh_of(world: World, degrees: Mapping[str, int] | None) -> Mesh:
    """Arrange the processes; collective. By default they are all ranks of one pipeline.

    `degrees` maps "pp", "dp" and "tp" to how many there are; one that is left out is 1, but for "pp", which
    is then what is left. Raises `ConfigError` for degrees that no number of processes can have, or these.
    """
    sizes = checked_degrees(degrees, world.size)
    if sizes["dp"] == sizes["tp"] == 1:
        alone = SingleProcess()
        return Mesh(world, world, alone, alone)
    assert isinstance(world, ProcessGroupWorld), "one process has one rank of each kind"
    shape = tuple(sizes[axis] for axis in AXES)
    devices = init_device_mesh(world.device.type, shape, mesh_dim_names=AXES)
    pipeline, data, tensor = (_line(world, devices, axis) for axis in AXES)
    return Mesh(world, pipeline, data, tensor, devices)


def _line(world: ProcessGroupWorld, devices: DeviceMesh, axis: str) -> World:
    """The processes that differ from this one along an axis alone."""
    at = AXES.index(axis)
    size = devices.mesh.shape[at]
    if size == 1:
        return SingleProcess()
    lines: Sequence[Sequence[int]] = devices.mesh.movedim(at, -1).reshape(-1, size).tolist()
    return world.part(devices.get_group(axis), lines)


def checked_degrees(degrees: Mapping[str, int] | None, num_processes: int) -> dict[str, int]:
    """Return how many ranks of each kind there are; `ConfigError` where they don't fit the processes.

    >>> checked_degrees({"dp": 2}, 8)
    {'pp': 4, 'dp': 2, 'tp': 1}
    """
    given = dict(degrees or {})
    for axis, degree in given.items():
        if axis not in AXES:
            raise ConfigError(f"mesh= names {axis!r}; the axes are {', '.join(map(repr, AXES))}")
        if type(degree) is not int or degree < 1:
            raise ConfigError(f"mesh= has {axis!r}: {degree!r}; a degree is a whole number from 1 on")
    beside = given.get("dp", 1) * given.get("tp", 1)
    pipeline = given.get("pp", max(1, num_processes // beside))
    sizes = {"pp": pipeline, "dp": given.get("dp", 1), "tp": given.get("tp", 1)}
    needed = pipeline * beside
    if given and needed != num_processes:
        product = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        are = "1 is" if num_processes == 1 else f"{num_processes} are"
        fitting = f", or leave pp out, which would be {num_processes // beside}" if "pp" in given else ""
        remedy = fitting if num_processes % beside == 0 and num_processes > beside else ""
        raise ConfigError(
            f"{needed} processes are needed ({product}), but {are} running; start with torchrun "
            f"--nproc-per-node {needed}{remedy}"
        )
    return sizes
