# SPDX-License-Identifier: Apache-2.0
"""Loads a pipeline, and draws jobs with it in batches."""

import argparse
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from PIL import Image
from tqdm import tqdm

from action_units import AU_NAMES, au_columns
from au_encoder import ENCODER_CONFIG_NAME, IP_ADAPTER_NAME, read_ip_adapter_au_names
from drawing.jobs import Job, errors_at
from program import check_folder_or_hub_id


# The fields of a `Job` that go to the pipeline as they are.
SAMPLING = ("num_inference_steps", "guidance_scale", "au_guidance_scale", "au_scale")


@dataclass(frozen=True)
class Weights:
    """The folders or Hub ids of a model and its adapter."""

    model: str
    adapter: str | None = None
    adapter_variant: str | None = None


def check_weights(weights: Weights) -> None:
    """Raise an error for a path without a model. Only the Hub knows whether a Hub id exists."""
    check_folder_or_hub_id(weights.model, "`--model`")
    if Path(weights.model).is_dir() and not (Path(weights.model) / "model_index.json").is_file():
        raise FileNotFoundError(f"`--model` is {weights.model!r}, a folder without a model: no model_index.json.")
    if weights.adapter is not None:
        check_folder_or_hub_id(weights.adapter, "`--adapter`")
    elif weights.adapter_variant is not None:
        raise ValueError("`--adapter-variant` chooses among the files of an `--adapter`, but there is none.")


def read_au_names(weights: Weights) -> tuple[str, ...]:
    """
    Read the AUs of the adapter from its config, before any weights are loaded. They are the paper's twelve if the
    config names none, or if there is no adapter; a missing adapter is an error when it is loaded.

    Raises:
        ValueError: if they are not names of AUs, see `au_columns`.
    """
    source = weights.adapter or weights.model
    path = Path(source) / ENCODER_CONFIG_NAME
    try:
        path = path if Path(source).is_dir() else Path(hf_hub_download(source, ENCODER_CONFIG_NAME))
        au_names = json.loads(path.read_text(encoding="utf-8")).get("au_names")
    except (OSError, ValueError, AttributeError):
        path = Path(source) / IP_ADAPTER_NAME
        au_names = read_ip_adapter_au_names(path) if path.is_file() else None
    if au_names is None or weights.adapter_variant is not None:
        return AU_NAMES
    with errors_at(path):
        au_columns(au_names)
    return tuple(au_names)


@contextmanager
def quiet() -> Iterator[None]:
    """Show no progress bars while weights are loaded, and no warnings of transformers about unused weights."""
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


@contextmanager
def complete_weights(model: str) -> Iterator[None]:
    """
    Raise a ValueError if a text encoder that is loaded inside lacks weights: transformers draws them at random, and
    says so only in its log.
    """
    logger, records = logging.getLogger("transformers.modeling_utils"), []
    level, collect = logger.level, records.append
    logger.setLevel(logging.WARNING)
    # A filter that returns nothing keeps a record out of the log.
    logger.addFilter(collect)
    try:
        yield
    finally:
        logger.removeFilter(collect)
        logger.setLevel(level)
    log = "\n".join(record.getMessage() for record in records)
    missing = re.findall(r"^(\S+) *\| *(?:\x1b\[\d+m)*MISSING", log, flags=re.MULTILINE)
    if missing:
        raise ValueError(
            f"{model!r} lacks {len(missing)} weights, such as {missing[0]}, which would be random numbers."
            " Copy or download the model again."
        )


def pipeline_class_of(model: str, revision: str | None = None) -> type:
    """
    The class of pipelines for a base model, by the text encoders that its `model_index.json` names.

    Raises:
        OSError: if there is no model.
        ValueError: if it is of a family that AUs have no pipeline for.
    """
    from diffusers import DiffusionPipeline

    from pipeline_fineface import FineFacePipeline
    from pipeline_fineface_xl import FineFaceXLPipeline

    index = DiffusionPipeline.load_config(model, revision=revision)
    components = {name for name, entry in index.items() if isinstance(entry, list | tuple) and entry[0] is not None}
    text_encoders = sorted(name for name in components if name.startswith("text_encoder"))
    classes = {("text_encoder",): FineFacePipeline, ("text_encoder", "text_encoder_2"): FineFaceXLPipeline}
    if "unet" not in components or tuple(text_encoders) not in classes:
        raise ValueError(
            f"{model!r} is a {index.get('_class_name')} of {', '.join(sorted(components))}. AUs have pipelines for"
            " Stable Diffusion 1.x, 2.x and XL: a unet with one text_encoder, or with text_encoder_2 beside it."
        )
    return classes[tuple(text_encoders)]


