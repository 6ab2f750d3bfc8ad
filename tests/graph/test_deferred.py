"""Models built under `deferred_init`: no memory, and the numbers that ordinary initialisation would give."""

import copy
import gc
import resource
import weakref

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import evenflow
from evenflow.errors import ConfigError
from evenflow.graph.kernels.fakes import FakeParameters
from evenflow.graph.recipes import Recipes, memory_of
from evenflow.graph.recording.record import record

CPU = torch.device("cpu")


def deferred(build):
    with evenflow.deferred_init():
        return build()


def numbers(model, seed=0) -> dict[str, torch.Tensor]:
    """Every parameter and buffer that has a recipe, made."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    recipes = Recipes(tensors, seed=seed)
    assert recipes.unknown == []
    return {name: recipes.materialise(name, CPU) for name, tensor in tensors.items() if tensor.is_meta}


class Holder(nn.Module):
    """A module with one parameter, `w`, made by a function."""

    def __init__(self, make):
        super().__init__()
        made = make()
        if "w" not in self._parameters:
            self.w = made if isinstance(made, nn.Parameter) else nn.Parameter(made)


def made_by(make) -> torch.Tensor:
    model = deferred(lambda: Holder(make))
    assert model.w.is_meta
    return numbers(model)["w"]


# -- the ways of initialising


def in_place(write):
    def make():
        parameter = nn.Parameter(torch.empty(40, 30))
        write(parameter)
        return parameter

    return make


RANDOM = {
    "normal": in_place(lambda w: nn.init.normal_(w, 1.0, 0.1)),
    "uniform": in_place(nn.init.uniform_),
    "trunc_normal": in_place(lambda w: nn.init.trunc_normal_(w, std=0.02)),
    "trunc_normal, cut close": in_place(lambda w: nn.init.trunc_normal_(w, a=-0.5, b=0.5)),
    "trunc_normal far out": in_place(lambda w: nn.init.trunc_normal_(w, a=1.5, b=3.0)),
    "trunc_normal, registered before": lambda: nn.init.trunc_normal_(nn.Linear(30, 40).weight, a=1, b=2),
    "kaiming": in_place(nn.init.kaiming_uniform_),
    "xavier": in_place(nn.init.xavier_normal_),
    "randn": lambda: torch.randn(40, 30) * 0.02,
    "rand of another type": lambda: torch.rand(40, 30, dtype=torch.float64).to(torch.bfloat16),
    "data": in_place(lambda w: w.data.normal_(0, 3)),
    "a part of something larger": lambda: torch.randn(80, 30)[10:50],
    "own generator": lambda: torch.randn(40, 30, generator=torch.Generator().manual_seed(5)),
    "where": in_place(lambda w: w.data.copy_(torch.where(torch.rand(40, 30) > 0.5, 1.0, -1.0))),
    "bernoulli": in_place(lambda w: w.data.bernoulli_(0.3)),
    "sparse": in_place(lambda w: nn.init.sparse_(w, 0.5, std=1.0)),
}


@pytest.mark.parametrize("way", RANDOM)
def test_random_numbers_have_the_same_distribution(way):
    torch.manual_seed(3)
    expected = Holder(RANDOM[way]).w.detach()
    found = made_by(RANDOM[way])
    assert (found.shape, found.dtype, found.stride()) == (expected.shape, expected.dtype, expected.stride())
    assert not torch.equal(found, expected)
    found, expected = found.double(), expected.double()
    assert abs(found.mean() - expected.mean()) < 0.15 * expected.std()
    assert abs(found.std() / expected.std() - 1) < 0.1
    assert found.min() >= expected.min() - 1.5 * expected.std()
    assert found.max() <= expected.max() + 1.5 * expected.std()


def registered(write):
    """The weight of a layer, which is empty by the time that it is written."""

    def make():
        layer = nn.Linear(30, 40)
        with torch.no_grad():
            write(layer.weight)
        return layer.weight

    return make


def copied_before_a_change(w):
    other = nn.Linear(30, 40)
    nn.init.ones_(other.weight)
    w.copy_(other.weight)
    nn.init.zeros_(other.weight)


def zeroed_row(w):
    nn.init.ones_(w)
    w.data[3].zero_()


def changed_twice():
    table = torch.tensor(range(12), dtype=torch.float32)
    first = nn.Parameter(torch.empty(24))
    with torch.no_grad():
        first[:12].copy_(table)
        table[0] = 50.0
        first[12:] = table
    return first


def set_again():
    parameter = nn.Parameter(torch.zeros(3))
    parameter.data = torch.ones(4) * 2
    return parameter


def written_through_numpy():
    table = torch.zeros(5)
    table.numpy()[2] = 7.0
    return table


EXACT = {
    "ones": in_place(nn.init.ones_),
    "eye": in_place(nn.init.eye_),
    "dirac": lambda: nn.init.dirac_(torch.empty(4, 4, 3)),
    "copy of a constant": in_place(lambda w: w.data.copy_(torch.eye(40)[:, :30])),
    "a row of zeros": in_place(zeroed_row),
    "numpy": lambda: torch.from_numpy(np.arange(6.0)),
    "written through numpy": written_through_numpy,
    "a list": lambda: torch.tensor([1.0, 2.0, 4.0]),
    "a list on the parameter's device": registered(lambda w: w.fill_(torch.tensor(3.0, device=w.device))),
    "new_tensor": registered(lambda w: w.copy_(w.new_tensor([5.0]))),
    "copy of what changes later": registered(copied_before_a_change),
    "a buffer's numbers": registered(lambda w: w.copy_(nn.BatchNorm1d(30).running_var)),
    "a real index": registered(lambda w: nn.init.ones_(w)[torch.arange(0, 40, 2)].zero_()),
    "written at a real index": registered(lambda w: nn.init.ones_(w).index_fill_(0, torch.arange(3), 2.0)),
    "a product with a real table": registered(lambda w: nn.init.ones_(w).mul_(torch.arange(30.0))),
    "a constant that changes": changed_twice,
    "data set": set_again,
    "half precision": lambda: torch.linspace(0, 1, 9).half(),
    "transposed": lambda: torch.arange(12.0).view(3, 4).t(),
    "no numbers": lambda: torch.ones(0, 3),
    "numbers asked for": lambda: torch.full((4,), float(torch.ones(3).sum())),
}


@pytest.mark.parametrize("way", EXACT)
def test_numbers_without_chance_are_the_same(way):
    expected = Holder(EXACT[way]).w.detach()
    found = made_by(EXACT[way])
    assert (found.shape, found.dtype, found.stride()) == (expected.shape, expected.dtype, expected.stride())
    assert torch.equal(found, expected)


@pytest.mark.parametrize("way", ["orthogonal, registered later", "orthogonal, registered before"])
def test_an_orthogonal_matrix_is_orthogonal(way):
    if "before" in way:
        found = numbers(deferred(orthogonal_linear))["weight"]
    else:
        found = made_by(in_place(nn.init.orthogonal_))
    assert torch.allclose(found.t() @ found, torch.eye(30), atol=1e-5)


def orthogonal_linear():
    layer = nn.Linear(30, 40)
    nn.init.orthogonal_(layer.weight)
    return layer


def test_what_nobody_initialises_is_zero_and_not_left_to_chance():
    assert torch.equal(made_by(lambda: torch.empty(1000)), torch.zeros(1000))


def test_a_default_type_that_was_set_meanwhile_is_kept():
    def build():
        torch.set_default_dtype(torch.float64)
        try:
            return nn.ModuleList([nn.Linear(2, 3), Holder(lambda: torch.ones(3))])
        finally:
            torch.set_default_dtype(torch.float32)

    assert {tensor.dtype for tensor in numbers(deferred(build)).values()} == {torch.float64}


# -- parameters that belong together


def test_copies_of_a_layer_have_its_numbers():
    def build():
        layer = nn.Linear(8, 8)
        return nn.ModuleList(copy.deepcopy(layer) for _ in range(3))

    found = numbers(deferred(build))
    assert torch.equal(found["0.weight"], found["2.weight"])
    assert found["0.weight"].std() > 0.1


def test_a_norm_is_that_of_the_weight():
    found = numbers(deferred(lambda: weight_norm(nn.Linear(8, 8))))
    magnitude, direction = (found[f"parametrizations.weight.original{at}"] for at in (0, 1))
    assert torch.allclose(magnitude, direction.norm(dim=1, keepdim=True))


def test_buffers_computed_from_a_weight_fit_it():
    model = deferred(lambda: spectral_norm(nn.Linear(8, 8), n_power_iterations=40))
    found = numbers(model)
    weight = found["parametrizations.weight.original"]
    u, v = (found[f"parametrizations.weight.0._{key}"] for key in "uv")
    assert torch.isclose(u @ weight @ v, torch.linalg.matrix_norm(weight, 2), rtol=1e-2)


def test_a_tied_parameter_stays_one_object():
    def build():
        shared = nn.Parameter(torch.randn(4, 4))
        first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        first.weight = shared
        second.weight = shared
        assert first.weight is shared
        return nn.Sequential(first, second)

    model = deferred(build)
    assert model[0].weight is model[1].weight
    fakes = FakeParameters(model, CPU)
    assert fakes.tied == {"0.weight": "0.weight", "1.weight": "0.weight"}


def test_a_parameter_that_something_else_holds_on_to_is_tied_too():
    def build():
        shared = nn.Parameter(torch.randn(4, 4))
        watched = weakref.ref(shared)
        first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        first.weight = shared
        second.weight = shared
        assert watched() is shared
        return nn.Sequential(first, second)

    model = deferred(build)
    assert model[0].weight is model[1].weight
    assert model[0].weight.is_meta


def test_the_users_attributes_and_flags_stay():
    def build():
        parameter = nn.Parameter(torch.randn(3), requires_grad=False)
        parameter.no_decay = True
        return Holder(lambda: parameter)

    model = deferred(build)
    assert model.w.no_decay
    assert not model.w.requires_grad


# -- what the numbers depend on


class Named(nn.Module):
    def __init__(self, *names):
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(5, 5))


def test_numbers_depend_on_seed_and_name_alone():
    torch.manual_seed(0)
    found = numbers(deferred(lambda: Named("a", "b")))
    torch.manual_seed(1)
    again = numbers(deferred(lambda: Named("c", "b", "a")))
    assert all(torch.equal(tensor, again[name]) for name, tensor in found.items())
    other_seed = numbers(deferred(lambda: Named("a", "b")), seed=1)
    assert not any(torch.equal(tensor, other_seed[name]) for name, tensor in found.items())
    assert not torch.equal(found["a.weight"], found["b.weight"])


def test_the_users_generator_goes_on_as_if_nothing_had_been_drawn():
    model = deferred(lambda: nn.Linear(5, 5))
    state = torch.get_rng_state()
    numbers(model)
    assert torch.equal(torch.get_rng_state(), state)


# -- memory


def test_only_parameters_lose_their_memory():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.register_buffer("table", torch.arange(3) * 2)
            self.scale = torch.full((2,), 0.5)

    model = deferred(Model)
    assert model.linear.weight.is_meta
    assert model.table.tolist() == [0, 2, 4]
    assert model.scale.tolist() == [0.5, 0.5]


def test_nothing_is_kept_of_what_was_made_on_the_way():
    seen = []

    def draw():
        drawn = torch.randn(30)
        outside = torch.from_numpy(np.ones(30, dtype=np.float32))
        seen.extend(weakref.ref(tensor) for tensor in (drawn, outside))
        return drawn, drawn * outside

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", draw()[1])
            self.w = nn.Parameter(draw()[0])

    model = deferred(Model)
    gc.collect()
    assert [tensor() is None for tensor in seen] == [True] * 4
    assert memory_of(model.table) is None


def test_a_parameter_larger_than_the_machine_is_never_allocated():
    model = deferred(lambda: Holder(lambda: torch.randn(1 << 20, 1 << 22) * 0.02))  # 16 TiB
    assert model.w.shape == (1 << 20, 1 << 22)


def test_a_model_of_671_billion_parameters_is_built_and_recorded_in_little_memory():
    config = transformers.DeepseekV3Config()  # its defaults are the full size
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = deferred(lambda: transformers.DeepseekV3ForCausalLM._from_config(config, dtype=torch.bfloat16))
    assert sum(parameter.numel() for parameter in model.parameters()) == 671_026_404_352
    config.num_hidden_layers = 12  # recording the layers behind would be the same again
    batch = {"input_ids": torch.zeros(1, 4, dtype=torch.long), "labels": torch.zeros(1, 4, dtype=torch.long)}
    fakes = FakeParameters(model, CPU)
    tree = record(lambda m, b: m(**b).loss, model, batch, device=CPU, fakes=fakes)
    assert len(tree.values) > config.num_hidden_layers
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 * 1024  # KiB


# -- real models

SMALL = {"vocab_size": 600, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
KEYS = {"num_key_value_heads": 2}
MODELS = {
    "LlamaForCausalLM": SMALL | KEYS | {"intermediate_size": 96, "pad_token_id": 0},
    "GPT2LMHeadModel": {"vocab_size": 600, "n_embd": 64, "n_layer": 2, "n_head": 4},
    "MixtralForCausalLM": SMALL | KEYS | {"intermediate_size": 96, "num_local_experts": 4},
    "BertForMaskedLM": SMALL | {"intermediate_size": 96},
    "T5ForConditionalGeneration": {"vocab_size": 600, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2},
    "WhisperForConditionalGeneration": {
        "vocab_size": 600,
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "decoder_start_token_id": 1,
    },
    "ViTForImageClassification": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 4,
    },
    "MambaForCausalLM": {"vocab_size": 600, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
    "RwkvForCausalLM": {"vocab_size": 600, "hidden_size": 64, "num_hidden_layers": 2},
}


@pytest.mark.parametrize("name", MODELS)
def test_transformers_initialises_its_models_alike(name):
    kind = getattr(transformers, name)

    def build():
        return kind(kind.config_class(**MODELS[name]))

    torch.manual_seed(0)
    ordinary, model = build(), deferred(build)
    names = [name for name, _ in ordinary.named_parameters()]
    assert [name for name, p in model.named_parameters() if p.is_meta] == names
    for (key, buffer), (_, expected) in zip(model.named_buffers(), ordinary.named_buffers(), strict=True):
        assert torch.equal(buffer, expected), key
    found = numbers(model)
    for key, parameter in ordinary.named_parameters():
        assert_alike(found[key], parameter.detach(), key)


def assert_alike(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    assert (found.shape, found.dtype, found.stride()) == (expected.shape, expected.dtype, expected.stride())
    if torch.equal(found, expected):
        return
    assert expected.std() > 0, f"{name} is constant: {expected.flatten()[:3]}, found {found.flatten()[:3]}"
    noise = 4 / expected.numel() ** 0.5
    assert abs(found.std() / expected.std() - 1) < max(0.1, noise), name
    assert abs(found.mean() - expected.mean()) < 1.5 * noise * expected.std(), name
    rows = [(tensor == 0).reshape(len(tensor), -1).all(1) for tensor in (found, expected)]
    assert torch.equal(*rows), name


# -- what cannot be done


def refused(text: str):
    return pytest.raises(ConfigError, match=text)


@pytest.mark.parametrize(
    ("look", "what"),
    [
        (lambda w: w.sum().item(), "item"),
        (lambda w: bool((w > 0).any()), "item"),
        (lambda w: w.detach().numpy(), "numpy"),
        (lambda w: torch.equal(w, w * 2), "equal"),
        (lambda w: w[w > 0], "index"),
    ],
)
def test_code_that_looks_at_random_numbers_is_refused_by_name(look, what):
    with refused(f"^{what} asks for numbers of Linear.weight inside deferred_init"):
        deferred(lambda: look(nn.Linear(3, 3).weight))


@pytest.mark.parametrize(
    "look", [lambda w: bool((w > 0).all()), lambda w: (w > 2).nonzero(), torch.Tensor.tolist]
)
def test_a_parameter_whose_numbers_decided_something_before_it_was_one_is_refused(look):
    def drawn():
        made = torch.randn(30)
        look(made)
        return made

    model = deferred(lambda: Holder(drawn))
    with refused("^the initialisation of w looks at the random numbers that it has drawn"):
        numbers(model)


def test_numbers_that_are_no_ones_chance_are_computed():
    def build():
        layer = nn.LayerNorm(7)
        assert layer.weight.sum().item() == 7.0
        return layer

    deferred(build)


def test_writing_a_parameter_into_a_real_tensor_is_refused():
    with refused(r"^copy_ writes numbers of Linear.weight into another tensor, of shape \[3, 3\]"):
        deferred(lambda: torch.zeros(3, 3).copy_(nn.Linear(3, 3).weight))


def test_from_pretrained_is_refused_with_a_hint(tmp_path):
    config = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with refused("is being loaded inside deferred_init.*from_config"):
        deferred(lambda: transformers.GPT2LMHeadModel.from_pretrained(tmp_path))


def test_a_given_tensor_that_changed_afterwards_is_refused():
    table = torch.ones(4)
    model = deferred(lambda: Holder(lambda: table * 2))
    assert torch.equal(numbers(model)["w"], torch.full((4,), 2.0))
    table += 1
    with refused(r"^w is initialised from a tensor of shape \[4\] that was changed after deferred_init"):
        numbers(model)


def test_a_state_dict_that_is_loaded_inside_is_kept():
    expected = nn.Linear(4, 4)

    def build():
        model = nn.Linear(4, 4)
        model.load_state_dict(expected.state_dict())
        return model

    found = numbers(deferred(build))
    assert torch.equal(found["weight"], expected.weight)
    assert torch.equal(found["bias"], expected.bias)


def test_models_built_afterwards_or_after_an_error_are_ordinary():
    with pytest.raises(ZeroDivisionError), evenflow.deferred_init():
        raise ZeroDivisionError
    with evenflow.deferred_init():
        with evenflow.deferred_init():
            nn.Linear(2, 2)
        assert nn.Linear(2, 2).weight.is_meta
    assert not nn.Linear(2, 2).weight.is_meta
