"""Every architecture's weights in and out as transformers itself stores them, without a pipeline around."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

from evenflow.checkpoint.weights_in import find_weights
from evenflow.checkpoint.weights_out import export_model
from evenflow.graph.kernels.fakes import FakeParameters
from evenflow.runtime.ranks.world import SingleProcess

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
}
DECODER = SIZES | {"num_key_value_heads": 2}
BOTH = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
IMAGE = {name: SIZES[name] for name in SIZES if name != "vocab_size"} | {"image_size": 8, "patch_size": 4}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16}

MODELS = {
    "BertForMaskedLM": SIZES,
    "AlbertForMaskedLM": SIZES | {"embedding_size": 16},
    "T5ForConditionalGeneration": {
        "d_model": 32,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 2,
        "d_kv": 16,
        "vocab_size": 64,
    },
    "BartForConditionalGeneration": BOTH,
    "MarianMTModel": BOTH,
    "Qwen2MoeForCausalLM": DECODER | EXPERTS | {"shared_expert_intermediate_size": 16},
    "PhimoeForCausalLM": DECODER | {"num_local_experts": 4},
    "GptOssForCausalLM": DECODER | {"num_local_experts": 4, "head_dim": 8},
    "DeepseekV3ForCausalLM": DECODER
    | {
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "CLIPModel": {"text_config": SIZES, "vision_config": IMAGE},
    "LlavaForConditionalGeneration": {
        "text_config": DECODER | {"model_type": "llama"},
        "vision_config": IMAGE | {"model_type": "clip_vision_model"},
    },
    "Wav2Vec2ForCTC": SIZES  # with weight_norm, stored under the names of old
    | {
        "conv_dim": (8, 8),
        "conv_stride": (2, 2),
        "conv_kernel": (3, 3),
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
    },
    "ResNetForImageClassification": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
}


def named(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Distinct parameters and persistent buffers."""
    stored = set(model.state_dict())
    return dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n in stored}


@pytest.mark.parametrize("name", MODELS)
def test_weights_in_and_out_are_those_of_transformers(tmp_path, name):
    kind = getattr(transformers, name)
    config = kind.config_class(**MODELS[name])
    kind(config).save_pretrained(tmp_path / "theirs")
    expected = kind.from_pretrained(tmp_path / "theirs").state_dict()

    model = kind(config)
    tensors = named(model)
    fakes = FakeParameters(model, torch.device("cpu"))
    weights = find_weights(model, tmp_path / "theirs", fakes.tied)
    names = list(tensors)
    for part in (set(names[::2]), set(names[1::2])):  # as two processes would
        found = dict(weights.read(part))
        assert found.keys() <= part
        for each, tensor in found.items():
            tensors[each].data.copy_(tensor)
    assert all(torch.equal(tensor, expected[each]) for each, tensor in model.state_dict().items())

    export_model(tmp_path / "ours", SingleProcess(), model, tensors, loaded=None)
    ours, theirs = (load_file(tmp_path / who / "model.safetensors") for who in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[each]) for each, tensor in ours.items())
