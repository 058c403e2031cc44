# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
Faces from the command line. Without --model, the embedded model draws them, offline and without a GPU.

  one picture      python generate.py --prompt "a girl in a park" --aus "6C+12D" --seed 3 --output smile.png
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
gives each of several GPUs or machines its share. The pictures are the same whatever runs together.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from action_units import available_presets
from drawing.contact_sheet import ANIMATION_SUFFIXES, Table, check_animation, draw_sheet, write_animation
from drawing.files import background_writer, describe, find_unfinished, write_picture
from drawing.jobs import (
    JOB_FIELDS,
    MODEL_DEFAULTS_NAME,
    Job,
    demo_tables,
    grid_table,
    interpolate_jobs,
    make_job,
    preset_table,
    read_jobs,
    read_model_defaults,
    read_table_jobs,
    sweep_table,
)
from drawing.labelled_set import (
    DEFAULT_DISTRIBUTION,
    check_dataset_folder,
    draw_dataset,
    read_distribution,
    write_dataset_metadata,
)
from drawing.model import Weights, check_weights, draw_jobs, group_jobs
from face_data.au_tables import AU_TABLE_TOOLS
from program import Parser, Processes, add_model_options, check_output, number_or_none, settle_device, spell_option


# What nobody calls a folder.
FILE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avi", ".mov", ".webm")
SHEET_COLUMNS = 8
DEMO_PROMPT = "a closeup of a woman with long brown hair and tan skin in a park, wearing a blue sweater"
# Chosen by eye, of six: the one whose named expressions come out best.
DEMO_SEED = 5


# --------------------------------------------------------------------------------------------------------------------
# What is asked for. All of it is checked before a model is loaded.
# --------------------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The arguments. Those that are fields of `Job` are there only if they were given."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    _add_what_to_make(parser)
    _add_picture_options(parser)
    model = parser.add_argument_group(
        "the model", f"A model folder may bring other defaults in {MODEL_DEFAULTS_NAME}; the embedded one does."
    )
    add_model_options(model)
    model.add_argument("--batch-size", type=int, default=4, help="pictures at once (default: 4)")
    args = parser.parse_args(argv)
    _check_counts(args)
    settle_device(args)
    return args


def _add_what_to_make(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", required=True, type=Path, help="PNG file; a folder where there are many; or a .gif, .mp4"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--sweep", metavar="AU=A:B:N", help="N pictures in a row, one AU going from A to B")
    mode.add_argument("--grid", action="store_true", help="a sheet of all 12 AUs, each from 0 to 5")
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
        help="what a data set is drawn from (default: examples/dataset_distribution.json, for the embedded model)",
    )
    parser.add_argument("--fps", type=float, help="pictures a second of an animation (default: 12)")
    parser.add_argument(
        "--frames-between",
        type=int,
        metavar="N",
        help="of an animation, pictures between two rows of the table; 0 for a video's frames (default: 4)",
    )


def _add_picture_options(parser: argparse.ArgumentParser) -> None:
    job = parser.add_argument_group("a picture", argument_default=argparse.SUPPRESS)
    job.add_argument("--prompt", help="what to draw; AUs may stand in it: 'a boy <AU6=3 AU12=5>'")
    job.add_argument(
        "--aus", help='"AU6=2.5 AU12=5", "6C+12D", or a preset: "doubtful@0.5" (default: up to the prompt)'
    )
    job.add_argument("--seed", type=int, help="equal seeds give equal pictures (default: 0)")
    job.add_argument("--negative-prompt", help="what not to draw")
    job.add_argument("--negative-aus", help="the expression to guide away from (default: neutral)")
    job.add_argument("--au-scale", type=float, help="how strongly the AUs are added (default: 1)")
    job.add_argument("--guidance-scale", type=float, help="how closely to follow prompt and AUs (default: 7.5)")
    job.add_argument(
        "--au-guidance-scale", type=number_or_none, help="... and the AUs, apart from the prompt (or: none)"
    )
    job.add_argument("--num-inference-steps", type=int, help="denoising steps (default: 50)")
    job.add_argument("--height", type=int, help="in pixels (default: the model's)")
    job.add_argument("--width", type=int, help="in pixels (default: the model's)")


