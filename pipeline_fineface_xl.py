# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""Text and facial Action Units (AUs) to faces: FineFace on Stable Diffusion XL."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.stable_diffusion_xl import StableDiffusionXLPipelineOutput
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)


# diffusers copies only the files that this file imports, so it also imports the files that the mixin needs.
if "." in __name__:  # a copy inside a package: diffusers loads it with custom_pipeline= or from the Hub
    from .action_units import AU_NAMES  # noqa: F401
    from .au_attention_processor import AUAttnProcessor  # noqa: F401
    from .au_encoder import AUAdapter  # noqa: F401
    from .au_pipeline_mixin import AUPipelineMixin
else:  # a clone: the files are top-level modules
    # `import x as y`: diffusers reports any plainer form as a package to pip install.
    import au_pipeline_mixin as _au_pipeline_mixin

    AUPipelineMixin = _au_pipeline_mixin.AUPipelineMixin


class FineFaceXLPipeline(AUPipelineMixin, StableDiffusionXLPipeline):
    r"""
    Text-to-image generation with Stable Diffusion XL, where Action Units (AUs) of FACS set the facial expression. The
    method is that of [`FineFacePipeline`].

    It is a [`StableDiffusionXLPipeline`] in every other respect, with the arguments of that class. It adds one
    component, `au_adapter` (an `AUAdapter`; without it the pipeline is plain Stable Diffusion XL), and a LoRA named
    `"fineface"` on the UNet. `load_au_adapter` loads both.
    """

    base_class = StableDiffusionXLPipeline
    model_cpu_offload_seq = "text_encoder->text_encoder_2->image_encoder->au_adapter->unet->vae"
    _optional_components = [*StableDiffusionXLPipeline._optional_components, "au_adapter"]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        image_encoder: CLIPVisionModelWithProjection = None,
        feature_extractor: CLIPImageProcessor = None,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
        # Not `AUAdapter`: from the Hub, the component comes with a class object of its own.
        au_adapter: ModelMixin | None = None,
    ):
        if getattr(unet, "config", {}).get("addition_embed_type") != "text_time":
            raise ValueError(
                "The UNet takes no sizes and no pooled text, so it is none of Stable Diffusion XL. For one of Stable"
                " Diffusion 1.x or 2.x use `FineFacePipeline`."
            )
        others = (image_encoder, feature_extractor, force_zeros_for_empty_prompt, add_watermarker)
        super().__init__(vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2, unet, scheduler, *others)
        self._attach_adapter(au_adapter)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        denoising_end: float | None = None,
        guidance_scale: float = 5.0,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        negative_original_size: tuple[int, int] | None = None,
        negative_crops_coords_top_left: tuple[int, int] = (0, 0),
        negative_target_size: tuple[int, int] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        aus: str | dict[str, float] | torch.Tensor | list | None = None,
        negative_aus: str | dict[str, float] | torch.Tensor | list | None = None,
        au_scale: float = 1.0,
        au_guidance_scale: float | None = None,
        au_masks: torch.Tensor | list | None = None,
    ) -> StableDiffusionXLPipelineOutput | tuple:
        r"""
        Generate images. All arguments but the last five are those of [`StableDiffusionXLPipeline.__call__`], and the
        last five are those of [`FineFacePipeline.__call__`].

        Args:
            prompt (`str` or `list[str]`, *optional*):
                Description of the image. It may contain AUs: `"a boy <AU6=3 AU12=5>"`. In `prompt_2`, which goes to
                the second text encoder in place of `prompt`, AUs are read as words.
            denoising_end (`float`, *optional*):
                The share of the steps after which a refiner takes over, with `output_type="latent"`. It knows no AUs,
                so hand over late.
            aus, negative_aus, au_scale, au_guidance_scale, au_masks:
                See [`FineFacePipeline.__call__`].

        Examples:
            ```py
            >>> import torch
            >>> from pipeline_fineface_xl import FineFaceXLPipeline

            >>> base = "stabilityai/stable-diffusion-xl-base-1.0"
            >>> pipe = FineFaceXLPipeline.from_pretrained(base, dtype=torch.float16)
            >>> pipe.load_au_adapter("fineface-xl")  # trained with `train_fineface.py`
            >>> pipe = pipe.to("cuda")

            >>> generator = torch.Generator().manual_seed(0)
            >>> aus = {"AU1": 2.5, "AU6": 2.5, "AU12": 5}
            >>> image = pipe("a closeup of a boy in a park", aus=aus, generator=generator).images[0]
            ```

        Returns:
            [`~pipelines.stable_diffusion_xl.StableDiffusionXLPipelineOutput`], or if `return_dict` is False a tuple
            of the images.

        Raises:
            ValueError: if an argument is wrong. This is checked before any model runs.
        """
        images, _ = self._generate(SimpleNamespace(**locals()))
        if not return_dict:
            return (images,)
        return StableDiffusionXLPipelineOutput(images=images)

    def _check_call(self, call: SimpleNamespace) -> None:
        super()._check_call(call)
        pooled_dim = self.unet.add_embedding.linear_1.in_features - 6 * self.unet.config.addition_time_embed_dim
        widths = {"prompt_embeds": self.unet.config.cross_attention_dim, "pooled_prompt_embeds": pooled_dim}
        for name, expected in (widths | {f"negative_{name}": width for name, width in widths.items()}).items():
            tensor = getattr(call, name)
            if tensor is not None and tensor.shape[-1] != expected:
                raise ValueError(
                    f"`{name}` is {tensor.shape[-1]} wide, but this base needs {expected}. Embeddings of Stable"
                    " Diffusion 1.x and 2.x do not fit Stable Diffusion XL: make them with `encode_prompt` of this"
                    " pipeline."
                )
        if call.denoising_end is not None and not 0 < call.denoising_end <= 1:
            raise ValueError(
                f"`denoising_end` is the share of the steps to take, above 0 and up to 1, but is {call.denoising_end}."
            )

    def _arrange_embeds(self, call: SimpleNamespace, *embeds: torch.Tensor | None) -> dict[str, torch.Tensor]:
        prompt_embeds, negative_prompt_embeds, add_text_embeds, negative_pooled_prompt_embeds = embeds
        # The text encoders may have another dtype than the UNet.
        device, dtype, size = self._execution_device, self.unet.dtype, (call.height, call.width)
        num_images = len(prompt_embeds)

        def time_ids(original_size, crops_coords_top_left, target_size) -> torch.Tensor:
            sizes = (original_size, crops_coords_top_left, target_size)
            return self._get_add_time_ids(*sizes, dtype, add_text_embeds.shape[-1]).repeat(num_images, 1)

        add_time_ids = time_ids(call.original_size or size, call.crops_coords_top_left, call.target_size or size)
        if self.do_classifier_free_guidance:
            negative_add_time_ids = add_time_ids
            if call.negative_original_size is not None and call.negative_target_size is not None:
                negative_add_time_ids = time_ids(
                    call.negative_original_size, call.negative_crops_coords_top_left, call.negative_target_size
                )
            prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
            add_text_embeds = torch.cat([negative_pooled_prompt_embeds, add_text_embeds])
            add_time_ids = torch.cat([negative_add_time_ids, add_time_ids])
        return {
            "prompt_embeds": prompt_embeds.to(device, dtype),
            "negative_prompt_embeds": negative_prompt_embeds,
            "add_text_embeds": add_text_embeds.to(device, dtype),
            "negative_pooled_prompt_embeds": negative_pooled_prompt_embeds,
            "add_time_ids": add_time_ids.to(device),
        }

    def _prepare_timesteps(self, call: SimpleNamespace, device: torch.device) -> tuple[torch.Tensor, int]:
        self._denoising_end = call.denoising_end
        timesteps, num_inference_steps = super()._prepare_timesteps(call, device)
        if call.denoising_end is not None and call.denoising_end < 1:
            num_train_timesteps = self.scheduler.config.num_train_timesteps
            cutoff = int(round(num_train_timesteps - call.denoising_end * num_train_timesteps))
            num_inference_steps = sum(bool(t >= cutoff) for t in timesteps)
            timesteps = timesteps[:num_inference_steps]
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)
        return timesteps, num_inference_steps

    def _decode(self, latents: torch.Tensor, generator) -> tuple[torch.Tensor, None]:
        """Pictures from -1 to 1. In `float16` the VAE of SDXL overflows, unless its config says otherwise."""
        config = self.vae.config
        needs_upcasting = self.vae.dtype == torch.float16 and config.force_upcast
        if needs_upcasting:
            self.vae.to(dtype=torch.float32)
        latents = latents.to(self.vae.dtype) / config.scaling_factor
        if getattr(config, "latents_mean", None) is not None and getattr(config, "latents_std", None) is not None:
            mean, std = (
                latents.new_tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std)
            )
            latents = latents * std + mean
        try:
            return self.vae.decode(latents, return_dict=False)[0], None
        finally:
            if needs_upcasting:
                self.vae.to(dtype=torch.float16)
