"""FLOPs of the model, counted by hand.

XLA's own count takes the body of a loop once, however often it runs, and a custom kernel for
nothing, so it cannot be trusted on a whole training step; on code without loops it agrees with
these formulas (``tests/unit/test_benchmarks.py``).

All numbers are floating-point operations, two for each multiply-add of a matrix product or
convolution. What is done element by element (activations, norms, softmax, losses, resizing, the
optimizer) is not counted: it is no work for a matrix unit, and how much of it there is depends on
how it is written.
"""

import dataclasses

from sam_jax.arrays import GridShape
from sam_jax.models.image_encoder import ImageEncoderConfig
from sam_jax.models.mask_decoder import NUM_MASK_TOKENS, NUM_MULTIMASK
from sam_jax.models.masked_autoencoder import AutoencoderConfig, kept_patches
from sam_jax.models.sam import SamConfig
from sam_jax.models.tiny_vit import MERGE_STRIDES, TinyViTConfig
from sam_jax.ops.token_attention import folding_pays
from sam_jax.simulated_user import PromptConfig

# The backward pass multiplies twice for each product of the forward pass: once for the gradient of
# either factor. Rematerialisation multiplies again, but that is a price, not work done.
TRAINING_FACTOR = 3
# The quality token and the tokens of the four masks.
NUM_OUTPUT_TOKENS = 1 + NUM_MASK_TOKENS
# Sub-pixels per image token of the low-resolution logits.
_SUBPIXELS = 16


def encoder_flops(
    config: ImageEncoderConfig | TinyViTConfig,
    image_size: tuple[int, int] | None = None,
    *,
    useful: bool = False,
    num_channels: int = 3,
) -> int:
    """Operations of encoding one image.

    Args:
      config: the encoder's shape.
      image_size: height and width in pixels, by default the config's.
      useful: counts only tokens of the image as queries. Without it the zeros that fill up the last
        windows count too, as they are computed. They stay keys either way: the published model
        attends to them.
      num_channels: of the image.
    """
    height, width = image_size or config.image_size
    gh, gw = height // config.patch_size, width // config.patch_size
    if isinstance(config, TinyViTConfig):
        return _tiny_vit_flops(config, (height, width), num_channels, useful=useful)
    image_tokens, dim, side = gh * gw, config.embed_dim, config.window_size
    padded = (gh + -gh % side) * (gw + -gw % side) if side else image_tokens

    mlp = 2 * image_tokens * dim * int(dim * config.mlp_rate)
    total = image_tokens * num_channels * config.patch_size**2 * dim
    for index in range(config.depth):
        if index in config.global_attention_blocks or not side:
            total += _grid_attention(image_tokens, (gh, gw), dim) + mlp
        else:
            total += _grid_attention(image_tokens if useful else padded, (side, side), dim) + mlp
    return 2 * (total + _neck(image_tokens, dim, config.output_dim))


def autoencoder_flops(
    encoder: ImageEncoderConfig, config: AutoencoderConfig, num_channels: int = 3
) -> int:
    """Operations of reconstructing one image: blocks of the encoder see the kept patches alone."""
    num_patches = encoder.grid[0] * encoder.grid[1]
    visible = 1 + kept_patches(num_patches, config.mask_rate)
    dim, pixels = config.decoder_dim, num_channels * encoder.patch_size**2
    total = num_patches * pixels * encoder.embed_dim
    total += encoder.depth * _plain_block(visible, encoder.embed_dim, encoder.mlp_rate)
    total += visible * encoder.embed_dim * dim
    total += config.decoder_depth * _plain_block(1 + num_patches, dim, config.decoder_mlp_rate)
    return 2 * (total + num_patches * dim * pixels)


def _plain_block(tokens: int, dim: int, mlp_rate: float) -> int:
    """Multiply-adds of a transformer block without relative positions, of all tokens with all."""
    return tokens * dim * (4 * dim + 2 * tokens + 2 * int(dim * mlp_rate))


