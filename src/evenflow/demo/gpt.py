"""A small GPT of plain modules that reads text as bytes: nothing here knows of Evenflow.

`build` has the form that every `evenflow` command takes as MODULE:FUNCTION: it returns the model, the
function that computes the loss of one microbatch, and an example batch.

    evenflow train evenflow.demo.gpt:build        # learns its example batch by heart
    evenflow train --demo                         # learns real text
    evenflow train examples/train_gpt.toml        # the same for longer, with a larger one
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class GPTConfig:
    """The sizes of a GPT: `width` numbers per position, `num_heads` attention heads in each layer."""

    vocabulary_size: int = 256
    max_length: int = 128
    num_layers: int = 4
    width: int = 192
    num_heads: int = 6
    dropout: float = 0.0


class GPTOutput(NamedTuple):
    """What a GPT predicts, and how wrong that is where there are labels."""

    logits: Tensor  # (batch, length, vocabulary)
    loss: Tensor | None  # mean over the predicted positions, in nats


class Attention(nn.Module):
    """Every position looks at itself and at the positions before it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.query_key_value = nn.Linear(config.width, 3 * config.width)
        self.output = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.query_key_value(x).view(batch, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        projected: Tensor = self.output(mixed.transpose(1, 2).reshape(batch, length, width))
        return projected


class Block(nn.Module):
    """One layer: attention, then a two-layer perceptron, each added to what came in."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width), nn.GELU(), nn.Linear(4 * config.width, config.width)
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        mixed: Tensor = x + self.dropout(self.mlp(self.norm2(x)))
        return mixed


class GPT(nn.Module):
    """A decoder-only transformer with learned positions and an output layer of its own."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary_size, config.width)
        self.positions = nn.Embedding(config.max_length, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary_size, bias=False)
        self.apply(self._initialise)
        # Nearly equal logits: the first loss is that of a guess, log(vocabulary_size).
        nn.init.normal_(self.head.weight, std=0.02)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.8 * module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.3)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> GPTOutput:
        """Predict each label from the inputs before it.

        `input_ids` and `labels` are (batch, length) integers, and the same ones: label t + 1 is compared
        with what was predicted at t (the convention of Hugging Face).
        """
        length = input_ids.shape[1]
        if length > self.config.max_length:
            raise ValueError(f"{length} positions, but this GPT has max_length={self.config.max_length}")
        x = self.tokens(input_ids) + self.positions(torch.arange(length, device=input_ids.device))
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x))
        if labels is None:
            return GPTOutput(logits, None)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return GPTOutput(logits, loss)


Loss = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


def loss(model: nn.Module, microbatch: Mapping[str, Tensor]) -> Tensor:
    """The mean loss of one microbatch, in nats per token."""
    output: GPTOutput = model(**microbatch)
    assert output.loss is not None, "labels were given"
    return output.loss


def build(
    *, batch_size: int = 16, length: int = 128, num_layers: int = 4, width: int = 192, dropout: float = 0.0
) -> tuple[nn.Module, Loss, dict[str, Tensor]]:
    """The model, its loss function and an example batch of random bytes."""
    config = GPTConfig(
        max_length=length, num_layers=num_layers, width=width, num_heads=max(1, width // 32), dropout=dropout
    )
    tokens = torch.randint(config.vocabulary_size, (batch_size, length))
    return GPT(config), loss, {"input_ids": tokens, "labels": tokens}
