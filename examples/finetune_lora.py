"""Fine-tuning a Hugging Face folder with LoRA adapters, in two stages.

    python examples/finetune_lora.py --model ./llama --out adapter         # one process, both stages
    torchrun --nproc-per-node 2 examples/finetune_lora.py --model ./llama --out adapter
    python examples/finetune_lora.py                                       # with a small random model

No process holds the whole model: it is built without memory, each stage's numbers are read from the folder,
and only the adapters are trained, exported, and loaded again, by peft alone. Needs evenflow[hf] and peft.
"""

import argparse
import tempfile
from pathlib import Path

import peft
import torch
import transformers
from torch import Tensor, nn

import evenflow

NUM_STEPS = 20
LENGTH = 64


def make_small_llama(folder: Path) -> None:
    """Write a folder such as a hub has, of a Llama with random numbers that reads bytes."""
    torch.manual_seed(0)  # the same on every rank
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=256, initializer_range=0.1, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def tokens_of(folder: Path, text: str) -> list[int]:
    """With the folder's tokenizer, or a token for each byte where it has none."""
    if not (folder / "tokenizer_config.json").exists():
        return list(text.encode())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


def adapted(folder: Path) -> nn.Module:
    """The folder's model with adapters beside the layers' matrices, all of it still without memory."""
    with evenflow.deferred_init():
        config = transformers.AutoConfig.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_config(config)
        lora = peft.LoraConfig(r=8, target_modules="all-linear")
        wrapped: nn.Module = peft.get_peft_model(model, lora)
    return wrapped


def loss(model: nn.Module, microbatch: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**microbatch).loss
    return found


def train(folder: Path, out: Path) -> None:
    """Learn this file by heart, as well as adapters can, and load what was exported."""
    tokens = torch.tensor(tokens_of(folder, Path(__file__).read_text()))
    rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)[:16]
    batch = {"input_ids": rows, "labels": rows}
    pipe = evenflow.pipeline(
        adapted(folder),
        loss=loss,
        example=batch,
        load=folder,
        optimizer=lambda named_parameters: torch.optim.AdamW(named_parameters, lr=2e-2),
        stages=2,
        num_microbatches=4,
        device="cuda" if torch.cuda.device_count() >= 2 else "cpu",
    )
    with evenflow.progress(pipe, num_steps=NUM_STEPS):
        for _ in range(NUM_STEPS):
            pipe.step(batch)
    after = float(pipe.evaluate(batch).loss)
    pipe.export(pipe.share(out))  # every rank calls it, and writes what it has
    if pipe.is_main:
        base = transformers.AutoModelForCausalLM.from_pretrained(folder)
        again = peft.PeftModel.from_pretrained(base, out).eval()
        with torch.no_grad():
            loaded = sum(float(loss(again, dict.fromkeys(batch, part))) for part in rows.chunk(4)) / 4
        print(f"exported {sorted(path.name for path in out.iterdir() if 'adapter' in path.name)}")
        print(f"loss of the pipeline {after:.4f}, of peft's model with the exported adapter {loaded:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, help="a Hugging Face folder; without it a small random Llama")
    parser.add_argument("--out", type=Path, help="where the adapter goes; without it it is shown and dropped")
    given = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model = given.model
        if model is None:
            model = Path(folder, "llama")
            make_small_llama(model)
        train(model, given.out or Path(folder, "adapter"))


if __name__ == "__main__":
    main()
