# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
The laboratory: variants of the paper's design under equal budgets, on the embedded world.

  python -m paper.trials --quick                       # all of them
  python -m paper.trials --full --only tokens_4 face_loss
  python -m paper.trials --list

Each variant changes flags of train_fineface.py, or of sampling, or both. The table of all trials, the failures too, is
kept in trials.csv of the working folder, the same folder as that of `paper.tables`, and goes into
docs/results.md.
"""

import argparse
import csv
import dataclasses
import functools
import io
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState

from evaluation.metrics import Figure
from paper.laboratory import Laboratory, run_jobs
from paper.tables import (
    OURS,
    TRIALS_NAME,
    VERDICT_NAME,
    add_laboratory_arguments,
    all_methods,
    figure_of,
    is_complete,
    make,
    make_laboratory,
    paired_difference,
    report,
    write_results,
)
from program import Parser, write_atomically
from training.config import PRESETS, TrainConfig


@dataclass(frozen=True)
class Trial:
    """
    Args:
        why (`str`):
            What is hoped for.
        train (`dict`):
            Flags of train_fineface.py. Trials with equal ones share one adapter.
        sampling (`dict`):
            Options of `evaluation.run`.
    """

    why: str
    train: dict = field(default_factory=dict)
    sampling: dict = field(default_factory=dict)


GOAL = -0.25
"""AU MSE of combinations against the paper's design."""
SLOPES = (0.85, 1.15)
GUIDED = {"au_guidance_scale": 3.0}
WEIGHTED = {
    "face_loss_weight": 8.0,
    "timestep_bias_strategy": "range",
    "timestep_bias_begin": 400,
    "timestep_bias_multiplier": 4.0,
}
"""What the embedded model's own adapter is trained with."""
TOGETHER = {**PRESETS["best"], "au_learning_rate": 3e-3}
FASTER = {**PRESETS["best"], "au_learning_rate": 1e-2}
"""`--preset best`: ten times the learning rate of the LoRA, which is 1e-3 here."""
TRIALS = {
    "paper": Trial("the paper's design: Res + MLP64, one token, joint guidance"),
    # Sampling alone: these share the paper's adapter.
    "au_guidance_1.5": Trial("AUs guided apart from the text", sampling={"au_guidance_scale": 1.5}),
    "au_guidance_3": Trial("… MagicFace's optimum", sampling=GUIDED),
    "au_guidance_5": Trial("…", sampling={"au_guidance_scale": 5.0}),
    "au_guidance_8": Trial("…", sampling={"au_guidance_scale": 8.0}),
    "au_scale_1.5": Trial("a larger λ_AU", sampling={"au_scale": 1.5}),
    "au_scale_2": Trial("…", sampling={"au_scale": 2.0}),
    "commands_beyond": Trial("both", sampling={"au_guidance_scale": 3.0, "au_scale": 1.5}),
    # Training, each under joint and under separate guidance.
    "au_drop": Trial("AU dropout, as in MagicFace, for guidance", {"au_drop_prob": 0.1}),
    "au_drop_guided": Trial("…", {"au_drop_prob": 0.1}, GUIDED),
    "tokens_4": Trial("four tokens: attention can look at different places", {"num_au_tokens": 4}),
    "tokens_4_guided": Trial("…", {"num_au_tokens": 4}, GUIDED),
    "tokens_12": Trial("a token for each AU, of an encoder that sees all", {"num_au_tokens": 12}),
    "individual_12": Trial(
        "a token for each AU, encoded one by one", {"encoder_type": "individual", "num_au_tokens": 12}
    ),
    "res_3mlp": Trial("an encoder with layers, for interactions", {"encoder_type": "res_3mlp"}),
    "au_learning_rate_3x": Trial("encoder, keys and values learn faster than the LoRA", {"au_learning_rate": 3e-3}),
    "au_learning_rate_10x": Trial("… and faster", {"au_learning_rate": 1e-2}),
    "au_learning_rate_10x_guided": Trial("…", {"au_learning_rate": 1e-2}, GUIDED),
    "kv_random": Trial("keys and values from noise instead of the text's", {"au_kv_init": "random"}),
    "kv_zero": Trial("values from zero: at first the AUs add nothing", {"au_kv_init": "zero"}),
    "rank_4": Trial("a small LoRA: what it takes over, the AUs do not have to", {"rank": 4}),
    "rank_64": Trial("a large LoRA", {"rank": 64}),
    "face_loss": Trial("the loss counts in the face, where AUs are", {"face_loss_weight": 4.0}),
    "face_loss_guided": Trial("…", {"face_loss_weight": 4.0}, GUIDED),
    "face_loss_and_timesteps": Trial("… and with it more of the noisy timesteps", WEIGHTED),
    "face_loss_and_timesteps_guided": Trial("…", WEIGHTED, GUIDED),
    "face_loss_and_timesteps_guided_5": Trial("…", WEIGHTED, {"au_guidance_scale": 5.0}),
    "min_snr": Trial("timesteps weighted by min-SNR", {"snr_gamma": 5.0}),
    "later_timesteps": Trial(
        "more of the noisy timesteps, where a face gets its shape",
        {"timestep_bias_strategy": "later", "timestep_bias_portion": 0.5, "timestep_bias_multiplier": 2.0},
    ),
    "stratified": Trial("timesteps spread evenly over a step's samples", {"timestep_sampling": "stratified"}),
    "no_smoothing": Trial("labels as they are: here they are exact", {"au_noise_variance": 0.0}),
    "all_together": Trial("what has been promising, at once", TOGETHER),
    "all_together_guided": Trial("…", TOGETHER, GUIDED),
    "all_together_guided_5": Trial("…", TOGETHER, {"au_guidance_scale": 5.0}),
    "all_together_guided_8": Trial("…", TOGETHER, {"au_guidance_scale": 8.0}),
    "all_together_faster": Trial("… and encoder, keys and values faster still", FASTER),
    "all_together_faster_guided": Trial("…", FASTER, GUIDED),
    "all_together_faster_guided_5": Trial("…", FASTER, {"au_guidance_scale": 5.0}),
    "all_together_faster_scale_1.5": Trial("… and a larger λ_AU", FASTER, {"au_scale": 1.5}),
    "all_together_faster_guided_scale_1.5": Trial("…", FASTER, {**GUIDED, "au_scale": 1.5}),
}
HEADER = (
    *(
        "Trial",
        "what for",
        "training",
        "sampling",
        "AU MSE, combinations ↓",
        "against the paper's",
        "AU MSE, single ↓",
    ),
    *("slope, single", "mean r ↑", "CLIP-I, combinations", "agreement with the prompt ↑", "other AUs move by ↓"),
    "pictures",
)


