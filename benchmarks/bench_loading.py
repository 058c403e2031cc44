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
from functools import partial
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from peft import LoraConfig
from torch import nn

from au_attention_processor import au_layers
from au_encoder import ATTN_PROCESSORS_NAME, ENCODER_FOLDER, LORA_WEIGHTS_NAME, AUAdapter, write_au_adapter
from benchmarks.pipelines import LORA_RANK, SD21
from benchmarks.tables import DTYPES, count, in_units, markdown_table, run_benchmark, synchronize
from drawing.model import quiet
from hub.ip_adapter import write_ip_adapter
from pipeline_fineface import LORA_NAME, FineFacePipeline
from train_fineface import LORA_TARGETS


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


def peak_growth(device: torch.device, work: Callable[[], object]) -> int | None:
    """
    Returns by how many bytes memory on `device` grew at most while `work` was running; None on an accelerator that is
    no CUDA device, and without /proc. On the CPU, pages of mapped files do not count, because the system can take them
    back at any time.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not STATM.is_file():
        work()
        return None
    finished = threading.Event()

    def own_bytes() -> int:
        _, resident, shared, *_ = map(int, STATM.read_text().split())
        return (resident - shared) * os.sysconf("SC_PAGE_SIZE")

    def watch() -> None:
        while not finished.wait(SAMPLING_INTERVAL):
            sizes.append(own_bytes())

    sizes = [own_bytes()]
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        work()
    finally:
        finished.set()
        thread.join()
    return max(*sizes, own_bytes()) - sizes[0]


def time_loading(pipeline: FineFacePipeline, folder: Path, repeats: int) -> tuple[float, float, int | None]:
    """Returns the seconds of a first load, the median of later ones, and the peak of memory in the first."""
    device, seconds = pipeline.unet.device, []

    def load() -> None:
        synchronize(device)
        started = time.perf_counter()
        pipeline.load_au_adapter(folder)
        synchronize(device)
        seconds.append(time.perf_counter() - started)

    with quiet():
        peak = peak_growth(device, load)
        for _ in range(repeats):
            load()
    return seconds[0], statistics.median(seconds[1:]), peak


def make_tables(args: argparse.Namespace, unet_config: dict) -> Iterator[str]:
    rows = []
    for form, dtype in itertools.product(FORMS, ("float32", "float16")):
        with tempfile.TemporaryDirectory() as folder:
            size = write_adapter(Path(folder), unet_config, form)
            pipeline = make_pipeline(unet_config, args.device, DTYPES[dtype])
            first, later, peak = time_loading(pipeline, Path(folder), args.repeats)
        file, stays, most = (in_units(number, 2**20) for number in (size, adapter_bytes(pipeline), peak))
        rows.append([f"{form}, {dtype} UNet", file, f"{first:.2f}", f"{later:.2f}", stays, most])
        del pipeline
    header = ["", "files, MiB", "first, s", "in place of another, s", "stays, MiB", "at most, MiB"]
    yield markdown_table(header, rows)


def main(argv: list[str] | None = None, unet_config: dict = SD21["unet"]) -> int:
    options = {"--repeats": {"type": count, "default": 5, "help": "(default: 5)"}}
    tables = partial(make_tables, unet_config=unet_config)
    return run_benchmark("benchmarks.bench_loading", __doc__, options, ({}, {}), tables, argv)


if __name__ == "__main__":
    sys.exit(main())
