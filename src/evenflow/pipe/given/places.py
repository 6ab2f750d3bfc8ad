"""Where a pipeline runs: the processes of the run, and the device of each stage."""

import atexit
import threading
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from evenflow.errors import ConfigError
from evenflow.ir.placement import Placement
from evenflow.runtime.notes.host_memory import keep_freed_memory
from evenflow.runtime.ranks import network
from evenflow.runtime.ranks.mesh import Mesh
from evenflow.runtime.ranks.watchdog import TIMEOUT_SECONDS, check_timeout, group_seconds
from evenflow.runtime.ranks.world import ProcessGroupWorld, SingleProcess, World

_LEAVE_SECONDS = 10.0
_TIMEOUT = timedelta(minutes=5)  # a lost peer ends every survivor within it, where no watchdog does


def device_kind(device: str | torch.device | None) -> str:
    """Return "cpu" or "cuda"; raises `ConfigError` where CUDA was asked for and there is none."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ConfigError(f"device={device!r} is no device that torch knows; use 'cpu' or 'cuda'") from error
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"device={str(device)!r} is not supported; use 'cpu' or 'cuda'")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device={str(device)!r} was asked for, but torch {torch.__version__} finds no CUDA device; "
            "use device='cpu', or install a CUDA build of torch"
        )
    return kind


def world_of(kind: str, timeout: float | None = TIMEOUT_SECONDS) -> World:
    """The processes of this run: torch.distributed's if it is set up or the elastic launcher started us.

    A group that is made here gives up later than a watchdog with this `timeout`, in seconds.
    """
    check_timeout(timeout)
    if kind == "cpu":
        keep_freed_memory()
    if not dist.is_available():
        return SingleProcess()
    if not dist.is_initialized() and dist.is_torchelastic_launched():
        waits = _TIMEOUT if timeout is None else timedelta(seconds=group_seconds(timeout, kind))
        network.join("gloo" if kind == "cpu" else "cpu:gloo,cuda:nccl", waits)
        atexit.register(_leave)  # a group that nobody closes can abort the interpreter as it ends
    if dist.is_initialized() and kind == "cuda":
        torch.cuda.set_device(_cuda_index(dist.get_rank()))
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return SingleProcess()
    return ProcessGroupWorld(_device_of(kind, dist.get_rank()))


def own_device(kind: str, world: World) -> torch.device:
    """The device that this process has if nothing else is said."""
    return _device_of(kind, world.rank)


def _device_of(kind: str, number: int) -> torch.device:
    return torch.device("cpu") if kind == "cpu" else torch.device("cuda", _cuda_index(number))


def _leave() -> None:
    if dist.is_initialized():
        closing = threading.Thread(target=dist.destroy_process_group, daemon=True)
        closing.start()
        closing.join(_LEAVE_SECONDS)  # with a peer gone it may wait for ever


def _cuda_index(number: int) -> int:
    return number % torch.cuda.device_count()


def devices_of(
    kind: str, placement: Placement, mesh: Mesh, places: Sequence[int] | None = None
) -> tuple[torch.device, ...]:
    """The device of each stage: its rank's, `places[rank]` if given; they take turns over those there are."""
    if kind == "cpu":
        return (torch.device("cpu"),) * placement.num_stages
    order: Sequence[int] = range(placement.num_ranks)
    if mesh.world.size > 1:
        order = mesh.pipeline.members if mesh.pipeline.size > 1 else [mesh.world.rank] * placement.num_ranks
    if places is not None and mesh.is_whole:
        order = places
    return tuple(torch.device("cuda", _cuda_index(order[rank])) for rank in placement.rank_of)
