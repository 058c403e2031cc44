"""
What the benchmarks print: Markdown tables, under the machine and the versions that they come from.

`python -m benchmarks.tables outputs/bench docs/performance.md` puts what they wrote to `outputs/bench/NAME.md` between
the lines `<!-- NAME -->` and `<!-- /NAME -->` of a document.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from program import pick_device


class Report:
    """Prints as it grows, and is written to `path` after every part, so that a stopped run leaves what it has."""

    def __init__(self, path: Path | None, device: torch.device):
        self.path, self.parts = path, []
        self.add(describe_machine(device))

    def add(self, part: str) -> None:
        print(part, end="\n\n", flush=True)
        self.parts.append(part)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, "\n\n".join(self.parts) + "\n")


def write_text(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def describe_machine(device: torch.device) -> str:
    packages = ("torch", "diffusers", "transformers", "peft")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{_device_name(device)}; Python {platform.python_version()}, {versions}."


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


def add_clock_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="count the seconds that the cores work for this process, where other processes take turns on them;"
        " of a CPU with one thread (OMP_NUM_THREADS=1)",
    )


def pick_clock(processor_time: bool, device: torch.device, parser: argparse.ArgumentParser) -> Callable[[], float]:
    if processor_time and (device.type != "cpu" or torch.get_num_threads() > 1):
        parser.error(
            f"`--processor-time` is for a CPU with one thread, but the device is {device.type} and there are"
            f" {torch.get_num_threads()} threads. Set OMP_NUM_THREADS=1 and take `--device cpu`."
        )
    return time.process_time if processor_time else time.perf_counter


def device_or_error(name: str) -> torch.device:
    """For argparse, which turns this kind of error into its message and exit status 2."""
    try:
        return pick_device(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def count(text: str) -> int:
    """For argparse: a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on.")
    return int(text)


def fill_in(document: str, tables: dict[str, str]) -> str:
    """
    `document` with each of `tables` between the lines of its name.

    Raises:
        ValueError: if the lines are not there, once and in this order.
    """
    for name, text in tables.items():
        first, last = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
        before, found, rest = document.partition(first)
        _, found_last, after = rest.partition(last)
        if not found or not found_last or first in rest:
            raise ValueError(f"Tables of {name!r} go between lines {first.strip()} and {last.strip()}, once each.")
        document = f"{before}{first}\n{text.strip()}\n\n{last}{after}"
    return document


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with the files of tables")
    parser.add_argument("document", type=Path)
    args = parser.parse_args(argv)
    paths = sorted(args.folder.glob("*.md"))
    if not paths or not args.document.is_file():
        missing = f"{str(args.document)!r} is no file" if paths else f"there is no .md file in {str(args.folder)!r}"
        parser.error(f"{missing}. Run `make bench` first, and name its folder and the document.")
    tables = {path.stem: path.read_text(encoding="utf-8") for path in paths}
    try:
        write_text(args.document, fill_in(args.document.read_text(encoding="utf-8"), tables))
    except ValueError as error:
        parser.error(f"{str(args.document)!r}: {error}")
    print(f"{args.document}: {', '.join(tables)}")


if __name__ == "__main__":
    main()
