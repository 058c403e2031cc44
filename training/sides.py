# SPDX-License-Identifier: Apache-2.0
"""Teaches the UNet which position of a face belongs to which side, for adapters with a token for each side."""

import torch
import torch.nn.functional as F
from torch import nn

from au_attention_processor import query_weights


class SideAttention:
    r"""
    The loss of the attention between the tokens of the left and the right side, in every cross-attention layer.

    The softmax over both sides is a sigmoid of the difference of their scores, so at a position inside the face the
    loss is the binary cross-entropy against the side that the position is on. By the diffusion loss alone, queries and
    keys learn nothing of sides for long: as long as both sides are attended to alike, hardly anything depends on them.
    The loss is that of the last forward pass of `model`, a `FineFaceModel`.

    Raises:
        ValueError: if its adapter has no `side_tokens`.
    """

    def __init__(self, model: nn.Module):
        if not model.au_adapter.config.side_tokens:
            raise ValueError(
                "`--au_side_attention_weight` needs an adapter with a token for each side: set `--au_side_tokens`, or"
                " leave it at 0."
            )
        # What the last forward pass computed: the keys of the adapter, and the queries of each layer by its name.
        self.kept: dict[str, torch.Tensor] = {}
        self.widths = model.au_adapter.layers
        self.layers = {name: model.unet.get_submodule(name) for name in self.widths}
        model.au_adapter.register_forward_hook(lambda module, inputs, output: self.kept.update(keys=output[0]))
        for name, layer in self.layers.items():
            layer.to_q.register_forward_hook(lambda module, inputs, query, name=name: self.kept.update({name: query}))

    def loss(self, face_sides: torch.Tensor) -> torch.Tensor:
        """
        The mean over all layers, positions inside the face and heads, a scalar. `face_sides` of shape `(batch, height,
        width)` says how much of each latent is on the person's left side of the face, minus how much is on the right.
        """
        losses, keys = [], self.kept.pop("keys").float().unflatten(1, (2, -1))  # (batch, sides, tokens, width)
        for (name, layer), key in zip(self.layers.items(), keys.split(list(self.widths.values()), -1), strict=True):
            query = self.kept.pop(name).float().unflatten(-1, (layer.heads, -1))
            key = key.unflatten(-1, (layer.heads, -1))
            scores = layer.scale * torch.einsum("bqhd,bsthd->bsthq", query, key)
            left, right = scores.logsumexp(2).unbind(1)
            sides = query_weights(face_sides[:, None], query.shape[1]).transpose(1, 2)  # (batch, 1, positions)
            is_left = (sides > 0).float().expand_as(left)
            loss = F.binary_cross_entropy_with_logits(left - right, is_left, reduction="none")
            losses.append((sides.abs() * loss).mean() / sides.abs().mean().clamp(min=1e-6))
        return torch.stack(losses).mean()
