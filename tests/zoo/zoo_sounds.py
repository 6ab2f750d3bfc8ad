"""Models of transformers that hear sounds, and those that continue series of numbers."""

from typing import Any

import torch
from zoo_configured import ROWS, classes, family, generator, other
from zoo_pictures import PICTURE

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


def waves() -> dict[str, torch.Tensor]:
    return {"input_values": sounds()["input_values"]}


def frames_loss(model: Any, batch: Any) -> tuple[torch.Tensor, Any]:
    """A loss of frames that needs no alignment."""
    output = model(**{key: value for key, value in batch.items() if key != "labels"})
    return output.logits.square().mean(), output


def series() -> dict[str, torch.Tensor]:
    return {
        "past_values": torch.randn(ROWS, 16, 2, generator=generator()),
        "future_values": torch.randn(ROWS, 4, 2, generator=generator(6)),
    }


sound = family(SOUND, sounds)

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

SERIES = [
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
