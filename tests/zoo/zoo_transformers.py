"""Models of transformers, as small as their configurations let them be."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from zoo_case import Case, loss_and_output, loss_and_whole_output

from evenflow.runtime.microbatch import Microbatches, split
from unsplit import Loss

VOCABULARY = 64
ROWS, LENGTH = 6, 8

transformers.logging.set_verbosity_error()


def built(kind: str, prepare: Callable[[Any], None] | None = None, **config: Any) -> Callable[[], Any]:
    """A builder of transformers' class `kind`, its configuration with these values.

    All parameters are moved off what they were initialised to, zeros and ones among it: a gradient that is
    zero for every input would hide a mistake.
    """

    def build() -> torch.nn.Module:
        torch.manual_seed(0)
        model_class = getattr(transformers, kind)
        model = model_class(model_class.config_class(**config)).train()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape), alpha=0.05)
        if prepare is not None:
            prepare(model)
        return model

    return build


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(rows: int = ROWS, length: int = LENGTH, seed: int = 5) -> torch.Tensor:
    return torch.randint(5, VOCABULARY, (rows, length), generator=generator(seed))


def padding(rows: int = ROWS, length: int = LENGTH, *, left: bool = False) -> torch.Tensor:
    """A mask whose rows end, or begin, at different places."""
    mask = torch.ones(rows, length, dtype=torch.int64)
    for row in range(rows):
        cut = row * 3 % 5
        if left:
            mask[row, :cut] = 0
        elif cut:
            mask[row, -cut:] = 0
    return mask


def text(**more: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Token ids, a mask with padding, and labels that leave the padding out."""
    ids, mask = tokens(), padding()
    batch = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    batch["labels"] = ids.masked_fill(mask == 0, -100)
    return batch | {key: make() for key, make in more.items()}


DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {
    "moe_intermediate_size": 12,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "output_router_logits": True,
}


def decoder(
    name: str,
    kind: str,
    *,
    exact: bool = False,
    refused: str = "",
    loss: Loss = loss_and_output,
    batch: Callable[[], Any] = text,
    prepare: Callable[[Any], None] | None = None,
    **config: Any,
) -> Case:
    """A decoder-only model; `exact`: its word embeddings are tied to its head."""
    values = DECODER | {"tie_word_embeddings": exact} | config
    return Case(name, built(kind, prepare, **values), batch, loss=loss, exact=exact, refused=refused)


def alike(_: Any) -> float:
    """The weight of each microbatch, where rows cannot be counted because its tensors disagree."""
    return 1.0


def packed_text() -> dict[str, torch.Tensor]:
    """Two sequences in each row, told apart by their positions alone."""
    positions = torch.arange(LENGTH).remainder(LENGTH // 2).repeat(ROWS, 1)
    return {"input_ids": tokens(), "labels": tokens(), "position_ids": positions}


def loss_over_items(model: Any, batch: Any) -> torch.Tensor:
    """The loss as transformers' trainer asks for it: divided by the tokens of the whole batch."""
    return model(**batch, num_items_in_batch=ROWS * LENGTH).loss


LONG_ROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 4,
}


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
    decoder(
        "deepseek-v3",
        "DeepseekV3ForCausalLM",
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        moe_intermediate_size=12,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        num_mtp_layers=0,
    ),
    decoder(
        "deepseek-v3, batched experts",
        "DeepseekV3ForCausalLM",
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        moe_intermediate_size=12,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        num_mtp_layers=0,
        experts_implementation="batched_mm",
    ),
    decoder(
        "deepseek-v2",
        "DeepseekV2ForCausalLM",
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        moe_intermediate_size=12,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
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
]


# -- encoders

ENCODER = DECODER | {
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "classifier_dropout": 0.0,
    "attention_dropout": 0.0,
    "embedding_size": 12,
    "num_labels": 3,
    "num_key_value_heads": 2,
}


def encoder(
    name: str,
    kind: str,
    *,
    exact: bool = False,
    loss: Loss = loss_and_output,
    batch: Callable[[], Any] = text,
    **config: Any,
) -> Case:
    values = ENCODER | {"tie_word_embeddings": exact} | config
    return Case(name, built(kind, **values), batch, loss=loss, exact=exact)


