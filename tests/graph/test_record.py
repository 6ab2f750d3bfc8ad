"""The recorder: what the call tree, the leaves and the graph say of a program."""

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from evenflow.errors import ConfigError, RecordError
from evenflow.graph.kernels.fakes import FakeParameters
from evenflow.graph.kernels.settings import Under
from evenflow.graph.leaves.leaves import flatten
from evenflow.graph.nouns.graph import FunctionTarget, Graph, ModuleTarget
from evenflow.graph.nouns.tree import BatchLeaf, BufferSource, CallTree, ParameterSource, modules_in
from evenflow.graph.recording.record import record
from unsplit import mean_square, mlp, regression

CPU = torch.device("cpu")
WIDTH = 4


def tree_of(model: nn.Module, program=mean_square, batch=None) -> CallTree:
    fakes = FakeParameters(model, CPU)
    return record(program, model, regression(4) if batch is None else batch, device=CPU, fakes=fakes)


def graph_of(
    model: nn.Module, program=mean_square, batch=None, *, max_share: float = 0.0, **options
) -> Graph:
    return flatten(tree_of(model, program, batch), max_share=max_share, **options)


def names(graph: Graph) -> list[str]:
    return [node.name for node in graph.nodes]


def chain(graph: Graph) -> list[str]:
    return [node.name for node in graph.chain]


def output(graph: Graph) -> int:
    (value,) = graph.output.refs
    return value


# -- what is written down


def test_nodes_stand_in_program_order_with_their_parameters():
    graph = graph_of(mlp(4, 8, 1))
    assert names(graph) == ["0", "1", "2", "mse_loss"]
    assert [node.index for node in graph.nodes] == [0, 1, 2, 3]
    assert graph.nodes[0].parameters == ("0.weight", "0.bias")
    assert graph.nodes[1].parameters == ()
    assert isinstance(graph.nodes[0].target, ModuleTarget)
    assert isinstance(graph.nodes[3].target, FunctionTarget)
    assert graph.maker[output(graph)] is graph.nodes[3]


def test_values_know_shape_stride_type_and_source():
    graph = graph_of(mlp(4, 8, 1))
    sources = {type(value.source) for value in graph.values}
    assert {BatchLeaf, ParameterSource} <= sources
    x = next(value for value in graph.values if value.source == BatchLeaf(0))
    assert (x.info.shape, x.info.stride, x.info.dtype, x.info.requires_grad) == (
        (4, 4),
        (4, 1),
        torch.float32,
        False,
    )
    weight = next(value for value in graph.values if value.source == ParameterSource("0.weight"))
    assert weight.info.requires_grad
    assert str(weight.info) == "float32[8, 4]"


def test_flops_are_those_of_the_matrix_products():
    graph = graph_of(mlp(4, 8, 1))
    assert [node.flops for node in graph.nodes] == [2 * 4 * 4 * 8, 0, 2 * 4 * 8 * 1, 0]


def test_parameters_are_never_allocated_nor_read():
    """Recording works on shapes alone: a model that could not fit may be recorded from stand-ins."""
    model = mlp(4, 8, 1).to("meta")
    assert names(graph_of(model)) == ["0", "1", "2", "mse_loss"]


def test_the_mask_of_an_attention_is_never_allocated():
    """Heads of values that are narrower than those of queries have no kernel of their own on a CPU."""
    length = 2048

    def program(model, batch):
        query, key, value = (part[:, None] for part in model(batch).split([8, 8, 4], -1))
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).mean()

    def allocated(program, model):
        with torch.profiler.profile(profile_memory=True) as profiler:
            program(model, torch.ones(1, length, WIDTH))
        return sum(max(0, event.self_cpu_memory_usage) for event in profiler.events())

    model = nn.Linear(WIDTH, 20)
    graph = graph_of(model, program, torch.ones(1, length, WIDTH))
    assert sum(node.flops for node in graph.nodes) == 2 * length * (length * (8 + 4) + WIDTH * 20)
    assert allocated(program, model) > length**2
    assert allocated(lambda model, batch: graph_of(model, program, batch), model) < length**2


def test_the_program_runs_once():
    calls = []

    def program(model, batch):
        calls.append(torch.is_grad_enabled())
        return mean_square(model, batch)

    graph_of(mlp(4, 1), program)
    assert calls == [True]


