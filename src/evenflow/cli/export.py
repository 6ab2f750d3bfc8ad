"""`evenflow export`: a saved plan, or a schedule file, in another system's words. Nothing is planned anew."""

from pathlib import Path

from rich.console import Console

from evenflow.cli.printing import print_line
from evenflow.cli.writing import check_new, write
from evenflow.errors import ConfigError
from evenflow.plan.plan import Plan
from evenflow.plan.plan_file import read_plan_file
from evenflow.plan.systems.target_settings import TORCH, export_plan
from evenflow.schedule_file import read_schedule_file
from evenflow.torch_schedule import format_torch_schedule
from evenflow.view.units import format_count


def export(source: Path, to: str, out: Path | None) -> None:
    """Print a plan or a schedule as another system takes it, or write it to `out`, a new file.

    Raises `ConfigError` for files that cannot be read or written, and for what the system cannot run.
    """
    console = Console()
    check_new("--out", out)
    plan = None
    if source.suffix == ".toml":
        plan = read_plan_file(source)
        text = export_plan(plan, to)
    elif to == TORCH:
        text = format_torch_schedule(read_schedule_file(source))
    else:
        raise ConfigError(
            f"{source} is read as a schedule, which says nothing of a model's layers: export a plan (.toml) "
            f"to {to}, or the schedule to {TORCH}"
        )
    if out is None:
        console.out(text, end="", highlight=False)
        return
    write(console, out, text)
    if plan is not None and to == TORCH:
        _tell_stages(console, plan)


def _tell_stages(console: Console, plan: Plan) -> None:
    """Say what torch's file does not: where the model is cut."""
    microbatches = format_count(plan.num_microbatches, "microbatch", "es")
    print_line(console, f"{microbatches} of {plan.microbatch_size}")
    for number, stage in enumerate(plan.stages):
        print_line(console, f"stage {number} on rank {stage.rank} begins with {stage.first}")
