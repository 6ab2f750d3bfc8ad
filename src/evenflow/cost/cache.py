"""Measurements kept on disk, one small JSON file for each: nobody measures the same thing twice."""

import dataclasses
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from evenflow.cost.measured import Measured
from evenflow.errors import ConfigError
from evenflow.foreign import parse_json, read_text
from evenflow.plain_data import read_as

_VERSION = 3  # of how things are measured: raised where old numbers mean something else


def user_folder() -> Path:
    """Where measurements are kept: EVENFLOW_CACHE, or a folder in the user's own cache."""
    own = os.environ.get("EVENFLOW_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(shared) / "evenflow"


@dataclass(frozen=True, slots=True)
class Place:
    """Where something was measured: what makes its numbers hold elsewhere too."""

    device: str
    torch_version: str
    num_threads: int

    @staticmethod
    def of(device: torch.device) -> "Place":
        """This process, computing on `device`.

        >>> Place.of(torch.device("cpu")).torch_version == torch.__version__
        True
        """
        return Place(device_name(device), torch.__version__, torch.get_num_threads())


def device_name(device: torch.device) -> str:
    """What a device calls itself: a GPU's name, or the processor's.

    >>> device_name(torch.device("cpu")) != ""
    True
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "cpu")


class Cache:
    """A folder of measurements made at one place. A file that cannot be understood counts as none.

    >>> Cache(None, Place("cpu", "2", 1)).find("any") is None
    True
    """

    def __init__(self, folder: Path | None, place: Place) -> None:
        self._folder, self._place = folder, place

    @property
    def device(self) -> str:
        """The kind of device that the measurements are of."""
        return self._place.device

    def find(self, signature: str) -> Measured | None:
        """What was measured under this signature, if anything was."""
        path = self._path(signature)
        if path is None:
            return None
        try:
            found = parse_json(read_text(path, "measurement"))
            measured = found.get("measured") if isinstance(found, dict) else None
            return read_as(Measured, measured, lambda _kind, _place: 0)
        except ConfigError:
            return None

    def keep(self, signature: str, name: str, measured: Measured) -> None:
        """Write a measurement of the node of that name; does nothing where the folder cannot be written."""
        path = self._path(signature)
        if path is None:
            return
        text = json.dumps(
            {"node": name, **dataclasses.asdict(self._place), "measured": dataclasses.asdict(measured)},
            indent=1,
        )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
                file.write(text)
            os.replace(file.name, path)  # noqa: PTH105 (of a name, as the line above has it)
        except OSError:
            return

    def _path(self, signature: str) -> Path | None:
        if self._folder is None:
            return None
        what = repr((_VERSION, signature, dataclasses.astuple(self._place)))
        digest = hashlib.blake2b(what.encode(), digest_size=16).hexdigest()
        return self._folder / "costs" / f"{digest}.json"
