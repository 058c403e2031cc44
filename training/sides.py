"""Teaches the UNet which position of a face belongs to which side, for adapters with a token for each side."""

import torch
import torch.nn.functional as F
from torch import nn


class SideAttention:
    r"""
    The loss of the attention between the tokens of the left and the right side, in every cross-attention layer.

    The softmax over both sides is a sigmoid of the difference of their scores, so at a position inside the face the
    loss is the binary cross-entropy against the side that the position is on. By the diffusion loss alone, queries and
    keys learn nothing of sides for long: as long as both sides are attended to alike, hardly anything depends on them.

    Args:
        model (`FineFaceModel`):
            The model in training. Its adapter has `side_tokens`. The loss is of its last forward pass.

    Raises:
        ValueError: if the adapter has no `side_tokens`.
    """

    def __init__(self, model: nn.Module):
        if not model.au_adapter.config.side_tokens:
            raise ValueError(
                "`--au_side_attention_weight` needs an adapter with a token for each side: set `--au_side_tokens`, or"
                " leave it at 0."
            )
        self.adapter, self.queries = model.au_adapter, {}
        self.layers = {name: model.unet.get_submodule(name) for name in self.adapter.layers}
        for name, layer in self.layers.items():
            layer.to_q.register_forward_hook(lambda module, inputs, query, name=name: self._keep(name, query))

    def _keep(self, name: str, query: torch.Tensor) -> None:
        self.queries[name] = query

    def loss(self, au_intensities: torch.Tensor, face_sides: torch.Tensor) -> torch.Tensor:
        r"""
        Args:
            au_intensities (`torch.Tensor` of shape `(batch, num_aus)`):
                Those of the forward pass.
            face_sides (`torch.Tensor` of shape `(batch, height, width)`):
                From `training.data.face_sides`, in the size of the latents: how much of each latent is on the
                person's left side of the face, minus how much is on the right.

        Returns:
            The mean over all layers, positions inside the face and heads, a scalar.
        """
        keys = self.adapter(au_intensities)[0].float().unflatten(1, (2, -1))  # (batch, sides, tokens, width)
        losses, widths = [], list(self.adapter.layers.values())
        for (name, layer), key in zip(self.layers.items(), keys.split(widths, -1), strict=True):
            query = self.queries.pop(name).float().unflatten(-1, (layer.heads, -1))
            key = key.unflatten(-1, (layer.heads, -1))
            scores = layer.scale * torch.einsum("bqhd,bsthd->bsthq", query, key)
            left, right = scores.logsumexp(2).unbind(1)
            sides = _resize(face_sides, query.shape[1])[:, None]
            is_left = (sides > 0).float().expand_as(left)
            loss = F.binary_cross_entropy_with_logits(left - right, is_left, reduction="none")
            losses.append((sides.abs() * loss).mean() / sides.abs().mean().clamp(min=1e-6))
        return torch.stack(losses).mean()


def _resize(face_sides: torch.Tensor, positions: int) -> torch.Tensor:
    """The sides at the resolution of a layer with this number of positions, `(batch, positions)`."""
    height, width = face_sides.shape[-2:]
    factor = round((height * width / positions) ** 0.5)
    return F.avg_pool2d(face_sides[:, None].float(), factor, ceil_mode=True).flatten(1)
