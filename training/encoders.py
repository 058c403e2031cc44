# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
The frozen part of a base model that prepares the inputs of training: pictures become latents, and captions become the
conditions of the UNet.

`model_index.json` tells the family of a base. One class for each family contains everything that differs.
"""

import gc
import hashlib

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from au_encoder import AUAdapter
from pipeline_fineface import FineFacePipeline
from pipeline_fineface_xl import FineFaceXLPipeline
from training.config import TrainConfig


class StableDiffusionEncoders:
    """
    The tokenizer, text encoder and VAE of Stable Diffusion 1 and 2.

    Args:
        tokenizer (`CLIPTokenizer`), text_encoder (`CLIPTextModel`), vae (`AutoencoderKL`):
            The models, on the device of training. This object freezes them.
    """

    takes_sizes = False
    """Whether `added_cond_kwargs` needs the `original_size` of each picture."""

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
        return cls(tokenizer, text_encoder.to(device), load_vae(config, dtype).to(device))

    def _modules(self) -> list[nn.Module]:
        return [self.text_encoder, self.vae]

    @property
    def are_loaded(self) -> bool:
        return self.vae is not None

    def unload(self) -> None:
        """Free the memory of VAE and text encoder. Methods that need neither still work."""
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
        """Whether `tokenize` cuts the end of a caption off."""
        length = self.tokenizer.model_max_length
        # A token has at least one byte, and two tokens mark start and end, so short captions need no tokenizer.
        return len(caption.encode()) > length - 2 and len(self.tokenizer(caption, verbose=False).input_ids) > length

    @torch.no_grad()
    def encode_captions(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encode ids `(batch, tokens)` to `prompt_embeds` of shape `(batch, tokens, cross_attention_dim)`."""
        return {"prompt_embeds": self.text_encoder(input_ids.to(self.text_encoder.device))[0]}

    @torch.no_grad()
    def encode_pictures(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Encode pictures `(batch, 3, height, width)` in [-1, 1] to the mean and the standard deviation of the unscaled
        latents, each of shape `(batch, channels, height, width)`.
        """
        distribution = self.vae.encode(pixel_values.to(self.vae.device, self.vae.dtype)).latent_dist
        return {"latents_mean": distribution.mean, "latents_std": distribution.std}

    def added_cond_kwargs(self, batch: dict[str, torch.Tensor]) -> dict | None:
        """Conditions of the UNet beside text and AUs, from the entries of `batch`. This family has none."""
        return None

    def make_pipeline(self, unet: UNet2DConditionModel, au_adapter: AUAdapter, scheduler: DDIMScheduler):
        """Make a pipeline from these models."""
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
        """A hash of everything that the encodings depend on."""
        # Both tokenizers of Stable Diffusion XL have this vocabulary.
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        digest = hashlib.blake2b(repr((vocabulary, self.tokenizer.model_max_length)).encode(), digest_size=16)
        for module in self._modules():
            for name, tensor in module.state_dict().items():
                digest.update(f"{name} {tensor.dtype}".encode())
                digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


class StableDiffusionXLEncoders(StableDiffusionEncoders):
    """
    The tokenizers, text encoders and VAE of Stable Diffusion XL. Its UNet takes the tokens of both text encoders side
    by side, the pooled text of the second encoder, the original size of a picture, and the position and size of the
    crop.

    Args:
        tokenizer, tokenizer_2, text_encoder, text_encoder_2, vae:
            The models, on the device of training. This object freezes them.
        zeros_for_empty (`bool`):
            Whether zeros encode the empty caption. `force_zeros_for_empty_prompt` of the base sets this for calls
            without a negative prompt.
    """

    takes_sizes = True

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        vae: AutoencoderKL,
        zeros_for_empty: bool = True,
    ):
        self.tokenizer_2, self.text_encoder_2, self.zeros_for_empty = tokenizer_2, text_encoder_2, zeros_for_empty
        super().__init__(tokenizer, text_encoder, vae)

    @classmethod
    def from_pretrained(cls, config: TrainConfig, device: torch.device, dtype: torch.dtype):
        base, hub_options = config.pretrained_model_name_or_path, {"revision": config.revision}
        zeros = DiffusionPipeline.load_config(base, **hub_options).get("force_zeros_for_empty_prompt", True)
        tokenizers = [
            CLIPTokenizer.from_pretrained(base, subfolder=name, **hub_options) for name in ("tokenizer", "tokenizer_2")
        ]
        hub_options |= {"variant": config.variant, "dtype": dtype}
        text_encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder", **hub_options)
        text_encoder_2 = CLIPTextModelWithProjection.from_pretrained(base, subfolder="text_encoder_2", **hub_options)
        models = (model.to(device) for model in (text_encoder, text_encoder_2, load_vae(config, dtype, True)))
        return cls(*tokenizers, *models, zeros)

    def _modules(self) -> list[nn.Module]:
        return [self.text_encoder, self.text_encoder_2, self.vae]

    def unload(self) -> None:
        self.text_encoder_2 = None
        super().unload()

    def tokenize(self, caption: str) -> torch.Tensor:
        """Token ids of both tokenizers, of shape `(2, tokens)`. The two pad differently."""
        length = self.tokenizer.model_max_length
        options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
        return torch.cat([tokenizer(caption, **options).input_ids for tokenizer in (self.tokenizer, self.tokenizer_2)])

    @torch.no_grad()
    def encode_captions(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Encode ids `(batch, 2, tokens)` to `prompt_embeds` of shape `(batch, tokens, cross_attention_dim)`, and to
        `text_embeds`, the pooled text, of shape `(batch, projection_dim)`.
        """
        input_ids = input_ids.to(self.text_encoder.device)
        outputs = [
            encoder(ids, output_hidden_states=True)
            for encoder, ids in zip((self.text_encoder, self.text_encoder_2), input_ids.unbind(1), strict=True)
        ]
        # `StableDiffusionXLPipeline.encode_prompt` also takes the last but one layer.
        prompt_embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        text_embeds = outputs[1].text_embeds
        if self.zeros_for_empty:
            is_empty = (input_ids == self.tokenize("").to(input_ids.device)).flatten(1).all(dim=1)
            prompt_embeds = prompt_embeds.masked_fill(is_empty[:, None, None], 0)
            text_embeds = text_embeds.masked_fill(is_empty[:, None], 0)
        return {"prompt_embeds": prompt_embeds, "text_embeds": text_embeds}

    def added_cond_kwargs(self, batch: dict[str, torch.Tensor]) -> dict:
        """The pooled text, and `time_ids`: original height and width, top and left of the crop, and its size."""
        sizes = batch["original_size"].float()  # (batch, 2), height and width
        side = float(batch["noise"].shape[-1] * self.vae_scale_factor)
        # `PixelInputs` resizes the shorter side and crops the middle of the longer side.
        resized = sizes * (side / sizes.min(dim=1, keepdim=True).values)
        cut = ((resized - side) / 2).round()
        return {
            # A cache may hold half precision, but the UNet concatenates this with float32 sizes.
            "text_embeds": batch["text_embeds"].float(),
            "time_ids": torch.cat([sizes, cut, torch.full_like(sizes, side)], dim=1),
        }

    def make_pipeline(self, unet: UNet2DConditionModel, au_adapter: AUAdapter, scheduler: DDIMScheduler):
        """Make a pipeline from these models."""
        return FineFaceXLPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            text_encoder_2=self.text_encoder_2,
            tokenizer=self.tokenizer,
            tokenizer_2=self.tokenizer_2,
            unet=unet,
            scheduler=scheduler,
            force_zeros_for_empty_prompt=self.zeros_for_empty,
            add_watermarker=False,
            au_adapter=au_adapter,
        )

    def fingerprint(self) -> str:
        return f"{super().fingerprint()} {self.zeros_for_empty}"


