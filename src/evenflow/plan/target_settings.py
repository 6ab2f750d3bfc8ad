"""A plan in the words of the system that is to run it; `targets` has the sources."""

import json

from evenflow.plan.plan import Plan
from evenflow.plan.targets import Within


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
            "pipeline_parallel_schedule": within.target.schedules[plan.schedule][0],
            "pipeline_parallel_module_fqns_per_model_part": _modules(within),
            "num_pp_microbatches": plan.num_microbatches,
        }
    lines = [f"    {name}={json.dumps(value)}," for name, value in fields.items()]
    return "\n".join(
        [
            "parallelism=ParallelismConfig(",
            *lines,
            ")",
            f"# training.local_batch_size = {plan.microbatch_size * plan.num_microbatches}",
            f'# activation_checkpoint.mode = "{"full" if _recomputes(plan) else "none"}"',
        ]
    )


def _modules(within: Within) -> list[list[str]]:
    """The modules of each stage, under the names of torchtitan's own language models."""
    stages: list[list[str]] = []
    block = 0
    for count in within.blocks:
        stages.append([f"layers.{number}" for number in range(block, block + count)])
        block += count
    if within.layers.begins[0]:
        stages[0].insert(0, "tok_embeddings")
    stages[-1] += ["norm", "output"]
    return stages


def _megatron(within: Within) -> str:
    """Flags of its training scripts."""
    plan, degrees = within.plan, within.plan.degrees
    flags = [f"--pipeline-model-parallel-size {degrees.pipeline}"]
    if degrees.pipeline > 1:
        stages = ["t" * count for count in within.blocks]
        stages[0], stages[-1] = f"E{stages[0]}", f"{stages[-1]}L"
        flags.append(f'--pipeline-model-parallel-layout "{"|".join(map(_short, stages))}"')
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


def _short(stage: str) -> str:
    """A stage of a layout with its decoder layers counted.

    >>> _short("Ettt"), _short("t"), _short("L")
    ('Et*3', 't', 'L')
    """
    count = stage.count("t")
    return stage.replace("t" * count, f"t*{count}") if count > 1 else stage


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
    way = "type:BLOCK" if within.way_to_cut == "type:" else within.way_to_cut
    module = (
        f"PipelineModule(layers=[embedding, *blocks, head], num_stages={degrees.pipeline}, "
        f'partition_method="{way}", activation_checkpoint_interval={interval})'
    )
    named = "\n# BLOCK: the class of the blocks" if way == "type:BLOCK" else ""
    return f"{module}{named}\n{text}"
