"""Small models of text and images: unmodified classes, random weights, and batches with images of several sizes."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from hf_models import SMALL, VOCAB, WINDOW
from torch import Tensor, nn

SEQ_LEN = 83
IMAGE, VIDEO, BEGIN = VOCAB - 1, VOCAB - 2, VOCAB - 3
"""Tokens: of images, of videos, and the one before either."""

TEXT = SMALL | {"num_hidden_layers": 2}
TOWER = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 2}
QWEN_TOWER = {"depth": 2, "hidden_size": 24, "intermediate_size": 32, "num_heads": 2, "patch_size": 2}
QWEN_TOWER |= {"spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32}
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": BEGIN,
    "vision_end_token_id": 3,
}


def mrope(**more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]} | more}


Spans = Sequence[tuple[int, int]]
"""Row and start of each image's tokens."""


@dataclass(frozen=True)
class Multimodal:
    """A model class of transformers of text and images."""

    config: Callable[[], Any]
    pixels: Callable[[torch.Generator], Mapping[str, Tensor]]
    """Images, and what goes with them."""
    num_tokens: Sequence[int]
    """Of each image."""
    spans: Spans
    token_types: str = ""
    """What the processor calls them."""

    def model(self, attention: Any) -> nn.Module:
        """Equal weights whatever the attention."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = self.config()
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation=attention)
        random = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=random)
                parameter.copy_(1 + 0.1 * noise if parameter.ndim == 1 else 0.15 * noise)
        return model.train()

    def batch(self, with_images: bool = True) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(1)
        ids = torch.randint(4, BEGIN, (2, SEQ_LEN), generator=random)
        if not with_images:
            return {"input_ids": ids, "labels": ids}
        for (row, start), count in zip(self.spans, self.num_tokens, strict=True):
            ids[row, start - 1] = BEGIN
            ids[row, start : start + count] = IMAGE
        batch = {"input_ids": ids, "labels": ids.masked_fill(ids == IMAGE, -100), **self.pixels(random)}
        return batch | ({self.token_types: (ids == IMAGE).long()} if self.token_types else {})


def images(count: int, height: int, width: int) -> Callable[[torch.Generator], dict[str, Tensor]]:
    return lambda random: {"pixel_values": torch.randn(count, 3, height, width, generator=random)}


def of_sizes(*sizes: tuple[int, int]) -> Callable[[torch.Generator], dict[str, Tensor]]:
    """Padded to the largest."""
    height, width = (max(side) for side in zip(*sizes, strict=True))
    return lambda random: images(len(sizes), height, width)(random) | {"image_sizes": torch.tensor(sizes)}


GRIDS = ((1, 4, 6), (1, 8, 4), (1, 6, 10))


def of_grids(random: torch.Generator) -> dict[str, Tensor]:
    """Patches of 2 x 2 x 2 pixels in three colours, of images of three sizes."""
    grids = torch.tensor(GRIDS)
    patches = torch.randn(int(grids.prod(dim=1).sum()), 24, generator=random)
    return {"pixel_values": patches, "image_grid_thw": grids}


def gemma3() -> Any:
    layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    special = {"num_hidden_layers": 3, "sliding_window": WINDOW, "layer_types": layer_types}
    return transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**TEXT | special | {"query_pre_attn_scalar": 11}),
        vision_config=TOWER | {"image_size": 16, "model_type": "siglip_vision_model"},
        image_token_id=IMAGE,
        image_token_index=IMAGE,
        mm_tokens_per_image=16,
    )


def qwen2_5_vl() -> Any:
    tower = {"window_size": 8, "fullatt_block_indexes": [1], "tokens_per_second": 2}
    return transformers.Qwen2_5_VLConfig(text_config=TEXT | mrope(), vision_config=QWEN_TOWER | tower, **QWEN_TOKENS)


def qwen3_vl() -> Any:
    tower = {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    text = TEXT | mrope(mrope_interleaved=True)
    return transformers.Qwen3VLConfig(text_config=text, vision_config=QWEN_TOWER | tower, **QWEN_TOKENS)


def llava() -> Any:
    return transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=TOWER | {"image_size": 8, "model_type": "clip_vision_model"},
        image_token_id=IMAGE,
        image_token_index=IMAGE,
    )


def mistral3() -> Any:
    return transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**TEXT | {"sliding_window": WINDOW}),
        vision_config=TOWER | {"image_size": 32, "head_dim": 12, "model_type": "pixtral"},
        image_token_id=IMAGE,
        image_token_index=IMAGE,
    )


def internvl() -> Any:
    return transformers.InternVLConfig(
        text_config=transformers.Qwen2Config(**TEXT),
        vision_config=TOWER | {"image_size": [8, 8], "patch_size": [2, 2]},
        image_token_id=IMAGE,
        downsample_ratio=0.5,
    )


FEW = ((0, 5), (0, 10), (1, 40))
"""Two images in a row with a token between, and one across the middle."""
SIXTEEN = ((0, 5), (0, 22), (0, 39), (1, 3), (1, 60))

MULTIMODAL = {
    "gemma3": Multimodal(gemma3, images(5, 16, 16), (16,) * 5, SIXTEEN, "token_type_ids"),
    "qwen2_5_vl": Multimodal(qwen2_5_vl, of_grids, (6, 8, 15), ((0, 4), (0, 37), (1, 35)), "mm_token_type_ids"),
    "qwen3_vl": Multimodal(qwen3_vl, of_grids, (6, 8, 15), ((0, 4), (0, 37), (1, 35)), "mm_token_type_ids"),
    "llava": Multimodal(llava, images(3, 8, 8), (16,) * 3, ((0, 5), (0, 22), (1, 40))),
    "mistral3": Multimodal(mistral3, of_sizes((8, 12), (16, 8), (12, 12)), (6, 8, 9), ((0, 5), (0, 12), (1, 38))),
    "internvl": Multimodal(internvl, images(3, 8, 8), (4,) * 3, FEW),
}


def takes_what_was_encoded() -> bool:
    forward = transformers.LlavaForConditionalGeneration.forward
    return "mm_encoder_outputs" in inspect.signature(forward).parameters
