"""Adapters of PEFT: base weights through renamed layers, no gradients where frozen, adapter-only export."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from torch import distributed as dist
from torch import nn

import evenflow
from evenflow.checkpoint.weights_in import find_weights
from folders import (
    assert_same_numbers,
    halves,
    keys,
    llama,
    llama_without_memory,
    mixtral,
    reads_noted,
    refused,
    split_over_4,
    tokens,
    train_and_export,
)
from unsplit import mean_square, mlp, plain_step, regression, sgd

peft = pytest.importorskip("peft")

# peft asks transformers by a name that transformers has given up.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def lora(**changes):
    return peft.LoraConfig(
        **({"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | changes)
    )


def adapted(base: nn.Module, **changes) -> nn.Module:
    """The model with adapters, the same numbers in them every time."""
    torch.manual_seed(1)
    return peft.get_peft_model(base, lora(**changes)).train()


def adapters_in_memory() -> nn.Module:
    """An adapted model of which the base alone has no memory.

    PEFT puts an adapter beside its base layer, without memory too: give it the seeded numbers.
    """
    model = adapted(llama_without_memory())
    whole = adapted(transformers.LlamaForCausalLM(llama()))
    state = {name: tensor for name, tensor in whole.state_dict().items() if "lora_" in name}
    model.load_state_dict(state, strict=False, assign=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


@pytest.fixture
def folder(tmp_path) -> Path:
    transformers.LlamaForCausalLM(llama()).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def whole(folder: Path, **changes) -> nn.Module:
    return adapted(transformers.LlamaForCausalLM.from_pretrained(folder), **changes)


def own_loss(model, batch):
    return model(**batch).loss


def test_base_weights_load_through_the_layers_that_peft_renamed(folder):
    model = adapters_in_memory()
    pipe = split_over_4(model, tokens(), load=folder)
    assert_same_numbers(whole(folder), pipe.named_parameters())


def test_a_step_is_that_of_the_unsplit_model_bit_for_bit(folder):
    pipe = split_over_4(adapters_in_memory(), tokens(), load=folder)
    expected = plain_step(whole(folder), own_loss, halves(tokens()))
    assert torch.equal(pipe.step(tokens()).loss, expected.loss)
    found = dict(pipe.named_gradients())
    assert found.keys() == expected.gradients.keys()
    assert all(torch.equal(gradient, found[name]) for name, gradient in expected.gradients.items())


def test_frozen_parameters_get_no_gradients(folder):
    pipe = split_over_4(whole(folder), tokens(), load=folder)
    pipe.step(tokens())
    having = {name for name, parameter in pipe.named_parameters() if parameter.grad is not None}
    assert having == {name for name, _ in pipe.named_parameters() if "lora_" in name}


def test_stages_before_the_first_trainable_parameter_run_no_backward(folder):
    pipe = split_over_4(whole(folder, layers_to_transform=[3]), tokens(), load=folder)
    cut = pipe._parts.recordings.entries[0].cut
    trained = [
        section.stage
        for section in cut.sections
        if any("lora_" in name for node in section.nodes for name in node.parameters)
    ]
    first = min(trained)
    assert first >= 2, "else this test says nothing"
    for section in cut.sections:
        assert bool(section.gradient_sends) == (section.stage > first)
        assert bool(section.gradient_receives) == (first <= section.stage < 3)
    roots = []
    for stage in pipe._parts.stages.values():
        stage._walk = noting(stage, roots)
    pipe.step(tokens())
    assert {stage for stage, walked in roots if walked} == set(range(first, 4))
    assert {stage for stage, _ in roots} == set(range(4))


def noting(stage, roots):
    whole_walk = stage._walk

    def walk(flight):
        made = whole_walk(flight)
        roots.append((stage.index, len(made.roots)))
        return made

    return walk


def test_the_adapter_alone_is_exported_and_loads_again(folder, tmp_path):
    pipe = split_over_4(adapters_in_memory(), tokens(), load=folder)
    train_and_export(pipe, tokens(), tmp_path / "exported")
    assert keys(tmp_path / "exported") == {
        f"base_model.model.model.layers.{layer}.self_attn.{module}_proj.lora_{half}.weight"
        for layer in range(4)
        for module in "qv"
        for half in "AB"
    }
    again = peft.PeftModel.from_pretrained(
        transformers.LlamaForCausalLM.from_pretrained(folder), tmp_path / "exported"
    )
    assert_same_numbers(again, pipe.named_parameters())
    trained = dict(pipe.named_parameters())
    assert not any(
        torch.equal(p, trained[name]) for name, p in whole(folder).named_parameters() if "lora_" in name
    )
    train_and_export(pipe, tokens(), tmp_path / "exported")  # in the place of the first


def test_an_exported_adapter_names_its_base_and_is_loaded_with_it(folder, tmp_path):
    first = split_over_4(adapters_in_memory(), tokens(), load=folder)
    train_and_export(first, tokens(), tmp_path / "exported")
    config = json.loads((tmp_path / "exported" / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]) == folder.resolve()
    again = split_over_4(adapted(llama_without_memory()), tokens(), load=tmp_path / "exported")
    base = transformers.LlamaForCausalLM.from_pretrained(folder)
    assert_same_numbers(peft.PeftModel.from_pretrained(base, tmp_path / "exported"), again.named_parameters())
    train_and_export(again, tokens(), tmp_path / "again")
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]) == folder.resolve()


def test_experts_are_fused_under_adapters_too(tmp_path):
    transformers.MixtralForCausalLM(mixtral()).save_pretrained(tmp_path)
    base = transformers.MixtralForCausalLM.from_pretrained(tmp_path, experts_implementation="batched_mm")
    expected = adapted(base)
    pipe = split_over_4(adapted(transformers.MixtralForCausalLM(mixtral())), tokens(), load=tmp_path)
    assert_same_numbers(expected, pipe.named_parameters())


def test_a_module_that_is_trained_whole_starts_from_the_base_and_is_exported(folder, tmp_path):
    pipe = split_over_4(
        adapted(transformers.LlamaForCausalLM(llama()), modules_to_save=["lm_head"]), tokens(), load=folder
    )
    head = transformers.LlamaForCausalLM.from_pretrained(folder).lm_head.weight
    trained = dict(pipe.named_parameters())["base_model.model.lm_head.modules_to_save.default.weight"]
    assert torch.equal(trained, head)
    pipe.step(tokens())
    assert not torch.equal(trained, head)
    pipe.export(tmp_path / "exported")
    assert "base_model.model.lm_head.weight" in keys(tmp_path / "exported")
    base = transformers.LlamaForCausalLM.from_pretrained(folder)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "exported")
    assert_same_numbers(again, pipe.named_parameters())


def test_only_what_is_wanted_comes_out_of_a_key_that_fills_two_parameters(folder):
    model = whole(folder, modules_to_save=["lm_head"])
    weights = find_weights(model, folder, {name: name for name, _ in model.named_parameters()})
    for part in ("original_module", "modules_to_save.default"):
        wanted = f"base_model.model.lm_head.{part}.weight"
        assert [name for name, _ in weights.read({wanted})] == [wanted]


def test_adapters_on_a_plain_module(tmp_path):
    def build():
        return mlp(4, 8, 8, 8, 1)

    evenflow.pipeline(build(), loss=mean_square, example=regression(), stages=2).export(tmp_path / "base")
    model = adapted(nn.Sequential(*build()).apply(zero), target_modules=["2", "4"])
    pipe = split_over_4(model, regression(), loss=mean_square, load=tmp_path / "base")
    assert_same_numbers(adapted(build(), target_modules=["2", "4"]), pipe.named_parameters())
    train_and_export(pipe, regression(), tmp_path / "exported")
    assert_same_numbers(
        peft.PeftModel.from_pretrained(build(), tmp_path / "exported"), pipe.named_parameters()
    )


def zero(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        nn.init.zeros_(parameter)


def test_an_adapter_of_another_name_lies_in_a_folder_of_that_name(folder, tmp_path):
    model = peft.get_peft_model(
        transformers.LlamaForCausalLM.from_pretrained(folder), lora(), adapter_name="mine"
    )
    pipe = split_over_4(model, tokens())
    for _ in range(2):  # the second in the place of the first
        train_and_export(pipe, tokens(), tmp_path / "exported")
    base = transformers.LlamaForCausalLM.from_pretrained(folder)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "exported" / "mine", adapter_name="mine")
    assert_same_numbers(again, pipe.named_parameters())


def test_an_adapter_does_not_take_the_place_of_its_base(folder):
    pipe = split_over_4(whole(folder), tokens(), load=folder)
    with refused(
        "the folder exists and holds what this export does not write (config.json, generation_config"
    ):
        pipe.export(folder)


# -- what does not fit


def test_adapters_without_memory_that_no_folder_holds(folder):
    with refused("16 tensors of the model have no memory (device 'meta'), and load="):
        split_over_4(adapted(llama_without_memory()), tokens(), load=folder)


def test_an_adapter_that_lacks_and_has_other_keys(folder, tmp_path):
    split_over_4(whole(folder), tokens()).export(tmp_path / "exported")
    other = adapted(transformers.LlamaForCausalLM(llama()), target_modules=["q_proj", "k_proj"])
    with refused("8 missing from the folder: base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"):
        split_over_4(other, tokens(), load=tmp_path / "exported")
    with refused("8 unexpected in it: base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight"):
        split_over_4(other, tokens(), load=tmp_path / "exported")


def test_an_adapter_for_a_model_without_one(folder, tmp_path):
    split_over_4(whole(folder), tokens()).export(tmp_path / "exported")
    with refused("holds an adapter, and the LlamaForCausalLM has none: wrap it with peft.get_peft_model"):
        split_over_4(transformers.LlamaForCausalLM(llama()), tokens(), load=tmp_path / "exported")


def test_an_adapter_whose_base_is_not_here(folder, tmp_path):
    split_over_4(whole(folder), tokens()).export(tmp_path / "exported")
    path = tmp_path / "exported" / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": "someone/llama"}
    path.write_text(json.dumps(config))
    with refused("holds an adapter to the base model 'someone/llama', which is no folder here: write"):
        split_over_4(whole(folder), tokens(), load=tmp_path / "exported")


def test_an_adapter_that_was_put_into_the_model_itself(folder, tmp_path):
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    model.add_adapter(lora())
    text = (
        "the model's module model.layers.0.self_attn.q_proj carries an adapter (add_adapter?), and the model"
    )
    with refused(text):
        split_over_4(model, tokens(), load=folder)
    with refused(text):
        split_over_4(model, tokens()).export(tmp_path / "exported")


def test_several_adapters(folder, tmp_path):
    model = whole(folder)
    model.add_adapter("other", lora())
    pipe = split_over_4(model, tokens())
    with refused("the model has several adapters (default, other), and load= and export know one"):
        pipe.export(tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


# -- two processes


def load_and_export(folder: Path):
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    model = peft.get_peft_model(transformers.LlamaForCausalLM(llama()), lora())
    with reads_noted() as noted:
        pipe = evenflow.pipeline(
            model, example=tokens(), num_microbatches=2, optimizer=sgd, load=folder / "llama"
        )
    train_and_export(pipe, tokens(), folder / "exported")
    return noted, {name: p.detach().clone() for name, p in pipe.named_parameters()}


def test_two_ranks_export_one_adapter(folder, tmp_path):
    (read, first), (also, second) = evenflow.launch(load_and_export, tmp_path, nproc=2)
    assert not set(read) & set(also)
    assert set(read) | set(also) == keys(folder)
    assert any("lora_" in name for name in first)
    assert any("lora_" in name for name in second)
    again = peft.PeftModel.from_pretrained(
        transformers.LlamaForCausalLM.from_pretrained(folder), tmp_path / "exported"
    )
    assert_same_numbers(again, first | second)
