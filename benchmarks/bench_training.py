# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
Measures how much each optimization of `train_fineface.py` saves: `python -m benchmarks.bench_training`.

The first row trains a textbook implementation of the paper's recipe, and each row below has one optimization more. All
run the whole loop of `train_fineface.py` on pictures from files: on a CPU with the toy model in float32, else with one
of the size of Stable Diffusion 2.1 with random weights, in bfloat16.
"""

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from datasets.utils.logging import disable_progress_bar
from diffusers import DDPMScheduler
from PIL import Image

from action_units import AU_NAMES
from benchmarks.pipelines import ARCHITECTURES, LORA_RANK, resolution_of, set_textbook_processors
from benchmarks.tables import DTYPES, count, in_units, markdown_table, run_benchmark
from face_data.store import write_lines
from paper.baselines import BaselineModel, encode_data
from toy_faces.pictures import aus_of, captions_of, render_seed
from train_fineface import attention_for_training, make_accelerator, make_model, train
from training.checkpoints import TrainingState
from training.config import TrainConfig
from training.data import TrainingSamples, load_training_data
from training.encoders import StableDiffusionEncoders


PICTURES = 64
ROWS = {
    "textbook": ("textbook", {"gradient_checkpointing": True}),
    "one-token": ("one token added, fused attention", {"gradient_checkpointing": True}),
    "no-checkpointing": ("… without gradient checkpointing", {}),
    "cached": ("… latents and captions from the cache", {"cache_latents": True}),
    "compiled": ("… and `torch.compile`", {"cache_latents": True, "torch_compile": True}),
}
"""The label and the settings of each row, by its name on the command line."""


def setup_on(device: torch.device) -> tuple[str, str, int]:
    """The model that is trained there, its dtype, and the number of workers that read pictures."""
    return ("toy", "float32", 0) if device.type == "cpu" else ("sd21", "bfloat16", 8)


def write_pictures(folder: Path, resolution: int) -> None:
    """Write portraits in the size of training, as an image folder that the trainer reads."""
    folder.mkdir()
    seeds, lines = range(PICTURES), []
    for seed, text, aus in zip(seeds, captions_of(seeds, 0), aus_of(seeds).tolist(), strict=True):
        picture = Image.fromarray(render_seed(seed)).resize((resolution, resolution), Image.Resampling.BICUBIC)
        picture.save(folder / f"{seed}.jpg", quality=95)
        lines.append({"file_name": f"{seed}.jpg", "text": text, **dict(zip(AU_NAMES, aus, strict=True))})
    write_lines(folder / "metadata.jsonl", lines)


def measure(name: str, folder: Path, args: argparse.Namespace) -> tuple[float, int | None]:
    """Returns the median seconds of a step of the row `name`, and the peak memory of a GPU in bytes."""
    pictures, (model_name, dtype_name, workers) = folder / "pictures", setup_on(args.device)
    dtype, components = DTYPES[dtype_name], ARCHITECTURES[model_name][1](args.device, DTYPES[dtype_name])
    resolution = resolution_of(components)
    if not pictures.exists():
        write_pictures(pictures, resolution)
    config = TrainConfig(
        pretrained_model_name_or_path="random",
        train_data_dir=pictures,
        output_dir=folder / "run",
        train_batch_size=args.batch_size,
        rank=LORA_RANK,
        max_train_steps=args.warm_up + args.steps + 1,
        checkpointing_steps=1_000_000,
        mixed_precision="no" if dtype == torch.float32 else "bf16",
        dataloader_num_workers=workers,
        resolution=resolution,
        report_to="none",
        **ROWS[name][1],
    )
    accelerator = make_accelerator(config)
    tokenizer, text_encoder, vae = (components.pop(name) for name in ("tokenizer", "text_encoder", "vae"))
    encoders, unet = StableDiffusionEncoders([tokenizer], [text_encoder], vae), components["unet"].train()
    inputs = encode_data(load_training_data(config), config, accelerator, encoders, unet)
    if config.cache_latents:
        encoders.unload()
    gc.collect()
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(args.device)
    model = make_model(unet, config, dtype)
    if name == "textbook":
        set_textbook_processors(unet, model.au_adapter)
        model = BaselineModel(unet, model.au_adapter.encoder)
    model.to(args.device)
    samples_per_step = args.batch_size * accelerator.num_processes
    noise_scheduler = DDPMScheduler.from_config(components["scheduler"].config)
    samples = TrainingSamples(inputs, noise_scheduler.config.num_train_timesteps, config, samples_per_step)
    state = TrainingState(model, None, samples_per_step, len(inputs.data))
    marks = []

    # A step ends by copying its loss to the CPU, so the device is idle when the next forward pass begins.
    model.register_forward_pre_hook(lambda *_: marks.append(time.perf_counter()))
    with attention_for_training(args.device, dtype):
        train(config, accelerator, state, samples, noise_scheduler, encoders)
    peak = torch.cuda.max_memory_allocated(args.device) if args.device.type == "cuda" else None
    return float(np.median(np.diff(marks)[args.warm_up :])), peak


def make_tables(args: argparse.Namespace) -> Iterator[str]:
    disable_progress_bar()
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.rows:
            torch._dynamo.reset()
            measured[name] = measure(name, Path(folder), args)
            gc.collect()
    first, before, rows = args.rows[0], args.rows[0], []
    for name, (seconds, peak) in measured.items():
        ratios = (f"{measured[other][0] / seconds:.2f}×" for other in (first, before))
        cells = [f"{args.batch_size / seconds:.2f}", *ratios, f"{1000 * seconds:.0f}", in_units(peak, 2**30)]
        rows.append([ROWS[name][0], *cells])
        before = name
    header = ["training", "images/s", f"to {ROWS[first][0]}", "to the row before", "ms a step", "peak GiB"]
    model_name, dtype, _ = setup_on(args.device)
    what = f"{dtype}, batch {args.batch_size}, median of {args.steps} steps"
    yield f"{ARCHITECTURES[model_name][0]}, {what}\n\n{markdown_table(header, rows)}"


OPTIONS = {
    "--batch-size": {"type": count, "default": (8, 16), "help": "(default: 8 on cpu, else 16)"},
    "--rows": {
        **{"nargs": "+", "choices": ROWS, "default": (list(ROWS)[:-1], list(ROWS))},
        "help": "(default: all, on cpu without compiled)",
    },
    "--steps": {"type": count, "default": (6, 30), "help": "that are measured (default: 6 on cpu, else 30)"},
    "--warm-up": {"type": count, "default": (2, 10), "help": "steps before them (default: 2 on cpu, else 10)"},
}


def main(argv: list[str] | None = None) -> int:
    return run_benchmark("benchmarks.bench_training", __doc__, OPTIONS, make_tables, argv)


if __name__ == "__main__":
    sys.exit(main())
