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
import functools
import json
import os
import re
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from action_units import PRESETS
from contact_sheet import ANIMATION_SUFFIXES, Table, check_animation, draw_sheet, write_animation
from jobs import (
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
from synthetic_dataset import (
    DEFAULT_DISTRIBUTION,
    check_dataset_folder,
    draw_dataset,
    read_distribution,
    write_dataset_metadata,
)


EMBEDDED_MODEL = Path(__file__).resolve().parent / "toy_faces" / "weights"
METADATA_KEY = "fineface"
MAX_UNWRITTEN = 64
# What nobody calls a folder.
FILE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avi", ".mov", ".webm")
SHEET_COLUMNS = 8
DEMO_PROMPT = "a closeup of a woman with long brown hair and tan skin in a park, wearing a blue sweater"
# Chosen by eye, of six: the one whose named expressions come out best.
DEMO_SEED = 5


@dataclass(frozen=True)
class Weights:
    """Where the model comes from: folders or Hub ids."""

    model: str
    adapter: str | None = None
    adapter_variant: str | None = None


# --------------------------------------------------------------------------------------------------------------------
# What is asked for. All of it is checked before a model is loaded.
# --------------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """One whose errors are ValueErrors, for `main` to report."""

    def error(self, message: str):
        raise ValueError(message)


def number_or_none(text: str) -> float | None:
    return None if text == "none" else float(text)


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


def add_model_options(parser) -> None:
    """Which model, where and in which precision, to a parser or a group of one; `settle_device` completes them."""
    parser.add_argument("--model", default=str(EMBEDDED_MODEL), help="folder or Hub id (default: the embedded model)")
    parser.add_argument("--adapter", help="folder or Hub id of the AU adapter (default: the one beside the model)")
    parser.add_argument("--adapter-variant", help="sd15: of the published adapter, the files for Stable Diffusion 1.5")
    parser.add_argument("--device", help="as torch names it (default: the accelerator, if there is one)")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="(default: float32 on cpu, else 16)"
    )


def settle_device(args: argparse.Namespace) -> None:
    """Put the device, and the dtype that suits it if none was named, in the place of what was asked for."""
    args.device = pick_device(args.device)
    args.dtype = args.dtype or ("float32" if args.device.type == "cpu" else "float16")


def _check_counts(args: argparse.Namespace) -> None:
    if args.batch_size < 1:
        raise ValueError(f"`--batch-size` has to be a whole number from 1 on, but is {args.batch_size}.")
    for option in ("fps", "frames_between"):
        if getattr(args, option) is not None and not is_animation(args):
            raise ValueError(
                f"`{spell_option(option)}` is for an animation: `--aus-from` with an `--output` that ends in"
                f" {' or '.join(ANIMATION_SUFFIXES)}."
            )
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


def spell_option(name: str) -> str:
    return "--" + name.replace("_", "-")


def is_animation(args: argparse.Namespace) -> bool:
    return args.aus_from is not None and args.output.suffix.lower() in ANIMATION_SUFFIXES


