"""Precision and clipping: what they compute, that no cut changes it, and what is refused."""

import copy
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import evenflow
from evenflow.errors import ConfigError
from evenflow.pipe.parameters.norm import GradientNorm, Piece, clip_factor
from evenflow.pipe.parameters.rules import INTERVAL, LossScale
from evenflow.runtime.ranks.world import SingleProcess
from evenflow.runtime.recorded.microbatch import split
from unsplit import mean_square, mlp, regression

STEPS = 3


def net() -> nn.Sequential:
    return mlp(4, 16, 16, 16, 1)


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


def make(model=None, **options) -> evenflow.Pipeline:
    given = {"loss": mean_square, "example": regression(), "optimizer": adam, "num_microbatches": 4}
    return evenflow.pipeline(net() if model is None else model, device="cpu", **(given | options))


def trained(**options):
    pipe = make(**options)
    results = [pipe.step(regression()) for _ in range(STEPS)]
    weights = {name: parameter.detach().clone() for name, parameter in pipe.named_parameters()}
    return [float(each.loss) for each in results], [float(each.grad_norm) for each in results], weights


# -- clipping


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_clipped_steps_have_the_bits_of_torchs_own(stages, schedule):
    model = net()
    optimizer = adam(model.parameters())
    losses, norms = [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        parts = []
        for item in split(regression(), 4):
            loss = mean_square(model, item)
            loss.backward(torch.full_like(loss, 0.25))
            parts.append(loss.detach() * 0.25)
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        losses.append(float(torch.stack(parts).sum()))
    found, their_norms, weights = trained(stages=stages, schedule=schedule, clip_norm=0.5)
    assert min(norms) > 0.5
    assert (found, their_norms) == (losses, norms)
    assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())


def test_a_bound_of_infinity_measures_alone():
    free = make(stages=2)
    free.step(regression())
    pipe = make(stages=2, clip_norm=math.inf)
    result = pipe.step(regression())
    assert math.isfinite(float(result.grad_norm))
    expected = dict(free.named_parameters())
    assert all(torch.equal(parameter, expected[name]) for name, parameter in pipe.named_parameters())


def test_without_clipping_no_norm_is_taken_and_none_before_an_update():
    assert make(stages=2).step(regression()).grad_norm is None
    assert make(stages=2, clip_norm=1.0).step(regression(), update=False).grad_norm is None


def test_a_shared_parameter_counts_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.middle = nn.Linear(4, 4)
            self.last.weight = self.first.weight

        def forward(self, x):
            return self.last(torch.tanh(self.middle(torch.tanh(self.first(x)))))

    torch.manual_seed(0)
    model = Tied()
    batch = {"x": torch.randn(8, 4), "y": torch.randn(8, 4)}
    twin = copy.deepcopy(model)
    mean_square(twin, batch).backward()
    expected = nn.utils.clip_grad_norm_(twin.parameters(), math.inf)
    pipe = make(model, stages=3, example=batch, clip_norm=math.inf)
    assert float(pipe.step(batch).grad_norm) == pytest.approx(float(expected), rel=1e-6)


def test_norms_of_parts_add_up_as_squares():
    norm = GradientNorm(SingleProcess(), ["a", "b", "never used"])
    whole, part = torch.tensor([3.0]), torch.tensor([0.0, 4.0])
    assert float(norm([Piece("b", part, is_part=True), Piece("a", whole)])) == 5.0
    assert float(norm([])) == 0.0
    assert float(clip_factor(torch.tensor(0.1), 1.0)) == 1.0


# -- types


