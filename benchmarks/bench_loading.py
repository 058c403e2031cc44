# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
Measures the cost of loading an adapter: `python -m benchmarks.bench_loading`.

An adapter of full size (Stable Diffusion 2.1, one token, LoRA of rank 32) with random weights is written to a
temporary folder and loaded from there, first into a pipeline without an adapter, then in place of itself. It has three
forms: as trained, folded into a few vectors for each layer, and as an IP-Adapter for plain diffusers. The table has
the size of the files without the LoRA, the time, the memory that the adapter keeps, and the peak while it is loaded.
"""

import argparse
import gc
import itertools
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from peft import LoraConfig
from torch import nn

from au_attention_processor import au_layers
from au_encoder import ATTN_PROCESSORS_NAME, ENCODER_FOLDER, LORA_WEIGHTS_NAME, AUAdapter, write_au_adapter
from benchmarks.bench_inference import DTYPES, LORA_RANK, LORA_TARGETS, SD21, synchronize
from benchmarks.tables import Report, count, markdown_table
from drawing.model import quiet
from hub.ip_adapter import write_ip_adapter
from pipeline_fineface import LORA_NAME, FineFacePipeline
from program import Parser, pick_device, run_program


FORMS = ("as trained", "folded", "as an IP-Adapter")
STATM, SAMPLING_INTERVAL = Path("/proc/self/statm"), 0.001


def make_pipeline(unet_config: dict, device: torch.device, dtype: torch.dtype) -> FineFacePipeline:
    """Make a pipeline that has only a UNet, with uninitialized weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**unet_config)
    unet = nn.Module.to(unet, dtype).to_empty(device=device).eval()
    absent = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    return FineFacePipeline(unet=unet, scheduler=scheduler, **absent, requires_safety_checker=False)


def write_adapter(folder: Path, unet_config: dict, form: str = FORMS[0]) -> int:
    """Write a random adapter with a LoRA, in float32. Returns the bytes of its files without the LoRA."""
    unet = make_pipeline(unet_config, torch.device("cpu"), torch.float32).unet
    adapter = AUAdapter(au_layers(unet), unet.config.cross_attention_dim)
    unet.add_adapter(LoraConfig(r=LORA_RANK, target_modules=LORA_TARGETS), LORA_NAME)
    write_au_adapter(folder, adapter if form == FORMS[0] else adapter.fold(), unet, LORA_NAME)
    if form == FORMS[2]:
        (folder / ATTN_PROCESSORS_NAME).unlink()
        shutil.rmtree(folder / ENCODER_FOLDER)
        write_ip_adapter(folder, adapter)
    files = [path for path in folder.rglob("*.safetensors") if path.name != LORA_WEIGHTS_NAME]
    return sum(path.stat().st_size for path in files)


def adapter_bytes(pipeline: FineFacePipeline) -> int:
    """The bytes of the adapter and of its LoRA in memory."""
    lora = [parameter for name, parameter in pipeline.unet.named_parameters() if ".lora_" in name]
    return sum(p.numel() * p.element_size() for p in (*pipeline.au_adapter.parameters(), *lora))


# --------------------------------------------------------------------------------------------------------------------
# Memory
# --------------------------------------------------------------------------------------------------------------------


@contextmanager
def peak_growth(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """
    Yield a function that returns by how much memory on `device` has grown at most since; None where that cannot be
    measured. On the CPU, pages of mapped files do not count, because the system can take them back at any time.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
    elif device.type != "cpu" or not STATM.is_file():
        yield lambda: None
    else:
        sizes, stopped = [_own_bytes()], threading.Event()

        def watch():
            while not stopped.wait(SAMPLING_INTERVAL):
                sizes.append(_own_bytes())

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield lambda: max(*sizes, _own_bytes()) - sizes[0]
        finally:
            stopped.set()
            thread.join()


def _own_bytes() -> int:
    _, resident, shared, *_ = map(int, STATM.read_text().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


# --------------------------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------------------------


def time_loading(pipeline: FineFacePipeline, folder: Path, repeats: int) -> tuple[float, float, int | None]:
    """Returns the seconds of a first load, the median of later ones, and the peak of memory in the first."""
    device = pipeline.unet.device

    def load() -> float:
        synchronize(device)
        started = time.perf_counter()
        pipeline.load_au_adapter(folder)
        synchronize(device)
        return time.perf_counter() - started

    with quiet(), peak_growth(device) as growth:
        first = load()
        peak = growth()
        later = [load() for _ in range(repeats)]
    return first, statistics.median(later), peak


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("benchmarks.bench_loading", __doc__)
    parser.add_argument("--device", help="(default: the accelerator, if there is one)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "float16"])
    parser.add_argument("--repeats", type=count, default=5, help="(default: 5)")
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="write the table to a file as well")
    args = parser.parse_args(argv)
    args.device = pick_device(args.device)
    return args


def run(args: argparse.Namespace, unet_config: dict) -> None:
    report, rows = Report(args.output, args.device), []
    for form, dtype in itertools.product(FORMS, args.dtypes):
        with tempfile.TemporaryDirectory() as folder:
            size = write_adapter(Path(folder), unet_config, form)
            pipeline = make_pipeline(unet_config, args.device, DTYPES[dtype])
            first, later, peak = time_loading(pipeline, Path(folder), args.repeats)
        sizes = (size, adapter_bytes(pipeline), peak)
        file, stays, most = ("–" if size is None else f"{size / 2**20:.1f}" for size in sizes)
        rows.append([f"{form}, {dtype} UNet", file, f"{first:.2f}", f"{later:.2f}", stays, most])
        del pipeline
    header = ["", "files, MiB", "first, s", "in place of another, s", "stays, MiB", "at most, MiB"]
    report.add(markdown_table(header, rows))


def main(argv: list[str] | None = None, unet_config: dict = SD21["unet"]) -> int:
    return run_program(lambda: run(parse_args(argv), unet_config))


if __name__ == "__main__":
    sys.exit(main())
