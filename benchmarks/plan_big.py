"""Plans runs that no laptop could make: how long that takes, and what comes out beside what was published.

Each case runs in a process of its own, from the import of torch on: the model is built without memory,
recorded, its costs estimated, and planned, through the functions of `evenflow plan`. Then the published
layout is priced by the same estimate. Run: `python benchmarks/plan_big.py`.
"""

import argparse
import functools
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console

from evenflow.cluster.cluster import Cluster
from evenflow.cluster.short import parse_cluster
from evenflow.ir.costs import Link
from evenflow.plan.choice import Choice, describe
from evenflow.plan.plan import Plan
from evenflow.plan.planner import NoPlanError, plan
from evenflow.plan.rank_memory import TrainingState
from evenflow.plan.request import Levers, Request
from evenflow.plan.scale import scaled

SHARE = 1 / 32  # of all work, that a leaf holds at most
RECORDED_ROWS = (2, 4)
# A master copy in float32 and both moments of AdamW; gradients are summed in float32.
MIXED = TrainingState(optimizer_bytes=12.0, update_bytes=4.0, gradient_bytes=2.0)


@dataclass(frozen=True)
class Layout:
    """A published layout, and the tokens a second that each device reached; 0 where none were published."""

    source: str
    levers: Levers
    tokens_per_second: float = 0.0


@dataclass(frozen=True)
class Case:
    """What is planned: `rows` of `length` tokens a step. `model` makes it without memory."""

    model: Callable[[], Any]  # a transformers.PreTrainedModel, or peft's wrapper of one
    cluster: str
    rows: int
    length: int
    state: TrainingState = MIXED
    published: tuple[Layout, ...] = ()
    sizes: tuple[int, ...] = (1, 2, 4, 8)


def llama_70b() -> Any:
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        use_cache=False,
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def deepseek_v3() -> Any:
    import torch
    import transformers

    config = transformers.DeepseekV3Config(use_cache=False)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def llama_13b_lora() -> Any:
    import peft
    import torch
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        max_position_embeddings=4096,
        use_cache=False,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, lora)


CASES = {
    "Llama-3 70B on 8x8 H100": Case(
        llama_70b,
        "8x8xH100",
        rows=512,
        length=8192,
        published=(
            # torchtitan's of Llama 3.1 70B (benchmarks/llama3_h100_202412_torchtitan.md, table 4): there 32
            # of these groups of 8, here 8; and float8.
            Layout(
                "torchtitan's: 8-way tensor, the rest sharded data, all recomputed",
                Levers(
                    pipeline=1,
                    tensor=8,
                    sharding="fsdp",
                    microbatch_size=2,
                    recompute="full",
                ),
                tokens_per_second=829.0,
            ),
            # The Llama 3 paper's of 405B (table 4), with as many pipeline ranks as 64 devices leave.
            Layout(
                "the paper's of 405B: 8-way tensor, pipeline over hosts, nothing recomputed",
                Levers(
                    pipeline=8,
                    tensor=8,
                    stages_per_rank=4,
                    schedule="interleaved-1f1b",
                    microbatch_size=1,
                    recompute="none",
                ),
            ),
        ),
    ),
    "DeepSeek-V3 on 2,048 H100": Case(
        deepseek_v3,
        "256x8xH100",
        rows=15_360,
        length=4096,
        # The report, section 3.3.3: moments in bfloat16, master weights and gradients in float32.
        state=TrainingState(optimizer_bytes=8.0, update_bytes=4.0, gradient_bytes=2.0),
        published=(
            Layout(
                "16-way pipeline, 64-way experts, ZeRO-1, zb-v in the place of DualPipe",
                Levers(
                    pipeline=16,
                    tensor=1,
                    data=128,
                    expert=64,
                    stages_per_rank=2,
                    schedule="zb-v",
                    sharding="zero1",
                    microbatch_size=1,
                ),
                # 180,000 H800 hours for 10**12 tokens.
                tokens_per_second=1e12 / (180e3 * 3600),
            ),
        ),
    ),
    "Llama-2 13B with LoRA on 2x RTX 4090 + 2x RTX 3090": Case(
        llama_13b_lora,
        "2x RTX 4090 + 2x RTX 3090",
        rows=16,
        length=2048,
        # LoRA's matrices are float32, as peft makes them: no master copy.
        state=TrainingState(optimizer_bytes=8.0, update_bytes=4.0, gradient_bytes=1.0),
    ),
}