def load_pipeline(weights: Weights, device: torch.device, dtype: torch.dtype, needs_adapter: bool = False):
    """
    A `FineFacePipeline`, or a `FineFaceXLPipeline` for a base of that family.

    Raises:
        OSError: if the model or the adapter cannot be found.
        ValueError: if a file is broken, the adapter does not fit the model, or there is none although one is needed.
    """
    pipeline_class = pipeline_class_of(weights.model)
    without_adapter = {} if weights.adapter is None else {"au_adapter": None}
    with complete_weights(weights.model):
        pipeline = pipeline_class.from_pretrained(weights.model, dtype=dtype, **without_adapter)
    if weights.adapter is not None:
        pipeline.load_au_adapter(weights.adapter, variant=weights.adapter_variant)
    if needs_adapter and pipeline.au_adapter is None:
        raise ValueError(f"{weights.model!r} has no AU adapter, which AUs need. Name one with `--adapter`.")
    return pipeline.to(device)


def fuse_lora(pipeline) -> None:
    """
    Fuse the LoRA into the weights. It cannot be taken out again, but a step then costs what a step of plain Stable
    Diffusion costs. The pictures change by rounding.
    """
    pipeline.fuse_lora(components=["unet"])
    pipeline.unload_lora_weights()


def make_batches(jobs: list[Job], batch_size: int) -> list[list[Job]]:
    """Bring jobs of equal settings together, in batches of at most `batch_size`. One call draws one batch."""
    by_settings = {}
    for job in jobs:
        settings = replace(
            job, prompt="", seed=0, aus=job.aus and "", negative_prompt=job.negative_prompt and "", negative_aus=None
        )
        by_settings.setdefault(settings, []).append(job)
    return [group[i : i + batch_size] for group in by_settings.values() for i in range(0, len(group), batch_size)]


def generate_batch(pipeline, jobs: list[Job], **options) -> list[Image.Image]:
    """
    Draw one batch of `make_batches`. Each picture has its own generator, so it does not depend on the others.
    `options` are more arguments of the pipeline, or replace some.
    """
    has_aus, has_negative = jobs[0].aus is not None, jobs[0].negative_prompt is not None
    arguments = {
        "prompt": [job.prompt for job in jobs],
        # To SDXL, no negative prompt is something else than an empty one: it was trained with zeros in its place.
        "negative_prompt": [job.negative_prompt for job in jobs] if has_negative else None,
        "aus": [job.aus for job in jobs] if has_aus else None,
        "negative_aus": [job.negative_aus for job in jobs] if has_aus else None,
        # On the CPU, a seed gives the same numbers for every device.
        "generator": [torch.Generator().manual_seed(job.seed) for job in jobs],
        **{name: getattr(jobs[0], name) for name in (*SAMPLING, "height", "width")},
    }
    return pipeline(**arguments | options).images


def draw_jobs(
    jobs: list[Job], weights: Weights, args: argparse.Namespace, num_finished: int = 0, silent: bool = False
) -> Iterator[tuple[Job, Image.Image]]:
    """
    Load the model and yield each job with its picture, under one progress bar. `args` are those of `generate.py`:
    `device`, `dtype` and `batch_size`.
    """
    with quiet():
        has_aus = any(job.aus is not None for job in jobs)
        pipeline = load_pipeline(weights, args.device, getattr(torch, args.dtype), needs_adapter=has_aus)
        fuse_lora(pipeline)
        # A single picture shows its denoising steps instead of a bar of pictures.
        is_single = num_finished + len(jobs) == 1
        pipeline.set_progress_bar_config(disable=silent or not is_single)
        yield from draw_batches(pipeline, jobs, args.batch_size, num_finished, silent or is_single)


def draw_batches(
    pipeline, jobs: list[Job], batch_size: int = 4, num_finished: int = 0, silent: bool = False
) -> Iterator[tuple[Job, Image.Image]]:
    """Yield each job with its picture, under a progress bar that begins at `num_finished`."""
    total = num_finished + len(jobs)
    with tqdm(total=total, initial=num_finished, unit="picture", mininterval=0, disable=silent) as bar:
        for batch in make_batches(jobs, batch_size):
            for job, image in zip(batch, generate_batch(pipeline, batch), strict=True):
                yield job, image
                bar.update()
