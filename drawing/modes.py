# SPDX-License-Identifier: Apache-2.0
"""The modes of `generate.py`: picture, sheet, folder and animation. All is checked before a model is loaded."""

import argparse
import contextlib
import itertools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

import program
from drawing import labelled_set
from drawing.contact_sheet import ANIMATION_SUFFIXES, Table, draw_sheet, write_animation
from drawing.files import background_writer, describe, find_unfinished, sheet_metadata, write_picture
from drawing.jobs import (
    DEMO_PROMPT,
    DEMO_SEED,
    JOB_FIELDS,
    Job,
    interpolate_jobs,
    is_animation,
    make_job,
    read_jobs,
    read_model_defaults,
    read_table_jobs,
    sheet_of,
)
from drawing.model import Weights, check_weights, draw_jobs, make_batches, read_au_names
from face_data.store import write_lines


FILE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avi", ".mov", ".webm")
"""Suffixes that mean `--output` was meant as a file."""


def draw_picture(job: Job, bands: list[list[Table[Job]]] | None, weights: Weights, args: argparse.Namespace) -> str:
    """Draw one picture, or the sheet of `bands`, which are tables of jobs."""
    rows = [[job]] if bands is None else [row for band in bands for table in band for row in table.rows]
    # Each picture is drawn once: in a grid, the rows of all AUs begin with the same face.
    pictures = dict(draw_jobs(list(dict.fromkeys(itertools.chain(*rows))), weights, args))
    if bands is None:
        image, values = pictures[job], asdict(job)
    else:
        drawn = [[table.map(pictures.__getitem__) for table in band] for band in bands]
        image, values = draw_sheet(drawn, f"{job.prompt} · seed {job.seed}"), sheet_metadata(job, rows)
    write_picture(image, args.output, values | describe(weights, args.dtype))
    return str(args.output)


def draw_folder(
    jobs: Mapping[str, Job],
    weights: Weights,
    args: argparse.Namespace,
    processes: PartialState,
    frames_folder: Path | None = None,
    finish: Callable[[], object] = lambda: None,
) -> str:
    """
    Draw the pictures that are not finished, and write each as soon as it is drawn. Then call `finish` on the main
    process. Old pictures in a `frames_folder` belong to another animation of the same name, so they are overwritten.
    Returns in words how many pictures are new.
    """
    folder, overwrite = frames_folder or args.output, args.overwrite or frames_folder is not None
    with contextlib.ExitStack() as stack:

        def begin() -> dict[Job, list[Path]]:
            stack.enter_context(program.only_run_in(folder))
            return find_unfinished(jobs, folder, weights, overwrite)

        paths_by_job = program.on_main_process(processes, begin)
        # Jobs of equal settings are side by side, so every process gets an equal share of them.
        share = program.share_of(processes, list(itertools.chain(*make_batches(list(paths_by_job), 1))))
        if share:
            num_before = len(jobs) - len(paths_by_job) if processes.num_processes == 1 else 0
            about, silent = describe(weights, args.dtype), not processes.is_main_process
            with background_writer() as write:
                for job, image in draw_jobs(share, weights, args, num_before, silent):
                    for path in paths_by_job[job]:
                        write(image, path, asdict(job) | about)
        processes.wait_for_everyone()
        if processes.is_main_process:
            finish()
    num_new = sum(map(len, paths_by_job.values()))
    return f"{folder}: {num_new} new pictures, {len(jobs) - num_new} from before"


def run_batch(values: Mapping, au_names: Sequence[str], weights: Weights, args, processes: PartialState) -> str:
    jobs = program.on_main_process(processes, lambda: read_jobs(args.batch, values, au_names))
    return draw_folder(jobs, weights, args, processes)


