"""Warnings where the loss of several microbatches cannot be that of the whole batch, and nowhere else."""

import warnings

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import evenflow
from unsplit import mean_square, regression, seeded

PREFIX = "the pipeline's loss is not that of the unsplit batch: "
ROWS = 6


def own_loss(model, batch):
    return model(**batch).loss


def warned(build, loss, example, **options) -> list[str]:
    """What is said when a pipeline is built."""
    options = {"stages": 2, "num_microbatches": 2, "max_leaf_share": 0.05} | options
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe = evenflow.pipeline(seeded(build)(), loss=loss, example=example, **options)
        built = [str(warning.message) for warning in caught]
        pipe.step(example)
    assert len(caught) == len(built), "said once, when it is built"
    assert all(text.startswith(PREFIX) for text in built)
    return [text.removeprefix(PREFIX) for text in built]


def normed(*norms):
    return nn.Sequential(nn.Linear(4, 8), *norms, nn.Linear(8, 1))


def images():
    generator = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(ROWS, 3, 8, 8, generator=generator), "labels": torch.arange(ROWS) % 3}


def text(length=7):
    return {"input_ids": torch.arange(ROWS * length).view(ROWS, length) % 11}


def labelled():
    return text() | {"labels": text()["input_ids"]}


SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=11, num_key_value_heads=2, **SMALL)
    )


def gpt():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=11, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    )


def vit():
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=3, **SMALL)
    return transformers.ViTForImageClassification(config)


def mixtral(balanced):
    config = transformers.MixtralConfig(
        vocab_size=11, num_key_value_heads=2, num_local_experts=2, output_router_logits=balanced, **SMALL
    )
    config._experts_implementation = "batched_mm"  # torch has no grouped_mm for fake tensors of fp32
    return transformers.MixtralForCausalLM(config)


def clip():
    config = transformers.CLIPConfig(
        text_config=SMALL | {"vocab_size": 11, "max_position_embeddings": 8, "eos_token_id": 2},
        vision_config=SMALL | {"image_size": 8, "patch_size": 4},
        projection_dim=16,
    )
    return transformers.CLIPModel(config)


def contrastive(model, batch):
    return model(**batch, return_loss=True).loss


# -- what is warned of


def test_batch_norm_is_named():
    found = warned(lambda: normed(nn.BatchNorm1d(8), nn.Tanh(), nn.BatchNorm1d(8)), mean_square, regression())
    assert found == ["BatchNorm (1, 3) takes its statistics of each microbatch, not of the whole batch"]


def test_many_batch_norms_are_counted():
    norms = [nn.BatchNorm1d(8) for _ in range(5)]
    (found,) = warned(lambda: normed(*norms), mean_square, regression())
    assert found.startswith("BatchNorm (1, 2, 3 and 2 more) takes")


def test_batch_norm_without_running_statistics_is_named_in_evaluation_mode_too():
    def build():
        return normed(nn.BatchNorm1d(8, track_running_stats=False))

    pipe = {"loss": mean_square, "example": regression(), "stages": 2, "num_microbatches": 2}
    with pytest.warns(UserWarning, match=r"BatchNorm \(1\)"):
        evenflow.pipeline(build().eval(), **pipe)


@pytest.mark.parametrize("num", [2, ROWS])
def test_clip_is_warned_of(num):
    example = images() | text()
    del example["labels"]
    (found,) = warned(clip, contrastive, example, num_microbatches=num)
    assert found.endswith(
        "multiplies all rows with all rows, as contrastive losses do: each microbatch sees only its own"
    )


@pytest.mark.parametrize(
    "similar",
    [
        lambda a, b: a @ b.t(),
        lambda a, b: torch.mm(F.normalize(a), F.normalize(b).t()),
        lambda a, b: torch.einsum("id,jd->ij", a, b),
        lambda a, b: -torch.cdist(a, b),
        lambda a, b: torch.cat([a, b]) @ torch.cat([a, b]).t(),
    ],
)
def test_contrastive_losses_of_ones_own_are_warned_of(similar):
    def loss(model, batch):
        pairs = similar(model(batch["x"]), model(batch["y"]))
        return F.cross_entropy(pairs, torch.arange(len(pairs)))

    generator = torch.Generator().manual_seed(0)
    example = {name: torch.randn(ROWS, 4, generator=generator) for name in ("x", "y")}
    (found,) = warned(lambda: nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 5)), loss, example)
    assert "multiplies all rows with all rows" in found


def test_the_balance_of_experts_is_warned_of():
    (found,) = warned(lambda: mixtral(balanced=True), own_loss, labelled())
    assert found == (
        "the load balance of experts (MixtralForCausalLM) is computed in each microbatch, not over the whole "
        "batch"
    )


def test_what_is_added_to_a_sum_is_warned_of():
    def loss(model, batch):
        return F.mse_loss(model(batch["x"]), batch["y"], reduction="sum") + 0.1 * model[0].weight.norm()

    (found,) = warned(normed, loss, regression())
    assert found.endswith(
        "what the loss function adds to its sum (a penalty, the balance of experts) counts once for each"
    )


# -- what is not


def test_nothing_is_said_of_two_sums_or_of_what_is_added_to_a_mean():
    def two_sums(model, batch):
        found = model(batch["x"])
        return F.mse_loss(found, batch["y"], reduction="sum") + 0.1 * found.square().sum()

    def with_penalty(model, batch):
        return mean_square(model, batch) + 0.1 * model[0].weight.norm()

    for loss in (two_sums, with_penalty):
        assert warned(normed, loss, regression()) == []


@pytest.mark.parametrize(
    ("build", "example"),
    [
        (llama, labelled),
        (gpt, labelled),
        (vit, images),
        (lambda: mixtral(balanced=False), labelled),
    ],
    ids=["llama", "gpt", "vit", "mixtral"],
)
@pytest.mark.parametrize("num", [2, ROWS])
def test_nothing_is_said_of_models_whose_rows_are_apart(build, example, num):
    assert warned(build, own_loss, example(), num_microbatches=num) == []


def test_nothing_is_said_of_attention_over_as_many_words_as_rows():
    example = {name: tensor[:4] for name, tensor in labelled().items()}
    example = {name: tensor[:, :2].contiguous() for name, tensor in example.items()}
    assert warned(llama, own_loss, example) == []


def test_nothing_is_said_of_weights_with_as_many_rows_as_the_batch():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 3)
            self.weight = nn.Parameter(torch.ones(3, 3))

        def forward(self, x):
            return (self.first(x) @ self.weight) @ self.weight[:, :1]

    assert warned(Product, mean_square, regression(6)) == []


def test_nothing_is_said_of_one_microbatch_or_of_frozen_statistics():
    assert warned(lambda: normed(nn.BatchNorm1d(8)), mean_square, regression(), num_microbatches=1) == []
    model = normed(nn.BatchNorm1d(8)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evenflow.pipeline(model, loss=mean_square, example=regression(), stages=2, num_microbatches=2)
