"""How long recording takes, and what memory: a tiny model, Llama-3 70B and DeepSeek-V3 (671 B parameters).

The big ones are built under `evenflow.deferred_init()` from their configurations alone, so that no
parameter has memory. Each is recorded in a process of its own on one thread, with 128 tokens. The goals:
under 0.2 s, under 5 s, and under 15 s and 4 GiB.
"""

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable

import torch
import transformers

import evenflow
from evenflow.graph.kernels.fakes import FakeParameters
from evenflow.pipe.given.default_programs import model_loss
from evenflow.runtime.recorded.tracing import Leaves, Tracing

CPU = torch.device("cpu")
TOKENS = 128


def tiny() -> torch.nn.Module:
    """Three layers of a Llama of width 32."""
    model: torch.nn.Module = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )
    return model


def llama() -> torch.nn.Module:
    """Llama-3 70B."""
    config = transformers.LlamaConfig(
        vocab_size=128_256,
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    model: torch.nn.Module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model


def deepseek() -> torch.nn.Module:
    """DeepSeek-V3 at full size."""
    config = transformers.DeepseekV3Config()
    model: torch.nn.Module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "tiny Llama": tiny,
    "Llama-3 70B": llama,
    "DeepSeek-V3": deepseek,
}


def measure(name: str, rounds: int) -> None:
    """Print one row for a model."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    with evenflow.deferred_init():
        model = MODELS[name]().train()
    built = time.perf_counter() - start
    ids = torch.randint(0, 64, (1, TOKENS))
    seconds = []
    num_nodes = 0
    for _ in range(rounds):
        start = time.perf_counter()
        fakes = FakeParameters(model, CPU)
        leaves = Leaves(1 / 32, exact=False, opened=(), atomic=())
        tracing = Tracing(model, fakes, device=CPU, leaves=leaves)
        num_nodes = len(tracing.trace(model_loss, {"input_ids": ids, "labels": ids}).chain)
        seconds.append(time.perf_counter() - start)
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{name:12} {size:9.3f} B  built {built:5.2f} s  recorded {sorted(seconds)[rounds // 2]:5.2f} s "
        f"({min(seconds):.2f} to {max(seconds):.2f})  {num_nodes} nodes  peak {peak:.2f} GiB",
        flush=True,
    )


def main() -> None:
    """Each model in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    for name in MODELS:
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(name, rounds))
        process.start()
        process.join()
        if process.exitcode != 0:
            raise SystemExit(f"{name} failed")


if __name__ == "__main__":
    main()
