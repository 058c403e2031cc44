# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""The modes of `generate.py`: picture, sheet, folder and animation. All is checked before a model is loaded."""

import argparse
import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from action_units import available_presets
from drawing import labelled_set
from drawing.contact_sheet import ANIMATION_SUFFIXES, Table, draw_sheet, write_animation
from drawing.files import background_writer, describe, find_unfinished, sheet_metadata, write_picture
from drawing.jobs import (
    DEMO_PROMPT,
    DEMO_SEED,
    JOB_FIELDS,
    Job,
    demo_tables,
    grid_table,
    interpolate_jobs,
    is_animation,
    make_job,
    preset_table,
    read_jobs,
    read_model_defaults,
    read_table_jobs,
    sweep_table,
)
from drawing.model import Weights, check_weights, draw_jobs, group_jobs, read_au_names
from face_data.store import write_lines
from program import (
    check_output,
    import_av,
    on_main_process,
    only_run_in,
    settle_device,
    share_of,
    spell_option,
    start_processes,
)


FILE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avi", ".mov", ".webm")
"""Suffixes that mean `--output` was meant as a file."""
SHEET_COLUMNS = 8


def _draw(jobs: list[Job], weights: Weights, args: argparse.Namespace, **options) -> Iterator[tuple[Job, Image.Image]]:
    return draw_jobs(jobs, weights, args.device, args.dtype, args.batch_size, **options)


def run_single(job: Job, weights: Weights, args: argparse.Namespace) -> str:
    for _, image in _draw([job], weights, args):
        write_picture(image, args.output, asdict(job) | describe(weights, args.dtype))
    return str(args.output)


def run_sheet(job: Job, bands: list[list[Table[Job]]], weights: Weights, args: argparse.Namespace) -> str:
    rows = [row for band in bands for table in band for row in table.rows]
    # Each picture is drawn once: in a grid, the rows of all AUs begin with the same face.
    pictures = dict(_draw(list(dict.fromkeys(job for row in rows for job in row)), weights, args))
    drawn = [[table.map(pictures.__getitem__) for table in band] for band in bands]
    sheet = draw_sheet(drawn, f"{job.prompt} · seed {job.seed}")
    write_picture(sheet, args.output, sheet_metadata(job, rows) | describe(weights, args.dtype))
    return str(args.output)


def run_folder(
    jobs: Mapping[str, Job],
    folder: Path,
    weights: Weights,
    args: argparse.Namespace,
    processes: PartialState,
    overwrite: bool = False,
    finish: Callable[[], object] = lambda: None,
) -> str:
    """
    Draw the pictures that are not finished, and write each as soon as it is drawn. Then call `finish` on the main
    process. Returns in words how many pictures are new.
    """
    with contextlib.ExitStack() as stack:

        def begin() -> tuple[dict[Job, list[Path]], int]:
            stack.enter_context(only_run_in(folder))
            return find_unfinished(jobs, folder, weights, overwrite)

        paths_by_job, num_finished = on_main_process(processes, begin)
        # Jobs of equal settings are side by side, so every process gets an equal share of them.
        share = share_of(processes, [job for group in group_jobs(list(paths_by_job)) for job in group])
        if share:
            num_before = len(jobs) - len(paths_by_job) if processes.num_processes == 1 else 0
            about, silent = describe(weights, args.dtype), not processes.is_main_process
            with background_writer() as write:
                for job, image in _draw(share, weights, args, num_finished=num_before, silent=silent):
                    for path in paths_by_job[job]:
                        write(image, path, asdict(job) | about)
        processes.wait_for_everyone()
        if processes.is_main_process:
            finish()
    return f"{len(jobs) - num_finished} new pictures, {num_finished} from before"


def run_batch(values: Mapping, weights: Weights, args: argparse.Namespace, processes: PartialState) -> str:
    jobs = on_main_process(processes, lambda: read_jobs(args.batch, values, read_au_names(weights)))
    return f"{args.output}: {run_folder(jobs, args.output, weights, args, processes, args.overwrite)}"


