# SPDX-License-Identifier: Apache-2.0
"""
Measures the cost of loading an adapter for Stable Diffusion 2.1, of random weights, in three forms: `python -m
benchmarks.bench_loading`. docs/performance.md says what each column is.
"""

import argparse
import ctypes
import gc
import os
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import nn

from au_encoder import LORA_WEIGHTS_NAME
from benchmarks.pipelines import SD21, empty_model, make_row
from benchmarks.tables import count, markdown_table, now, run_benchmark, take_peak
from drawing.model import quiet
from hub import export
from pipeline_fineface import FineFacePipeline


FORMS = {"as trained": None, "folded": "folded", "as an IP-Adapter": "ip-adapter"}
"""The forms of an adapter, and the `--format` of `hub.export` that makes each."""
STATM, SAMPLING_INTERVAL = Path("/proc/self/statm"), 0.001


def make_components(make_unet: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> dict:
    """The components of a pipeline that has only a UNet, with uninitialized weights."""
    absent = dict.fromkeys(("vae", "text_encoder", "tokenizer", "scheduler", "safety_checker", "feature_extractor"))
    return {**absent, "unet": empty_model(make_unet, device, dtype)}


def write_adapter(folder: Path, make_unet: Callable[[], nn.Module]) -> None:
    """Write a random adapter with a LoRA, in float32."""
    components = make_components(make_unet, torch.device("cpu"), torch.float32)
    make_row("lora", components).pipeline.save_au_adapter(folder)


def export_as(form: str, trained: Path) -> tuple[Path, int]:
    """Returns the folder of the adapter `trained` in a form, and the bytes of its files without the LoRA."""
    folder = trained
    if FORMS[form] is not None:
        folder = trained.with_name(FORMS[form])
        export.run(export.ExportConfig(source=str(trained), folder=folder, format=FORMS[form]))
    files = [path for path in folder.rglob("*.safetensors") if path.name != LORA_WEIGHTS_NAME]
    return folder, sum(path.stat().st_size for path in files)


def own_bytes() -> int:
    """The memory of this process, without pages of mapped files, which the system can take back at any time."""
    _, resident, shared, *_ = map(int, STATM.read_text().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def peak_growth(device: torch.device, work: Callable[[], object]) -> float:
    """
    Returns by how many bytes memory on `device` grew at most while `work` was running; NaN on an accelerator that is
    no CUDA device, and without /proc.
    """
    gc.collect()
    if device.type != "cpu" or not STATM.is_file():
        take_peak(device)
        before = take_peak(device)
        work()
        return take_peak(device) - before
    # Memory that was freed but not given back would be used first, and hide what `work` needs.
    ctypes.CDLL(None).malloc_trim(0)
    sizes, finished = [own_bytes()], threading.Event()

    def watch() -> None:
        while not finished.wait(SAMPLING_INTERVAL):
            sizes.append(own_bytes())

    # The work stays in this thread, because another one would not use memory that this one has freed.
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        work()
    finally:
        finished.set()
        thread.join()
    return max(*sizes, own_bytes()) - sizes[0]


def time_loading(components: dict, folder: Path, repeats: int) -> tuple[float, float, int, float]:
    """
    Load an adapter. Returns the seconds of a first load, the median of later ones, the bytes of the adapter and of its
    LoRA in memory, and the peak of memory in the first load.
    """
    pipeline, seconds = FineFacePipeline(**components, requires_safety_checker=False), []
    device, bare = pipeline.unet.device, pipeline.unet.get_memory_footprint()

    def load() -> None:
        started = now(device)
        pipeline.load_au_adapter(folder)
        seconds.append(now(device) - started)

    with quiet():
        peak = peak_growth(device, load)
        for _ in range(repeats):
            load()
    stays = pipeline.unet.get_memory_footprint() - bare + pipeline.au_adapter.get_memory_footprint()
    return seconds[0], statistics.median(seconds[1:]), stays, peak


def make_tables(args: argparse.Namespace) -> Iterator[str]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        trained = Path(folder, "trained")
        write_adapter(trained, SD21["unet"])
        for form in FORMS:
            exported, size = export_as(form, trained)
            for dtype in ("float32", "float16"):
                components = make_components(SD21["unet"], args.device, getattr(torch, dtype))
                first, later, stays, peak = time_loading(components, exported, args.repeats)
                rows.append((f"{form}, {dtype} UNet", size / 2**20, first, later, stays / 2**20, peak / 2**20))
    columns = {"": "{}", "files, MiB": "{:,.1f}", "first, s": "{:.2f}", "in place of another, s": "{:.2f}"}
    yield markdown_table(columns | {"stays, MiB": "{:,.1f}", "at most, MiB": "{:,.1f}"}, rows)


OPTIONS = {"--repeats": {"type": count, "default": 5, "help": "(default: 5)"}}

main = partial(run_benchmark, "benchmarks.bench_loading", __doc__, OPTIONS, make_tables)

if __name__ == "__main__":
    sys.exit(main())