def adapter_name(trial: Trial) -> str:
    """The folder of its adapter: the same for the same training, that of the paper's tables if they have it."""
    for method in all_methods():
        if method.system == "fineface" and dict(method.changes) == trial.train:
            return method.name
    return "trial_" + "_".join(f"{flag}-{value}" for flag, value in sorted(trial.train.items()))


def check_trials(names: list[str]) -> None:
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    for name in names:
        if name not in TRIALS:
            raise ValueError(f"There is no trial {name!r}. There are {', '.join(TRIALS)}.")
        unknown = set(TRIALS[name].train) - known
        if unknown:
            raise ValueError(f"The trial {name!r} needs flags that train_fineface.py has not: {', '.join(unknown)}.")


def make_trials(laboratory: Laboratory, names: Sequence[str]) -> None:
    """Trials that share an adapter. One that diverges is a result, too: it is kept, and the others go on."""
    if has_diverged(laboratory, names[0]):
        return
    try:
        adapter = laboratory.train_fineface(adapter_name(TRIALS[names[0]]), **TRIALS[names[0]].train)
    except FloatingPointError as error:
        # Without it there is nothing to compare with.
        if "paper" in names:
            raise
        write_atomically(_divergence(laboratory, names[0]), f"{error}\n")
        return
    for name in names:
        if name == "paper":
            make(laboratory, OURS)
        else:
            laboratory.evaluate(run_name(name), adapter, **TRIALS[name].sampling)


def group_by_adapter(names: Iterable[str]) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(adapter_name(TRIALS[name]), []).append(name)
    return list(groups.values())


def _divergence(laboratory: Laboratory, name: str) -> Path:
    return laboratory.folder / "systems" / adapter_name(TRIALS[name]) / "diverged.txt"


def has_diverged(laboratory: Laboratory, name: str) -> bool:
    """Whether the training of a trial has ended with a loss that is not finite."""
    return _divergence(laboratory, name).exists()


def run_name(name: str) -> str:
    return OURS.name if name == "paper" else f"trial_{name}"


