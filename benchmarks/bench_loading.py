# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
Measures the cost of loading an adapter for Stable Diffusion 2.1, of random weights, in three forms: `python -m
benchmarks.bench_loading`. docs/performance.md says what each column is.
"""

import argparse
import gc
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from peft import LoraConfig
from torch import nn

from au_attention_processor import au_layers
from au_encoder import LORA_WEIGHTS_NAME, AUAdapter, write_au_adapter
from benchmarks.pipelines import LORA_RANK, SD21
from benchmarks.tables import DTYPES, count, in_units, markdown_table, run_benchmark, synchronize
from drawing.model import quiet
from hub import export
from pipeline_fineface import LORA_NAME, FineFacePipeline
from train_fineface import LORA_TARGETS


FORMS = {"as trained": None, "folded": "folded", "as an IP-Adapter": "ip-adapter"}
"""The forms of an adapter, and the `--format` of `hub.export` that makes each."""
STATM, SAMPLING_INTERVAL = Path("/proc/self/statm"), 0.001


def make_pipeline(unet_config: dict, device: torch.device, dtype: torch.dtype) -> FineFacePipeline:
    """Make a pipeline that has only a UNet, with uninitialized weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**unet_config)
    unet = nn.Module.to(unet, dtype).to_empty(device=device).eval()
    absent = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    return FineFacePipeline(unet=unet, scheduler=scheduler, **absent, requires_safety_checker=False)


def write_adapter(folder: Path, unet_config: dict) -> None:
    """Write a random adapter with a LoRA, in float32."""
    unet = make_pipeline(unet_config, torch.device("cpu"), torch.float32).unet
    adapter = AUAdapter(au_layers(unet), unet.config.cross_attention_dim)
    unet.add_adapter(LoraConfig(r=LORA_RANK, target_modules=LORA_TARGETS), LORA_NAME)
    write_au_adapter(folder, adapter, unet, LORA_NAME)


def export_as(form: str, trained: Path) -> tuple[Path, int]:
    """Returns the folder of the adapter `trained` in a form, and the bytes of its files without the LoRA."""
    folder = trained
    if FORMS[form] is not None:
        folder = trained.with_name(FORMS[form])
        export.run(export.ExportConfig(source=str(trained), folder=folder, format=FORMS[form]))
    files = [path for path in folder.rglob("*.safetensors") if path.name != LORA_WEIGHTS_NAME]
    return folder, sum(path.stat().st_size for path in files)


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

    def own_bytes() -> int:
        _, resident, shared, *_ = map(int, STATM.read_text().split())
        return (resident - shared) * os.sysconf("SC_PAGE_SIZE")

    def watch() -> None:
        while not finished.wait(SAMPLING_INTERVAL):
            sizes.append(own_bytes())

    sizes, finished = [own_bytes()], threading.Event()
    thread = threading.Thread(target=watch, daemon=True)
    # The work stays in this thread, because another one would not use memory that this one has freed.
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


def make_tables(args: argparse.Namespace) -> Iterator[str]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        trained = Path(folder, "trained")
        write_adapter(trained, SD21["unet"])
        for form in FORMS:
            exported, size = export_as(form, trained)
            for dtype in ("float32", "float16"):
                pipeline = make_pipeline(SD21["unet"], args.device, DTYPES[dtype])
                first, later, peak = time_loading(pipeline, exported, args.repeats)
                file, stays, most = (in_units(number, 2**20) for number in (size, adapter_bytes(pipeline), peak))
                rows.append([f"{form}, {dtype} UNet", file, f"{first:.2f}", f"{later:.2f}", stays, most])
                del pipeline
    header = ["", "files, MiB", "first, s", "in place of another, s", "stays, MiB", "at most, MiB"]
    yield markdown_table(header, rows)


def main(argv: list[str] | None = None) -> int:
    options = {"--repeats": {"type": count, "default": 5, "help": "(default: 5)"}}
    return run_benchmark("benchmarks.bench_loading", __doc__, options, make_tables, argv)


if __name__ == "__main__":
    sys.exit(main())
