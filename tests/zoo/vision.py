"""Images, and images with text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator

from .causal import ATTENTION, DECODER, GATED, SLIDING
from .encoders import ENCODER, PROJECTIONS
from .entry import IMAGE_SIZE, LABELS, Call, Entry, Inputs, classes, ids, images, pictures, pretrained

PATCH, FRAMES = 4, 4
PATCHES = (IMAGE_SIZE // PATCH) ** 2
IMAGE, START, END = 91, 92, 93  # tokens that stand for a patch, and around patches
VIT = {
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_labels": LABELS,
}
STAGES = {"image_size": IMAGE_SIZE, "num_labels": LABELS, "depths": [1, 1]}
TEXT = ENCODER | {"eos_token_id": 89}


def viewer(name: str, targets: list[str] | str, base: dict[str, Any] = VIT, **settings: Any) -> Entry:
    return pretrained(f"{name}ForImageClassification", pictures, targets, base | settings)


def films(batch: int, length: int) -> Call:
    """Frames one after another, with a label; they have no length."""
    frames = [images(Generator().manual_seed(i), batch) for i in range(FRAMES)]
    return {"pixel_values": torch.stack(frames, 1), "labels": classes(batch)}


def pairs(batch: int, length: int) -> Call:
    """Images and sentences to tell which belongs to which."""
    rng = Generator().manual_seed(0)
    return {"input_ids": ids(rng, batch, length), "pixel_values": images(rng, batch), "return_loss": True}


def prompted(rng: Generator, batch: int, length: int, patches: int) -> dict[str, Any]:
    """A text that begins with an image of so many tokens; the image's labels count too."""
    marks = torch.tensor([START, *[IMAGE] * patches, END]).expand(batch, -1)
    return {
        "input_ids": torch.cat([marks, ids(rng, batch, length)], 1),
        "labels": ids(rng, batch, patches + 2 + length),
    }


def described(batch: int, length: int) -> Call:
    """An image and text about it."""
    rng = Generator().manual_seed(0)
    return {"pixel_values": images(rng, batch)} | prompted(rng, batch, length, PATCHES)


def typed(batch: int, length: int) -> Call:
    """As `described`, an image taking four tokens, and each token said to be of an image or not."""
    rng = Generator().manual_seed(0)
    call = {"pixel_values": images(rng, batch)} | prompted(rng, batch, length, PATCHES // 4)
    return call | {"token_type_ids": (call["input_ids"] == IMAGE).long()}


def gridded(batch: int, length: int) -> Call:
    """As `typed`, in Qwen's form: the patches of all images in one row, two frames deep, and each image's grid."""
    rng, side = Generator().manual_seed(0), IMAGE_SIZE // PATCH
    call = prompted(rng, batch, length, PATCHES // 4)
    return call | {
        "pixel_values": torch.randn(batch * PATCHES, 3 * 2 * PATCH**2, generator=rng),
        "image_grid_thw": torch.tensor([[1, side, side]]).expand(batch, -1),
        "mm_token_type_ids": (call["input_ids"] == IMAGE).int(),
    }


def reader(name: str, inputs: Inputs, targets: list[str], text: dict[str, Any], vision: Any = VIT, **own: Any) -> Entry:
    parts = {"text_config": DECODER | text, "vision_config": vision, "tie_word_embeddings": False}
    return pretrained(f"{name}ForConditionalGeneration", inputs, targets, parts | own)


ENTRIES = (
    viewer("ViT", [*ATTENTION, "fc1", "fc2", "projection"]),
    viewer("Dinov2", "all-linear", mlp_ratio=2),
    viewer(
        "Swin",
        [*ATTENTION, "fc1", "fc2", "reduction"],
        # Every second layer of a stage shifts its windows.
        {**STAGES, "depths": [2, 1], "num_heads": [2, 4], "patch_size": 2, "embed_dim": 24, "window_size": 4},
    ),
    viewer(
        "ConvNext",
        ["pwconv1", "pwconv2", "patch_embeddings"],
        STAGES | {"num_stages": 2, "hidden_sizes": [12, 20], "patch_size": 2},
    ),
    # Without `get_input_embeddings`, as most models of images.
    viewer("ResNet", ["convolution"], STAGES | {"embedding_size": 8, "hidden_sizes": [8, 12]}),
    viewer(
        "RegNet",
        ["convolution"],
        STAGES | {"embedding_size": 8, "hidden_sizes": [8, 16], "groups_width": 8, "layer_type": "x"},
    ),
    viewer("DeiT", [*ATTENTION, "fc1", "fc2"]),
    viewer("Beit", [*ATTENTION, "fc1", "fc2"]),
    viewer(
        "Segformer",
        ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"],
        {
            **{"num_labels": LABELS, "depths": [1] * 4, "hidden_sizes": [8, 8, 16, 16], "mlp_ratios": [2] * 4},
            **{"num_attention_heads": [1, 1, 2, 2], "sr_ratios": [1] * 4, "strides": [2, 2, 2, 1]},
        },
    ),
    pretrained(
        "VideoMAEForVideoClassification", films, ["query", "value"], VIT | {"num_frames": FRAMES, "tubelet_size": 2}
    ),
    pretrained("CLIPModel", pairs, PROJECTIONS, {"text_config": TEXT, "vision_config": VIT, "projection_dim": 40}),
    pretrained(
        "SiglipModel",
        pairs,
        # Not the out_proj of the pooling nn.MultiheadAttention, where PEFT would put an adapter that is never run.
        [target.replace("out_proj", "self_attn.out_proj") for target in PROJECTIONS],
        {"text_config": TEXT | {"projection_size": 32}, "vision_config": VIT},
    ),
    reader(
        "Llava",
        described,
        [*ATTENTION, *GATED, "fc1", "linear_1"],
        {"model_type": "llama"},
        **{"image_token_index": IMAGE, "vision_feature_layer": -1},
    ),
    reader(
        "Gemma3",
        typed,
        [*ATTENTION, *GATED, "fc2"],
        {"model_type": "gemma3_text", **SLIDING},
        VIT | {"vision_use_head": False},
        **{"image_token_id": IMAGE, "mm_tokens_per_image": PATCHES // 4},
    ),
    reader(
        "Qwen2VL",
        gridded,
        [*ATTENTION, *GATED, "qkv", "proj"],
        {
            "model_type": "qwen2_vl_text",
            "head_dim": 12,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2]},
        },
        {"depth": 2, "embed_dim": 32, "num_heads": 4, "mlp_ratio": 2, "hidden_size": 48, "patch_size": PATCH},
        **{"image_token_id": IMAGE, "vision_start_token_id": START},
    ),
)
