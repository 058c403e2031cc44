# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
Measures the cost of AU control as a multiple of plain Stable Diffusion: `python -m benchmarks.bench_inference`.
docs/performance.md says how, and has the command for each table.
"""

import argparse
import itertools
import math
import sys
import time
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm, trange

from benchmarks.pipelines import ARCHITECTURES, AUS, ROWS, Variant, is_xl, make_row, resolution_of
from benchmarks.tables import DTYPES, count, in_units, markdown_table, run_benchmark, synchronize


# Enough for compilation, for recording CUDA graphs after it, and for a first replay.
WARM_UP_STEPS = 4
COMPILE_MODES = ("no", "default", "reduce-overhead", "max-autotune")


def time_call(variant: Variant, batch_size: int, steps: int) -> tuple[float, float]:
    """Returns the seconds of a call, and of a denoising step in it, without the first; NaN if there is only one."""
    marks = []

    def mark(pipeline=None, step=None, timestep=None, tensors=None):
        if step in (None, 0, steps - 1):
            synchronize(variant.pipeline.unet.device)
            marks.append(time.perf_counter())
        return tensors

    mark()
    variant(batch_size, steps, mark)
    mark()
    return marks[-1] - marks[0], (marks[-2] - marks[1]) / (steps - 1) if steps > 1 else math.nan


def measure(variants: dict[str, Variant], batch_size: int, steps: int, repeats: int, mode: str) -> str:
    """Measure `variants` in `repeats` rounds of one call each. Returns a table."""
    names, peaks, rows = list(variants), {}, []
    times = {name: np.empty((repeats, 2)) for name in names}
    for name, variant in tqdm(variants.items(), desc="warm-up", leave=False):
        device = variant.pipeline.unet.device
        # The statistics leave out the memory of recorded CUDA graphs, so there is no figure with them.
        has_peak = device.type == "cuda" and mode == "no"
        if mode != "no":
            variant.pipeline.unet.compile(mode=mode, fullgraph=True, dynamic=False)
        if has_peak:
            torch.cuda.reset_peak_memory_stats(device)
        variant(batch_size, WARM_UP_STEPS if mode != "no" or device.type != "cpu" else 1)
        peaks[name] = torch.cuda.max_memory_allocated(device) if has_peak else None
    for number in trange(repeats, desc="rounds", leave=False):
        # No row is always the first, or always after the same one.
        for name in names[number % len(names) :] + names[: number % len(names)]:
            times[name][number] = time_call(variants[name], batch_size, steps)
    for name, variant in variants.items():
        call, step = np.median(times[name], axis=0)
        ratios = times[name][:, 0] / times[variant.row.baseline][:, 0]
        cells = [f"{call:.3f}", "–" if math.isnan(step) else f"{step:.4f}", f"{np.median(ratios):.3f}"]
        cells += [f"{ratios.min():.3f} – {ratios.max():.3f}", in_units(peaks[name], 2**20)]
        rows.append([variant.row.label, *cells])
    return markdown_table(["", "s / call", "s / step", "ratio", "lowest – highest", "peak MiB"], rows)


@torch.no_grad()
def step_flops(variant: Variant, batch_size: int) -> int:
    """Floating-point operations of the UNet in one denoising step with guidance."""
    pipeline, unet, is_textbook = variant.pipeline, variant.pipeline.unet, variant.row.textbook
    rows = batch_size * (3 if "au_guidance_scale" in variant.kwargs else 2)
    empty = partial(torch.empty, device=unet.device, dtype=unet.dtype)
    added, kwargs = {}, {}
    if variant.row.tokens and not is_textbook:
        kwargs["cross_attention_kwargs"] = pipeline.encode_aus(AUS, unet.device, batch_size=rows)[0]
    if "ip_adapter_image_embeds" in variant.kwargs:
        embeds = variant.kwargs["ip_adapter_image_embeds"]
        added["image_embeds"] = [empty(rows, *tensor.shape[1:]) for tensor in embeds]
    if unet.config.addition_embed_type == "text_time":
        added["text_embeds"] = empty(rows, pipeline.text_encoder_2.config.projection_dim)
        added["time_ids"] = empty(rows, 6)
    sample = empty(rows, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    text = empty(rows, pipeline.tokenizer.model_max_length + is_textbook, unet.config.cross_attention_dim)
    with FlopCounterMode(display=False) as counter:
        unet(sample, torch.zeros((), device=unet.device), text, added_cond_kwargs=added, **kwargs)
    return counter.get_total_flops()


def count_steps(variants: dict[str, Variant], batch_size: int) -> str:
    """Count what a step of each variant computes. Returns a table."""
    counts = {name: step_flops(variant, batch_size) for name, variant in variants.items()}
    ratios = {name: counts[name] / counts[ROWS[name].baseline] for name in counts}
    rows = [[ROWS[name].label, f"{counts[name] / 1e9:,.2f}", f"{ratios[name]:.5f}"] for name in counts]
    return markdown_table(["", "GFLOP / step", "ratio"], rows)


def make_table(components: dict, batch_size: int, mode: str, args: argparse.Namespace) -> str:
    # The baseline of each row is measured too.
    needed = {"plain", *args.rows, *(ROWS[row].baseline for row in args.rows)}
    # The textbook's pipeline is one for Stable Diffusion 1.x and 2.x.
    needed -= {"textbook"} if is_xl(components) else set()
    variants = {row: make_row(row, components) for row in ROWS if row in needed}
    if args.count:
        return count_steps(variants, batch_size)
    torch._dynamo.reset()
    # All variants run the code of one class, but each is compiled by itself, which would exceed the usual limit.
    with torch._dynamo.config.patch(recompile_limit=16 * len(ROWS)):
        return measure(variants, batch_size, args.steps, args.repeats, mode)


def make_tables(args: argparse.Namespace) -> Iterator[str]:
    for model, dtype in itertools.product(args.models, args.dtypes):
        model_title, make_components = ARCHITECTURES[model]
        components = make_components(args.device, DTYPES[dtype])
        side = resolution_of(components)
        for batch_size, mode in itertools.product(args.batch_sizes, ["no"] if args.count else args.compile):
            title, what = f"{model_title}, batch {batch_size}", "one step"
            if not args.count:
                title += f", {dtype}, {'eager' if mode == 'no' else f'compiled ({mode})'}"
                what = f"{args.steps} steps, medians of {args.repeats}"
            try:
                table = make_table(components, batch_size, mode, args)
            except torch.OutOfMemoryError:
                table = "Not enough memory on the device for all rows at once. Name fewer with `--rows`."
            yield f"### {title}\n\n{side} × {side} pixels, {what}.\n\n{table}"


OPTIONS = {
    "--models": {
        **{"nargs": "+", "choices": ARCHITECTURES, "default": (["toy"], list(ARCHITECTURES))},
        "help": "(default: toy on cpu, else all)",
    },
    "--batch-sizes": {"nargs": "+", "type": count, "default": [1, 4, 8], "metavar": "N"},
    "--dtypes": {
        **{"nargs": "+", "choices": DTYPES, "default": (["float32"], ["float16"])},
        "help": "(default: float32 on cpu, else float16)",
    },
    "--compile": {"nargs": "+", "choices": COMPILE_MODES, "default": ["no"], "help": "modes of torch.compile"},
    "--rows": {"nargs": "+", "choices": ROWS, "default": list(ROWS), "help": "what to measure (default: all)"},
    "--steps": {"type": count, "default": (10, 50), "help": "(default: 10 on cpu, else 50)"},
    "--repeats": {"type": count, "default": 5, "help": "rounds of interleaved calls (default: 5)"},
    "--count": {"action": "store_true", "help": "count what is computed instead, on no device"},
}


def main(argv: list[str] | None = None) -> int:
    return run_benchmark("benchmarks.bench_inference", __doc__, OPTIONS, make_tables, argv)


if __name__ == "__main__":
    sys.exit(main())
