"""Estimates: operations by the formulas of the papers, memory as autograd keeps it, published speeds."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

import evenflow
from evenflow.cluster.device import Device, calibrated
from evenflow.cost.estimate import estimate
from evenflow.errors import ConfigError
from evenflow.graph.kernels.fakes import FakeParameters
from evenflow.graph.leaves.leaves import flatten
from evenflow.graph.recording.record import record

CPU = torch.device("cpu")
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 4,  # of 32, which are all alike
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
}
# 1e12 operations and 1e11 bytes a second: what takes longer is plain to see.
TOY = Device("toy", {"float32": 1e12}, 2.0**30, 1e11, 0.0, 0.5, "made up")


def recorded(model, batch, program, max_share=0.0):
    tree = record(program, model, batch, device=CPU, fakes=FakeParameters(model, CPU))
    return flatten(tree, max_share=max_share)


def language_model_loss(model, batch):
    return model(**batch).loss


def tokens(model, length):
    ids = torch.randint(0, model.config.vocab_size, (1, length))
    return {"input_ids": ids, "labels": ids}


def deferred(kind, config):
    with evenflow.deferred_init():
        return kind(config).to(torch.bfloat16)


def llama(sizes):
    return deferred(LlamaForCausalLM, LlamaConfig(**sizes, use_cache=False, tie_word_embeddings=False))


def chain_of(model, length, *devices):
    graph = recorded(model, tokens(model, length), language_model_loss, max_share=0.01)
    return estimate(graph, model, devices, num_rows=1)


@pytest.mark.parametrize("sizes", [LLAMA_8B, LLAMA_70B], ids=["8B", "70B"])
def test_llama_computes_six_operations_for_each_parameter_and_token(sizes):
    length = 2048
    chain = chain_of(llama(sizes), length)
    embedding = sizes["vocab_size"] * sizes["hidden_size"]
    num_parameters = sum(each.num_elements for each in chain.parameters) - embedding
    attention = 12 * sizes["num_hidden_layers"] * sizes["hidden_size"] * length
    assert 3 * sum(chain.flops) / length == pytest.approx(6 * num_parameters + attention, rel=0.02)


def test_deepseek_v3_computes_with_its_active_parameters():
    length = 512

    def flops(num_layers):
        config = DeepseekV3Config(num_hidden_layers=num_layers, use_cache=False)
        return sum(chain_of(deferred(DeepseekV3ForCausalLM, config), length).flops)

    four = flops(4)  # all after the third have experts, and are alike
    total = four + 57 * (flops(5) - four)
    # Scores over keys of 128 + 64 numbers, and sums of values of 128, in 128 heads of 61 layers.
    attention = 2 * length * 61 * 128 * (192 + 128)
    # The technical report (arXiv 2412.19437) counts 37 B active parameters, the embedding's among them.
    active = (total / length - attention) / 2 + 129280 * 7168
    assert active == pytest.approx(37e9, rel=0.05)


def test_times_of_a_product_that_computes_and_a_sum_that_moves():
    model = nn.Linear(1000, 1000, bias=False)
    batch = torch.ones(1000, 1000, requires_grad=False)
    chain = estimate(
        recorded(model, batch, lambda model, batch: (model(batch) + 1).sum()), model, [TOY], num_rows=1000
    )
    product, add, _ = chain.seconds["toy"].forward
    assert product == pytest.approx(2e9 / 0.5e12)
    assert add == pytest.approx(8e6 / 0.85e11)
    # Nothing before the product needs a gradient; its weight's takes as long as the product itself.
    assert chain.seconds["toy"].input_grad[0] == 0
    assert chain.seconds["toy"].weight_grad[0] == pytest.approx(2e9 / 0.5e12)


def test_what_is_frozen_has_no_weight_gradient():
    model = nn.Sequential(nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 512))
    model[2].requires_grad_(False)
    seconds = chain_of_layers(model)
    assert seconds.weight_grad[0] > 0 == seconds.input_grad[0]
    assert seconds.input_grad[2] > 0 == seconds.weight_grad[2]


def test_a_slower_measurement_makes_all_products_slower():
    slow = calibrated(TOY, flops=1e12, seconds=8.0, dtype="float32")
    model = nn.Sequential(nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 512))
    before, after = chain_of_layers(model), chain_of_layers(model, slow)
    assert after.forward[0] == pytest.approx(before.forward[0] * 0.5 / 0.125)
    assert after.forward[1] == before.forward[1]


def chain_of_layers(model, device=TOY):
    batch = torch.ones(4096, 512)
    graph = recorded(model, batch, lambda model, batch: model(batch).square().mean())
    return estimate(graph, model, [device], num_rows=4096).seconds["toy"]


def test_a_dtype_without_a_rate_is_refused():
    model = nn.Linear(4, 4).to(torch.bfloat16)
    batch = torch.ones(2, 4, dtype=torch.bfloat16)
    graph = recorded(model, batch, lambda model, batch: model(batch).sum())
    with pytest.raises(ConfigError, match="device toy has no rate for bfloat16"):
        estimate(graph, model, [TOY], num_rows=2)
    assert estimate(graph, model, [TOY], num_rows=2, dtype="float32").num_nodes == 2


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(32, 96), nn.Linear(32, 32), nn.LayerNorm(32)

    def forward(self, x):
        q, k, v = (t.view(2, 16, 4, 8).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).reshape(2, 16, 32))


def llama_of_two_layers():
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 100}
    return LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False)
    )


def classify(model, batch):
    return F.cross_entropy(model(batch).flatten(1), torch.zeros(len(batch), dtype=torch.long))


@pytest.mark.parametrize(
    ("make", "batch", "program"),
    [
        (Attention, torch.ones(2, 16, 32), classify),
        (
            lambda: nn.Sequential(
                nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.GELU()
            ),
            torch.ones(2, 3, 16, 16),
            classify,
        ),
        (
            lambda: nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.GroupNorm(4, 64), nn.Sigmoid()),
            torch.ones(128, 32),
            classify,
        ),
        (
            llama_of_two_layers,
            {"input_ids": torch.ones(2, 32).long(), "labels": torch.ones(2, 32).long()},
            None,
        ),
    ],
    ids=["attention", "convolutions", "layers", "llama"],
)
@pytest.mark.parametrize("max_share", [0.0, 1.0])
def test_what_is_saved_is_what_autograd_keeps(make, batch, program, max_share):
    model, program = make(), program or language_model_loss
    graph = recorded(model, batch, program, max_share)
    chain = estimate(graph, model, [], num_rows=2)
    assert sum(held.num_bytes for held in chain.saved) == pytest.approx(
        kept_by_autograd(model, batch, program),
        rel=0.05,  # statistics of norms are not counted, which in small models is something
    )


def kept_by_autograd(model, batch, program):
    """Bytes of all memory that autograd keeps of one forward, but for parameters, buffers and the batch."""
    given = [*model.parameters(), *model.buffers(), *(batch.values() if isinstance(batch, dict) else [batch])]
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        program(model, batch)
    return sum(each.untyped_storage().nbytes() for at, each in kept.items() if at not in known)


def test_a_tensor_that_several_nodes_keep_is_held_once():
    model = nn.ModuleList([nn.Linear(16, 16, bias=False) for _ in range(3)])

    def program(model, batch):
        first = model[0](batch)
        return (model[1](first) + model[2](first)).sum()

    chain = estimate(recorded(model, torch.ones(8, 16), program), model, [TOY], num_rows=8)
    assert [(held.num_bytes, held.nodes) for held in chain.saved] == [(8 * 16 * 4.0, (1, 2))]
    assert [(each.name, each.num_bytes, each.nodes) for each in chain.parameters] == [
        (f"{at}.weight", 1024, (at,)) for at in range(3)
    ]
    assert chain.cut_bytes[:3] == (0.0, 512.0, 1024.0)


def test_a_checkpoint_keeps_what_it_was_given_and_no_more():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

        def forward(self, x):
            return self.down(self.up(x).tanh())

    def program(model, batch):
        return checkpoint(model[1], model[0](batch), use_reentrant=False).sum()

    model = nn.Sequential(nn.Linear(16, 16), Block())
    graph = recorded(model, torch.ones(8, 16), program)
    chain = estimate(graph, model, [TOY], num_rows=8)
    assert chain.names[1:4] == ("1.up", "1:tanh", "1.down")
    assert [(held.num_bytes, held.nodes) for held in chain.saved] == [(8 * 16 * 4.0, (1,))]


def test_a_product_with_a_weight_s_view_is_not_put_off():
    class Transposed(nn.Linear):
        def forward(self, x):
            return x @ self.weight.t()

    model = Transposed(512, 512, bias=False)
    seconds = chain_of_layers(model)
    product = seconds.forward.index(max(seconds.forward))
    assert seconds.input_grad[product] > 0 == seconds.weight_grad[product]


class Routed(nn.Module):
    """An expert for the rows whose first number is positive: which they are, only numbers say."""

    def __init__(self):
        super().__init__()
        self.before, self.expert = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        x = self.before(x)
        rows = [number for number, row in enumerate(x) if row[0] > -1e9]
        return self.expert(x[rows])


def test_a_module_whose_inside_was_not_seen_has_both_gradients_at_once():
    frozen, trained = (input_and_weight_grad_of_routed(trains=trains) for trains in (False, True))
    assert trained[0] > frozen[0] > 0
    assert trained[1] == frozen[1] == 0


def input_and_weight_grad_of_routed(*, trains: bool) -> tuple[float, float]:
    model = nn.Sequential(nn.Linear(64, 64), Routed())
    model[1].requires_grad_(trains)
    batch = torch.ones(8, 64)
    graph = recorded(model, batch, lambda model, batch: model(batch).square().mean())
    seconds = estimate(graph, model, [TOY], num_rows=8).seconds["toy"]
    at = next(at for at, node in enumerate(graph.chain) if node.name == "1")
    return seconds.input_grad[at], seconds.weight_grad[at]