# A batch of float32 becomes bfloat16 where all is.
@pytest.mark.parametrize("precision", ["bf16", "bf16-pure", "fp16"])
def test_numbers_and_norms_in_few_bits_do_not_depend_on_the_cut(precision):
    example = {"x": torch.randn(8, 4), "y": torch.randn(8, 1)}
    batch = {"example": example}
    expected = make(**batch, precision=precision, stages=1, clip_norm=1.0)
    losses = [expected.step(example) for _ in range(STEPS)]
    for stages, schedule in [(2, "1f1b"), (4, "1f1b"), (4, "zb-h1"), (4, "interleaved-1f1b")]:
        pipe = make(**batch, precision=precision, stages=stages, schedule=schedule, clip_norm=1.0)
        found = [pipe.step(example) for _ in range(STEPS)]
        assert [float(each.loss) for each in found] == [float(each.loss) for each in losses]
        assert [float(each.grad_norm) for each in found] == [float(each.grad_norm) for each in losses]
        weights = dict(pipe.named_parameters())
        assert all(torch.equal(weights[name], p) for name, p in expected.named_parameters())


def test_bf16_is_autocast_over_float32_parameters():
    model = net().bfloat16()
    twin = net()
    pipe = make(model, precision="bf16", stages=2)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    twin.load_state_dict(model.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        expected = sum(mean_square(twin, item) for item in split(regression(), 4)) / 4
    assert float(pipe.step(regression()).loss) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert make(precision="fp32", stages=2).step(regression()).loss != expected


def test_bf16_keeps_frozen_parameters_in_their_types():
    model = net()
    model[0].bfloat16().requires_grad_(requires_grad=False)
    make(model, precision="bf16", stages=2)
    assert model[0].weight.dtype is torch.bfloat16
    assert model[2].weight.dtype is torch.float32


def test_pure_bf16_trains_float32_copies():
    """Updates too small for bfloat16 add up."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    batch = {"x": torch.ones(4, 4).bfloat16()}

    def loss(model, batch):
        return model(batch["x"]).mean()

    pipe = make(
        model,
        loss=loss,
        example=batch,
        precision="bf16-pure",
        stages=2,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-4),
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for _ in range(20):
        pipe.step(batch)
    assert float(model[1].weight.detach().max()) < 1.0
    again = make(model, loss=loss, example=batch, precision="bf16-pure", stages=1)
    again.load_state_dict(pipe.state_dict(), optimizer=False)
    assert torch.equal(again._parts.updater.rules.masters.by_name["1.weight"], model[1].weight.float())


def test_a_scale_shrinks_when_it_overflows_and_grows_after_a_while():
    scale = LossScale(8.0)
    for _ in range(INTERVAL - 1):
        scale.update(overflowed=False)
    assert scale.factor == 8.0
    scale.update(overflowed=False)
    assert scale.factor == 16.0
    scale.update(overflowed=True)
    assert (scale.factor, scale.num_good) == (8.0, 0)


def test_gradients_are_told_without_the_scale():
    pipe = make(precision="fp16", stages=2)
    plain = make(precision="bf16", stages=2)
    for each in (pipe, plain):
        each.step(regression(), update=False)
    expected = dict(plain.named_gradients())
    for name, gradient in pipe.named_gradients():
        assert torch.allclose(gradient, expected[name], rtol=0.1, atol=0.02), name


# -- what is refused


def test_float16_that_nobody_scales_is_refused():
    with pytest.raises(ConfigError, match=r"the parameter 0\.weight is float16, whose gradients vanish"):
        make(net().half(), example={"x": torch.randn(8, 4).half(), "y": torch.randn(8, 1).half()}, stages=2)

    def loss(model, batch):
        with torch.autocast("cpu", torch.float16):
            return mean_square(model, batch)

    with pytest.raises(ConfigError, match=r'under autocast to float16.*pipeline\(precision="fp16"\)'):
        make(loss=loss, stages=2)


def test_what_becomes_another_type_is_judged_by_that(tmp_path):
    """A float16 model may become float32; a float16 folder is refused."""
    half = {"loss": mean_square, "example": regression(), "stages": 2}
    pipe = make(net().half(), **half, precision="fp32")
    assert {parameter.dtype for _, parameter in pipe.named_parameters()} == {torch.float32}
    save_file(
        {name: tensor.half() for name, tensor in net().state_dict().items()}, tmp_path / "model.safetensors"
    )
    with evenflow.deferred_init():
        model = net()
    with pytest.raises(ConfigError, match=r"is float16, whose gradients vanish"):
        make(model, **half, load=tmp_path)
