"""A schedule as a file of torch's, for `_PipelineScheduleRuntime._load_csv(file, format="compute_only")`.

A row for each rank and a cell for each op, in the order in which they run, without a head and comments, which
torch does not know; the cells are those of `torch_cells`. torch places the transfers by itself, as we do. It
holds the stages to what `_validate_schedule` and the runtime's own code ask for
(`torch/distributed/pipelining/schedules.py` of torch 2.13), of which a schedule here may be free: see
`torch_faults`. Reading is `schedule_file.parse_schedule`, to which torch's files are schedules like others.
"""

from evenflow.errors import ConfigError
from evenflow.ir.costs import Costs
from evenflow.ir.flow import Flow
from evenflow.ir.op import Forward, parts
from evenflow.ir.schedule import Schedule
from evenflow.simulate import simulate
from evenflow.torch_cells import torch_cell


def format_torch_schedule(schedule: Schedule) -> str:
    """Return the text of torch's file of a schedule.

    Raises `ConfigError` for a schedule that torch's runtime cannot run, with every reason, and
    `ScheduleError` for one that nothing can: that is incomplete, or comes to a standstill.

    >>> from evenflow.schedules.catalog import get
    >>> print(format_torch_schedule(get("zb-h1")(2, 1, 2)), end="")
    0F0,0F1,0I0,0W0,0I1,0W1
    1F0,1I0,1F1,1I1,1W0,1W1
    """
    if faults := torch_faults(schedule):
        raise ConfigError(
            f"schedule {schedule.name!r} cannot be run by torch.distributed.pipelining: {'; '.join(faults)}"
        )
    return "".join(",".join(map(torch_cell, queue)) + "\n" for queue in schedule.ranks)


def torch_faults(schedule: Schedule) -> list[str]:
    """Return why torch's runtime cannot run a schedule; empty where it can.

    - It counts a backward of each microbatch of each stage; without them it has `eval`.
    - The number of stages is a multiple of the ranks' (`generate_stage_to_rank_mapping`).
    - The last stage's forwards run in the order of microbatches: losses are kept as they come, and looked up
      by the microbatch.
    - What it fuses is a forward and a backward.

    Raises `ScheduleError` for a schedule that nothing can run.

    >>> from evenflow.schedules.forward_only import forward_only
    >>> torch_faults(forward_only(2, 1, 4))
    ['it has no backward: torch evaluates without a schedule file, with `schedule.eval`']
    """
    num_stages, num_ranks = schedule.placement.num_stages, schedule.placement.num_ranks
    simulate(schedule, Flow.chain(num_stages), Costs.uniform(num_stages))
    faults = []
    if not schedule.trains:
        faults.append("it has no backward: torch evaluates without a schedule file, with `schedule.eval`")
    if num_stages % num_ranks:
        faults.append(
            f"{num_stages} stages are on {num_ranks} ranks: torch takes a multiple of the ranks' number"
        )
    heads = [
        part.microbatch
        for op in schedule.ranks[schedule.placement.rank_of[-1]]
        for part in parts(op)
        if isinstance(part, Forward) and part.stage == num_stages - 1
    ]
    if heads != sorted(heads):
        early = next(at for at, microbatch in enumerate(heads) if at != microbatch)
        faults.append(
            "the last stage's forwards must run in the order of microbatches, by which torch finds their "
            f"losses, and {num_stages - 1}F{heads[early]} comes before {num_stages - 1}F{early}"
        )
    for queue in schedule.ranks:
        for op in queue:
            try:
                torch_cell(op)
            except ConfigError as error:
                return [*faults, str(error)]  # the first is enough: there may be thousands
    return faults
