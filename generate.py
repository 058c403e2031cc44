# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
Faces from the command line. Without --model, the embedded model draws them, offline and without a GPU.

  one picture      python generate.py --prompt "a girl in a park" --aus "6C+12D" --seed 3 --output smile.png
  a rising AU      python generate.py --prompt "a girl in a park" --sweep AU12=0:5:6 --output sweep.png
  each AU, 0 to 5  python generate.py --prompt "a girl in a park" --grid --output grid.png
  presets          python generate.py --prompt "a girl in a park" --presets happy doubtful@0.5 --output presets.png
  many pictures    python generate.py --batch jobs.jsonl --output FOLDER

A line of jobs.jsonl is a job: {"prompt": "a girl in a park", "aus": "6C+12D", "seed": 3, "output": "smile.png"}. Its
other keys are the options of a picture, with _ for -; what it leaves out, it takes from the command line. A batch
that was stopped goes on when the same command runs again.
"""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from numbers import Real
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from action_units import ACTION_UNITS, AU_NAMES, PRESETS, extract_au_tags, format_aus, parse_aus
from contact_sheet import Table, draw_sheet


EMBEDDED_MODEL = Path(__file__).resolve().parent / "toy_faces" / "weights"
MODEL_DEFAULTS_NAME = "fineface.json"
METADATA_KEY = "fineface"
MAX_SEED = 2**63 - 1
MAX_SWEEP_COUNT = 50
SHEET_COLUMNS = 8
GRID_INTENSITIES = (0, 1, 2, 3, 4, 5)
DEMO_PROMPT = "a closeup of a woman with long brown hair and tan skin in a park, wearing a blue sweater"
DEMO_PRESETS = (
    ("happy", "sad", "surprised", "fearful", "angry", "disgusted"),
    ("laughing", "doubtful", "pained", "pleading", "pouting", "skeptical"),
)


@dataclass(frozen=True)
class Job:
    """
    One picture. `aus` and `negative_aus` are as `format_aus` writes them, or None for none; the rest is as in
    `FineFacePipeline.__call__`, with the same defaults. Equal jobs give equal pictures.
    """

    prompt: str
    aus: str | None = None
    seed: int = 0
    negative_prompt: str | None = None
    negative_aus: str | None = None
    au_scale: float = 1.0
    guidance_scale: float = 7.5
    au_guidance_scale: float | None = None
    num_inference_steps: int = 50
    height: int | None = None
    width: int | None = None


JOB_FIELDS = tuple(field.name for field in fields(Job))


@dataclass(frozen=True)
class Weights:
    """Where the model comes from: folders or Hub ids."""

    model: str
    adapter: str | None = None
    adapter_variant: str | None = None


# --------------------------------------------------------------------------------------------------------------------
# What is asked for. All of it is checked before a model is loaded.
# --------------------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)


def number_or_none(text: str) -> float | None:
    return None if text == "none" else float(text)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The arguments. Those that are fields of `Job` are there only if they were given."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--output", required=True, type=Path, help="PNG file; with --batch, a folder")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--sweep", metavar="AU=A:B:N", help="N pictures in a row, one AU going from A to B")
    mode.add_argument("--grid", action="store_true", help="a sheet of all 12 AUs, each from 0 to 5")
    mode.add_argument("--presets", nargs="*", metavar="AUS", help="a sheet of these expressions, or of all presets")
    mode.add_argument(
        "--demo", action="store_true", help="a sheet of the grid and some presets, of a person or --prompt"
    )
    mode.add_argument("--batch", type=Path, metavar="JSONL", help="a file with one job a line")
    parser.add_argument("--overwrite", action="store_true", help="in a batch, replace files that show something else")

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

    model = parser.add_argument_group(
        "the model", f"A model folder may bring other defaults in {MODEL_DEFAULTS_NAME}; the embedded one does."
    )
    model.add_argument("--model", default=str(EMBEDDED_MODEL), help="folder or Hub id (default: the embedded model)")
    model.add_argument("--adapter", help="folder or Hub id of the AU adapter (default: the one beside the model)")
    model.add_argument("--adapter-variant", help="sd15: of the published adapter, the files for Stable Diffusion 1.5")
    model.add_argument("--device", help="as torch names it (default: the accelerator, if there is one)")
    model.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="(default: float32 on cpu, else 16)"
    )
    model.add_argument("--batch-size", type=int, default=4, help="pictures at once (default: 4)")

    args = parser.parse_args(argv)
    if args.batch_size < 1:
        raise ValueError(f"`--batch-size` has to be a whole number from 1 on, but is {args.batch_size}.")
    args.device = pick_device(args.device)
    args.dtype = args.dtype or ("float32" if args.device.type == "cpu" else "float16")
    return args


def pick_device(name: str | None) -> torch.device:
    """The device of this name; without one, the accelerator that torch finds, or the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    devices = {"cpu": 1} | ({accelerator.type: torch.accelerator.device_count()} if accelerator else {})
    if name is None:
        return torch.device(list(devices)[-1])
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


