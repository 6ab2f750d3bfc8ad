"""A plan in the words of the system that is to run it; `targets` has the sources."""

import itertools
import json

from evenflow.plan.own_order import planned_schedule
from evenflow.plan.plan import Plan
from evenflow.plan.systems.megatron_layout import format_layout
from evenflow.plan.systems.targets import Within, target_called, torch_style, within
from evenflow.torch_schedule import format_torch_schedule

TORCH = "torch"  # torch.distributed.pipelining itself, which has no settings but an order of work
_TORCHTITAN_FILE = "schedule.csv"  # of an order that torchtitan has no name for
# What makes torchtitan put stages on ranks; the order is then the file's. Its `_build_pipeline_schedule`.
_STYLES = {"loop": "PipelineScheduleMulti", "v": "ZBVZeroBubble"}


def export_plan(plan: Plan, to: str) -> str:
    """Return a plan as another system takes it: settings, or for "torch" the schedule file of its runtime.

    Raises `ConfigError` for a system that there is not, and for a plan that it cannot run, with every reason.

    >>> from pathlib import Path
    >>> from evenflow.plan.plan_file import read_plan_file
    >>> print(export_plan(read_plan_file(Path("plan.toml")), "megatron"))  # doctest: +SKIP
    --pipeline-model-parallel-size 2
    --pipeline-model-parallel-layout "Et*3|tL"
    ...
    """
    if to == TORCH:
        return format_torch_schedule(planned_schedule(plan))
    return settings(within(plan, target_called(to))) + "\n"


def settings(within: Within) -> str:
    """Return what to write into the target's own configuration.

    Layers are called as the target calls its own; a batch's rows count over all data ranks.
    """
    match within.target.name:
        case "torchtitan":
            return _torchtitan(within)
        case "megatron":
            return _megatron(within)
        case name:
            assert name == "deepspeed", "every target has its settings"
            return _deepspeed(within)


def _rows(plan: Plan) -> int:
    return plan.microbatch_size * plan.num_microbatches * plan.degrees.data


def _recomputes(plan: Plan) -> bool:
    return any(stage.recompute for stage in plan.stages)


def _torchtitan(within: Within) -> str:
    """Fields of its ParallelismConfig, and what else there is to set."""
    plan, degrees = within.plan, within.plan.degrees
    sharded = degrees.sharding == "fsdp"
    fields: dict[str, object] = {
        "data_parallel_shard_degree": degrees.data if sharded else 1,
        "data_parallel_replicate_degree": 1 if sharded else degrees.data,
        "tensor_parallel_degree": degrees.tensor,
        "context_parallel_degree": degrees.context,
        "expert_parallel_degree": degrees.expert,
        "pipeline_parallel_degree": degrees.pipeline,
    }
    if degrees.pipeline > 1:
        fields |= {
            **_torchtitan_schedule(within),
            "pipeline_parallel_module_fqns_per_model_part": _modules(within),
            "num_pp_microbatches": plan.num_microbatches,
        }
    lines = [f"    {name}={json.dumps(value)}," for name, value in fields.items()]
    if "pipeline_parallel_schedule_csv" in fields:
        lines.append(
            f"    # {_TORCHTITAN_FILE}: evenflow export PLAN.toml --to {TORCH} -o {_TORCHTITAN_FILE}"
        )
    return "\n".join(
        [
            "parallelism=ParallelismConfig(",
            *lines,
            ")",
            f"# training.local_batch_size = {plan.microbatch_size * plan.num_microbatches}",
            f'# activation_checkpoint.mode = "{"full" if _recomputes(plan) else "none"}"',
        ]
    )


def _torchtitan_schedule(within: Within) -> dict[str, str]:
    """Its name of the schedule, or the file and what puts the stages where that has them."""
    if within.schedule is not None:
        return {"pipeline_parallel_schedule": within.schedule}
    style = torch_style(planned_schedule(within.plan).placement)
    assert style is not None, "checked"
    return {
        "pipeline_parallel_schedule": _STYLES[style],
        "pipeline_parallel_schedule_csv": _TORCHTITAN_FILE,
    }


def _modules(within: Within) -> list[list[str]]:
    """The modules of each stage, under the names of torchtitan's own language models.

    It leaves out what is named and not there, without a word (`_split_module`).
    """
    stages: list[list[str]] = []
    block = 0
    for count in within.blocks:
        stages.append([f"layers.{number}" for number in range(block, block + count)])
        block += count
    if within.layers.begins[0]:
        stages[0].insert(0, "tok_embeddings")
    stages[-1] += ["norm", "lm_head"]
    return stages


def _megatron(within: Within) -> str:
    """Flags of its training scripts."""
    plan, degrees = within.plan, within.plan.degrees
    flags = [f"--pipeline-model-parallel-size {degrees.pipeline}"]
    if degrees.pipeline > 1:
        stages = ["t" * count for count in within.blocks]
        stages[0], stages[-1] = f"E{stages[0]}", f"{stages[-1]}L"
        flags.append(f'--pipeline-model-parallel-layout "{format_layout(stages)}"')
    flags.append(f"--tensor-model-parallel-size {degrees.tensor}")
    if degrees.tensor > 1:
        flags.append("--sequence-parallel")
    flags.append(f"--context-parallel-size {degrees.context}")
    if degrees.expert > 1:
        flags.append(f"--expert-model-parallel-size {degrees.expert}")
    match degrees.sharding:
        case "zero1":
            flags.append("--use-distributed-optimizer")
        case "fsdp":
            flags.append("--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads_params")
        case "none":
            pass
    flags.append(f"--micro-batch-size {plan.microbatch_size} --global-batch-size {_rows(plan)}")
    if _recomputes(plan):
        flags.append("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1")
    return "\n".join(flags)


def _deepspeed(within: Within) -> str:
    """Arguments of its PipelineModule, and its JSON."""
    plan, degrees = within.plan, within.plan.degrees
    stage = {"none": 0, "zero1": 1, "fsdp": 3}[degrees.sharding]
    config = {
        "train_batch_size": _rows(plan),
        "train_micro_batch_size_per_gpu": plan.microbatch_size,
        "gradient_accumulation_steps": plan.num_microbatches,
        "zero_optimization": {"stage": stage},
    }
    text = json.dumps(config, indent=2)
    if degrees.pipeline == 1:
        return text
    interval = 1 if _recomputes(plan) else 0
    layers = within.layers
    listed = ["*blocks", "head"] if not layers.begins[0] else ["embedding", "*blocks", "head"]
    parts = [0, *within.positions, layers.end + 1]
    spread = ", ".join(str(end - start) for start, end in itertools.pairwise(parts))
    way = "type:BLOCK" if within.way_to_cut == "type:" else within.way_to_cut
    module = (
        f"PipelineModule(layers=[{', '.join(listed)}], num_stages={degrees.pipeline}, "
        f'partition_method="{way}", activation_checkpoint_interval={interval})'
    )
    named = "\n# BLOCK: the class of the blocks" if way == "type:BLOCK" else ""
    return f"{module}{named}\n# parts: {parts}, so {spread} layers on the stages\n{text}"
