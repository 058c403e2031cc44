# SPDX-License-Identifier: Apache-2.0
"""
Gives the face in a photograph another expression: the region of the face is drawn anew with AUs (inpainting), at the
size that suits the model, and pasted back. Every pixel outside the region stays as it is.
"""

import copy
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import PNDMScheduler
from PIL import Image, ImageDraw, ImageFilter, ImageOps, UnidentifiedImageError
from torch import nn

from au_attention_processor import read_au_masks
from pipeline_fineface import FineFacePipeline


Box = tuple[int, int, int, int]
"""Left, top, right, bottom, in pixels."""

# Models are trained on portraits, whose side is about this many times that of the face.
SURROUNDINGS = 1.4
MAX_PHOTO_PIXELS = 50_000_000
NO_DETECTOR = "Faces are found by themselves where scikit-image is installed: pip install scikit-image."


def open_photo(path: Path | str) -> Image.Image:
    """
    A picture in RGB, turned as its EXIF data say.

    Raises:
        OSError: if there is no such file, or it is damaged.
        ValueError: if it is no picture, or has more than `MAX_PHOTO_PIXELS`.
    """
    name = Path(path).name
    try:
        with Image.open(path) as file:
            if file.width * file.height > MAX_PHOTO_PIXELS:
                raise ValueError(
                    f"{name} has {file.width} × {file.height} pixels, and {MAX_PHOTO_PIXELS // 10**6} million are"
                    " allowed. Make it smaller."
                )
            return ImageOps.exif_transpose(file).convert("RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        # The name alone, because the screen does not show where a server keeps uploads.
        raise ValueError(f"{name} is no picture that can be read.") from error


def has_detector() -> bool:
    return importlib.util.find_spec("skimage") is not None


def find_faces(picture: Image.Image) -> list[Box]:
    """
    Find the faces in a picture that look at the camera, with the detector (a cascade of local binary patterns) that
    comes with scikit-image. Returns the boxes around them, the largest first.

    Raises:
        ValueError: if scikit-image is not installed.
    """
    if not has_detector():
        raise ValueError(NO_DETECTOR)
    import numpy as np
    from skimage.data import lbp_frontal_face_cascade_filename
    from skimage.feature import Cascade

    # The detector finds every face that is large enough for editing at this size.
    scale = min(1.0, 640 / max(picture.size))
    small = picture.convert("RGB").resize([max(1, round(scale * side)) for side in picture.size])
    smallest, largest = max(24, min(small.size) // 10), min(small.size)
    found = Cascade(lbp_frontal_face_cascade_filename()).detect_multi_scale(
        np.asarray(small), scale_factor=1.15, step_ratio=1, min_size=(smallest,) * 2, max_size=(largest,) * 2
    )
    boxes = []
    for face in sorted(found, key=lambda face: -face["width"] * face["height"]):
        left, top, width, height = (face[name] / scale for name in ("c", "r", "width", "height"))
        # The detector leaves out forehead and chin, which move too.
        box = left, top - height / 8, left + width, top + height * 9 / 8
        boxes.append(clip_box(box, picture.size))
    return boxes


def clip_box(box, size: tuple[int, int]) -> Box:
    """Round `box` to whole pixels, and cut off what lies outside a picture of `size`."""
    left, top, right, bottom = (round(value) for value in box)
    return max(0, left), max(0, top), min(size[0], right), min(size[1], bottom)


def check_box(box, size: tuple[int, int], label: str = "box") -> Box:
    """
    Return the part of `box` inside a picture of `size` (width, height).

    Raises:
        ValueError: if `box` is not four numbers, or less than 16 × 16 pixels of it lie inside the picture.
    """
    if len(box) != 4 or not all(value is not None and math.isfinite(value) for value in box):
        raise ValueError(f"`{label}` is incomplete. It needs left, top, right and bottom, in pixels.")
    clipped = clip_box(box, size)
    if clipped[2] - clipped[0] < 16 or clipped[3] - clipped[1] < 16:
        raise ValueError(
            f"`{label}` is {', '.join(f'{value:g}' for value in box)} (left, top, right, bottom), which lies outside"
            f" the picture of {size[0]} × {size[1]} pixels, or holds less than 16 × 16 of them."
        )
    return clipped


def check_mask(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The mask. Raises a ValueError if it has another size than the picture, or is black everywhere."""
    if mask.size != size:
        raise ValueError("The mask has {} × {} pixels, but the picture has {} × {}.".format(*mask.size, *size))
    if not mask.getbbox():
        raise ValueError("The mask is black, so nothing is to be drawn. It is white where the face is.")
    return mask


def face_mask(size: tuple[int, int], box: Box, feather: float = 0.04) -> Image.Image:
    """
    Draw the shape of a face in `box`, white on black (mode `"L"`). Its edge fades inwards over `feather` times the
    shorter side of the box, so that everything outside the box is black.
    """
    shorter = min(box[2] - box[0], box[3] - box[1])
    edge = feather * shorter
    left, top, right, bottom = box[0] + 2 * edge, box[1] + 2 * edge, box[2] - 2 * edge, box[3] - 2 * edge
    mask = Image.new("L", size)
    draw = ImageDraw.Draw(mask)
    draw.ellipse((left, top, right, bottom), fill=255)
    # An ellipse alone would cut the outer ends of the brows, and leave them no room to rise.
    upper_half = (left, top, right, (top + bottom) / 2)
    draw.rounded_rectangle(upper_half, shorter / 4, fill=255, corners=(True, True, False, False))
    inside = Image.new("L", size)
    ImageDraw.Draw(inside).rectangle(box, fill=255)
    return Image.composite(mask.filter(ImageFilter.GaussianBlur(edge)), Image.new("L", size), inside)


@torch.no_grad()
def edit_photo(
    pipe: FineFacePipeline,
    picture: Image.Image,
    mask: Image.Image,
    prompt: str,
    aus,
    side: int | None = None,
    strength: float = 0.8,
    seed: int = 0,
    num_inference_steps: int = 50,
    on_step: Callable[[int], None] = lambda step: None,
    **call_kwargs,
) -> Image.Image:
    """
    Give the face where `mask` is white the expression `aus`. The model, which may be a `FineFaceXLPipeline`, draws
    the region around the mask at the size that suits it, and the result is scaled back and pasted in. Where `mask` is
    black, every pixel stays as it is.

    Args:
        picture, mask (`Image.Image`):
            Two pictures of the same size, which may be any.
        side (`int`, *optional*):
            The longer side of the region while the model draws it, in pixels, a multiple of 8; by default the size for
            which the model was made.
        strength (`float`, defaults to 0.8):
            Share of the denoising steps that are drawn, the last ones, in (0, 1].
        on_step (`Callable`):
            Called with the number of finished denoising steps. Those that are not drawn count as finished.
        prompt, aus, num_inference_steps, call_kwargs:
            See [`FineFacePipeline.__call__`]. With `aus=None` the region is only drawn anew.

    Raises:
        ValueError: if an argument is wrong.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"`strength` has to be above 0 and up to 1, but is {strength!r}.")
    side = side or pipe.unet.config.sample_size * pipe.vae_scale_factor
    region = surroundings(check_mask(mask, picture.size).getbbox(), picture.size)
    part, part_mask = picture.convert("RGB").crop(region), mask.crop(region)
    # The model draws in blocks of 8 pixels.
    width, height = (max(8, 8 * round(side * length / max(part.size) / 8)) for length in part.size)
    resample = Image.Resampling.LANCZOS
    latents = encode(pipe, part.resize((width, height), resample))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    inside = read_au_masks(part_mask, 1, tuple(latents.shape[-2:])).to(latents)
    first_step = num_inference_steps - max(1, round(num_inference_steps * strength))
    # A copy shares models and scheduler, so calls of both still wait for each other.
    late_pipe, timesteps = copy.copy(pipe), torch.empty(0)

    def begin_late(call, device: torch.device) -> tuple[torch.Tensor, int]:
        """The timesteps from `first_step` on. Before, the latents are the picture with the noise of this timestep."""
        nonlocal timesteps
        timesteps, _ = pipe._prepare_timesteps(call, device)
        if first_step > 0:
            start, repeats = first_step * pipe.scheduler.order, isinstance(pipe.scheduler, PNDMScheduler)
            # PNDM makes its first step twice, for which it wants the second timestep twice.
            timesteps = torch.cat([timesteps[start : start + 2], timesteps[start + 2 - repeats :]])
            if hasattr(pipe.scheduler, "set_begin_index"):
                pipe.scheduler.set_begin_index(start)
            call.latents = pipe.scheduler.add_noise(latents, noise, timesteps[:1]) / pipe.scheduler.init_noise_sigma
        return timesteps, num_inference_steps - first_step

    def keep_picture(pipe, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        """Outside the mask, replace what is drawn by the picture with the noise of this step, so the face fits in."""
        on_step(first_step + step + 1)
        next_timestep = timesteps[step + 1 : step + 2]
        kept = pipe.scheduler.add_noise(latents, noise, next_timestep) if len(next_timestep) else latents
        return {"latents": kept + inside * (tensors["latents"] - kept)}

    late_pipe._prepare_timesteps = begin_late
    drawn = late_pipe(
        prompt,
        aus=aus,
        height=height,
        width=width,
        num_inference_steps=num_inference_steps,
        latents=noise,
        generator=generator,
        callback_on_step_end=keep_picture,
        **call_kwargs,
    ).images[0]
    edited = picture.convert("RGB")
    edited.paste(drawn.resize(part.size, resample), region[:2], part_mask)
    return edited


def surroundings(box: Box, size: tuple[int, int]) -> Box:
    """The square of a portrait of the face in `box`, as far as it lies inside a picture of `size`."""
    side = SURROUNDINGS * max(box[2] - box[0], box[3] - box[1])
    # A picture that is a portrait itself is not cut. In a cut that is slightly too tight, the model would draw brows
    # and eyes where they are in portraits, beside those that are kept.
    if side > 0.75 * min(size):
        side = max(side, min(size))
    region = []
    for low, high, length in ((box[0], box[2], size[0]), (box[1], box[3], size[1])):
        extent = min(length, max(round(side), high - low))
        # At an edge of the picture, the square moves inwards.
        start = min(max(0, round((low + high - extent) / 2)), length - extent)
        region.append((start, start + extent))
    (left, right), (top, bottom) = region
    return left, top, right, bottom


def encode(pipe: FineFacePipeline, picture: Image.Image) -> torch.Tensor:
    """
    The latents of a picture, of shape (1, channels, height / 8, width / 8). In `float16` the VAE of SDXL overflows,
    unless its config says otherwise.
    """
    vae, dtype = pipe.vae, pipe.vae.dtype
    overflows = hasattr(pipe, "text_encoder_2") and dtype == torch.float16 and vae.config.force_upcast
    # `ModelMixin.to` logs a warning on casts.
    nn.Module.to(vae, torch.float32 if overflows else dtype)
    try:
        pixel_values = pipe.image_processor.preprocess(picture).to(vae.device, vae.dtype)
        latents = vae.encode(pixel_values).latent_dist.mode()
    finally:
        nn.Module.to(vae, dtype)
    if getattr(vae.config, "latents_mean", None) is not None and getattr(vae.config, "latents_std", None) is not None:
        shape = (1, -1, 1, 1)
        latents = latents - latents.new_tensor(vae.config.latents_mean).view(shape)
        latents = latents / latents.new_tensor(vae.config.latents_std).view(shape)
    return (latents * vae.config.scaling_factor).to(dtype)
