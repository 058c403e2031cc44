# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
The part that all pipelines with Action Units (AUs) share: loading and saving an adapter, reading the AUs of a call,
encoding them, and the branches of guidance. Only the files of pipelines import this file.
"""

import functools
import inspect
import logging
import math
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral, Real
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg, retrieve_timesteps
from transformers import PreTrainedModel


if "." in __name__:  # a copy inside a package: diffusers loads it with custom_pipeline= or from the Hub
    from . import action_units, au_attention_processor, au_encoder
else:  # a clone: the files are top-level modules
    # `import x as x`: diffusers reports any plainer form as a package to pip install.
    import action_units as action_units
    import au_attention_processor as au_attention_processor
    import au_encoder as au_encoder


logger = logging.getLogger(__name__)

LORA_NAME = "fineface"

# A larger scale is more likely a typing error, and half precision overflows.
MAX_SCALE = 100


@dataclass(frozen=True)
class AUControls:
    """
    The AU arguments of a call, checked and laid out in rows by `read_au_controls`. With masks, all tensors have a
    dimension of people after the batch dimension.
    """

    intensities: torch.Tensor  # (batch, num_aus), FACS intensities to guide to
    negative_intensities: torch.Tensor  # (batch, num_aus), FACS intensities to guide away from
    scales: torch.Tensor  # (batch,), λ_AU of each row, 0 for rows without AUs
    masks: torch.Tensor | None = None  # (batch, people, height and width of the latents), the region of each person
    guidance_scale: float | None = None  # of guidance by AUs alone; None guides prompt and AUs together


def check_scale(name: str, scale: float) -> None:
    """Raise a ValueError unless `scale` is a number within ±`MAX_SCALE`."""
    # `math.isfinite` fails on whole numbers that no float can hold.
    if not isinstance(scale, Real) or not -math.inf < scale < math.inf:
        raise ValueError(f"`{name}` has to be a finite number, but is {scale!r}.")
    if abs(scale) > MAX_SCALE:
        raise ValueError(f"`{name}` goes from -{MAX_SCALE} to {MAX_SCALE}, but is {scale!r}.")


def check_count(name: str, count: int) -> None:
    """Raise a ValueError unless `count` is an integer of at least 1."""
    if not isinstance(count, Integral) or count < 1:
        raise ValueError(f"`{name}` has to be a whole number from 1 on, but is {count!r}.")


# A scheduler keeps the state of a call, and pipelines that `from_pipe` makes from each other share one scheduler.
_turns: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()
_busy: weakref.WeakSet[Any] = weakref.WeakSet()
_turns_lock = threading.Lock()


def takes_turns(call: Callable) -> Callable:
    """
    Make concurrent calls of pipelines with the same scheduler wait for each other. A callback that calls the pipeline
    of its own call gets a RuntimeError.
    """

    @functools.wraps(call)
    def wrapper(self, *args, **kwargs):
        with _turns_lock:
            turn = _turns.setdefault(self.scheduler, threading.RLock())
        with turn:
            # Other threads wait for the lock, so only this thread can be inside a call already.
            if self.scheduler in _busy:
                raise RuntimeError(
                    "The pipeline was called by a callback of its own call. Its scheduler can follow one call at a"
                    " time: let the call end first, or use another pipeline with a scheduler of its own."
                )
            _busy.add(self.scheduler)
            try:
                return call(self, *args, **kwargs)
            finally:
                _busy.discard(self.scheduler)

    return wrapper


class AUPipelineMixin:
    r"""
    Base class that adds AUs to a diffusers pipeline with a `UNet2DConditionModel`.

    A subclass names this class before the pipeline in its bases. Its constructor takes a component `au_adapter` and
    calls `_attach_adapter` with it, its `__call__` calls `_generate`, and it has `_arrange_embeds` and `_decode`.
    """

    # The extended pipeline of diffusers. `save_pretrained` writes the files of this class.
    base_class: type[DiffusionPipeline]

    # ---- Loading and saving -----------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "AUPipelineMixin":
        r"""
        As [`DiffusionPipeline.from_pretrained`]. If an AU adapter stands beside the base model, it is loaded as well;
        `au_adapter=None` leaves it out. Without `dtype`, all models get the dtype of the UNet.
        """
        pipeline = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            # Models of transformers load in the dtype of their files.
            for module in pipeline.components.values():
                if isinstance(module, PreTrainedModel) and not getattr(module, "is_quantized", False):
                    module.to(pipeline.unet.dtype)
        if pipeline.au_adapter is None and "au_adapter" not in kwargs:
            hub_options = ("revision", "token", "cache_dir", "force_download", "local_files_only")
            hub_kwargs = {name: kwargs[name] for name in hub_options if kwargs.get(name) is not None}
            files = au_encoder.find_adapter_beside(pretrained_model_name_or_path, **hub_kwargs)
            if files is not None:
                pipeline._load_adapter_files(files)
        return pipeline

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "AUPipelineMixin":
        """As [`DiffusionPipeline.from_pipe`], with the AU adapter of `pipeline` if it has one."""
        # Pass the adapter explicitly: diffusers would compare the class of a component of `pipeline` with the
        # annotation in the signature, and leave it out.
        kwargs.setdefault("au_adapter", getattr(pipeline, "au_adapter", None))
        new_pipeline = super().from_pipe(pipeline, **kwargs)
        new_pipeline._merged_adapters = set(getattr(pipeline, "_merged_adapters", ()))
        if new_pipeline.au_adapter is getattr(pipeline, "au_adapter", None):
            new_pipeline._has_lora = getattr(pipeline, "_has_lora", False)
        return new_pipeline

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        r"""
        As [`DiffusionPipeline.save_pretrained`], with the AU adapter beside the base model: the folder loads as a
        pipeline of this class with the adapter, and as a plain pipeline of diffusers without it. Other LoRAs and
        IP-Adapters are not saved. If this pipeline has no adapter, an adapter in the folder is removed.
        """
        with self._offloading_paused():
            base = {name: module for name, module in self.components.items() if name != "au_adapter"}
            base["unet"] = au_encoder.base_unet(self.unet)
            if self.au_adapter is not None:
                self.save_au_adapter(save_directory)
            else:
                au_encoder.remove_au_adapter(save_directory)
            self.base_class(**base, **self.parameters).save_pretrained(save_directory, *args, **kwargs)

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
        Load an AU adapter, which replaces the present one. An IP-Adapter and other LoRAs stay active, but fused LoRAs
        are unfused. If a file is missing or wrong, the pipeline stays as it was.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                A folder, or the id of a Hub repository, as `save_au_adapter` writes it, as the paper's authors
                published it (`"Tvaranka/fineface"`), or with `au_ip_adapter.safetensors` for plain diffusers.
            variant (`str`, *optional*):
                Of the published weights, `"sd15"` takes those for Stable Diffusion 1.x; the default fits 2.x.
            subfolder, revision, token, cache_dir, force_download, local_files_only:
                As in [`DiffusionPipeline.from_pretrained`].

        Raises:
            OSError: if there is no adapter, or a file of it is missing.
            ValueError: if a file is broken, carries code, or does not fit the base model.
        """
        options = {"revision": revision, "token": token, "cache_dir": cache_dir, "force_download": force_download}
        options |= {"local_files_only": local_files_only, "subfolder": subfolder, "variant": variant}
        self._load_adapter_files(au_encoder.find_adapter_files(pretrained_model_name_or_path, **options))

    def save_au_adapter(self, save_directory: str | os.PathLike) -> None:
        """Write the AU adapter, with its LoRA, as a folder that `load_au_adapter` reads."""
        if self.au_adapter is None:
            raise ValueError("There is no AU adapter to save. Load one with `load_au_adapter`.")
        if self._has_lora and LORA_NAME not in getattr(self.unet, "peft_config", {}):
            raise ValueError(
                f"The LoRA {LORA_NAME!r} of the AU adapter is no longer on the UNet, so it cannot be saved. Without"
                " it, the adapter would be another one. Save before `unload_lora_weights`, or load the adapter again."
            )
        with self._offloading_paused():
            au_encoder.write_au_adapter(save_directory, self.au_adapter, self.unet, LORA_NAME)

    def unload_au_adapter(self) -> None:
        """
        Remove the AU adapter and its LoRA. This restores the base model bit for bit; after `fuse_lora`, it restores it
        up to rounding.
        """
        with self._offloading_paused():
            self._remove_adapter()

    def _load_adapter_files(self, files: au_encoder.AdapterFiles) -> None:
        if LORA_NAME in self.fused_loras and LORA_NAME not in getattr(self.unet, "peft_config", {}):
            raise ValueError(
                f"The LoRA {LORA_NAME!r} of an AU adapter was fused into the UNet, and then unloaded. Another adapter"
                " would come on top of it. Load the base model anew."
            )
        adapter = au_encoder.read_au_adapter(files, self.unet, au_attention_processor.au_layers(self.unet))
        try:
            _au_names_of(adapter)
        except ValueError as error:
            source = files.encoder_config or files.encoder or files.attn_processors
            raise ValueError(f"{str(source)!r}: {error}") from error
        lora = None if files.lora is None else au_encoder.read_lora(files.lora, self.unet)
        # All files are read and checked here, so the pipeline can change now.
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
        """The AUs of the adapter, in the order of its intensities; without an adapter, the paper's twelve."""
        return action_units.AU_NAMES if self.au_adapter is None else _au_names_of(self.au_adapter)

    def _remove_adapter(self) -> None:
        if any(getattr(module, "merged", False) for module in self.unet.modules()):
            self.unfuse_lora(components=["unet"])
        loras = getattr(self.unet, "peft_config", {})
        if set(loras) == {LORA_NAME}:
            self.unet.unload_lora()
        elif LORA_NAME in loras:
            self.unet.delete_adapters(LORA_NAME)
        elif LORA_NAME in self.fused_loras:
            logger.warning("The LoRA %r was fused into the UNet and unloaded. It stays in the weights.", LORA_NAME)
        au_attention_processor.detach_au_processors(self.unet)
        self.register_modules(au_adapter=None)

    def _attach_adapter(self, adapter: ModelMixin | None) -> None:
        if adapter is not None:
            layers = au_attention_processor.au_layers(self.unet)
            if adapter.layers != layers or adapter.config.cross_attention_dim != self.unet.config.cross_attention_dim:
                raise ValueError(
                    f"`au_adapter` has {len(adapter.layers)} layers for text embeddings of width"
                    f" {adapter.config.cross_attention_dim}. The UNet has {len(layers)} for"
                    f" {self.unet.config.cross_attention_dim}, or layers of other names and widths. Use the adapter"
                    " that was trained on this base model."
                )
            _au_names_of(adapter)
            au_attention_processor.attach_au_processors(self.unet)
        self._has_lora = adapter is not None and LORA_NAME in getattr(self.unet, "peft_config", {})
        self._lora_warning = None
        self.register_modules(au_adapter=adapter)

    @contextmanager
    def _offloading_paused(self) -> Iterator[None]:
        """Turn CPU offloading off, and on again at the end, so that it includes new components."""
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
        """Keep active LoRAs of `names` active, because loading a LoRA makes it the only active one."""
        kept = [name for name in self._active_loras() if name in names]
        yield
        active = self._active_loras()
        if not set(kept) <= set(active):
            self.unet.set_adapter(list(dict.fromkeys([*kept, *active])))

    def _active_loras(self) -> list[str]:
        active = self.unet.active_adapters() if getattr(self.unet, "peft_config", None) else []
        return [active] if isinstance(active, str) else list(active or [])

    def load_lora_weights(self, *args, **kwargs) -> None:
        """As [`~loaders.StableDiffusionLoraLoaderMixin.load_lora_weights`], but the adapter's LoRA stays active."""
        with self._loras_kept_active(LORA_NAME):
            super().load_lora_weights(*args, **kwargs)

    def load_ip_adapter(self, *args, **kwargs) -> None:
        """As [`~loaders.IPAdapterMixin.load_ip_adapter`], but the adapter's LoRA stays active."""
        with self._loras_kept_active(LORA_NAME):
            super().load_ip_adapter(*args, **kwargs)

    def _check_lora(self) -> None:
        """
        Log one warning if the user switched the LoRA of the adapter off. Raises a ValueError if other LoRAs are fused,
        but this one is not, because PEFT then switches it off without a message.
        """
        if not self._has_lora:
            return
        layer = next((module for module in self.unet.modules() if LORA_NAME in getattr(module, "lora_A", {})), None)
        warning = None
        if layer is None:
            if LORA_NAME not in self.fused_loras:
                warning = "is not on the UNet. `load_au_adapter` brings it back."
        elif layer.merged:
            if LORA_NAME not in layer.merged_adapters:
                fused = ", ".join(layer.merged_adapters)
                raise ValueError(
                    f"{fused} is fused into the UNet, which switches the LoRA {LORA_NAME!r} of the AU adapter off."
                    f" Call `unfuse_lora()`, then `fuse_lora()` with {LORA_NAME!r} among its `adapter_names`."
                )
        elif layer.disable_adapters or LORA_NAME not in layer.active_adapters:
            warning = f"is switched off. `set_adapters` with {LORA_NAME!r} among the names switches it on."
        if warning is not None and warning != self._lora_warning:
            logger.warning("The LoRA %r, which belongs to the AU adapter, %s", LORA_NAME, warning)
        self._lora_warning = warning

    # ---- The AUs of a call ------------------------------------------------------------------------------------------

    def read_au_controls(
        self,
        aus,
        negative_aus=None,
        au_scale: float = 1.0,
        au_guidance_scale: float | None = None,
        au_masks=None,
        batch_size: int = 1,
        height: int | None = None,
        width: int | None = None,
    ) -> AUControls:
        """
        Check and read the AU arguments of a call with `batch_size` prompts, see `__call__`.

        Raises:
            ValueError: if an argument is wrong, there is no adapter for `aus`, or `negative_aus` or `au_masks` come
                without `aus`.
        """
        if aus is not None:
            if self.au_adapter is None:
                raise ValueError("`aus` need an AU adapter, and none is loaded. Load one with `load_au_adapter`.")
            self._check_lora()
        elif negative_aus is not None:
            raise ValueError("`negative_aus` says what to guide away from, but there are no `aus` to guide to.")
        elif au_masks is not None:
            raise ValueError("`au_masks` says where each of the `aus` goes, but there are no `aus`.")
        check_scale("au_scale", au_scale)
        if au_guidance_scale is not None:
            check_scale("au_guidance_scale", au_guidance_scale)
        height, width = self._image_size(height, width)
        latent_size = (height // self.vae_scale_factor, width // self.vae_scale_factor)
        masks = None if au_masks is None else au_attention_processor.read_au_masks(au_masks, batch_size, latent_size)
        options = {"num_people": None if masks is None else masks.shape[1], "au_names": self.au_names}
        negative_aus = {} if negative_aus is None else negative_aus
        intensities, has_aus = action_units.parse_aus_per_prompt(aus, batch_size, "aus", **options)
        negative, _ = action_units.parse_aus_per_prompt(negative_aus, batch_size, "negative_aus", **options)
        # Without AUs, a third prediction would equal the second.
        guidance_scale = None if aus is None or au_scale == 0 else au_guidance_scale
        return AUControls(intensities, negative, au_scale * has_aus, masks, guidance_scale)

    def _check_call(self, call: SimpleNamespace) -> None:
        """Check the arguments of `call` but for AUs, and add `batch_size`, the number of prompts."""
        # A parameter of diffusers' check that its calls have no more.
        call.callback_steps = None
        _pass_arguments(self.check_inputs, call)
        prompts = [call.prompt] if isinstance(call.prompt, str) else call.prompt
        if prompts is not None and not (prompts and all(isinstance(text, str) for text in prompts)):
            raise ValueError(f"`prompt` has to be a string or a list of at least one string, but is {prompts!r}.")
        call.batch_size = len(call.prompt_embeds if prompts is None else prompts)
        for name in ("prompt_2", "negative_prompt", "negative_prompt_2"):
            texts = getattr(call, name, None)
            if isinstance(texts, list) and len(texts) != call.batch_size:
                raise ValueError(f"`{name}` has {len(texts)} entries, but `prompt` has {call.batch_size}.")
        check_count("num_inference_steps", call.num_inference_steps)
        check_count("num_images_per_prompt", call.num_images_per_prompt)
        num_images = call.batch_size * call.num_images_per_prompt
        if isinstance(call.generator, list) and len(call.generator) != num_images:
            raise ValueError(
                f"`generator` is a list of {len(call.generator)}, but the call makes {num_images} images. Pass one"
                " generator for each image, or a single one."
            )
        check_scale("guidance_scale", call.guidance_scale)

    def take_au_tags(self, prompt, aus):
        """
        Move AU tags from the prompt, or prompts, to `aus`. Tokens that were added to the tokenizer, such as a textual
        inversion `<happy>`, stay in the prompt. Without an adapter, names of presets stay too.

        Raises:
            ValueError: if a tag cannot be read, or there are both tags and `aus`.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, list) or not all(isinstance(text, str) for text in prompts):
            return prompt, aus
        tokenizers = [getattr(self, name, None) for name in ("tokenizer", "tokenizer_2")]
        words = {token for tokenizer in tokenizers if tokenizer is not None for token in tokenizer.get_added_vocab()}
        has_adapter, pairs = self.au_adapter is not None, []
        for index, text in enumerate(prompts):
            label = "prompt" if isinstance(prompt, str) else f"prompt[{index}]"
            pairs.append(action_units.extract_au_tags(text, label, self.au_names, words, with_presets=has_adapter))
        if all(tag is None for _, tag in pairs):
            return prompt, aus
        if aus is not None:
            raise ValueError("Both `prompt` and `aus` contain AUs. Write them in one of the two.")
        return pairs[0] if isinstance(prompt, str) else ([text for text, _ in pairs], [tag for _, tag in pairs])

    def encode_aus(
        self,
        aus,
        device: torch.device,
        num_images_per_prompt: int = 1,
        batch_size: int = 1,
        lora_scale: float = 1.0,
        **options,
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """
        Encode AUs on `device` into the `cross_attention_kwargs` of the UNet, which are the same at every denoising
        step. `aus` is all AU arguments of a call as `AUControls`; or it is the argument of `__call__` for `batch_size`
        prompts, and `options` are `negative_aus`, `au_scale`, `au_masks`, `height` and `width`. `lora_scale` is the
        `scale` in the call's `cross_attention_kwargs`.

        Returns:
            `cross_attention_kwargs` for the branch with `aus`, and for the other branches, with `batch_size *
            num_images_per_prompt` rows each. Rows without AUs add exactly nothing; if `aus` is None, that is all rows.
        """
        controls = aus if isinstance(aus, AUControls) else self.read_au_controls(aus, batch_size=batch_size, **options)
        if self.au_adapter is None:
            return {}, {}
        # The hook on the UNet does this too, but it would break a graph that `torch.compile` compiles as a whole.
        au_attention_processor.attach_au_processors(self.unet)

        def for_each_image(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
            return torch.cat([positive, negative]).repeat_interleave(num_images_per_prompt, dim=0).to(device)

        intensities = for_each_image(controls.intensities, controls.negative_intensities)
        scales = for_each_image(controls.scales, controls.scales).flatten()
        masks = None if controls.masks is None else for_each_image(controls.masks, controls.masks)
        keys_and_values = self.au_adapter(intensities.flatten(0, -2))
        options = {"au_scale": scales, "lora_scale": lora_scale, "au_masks": masks}
        kwargs = au_attention_processor.pack_au_tensors(self.unet, *keys_and_values, **options)
        half = len(intensities) // 2
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
                See `__call__`. The height and width of the picture matter only for masks.
            batch_size, num_images_per_prompt, guidance_scale:
                The number of prompts of the other call, and its arguments. The defaults are the same.
            cross_attention_kwargs (`dict`, *optional*):
                Other entries for the other call, such as `{"scale": 0.7}` for the LoRA.
            pag_scale (`float`, defaults to 0.0):
                As in the call of a pipeline with perturbed-attention guidance (PAG), whose default is 3.0. Above 0,
                such a pipeline makes one more prediction for each picture, with the same AUs.

        Returns:
            The `cross_attention_kwargs` of the other call.

        Raises:
            ValueError: if an argument is wrong.
        """
        check_count("batch_size", batch_size)
        check_count("num_images_per_prompt", num_images_per_prompt)
        if aus is None:
            raise ValueError("`aus` is None. Without AUs, the other call needs no `cross_attention_kwargs`.")
        lora_scale = (cross_attention_kwargs or {}).get("scale", 1.0)
        controls = self.read_au_controls(aus, negative_aus, au_scale, None, au_masks, batch_size, height, width)
        au_kwargs, negative_au_kwargs = self.encode_aus(
            controls, self._execution_device, num_images_per_prompt, lora_scale=lora_scale
        )
        is_guided = guidance_scale > 1 and self.unet.config.time_cond_proj_dim is None
        branches = [negative_au_kwargs] * is_guided + [au_kwargs] * (2 if pag_scale > 0 else 1)
        au_kwargs = {name: torch.cat([branch[name] for branch in branches]) for name in au_kwargs}
        return {**(cross_attention_kwargs or {}), **au_kwargs}

    def _image_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        sample_size = self.unet.config.sample_size
        default_height, default_width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        return height or default_height * self.vae_scale_factor, width or default_width * self.vae_scale_factor

    # ---- Denoising --------------------------------------------------------------------------------------------------

    @property
    def au_guidance_scale(self) -> float | None:
        return self._au_guidance_scale

    @property
    def do_au_guidance(self) -> bool:
        return self._au_guidance_scale is not None

    @takes_turns
    def _generate(self, call: SimpleNamespace) -> tuple[Any, list[bool] | None]:
        """
        Carry out a call of the pipeline; `call` has the arguments of `__call__` by name. Returns the images, and their
        NSFW flags if there is a safety checker.
        """
        # 1. Check inputs.
        if isinstance(call.callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            call.callback_on_step_end_tensor_inputs = call.callback_on_step_end.tensor_inputs
        call.prompt, call.aus = self.take_au_tags(call.prompt, call.aus)
        call.height, call.width = self._image_size(call.height, call.width)
        self._check_call(call)
        au_controls = _pass_arguments(self.read_au_controls, call)

        self._guidance_scale = call.guidance_scale
        self._guidance_rescale = call.guidance_rescale
        self._au_guidance_scale = au_controls.guidance_scale
        self._clip_skip = call.clip_skip
        self._cross_attention_kwargs = call.cross_attention_kwargs
        self._interrupt = False
        num_images = call.batch_size * call.num_images_per_prompt
        device, dtype, is_guided = self._execution_device, self.unet.dtype, self.do_classifier_free_guidance
        lora_scale = (call.cross_attention_kwargs or {}).get("scale")

        # 2. Encode prompts, AUs and the images of an IP-Adapter. Unconditional rows come first.
        options = {"device": device, "do_classifier_free_guidance": is_guided, "lora_scale": lora_scale}
        tensors = self._arrange_embeds(call, *_pass_arguments(self.encode_prompt, call, **options))
        au_kwargs, negative_au_kwargs = self.encode_aus(
            au_controls, device, call.num_images_per_prompt, lora_scale=1.0 if lora_scale is None else lora_scale
        )
        image_embeds = None
        if call.ip_adapter_image is not None or call.ip_adapter_image_embeds is not None:
            image_embeds = self.prepare_ip_adapter_image_embeds(
                call.ip_adapter_image, call.ip_adapter_image_embeds, device, num_images, is_guided
            )

        # 3. Prepare timesteps and latents.
        timesteps, num_inference_steps = self._prepare_timesteps(call, device)
        self._num_timesteps = len(timesteps)
        size = (num_images, self.unet.config.in_channels, call.height, call.width)
        tensors["latents"] = self.prepare_latents(*size, dtype, device, call.generator, call.latents)
        extra_step_kwargs = self.prepare_extra_step_kwargs(call.generator, call.eta)
        timestep_cond, time_cond_dim = None, self.unet.config.time_cond_proj_dim
        if time_cond_dim is not None:
            scale = torch.tensor([self.guidance_scale - 1])
            timestep_cond = self.get_guidance_scale_embedding(scale, time_cond_dim).to(tensors["latents"])

        # 4. Denoise.
        num_warmup_steps = len(timesteps) - num_inference_steps * self.scheduler.order
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    break

                noise_pred = self._predict_noise(
                    t, tensors, timestep_cond, au_kwargs, negative_au_kwargs, image_embeds
                )
                tensors["latents"] = self.scheduler.step(
                    noise_pred, t, tensors["latents"], **extra_step_kwargs, return_dict=False
                )[0]

                if call.callback_on_step_end is not None:
                    callback_kwargs = {name: tensors[name] for name in call.callback_on_step_end_tensor_inputs}
                    tensors |= call.callback_on_step_end(self, i, t, callback_kwargs)

                if i == len(timesteps) - 1 or ((i + 1) > num_warmup_steps and (i + 1) % self.scheduler.order == 0):
                    progress_bar.update()

        # 5. Decode.
        images, has_nsfw_concept = tensors["latents"], None
        if call.output_type != "latent":
            images, has_nsfw_concept = self._decode(images, call.generator)
        self._check_finite(images, tensors, au_kwargs)
        if call.output_type != "latent":
            if getattr(self, "watermark", None) is not None:
                images = self.watermark.apply_watermark(images)
            do_denormalize = [not nsfw for nsfw in has_nsfw_concept or [False] * len(images)]
            images = self.image_processor.postprocess(images, call.output_type, do_denormalize)
        self.maybe_free_model_hooks()
        return images, has_nsfw_concept

    def _prepare_timesteps(self, call: SimpleNamespace, device: torch.device) -> tuple[torch.Tensor, int]:
        """The timesteps of a call, and the number of its steps."""
        return retrieve_timesteps(self.scheduler, call.num_inference_steps, device, call.timesteps, call.sigmas)

    def _predict_noise(
        self,
        t: torch.Tensor,
        tensors: dict[str, torch.Tensor],
        timestep_cond: torch.Tensor | None,
        au_kwargs: dict[str, torch.Tensor],
        negative_au_kwargs: dict[str, torch.Tensor],
        image_embeds: list[torch.Tensor] | None,
    ) -> torch.Tensor:
        """
        Predict the noise of one denoising step, with guidance. `tensors` are `latents` and what `_arrange_embeds`
        returns; with guidance, embeddings have unconditional rows and then the rows of the prompts. The others come
        from `encode_aus` and `prepare_ip_adapter_image_embeds`.
        """
        # The branches in order: without prompt and AUs (with guidance), with the prompt alone (with AU guidance), and
        # with both.
        num_branches = 1 + self.do_classifier_free_guidance + self.do_au_guidance
        latents = tensors["latents"]

        def expand(embeds: torch.Tensor) -> torch.Tensor:
            # AU guidance has two conditional branches with the same prompts.
            unconditional, conditional = embeds[: -len(latents)], embeds[-len(latents) :]
            branches = [unconditional] * self.do_classifier_free_guidance + [conditional] * (1 + self.do_au_guidance)
            return torch.cat(branches).to(tensors["prompt_embeds"].dtype)

        cross_attention_kwargs = dict(self.cross_attention_kwargs or {})
        for name, tensor in au_kwargs.items():
            cross_attention_kwargs[name] = torch.cat([negative_au_kwargs[name]] * (num_branches - 1) + [tensor])
        added_cond_kwargs = {}
        if "add_time_ids" in tensors:
            added_cond_kwargs["text_embeds"] = expand(tensors["add_text_embeds"])
            added_cond_kwargs["time_ids"] = expand(tensors["add_time_ids"])
        if image_embeds is not None:
            added_cond_kwargs["image_embeds"] = [expand(embeds) for embeds in image_embeds]
        noise_pred = self.unet(
            self.scheduler.scale_model_input(torch.cat([latents] * num_branches), t),
            t,
            encoder_hidden_states=expand(tensors["prompt_embeds"]),
            timestep_cond=timestep_cond,
            cross_attention_kwargs=cross_attention_kwargs or None,
            added_cond_kwargs=added_cond_kwargs or None,
            return_dict=False,
        )[0]

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
        return noise_pred

    def _check_finite(self, image: torch.Tensor, tensors: dict[str, torch.Tensor], au_kwargs: dict) -> None:
        """Raise a ValueError that names the likely cause if `image` holds NaN or infinity."""
        if image.isfinite().all():
            return
        damage = "whose weights are damaged or overflow in half precision."
        cause = f"the VAE, {damage}"
        if not tensors["prompt_embeds"].isfinite().all():
            cause = f"the text encoder, {damage}"
        elif not all(tensor.isfinite().all() for tensor in au_kwargs.values()):
            cause = f"the AU adapter, {damage}"
        elif not tensors["latents"].isfinite().all():
            cause = (
                "denoising: `guidance_scale`, `au_guidance_scale` or `au_scale` is too high for"
                f" {tensors['latents'].dtype}, or the {type(self.scheduler).__name__} or the weights of the UNet are"
                " not right."
            )
        raise ValueError(
            f"The picture holds numbers that are not finite. They come from {cause} Load with `dtype=torch.float32`."
        )


def _pass_arguments(method: Callable, call: SimpleNamespace, **others):
    """Call `method` with `others`, and with the arguments of `call` that it has parameters for."""
    arguments = {name: getattr(call, name) for name in inspect.signature(method).parameters if hasattr(call, name)}
    return method(**arguments, **others)


def _au_names_of(adapter: ModelMixin) -> tuple[str, ...]:
    """
    The AUs of an adapter, by default the paper's twelve. Raises a ValueError if it has no names but other than twelve
    AUs, or names that `au_columns` rejects.
    """
    names = tuple(adapter.config.au_names or action_units.AU_NAMES)
    action_units.au_columns(names)
    if adapter.config.num_aus != len(names):
        raise ValueError(
            f"The AU adapter was trained for {adapter.config.num_aus} AUs and does not name them in `au_names`. Only"
            f" the twelve of the paper need no names: {', '.join(names)}."
        )
    return names
