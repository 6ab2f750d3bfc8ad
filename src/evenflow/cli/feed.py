"""What a run trains on and validates with: text, or the example batch again and again."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from evenflow.cli.config import DataChoice, ExampleData, TextData, Training
from evenflow.cli.source import ModelSource
from evenflow.cli.text import held_out_batches, make_corpus, read_text, training_batches


@dataclass(frozen=True, slots=True)
class Units:
    """What this run counts and in what it measures: `tok` and `nats/byte` for text."""

    item: str
    num_items_per_batch: int
    loss: str


@dataclass(frozen=True, slots=True, eq=False)  # batches have no equality
class Feed:
    """The batches of a run; `loss_scale` turns the model's loss into the units of the validation loss."""

    batches: Iterable[Any]  # the user's batches: any tree
    validation: Sequence[Any]
    units: Units
    loss_scale: float


def make_feed(data: DataChoice, source: ModelSource, training: Training) -> Feed:
    """The batches that a run trains on and validates with.

    Raises:
        ConfigError: There is not enough text, or none.
    """
    match data:
        case ExampleData():
            num_rows = max(
                (leaf.shape[0] for leaf in pytree.tree_leaves(source.example) if _has_rows(leaf)), default=1
            )
            return Feed(
                batches=itertools.repeat(source.example, training.steps),
                validation=[source.example],
                units=Units(item="samples", num_items_per_batch=num_rows, loss="loss (on the same batch)"),
                loss_scale=1.0,
            )
        case TextData():
            corpus = make_corpus(
                read_text(data.paths), tokenize=source.tokenize, held_out=data.held_out, length=data.length
            )
            return Feed(
                batches=training_batches(
                    corpus,
                    batch_size=data.batch_size,
                    length=data.length,
                    seed=training.seed,
                    num_batches=training.steps,
                ),
                validation=held_out_batches(corpus, batch_size=data.batch_size, length=data.length),
                units=Units(item="tok", num_items_per_batch=data.batch_size * data.length, loss="nats/byte"),
                loss_scale=1 / corpus.bytes_per_token,
            )


def _has_rows(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.ndim > 0
