# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
The frozen part of a base model that training reads with: pictures to latents, captions to the conditions of the UNet.

`model_index.json` says which family a base belongs to. All that differs between families is in one class each.
"""

import gc
import hashlib

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from au_encoder import AUAdapter
from pipeline_fineface import FineFacePipeline
from training.config import TrainConfig


class StableDiffusionEncoders:
    """
    The tokenizer, text encoder and VAE of Stable Diffusion 1 and 2.

    Args:
        tokenizer (`CLIPTokenizer`), text_encoder (`CLIPTextModel`), vae (`AutoencoderKL`):
            The models, where they are. They get frozen.
    """

    def __init__(self, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, vae: AutoencoderKL):
        self.tokenizer, self.text_encoder, self.vae = tokenizer, text_encoder, vae
        for module in self._modules():
            module.eval().requires_grad_(False)
        self.scaling_factor = vae.config.scaling_factor
        self.latent_channels = vae.config.latent_channels
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)

    @classmethod
    def from_pretrained(cls, config: TrainConfig, device: torch.device, dtype: torch.dtype):
        base, hub_options = config.pretrained_model_name_or_path, {"revision": config.revision}
        tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer", **hub_options)
        hub_options |= {"variant": config.variant, "dtype": dtype}
        text_encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder", **hub_options)
        vae = AutoencoderKL.from_pretrained(base, subfolder="vae", **hub_options)
        return cls(tokenizer, text_encoder.to(device), vae.to(device))

    def _modules(self) -> list[nn.Module]:
        return [self.text_encoder, self.vae]

    @property
    def are_loaded(self) -> bool:
        return self.vae is not None

    def unload(self) -> None:
        """Free the memory of VAE and text encoder. What needs neither goes on working."""
        self.text_encoder = self.vae = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def tokenize(self, caption: str) -> torch.Tensor:
        """Token ids of shape `(tokens,)`, cut and padded to the length of the tokenizer."""
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(caption, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return tokens.input_ids[0]

    def is_cut(self, caption: str) -> bool:
        """Whether `tokenize` leaves out the end of a caption."""
        length = self.tokenizer.model_max_length
        # Each token has a byte or more, and two mark the start and the end.
        return len(caption.encode()) > length - 2 and len(self.tokenizer(caption, verbose=False).input_ids) > length

    @torch.no_grad()
    def encode_captions(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """`(batch, tokens)` → `prompt_embeds` of shape `(batch, tokens, cross_attention_dim)`."""
        return {"prompt_embeds": self.text_encoder(input_ids.to(self.text_encoder.device))[0]}

    @torch.no_grad()
    def encode_pictures(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        `(batch, 3, height, width)` in [-1, 1] → mean and standard deviation of the latents, before scaling, of shape
        `(batch, channels, height, width)`.
        """
        distribution = self.vae.encode(pixel_values.to(self.vae.device, self.vae.dtype)).latent_dist
        return {"latents_mean": distribution.mean, "latents_std": distribution.std}

    def added_cond_kwargs(self, batch: dict[str, torch.Tensor]) -> dict | None:
        """What the UNet of this family needs beside text and AUs, made of the entries of `batch`."""
        return None

    def make_pipeline(self, unet: UNet2DConditionModel, au_adapter: AUAdapter, scheduler: DDIMScheduler):
        """A pipeline of these models that draws."""
        return FineFacePipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            au_adapter=au_adapter,
        )

    def fingerprint(self) -> str:
        """A hash of all that the encodings depend on."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        digest = hashlib.blake2b(repr((vocabulary, self.tokenizer.model_max_length)).encode(), digest_size=16)
        for module in self._modules():
            for name, tensor in module.state_dict().items():
                digest.update(f"{name} {tensor.dtype}".encode())
                digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


FAMILIES = {("text_encoder",): StableDiffusionEncoders}
"""The class of each family of bases with a UNet, by the text encoders that `model_index.json` names."""


def load_encoders(config: TrainConfig, device: torch.device, dtype: torch.dtype) -> StableDiffusionEncoders:
    """
    The encoders of the base, as its family needs them.

    Raises:
        ValueError: if the base belongs to no family that can be trained.
    """
    base = config.pretrained_model_name_or_path
    index = DiffusionPipeline.load_config(base, revision=config.revision)
    components = {name for name, entry in index.items() if isinstance(entry, list | tuple) and entry[0] is not None}
    text_encoders = tuple(sorted(name for name in components if name.startswith("text_encoder")))
    if "unet" not in components or text_encoders not in FAMILIES:
        known = " or ".join(" and ".join(names) for names in FAMILIES)
        raise ValueError(
            f"The base {base!r} is a {index.get('_class_name')} of {', '.join(sorted(components))}. A base that can be"
            f" trained has a unet and {known}."
        )
    return FAMILIES[text_encoders].from_pretrained(config, device, dtype)
