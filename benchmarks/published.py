"""The published PyTorch packages, also where torchvision has no build that fits PyTorch's.

They import four functions of torchvision, and MobileSAM's a few of timm. Where these are missing,
stand-ins with the same results take their place, and only while a package is imported: other
packages see the truth.
"""

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
import numpy as np
from PIL import Image

from sam_jax.inference.automatic import AutomaticOptions
from sam_jax.models.mask_decoder import NUM_MULTIMASK
from sam_jax.models.sam import SamConfig
from sam_jax.models.tiny_vit import TinyViTConfig
from sam_jax.weights.mobile_sam import unused_classifier
from sam_jax.weights.names import from_native


@functools.cache
def segment_anything() -> ModuleType:
    """Segment Anything's package; it needs ``requirements-torch.lock``."""
    return _imported("segment_anything")


@functools.cache
def mobile_sam() -> ModuleType:
    """MobileSAM's package, which is Segment Anything's with TinyViT; needs the same."""
    return _imported("mobile_sam")


def _imported(name: str) -> ModuleType:
    stand_ins = {} if importlib.util.find_spec("torchvision") else _torchvision()
    if importlib.util.find_spec("timm") is None:
        stand_ins |= _timm()
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module(name)
    finally:
        for stand_in in stand_ins:
            del sys.modules[stand_in]


def _torchvision() -> dict[str, ModuleType]:
    functional = ModuleType("torchvision.transforms.functional")
    functional.__dict__.update(resize=_resize, to_pil_image=Image.fromarray)
    boxes = ModuleType("torchvision.ops.boxes")
    boxes.__dict__.update(batched_nms=_batched_nms, box_area=_box_area)
    packages = ("torchvision", "torchvision.ops", "torchvision.transforms")
    return {module.__name__: module for module in (functional, boxes, *map(ModuleType, packages))}


def _timm() -> dict[str, ModuleType]:
    import torch

    layers = ModuleType("timm.models.layers")
    # Paths are dropped in training alone.
    layers.__dict__.update(
        DropPath=torch.nn.Identity,
        to_2tuple=lambda size: (size, size),
        trunc_normal_=torch.nn.init.trunc_normal_,
    )
    registry = ModuleType("timm.models.registry")
    registry.__dict__.update(register_model=lambda function: function)
    packages = ("timm", "timm.models")
    return {module.__name__: module for module in (layers, registry, *map(ModuleType, packages))}


def build(config: SamConfig) -> Any:
    """The published model in the shape of a config, with the weights that its constructors make.

    Its encoder is built for square images of the config's height; a TinyViT runs at 1024 alone, and
    steps to its last stage without a stride only where that is 320 wide.
    """
    import torch

    encoder, decoder = config.image_encoder, config.mask_decoder
    dim = encoder.output_dim
    if isinstance(encoder, TinyViTConfig):
        modeling = mobile_sam().modeling
        image_encoder = modeling.TinyViT(
            img_size=encoder.image_size[0],
            embed_dims=list(encoder.embed_dims),
            depths=list(encoder.depths),
            num_heads=list(encoder.num_heads),
            window_sizes=list(encoder.window_sizes),
            mlp_ratio=encoder.mlp_rate,
            mbconv_expand_ratio=encoder.expand_rate,
            drop_path_rate=0.0,
        )
    else:
        modeling = segment_anything().modeling
        image_encoder = modeling.ImageEncoderViT(
            img_size=encoder.image_size[0],
            patch_size=encoder.patch_size,
            embed_dim=encoder.embed_dim,
            depth=encoder.depth,
            num_heads=encoder.num_heads,
            mlp_ratio=encoder.mlp_rate,
            out_chans=dim,
            norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            global_attn_indexes=tuple(encoder.global_attention_blocks),
            window_size=encoder.window_size,
        )
    return modeling.Sam(
        image_encoder,
        modeling.PromptEncoder(
            embed_dim=dim,
            image_embedding_size=encoder.grid,
            input_image_size=encoder.image_size,
            mask_in_chans=config.mask_channels,
        ),
        modeling.MaskDecoder(
            transformer_dim=dim,
            num_multimask_outputs=NUM_MULTIMASK,
            transformer=modeling.TwoWayTransformer(
                depth=decoder.depth,
                embedding_dim=dim,
                num_heads=decoder.num_heads,
                mlp_dim=decoder.mlp_dim,
            ),
            iou_head_hidden_dim=decoder.iou_head_dim,
        ),
    )


def with_weights(config: SamConfig, variables: Mapping[str, Any], device: str = "cpu") -> Any:
    """The published model with our weights, for inference."""
    import torch

    model = build(config).to(device).requires_grad_(False)
    tensors = from_native(jax.device_get(variables))
    if isinstance(config.image_encoder, TinyViTConfig):
        tensors |= unused_classifier(config.image_encoder)
    model.load_state_dict(
        {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}
    )
    # Not before: that is when TinyViT takes its attention's biases from their tables.
    return model.eval()


def generator_arguments(options: AutomaticOptions) -> dict[str, Any]:
    """Arguments of the published generator: those of our options that it has, too."""
    known = inspect.signature(segment_anything().SamAutomaticMaskGenerator).parameters
    ours = dataclasses.asdict(options)
    return {name: value for name, value in ours.items() if name in known}


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image.resize(size[::-1], Image.Resampling.BILINEAR)


def _box_area(boxes: Any) -> Any:
    boxes = boxes.reshape(-1, 4)
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _batched_nms(boxes: Any, scores: Any, idxs: Any, iou_threshold: float) -> Any:
    """Boxes of different ``idxs`` are no rivals; all are of one kind where the package calls it."""
    import torch

    corners = boxes.reshape(-1, 4).numpy(force=True)
    kinds = idxs.numpy(force=True)
    area = _box_area(corners)
    order = torch.argsort(scores, descending=True, stable=True).numpy(force=True)
    kept = []
    while order.size:
        best, rest = order[0], order[1:]
        kept.append(int(best))
        left_top = np.maximum(corners[best, :2], corners[rest, :2])
        right_bottom = np.minimum(corners[best, 2:], corners[rest, 2:])
        overlap = np.clip(right_bottom - left_top, 0, None).prod(axis=-1)
        with np.errstate(invalid="ignore"):
            iou = overlap / (area[best] + area[rest] - overlap)
        # Boxes without an area have no overlap with one another: 0 / 0 is no rivalry.
        order = rest[~(iou > iou_threshold) | (kinds[rest] != kinds[best])]
    return torch.tensor(kept, dtype=torch.int64, device=boxes.device)
