"""The published model with segment-anything-fast's ideas: the same results in fewer passes.

Attention is one call of PyTorch's, with the relative positions as an additive bias; nothing waits
for the device in between; prompts of several images are decoded at once. Compiling it is left to
the caller. Its own kernel for the biases, 8-bit weights and sparsity are left out.

Source: meta-pytorch/segment-anything-fast.
Differs: its prompts of several images are nested tensors; here each image has as many.
"""

import types
from typing import Any

import torch
from torch.nn import functional


def speed_up(model: Any) -> None:
    """Replaces how a published ``Sam`` computes, in place; its weights stay what they are."""
    # Those of a TinyViT, in small windows, stay as published.
    for block in getattr(model.image_encoder, "blocks", ()):
        _replace(block.attn, "forward", attend_on_grid)
    transformer = model.mask_decoder.transformer
    layers = transformer.layers
    for attention in (
        *(layer.self_attn for layer in layers),
        *(layer.cross_attn_token_to_image for layer in layers),
        *(layer.cross_attn_image_to_token for layer in layers),
        transformer.final_attn_token_to_image,
    ):
        _replace(attention, "forward", attend)
    _replace(model.prompt_encoder, "_embed_points", embed_points)


def _replace(module: Any, name: str, method: Any) -> None:
    setattr(module, name, types.MethodType(method, module))


def attend_on_grid(self: Any, x: torch.Tensor) -> torch.Tensor:
    """The encoder's ``Attention.forward``."""
    batch, height, width, _ = x.shape
    cells = height * width
    qkv = self.qkv(x).view(batch, cells, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
    queries, keys, values = qkv.unbind(0)
    on_grid = queries.unflatten(2, (height, width))
    # Of queries that are not scaled, as published.
    rows = torch.einsum("bnhwc,hkc->bnhwk", on_grid, _relative(self.rel_pos_h, height))
    columns = torch.einsum("bnhwc,wkc->bnhwk", on_grid, _relative(self.rel_pos_w, width))
    # Small ones are put in order here, so that the large one need not be.
    rows, columns = (x.reshape(batch, self.num_heads, cells, -1) for x in (rows, columns))
    bias = (rows[..., :, None] + columns[..., None, :]).view(batch, self.num_heads, cells, cells)
    out = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)
    return self.proj(out.transpose(1, 2).reshape(batch, height, width, -1))


def _relative(table: torch.Tensor, size: int) -> torch.Tensor:
    """The table's entry for each pair of places, looked up on the table's own device."""
    places = torch.arange(size, device=table.device)
    return table[places[:, None] - places[None, :] + size - 1]


def attend(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The decoder's ``Attention.forward``."""
    queries, keys, values = (
        self._separate_heads(project(tokens), self.num_heads)
        for project, tokens in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v))
    )
    out = functional.scaled_dot_product_attention(queries, keys, values)
    return self.out_proj(self._recombine_heads(out))


def embed_points(self: Any, points: torch.Tensor, labels: torch.Tensor, pad: bool) -> torch.Tensor:
    """``PromptEncoder._embed_points``, choosing where the published code gathers and scatters.

    How many there are to gather is known to the device only.
    """
    points = points + 0.5
    if pad:
        points = functional.pad(points, (0, 0, 0, 1))
        labels = functional.pad(labels, (0, 1), value=-1)
    embedding = self.pe_layer.forward_with_coords(points, self.input_image_size)
    of_label = labels[..., None]
    embedding = torch.where(of_label == -1, self.not_a_point_embed.weight, embedding)
    for label in (0, 1):
        learned = embedding + self.point_embeddings[label].weight
        embedding = torch.where(of_label == label, learned, embedding)
    return embedding


def decode_images(
    model: Any,
    embeddings: torch.Tensor,
    points: tuple[torch.Tensor, torch.Tensor],
    masks: torch.Tensor | None,
    *,
    multimask_output: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks and predicted IoU of the prompts of several images, in one pass.

    Args:
      model: a published ``Sam``.
      embeddings: of the images, [b, d, gh, gw].
      points: coordinates [b * p, n, 2] and labels [b * p, n], image after image.
      masks: prompts [b * p, 1, 4 gh, 4 gw], or None.
      multimask_output: as published.
    """
    sparse, dense = model.prompt_encoder(points, None, masks)
    if len(embeddings) > 1:
        # The decoder copies one image for all prompts, and adds what each has of its own.
        dense = dense + embeddings.repeat_interleave(len(dense) // len(embeddings), dim=0)
        embeddings = torch.zeros_like(embeddings[:1])
    return model.mask_decoder(
        image_embeddings=embeddings,
        image_pe=model.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=multimask_output,
    )
