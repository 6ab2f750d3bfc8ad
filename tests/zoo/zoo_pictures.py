"""Models of transformers that see pictures."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from zoo_configured import ROWS, VOCABULARY, alike, classes, family, generator

from evenflow.runtime.recorded.microbatch import Microbatches, split

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


def pixels(size: int = 16, rows: int = ROWS) -> torch.Tensor:
    return torch.randn(rows, 3, size, size, generator=generator())


def pictures(size: int = 16) -> dict[str, torch.Tensor]:
    return {"pixel_values": pixels(size), "labels": classes()}


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


def uncached(of: str) -> Callable[[Any], None]:
    """Forget what a module class of transformers keeps between calls, whoever made them."""

    def prepare(model: Any) -> None:
        kind = next(type(module) for module in model.modules() if type(module).__name__ == of)
        inspect.getclosurevars(kind.generate_relative_position_index).nonlocals[
            "func_with_cache"
        ].cache_clear()

    return prepare


picture = family(PICTURE, pictures)
pyramid = family({"num_labels": 3, "drop_path_rate": 0.0}, partial(pictures, 32))  # stages of own sizes

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
