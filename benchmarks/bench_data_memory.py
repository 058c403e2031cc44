"""
What preparing a data set costs: `python -m benchmarks.bench_data_memory`.

A folder with so many pictures and a table of their AUs goes through the steps of `face_data.prepare`, each in
processes of its own. The table has the most memory that any of these processes held at a time, beside that of one
that only prints the help, and pictures a second. The pictures are small, so that it is rows that count; some thousand
rows share a file by hard links.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from action_units import AU_NAMES
from benchmarks.tables import Report, count, markdown_table


ROOT = Path(__file__).resolve().parents[1]
# Well below the number of hard links that file systems allow, of which preparing takes three for each row.
ROWS_PER_PICTURE = 5000
PICTURES_PER_FOLDER = 1000
SIDE = 32


def make_folder(root: Path, num_rows: int) -> Path:
    """Pictures below `root`, and their table beside it, with other AUs and another caption in each row."""
    rng = np.random.default_rng(0)
    table = root.with_suffix(".csv")
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text", *AU_NAMES])
        for row in tqdm(range(num_rows), f"{num_rows} pictures", mininterval=5):
            name = f"{row // PICTURES_PER_FOLDER:05d}/{row:07d}.jpg"
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if row % ROWS_PER_PICTURE == 0:
                Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(path)
                first = path
            else:
                os.link(first, path)
            aus = np.round(rng.uniform(0, 5, len(AU_NAMES)), 2)
            writer.writerow([name, f"a photo of person {row} in a place of which there are many", *aus])
    return table


def run(*arguments) -> tuple[float, float]:
    """The peak of resident memory in MiB of the largest process, and the seconds it took."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "face_data.prepare", *map(str, arguments)], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    # The maximum is that of the process and of those it has waited for.
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"error: the step {arguments[0]} failed.")
    # Kilobytes but on macOS, where it is bytes.
    return usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10), seconds


def measure(folder: Path, num_rows: int, num_workers: int) -> list[tuple[str, float, float]]:
    """Name, MiB and pictures a second of each step."""
    table = make_folder(folder / "faces", num_rows)
    work, workers = folder / "work", ("--num_workers", num_workers)
    steps = {
        "folder": ("folder", "--root", folder / "faces", "--aus", table, "--measured", "--output", work, *workers),
        "build, files": ("build", work, "--output", folder / "files", *workers),
        "build, Parquet": ("build", work, "--output", folder / "parquet", "--format", "parquet", *workers),
        "report": ("report", work),
    }
    results = []
    for name, arguments in steps.items():
        memory, seconds = run(*arguments)
        results.append((name, memory, num_rows / seconds))
    return results


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_data_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--rows", type=count, nargs="+", default=[20_000, 200_000], help="Numbers of pictures.")
    parser.add_argument("--num_workers", type=count, default=2, help="Processes.")
    parser.add_argument("--output", type=Path, help="Markdown file for the table; it is printed anyway.")
    args = parser.parse_args(argv)
    report = Report(args.output, torch.device("cpu"))
    nothing, _ = run("--help")
    columns = []
    for num_rows in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            columns.append(measure(Path(folder), num_rows, args.num_workers))
    header = [
        "step",
        *(f"MiB, {rows:,} rows" for rows in args.rows),
        *(f"rows/s, {rows:,} rows" for rows in args.rows),
    ]
    rows = [["only the help", *[f"{nothing:.0f}"] * len(columns), *[""] * len(columns)]]
    for results in zip(*columns, strict=True):
        name = results[0][0]
        rows.append([name, *(f"{memory:.0f}" for _, memory, _ in results), *(f"{rate:.0f}" for *_, rate in results)])
    report.add(markdown_table(header, rows))


if __name__ == "__main__":
    main()
