"""How much memory each rank needs to build an 8-stage pipeline of a model with 2 billion parameters.

Eight processes on this machine, Gloo between them, single precision on the CPU. For each rank: the bytes of
the parameters that its stage owns, its resident memory after the imports, and the largest resident memory of
the whole process until the pipeline stands (`ru_maxrss`, the interpreter and every library included). The
goal is that the last stays under the stage's own parameters + 1 GiB. `--steps` trains as well, to show that
the pipeline is one that works; what a step needs is shown apart and has no goal.
"""

import argparse
import resource
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import evenflow

NUM_STAGES = 8
GIB = 2**30
ALLOWED_BYTES = GIB
CONFIG: dict[str, Any] = {  # values of many kinds
    "vocab_size": 32_000,
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "num_hidden_layers": 24,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "use_cache": False,
}


@dataclass(frozen=True)
class Rank:
    own_bytes: int
    imports_bytes: int
    peak_bytes: int
    step_peak_bytes: int
    build_seconds: float
    losses: tuple[float, ...]


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def build(num_steps: int) -> Rank:
    imports, start = peak_bytes(), time.perf_counter()
    with evenflow.deferred_init():
        model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, CONFIG["vocab_size"], (NUM_STAGES, 8), generator=generator)
    batch = {"input_ids": tokens, "labels": tokens}
    pipe = evenflow.pipeline(model, example=batch, stages=NUM_STAGES, num_microbatches=NUM_STAGES)
    own = sum(parameter.nbytes for _, parameter in pipe.named_parameters())
    peak, took = peak_bytes(), time.perf_counter() - start
    losses = tuple(float(pipe.step(batch).loss) for _ in range(num_steps))
    pipe.close()
    return Rank(own, imports, peak, peak_bytes(), took, losses)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--steps", type=int, default=0, help="train this many steps afterwards")
    num_steps = arguments.parse_args().steps
    ranks = evenflow.launch(build, num_steps, nproc=NUM_STAGES)
    parameters = sum(rank.own_bytes for rank in ranks)
    print(f"{parameters / 4e9:.2f} B parameters, {parameters / GIB:.2f} GiB in all, {NUM_STAGES} processes")
    print(
        "rank  own GiB  after imports  peak  peak - own  seconds" + ("  peak in steps" if num_steps else "")
    )
    for number, rank in enumerate(ranks):
        print(
            f"{number:4}  {rank.own_bytes / GIB:7.2f}  {rank.imports_bytes / GIB:13.2f}  "
            f"{rank.peak_bytes / GIB:4.2f}  {(rank.peak_bytes - rank.own_bytes) / GIB:10.2f}  "
            f"{rank.build_seconds:7.1f}" + (f"  {rank.step_peak_bytes / GIB:13.2f}" if num_steps else "")
        )
    if num_steps:
        print("losses: " + ", ".join(f"{loss:.4f}" for loss in ranks[0].losses))
    worst = max(rank.peak_bytes - rank.own_bytes for rank in ranks)
    good = worst < ALLOWED_BYTES
    print(
        f"peak beyond own parameters: at most {worst / GIB:.2f} GiB; "
        f"goal: under {ALLOWED_BYTES / GIB:.0f} GiB: {'met' if good else 'MISSED'}"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