def pick_device(name: str | None) -> torch.device:
    """The device of this name; without one, the accelerator that torch finds, or the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    devices = {"cpu": 1} | ({accelerator.type: torch.accelerator.device_count()} if accelerator else {})
    if name is None:
        # What accelerate calls its option to leave the GPU alone.
        cpu_only = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        return torch.device("cpu" if cpu_only else list(devices)[-1])
    match = re.fullmatch("([a-z]+)(?::([0-9]+))?", name)
    if not match or int(match[2] or 0) >= devices.get(match[1], 0):
        raise ValueError(f"`--device` is {name!r}, which torch does not find here. It finds {' and '.join(devices)}.")
    return torch.device(name)


def check_weights(weights: Weights) -> None:
    """Raise an error for a path without a model. Whether there is a Hub id, only the Hub knows."""
    for option, name in (("--model", weights.model), ("--adapter", weights.adapter)):
        if name is None:
            continue
        folder = Path(name)
        # With its first part on this disk, it is a mistyped path.
        is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not folder.parent.exists()
        if not folder.is_dir() and not is_hub_id:
            raise FileNotFoundError(
                f"`{option}` is {name!r}, which is neither a folder nor the id of a Hub repository."
            )
        if option == "--model" and folder.is_dir() and not (folder / "model_index.json").is_file():
            raise FileNotFoundError(f"`{option}` is {name!r}, a folder without a model: it has no model_index.json.")
    if weights.adapter_variant is not None and weights.adapter is None:
        raise ValueError("`--adapter-variant` chooses among the files of an `--adapter`, but there is none.")


def check_output(path: Path, is_folder: bool = False, suffixes: Sequence[str] = (".png",)) -> None:
    """Raise an error if nothing can be written at `path`. Creates nothing."""
    if path.exists() and path.is_dir() != is_folder:
        raise OSError(f"`--output` is {str(path)!r}, which is {'no' if is_folder else 'a'} folder.")
    if not is_folder and path.suffix.lower() not in suffixes:
        raise ValueError(f"`--output` is {str(path)!r}. Pictures are PNG files: give it the ending .png.")
    folder = (path if is_folder else path.parent).resolve()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OSError(f"`--output` is {str(path)!r}, but nothing can be written into {str(existing)!r}.")


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------


def write_picture(image: Image.Image, path: Path, metadata: Mapping) -> None:
    """Write a PNG with `metadata` in it. At `path` there is never less than a whole file."""
    chunks = PngInfo()
    chunks.add_text("Software", "FineFace")
    aus = f" [{metadata['aus']}]" if metadata.get("aus") else ""
    chunks.add_itxt("Description", metadata["prompt"] + aus)
    chunks.add_itxt(METADATA_KEY, json.dumps(metadata))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.part")
    with open(unfinished, "wb") as file:
        # Half the time of Pillow's own level, for a tenth more bytes: the model draws on a CPU meanwhile.
        image.save(file, "PNG", pnginfo=chunks, compress_level=3)
    os.replace(unfinished, path)


@contextmanager
def background_writer() -> Iterator[Callable[[Image.Image, Path, Mapping], None]]:
    """
    `write_picture` in a thread, so that the model draws on meanwhile. When the block is left, also by an error, all is
    written. An error in writing comes up at one of the next pictures.
    """
    unwritten = deque()
    with ThreadPoolExecutor(1) as pool:

        def write(*args) -> None:
            unwritten.append(pool.submit(write_picture, *args))
            while unwritten and (unwritten[0].done() or len(unwritten) > MAX_UNWRITTEN):
                unwritten.popleft().result()

        yield write
    for future in unwritten:
        future.result()


def read_metadata(path: str | os.PathLike) -> dict:
    """
    What a picture of this program says about itself: the fields of its `Job` and of `Weights`, the `dtype`, and the
    `versions` of the libraries. A sheet has `rows`, the AUs of each of its pictures, in place of `aus`.

    Raises:
        ValueError: if the file carries nothing of the kind.
        OSError: if it is no picture.
    """
    with Image.open(path) as image:
        text = image.info.get(METADATA_KEY)
    if not isinstance(text, str):
        raise ValueError(f"{os.fspath(path)!r} carries no FineFace metadata: another program has written it.")
    return json.loads(text)


def describe(weights: Weights, args: argparse.Namespace) -> dict:
    """What pictures say about how they were made."""
    return _names(weights) | {"dtype": args.dtype, "versions": _library_versions()}


@functools.cache
def _library_versions() -> dict[str, str]:
    # Looked up anew for every picture, they would cost a twentieth of drawing one with the embedded model.
    return {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")}


def _names(weights: Weights) -> dict:
    # The same in every clone.
    is_embedded = Path(weights.model).resolve() == EMBEDDED_MODEL
    return asdict(weights) | ({"model": "toy_faces/weights"} if is_embedded else {})


def is_finished(path: Path, job: Job, weights: Weights, overwrite: bool = False) -> bool:
    """
    Whether `path` already shows `job`. Versions, dtype and device, which change a picture by rounding, may differ.

    Raises:
        ValueError: if it shows something else, unless `overwrite`.
    """
    if not path.exists():
        return False
    try:
        found = read_metadata(path)
    except (OSError, ValueError):
        found = {}
    wanted = asdict(job) | _names(weights)
    differences = [name for name, value in wanted.items() if found.get(name) != value]
    if differences and not overwrite:
        name = differences[0]
        what = (
            f"with `{name}` = {found[name]!r} in place of {wanted[name]!r}" if name in found else "by another program"
        )
        raise ValueError(f"{str(path)!r} is there already, {what}. Use another `--output`, or `--overwrite` it.")
    return not differences


def find_unfinished(
    jobs: Mapping[str, Job], folder: Path, weights: Weights, overwrite: bool
) -> tuple[dict[Job, list[Path]], int]:
    """Where the pictures go that are not there yet, by their jobs, and the number of those that are."""
    paths_by_job, num_finished = {}, 0
    for name, job in jobs.items():
        path = folder / name
        check_output(path)
        if is_finished(path, job, weights, overwrite):
            num_finished += 1
        else:
            paths_by_job.setdefault(job, []).append(path)
    return paths_by_job, num_finished


# --------------------------------------------------------------------------------------------------------------------
# Processes
# --------------------------------------------------------------------------------------------------------------------


class Processes:
    """Those that `accelerate launch` or `torchrun` has started together to share the work; mostly only this one."""

    def __init__(self, device: torch.device):
        self.state = None
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            from accelerate import PartialState

            if device.index is not None:
                raise ValueError(
                    f"`--device` is {str(device)!r}, which all processes would share. Leave out the number: each takes"
                    " a device of its own."
                )
            # Whoever is done first waits for the last.
            self.state = PartialState(cpu=device.type == "cpu", timeout=timedelta(days=7))

    @property
    def is_main(self) -> bool:
        return self.state is None or self.state.is_main_process

    def on_main(self, work: Callable):
        """What `work` returns on the main process, on all of them. If it fails there, all end, with one message."""
        if self.state is None:
            return work()
        from accelerate.utils import broadcast_object_list

        outcome = [None, None]
        if self.is_main:
            try:
                outcome = [work(), None]
            except (ValueError, OSError) as error:
                outcome = [None, error]
        error = outcome[1]
        broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise error or SystemExit(2)
        return outcome[0]

    def share(self, entries: list) -> list:
        """Every n-th of `entries`, another one for each process."""
        return entries if self.state is None else entries[self.state.process_index :: self.state.num_processes]

    def wait(self) -> None:
        if self.state is not None:
            self.state.wait_for_everyone()


# --------------------------------------------------------------------------------------------------------------------
# Generation
# --------------------------------------------------------------------------------------------------------------------


@contextmanager
def quiet() -> Iterator[None]:
    """No bars while weights are loaded, and nothing from transformers about parts that are not in use."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        diffusers_logging.enable_progress_bar()
        transformers_logging.enable_progress_bar()


