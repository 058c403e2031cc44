# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
Another expression on the face of a photograph: the region of the face is drawn anew with AUs (inpainting), at the size
that suits the model, and pasted back. Every pixel outside the region stays as it is.
"""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps, UnidentifiedImageError

from au_attention_processor import read_au_masks
from pipeline_fineface import FineFacePipeline


Box = tuple[int, int, int, int]
"""Left, top, right, bottom, in pixels."""

# The fields of a `Job` that go to the pipeline as they are.
SAMPLING = ("num_inference_steps", "guidance_scale", "au_guidance_scale", "au_scale")
# How much of a picture a face fills in what the models were trained on.
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
        # Where a server keeps uploads is nothing for the screen.
        raise ValueError(f"{name} is no picture that can be read.") from error


def has_detector() -> bool:
    return importlib.util.find_spec("skimage") is not None


def find_faces(picture: Image.Image) -> list[Box]:
    """
    Boxes around the faces in a picture that look at the camera, the largest first, by the detector (a cascade of local
    binary patterns) that comes with scikit-image.

    Raises:
        ValueError: if scikit-image is not installed.
    """
    if not has_detector():
        raise ValueError(NO_DETECTOR)
    import numpy as np
    from skimage.data import lbp_frontal_face_cascade_filename
    from skimage.feature import Cascade

    # The detector needs no more than this to find a face that is worth editing.
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
    """`box` in whole pixels, as far as it lies inside a picture of `size`."""
    left, top, right, bottom = (round(value) for value in box)
    return max(0, left), max(0, top), min(size[0], right), min(size[1], bottom)


def check_box(box, size: tuple[int, int], label: str = "box") -> Box:
    """
    `box` as far as it lies inside a picture of `size`.

    Raises:
        ValueError: if there are no four numbers, or less than 16 × 16 pixels of the box lie inside the picture.
    """
    is_complete = len(box) == 4 and all(value is not None and math.isfinite(value) for value in box)
    if not is_complete:
        raise ValueError(f"`{label}` is incomplete. It needs left, top, right and bottom, in pixels.")
    clipped = clip_box(box, size)
    if clipped[2] - clipped[0] < 16 or clipped[3] - clipped[1] < 16:
        raise ValueError(
            f"`{label}` is {', '.join(f'{value:g}' for value in box)} (left, top, right, bottom), which lies outside"
            f" the picture of {size[0]} × {size[1]} pixels, or holds less than 16 × 16 of them."
        )
    return clipped


def face_mask(size: tuple[int, int], box: Box, feather: float = 0.04) -> Image.Image:
    """
    A white ellipse in `box` on black, `"L"`. Its edge, as wide as `feather` times the box, fades inwards, so that
    nothing outside the box is white.
    """
    left, top, right, bottom = box
    edge = feather * min(right - left, bottom - top)
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).ellipse((left + 2 * edge, top + 2 * edge, right - 2 * edge, bottom - 2 * edge), fill=255)
    inside = Image.new("L", size)
    ImageDraw.Draw(inside).rectangle(box, fill=255)
    return Image.composite(mask.filter(ImageFilter.GaussianBlur(edge)), Image.new("L", size), inside)


def edit_photo(
    pipe: FineFacePipeline,
    picture: Image.Image,
    mask: Image.Image,
    prompt: str,
    aus,
    side: int | None = None,
    **kwargs,
) -> Image.Image:
    """
    `picture` with the expression `aus` where `mask` is white. The model sees the region around the mask, with a side
    of `side` pixels; what it draws is scaled back.

    Args:
        picture, mask (`Image.Image`):
            Of one size, which may be any.
        side (`int`, *optional*):
            A multiple of 8; by default the size for which the model was made.
        prompt, aus, kwargs:
            See [`edit_expression`].
    """
    side = side or pipe.unet.config.sample_size * pipe.vae_scale_factor
    region = surroundings(mask.getbbox(), picture.size)
    width, height = region[2] - region[0], region[3] - region[1]
    scale = side / max(width, height)
    # The model draws in blocks of 8 pixels.
    size = tuple(max(8, 8 * round(scale * length / 8)) for length in (width, height))
    part, part_mask = picture.convert("RGB").crop(region), mask.crop(region)
    resample = Image.Resampling.LANCZOS
    small = edit_expression(pipe, part.resize(size, resample), part_mask.resize(size, resample), prompt, aus, **kwargs)
    edited = picture.convert("RGB")
    edited.paste(small.resize(part.size, resample), region[:2], part_mask)
    return edited


def surroundings(box: Box, size: tuple[int, int]) -> Box:
    """The square around `box` that a portrait of it would show, as far as it lies inside a picture of `size`."""
    side = SURROUNDINGS * max(box[2] - box[0], box[3] - box[1])
    region = []
    for low, high, length in ((box[0], box[2], size[0]), (box[1], box[3], size[1])):
        extent = min(length, max(round(side), high - low))
        # At an edge of the picture, the square moves inwards.
        start = min(max(0, round((low + high - extent) / 2)), length - extent)
        region.append((start, start + extent))
    (left, right), (top, bottom) = region
    return left, top, right, bottom


@torch.no_grad()
def edit_expression(
    pipe: FineFacePipeline,
    picture: Image.Image,
    mask: Image.Image,
    prompt: str,
    aus,
    strength: float = 0.8,
    seed: int = 0,
    num_inference_steps: int = 50,
    on_step: Callable[[int], None] = lambda step: None,
    **call_kwargs,
) -> Image.Image:
    """
    `picture` with the expression `aus` where `mask` is white; where it is black, equal to `picture` in every pixel.

    Args:
        picture, mask (`Image.Image`):
            Of one size, with sides that are multiples of 8.
        strength (`float`, defaults to 0.8):
            Share of the denoising steps in which the face may leave the old one, in (0, 1].
        on_step (`Callable`):
            Is called with the number of denoising steps that are done.
        prompt, aus, num_inference_steps, call_kwargs:
            See [`FineFacePipeline.__call__`]. With `aus=None` the region is only drawn anew.
    """
    picture = picture.convert("RGB")
    pixel_values = pipe.image_processor.preprocess(picture).to(pipe.vae.device, pipe.vae.dtype)
    latents = pipe.vae.encode(pixel_values).latent_dist.mode() * pipe.vae.config.scaling_factor
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    inside = read_au_masks(mask, 1, tuple(latents.shape[-2:])).to(latents)
    first_step = num_inference_steps - max(1, round(num_inference_steps * strength))
    edited = pipe(
        prompt,
        aus=aus,
        height=picture.height,
        width=picture.width,
        num_inference_steps=num_inference_steps,
        latents=noise,
        generator=generator,
        callback_on_step_end=keep_picture(latents, noise, inside, first_step, on_step),
        **call_kwargs,
    ).images[0]
    return Image.composite(edited, picture, mask)


def keep_picture(
    latents: torch.Tensor,
    noise: torch.Tensor,
    inside: torch.Tensor,
    first_step: int,
    on_step: Callable[[int], None] = lambda step: None,
) -> Callable:
    """
    A callback that puts `latents`, as noisy as those of the step, in the place of what is drawn: where `inside` is 0,
    so that the face fits in, and before `first_step` everywhere. The noise is that from which the drawing begins, so
    the two belong together at every step.
    """

    def callback(pipe: FineFacePipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        on_step(step + 1)
        next_timestep = pipe.scheduler.timesteps[step + 1 : step + 2]
        kept = pipe.scheduler.add_noise(latents, noise, next_timestep) if len(next_timestep) else latents
        return {"latents": kept if step < first_step else kept + inside * (tensors["latents"] - kept)}

    return callback