def check_output(path: Path, is_folder: bool = False) -> None:
    """Raise an error if nothing can be written at `path`. Creates nothing."""
    if path.exists() and path.is_dir() != is_folder:
        raise OSError(f"`--output` is {str(path)!r}, which is {'no' if is_folder else 'a'} folder.")
    if not is_folder and path.suffix.lower() != ".png":
        raise ValueError(f"`--output` is {str(path)!r}. Pictures are PNG files: give it the ending .png.")
    folder = (path if is_folder else path.parent).resolve()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OSError(f"`--output` is {str(path)!r}, but nothing can be written into {str(existing)!r}.")


def make_job(values: Mapping, spell: Callable[[str], str] = str) -> Job:
    """A checked `Job` from raw values of its fields; `spell` gives the name of a field in messages."""
    prompt, tag = extract_au_tags(values.get("prompt", ""), spell("prompt"))
    if not prompt.strip():
        raise ValueError(f"`{spell('prompt')}` is empty. Say what to draw, such as 'a girl in a park'.")
    if tag is not None and values.get("aus") is not None:
        raise ValueError(f"AUs stand in `{spell('prompt')}` and in `{spell('aus')}`. Write them in one of the two.")
    aus = values.get("aus") if tag is None else tag
    expressions = {"aus": aus, "negative_aus": values.get("negative_aus")}
    canonical = {name: None if aus is None else _canonical(aus, spell(name)) for name, aus in expressions.items()}
    job = Job(**{**values, "prompt": prompt, **canonical})

    for name in ("prompt", "negative_prompt"):
        text = getattr(job, name)
        # The command line and JSON can both carry halves of characters, which no file can.
        if text is not None and (not isinstance(text, str) or re.search("[\ud800-\udfff]", text)):
            raise ValueError(f"`{spell(name)}` has to be Unicode text, but is {text!r}.")
    for name, low, high in (("seed", 0, MAX_SEED), ("num_inference_steps", 1, 1000)):
        value = getattr(job, name)
        if not _is_integer(value) or not low <= value <= high:
            raise ValueError(f"`{spell(name)}` has to be a whole number from {low} to {high}, but is {value!r}.")
    for name in ("height", "width"):
        value = getattr(job, name)
        if value is not None and (not _is_integer(value) or value < 8 or value % 8):
            raise ValueError(f"`{spell(name)}` is in pixels and has to be a multiple of 8, but is {value!r}.")
    for name in ("au_scale", "guidance_scale", "au_guidance_scale"):
        value = getattr(job, name)
        is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number and (name, value) != ("au_guidance_scale", None):
            raise ValueError(f"`{spell(name)}` has to be a finite number, but is {value!r}.")
    if job.aus is None and job.negative_aus is not None:
        raise ValueError(f"`{spell('negative_aus')}` says what to guide away from, but no `{spell('aus')}` where to.")
    return job


def _canonical(aus, label: str) -> str:
    intensities = parse_aus(aus, label)
    if len(intensities) != 1:
        raise ValueError(f"`{label}` holds {len(intensities)} expressions, but a picture has one. Make a job of each.")
    return format_aus(intensities)