def run_table(values: Mapping, weights: Weights, args: argparse.Namespace, processes: PartialState) -> str:
    """Draw each row of the table, or an animation, whose frames are kept in a hidden folder until it is written."""

    def read() -> tuple[tuple[str, ...], dict[str, Job], int]:
        au_names = read_au_names(weights)
        job = make_job(values, spell_option, au_names)
        if job.aus is not None:
            raise ValueError("`--aus-from` says what the AUs are. Leave out `--aus`, and AUs in the prompt.")
        if args.output.suffix.lower() == ".mp4":
            import_av()
        return au_names, *read_table_jobs(args.aus_from, job, args.aus_tool, args.aus_face, au_names=au_names)

    au_names, jobs, num_skipped = on_main_process(processes, read)
    skipped = f", {num_skipped} rows without a face skipped" if num_skipped else ""
    if not is_animation(args):
        return f"{args.output}: {run_folder(jobs, args.output, weights, args, processes, args.overwrite)}{skipped}"
    frames_folder = args.output.with_name(f".{args.output.name}.frames")
    key_jobs = list(jobs.values())
    jobs = interpolate_jobs(key_jobs, args.frames_between, au_names)

    def encode() -> None:
        about = sheet_metadata(key_jobs[0], [key_jobs]) | describe(weights, args.dtype)
        frames = (Image.open(frames_folder / name).convert("RGB") for name in jobs)
        write_animation(tqdm(frames, "encoding", len(jobs), unit="frame"), args.output, args.fps, json.dumps(about))
        shutil.rmtree(frames_folder)

    # Old frames in this folder belong to another animation of the same name, so they are overwritten.
    run_folder(jobs, frames_folder, weights, args, processes, overwrite=True, finish=encode)
    return f"{args.output}: {len(jobs)} frames from {len(key_jobs)} rows{skipped}"


def run_dataset(values: Mapping, weights: Weights, args: argparse.Namespace, processes: PartialState) -> str:
    def read() -> tuple[dict[str, Job], dict[str, dict]]:
        given = [name for name in ("prompt", "aus") if name in values]
        if given:
            raise ValueError(f"The distribution says what a data set shows. Leave out `{spell_option(given[0])}`.")
        labelled_set.check_dataset_folder(args.output, args.dataset)
        au_names = read_au_names(weights)
        distribution = labelled_set.read_distribution(args.distribution or labelled_set.DEFAULT_DISTRIBUTION, au_names)
        return labelled_set.draw_dataset(distribution, args.dataset, values, au_names)

    jobs, rows = on_main_process(processes, read)
    label = partial(write_lines, args.output / labelled_set.DATASET_METADATA_NAME, rows.values())
    return f"{args.output}: {run_folder(jobs, args.output, weights, args, processes, args.overwrite, label)}"


def run(args: argparse.Namespace) -> str | None:
    """Check the request, carry it out, and return where the result is; None on processes with nothing to report."""
    settle_device(args)
    weights = Weights(args.model, args.adapter, args.adapter_variant)
    in_folder = {"batch": run_batch, "aus_from": run_table, "dataset": run_dataset}
    run_shared = next((run_mode for mode, run_mode in in_folder.items() if getattr(args, mode) is not None), None)
    processes = start_processes(args.device)

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

    values = on_main_process(processes, check)
    if run_shared is not None:
        return run_shared(values, weights, args, processes)
    if not processes.is_main_process:
        return None
    au_names = read_au_names(weights)
    values = {"prompt": DEMO_PROMPT, "seed": DEMO_SEED} | values if args.demo else values
    job = make_job(values, spell_option, au_names)
    if job.aus is not None and (args.demo or args.presets is not None):
        raise ValueError("This sheet sets all AUs itself. Leave out `--aus`, and AUs in the prompt.")
    bands = _sheet_of(job, args, au_names)
    return run_single(job, weights, args) if bands is None else run_sheet(job, bands, weights, args)


def _sheet_of(job: Job, args: argparse.Namespace, au_names: Sequence[str]) -> list[list[Table[Job]]] | None:
    """The tables of the sheet that is asked for, or None."""
    if args.sweep is not None:
        return [[sweep_table(job, args.sweep, au_names)]]
    if args.grid:
        return [[grid_table(job, au_names)]]
    if args.presets is not None:
        expressions = args.presets or list(available_presets(au_names))
        rows = (expressions[i : i + SHEET_COLUMNS] for i in range(0, len(expressions), SHEET_COLUMNS))
        return [[preset_table(job, row, au_names)] for row in rows]
    return demo_tables(job, au_names) if args.demo else None