def load_pipeline(weights: Weights, device: torch.device, dtype: torch.dtype):
    """
    Raises:
        OSError: if the model or the adapter cannot be found.
        ValueError: if a file is broken, or the adapter does not fit the model.
    """
    from pipeline_fineface import FineFacePipeline

    if weights.adapter is None:
        pipeline = FineFacePipeline.from_pretrained(weights.model, dtype=dtype)
    else:
        pipeline = FineFacePipeline.from_pretrained(weights.model, dtype=dtype, au_adapter=None)
        pipeline.load_au_adapter(weights.adapter, variant=weights.adapter_variant)
    return pipeline.to(device)


def fuse_lora(pipeline) -> None:
    """
    Make the LoRA part of the weights, for good: from then on a step costs what one of plain Stable Diffusion does.
    The pictures change by rounding.
    """
    pipeline.fuse_lora(components=["unet"])
    pipeline.unload_lora_weights()


def group_jobs(jobs: list[Job]) -> list[list[Job]]:
    """Jobs of equal settings, which calls of the pipeline can serve together."""
    by_settings = {}
    for job in jobs:
        settings = replace(job, prompt="", aus=job.aus and "", seed=0, negative_prompt=None, negative_aus=None)
        by_settings.setdefault(settings, []).append(job)
    return list(by_settings.values())


