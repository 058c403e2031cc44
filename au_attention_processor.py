# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
AU attention (Eq. 2): beside the text, every cross-attention layer of a UNet attends to the AUs.

    Z = Attention(Q, K_text, V_text) + λ_AU · Attention(Q, K_AU, V_AU)

The layer then applies its output projection `to_out`, which is affine, so the second term can be added after it, as
λ_AU · (to_out(Attention(Q, K_AU, V_AU)) - bias). That is what lets `AUAttnProcessor` wrap any processor a layer has.

With one AU token, which is what the paper uses, a softmax over one key is 1 whatever the query: the attention is V_AU,
the same at every position and every denoising step. So its whole term is one vector for each layer and image, which
`au_cross_attention_kwargs` computes once, before the first step. K_AU has no influence then.
"""

import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.utils import scale_lora_layers, unscale_lora_layers
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn


class AUAttnProcessor(nn.Module):
    r"""
    Wrap the processor of an attention layer and add the AU attention to what it returns. It owns no weights.

    Self-attention layers get one too: the UNet hands its `cross_attention_kwargs` to every layer, and there they are
    only dropped.

    Args:
        processor:
            The processor that the layer has.
        channels (`slice`, *optional*):
            Where this layer stands in the packed AU tensors. None for self-attention.
    """

    def __init__(self, processor, channels: slice | None = None):
        super().__init__()
        self.processor = processor
        self.channels = channels
        accepted = inspect.signature(processor.__call__).parameters
        self.takes_ip_adapter_masks = "ip_adapter_masks" in accepted

    # diffusers reads this signature, and passes on the `cross_attention_kwargs` that it names.
    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        ip_adapter_masks: list[torch.Tensor] | torch.Tensor | None = None,
        au_residual: torch.Tensor | None = None,
        au_keys: torch.Tensor | None = None,
        au_values: torch.Tensor | None = None,
    ) -> torch.Tensor:
        r"""
        Args:
            attn, hidden_states, encoder_hidden_states, attention_mask, ip_adapter_masks:
                As for the processors of diffusers.
            au_residual (`torch.Tensor` of shape `(batch, sum of all widths)`, *optional*):
                What one AU token adds to each layer's output.
            au_keys, au_values (`torch.Tensor` of shape `(batch, num_tokens, sum of all widths)`, *optional*):
                Keys and values for the attention to any number of AU tokens.
        """
        masks = {"ip_adapter_masks": ip_adapter_masks} if self.takes_ip_adapter_masks else {}
        output = self.processor(attn, hidden_states, encoder_hidden_states, attention_mask, **masks)
        if self.channels is None:
            return output
        if au_residual is not None:
            output = output + au_residual[:, None, self.channels].to(output.dtype)
        if au_keys is not None:
            au_keys, au_values = (tensor[..., self.channels].to(output.dtype) for tensor in (au_keys, au_values))
            output = output + _au_attention(attn, hidden_states, au_keys, au_values)
        return output


def au_layers(unet: nn.Module) -> dict[str, int]:
    """The inner width of each cross-attention layer of `unet` by its name, in the order of the names."""
    layers = {name: attn.inner_dim for name, attn in _attention_layers(unet) if name.endswith(".attn2")}
    if not layers:
        raise ValueError(f"This {type(unet).__name__} has no cross-attention layers, so AUs have no way into it.")
    return dict(sorted(layers.items()))


def attach_au_processors(unet: nn.Module) -> None:
    """Wrap the attention processors of `unet`, where they are not wrapped yet."""
    unwrapped = {n: attn for n, attn in _attention_layers(unet) if not isinstance(attn.processor, AUAttnProcessor)}
    if unwrapped:
        widths = au_layers(unet)
        ends = dict(zip(widths, itertools.accumulate(widths.values()), strict=True))
        channels = {name: slice(ends[name] - width, ends[name]) for name, width in widths.items()}
        for name, attn in unwrapped.items():
            attn.set_processor(AUAttnProcessor(attn.processor, channels.get(name)))


def detach_au_processors(unet: nn.Module) -> None:
    """Give every attention layer of `unet` back the processor that it had."""
    for _, attn in _attention_layers(unet):
        if isinstance(attn.processor, AUAttnProcessor):
            attn.set_processor(attn.processor.processor)


@contextmanager
def au_processors_detached(unet: nn.Module) -> Iterator[None]:
    """Detach the AU processors, if there are any, while something else looks at or changes the processors."""
    attached = any(isinstance(attn.processor, AUAttnProcessor) for _, attn in _attention_layers(unet))
    detach_au_processors(unet)
    try:
        yield
    finally:
        if attached:
            attach_au_processors(unet)


# Under CPU offloading the UNet's weights are elsewhere until its hook runs.
@apply_forward_hook
def au_cross_attention_kwargs(
    unet: nn.Module,
    au_keys: torch.Tensor,
    au_values: torch.Tensor,
    au_scale: float | torch.Tensor = 1.0,
    lora_scale: float = 1.0,
    general: bool = False,
) -> dict[str, torch.Tensor]:
    r"""
    The `cross_attention_kwargs` that make `unet`, with its processors attached, attend to the AUs. Differentiable.

    They are tensors only, and the scale is inside them, so a compiled UNet is not compiled again when AUs or scales
    change.

    Args:
        unet (`UNet2DConditionModel`):
            The UNet that will be called with them.
        au_keys, au_values (`torch.Tensor` of shape `(batch, num_tokens, sum of all widths)`):
            From an `AUAdapter`.
        au_scale (`float` or `torch.Tensor` of shape `(batch,)`, defaults to 1.0):
            λ_AU. With 0 the AUs add exactly nothing.
        lora_scale (`float`, defaults to 1.0):
            The `scale` that the same call passes to the UNet in `cross_attention_kwargs`.
        general (`bool`, defaults to `False`):
            Compute the attention also for one token, which gives the same result more slowly.

    Returns:
        `{"au_residual": tensor}` for one token, `{"au_keys": tensor, "au_values": tensor}` otherwise.
    """
    dtype = unet.dtype
    au_scale = torch.as_tensor(au_scale, device=au_values.device).to(dtype).reshape(-1, 1, 1)
    au_keys, au_values = au_keys.to(dtype), au_values.to(dtype)
    layers = [attn for name, attn in sorted(_attention_layers(unet)) if name.endswith(".attn2")]
    # Group offloading has the weights in place only while the UNet runs, so it is the UNet that has to use them.
    devices = {attn.to_out[0].weight.device for attn in layers}
    if general or au_values.shape[1] != 1 or devices - {au_values.device, torch.device("meta")}:
        # Attention is linear in its values, so the scale can be applied to them.
        return {"au_keys": au_keys, "au_values": au_scale * au_values}
    # The offset of the affine `to_out` is what it makes of 0, which is the last row.
    values = F.pad(au_values, (0, 0, 0, 0, 0, 1)).split([attn.inner_dim for attn in layers], dim=-1)
    scale_lora_layers(unet, lora_scale)
    try:
        outputs = [attn.to_out[0](v) / attn.rescale_output_factor for attn, v in zip(layers, values, strict=True)]
    finally:
        unscale_lora_layers(unet, lora_scale)
    outputs = torch.cat(outputs, dim=-1)
    return {"au_residual": (au_scale * (outputs[:-1] - outputs[-1:])).squeeze(1)}


def _attention_layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Attention]]:
    """The attention layers of a UNet by name. It is walked before every call, so no deeper than needed."""
    # torch.compile(unet) is a module around the UNet, and would put its own name before the others.
    for name, child in getattr(module, "_orig_mod", module).named_children():
        if isinstance(child, Attention):
            yield prefix + name, child
        # An IP-Adapter's image projection may hold attention layers that get no `cross_attention_kwargs`.
        elif prefix or name in ("down_blocks", "mid_block", "up_blocks"):
            yield from _attention_layers(child, f"{prefix}{name}.")


def _au_attention(
    attn: Attention, hidden_states: torch.Tensor, au_keys: torch.Tensor, au_values: torch.Tensor
) -> torch.Tensor:
    query, key, value = (
        tensor.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (batch, heads, tokens, head_dim)
        for tensor in (attn.to_q(hidden_states), au_keys, au_values)
    )
    attended = F.scaled_dot_product_attention(query, key, value, scale=attn.scale)
    attended = attended.transpose(1, 2).flatten(2)  # (batch, query tokens, width)
    offset = attn.to_out[0](attended.new_zeros(1, 1, attended.shape[-1]))
    return (attn.to_out[0](attended) - offset) / attn.rescale_output_factor
