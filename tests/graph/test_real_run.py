"""Modules that cannot run on fake tensors become leaves that ran once for real, and give the same numbers."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional

import evenflow
from evenflow.errors import RecordError
from evenflow.runtime.recorded.microbatch import Microbatches
from unsplit import assert_splits, mean_square, regression, seeded

WIDTH = 4

READS = {
    "item": lambda h: h.sum().item() > 0,
    "bool": lambda h: bool(h.sum() > 0),
    "if": lambda h: 1 if h.sum() > 0 else 0,
    "tolist": lambda h: h.tolist()[0][0] > 0,
    "float": lambda h: float(h.detach().sum()) > 0,
    "equal": lambda h: not torch.equal(h.abs().sum(), h.sum()),
    "allclose": lambda h: torch.allclose(h[0, 0], h[0, 0].abs()),
    "numpy": lambda h: h.detach().numpy()[0, 0] > 0,
    "contains": lambda h: 0.5 in h,
    "nonzero": lambda h: (h > 0).nonzero().shape[0] > 6,
    "masked": lambda h: h[h > 0].shape[0] > 6,
}


def microbatches(count: int = 4, rows: int = 3) -> Microbatches:
    """Microbatches whose numbers differ in sign, so that branches flip."""
    chance = torch.Generator().manual_seed(1)
    signs = [1, -1, 3, -3, 1, -2]
    return Microbatches(
        [
            {
                "x": signs[at] * torch.randn(rows, WIDTH, generator=chance) + signs[at],
                "y": torch.randn(rows, WIDTH, generator=chance),
            }
            for at in range(count)
        ]
    )


class Chain(nn.Module):
    """A linear layer, the module in question, another linear layer."""

    def __init__(self, inner):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(WIDTH, WIDTH), inner, nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.last(self.inner(self.first(x)))


class Gate(nn.Module):
    def __init__(self, read):
        super().__init__()
        self.read, self.layer = read, nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        h = self.layer(x)
        return h * 2 if self.read(h) else h


@pytest.mark.parametrize("read", READS)
def test_a_branch_on_activations_stays_inside_its_module(read):
    assert_splits(seeded(lambda: Chain(Gate(READS[read]))), microbatches(), loss=mean_square)


def test_the_branches_do_flip():
    """Else the tests above would prove little."""
    model = seeded(lambda: Chain(Gate(None)))()
    found = set()
    model.inner.read = lambda h: found.add(READS["item"](h))
    for item in microbatches().items:
        model(item["x"])
    assert found == {True, False}


def test_a_branch_on_a_parameter():
    class Deciding(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return x * (self.gate if self.gate > 0 else 1.0)

    assert_splits(seeded(lambda: Chain(Deciding())), microbatches(), loss=mean_square)


class Experts(nn.Module):
    """Top-1 routing by a Python loop over experts."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        weight, choice = self.router(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for index in choice.unique().tolist():
            (rows,) = torch.where(choice == index)
            out.index_add_(0, rows, self.experts[index](x[rows]) * weight[rows, None])
        return out


def test_a_loop_over_experts():
    assert_splits(seeded(lambda: Chain(Experts())), microbatches(), loss=mean_square, stages=(2, 3))


def test_experts_that_no_token_chose_get_no_gradient():
    model = seeded(lambda: Chain(Experts()))()
    with torch.no_grad():
        model.inner.router.bias.copy_(torch.tensor([100.0, 0.0, 0.0]))
    pipe = evenflow.pipeline(model, loss=mean_square, example=microbatches(), stages=2, max_leaf_share=0.0)
    pipe.step(microbatches())
    gradients = dict(pipe.named_gradients())
    assert gradients["inner.experts.0.weight"] is not None
    assert gradients["inner.experts.1.weight"] is None


class Pick(nn.Module):
    """Returns as many rows as its numbers say: it cannot be a leaf, whoever calls it can."""

    def forward(self, x):
        return x[x.sum(1) > 0]


class Picked(nn.Module):
    def __init__(self):
        super().__init__()
        self.pick = Pick()

    def forward(self, x):
        return x + self.pick(x).sum(0)


def test_a_module_whose_result_depends_on_numbers_in_shape_lies_inside_a_leaf():
    assert_splits(seeded(lambda: Chain(Picked())), microbatches(), loss=mean_square)


class Dropping(nn.Module):
    def forward(self, x):
        return functional.dropout(x, 0.5, self.training) if x.sum() > 0 else x


def test_draws_inside_do_not_depend_on_cuts():
    def build():
        return seeded(lambda: Chain(nn.Sequential(Dropping(), nn.Linear(WIDTH, WIDTH), Dropping())))()

    found = []
    for stages, share in ((1, None), (2, 0.0), (3, 0.0), (2, None)):
        pipe = evenflow.pipeline(
            build(), loss=mean_square, example=microbatches(), stages=stages, max_leaf_share=share
        )
        loss = pipe.step(microbatches()).loss
        found.append((loss, [g for _, g in pipe.named_gradients()]))
        pipe.close()
    for loss, gradients in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert all(map(torch.equal, gradients, found[0][1]))
    plain = [mean_square(build().eval(), item) for item in microbatches().items]
    assert not torch.isclose(found[0][0], torch.stack(plain).mean().detach()), "nothing was dropped"


