"""Which programs keep a shared head's logits in parts, and that no other does."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import evenflow
from evenflow.graph.cutting.parted_logits import parted_logits
from evenflow.runtime.program.vocabulary_loss import cross_entropy
from evenflow.runtime.ranks.world import SingleProcess

WORDS = 8
ORDER = [*range(WORDS)]


def graph_of(loss):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(WORDS, 4), nn.Linear(4, WORDS, bias=False))
    batch = {"x": torch.randint(0, WORDS, (2, 12)), "y": torch.randint(0, WORDS, (2, 12))}
    pipe = evenflow.pipeline(
        model, loss=loss, example=batch, stages=1, num_microbatches=1, atomic=[nn.Linear], device="cpu"
    )
    return pipe._parts.recordings.entries[0].graph


def is_parted(loss) -> bool:
    graph = graph_of(loss)
    return bool(parted_logits(graph, graph.chain, {"1": WORDS}))


@pytest.mark.parametrize(
    "loss",
    [
        lambda model, b: F.cross_entropy(model(b["x"]).view(-1, WORDS), b["y"].view(-1)),
        lambda model, b: F.cross_entropy(model(b["x"]).float().flatten(0, 1), b["y"].flatten()),
        lambda model, b: F.cross_entropy(model(b["x"])[:, :-1].reshape(-1, WORDS), b["y"][:, 1:].reshape(-1)),
        lambda model, b: F.cross_entropy(
            model(b["x"])[..., 1:, :].reshape(22, -1), b["y"][:, 1:].reshape(-1)
        ),
        lambda model, b: F.cross_entropy(model(b["x"]).view(-1, WORDS), b["y"].view(-1), reduction="sum"),
        lambda model, b: F.cross_entropy(model(b["x"]).view(-1, WORDS), b["y"].view(-1), ignore_index=3),
    ],
)
def test_casts_and_new_shapes_keep_logits_in_parts(loss):
    assert is_parted(loss)


def ragged(model, b):
    return F.cross_entropy(model(b["x"]).view(WORDS, 3, WORDS)[:, 0].reshape(WORDS, -1), b["y"][0, :WORDS])


def smooth(model, b):
    return F.cross_entropy(model(b["x"]).view(-1, WORDS), b["y"].view(-1), label_smoothing=0.1)


@pytest.mark.parametrize(
    "loss",
    [
        smooth,
        ragged,  # a size of rows is that of the vocabulary
        lambda model, b: F.cross_entropy(model(b["x"])[:, 8], b["y"][:, 8]),  # so is the number of a position
        lambda model, b: F.cross_entropy(model(b["x"])[..., ORDER].flatten(0, 1), b["y"].flatten()),
        lambda model, b: F.cross_entropy(model(b["x"]).transpose(1, 2), b["y"]),
        lambda model, b: F.cross_entropy(model(b["x"]).flatten(0, 1).softmax(-1), b["y"].flatten()),
        lambda model, b: (F.cross_entropy((o := model(b["x"])).flatten(0, 1), b["y"].flatten()), o),
        lambda model, b: F.cross_entropy(
            model(b["x"]).flatten(0, 1), F.one_hot(b["y"], WORDS).flatten(0, 1).float()
        ),
    ],
)
def test_whatever_else_is_done_with_logits_gathers_them(loss):
    assert not is_parted(loss)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_and_its_gradient_are_torchs(reduction, dtype):
    logits = torch.randn(6, WORDS, dtype=dtype, requires_grad=True)
    twin = logits.detach().clone().requires_grad_()
    target = torch.tensor([0, 3, -100, 7, 2, -100])
    found = cross_entropy(SingleProcess(), logits, target, reduction=reduction)
    expected = F.cross_entropy(twin, target, reduction=reduction)
    found.sum().backward()
    expected.sum().backward()
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 1e-2}
    assert found.dtype is expected.dtype
    assert torch.allclose(found, expected, **tolerance)
    assert torch.allclose(logits.grad, twin.grad, **tolerance)
