"""What a `PipelineTrainer` refuses: arguments that would be ignored, or that pull against the pipeline."""

from collections.abc import Mapping
from typing import Any

from evenflow.errors import ConfigError

# The first whose training loop calls `_prepare_for_training` (huggingface/transformers#44041).
_OLDEST = (5, 3)
# Arguments of `pipeline` that the trainer gives itself, and from what.
_OWN = {
    "model": "model=",
    "example": "the first batch of the data",
    "optimizer": "args.optim, or optimizer_cls_and_kwargs=",
    "scheduler": "args.lr_scheduler_type",
    "device": "args.use_cpu",
}
# Training arguments that must stay as they are by default, and what does the same.
_UNUSED: Mapping[str, tuple[Any, str]] = {
    "fp16": (False, "use bf16=True, which needs no scaled gradients"),
    "fp16_full_eval": (False, "leave it out"),
    "bf16_full_eval": (False, "leave it out"),
    "torch_compile": (False, 'give pipeline={"compile": True}'),
    "auto_find_batch_size": (False, "a pipeline's memory is known beforehand: see `evenflow plan`"),
    "neftune_noise_alpha": (None, "leave it out"),
    "label_smoothing_factor": (0.0, 'give a loss function: pipeline={"loss": lambda model, batch: …}'),
    "deepspeed": (None, "the pipeline takes its place"),
    "parallelism_config": (None, "the pipeline takes its place"),
}


def check_version(installed: str) -> None:
    """Raise `ConfigError` for a transformers whose training loop is still in one piece.

    >>> check_version("5.3.0")
    """
    if tuple(int(part) for part in installed.split(".")[:2]) < _OLDEST:
        needed = ".".join(map(str, _OLDEST))
        raise ConfigError(
            f"PipelineTrainer needs transformers {needed} or newer, and {installed} is installed: "
            f"pip install 'transformers>={needed}'"
        )


def check_pipeline_arguments(given: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for an argument of `pipeline` that the trainer decides."""
    for name in given:
        if name in _OWN:
            raise ConfigError(f"pipeline={{{name!r}: …}}: a PipelineTrainer takes it from {_OWN[name]}")


def check_trainer_arguments(given: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for an argument of `Trainer` that a pipeline has no use for."""
    if any(part is not None for part in given.get("optimizers") or ()):
        raise ConfigError(
            "optimizers= holds an optimizer that was made before the model was cut; give "
            "optimizer_cls_and_kwargs=(torch.optim.AdamW, {…}), and args.lr_scheduler_type"
        )
    if given.get("compute_loss_func") is not None:
        raise ConfigError(
            "compute_loss_func= sees whole outputs, and a pipeline calls one function for each microbatch; "
            'give it as pipeline={"loss": lambda model, batch: …}'
        )
    if given.get("model_init") is not None:
        raise ConfigError("model_init= makes the model anew for each train(); give model=")


# args: transformers is not type-checked here.
def check_training_arguments(args: Any) -> None:
    """Raise `ConfigError` for a training argument that would be ignored, with what to do instead."""
    for name, (default, remedy) in _UNUSED.items():
        value = getattr(args, name)
        if value != default:
            raise ConfigError(f"args.{name}={value!r} has no effect on a pipeline: {remedy}")
    if args.fsdp:
        raise ConfigError(f"args.fsdp={args.fsdp!r} has no effect on a pipeline, which takes its place")
    if args.train_sampling_strategy == "batch_rebalance":
        raise ConfigError(
            "args.train_sampling_strategy='batch_rebalance' gives each rank rows of its own, and under a "
            "pipeline all ranks work on one batch: use 'random' or 'group_by_length'"
        )
    if args.load_best_model_at_end and args.save_only_model:
        raise ConfigError(
            "args.load_best_model_at_end=True reads what args.save_only_model=True leaves out of a "
            "checkpoint: set one of them to False"
        )


# args: as above. The kwargs are whatever the optimizer's constructor takes.
def check_optimizer(name: str, kwargs: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for an optimizer that wants the model, or parameters of its own choice."""
    for wanted in ("params", "model", "optimizer_dict"):
        if wanted in kwargs:
            raise ConfigError(
                f"the optimizer {name} is made from the whole model ({wanted}=), and here each stage has its "
                "own: choose one that takes parameters alone, such as args.optim='adamw_torch'"
            )
