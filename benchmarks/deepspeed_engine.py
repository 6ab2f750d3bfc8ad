"""DeepSpeed's pipeline engine among the competitors of `runtime`, where `pip install deepspeed` has been run.

Its schedule is 1F1B, each stage's cuts are given, and it takes no step with an optimizer, as the others.
"""

import importlib.util
import logging
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from workloads import Workload, gradients_of

IS_INSTALLED = importlib.util.find_spec("deepspeed") is not None


class DeepSpeeds:
    """DeepSpeed's engine on the default group, which must be Gloo's."""

    def __init__(self, workload: Workload) -> None:
        # Untyped, and not among what the project depends on.
        deepspeed = importlib.import_module("deepspeed")
        instructions = importlib.import_module("deepspeed.runtime.pipe.schedule")
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
        edges = [0, *workload.cuts(dist.get_world_size()), len(workload.chain)]

        def partition(module: Any, **_: Any) -> None:  # a PipelineModule, which knows no cuts of ours
            module.parts = edges
            module._set_bounds(start=edges[dist.get_rank()], stop=edges[dist.get_rank() + 1])  # noqa: SLF001

        kind = type("Cut", (deepspeed.pipe.PipelineModule,), {"_partition_layers": partition})
        module = kind(list(workload.chain), num_stages=dist.get_world_size(), loss_fn=workload.loss)
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.0),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": len(workload.inputs),
                "steps_per_print": None,
            },
        )
        without = {**self.engine._INSTRUCTION_MAP, instructions.OptimizerStep: lambda _: None}  # noqa: SLF001
        self.engine._INSTRUCTION_MAP = MappingProxyType(without)  # noqa: SLF001
        self.microbatches = list(zip(workload.inputs.split(1), workload.targets.split(1), strict=True))

    def step(self) -> None:
        """Forward and backward of a batch."""
        self.engine.train_batch(iter(self.microbatches))

    def gradients(self) -> dict[str, torch.Tensor]:
        """Those of this rank's parameters, by the chain's names."""
        return gradients_of(self.engine.module)