def run_table(values: Mapping, au_names: Sequence[str], weights: Weights, args, processes: PartialState) -> str:
    """Draw each row of the table, or an animation, whose frames are kept in a hidden folder until it is written."""

    def read() -> tuple[dict[str, Job], int]:
        job = make_job(values, program.spell_option, au_names)
        if job.aus is not None:
            raise ValueError("`--aus-from` says what the AUs are. Leave out `--aus`, and AUs in the prompt.")
        if args.output.suffix.lower() == ".mp4":
            program.import_av()
        return read_table_jobs(args.aus_from, job, args.aus_tool, args.aus_face, au_names=au_names)

    jobs, num_skipped = program.on_main_process(processes, read)
    skipped = f", {num_skipped} rows without a face skipped" if num_skipped else ""
    if not is_animation(args):
        return draw_folder(jobs, weights, args, processes) + skipped
    frames_folder = args.output.with_name(f".{args.output.name}.frames")
    key_jobs = list(jobs.values())
    jobs = interpolate_jobs(key_jobs, args.frames_between, au_names)

    def encode() -> None:
        about = sheet_metadata(key_jobs[0], [key_jobs]) | describe(weights, args.dtype)
        frames = (Image.open(frames_folder / name).convert("RGB") for name in jobs)
        write_animation(tqdm(frames, "encoding", len(jobs), unit="frame"), args.output, args.fps, json.dumps(about))
        shutil.rmtree(frames_folder)

    draw_folder(jobs, weights, args, processes, frames_folder, encode)
    return f"{args.output}: {len(jobs)} frames from {len(key_jobs)} rows{skipped}"


def run_dataset(values: Mapping, au_names: Sequence[str], weights: Weights, args, processes: PartialState) -> str:
    def read() -> tuple[dict[str, Job], dict[str, dict]]:
        given = [name for name in ("prompt", "aus") if name in values]
        if given:
            raise ValueError(
                f"The distribution says what a data set shows. Leave out `{program.spell_option(given[0])}`."
            )
        labelled_set.check_dataset_folder(args.output, args.dataset)
        distribution = labelled_set.read_distribution(args.distribution or labelled_set.DEFAULT_DISTRIBUTION, au_names)
        return labelled_set.draw_dataset(distribution, args.dataset, values, au_names)

    jobs, rows = program.on_main_process(processes, read)
    label = partial(write_lines, args.output / labelled_set.DATASET_METADATA_NAME, rows.values())
    return draw_folder(jobs, weights, args, processes, finish=label)


def run(args: argparse.Namespace) -> str | None:
    """Check the request, carry it out, and return where the result is; None on processes with nothing to report."""
    program.settle_device(args)
    weights = Weights(args.model, args.adapter, args.adapter_variant)
    in_folder = {"batch": run_batch, "aus_from": run_table, "dataset": run_dataset}
    run_shared = next((run_mode for mode, run_mode in in_folder.items() if getattr(args, mode) is not None), None)
    processes = program.start_processes(args.device)

    def check() -> tuple[dict, tuple[str, ...]]:
        check_weights(weights)
        if args.aus_from is not None and args.output.suffix.lower() in FILE_SUFFIXES:
            raise ValueError(
                f"`--output` is {str(args.output)!r}. `--aus-from` makes a folder of pictures, or an animation, which"
                f" ends in {' or '.join(ANIMATION_SUFFIXES)}."
            )
        suffixes = ANIMATION_SUFFIXES if is_animation(args) else (".png",)
        program.check_output(args.output, run_shared is not None and not is_animation(args), suffixes)
        given = {name: value for name, value in vars(args).items() if name in JOB_FIELDS}
        return read_model_defaults(args.model) | given, read_au_names(weights)

    values, au_names = program.on_main_process(processes, check)
    if run_shared is not None:
        return run_shared(values, au_names, weights, args, processes)
    if not processes.is_main_process:
        return None
    values = {"prompt": DEMO_PROMPT, "seed": DEMO_SEED} | values if args.demo else values
    job = make_job(values, program.spell_option, au_names)
    if job.aus is not None and (args.demo or args.presets is not None):
        raise ValueError("This sheet sets all AUs itself. Leave out `--aus`, and AUs in the prompt.")
    return draw_picture(job, sheet_of(job, args, au_names), weights, args)
