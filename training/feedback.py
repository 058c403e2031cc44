# SPDX-License-Identifier: Apache-2.0
"""
AU feedback: draw pictures while training, read their AUs with a frozen meter, and send the error back.

AUs explain only about a hundredth of the diffusion loss, so it teaches them slowly. A meter depends on nothing else.
The gradient of its error goes through the decoder and the denoising steps into all trained parameters, as in DRaFT
(https://huggingface.co/papers/2309.17400) and AlignProp (https://huggingface.co/papers/2310.03739). Training can
exploit the mistakes of a meter. Therefore the pictures are perturbed before the meter reads them, the diffusion loss
stays in the sum, and a different meter has to judge the result.
"""

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from torch.func import functional_call

from action_units import AU_NAMES, au_projection
from training.config import TrainConfig
from training.data import PixelInputs
from training.encoders import StableDiffusionEncoders


METER_CLASSES = {name: f"toy_faces.networks:{name}" for name in ("PictureReader", "SecondMeter")}
"""Import path of each class of meter that `ModelMixin.save_pretrained` can write, by the name of the class."""

Batch = dict[str, Tensor]
Generators = torch.Generator | list[torch.Generator] | None


def load_meter(name: str, device: torch.device | str = "cpu") -> nn.Module:
    r"""
    Load a frozen meter that reads AU intensities from pictures.

    Args:
        name (`str`):
            A folder with the `config.json` of a class in `METER_CLASSES`, or an import path `package.module:callable`.
            The callable takes no arguments and returns a `torch.nn.Module`. The module takes pictures of shape
            `(batch, 3, height, width)` in [-1, 1] and returns intensities of shape `(batch, n)` in FACS units from 0
            to 5; gradients must pass through. Its attribute `au_names` names the n AUs; without it, they are the
            paper's twelve. With the attribute `reads_latents = True`, it takes latents instead, see `AUFeedback`.

    Raises:
        FileNotFoundError: if `name` is neither a folder with a meter nor an import path.
        ValueError: if the callable does not exist or does not return a module.
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


def shake(pixel_values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """
    Perturb pictures of shape `(batch, 3, height, width)` in [-1, 1]: shift them by up to 1/64 of their height, change
    brightness and contrast, and add noise. A true expression survives this, but a pattern that only deceives the meter
    does not.
    """

    # A seed gives the same numbers on every device; without one, the device of the pictures draws faster.
    device = pixel_values.device if generator is None else generator.device

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(pixel_values)

    batch, _, height, width = pixel_values.shape
    reach = max(1, height // 64)
    top, left = torch.randint(0, 2 * reach + 1, (2,), generator=generator).tolist()
    padded = F.pad(pixel_values, (reach,) * 4, mode="replicate")
    shifted = padded[..., top : top + height, left : left + width]
    shifted = shifted * (1 + 0.05 * random(batch, 1, 1, 1)) + 0.05 * random(batch, 1, 1, 1)
    return shifted + 0.04 * random(*shifted.shape)


def shake_latents(latents: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Add noise of a fifth of their standard deviation, which is 1, to scaled latents, as `shake` does to pictures."""
    return latents + 0.2 * torch.randn(latents.shape, generator=generator).to(latents)


