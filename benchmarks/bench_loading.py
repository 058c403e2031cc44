"""
What loading costs: `python -m benchmarks.bench_loading`.

An adapter of full size (Stable Diffusion 2.1, one token, LoRA of rank 32) is written with random weights to a
temporary folder and loaded from there: once while the files are only on disk, then in place of itself while the system
has them in memory. Beside its time stand the bytes that stay and the most that were taken on the way. Then: importing
the pipeline, in fresh processes, against importing diffusers.
"""

import argparse
import gc
import os
import statistics
import subprocess
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
from au_encoder import AUAdapter, write_au_adapter
from benchmarks.bench_inference import DTYPES, LORA_RANK, LORA_TARGETS, SD21, synchronize
from benchmarks.tables import Report, add_clock_argument, count, device_or_error, markdown_table, pick_clock
from drawing.model import quiet
from pipeline_fineface import LORA_NAME, FineFacePipeline


ROOT = Path(__file__).resolve().parents[1]
IMPORTS = (
    "import diffusers",
    "from diffusers import StableDiffusionPipeline",
    "from pipeline_fineface import FineFacePipeline",
)
SAMPLING_INTERVAL = 0.001


def make_pipeline(unet_config: dict, device: torch.device, dtype: torch.dtype) -> FineFacePipeline:
    """A pipeline of which only the UNet is there; its weights are whatever was in memory."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**unet_config)
    unet = nn.Module.to(unet, dtype).to_empty(device=device).eval()
    absent = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    return FineFacePipeline(unet=unet, scheduler=scheduler, **absent, requires_safety_checker=False)


def write_adapter(folder: Path, unet_config: dict, dtype: torch.dtype) -> None:
    """An adapter with a LoRA, random, in files of `dtype`."""
    unet = make_pipeline(unet_config, torch.device("cpu"), dtype).unet
    adapter = nn.Module.to(AUAdapter(au_layers(unet), unet.config.cross_attention_dim), dtype)
    unet.add_adapter(LoraConfig(r=LORA_RANK, target_modules=LORA_TARGETS), LORA_NAME)
    write_au_adapter(folder, adapter, unet, LORA_NAME)


def adapter_bytes(pipeline: FineFacePipeline) -> int:
    """The bytes of the adapter and of its LoRA in memory."""
    lora = [parameter for name, parameter in pipeline.unet.named_parameters() if ".lora_" in name]
    return sum(p.numel() * p.element_size() for p in (*pipeline.au_adapter.parameters(), *lora))


def drop_from_page_cache(folder: Path) -> bool:
    """Whether the system could be asked to forget what the files hold."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    return True


# --------------------------------------------------------------------------------------------------------------------
# Memory
# --------------------------------------------------------------------------------------------------------------------


@contextmanager
def peak_growth(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """
    Gives a function that says, afterwards, by how much memory on `device` has grown at most; None where that cannot be
    seen. On the CPU this is memory of the process's own: pages of mapped files can be given up at any time.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    if device.type != "cpu" or not Path("/proc/self/statm").is_file():
        yield lambda: None
        return
    before, highest, stopped = _own_bytes(), [0], threading.Event()

    def watch():
        while not stopped.wait(SAMPLING_INTERVAL):
            highest[0] = max(highest[0], _own_bytes())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: max(highest[0], _own_bytes()) - before
    finally:
        stopped.set()
        thread.join()


def _own_bytes() -> int:
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


# --------------------------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------------------------


def time_loading(
    pipeline: FineFacePipeline, folder: Path, repeats: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[list[tuple[str, float]], int | None]:
    """Seconds of a first load and of later ones, and the most memory that the first took."""
    device = pipeline.unet.device
    is_cold = drop_from_page_cache(folder)

    def load() -> float:
        synchronize(device)
        started = clock()
        pipeline.load_au_adapter(folder)
        synchronize(device)
        return clock() - started

    with quiet(), peak_growth(device) as growth:
        first = load()
        peak = growth()
        later = [load() for _ in range(repeats)]
    return [
        (f"first, {'from the disk' if is_cold else 'files in memory'}", first),
        ("in place of another, files in memory", statistics.median(later)),
    ], peak


def time_imports(repeats: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, list[float]]:
    """Seconds of each of `IMPORTS` in a fresh process, interleaved."""
    times: dict[str, list[float]] = {statement: [] for statement in IMPORTS}
    for _ in range(repeats):
        for statement, seconds in times.items():
            code = f"from time import {clock.__name__} as clock; t = clock(); {statement}; print(clock() - t)"
            output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
            seconds.append(float(output.stdout.splitlines()[-1]))
    return times


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=device_or_error, default=None, help="(default: the accelerator, if any)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "float16"])
    parser.add_argument("--repeats", type=count, default=5, help="(default: 5)")
    add_clock_argument(parser)
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="write the tables to a file as well")
    args = parser.parse_args(argv)
    args.device = args.device or device_or_error(None)
    args.clock = pick_clock(args.processor_time, args.device, parser)
    return args


def main(argv: list[str] | None = None, unet_config: dict = SD21["unet"]) -> None:
    args = parse_args(argv)
    report = Report(args.output, args.device)
    rows = []
    for dtype in args.dtypes:
        with tempfile.TemporaryDirectory() as folder:
            write_adapter(Path(folder), unet_config, torch.float32)
            pipeline = make_pipeline(unet_config, args.device, DTYPES[dtype])
            loads, peak = time_loading(pipeline, Path(folder), args.repeats, args.clock)
        stays = f"{adapter_bytes(pipeline) / 2**20:.1f}"
        for (when, seconds), most in zip(loads, ("–" if peak is None else f"{peak / 2**20:.1f}", "–"), strict=True):
            rows.append([f"`load_au_adapter`, {dtype} UNet: {when}", f"{seconds:.2f}", stays, most])
        del pipeline
    unit = "s of processor time" if args.processor_time else "s"
    report.add(markdown_table(["", unit, "stays, MiB", "at most, MiB"], rows))

    times = time_imports(args.repeats, args.clock)
    rows = [
        [f"`{statement}`", f"{statistics.median(seconds):.2f}", f"{min(seconds):.2f} – {max(seconds):.2f}"]
        for statement, seconds in times.items()
    ]
    report.add(markdown_table(["", unit, "lowest – highest"], rows))


if __name__ == "__main__":
    main()
