"""Meshes: pipelines beside data, tensor and sharded ranks train as one process does."""

import math
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

import evenflow
from evenflow.errors import ConfigError
from unsplit import saved_model

STEPS, ROWS, WORDS = 3, 8, 64
MESHES = {
    "dp": {"mesh": {"pp": 2, "dp": 2}},
    "tp": {"mesh": {"pp": 2, "tp": 2}},
    "zero1": {"mesh": {"pp": 2, "dp": 2}, "shard": "zero1"},
    "fsdp": {"mesh": {"pp": 2, "dp": 2}, "shard": "fsdp"},
    "dp and tp": {"mesh": {"pp": 2, "dp": 2, "tp": 2}},
}
# Data ranks sum where a stage's gradients are there: whole or split backwards, one stage a rank or several.
# What tensor ranks do is the same at every place of a schedule.
RUN_WITH = {
    "dp": ("1f1b", "interleaved-1f1b", "zb-auto", "zb-v"),
    "tp": ("1f1b", "zb-v"),
    "zero1": ("interleaved-1f1b", "zb-v"),
    "fsdp": ("interleaved-1f1b", "zb-v"),
    "dp and tp": ("zb-v",),
}


def llama(**changes) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(sizes | heads | changes)))


def text(seed: int, rows: int = ROWS) -> dict[str, torch.Tensor]:
    """Rows of unequal numbers of targets."""
    words = torch.randint(0, WORDS, (rows, 12), generator=torch.Generator().manual_seed(seed))
    labels = words.clone()
    for row in range(rows):
        labels[row, : row % 5] = -100
    return {"input_ids": words, "labels": labels}


def adam(parameters):
    # Adam divides a gradient near zero by itself, and what rounding makes of it: a larger eps than 1e-8.
    return torch.optim.AdamW(parameters, lr=1e-3, eps=1e-5)


def make(model=None, **options) -> evenflow.Pipeline:
    options = {"example": text(0), "optimizer": adam, "num_microbatches": 8, "device": "cpu"} | options
    return evenflow.pipeline(llama() if model is None else model, **options)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def trained(**options) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    pipe = make(clip_norm=0.5, **options)
    results = [pipe.step(text(seed)) for seed in range(STEPS)]
    weights = {name: whole(parameter) for name, parameter in pipe.named_parameters()}
    pipe.close()
    return [float(each.loss) for each in results], [float(each.grad_norm) for each in results], weights


def table(num_processes: int):
    """What all meshes of so many processes train to."""
    names = [name for name, each in MESHES.items() if math.prod(each["mesh"].values()) == num_processes]
    return {
        (name, schedule): trained(schedule=schedule, **MESHES[name])
        for name in names
        for schedule in RUN_WITH[name]
    }


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@cache
def alone():
    return trained(stages=1)


@pytest.mark.parametrize("num_processes", [4, 8])
def test_meshes_train_as_one_process(folder, num_processes):
    losses, norms, weights = alone()
    assert min(norms) > 0.5, "clipping is on"
    if num_processes == 4:
        ranks = [rank["table"] for rank in results(folder)]
    else:
        ranks = evenflow.launch(table, num_processes, nproc=num_processes)
    for which in ranks[0]:
        mine = [rank[which] for rank in ranks]
        assert len({tuple(found) for found, _, _ in mine}) == 1, f"{which}: not the same on all"
        assert mine[0][0] == pytest.approx(losses, rel=1e-5), which
        assert mine[0][1] == pytest.approx(norms, rel=1e-5), which
        for _, _, found in mine:
            for parameter, numbers in found.items():
                assert relative(numbers, weights[parameter]) <= 1e-5, f"{which}: {parameter}"
        assert {parameter for _, _, found in mine for parameter in found} == weights.keys()


# -- what else four ranks do, two pipelines of two or two tensor ranks


def error_of(function):
    try:
        function()
    except Exception as error:  # noqa: BLE001 (it is what the test looks at)
        return type(error).__name__, str(error)
    return None


