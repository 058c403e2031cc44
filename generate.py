# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
Faces from the command line. Without --model, the toy model in this repository draws them, offline and without a GPU.

  one picture      python generate.py --prompt "a girl in a park" --aus "6C+12D" --seed 3 --output smile.png
  one side of it   python generate.py --prompt "a girl" --adapter toy_faces/weights/sided --aus wink --output wink.png
  a rising AU      python generate.py --prompt "a girl in a park" --sweep AU12=0:5:6 --output sweep.png
  each AU, 0 to 5  python generate.py --prompt "a girl in a park" --grid --output grid.png
  presets          python generate.py --prompt "a girl in a park" --presets happy doubtful@0.5 --output presets.png
  many pictures    python generate.py --batch jobs.jsonl --output FOLDER
  another's face   python generate.py --prompt "a girl in a park" --aus-from openface.csv --output FOLDER
  an animation     python generate.py --prompt "a girl in a park" --aus-from openface.csv --output face.gif
  a data set       python generate.py --dataset 1000 --output FOLDER

A line of jobs.jsonl is a job: {"prompt": "a girl in a park", "aus": "6C+12D", "seed": 3, "output": "smile.png"}. Its
other keys are the options of a picture, with _ for -; what it leaves out, it takes from the command line.

The last four go on where they were stopped when the same command runs again, and `accelerate launch generate.py …`
gives each of several GPUs or machines its share. What is drawn together changes a picture by rounding at most: by one
grey level here and there.
"""

import argparse
import sys
from pathlib import Path

from drawing.contact_sheet import ANIMATION_SUFFIXES
from drawing.jobs import MODEL_DEFAULTS_NAME, Job, is_animation
from face_data.au_tables import AU_TABLE_TOOLS
from program import Parser, add_model_options, add_options, check_integer, run_program, spell_option


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The arguments. Those that are fields of `Job` are there only if they were given."""
    parser = Parser(description=__doc__)
    _add_what_to_make(parser)
    add_options(parser.add_argument_group("a picture"), Job, spell=spell_option)
    model = parser.add_argument_group(
        "the model",
        f"A model folder may set steps, guidance and size in its {MODEL_DEFAULTS_NAME}, as the toy model does.",
    )
    add_model_options(model)
    model.add_argument("--batch-size", type=int, default=4, help="pictures at once (default: 4)")
    args = parser.parse_args(argv)
    _check_counts(args)
    return args


def _add_what_to_make(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", required=True, type=Path, help="PNG file; a folder where there are many; or a .gif, .mp4"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--sweep", metavar="AU=A:B:N", help="N pictures in a row, one AU going from A to B")
    mode.add_argument("--grid", action="store_true", help="a sheet of all AUs, each from 0 to 5")
    mode.add_argument("--presets", nargs="*", metavar="AUS", help="a sheet of these expressions, or of all presets")
    mode.add_argument(
        "--demo", action="store_true", help="a sheet of the grid and some presets, of a person or --prompt"
    )
    mode.add_argument("--batch", type=Path, metavar="JSONL", help="a file with one job a line")
    mode.add_argument(
        "--aus-from",
        type=Path,
        metavar="TABLE",
        help="a picture for each row of a table of AUs, or an animation: CSV, JSON or Parquet of OpenFace, LibreFace,"
        " py-feat, ARKit or MediaPipe, or with columns AU1 … AU26",
    )
    mode.add_argument("--dataset", type=int, metavar="N", help="N labelled pictures for training, at random")
    parser.add_argument(
        "--aus-tool", choices=AU_TABLE_TOOLS, help="whose columns of the table to read (default: the columns tell)"
    )
    parser.add_argument(
        "--aus-face", type=int, metavar="N", help="the `face_id` to draw of a table with several (default: the first)"
    )
    parser.add_argument("--overwrite", action="store_true", help="in a folder, replace what shows something else")
    parser.add_argument(
        "--distribution",
        type=Path,
        metavar="JSON",
        help="what a data set is drawn from (default: examples/dataset_distribution.json, for the toy model)",
    )
    parser.add_argument("--fps", type=float, help="pictures a second of an animation (default: 12)")
    parser.add_argument(
        "--frames-between",
        type=int,
        metavar="N",
        help="of an animation, pictures between two rows of the table; 0 for a video's frames (default: 4)",
    )


def _check_counts(args: argparse.Namespace) -> None:
    for option in ("fps", "frames_between"):
        if getattr(args, option) is not None and not is_animation(args):
            raise ValueError(
                f"`{spell_option(option)}` is for an animation: `--aus-from` with an `--output` that ends in"
                f" {' or '.join(ANIMATION_SUFFIXES)}."
            )
    for option in ("aus_tool", "aus_face"):
        if getattr(args, option) is not None and args.aus_from is None:
            raise ValueError(f"`{spell_option(option)}` is for the table of `--aus-from`, but there is none.")
    args.fps = 12.0 if args.fps is None else args.fps
    args.frames_between = 4 if args.frames_between is None else args.frames_between
    if not 1 <= args.fps <= 60:
        raise ValueError(f"`--fps` has to be from 1 to 60, but is {args.fps:g}.")
    check_integer("--batch-size", args.batch_size, 1)
    check_integer("--frames-between", args.frames_between, 0)
    if args.distribution is not None and args.dataset is None:
        raise ValueError("`--distribution` is what a `--dataset` is drawn from, but there is none.")
    if args.dataset is not None:
        check_integer("--dataset", args.dataset, 1)


def main(argv: list[str] | None = None) -> int:

    def work() -> str | None:
        args = parse_args(argv)
        # Only now, because importing torch and diffusers takes seconds.
        from drawing.modes import run

        return run(args)

    return run_program(
        work,
        interrupted="many pictures go on from here with the same command",
        out_of_memory="Try `--batch-size 1`, `--dtype float16`, or a smaller picture.",
    )


if __name__ == "__main__":
    sys.exit(main())
