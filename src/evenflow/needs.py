"""PyTorch, and a system for it, where they are needed: schedules, saved plans and kept runs do without.

`pip install evenflow` brings no torch.
"""

import re
import sys

from evenflow.errors import ConfigError, MissingPackageError

OLDEST_TORCH = (2, 11)


def need_torch(what: str) -> None:
    """Import torch for `what`, which an error begins with.

    Raises:
        ConfigError: This is Windows.
        MissingPackageError: torch is not installed, or is older than `OLDEST_TORCH`.

    Example:
        >>> need_torch("evenflow train")
    """
    if sys.platform == "win32":
        raise ConfigError(
            f"{what} does not run on Windows, which lacks what its processes talk through (fcntl, Unix "
            "sockets): use Linux, for instance WSL"
        )
    oldest = ".".join(map(str, OLDEST_TORCH))
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":  # torch is there, and something that it needs is not
            raise
        reason = "which is not installed"
    else:
        # A build from source calls itself 2.11.0a0+git…: what counts are the first two numbers.
        found = re.match(r"(\d+)\.(\d+)", torch.__version__)
        if found is None or (int(found[1]), int(found[2])) >= OLDEST_TORCH:
            return
        reason = f"and {torch.__version__} is installed"
    raise MissingPackageError(
        f"{what} needs PyTorch {oldest} or newer, {reason}: pip install 'evenflow[torch]'"
    )
