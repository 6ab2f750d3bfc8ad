"""Where a command's model comes from: a function that the user names, or a Hugging Face folder.

Every command that needs a model takes a function that returns three things: the model, the function that
computes the loss of one microbatch, and an example batch. A folder is made into the same three.
"""

import contextlib
import difflib
import functools
import importlib
import importlib.util
import os
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from evenflow.checkpoint.adapters import is_adapter_folder
from evenflow.checkpoint.files import files_of, open_folder
from evenflow.cli.config import FolderModel, FunctionModel, ModelChoice
from evenflow.cli.text import Tokenize, bytes_as_tokens
from evenflow.cluster.sizes import told_bytes
from evenflow.errors import ConfigError, EvenflowError, MissingPackageError
from evenflow.foreign import shown

# A loss function is the user's: it takes the model and a microbatch, any tree, and returns a loss or
# (loss, metrics). `Any`, because the shape of neither is ours to say.
LossFunction = Callable[[Any, Any], Any]


@dataclass(frozen=True, slots=True, eq=False)  # a model has no equality
class ModelSource:
    """A model ready to be cut, its loss function, an example batch and how text becomes its tokens."""

    model: nn.Module
    loss: LossFunction
    example: Any  # the user's batch: any tree of tensors and plain values
    tokenize: Tokenize


def find_function(reference: str) -> Callable[..., object]:
    """The function that `MODULE:FUNCTION` or `FILE.py:FUNCTION` names; its module is imported.

    Raises:
        ConfigError: The reference has another form, or there is no such file, module or function (the
            nearest names are suggested), or the import fails.

    Example:
        >>> find_function("math:sqrt")(9.0)
        3.0
    """
    place, _, name = reference.rpartition(":")
    if not place or not name:
        raise ConfigError(
            f"{reference!r} names no model: give a CONFIG.toml, MODULE:FUNCTION or FILE.py:FUNCTION"
        )
    module = _load_file(Path(place)) if place.endswith(".py") else _import_module(place)
    function = getattr(module, name, None)
    if callable(function):
        return function  # type: ignore[no-any-return]  # mypy sees getattr's Any
    if function is not None:
        raise ConfigError(f"{reference}: {name} is a {type(function).__name__}, not a function")
    candidates = [
        each for each, value in vars(module).items() if callable(value) and not each.startswith("_")
    ]
    nearest = difflib.get_close_matches(name, candidates, n=3)
    hint = f"; did you mean {', '.join(nearest)}?" if nearest else ""
    raise ConfigError(f"{place} has no function {name!r}{hint}")


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"there is no file {path} to take a model from")
    path = path.resolve()
    # As with `python FILE.py`, what lies beside the file can be imported by it.
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    # A name of its own, so that a file called random.py does not take the place of another module.
    name = f"_evenflow_source_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, "the path ends in .py"
    assert spec.loader is not None, "the path ends in .py"
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by its name while they are defined.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"importing {path} failed: {type(error).__name__}: {error}") from error
    return module


def _import_module(name: str) -> ModuleType:
    # As with `python -m`, modules of the current folder can be named.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ConfigError(
                f"there is no module {error.name!r}; to name a file, write its path: FILE.py:FUNCTION"
            ) from error
        raise ConfigError(f"importing {name} failed: {error}") from error
    except Exception as error:
        raise ConfigError(f"importing {name} failed: {type(error).__name__}: {error}") from error


def build(choice: ModelChoice, *, seed: int, loads: bool = True) -> ModelSource:
    """Build the model: the same weights on every rank that passes the same `seed`.

    Without `loads`, weights that lie in a folder are not read: the model is one of fresh numbers.

    Raises:
        ConfigError: The model cannot be found, or its function did not return the three things.

    Example:
        >>> build(FunctionModel("examples/gpt.py:build"), seed=0).example["labels"].shape  # doctest: +SKIP
        torch.Size([16, 128])
    """
    torch.manual_seed(seed)
    match choice:
        case FunctionModel(reference=reference, arguments=arguments):
            return _build_from_function(reference, arguments)
        case FolderModel(folder=folder):
            return _build_from_folder(folder, loads=loads)


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn an exception of the user's code into a `ConfigError` that says `what` and has its traceback."""
    try:
        yield
    except EvenflowError:
        raise
    except Exception as error:
        refusal = ConfigError(f"{what}: {type(error).__name__}: {error}")
        refusal.add_note("".join(traceback.format_exception(error)).rstrip())
        raise refusal from error


def _build_from_function(reference: str, arguments: Mapping[str, object]) -> ModelSource:
    function = find_function(reference)
    try:
        built = function(**arguments)
    except TypeError as error:
        # Only a wrong call is the configuration's fault; a TypeError from inside is the function's own.
        if error.__traceback__ is not None and error.__traceback__.tb_next is None:
            raise ConfigError(f"{reference} cannot be called with {dict(arguments)}: {error}") from error
        raise
    match built:
        case (nn.Module() as model, loss, example) if callable(loss):
            return ModelSource(model=model, loss=loss, example=example, tokenize=bytes_as_tokens)
        case tuple():
            found = "(" + ", ".join(type(each).__name__ for each in built) + ")"
        case _:
            found = type(built).__name__
    raise ConfigError(
        f"{reference} returned {found}: it must return (model, loss function, example batch), where the "
        "model is a torch.nn.Module and the loss function is called as loss(model, microbatch)"
    )


