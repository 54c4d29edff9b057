"""Small models of text and images: unmodified classes, random weights, and batches with images of several sizes."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from hf_hybrids import DELTA, LINEAR, SHARED_EXPERT, decay_slowly
from hf_models import SMALL, VOCAB, WINDOW
from torch import Tensor, nn

from cpflex.integrations.transformers import attach_recurrent, exchanged
from cpflex.integrations.transformers.masks import recurrent_types

SEQ_LEN = 83
IMAGE, VIDEO, BEGIN = VOCAB - 1, VOCAB - 2, VOCAB - 3
"""Tokens: of images, of videos, and the one before either."""

TEXT = SMALL | {"num_hidden_layers": 2}
HYBRID = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
HYBRID |= {"num_hidden_layers": 3}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
TOWER = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 2}
CLIP = TOWER | {"image_size": 8, "model_type": "clip_vision_model"}
SIGLIP = TOWER | {"image_size": 8, "model_type": "siglip_vision_model"}
PIXTRAL = TOWER | {"image_size": 32, "head_dim": 12, "model_type": "pixtral"}
QWEN_TOWER = {"depth": 2, "hidden_size": 24, "intermediate_size": 32, "num_heads": 2, "patch_size": 2}
QWEN_TOWER |= {"spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32}
TOKEN = {"image_token_id": IMAGE, "image_token_index": IMAGE}
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": BEGIN,
    "vision_end_token_id": 3,
}
GLM_TOKENS = {"image_token_id": IMAGE, "image_start_token_id": BEGIN, "image_end_token_id": 3}
GLM_TOKENS |= {"video_token_id": VIDEO, "video_start_token_id": 1, "video_end_token_id": 2}


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
        decay_slowly(model)
        if attention != "eager" and recurrent_types(model.config.get_text_config()):
            attach_recurrent(model, exchanged)
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


def unmerged(random: torch.Generator) -> dict[str, Tensor]:
    """The same images in patches of 2 x 2 pixels."""
    grids = torch.tensor(GRIDS)
    return {
        "pixel_values": torch.randn(int(grids.prod(dim=1).sum()), 3, 2, 2, generator=random),
        "image_grid_thw": grids,
    }


def of_parts(count: int, parts: int, **more: Any) -> Callable[[torch.Generator], dict[str, Tensor]]:
    """Images of 8 x 8 pixels in several parts."""
    more = {name: torch.tensor(value) for name, value in more.items()}
    return lambda random: {"pixel_values": torch.randn(count, parts, 3, 8, 8, generator=random), **more}


def of_patches(random: torch.Generator) -> dict[str, Tensor]:
    """Three images of 8 x 8 patches of 2 x 2 pixels, with the places of the patches."""
    places = torch.cartesian_prod(torch.arange(8), torch.arange(8)).flip(-1).expand(3, -1, -1)
    return {"pixel_values": torch.rand(3, 64, 12, generator=random), "image_position_ids": places}


# -- configs


def text(prefix: str, **special: Any) -> Any:
    return getattr(transformers, f"{prefix}Config")(**TEXT | special)


def llava_like(prefix: str, text_config: Any, tower: Mapping[str, Any], **special: Any) -> Callable[[], Any]:
    def config() -> Any:
        make = getattr(transformers, f"{prefix}Config")
        return make(text_config=text_config(), vision_config=dict(tower), **TOKEN | special)

    return config


def llama() -> Any:
    return text("Llama")


def qwen2() -> Any:
    return text("Qwen2")


def cohere2() -> Any:
    return text("Cohere2", **HYBRID)


def deepseek_v3() -> Any:
    latent = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
    latent |= {"num_key_value_heads": 4, "head_dim": 4}
    routed = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    return text("DeepseekV3", **latent | routed | EXPERTS)


def gemma3() -> Any:
    text_config = transformers.Gemma3TextConfig(**TEXT | HYBRID | {"query_pre_attn_scalar": 11})
    tower = SIGLIP | {"image_size": 16}
    return transformers.Gemma3Config(text_config=text_config, vision_config=tower, mm_tokens_per_image=16, **TOKEN)


def gemma4(**special: Any) -> Any:
    layer_types = ["sliding_attention", "full_attention"] * 2
    special = {"num_hidden_layers": 4, "layer_types": layer_types, "global_head_dim": 8} | special
    tower = TOWER | {"num_key_value_heads": 2, "head_dim": 12, "pooling_kernel_size": 2, "position_embedding_size": 32}
    return transformers.Gemma4Config(
        text_config=TEXT | {"sliding_window": WINDOW, "vocab_size_per_layer_input": VOCAB} | special,
        vision_config=tower,
        audio_config=None,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=VIDEO - 2,
        boi_token_id=BEGIN,
        eoi_token_id=3,
    )


def gemma4_vision() -> Any:
    """Sees images in both directions."""
    return gemma4(use_bidirectional_attention="vision", num_kv_shared_layers=0, hidden_size_per_layer_input=0)


def gemma4_shared() -> Any:
    """Its last layers reuse the keys of earlier ones, and all take embeddings of their own."""
    return gemma4(num_kv_shared_layers=2, hidden_size_per_layer_input=4)


def qwen2_vl() -> Any:
    tower = {"depth": 2, "embed_dim": 24, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 2}
    tower |= {"spatial_merge_size": 2, "temporal_patch_size": 2}
    return transformers.Qwen2VLConfig(text_config=TEXT | mrope(), vision_config=tower, **QWEN_TOKENS)


def qwen2_5_vl() -> Any:
    tower = {"window_size": 8, "fullatt_block_indexes": [1], "tokens_per_second": 2}
    return transformers.Qwen2_5_VLConfig(text_config=TEXT | mrope(), vision_config=QWEN_TOWER | tower, **QWEN_TOKENS)


def qwen3_vl() -> Any:
    tower = QWEN_TOWER | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    text_config = TEXT | mrope(mrope_interleaved=True)
    return transformers.Qwen3VLConfig(text_config=text_config, vision_config=tower, **QWEN_TOKENS)


def qwen3_vl_moe() -> Any:
    tower = QWEN_TOWER | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    text_config = TEXT | mrope(mrope_interleaved=True) | EXPERTS | {"num_experts": 4, "decoder_sparse_step": 1}
    return transformers.Qwen3VLMoeConfig(text_config=text_config, vision_config=tower, **QWEN_TOKENS)


def qwen3_5() -> Any:
    tower = QWEN_TOWER | {"num_position_embeddings": 64}
    text_config = TEXT | mrope(mrope_interleaved=True, partial_rotary_factor=1.0) | DELTA
    text_config |= {"layer_types": LINEAR, "num_hidden_layers": 3}
    return transformers.Qwen3_5Config(text_config=text_config, vision_config=tower, **QWEN_TOKENS)


def qwen3_5_moe() -> Any:
    config = qwen3_5()
    text_config = config.text_config.to_dict() | SHARED_EXPERT | {"model_type": "qwen3_5_moe_text"}
    tower = config.vision_config.to_dict() | {"model_type": "qwen3_5_moe_vision"}
    return transformers.Qwen3_5MoeConfig(text_config=text_config, vision_config=tower, **QWEN_TOKENS)


GLM = TEXT | mrope(mrope_section=[1, 0, 1], partial_rotary_factor=0.5)


def glm4v() -> Any:
    tower = QWEN_TOWER | {"image_size": 16}
    return transformers.Glm4vConfig(text_config=GLM, vision_config=tower, **GLM_TOKENS)


def glm46v() -> Any:
    tower = transformers.Glm4vVisionConfig(**QWEN_TOWER | {"image_size": 16})
    return transformers.Glm46VConfig(text_config=transformers.Glm4vTextConfig(**GLM), vision_config=tower, **GLM_TOKENS)


def glm4v_moe() -> Any:
    routed = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    tower = QWEN_TOWER | {"image_size": 16}
    return transformers.Glm4vMoeConfig(text_config=GLM | routed | EXPERTS, vision_config=tower, **GLM_TOKENS)


def paddleocr_vl() -> Any:
    tower = TOWER | {"image_size": 16, "spatial_merge_size": 2}
    return transformers.PaddleOCRVLConfig(text_config=TEXT | mrope(), vision_config=tower, **QWEN_TOKENS)


def kimi_k25() -> Any:
    tower = TOWER | {"pos_emb_height": 8, "pos_emb_width": 8}
    return transformers.Kimi_K25Config(
        text_config=deepseek_v3(),
        vision_config=tower,
        projection_hidden_size=24,
        tie_word_embeddings=False,
        **QWEN_TOKENS,
    )


# -- where images are

SMALL_ONES = ((0, 5), (0, 10), (1, 40))
"""Two images in a row with a token between, and one across the middle; so in all of these."""
LARGE_ONES = ((0, 5), (0, 22), (1, 35))
FIVE = ((0, 5), (0, 22), (0, 39), (1, 3), (1, 60))
SIZES = ((8, 12), (16, 8), (12, 12))
TILES = {"image_grid_pinpoints": [[8, 16], [16, 8], [16, 16]]}

GRID = ((6, 8, 15), ((0, 4), (0, 37), (1, 35)), "mm_token_type_ids")
FOUR_EACH = (images(3, 8, 8), (4,) * 3, SMALL_ONES)
SIXTEEN_EACH = (images(3, 8, 8), (16,) * 3, LARGE_ONES)
OF_SIZES = (of_sizes(*SIZES), (6, 8, 9), ((0, 5), (0, 12), (1, 38)))
OF_PARTS = (of_parts(2, 2), (4,) * 4, ((0, 5), (0, 10), (1, 36), (1, 41)))
OF_TILES = (of_parts(2, 3, image_sizes=[[8, 16], [16, 8]]), (52, 56), ((0, 5), (1, 7)))
OF_PATCHES = (of_patches, (16,) * 3, LARGE_ONES, "mm_token_type_ids")

MULTIMODAL = {
    "aya_vision": Multimodal(llava_like("AyaVision", cohere2, SIGLIP, downsample_factor=2), *FOUR_EACH),
    "cohere2_vision": Multimodal(
        llava_like("Cohere2Vision", cohere2, SIGLIP, downsample_factor=2, alignment_intermediate_size=32), *FOUR_EACH
    ),
    "gemma3": Multimodal(gemma3, images(5, 16, 16), (16,) * 5, FIVE, "token_type_ids"),
    "gemma4": Multimodal(gemma4_vision, *OF_PATCHES),
    "gemma4, keys shared": Multimodal(gemma4_shared, *OF_PATCHES),
    "glm46v": Multimodal(glm46v, of_grids, *GRID),
    "glm4v": Multimodal(glm4v, of_grids, *GRID),
    "glm4v_moe": Multimodal(glm4v_moe, of_grids, *GRID),
    "got_ocr2": Multimodal(
        llava_like(
            "GotOcr2",
            qwen2,
            TOWER
            | {"image_size": 16, "patch_size": 1, "output_channels": 16, "mlp_dim": 32, "window_size": 4}
            | {"global_attn_indexes": [1]},
        ),
        images(3, 16, 16),
        *SIXTEEN_EACH[1:],
    ),
    "idefics3": Multimodal(llava_like("Idefics3", llama, SIGLIP, scale_factor=2), *OF_PARTS),
    "internvl": Multimodal(
        llava_like("InternVL", qwen2, TOWER | {"image_size": [8, 8], "patch_size": [2, 2]}, downsample_ratio=0.5),
        *FOUR_EACH,
    ),
    "kimi_k25": Multimodal(kimi_k25, unmerged, *GRID),
    "lighton_ocr": Multimodal(
        llava_like("LightOnOcr", lambda: text("Qwen3"), PIXTRAL, spatial_merge_size=2), *OF_SIZES
    ),
    "llava": Multimodal(llava_like("Llava", llama, CLIP), *SIXTEEN_EACH),
    "llava_next": Multimodal(llava_like("LlavaNext", llama, CLIP, **TILES), *OF_TILES),
    "llava_onevision": Multimodal(
        llava_like("LlavaOnevision", qwen2, SIGLIP, video_token_id=VIDEO, **TILES), *OF_TILES
    ),
    "mistral3": Multimodal(llava_like("Mistral3", lambda: text("Mistral", sliding_window=WINDOW), PIXTRAL), *OF_SIZES),
    "paddleocr_vl": Multimodal(paddleocr_vl, unmerged, *GRID),
    "qwen2_vl": Multimodal(qwen2_vl, of_grids, *GRID),
    "qwen2_5_vl": Multimodal(qwen2_5_vl, of_grids, *GRID),
    "qwen3_5": Multimodal(qwen3_5, of_grids, *GRID),
    "qwen3_5_moe": Multimodal(qwen3_5_moe, of_grids, *GRID),
    "qwen3_vl": Multimodal(qwen3_vl, of_grids, *GRID),
    "qwen3_vl_moe": Multimodal(qwen3_vl_moe, of_grids, *GRID),
    "smolvlm": Multimodal(llava_like("SmolVLM", llama, SIGLIP, scale_factor=2), *OF_PARTS),
    "vipllava": Multimodal(llava_like("VipLlava", llama, CLIP, vision_feature_layers=[-1, -2]), *SIXTEEN_EACH),
}


def takes_what_was_encoded() -> bool:
    forward = transformers.LlavaForConditionalGeneration.forward
    return "mm_encoder_outputs" in inspect.signature(forward).parameters