def test_the_batch_is_real_and_a_copy():
    batch = regression(4)
    seen = []

    def program(model, items):
        seen.append(items["x"].tolist())
        items["x"].add_(1)
        return mean_square(model, items)

    before = batch["x"].clone()
    graph_of(mlp(4, 1), program, batch)
    assert seen == [before.tolist()]
    assert torch.equal(batch["x"], before)


def test_buffers_are_put_back():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    buffers = dict(model.named_buffers())
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    graph = graph_of(model)
    assert all(dict(model.named_buffers())[name] is buffer for name, buffer in buffers.items())
    assert all(torch.equal(buffers[name], tensor) for name, tensor in before.items())
    (norm,) = (node for node in graph.nodes if node.name == "1")
    assert set(norm.changed_buffers) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_tied_parameters_have_one_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1))
    model[1].weight = model[0].weight
    graph = graph_of(model)
    assert graph.nodes[1].parameters == ("0.weight", "1.bias")


def test_two_parameters_in_one_memory_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1))
    model[1].weight = nn.Parameter(model[0].weight.detach())
    with pytest.raises(ConfigError, match=r"1\.weight and 0\.weight are two parameters in one memory"):
        FakeParameters(model, CPU)


def test_changes_in_place_make_new_versions():
    def program(model, batch):
        h = model(batch["x"]) * 1.0
        view = h[0]
        h.add_(1.0)
        return view.sum() + h.sum()

    graph = graph_of(nn.Linear(4, 1), program)
    (added,) = (node for node in graph.nodes if node.name == "add_")
    assert len(added.rebinds) == 2, "the tensor and its view"
    old, new = zip(*added.rebinds, strict=True)
    assert not set(old) & set(new)
    sums = [node.args.refs[0] for node in graph.nodes if node.name == "sum"]
    assert set(sums) == set(new), "what follows uses the new versions"


def test_a_read_of_the_batch_becomes_a_guard():
    def program(model, batch):
        return mean_square(model, batch) * (2 if (batch["x"] > 0).all() else 3)

    graph = graph_of(mlp(4, 1), program)
    (guard,) = graph.guards
    assert guard.result is False
    assert guard.name == "the loss function: __bool__"


# -- glue


def test_what_depends_on_the_batch_alone_is_glue():
    def program(model, batch):
        mask = (batch["x"] > 0).float()
        positions = torch.arange(4)[:, None]
        h = model(batch["x"])
        return (h * mask + positions).mean()

    graph = graph_of(nn.Linear(4, 1), program)
    assert {node.name for node in graph.nodes if node.glue} == {"gt", "float", "arange", "__getitem__"}
    assert "mul" in chain(graph)


def test_random_and_stateful_functions_are_no_glue():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 1)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            noise = torch.rand(1)
            return self.layer(x) + noise + self.calls * 2

    assert {"rand", "add_"} <= {name.rpartition(":")[2] for name in chain(graph_of(Model()))}


def test_functions_without_use_are_dropped():
    def program(model, batch):
        h = model(batch["x"])
        h.exp()
        _ = batch["x"] * 2
        return h.mean()

    assert names(graph_of(nn.Linear(4, 1), program)) == ["the model", "mean"]


# -- leaves


