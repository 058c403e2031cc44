# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""Prints the results of benchmarks: Markdown tables under the names of the machine and the versions."""

import argparse
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from program import write_atomically


class Report:
    """Prints each part, and writes all parts to `path` after each, so that a run that was stopped leaves its parts."""

    def __init__(self, path: Path | None, device: torch.device):
        self.path, self.parts = path, []
        packages = ("torch", "diffusers", "transformers", "peft")
        versions = ", ".join(f"{name} {version(name)}" for name in packages)
        self.add(f"{_device_name(device)}; Python {platform.python_version()}, {versions}.")

    def add(self, part: str) -> None:
        print(part, end="\n\n", flush=True)
        self.parts.append(part)
        if self.path is not None:
            write_atomically(self.path, "\n\n".join(self.parts) + "\n")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    if device.type == "meta":
        return "no device"
    if device.type != "cpu":
        return f"{device.type} on {platform.platform()}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.processor()])[0] or platform.machine()}, {torch.get_num_threads()} threads"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def count(text: str) -> int:
    """A type for argparse: a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on.")
    return int(text)
