# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
The trained part of FineFace outside the UNet: the AU encoder (Table 2), the keys and values that it gives to every
cross-attention layer (Eq. 2), and the files that hold both.
"""

import copy
import functools
import inspect
import json
import logging
import os
import pickle
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import convert_unet_state_dict_to_peft
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn


ENCODER_TYPES = ("none", "mlp", "res_mlp", "res_mlp64", "res_3mlp", "individual", "direct")
# With one token of these types, the values of every layer are an affine map of the intensities: see `AUAdapter.fold`.
AFFINE_ENCODER_TYPES = ("none", "mlp", "res_mlp", "res_mlp64", "direct")
# A damaged or hostile config must not cost minutes and gigabytes before its tensors are checked. FACS has fewer AUs,
# and no encoder was tried with more tokens or wider layers.
MAX_SIZES = {"num_aus": 256, "cross_attention_dim": 65536, "num_tokens": 256, "hidden_dim": 8192}
KV_INITS = ("text", "random", "zero")

ENCODER_FOLDER = "au_encoder"
ENCODER_CONFIG_NAME = f"{ENCODER_FOLDER}/config.json"
ENCODER_WEIGHTS_NAME = f"{ENCODER_FOLDER}/diffusion_pytorch_model.safetensors"
ATTN_PROCESSORS_NAME = "au_attn_processors.safetensors"
LORA_WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
# File names of the weights that the paper's authors published.
ORIGINAL_ENCODER_NAME = "au_encoder.ckpt"
ORIGINAL_ATTN_PROCESSORS_NAME = "attn_processors.ckpt"
# File name of an adapter that `load_ip_adapter` of diffusers reads.
IP_ADAPTER_NAME = "au_ip_adapter.safetensors"
# Inputs of an IP-Adapter-FaceID: the embedding of a face recognition model.
FACE_ID_DIM = 512
# A larger scale numerator in the metadata of a LoRA is damage: PEFT computes `lora_alpha / r`.
MAX_LORA_ALPHA = 1e6


class AUEncoder(ModelMixin, ConfigMixin):
    r"""
    Turn AU intensities into tokens as wide as the text embedding (paper §4.3, Table 2 and supplement "AU Encoders").

    | `encoder_type` | a token is |
    |---|---|
    | `"none"` | the intensities, then zeros |
    | `"mlp"` | one linear layer |
    | `"res_mlp"` | the intensities, then one linear layer that fills the rest (the published SD 1.5 encoder) |
    | `"res_mlp64"` | the intensities, then `hidden_dim` linear features, then zeros (the paper's choice) |
    | `"res_3mlp"` | the intensities, then three layers with LayerNorm and LeakyReLU that fill the rest |
    | `"individual"` | the sum of one small MLP for each AU and one for the interactions of all |
    | `"direct"` | the intensities, then 1, and no wider: the values of a layer are `num_aus` vectors and an offset |

    Args:
        num_aus (`int`, *optional*):
            Number of AUs. The default is the length of `au_names`, or 12 without names.
        cross_attention_dim (`int`, defaults to 1024):
            Width of the text embedding: 1024 for Stable Diffusion 2.x, 768 for 1.x, 2048 for XL.
        encoder_type (`str`, defaults to `"res_mlp64"`):
            One of the types in the table.
        num_tokens (`int`, defaults to 1):
            Tokens for each face: one in the paper and with `"direct"`. With `"none"`, all tokens are the same.
        hidden_dim (`int`, defaults to 64):
            Number of features in `"res_mlp64"`, and width of the hidden layers in `"res_3mlp"` and `"individual"`.
        au_names (`list[str]`, *optional*):
            The names of the AUs in the order of the intensities: `"AU12"` for both sides of the face, or `"AU12L"` and
            `"AU12R"` for each side. None stands for the paper's twelve; files from before this option have None.
        side_tokens (`bool`, defaults to `False`):
            Make tokens for each side of the face, so that each position of a picture can attend to its side. Those of
            the left are the tokens of a face whose both sides do what the left does, plus a trained vector that says
            left, and the same for the right. One token for all adds the same everywhere.

    Raises:
        ValueError: if the encoder type is unknown, the parts do not fit into `cross_attention_dim`, `au_names` is
            not a list of `num_aus` different names, or there are `side_tokens` without names of sides.
    """

    @register_to_config
    def __init__(
        self,
        num_aus: int | None = None,
        cross_attention_dim: int = 1024,
        encoder_type: str = "res_mlp64",
        num_tokens: int = 1,
        hidden_dim: int = 64,
        au_names: list[str] | None = None,
        side_tokens: bool = False,
    ):
        super().__init__()
        num_aus, au_names = _check_au_names(num_aus, au_names)
        self.register_to_config(num_aus=num_aus, au_names=au_names)
        sizes = {"num_aus": num_aus, "cross_attention_dim": cross_attention_dim}
        _check_encoder(encoder_type, **sizes, num_tokens=num_tokens, hidden_dim=hidden_dim)
        remaining_dim = cross_attention_dim - num_aus
        if encoder_type in ("none", "direct"):
            # A model without a single tensor has no dtype and cannot be saved.
            self.register_buffer("intensity_scale", torch.ones(num_aus))
        elif encoder_type == "individual":
            self.intensity_proj = _two_layers(num_aus, hidden_dim, num_tokens * cross_attention_dim)
            self.individual_proj = nn.ModuleList(
                _two_layers(1, hidden_dim, num_tokens * cross_attention_dim) for _ in range(num_aus)
            )
        elif encoder_type == "res_3mlp":
            self.intensity_proj = nn.Sequential(
                nn.Linear(num_aus, hidden_dim),
                nn.LayerNorm(hidden_dim),
                nn.LeakyReLU(),
                nn.Linear(hidden_dim, hidden_dim),
                nn.LayerNorm(hidden_dim),
                nn.LeakyReLU(),
                nn.Linear(hidden_dim, num_tokens * remaining_dim),
            )
        else:
            features = {"mlp": cross_attention_dim, "res_mlp": remaining_dim, "res_mlp64": hidden_dim}[encoder_type]
            self.intensity_proj = nn.Linear(num_aus, num_tokens * features)
        if side_tokens:
            self.side_columns = _side_columns(au_names, encoder_type)
            self.side_embedding = nn.Parameter(torch.zeros(2, cross_attention_dim))

    @property
    def token_dim(self) -> int:
        """Width of a token: `num_aus + 1` for `"direct"`, otherwise the width of the text embedding."""
        return self.config.num_aus + 1 if self.config.encoder_type == "direct" else self.config.cross_attention_dim

    def forward(self, au_intensities: torch.Tensor) -> torch.Tensor:
        """
        Encode FACS intensities (0 is absent, 5 is grade E) of shape `(batch, num_aus)` to tokens of shape `(batch,
        num_tokens, token_dim)`, or with `side_tokens` `(batch, 2 * num_tokens, token_dim)`, the left side first.
        """
        if not self.config.side_tokens:
            return self._encode(au_intensities)
        tokens = self._encode(au_intensities[:, self.side_columns].flatten(0, 1)).unflatten(0, (-1, 2))
        return (tokens + self.side_embedding[:, None]).flatten(1, 2)

    def _encode(self, au_intensities: torch.Tensor) -> torch.Tensor:
        encoder_type, num_tokens = self.config.encoder_type, self.config.num_tokens
        au_intensities = au_intensities.to(self.dtype)
        residual = au_intensities[:, None].expand(-1, num_tokens, -1)  # (batch, num_tokens, num_aus)
        if encoder_type in ("none", "direct"):
            tokens = residual * self.intensity_scale
            if encoder_type == "direct":
                return nn.functional.pad(tokens, (0, 1), value=1.0)
        else:
            features = self.intensity_proj(au_intensities)
            if encoder_type == "individual":
                for proj, intensity in zip(self.individual_proj, au_intensities.split(1, dim=1), strict=True):
                    features = features + proj(intensity)
            tokens = features.unflatten(1, (num_tokens, -1))
            if encoder_type.startswith("res"):
                tokens = torch.cat([residual, tokens], dim=-1)
        return nn.functional.pad(tokens, (0, self.config.cross_attention_dim - tokens.shape[-1]))


def _two_layers(in_features: int, hidden_dim: int, out_features: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_features, hidden_dim), nn.LeakyReLU(), nn.Linear(hidden_dim, out_features))


def _side_columns(au_names: list[str] | None, encoder_type: str) -> list[list[int]]:
    """For each side, the column from which a face takes each AU if both its sides do what this side does."""
    names = au_names or []
    columns = [
        # AU10 is no side of AU1: only names that end with a side have another side.
        [
            names.index(own) if name[-1] in "LR" and (own := name[:-1] + side) in names else i
            for i, name in enumerate(names)
        ]
        for side in "LR"
    ]
    if encoder_type == "direct" or columns[0] == columns[1]:
        raise ValueError(
            "`side_tokens` need `au_names` with both sides of an AU, such as 'AU12L' and 'AU12R', and an encoder type"
            f" other than 'direct', but `au_names` is {au_names!r} and the encoder type {encoder_type!r}."
        )
    return columns


def _check_au_names(num_aus: int | None, au_names: Sequence[str] | None) -> tuple[int, list[str] | None]:
    """Return the number of AUs and their names, or None for unknown names."""
    if au_names is None:
        return 12 if num_aus is None else num_aus, None
    is_list = isinstance(au_names, list | tuple) and all(isinstance(name, str) for name in au_names)
    if not is_list or len(set(au_names)) < len(au_names):
        raise ValueError(f"`au_names` has to be a list of different names such as 'AU12', but is {au_names!r}.")
    if num_aus is not None and num_aus != len(au_names):
        raise ValueError(f"`num_aus` is {num_aus}, but `au_names` has {len(au_names)}: {', '.join(au_names)}.")
    return len(au_names), list(au_names)


def _check_encoder(encoder_type: str, **sizes: int) -> None:
    if encoder_type not in ENCODER_TYPES:
        raise ValueError(f"`encoder_type` has to be one of {', '.join(ENCODER_TYPES)}, but is {encoder_type!r}.")
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"`{name}` has to be a positive integer, but is {size!r}.")
        if size > MAX_SIZES[name]:
            raise ValueError(f"`{name}` goes up to {MAX_SIZES[name]}, but is {size}.")
    num_aus, width, num_tokens = sizes["num_aus"], sizes["cross_attention_dim"], sizes["num_tokens"]
    if encoder_type == "direct" and num_tokens > 1:
        raise ValueError(f"`num_tokens` is {num_tokens}, but the encoder type 'direct' has one token, without keys.")
    # Features beside the intensities that a token must have room for. A residual encoder needs at least one.
    features = {"none": 0, "res_mlp": 1, "res_mlp64": sizes["hidden_dim"], "res_3mlp": 1}
    if encoder_type in features and num_aus + features[encoder_type] > width:
        raise ValueError(
            f"`cross_attention_dim` is {width}, but an {encoder_type!r} token holds {num_aus} AU"
            f" intensities and at least {features[encoder_type]} features. Use fewer AUs, a smaller `hidden_dim`, or"
            " the encoder type 'mlp', which fits any width."
        )


class AUAdapter(ModelMixin, ConfigMixin):
    r"""
    Everything that FineFace trains outside the LoRA: the AU encoder and the projections to keys and values for all
    cross-attention layers of a UNet (Eq. 2). One linear layer packs all keys, and another all values.

    The adapter is a component of the pipeline, so it is moved, cast, offloaded and saved like any other model. The
    UNet's attention processors own no weights.

    Args:
        layers (`dict[str, int]`):
            Inner width of each cross-attention layer by its name in the UNet, for instance
            `{"mid_block.attentions.0.transformer_blocks.0.attn2": 1280}`. Layers are packed in the order of their
            names.
        cross_attention_dim, num_aus, encoder_type, num_tokens, hidden_dim, au_names, side_tokens:
            See [`AUEncoder`].
    """

    @register_to_config
    def __init__(
        self,
        layers: dict[str, int],
        cross_attention_dim: int = 1024,
        num_aus: int | None = None,
        encoder_type: str = "res_mlp64",
        num_tokens: int = 1,
        hidden_dim: int = 64,
        au_names: list[str] | None = None,
        side_tokens: bool = False,
    ):
        super().__init__()
        if not layers:
            raise ValueError("`layers` is empty: an AU adapter needs at least one cross-attention layer.")
        # Saving sorts the config by key, so the layers are sorted here too: the order is the same after loading.
        self.layers = dict(sorted(layers.items()))
        sizes = (num_aus, cross_attention_dim, encoder_type, num_tokens, hidden_dim)
        self.encoder = AUEncoder(*sizes, au_names, side_tokens)
        self.register_to_config(num_aus=self.encoder.config.num_aus, au_names=self.encoder.config.au_names)
        token_dim, width = self.encoder.token_dim, sum(layers.values())
        # With one token, keys have no influence, but the paper's files contain them.
        self.to_k_au = None if encoder_type == "direct" else nn.Linear(token_dim, width, bias=False)
        self.to_v_au = nn.Linear(token_dim, width, bias=False)

    @classmethod
    def from_unet(cls, unet: nn.Module, kv_init: str = "text", **config) -> "AUAdapter":
        """
        Create an untrained adapter for `unet`.

        Args:
            kv_init (`str`, defaults to `"text"`):
                Initial keys and values: `"text"` copies those of the text, as the paper's code does; `"random"` draws
                them; `"zero"` sets the values to 0, so that the AUs add nothing yet. A `"direct"` adapter starts as
                the fold of a new `"res_mlp64"` adapter, so both add the same.
            config:
                `num_aus`, `encoder_type`, `num_tokens`, `hidden_dim`, `au_names` and `side_tokens` of [`AUEncoder`].

        Raises:
            ValueError: for another `kv_init`.
        """
        if kv_init not in KV_INITS:
            raise ValueError(f"`kv_init` has to be one of {', '.join(KV_INITS)}, but is {kv_init!r}.")
        text_layers = {name: module for name, module in _unwrap(unet).named_modules() if name.endswith(".attn2")}
        layers = {name: len(module.to_k.weight) for name, module in text_layers.items()}
        width = unet.config.cross_attention_dim
        adapter = cls(layers, width, **config)
        if kv_init == "zero":
            nn.init.zeros_(adapter.to_v_au.weight)
        elif adapter.to_k_au is None:
            tokens = _affine_map(AUEncoder(cross_attention_dim=width, **config | {"encoder_type": "res_mlp64"}))
            for name, target in zip(adapter.layers, adapter.attn_processors_state_dict().values(), strict=True):
                to_v = text_layers[name].to_v if kv_init == "text" else nn.Linear(width, len(target), bias=False)
                target.copy_(to_v.weight.detach().double() @ tokens)
        elif kv_init == "text":
            for key, target in adapter.attn_processors_state_dict().items():
                name, _, kind = key.removesuffix("_au.weight").partition(".processor.")
                target.copy_(getattr(text_layers[name], kind).weight.detach())
        return adapter

    def forward(self, au_intensities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Encode FACS intensities (0 is absent, 5 is grade E) of shape `(batch, num_aus)` to `(au_keys, au_values)`, each
        of shape `(batch, tokens, sum(layers.values()))`: all layers side by side, in the order of their names.
        """
        au_hidden_states = self.encoder(au_intensities).to(self.to_v_au.weight.dtype)
        au_values = self.to_v_au(au_hidden_states)
        return torch.zeros_like(au_values) if self.to_k_au is None else self.to_k_au(au_hidden_states), au_values

    @property
    def is_affine(self) -> bool:
        """Whether the values are an affine map of the intensities, which `fold` and IP-Adapters need."""
        return self.config.encoder_type in AFFINE_ENCODER_TYPES and self.num_tokens == 1

    @property
    def num_tokens(self) -> int:
        """The number of AU tokens of a face."""
        return self.config.num_tokens * (2 if self.config.side_tokens else 1)

    @torch.no_grad()
    def fold(self) -> "AUAdapter":
        """
        This adapter with the encoder type `"direct"`, on the CPU, in its dtype.

        A token A·au + c that is affine in the intensities has the values W_v·(A·au + c) = (W_v·A)·au + W_v·c, and its
        keys have no influence. So W_v·A and W_v·c are enough. They are computed in double precision and rounded once.

        Raises:
            ValueError: if the values are not affine in the intensities, see `is_affine`.
        """
        if not self.is_affine:
            encoder_type, num_tokens = self.config.encoder_type, self.num_tokens
            what = f"{num_tokens} tokens" if num_tokens != 1 else f"the encoder {encoder_type!r}"
            raise ValueError(
                f"This adapter has {what}, so what it adds is no affine map of the AU intensities, but folding and"
                " IP-Adapters need one. Train an adapter with one token of"
                f" {', '.join(map(repr, AFFINE_ENCODER_TYPES))}, or use this adapter with FineFacePipeline."
            )
        config = {name: self.config[name] for name in ("cross_attention_dim", "num_aus", "hidden_dim", "au_names")}
        folded = nn.Module.to(type(self)(self.layers, encoder_type="direct", **config), self.dtype).eval()
        tokens, values = _affine_map(self.encoder), self.attn_processors_state_dict()
        for key, target in folded.attn_processors_state_dict().items():
            target.copy_(values[key].cpu().double() @ tokens)
        return folded

    def attn_processors_state_dict(self) -> dict[str, torch.Tensor]:
        """The keys and values of each layer by their names in a file. They are views of the packed weights."""
        widths = list(self.layers.values())
        return {
            f"{layer}.processor.{name}.weight": weight
            for name, proj in (("to_k_au", self.to_k_au), ("to_v_au", self.to_v_au))
            if proj is not None
            for layer, weight in zip(self.layers, proj.weight.detach().split(widths), strict=True)
        }


@torch.no_grad()
def _affine_map(encoder: AUEncoder) -> torch.Tensor:
    """(A | c) of the one token A·au + c of an affine encoder, `(token_dim, num_aus + 1)`, in double precision."""
    encoder = copy.deepcopy(encoder).cpu().double()
    num_aus = encoder.config.num_aus
    tokens = encoder(torch.cat([torch.eye(num_aus), torch.zeros(1, num_aus)]))[:, 0]  # of each AU alone, then of none
    return torch.cat([tokens[:-1] - tokens[-1], tokens[-1:]]).T


# ---- Files ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdapterFiles:
    """
    The files of one adapter. The weights of the paper's authors have no `encoder_config`. In the layout of an
    IP-Adapter, `attn_processors` holds everything except the LoRA. `lora` is None without a LoRA.
    """

    attn_processors: Path
    encoder: Path | None = None
    encoder_config: Path | None = None
    lora: Path | None = None

    @property
    def is_ip_adapter(self) -> bool:
        return self.encoder is None

    @property
    def is_original(self) -> bool:
        return self.encoder is not None and self.encoder_config is None


def find_adapter_files(
    pretrained_model_name_or_path: str | os.PathLike,
    *,
    variant: str | None = None,
    subfolder: str | None = None,
    optional: bool = False,
    **hub_options,
) -> AdapterFiles | None:
    """
    Find an adapter in a folder or a Hub repository, or in its `subfolder`. It may have our layout, the layout of the
    paper's authors, or that of an IP-Adapter, whose `.safetensors` file may also be named itself; if several are
    there, the first in this order is taken. `variant` is a prefix of file names in the layout of the paper's authors:
    `"sd15"` for `sd15_au_encoder.ckpt`. `hub_options` are those of `huggingface_hub.hf_hub_download`.

    Raises:
        OSError: if only a part of an adapter is there, the Hub repository cannot be reached, or there is no adapter,
            for which the result is None if it is `optional`.
    """
    folder, given = Path(pretrained_model_name_or_path), os.fspath(pretrained_model_name_or_path)
    unreached: list[LocalEntryNotFoundError] = []
    if folder.is_file() and folder.suffix == ".safetensors" and not variant:
        lora = folder.with_name(LORA_WEIGHTS_NAME)
        return AdapterFiles(folder, lora=lora if lora.is_file() and lora != folder else None)

    def find(name: str) -> Path | None:
        if folder.is_dir():
            path = folder / (subfolder or "") / name
            return path if path.is_file() else None
        try:
            return Path(hf_hub_download(given, name, subfolder=subfolder, **hub_options))
        except LocalEntryNotFoundError as error:
            unreached.append(error)
            return None
        except EntryNotFoundError:
            return None
        except HFValidationError as error:
            raise OSError(f"{given!r} is neither a folder nor the id of a Hub repository.") from error

    prefix = f"{variant}_" if variant else ""
    ours = (ATTN_PROCESSORS_NAME, ENCODER_WEIGHTS_NAME, ENCODER_CONFIG_NAME)
    original = (prefix + ORIGINAL_ATTN_PROCESSORS_NAME, prefix + ORIGINAL_ENCODER_NAME)
    for names in (original,) if variant else (ours, original, (IP_ADAPTER_NAME,)):
        found = {name: find(name) for name in names}
        absent = [name for name, path in found.items() if path is None]
        if len(absent) == len(names):
            continue
        if absent:
            present = ", ".join(name for name in names if name not in absent)
            raise OSError(
                f"The AU adapter in {given!r} is not complete: there is {present}, but no {', '.join(absent)}."
            )
        return AdapterFiles(*found.values(), lora=None if variant else find(LORA_WEIGHTS_NAME))
    if optional:
        return None
    what = f"AU adapter{f' of the variant {variant!r}' if variant else ''}"
    if unreached:
        raise OSError(
            f"There is no {what} in the cache for the Hub repository (no folder) {given!r}, and the Hub was not"
            " reached. Load it once online, without `local_files_only` and HF_HUB_OFFLINE, or pass a folder."
        ) from unreached[0]
    raise OSError(
        f"There is no {what} in the {'folder' if folder.is_dir() else 'Hub repository (no folder)'} {given!r}: neither"
        f" {ATTN_PROCESSORS_NAME} and the folder {ENCODER_FOLDER}, nor {ORIGINAL_ATTN_PROCESSORS_NAME} and"
        f" {ORIGINAL_ENCODER_NAME} as the paper's authors published them, nor {IP_ADAPTER_NAME}."
    )


def find_adapter_beside(base: str | os.PathLike, **hub_options) -> AdapterFiles | None:
    """
    Find the adapter that a pipeline saved beside its base model, a folder or a Hub id, or return None. If a Hub
    repository has no adapter, this sends one request. `hub_options` are those of `huggingface_hub.hf_hub_download`.
    """
    if not Path(base).is_dir():
        try:
            hf_hub_download(os.fspath(base), ATTN_PROCESSORS_NAME, **hub_options)
        except LocalEntryNotFoundError:
            where = {name: hub_options[name] for name in ("cache_dir", "revision") if name in hub_options}
            if try_to_load_from_cache(os.fspath(base), ATTN_PROCESSORS_NAME, **where) is not _CACHED_NO_EXIST:
                logging.getLogger(__name__).warning(
                    "Whether there is an AU adapter beside %r is not known: the Hub was not reached, and the cache"
                    " does not say. The pipeline has none. `load_au_adapter` loads one; pass `au_adapter=None` if none"
                    " is wanted.",
                    os.fspath(base),
                )
            return None
        except (EntryNotFoundError, HFValidationError):
            return None
    return find_adapter_files(base, optional=True, **hub_options)


def remove_au_adapter(folder: str | os.PathLike) -> None:
    """Remove the files of an adapter that `write_au_adapter` wrote into `folder`, if there are any."""
    folder = Path(folder)
    if (folder / ATTN_PROCESSORS_NAME).is_file():
        # The first file goes first: without it, a folder is no adapter.
        for name in (ATTN_PROCESSORS_NAME, LORA_WEIGHTS_NAME, ENCODER_WEIGHTS_NAME, ENCODER_CONFIG_NAME):
            (folder / name).unlink(missing_ok=True)
        if not any((folder / ENCODER_FOLDER).iterdir()):
            (folder / ENCODER_FOLDER).rmdir()


def read_au_adapter(
    files: AdapterFiles, unet: nn.Module | None = None, layers: dict[str, int] | None = None
) -> AUAdapter:
    """
    Read an adapter onto the CPU and check everything about it. It has to fit the base `unet`, whose cross-attention
    layers have the inner widths `layers` by name, and gets the dtype of `unet`. Without `unet`, it has the dtype of
    its files and the layers that they name.

    Raises:
        ValueError: if a file is broken, carries code, does not fit the base, or holds a wrong tensor. It names the
            file.
    """
    values, source = read_tensors(files.attn_processors), files.encoder_config or files.encoder
    if files.is_ip_adapter:
        source = files.attn_processors
        if unet is None:
            raise ValueError(
                f"{str(source)!r} numbers the layers that it is for and does not name them. Load it with"
                " `FineFacePipeline.load_au_adapter` onto its base, and `save_au_adapter` writes it with their names."
            )
        values, config = _from_ip_adapter(values, source, layers, unet.config.cross_attention_dim)
        encoder_weights = {"intensity_scale": torch.ones(config["num_aus"])}
    elif files.is_original:
        values = {re.sub(r"\.au_to_([kv])\.", r".to_\1_au.", key): tensor for key, tensor in values.items()}
        width = next((tensor.shape[-1] for tensor in values.values() if tensor.ndim), 0)
        encoder_weights, config = _read_original_encoder(files.encoder, width)
    else:
        encoder_weights, config = read_tensors(files.encoder), _read_encoder_config(files.encoder_config)
    width = config["cross_attention_dim"]
    if unet is not None:
        _check_base(width, unet.config.cross_attention_dim, source)
    if config["encoder_type"] != "direct":
        for key, tensor in values.items():
            if key.endswith("_au.weight"):
                _check_base(tensor.shape[-1] if tensor.ndim else 0, width, files.attn_processors)
    if layers is None:
        matches = {re.fullmatch(r"(.+)\.processor\.to_[kv]_au\.weight", key): t for key, t in values.items()}
        layers = {match[1]: len(tensor) for match, tensor in matches.items() if match and tensor.ndim}
    try:
        with torch.device("meta"):
            adapter = AUAdapter(layers, **config)
    except ValueError as error:
        raise ValueError(f"{str(source)!r}: {error}") from error
    # Each tensor goes from the mapped file straight into its final place, so memory never holds a second copy.
    adapter = nn.Module.to(adapter, _dtype_of(values) if unet is None else unet.dtype)
    if unet is None:
        nn.Module.to(adapter.encoder, _dtype_of(encoder_weights))
    adapter.to_empty(device="cpu").eval()
    copy_checked(values, adapter.attn_processors_state_dict(), files.attn_processors)
    copy_checked(encoder_weights, adapter.encoder.state_dict(), files.encoder or source)
    return adapter


def _dtype_of(tensors: dict[str, torch.Tensor]) -> torch.dtype:
    """The dtype that holds all numbers of `tensors` exactly."""
    dtypes = [tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()]
    return functools.reduce(torch.promote_types, dtypes) if dtypes else torch.float32


def ip_adapter_numbers(layers: Iterable[str]) -> dict[str, int]:
    """
    The number of each of the cross-attention `layers` of a UNet in the file of an IP-Adapter: its index among all
    attention layers, where every cross-attention layer follows its self-attention. Raises a ValueError if a
    `UNet2DConditionModel` has no layer of such a name.
    """
    stages = ("down_blocks", "up_blocks", "mid_block")  # in the order in which a UNet has them as attributes

    def place(name: str) -> tuple[int, ...]:
        stage, *parts = name.split(".")
        if stage not in stages:
            raise ValueError(f"An IP-Adapter has layers of {', '.join(stages)} only, and none called {name!r}.")
        return stages.index(stage), *(int(part) for part in parts if part.isdecimal())

    return {name: 2 * index + 1 for index, name in enumerate(sorted(layers, key=place))}


def _from_ip_adapter(
    tensors: dict[str, torch.Tensor], path: Path, layers: dict[str, int], width: int
) -> tuple[dict[str, torch.Tensor], dict]:
    """
    Turn the `tensors` of a file that `hub.ip_adapter` has written into the values of a `"direct"` adapter, by their
    names in our layout, and the config of its encoder.
    """

    def foreign(reason: str) -> ValueError:
        return ValueError(
            f"{str(path)!r} is no AU adapter: {reason} If it is an adapter for images, load it with `load_ip_adapter`,"
            " beside the AU adapter. `python -m hub.export ADAPTER FOLDER --format ip-adapter` writes one for AUs, as"
            f" {IP_ADAPTER_NAME}."
        )

    projection = {key.removeprefix("image_proj."): t for key, t in tensors.items() if key.startswith("image_proj.")}
    inputs, norm = projection.get("proj.0.weight"), projection.get("norm.weight")
    if inputs is None or norm is None or inputs.ndim != 2 or norm.ndim != 1:
        found = ", ".join(sorted(projection or tensors)[:3])
        raise foreign(f"it needs the matrix image_proj.proj.0.weight and image_proj.norm.weight, but holds {found}.")
    num_aus = inputs.shape[1]
    if num_aus == FACE_ID_DIM:
        raise foreign(
            f"it is an IP-Adapter-FaceID: it takes the {FACE_ID_DIM} numbers of a face recognition model instead of"
            " one for each AU."
        )
    _check_base(len(norm), width, path)
    one = 2 * num_aus
    shapes = {"proj.0.weight": (one, num_aus), "proj.0.bias": (one,), "norm.weight": (width,), "norm.bias": (width,)}
    shapes |= {"proj.2.weight": (width, one), "proj.2.bias": (width,)}
    shapes = {f"image_proj.{key}": shape for key, shape in shapes.items()}
    numbers = ip_adapter_numbers(layers)
    for name, number in numbers.items():
        shapes |= {f"ip_adapter.{number}.to_{kind}_ip.weight": (layers[name], width) for kind in "kv"}
    check_tensors(tensors, shapes, path)
    # For any AUs, the token has to be the AUs, zeros, and a 1 at the index `one`.
    probes = torch.randn(8, num_aus, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul(3)
    expected = nn.functional.pad(probes, (0, width - num_aus))
    expected[:, one : one + 1] = 1
    if one >= width or not torch.allclose(_project_image(projection, probes), expected, atol=1e-2):
        raise foreign(
            f"what its image_proj makes of {num_aus} inputs is not a token with the intensities of as many AUs in it."
        )
    values = {
        f"{name}.processor.to_v_au.weight": tensors[f"ip_adapter.{number}.to_v_ip.weight"][:, [*range(num_aus), one]]
        for name, number in numbers.items()
    }
    config = {"cross_attention_dim": width, "encoder_type": "direct", "num_aus": num_aus}
    return values, config | {"au_names": read_ip_adapter_au_names(path)}


def _project_image(projection: dict[str, torch.Tensor], embeds: torch.Tensor) -> torch.Tensor:
    """Compute diffusers' `IPAdapterFaceIDImageProjection` in double precision."""
    weights = {key: tensor.double() for key, tensor in projection.items()}
    hidden = nn.functional.gelu(nn.functional.linear(embeds, weights["proj.0.weight"], weights["proj.0.bias"]))
    tokens = nn.functional.linear(hidden, weights["proj.2.weight"], weights["proj.2.bias"])
    return nn.functional.layer_norm(tokens, tokens.shape[-1:], weights["norm.weight"], weights["norm.bias"])


def read_ip_adapter_au_names(path: Path) -> list[str] | None:
    """Read the AU names of an adapter in the layout of an IP-Adapter, or None if the file does not name them."""
    try:
        with safe_open(path, framework="pt") as file:
            names = (file.metadata() or {}).get("au_names")
        return None if names is None else json.loads(names)
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is truncated or no safetensors file: {error}") from error
    except ValueError as error:
        raise ValueError(f"{str(path)!r} has broken metadata: au_names is {names!r}.") from error


def read_lora(path: Path, unet: nn.Module) -> tuple[dict[str, torch.Tensor], dict | None]:
    """
    Read the LoRA of an adapter onto the CPU, in the dtype of `unet`. Returns its state dict in PEFT's names without a
    prefix, and its metadata, or None if the file has none. Raises a ValueError that names the file if it is broken, or
    holds a tensor that fits no layer of `unet`.
    """
    state_dict = {key.removeprefix("unet."): tensor for key, tensor in read_tensors(path).items()}
    state_dict = convert_unet_state_dict_to_peft(state_dict)
    modules, expected = dict(_unwrap(unet).named_modules()), {}
    for name in {key.partition(".lora_")[0] for key in state_dict}:
        weight = getattr(modules.get(name), "weight", None)
        down = state_dict.get(f"{name}.lora_A.weight")
        # `check_tensors` reports every key without an expected shape.
        if weight is not None and weight.ndim >= 2 and down is not None and down.ndim >= 2:
            out_features, in_features, *kernel_size = weight.shape
            expected[f"{name}.lora_A.weight"] = (down.shape[0], in_features, *kernel_size)
            expected[f"{name}.lora_B.weight"] = (out_features, down.shape[0], *[1] * len(kernel_size))
    check_tensors(state_dict, expected, path)
    dtype = unet.dtype  # read once, because `unet.dtype` walks through all modules
    state_dict = {key: tensor.to(dtype, copy=True) for key, tensor in state_dict.items()}
    for key, tensor in state_dict.items():
        check_finite(key, tensor, path)
    return state_dict, read_lora_metadata(path, state_dict)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    r"""
    Map the tensors of a `.safetensors` or `.ckpt` file into memory. A pickle is read with `weights_only=True`.

    Raises:
        ValueError: if the file is truncated or of another kind, carries code, or holds anything but named tensors.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} is truncated or no safetensors file: {error}") from error
    try:
        with zipfile.ZipFile(path) as archive:
            compressed = [entry for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    except zipfile.BadZipFile:
        raise ValueError(
            f"{str(path)!r} is truncated or no PyTorch checkpoint. A bare pickle may carry code and is not opened."
        ) from None
    if compressed:
        # Compressed entries may unpack to thousands of times their size.
        size = sum(entry.file_size for entry in compressed)
        raise ValueError(
            f"{str(path)!r} holds compressed data, {size:,} bytes when unpacked, which PyTorch never writes. It was"
            " not read."
        )
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        # `from None` hides PyTorch's own message, which explains how to run such code anyway.
        raise ValueError(
            f"{str(path)!r} carries code or objects other than tensors. It was not run. Do not trust other files from"
            " this source."
        ) from None
    except (RuntimeError, ValueError, TypeError, LookupError, EOFError) as error:
        raise ValueError(f"{str(path)!r} is a damaged PyTorch checkpoint: {error}") from error
    if not isinstance(state_dict, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state_dict.values()):
        raise ValueError(
            f"{str(path)!r} holds a {type(state_dict).__name__}, but has to hold a dict of named tensors."
        )
    return state_dict


def check_tensors(
    state_dict: dict[str, torch.Tensor], expected: dict[str, tuple[int, ...]], source: str | Path
) -> None:
    """Raise a ValueError unless `state_dict` holds floating point tensors of just these names and shapes."""
    unexpected = state_dict.keys() - expected
    for problem, keys in (("misses", expected.keys() - state_dict), ("has the unexpected", unexpected)):
        if keys:
            some = ", ".join(sorted(keys)[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise ValueError(f"{str(source)!r} {problem} {some}. It fits another base model, or is damaged.")
    for key, shape in expected.items():
        tensor = state_dict[key]
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise ValueError(
                f"{str(source)!r}: {key} is {tensor.dtype} of shape {tuple(tensor.shape)}, but the base model needs a"
                f" floating point tensor of shape {shape}."
            )


@torch.no_grad()
def copy_checked(tensors: dict[str, torch.Tensor], targets: dict[str, torch.Tensor], source: str | Path) -> None:
    """Copy the `tensors` of a `source` into `targets`. Raises a ValueError unless they fit and are finite."""
    check_tensors(tensors, {key: tuple(target.shape) for key, target in targets.items()}, source)
    for key, target in targets.items():
        target.copy_(tensors[key])
        check_finite(key, target, source)


def check_finite(key: str, tensor: torch.Tensor, source: str | Path) -> None:
    """Raise a ValueError if the `tensor` called `key` in `source` holds NaN or infinity."""
    # The extremes need no memory, unlike `isfinite` of the whole tensor. Both are NaN if any value is.
    if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
        raise ValueError(f"{str(source)!r}: {key} holds values that are not finite in {tensor.dtype}.")


def _check_base(found_dim: int, cross_attention_dim: int, source: Path) -> None:
    if found_dim != cross_attention_dim:
        raise ValueError(
            f"{str(source)!r} is for {_name_base(found_dim)}, but this base is {_name_base(cross_attention_dim)}."
            " Load it onto a base that it fits, or the adapter that fits this base. Of the published weights, the"
            ' default is for Stable Diffusion 2.x and `variant="sd15"` for 1.x.'
        )


def _name_base(cross_attention_dim: int) -> str:
    families = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}
    name = families.get(cross_attention_dim, "another model")
    return f"{name} (text embeddings of width {cross_attention_dim})"


def _read_original_encoder(path: Path, cross_attention_dim: int) -> tuple[dict[str, torch.Tensor], dict]:
    """Read an encoder of the paper's authors: its tensors by our names, and its config."""
    state_dict = read_tensors(path)
    weight = state_dict.get("au_encoder.weight")
    if weight is None or weight.ndim != 2:
        raise ValueError(f"{str(path)!r} misses the matrix au_encoder.weight. It holds {', '.join(state_dict)}.")
    hidden_dim, num_aus = weight.shape
    encoder_type = "res_mlp" if num_aus + hidden_dim == cross_attention_dim else "res_mlp64"
    config = {"num_aus": num_aus, "encoder_type": encoder_type, "hidden_dim": hidden_dim}
    weights = {key.replace("au_encoder.", "intensity_proj."): tensor for key, tensor in state_dict.items()}
    return weights, config | {"cross_attention_dim": cross_attention_dim}


def _read_encoder_config(path: Path) -> dict:
    try:
        config = {"au_names": None, "side_tokens": False, **json.loads(path.read_text())}
        return {name: config[name] for name in inspect.signature(AUEncoder.__init__).parameters if name != "self"}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{str(path)!r} is not the config of an AU encoder: {error!r}") from error


def read_lora_metadata(path: Path, state_dict: dict[str, torch.Tensor]) -> dict | None:
    """Ranks and scales of the LoRA for PEFT, or None if the file states none; PEFT then takes the scale 1."""
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get("lora_adapter_metadata", "{}")
    try:
        stated = {key.removeprefix("unet."): value for key, value in json.loads(text).items()}
        if not stated:
            return None
        metadata = {"r": _rank(stated["r"]), "lora_alpha": _lora_alpha(stated["lora_alpha"])}
        for name, convert in (("rank_pattern", _rank), ("alpha_pattern", _lora_alpha)):
            patterns = stated.get(name) or {}
            metadata[name] = {pattern: convert(value) for pattern, value in patterns.items()}
            for pattern in patterns:
                re.compile(pattern)  # PEFT matches it as a regular expression
        metadata["use_rslora"] = bool(stated.get("use_rslora"))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, re.error) as error:
        raise ValueError(f"{str(path)!r} has broken metadata: {error!r}") from error
    ranks = {tensor.shape[0] for key, tensor in state_dict.items() if key.endswith("lora_A.weight")}
    if not ranks <= {metadata["r"], *metadata["rank_pattern"].values()}:
        raise ValueError(f"{str(path)!r} holds a LoRA of rank {sorted(ranks)}, but its metadata say {metadata['r']}.")
    # The tensors tell which layers have a LoRA; other entries of the metadata concern training only.
    metadata["target_modules"] = sorted({key.partition(".lora_")[0] for key in state_dict})
    return metadata


def _rank(value) -> int:
    rank = int(value)
    if rank != value or rank < 1:
        raise ValueError(f"a rank has to be a positive integer, but is {value!r}")
    return rank


def _lora_alpha(value) -> float:
    alpha = float(value)
    if not abs(alpha) <= MAX_LORA_ALPHA:  # `not … <= …` rejects NaN too
        raise ValueError(f"a lora_alpha goes from -{MAX_LORA_ALPHA:g} to {MAX_LORA_ALPHA:g}, but is {value!r}")
    return alpha


def write_au_adapter(save_directory: str | os.PathLike, adapter: AUAdapter, unet: nn.Module, lora_name: str) -> None:
    """
    Write the adapter, and the LoRA `lora_name` of `unet` if it has one, as a folder that `load_au_adapter` reads.

    All files are written into a hidden folder inside `save_directory`, so that a rename never crosses volumes, and
    then renamed into place. If a step fails, the folder holds one adapter or none that loads, never a mixture of two.
    """
    save_directory = Path(save_directory)
    if save_directory.is_file():
        raise NotADirectoryError(f"`save_directory` has to be a folder, but {str(save_directory)!r} is a file.")
    save_directory.mkdir(parents=True, exist_ok=True)
    for left_by_a_kill in save_directory.glob(".au_adapter_*"):
        shutil.rmtree(left_by_a_kill)
    with tempfile.TemporaryDirectory(prefix=".au_adapter_", dir=save_directory) as temporary:
        temporary = Path(temporary)
        write_adapter_weights(temporary, adapter)
        has_lora = lora_name in getattr(unet, "peft_config", {})
        if has_lora:
            suffix = f".{lora_name}.weight"
            weights = _unwrap(unet).state_dict()
            lora = {k.replace(suffix, ".weight"): weight for k, weight in weights.items() if k.endswith(suffix)}
            StableDiffusionLoraLoaderMixin.save_lora_weights(
                temporary,
                unet_lora_layers=lora,
                unet_lora_adapter_metadata=unet.peft_config[lora_name].to_dict(),
                weight_name=LORA_WEIGHTS_NAME,
            )
        (save_directory / ENCODER_FOLDER).mkdir(exist_ok=True)
        # Without this file a folder is no adapter, so a mixture of old and new files does not load.
        (save_directory / ATTN_PROCESSORS_NAME).unlink(missing_ok=True)
        (save_directory / LORA_WEIGHTS_NAME).unlink(missing_ok=True)
        names = [ENCODER_CONFIG_NAME, ENCODER_WEIGHTS_NAME, *([LORA_WEIGHTS_NAME] if has_lora else [])]
        umask = os.umask(0)
        os.umask(umask)
        for name in (*names, ATTN_PROCESSORS_NAME):
            # safetensors writes files that nobody else may read.
            (temporary / name).chmod(0o666 & ~umask)
            os.replace(temporary / name, save_directory / name)


def write_adapter_weights(folder: Path, adapter: AUAdapter) -> None:
    """Write the files of `adapter`, without a LoRA, into `folder`."""
    adapter.encoder.save_pretrained(folder / ENCODER_FOLDER)
    state_dict = {key: tensor.cpu().clone() for key, tensor in adapter.attn_processors_state_dict().items()}
    save_file(state_dict, folder / ATTN_PROCESSORS_NAME, metadata={"format": "pt"})


def base_unet(unet: nn.Module) -> nn.Module:
    """A copy of `unet` without LoRAs and without processors that were loaded into it. It shares the weights."""
    unet = _unwrap(unet)
    if any(getattr(module, "merged", False) for module in unet.modules()):
        raise ValueError(
            "A LoRA is fused into the UNet, so the base weights are not there. Call `unfuse_lora()` first."
        )
    with torch.device("meta"):
        base = type(unet).from_config(unet.config)
    weights = {name.replace(".base_layer.", "."): weight for name, weight in unet.state_dict().items()}
    base.load_state_dict({name: weights[name] for name in base.state_dict()}, assign=True)
    return base


def _unwrap(unet: nn.Module) -> nn.Module:
    """The module that `torch.compile` has wrapped, or `unet` itself."""
    return getattr(unet, "_orig_mod", unet)
