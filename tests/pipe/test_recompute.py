"""`pipeline(recompute=…)`: every bit stays, what is named runs twice, and what may not is left out."""

import logging
import re

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import evenflow
from evenflow.errors import ConfigError
from evenflow.runtime.program.weight_grads import WeightGrads
from own_schedules import OWN
from small_models import DROPOUT, MODELS, NUM_MICROBATCHES, TIED, assert_same_bits, reference, train
from unsplit import assert_same_step, mean_square, pipeline_step, regression, seeded

WIDTH = 4


class Block(nn.Module):
    def __init__(self, dropout=0.5):
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH), nn.Dropout(dropout)

    def forward(self, x):
        return x + self.dropout(self.down(torch.tanh(self.up(x))))


class Blocks(nn.Module):
    def __init__(self, *middle):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), *middle, Block()])
        self.last = nn.Linear(WIDTH, 1)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def make(model, **options):
    given = {"loss": mean_square, "example": regression(), "stages": 2, "num_microbatches": NUM_MICROBATCHES}
    return evenflow.pipeline(model, **(given | {"max_leaf_share": 0.0} | options))


def step(build, **options):
    model = seeded(build)()
    pipe = make(model, **options)
    found = pipeline_step(pipe, model, regression())
    pipe.close()
    return found


def refused(text):
    return pytest.raises(ConfigError, match=re.escape(text))


# -- the same numbers


@pytest.mark.parametrize(("recompute", "share"), [("full", None), ("full", 0.0), ("selective", 0.0)])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "interleaved-zb"])
@pytest.mark.parametrize("name", MODELS)
def test_recomputation_changes_no_bit(name, schedule, recompute, share):
    stages = 4 if schedule == "interleaved-zb" else 2
    options = {"dropout": DROPOUT, "exact": name in TIED, "stages": stages, "schedule": schedule}
    assert_same_bits(train(name, recompute=recompute, max_leaf_share=share, **options), reference(name))


@pytest.mark.parametrize("schedule", OWN)
def test_it_changes_none_with_any_order(schedule):
    own = OWN[schedule]
    options = {"dropout": DROPOUT, "schedule": own, "stages": 2 * own.stages_per_rank}
    options |= {"stages_per_rank": own.stages_per_rank}
    assert_same_bits(train("gpt", recompute="full", **options), reference("gpt"))


class UnderAutocast(nn.Module):
    """One weight is used in two blocks and between them: casts of it add up in bfloat16, or not."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.blocks[1].up, self.between = self.blocks[0].up, nn.Linear(8, WIDTH)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.blocks[0](x)
            x = self.between(self.blocks[0].up(x))
            x = self.blocks[1](x)
        return self.between(self.blocks[1].up(x.float())).sum(1, keepdim=True)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
@pytest.mark.parametrize("recompute", ["full", ["blocks.*"], ["blocks.0"], ["between"]])
def test_casts_of_weights_add_up_as_without(recompute, schedule):
    options = {"stages": 1, "schedule": schedule, "exact": False}
    assert_same_step(step(UnderAutocast, recompute=recompute, **options), step(UnderAutocast, **options))


class Routed(nn.Module):
    """Which rows go to the second layer depends on numbers: a leaf whose inside was not seen."""

    def __init__(self):
        super().__init__()
        self.one, self.other, self.dropout = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)

    def forward(self, x):
        rows = (x.sum(1) > 0).nonzero()[:, 0]
        return self.dropout(self.one(x)).index_add(0, rows, torch.tanh(self.other(x[rows])))


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_a_leaf_that_was_not_seen_runs_again(schedule):
    def build():
        return Blocks(Routed())

    again = step(build, recompute=["blocks.1"], schedule=schedule)
    assert_same_step(again, step(build, schedule=schedule))


class Masked(Block):
    def forward(self, x, mask):
        h = self.up(x)
        kept = (mask * 2).cos()
        return x + self.dropout(self.down(torch.tanh(h))) * kept


class WithMask(Blocks):
    """What depends on the batch alone is needed in the middle of a block, and before it."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Masked() for _ in range(2))

    def forward(self, x, mask):
        for block in self.blocks:
            x = block(x, mask)
        return self.last(x * mask)


def test_what_depends_on_the_batch_alone_is_there():
    def loss(model, batch):
        return functional.mse_loss(model(batch["x"], batch["x"] > 0), batch["y"])

    again = step(WithMask, loss=loss, recompute="full")
    assert_same_step(again, step(WithMask, loss=loss))
    pipe = make(seeded(WithMask)(), loss=loss, recompute="full", stages=1)
    (work,) = pipe._parts.recordings.entries[0].works.values()
    pipe.close()
    assert sum(run.recomputed for run in work.runs) == 2, "each block is one region"


def test_other_kinds_of_microbatches_and_evaluation_work():
    pipes = [make(seeded(Blocks)(), recompute=recompute) for recompute in ("full", None)]
    for rows in (8, 7, 8):
        again, plain = (pipe.step(regression(rows)) for pipe in pipes)
        assert again.loss == plain.loss
        again, plain = (pipe.evaluate(regression(rows)) for pipe in pipes)
        assert again.loss == plain.loss
    for pipe in pipes:
        pipe.close()


# -- what runs again