def other(
    name: str,
    kind: str,
    batch: Callable[[], Any],
    *,
    exact: bool = False,
    loss: Loss = loss_and_output,
    reduction: Any = "item-mean",
    prepare: Callable[[Any], None] | None = None,
    **config: Any,
) -> Case:
    """A model with a configuration of its own."""
    build = built(kind, prepare, **config)
    return Case(name, build, batch, loss=loss, exact=exact, reduction=reduction)


def texts_and_classes() -> dict[str, torch.Tensor]:
    """Texts of two segments, each with a class of three."""
    batch = text()
    batch["token_type_ids"] = (torch.arange(LENGTH) > torch.arange(ROWS)[:, None]).long()
    batch["labels"] = torch.randint(0, 3, (ROWS,), generator=generator())
    return batch


def texts_and_answers() -> dict[str, torch.Tensor]:
    batch = text()
    del batch["labels"]
    places = torch.randint(0, LENGTH // 2, (2, ROWS), generator=generator())
    return batch | {"start_positions": places[0], "end_positions": places[1] + 2}


def texts_and_choices() -> dict[str, torch.Tensor]:
    """Two choices for each row."""
    ids, mask = tokens(2 * ROWS).view(ROWS, 2, LENGTH), padding(2 * ROWS).view(ROWS, 2, LENGTH)
    labels = torch.randint(0, 2, (ROWS,), generator=generator())
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}


def texts_without_mask() -> dict[str, torch.Tensor]:
    batch = text()
    del batch["attention_mask"]
    return batch


def long_text(length: int) -> dict[str, torch.Tensor]:
    ids, mask = tokens(length=length), padding(length=length)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def boxes() -> torch.Tensor:
    corners = torch.randint(0, 16, (ROWS, LENGTH, 2), generator=generator())
    return torch.cat([corners, corners + 5], dim=-1)


