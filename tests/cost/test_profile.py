"""The profiler: what it measures of real nodes, and what it measures once."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from evenflow.cost.cache import Cache, Place
from evenflow.cost.measured import Kept, Measured
from evenflow.cost.profile import profile_of
from evenflow.pipe.building.recorded import recorded
from evenflow.pipe.given.splitter import Splitter

CPU = torch.device("cpu")
ROWS, WIDTH = 4, 64
SIZE = ROWS * WIDTH * 4  # bytes of an activation
MANY_ROWS = {"x": torch.ones(4096, WIDTH)}  # for what must take longer than nothing


def mean_square(model, batch):
    return model(batch["x"]).square().mean()


def record(model, loss=mean_square, batch=None, share=0.0, device=CPU, atomic=()):
    return recorded(
        model,
        loss=loss,
        example={"x": torch.randn(ROWS, WIDTH)} if batch is None else batch,
        splitter=Splitter(1, 1, None, None),
        max_leaf_share=share,
        device=device,
        atomic=atomic,
    )


def measured(model, device=CPU, **others):
    return profile_of(record(model, device=device, **others), budget_seconds=0.0)


def held_by(chain, held, name):
    at = chain.names.index(name)
    return sorted(one.num_bytes for one in held if at in one.nodes)


def seconds(chain):
    (found,) = chain.seconds.values()
    return found


def test_a_linear_layer_saves_its_input_and_a_relu_its_output():
    chain = measured(
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.ReLU())
    ).chain
    assert chain.names == ("0", "1", "2", "3", "square", "mean")
    assert held_by(chain, chain.saved, "0") == [SIZE]  # the batch
    # tanh saves its result, which is what the next layer saves: one memory
    assert [one.nodes for one in chain.saved if set(one.nodes) & {1, 2}] == [(1, 2)]
    assert [one.nodes for one in chain.saved if set(one.nodes) & {3, 4}] == [(3, 4)]
    assert sum(one.num_bytes for one in chain.saved) == 3 * SIZE


def test_what_is_saved_is_what_autograd_says_that_it_saves():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.GELU(), nn.Linear(WIDTH, 8))
    batch = {"x": torch.randn(ROWS, WIDTH)}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mean_square(model, batch)
    chain = measured(model, batch=batch).chain
    assert sum(one.num_bytes for one in chain.saved) == sum(size for size, _ in seen.values())


def test_memory_that_passes_is_what_is_allocated_beyond_what_is_kept():
    class Twice(nn.Module):
        def forward(self, x):
            return (x + 1.0 + 2.0).exp()  # x + 1 is gone when exp makes its result, which is kept

    chain = measured(nn.Sequential(nn.Linear(WIDTH, WIDTH), Twice()), atomic=(Twice,)).chain
    assert held_by(chain, chain.saved, "1") == [SIZE]
    # Its input, which nobody keeps, and twice two at once, of which one is kept in the end.
    assert chain.forward_transient_bytes[1] == SIZE + 2 * SIZE - SIZE


def test_buffers_that_are_kept_for_the_backward_are_not_counted():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)
            self.register_buffer("scale", torch.ones(2 * WIDTH))

        def forward(self, x):
            return self.layer(x) * self.scale[:WIDTH]

    chain = measured(Scaled()).chain
    assert chain.names[1] == "mul"
    assert [one.nodes for one in chain.saved if 1 in one.nodes] == []


def test_equal_layers_are_measured_once():
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(4)]
    found = measured(nn.Sequential(*layers))
    assert found.alike == (0, 1, 1, 1, 4, 5)  # the first has no gradient to give
    assert found.num_measured == 4


def test_an_attribute_that_only_numbers_the_layer_makes_no_difference():
    class Layer(nn.Module):
        def __init__(self, number, power):
            super().__init__()
            self.number, self.power = number, power

        def forward(self, x):
            return torch.tanh(x) ** self.power

    def alike(powers):
        layers = [nn.Linear(WIDTH, WIDTH), *(Layer(1 + at, power) for at, power in enumerate(powers))]
        found = profile_of(record(nn.Sequential(*layers), share=0.9), budget_seconds=0.0)
        return found.alike[1:3]

    assert alike([3.0, 3.0]) == (1, 1)
    assert alike([3.0, 2.0]) == (1, 2)


def test_a_frozen_layer_has_no_weight_gradient_and_keeps_nothing_for_one():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    model[1].requires_grad_(False)
    found = measured(model, batch=MANY_ROWS)
    chain = found.chain
    assert seconds(chain).weight_grad[1] == 0.0
    assert seconds(chain).input_grad[1] > 0.0
    assert held_by(chain, chain.saved, "1") == []
    assert [one.trains for one in chain.parameters] == [True, True, False, False, True, True]
    assert seconds(chain).input_grad[0] == 0.0  # nothing before it wants a gradient
    assert seconds(chain).weight_grad[0] > 0.0
    assert found.alike[2] == 2  # not as the frozen one


def test_nodes_without_gradients_have_no_backward_and_keep_nothing():
    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            with torch.no_grad():
                x = self.frozen(x)
            return self.head(x)

    chain = measured(Apart(), batch=MANY_ROWS).chain
    at = chain.names.index("frozen")
    assert seconds(chain).input_grad[at] == seconds(chain).weight_grad[at] == 0.0
    assert seconds(chain).forward[at] > 0.0
    assert held_by(chain, chain.saved, "frozen") == []


def test_under_autocast_what_is_saved_is_half_as_large():
    def loss(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(batch["x"]).float().square().mean()

    chain = measured(
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)), loss=loss
    ).chain
    weight = WIDTH * WIDTH * 2
    # what tanh makes, and the weight's copy of the lower precision
    assert held_by(chain, chain.saved, "2") == [SIZE / 2, weight]


def test_a_checkpoint_keeps_what_it_was_given_and_computes_again():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.start, self.block = nn.Linear(WIDTH, WIDTH), Block()

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.block, self.start(x), use_reentrant=False)

    chain = measured(Model()).chain
    first = chain.names.index("block.first")
    inside = range(first, first + 3)
    assert [one for one in chain.saved if set(one.nodes) & set(inside)] == [
        one for one in chain.saved if one.nodes == (first,) and one.num_bytes == SIZE
    ]
    # What the three keep while they are computed again, two results and one more, beside their gradients.
    assert all(chain.backward_transient_bytes[at] >= 3 * SIZE for at in inside)


def test_a_model_without_memory_is_profiled_and_stays_without():
    import evenflow

    with evenflow.deferred_init():
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH))
    without = []
    chain = profile_of(
        record(model),
        budget_seconds=0.0,
        progress=lambda *_: without.append(all(p.is_meta for p in model.parameters())),
    ).chain
    assert without == [True] * 5  # between two nodes there is none in memory
    assert all(parameter.is_meta for parameter in model.parameters())
    assert chain.num_nodes == 5
    assert sum(one.num_bytes for one in chain.parameters) == 4 * sum(p.numel() for p in model.parameters())


def test_model_buffers_and_generator_are_left_as_they_were():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.5))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found, state = record(model), torch.get_rng_state()
    profile_of(found, budget_seconds=0.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model[2]._forward_pre_hooks


def test_indexes_that_a_node_makes_are_real_ones():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.table = nn.Linear(WIDTH, 5), nn.Embedding(5, WIDTH)

        def forward(self, x):
            return self.table(self.router(x).argmax(-1)) + x

    found = record(Routed(), batch=MANY_ROWS)
    values = found.graph.values
    table = next(node for node in found.graph.chain if node.name == "table")
    assert values[table.inputs[0]].info.dtype is torch.int64
    assert (
        seconds(profile_of(found, budget_seconds=0.0).chain).weight_grad[found.graph.chain.index(table)] > 0
    )


def test_boundaries_are_the_graphs_own():
    chain = measured(nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH))).chain
    assert chain.cut_bytes == (0, 2 * SIZE, 2 * SIZE, SIZE, SIZE)
    assert chain.legal == (True,) * 5
    assert chain.flops[0] == 2 * ROWS * WIDTH * 2 * WIDTH


# -- the cache


def test_with_a_full_cache_nothing_is_measured(tmp_path):
    found = record(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)))
    first = profile_of(found, cache=tmp_path, budget_seconds=0.0)
    told = []
    second = profile_of(
        found, cache=tmp_path, budget_seconds=0.0, progress=lambda *told_now: told.append(told_now)
    )
    assert first.num_measured == 4
    assert second.num_measured == 0
    assert told == []
    assert second.chain == first.chain


def test_another_model_with_the_same_layers_finds_them(tmp_path):
    profile_of(
        record(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))),
        cache=tmp_path,
        budget_seconds=0.0,
    )
    longer = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(5)))
    assert profile_of(record(longer), cache=tmp_path, budget_seconds=0.0).num_measured == 0
    wider = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH))
    assert profile_of(record(wider), cache=tmp_path, budget_seconds=0.0).num_measured == 3


def test_a_broken_file_is_made_again(tmp_path):
    found = record(nn.Sequential(nn.Linear(WIDTH, WIDTH)))
    profile_of(found, cache=tmp_path, budget_seconds=0.0)
    broken = min(tmp_path.rglob("*.json"))
    broken.write_text("{")
    assert profile_of(found, cache=tmp_path, budget_seconds=0.0).num_measured == 1
    assert json.loads(broken.read_text())["measured"]["forward_seconds"] >= 0
    assert profile_of(found, cache=tmp_path, budget_seconds=0.0).num_measured == 0


MEASURED = Measured(1.0, 2.0, 1.5, 0.5, Kept((0,), (0,), 8), Kept((), (), 0), (16,), 32, 64)


@pytest.fixture
def kept(tmp_path):
    """A cache that holds one measurement, and its file."""
    cache = Cache(tmp_path, Place("cpu", "2", 1))
    cache.keep("sign", "a node", MEASURED)
    assert cache.find("sign") == MEASURED
    return cache, min(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"measured": 1}', '{"measured": {"forward_seconds": 1}}']
)
def test_a_file_that_holds_something_else_counts_as_none(kept, text):
    cache, file = kept
    file.write_text(text)
    assert cache.find("sign") is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("result_bytes", "many"),
        ("result_bytes", 1),
        ("result_bytes", [None]),
        ("forward_seconds", [1.0]),
        ("forward_seconds", -1.0),
        ("forward_seconds", True),
        ("saved", {"inputs": [0], "results": [0]}),
    ],
)
def test_a_number_that_is_none_counts_as_broken(kept, name, value):
    cache, file = kept
    held = json.loads(file.read_text())
    held["measured"][name] = value
    file.write_text(json.dumps(held))
    assert cache.find("sign") is None


def test_progress_names_each_node_that_is_measured():
    told = []
    profile_of(
        record(nn.Sequential(nn.Linear(WIDTH, WIDTH))),
        budget_seconds=0.0,
        progress=lambda *told_now: told.append(told_now),
    )
    assert told == [("0", 0, 3), ("square", 1, 3), ("mean", 2, 3)]


# -- against the pipeline itself


def test_what_a_stage_of_a_pipeline_keeps_is_what_its_nodes_save():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256), nn.Linear(256, WIDTH)

        def forward(self, x):
            return x + self.down(F.gelu(self.up(self.norm(x))))

    chain = measured(nn.Sequential(Block(), Block(), nn.Linear(WIDTH, WIDTH))).chain
    block = 2 * SIZE + 2 * ROWS * 4 + 2 * ROWS * 256 * 4  # norm: input, mean, deviation; its result; up, gelu
    last = 2 * SIZE  # the head's input, and the square's
    # Of the two blocks the first is given the batch, the second what the first made.
    assert sum(one.num_bytes for one in chain.saved) == 2 * block + last


def test_what_the_input_gradient_leaves_is_what_a_weight_s_takes():
    chain = measured(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sigmoid(), nn.Tanh(), nn.Sigmoid())).chain
    assert held_by(chain, chain.kept, "0") == [SIZE, SIZE]  # its input, and the gradient of its result
    assert not [one.nodes for one in chain.kept if set(one.nodes) & {1, 2, 3}]


@pytest.mark.gpu
def test_on_a_gpu_the_same_is_saved_as_on_the_cpu():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    cpu, cuda = (measured(model, device=torch.device(kind)).chain for kind in ("cpu", "cuda"))
    assert cuda.saved == cpu.saved
    assert all(time > 0 for time in seconds(cuda).forward)
    assert all(parameter.device == CPU for parameter in model.parameters())
