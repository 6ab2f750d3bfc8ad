"""Starting an examination: a process per device of this machine, or those that `torchrun` has started."""

import torch

from evenflow.doctor.examine import Examination, examine
from evenflow.errors import ConfigError
from evenflow.launcher import launch, library_settings, rank_environment


def run(device: str | None, num_ranks: int | None, *, timeout_seconds: float) -> Examination:
    """Examine the links between this machine's devices, or between all ranks under `torchrun`.

    `device` is "cpu" or "cuda", by default cuda where there is a GPU; `num_ranks` by default one a GPU, or 2.
    Raises `ConfigError` for fewer than two ranks, for more than there are GPUs, and for a timeout of nothing.
    """
    num_gpus = torch.cuda.device_count()
    kind = device or ("cuda" if num_gpus else "cpu")
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"device {kind!r} cannot be examined: choose cpu or cuda")
    if not timeout_seconds > 0:
        raise ConfigError(f"a timeout of {timeout_seconds:g} s leaves no time to answer: give it more than 0")
    place = rank_environment()
    if place is not None:
        num_ranks = place.num_ranks
    elif num_ranks is None:
        num_ranks = num_gpus if kind == "cuda" else 2
    elif kind == "cuda" and num_ranks > num_gpus:
        raise ConfigError(f"{num_ranks} ranks need as many GPUs, and torch finds {num_gpus}: lower --ranks")
    if num_ranks < 2:
        raise ConfigError(
            f"a link needs two ranks, and there are {num_ranks}: on CPUs give --ranks 2, and for several "
            "machines start it with torchrun on each"
        )
    return launch(_on_rank, kind, timeout_seconds, nproc=num_ranks)[0]


def _on_rank(kind: str, timeout_seconds: float) -> Examination:
    place = rank_environment()
    assert place is not None, "launched"
    return examine(kind, place.local_rank, library_settings(), timeout_seconds)