ENCODERS = [
    encoder("bert", "BertForMaskedLM", exact=True),
    encoder("bert, classes", "BertForSequenceClassification", batch=texts_and_classes),
    encoder("bert, answers", "BertForQuestionAnswering", num_labels=2, batch=texts_and_answers),
    encoder("bert, choices", "BertForMultipleChoice", batch=texts_and_choices),
    encoder(
        "bert, tokens",
        "BertForTokenClassification",
        batch=lambda: text() | {"labels": text()["labels"].clamp(max=2)},
    ),
    encoder(
        "bert, several labels",
        "BertForSequenceClassification",
        problem_type="multi_label_classification",
        batch=lambda: texts_and_classes() | {"labels": tokens(length=3) % 2 * 1.0},
    ),
    encoder("roberta", "RobertaForMaskedLM", exact=True),
    encoder("roberta, classes", "RobertaForSequenceClassification", batch=texts_and_classes),
    encoder("xlm-roberta", "XLMRobertaForMaskedLM", exact=True),
    encoder("albert", "AlbertForMaskedLM", exact=True),
    encoder("electra", "ElectraForMaskedLM", exact=True),
    encoder(
        "electra, discriminator",
        "ElectraForPreTraining",
        batch=lambda: text() | {"labels": tokens() % 2},
    ),
    encoder(
        "deberta",
        "DebertaForMaskedLM",
        exact=True,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        max_relative_positions=8,
    ),
    encoder(
        "deberta-v2",
        "DebertaV2ForMaskedLM",
        exact=True,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_buckets=4,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        conv_kernel_size=3,
        position_biased_input=False,
    ),
    encoder("distilbert", "DistilBertForMaskedLM", exact=True, dim=16, hidden_dim=24, dropout=0.0),
    encoder("mpnet", "MPNetForMaskedLM", exact=True),
    encoder(
        "modernbert", "ModernBertForMaskedLM", exact=True, local_attention=4, global_attn_every_n_layers=2
    ),
    encoder("longformer", "LongformerForMaskedLM", exact=True, attention_window=4),
    encoder("big-bird", "BigBirdForMaskedLM", exact=True, attention_type="original_full"),
    encoder(
        "big-bird, sparse",
        "BigBirdForMaskedLM",
        exact=True,
        block_size=2,
        num_random_blocks=1,
        batch=lambda: long_text(24),
        max_position_embeddings=32,
    ),
    encoder("roformer", "RoFormerForMaskedLM", exact=True),
    encoder(
        "fnet",
        "FNetForMaskedLM",
        exact=True,
        batch=lambda: {k: v for k, v in text().items() if k != "attention_mask"},
    ),
    encoder(
        "squeezebert",
        "SqueezeBertForMaskedLM",
        embedding_size=16,
        q_groups=2,
        k_groups=2,
        v_groups=2,
        post_attention_groups=1,
        intermediate_groups=2,
        output_groups=2,
    ),
    encoder(
        "mobilebert",
        "MobileBertForMaskedLM",
        embedding_size=8,
        intra_bottleneck_size=8,
        true_hidden_size=8,
        num_feedforward_networks=2,
    ),
    other(
        "funnel",
        "FunnelForMaskedLM",
        text,
        exact=True,
        vocab_size=VOCABULARY,
        block_sizes=[2, 1],
        num_decoder_layers=1,
        d_model=16,
        n_head=2,
        d_head=8,
        d_inner=24,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
    ),
    encoder("camembert", "CamembertForMaskedLM", exact=True),
    encoder("nomic", "NomicBertForMaskedLM"),
    encoder(
        "esm",
        "EsmForMaskedLM",
        mask_token_id=4,
        position_embedding_type="rotary",
        token_dropout=True,
        emb_layer_norm_before=True,
    ),
    encoder(
        "layoutlm",
        "LayoutLMForMaskedLM",
        exact=True,
        max_2d_position_embeddings=32,
        batch=lambda: text() | {"bbox": boxes()},
    ),
    other(
        "xlnet",
        "XLNetLMHeadModel",
        text,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
        d_model=16,
        n_layer=3,
        n_head=2,
        d_inner=24,
        dropout=0.0,
    ),
    encoder(
        "reformer",
        "ReformerForMaskedLM",
        is_decoder=False,
        attn_layers=["local", "lsh", "local"],
        axial_pos_shape=[4, 2],
        axial_pos_embds_dim=[8, 8],
        feed_forward_size=24,
        attention_head_size=8,
        local_attn_chunk_length=4,
        lsh_attn_chunk_length=4,
        num_buckets=2,
        num_hashes=1,
        hash_seed=1,
        lsh_attention_probs_dropout_prob=0.0,
        local_attention_probs_dropout_prob=0.0,
    ),
    encoder(
        "canine",
        "CanineForSequenceClassification",
        num_hash_buckets=16,
        downsampling_rate=2,
        local_transformer_stride=4,
        upsampling_kernel_size=2,
        batch=texts_and_classes,
    ),
    encoder(
        "nystromformer",
        "NystromformerForMaskedLM",
        num_landmarks=4,
        segment_means_seq_len=8,
        conv_kernel_size=3,
        batch=texts_without_mask,
    ),
    encoder("yoso", "YosoForMaskedLM", use_expectation=True),
    encoder("convbert", "ConvBertForMaskedLM", conv_kernel_size=3, head_ratio=2, num_groups=1),
    encoder(
        "perceiver",
        "PerceiverForMaskedLM",
        exact=True,
        max_position_embeddings=LENGTH,
        num_latents=4,
        d_latents=16,
        d_model=16,
        num_blocks=1,
        num_self_attends_per_block=2,
        num_self_attention_heads=2,
        num_cross_attention_heads=2,
        qk_channels=16,
        v_channels=16,
    ),
]


# -- encoders and decoders

BOTH = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 16,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 2,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "relative_attention_num_buckets": 4,
    "relative_attention_max_distance": 8,
}


def both(
    name: str,
    kind: str,
    *,
    exact: bool = True,
    loss: Loss = loss_and_output,
    batch: Callable[[], Any] = text,
    **config: Any,
) -> Case:
    values = BOTH | {"tie_word_embeddings": exact} | config
    return Case(name, built(kind, **values), batch, loss=loss, exact=exact)


def translations() -> dict[str, torch.Tensor]:
    """Labels shorter than what they translate."""
    batch = text()
    ids, mask = tokens(length=5, seed=6), padding(length=5)
    return batch | {"labels": ids.masked_fill(mask.flip(0) == 0, -100)}


def speech_to_text() -> dict[str, torch.Tensor]:
    sound = torch.randn(ROWS, 8, 24, generator=generator())
    return {"input_features": sound, "labels": translations()["labels"]}


def t5(
    name: str,
    kind: str,
    *,
    exact: bool = True,
    batch: Callable[[], Any] = text,
    **config: Any,
) -> Case:
    return Case(name, built(kind, **(T5 | config)), batch, exact=exact)


ENCODER_DECODERS = [
    t5("t5", "T5ForConditionalGeneration"),
    t5("t5, other lengths", "T5ForConditionalGeneration", batch=translations),
    t5("t5, gated", "T5ForConditionalGeneration", feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    t5("mt5", "MT5ForConditionalGeneration", batch=translations),
    t5("umt5", "UMT5ForConditionalGeneration", batch=translations),
    t5("long-t5", "LongT5ForConditionalGeneration", local_radius=2, batch=translations),
    t5(
        "long-t5, global",
        "LongT5ForConditionalGeneration",
        local_radius=2,
        global_block_size=2,
        encoder_attention_type="transient-global",
        batch=translations,
    ),
    t5(
        "switch",
        "SwitchTransformersForConditionalGeneration",
        num_experts=4,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        router_jitter_noise=0.0,
        expert_capacity=8,
        batch=translations,
    ),
    both("bart", "BartForConditionalGeneration"),
    both("bart, other lengths", "BartForConditionalGeneration", batch=translations),
    both("pegasus", "PegasusForConditionalGeneration", batch=translations),
    both("marian", "MarianMTModel", batch=translations),
    both("mbart", "MBartForConditionalGeneration", batch=translations),
    both("m2m-100", "M2M100ForConditionalGeneration", batch=translations),
    both("blenderbot", "BlenderbotForConditionalGeneration", batch=translations),
    both(
        "led",
        "LEDForConditionalGeneration",
        attention_window=4,
        max_encoder_position_embeddings=16,
        max_decoder_position_embeddings=16,
        batch=translations,
    ),
    other(
        "prophetnet",
        "ProphetNetForConditionalGeneration",
        translations,
        exact=True,
        vocab_size=VOCABULARY,
        max_position_embeddings=16,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        pad_token_id=0,
        decoder_start_token_id=1,
        hidden_size=16,
        num_encoder_layers=2,
        num_decoder_layers=2,
        num_encoder_attention_heads=2,
        num_decoder_attention_heads=2,
        ngram=2,
        num_buckets=4,
        relative_max_distance=8,
    ),
    both(
        "whisper",
        "WhisperForConditionalGeneration",
        num_mel_bins=8,
        max_source_positions=12,
        max_target_positions=16,
        batch=speech_to_text,
    ),
    both(
        "speech-to-text",
        "Speech2TextForConditionalGeneration",
        input_feat_per_channel=8,
        num_conv_layers=2,
        conv_kernel_sizes=[3, 3],
        conv_channels=8,
        max_source_positions=32,
        max_target_positions=16,
        batch=lambda: speech_to_text() | {"input_features": torch.randn(ROWS, 24, 8, generator=generator())},
    ),
]


# -- pictures

PICTURE = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 8,
    "num_labels": 3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "drop_path_rate": 0.0,
}


def pixels(size: int = 16, rows: int = ROWS) -> torch.Tensor:
    return torch.randn(rows, 3, size, size, generator=generator())


def classes() -> torch.Tensor:
    return torch.randint(0, 3, (ROWS,), generator=generator())


def pictures(size: int = 16) -> dict[str, torch.Tensor]:
    return {"pixel_values": pixels(size), "labels": classes()}


def picture(name: str, kind: str, batch: Callable[[], Any] = pictures, **config: Any) -> Case:
    return other(name, kind, batch, **(PICTURE | config))


def large_pictures() -> dict[str, torch.Tensor]:
    return pictures(32)


