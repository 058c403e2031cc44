# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
Measures how much each optimization of `train_fineface.py` saves: `python -m benchmarks.bench_training`.

The first row trains a textbook implementation of the paper's recipe: two attentions with matrices of scores in each
layer, gradient checkpointing, and pictures and captions that are encoded at every step. The next rows train ours, each
with one optimization more. All rows run the loop of `train_fineface.py` on pictures from files, with everything that
belongs to a step: data, forward and backward pass, clipping, optimizer. All weights but the toy model's are random.
"""

import argparse
import gc
import itertools
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets.utils.logging import disable_progress_bar
from diffusers import DDPMScheduler
from PIL import Image
from torch import nn

from action_units import AU_NAMES
from benchmarks.bench_inference import ARCHITECTURES, DTYPES, default_resolution, set_textbook_processors
from benchmarks.tables import Report, count, markdown_table
from face_data.store import write_lines
from program import Parser, pick_device, run_program
from toy_faces.renderer import caption, render, sample_aus, sample_portrait
from train_fineface import FineFaceModel, attention_for_training, make_accelerator, make_model, train
from training.checkpoints import TrainingState
from training.config import TrainConfig
from training.data import PixelInputs, TrainingSamples, cache_inputs, load_training_data
from training.encoders import StableDiffusionEncoders


MIXED_PRECISION = {"float32": "no", "float16": "fp16", "bfloat16": "bf16"}
PICTURES = 64


@dataclass(frozen=True)
class Row:
    label: str
    settings: dict
    textbook: bool = False


ROWS = {
    "textbook": Row("textbook", {"gradient_checkpointing": True}, textbook=True),
    "one-token": Row("one token added, fused attention", {"gradient_checkpointing": True}),
    "no-checkpointing": Row("… without gradient checkpointing", {}),
    "cached": Row("… latents and captions from the cache", {"cache_latents": True}),
    "compiled": Row("… and `torch.compile`", {"cache_latents": True, "torch_compile": True}),
}
"""Each row by its name on the command line."""


class TextbookModel(FineFaceModel):
    """Passes the AU token behind the tokens of the text, and each layer attends to both."""

    def __init__(self, unet: nn.Module, au_adapter: nn.Module):
        super().__init__(unet, au_adapter)
        set_textbook_processors(unet, au_adapter)
        # The layers have copies of these now.
        au_adapter.to_k_au.requires_grad_(False)
        au_adapter.to_v_au.requires_grad_(False)

    def forward(self, noisy_latents, timesteps, prompt_embeds, au_intensities, added_cond_kwargs=None):
        au_tokens = self.au_adapter.encoder(au_intensities).to(self.unet.dtype)
        tokens = torch.cat([prompt_embeds.to(self.unet.dtype), au_tokens], dim=1)
        return self.unet(noisy_latents.to(self.unet.dtype), timesteps, tokens).sample


@dataclass(frozen=True)
class Measured:
    label: str
    seconds: float
    peak_bytes: int | None


def write_pictures(folder: Path, resolution: int) -> None:
    """Write portraits in the size of training, as an image folder that the trainer reads."""
    folder.mkdir()
    lines = []
    for seed in range(PICTURES):
        portrait, aus = sample_portrait(seed), sample_aus(seed)
        picture = render(portrait, aus).resize((resolution, resolution), Image.Resampling.BICUBIC)
        picture.save(folder / f"{seed}.jpg", quality=95)
        named = dict(zip(AU_NAMES, aus.tolist(), strict=True))
        lines.append({"file_name": f"{seed}.jpg", "text": caption(portrait), **named})
    write_lines(folder / "metadata.jsonl", lines)


def measure(row: Row, folder: Path, args: argparse.Namespace) -> Measured:
    architecture = ARCHITECTURES[args.model]
    components = architecture.make_components(args.device, DTYPES[args.dtype])
    resolution = args.resolution or default_resolution(components)
    pictures = folder / f"pictures-{resolution}"
    if not pictures.exists():
        write_pictures(pictures, resolution)
    config = TrainConfig(
        pretrained_model_name_or_path="random",
        train_data_dir=pictures,
        output_dir=folder / "run",
        train_batch_size=args.batch_size,
        rank=architecture.lora_rank(),
        max_train_steps=args.warm_up + args.steps + 1,
        checkpointing_steps=1_000_000,
        mixed_precision=MIXED_PRECISION[args.dtype],
        dataloader_num_workers=args.workers,
        resolution=resolution,
        report_to="none",
        **row.settings,
    )
    accelerator = make_accelerator(config)
    tokenizer, text_encoder, vae = (components.pop(name) for name in ("tokenizer", "text_encoder", "vae"))
    encoders = StableDiffusionEncoders([tokenizer], [text_encoder], vae)
    inputs = PixelInputs(load_training_data(config), encoders, resolution)
    if config.cache_latents:
        inputs = cache_inputs(inputs, config, accelerator)
        encoders.unload()
    gc.collect()
    if args.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(args.device)
    unet = components["unet"].train()
    model = make_model(unet, config, DTYPES[args.dtype])
    if row.textbook:
        model = TextbookModel(unet, model.au_adapter)
    model.to(args.device)
    samples_per_step = args.batch_size * accelerator.num_processes
    noise_scheduler = DDPMScheduler.from_config(components["scheduler"].config)
    samples = TrainingSamples(inputs, noise_scheduler.config.num_train_timesteps, config, samples_per_step)
    state = TrainingState(model, None, samples_per_step, len(inputs.data))
    marks = []

    # A step ends by copying its loss to the CPU, so the device is idle when the next forward pass begins.
    model.register_forward_pre_hook(lambda *_: marks.append(time.perf_counter()))
    with attention_for_training(args.device, DTYPES[args.dtype]):
        train(config, accelerator, state, samples, noise_scheduler, encoders)
    seconds = [later - earlier for earlier, later in itertools.pairwise(marks)][args.warm_up :]
    peak = torch.cuda.max_memory_allocated(args.device) if args.device.type == "cuda" else None
    return Measured(row.label, statistics.median(seconds), peak)


def format_measured(measured: list[Measured], batch_size: int) -> str:
    lines = []
    for number, one in enumerate(measured):
        first, before = measured[0].seconds / one.seconds, measured[max(0, number - 1)].seconds / one.seconds
        peak = "–" if one.peak_bytes is None else f"{one.peak_bytes / 2**30:.1f}"
        speed = f"{batch_size / one.seconds:.2f}"
        lines.append([one.label, speed, f"{first:.2f}×", f"{before:.2f}×", f"{1000 * one.seconds:.0f}", peak])
    header = ["training", "images/s", f"to {measured[0].label}", "to the row before", "ms a step", "peak GiB"]
    return markdown_table(header, lines)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("benchmarks.bench_training", __doc__)
    add = parser.add_argument
    add("--device", help="(default: the accelerator, if there is one)")
    add("--model", choices=ARCHITECTURES, help="(default: toy on cpu, else sd21)")
    add("--dtype", choices=DTYPES, help="(default: float32 on cpu, else bfloat16)")
    add("--batch-size", type=count, help="(default: 8 on cpu, else 16)")
    add("--resolution", type=count, metavar="PIXELS", help="(default: the model's)")
    add("--rows", nargs="+", choices=ROWS, help="(default: all, on cpu without compiled)")
    add("--steps", type=count, help="steps of which the median counts (default: 6 on cpu, else 30)")
    add("--warm-up", type=count, help="steps before them (default: 2 on cpu, else 10)")
    add("--workers", type=int, help="processes that prepare data (default: 0 on cpu, else 8)")
    add("--output", type=Path, metavar="FILE.md", help="write the table to a file as well")
    args = parser.parse_args(argv)
    args.device = pick_device(args.device)
    defaults = {"model": "sd21", "dtype": "bfloat16", "batch_size": 16, "steps": 30, "warm_up": 10, "workers": 8}
    if args.device.type == "cpu":
        defaults = {"model": "toy", "dtype": "float32", "batch_size": 8, "steps": 6, "warm_up": 2, "workers": 0}
    rows = [name for name in ROWS if name != "compiled" or args.device.type != "cpu"]
    given = {name: value for name, value in vars(args).items() if value is not None}
    return argparse.Namespace(**{**vars(args), **defaults, "rows": rows, **given})


def run(args: argparse.Namespace) -> None:
    disable_progress_bar()
    report = Report(args.output, args.device)
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.rows:
            torch._dynamo.reset()
            measured.append(measure(ROWS[name], Path(folder), args))
            gc.collect()
    what = f"{args.dtype}, batch {args.batch_size}, median of {args.steps} steps"
    report.add(f"{ARCHITECTURES[args.model].title}, {what}\n\n{format_measured(measured, args.batch_size)}")


def main(argv: list[str] | None = None) -> int:
    return run_program(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
