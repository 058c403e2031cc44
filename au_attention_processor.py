# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
AU attention (Eq. 2): beside the text, every cross-attention layer of a UNet attends to the AUs.

    Z = Attention(Q, K_text, V_text) + λ_AU · Attention(Q, K_AU, V_AU)

The layer then applies its output projection `to_out`, which is affine, so the second term can be added after it, as
λ_AU · (to_out(Attention(Q, K_AU, V_AU)) - bias). Because of this, `AUAttnProcessor` can extend any processor.

The paper uses one AU token. A softmax over one key is always 1, so the attention is V_AU at every position and every
denoising step, and K_AU has no influence. The second term is then one vector for each layer and image, and
`pack_au_tensors` computes it once, before the first step.

If several people in a picture have their own AUs, each in the region of a mask, the second term is the sum over the
people, weighted at each position by their masks.
"""

import functools
import inspect
import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_utils import get_parameter_dtype
from diffusers.utils import scale_lora_layers, unscale_lora_layers
from diffusers.utils.accelerate_utils import apply_forward_hook
from PIL import Image
from torch import nn


# Relative difference between the aspect ratios of mask and picture that is allowed, for sizes that were rounded.
MAX_MASK_DISTORTION = 0.05


class AUAttnProcessor:
    r"""
    Base class of attention processors that take AUs. They add the AU attention to the output of another processor.

    `attach_au_processors` changes the class of each processor in a UNet to a subclass of this class and of its former
    class. A processor with AUs is therefore still an instance of its former class, with the same attributes, weights
    and constructor. It has no state of its own: the slice of the AU tensors that belongs to a layer is an attribute of
    the layer, `au_channels`. Its call takes these arguments in addition to those of the extended processor.

    Args:
        au_residual (`torch.Tensor` of shape `(batch, sum of all widths)`, *optional*):
            The vector that one AU token adds to each layer's output.
        au_keys, au_values (`torch.Tensor` of shape `(batch, num_tokens, sum of all widths)`, *optional*):
            Keys and values for the attention to any number of AU tokens.
        au_masks (`torch.Tensor` of shape `(batch, people, height, width)`, *optional*):
            The region of each person, in the size of the latents. The tensors above then have a dimension of people
            after the batch dimension.

    Raises:
        ValueError: if the AU tensors were made for another batch or another size of latents.
    """


class _Signature(inspect.Signature):
    """A signature with a plain dict of parameters: torch.compile cannot trace the read-only view of `inspect`."""

    def __init__(self, parameters: Iterable[inspect.Parameter] = ()):
        super().__init__()
        self._by_name = {parameter.name: parameter for parameter in parameters}

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        return self._by_name

    def replace(self, *, parameters: Iterable[inspect.Parameter]) -> inspect.Signature:
        return _Signature(parameters)


@functools.cache
def _with_aus(processor_class: type) -> type:
    """The subclass of `AUAttnProcessor` and `processor_class`."""

    def __call__(
        self, attn, hidden_states, *args, au_residual=None, au_keys=None, au_values=None, au_masks=None, **kwargs
    ):
        output = processor_class.__call__(self, attn, hidden_states, *args, **kwargs)
        if au_residual is None and au_keys is None:
            return output
        # The UNet passes its `cross_attention_kwargs` to every layer, and self-attention layers ignore the AUs.
        channels = getattr(attn, "au_channels", None)
        if channels is None:
            return output
        num_rows = (au_values if au_residual is None else au_residual).shape[0]
        if num_rows != output.shape[0]:
            raise ValueError(
                f"The AU tensors in `cross_attention_kwargs` have {num_rows} rows, but this call of the UNet has"
                f" {output.shape[0]}. Make them with the values of this call: its number of prompts as `batch_size`,"
                " its `num_images_per_prompt`, its `guidance_scale` (above 1 it has twice the rows) and its"
                " `pag_scale`."
            )
        weights = None if au_masks is None else query_weights(au_masks, output.shape[1]).to(output.dtype)
        if au_residual is not None:
            if weights is None:
                output = output + au_residual[:, None, channels].to(output.dtype)
            else:
                output = output + weights @ au_residual[..., channels].to(output.dtype)
        if au_keys is not None:
            au_keys, au_values = (tensor[..., channels].to(output.dtype) for tensor in (au_keys, au_values))
            output = output + _au_attention(attn, hidden_states, au_keys, au_values, weights)
        return output

    # diffusers reads the signature of a layer's processor at each step, and passes only arguments that it names.
    parameters = [
        *inspect.signature(processor_class.__call__).parameters.values(),
        *(p for p in inspect.signature(__call__).parameters.values() if p.kind is p.KEYWORD_ONLY),
    ]
    __call__.__signature__ = _Signature(sorted(parameters, key=lambda parameter: parameter.kind))
    name = f"{processor_class.__name__}WithAUs"
    return type(name, (AUAttnProcessor, processor_class), {"__call__": __call__, "__module__": __name__})


class _KeepAUProcessors:
    """A pre-forward hook for a UNet that extends its processors again if a pipeline has replaced them."""

    def __init__(self, layers: list[Attention]):
        self.layers = layers

    def __call__(self, unet: nn.Module, args: tuple) -> None:
        for attn in self.layers:
            if not isinstance(attn.processor, AUAttnProcessor):
                _extend_processor(attn)


def au_layers(unet: nn.Module) -> dict[str, int]:
    """The inner width of each cross-attention layer of `unet` by its name, in the order of the names."""
    layers = {name: attn.inner_dim for name, attn in _attention_layers(unet) if name.endswith(".attn2")}
    if not layers:
        raise ValueError(f"This {type(unet).__name__} has no cross-attention layers, so AUs have no way into it.")
    return dict(sorted(layers.items()))


def attach_au_processors(unet: nn.Module) -> None:
    """
    Make the attention processors of `unet` take AUs. Processors that are set later are extended before the next call.
    Raises a TypeError if one is not an instance of an ordinary Python class, so that it cannot be extended.
    """
    unet = getattr(unet, "_orig_mod", unet)
    layers = dict(_attention_layers(unet))
    widths = au_layers(unet)
    ends = dict(zip(widths, itertools.accumulate(widths.values()), strict=True))
    for name, attn in layers.items():
        attn.au_channels = slice(ends[name] - widths[name], ends[name]) if name in widths else None
        if not isinstance(attn.processor, AUAttnProcessor):
            _extend_processor(attn)
    if not any(isinstance(hook, _KeepAUProcessors) for hook in unet._forward_pre_hooks.values()):
        unet.register_forward_pre_hook(_KeepAUProcessors(list(layers.values())))
    if hasattr(unet, "set_default_attn_processor"):
        unet.set_default_attn_processor = functools.partial(_set_default_attn_processor, unet)


def detach_au_processors(unet: nn.Module) -> None:
    """Give every attention processor of `unet` its former class back."""
    unet = getattr(unet, "_orig_mod", unet)
    unet.__dict__.pop("set_default_attn_processor", None)
    for key, hook in list(unet._forward_pre_hooks.items()):
        if isinstance(hook, _KeepAUProcessors):
            del unet._forward_pre_hooks[key]
    for _, attn in _attention_layers(unet):
        attn.__dict__.pop("au_channels", None)
        if isinstance(attn.processor, AUAttnProcessor):
            attn.processor.__class__ = type(attn.processor).__bases__[1]


def _set_default_attn_processor(unet: nn.Module) -> None:
    """Replace the method of `unet`, which rejects every processor that is not exactly of a class of diffusers."""
    detach_au_processors(unet)
    try:
        unet.set_default_attn_processor()
    finally:
        attach_au_processors(unet)


def _extend_processor(attn: Attention) -> None:
    # Change the object in place, because a pipeline may keep the processor that it has set.
    try:
        attn.processor.__class__ = _with_aus(type(attn.processor))
    except TypeError as error:
        raise TypeError(
            f"AUs cannot be added to an attention processor of the type {type(attn.processor).__name__}: {error}. Set"
            " an instance of an ordinary Python class, such as `AttnProcessor2_0()`."
        ) from error


# With CPU offloading, the hook of `apply_forward_hook` first brings the UNet's weights to the device.
@apply_forward_hook
def pack_au_tensors(
    unet: nn.Module,
    au_keys: torch.Tensor,
    au_values: torch.Tensor,
    *,
    au_scale: float | torch.Tensor = 1.0,
    lora_scale: float = 1.0,
    general: bool = False,
    au_masks: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    r"""
    Pack the AU keys and values of all layers into the `cross_attention_kwargs` with which `unet` attends to the AUs.
    Its AU processors have to be attached. Gradients pass through.

    The result contains only tensors, and they include the scale, so a compiled UNet is not compiled again when AUs or
    scales change. `general` computes the attention also for one token, which gives the same result more slowly.

    Args:
        au_keys, au_values (`torch.Tensor` of shape `(batch, num_tokens, sum of all widths)`):
            From an `AUAdapter`.
        au_scale (`float` or `torch.Tensor` of shape `(batch,)`, defaults to 1.0):
            λ_AU. With 0 the AUs add exactly nothing.
        lora_scale (`float`, defaults to 1.0):
            The `scale` that the same call passes to the UNet in `cross_attention_kwargs`.
        au_masks (`torch.Tensor` of shape `(batch, people, height, width)`, *optional*):
            From `read_au_masks`. The rows of all other tensors are then the people of the first picture, followed by
            the people of the second, and so on.

    Returns:
        `{"au_residual": tensor}` for one token, `{"au_keys": tensor, "au_values": tensor}` otherwise, and `"au_masks"`
        if there are masks.
    """
    # Same as `unet.dtype`, without walking all modules.
    dtype = get_parameter_dtype(unet.conv_in)
    au_scale = torch.as_tensor(au_scale, device=au_values.device).to(dtype).reshape(-1, 1, 1)
    au_keys, au_values = au_keys.to(dtype), au_values.to(dtype)
    layers = [attn for name, attn in sorted(_attention_layers(unet)) if name.endswith(".attn2")]
    # With group offloading, the weights are on the device only while the UNet runs, so the UNet has to do the work.
    devices = {attn.to_out[0].weight.device for attn in layers}
    if general or au_values.shape[1] != 1 or devices - {au_values.device, torch.device("meta")}:
        # Attention is linear in its values, so the scale can be applied to them.
        return _with_masks({"au_keys": au_keys, "au_values": au_scale * au_values}, au_masks)
    # `to_out` is affine. The row of zeros at the end gives its offset.
    values = F.pad(au_values, (0, 0, 0, 0, 0, 1)).split([attn.inner_dim for attn in layers], dim=-1)
    scale_lora_layers(unet, lora_scale)
    try:
        outputs = [attn.to_out[0](v) / attn.rescale_output_factor for attn, v in zip(layers, values, strict=True)]
    finally:
        unscale_lora_layers(unet, lora_scale)
    outputs = torch.cat(outputs, dim=-1)
    return _with_masks({"au_residual": (au_scale * (outputs[:-1] - outputs[-1:])).squeeze(1)}, au_masks)


def read_au_masks(au_masks, batch_size: int, latent_size: tuple[int, int]) -> torch.Tensor:
    r"""
    Bring masks of people for `batch_size` prompts into the form that the attention processors take.

    Args:
        au_masks (`torch.Tensor`, `np.ndarray`, `PIL.Image.Image` or `list`):
            One mask, a list with a mask for each person, or a list of such lists with one for each prompt; or a tensor
            of shape `(height, width)`, `(people, height, width)` or `(batch or 1, people, height, width)`. Values go
            from 0 (elsewhere) to 1 (the person), in a PIL image from black to white. A mask covers the whole picture,
            in any resolution.
        latent_size (`tuple[int, int]`):
            Height and width of the latents.

    Returns:
        `torch.Tensor` of shape `(batch_size, people, *latent_size)`, `float32`, on the CPU.

    Raises:
        ValueError: if the masks have another form, size or range.
    """
    masks = _mask_tensor(au_masks)
    if not 2 <= masks.ndim <= 4 or 0 in masks.shape:
        raise ValueError(
            f"`au_masks` has the shape {tuple(masks.shape)}. It needs (height, width), (people, height, width) or"
            " (batch, people, height, width)."
        )
    masks = masks.reshape(*[1] * (4 - masks.ndim), *masks.shape)
    if len(masks) not in (1, batch_size):
        raise ValueError(
            f"`au_masks` has masks for {len(masks)} pictures, but there are {batch_size} prompts. Pass them for each"
            " prompt, or once for all."
        )
    if not (masks.min() >= 0 and masks.max() <= 1):  # written so that NaN fails too
        raise ValueError(
            f"`au_masks` goes from {masks.min():g} to {masks.max():g}. Masks go from 0, elsewhere, to 1, the person."
        )
    distortion = masks.shape[-1] / masks.shape[-2] * latent_size[0] / latent_size[1]
    if abs(distortion - 1) > MAX_MASK_DISTORTION:
        raise ValueError(
            f"`au_masks` are {masks.shape[-1]}×{masks.shape[-2]} wide and high, but the picture has another shape."
            " Masks cover the whole picture: draw them in its `width` and `height`."
        )
    # By area, weights stay in [0, 1] and add up as the masks do. The bicubic interpolation of diffusers' IP-Adapters
    # reads only the four pixels around a position: it loses narrow masks and goes below 0.
    return F.interpolate(masks, latent_size, mode="area").expand(batch_size, -1, -1, -1)


def _mask_tensor(mask) -> torch.Tensor:
    if isinstance(mask, torch.Tensor):
        return mask.detach().float().cpu()
    if isinstance(mask, Image.Image):
        return torch.from_numpy(np.array(mask.convert("L"))).float() / 255
    if isinstance(mask, np.ndarray) and mask.dtype.kind in "bfiu":
        return torch.from_numpy(mask.astype(np.float32))
    if not isinstance(mask, (list, tuple)) or not mask:
        raise ValueError(
            f"`au_masks` is or holds {'an empty' if mask in ([], ()) else 'a'} {type(mask).__name__}. A mask is a PIL"
            " image, a tensor or an array; pass one for each person."
        )
    masks = [_mask_tensor(entry) for entry in mask]
    shapes = {tuple(entry.shape) for entry in masks}
    if len(shapes) > 1:
        raise ValueError(
            f"`au_masks` holds masks of the shapes {', '.join(map(str, sorted(shapes)))}. All need the same size, and"
            " all pictures of a call the same number of people; add an empty mask where one has fewer."
        )
    return torch.stack(masks)


def _with_masks(tensors: dict[str, torch.Tensor], au_masks: torch.Tensor | None) -> dict[str, torch.Tensor]:
    if au_masks is None:
        return tensors
    tensors = {name: tensor.unflatten(0, (-1, au_masks.shape[1])) for name, tensor in tensors.items()}
    dtype, device = next((tensor.dtype, tensor.device) for tensor in tensors.values())
    return {**tensors, "au_masks": au_masks.to(device=device, dtype=dtype)}


def query_weights(au_masks: torch.Tensor, num_queries: int) -> torch.Tensor:
    """The weight of each person at each position of a layer, of shape `(batch, num_queries, people)`."""
    height, width = au_masks.shape[-2:]
    while height * width > num_queries:
        height, width = (height + 1) // 2, (width + 1) // 2  # the UNet's downsampling rounds up
    if height * width != num_queries:
        raise ValueError(
            f"`au_masks` were made for latents of {tuple(au_masks.shape[-2:])}, which is not the size of the picture."
        )
    return F.adaptive_avg_pool2d(au_masks, (height, width)).flatten(2).transpose(1, 2)


def _attention_layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Attention]]:
    """The attention layers of a UNet by name. This runs before every call, so it skips what is inside these layers."""
    # torch.compile(unet) wraps the UNet in a module whose name would come before all others.
    for name, child in getattr(module, "_orig_mod", module).named_children():
        if isinstance(child, Attention):
            yield prefix + name, child
        # Skip an IP-Adapter's image projection, whose attention layers get no `cross_attention_kwargs`.
        elif prefix or name in ("down_blocks", "mid_block", "up_blocks"):
            yield from _attention_layers(child, f"{prefix}{name}.")


def _au_attention(
    attn: Attention,
    hidden_states: torch.Tensor,
    au_keys: torch.Tensor,
    au_values: torch.Tensor,
    weights: torch.Tensor | None,
) -> torch.Tensor:
    def split_heads(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (batch, heads, tokens, head_dim)

    def attend(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        attended = F.scaled_dot_product_attention(query, split_heads(key), split_heads(value), scale=attn.scale)
        return attended.transpose(1, 2).flatten(2)  # (batch, query tokens, width)

    query = split_heads(attn.to_q(hidden_states))
    if weights is None:
        attended = attend(au_keys, au_values)
    else:
        # `to_out` is affine, so it is applied once, after the sum.
        people = zip(weights.unbind(-1), au_keys.unbind(1), au_values.unbind(1), strict=True)
        attended = sum(weight[..., None] * attend(key, value) for weight, key, value in people)
    offset = attn.to_out[0](attended.new_zeros(1, 1, attended.shape[-1]))
    return (attn.to_out[0](attended) - offset) / attn.rescale_output_factor