class Counting(nn.Module):
    """Changes a buffer and an argument in place as its numbers say."""

    def __init__(self):
        super().__init__()
        self.register_buffer("positive", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        h = x * 1
        if x.sum() > 0:
            self.positive += 1
            h[0] += 1
        return h


def test_buffers_end_as_unsplit():
    assert_splits(seeded(lambda: Chain(Counting())), microbatches(), loss=mean_square)


class InPlace(nn.Module):
    def forward(self, x):
        if x.sum() > -1e9:
            x.mul_(2)
        return x


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.change = InPlace()

    def forward(self, x):
        h = x * 2
        view = h[:, 1:]
        self.change(h)
        return h + view.sum(1, keepdim=True)


def test_an_argument_that_is_changed_in_place_is_seen_by_its_views():
    assert_splits(seeded(lambda: Chain(Around())), microbatches(), loss=mean_square)


@torch.library.custom_op("evenflow_tests::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


doubled.register_autograd(lambda ctx, gradient: gradient * 2)


class Custom(nn.Module):
    def forward(self, x):
        return doubled(x)


def test_a_kernel_without_a_fake_implementation():
    assert_splits(seeded(lambda: Chain(Custom())), microbatches(), loss=mean_square)


class ByAddress(nn.Module):
    """What a C extension does: it works on memory, which fakes have not."""

    def forward(self, x):
        assert x.data_ptr() != 0
        return x * 2


def test_a_module_that_wants_memory():
    assert_splits(seeded(lambda: Chain(ByAddress())), microbatches(), loss=mean_square)


INDEXED = {
    "rows": lambda found, mask: found[mask],
    "rows of a column": lambda found, mask: found[mask, 1],
    "a column of rows": lambda found, mask: found[:, 1][mask],
    "selected": lambda found, mask: found.masked_select(mask[:, None]),
}


@pytest.mark.parametrize("way", INDEXED)
def test_a_mask_of_the_batch_indexes_activations(way):
    def loss(model, batch):
        return INDEXED[way](model(batch["x"]), batch["mask"]).square().mean()

    items = microbatches().items
    for at, item in enumerate(items):
        item["mask"] = torch.tensor([True, at % 2 == 0, at % 3 == 0])
    build = seeded(lambda: Chain(nn.Tanh()))
    assert_splits(build, Microbatches(items), loss=loss)


def test_repeats_of_the_batch():
    def loss(model, batch):
        return torch.repeat_interleave(model(batch["x"]), batch["repeats"], dim=0).square().sum()

    items = microbatches().items
    for at, item in enumerate(items):
        item["repeats"] = torch.tensor([1, at, 2])
    assert_splits(seeded(lambda: Chain(nn.Tanh())), Microbatches(items), loss=loss)


# -- refused


def refused_pipeline(inner: nn.Module, text: str) -> pytest.ExceptionInfo[RecordError]:
    with pytest.raises(RecordError, match=re.escape(text)) as caught:
        evenflow.pipeline(Chain(inner), loss=mean_square, example=microbatches(), stages=2)
    return caught


class Telling(nn.Module):
    """Gives a Python number away: to record it would freeze it."""

    def forward(self, x):
        return x, x.sum().item()


class Told(nn.Module):
    def __init__(self):
        super().__init__()
        self.tell = Telling()

    def forward(self, x):
        x, number = self.tell(x)
        return x * number


def test_a_python_number_never_leaves_a_leaf():
    model = seeded(lambda: Chain(Told()))
    assert_splits(model, microbatches(), loss=mean_square)  # inside `inner`, which runs as a whole

    def loss(model, batch):
        found, number = model(batch["x"])
        return found.square().mean() * number

    with pytest.raises(RecordError, match="calls item on numbers") as caught:
        evenflow.pipeline(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), Telling()), loss=loss, example=microbatches()
        )
    assert any("it returns Python numbers" in note for note in caught.value.__notes__)


class Keeping(nn.Module):
    def forward(self, x):
        self.kept = x.sum() if x.sum() > 0 else x.mean()
        return x


def test_a_tensor_kept_by_a_leaf_is_refused():
    def loss(model, batch):
        return model(batch["x"]).square().mean() + model.inner.kept

    with pytest.raises(RecordError, match="inner calls __bool__ on numbers") as caught:
        evenflow.pipeline(Chain(Keeping()), loss=loss, example=microbatches(), stages=2)
    assert any("keeps tensors as attributes (kept)" in note for note in caught.value.__notes__)


class Growing(nn.Module):
    """Returns another number of rows when its numbers are larger than any that are made up."""

    def forward(self, x):
        return torch.cat([x, x]) if x.abs().max() > 1e3 else x


def test_a_result_of_another_form_than_recorded_is_refused_when_it_comes():
    pipe = evenflow.pipeline(
        Chain(Growing()), loss=lambda m, b: m(b["x"]).square().mean(), example=microbatches(), stages=2
    )
    pipe.step(microbatches())
    items = microbatches().items
    items[2]["x"] *= 1e6
    with pytest.raises(
        RecordError, match=re.escape("inner returned a tensor torch.float32 [6, 4], and float32[3, 4]")
    ):
        pipe.step(Microbatches(items))


class Wrong(nn.Module):
    def forward(self, x):
        return x @ torch.ones(WIDTH + 1, WIDTH)


def test_a_mistake_of_the_users_is_their_own_error():
    with pytest.raises(RuntimeError, match=r"reduction dim|shape|size") as caught:
        evenflow.pipeline(Chain(Wrong()), loss=mean_square, example=microbatches(), stages=2)
    assert any("while recording inner" in note for note in caught.value.__notes__)


def test_the_model_is_as_before_after_a_run_for_real():
    model = seeded(lambda: Chain(Counting()))()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = list(model.parameters())
    pipe = evenflow.pipeline(model, loss=mean_square, example=microbatches(), stages=2)
    pipe.close()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(mine is theirs for mine, theirs in zip(model.parameters(), parameters, strict=True))


def test_other_examples_are_not_disturbed():
    assert_splits(
        seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))), regression(), loss=mean_square
    )
