# SPDX-License-Identifier: Apache-2.0
"""
Writes an AU adapter as an IP-Adapter, which plain diffusers loads.

All encoders that were ever published make one token that is affine in the n intensities, A·au + c. Then the values of
a layer are W_v·(A·au + c) = (W_v·A)·au + W_v·c, and its keys have no influence. diffusers loads any file in the layout
of IP-Adapter-FaceID, and turns an embedding into

    token = LayerNorm(proj.2(GELU(proj.0(embedding))))
    key, value = to_k_ip(token), to_v_ip(token)             in each cross-attention layer

With these numbers, a vector of AUs as the embedding becomes the token (au, …, 1, …), up to rounding:

    proj.0   (2n, n)   S times the identity, below it minus that; bias 0
    proj.2   (d, 2n)   rows 0 … n-1: (I, -I)/S, which gives au, because GELU(x) - GELU(-x) = x for every x;
                       rows n … 2n-1: (-I, I)/S, so that the mean of the token is 0;
                       the next m rows: weight 0, bias +C, -C, +C, …, so that its variance is m·C²/d, whatever the AUs;
                       the rest: 0
    norm     weight C·sqrt(m/d) on rows 0 … n-1, which undoes the normalization; sqrt(m/d) on row 2n, which turns C
             into 1; 0 elsewhere; bias 0
    to_v_ip  columns 0 … n-1: W_v·A; column 2n: W_v·c; 0 elsewhere. to_k_ip is 0

`LayerNorm` divides by sqrt((m·C² + 2·|au|²)/d), so C has to be large; with m·C² near 2^28, the AUs move that by 4e-6
even where all are ±10, and a larger C would cost as much by rounding in `float32`. For half precision, every constant
is a power of two, and so exact: m is d/4 where there is room, which makes sqrt(m/d) one half. S = 64 puts the AUs
where GELU(x) is x or 0 already in half precision. So AUs come through `float16` and `bfloat16` to 2e-4, a hundredth of
what `bfloat16` rounds at an AU of 5. (With C = 1000, S = 1 and all rows in use, it is 2e-2.)
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

from action_units import AU_NAMES
from au_encoder import IP_ADAPTER_NAME, AUAdapter, ip_adapter_numbers


GELU_SCALE = 64.0


def fits_ip_adapter(adapter: AUAdapter) -> bool:
    """Whether this layout can hold `adapter`: its values are affine, and a token has room for its AUs."""
    return adapter.is_affine and 2 * adapter.config.num_aus + 2 <= adapter.config.cross_attention_dim


def image_projection(num_aus: int, width: int) -> dict[str, torch.Tensor]:
    r"""
    Make the projection that turns `num_aus` intensities into a token of `width` numbers, which are the intensities and
    a 1 at `2 * num_aus`.

    Raises:
        ValueError: if the token has no room for them.
    """
    room = (width - 2 * num_aus) // 2 * 2
    if room < 2:
        raise ValueError(
            f"A token of {width} numbers holds at most {(width - 2) // 2} AUs as an IP-Adapter, but this adapter has"
            f" {num_aus}. Use it with FineFacePipeline."
        )
    # Where sqrt(num_offsets / width) is a power of two, half precision has it exactly.
    exact = [width // 4**i for i in range(1, 8) if width % (2 * 4**i) == 0]
    num_offsets = next((number for number in exact if number <= room), room)
    scale = math.sqrt(num_offsets / width)
    offset = 2.0 ** round(14 - math.log2(num_offsets) / 2)
    signs = torch.cat([torch.eye(num_aus), -torch.eye(num_aus)])
    to_token, token_bias, norm = torch.zeros(width, 2 * num_aus), torch.zeros(width), torch.zeros(width)
    to_token[: 2 * num_aus] = signs @ signs.T / GELU_SCALE
    token_bias[2 * num_aus :][:num_offsets] = torch.tensor([offset, -offset]).repeat(num_offsets // 2)
    norm[:num_aus], norm[2 * num_aus] = offset * scale, scale
    return {
        "proj.0.weight": GELU_SCALE * signs,
        "proj.0.bias": torch.zeros(2 * num_aus),
        "proj.2.weight": to_token,
        "proj.2.bias": token_bias,
        "norm.weight": norm,
        "norm.bias": torch.zeros(width),
    }


def ip_adapter_state_dict(adapter: AUAdapter) -> dict[str, torch.Tensor]:
    r"""
    Make all tensors of the file, by the names that `load_ip_adapter` looks for, in the dtype of `adapter`.

    Raises:
        ValueError: if the values are not affine in the intensities, or a token has no room for them.
    """
    folded, width = adapter.fold(), adapter.config.cross_attention_dim
    num_aus, dtype = adapter.config.num_aus, adapter.dtype
    projection = image_projection(num_aus, width)
    state_dict = {f"image_proj.{name}": tensor.to(dtype) for name, tensor in projection.items()}
    values = folded.attn_processors_state_dict()
    for layer, number in ip_adapter_numbers(adapter.layers).items():
        value = values[f"{layer}.processor.to_v_au.weight"]
        to_v = torch.zeros(len(value), width, dtype=dtype)
        to_v[:, :num_aus], to_v[:, 2 * num_aus] = value[:, :num_aus], value[:, num_aus]
        state_dict[f"ip_adapter.{number}.to_k_ip.weight"] = torch.zeros_like(to_v)
        state_dict[f"ip_adapter.{number}.to_v_ip.weight"] = to_v
    return state_dict


def write_ip_adapter(folder: Path, adapter: AUAdapter) -> None:
    """Write `adapter` into `folder` as `au_ip_adapter.safetensors`, in its dtype, with the names of its AUs."""
    metadata = {"format": "pt", "au_names": json.dumps(list(adapter.config.au_names or AU_NAMES))}
    save_file(ip_adapter_state_dict(adapter), folder / IP_ADAPTER_NAME, metadata=metadata)