def _neck(image_tokens: int, dim: int, output_dim: int) -> int:
    """Multiply-adds of the convolutions after the last block."""
    return image_tokens * output_dim * (dim + 9 * output_dim)


def _tiny_vit_flops(
    config: TinyViTConfig, image_size: tuple[int, int], num_channels: int, *, useful: bool
) -> int:
    """Operations of encoding one image, see ``encoder_flops``."""
    height, width = (size // 2 for size in image_size)
    dims = config.embed_dims
    total = height * width * 9 * num_channels * (dims[0] // 2)
    height, width = height // 2, width // 2
    total += height * width * 9 * (dims[0] // 2) * dims[0]
    for stage, dim in enumerate(dims):
        tokens = height * width
        if stage == 0:
            hidden = int(dim * config.expand_rate)
            block = tokens * hidden * (2 * dim + 9)
        else:
            side = config.window_sizes[stage]
            padded = (height + -height % side) * (width + -width % side)
            attended = tokens if useful else padded
            block = attended * (4 * dim * dim + 2 * side * side * dim)
            block += tokens * (2 * dim * int(dim * config.mlp_rate) + 9 * dim)
        total += config.depths[stage] * block
        if stage < len(MERGE_STRIDES):
            stride, features = MERGE_STRIDES[stage], dims[stage + 1]
            total += tokens * dim * features
            height, width = height // stride, width // stride
            total += height * width * features * (9 + features)
    return 2 * (total + _neck(height * width, dims[-1], config.output_dim))


def attention_flops(grid: GridShape, dim: int) -> int:
    """Operations of attention over one grid, without the projections before and after it."""
    image_tokens = grid[0] * grid[1]
    return 2 * image_tokens * (2 * image_tokens + grid[0] + grid[1]) * dim


def _grid_attention(queries: int, grid: tuple[int, int], dim: int) -> int:
    """Multiply-adds of attention with relative positions; each query sees one whole grid."""
    projections = 4 * dim * dim
    logits_and_values = 2 * grid[0] * grid[1] * dim
    relative_positions = (grid[0] + grid[1]) * dim
    return queries * (projections + logits_and_values + relative_positions)


def decoder_flops(
    config: SamConfig,
    num_prompts: float,
    num_sparse: int,
    *,
    multimask_output: bool,
    with_mask: bool = False,
    image_size: tuple[int, int] | None = None,
) -> float:
    """Operations of embedding and decoding the prompts of one image.

    Args:
      config: the model's shape.
      num_prompts: prompted objects; a fraction if it is a mean over images.
      num_sparse: sparse tokens of each, valid or not: points, box corners or "not a point".
      multimask_output: three candidates each, or one.
      with_mask: whether they bring a mask.
      image_size: height and width in pixels, by default the config's.
    """
    encoder, decoder = config.image_encoder, config.mask_decoder
    height, width = image_size or encoder.image_size
    image_tokens = (height // encoder.patch_size) * (width // encoder.patch_size)
    dim, tokens = encoder.output_dim, NUM_OUTPUT_TOKENS + num_sparse
    masks = NUM_MULTIMASK if multimask_output else 1
    inner = dim // 2
    # Without masks, all objects of an image see the same image tokens in the first layer.
    sharing = 1 if with_mask else num_prompts

    cross = _CrossAttention(tokens, image_tokens, dim, inner, decoder.num_heads)
    of_tokens = _self_attention(tokens, dim, decoder.num_heads) + 2 * tokens * dim * decoder.mlp_dim
    first = cross.to_image(sharing) + cross.to_tokens(sharing)
    others = (decoder.depth - 1) * (cross.to_image() + cross.to_tokens())
    transformer = decoder.depth * of_tokens + first + others + cross.to_image()
    upscaling = image_tokens * dim * (dim + dim // 2)
    filters = masks * dim * (2 * dim + dim // 8)
    products = masks * _SUBPIXELS * image_tokens * (dim // 8)
    iou_head = decoder.iou_head_dim * (dim + decoder.iou_head_dim + NUM_MASK_TOKENS)
    per_prompt = transformer + upscaling + filters + products + iou_head
    if with_mask:
        channels = config.mask_channels
        per_prompt += image_tokens * channels * (4 + channels + dim)
    return 2 * num_prompts * per_prompt


def _self_attention(tokens: int, dim: int, num_heads: int) -> int:
    """Multiply-adds of full attention among a few tokens.

    Each head's queries meet all heads' keys, and are zero but for their own.
    """
    return 4 * tokens * dim * dim + 2 * tokens * num_heads * tokens * dim


@dataclasses.dataclass(frozen=True)
class _CrossAttention:
    """Multiply-adds, for one object, of attention between its tokens and the image tokens.

    Either the image tokens go through a projection, which objects may share, or the tokens go
    through it in their stead and meet the image tokens at full width, see ``ops.token_attention``.
    """

    tokens: int
    image_tokens: int
    dim: int
    inner: int
    num_heads: int

    def to_image(self, sharing: float = 1) -> float:
        """Tokens attend to those of an image, which as many objects share."""
        return 2 * self._project_tokens() + 2 * self._meet(sharing)

    def to_tokens(self, sharing: float = 1) -> float:
        """Image tokens attend to the tokens; each object's own result is always folded."""
        bias = self.tokens * self.inner if self._folds(sharing) else 0
        return 2 * self._project_tokens() + self._meet(sharing) + bias + self._folded()

    def _project_tokens(self) -> int:
        return self.tokens * self.dim * self.inner

    def _folds(self, sharing: float) -> bool:
        return folding_pays(
            self.tokens, self.image_tokens, self.dim, self.inner, self.num_heads, sharing
        )

    def _meet(self, sharing: float) -> float:
        if self._folds(sharing):
            return self._folded()
        # Tokens are expanded with zeros for the other heads, as in self-attention.
        return self.image_tokens * self.inner * (self.dim / sharing + self.tokens * self.num_heads)

    def _folded(self) -> int:
        return self.tokens * self.dim * (self.inner + self.image_tokens * self.num_heads)


def round_flops(
    config: SamConfig, prompts: PromptConfig, num_objects: float, *, is_first: bool
) -> float:
    """Operations of one training round of an image, forward.

    Every round has room for all points and a box, and every round but the first brings a mask and
    wants one candidate.
    """
    corners = 2  # in whose place "not a point" stands where there is no box
    return decoder_flops(
        config,
        num_objects,
        prompts.num_points + corners,
        multimask_output=is_first,
        with_mask=not is_first,
    )


def step_flops(
    config: SamConfig,
    prompts: PromptConfig,
    batch_size: int,
    num_objects: float,
    *,
    useful: bool = False,
    encoder_factor: float = TRAINING_FACTOR,
    decoder_factor: float = TRAINING_FACTOR,
) -> float:
    """Operations of a training step: each image encoded once, its objects decoded every round.

    Args:
      config: the model's shape.
      prompts: says how many rounds there are.
      batch_size: images.
      num_objects: objects of each image, on average.
      useful: see ``encoder_flops``.
      encoder_factor: passes over the encoder, see ``training_factor``; 0 where batches hold
        embeddings.
      decoder_factor: passes over prompt encoder and mask decoder.
    """
    rounds = round_flops(config, prompts, num_objects, is_first=True)
    rounds += (prompts.num_rounds - 1) * round_flops(config, prompts, num_objects, is_first=False)
    encoder = encoder_flops(config.image_encoder, useful=useful, num_channels=config.channels.count)
    return batch_size * (encoder_factor * encoder + decoder_factor * rounds)


def training_factor(trained_rate: float, *, passes_gradients: bool) -> float:
    """Passes over a part of a model in a training step, in units of its forward pass.

    Args:
      trained_rate: share of the part's parameters that are trained, whose gradients are computed.
      passes_gradients: whether its activations have gradients, for what is trained in it or before
        it. Taken to reach the part's first product, which is too much where only its last layers
        are trained.
    """
    return 1 + passes_gradients + trained_rate
