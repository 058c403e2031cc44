# SPDX-License-Identifier: Apache-2.0
"""
Gives the face of a picture another expression: the region of the face is drawn anew with AUs (inpainting), and every
pixel outside it stays as it is. Without --model, the toy model draws. Without --box and --mask, the face is searched
for, if scikit-image is installed.

  python -m examples.edit_expression portrait.png --box 24,24,104,116 --aus "6C+12E" --output smiling.png
      --prompt "a closeup of a woman with long brown hair and tan skin in a park"

The higher --strength is, the more the region may change. At 1, nothing of the old face is kept.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from PIL import Image

import program
from drawing.jobs import Job, make_job, read_model_defaults
from drawing.model import SAMPLING, Weights, check_weights, read_au_names
from drawing.photo import check_box, check_mask, face_mask, find_faces, open_photo
from drawing.studio import Studio


def read_box(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = program.Parser(description=__doc__)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--aus", required=True, help='the new expression: "AU6=2.5 AU12=5", "6C+12D", a preset')
    parser.add_argument("--prompt", required=True, help="what the picture shows, apart from the expression")
    region = parser.add_mutually_exclusive_group()
    region.add_argument("--box", type=read_box, metavar="LEFT,TOP,RIGHT,BOTTOM", help="around the face, in pixels")
    region.add_argument("--mask", type=Path, help="a picture of the same size, white where the face is")
    parser.add_argument("--output", required=True, type=Path, help="PNG file")
    parser.add_argument("--strength", type=float, default=0.8, help="how much may change, up to 1 (default: 0.8)")
    program.add_options(parser, Job, ("seed", *SAMPLING), program.spell_option)
    program.add_model_options(parser)
    return parser.parse_args(argv)


def read_picture_and_mask(args: argparse.Namespace) -> tuple[Image.Image, Image.Image]:
    picture = open_photo(args.picture)
    if args.mask is None:
        faces = find_faces(picture) if args.box is None else [check_box(args.box, picture.size, "--box")]
        if len(faces) != 1:
            found = "; ".join(",".join(map(str, box)) for box in faces)
            what = f"several faces: {found}" if faces else "no face"
            raise ValueError(f"{args.picture} shows {what}. Say where with `--box`.")
        return picture, face_mask(picture.size, faces[0])
    with Image.open(args.mask) as file:
        return picture, check_mask(file.convert("L"), picture.size)


def run(args: argparse.Namespace) -> Path:
    weights = Weights(args.model, args.adapter, args.adapter_variant)
    check_weights(weights)
    program.check_output(args.output)
    if not 0 < args.strength <= 1:
        raise ValueError(f"`--strength` has to be above 0 and up to 1, but is {args.strength}.")
    program.settle_device(args)
    picture, mask = read_picture_and_mask(args)
    values = read_model_defaults(args.model) | program.take_options(Job, args)
    job = make_job(values, program.spell_option, read_au_names(weights))
    studio = Studio(weights, args.device, args.dtype)
    studio.pipeline.set_progress_bar_config(disable=False)
    edited = studio.edit(picture, mask, job, args.strength)
    studio.write(edited, args.output, asdict(job) | {"picture": args.picture.name, "strength": args.strength})
    return args.output


def main(argv: list[str] | None = None) -> int:
    return program.run_program(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
