"""What `test_hosts.py` runs: the same script in one process and, under torchrun, on several hosts."""

import json
import os
import sys

import torch
from torch import distributed as dist

import evenflow
from evenflow.runtime.links.by_rank import LinkByRank
from unsplit import mean_square, mlp, regression

NUM_STAGES, NUM_STEPS = 4, 4


def train() -> dict[str, object]:
    """A few steps: this rank, its losses to the last bit, and which link leads to each other rank."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pipe = evenflow.pipeline(
        mlp(4, 16, 16, 16, 16, 1),
        loss=mean_square,
        example=regression(),
        optimizer=lambda named: torch.optim.AdamW([parameter for _, parameter in named], lr=1e-2),
        stages=NUM_STAGES,
        num_microbatches=8,
    )
    losses = [float(pipe.step(regression()).loss).hex() for _ in range(NUM_STEPS)]
    link = pipe._parts.link
    links = link._links if isinstance(link, LinkByRank) else [link] * NUM_STAGES
    rank = dist.get_rank() if dist.is_initialized() else 0
    return {
        "rank": rank,
        "losses": losses,
        "links": [type(each).__name__ for each in links],
        "interface": os.environ.get("GLOO_SOCKET_IFNAME"),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(train()) + "\n")
