# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
AU feedback: draw pictures while training, read their AUs with a frozen meter, and send the error back.

The diffusion loss hardly feels AUs: they explain about a hundredth of it. A meter feels nothing else. The gradient of
its error goes through the decoder and through the denoising steps into everything that is trained, as in DRaFT
(https://huggingface.co/papers/2309.17400) and AlignProp (https://huggingface.co/papers/2310.03739). A meter can be
cheated, so the pictures are shaken before it sees them, the diffusion loss goes on beside it, and another meter than
this one has to judge the result.
"""

import importlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import nn

from action_units import AU_NAMES, au_projection
from training.config import TrainConfig
from training.encoders import StableDiffusionEncoders


METER_CLASSES = {
    "PictureReader": "toy_faces.networks:PictureReader",
    "SecondMeter": "toy_faces.networks:SecondMeter",
}
"""Where the classes of meters that `ModelMixin.save_pretrained` wrote are defined, by their names."""


def load_meter(name: str, device: torch.device | str = "cpu") -> nn.Module:
    r"""
    Load a frozen meter that reads AU intensities from pictures.

    Args:
        name (`str`):
            A folder with the `config.json` of a class in `METER_CLASSES`, or `package.module:callable`. The callable
            takes nothing and returns a `torch.nn.Module` that takes pictures, `(batch, 3, height, width)` in [-1, 1],
            and returns intensities, `(batch, n)` in FACS units from 0 to 5, differentiably. Its attribute `au_names`
            names the n AUs; without it, they are the paper's twelve.

    Raises:
        FileNotFoundError: if `name` is neither a folder with a meter nor an import path.
        ValueError: if the callable is not there or returns something else than a module.
    """
    folder = Path(name)
    if (folder / "config.json").is_file():
        class_name = json.loads((folder / "config.json").read_text())["_class_name"]
        if class_name not in METER_CLASSES:
            raise ValueError(
                f"{name!r} holds a {class_name}, which is no meter. Meters are {', '.join(METER_CLASSES)}; any other"
                " network is named by its import path, `package.module:callable`."
            )
        meter = _import(METER_CLASSES[class_name]).from_pretrained(folder, dtype=torch.float32)
        meter.au_names = tuple(meter.config.au_names or AU_NAMES)
    elif ":" in name:
        meter = _import(name)()
        if not isinstance(meter, nn.Module):
            raise ValueError(f"{name!r} returned a {type(meter).__name__}, but a meter is a torch.nn.Module.")
        meter.au_names = tuple(getattr(meter, "au_names", AU_NAMES))
    else:
        raise FileNotFoundError(
            f"{name!r} is neither a folder with a meter nor an import path such as `package.module:callable`."
        )
    return meter.to(device).eval().requires_grad_(False)


def _import(path: str):
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{path!r} cannot be imported: {error}.") from error


def shake(pixel_values: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """
    Pictures `(batch, 3, height, width)` in [-1, 1], shifted by up to a sixty-fourth of their size, with another
    brightness and contrast and some noise: what a meter must not depend on, and a picture cannot be fitted to.
    """

    def random(*shape: int) -> torch.Tensor:
        # On the CPU, where a seed gives the same numbers whatever the device.
        return torch.randn(*shape, generator=generator).to(pixel_values)

    batch, _, height, width = pixel_values.shape
    reach = max(1, height // 64)
    top, left = torch.randint(0, 2 * reach + 1, (2,), generator=generator).tolist()
    padded = F.pad(pixel_values, (reach,) * 4, mode="replicate")
    shifted = padded[..., top : top + height, left : left + width]
    shifted = shifted * (1 + 0.05 * random(batch, 1, 1, 1)) + 0.05 * random(batch, 1, 1, 1)
    return shifted + 0.04 * random(*shifted.shape)


class AUFeedback:
    r"""
    Draws pictures with the model that is trained, and compares their AUs with the commanded ones.

    Args:
        meters (`list[nn.Module]`):
            From `load_meter`, on the device of the model. Several are averaged: it is harder to cheat all of them.
        encoders (`StableDiffusionEncoders`):
            The frozen part of the base. Its decoder is kept, also if `encoders.unload` is called later.
        scheduler (`DDIMScheduler`):
            Of the base. It takes `steps` deterministic steps.
        au_names (`tuple[str, ...]`):
            The AUs of the adapter. A meter that reads sides is asked for both sides alike; AUs that only one of the
            two has are left out.
        steps (`int`):
            Denoising steps of a picture.
        backprop (`int`, *optional*):
            How many of them, the last ones, carry gradient; by default all.
        guidance_scale (`float`):
            As in sampling: prompt and AUs together, away from the empty prompt and the neutral face. The
            unconditional predictions carry no gradient.

    Raises:
        ValueError: if `backprop` is larger than `steps`, or a meter reads none of the AUs.
    """

    def __init__(
        self,
        meters: list[nn.Module],
        encoders: StableDiffusionEncoders,
        scheduler: DDIMScheduler,
        au_names: Sequence[str],
        steps: int = 4,
        backprop: int | None = None,
        guidance_scale: float = 7.5,
    ):
        self.meters, self.encoders, self.vae, self.steps = meters, encoders, encoders.vae, steps
        self.backprop, self.guidance_scale = steps if backprop is None else backprop, guidance_scale
        self.scheduler = DDIMScheduler.from_config(scheduler.config, clip_sample=False, thresholding=False)
        self.empty = encoders.encode_captions(encoders.tokenize("")[None])
        self.projections = [au_projection(au_names, meter.au_names) for meter in meters]
        if self.backprop > steps:
            raise ValueError(
                f"`--au_feedback_backprop` has to be at most `--au_feedback_steps`, {steps}, but is {backprop}."
            )
        for meter, projection in zip(meters, self.projections, strict=True):
            if not projection.any():
                raise ValueError(
                    f"The meter reads {', '.join(meter.au_names)}, none of which the adapter has:"
                    f" {', '.join(au_names)}."
                )

    def loss(
        self,
        model: nn.Module,
        batch: dict[str, torch.Tensor],
        noise: torch.Tensor,
        au_intensities: torch.Tensor,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """
        Mean squared error, in FACS intensity units, between what the meters read and what was commanded.

        Args:
            model: is called as `FineFaceModel.forward`.
            batch: has `prompt_embeds`, and what else `encoders.added_cond_kwargs` takes from it.
            noise: has the shape of the latents.
            au_intensities: the commanded ones, `(batch, number of AUs)`.
            generator: draws on the CPU how the pictures are shaken.
        """
        return self.error(self.draw(model, batch, noise, au_intensities), au_intensities, generator)

    def draw(
        self, model: nn.Module, batch: dict[str, torch.Tensor], noise: torch.Tensor, au_intensities: torch.Tensor
    ) -> torch.Tensor:
        """Pictures `(batch, 3, height, width)`, about [-1, 1], differentiable in what is trained. As `loss` takes."""
        # The scheduler computes on the CPU, so that no step waits for the device.
        self.scheduler.set_timesteps(self.steps)
        empty = {name: tensor.expand(len(noise), *tensor.shape[1:]) for name, tensor in self.empty.items()}
        conditions, unconditions = self._conditions(batch), self._conditions(batch | empty)
        latents, neutral = noise * self.scheduler.init_noise_sigma, torch.zeros_like(au_intensities)
        for remaining, timestep in zip(range(self.steps, 0, -1), self.scheduler.timesteps, strict=True):
            timesteps = timestep.to(latents.device).expand(len(latents))
            with torch.set_grad_enabled(remaining <= self.backprop and torch.is_grad_enabled()):
                prediction = model(latents, timesteps, au_intensities=au_intensities, **conditions).float()
                if self.guidance_scale > 1:
                    with torch.no_grad():
                        unguided = model(latents, timesteps, au_intensities=neutral, **unconditions).float()
                    prediction = unguided + self.guidance_scale * (prediction - unguided)
                latents = self.scheduler.step(prediction, timestep, latents).prev_sample
        latents = (latents / self.encoders.scaling_factor).to(self.vae.dtype)
        return self.vae.decode(latents, return_dict=False)[0].float()

    def _conditions(self, batch: dict[str, torch.Tensor]) -> dict:
        return {
            "prompt_embeds": batch["prompt_embeds"],
            "added_cond_kwargs": self.encoders.added_cond_kwargs(batch),
        }

    def error(
        self, pictures: torch.Tensor, au_intensities: torch.Tensor, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """As `loss`, of pictures that are there already."""
        shaken = shake(pictures, generator)
        errors = []
        for meter, projection in zip(self.meters, self.projections, strict=True):
            projection = projection.to(au_intensities)
            # What a meter reads beyond the AUs of the adapter was not commanded.
            commanded = projection.any(0)
            errors.append((meter(shaken) - au_intensities @ projection)[:, commanded].square().mean())
        return torch.stack(errors).mean()


def make_feedback(
    config: TrainConfig, encoders: StableDiffusionEncoders, au_names: Sequence[str], device: torch.device
) -> AUFeedback | None:
    """The feedback that the flags `--au_feedback_…` ask for, or None without a meter."""
    if config.au_feedback_meter is None:
        return None
    if config.gradient_checkpointing:
        encoders.vae.enable_gradient_checkpointing()
    scheduler = DDIMScheduler.from_pretrained(
        config.pretrained_model_name_or_path, subfolder="scheduler", revision=config.revision
    )
    return AUFeedback(
        [load_meter(config.au_feedback_meter, device)],
        encoders,
        scheduler,
        au_names,
        config.au_feedback_steps,
        config.au_feedback_backprop,
        config.au_feedback_guidance_scale,
    )


def feedback_generator(seed: int, step: int, first_row: int) -> torch.Generator:
    """On the CPU, from what names a batch alone: a run that is resumed draws what it would have drawn."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, step, first_row)).generate_state(1)[0]))