def load_vae(config: TrainConfig, dtype: torch.dtype, can_overflow: bool = False) -> AutoencoderKL:
    """
    Load the VAE of the base or of `--pretrained_vae_model_name_or_path` in `dtype`. If it `can_overflow` and its
    config has `force_upcast`, it is in float32 instead of float16.
    """
    options = {"subfolder": "vae", "revision": config.revision, "variant": config.variant}
    source = config.pretrained_model_name_or_path
    if config.pretrained_vae_model_name_or_path is not None:
        # Most repositories of a VAE have it at their root.
        source, options = config.pretrained_vae_model_name_or_path, {}
    vae = AutoencoderKL.from_pretrained(source, **options)
    if can_overflow and dtype == torch.float16 and vae.config.force_upcast:
        dtype = torch.float32
    return nn.Module.to(vae, dtype)


FAMILIES = {("text_encoder",): StableDiffusionEncoders, ("text_encoder", "text_encoder_2"): StableDiffusionXLEncoders}
"""The class for each family of bases with a UNet, by the text encoders in `model_index.json`."""


def load_encoders(config: TrainConfig, device: torch.device, dtype: torch.dtype) -> StableDiffusionEncoders:
    """
    Load the encoders of the base with the class of its family.

    Raises:
        ValueError: if the base belongs to no family in `FAMILIES`.
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