_MOST_LAYERS = 10_000
# A folder is data: nothing is fetched, and no code of its own runs. Weights that are pickled (*.bin) are read
# by torch's reader of plain tensors.
_AS_DATA = {"local_files_only": True, "trust_remote_code": False}

# --- Hugging Face ------------------------------------------------------------------------------------


def _import_transformers() -> ModuleType:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise MissingPackageError(
            "a Hugging Face folder needs the package transformers: pip install 'evenflow[hf]'"
        ) from error


def _build_from_folder(folder: Path, *, loads: bool) -> ModelSource:
    """The folder's model: with its weights where it holds them, else with fresh ones."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} is no Hugging Face model folder: it holds no config.json")
    transformers = _import_transformers()
    has_weights = _has_weights(folder)
    with _loading("a causal language model", folder):
        config = transformers.AutoConfig.from_pretrained(folder, **_AS_DATA)
        _refuse_huge(config, folder, held=loads)
        kind = transformers.AutoModelForCausalLM
        if has_weights and loads:
            model = kind.from_pretrained(
                folder, config=config, dtype=torch.float32, weights_only=True, **_AS_DATA
            )
        else:
            chosen = {"dtype": torch.float32} if has_weights else {}
            model = kind.from_config(config, trust_remote_code=False, **chosen)
    model.config.use_cache = False  # the cache serves generation; in training it is only memory

    @functools.cache
    def tokenizer() -> Any:  # transformers' classes are not typed
        with _loading("a tokenizer", folder):
            return transformers.AutoTokenizer.from_pretrained(folder, **_AS_DATA)

    def tokenize(text: bytes) -> Tensor:
        try:
            decoded = text.decode("utf-8")
        except UnicodeDecodeError:
            # The held-out boundary may fall inside a character; anything worse is not text.
            decoded = text.decode("utf-8", errors="ignore")
            if len(decoded.encode()) < len(text) - 6:
                raise ConfigError(f"the text is not UTF-8, which the tokenizer of {folder} needs") from None
        return torch.tensor(tokenizer()(decoded, add_special_tokens=False, verbose=False)["input_ids"])

    example = {
        "input_ids": torch.zeros(1, 8, dtype=torch.int64),
        "labels": torch.zeros(1, 8, dtype=torch.int64),
    }
    return ModelSource(model=model, loss=_own_loss, example=example, tokenize=tokenize)


def _has_weights(folder: Path) -> bool:
    """Whether a folder holds weights; raises `ConfigError` for those that are broken, or lie elsewhere."""
    if is_adapter_folder(folder):  # transformers would load the model that it names, wherever that lies
        raise ConfigError(f"{folder} holds an adapter to another model: name the folder of a whole model")
    if any(folder.glob("*.safetensors")):
        open_folder(folder)
        return True
    if not any(folder.glob("pytorch_model*.bin")):
        return False
    files_of(folder, "pytorch_model.bin", "pytorch_model.bin.index.json")
    return True


# config: transformers' classes are not typed.
def _refuse_huge(config: Any, folder: Path, *, held: bool) -> None:
    """Refuse a configuration of more layers than can be built, and, if it is to be `held`, of more numbers.

    The numbers are counted on the device "meta", before any is made.
    """
    layers = max((value for name, value in _whole_numbers(config.to_dict()) if "layers" in name), default=0)
    if layers > _MOST_LAYERS:
        raise ConfigError(
            f"{folder} asks for a model of {shown(layers)} layers; at most {_MOST_LAYERS} are built"
        )
    if not held:
        return
    with torch.random.fork_rng(devices=()), torch.device("meta"):
        empty = _import_transformers().AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    num_bytes = 4.0 * sum(each.numel() for each in empty.parameters())
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if num_bytes > there:
        raise ConfigError(
            f"{folder} asks for a model of {told_bytes(num_bytes)} in float32, and this machine has "
            f"{told_bytes(there)} of memory"
        )


def _whole_numbers(table: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """All of a configuration's whole numbers by name, those of parts included."""
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _whole_numbers(value)
        elif isinstance(value, int):
            yield str(name), value


@contextlib.contextmanager
def _loading(what: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"cannot load {what} from {folder}: its pickled weights (*.bin) hold more than tensors, which is "
            "never run; save them with save_pretrained, which writes safetensors"
        ) from error
    except Exception as error:  # what transformers makes of a broken file has every type there is
        raise ConfigError(f"cannot load {what} from {folder}: {type(error).__name__}: {error}") from error


def _own_loss(model: Any, microbatch: Mapping[str, Tensor]) -> Any:  # Hugging Face's classes are not typed
    return model(**microbatch).loss
