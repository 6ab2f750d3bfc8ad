"""Pipelines of models that were built under `deferred_init`: the same weights wherever the cuts are."""

import re
import resource
from functools import cache

import pytest
import torch
import transformers
from torch import distributed as dist
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import evenflow
from evenflow.errors import ConfigError
from unsplit import mean_square, mlp, plain_step, regression, sgd

NUM_STEPS = 3


class Net(nn.Module):
    """Layers, a norm, dropout, a frozen parameter, a buffer computed from a weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.1)) for _ in range(4)
        )
        self.norm = nn.LayerNorm(8)
        self.last = nn.Linear(8, 1)
        self.offset = nn.Parameter(torch.randn(1) * 0.1, requires_grad=False)
        self.register_buffer("table", self.first.weight.detach().mean(dim=1))

    def forward(self, x):
        x = self.first(x) + self.table
        for block in self.blocks:
            x = x + block(x)
        return self.last(self.norm(x)) + self.offset


def net_case():
    with evenflow.deferred_init():
        model = Net()
    return model, {"loss": mean_square, "example": regression()}


def gpt2_case():
    with evenflow.deferred_init():
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=3, n_head=2, n_positions=16)
        ).train()
    tokens = torch.arange(64).view(8, 8) % 40
    return model, {"example": {"input_ids": tokens, "labels": tokens}, "exact": True}


CASES = {"net": net_case, "gpt2": gpt2_case}


def trained(case, stages):
    """What a pipeline of a deferred model begins with and what training makes of it, on this process."""
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 10)  # must not matter
    model, options = CASES[case]()
    pipe = evenflow.pipeline(model, stages=stages, num_microbatches=2, optimizer=sgd, seed=3, **options)
    weights = {name: p.detach().clone() for name, p in pipe.named_parameters()}
    losses = [float(pipe.step(options["example"]).loss) for _ in range(NUM_STEPS)]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    return losses, weights, buffers, empty


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different


@pytest.mark.parametrize("case", CASES)
def test_weights_and_losses_do_not_depend_on_the_number_of_stages(case):
    losses, weights, buffers, empty = trained(case, 1)
    assert empty == []
    assert len(set(losses)) == NUM_STEPS
    for stages in (2, 4):
        found = trained(case, stages)
        assert found[0] == losses
        assert_equal(found[1], weights)
        assert_equal(found[2], buffers)


def peak_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def growth_for_a_large_model():
    """By how much building a pipeline raises the peak of memory, and what its own parameters take, in KiB."""
    before = peak_kib()
    with evenflow.deferred_init():
        model = nn.Sequential(*(nn.Linear(5000, 5000) for _ in range(4)))  # 95 MiB each
    batch = {"x": torch.zeros(2, 5000), "y": torch.zeros(2, 5000)}
    pipe = evenflow.pipeline(model, loss=mean_square, example=batch, num_microbatches=1)
    return peak_kib() - before, sum(p.nbytes for _, p in pipe.named_parameters()) // 1024


def on_each_process():
    return {"large": growth_for_a_large_model()} | {case: trained(case, 2) for case in CASES}


@cache
def two_processes():
    return evenflow.launch(on_each_process, nproc=2)


def test_a_process_allocates_its_own_parameters_and_no_others():
    for found in two_processes():
        growth, own = found["large"]
        assert own == 2 * 5000 * 5001 * 4 // 1024
        assert growth < own + 80 * 1024


@pytest.mark.parametrize("case", CASES)
def test_each_of_two_processes_has_the_same_weights_and_only_its_own(case):
    losses, weights, buffers, _ = trained(case, 2)
    ranks = [found[case] for found in two_processes()]
    assert [rank[0] for rank in ranks] == [losses, losses]
    assert_equal(ranks[0][1] | ranks[1][1], weights)
    for _, own, found, empty in ranks:
        assert_equal(found, buffers)
        assert own
        assert len(own) < len(weights)
        used = {"transformer.wte.weight"} & own.keys() or {"transformer.wte.weight"}  # by both, in gpt2
        assert set(empty) == weights.keys() - own.keys() - used


def test_the_numbers_are_those_of_a_plain_loop():
    model, options = net_case()
    pipe = evenflow.pipeline(model, stages=3, num_microbatches=2, **options)
    plain = Net()
    plain.load_state_dict(model.state_dict())
    plain.offset.requires_grad_(False)
    for one in (model, plain):
        one.eval()  # no dropout
    batch = regression()
    expected = plain_step(
        plain, mean_square, [{key: t[at : at + 4] for key, t in batch.items()} for at in (0, 4)]
    )
    assert torch.equal(pipe.step(batch).loss, expected.loss)
    assert_equal({n: g for n, g in pipe.named_gradients() if g is not None}, expected.gradients)


def test_the_seed_chooses_the_weights():
    def weights(seed):
        model, options = net_case()
        pipe = evenflow.pipeline(model, stages=2, seed=seed, **options)
        return dict(pipe.named_parameters())

    assert_equal(weights(1), weights(1))
    assert not torch.equal(weights(1)["first.weight"], weights(2)["first.weight"])


def test_hooks_and_attributes_of_parameters_and_tied_ones_survive():
    with evenflow.deferred_init():
        model = mlp(4, 8, 8, 1)
        model[2].bias = model[0].bias
        model[0].weight.tag = "mine"
    seen = []
    model[0].weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.tag))
    pipe = evenflow.pipeline(model, loss=mean_square, example=regression(), num_microbatches=2, stages=1)
    pipe.step(regression())
    assert seen == ["mine", "mine"]
    assert model[2].bias is model[0].bias
    assert not model[2].bias.is_meta


def test_a_model_may_be_deferred_in_part():
    first = nn.Linear(4, 8)
    with evenflow.deferred_init():
        model = nn.Sequential(first, nn.Tanh(), nn.Linear(8, 1))
    before = first.weight.detach().clone()
    pipe = evenflow.pipeline(model, loss=mean_square, example=regression(), stages=2)
    assert torch.equal(dict(pipe.named_parameters())["0.weight"], before)
    assert float(pipe.step(regression()).loss) > 0


def test_buffers_with_a_state_that_a_weight_began():
    with evenflow.deferred_init():
        model = nn.Sequential(spectral_norm(nn.Linear(4, 8)), nn.Tanh(), nn.Linear(8, 1))
    pipe = evenflow.pipeline(model, loss=mean_square, example=regression(), stages=2, num_microbatches=1)
    assert float(pipe.step(regression()).loss) > 0


# -- refusals


def refused(model, text, **options):
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}"):
        evenflow.pipeline(model, loss=mean_square, example=regression(), **options)


def test_a_model_without_numbers_or_recipe():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 1))
    refused(
        model,
        "parameters without memory (device 'meta') that nothing says how to initialise: 0.weight, 0.bias;",
    )


def test_a_buffer_without_numbers_or_recipe():
    model = mlp(4, 8, 1)
    model.register_buffer("table", torch.empty(3, device="meta"))
    refused(model, "1 tensors of the model have no memory (device 'meta'), and nothing")


def test_a_model_converted_afterwards():
    with evenflow.deferred_init():
        model = mlp(4, 8, 1)
    refused(model.to(torch.bfloat16), "parameters without memory")


def test_a_model_converted_inside():
    with evenflow.deferred_init():
        model = mlp(4, 8, 1).to(torch.float64)
    batch = {key: tensor.double() for key, tensor in regression().items()}
    pipe = evenflow.pipeline(model, loss=mean_square, example=batch, stages=2)
    assert {parameter.dtype for _, parameter in pipe.named_parameters()} == {torch.float64}


def test_a_parameter_changed_afterwards():
    with evenflow.deferred_init():
        model = mlp(4, 8, 1)
    nn.init.zeros_(model[2].weight)
    refused(model, "the parameter 2.weight was changed after deferred_init()")


def test_two_views_of_one_memory():
    with evenflow.deferred_init():
        model = mlp(4, 4, 1)
        model[0].extra = nn.Parameter(model[0].weight.detach().t())
    refused(model, "0.weight and 0.extra are different views of the same memory")