class Block(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.a = nn.Linear(width, width)
        self.b = nn.Linear(width, width)

    def forward(self, x):
        return x + self.b(self.a(x).relu())


def blocks(num: int) -> nn.Sequential:
    return nn.Sequential(*(Block() for _ in range(num)), nn.Linear(WIDTH, 1))


def test_a_large_share_keeps_blocks_whole_and_a_small_one_does_not():
    assert names(graph_of(blocks(4), max_share=0.5)) == ["0", "1", "2", "3", "4", "mse_loss"]
    assert names(graph_of(blocks(2), max_share=0.0))[:4] == ["0.a", "0:relu", "0.b", "0:add"]


@pytest.mark.parametrize("max_share", [0.0, 0.1, 0.2, 0.5, 1.0])
def test_no_node_is_heavier_than_its_share_unless_it_must_be(max_share):
    graph = graph_of(blocks(4), max_share=max_share)
    total = sum(node.flops for node in graph.nodes)
    for node in graph.nodes:
        assert node.flops <= max_share * total or node.name.endswith((".a", ".b", "4"))


def test_the_flops_do_not_depend_on_the_leaves():
    totals = {sum(n.flops for n in graph_of(blocks(3), max_share=s).nodes) for s in (0.0, 0.1, 0.3, 1.0)}
    assert len(totals) == 1


def test_atomic_modules_are_not_taken_apart():
    model = blocks(2)
    found = names(
        graph_of(model, is_atomic=lambda path: isinstance(model.get_submodule(path), Block), max_share=0.0)
    )
    assert found == ["0", "1", "2", "mse_loss"]


def test_opened_modules_are():
    assert "1.a" in names(graph_of(blocks(4), opened=["1.b"], max_share=0.5))


def test_exact_parts_the_uses_of_a_shared_parameter():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Block()
            self.inner.b = self.inner.a

        def forward(self, x):
            return self.inner(x).mean(1, keepdim=True)

    uses = [n for n in graph_of(nn.Sequential(Shared()), max_share=1.0, exact=True).nodes if n.parameters]
    assert [node.parameters for node in uses] == [("0.inner.a.weight", "0.inner.a.bias")] * 2


@pytest.mark.parametrize("kind", ["forward hook", "pre-hook", "backward hook"])
def test_modules_with_hooks_stay_whole(kind):
    model = blocks(2)
    match kind:
        case "forward hook":
            model[0].register_forward_hook(lambda *_: None)
        case "pre-hook":
            model[0].register_forward_pre_hook(lambda *_: None)
        case _:
            model[0].register_full_backward_hook(lambda *_: None)
    graph = graph_of(model)
    assert names(graph)[0] == "0"
    assert graph.nodes[0].whole.startswith("it carries hooks: put them on")
    assert "1.a" in names(graph)


def test_modules_that_change_themselves_stay_whole():
    class Counting(Block):
        def forward(self, x):
            self.num_calls = getattr(self, "num_calls", 0) + 1
            return super().forward(x)

    graph = graph_of(nn.Sequential(Counting(), Block(), nn.Linear(WIDTH, 1)))
    assert names(graph)[0] == "0"
    assert graph.nodes[0].whole == "it changes its own attributes while it runs: num_calls"


def test_a_value_kept_on_a_module_takes_its_reader_and_writer_apart():
    class Writer(Block):
        def forward(self, x):
            self.notes["kept"] = h = super().forward(x)
            return h * 2

    class Reader(Block):
        def forward(self, x):
            return super().forward(x) + self.notes["kept"]

    writer, reader = Writer(), Reader()
    writer.notes = reader.notes = {}
    graph = graph_of(nn.Sequential(writer, reader, Block(), nn.Linear(WIDTH, 1)), max_share=0.5)
    assert "2" in names(graph), "it is small enough to stay whole"
    assert "0:mul" in names(graph)
    assert "1:add" in names(graph)


class KeepingWriter(Block):
    def forward(self, x):
        self.kept = super().forward(x)
        return x * 2


def test_a_value_that_is_hidden_keeps_all_whole_that_it_goes_through():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.writer, self.last = KeepingWriter(), nn.Linear(WIDTH, 1)

        def forward(self, x):
            return self.last(self.writer(x) + self.writer.kept)

    assert names(graph_of(Model())) == ["the model", "mse_loss"]


def test_a_hidden_value_that_reaches_the_loss_function_is_refused():
    def program(model, batch):
        return model(batch["x"]).mean() + model.kept.mean()

    with pytest.raises(RecordError) as caught:
        graph_of(KeepingWriter(), program)
    assert str(caught.value) == (
        "the model cannot be taken apart (it changes its own attributes while it runs: kept), nor can it "
        "stay whole (mean uses a tensor float32[4, 4] made inside it that is not in its result); move one of "
        "the two into a module of its own"
    )


# -- the tree


def test_the_tree_holds_every_call_with_its_place():
    tree = tree_of(blocks(2))
    calls = list(modules_in(tree.root))
    assert [call.path for call in calls] == ["", "", "0", "0.a", "0.b", "1", "1.a", "1.b", "2"]
    assert all(call.start <= call.end for call in calls)


def test_calls_of_one_module_are_counted():
    def program(model, batch):
        return mean_square(lambda x: model[2](model[0](model[0](x))), batch)

    calls = [call for call in modules_in(tree_of(blocks(2), program).root) if call.path == "0"]
    assert [call.call for call in calls] == [0, 1]


def test_buffers_and_tensor_attributes_are_found_by_name():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 1)
            self.register_buffer("scale", torch.ones(4))
            self.shift = torch.ones(4)

        def forward(self, x):
            return self.layer(x * self.scale + self.shift)

    sources = {value.source for value in graph_of(Model()).values if isinstance(value.source, BufferSource)}
    assert sources == {BufferSource("scale"), BufferSource("shift")}


