"""
What `generate.py --batch` adds to the pipeline itself: `python -m benchmarks.bench_batch`.

The same jobs go through a bare loop over pipeline calls, which keeps its pictures in memory, and through the command
line, which writes files that can be resumed from. Pictures per second are counted from the end of the first batch to
the end of the last, so that loading and warming up do not count; the two take turns.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch

import generate
from benchmarks.tables import Report, count, device_or_error, markdown_table
from drawing.jobs import read_model_defaults
from drawing.model import Weights, fuse_lora, load_pipeline, quiet
from pipeline_fineface import FineFacePipeline
from program import TOY_MODEL


PROMPTS = ("a girl with long red hair in a park", "a bald man in the snow", "a woman with glasses in the city")
EXPRESSIONS = ("6C+12D", "AU1=2 AU2=2 AU5=3 AU26=4", "doubtful", "AU4=4 AU9=2")


def make_jobs(number: int) -> list[dict]:
    return [
        {"prompt": PROMPTS[seed % len(PROMPTS)], "aus": EXPRESSIONS[seed % len(EXPRESSIONS)], "seed": seed}
        for seed in range(number)
    ]


def pictures_per_second(finished: list[float], batch_size: int) -> float:
    """From the moments, in order, at which each picture was there."""
    return (len(finished) - batch_size) / (finished[-1] - finished[batch_size - 1])


def run_bare_loop(pipeline: FineFacePipeline, jobs: list[dict], batch_size: int, call_kwargs: Mapping) -> list[float]:
    finished = []
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        pipeline(
            [job["prompt"] for job in batch],
            aus=[job["aus"] for job in batch],
            generator=[torch.Generator().manual_seed(job["seed"]) for job in batch],
            **call_kwargs,
        )
        finished += [time.time()] * len(batch)
    return finished


def run_command_line(jobs: list[dict], arguments: list[str]) -> tuple[list[float], float]:
    """When each picture was written, and the seconds of everything, from arguments to the last file."""
    with tempfile.TemporaryDirectory() as folder:
        job_file, output = Path(folder) / "jobs.jsonl", Path(folder) / "pictures"
        job_file.write_text("".join(json.dumps(job) + "\n" for job in jobs), encoding="utf-8")
        started = time.perf_counter()
        status = generate.main(["--batch", str(job_file), "--output", str(output), *arguments])
        seconds = time.perf_counter() - started
        if status:
            raise RuntimeError(f"generate.py ended with the status {status}; its message is above.")
        return sorted(path.stat().st_mtime_ns / 1e9 for path in output.glob("*.png")), seconds


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=device_or_error, default=None, help="(default: the accelerator, if any)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--model", default=str(TOY_MODEL), help="(default: the embedded model)")
    parser.add_argument("--batch-size", type=count, default=4)
    parser.add_argument("--batches", type=count, default=6, help="2 or more (default: 6)")
    parser.add_argument("--steps", type=count, help="(default: the model's)")
    parser.add_argument("--repeats", type=count, default=3)
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="write the table to a file as well")
    args = parser.parse_args(argv)
    if args.batches < 2:
        parser.error("`--batches` is 1, but the first only warms up. Take 2 or more.")
    args.device = args.device or device_or_error(None)
    args.dtype = args.dtype or ("float32" if args.device.type == "cpu" else "float16")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    report = Report(args.output, args.device)
    jobs = make_jobs(args.batches * args.batch_size)
    arguments = ["--model", args.model, "--device", str(args.device), "--dtype", args.dtype]
    arguments += ["--batch-size", str(args.batch_size)]
    call_kwargs = read_model_defaults(args.model)
    if args.steps:
        arguments += ["--num-inference-steps", str(args.steps)]
        call_kwargs["num_inference_steps"] = args.steps
    weights = Weights(args.model)
    with quiet():
        pipeline = load_pipeline(weights, args.device, getattr(torch, args.dtype))
        fuse_lora(pipeline)
    pipeline.set_progress_bar_config(disable=True)

    bare, command_line, totals = [], [], []
    for _ in range(args.repeats):
        bare.append(pictures_per_second(run_bare_loop(pipeline, jobs, args.batch_size, call_kwargs), args.batch_size))
        finished, seconds = run_command_line(jobs, arguments)
        command_line.append(pictures_per_second(finished, args.batch_size))
        totals.append(seconds)
    ratios = [ours / theirs for ours, theirs in zip(command_line, bare, strict=True)]
    spread = f"{min(ratios):.3f} – {max(ratios):.3f}"
    rows = [
        ["bare loop", f"{statistics.median(bare):.2f}", "1.000", ""],
        [
            "`generate.py --batch`",
            f"{statistics.median(command_line):.2f}",
            f"{statistics.median(ratios):.3f}",
            spread,
        ],
    ]
    title = f"{len(jobs)} pictures in batches of {args.batch_size}, {args.dtype}, medians of {args.repeats}"
    everything = f"With loading and files, `generate.py --batch` takes {statistics.median(totals):.1f} s for all."
    report.add(
        f"{title}.\n\n{markdown_table(['', 'pictures / s', 'ratio', 'lowest – highest'], rows)}\n\n{everything}"
    )


if __name__ == "__main__":
    main()
