"""Boundary tensors in bfloat16: the numbers of a model that rounds at its cuts, whatever runs it."""

from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import evenflow
from evenflow.errors import ConfigError
from evenflow.graph.nouns.tree import TensorInfo
from evenflow.runtime.links.process_group import ProcessGroupLink
from evenflow.runtime.links.shared_memory import SharedMemoryLink
from evenflow.runtime.stages.narrowing import Narrowing
from evenflow.schedules import catalog

WIDTH, ROWS, NUM_MICROBATCHES = 8, 8, 4


class Skipping(nn.Module):
    """Four layers, the first of which is added to the last, and a mask that needs no gradient."""

    def __init__(self, rounds=False):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.rounds = rounds

    def at_cut(self, x):
        return x.bfloat16().float() if self.rounds else x

    def forward(self, x):
        first = torch.tanh(self.layers[0](x))
        mask = torch.sigmoid(first.detach()) / 3  # float32, made on the first stage
        skipped = self.at_cut(first)
        second = self.at_cut(torch.tanh(self.layers[1](skipped)))
        third = self.at_cut(torch.tanh(self.layers[2](second)))
        # The gradient comes back from the last stage over the second, which adds its own.
        return self.layers[3](third) + self.at_cut(skipped) * mask


def model(rounds=False):
    torch.manual_seed(0)
    return Skipping(rounds)


def batches():
    torch.manual_seed(1)
    return [{"x": torch.randn(ROWS, WIDTH), "y": torch.randn(ROWS, WIDTH)} for _ in range(3)]


def loss(module, batch):
    return F.mse_loss(module(batch["x"]), batch["y"])


def optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.5)


def train(schedule="1f1b", ranks=4, **options):
    on_each = catalog.default_stages_per_rank(schedule)
    pipe = evenflow.pipeline(
        model(),
        loss=loss,
        example=batches()[0],
        optimizer=lambda named: optimizer([p for _, p in named]),
        split=["layers.1", "layers.2", "layers.3"],
        stages_per_rank=on_each,
        schedule=schedule,
        num_microbatches=NUM_MICROBATCHES,
        boundary_dtype=torch.bfloat16,
        **options,
    )
    losses = [float(pipe.step(batch).loss) for batch in batches()]
    return losses, {name: p.detach().clone() for name, p in pipe.named_parameters()}, pipe


@cache
def rounded():
    """A plain loop over a model that rounds where the pipeline is cut."""
    module, losses = model(rounds=True), []
    steps = optimizer(module.parameters())
    for batch in batches():
        parts = zip(*(each.chunk(NUM_MICROBATCHES) for each in batch.values()), strict=True)
        found = [loss(module, {"x": x, "y": y}) for x, y in parts]
        for each in found:
            each.backward(torch.tensor(1 / NUM_MICROBATCHES))
        losses.append(float(torch.stack([each.detach() / NUM_MICROBATCHES for each in found]).sum()))
        steps.step()
        steps.zero_grad()
    return losses, dict(module.named_parameters())


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1", "interleaved-1f1b", "zb-v"])
def test_numbers_are_those_of_a_model_that_rounds_at_its_cuts(schedule):
    losses, weights, _ = train(schedule)
    assert losses == rounded()[0]
    for name, expected in rounded()[1].items():
        assert torch.equal(weights[name], expected), name


def on_processes(link):
    sent = []
    kind = SharedMemoryLink if link == "shared-memory" else ProcessGroupLink
    send = kind.send

    def noted(self, op, parcel, manifest):
        sent.extend((op.source, op.target, each.dtype) for each in parcel if each is not None)
        assert [each.dtype for each in parcel if each is not None] == [i.dtype for i in manifest.values]
        return send(self, op, parcel, manifest)

    kind.send = noted
    losses, weights, _ = train(link=link)
    return losses, weights, sent


@pytest.mark.parametrize("link", ["shared-memory", "torch"])
def test_processes_change_no_bit_and_send_half_the_bytes(link):
    found = evenflow.launch(on_processes, link, nproc=4)
    assert [losses for losses, _, _ in found] == [rounded()[0]] * 4
    for _, weights, _ in found:
        for name, weight in weights.items():
            assert torch.equal(weight, rounded()[1][name]), name
    types = {(source, target): set() for _, _, sent in found for source, target, _ in sent}
    for _, _, sent in found:
        for source, target, dtype in sent:
            types[source, target].add(dtype)
    # The mask goes past two stages as it is, beside the first layer's result.
    assert types.pop((0, 3)) == {torch.bfloat16, torch.float32}
    assert set.union(*types.values()) == {torch.bfloat16}


def test_what_stages_send_is_told():
    wide = evenflow.pipeline(model(), loss=loss, example=batches()[0], split=["layers.1"], num_microbatches=2)
    *_, narrow = train("gpipe")
    (sent, _) = (each.sends_bytes for each in wide.cut)
    numbers = ROWS // NUM_MICROBATCHES * WIDTH
    assert sent == 2 * 4 * (ROWS // 2) * WIDTH, "the first layer's result and the mask"
    told = [each.sends_bytes / numbers for each in narrow.cut]
    assert told == [2 + 2 + 4, 2, 2, 0], "the result goes to two stages"


def test_an_evaluation_is_not_rounded():
    *_, narrow = train()
    with torch.no_grad():
        whole = model()
        whole.load_state_dict(dict(narrow.named_parameters()))
        batch = batches()[0]
        parts = zip(*(each.chunk(NUM_MICROBATCHES) for each in batch.values()), strict=True)
        expected = [loss(whole, {"x": x, "y": y}) / NUM_MICROBATCHES for x, y in parts]
    assert float(narrow.evaluate(batch).loss) == float(torch.stack(expected).sum())


def test_single_numbers_are_not_rounded():
    info = TensorInfo((), (), torch.float32, requires_grad=True)
    assert Narrowing(torch.bfloat16).info(info) == info


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, "bfloat16", 16])
def test_other_types_are_refused(dtype):
    with pytest.raises(ConfigError, match=r"boundary_dtype=.* is neither None nor torch.bfloat16"):
        evenflow.pipeline(model(), loss=loss, example=batches()[0], boundary_dtype=dtype)
