"""`PipelineTrainer`: Hugging Face's `Trainer` with a pipeline inside.

The loop, the callbacks, the logs and the checkpoints' folders are the Trainer's. What it would do to the
model is the pipeline's: placing it, forward and backward, the update. Its optimizer is a stand-in with one
parameter that nobody uses: the Trainer's scheduler steers that one's learning rate, and the pipeline's
optimizers, one for each stage, follow. Rejected: handing `pipeline` a scheduler, because the Trainer makes a
new one for each `train()`, and some of its own look at the loss.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import evenflow
from evenflow.errors import ConfigError, MissingPackageError
from evenflow.interop.trainer_refusals import (
    check_optimizer,
    check_pipeline_arguments,
    check_trainer_arguments,
    check_training_arguments,
    check_version,
)
from evenflow.pipe.pipeline import Pipeline
from evenflow.pipe.state import merged
from evenflow.runtime.recorded.microbatch import GIVEN_COUNT

try:
    from transformers import Trainer
    from transformers import __version__ as installed

    from evenflow.interop.alone import Alone
except ImportError as error:
    raise MissingPackageError(
        f"PipelineTrainer needs transformers and accelerate ({error}): pip install 'evenflow[hf]'"
    ) from error

check_version(installed)

# In a checkpoint's folder, one for each process.
_STATE = "evenflow_state_{rank}_of_{size}.pt"
_STATES = "evenflow_state_*_of_*.pt"


class PipelineTrainer(Trainer):  # type: ignore[misc]  # transformers is not type-checked here
    """A `transformers.Trainer` that trains a pipeline.

    Arguments are the Trainer's, and `pipeline`: arguments of `evenflow.pipeline` by name (stages, schedule,
    num_microbatches, loss, …). `python train.py` runs all stages in one process, `torchrun` a rank in each.
    Then all ranks make the trainer, call its methods and read the same batches, so that
    `per_device_train_batch_size` is the rows of one batch for all of them, which the pipeline splits into
    microbatches. `save_model` writes what `from_pretrained` loads. A checkpoint holds beside it a file for
    each rank, from which a run goes on with any number of ranks and any cut.

    Raises `ConfigError` for arguments that have no effect on a pipeline, before anything starts.

    >>> trainer = PipelineTrainer(  # doctest: +SKIP
    ...     model,
    ...     TrainingArguments("out", per_device_train_batch_size=16),
    ...     train_dataset=rows,
    ...     pipeline={"stages": 2, "num_microbatches": 8},
    ... )
    >>> trainer.train(resume_from_checkpoint=True), trainer.save_model("tuned")  # doctest: +SKIP
    """

    # What the Trainer sets, of types that are not checked here.
    accelerator: Any
    current_flos: Any
    lr_scheduler: Any
    optimizer: Any
    _created_lr_scheduler: bool

    def __init__(self, *args: Any, pipeline: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self._given = dict(pipeline or {})
        self._pipe: Pipeline | None = None
        self._norm: torch.Tensor | None = None  # of the last update's gradients
        check_pipeline_arguments(self._given)
        check_trainer_arguments(kwargs)
        if type(self).compute_loss is not Trainer.compute_loss:
            raise ConfigError(
                f"{type(self).__name__} overrides compute_loss, which a pipeline never calls; give the loss "
                'as pipeline={"loss": lambda model, batch: …}'
            )
        super().__init__(*args, **kwargs)
        check_training_arguments(self.args)
        if self.args.n_gpu > 1:
            self.args._n_gpu = 1  # noqa: SLF001 (as the Trainer itself says that nothing is replicated)
            self._train_batch_size = self.args.train_batch_size

    @property
    def pipe(self) -> Pipeline:
        """The pipeline inside; raises `ConfigError` before `train` or `evaluate` has made it."""
        if self._pipe is None:
            raise ConfigError("the pipeline is made from the first batch, by train() or evaluate()")
        return self._pipe

    # -- what the Trainer would do to model, optimizer and data

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator = Alone(self.accelerator, data_seed=self.args.data_seed)
        self.gather_function = self.accelerator.gather_for_metrics

    def _move_model_to_device(self, model: torch.nn.Module, device: torch.device) -> None:
        """Nothing: the pipeline places each stage."""

    def get_total_train_batch_size(self, args: Any) -> int:  # transformers' own class
        """The rows of an update: all ranks work on the same."""
        rows: int = self._train_batch_size * args.gradient_accumulation_steps
        return rows

    def store_flos(self) -> None:
        """Note the operations so far; every rank counts those of the whole model."""
        self.state.total_flos += self.current_flos
        self.current_flos = 0

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The stand-in whose learning rate the pipeline's optimizers follow."""
        if self.optimizer is None:
            rate = self._optimizer_and_arguments()[1].get("lr", self.args.learning_rate)
            self.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=rate)
        stand_in: torch.optim.Optimizer = self.optimizer
        return stand_in

    def _optimizer_and_arguments(self) -> tuple[Any, dict[str, Any]]:
        made = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, self.model)
        kind, kwargs = made[0], dict(made[1])
        check_optimizer(kind.__name__, kwargs)
        return kind, kwargs

    def _optimizer_of(self, named: list[tuple[str, torch.nn.Parameter]]) -> torch.optim.Optimizer:
        """As the Trainer makes one: weight decay for those that it names."""
        kind, kwargs = self._optimizer_and_arguments()
        decayed = set(self.get_decay_parameter_names(self.model))
        groups = [
            {"params": [p for name, p in named if (name in decayed) is decays], "weight_decay": decay}
            for decays, decay in ((True, self.args.weight_decay), (False, 0.0))
        ]
        made: torch.optim.Optimizer = kind([group for group in groups if group["params"]], **kwargs)
        return made

    def _made_from(self, batch: Any) -> Pipeline:
        """The pipeline, which the first batch makes; later ones may have other shapes."""
        if self._pipe is None:
            modes, largest = [(each, each.training) for each in self.model.modules()], self.args.max_grad_norm
            self.model.train()
            self._pipe = evenflow.pipeline(
                self.model,
                **{
                    "seed": self.args.seed,
                    "precision": "bf16" if self.args.bf16 else None,
                    "clip_norm": largest if largest and largest > 0 else None,
                    **self._given,
                },
                example=batch,
                optimizer=self._optimizer_of,
                device=self.args.device.type,
            )
            for module, training in modes:
                module.training = training
        return self._pipe

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> Any:
        """Make the pipeline, the stand-in and its scheduler; nothing is wrapped."""
        if self._created_lr_scheduler:
            self.lr_scheduler, self._created_lr_scheduler = None, False
        self.create_optimizer()
        self.create_scheduler(num_training_steps=max_steps)
        with torch.random.fork_rng(devices=()):  # a loader draws a seed for its workers
            # The loader's own iterator, for accelerate's would take this for the beginning of an epoch.
            first = next(torch.utils.data.DataLoader.__iter__(train_dataloader))
        pipe = self._made_from(self._counted(first, self._get_num_items_in_batch([first], self.args.device)))
        if resume_from_checkpoint is not None:
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            pipe.load_state_dict(_read_states(Path(resume_from_checkpoint)))
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.callback_handler.train_dataloader = train_dataloader
        return self.model, train_dataloader

    # -- steps

    def training_step(
        self, model: torch.nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Run one batch through the pipeline, which updates the parameters after an update's last batch."""
        model.train()
        for optimizer in self.pipe.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = self.optimizer.param_groups[0]["lr"]
        batch = self._counted(inputs, num_items_in_batch)
        result = self.pipe.step(batch, update=self.accelerator.gradient_state.sync_gradients)
        self._norm, loss = result.grad_norm, result.loss
        if GIVEN_COUNT not in batch:  # else it is a part of the update's mean already
            loss = loss / self.current_gradient_accumulation_steps
        return loss.to(self.args.device)

    def _counted(self, inputs: Mapping[str, Any], num_items: Any) -> dict[str, Any]:
        """The batch with the number of targets of the whole update, if the model's own loss takes it."""
        counts = self.model_accepts_loss_kwargs and num_items is not None and "loss" not in self._given
        return {**inputs, GIVEN_COUNT: torch.as_tensor(num_items).cpu()} if counts else dict(inputs)

    def _clip_grad_norm(self, model: torch.nn.Module) -> None:
        """Nothing: the pipeline clips within its update (`args.max_grad_norm`)."""

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> float | None:
        """The norm of the last update's gradients; None where nothing clips, for then none is computed."""
        return None if self._norm is None else float(self._norm)

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """Loss, outputs and labels of one batch, on every rank; outputs take a second pass.

        Raises `ConfigError` for data without labels where no pipeline has been made yet.
        """
        names = self.label_names
        has_labels = bool(names) and all(inputs.get(name) is not None for name in names)
        returns_loss = inputs.get("return_loss", None)
        returns_loss = self.can_return_loss if returns_loss is None else returns_loss
        loss = None
        if has_labels or (not names and returns_loss):
            batch = self._counted(inputs, self._get_num_items_in_batch([inputs], self.args.device))
            loss = self._made_from(batch).evaluate(batch).loss
        if prediction_loss_only:
            return loss, None, None
        if self._pipe is None:
            raise ConfigError(
                "the pipeline is made from a batch with labels, by train() or evaluate(); call one of them "
                "before predict() on data without any"
            )
        config = getattr(self.model, "config", None)
        if ignore_keys is None:
            ignore_keys = getattr(config, "keys_to_ignore_at_inference", ["past_key_values"])
        outputs = _outputs_without(frozenset(ignore_keys) | {"loss"})
        logits = self.pipe.predict(dict(inputs), outputs)
        labels = tuple(inputs[name] for name in names) if has_labels else None
        return loss, _only(logits), _only(labels)

    # -- checkpoints

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write what `from_pretrained` loads, the tokenizer and the arguments; every rank calls this."""
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        if self._pipe is None:
            super()._save(str(folder), state_dict)
            return
        aside = folder / "evenflow_export"  # for an export takes the place of a whole folder
        self._pipe.export(aside)
        if self.args.should_save:
            for old in (*folder.glob("model*.safetensors"), *folder.glob("model.safetensors.index.json")):
                old.unlink()
            for path in aside.iterdir():
                path.replace(folder / path.name)
            shutil.rmtree(aside)
            processing = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            if processing is not None:
                processing.save_pretrained(str(folder))
            torch.save(self.args, folder / "training_args.bin")
        self._pipe.meter.gather(None)  # nobody looks for the files before they are there

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        folder, rank, size = Path(output_dir), self.args.process_index, self.args.world_size
        if self.args.should_save:
            for old in folder.glob(_STATES):
                old.unlink()
        self.pipe.meter.gather(None)  # nobody writes before the old ones are gone
        path = folder / _STATE.format(rank=rank, size=size)
        partial = path.with_suffix(".partial")
        torch.save(self.pipe.state_dict(), partial)
        partial.replace(path)
        self.pipe.meter.gather(None)  # the checkpoint is whole when anybody goes on

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Look whether the run can go on from there; its weights are read when the pipeline is there."""
        _state_files(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self.pipe.load_state_dict(_read_states(Path(self.state.best_model_checkpoint)), optimizer=False)


def _outputs_without(ignored: frozenset[str]) -> Any:  # a function of the model and a microbatch
    def outputs(model: Any, microbatch: Any) -> Any:
        found = model(**microbatch)
        if isinstance(found, Mapping):
            return tuple(value for key, value in found.items() if key not in ignored)
        return found

    return outputs


def _only(things: Any) -> Any:  # what a model returned
    """The one thing of a tuple of one, as the Trainer hands it to metrics."""
    return things[0] if isinstance(things, tuple) and len(things) == 1 else things


def _state_files(folder: Path) -> list[Path]:
    """The files of all processes that wrote a checkpoint; raises `ConfigError` where one is missing."""
    found = sorted(folder.glob(_STATES))
    if not found:
        raise ConfigError(
            f"resume_from_checkpoint={str(folder)!r} holds no evenflow_state_*.pt: it was not written by a "
            "PipelineTrainer, or with save_only_model=True; load its weights with from_pretrained, and start"
        )
    size = int(found[0].stem.rpartition("_")[2])
    if len(found) != size:
        raise ConfigError(
            f"resume_from_checkpoint={str(folder)!r} holds {len(found)} of the {size} files that its "
            "processes wrote (evenflow_state_*.pt): copy the missing ones, or resume from an older checkpoint"
        )
    return found


def _read_states(folder: Path) -> dict[str, Any]:
    """The state of a whole run; tensors are read from the files when they are looked at."""
    return merged([torch.load(path, mmap=True, weights_only=True) for path in _state_files(folder)])
