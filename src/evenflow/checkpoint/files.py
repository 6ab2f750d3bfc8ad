"""A folder of safetensors files, sharded or not: its keys, and one tensor at a time."""

import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from evenflow.errors import ConfigError
from evenflow.foreign import is_file_name, parse_json, read_text, shown

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MOST_ELEMENTS = 2**48
_TRAINED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class TensorFiles:
    """Where each key of a folder lies, its shape, and its type where models are trained in that.

    `no_floats` are those whose numbers are no floating-point ones: flags, counts, or the codes of weights.

    Made by `open_folder`, which reads headers alone.
    """

    folder: Path
    shapes: Mapping[str, torch.Size]
    dtypes: Mapping[str, torch.dtype]
    file_of: Mapping[str, Path]
    no_floats: frozenset[str]


class Reader:
    """Reads single tensors of a `TensorFiles`, once entered; each file is opened when it is first needed."""

    def __init__(self, files: TensorFiles) -> None:
        self._files = files
        self._open: dict[Path, Any] = {}  # safetensors' handles have no type
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.clear()
        self._stack.close()

    def read(self, key: str, dtype: torch.dtype) -> torch.Tensor:
        """One tensor, in memory of its own."""
        path = self._files.file_of[key]
        if path not in self._open:
            self._open[path] = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        # A copy, because what safetensors returns may be the file, mapped into memory.
        tensor: torch.Tensor = self._open[path].get_tensor(key).to(dtype, copy=True)
        return tensor


def open_folder(folder: Path, *, names: tuple[str, str] = (WEIGHTS, INDEX)) -> TensorFiles:
    """Look into every file of a folder, without reading a tensor.

    `names` are those of the weights in one file, and of the index of several. A folder that has neither may
    hold files of any name.

    Raises:
        ConfigError: There is no such folder, it holds no safetensors, or a file is missing or damaged, or
            its index names a file that is not in the folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"load={str(folder)!r}: there is no such folder")
    shapes: dict[str, torch.Size] = {}
    dtypes: dict[str, torch.dtype] = {}
    file_of: dict[str, Path] = {}
    no_floats: set[str] = set()
    for path in files_of(folder, *names):
        try:
            with safe_open(path, framework="pt", device="cpu") as handle:
                for key in handle.keys():  # noqa: SIM118 (a handle is no mapping)
                    if key in file_of:
                        raise ConfigError(
                            f"load={str(folder)!r}: {file_of[key].name} and {path.name} both hold {key}"
                        )
                    header = handle.get_slice(key)
                    shapes[key] = _shape(header.get_shape())
                    if not header.get_dtype().startswith(("F", "BF")):
                        no_floats.add(key)
                    if header.get_dtype() in _TRAINED:
                        dtypes[key] = _TRAINED[header.get_dtype()]
                    file_of[key] = path
            _refuse_doubled(path)
        except (OSError, ValueError, SafetensorError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"load={str(folder)!r}: {path.name} cannot be read: {error}") from error
    return TensorFiles(folder, shapes, dtypes, file_of, frozenset(no_floats))


def _refuse_doubled(path: Path) -> None:
    """Refuse a header that names a key twice, of which safetensors takes one; others may take the other."""

    def once(pairs: list[tuple[str, object]]) -> None:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            doubled = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"its header names {shown(doubled)} twice")

    with path.open("rb") as file:  # of a file that safetensors has read
        json.loads(file.read(int.from_bytes(file.read(8), "little")), object_pairs_hook=once)


def _shape(lengths: list[int]) -> torch.Size:
    """A header's shape; `ValueError` for one that has more elements than can be counted.

    The file's own size bounds what a shape holds, unless one of its lengths is 0.
    """
    if math.prod(length or 1 for length in lengths) > _MOST_ELEMENTS:
        raise ValueError(f"a tensor of shape {shown(lengths)} has more elements than can be counted")
    return torch.Size(lengths)


def read_json(path: Path) -> dict[str, Any]:
    """The content of one of a folder's configurations; raises `ConfigError` for what is none."""
    try:
        content = parse_json(read_text(path, "configuration"))
    except ConfigError as error:
        raise ConfigError(f"load={str(path.parent)!r}: {path.name}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"load={str(path.parent)!r}: {path.name} holds no configuration: {shown(content)}")
    return content


def files_of(folder: Path, weights: str, index: str) -> list[Path]:
    """The files of a folder's weights: those that its index names, or the one called `weights`, or any.

    Raises `ConfigError` for an index that is none, or that names what is not in the folder, and where no file
    is a safetensors one.
    """
    if (folder / index).is_file():
        held = read_json(folder / index).get("weight_map")
        if not isinstance(held, dict):
            raise ConfigError(
                f"load={str(folder)!r}: {index} is no index of safetensors: it has no weight_map"
            )
        for name in held.values():
            # A path could lead out of the folder. (A file in it may be a link, as in the cache of the Hub.)
            if not is_file_name(name):
                raise ConfigError(
                    f"load={str(folder)!r}: {index} names {shown(name)}, which is no file in the folder"
                )
        return [folder / name for name in sorted(set(held.values()))]
    if (folder / weights).is_file():
        return [folder / weights]
    found = sorted(folder.glob("*.safetensors"))
    if found:
        return found
    other = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth") for path in folder.glob(kind))
    hint = f" ({', '.join(other)}: save them with save_pretrained, which writes safetensors)" if other else ""
    raise ConfigError(f"load={str(folder)!r}: the folder holds no *.safetensors{hint}")
