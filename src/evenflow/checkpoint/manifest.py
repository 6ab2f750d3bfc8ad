"""The manifest of a checkpoint: what was saved, by what, when and where from, and what its files must be.

It is written last, so that a folder with a manifest is whole. Its own checksum stands in it.
"""

import json
import re
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evenflow.checkpoint.whole import flush
from evenflow.errors import ConfigError
from evenflow.foreign import is_file_name, parse_json, read_text, shown
from evenflow.plain_data import read_as

FILE, STATE, TABLE, PLAN = "manifest.json", "state.json", "tensors.json", "plan.toml"
VERSION = 1
_MOST_BYTES = 2**31


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file: its size, and the CRC-32 of its first `checked_bytes`.

    Of a file of tensors those are its header: tensors have checksums of their own, in the table.
    """

    name: str
    num_bytes: int
    checked_bytes: int
    checksum: int

    @staticmethod
    def of(path: Path, checked_bytes: int | None = None) -> "FileRecord":
        """That of a file that is there."""
        size = path.stat().st_size
        checked = size if checked_bytes is None else checked_bytes
        with path.open("rb") as file:
            return FileRecord(path.name, size, checked, zlib.crc32(file.read(checked)))

    def problem(self, folder: Path) -> str | None:
        """What is wrong with the file of this record, if anything."""
        path = folder / self.name
        try:
            if not path.is_file():
                return f"{self.name} is missing"
            size = path.stat().st_size
            if size != self.num_bytes:
                return f"{self.name} has {size} bytes, and was written with {self.num_bytes}"
            if FileRecord.of(path, self.checked_bytes) != self:
                return f"{self.name} is damaged: its checksum is another"
        except OSError as error:
            return f"{self.name} cannot be read: {error.strerror}"
        return None


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint is. `model` is the model's class, `layout` says in words how the run was cut."""

    evenflow: str
    torch: str
    saved_at: str
    step: int
    num_updates: int
    model: str
    layout: str
    files: tuple[FileRecord, ...]

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(file.num_bytes for file in self.files)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write it beside the files of which it tells."""
    content = {"version": VERSION, **asdict(manifest)}
    text = json.dumps({"checksum": _checksum(content), **content}, indent=2, allow_nan=False)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")
    flush(folder / FILE)


def read_manifest(folder: Path) -> Manifest:
    """Read it and check it; raises `ConfigError` that names the folder and what is wrong."""
    if not (folder / FILE).is_file():
        raise ConfigError(f"{folder} is no checkpoint: it has no {FILE}{_near(folder)}")
    content = read_json(folder / FILE)
    if not isinstance(content, dict):
        raise ConfigError(f"{folder / FILE} is no manifest: it must be an object of JSON")
    said, version = content.pop("checksum", None), content.get("version")
    if version != VERSION:
        raise ConfigError(
            f"{folder / FILE} is of version {shown(version)}, and this Evenflow reads version {VERSION}: "
            "read it with the Evenflow that wrote it"
        )
    if said != _checksum(content):
        raise ConfigError(f"{folder / FILE} is damaged: its checksum is another")
    del content["version"]
    try:
        manifest = read_as(Manifest, content, lambda _kind, _place: 0)
    except ConfigError as error:
        raise ConfigError(f"{folder / FILE}: {error}") from error
    for file in manifest.files:
        if not is_file_name(file.name):
            raise ConfigError(f"{folder / FILE} names {shown(file.name)}, which is no file of this folder")
    return manifest


def read_json(path: Path) -> Any:  # whatever the file holds
    """What a JSON file of a checkpoint holds; raises `ConfigError` that names it."""
    text = read_text(path, "file of a checkpoint", most_bytes=_MOST_BYTES)
    try:
        return parse_json(text)
    except ConfigError as error:
        raise ConfigError(f"{path} is damaged: {error}") from error


def checkpoints_in(folder: Path) -> list[Path]:
    """The whole checkpoints of a folder, by the first number in their names, the highest last."""
    found: Iterable[Path] = folder.iterdir() if folder.is_dir() else ()
    return sorted(filter(is_checkpoint, found), key=_order)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint that was written to its end."""
    return (folder / FILE).is_file() and not is_unfinished(folder)


def is_unfinished(folder: Path) -> bool:
    """Whether a folder bears a name under which it is being written, or put away."""
    return folder.suffix in (".partial", ".replaced")


def _order(folder: Path) -> tuple[int, str]:
    number = re.search(r"[0-9]+", folder.name)
    return int(number[0]) if number else -1, folder.name


def _near(folder: Path) -> str:
    found = [each.name for each in checkpoints_in(folder)]
    return f"; name one of those in it: {', '.join(found[-5:])}" if found else ""


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True, allow_nan=False).encode())