def format_row(laboratory: Laboratory, name: str) -> list[str]:
    trial, run = TRIALS[name], run_name(name)
    settings = [" ".join(f"{key}={value}" for key, value in part.items()) for part in (trial.train, trial.sampling)]
    if has_diverged(laboratory, name):
        return [name, trial.why, *settings, "diverged", *["–"] * (len(HEADER) - 5)]

    def figure(metric: str, part: str):
        return figure_of(laboratory, run, metric, part)

    error, papers = figure("au_mse", "combination"), figure_of(laboratory, OURS.name, "au_mse", "combination")
    change = paired_difference(laboratory, (run, OURS.name), "au_mse", "combination")
    relative = [100 * value / papers.value for value in (change.value, change.low, change.high)]
    single = figure("au_mse", "single")
    return [
        name,
        trial.why,
        *settings,
        f"{error:.3f}",
        "{:+.0f} % [{:+.0f}, {:+.0f}]".format(*relative),
        f"{single:.3f}",
        f"{figure('slope', 'single')}",
        f"{figure('r', 'single')}",
        f"{figure('clip_i', 'combination'):.3f}",
        f"{figure('agreement', 'combination'):.3f}",
        f"{figure('unrequested', 'single'):.3f}",
        str(error.num_pictures + single.num_pictures),
    ]


def finished_trials(laboratory: Laboratory) -> list[str]:
    """All that have been evaluated in this folder, or have diverged, in the order of `TRIALS`."""
    return [
        name for name in TRIALS if laboratory.summary(run_name(name)) is not None or has_diverged(laboratory, name)
    ]


def write_table(laboratory: Laboratory) -> None:
    """trials.csv, and in words which is the best, trials.txt."""
    names = finished_trials(laboratory)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([HEADER, *(format_row(laboratory, name) for name in names)])
    write_atomically(laboratory.folder / TRIALS_NAME, text.getvalue())
    run = f"Of the {len(TRIALS)} trials that `python -m paper.trials --list` shows, {len(names)} were run."
    write_atomically(laboratory.folder / VERDICT_NAME, f"{run} {describe_best(laboratory)}\n")


def best_trial(laboratory: Laboratory) -> str | None:
    """
    The trial with the lowest AU MSE of combinations, of those whose CLIP-I and agreement with the prompt are not
    clearly below those of the paper's design: the interval reaches up to its figure. None if there is none.
    """

    def figure(name: str, metric: str) -> Figure:
        return figure_of(laboratory, run_name(name), metric, "combination")

    def keeps(name: str, metric: str) -> bool:
        return figure(name, metric).high >= figure("paper", metric).value

    names = [n for n in finished_trials(laboratory) if n != "paper" and not has_diverged(laboratory, n)]
    kept = [name for name in names if keeps(name, "clip_i") and keeps(name, "agreement")]
    return min(kept, key=lambda name: figure(name, "au_mse").value, default=None)


def describe_best(laboratory: Laboratory) -> str:
    name = best_trial(laboratory)
    if name is None:
        return "No trial keeps the CLIP-I and the agreement with the prompt of the paper's design."
    error, papers = (figure_of(laboratory, run_name(n), "au_mse", "combination").value for n in (name, "paper"))
    single = figure_of(laboratory, run_name(name), "slope", "single").value
    change = error / papers - 1
    return (
        "Of the trials whose CLIP-I and agreement with the prompt are not clearly below those of the paper's design,"
        f" `{name}` has the lowest AU MSE of combinations: {100 * change:+.0f} % against the paper's"
        f" (the goal of {100 * GOAL:+.0f} % is {'reached' if change <= GOAL else 'not reached'}), with a slope of"
        f" {single:.2f} ({SLOPES[0]} to {SLOPES[1]} is the goal,"
        f" {'reached' if SLOPES[0] <= single <= SLOPES[1] else 'not reached'})."
    )


def run(arguments: argparse.Namespace) -> Path | None:
    check_trials(arguments.only)
    laboratory = make_laboratory(arguments)
    laboratory.prepare()
    # The paper's design is what the others are compared with.
    groups = group_by_adapter(dict.fromkeys(["paper", *arguments.only]))
    run_jobs([functools.partial(make_trials, laboratory, group) for group in groups], arguments.processes)
    if not PartialState().is_main_process:
        return None
    write_table(laboratory)
    if is_complete(laboratory):
        write_results(laboratory, arguments.output)
    return laboratory.folder / TRIALS_NAME


def main(argv: list[str] | None = None) -> int:
    parser = Parser("paper.trials", __doc__)
    parser.add_argument("--only", nargs="+", metavar="TRIAL", default=list(TRIALS), help="(default: all of them)")
    if "--list" in (sys.argv[1:] if argv is None else argv):
        for name, trial in TRIALS.items():
            print(f"{name:30}{trial.why}: {trial.train | trial.sampling}")
        return 0
    parser.add_argument("--list", action="store_true", help="show the trials and stop")
    add_laboratory_arguments(parser)
    return report(lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