def appearance_change(change: Tensor, cell: int) -> Tensor:
    """
    How much an expression changes what it should leave alone. A meter does not see that: in the toy world, feedback
    alone turned brown eyes blue and darkened the skin of a strong smile. Brows, lids, lips and wrinkles are too small
    to count much here. `change`, of shape `(batch, 3, height, width)`, is pictures in [-1, 1] minus the neutral
    pictures of the first weights from the same noise, and `cell` an eighth of the height of a whole picture in pixels.

    Returns:
        `torch.Tensor` of shape `(batch,)`: the mean squared change of tone, in means of cells, plus four times that of
        colour without brightness, in means of a quarter of a cell in each direction.
    """
    luma = change.new_tensor([0.299, 0.587, 0.114])[:, None, None]
    colour = change - (luma * change).sum(1, keepdim=True)
    tone, colour = F.avg_pool2d(change, cell), F.avg_pool2d(colour, max(1, cell // 4))
    return tone.square().mean((1, 2, 3)) + 4 * colour.square().mean((1, 2, 3))


def first_weights_of(model: nn.Module) -> Callable[..., Tensor]:
    """
    Return the forward pass of `model`, without gradient, with copies of its trained parameters as they are now. It
    stays the same while the model is trained, loaded from a checkpoint or wrapped.
    """
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def forward(*args, **kwargs) -> Tensor:
        return functional_call(model, weights, args, kwargs)

    return forward


@dataclass(eq=False)
class AUFeedback:
    """
    Read the AUs of pictures that the model in training makes, and compare them with the commanded AUs.

    Raises:
        ValueError: if the meter reads none of the AUs, or an `appearance_weight` comes without `first_weights`, or
            with a meter that reads latents.
    """

    meter: nn.Module
    """From `load_meter`, on the device of the model. With `reads_latents = True`, it gets scaled latents of shape
    `(batch, channels, height, width)`, and nothing is decoded."""
    encoders: StableDiffusionEncoders
    """The frozen part of the base. The decoder is kept even if `encoders.unload` is called later."""
    scheduler: DDIMScheduler
    """The scheduler of the base. It takes `steps` deterministic steps."""
    au_names: Sequence[str]
    """The AUs of the adapter. If the meter reads sides and the adapter does not know them, both sides should show the
    commanded AU. AUs that only one of the two has are left out; `read_aus` lists the others."""
    steps: int = 4
    """Denoising steps of a picture."""
    backprop: int | None = None
    """Number of last denoising steps that carry gradient in the mode `"draw"`; None means all."""
    guidance_scale: float = 7.5
    """Guides prompt and AUs together, as in sampling, away from the empty prompt and the neutral face. The
    unconditional predictions carry no gradient."""
    mode: str = "draw"
    """Where the pictures come from: `"draw"`, `"random_step"` or `"one_step"`, as docs/training.md explains."""
    appearance_weight: float = 0.0
    """Weight of the `appearance_change` of drawn pictures, which is added to the meter's error. It costs two passes of
    the UNet without gradient for each denoising step."""
    first_weights: Callable[..., Tensor] | None = None
    """From `first_weights_of`, before the training begins: draws the neutral faces that pictures are compared with.
    Those of the weights in training would not do, because both could drift to one colour together."""

    def __post_init__(self):
        self.vae = self.encoders.vae
        self.backprop = self.steps if self.backprop is None else self.backprop
        self.reads_latents = bool(getattr(self.meter, "reads_latents", False))
        self.scheduler = DDIMScheduler.from_config(self.scheduler.config, clip_sample=False, thresholding=False)
        self.empty = self.encoders.encode_captions(self.encoders.tokenize("")[None])
        self.projection = au_projection(self.au_names, self.meter.au_names)
        if self.appearance_weight and self.reads_latents:
            raise ValueError(
                "`--au_feedback_appearance_weight` compares drawn pictures, but the meter reads latents: set it to 0."
            )
        if self.appearance_weight and self.first_weights is None:
            raise ValueError("`appearance_weight` needs `first_weights`, which draw the neutral faces.")
        self.read_aus = [name for name, row in zip(self.au_names, self.projection, strict=True) if row.any()]
        if not self.read_aus:
            known, read = ", ".join(self.au_names), ", ".join(self.meter.au_names)
            raise ValueError(f"The meter reads {read}, none of which the adapter has: {known}.")

    def batch_loss(
        self,
        model: nn.Module,
        batch: Batch,
        noisy_latents: Tensor,
        prediction: Tensor,
        num_pictures: int | None = None,
    ) -> Tensor:
        """
        The loss of the first `num_pictures` of a batch of `TrainingSamples`, by the mode. Drawn pictures are commanded
        the AUs of other rows, or one AU alone, because an expression must not depend on the person. `noisy_latents`
        and `prediction` are input and output of the model for the batch.
        """
        batch = {name: tensor[:num_pictures] for name, tensor in batch.items()}
        noisy_latents, prediction = noisy_latents[:num_pictures], prediction[:num_pictures]
        generators = [torch.Generator().manual_seed(seed) for seed in batch["feedback_seed"].tolist()]
        if self.mode == "one_step":
            aus, timesteps = batch["au_intensities"], batch["timesteps"]
            # Without its AUs, a sample teaches the prediction that guidance leads away from. Its picture still has an
            # expression, which that prediction has to explain and not to erase.
            weights = (~batch["aus_are_dropped"]).float()
            return self.one_step_loss(prediction, noisy_latents, timesteps, aus, generators, weights)
        noise = randn_tensor(noisy_latents.shape, generators, noisy_latents.device, noisy_latents.dtype)
        return self.loss(model, batch, noise, batch["commanded_aus"], generators)

    def loss(
        self, model: nn.Module, batch: Batch, noise: Tensor, au_intensities: Tensor, generator: Generators = None
    ) -> Tensor:
        """
        Mean squared error between the intensities that the meter reads from drawn pictures and the commanded
        `au_intensities` of shape `(batch, num_aus)`, in squared FACS units, plus `appearance_weight` times the change
        of appearance. `batch` has `prompt_embeds` and what `encoders.added_cond_kwargs` needs; `noise` is standard
        normal, in the shape of the latents, `(batch, channels, height, width)`. `generator` draws the perturbations of
        the pictures and the random step, on the CPU. With a generator for each picture, a picture does not depend on
        the others of its batch.
        """
        pictures = self.draw(model, batch, noise, au_intensities, generator)
        error = self.error(pictures, au_intensities, generator)
        if not self.appearance_weight:
            return error
        with torch.no_grad():
            neutral = self.draw(self.first_weights, batch, noise, torch.zeros_like(au_intensities), generator)
        change = appearance_change(pictures - neutral, max(1, pictures.shape[-2] // 8))
        return error + self.appearance_weight * change.mean()

    def one_step_loss(
        self,
        prediction: Tensor,
        noisy_latents: Tensor,
        timesteps: Tensor,
        au_intensities: Tensor,
        generator: Generators = None,
        weights: Tensor | float = 1.0,
    ) -> Tensor:
        """
        The error of `loss` for the clean pictures that a `prediction` of noise or velocity implies. The error of a
        picture has the weight `SNR / (1 + SNR)`, because an estimate from much noise is blurred, times `weights` of
        shape `(batch,)`. `noisy_latents` of shape `(batch, channels, height, width)`, `timesteps` of shape `(batch,)`
        and `au_intensities` are what the model predicted from.
        """
        signal = self.scheduler.alphas_cumprod.to(noisy_latents.device)[timesteps]  # SNR / (1 + SNR)
        alpha, sigma = (part.sqrt()[:, None, None, None] for part in (signal, 1 - signal))
        if self.scheduler.config.prediction_type == "v_prediction":
            latents = alpha * noisy_latents - sigma * prediction.float()
        else:
            latents = (noisy_latents - sigma * prediction.float()) / alpha
        return self.error(self._decode(latents), au_intensities, generator, weights * signal)

    def draw(
        self, model: Callable, batch: Batch, noise: Tensor, au_intensities: Tensor, generator: Generators = None
    ) -> Tensor:
        """
        Draw pictures of shape `(batch, 3, height, width)`, about in [-1, 1], or scaled latents for a meter that reads
        these. The arguments are those of `loss`.
        """
        # The timesteps stay on the CPU, so that no step waits for the device.
        self.scheduler.set_timesteps(self.steps)
        steps = range(self.steps)
        with_gradient = steps[self.steps - self.backprop :]
        if self.mode == "random_step":
            first = generator[0] if isinstance(generator, list) else generator
            with_gradient = [int(torch.randint(self.steps, (), generator=first))]
        empty = {name: tensor.expand(len(noise), *tensor.shape[1:]) for name, tensor in self.empty.items()}
        conditions, unconditions = self._conditions(batch), self._conditions(batch | empty)
        latents, neutral = noise * self.scheduler.init_noise_sigma, torch.zeros_like(au_intensities)
        for step, timestep in zip(steps, self.scheduler.timesteps, strict=True):
            timesteps = timestep.to(latents.device).expand(len(latents))
            with torch.set_grad_enabled(step in with_gradient and torch.is_grad_enabled()):
                prediction = model(latents, timesteps, au_intensities=au_intensities, **conditions).float()
            if self.guidance_scale > 1:
                with torch.no_grad():
                    unguided = model(latents, timesteps, au_intensities=neutral, **unconditions).float()
                prediction = unguided + self.guidance_scale * (prediction - unguided)
            latents = self.scheduler.step(prediction, timestep, latents).prev_sample
        return self._decode(latents)

    def _decode(self, latents: Tensor) -> Tensor:
        if self.reads_latents:
            return latents
        latents = (latents / self.encoders.scaling_factor).to(self.vae.dtype)
        return self.vae.decode(latents, return_dict=False)[0].float()

    def _conditions(self, batch: Batch) -> dict:
        return {"prompt_embeds": batch["prompt_embeds"], "added_cond_kwargs": self.encoders.added_cond_kwargs(batch)}

    def error(
        self,
        pictures: Tensor,
        au_intensities: Tensor,
        generator: Generators = None,
        weights: Tensor | None = None,
        au_weights: Tensor | None = None,
    ) -> Tensor:
        """
        The error of `loss` for pictures that are there. `weights` of shape `(batch,)`, and `au_weights` in the shape
        of `au_intensities`, are 1 by default.
        """
        generators = generator if isinstance(generator, list) else [generator]
        parts = zip(pictures.chunk(len(generators)), generators, strict=True)
        perturb = shake_latents if self.reads_latents else shake
        shaken = torch.cat([perturb(part, generator) for part, generator in parts])
        projection = self.projection.to(au_intensities)
        squares = (self.meter(shaken) - au_intensities @ projection).square()
        if au_weights is not None:
            squares = squares * (au_weights @ projection)
        # Only the AUs that both the meter and the adapter have count.
        errors = squares[:, projection.any(0)].mean(1)
        return (errors if weights is None else weights * errors).mean()


def check_meter(meter: nn.Module, picture: Tensor) -> None:
    """
    Let a meter read one picture, or latents, of shape `(1, channels, height, width)`. Raises a ValueError if it does
    not return an intensity for each of its AUs, or no gradient passes through it.
    """
    read = meter(picture.requires_grad_())
    if getattr(read, "shape", None) != (1, len(meter.au_names)):
        what = f"a tensor of shape {tuple(read.shape)}" if isinstance(read, torch.Tensor) else type(read).__name__
        raise ValueError(
            f"For one picture, the meter returned {what}, but has to return a tensor of shape"
            f" (1, {len(meter.au_names)}) for its `au_names`, {', '.join(meter.au_names)}."
        )
    if not read.requires_grad:
        raise ValueError(
            "No gradient passes through the meter, so it could teach nothing. Its `forward` has to compute with torch"
            " alone, without `torch.no_grad`, `detach` or numpy."
        )


def make_feedback(
    config: TrainConfig, meter: nn.Module | None, model: nn.Module, inputs: PixelInputs, au_names: Sequence[str]
) -> AUFeedback | None:
    """
    Make the feedback of the flags `--au_feedback_…` for pictures in the size of `inputs`, or return None without a
    meter. `model` is as the training begins with it, before a checkpoint is loaded. Raises the errors of `check_meter`
    and `AUFeedback`.
    """
    if meter is None:
        return None
    encoders, side = inputs.encoders, inputs.resolution
    shape = inputs.latents_shape if getattr(meter, "reads_latents", False) else (3, side, side)
    check_meter(meter, torch.zeros(1, *shape, device=encoders.vae.device))
    if config.gradient_checkpointing:
        encoders.vae.enable_gradient_checkpointing()
    scheduler = DDIMScheduler.from_pretrained(
        config.pretrained_model_name_or_path, subfolder="scheduler", revision=config.revision
    )
    options = ("steps", "backprop", "guidance_scale", "mode", "appearance_weight")
    options = {name: getattr(config, f"au_feedback_{name}") for name in options}
    first_weights = first_weights_of(model) if config.au_feedback_appearance_weight else None
    return AUFeedback(meter, encoders, scheduler, au_names, **options, first_weights=first_weights)
