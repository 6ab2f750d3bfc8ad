"""Four small models, and how a test trains them: in a pipeline, or in a plain PyTorch loop."""

import contextlib
import importlib.util
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

import evenflow
from evenflow.graph.nouns.tree import CallTree
from recorded_once import recorded_once

VOCABULARY = 64
ROWS, LENGTH = 8, 8
NUM_MICROBATCHES = 4
DROPOUT = 0.1
NUM_STEPS = 2  # the second starts from what the first left in weights and optimizer

_TREES: dict[Hashable, CallTree] = {}

transformers.logging.set_verbosity_error()


def load_example(name: str):
    """A file of examples/ as a module."""
    path = Path(__file__).parents[1] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"example_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gpt(dropout: float) -> torch.nn.Module:
    example = load_example("gpt")
    return example.GPT(
        example.GPTConfig(
            vocabulary_size=VOCABULARY, max_length=16, num_layers=3, width=32, num_heads=2, dropout=dropout
        )
    )


def llama(dropout: float) -> torch.nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            attention_dropout=dropout,
        )
    )


def gpt2(dropout: float) -> torch.nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=3,
            n_head=2,
            n_positions=32,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def t5(dropout: float) -> torch.nn.Module:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
            dropout_rate=dropout,
        )
    )


MODELS: Mapping[str, Callable[[float], torch.nn.Module]] = {
    "gpt": gpt,
    "llama": llama,
    "gpt2": gpt2,
    "t5": t5,
}
TIED = ("gpt2", "t5")  # models with a parameter that is used in several places


def build(name: str, dropout: float = 0.0) -> torch.nn.Module:
    """A model in training mode, with the same numbers every time."""
    torch.manual_seed(0)
    return MODELS[name](dropout).train()


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator) for _ in range(NUM_STEPS)]
    return [{"input_ids": tokens, "labels": tokens.clone()} for tokens in ids]


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-1)


def recorded(name: str, dropout: float = 0.0) -> contextlib.AbstractContextManager[None]:
    """Meanwhile this model is recorded only if this process has not done so: see `recorded_once`."""
    return recorded_once(_TREES, name, dropout)


@dataclass(frozen=True)
class Outcome:
    """What training left: every step's loss, the last step's gradients, the weights."""

    losses: list[float]
    gradients: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]


def outcome(pipe: evenflow.Pipeline, losses: list[float]) -> Outcome:
    """The outcome on this process."""
    return Outcome(
        losses,
        {name: g.detach().clone() for name, g in pipe.named_gradients() if g is not None},
        {name: parameter.detach().clone() for name, parameter in pipe.named_parameters()},
    )


def train(
    name: str,
    *,
    dropout: float = 0.0,
    optimizer: Callable[[Any], Any] = adamw,
    num_steps: int = NUM_STEPS,
    **options: Any,
) -> Outcome:
    """Train a model in a pipeline of this process."""
    model, data = build(name, dropout), batches()[:num_steps]
    with recorded(name, dropout):
        pipe = evenflow.pipeline(
            model, example=data[0], optimizer=optimizer, **{"num_microbatches": NUM_MICROBATCHES, **options}
        )
        losses = [float(pipe.step(batch).loss) for batch in data]
    found = outcome(pipe, losses)
    pipe.close()
    assert found.weights.keys() == dict(model.named_parameters()).keys()
    return found


@cache
def reference(name: str, *, dropout: float = DROPOUT, num_microbatches: int = NUM_MICROBATCHES) -> Outcome:
    """What a model on one stage comes to: the same bits as at every cut and in every order."""
    return train(name, dropout=dropout, stages=1, exact=name in TIED, num_microbatches=num_microbatches)


def train_plainly(
    name: str, *, optimizer: Callable[[Any], Any] = adamw, num_steps: int = NUM_STEPS
) -> Outcome:
    """Train the untouched model in a plain loop over the same microbatches."""
    model = build(name)
    updates = optimizer(model.parameters())
    losses, rows = [], ROWS // NUM_MICROBATCHES
    for batch in batches()[:num_steps]:
        updates.zero_grad()
        parts = []
        for start in range(0, ROWS, rows):
            loss = model(**{key: tensor[start : start + rows] for key, tensor in batch.items()}).loss
            (loss / NUM_MICROBATCHES).backward()
            parts.append(loss.detach() / NUM_MICROBATCHES)
        losses.append(float(torch.stack(parts).sum()))
        updates.step()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return Outcome(losses, gradients, {n: p.detach().clone() for n, p in model.named_parameters()})


def assert_same_bits(found: Outcome, expected: Outcome) -> None:
    """Fail where a single bit of losses, gradients or weights differs."""
    assert found.losses == expected.losses
    for kind in ("gradients", "weights"):
        ours, theirs = getattr(found, kind), getattr(expected, kind)
        assert ours.keys() == theirs.keys()
        differing = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
        assert not differing, f"{kind} differ: {differing}"


def assert_close(found: Outcome, expected: Outcome, tolerance: float) -> None:
    """Fail where a number is off by more than `tolerance` of the largest in its tensor.

    Gradients only after a single step: those of later steps answer to weights that differ already.
    """
    for loss, wanted in zip(found.losses, expected.losses, strict=True):
        assert abs(loss - wanted) <= tolerance * abs(wanted)
    for kind in ("weights", "gradients") if len(expected.losses) == 1 else ("weights",):
        ours, theirs = getattr(found, kind), getattr(expected, kind)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            error = float((ours[name] - tensor).abs().max() / tensor.abs().max())
            assert error <= tolerance, f"{kind} of {name} differ by {error:.1e}"