def make_batches(jobs: list[Job], batch_size: int) -> list[list[Job]]:
    """Jobs that one call of the pipeline can serve, at most `batch_size` in each."""
    return [group[i : i + batch_size] for group in group_jobs(jobs) for i in range(0, len(group), batch_size)]


def generate_batch(pipeline, jobs: list[Job]) -> list[Image.Image]:
    """The pictures of one of `make_batches`. With a generator for each, they do not depend on their neighbours."""
    shared = jobs[0]
    has_aus = shared.aus is not None
    return pipeline(
        [job.prompt for job in jobs],
        negative_prompt=[job.negative_prompt or "" for job in jobs],
        aus=[job.aus for job in jobs] if has_aus else None,
        negative_aus=[job.negative_aus for job in jobs] if has_aus else None,
        # On the CPU, where a seed gives the same numbers whatever the device.
        generator=[torch.Generator().manual_seed(job.seed) for job in jobs],
        au_scale=shared.au_scale,
        guidance_scale=shared.guidance_scale,
        au_guidance_scale=shared.au_guidance_scale,
        num_inference_steps=shared.num_inference_steps,
        height=shared.height,
        width=shared.width,
    ).images


def generate(
    jobs: list[Job], weights: Weights, args: argparse.Namespace, num_finished: int = 0, silent: bool = False
) -> Iterator[tuple[Job, Image.Image]]:
    """Load the model and yield each job with its picture, behind one progress bar."""
    with quiet():
        pipeline = load_pipeline(weights, args.device, getattr(torch, args.dtype))
        if pipeline.au_adapter is None and any(job.aus is not None for job in jobs):
            raise ValueError(f"{weights.model!r} has no AU adapter, which AUs need. Name one with `--adapter`.")
        fuse_lora(pipeline)
        total = num_finished + len(jobs)
        # A single picture shows its denoising steps instead.
        pipeline.set_progress_bar_config(disable=silent or total > 1)
        no_bar = silent or total == 1
        with tqdm(total=total, initial=num_finished, unit="picture", mininterval=0, disable=no_bar) as bar:
            for batch in make_batches(jobs, args.batch_size):
                for job, image in zip(batch, generate_batch(pipeline, batch), strict=True):
                    yield job, image
                    bar.update()


# --------------------------------------------------------------------------------------------------------------------
# The program
# --------------------------------------------------------------------------------------------------------------------


def run_single(job: Job, weights: Weights, args: argparse.Namespace) -> str:
    for _, image in generate([job], weights, args):
        write_picture(image, args.output, asdict(job) | describe(weights, args))
    return str(args.output)


def run_sheet(job: Job, bands: list[list[Table]], weights: Weights, args: argparse.Namespace) -> str:
    rows = [row for band in bands for table in band for row in table.rows]
    # Each picture once: in a grid, all AUs begin at the same face.
    pictures = dict(generate(list(dict.fromkeys(job for row in rows for job in row)), weights, args))
    bands = [[replace(t, rows=[[pictures[job] for job in row] for row in t.rows]) for t in band] for band in bands]
    metadata = asdict(job) | {"rows": [[job.aus for job in row] for row in rows]} | describe(weights, args)
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
            for job, image in generate(share, weights, args, num_before, silent=not processes.is_main):
                for path in paths_by_job[job]:
                    write(image, path, asdict(job) | describe(weights, args))
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
        return read_table_jobs(args.aus_from, job)

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
        about = asdict(key_jobs[0]) | {"rows": [[job.aus for job in key_jobs]]} | describe(weights, args)
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
        expressions = args.presets or list(PRESETS)
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
