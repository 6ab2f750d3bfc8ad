"""Random numbers: the same at every cut and granularity, and other ones where they should be."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import evenflow
from unsplit import assert_same_step, mean_square, pipeline_step, random_cuts, regression, seeded, sgd

WIDTH = 8


class Drawing(nn.Module):
    """Draws several times itself, before, between and after the calls of modules that draw too."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.3)
        self.second = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = F.dropout(x, 0.2, self.training)
        h = self.dropout(self.first(x))
        h = h + torch.randn_like(h) * 0.1
        h = self.dropout(self.second(h)) * torch.bernoulli(torch.full_like(x, 0.5))
        return h + torch.rand(h.shape[-1]) + F.dropout(h, 0.5, self.training)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Drawing() for _ in range(3))
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=0.2, batch_first=True)
        self.recurrent = nn.LSTM(WIDTH, WIDTH, num_layers=2, dropout=0.3, batch_first=True)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        x = self.blocks[0](x)  # again: another call, other numbers
        x, _ = self.attention(x[:, None], x[:, None], x[:, None], need_weights=False)
        x, _ = self.recurrent(x)
        return self.head(F.alpha_dropout(x[:, 0], 0.1, self.training))


def batch() -> dict[str, torch.Tensor]:
    return regression(8, WIDTH)


def one_step(
    *, share: float, stages: int, cuts: int | None = None, num_steps: int = 2, seed: int = 0, **options
):
    model = seeded(Model)()
    arguments = {
        "loss": mean_square,
        "example": batch(),
        "stages": stages,
        "max_leaf_share": share,
        "num_microbatches": 4,
        "exact": True,  # a block is called twice
        **options,
    }
    if cuts is None:
        pipe = evenflow.pipeline(model, **arguments)
    else:
        with random_cuts(cuts, stages):
            pipe = evenflow.pipeline(model, **arguments)
    for _ in range(num_steps - 1):
        pipe.step(batch())
    return pipeline_step(pipe, model, batch())


@functools.cache
def on_one_stage():
    return one_step(share=0.0, stages=1)


@pytest.mark.parametrize(("stages", "share"), [(1, 1.0), (2, 0.1), (2, 1.0), (3, 0.0), (3, 0.3)])
def test_draws_do_not_depend_on_cuts_or_leaves(stages, share):
    assert_same_step(one_step(share=share, stages=stages), on_one_stage())


@pytest.mark.parametrize("cuts", range(2))
def test_draws_do_not_depend_on_random_cuts(cuts):
    assert_same_step(one_step(share=0.0, stages=4, cuts=cuts), on_one_stage())


@pytest.mark.parametrize("schedule", ["sequential", "gpipe"])
def test_draws_do_not_depend_on_the_schedule(schedule):
    assert_same_step(one_step(share=0.0, stages=3, schedule=schedule), on_one_stage())


def noise(*shape):
    """A program whose loss is all the noise that it draws."""

    def loss(model, batch):
        drawn = model(batch["x"])
        return drawn.mean(), drawn.detach()

    return loss


class Noise(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = OneNoise(), OneNoise()

    def forward(self, x):
        return torch.stack([self.a(x), self.a(x), self.b(x)], 1)


class OneNoise(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return (torch.randn(x.shape[0], 4) + torch.randn(x.shape[0], 4) * 1e-9) * self.weight


def drawn(pipe) -> torch.Tensor:
    return pipe.step({"x": torch.zeros(6, 1)}).metrics


def noisy(**options):
    return evenflow.pipeline(
        Noise(), loss=noise(), example={"x": torch.zeros(6, 1)}, num_microbatches=3, **options
    )


def test_every_call_microbatch_step_and_seed_draws_its_own_numbers():
    pipe = noisy(stages=2, max_leaf_share=0.0)
    first, second, other = drawn(pipe), drawn(pipe), drawn(noisy(seed=1))
    numbers = torch.cat([first, second, other]).flatten().tolist()
    assert len(numbers) == 3 * 6 * 3 * 4
    assert len(set(numbers)) == len(numbers)


def test_numbers_are_of_the_right_kind():
    pipe = noisy(stages=2)
    numbers = torch.cat([drawn(pipe) for _ in range(50)]).flatten()
    assert abs(float(numbers.mean())) < 0.06
    assert abs(float(numbers.std()) - 1) < 0.05


def test_the_same_seed_gives_the_same_numbers_again():
    assert torch.equal(drawn(noisy(stages=2)), drawn(noisy(stages=1)))


@pytest.mark.parametrize("stages", [1, 2])
def test_the_users_generator_is_left_alone(stages):
    model = seeded(Model)()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    pipe = evenflow.pipeline(
        model, loss=mean_square, example=batch(), stages=stages, optimizer=sgd, num_microbatches=2
    )
    assert torch.equal(torch.get_rng_state(), before), "by recording"
    pipe.step(batch())
    assert torch.equal(torch.get_rng_state(), before), "by a step"
    pipe.evaluate(batch())
    pipe.predict(batch(), lambda model, batch: model(batch["x"]))
    assert torch.equal(torch.get_rng_state(), before), "by an evaluation"


def test_the_users_generator_does_not_matter():
    expected = on_one_stage()
    torch.manual_seed(99)
    assert_same_step(one_step(share=0.0, stages=2), expected)


def test_closing_leaves_no_hooks():
    model = seeded(Model)()
    pipe = evenflow.pipeline(model, loss=mean_square, example=batch(), stages=2)
    pipe.step(batch())
    pipe.close()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    before = torch.get_rng_state()
    model(batch()["x"])
    assert not torch.equal(torch.get_rng_state(), before), "the model draws from the user's generator again"


def test_the_model_used_by_itself_draws_from_the_users_generator():
    """Between steps too: our hooks seed only within a step."""
    model = seeded(Model)()
    pipe = evenflow.pipeline(model, loss=mean_square, example=batch(), stages=2)
    pipe.step(batch())
    torch.manual_seed(3)
    first = model(batch()["x"])
    torch.manual_seed(4)
    assert not torch.equal(first, model(batch()["x"]))
    torch.manual_seed(3)
    assert torch.equal(first, model(batch()["x"]))


def test_a_generator_of_the_modules_own_stays_in_its_module():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.generator = torch.Generator().manual_seed(0)
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.layer(x) + torch.randn(x.shape, generator=self.generator)

    model = nn.Sequential(Own(), nn.Tanh(), nn.Linear(WIDTH, 1))
    pipe = evenflow.pipeline(
        model, loss=mean_square, example=batch(), stages=2, max_leaf_share=0.0, num_microbatches=2
    )
    assert pipe.step(batch()).loss != pipe.step(batch()).loss
