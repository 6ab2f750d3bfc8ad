"""`PipelineTrainer`: the Trainer's training, evaluation, checkpoints and resume, alone and on ranks."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import trainer_runs as runs
import transformers
from transformers import LlamaForCausalLM

import evenflow
from evenflow.errors import ConfigError
from evenflow.interop.trainer_refusals import check_version
from preloaded import python

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # transformers' own, of torch
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("trainer")


@cache
def alone(folder):
    return runs.whole_run(folder / "alone")


@cache
def on_two_ranks(folder):
    return evenflow.launch(runs.whole_run, folder / "ranks", nproc=2)


@pytest.fixture(params=["one process", "two ranks"])
def run(request, folder):
    """What each rank found, and where the run wrote."""
    if request.param == "one process":
        return [alone(folder)], folder / "alone"
    return on_two_ranks(folder), folder / "ranks"


def refused(text):
    return pytest.raises(ConfigError, match=f"^{re.escape(text)}")


# -- a whole run


def test_the_loss_falls_and_callbacks_and_schedule_are_the_trainers(run):
    for found in run[0]:
        assert len(found["losses"]) == runs.NUM_STEPS
        assert found["losses"][-1] < found["losses"][0] - 1
        assert found["events"] == list(range(1, runs.NUM_STEPS + 1))
        assert found["rates"][:3] == [0.0, 0.005, 0.01]
        assert found["rates"][-1] < found["rates"][-2] < 0.01


def test_a_resumed_run_makes_the_same_steps(run):
    for found in run[0]:
        assert found["resumed"] == found["losses"]
        assert found["resumed_rates"] == found["rates"]


def test_ranks_find_what_one_process_finds(folder):
    first, second = on_two_ranks(folder)
    assert first == second == alone(folder)


def test_evaluation_is_over_all_rows(run):
    for found in run[0]:
        assert found["evaluated"][-1] == found["eval_loss"] == found["test_loss"]
        assert found["targets"] == sum(
            sum(label != -100 for label in row["labels"][1:]) for row in runs.rows()[:40]
        )
        assert found["predictions"] == (40, runs.LENGTH, 256)
        assert 0.1 < found["accuracy"] < 1


def test_what_was_saved_loads_with_from_pretrained(run):
    found, folder = run[0][0], run[1]
    model = LlamaForCausalLM.from_pretrained(folder / "tuned")
    batch = {key: torch.tensor([row[key] for row in runs.rows()[:16]]) for key in ("input_ids", "labels")}
    plain = runs.trainer(folder / "plain", kind=transformers.Trainer)
    plain.model = plain.model_wrapped = model
    assert plain.evaluate()["eval_loss"] == pytest.approx(found["eval_loss"], rel=1e-6)
    assert model(**batch).loss < 5
    assert (folder / "tuned" / "training_args.bin").exists()


def test_a_checkpoint_holds_the_trainers_files_and_one_for_each_rank(run):
    found, folder = run
    names = {path.name for path in (folder / f"checkpoint-{runs.NUM_STEPS}").iterdir()}
    assert {"config.json", "trainer_state.json", "training_args.bin", "scheduler.pt"} <= names
    size = len(found)
    assert {name for name in names if "evenflow" in name} == {
        f"evenflow_state_{rank}_of_{size}.pt" for rank in range(size)
    }


# -- beside the plain Trainer


@pytest.mark.parametrize("bf16", [False, True])
def test_it_trains_as_the_trainer_does(tmp_path, bf16):
    """Within rounding: the Trainer's batch is one microbatch, the pipeline's four."""
    options = {"bf16": bf16, "save_strategy": "no"}
    plain = runs.trainer(tmp_path / "plain", kind=transformers.Trainer, **options)
    ours = runs.trainer(tmp_path / "ours", pipeline={"num_microbatches": 4}, **options)
    for made in (plain, ours):
        made.train()
    tolerance = 2e-2 if bf16 else 2e-5
    assert runs.curve(ours) == pytest.approx(runs.curve(plain), rel=tolerance)
    assert runs.curve(ours, "eval_loss") == pytest.approx(runs.curve(plain, "eval_loss"), rel=tolerance)
    assert runs.curve(ours, "learning_rate") == runs.curve(plain, "learning_rate")
    if not bf16:
        assert runs.curve(ours, "eval_accuracy") == pytest.approx(
            runs.curve(plain, "eval_accuracy"), abs=2e-3
        )


def test_the_devices_of_one_process_share_a_batch(tmp_path):
    """As where one process sees two GPUs, for each of which the Trainer would read rows."""
    args = runs.arguments(tmp_path, eval_strategy="no")
    args._n_gpu = 2
    made = evenflow.PipelineTrainer(
        model=runs.model(), args=args, train_dataset=runs.rows(), pipeline={"stages": 2}
    )
    batch = next(iter(made.get_train_dataloader()))
    assert len(batch["input_ids"]) == args.per_device_train_batch_size
    assert made.get_total_train_batch_size(args) == 2 * args.per_device_train_batch_size  # accumulated


def test_a_loss_of_ones_own_and_other_optimizers(tmp_path):
    def smooth(model, batch):
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), label_smoothing=0.1
        )

    data = runs.rows()
    made = evenflow.PipelineTrainer(
        model=runs.model(),
        args=runs.arguments(tmp_path, eval_strategy="no", save_strategy="no", lr_scheduler_type="constant"),
        train_dataset=data,
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.5, "momentum": 0.9}),
        pipeline={"stages": 2, "loss": smooth},
    )
    made.train()
    losses = runs.curve(made)
    assert losses[-1] < losses[0] - 0.5
    assert {type(each) for each in made.pipe.optimizers.values()} == {torch.optim.SGD}
    decays = [group["weight_decay"] for group in made.pipe.optimizers[0].param_groups]
    assert decays == [0.1, 0.0]


def test_evaluation_before_training_and_a_second_training(tmp_path):
    made = runs.trainer(tmp_path, save_strategy="no", eval_strategy="no")
    with refused("the pipeline is made from the first batch, by train() or evaluate()"):
        _ = made.pipe
    before = made.evaluate()["eval_loss"]
    assert before == pytest.approx(5.5, abs=0.2)
    made.train()
    middle = made.evaluate()["eval_loss"]
    made.train()
    assert made.evaluate()["eval_loss"] < middle < before


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    made = runs.trainer(
        tmp_path,
        load_best_model_at_end=True,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        max_steps=12,
        eval_steps=3,
        save_steps=3,
        save_total_limit=1,
    )
    made.train()
    best = min(runs.curve(made, "eval_loss"))
    assert made.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-6)


def test_a_run_goes_on_with_another_cut(folder, tmp_path):
    losses = alone(folder)["losses"]
    made = runs.trainer(
        tmp_path, dropout=0.1, pipeline={"stages": 3, "schedule": "gpipe"}, save_strategy="no"
    )
    made.train(resume_from_checkpoint=str(folder / "alone" / f"checkpoint-{runs.RESUMED_AT}"))
    resumed = runs.curve(made)
    assert resumed == pytest.approx(losses, rel=1e-5)


def test_a_run_of_two_ranks_goes_on_in_one_process(folder, tmp_path):
    losses = on_two_ranks(folder)[0]["losses"]
    made = runs.trainer(tmp_path, dropout=0.1, save_strategy="no")
    made.train(resume_from_checkpoint=str(folder / "ranks" / f"checkpoint-{runs.RESUMED_AT}"))
    assert runs.curve(made) == losses


SCRIPT = """
    import sys
    from pathlib import Path
    sys.path[:0] = {paths!r}
    import trainer_runs as runs

    made = runs.trainer(Path(sys.argv[1]), eval_strategy="no")
    made.train()
    if made.is_world_process_zero():
        print("losses", *runs.curve(made))
