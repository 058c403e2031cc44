# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
Give the face of a picture another expression: the region of the face is drawn anew with AUs (inpainting), and every
pixel outside it stays as it is. Without --model, the toy model draws.

  python -m examples.edit_expression portrait.png --box 24,24,104,116 --aus "6C+12E" --output smiling.png
      --prompt "a closeup of a woman with long brown hair and tan skin in a park"

The more of --strength, the more the region may change: at 1 nothing but its surroundings is left of the old face.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from au_attention_processor import read_au_masks
from drawing.files import write_picture
from drawing.jobs import make_job, read_model_defaults
from drawing.model import Weights, check_weights, load_pipeline, quiet
from pipeline_fineface import FineFacePipeline
from program import TOY_MODEL, Parser, check_output, pick_device, run_program, spell_option


SAMPLING = ("num_inference_steps", "guidance_scale", "au_guidance_scale", "au_scale")


def face_mask(size: tuple[int, int], box: tuple[int, int, int, int], feather: float = 0.04) -> Image.Image:
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
    **call_kwargs,
) -> Image.Image:
    """
    `picture` with the expression `aus` where `mask` is white; where it is black, equal to `picture` in every pixel.

    Args:
        picture, mask (`Image.Image`):
            Of one size, with sides that are multiples of 8.
        strength (`float`, defaults to 0.8):
            Share of the denoising steps in which the face may leave the old one, in (0, 1].
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
        callback_on_step_end=keep_picture(latents, noise, inside, first_step),
        **call_kwargs,
    ).images[0]
    return Image.composite(edited, picture, mask)


def keep_picture(latents: torch.Tensor, noise: torch.Tensor, inside: torch.Tensor, first_step: int) -> Callable:
    """
    A callback that puts `latents`, as noisy as those of the step, in the place of what is drawn: where `inside` is 0,
    so that the face fits in, and before `first_step` everywhere. The noise is that from which the drawing begins, so
    the two belong together at every step.
    """

    def callback(pipe: FineFacePipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        next_timestep = pipe.scheduler.timesteps[step + 1 : step + 2]
        kept = pipe.scheduler.add_noise(latents, noise, next_timestep) if len(next_timestep) else latents
        return {"latents": kept if step < first_step else kept + inside * (tensors["latents"] - kept)}

    return callback


def read_box(text: str) -> tuple[int, ...]:
    box = tuple(int(number) for number in text.split(","))
    if len(box) != 4 or not (0 <= box[0] < box[2] and 0 <= box[1] < box[3]):
        raise ValueError
    return box


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--aus", required=True, help='the new expression: "AU6=2.5 AU12=5", "6C+12D", a preset')
    parser.add_argument("--prompt", required=True, help="what the picture shows, apart from the expression")
    region = parser.add_mutually_exclusive_group(required=True)
    region.add_argument("--box", type=read_box, metavar="LEFT,TOP,RIGHT,BOTTOM", help="around the face, in pixels")
    region.add_argument("--mask", type=Path, help="a picture of the same size, white where the face is")
    parser.add_argument("--output", required=True, type=Path, help="PNG file")
    parser.add_argument("--strength", type=float, default=0.8, help="how much may change, up to 1 (default: 0.8)")
    parser.add_argument("--au-scale", type=float, help="how strongly the AUs are added (default: 1)")
    parser.add_argument("--guidance-scale", type=float, help="of the prompt (default: the model's, else 7.5)")
    parser.add_argument("--au-guidance-scale", type=float, help="of the AUs (default: the model's, else the prompt's)")
    parser.add_argument("--num-inference-steps", type=int, help="denoising steps (default: the model's, else 50)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default=str(TOY_MODEL), help="folder or Hub id (default: the toy model)")
    parser.add_argument("--adapter", help="folder or Hub id of the AU adapter (default: the one beside the model)")
    parser.add_argument("--device", help="as torch names it (default: the accelerator, if there is one)")
    return parser.parse_args(argv)


def read_picture_and_mask(args: argparse.Namespace) -> tuple[Image.Image, Image.Image]:
    with Image.open(args.picture) as file:
        picture = ImageOps.exif_transpose(file).convert("RGB")
    if picture.width % 8 or picture.height % 8:
        raise ValueError(f"{str(args.picture)!r} has {picture.size} pixels. Crop it: sides have to be multiples of 8.")
    if args.mask is None:
        mask = face_mask(picture.size, args.box)
    else:
        with Image.open(args.mask) as file:
            mask = file.convert("L")
    if mask.size != picture.size:
        raise ValueError(f"The mask has {mask.size} pixels, but the picture has {picture.size}.")
    if not mask.getextrema()[1]:
        raise ValueError(f"Nothing is to be drawn: the {'mask is black' if args.mask else 'box lies outside'}.")
    return picture, mask


def run(args: argparse.Namespace) -> Path:
    weights = Weights(args.model, args.adapter)
    check_weights(weights)
    check_output(args.output)
    if not 0 < args.strength <= 1:
        raise ValueError(f"`--strength` has to be above 0 and up to 1, but is {args.strength}.")
    device = pick_device(args.device)
    picture, mask = read_picture_and_mask(args)
    given = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    options = {name: value for name, value in read_model_defaults(args.model).items() if name in SAMPLING} | given
    job = make_job({"prompt": args.prompt, "aus": args.aus, "seed": args.seed, **options}, spell_option)
    with quiet():
        pipe = load_pipeline(weights, device, torch.float32 if device.type == "cpu" else torch.float16)
    edited = edit_expression(pipe, picture, mask, job.prompt, job.aus, args.strength, args.seed, **options)
    about = {"picture": args.picture.name, "strength": args.strength}
    write_picture(edited, args.output, asdict(job) | about)
    return args.output


def main(argv: list[str] | None = None) -> int:
    return run_program(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
