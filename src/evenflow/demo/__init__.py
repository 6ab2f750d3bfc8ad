"""What `evenflow train --demo` trains: a small GPT, and its run's configuration, part of every install."""

from pathlib import Path

CONFIG = Path(__file__).parent / "demo.toml"
