"""Published vision and diffusion models with tiny configurations: timm, diffusers, torchvision.

A library is imported when the first of its models is built, so that a test can skip where it is missing.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from zoo_checks import Zoo, many

ZOO = Zoo()
CLASSES = 3


def photos(size: int, rows: int = 2) -> Callable[[int], list[Any]]:
    def items(step: int) -> list[Any]:
        return many(
            step, lambda: {"x": torch.randn(rows, 3, size, size), "y": torch.randint(0, CLASSES, (rows,))}
        )

    return items


def class_loss(model: Any, batch: Any) -> Any:
    logits = model(batch["x"])
    return F.cross_entropy(logits, batch["y"]), {"correct": (logits.argmax(1) == batch["y"]).sum()}


# -- timm: what makes it tiny, and whether it draws

TIMM: dict[str, dict[str, Any]] = {
    "test_resnet": {},
    "test_efficientnet": {},
    "test_convnext": {},
    "test_byobnet": {},
    "test_nfnet": {},
    "test_vit": {"img_size": 32},
    "deit3_small_patch16_224": {"img_size": 32, "depth": 3, "embed_dim": 24, "num_heads": 2},
    "beit_base_patch16_224": {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2},
    "swin_tiny_patch4_window7_224": {
        "img_size": 32,
        "depths": (2, 2),
        "embed_dim": 12,
        "num_heads": (2, 2),
        "window_size": 4,
        "drop_path_rate": 0.0,
    },
}


def _timm(name: str, tiny: dict[str, Any]) -> None:
    def build() -> torch.nn.Module:
        import timm

        return timm.create_model(name, num_classes=CLASSES, **tiny)

    build.__name__ = f"timm_{name}"
    ZOO.model(items=photos(32), loss=class_loss, library="timm")(build)


for entry, settings in TIMM.items():
    _timm(entry, settings)


@ZOO.model(items=photos(32), loss=class_loss, library="timm", draws=True)
def timm_vit_with_dropout():
    import timm

    return timm.create_model("test_vit", img_size=32, num_classes=CLASSES, drop_path_rate=0.3, drop_rate=0.1)


@ZOO.model(items=photos(32), loss=class_loss, library="timm")
def timm_mixer():
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(num_classes=CLASSES, img_size=32, patch_size=8, num_blocks=3, embed_dim=16)


# -- diffusers


def noised(size: int, channels: int, **more: Callable[[], Any]) -> Callable[[int], list[Any]]:
    def items(step: int) -> list[Any]:
        return many(
            step,
            lambda: {
                "x": torch.randn(2, channels, size, size),
                "t": torch.randint(0, 1000, (2,)),
                "noise": torch.randn(2, channels, size, size),
                **{name: make() for name, make in more.items()},
            },
        )

    return items


def denoising(call: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """The loss of diffusion training, with a schedule for the noise."""

    def loss(model: Any, batch: Any) -> torch.Tensor:
        kept = torch.cos(batch["t"] / 1000 * 1.57)[:, None, None, None]
        x = kept * batch["x"] + (1 - kept**2).sqrt() * batch["noise"]
        return F.mse_loss(call(model, x, batch), batch["noise"])

    return loss


@ZOO.model(
    library="diffusers",
    items=noised(16, 3),
    loss=denoising(lambda model, x, batch: model(x, batch["t"]).sample),
)
def diffusers_unet():
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )


@ZOO.model(
    library="diffusers",
    items=noised(8, 4, text=lambda: torch.randn(2, 5, 12)),
    loss=denoising(
        lambda model, x, batch: model(x, batch["t"], encoder_hidden_states=batch["text"], return_dict=False)[
            0
        ]
    ),
)
def diffusers_conditional_unet():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


@ZOO.model(
    library="diffusers",
    items=noised(8, 4, kind=lambda: torch.randint(0, 5, (2,))),
    loss=denoising(lambda model, x, batch: model(x, batch["t"], class_labels=batch["kind"]).sample[:, :4]),
    draws=True,  # labels are dropped at random
    shared=True,  # the first block's embedding of the time is used again at the end
)
def diffusers_dit():
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=8,
        num_embeds_ada_norm=5,
        norm_num_groups=4,
    )


def autoencoding(model: Any, batch: Any) -> Any:
    posterior = model.encode(batch["x"]).latent_dist
    back = model.decode(posterior.sample()).sample
    kl = posterior.kl().mean()
    return F.mse_loss(back, batch["x"]) + 1e-3 * kl, {"kl": kl}


@ZOO.model(library="diffusers", items=photos(16), loss=autoencoding, draws=True)
def diffusers_autoencoder():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=2,
        norm_num_groups=4,
        sample_size=16,
    )


@ZOO.model(
    library="diffusers",
    items=noised(8, 4, text=lambda: torch.randn(2, 5, 16), pooled=lambda: torch.randn(2, 12)),
    loss=denoising(
        lambda model, x, batch: (
            model(
                hidden_states=x,
                encoder_hidden_states=batch["text"],
                pooled_projections=batch["pooled"],
                timestep=batch["t"],
            ).sample
        )
    ),
)
def diffusers_sd3():
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        out_channels=4,
        pos_embed_max_size=8,
    )


def patches(step: int) -> list[Any]:
    return many(
        step,
        lambda: {
            "x": torch.randn(2, 16, 4),
            "y": torch.randn(2, 16, 4),
            "text": torch.randn(2, 5, 16),
            "pooled": torch.randn(2, 12),
            "t": torch.rand(2),
        },
    )


def flux_loss(model: Any, batch: Any) -> torch.Tensor:
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    found = model(
        hidden_states=batch["x"],
        encoder_hidden_states=batch["text"],
        pooled_projections=batch["pooled"],
        timestep=batch["t"],
        img_ids=places,
        txt_ids=torch.zeros(5, 3),
        return_dict=False,
    )[0]
    return F.mse_loss(found, batch["y"])


@ZOO.model(library="diffusers", items=patches, loss=flux_loss)
def diffusers_flux():
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=12,
        axes_dims_rope=(4, 6, 6),
    )


# -- torchvision


@ZOO.model(library="torchvision", items=photos(32), loss=class_loss)
def torchvision_resnet18():
    from torchvision.models import resnet18

    return resnet18(num_classes=CLASSES)


@ZOO.model(library="torchvision", items=photos(32), loss=class_loss)
def torchvision_vit():
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=CLASSES
    )