@pytest.mark.parametrize(
    ("recompute", "counts"),
    [
        (None, (1, 1, 1)),
        ("none", (1, 1, 1)),
        (["blocks.*"], (2, 2, 1)),
        (["blocks.1"], (1, 2, 1)),
        (["blocks.*.up"], (2, 2, 1)),
        (["*.0.up", "last"], (2, 1, 2)),
    ],
)
@pytest.mark.parametrize("share", [None, 0.0])
def test_what_is_named_runs_twice_and_nothing_else(recompute, counts, share):
    model = seeded(Blocks)()
    ran = dict.fromkeys(("blocks.0.up", "blocks.1.up", "last"), 0)

    def counting(name):
        def hook(*_):
            ran[name] += 1

        return hook

    for name in ran:
        # (A hook behind it would not see a run that ends once it has made what is needed.)
        model.get_submodule(name).register_forward_pre_hook(counting(name))
    pipe = make(model, recompute=recompute, max_leaf_share=share)
    before = dict(ran)
    pipe.step(regression())
    pipe.close()
    assert tuple((ran[name] - before[name]) / NUM_MICROBATCHES for name in ran) == counts


def test_selective_recomputes_less_than_full(caplog):
    with caplog.at_level(logging.INFO, "evenflow"):
        for recompute in ("selective", "full"):
            make(seeded(Blocks)(), recompute=recompute, stages=1).close()
    told = [line for line in caplog.messages if "recomputes" in line]
    fewer, all_of_them = (int(re.search(r"recomputes (\d+) of", line)[1]) for line in told)
    assert 0 < fewer < all_of_them


def test_gradients_of_recomputed_weights_are_put_off(monkeypatch):
    put, calls = WeightGrads.put, []

    def counting(*args):
        calls.append(1)
        put(*args)

    monkeypatch.setattr(WeightGrads, "put", counting)
    numbers = []
    for recompute in (None, "full"):
        calls.clear()
        step(Blocks, recompute=recompute, schedule="zb-h1")
        numbers.append(len(calls))
    assert numbers[0] == numbers[1] > 0


# -- what does not


class Checkpointed(Blocks):
    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.last(x)


@pytest.mark.parametrize("recompute", ["full", ["blocks.*"]])
def test_what_the_model_recomputes_itself_is_not_run_three_times(recompute):
    model = seeded(Checkpointed)()
    ran = []
    model.blocks[0].up.register_forward_hook(lambda *_: ran.append(1))
    pipe = make(model, recompute=recompute)
    ran.clear()
    pipe.step(regression())
    pipe.close()
    assert len(ran) == 2 * NUM_MICROBATCHES


class Reading(nn.Module):
    """Reads a buffer that another module changes."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return torch.tanh(x) + self.norm[0].running_mean


def with_norm():
    norm = nn.BatchNorm1d(WIDTH)
    return Blocks(norm, Reading([norm]))


class Counting(Block):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) / self.calls


class InPlace(Blocks):
    def forward(self, x):
        x = self.blocks[0](x)
        y = self.blocks[1](x)
        return self.last(y.mul_(2))


class Hidden(Blocks):
    def forward(self, x):
        y = self.blocks[1](self.blocks[0](x))
        y.data.mul_(2)
        return self.last(y)


class Walking(Block):
    def forward(self, x):
        return x + torch.func.grad(lambda x: torch.tanh(self.up(x)).sum())(x)


REFUSED = [
    (with_norm, "blocks.1", "it changes the buffer blocks.1."),
    (lambda: Blocks(Counting()), "blocks.1", "it changes attributes of its modules"),
    (InPlace, "blocks.1", "it uses a tensor that is changed in place, and so do other nodes"),
    (lambda: Blocks(Walking()), "blocks.1", "autograd walks inside it"),
]


@pytest.mark.parametrize(("build", "name", "why"), REFUSED)
def test_what_may_not_run_again_is_refused_where_it_is_named(build, name, why):
    with refused(f"recompute= names '{name}', and so") as raised:
        make(seeded(build)(), recompute=[name])
    assert why in str(raised.value)
    assert "leave it out" in str(raised.value)


@pytest.mark.parametrize("build", [*(build for build, *_ in REFUSED), Hidden])
def test_and_left_out_elsewhere(build, caplog):
    with caplog.at_level(logging.INFO, "evenflow"):
        again = step(build, recompute="full")
    assert_same_step(again, step(build))
    assert any("not recomputed: " in line for line in caplog.messages)


def test_a_copy_of_a_buffer_is_handed_in_again():
    assert_same_step(step(with_norm, recompute=["blocks.3"]), step(with_norm))


@pytest.mark.parametrize(
    ("recompute", "text"),
    [
        ("everything", "recompute='everything' is none of 'none', 'selective', 'full', and no list"),
        ([3], "recompute=[3] is none of"),
        (["block.0"], "recompute= names 'block.0', which is no module of the model; nearest are 'blocks.0'"),
        (["never"], "recompute= names 'never', of which the recorded program has no node of its own"),
    ],
)
def test_wrong_arguments_are_refused(recompute, text):
    model = seeded(Blocks)()
    model.never = nn.Linear(1, 1, bias=False).requires_grad_(False)
    with refused(text):
        make(model, recompute=recompute)
