"""What all processes of a run must have alike: buffers, and the program that they cut."""

import torch

from evenflow.errors import ConfigError
from evenflow.graph.cut import Cut
from evenflow.pipe.programs import Programs, fingerprint
from evenflow.runtime.world import World


def share_buffers(model: torch.nn.Module, world: World, device: torch.device) -> None:
    """Give every process the first one's buffers, which masks and tables are computed from on all of them."""
    for buffer in model.buffers() if world.size > 1 else ():
        moved = buffer.detach().to(device)
        world.broadcast(moved, 0).wait()
        buffer.detach().copy_(moved)


def check_alike(cut: Cut, programs: Programs, world: World) -> None:
    """Refuse examples under which the processes recorded different programs: their stages would not fit."""
    nodes, batches = [node.name for node in cut.graph.chain], [section.batch for section in cut.sections]
    orders = programs.placement, programs.example.ranks, programs.costs
    mine = fingerprint(nodes, cut.positions, batches, *orders)
    found = [row[0] for row in world.gather_numbers([mine])]
    if len(set(found)) > 1:
        other = next(rank for rank, number in enumerate(found) if number != found[0])
        raise ConfigError(
            f"ranks 0 and {other} recorded different programs (here {len(cut.graph.chain)} nodes, cut at "
            f"{cut.positions}): build the same model, pass an example of the same shapes, and name the same "
            "schedule, or the same plan, on every rank"
        )
