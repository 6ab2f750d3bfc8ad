"""Experts: found by grouped products and by their names, with what is handed to them."""

import pytest
import torch
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, MixtralConfig, MixtralForCausalLM

import evenflow
from evenflow.cluster.presets import PRESETS
from evenflow.cost.estimate import estimate
from evenflow.graph.kernels.fakes import FakeParameters
from evenflow.graph.leaves.leaves import flatten
from evenflow.graph.recording.record import record

CPU = torch.device("cpu")
ROWS, LENGTH, WIDTH = 2, 16, 64
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 3, "vocab_size": 128, "num_attention_heads": 4}


def chain_of(model, batch, program, max_share):
    tree = record(program, model, batch, device=CPU, fakes=FakeParameters(model, CPU))
    graph = flatten(tree, max_share=max_share)
    return estimate(graph, model, [PRESETS["H100"]], num_rows=ROWS)


@pytest.mark.parametrize("max_share", [0.0, 0.5])
@pytest.mark.parametrize(
    ("kind", "config", "per_token", "layers"),
    [
        (DeepseekV3ForCausalLM, DeepseekV3Config(**SIZES, n_routed_experts=16), 8, (False, False, False)),
        (
            DeepseekV3ForCausalLM,
            DeepseekV3Config(**SIZES, n_routed_experts=16, first_k_dense_replace=1),
            8,
            (False, True, True),
        ),
        (MixtralForCausalLM, MixtralConfig(**SIZES, num_key_value_heads=2), 2, (True, True, True)),
    ],
)
def test_experts_of_a_library(kind, config, per_token, layers, max_share):
    with evenflow.deferred_init():
        model = kind(config).to(torch.bfloat16)
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids}
    chain = chain_of(model, batch, lambda model, batch: model(**batch, use_cache=False).loss, max_share)
    found = {parameter.name for parameter in chain.parameters if parameter.is_expert}
    assert found == {
        f"model.layers.{layer}.mlp.experts.{name}"
        for layer, is_mixed in enumerate(layers)
        for name in ("gate_up_proj", "down_proj")
        if is_mixed
    }
    # Every layer with experts is handed each token once for each of its experts, in bfloat16.
    assert sum(chain.expert_bytes) == sum(layers) * ROWS * LENGTH * per_token * WIDTH * 2


class Mixture(nn.Module):
    """Top-1 routing by a Python loop over experts."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        best, out = self.router(x).argmax(-1), torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = (best == index).nonzero()[:, 0]
            out = out.index_add(0, rows, expert(x[rows]))
        return x + out


def test_experts_that_are_modules_of_a_list():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Mixture())
    chain = chain_of(model, torch.randn(ROWS, WIDTH), lambda model, batch: model(batch).sum(), 0.0)
    found = {parameter.name for parameter in chain.parameters if parameter.is_expert}
    assert found == {f"1.experts.{n}.{name}" for n in range(3) for name in ("weight", "bias")}
    assert sum(chain.expert_bytes) == ROWS * WIDTH * 4
