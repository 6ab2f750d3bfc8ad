"""Text as batches of tokens: read, tokenised, one part held out, the rest in random windows.

Without a tokenizer a token is a byte. Which windows a run sees depends on its seed alone.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from evenflow.errors import ConfigError

Batch = dict[str, Tensor]
Tokenize = Callable[[bytes], Tensor]

# More windows than this make the validation loss no more certain in the three digits that are printed.
_MAX_HELD_OUT_WINDOWS = 256


@dataclass(frozen=True, slots=True, eq=False)  # tensors have no single truth value to compare by
class Corpus:
    """Tokens to train on and tokens held out, each (number of tokens,) int64.

    `bytes_per_token` is that of the held-out text: a loss in nats per token, divided by it, is in nats per
    byte, which can be compared between tokenizers.
    """

    training: Tensor
    held_out: Tensor
    bytes_per_token: float


def read_text(paths: Sequence[Path]) -> bytes:
    """The files' content, one after another; a folder stands for its files in order of name.

    Without paths: the English documentation that ships inside CPython (`pydoc_data.topics`).
    Hidden files, and files in hidden folders, are left out.

    Raises:
        ConfigError: A path is missing, cannot be read, holds no file, or everything together is empty.

    Example:
        >>> len(read_text([])) > 100_000
        True
    """
    if not paths:
        return _python_documentation()
    files = [file for path in paths for file in _files(path)]
    text = b"\n".join(_read(file) for file in files)
    if not text.strip():
        raise ConfigError(f"the data is empty: there is no text in {', '.join(map(str, paths))}")
    return text


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise ConfigError(f"data path {path} does not exist")
    if not path.is_dir():
        return [path]
    try:
        files = sorted(file for file in path.rglob("*") if file.is_file() and not _is_hidden(file, path))
    except OSError as error:
        raise ConfigError(f"cannot list the data folder {path}: {error.strerror}") from error
    if not files:
        raise ConfigError(f"data folder {path} holds no files")
    return files


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the data file {file}: {error.strerror}") from error


def _python_documentation() -> bytes:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise ConfigError(
            "this Python was installed without its documentation (the module pydoc_data), which is the "
            "default text: give a text of your own with --data FILE_OR_FOLDER"
        ) from error
    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


def bytes_as_tokens(text: bytes) -> Tensor:
    """One token, 0 to 255, for each byte: (number of bytes,) int64.

    Example:
        >>> bytes_as_tokens(b"ab").tolist()
        [97, 98]
    """
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).to(torch.int64)


def make_corpus(text: bytes, *, tokenize: Tokenize, held_out: float, length: int) -> Corpus:
    """Split `text` and tokenise it: its last `held_out` share (0 to 1) is kept for validation.

    Raises:
        ConfigError: A part is too short for one window of `length` tokens.

    Example:
        >>> corpus = make_corpus(b"to be or not to be", tokenize=bytes_as_tokens, held_out=0.5, length=4)
        >>> corpus.held_out.shape
        torch.Size([9])
    """
    boundary = len(text) - round(len(text) * held_out)
    corpus = Corpus(
        training=tokenize(text[:boundary]),
        held_out=(held_out_tokens := tokenize(text[boundary:])),
        bytes_per_token=(len(text) - boundary) / max(1, len(held_out_tokens)),
    )
    for part, tokens in (("the training part", corpus.training), ("the held-out part", corpus.held_out)):
        if len(tokens) < length:
            raise ConfigError(
                f"the text is too short: {part} of its {len(text)} bytes has {len(tokens)} tokens, and one "
                f"sequence takes {length}; give more text with --data, or a smaller data.length"
            )
    return corpus


def training_batches(
    corpus: Corpus, *, batch_size: int, length: int, seed: int, num_batches: int
) -> Iterator[Batch]:
    """Batches of random windows of the training part: `input_ids` and `labels`, (batch_size, length) int64.

    `labels` equals `input_ids`: the model compares position t with token t + 1, as Hugging Face's do.

    Example:
        >>> corpus = make_corpus(b"to be or not to be", tokenize=bytes_as_tokens, held_out=0.5, length=4)
        >>> batches = training_batches(corpus, batch_size=2, length=4, seed=0, num_batches=1)
        >>> [batch["labels"].shape for batch in batches]
        [torch.Size([2, 4])]
    """
    generator = torch.Generator().manual_seed(seed)
    last_start = len(corpus.training) - length
    for _ in range(num_batches):
        starts = torch.randint(last_start + 1, (batch_size,), generator=generator)
        yield _windows(corpus.training, starts, length)


def held_out_batches(corpus: Corpus, *, batch_size: int, length: int) -> list[Batch]:
    """The held-out part as full batches of windows, spread evenly over it and the same every time.

    Where the text runs out before a batch is full, windows overlap.

    Example:
        >>> corpus = make_corpus(b"to be or not to be", tokenize=bytes_as_tokens, held_out=0.5, length=4)
        >>> len(held_out_batches(corpus, batch_size=2, length=4))
        1
    """
    num_windows = min(len(corpus.held_out) // length, _MAX_HELD_OUT_WINDOWS)
    num_batches = max(1, num_windows // batch_size)
    last_start = len(corpus.held_out) - length
    starts = torch.linspace(0, last_start, num_batches * batch_size).round().to(torch.int64)
    return [_windows(corpus.held_out, some, length) for some in starts.view(num_batches, batch_size)]


def _windows(tokens: Tensor, starts: Tensor, length: int) -> Batch:
    windows = tokens[starts[:, None] + torch.arange(length)]
    return {"input_ids": windows, "labels": windows.clone()}
