# SPDX-License-Identifier: Apache-2.0
"""What all benchmarks share: options, memory, and tables under the names of the machine and the versions."""

import argparse
import itertools
import math
import platform
import re
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from program import Parser, pick_device, run_program, write_atomically


def run_benchmark(
    module: str,
    description: str | None,
    options: dict[str, dict],
    tables: Callable[[argparse.Namespace], Iterable[str]],
    argv: list[str] | None = None,
) -> int:
    """
    Run a benchmark from the command line, and return the exit status. Each part that `tables` yields for the parsed
    arguments is printed, and the file of `--output` is written anew, so that a run that was stopped leaves its parts.
    `options` are the arguments of `add_argument` by flag, beside `--device` and `--output`. A default that is a tuple
    has two values: on a CPU, and elsewhere. `--count` takes no device.
    """
    parser = Parser(module, description)
    parser.add_argument("--device", help="(default: the accelerator, if there is one)")
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="write the tables to a file as well")
    for flag, option in options.items():
        parser.add_argument(flag, **option)

    def work() -> None:
        args, parts = parser.parse_args(argv), []
        args.device = torch.device("meta") if getattr(args, "count", False) else pick_device(args.device)
        for name, value in vars(args).items():
            if isinstance(value, tuple):
                setattr(args, name, value[args.device.type != "cpu"])
        for part in itertools.chain([_machine(args.device)], tables(args)):
            print(part, end="\n\n", flush=True)
            parts.append(part)
            if args.output is not None:
                write_atomically(args.output, "\n\n".join(parts) + "\n")

    return run_program(work)


def _machine(device: torch.device) -> str:
    """The device and the versions in words."""
    name = "no device" if device.type == "meta" else f"{device.type} on {platform.platform()}"
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    elif device.type == "cpu":
        cpuinfo = Path("/proc/cpuinfo")
        found = re.search(r"^model name\s*: (.+)", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else None
        name = f"{found[1] if found else platform.machine()}, {torch.get_num_threads()} threads"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "peft"))
    return f"{name}; Python {platform.python_version()}, {versions}."


def choices(allowed: Iterable[str], default, text: str) -> dict:
    """The arguments of `add_argument` for an option that takes several of `allowed`."""
    return {"nargs": "+", "choices": allowed, "default": default, "help": text}


def count(text: str) -> int:
    """A type for argparse: a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on.")
    return int(text)


def markdown_table(columns: dict[str, str], rows: Iterable[Sequence]) -> str:
    """A table. `columns` are headings, each with the format of its cells. NaN, what could not be measured, is "–"."""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1)]
    for row in rows:
        cells = zip(columns.values(), row, strict=True)
        lines.append("–" if cell != cell else form.format(cell) for form, cell in cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def now(device: torch.device) -> float:
    """The time in seconds when `device` has done its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def take_peak(device: torch.device) -> float:
    """Returns the most bytes that tensors took on a CUDA device since the last call; NaN on another device."""
    if device.type != "cuda":
        return math.nan
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak
