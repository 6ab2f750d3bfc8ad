"""Encoders with decoders of transformers: T5, BART and their kin, of texts, speech and series."""

import torch
from zoo_configured import ROWS, VOCABULARY, family, generator, other, padding, text, tokens

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

both = family(BOTH, exact=True, ties=True)
t5 = family(T5, exact=True)


def translations() -> dict[str, torch.Tensor]:
    """Labels shorter than what they translate."""
    batch = text()
    ids, mask = tokens(length=5, seed=6), padding(length=5)
    return batch | {"labels": ids.masked_fill(mask.flip(0) == 0, -100)}


def speech_to_text() -> dict[str, torch.Tensor]:
    sound = torch.randn(ROWS, 8, 24, generator=generator())
    return {"input_features": sound, "labels": translations()["labels"]}


def timed_series() -> dict[str, torch.Tensor]:
    times = torch.arange(16.0).repeat(ROWS, 1)
    past, future = torch.randn(ROWS, 12, generator=generator()), torch.randn(ROWS, 4, generator=generator(6))
    batch = {"past_values": past, "past_observed_mask": torch.ones(ROWS, 12), "future_values": future}
    return batch | {"past_time_features": times[:, :12, None], "future_time_features": times[:, 12:, None]}


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
]