"""


def test_under_torchrun(tmp_path):
    here = Path(__file__).parent
    script = tmp_path / "script.py"
    lines = (line.removeprefix("    ") for line in SCRIPT.splitlines())
    script.write_text("\n".join(lines).format(paths=[str(here), str(here.parent)]))
    command = [*python(), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, script, tmp_path / "out"], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = re.findall(r"^losses (.*)$", done.stdout, re.MULTILINE)
    losses = [float(word) for word in line.split()]
    assert losses[-1] < losses[0] - 1
    assert (tmp_path / "out" / f"checkpoint-{runs.NUM_STEPS}" / "model.safetensors.index.json").exists()


# -- what is refused


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"torch_compile": True},
            'args.torch_compile=True has no effect on a pipeline: give pipeline={"',
        ),
        (
            {"label_smoothing_factor": 0.1},
            "args.label_smoothing_factor=0.1 has no effect on a pipeline: give",
        ),
        (
            {"auto_find_batch_size": True},
            "args.auto_find_batch_size=True has no effect on a pipeline: a pipe",
        ),
        ({"neftune_noise_alpha": 1.0}, "args.neftune_noise_alpha=1.0 has no effect on a pipeline: leave it"),
        (
            {"load_best_model_at_end": True, "save_only_model": True},
            "args.load_best_model_at_end=True reads what args.save_only_model=True leaves out of a ",
        ),
    ],
)
def test_training_arguments_that_would_be_ignored(tmp_path, options, text):
    with refused(text):
        runs.trainer(tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"pipeline": {"optimizer": 1}},
            "pipeline={'optimizer': …}: a PipelineTrainer takes it from args.optim",
        ),
        ({"optimizers": (object(), None)}, "optimizers= holds an optimizer that was made before the model"),
        ({"compute_loss_func": print}, "compute_loss_func= sees whole outputs, and a pipeline calls one"),
        ({"model_init": print}, "model_init= makes the model anew for each train(); give model="),
    ],
)
def test_trainer_arguments_that_would_be_ignored(tmp_path, options, text):
    with refused(text):
        evenflow.PipelineTrainer(model=runs.model(), args=runs.arguments(tmp_path), **options)


def test_a_loss_in_a_subclass(tmp_path):
    class Own(evenflow.PipelineTrainer):
        def compute_loss(self, *args, **kwargs):
            raise AssertionError("never called")

    with refused("Own overrides compute_loss, which a pipeline never calls; give the loss as pipeline="):
        Own(model=runs.model(), args=runs.arguments(tmp_path))


def test_checkpoints_that_nobody_can_go_on_from(tmp_path):
    made = runs.trainer(tmp_path)
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    with refused(f"resume_from_checkpoint={str(folder)!r} holds no evenflow_state_*.pt: it was not written"):
        made.train(resume_from_checkpoint=str(folder))
    torch.save({}, folder / "evenflow_state_0_of_2.pt")
    with refused(f"resume_from_checkpoint={str(folder)!r} holds 1 of the 2 files that its processes wrote"):
        made.train(resume_from_checkpoint=str(folder))


def test_an_optimizer_that_wants_the_whole_model(tmp_path):
    made = runs.trainer(tmp_path)
    made.optimizer_cls_and_kwargs = (torch.optim.SGD, {"lr": 0.1, "model": made.model})
    with refused("the optimizer SGD is made from the whole model (model=), and here each stage has its own"):
        made.train()


def test_a_transformers_that_is_too_old():
    with refused(
        "PipelineTrainer needs transformers 5.3 or newer, and 5.2.0 is installed: pip install 'tran"
    ):
        check_version("5.2.0")
    check_version("5.24.0.dev0")
    check_version("6.0.0")


def test_evenflow_does_not_import_transformers():
    code = "import evenflow, evenflow.pipe.build, sys; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
