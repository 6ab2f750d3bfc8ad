"""A run that saves while it trains: its folder, made before the first step, and its checkpoints in there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

import evenflow
from evenflow.cli.config import RunConfig, Saving
from evenflow.cli.config_text import write_config
from evenflow.errors import BadNumbersError, ConfigError
from evenflow.journal.folder import has_ended, read_run, write_text

CHECKPOINTS, CONFIG = "checkpoints", "config.toml"


def check_kept(folder: Path, num_steps: int) -> None:
    """Refuse to go on with a run that has ended."""
    if has_ended(folder) and read_run(folder).num_steps >= num_steps:
        raise ConfigError(
            f"--resume {folder}: the run in it has ended, after {num_steps} steps; ask for more with --steps"
        )


def check_left(folder: Path, num_made: int, num_steps: int) -> None:
    """Refuse to go on with a run that has no steps left to make."""
    if num_made >= num_steps:
        raise ConfigError(
            f"--resume {folder}: {num_made} steps are made, and {num_steps} are asked for; ask for more with "
            "--steps"
        )


class Keeping:
    """Saves a run every so many steps, and goes on with one. Every rank has one."""

    def __init__(self, pipe: "evenflow.Pipeline", folder: Path, config: RunConfig) -> None:
        said: Saving = config.checkpoints
        assert said.every is not None, "checked before the ranks start"
        self._checkpoints = evenflow.Checkpoints(
            pipe, folder / CHECKPOINTS, every=said.every, keep_last=said.keep_last, on_error=said.on_error
        )
        if pipe.is_main and not (folder / CONFIG).exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / CONFIG, write_config(config))

    def resume(self, console: Console) -> Any:  # what was given to `updated`
        """Go on with the newest checkpoint; returns what came with it, None where there is none."""
        found = self._checkpoints.resume()
        if found is None:
            return None
        console.print(f"going on from {found}", soft_wrap=True, highlight=False)
        return self._checkpoints.extra

    def updated(self, extra: Callable[[], Any]) -> None:
        """A step is done; `extra` is asked, if it is time, for what is saved beside the pipeline."""
        self._checkpoints.updated(extra)

    def roll_back(self, error: BadNumbersError) -> str:
        """Go on from the last checkpoint after a step with bad numbers; what to tell of it."""
        return f"going back to {self._checkpoints.roll_back(error)}: {error}"

    def close(self) -> None:
        """Wait for the last one, and hear how it went."""
        self._checkpoints.close()
