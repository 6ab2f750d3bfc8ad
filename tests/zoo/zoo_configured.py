"""How the zoo makes cases of transformers' models: families of tiny configurations, and texts for them."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from zoo_case import Case, loss_and_output

from unsplit import Loss

VOCABULARY = 64
ROWS, LENGTH = 6, 8

transformers.logging.set_verbosity_error()

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


def text() -> dict[str, torch.Tensor]:
    """Token ids, a mask with padding, and labels that leave the padding out."""
    ids, mask = tokens(), padding()
    batch = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    batch["labels"] = ids.masked_fill(mask == 0, -100)
    return batch


def texts_and_classes() -> dict[str, torch.Tensor]:
    """Texts of two segments, each with a class of three."""
    batch = text()
    batch["token_type_ids"] = (torch.arange(LENGTH) > torch.arange(ROWS)[:, None]).long()
    batch["labels"] = torch.randint(0, 3, (ROWS,), generator=generator())
    return batch


def classes() -> torch.Tensor:
    return torch.randint(0, 3, (ROWS,), generator=generator())


def alike(_: Any) -> float:
    """The weight of each microbatch, where rows cannot be counted because its tensors disagree."""
    return 1.0


def family(
    common: dict[str, Any],
    batch: Callable[[], Any] = text,
    *,
    exact: bool = False,
    ties: bool = False,
) -> Callable[..., Case]:
    """A maker of cases whose configurations have `common` values; `batch` and `exact` are its defaults.

    `ties`: word embeddings are tied to the head where a case is `exact`, and only there.
    """

    def case(
        name: str,
        kind: str,
        batch: Callable[[], Any] = batch,
        *,
        exact: bool = exact,
        refused: str = "",
        loss: Loss = loss_and_output,
        reduction: Any = "item-mean",
        prepare: Callable[[Any], None] | None = None,
        **config: Any,
    ) -> Case:
        values = common | ({"tie_word_embeddings": exact} if ties else {}) | config
        build = built(kind, prepare, **values)
        return Case(name, build, batch, loss=loss, exact=exact, reduction=reduction, refused=refused)

    return case


other = family({})  # of a configuration of its own
