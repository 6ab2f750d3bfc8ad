"""A run that saves while it trains: its folder, made before the first step, and its checkpoints in there."""

from pathlib import Path

import evenflow
from evenflow.cli.config import RunConfig
from evenflow.cli.config_text import write_config
from evenflow.errors import ConfigError
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


def make_checkpoints(pipe: "evenflow.Pipeline", folder: Path, config: RunConfig) -> evenflow.Checkpoints:
    """What saves a run and goes on with it, on every rank; its folder is there from now on."""
    said = config.checkpoints
    assert said.every is not None, "checked before the ranks start"
    if pipe.is_main and not (folder / CONFIG).exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / CONFIG, write_config(config))
    return evenflow.Checkpoints(
        pipe, folder / CHECKPOINTS, every=said.every, keep_last=said.keep_last, on_error=said.on_error
    )
