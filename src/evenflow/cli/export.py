"""`evenflow export`: a saved plan, or a schedule file, in another system's words. Nothing is planned anew."""

from pathlib import Path

from rich.console import Console

from evenflow.cli.writing import check_new, refusing_to_write
from evenflow.errors import ConfigError
from evenflow.plan.plan import Plan
from evenflow.plan.plan_file import read_plan_file
from evenflow.plan.target_settings import TORCH, export_plan
from evenflow.schedule_file import read_schedule_file
from evenflow.torch_schedule import format_torch_schedule


def export(source: Path, to: str, out: Path | None, console: Console | None = None) -> None:
    """Print a plan or a schedule as another system takes it, or write it to `out`, a new file.

    Raises `ConfigError` for files that cannot be read or written, and for what the system cannot run.
    """
    console = console or Console()
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
    with refusing_to_write(out):
        out.write_text(text, encoding="utf-8")
    console.print(f"wrote {out}", soft_wrap=True, highlight=False, markup=False)
    if plan is not None and to == TORCH:
        _tell_stages(console, plan)


def _tell_stages(console: Console, plan: Plan) -> None:
    """Say what torch's file does not: where the model is cut."""
    num_microbatches, rows = plan.num_microbatches, plan.microbatch_size
    console.print(
        f"{num_microbatches} microbatch{'es' if num_microbatches > 1 else ''} of {rows}", highlight=False
    )
    for number, stage in enumerate(plan.stages):
        line = f"stage {number} on rank {stage.rank} begins with {stage.first}"
        console.print(line, soft_wrap=True, highlight=False, markup=False)