def _check_counts(args: argparse.Namespace) -> None:
    if args.batch_size < 1:
        raise ValueError(f"`--batch-size` has to be a whole number from 1 on, but is {args.batch_size}.")
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
    if args.frames_between < 0:
        raise ValueError(f"`--frames-between` has to be a whole number from 0 on, but is {args.frames_between}.")
    if args.distribution is not None and args.dataset is None:
        raise ValueError("`--distribution` is what a `--dataset` is drawn from, but there is none.")
    if args.dataset is not None and args.dataset < 1:
        raise ValueError(f"`--dataset` has to be a number of pictures from 1 on, but is {args.dataset}.")


def is_animation(args: argparse.Namespace) -> bool:
    return args.aus_from is not None and args.output.suffix.lower() in ANIMATION_SUFFIXES


# --------------------------------------------------------------------------------------------------------------------
# The program
# --------------------------------------------------------------------------------------------------------------------


def _draw(
    jobs: list[Job], weights: Weights, args: argparse.Namespace, num_finished: int = 0, silent: bool = False
) -> Iterator[tuple[Job, Image.Image]]:
    return draw_jobs(jobs, weights, args.device, args.dtype, args.batch_size, num_finished, silent)


def run_single(job: Job, weights: Weights, args: argparse.Namespace) -> str:
    for _, image in _draw([job], weights, args):
        write_picture(image, args.output, asdict(job) | describe(weights, args.dtype))
    return str(args.output)


def run_sheet(job: Job, bands: list[list[Table]], weights: Weights, args: argparse.Namespace) -> str:
    rows = [row for band in bands for table in band for row in table.rows]
    # Each picture once: in a grid, all AUs begin at the same face.
    pictures = dict(_draw(list(dict.fromkeys(job for row in rows for job in row)), weights, args))
    bands = [[replace(t, rows=[[pictures[job] for job in row] for row in t.rows]) for t in band] for band in bands]
    metadata = asdict(job) | {"rows": [[job.aus for job in row] for row in rows]} | describe(weights, args.dtype)
    del metadata["aus"]
    write_picture(draw_sheet(bands, f"{job.prompt} · seed {job.seed}"), args.output, metadata)
    return str(args.output)


def run_folder(
    jobs: Mapping[str, Job],
    folder: Path,
    weights: Weights,
    args: argparse.Namespace,
    processes: Processes,
    overwrite: bool = False,
) -> str:
    """Write each picture as soon as it is there, but for those that are finished already, and say how many."""
    paths_by_job, num_finished = processes.on_main(lambda: find_unfinished(jobs, folder, weights, overwrite))
    # Every process gets as much of each kind of work.
    share = processes.share([job for group in group_jobs(list(paths_by_job)) for job in group])
    if share:
        with background_writer() as write:
            num_before = len(jobs) - len(paths_by_job) if processes.state is None else 0
            for job, image in _draw(share, weights, args, num_before, silent=not processes.is_main):
                for path in paths_by_job[job]:
                    write(image, path, asdict(job) | describe(weights, args.dtype))
    processes.wait()
    return f"{len(jobs) - num_finished} new pictures, {num_finished} from before"


def run_batch(values: Mapping, weights: Weights, args: argparse.Namespace, processes: Processes) -> str:
    jobs = processes.on_main(lambda: read_jobs(args.batch, values))
    return f"{args.output}: {run_folder(jobs, args.output, weights, args, processes, args.overwrite)}"