def request_of(case: Case) -> Request:
    """Build, record and estimate, as `evenflow plan` does."""
    import torch

    import evenflow
    from evenflow.cost.estimate import estimate
    from evenflow.pipe.building.recorded import recorded
    from evenflow.pipe.given.splitter import Splitter

    with evenflow.deferred_init():
        model = case.model()
    machine = parse_cluster(case.cluster)

    def costed(num_rows: int) -> Any:  # a Chain
        ids = torch.zeros(num_rows, case.length, dtype=torch.long)
        found = recorded(
            model,
            loss=lambda model, batch: model(**batch).loss,
            example={"input_ids": ids, "labels": ids},
            splitter=Splitter(1, 1, None, None),
            max_leaf_share=SHARE,
            device=torch.device("cpu"),
        )
        return estimate(found.graph, found.model, machine.devices, num_rows=num_rows)

    small, large = map(costed, RECORDED_ROWS)
    return Request(
        functools.lru_cache(lambda num_rows: scaled(small, large, num_rows)),
        tuple(size for size in case.sizes if case.rows % size == 0),
        machine,
        case.rows,
        case.length,
        SHARE,
        case.state,
    )


def run(name: str) -> None:
    started = time.perf_counter()
    case, console = CASES[name], Console(width=120, highlight=False)
    request = request_of(case)
    recorded_seconds = time.perf_counter() - started
    found = plan(request)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    console.print(f"[bold]{name}[/bold]: {case.rows:,} rows of {case.length:,} tokens a step")
    console.print(
        f"{seconds:.1f} s, of them {recorded_seconds:.1f} s until it was recorded; {peak:.2f} GiB at most"
    )
    tell(console, "planned", request, found)
    console.print(
        f"  at most {found.prediction.gap:.1%} over the bound of {found.prediction.bound_seconds:.2f} s"
    )
    for layout in case.published:
        try:
            other = plan(replace(request, levers=layout.levers))
        except NoPlanError as error:
            console.print(f"  {layout.source}: {error}")
            continue
        tell(console, f"published ({layout.source})", request, other)
        free = replace(request, cluster=without_waiting(request.cluster), levers=layout.levers)
        tell(console, "the same, if no transfer took time", free, plan(free))
        if layout.tokens_per_second:
            console.print(f"  reached: {layout.tokens_per_second:,.0f} tokens/s on each device")


def without_waiting(cluster: Cluster) -> Cluster:
    """The cluster where whatever is sent is there at once."""
    hosts = tuple(replace(host, link=Link()) for host in cluster.hosts)
    return Cluster(hosts, Link())


def tell(console: Console, what: str, request: Request, found: Plan) -> None:
    told = found.prediction
    choice = Choice(
        found.degrees,
        found.stages_per_rank,
        found.schedule,
        found.microbatch_size,
        found.num_microbatches,
        "none",
    )
    again = sum(len(stage.recompute) for stage in found.stages)
    nodes = sum(stage.num_nodes for stage in found.stages)
    console.print(f"  {what}: {describe(choice)}; recomputes {again} of {nodes} nodes")
    each = told.tokens_per_second / request.cluster.num_ranks
    mfu = f", {told.mfu:.1%} of the peak" if told.mfu is not None else ""
    memory = [rank.memory.allocated / 2**30 for rank in found.ranks]
    idle = [max(0.0, rank.idle) for rank in found.ranks]
    console.print(
        f"    {told.step_seconds:.2f} s a step, {each:,.0f} tokens/s on each device{mfu}; memory "
        f"{min(memory):.0f} to {max(memory):.0f} GiB, idle {min(idle):.0%} to {max(idle):.0%}"
    )
    if len({rank.device for rank in found.ranks}) > 1:
        flops, at = request.chain_of(found.microbatch_size).flops, 0
        done = [0.0] * len(found.ranks)
        for stage in found.stages:
            done[stage.rank] += sum(flops[at : at + stage.num_nodes]) / sum(flops)
            at += stage.num_nodes
        for number, rank in enumerate(found.ranks):
            console.print(
                f"    rank {number}: {rank.device}, {done[number]:.1%} of the work, {memory[number]:.1f} GiB"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("case", nargs="?", choices=CASES)
    case = parser.parse_args().case
    if case is not None:
        run(case)
        return
    for name in CASES:
        subprocess.run([sys.executable, __file__, name], check=True)


if __name__ == "__main__":
    main()
