"""Bad input to `pipeline` and `step`: each error says what is wrong, with the numbers and the remedy."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import evenflow
from evenflow.errors import ConfigError, RecordError
from unsplit import mean_square, mlp, regression, sgd


def make(model=None, **options):
    options = {"loss": mean_square, "example": regression(), "device": "cpu"} | options
    return evenflow.pipeline(mlp(4, 8, 8, 1) if model is None else model, **options)


def refused(text: str, kind=ConfigError):
    return pytest.raises(kind, match=f"^{re.escape(text)}")


# -- sizes


def test_more_stages_than_nodes():
    with refused(
        "9 stages need 8 cuts, but the recorded program has 6 nodes and 5 places to cut; "
        "ask for at most 6 stages"
    ):
        make(stages=9, max_leaf_share=0.0)


def test_more_stages_than_one_whole_module_holds(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 1))
    model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ConfigError, match="5 stages need 4 cuts") as caught:
        make(model, stages=5)
    (note,) = caught.value.__notes__
    assert note.startswith("0 was not taken apart: it carries hooks: put them on a module inside it")


def test_an_empty_batch():
    with refused("the batch has no rows"):
        make(example=regression(0))


def test_tensors_that_disagree_in_dim_0():
    with refused(
        "the batch's tensors disagree in dim 0, along which it is split: ['x'] has 8, ['y'] has 6; "
        "give split_batch=, or pass evenflow.Microbatches([…])"
    ):
        make(example={"x": torch.zeros(8, 4), "y": torch.zeros(6, 1)})


@pytest.mark.parametrize("batch", [{}, {"x": 3}, {"x": torch.tensor(3.0)}])
def test_nothing_to_split(batch):
    with refused("the batch holds no tensor with a dimension to split; give split_batch="):
        make(example=batch)


def test_no_microbatch_at_all():
    with refused("the batch was split into no microbatch at all"):
        make(split_batch=lambda _: [])


def test_two_sizes():
    with refused("num_microbatches and microbatch_size say the same thing twice; give one of them"):
        make(num_microbatches=2, microbatch_size=4)


@pytest.mark.parametrize("name", ["num_microbatches", "microbatch_size"])
def test_a_size_of_nothing(name):
    with refused(f"{name}=0 must be at least 1"):
        make(**{name: 0})


def test_no_stages():
    with refused("stages=0 must be at least 1"):
        make(stages=0)


def test_something_in_the_batch_that_is_no_plain_value():
    with refused(
        "the batch holds a SimpleNamespace; a batch is a tree of tensors, numbers, strings and None"
    ):
        make(example=regression() | {"extra": SimpleNamespace()})


# -- names


def test_an_unknown_split_name():
    model = nn.ModuleDict({"encoder": mlp(4, 4), "decoder": mlp(4, 1)})
    with refused(
        "split= names 'decodr', which is no module of the model; nearest are 'decoder', "
        "'decoder.0', 'encoder'"
    ):
        make(
            model, loss=lambda m, b: mean_square(lambda x: m["decoder"](m["encoder"](x)), b), split=["decodr"]
        )


def test_a_split_name_that_nothing_resembles():
    with refused("split= names '?', which is no module of the model; nearest are '0', '1', '2'"):
        make(split=["?"])


def test_another_number_of_stages_than_the_split_makes():
    with refused("split= names 2 cuts, which makes 3 stages, but stages=2"):
        make(split=["2", "4"], stages=2)


def test_a_split_that_leaves_a_stage_empty():
    with refused("split= names '0', which leaves nothing for the first stage; name modules in the order"):
        make(split=["0"])
    with refused("split= names '2', which leaves nothing for the cut before '4'; name modules in the order"):
        make(split=["4", "2"])


def test_a_split_before_something_that_does_not_run():
    model = nn.Sequential(*mlp(4, 8, 1), nn.Identity())
    model.unused = nn.Linear(2, 2)
    with refused("split= names 'unused', but the recorded program runs nothing of it on a stage"):
        make(model, loss=lambda m, b: mean_square(lambda x: m[2](m[1](m[0](x))), b), split=["unused"])


def test_an_unknown_link():
    with pytest.raises(ConfigError, match="link='gloo' is none of 'auto', 'shared-memory', 'torch'"):
        make(link="gloo")


def test_an_unknown_schedule():
    with refused("no schedule '1f1'; did you mean '1f1b'?\nThere are: sequential, gpipe, 1f1b"):
        make(schedule="1f1")


# -- the machine


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda")])
def test_no_cuda(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with refused(
        f"device={str(device)!r} was asked for, but torch {torch.__version__} finds no CUDA device; "
        "use device='cpu', or install a CUDA build of torch"
    ):
        make(device=device)


def test_another_device():
    with refused("device='meta' is not supported; use 'cpu' or 'cuda'"):
        make(device="meta")


# -- the loss


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (
            lambda m, b: (m(b["x"]) - b["y"]) ** 2,
            "the loss function returned a tensor float32[2, 1], not a scalar; reduce it, for example with .m",
        ),
        (
            lambda m, b: None,
            "the loss function returned nothing; it must return a scalar tensor, or (scalar tensor, metrics)",
        ),
        (lambda m, b: 0.5, "the loss function returned a float; it must return a scalar tensor"),
        (lambda m, b: {"loss": mean_square(m, b)}, "the loss function returned a dict; it must return"),
        (
            lambda m, b: (m(b["x"]) > 0).sum(),
            "the loss function returned a tensor int64[], which has no gradient; return a floating one",
        ),
        (
            lambda m, b: mean_square(m, b).detach(),
            "the loss does not depend on any trainable parameter (computed under no_grad, or detached?)",
        ),
        (lambda m, b: b["y"].mean(), "the loss does not depend on any trainable parameter"),
    ],
)
def test_what_is_no_loss(loss, text):
    with refused(text):
        make(loss=loss)


def test_a_model_without_a_loss_of_its_own():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, x, y):
            return self.layer(x)

    with refused("Plain returned Tensor without a loss; put labels into the batch, or give loss="):
        make(Plain(), loss=None)


def test_a_batch_that_is_no_mapping_without_a_loss_function():
    with refused("without loss=, a batch must be a mapping of the model's arguments; give loss="):
        make(loss=None, example=torch.zeros(4, 4))


# -- the model


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_model_in_ddp(group):
    with refused("the model is wrapped: remove the line DistributedDataParallel(…) and pass the bare module"):
        make(DistributedDataParallel(mlp(4, 1)))


def test_a_model_in_data_parallel():
    with refused("the model is wrapped: remove the line DataParallel(…) and pass the bare module"):
        make(nn.DataParallel(mlp(4, 1)))


def test_a_part_of_a_model_in_ddp(group):
    with refused("the model's module 1 is wrapped: remove the line DistributedDataParallel(…)"):
        make(nn.Sequential(nn.Linear(4, 4), DistributedDataParallel(nn.Linear(4, 1))))


def test_a_sharded_model(group):
    model = mlp(4, 8, 1)
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
    with refused("the model was sharded: remove the line fully_shard(…) and pass the bare module"):
        make(model)


def test_a_compiled_model():
    with refused("the model was compiled: remove the line torch.compile(…) and pass the bare module"):
        make(torch.compile(mlp(4, 1), backend="eager"))


def test_a_model_spread_by_device_map():
    model = mlp(4, 1)
    model.hf_device_map = {"": "cpu"}
    with refused("the model was spread by device_map=; remove that argument of from_pretrained"):
        make(model)


def test_a_model_without_memory():
    with refused(
        "parameters without memory (device 'meta') that nothing says how to initialise: 0.weight, 0.bias, "
        "2.weight, 2.bias, 4.weight and 1 more; build the model, and convert it (.to(...)), inside "
        "evenflow.deferred_init()"
    ):
        make(mlp(4, 8, 8, 1).to("meta"))


def test_nothing_to_train():
    with refused("no parameter of the model requires a gradient: there is nothing to train"):
        make(mlp(4, 1).requires_grad_(False))


def test_a_scheduler_without_an_optimizer():
    with refused("scheduler= needs optimizer=: it is called with the optimizer that it steers"):
        make(scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1))


def test_a_module_with_parameters_outside_the_model():
    judge = nn.Linear(1, 1)
    with refused(
        "Linear is called by the loss function but is not part of the model; "
        "put both into one nn.ModuleDict and pass that as the model",
        RecordError,
    ):
        make(loss=lambda m, b: judge(m(b["x"])).mean())


# -- nothing half done


def test_a_refused_batch_changes_nothing():
    model = mlp(4, 8, 8, 1)
    pipe = make(model, optimizer=sgd, stages=2, num_microbatches=2)
    pipe.step(regression())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = dict(pipe.named_gradients())
    with refused("the batch has no rows"):
        pipe.step(regression(0))
    with pytest.raises(RuntimeError):  # torch's own, from recording
        pipe.step({"x": torch.zeros(8, 5), "y": torch.zeros(8, 1)})
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all(torch.equal(gradients[name], g) for name, g in pipe.named_gradients())
    pipe.step(regression())


def test_no_timeline_before_the_first_step():
    with refused("no step has run yet: there is nothing to show"):
        make().timelines()


def test_an_error_of_the_model_says_where_it_was_recorded():
    with pytest.raises(RuntimeError, match=r"\[2, 5\] X \[4, 8\]") as caught:
        make(example={"x": torch.zeros(8, 5), "y": torch.zeros(8, 1)})
    assert caught.value.__notes__ == ["evenflow: while recording 0"]
