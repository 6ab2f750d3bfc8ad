"""`evenflow check`: one step split against one step of the whole model, in this process and on the CPU."""

import traceback

from rich.console import Console

from evenflow.cli.report import print_check, print_cut
from evenflow.cli.train import Flags, make_job
from evenflow.cli.training import prepare_here
from evenflow.errors import ConfigError, EvenflowError


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
            print_cut(console, pipe.cut)
            report = pipe.check(feed.validation[0], progress=status.update)
        except EvenflowError:
            raise
        except Exception as error:
            refusal = ConfigError(f"the step cannot be run: {type(error).__name__}: {error}")
            refusal.add_note("".join(traceback.format_exception(error)).rstrip())
            raise refusal from error
        finally:
            pipe.close()
    print_check(console, report)
    return report.equal
