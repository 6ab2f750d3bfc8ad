"""Five models that the planner was not calibrated on, small enough for two CPU cores.

`build(name)` returns the model, the function that computes the loss of a microbatch, and a batch.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from gpt import GPT, GPTConfig

Built = tuple[nn.Module, Callable[[Any, Any], Any], dict[str, Tensor]]


def gpt() -> Built:
    """A GPT whose vocabulary of 16,384 makes the output layer as heavy as six of its eight blocks."""
    model = GPT(GPTConfig(vocabulary_size=16384, max_length=128, num_layers=8, width=256, num_heads=4))
    tokens = torch.randint(0, 16384, (16, 129))

    def loss(model: Any, batch: Any) -> Tensor:
        logits = model(batch["tokens"][:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1), batch["tokens"][:, 1:].flatten())

    return model, loss, {"tokens": tokens}


class _Twice(nn.Sequential):
    """Two convolutions with normalisation."""

    def __init__(self, given: int, made: int) -> None:
        super().__init__(
            nn.Conv2d(given, made, 3, padding=1),
            nn.GroupNorm(8, made),
            nn.SiLU(),
            nn.Conv2d(made, made, 3, padding=1),
            nn.GroupNorm(8, made),
            nn.SiLU(),
        )


class UNet(nn.Module):
    """Three levels; each level's output skips to the way up. Source: Ronneberger et al., "U-Net", 2015."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.down = nn.ModuleList([_Twice(3, width), _Twice(width, 2 * width)])
        self.middle = _Twice(2 * width, 4 * width)
        self.grow = nn.ModuleList(
            [nn.ConvTranspose2d(4 * width, 2 * width, 2, 2), nn.ConvTranspose2d(2 * width, width, 2, 2)]
        )
        self.up = nn.ModuleList([_Twice(4 * width, 2 * width), _Twice(2 * width, width)])
        self.head = nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level in self.down:
            x = level(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for grow, level in zip(self.grow, self.up, strict=True):
            x = level(torch.cat([skips.pop(), grow(x)], dim=1))
        noise: Tensor = self.head(x)
        return noise


def unet() -> Built:
    """A small U-Net that learns to name the noise in pictures."""
    batch = {"noisy": torch.randn(16, 3, 64, 64), "noise": torch.randn(16, 3, 64, 64)}
    return UNet(), lambda model, b: F.mse_loss(model(b["noisy"]), b["noise"]), batch


def _own_loss(model: Any, batch: Any) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def bert() -> Built:
    """A BERT with its masked-language-model head, whose output layer is its embedding."""
    config = transformers.BertConfig(
        vocab_size=8192,
        hidden_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        intermediate_size=1024,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    tokens = torch.randint(0, 8192, (16, 128))
    return transformers.BertForMaskedLM(config), _own_loss, {"input_ids": tokens, "labels": tokens}


def moe() -> Built:
    """A Mixtral with eight experts, two for each token."""
    config = transformers.MixtralConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        use_cache=False,
    )
    tokens = torch.randint(0, 4096, (16, 128))
    return transformers.MixtralForCausalLM(config), _own_loss, {"input_ids": tokens, "labels": tokens}


def t5() -> Built:
    """A T5: an encoder whose result every block of the decoder reads."""
    config = transformers.T5Config(
        vocab_size=8192,
        d_model=256,
        d_ff=1024,
        d_kv=64,
        num_layers=5,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        use_cache=False,
    )
    tokens, labels = torch.randint(0, 8192, (16, 128)), torch.randint(0, 8192, (16, 64))
    return transformers.T5ForConditionalGeneration(config), _own_loss, {"input_ids": tokens, "labels": labels}


MODELS: dict[str, Callable[[], Built]] = {"gpt": gpt, "unet": unet, "bert": bert, "moe": moe, "t5": t5}


def build(name: str) -> Built:
    """The model of that name, always with the same numbers."""
    torch.manual_seed(0)
    return MODELS[name]()
