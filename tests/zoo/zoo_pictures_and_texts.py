"""Models of transformers that see pictures and read texts."""

from functools import partial
from typing import Any

import torch
from zoo_configured import DECODER, ROWS, VOCABULARY, alike, generator, other, text, tokens
from zoo_pictures import pixels

from evenflow.runtime.recorded.microbatch import Microbatches, split

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

LLAVA = {
    "image_token_index": 63,
    "image_token_id": 63,
    "text_config": {"model_type": "llama", **DECODER},
    "vision_config": {"model_type": "clip_vision_model", **SEEN},
    "image_seq_length": 4,
    "tie_word_embeddings": False,
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
