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
from drawing.model import pipeline_class_of
from pipeline_fineface import FineFacePipeline
from pipeline_fineface_xl import FineFaceXLPipeline
from training.config import TrainConfig


class StableDiffusionEncoders:
    """The tokenizer, text encoder and VAE of Stable Diffusion 1 and 2, which this object freezes."""

    text_encoder_classes: dict[str, type] = {"text_encoder": CLIPTextModel}
    pipeline_class: type = FineFacePipeline
    pipeline_options: dict = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    takes_sizes = False
    """Whether `added_cond_kwargs` needs the `original_size` of each picture."""
    vae_overflows = False
    """Whether a VAE with `force_upcast` has to stay in float32 instead of float16."""

    def __init__(self, tokenizers: list[CLIPTokenizer], text_encoders: list[nn.Module], vae: AutoencoderKL):
        self.tokenizers, self.text_encoders, self.vae = tokenizers, text_encoders, vae
        for module in (*text_encoders, vae):
            module.eval().requires_grad_(False)
        self.max_tokens = tokenizers[0].model_max_length
        self.scaling_factor = vae.config.scaling_factor
        self.latent_channels = vae.config.latent_channels
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)

    @classmethod
    def from_pretrained(cls, config: TrainConfig, device: torch.device, dtype: torch.dtype):
        base, options = config.pretrained_model_name_or_path, {"revision": config.revision}
        names = [name.replace("text_encoder", "tokenizer") for name in cls.text_encoder_classes]
        tokenizers = [CLIPTokenizer.from_pretrained(base, subfolder=name, **options) for name in names]
        options["variant"] = config.variant
        text_encoders = [
            text_encoder_class.from_pretrained(base, subfolder=name, dtype=dtype, **options).to(device)
            for name, text_encoder_class in cls.text_encoder_classes.items()
        ]
        if config.pretrained_vae_model_name_or_path is None:
            vae = AutoencoderKL.from_pretrained(base, subfolder="vae", **options)
        else:
            # Most repositories of a VAE have it at their root.
            vae = AutoencoderKL.from_pretrained(config.pretrained_vae_model_name_or_path)
        if cls.vae_overflows and dtype == torch.float16 and vae.config.force_upcast:
            dtype = torch.float32
        # `ModelMixin.to` logs a warning on casts.
        return cls(tokenizers, text_encoders, nn.Module.to(vae, device, dtype))

    def unload(self) -> None:
        """Free the memory of VAE and text encoders. Methods that need neither still work."""
        self.text_encoders, self.vae = [], None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def tokenize(self, caption: str) -> torch.Tensor:
        """Token ids of all tokenizers, of shape `(tokenizers, tokens)`. Each pads in its own way."""
        options = {"padding": "max_length", "truncation": True, "max_length": self.max_tokens, "return_tensors": "pt"}
        return torch.cat([tokenizer(caption, **options).input_ids for tokenizer in self.tokenizers])

    def is_cut(self, caption: str) -> bool:
        """Whether `tokenize` cuts the end of a caption off."""
        # A token has at least one byte, and two tokens mark start and end, so short captions need no tokenizer.
        is_short = len(caption.encode()) <= self.max_tokens - 2
        return not is_short and len(self.tokenizers[0](caption, verbose=False).input_ids) > self.max_tokens

    @torch.no_grad()
    def encode_captions(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encode ids `(batch, 1, tokens)` to `prompt_embeds` of shape `(batch, tokens, cross_attention_dim)`."""
        [text_encoder] = self.text_encoders
        return {"prompt_embeds": text_encoder(input_ids[:, 0].to(text_encoder.device))[0]}

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
        models = {"vae": self.vae, "unet": unet, "scheduler": scheduler, "au_adapter": au_adapter}
        for name, text_encoder, tokenizer in zip(
            self.text_encoder_classes, self.text_encoders, self.tokenizers, strict=True
        ):
            models |= {name: text_encoder, name.replace("text_encoder", "tokenizer"): tokenizer}
        return self.pipeline_class(**models, **self.pipeline_options)

    def fingerprint(self) -> str:
        """A hash of everything that the encodings depend on."""
        # Both tokenizers of Stable Diffusion XL have this vocabulary.
        vocabulary = sorted(self.tokenizers[0].get_vocab().items())
        digest = hashlib.blake2b(repr((vocabulary, self.max_tokens)).encode(), digest_size=16)
        for module in (*self.text_encoders, self.vae):
            for name, tensor in module.state_dict().items():
                digest.update(f"{name} {tensor.dtype}".encode())
                digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


class StableDiffusionXLEncoders(StableDiffusionEncoders):
    """
    The tokenizers, text encoders and VAE of Stable Diffusion XL. Its UNet takes the tokens of both text encoders side
    by side, the pooled text of the second encoder, the original size of a picture, and the position and size of the
    crop.
    """

    text_encoder_classes = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    pipeline_class, pipeline_options = FineFaceXLPipeline, {"add_watermarker": False}
    takes_sizes = vae_overflows = zeros_for_empty = True

    @classmethod
    def from_pretrained(cls, config: TrainConfig, device: torch.device, dtype: torch.dtype):
        encoders = super().from_pretrained(config, device, dtype)
        index = DiffusionPipeline.load_config(config.pretrained_model_name_or_path, revision=config.revision)
        # Zeros encode the empty caption where calls without a negative prompt have zeros.
        encoders.zeros_for_empty = index.get("force_zeros_for_empty_prompt", True)
        return encoders

    @torch.no_grad()
    def encode_captions(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Encode ids `(batch, 2, tokens)` to `prompt_embeds` of shape `(batch, tokens, cross_attention_dim)`, and to
        `text_embeds`, the pooled text, of shape `(batch, projection_dim)`.
        """
        input_ids = input_ids.to(self.text_encoders[0].device)
        outputs = [
            text_encoder(ids, output_hidden_states=True)
            for text_encoder, ids in zip(self.text_encoders, input_ids.unbind(1), strict=True)
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
        pipeline = super().make_pipeline(unet, au_adapter, scheduler)
        pipeline.register_to_config(force_zeros_for_empty_prompt=self.zeros_for_empty)
        return pipeline

    def fingerprint(self) -> str:
        return f"{super().fingerprint()} {self.zeros_for_empty}"


FAMILIES = {family.pipeline_class: family for family in (StableDiffusionEncoders, StableDiffusionXLEncoders)}


def find_family(config: TrainConfig) -> type[StableDiffusionEncoders]:
    """The class of the family of the base. No model is loaded. Raises the errors of `pipeline_class_of`."""
    return FAMILIES[pipeline_class_of(config.pretrained_model_name_or_path, config.revision)]


def load_encoders(config: TrainConfig, device: torch.device, dtype: torch.dtype) -> StableDiffusionEncoders:
    """Load the encoders of the base with the class of its family. Raises the errors of `find_family`."""
    return find_family(config).from_pretrained(config, device, dtype)