def small(words: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(words, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


def mean_square(model, batch):
    found = model(batch["x"])
    return nn.functional.mse_loss(found, batch["y"]), {"sum": found.detach().sum(), "rows": len(found)}


def numbers(rows: int = 8, *, of_last: float = 1.0) -> dict[str, torch.Tensor]:
    """Rows of numbers; targets of the second half, the second data rank's, may be larger."""
    generator = torch.Generator().manual_seed(rows)
    x, y = (torch.randn(rows, size, generator=generator) for size in (8, 1))
    y[rows // 2 :] *= of_last
    return {"x": x, "y": y}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def make_small(model=None, **options) -> evenflow.Pipeline:
    options = {"loss": mean_square, "example": numbers(), "optimizer": sgd, "num_microbatches": 4} | options
    return evenflow.pipeline(small() if model is None else model, device="cpu", **options)


TWO = {"pp": 2, "dp": 2}


def fed_with_metrics(folder):
    """The first rank reads; the last batch is smaller and has an odd number of microbatches."""
    pipe = make_small(mesh=TWO)
    loader = [numbers(8), numbers(8), numbers(3)] if dist.get_rank() == 0 else None
    results = [pipe.step(batch) for batch in pipe.feed(loader)]
    batch = numbers(6)
    evaluated = pipe.evaluate(batch)
    predicted = pipe.predict(batch, lambda model, item: model(item["x"]))
    rest = [(float(each.metrics["sum"]), each.metrics["rows"]) for each in (*results, evaluated)]
    return [float(each.loss) for each in (*results, evaluated)], rest, predicted


def accumulated(folder, **options):
    pipe = make_small(**({"mesh": TWO} | options))
    for rows in (8, 4):
        pipe.step(numbers(rows), update=False)
    kept = {name: whole(gradient) for name, gradient in pipe.named_gradients()}
    pipe.step(numbers(8))
    return kept, {name: whole(parameter) for name, parameter in pipe.named_parameters()}


def accumulated_in_shards(folder):
    return accumulated(folder, shard="fsdp")


def overflowed(folder, **options):
    """Between two ordinary steps one whose gradients overflow in float16, by the second data rank's rows."""
    pipe = make_small(precision="fp16", **({"mesh": TWO} | options))
    found = []
    for of_last in (1.0, 1.0, 300.0, 1.0, 1.0):
        result = pipe.step(numbers(of_last=of_last))
        weights = {name: whole(parameter) for name, parameter in pipe.named_parameters()}
        found.append((float(result.loss), math.isfinite(float(result.grad_norm)), weights))
    return found


def saved(folder):
    for shard in (None, "zero1", "fsdp"):
        pipe = make_small(mesh=TWO, shard=shard)
        pipe.step(numbers())
        pipe.save(folder / f"saved {shard}")
        pipe.export(folder / f"exported {shard}")
    pipe = make(mesh={"pp": 2, "tp": 2})
    pipe.step(text(0))
    pipe.export(folder / "exported tp")


def other_numbers_on_each_rank(folder):
    """Every process initialises its model in its own way."""
    found = []
    for options in ({"mesh": TWO}, {"mesh": TWO, "shard": "fsdp"}, {"mesh": {"pp": 2, "tp": 2}}):
        model = llama(num_hidden_layers=2)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(dist.get_rank())
        pipe = make(model, **options)
        found.append(float(pipe.step(text(0)).loss))
    return found


def shared_across_stages(folder):
    """An embedding tied to the head, and shared by tensor ranks too."""
    found = []
    for mesh in (TWO, {"pp": 2, "tp": 2}):
        pipe = make(llama(tie_word_embeddings=True), mesh=mesh, clip_norm=1.0)
        losses = [float(pipe.step(text(seed)).loss) for seed in range(STEPS)]
        found.append((losses, {name: whole(parameter) for name, parameter in pipe.named_parameters()}))
    return found


def with_batch_norm(folder):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the loss is not that of the unsplit batch
        pipe = make_small(model, mesh=TWO, split=["2"])
    pipe.step(numbers())
    return [buffer.clone() for buffer in model.buffers()]


def all_stages_on_each(folder, *, alone=False):
    """Pipelines of one process, which has all stages; also fed, and with few rows to predict."""
    found = []
    feeds = dist.is_initialized() and dist.get_rank() > 0
    for options in ({"dp": 4}, {"dp": 4, "shard": "zero1"}, {"dp": 4, "shard": "fsdp"}, {"dp": 2, "tp": 2}):
        degrees = {key: value for key, value in options.items() if key != "shard"}
        plan = {"0": "colwise", "2": "rowwise"} if "tp" in degrees else None
        mesh = {} if alone else {"mesh": degrees, "shard": options.get("shard"), "tensor_plan": plan}
        pipe = make_small(stages=2, schedule="zb-h1", clip_norm=0.1, **mesh)
        losses = [float(pipe.step(numbers()).loss)]
        losses += [float(pipe.step(batch).loss) for batch in pipe.feed(None if feeds else [numbers(8)] * 2)]
        losses.append(float(pipe.evaluate(numbers(1)).loss))
        rows = pipe.predict(numbers(1), lambda model, item: model(item["x"]))
        weights = {name: whole(p) for name, p in pipe.named_parameters()}
        found.append((losses, rows, weights))
    return found


def words_in_bits(folder, *, alone=False):
    """Logits of bfloat16 in parts, over two stages: the loss has the type that was recorded."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(WORDS, 16), nn.Linear(16, 16), nn.Linear(16, WORDS))
    options = {} if alone else {"mesh": {"pp": 2, "tp": 2}, "tensor_plan": {"2": "colwise_rep"}}
    pipe = make(model, loss=next_words, split=["1"], precision="bf16-pure", **options)
    losses = [pipe.step(text(seed)).loss for seed in range(STEPS)]
    return [float(loss) for loss in losses], losses[0].dtype


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def rows_in_parts() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(WORDS, 16), Block(), Block(), nn.Linear(16, WORDS))


def next_words(model, batch):
    return nn.functional.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())


def sequence_parallel(folder, *, alone=False):
    """Between shared products each tensor rank has some positions of every row, on the way to a stage too."""
    here = Shard(1)
    plan = {
        "0": RowwiseParallel(input_layouts=Replicate(), output_layouts=here),
        "*.norm": SequenceParallel(use_local_output=True),
        "*.up": ColwiseParallel(input_layouts=here),
        "*.down": RowwiseParallel(output_layouts=here),
        "3": ColwiseParallel(input_layouts=here, output_layouts=Replicate()),
    }
    options = {} if alone else {"mesh": {"pp": 2, "tp": 2}, "tensor_plan": plan}
    pipe = make(rows_in_parts(), loss=next_words, split=["2"], clip_norm=1.0, **options)
    losses = [float(pipe.step(text(seed)).loss) for seed in range(STEPS)]
    return losses, pipe.cut[0].sends_bytes, {name: whole(p) for name, p in pipe.named_parameters()}


def refused(folder):
    """What cannot work, each with its error."""
    up = {"0": "colwise", "2": "rowwise"}
    tensor = {"pp": 2, "tp": 2}
    pipe = make_small(mesh=TWO)
    return {
        "mixed feed": error_of(lambda: pipe.step(None if dist.get_rank() == 3 else numbers())),
        "own shards": error_of(lambda: pipe.step(numbers(4, of_last=dist.get_rank()))),
        "too few rows": error_of(lambda: pipe.step(numbers(1))),
        "degrees": error_of(lambda: make_small(mesh={"pp": 2, "dp": 3})),
        "stages": error_of(lambda: make_small(mesh=TWO, stages=3)),
        "stages for data ranks": error_of(lambda: make_small(stages=2)),
        "no module": error_of(lambda: make_small(mesh=tensor, tensor_plan=up | {"7": "rowwise"})),
        "no style": error_of(lambda: make_small(mesh=tensor, tensor_plan={"0": "diagonal"})),
        "no plan": error_of(lambda: make_small(mesh=tensor)),
        "sizes": error_of(lambda: make_small(mesh=tensor, tensor_plan={"4": "colwise"})),
        "heads": error_of(lambda: make(llama(num_key_value_heads=1), mesh=tensor)),
        "fsdp and tp": error_of(lambda: make_small(mesh={"dp": 2, "tp": 2}, tensor_plan=up, shard="fsdp")),
        "tied": error_of(
            lambda: make(
                llama(tie_word_embeddings=True), mesh=tensor, tensor_plan={"lm_head": ColwiseParallel()}
            )
        ),
        "still working": float(pipe.step(numbers()).loss),
    }


SCENARIOS = [
    fed_with_metrics,
    accumulated,
    accumulated_in_shards,
    overflowed,
    saved,
    other_numbers_on_each_rank,
    shared_across_stages,
    with_batch_norm,
    sequence_parallel,
    all_stages_on_each,
    words_in_bits,
    refused,
]


def run_scenarios(folder: Path):
    dist.init_process_group("gloo")
    return {scenario.__name__: scenario(folder) for scenario in SCENARIOS} | {"table": table(4)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("mesh")


@cache
def results(folder: Path):
    return evenflow.launch(run_scenarios, folder, nproc=4)


@pytest.fixture
def found(folder, request):
    """What the four ranks returned from the scenario that the test is named after."""
    name = request.node.name.removeprefix("test_")
    return [rank[name] for rank in results(folder)]


def test_fed_with_metrics(found):
    pipe = make_small(stages=2)
    expected = [pipe.step(numbers(rows)) for rows in (8, 8, 3)] + [pipe.evaluate(numbers(6))]
    predicted = pipe.predict(numbers(6), lambda model, item: model(item["x"]))
    for losses, rest, mine in found:
        assert losses == pytest.approx([float(each.loss) for each in expected], rel=1e-6)
        assert [rows for _, rows in rest] == [8, 8, 3, 6]
        sums = [float(each.metrics["sum"]) for each in expected]
        assert [total for total, _ in rest] == pytest.approx(sums, rel=1e-5, abs=1e-6)
        assert torch.allclose(mine, predicted, rtol=1e-5)


@pytest.mark.parametrize("scenario", ["accumulated", "accumulated_in_shards"])
def test_steps_without_an_update_add_up_on_data_ranks(folder, scenario):
    gradients, weights = accumulated(folder, mesh=None, stages=2)
    for rank in results(folder):
        kept, after = rank[scenario]
        assert all(relative(kept[name], gradients[name]) < 1e-5 for name in kept)
        assert all(relative(after[name], weights[name]) < 1e-5 for name in after)


def test_overflowed(found):
    expected = overflowed(None, mesh=None, stages=2)
    assert [finite for _, finite, _ in expected] == [False, True, False, True, True]
    for rank in found:
        assert [(loss, finite) for loss, finite, _ in rank] == [(loss, ok) for loss, ok, _ in expected]
        (_, _, before), (_, _, after) = rank[1:3]
        assert all(torch.equal(before[name], after[name]) for name in before), "the step is left out"
        assert any(not torch.equal(rank[3][2][name], after[name]) for name in after)


def test_saved(folder):
    results(folder)
    one = make_small(stages=2)
    one.step(numbers())
    weights = dict(one.named_parameters())
    for shard in (None, "zero1", "fsdp"):
        loaded = saved_model(folder / f"saved {shard}")
        exported = make_small(load=folder / f"exported {shard}", stages=1)
        for name, parameter in exported.named_parameters():
            assert relative(parameter.detach(), weights[name].detach()) < 1e-5
            assert relative(loaded[name], weights[name].detach()) < 1e-5
    again = transformers.LlamaForCausalLM.from_pretrained(folder / "exported tp")
    one = make(stages=2)
    one.step(text(0))
    expected = dict(one.named_parameters())
    assert all(relative(p.detach(), expected[name].detach()) < 1e-5 for name, p in again.named_parameters())


def test_other_numbers_on_each_rank(found):
    assert all(rank == found[0] for rank in found)


def test_shared_across_stages(found):
    pipe = make(llama(tie_word_embeddings=True), stages=2, clip_norm=1.0)
    losses = [float(pipe.step(text(seed)).loss) for seed in range(STEPS)]
    weights = dict(pipe.named_parameters())
    for mine, after in (each for rank in found for each in rank):
        assert mine == pytest.approx(losses, rel=1e-6)
        assert all(relative(numbers, weights[name].detach()) < 1e-5 for name, numbers in after.items())


def test_with_batch_norm(found):
    """Running statistics are the first data rank's, as torch's DistributedDataParallel has them."""
    first, second = found[0], found[1]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, second, strict=True))
    assert float(first[2]) == 2, "of the four microbatches two were its own"


def test_sequence_parallel(found):
    losses, sent_bytes, weights = sequence_parallel(None, alone=True)
    for mine, my_bytes, found_weights in found:
        assert mine == pytest.approx(losses, rel=1e-6)
        assert my_bytes == sent_bytes / 2
        assert all(relative(numbers, weights[name]) < 1e-5 for name, numbers in found_weights.items())


def test_all_stages_on_each(found):
    expected = all_stages_on_each(None, alone=True)
    for rank in found:
        for (losses, rows, weights), (theirs, their_rows, their_weights) in zip(rank, expected, strict=True):
            assert losses == pytest.approx(theirs, rel=1e-5)
            assert torch.allclose(rows, their_rows, rtol=1e-4)
            assert all(relative(numbers, their_weights[name]) < 1e-5 for name, numbers in weights.items())


def test_words_in_bits(found):
    losses, dtype = words_in_bits(None, alone=True)
    for mine, my_dtype in found:
        assert my_dtype is dtype is torch.bfloat16
        assert mine == pytest.approx(losses, rel=2e-2)


def test_refused(found):
    texts = {
        "mixed feed": "ranks 0, 1, 2 passed a batch and ranks 3 none: pass the same batch on every rank",
        "own shards": "your loaders differ per rank: rank 0 has 4 microbatches of",
        "too few rows": "the batch makes 1 microbatches, and each of 2 data ranks needs one",
        "degrees": "6 processes are needed (pp 2 x dp 3 x tp 1), but 4 are running; start with torchrun",
        "stages": "3 stages need 3 pipeline ranks, and the mesh has 2: ask for stages=2, or for",
        "stages for data ranks": "2 stages need 2 processes, but 4 are running",
        "no module": "the tensor plan names '7', and the Sequential has no such module",
        "no style": "the tensor plan shares 0 as 'diagonal', which is none of colwise",
        "no plan": "mesh= has tensor ranks, and nothing says how they share the Sequential: give",
        "sizes": "2 tensor ranks cannot share 4 as 'colwise': 1 is no multiple of 2; change",
        "heads": "2 tensor ranks cannot share the model's 1 heads (num_key_value_heads): give a",
        "fsdp and tp": 'shard="fsdp" beside tensor ranks',
        "tied": "the tensor plan shares lm_head, whose weight is tied to model.embed_tokens.weight",
    }
    for rank in found:
        for name, start in texts.items():
            assert rank[name] is not None, name
            kind, said = rank[name]
            assert kind == "ConfigError", said
            assert said.startswith(start), said
        assert rank["still working"] == found[0]["still working"]
    assert 'mesh={"dp": 2}' in found[0]["stages for data ranks"][1]
    assert "data ranks, too, all pass the whole batch" in found[0]["own shards"][1]


@pytest.mark.parametrize(
    ("options", "start"),
    [
        ({"mesh": {"pp": 2, "dp": 2}}, "4 processes are needed (pp 2 x dp 2 x tp 1), but 1 is running"),
        ({"mesh": {"cp": 2}}, "mesh= names 'cp'; the axes are 'pp', 'dp', 'tp'"),
        ({"mesh": {"dp": 0}}, "mesh= has 'dp': 0; a degree is a whole number from 1 on"),
        ({"mesh": {"dp": True}}, "mesh= has 'dp': True"),
        ({"shard": "zero1"}, "shard='zero1' needs data ranks, and there is one: give mesh="),
        ({"shard": "zero9"}, "shard='zero9' is none of None, 'zero1', 'fsdp'"),
        ({"tensor_plan": {"0": "colwise"}}, "tensor_plan= needs tensor ranks, and there is one"),
        ({"clip_norm": 0}, "clip_norm=0 must be a positive number"),
        ({"clip_norm": "1"}, "clip_norm='1' must be a positive number"),
        ({"precision": "fp8"}, "precision='fp8' is none of None, 'fp32', 'bf16', 'bf16-pure', 'fp16'"),
    ],
)
def test_what_one_process_refuses(options, start):
    with pytest.raises(ConfigError) as error:
        make_small(**options)
    assert str(error.value).startswith(start)
