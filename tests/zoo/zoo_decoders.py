"""Decoders of transformers: models of the next token, dense, with experts, and recurrent."""

from typing import Any

import torch
from zoo_case import loss_and_whole_output
from zoo_configured import (
    DECODER,
    LENGTH,
    ROWS,
    VOCABULARY,
    family,
    generator,
    padding,
    text,
    texts_and_classes,
    tokens,
)

EXPERTS = {
    "moe_intermediate_size": 12,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "output_router_logits": True,
}

DEEPSEEK = {
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 12,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}

LONG_ROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 4,
}

GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 2,
    "n_positions": 16,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}

decoder = family(DECODER, ties=True)
gpt2 = family(GPT2)


def packed_text() -> dict[str, torch.Tensor]:
    """Two sequences in each row, told apart by their positions alone."""
    positions = torch.arange(LENGTH).remainder(LENGTH // 2).repeat(ROWS, 1)
    return {"input_ids": tokens(), "labels": tokens(), "position_ids": positions}


def typed_text() -> dict[str, torch.Tensor]:
    return text() | {"token_type_ids": texts_and_classes()["token_type_ids"]}


def loss_over_items(model: Any, batch: Any) -> torch.Tensor:
    """The loss as transformers' trainer asks for it: divided by the tokens of the whole batch."""
    return model(**batch, num_items_in_batch=ROWS * LENGTH).loss


def checkpointed(model: Any) -> None:
    model.activation_checkpointing_enable()


DECODERS = [
    decoder("llama", "LlamaForCausalLM"),
    decoder("llama, eager attention", "LlamaForCausalLM", attn_implementation="eager"),
    decoder("llama, hidden states", "LlamaForCausalLM", output_hidden_states=True),
    decoder("llama, tied", "LlamaForCausalLM", exact=True),
    decoder("llama, checkpointed", "LlamaForCausalLM", prepare=checkpointed),
    decoder("llama, cache returned", "LlamaForCausalLM", loss=loss_and_whole_output),
    decoder(
        "llama, biases and long rope",
        "LlamaForCausalLM",
        attention_bias=True,
        mlp_bias=True,
        rope_parameters={
            "rope_type": "yarn",
            "factor": 2.0,
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 16,
        },
    ),
    decoder("qwen2", "Qwen2ForCausalLM"),
    decoder("qwen3", "Qwen3ForCausalLM", head_dim=8),
    decoder("mistral", "MistralForCausalLM"),
    decoder("mistral, sliding window", "MistralForCausalLM", sliding_window=4),
    decoder("gemma", "GemmaForCausalLM", head_dim=8, exact=True),
    decoder("gemma2", "Gemma2ForCausalLM", head_dim=8, exact=True, sliding_window=4),
    decoder(
        "gemma3",
        "Gemma3ForCausalLM",
        head_dim=8,
        exact=True,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    decoder(
        "gemma3n",
        "Gemma3nForCausalLM",
        head_dim=8,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=4,
        laurel_rank=4,
        altup_num_inputs=2,
        intermediate_size=[24] * 4,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
    ),
    decoder("phi", "PhiForCausalLM", num_key_value_heads=2),
    decoder("phi3", "Phi3ForCausalLM"),
    decoder("falcon", "FalconForCausalLM", exact=True, num_kv_heads=1),
    decoder("falcon, alibi", "FalconForCausalLM", alibi=True, new_decoder_architecture=True, num_kv_heads=1),
    decoder("gpt-neox", "GPTNeoXForCausalLM"),
    decoder("gptj", "GPTJForCausalLM", n_embd=16, n_layer=3, n_head=2, n_positions=32, rotary_dim=4),
    decoder("opt", "OPTForCausalLM", exact=True, ffn_dim=24, dropout=0.0, word_embed_proj_dim=8),
    decoder("bloom", "BloomForCausalLM", exact=True, n_layer=3, n_head=2),
    decoder(
        "gpt-neo",
        "GPTNeoForCausalLM",
        exact=True,
        attention_types=[[["global", "local", "global"], 1]],
        window_size=4,
        attention_dropout=0.0,
        embed_dropout=0.0,
        resid_dropout=0.0,
    ),
    decoder(
        "gpt-bigcode",
        "GPTBigCodeForCausalLM",
        exact=True,
        n_embd=16,
        n_layer=3,
        n_head=2,
        n_positions=32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    decoder("mamba", "MambaForCausalLM", state_size=4, time_step_rank=4),
    decoder("mamba2", "Mamba2ForCausalLM", state_size=4, num_heads=4, head_dim=8, n_groups=2, chunk_size=4),
    decoder("falcon-mamba", "FalconMambaForCausalLM", state_size=4, time_step_rank=4),
    decoder(
        "recurrent-gemma", "RecurrentGemmaForCausalLM", exact=True, lru_width=16, attention_window_size=4
    ),
    decoder(  # its evaluation divides weights in place
        "rwkv",
        "RwkvForCausalLM",
        attention_hidden_size=16,
        refused=r"rwkv stays whole \(.*layers_are_rescaled\)",
    ),
    decoder("deepseek-v3", "DeepseekV3ForCausalLM", **DEEPSEEK, num_mtp_layers=0),
    decoder(
        "deepseek-v3, batched experts",
        "DeepseekV3ForCausalLM",
        **DEEPSEEK,
        num_mtp_layers=0,
        experts_implementation="batched_mm",
    ),
    decoder(
        "deepseek-v2",
        "DeepseekV2ForCausalLM",
        **DEEPSEEK,
        experts_implementation="batched_mm",
    ),
    decoder("stablelm", "StableLmForCausalLM", use_qkv_bias=True, qk_layernorm=True),
    decoder("cohere", "CohereForCausalLM", exact=True, use_qk_norm=True),
    decoder(
        "cohere2",
        "Cohere2ForCausalLM",
        exact=True,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    decoder("glm", "GlmForCausalLM", head_dim=8),
    decoder("glm4", "Glm4ForCausalLM", head_dim=8),
    decoder("granite", "GraniteForCausalLM", residual_multiplier=0.5, logits_scaling=2.0),
    decoder("smollm3", "SmolLM3ForCausalLM", exact=True, no_rope_layer_interval=2),
    decoder("olmo2", "Olmo2ForCausalLM"),
    decoder("starcoder2", "Starcoder2ForCausalLM", exact=True),
    decoder("nemotron", "NemotronForCausalLM"),
    decoder("codegen", "CodeGenForCausalLM", num_attention_heads=4, rotary_dim=4),
    decoder("mixtral", "MixtralForCausalLM", **EXPERTS),
    decoder("mixtral, batched experts", "MixtralForCausalLM", **EXPERTS, experts_implementation="batched_mm"),
    decoder("mixtral, eager experts", "MixtralForCausalLM", **EXPERTS, experts_implementation="eager"),
    decoder("qwen3-moe", "Qwen3MoeForCausalLM", **EXPERTS, head_dim=8, experts_implementation="batched_mm"),
    decoder("olmoe", "OlmoeForCausalLM", **EXPERTS, experts_implementation="batched_mm"),
    decoder(
        "gpt-oss",
        "GptOssForCausalLM",
        **EXPERTS,
        head_dim=8,
        sliding_window=4,
        experts_implementation="batched_mm",
    ),
    decoder(
        "qwen3-next",
        "Qwen3NextForCausalLM",
        **EXPERTS,
        num_hidden_layers=4,
        head_dim=8,
        linear_key_head_dim=4,
        linear_value_head_dim=4,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        shared_expert_intermediate_size=12,
        experts_implementation="batched_mm",
    ),
    decoder(
        "jamba",
        "JambaForCausalLM",
        **EXPERTS,
        num_hidden_layers=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=4,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
        experts_implementation="batched_mm",
    ),
    decoder("lfm2", "Lfm2ForCausalLM", exact=True, block_ff_dim=24, full_attn_idxs=[1]),
    decoder("llama, attentions", "LlamaForCausalLM", attn_implementation="eager", output_attentions=True),
    decoder("llama, packed", "LlamaForCausalLM", batch=packed_text),
    decoder(
        "llama, dynamic rope",
        "LlamaForCausalLM",
        max_position_embeddings=4,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    ),
    decoder("llama, loss over items", "LlamaForCausalLM", loss=loss_over_items),
    decoder(
        "phi3, long rope", "Phi3ForCausalLM", original_max_position_embeddings=4, rope_parameters=LONG_ROPE
    ),
    decoder("persimmon", "PersimmonForCausalLM", num_key_value_heads=2),
    decoder("diffllama", "DiffLlamaForCausalLM", num_key_value_heads=2),
    decoder("doge", "DogeForCausalLM", num_key_value_heads=2),
    decoder(
        "llama4",
        "Llama4ForCausalLM",
        **EXPERTS,
        head_dim=8,
        intermediate_size_mlp=24,
        interleave_moe_layer_step=2,
        attention_chunk_size=4,
    ),
    decoder(
        "minimax",
        "MiniMaxForCausalLM",
        **EXPERTS,
        head_dim=8,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        block_size=4,
        experts_implementation="batched_mm",
    ),
    decoder(
        "phimoe",
        "PhimoeForCausalLM",
        **EXPERTS,
        router_jitter_noise=0.0,
        input_jitter_noise=0.0,
        experts_implementation="batched_mm",
    ),
    decoder(
        "dbrx",
        "DbrxForCausalLM",
        d_model=16,
        n_heads=2,
        n_layers=3,
        max_seq_len=32,
        attn_config={"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 12, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 16},
    ),
    decoder("mpt", "MptForCausalLM", d_model=16, n_heads=2, n_layers=3, max_seq_len=32, expansion_ratio=2),
    decoder(
        "zamba2",
        "Zamba2ForCausalLM",
        num_key_value_heads=2,
        mamba_d_state=4,
        mamba_headdim=8,
        n_mamba_heads=4,
        mamba_ngroups=1,
        chunk_size=4,
        layers_block_type=["mamba", "hybrid", "mamba"],
        hybrid_layer_ids=[1],
        num_mem_blocks=1,
        attention_hidden_size=32,
        attention_head_dim=16,
        adapter_rank=4,
    ),
    decoder(
        "gemma4",
        "Gemma4ForCausalLM",
        head_dim=8,
        global_head_dim=8,
        sliding_window=4,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=VOCABULARY,
    ),
    gpt2("gpt2", "GPT2LMHeadModel", text, exact=True),
    gpt2("gpt2, token types", "GPT2LMHeadModel", typed_text, exact=True),
    gpt2(
        "gpt2, classes",
        "GPT2ForSequenceClassification",
        texts_and_classes,
        pad_token_id=0,
        num_labels=3,
    ),
    decoder(
        "llama, classes",
        "LlamaForSequenceClassification",
        batch=lambda: {k: v for k, v in texts_and_classes().items() if k != "token_type_ids"},
        num_labels=3,
    ),
    decoder(
        "llama, left padding",
        "LlamaForCausalLM",
        batch=lambda: text() | {"attention_mask": padding(left=True)},
    ),
    decoder(
        "llama, full and padded rows",
        "LlamaForCausalLM",
        batch=lambda: text() | {"attention_mask": padding().index_fill(0, torch.tensor([0, 1]), 1)},
    ),
    decoder(
        "llama, embeddings given",
        "LlamaForCausalLM",
        batch=lambda: {
            "inputs_embeds": torch.randn(ROWS, LENGTH, 16, generator=generator()),
            "labels": tokens(),
        },
    ),
    decoder("llama, no cache", "LlamaForCausalLM", use_cache=False, loss=loss_and_whole_output),
]
