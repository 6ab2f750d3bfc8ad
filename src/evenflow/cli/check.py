"""`evenflow check`: one step split against one step of the whole model, in this process and on the CPU."""

from rich.console import Console

from evenflow.cli.report import print_check, print_cut
from evenflow.cli.train import Flags, make_job
from evenflow.cli.training import prepare_here, refusing


def check(flags: Flags) -> bool:
    """Cut the model as `evenflow train` would, show the cut, compare, and return whether all is equal.

    The batch is the example that comes with the model, or the first of held-out text.

    Raises:
        EvenflowError: The model, the data or the cut cannot work as given, or the model's code fails.
    """
    job = make_job(flags)
    console = Console()
    with console.status("recording and cutting the model") as status:
        pipe, feed = prepare_here(job)
        try:
            with refusing("the step cannot be run"):
                print_cut(console, pipe.cut)
                report = pipe.check(feed.validation[0], progress=status.update)
        finally:
            pipe.close()
    print_check(console, report)
    return report.equal
