# SPDX-License-Identifier: Apache-2.0
"""
Measures the cost of AU control as a multiple of plain Stable Diffusion: `python -m benchmarks.bench_inference`.
docs/performance.md says how, and has the command for each table.
"""

import argparse
import contextlib
import itertools
import math
import sys
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm, trange

from benchmarks.pipelines import ARCHITECTURES, ROWS, Variant, make_row
from benchmarks.tables import choices, count, markdown_table, now, run_benchmark, take_peak


# Enough for compilation, for recording CUDA graphs after it, and for a first replay.
WARM_UP_STEPS = 4


def time_call(variant: Variant, batch_size: int, steps: int) -> tuple[float, float]:
    """Returns the seconds of a call, and of a denoising step in it, without the first; NaN if there is only one."""
    marks = []

    def mark(pipeline=None, step=None, timestep=None, tensors=None):
        if step in (None, 0, steps - 1):
            marks.append(now(variant.pipeline.unet.device))
        return tensors

    mark()
    variant(batch_size, steps, callback_on_step_end=mark)
    mark()
    return marks[-1] - marks[0], (marks[-2] - marks[1]) / (steps - 1) if steps > 1 else math.nan


def measure(variants: dict[str, Variant], batch_size: int, steps: int, repeats: int, mode: str) -> str:
    """Measure `variants` in `repeats` rounds of one call each. Returns a table."""
    names, peaks, rows = list(variants), {}, []
    times = {name: np.empty((2, repeats)) for name in names}
    for name, variant in tqdm(variants.items(), desc="warm-up", leave=False):
        device = variant.pipeline.unet.device
        if mode != "no":
            variant.pipeline.unet.compile(mode=mode, fullgraph=True, dynamic=False)
        take_peak(device)
        variant(batch_size, WARM_UP_STEPS if mode != "no" or device.type != "cpu" else 1)
        # The statistics leave out the memory of recorded CUDA graphs, so there is no figure with them.
        peaks[name] = take_peak(device) if mode == "no" else math.nan
    for number in trange(repeats, desc="rounds", leave=False):
        # No row is always the first, or always after the same one.
        for name in names[number % len(names) :] + names[: number % len(names)]:
            times[name][:, number] = time_call(variants[name], batch_size, steps)
    for name, (call, step) in times.items():
        ratios = call / times[ROWS[name].baseline][0]
        spread = f"{ratios.min():.3f} – {ratios.max():.3f}"
        medians = map(np.median, (call, step, ratios))
        rows.append((ROWS[name].label, *medians, spread, peaks[name] / 2**20))
    columns = {"": "{}", "s / call": "{:.3f}", "s / step": "{:.4f}", "ratio": "{:.3f}", "lowest – highest": "{}"}
    return markdown_table(columns | {"peak MiB": "{:,.1f}"}, rows)


def step_flops(variant: Variant, batch_size: int) -> int:
    """Floating-point operations of the UNet in the first step of a call, which ends after them."""

    def end_call(*_):
        raise StopIteration

    unet = variant.pipeline.unet
    with FlopCounterMode(display=False) as counter, contextlib.suppress(StopIteration):
        handle = unet.register_forward_hook(end_call)
        variant(batch_size, 1)
    handle.remove()
    return sum(counter.get_flop_counts()[type(unet).__name__].values())


def make_table(components: dict, batch_size: int, mode: str, args: argparse.Namespace) -> str:
    # The baseline of each row is measured too.
    needed = {"plain", *args.rows, *(ROWS[row].baseline for row in args.rows)}
    variants = {row: make_row(row, components) for row in ROWS if row in needed}
    if args.count:
        flops = {row: step_flops(variant, batch_size) for row, variant in variants.items()}
        rows = [(ROWS[row].label, flops[row] / 1e9, flops[row] / flops[ROWS[row].baseline]) for row in flops]
        return markdown_table({"": "{}", "GFLOP / step": "{:,.2f}", "ratio": "{:.5f}"}, rows)
    torch._dynamo.reset()
    # All variants run the code of one class, but each is compiled by itself, which would exceed the usual limit.
    with torch._dynamo.config.patch(recompile_limit=16 * len(ROWS)):
        return measure(variants, batch_size, args.steps, args.repeats, mode)


def make_tables(args: argparse.Namespace) -> Iterator[str]:
    for model, dtype in itertools.product(args.models, args.dtypes):
        model_title, make_components = ARCHITECTURES[model]
        components = make_components(args.device, getattr(torch, dtype))
        side = components["unet"].config.sample_size * 2 ** (len(components["vae"].config.block_out_channels) - 1)
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
    "--models": choices(ARCHITECTURES, (["toy"], list(ARCHITECTURES)), "(default: toy on cpu, else all)"),
    "--batch-sizes": {"nargs": "+", "type": count, "default": [1, 4, 8], "metavar": "N"},
    "--dtypes": choices(
        ("float32", "float16", "bfloat16"), (["float32"], ["float16"]), "(default: float32 on cpu, else float16)"
    ),
    "--compile": choices(("no", "default", "reduce-overhead", "max-autotune"), ["no"], "modes of torch.compile"),
    "--rows": choices(ROWS, list(ROWS), "what to measure (default: all)"),
    "--steps": {"type": count, "default": (10, 50), "help": "(default: 10 on cpu, else 50)"},
    "--repeats": {"type": count, "default": 5, "help": "rounds of interleaved calls (default: 5)"},
    "--count": {"action": "store_true", "help": "count what is computed instead, on no device"},
}

main = partial(run_benchmark, "benchmarks.bench_inference", __doc__, OPTIONS, make_tables)

if __name__ == "__main__":
    sys.exit(main())
