# SPDX-License-Identifier: Apache-2.0
"""
Measures how much each optimization of `train_fineface.py` saves: `python -m benchmarks.bench_training`.

The first row trains a textbook implementation of the paper's recipe, and each row below has one optimization more:
docs/training.md says on what.
"""

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets.utils.logging import disable_progress_bar
from diffusers import DDPMScheduler
from PIL import Image

from action_units import AU_NAMES
from benchmarks.pipelines import ARCHITECTURES, make_textbook
from benchmarks.tables import choices, count, markdown_table, run_benchmark, take_peak
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


def write_pictures(folder: Path, resolution: int) -> None:
    """Write portraits in the size of training, as an image folder that the trainer reads."""
    folder.mkdir()
    seeds, lines = range(PICTURES), []
    for seed, text, aus in zip(seeds, captions_of(seeds, 0), aus_of(seeds).tolist(), strict=True):
        picture = Image.fromarray(render_seed(seed)).resize((resolution, resolution), Image.Resampling.BICUBIC)
        picture.save(folder / f"{seed}.jpg", quality=95)
        lines.append({"file_name": f"{seed}.jpg", "text": text, **dict(zip(AU_NAMES, aus, strict=True))})
    write_lines(folder / "metadata.jsonl", lines)


def measure(name: str, folder: Path, components: dict, args: argparse.Namespace) -> tuple[float, float]:
    """Returns the median seconds of a step of the row `name`, and the peak memory of a GPU in bytes."""
    pictures, is_on_cpu = folder / "pictures", args.device.type == "cpu"
    config = TrainConfig(
        pretrained_model_name_or_path="random",
        train_data_dir=pictures,
        output_dir=folder / "run",
        train_batch_size=args.batch_size,
        max_train_steps=args.warm_up + args.steps + 1,
        checkpointing_steps=1_000_000,
        mixed_precision="no" if is_on_cpu else "bf16",
        dataloader_num_workers=0 if is_on_cpu else 8,
        report_to="none",
        **ROWS[name][1],
    )
    accelerator, unet, dtype = make_accelerator(config), components["unet"], components["unet"].dtype
    # Nothing else may refer to the models that `unload` frees.
    encoders = StableDiffusionEncoders(
        [components.pop("tokenizer")], [components.pop("text_encoder")], components.pop("vae")
    )
    if not pictures.exists():
        write_pictures(pictures, encoders.vae_scale_factor * unet.config.sample_size)
    inputs = encode_data(load_training_data(config), config, accelerator, encoders, unet)
    if config.cache_latents:
        encoders.unload()
    take_peak(args.device)
    model = make_model(unet, config, dtype)
    if name == "textbook":
        make_textbook(unet, model.au_adapter)
        model = BaselineModel(unet, None)
        # The AUs take the place of a picture.
        encoders.added_cond_kwargs = lambda batch: {"image_embeds": [batch["au_intensities"][:, None]]}
    model.to(args.device)
    noise_scheduler = DDPMScheduler.from_config(components["scheduler"].config)
    samples = TrainingSamples(inputs, noise_scheduler.config.num_train_timesteps, config, args.batch_size)
    state, marks = TrainingState(model, None, args.batch_size, len(inputs.data)), []

    # A step ends by copying its loss to the CPU, so the device is idle when the next forward pass begins.
    model.register_forward_pre_hook(lambda *_: marks.append(time.perf_counter()))
    with attention_for_training(args.device, dtype):
        train(config, accelerator, state, samples, noise_scheduler, encoders)
    return float(np.median(np.diff(marks)[args.warm_up :])), take_peak(args.device)


def make_tables(args: argparse.Namespace) -> Iterator[str]:
    disable_progress_bar()
    model_name, dtype = ("toy", "float32") if args.device.type == "cpu" else ("sd21", "bfloat16")
    title, make_components = ARCHITECTURES[model_name]
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.rows:
            torch._dynamo.reset()
            # No name refers to the components here, so that those of a row are gone when the next row begins.
            measured.append(measure(name, Path(folder), make_components(args.device, getattr(torch, dtype)), args))
            gc.collect()
    seconds, peaks = np.array(measured).T
    labels, before = [ROWS[name][0] for name in args.rows], np.insert(seconds, 0, seconds[0])[:-1]
    columns = {"training": "{}", "images/s": "{:.2f}", f"to {labels[0]}": "{:.2f}×", "to the row before": "{:.2f}×"}
    columns |= {"ms a step": "{:.0f}", "peak GiB": "{:,.1f}"}
    cells = (labels, args.batch_size / seconds, seconds[0] / seconds, before / seconds, 1000 * seconds, peaks / 2**30)
    what = f"{title}, {dtype}, batch {args.batch_size}, median of {args.steps} steps"
    yield f"{what}\n\n{markdown_table(columns, zip(*cells, strict=True))}"


OPTIONS = {
    "--batch-size": {"type": count, "default": (8, 16), "help": "(default: 8 on cpu, else 16)"},
    "--rows": choices(ROWS, (list(ROWS)[:-1], list(ROWS)), "(default: all, on cpu without compiled)"),
    "--steps": {"type": count, "default": (6, 30), "help": "that are measured (default: 6 on cpu, else 30)"},
    "--warm-up": {"type": count, "default": (2, 10), "help": "steps before them (default: 2 on cpu, else 10)"},
}

main = partial(run_benchmark, "benchmarks.bench_training", __doc__, OPTIONS, make_tables)

if __name__ == "__main__":
    sys.exit(main())