def pyramid(name: str, kind: str, batch: Callable[[], Any] = large_pictures, **config: Any) -> Case:
    """A model whose stages have sizes of their own."""
    return other(name, kind, batch, **({"num_labels": 3, "drop_path_rate": 0.0} | config))


def segments(size: int) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": pixels(size),
        "labels": torch.randint(0, 3, (ROWS, size, size), generator=generator()),
    }


def masked_pictures() -> dict[str, torch.Tensor]:
    """Some patches of each picture are hidden, and told from the others."""
    return {"pixel_values": pixels(), "bool_masked_pos": torch.rand(ROWS, 4, generator=generator()) < 0.6}


def told_patches() -> Microbatches:
    """Masked pictures with a label for each hidden patch, of which each microbatch has another number."""
    items = split(masked_pictures(), 3)
    for item in items:
        hidden = int(item["bool_masked_pos"].sum())
        item["labels"] = torch.randint(0, VOCABULARY, (hidden,), generator=generator(hidden))
    return Microbatches(items)


def boxes_loss(model: Any, batch: Any) -> tuple[torch.Tensor, Any]:
    """A loss of detections that needs no assignment of boxes."""
    output = model(**batch)
    return output.logits.square().mean() + output.pred_boxes.square().mean(), output


SEGFORMER = {
    "num_encoder_blocks": 2,
    "depths": [1, 2],
    "sr_ratios": [2, 1],
    "hidden_sizes": [8, 16],
    "patch_sizes": [3, 3],
    "strides": [2, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 8,
    "classifier_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"}
DETR = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "num_queries": 4,
    "dropout": 0.0,
    "backbone_config": {"model_type": "resnet", "out_features": ["stage2"], **RESNET},
    "num_labels": 3,
}
SWIN = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [2, 2],
    "num_heads": [1, 2],
    "window_size": 4,
}


def uncached(of: str) -> Callable[[Any], None]:
    """Forget what a module class of transformers keeps between calls, whoever made them."""

    def prepare(model: Any) -> None:
        kind = next(type(module) for module in model.modules() if type(module).__name__ == of)
        inspect.getclosurevars(kind.generate_relative_position_index).nonlocals[
            "func_with_cache"
        ].cache_clear()

    return prepare


PICTURES = [
    picture("vit", "ViTForImageClassification"),
    picture("vit, masked", "ViTForMaskedImageModeling", masked_pictures, encoder_stride=8),
    picture("deit", "DeiTForImageClassification"),
    picture(
        "deit, teacher",
        "DeiTForImageClassificationWithTeacher",
        lambda: {"pixel_values": pixels()},
        loss=lambda model, batch: ((output := model(**batch)).logits.square().mean(), output),
    ),
    picture(
        "beit",
        "BeitForImageClassification",
        use_relative_position_bias=True,
        prepare=uncached("BeitRelativePositionBias"),
    ),
    picture(
        "beit, shared bias",
        "BeitForImageClassification",
        prepare=uncached("BeitRelativePositionBias"),
        use_shared_relative_position_bias=True,
        exact=True,
    ),
    picture(
        "beit, masked",
        "BeitForMaskedImageModeling",
        told_patches,
        vocab_size=VOCABULARY,
        use_mask_token=True,
        reduction=alike,
    ),
    picture(
        "data2vec-vision",
        "Data2VecVisionForImageClassification",
        use_relative_position_bias=True,
        prepare=uncached("Data2VecVisionRelativePositionBias"),
    ),
    picture("dinov2", "Dinov2ForImageClassification"),
    picture(
        "vit-mae",
        "ViTMAEForPreTraining",
        lambda: {"pixel_values": pixels(), "noise": torch.rand(ROWS, 4, generator=generator())},
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=24,
    ),
    picture(
        "yolos",
        "YolosForObjectDetection",
        lambda: {"pixel_values": pixels()},
        loss=boxes_loss,
        num_detection_tokens=4,
        image_size=[16, 16],
    ),
    pyramid("swin", "SwinForImageClassification", pictures, **SWIN),
    pyramid("swinv2", "Swinv2ForImageClassification", pictures, **SWIN),
    pyramid("convnext", "ConvNextForImageClassification", num_stages=2, hidden_sizes=[8, 16], depths=[1, 2]),
    pyramid(
        "convnextv2", "ConvNextV2ForImageClassification", num_stages=2, hidden_sizes=[8, 16], depths=[1, 2]
    ),
    pyramid("segformer", "SegformerForSemanticSegmentation", partial(segments, 16), **SEGFORMER),
    pyramid("segformer, classes", "SegformerForImageClassification", pictures, **SEGFORMER),
    pyramid("resnet", "ResNetForImageClassification", **RESNET),
    pyramid("resnet, bottlenecks", "ResNetForImageClassification", **(RESNET | {"layer_type": "bottleneck"})),
    pyramid(
        "regnet",
        "RegNetForImageClassification",
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 2],
        groups_width=4,
    ),
    pyramid(
        "poolformer", "PoolFormerForImageClassification", depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16]
    ),
    pyramid(
        "pvt",
        "PvtForImageClassification",
        pictures,
        image_size=16,
        num_encoder_blocks=2,
        depths=[1, 1],
        sequence_reduction_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[4, 2],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
    ),
    pyramid(
        "detr",
        "DetrForObjectDetection",
        lambda: {"pixel_values": pixels(32)},
        loss=boxes_loss,
        exact=True,
        **DETR,
    ),
    pyramid(
        "conditional-detr",
        "ConditionalDetrForObjectDetection",
        lambda: {"pixel_values": pixels(32)},
        loss=boxes_loss,
        exact=True,
        **DETR,
    ),
    pyramid(
        "upernet",
        "UperNetForSemanticSegmentation",
        partial(segments, 32),
        backbone_config={
            "model_type": "convnext",
            "num_stages": 4,
            "hidden_sizes": [8, 8, 8, 8],
            "depths": [1, 1, 1, 1],
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
        hidden_size=8,
        use_auxiliary_head=True,
        auxiliary_in_channels=8,
        auxiliary_channels=8,
    ),
]