@pytest.mark.parametrize("num_draws", [0, 1, 2])
def test_draws_are_counted_by_module(num_draws):
    def program(model, batch):
        h = model(batch["x"])
        for _ in range(num_draws):
            h = F.dropout(h, 0.5)
        return h.mean()

    graph = graph_of(nn.Sequential(nn.Linear(4, 1), nn.Dropout(0.5)), program)
    firsts = [n.target.draws.first for n in graph.nodes if n.name == "dropout"]
    assert firsts == list(range(num_draws))
    (module,) = (n.target for n in graph.nodes if n.name == "1")
    assert [(d.path, d.call, d.count) for d in module.draws] == [("1", 0, 1)]
    assert module.keyed_at_entry


def test_dropout_that_is_off_draws_nothing():
    graph = graph_of(nn.Sequential(nn.Linear(4, 1), nn.Dropout(0.5)).eval())
    assert all(not node.target.draws for node in graph.nodes)


def test_a_change_of_a_batch_tensor_that_overlaps_another_is_refused():
    rows = torch.ones(4, 6)
    model = torch.nn.Linear(5, 1)

    def changing(model, batch):
        batch["x"].add_(1)
        return (model(batch["x"]) - batch["y"]).mean()

    def looking(model, batch):
        return (model(batch["x"].view(-1, 5)) - batch["y"]).mean()

    for program, overlapping in ((changing, False), (looking, True)):
        batch = {"x": rows[:, :-1], "y": rows[:, 1:] if overlapping else torch.ones(4, 5)}
        record(program, model, batch, device=CPU, fakes=FakeParameters(model, CPU))
    batch = {"x": rows[:, :-1], "y": rows[:, 1:]}
    with pytest.raises(RecordError, match="shares its memory with another one; clone one of them"):
        record(changing, model, batch, device=CPU, fakes=FakeParameters(model, CPU))


class Named(torch.Tensor):
    """A class of tensors that a user made."""


@pytest.mark.parametrize(
    ("program", "told"),
    [
        (
            lambda model, batch: model(batch["x"]).as_subclass(Named).mean(),
            "loss function calls as_subclass on a",
        ),
        (
            lambda model, batch: nn.functional.mse_loss(model(batch["x"]), batch["y"].as_subclass(Named)),
            "loss function calls mse_loss on a",
        ),
    ],
)
def test_subclasses_of_tensor_that_meet_parameters_are_refused(program, told):
    with pytest.raises(RecordError, match=f"{told} Named, a subclass of Tensor"):
        tree_of(mlp(WIDTH, WIDTH, 1), program)


# -- what goes on beside it


def test_other_threads_call_modules_of_their_own_meanwhile():
    other, found = nn.Linear(2, 2), []

    def calls_a_thread(model, batch):
        thread = threading.Thread(target=lambda: found.append(other(torch.ones(2))))
        thread.start()
        thread.join()
        return mean_square(model, batch)

    assert names(graph_of(mlp(4, 8, 1), calls_a_thread)) == ["0", "1", "2", "mse_loss"]
    assert len(found) == 1


def test_recordings_in_two_threads_leave_torch_as_it_was():
    own = nn.Module.__call__, nn.Module._apply, nn.Module.__setattr__, torch.autograd.Function.apply
    meeting, graphs = threading.Barrier(2, timeout=30), []

    def record_one():
        meeting.wait()
        graphs.append(graph_of(mlp(4, 8, 1)))

    threads = [threading.Thread(target=record_one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(graph.nodes) for graph in graphs] == [4, 4]
    assert own == (
        *(nn.Module.__call__, nn.Module._apply, nn.Module.__setattr__),
        torch.autograd.Function.apply,
    )


def test_the_precision_of_a_matmul_is_set_again():
    class Hasty(nn.Linear):
        def forward(self, x):
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("high")
            made = F.linear(x, self.weight, self.bias)
            torch.set_float32_matmul_precision(before)
            return made

    graph = graph_of(nn.Sequential(Hasty(4, 4), nn.Linear(4, 1)))
    told = [
        node.target.function.settings
        for node in graph.nodes
        if isinstance(node.target, FunctionTarget) and isinstance(node.target.function, Under)
    ]
    assert told == [{"the precision of matmuls": "high"}]
    assert torch.get_float32_matmul_precision() == "highest"