def run_table(values: Mapping, weights: Weights, args: argparse.Namespace, processes: Processes) -> str:
    """A picture for each row of the table, or an animation, whose frames stand in a hidden folder until it is done."""

    def read() -> tuple[dict[str, Job], int]:
        job = make_job(values, spell_option)
        if job.aus is not None:
            raise ValueError("`--aus-from` says what the AUs are. Leave out `--aus`, and AUs in the prompt.")
        if is_animation(args):
            check_animation(args.output)
        return read_table_jobs(args.aus_from, job, args.aus_tool, args.aus_face)

    jobs, num_skipped = processes.on_main(read)
    skipped = f", {num_skipped} rows without a face skipped" if num_skipped else ""
    if not is_animation(args):
        return f"{args.output}: {run_folder(jobs, args.output, weights, args, processes, args.overwrite)}{skipped}"
    frames_folder = args.output.with_name(f".{args.output.name}.frames")
    key_jobs = list(jobs.values())
    jobs = interpolate_jobs(key_jobs, args.frames_between)
    # Frames of another animation of this name are of no use.
    run_folder(jobs, frames_folder, weights, args, processes, overwrite=True)
    if processes.is_main:
        about = asdict(key_jobs[0]) | {"rows": [[job.aus for job in key_jobs]]} | describe(weights, args.dtype)
        del about["aus"]
        frames = (Image.open(frames_folder / name).convert("RGB") for name in jobs)
        write_animation(tqdm(frames, "encoding", len(jobs), unit="frame"), args.output, args.fps, json.dumps(about))
        shutil.rmtree(frames_folder)
    return f"{args.output}: {len(jobs)} frames from {len(key_jobs)} rows{skipped}"


def run_dataset(values: Mapping, weights: Weights, args: argparse.Namespace, processes: Processes) -> str:
    def draw() -> tuple[dict[str, Job], dict[str, dict]]:
        given = [name for name in ("prompt", "aus") if name in values]
        if given:
            raise ValueError(f"The distribution says what a data set shows. Leave out `{spell_option(given[0])}`.")
        check_dataset_folder(args.output, args.dataset)
        return draw_dataset(read_distribution(args.distribution or DEFAULT_DISTRIBUTION), args.dataset, values)

    jobs, rows = processes.on_main(draw)
    done = run_folder(jobs, args.output, weights, args, processes, args.overwrite)
    if processes.is_main:
        write_dataset_metadata(list(rows.values()), args.output)
    return f"{args.output}: {done}"


def run(args: argparse.Namespace) -> str | None:
    """Check all that is asked for, do it, and say where the result is; None where other processes do it."""
    weights = Weights(args.model, args.adapter, args.adapter_variant)
    in_folder = {"batch": run_batch, "aus_from": run_table, "dataset": run_dataset}
    run_shared = next((run_mode for mode, run_mode in in_folder.items() if getattr(args, mode) is not None), None)
    processes = Processes(args.device)

    def check() -> dict:
        check_weights(weights)
        if args.aus_from is not None and args.output.suffix.lower() in FILE_SUFFIXES:
            raise ValueError(
                f"`--output` is {str(args.output)!r}. `--aus-from` makes a folder of pictures, or an animation, which"
                f" ends in {' or '.join(ANIMATION_SUFFIXES)}."
            )
        suffixes = ANIMATION_SUFFIXES if is_animation(args) else (".png",)
        check_output(args.output, run_shared is not None and not is_animation(args), suffixes)
        given = {name: value for name, value in vars(args).items() if name in JOB_FIELDS}
        return read_model_defaults(args.model) | given

    values = processes.on_main(check)
    if run_shared is not None:
        return run_shared(values, weights, args, processes)
    if not processes.is_main:
        return None
    job = make_job({"prompt": DEMO_PROMPT, "seed": DEMO_SEED} | values if args.demo else values, spell_option)
    if job.aus is not None and (args.demo or args.presets is not None):
        raise ValueError("This sheet sets all AUs itself. Leave out `--aus`, and AUs in the prompt.")
    if args.sweep is not None:
        return run_sheet(job, [[sweep_table(job, args.sweep)]], weights, args)
    if args.grid:
        return run_sheet(job, [[grid_table(job)]], weights, args)
    if args.presets is not None:
        expressions = args.presets or list(available_presets())
        rows = (expressions[i : i + SHEET_COLUMNS] for i in range(0, len(expressions), SHEET_COLUMNS))
        return run_sheet(job, [[preset_table(job, row)] for row in rows], weights, args)
    if args.demo:
        return run_sheet(job, demo_tables(job), weights, args)
    return run_single(job, weights, args)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 if memory ran out, 2 for anything wrong with what was asked, 130 after Ctrl-C."""
    try:
        done = run(parse_args(argv))
        if done is not None and int(os.environ.get("RANK", 0)) == 0:
            print(done)
    except KeyboardInterrupt:
        print("interrupted; many pictures go on from here with the same command", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError:
        print("error: out of memory. Try `--batch-size 1`, `--dtype float16`, or a smaller picture.", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