def _is_integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def read_model_defaults(model: str) -> dict:
    """
    What suits a model best, from the optional `fineface.json` in its folder: `num_inference_steps`, `guidance_scale`,
    `au_guidance_scale`, and `size`, which is height and width in pixels.
    """
    path = Path(model) / MODEL_DEFAULTS_NAME
    if not path.is_file():
        return {}
    with _errors_at(path):
        defaults = _read_json_object(path.read_bytes())
        _check_keys(defaults, ("num_inference_steps", "guidance_scale", "au_guidance_scale", "size"))
        if "size" in defaults:
            defaults["height"] = defaults["width"] = defaults.pop("size")
        make_job({"prompt": "any", **defaults})
    return defaults


def read_jobs(path: Path, defaults: Mapping) -> dict[str, Job]:
    """
    The jobs of a JSON Lines file, by the name of the picture each makes. A job without `output` is named by its line:
    `00001.png`.

    Raises:
        ValueError: if a line is no JSON object, or has an unknown key or a value that cannot be; with its number.
    """
    jobs, line_numbers = {}, {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        with _errors_at(f"{path}, line {number}"):
            values = _read_json_object(line)
            _check_keys(values, (*JOB_FIELDS, "output"))
            name = _check_name(values.pop("output", f"{number:05d}.png"))
            # Not every disk tells upper from lower case.
            first_number = line_numbers.setdefault(name.casefold(), number)
            if first_number != number:
                raise ValueError(f"`output` is {name!r}, as in line {first_number}. Each job needs its own.")
            jobs[name] = make_job({**defaults, **values})
    if not jobs:
        raise ValueError(f"{path} holds no job. Write one JSON object a line.")
    return jobs


@contextmanager
def _errors_at(place) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _read_json_object(data: bytes) -> dict:
    try:
        values = json.loads(data.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"this is no JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError('this is no JSON object, such as {"prompt": "a girl in a park", "aus": "6C+12D"}.')
    return values


def _check_keys(values: Mapping, known: tuple[str, ...]) -> None:
    unknown = [key for key in values if key not in known]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no key here. The keys are {', '.join(known)}.")


def _check_name(name) -> str:
    is_name = isinstance(name, str) and name.isprintable() and name.lower().endswith(".png")
    if not is_name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"`output` has to name a .png file inside the `--output` folder, but is {name!r}.")
    return Path(name).as_posix()


# --------------------------------------------------------------------------------------------------------------------
# Sheets: tables of jobs, which become tables of pictures.
# --------------------------------------------------------------------------------------------------------------------


def sweep_table(job: Job, sweep: str) -> Table:
    """One row in which an AU rises beside the other AUs of `job`; of `"AU12=0:5:6"`, 6 pictures from 0 to 5."""
    match = re.fullmatch("(?:AU)?0*([0-9]+)=([^:]+):([^:]+):([0-9]{1,9})", sweep.strip(), flags=re.IGNORECASE)
    count = int(match[4]) if match else 0
    if not 2 <= count <= MAX_SWEEP_COUNT:
        raise ValueError(
            f"`--sweep` is {sweep!r}. Write AU=FROM:TO:COUNT, such as AU12=0:5:6, with a count from 2 to"
            f" {MAX_SWEEP_COUNT}."
        )
    name = f"AU{match[1]}"
    for end in (match[2], match[3]):
        parse_aus(f"{name}={end}", "--sweep")
    if _intensities(job)[name]:
        raise ValueError(f"`--sweep` and `--aus` both set {name}. Take it out of `--aus`.")
    first, last = float(match[2]), float(match[3])
    values = [first + (last - first) * i / (count - 1) for i in range(count)]
    label = _label(ACTION_UNITS[AU_NAMES.index(name)])
    return Table([[_with_au(job, name, value) for value in values]], [label], [f"{value:.3g}" for value in values])


def grid_table(job: Job, units=ACTION_UNITS) -> Table:
    """A row of rising intensities for each of `units`, beside the other AUs of `job`."""
    rows = [[_with_au(job, unit.name, value) for value in GRID_INTENSITIES] for unit in units]
    return Table(rows, [_label(unit) for unit in units], [str(value) for value in GRID_INTENSITIES])


def preset_table(job: Job, expressions: list[str]) -> Table:
    """A row of expressions in any form of `parse_aus`, each under what it was called."""
    return Table([[replace(job, aus=_canonical(aus, "--presets")) for aus in expressions]], [], expressions)


def demo_tables(job: Job) -> list[list[Table]]:
    """All AUs in two blocks, and presets below, in the same columns."""
    grids = [grid_table(job, ACTION_UNITS[:6]), grid_table(job, ACTION_UNITS[6:])]
    presets = [preset_table(job, list(names)) for names in DEMO_PRESETS]
    return [grids, [replace(table, row_labels=[label]) for table, label in zip(presets, ("Presets", ""), strict=True)]]


def _intensities(job: Job) -> dict[str, float]:
    return dict(zip(AU_NAMES, parse_aus(job.aus or "")[0].tolist(), strict=True))


def _with_au(job: Job, name: str, value: float) -> Job:
    return replace(job, aus=format_aus(_intensities(job) | {name: value}))


def _label(unit) -> str:
    return f"{unit.name}\n{unit.facs_name}"


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
        image.save(file, "PNG", pnginfo=chunks)
    os.replace(unfinished, path)


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
    versions = {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")}
    return _names(weights) | {"dtype": args.dtype, "versions": versions}


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


def make_batches(jobs: list[Job], batch_size: int) -> list[list[Job]]:
    """Jobs that one call of the pipeline can serve, at most `batch_size` in each."""
    by_settings = {}
    for job in jobs:
        settings = replace(job, prompt="", aus=job.aus and "", seed=0, negative_prompt=None, negative_aus=None)
        by_settings.setdefault(settings, []).append(job)
    return [group[i : i + batch_size] for group in by_settings.values() for i in range(0, len(group), batch_size)]


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
    jobs: list[Job], weights: Weights, args: argparse.Namespace, num_finished: int = 0
) -> Iterator[tuple[Job, Image.Image]]:
    """Load the model and yield each job with its picture, behind one progress bar."""
    with quiet():
        pipeline = load_pipeline(weights, args.device, getattr(torch, args.dtype))
        if pipeline.au_adapter is None and any(job.aus is not None for job in jobs):
            raise ValueError(f"{weights.model!r} has no AU adapter, which AUs need. Name one with `--adapter`.")
        total = num_finished + len(jobs)
        # A single picture shows its denoising steps instead.
        pipeline.set_progress_bar_config(disable=total > 1)
        with tqdm(total=total, initial=num_finished, unit="picture", mininterval=0, disable=total == 1) as bar:
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


def run_batch(jobs: Mapping[str, Job], weights: Weights, args: argparse.Namespace) -> str:
    """Write each picture as soon as it is there, but for those that are finished already."""
    paths_by_job, num_pending = {}, 0
    for name, job in jobs.items():
        path = args.output / name
        check_output(path)
        if not is_finished(path, job, weights, args.overwrite):
            paths_by_job.setdefault(job, []).append(path)
            num_pending += 1
    num_finished = len(jobs) - num_pending
    if paths_by_job:
        for job, image in generate(list(paths_by_job), weights, args, len(jobs) - len(paths_by_job)):
            for path in paths_by_job[job]:
                write_picture(image, path, asdict(job) | describe(weights, args))
    return f"{args.output}: {num_pending} new pictures, {num_finished} from before"


def run(args: argparse.Namespace) -> str:
    """Check all that is asked for, do it, and say where the result is."""
    weights = Weights(args.model, args.adapter, args.adapter_variant)
    check_weights(weights)
    check_output(args.output, is_folder=args.batch is not None)
    given = {name: value for name, value in vars(args).items() if name in JOB_FIELDS}
    values = read_model_defaults(args.model) | given
    if args.batch is not None:
        return run_batch(read_jobs(args.batch, values), weights, args)
    job = make_job(
        {"prompt": DEMO_PROMPT} | values if args.demo else values, lambda name: "--" + name.replace("_", "-")
    )
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
        print(run(parse_args(argv)))
    except KeyboardInterrupt:
        print("interrupted; a batch goes on from here with the same command", file=sys.stderr)
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
