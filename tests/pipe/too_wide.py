"""Models of which a single layer, or its activations alone, are more than a device's memory holds."""

import torch
import transformers
from torch import nn

WIDTH, VOCABULARY, LENGTH = 512, 16384, 256


class Wide(nn.Module):
    """Two products of 16 MiB, each with its gradient and AdamW's states 64 MiB."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 16 * WIDTH), nn.Linear(16 * WIDTH, WIDTH)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def mean_square(model, batch):
    return nn.functional.mse_loss(model(batch["x"]), batch["y"])


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, eps=1e-5, foreach=False)


def wide():
    torch.manual_seed(0)
    return Wide(), mean_square, {"x": torch.randn(8, WIDTH), "y": torch.randn(8, WIDTH)}


def wordy():
    """A row's logits are 16 MiB, four times over."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    words = torch.randint(0, VOCABULARY, (4, LENGTH))
    return model, lambda model, batch: model(**batch).loss, {"input_ids": words, "labels": words}