# -- pictures and texts

SIDES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "attention_dropout": 0.0,
    "projection_dim": 8,
}
SEEN = SIDES | {"image_size": 16, "patch_size": 8}
READ = SIDES | {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def pairs() -> dict[str, Any]:
    """A text for each picture."""
    batch = text()
    del batch["labels"]
    return batch | {"pixel_values": pixels(), "return_loss": True}


def told_pictures(*, image_token: int, patches: int) -> dict[str, torch.Tensor]:
    """Texts in which a picture stands where the image tokens are."""
    batch = text()
    batch["input_ids"] = torch.cat([torch.full((ROWS, patches), image_token), batch["input_ids"]], dim=1)
    batch["attention_mask"] = torch.cat([torch.ones(ROWS, patches).long(), batch["attention_mask"]], dim=1)
    batch["labels"] = torch.cat([torch.full((ROWS, patches), -100), batch["labels"]], dim=1)
    return batch | {"pixel_values": pixels()}


def sized_pictures() -> Microbatches:
    """Texts with pictures of 4 × 4 patches, all of a microbatch's patches in one tensor."""
    batch = told_pictures(image_token=63, patches=4)
    del batch["pixel_values"]
    batch["mm_token_type_ids"] = (batch["input_ids"] == 63).int()
    items = split(batch, 3)
    for seed, item in enumerate(items):
        rows = len(item["input_ids"])
        item["pixel_values"] = torch.randn(16 * rows, 3 * 2 * 4 * 4, generator=generator(seed))
        item["image_grid_thw"] = torch.tensor([[1, 4, 4]] * rows)
    return Microbatches(items)


LLAVA = {
    "image_token_index": 63,
    "image_token_id": 63,
    "text_config": {"model_type": "llama", **DECODER},
    "vision_config": {"model_type": "clip_vision_model", **SEEN},
    "image_seq_length": 4,
    "tie_word_embeddings": False,
}

PICTURES_AND_TEXTS = [
    other("clip", "CLIPModel", pairs, text_config=READ, vision_config=SEEN, projection_dim=8),
    other("siglip", "SiglipModel", pairs, text_config=READ, vision_config=SEEN),
    other(
        "siglip2",
        "Siglip2VisionModel",
        lambda: {
            "pixel_values": torch.randn(ROWS, 4, 192, generator=generator()),
            "pixel_attention_mask": torch.ones(ROWS, 4).long(),
            "spatial_shapes": torch.full((ROWS, 2), 2),
        },
        loss=lambda model, batch: ((output := model(**batch)).pooler_output.square().mean(), output),
        num_patches=16,
        **SIDES | {"patch_size": 8},
    ),
    other(
        "alt-clip",
        "AltCLIPModel",
        pairs,
        text_config=READ | {"project_dim": 8},
        vision_config=SEEN,
        projection_dim=8,
    ),
    other(
        "blip",
        "BlipForConditionalGeneration",
        lambda: pairs() | {"labels": tokens(), "return_loss": None},
        text_config=READ | {"encoder_hidden_size": 16, "is_decoder": True},
        vision_config=SEEN,
        projection_dim=8,
        exact=True,
    ),
    other(
        "llava", "LlavaForConditionalGeneration", partial(told_pictures, image_token=63, patches=4), **LLAVA
    ),
    other(
        "paligemma",
        "PaliGemmaForConditionalGeneration",
        partial(told_pictures, image_token=63, patches=4),
        **LLAVA
        | {
            "projection_dim": 16,
            "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **SEEN},
            "text_config": {"model_type": "gemma", **DECODER, "head_dim": 8},
        },
    ),
    other(
        "idefics3",
        "Idefics3ForConditionalGeneration",
        lambda: told_pictures(image_token=63, patches=1) | {"pixel_values": pixels()[:, None]},
        image_token_id=63,
        scale_factor=2,
        text_config={"model_type": "llama", **DECODER},
        vision_config=SEEN,
        tie_word_embeddings=False,
        pad_token_id=0,
    ),
    other(
        "qwen2-vl",
        "Qwen2VLForConditionalGeneration",
        sized_pictures,
        reduction=alike,
        image_token_id=63,
        vision_start_token_id=62,
        video_token_id=61,
        tie_word_embeddings=False,
        text_config={
            **DECODER,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": 16,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    ),
    other(
        "git",
        "GitForCausalLM",
        lambda: text() | {"pixel_values": pixels()},
        vision_config=SEEN,
        tie_word_embeddings=False,
        **{key: value for key, value in READ.items() if key != "projection_dim"},
    ),
    other(
        "vision-text",
        "VisionTextDualEncoderModel",
        pairs,
        text_config={"model_type": "bert", **READ},
        vision_config={"model_type": "vit", **SEEN},
        projection_dim=8,
    ),
    other(
        "vision-encoder-decoder",
        "VisionEncoderDecoderModel",
        lambda: {"pixel_values": pixels(), "labels": tokens()},
        encoder={"model_type": "vit", **SEEN},
        decoder={
            "model_type": "gpt2",
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 16,
            "vocab_size": VOCABULARY,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "add_cross_attention": True,
            "is_decoder": True,
        },
        pad_token_id=0,
        decoder_start_token_id=1,
        exact=True,
    ),
]

# -- sounds

SOUND = {
    "vocab_size": 12,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "hidden_dropout": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "final_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
    "conv_dim": [8, 8],
    "conv_stride": [5, 4],
    "conv_kernel": [10, 5],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "pad_token_id": 0,
    "classifier_proj_size": 8,
    "num_labels": 3,
}


def sounds() -> dict[str, torch.Tensor]:
    """Waves of other lengths, and what is said in them."""
    waves = torch.randn(ROWS, 240, generator=generator())
    mask = torch.ones(ROWS, 240, dtype=torch.int64)
    for row in range(ROWS):
        mask[row, 240 - row * 13 :] = 0
    labels = torch.randint(1, 12, (ROWS, 3), generator=generator())
    labels[1::2, 2] = -100
    return {"input_values": waves * mask, "attention_mask": mask, "labels": labels}


def sound(name: str, kind: str, batch: Callable[[], Any] = sounds, **config: Any) -> Case:
    return other(name, kind, batch, **(SOUND | config))


def frames_loss(model: Any, batch: Any) -> tuple[torch.Tensor, Any]:
    """A loss of frames that needs no alignment."""
    output = model(**{key: value for key, value in batch.items() if key != "labels"})
    return output.logits.square().mean(), output


def waves() -> dict[str, torch.Tensor]:
    return {"input_values": sounds()["input_values"]}


SOUNDS = [
    sound("wav2vec2, ctc", "Wav2Vec2ForCTC"),
    sound("hubert, ctc", "HubertForCTC"),
    sound("wav2vec2", "Wav2Vec2ForCTC", loss=frames_loss),
    sound(
        "wav2vec2, stable",
        "Wav2Vec2ForCTC",
        loss=frames_loss,
        do_stable_layer_norm=True,
        feat_extract_norm="layer",
    ),
    sound("wav2vec2, classes", "Wav2Vec2ForSequenceClassification", lambda: sounds() | {"labels": classes()}),
    sound(
        "wav2vec2, weighted layers",
        "Wav2Vec2ForSequenceClassification",
        lambda: sounds() | {"labels": classes()},
        use_weighted_layer_sum=True,
    ),
    sound("hubert", "HubertForCTC", loss=frames_loss),
    sound("wavlm", "WavLMForCTC", waves, loss=frames_loss, num_buckets=8, max_bucket_distance=8),
    sound("sew", "SEWForCTC", loss=frames_loss, squeeze_factor=2),
    sound("unispeech", "UniSpeechForCTC", loss=frames_loss),
    sound(
        "data2vec-audio",
        "Data2VecAudioForCTC",
        loss=frames_loss,
        conv_pos_kernel_size=3,
        num_conv_pos_embeddings=2,
    ),
    other(
        "audio-spectrogram",
        "ASTForAudioClassification",
        lambda: {"input_values": torch.randn(ROWS, 24, 16, generator=generator()), "labels": classes()},
        max_length=24,
        num_mel_bins=16,
        frequency_stride=8,
        time_stride=8,
        **PICTURE,
    ),
]

# -- other things

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


def typed_text() -> dict[str, torch.Tensor]:
    return text() | {"token_type_ids": texts_and_classes()["token_type_ids"]}


def series() -> dict[str, torch.Tensor]:
    return {
        "past_values": torch.randn(ROWS, 16, 2, generator=generator()),
        "future_values": torch.randn(ROWS, 4, 2, generator=generator(6)),
    }


def timed_series() -> dict[str, torch.Tensor]:
    times = torch.arange(16.0).repeat(ROWS, 1)
    past, future = torch.randn(ROWS, 12, generator=generator()), torch.randn(ROWS, 4, generator=generator(6))
    batch = {"past_values": past, "past_observed_mask": torch.ones(ROWS, 12), "future_values": future}
    return batch | {"past_time_features": times[:, :12, None], "future_time_features": times[:, 12:, None]}


OTHERS = [
    other(
        "time-series",
        "TimeSeriesTransformerForPrediction",
        timed_series,
        prediction_length=4,
        context_length=8,
        lags_sequence=[1, 2, 4],
        num_time_features=1,
        **{key: value for key, value in BOTH.items() if not key.endswith("token_id")},
    ),
    other("gpt2", "GPT2LMHeadModel", text, exact=True, **GPT2),
    other("gpt2, token types", "GPT2LMHeadModel", typed_text, exact=True, **GPT2),
    other(
        "gpt2, classes",
        "GPT2ForSequenceClassification",
        texts_and_classes,
        pad_token_id=0,
        num_labels=3,
        **GPT2,
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
    other(
        "patchtst",
        "PatchTSTForPrediction",
        series,
        num_input_channels=2,
        context_length=16,
        prediction_length=4,
        patch_length=4,
        patch_stride=4,
        d_model=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        ffn_dim=24,
    ),
    other(
        "patchtsmixer",
        "PatchTSMixerForPrediction",
        series,
        num_input_channels=2,
        context_length=16,
        prediction_length=4,
        patch_length=4,
        patch_stride=4,
        d_model=16,
        num_layers=2,
        dropout=0.0,
        head_dropout=0.0,
    ),
]

CASES = [*DECODERS, *ENCODERS, *ENCODER_DECODERS, *PICTURES, *PICTURES_AND_TEXTS, *SOUNDS, *OTHERS]
