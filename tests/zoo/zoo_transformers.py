"""Models of transformers, as small as their configurations let them be."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers

from zoo_case import Case

VOCABULARY = 64
ROWS, LENGTH = 6, 8

transformers.logging.set_verbosity_error()


def built(kind: str, prepare: Callable[[Any], None] | None = None, **config: Any) -> Callable[[], Any]:
    """A builder of transformers' class `kind`, its configuration with these values.

    All parameters are moved off what they were initialised to, zeros and ones among it: a gradient that is
    zero for every input would hide a mistake.
    """

    def build() -> torch.nn.Module:
        torch.manual_seed(0)
        model_class = getattr(transformers, kind)
        model = model_class(model_class.config_class(**config)).train()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape), alpha=0.05)
        if prepare is not None:
            prepare(model)
        return model

    return build


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(rows: int = ROWS, length: int = LENGTH, seed: int = 5) -> torch.Tensor:
    return torch.randint(5, VOCABULARY, (rows, length), generator=generator(seed))


def padding(rows: int = ROWS, length: int = LENGTH, *, left: bool = False) -> torch.Tensor:
    """A mask whose rows end, or begin, at different places."""
    mask = torch.ones(rows, length, dtype=torch.int64)
    for row in range(rows):
        cut = row * 3 % 5
        if left:
            mask[row, :cut] = 0
        elif cut:
            mask[row, -cut:] = 0
    return mask


def text(**more: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Token ids, a mask with padding, and labels that leave the padding out."""
    ids, mask = tokens(), padding()
    batch = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    batch["labels"] = ids.masked_fill(mask == 0, -100)
    return batch | {key: make() for key, make in more.items()}


DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = DECODER | {"num_key_value_heads": 2, "head_dim": 8}


def decoder(name: str, kind: str, *, exact: bool = False, fails: str = "", **config: Any) -> Case:
    return Case(name, built(kind, **(DECODER | {"tie_word_embeddings": exact} | config)), text, exact=exact, fails=fails)


DECODERS = [
    decoder("llama", "LlamaForCausalLM"),
    decoder("qwen2", "Qwen2ForCausalLM"),
    decoder("mistral", "MistralForCausalLM"),
    decoder("gemma2", "Gemma2ForCausalLM", head_dim=8, exact=True),
    decoder("mixtral", "MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2),
]

CASES = [*DECODERS]
