"""What the tests of `PipelineTrainer` do, in one process or on each rank: tune a tiny model on real text."""

from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

import evenflow

LENGTH = 32
NUM_STEPS, RESUMED_AT = 10, 5  # in the middle of the second of three epochs

transformers.logging.set_verbosity_error()


def rows() -> list[dict[str, list[int]]]:
    """This project's licence, in bytes; some labels are ignored, as where a prompt is not learned."""
    text = (Path(__file__).parents[2] / "LICENSE").read_bytes()
    cut = [list(text[at : at + LENGTH]) for at in range(0, len(text) - LENGTH, LENGTH)]
    return [{"input_ids": ids, "labels": [-100] * (at % 5) + ids[at % 5 :]} for at, ids in enumerate(cut)]


def model(dropout: float = 0.0) -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            attention_dropout=dropout,
            tie_word_embeddings=True,  # used on the first and on the last stage
        )
    )


def arguments(folder: Path, **options) -> TrainingArguments:
    options = {
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.1,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": RESUMED_AT,
        "save_steps": RESUMED_AT,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    } | options
    return TrainingArguments(str(folder), **options)


class Heard(TrainerCallback):
    def __init__(self):
        self.events = []

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append(state.global_step)


def accuracy(predicted):
    guesses, labels = predicted.predictions.argmax(-1)[:, :-1], predicted.label_ids[:, 1:]
    counted = labels != -100
    return {"accuracy": float((guesses == labels)[counted].mean()), "targets": int(counted.sum())}


def trainer(folder: Path, *, dropout=0.0, pipeline=None, kind=None, **options):
    data = rows()
    given = {} if kind is transformers.Trainer else {"pipeline": {"stages": 2} | (pipeline or {})}
    return (kind or evenflow.PipelineTrainer)(
        model(dropout),
        arguments(folder, **options),
        train_dataset=data[40:100],
        eval_dataset=data[:40],
        compute_metrics=accuracy,
        callbacks=[Heard()],
        **given,
    )


def curve(made, key="loss"):
    return [entry[key] for entry in made.state.log_history if key in entry]


def whole_run(folder: Path, dropout: float = 0.1):
    """Losses of a run, of one that goes on after its middle, and what was saved at the end."""
    made = trainer(folder, dropout=dropout)
    made.train()
    evaluated = made.evaluate()
    made.save_model(str(folder / "tuned"))
    resumed = trainer(folder, dropout=dropout)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{RESUMED_AT}"))
    predicted = made.predict(made.eval_dataset)
    heard = next(each for each in made.callback_handler.callbacks if isinstance(each, Heard))
    return {
        "losses": curve(made),
        "rates": curve(made, "learning_rate"),
        "evaluated": curve(made, "eval_loss"),
        "accuracy": evaluated["eval_accuracy"],
        "eval_loss": evaluated["eval_loss"],
        "targets": evaluated["eval_targets"],
        "resumed": curve(resumed),
        "resumed_rates": curve(resumed, "learning_rate"),
        "events": heard.events,
        "predictions": predicted.predictions.shape,
        "test_loss": predicted.metrics["test_loss"],
    }
