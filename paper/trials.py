# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
Trains and evaluates variants of the paper's design under one budget on the toy world.

  python -m paper.trials --quick                       # all of them
  python -m paper.trials --full --only tokens_4 au_drop_guided
  python -m paper.trials --quick --feedback            # trials of AU feedback under equal processor time
  python -m paper.trials --quick --feedback --feedback-seconds 600 --feedback-prompts 4
  python -m paper.trials --list

A trial changes settings of train_fineface.py, of sampling, or both. The table, which has diverged trials too, goes to
trials.csv or feedback.csv in the working folder, which `paper.tables` shares. docs/results.md has all trials that were
run. The code has the paper's design, the trials that did well, and one of each kind that did not.
"""

import argparse
import functools
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from accelerate import PartialState

from evaluation.metrics import Figure
from evaluation.testset import TOY_PROMPTS, read_prompts
from paper.experiment import Experiment
from paper.feedback_trials import FEEDBACK_TRIALS, FeedbackTrials
from paper.tables import OURS, add_arguments, all_methods, figure_of, make, make_experiment, paired_difference, report
from paper.workers import run_jobs
from program import Parser, check_integer, write_atomically
from training.config import TRAINING_PRESETS


@dataclass(frozen=True)
class Trial:
    """
    Args:
        why (`str`):
            The reason to try it.
        train (`dict`):
            Flags of train_fineface.py. Trials with equal flags share one adapter.
        sampling (`dict`):
            Options of `evaluation.run`.
    """

    why: str
    train: dict = field(default_factory=dict)
    sampling: dict = field(default_factory=dict)


TRIALS_NAME = "trials.csv"
GOAL = -0.65
"""The wanted change of the AU MSE of combinations, relative to the paper's design."""
SLOPES = (0.85, 1.15)
GUIDED = {"au_guidance_scale": 3.0}
WEIGHTED = {
    "face_loss_weight": 8.0,
    "timestep_bias_strategy": "range",
    "timestep_bias_begin": 400,
    "timestep_bias_multiplier": 4.0,
}
"""The weights of the loss in the recipe of the toy model."""
BEST = {**TRAINING_PRESETS["best"], "au_learning_rate": 1e-2}
"""`--preset best`. The AUs learn at ten times the rate of the LoRA, which is 1e-3 here."""
TRIALS = {
    "paper": Trial("the paper's design: Res + MLP64, one token, joint guidance"),
    "au_guidance_3": Trial("AUs guided apart from the text, by MagicFace's optimum", sampling=GUIDED),
    "au_scale_1.5": Trial("a larger λ_AU", sampling={"au_scale": 1.5}),
    "au_drop_guided": Trial("AU dropout, as in MagicFace, for guidance", {"au_drop_prob": 0.1}, GUIDED),
    "tokens_4": Trial("four tokens: attention can look at different places", {"num_au_tokens": 4}),
    "au_learning_rate_10x": Trial("encoder, keys and values learn faster than the LoRA", {"au_learning_rate": 1e-2}),
    "kv_zero": Trial("values from zero: at first the AUs add nothing", {"au_kv_init": "zero"}),
    "direct": Trial("a few vectors for each layer in place of encoder, keys and values", {"encoder_type": "direct"}),
    "direct_10x": Trial(
        "the same, which learn faster than the LoRA", {"encoder_type": "direct", "au_learning_rate": 1e-2}
    ),
    "rank_64": Trial("a large LoRA", {"rank": 64}),
    "face_loss_and_timesteps": Trial("the loss counts in the face, and noisy timesteps come more often", WEIGHTED),
    "stratified": Trial("timesteps spread evenly over a step's samples", {"timestep_sampling": "stratified"}),
    "best": Trial("what has been promising, at once", BEST),
    "best_guided": Trial("the same, with AUs guided apart", BEST, GUIDED),
}
HEADER = (
    *("Trial", "what for", "training", "sampling", "AU MSE, combinations ↓", "against the paper's"),
    *("AU MSE, single ↓", "slope, single", "mean r ↑", "CLIP-I, combinations", "agreement with the prompt ↑"),
    *("other AUs move by ↓", "pictures"),
)


def adapter_name(trial: Trial) -> str:
    """The name of a trial's adapter. Equal trainings have one name, and that of `paper.tables` if it has the same."""
    for method in all_methods():
        if method.system == "fineface" and dict(method.changes) == trial.train:
            return method.name
    return "trial_" + "_".join(f"{flag}-{value}" for flag, value in sorted(trial.train.items()))


def run_name(name: str) -> str:
    return OURS.name if name == "paper" else f"trial_{name}"


def check_trials(names: Iterable[str], trials: Mapping = TRIALS) -> None:
    for name in names:
        if name not in trials:
            raise ValueError(f"There is no trial {name!r}. There are {', '.join(trials)}.")


def make_trials(experiment: Experiment, names: Sequence[str]) -> None:
    """
    Train the adapter that the trials `names` share, and evaluate each trial. A training that diverges is a result
    too: it is recorded, and no error is raised.
    """
    if _divergence(experiment, names[0]).exists():
        return
    try:
        adapter = experiment.train_fineface(adapter_name(TRIALS[names[0]]), **TRIALS[names[0]].train)
    except FloatingPointError as error:
        # All trials are compared with the paper's design, so it has to work.
        if "paper" in names:
            raise
        write_atomically(_divergence(experiment, names[0]), f"{error}\n")
        return
    for name in names:
        if name == "paper":
            make(experiment, OURS)
        else:
            experiment.evaluate(run_name(name), adapter, sampling=TRIALS[name].sampling)


def group_by_adapter(names: Iterable[str]) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(adapter_name(TRIALS[name]), []).append(name)
    return list(groups.values())


def _divergence(experiment: Experiment, name: str) -> Path:
    """The file that says that the training of a trial ended with a loss that is not finite."""
    return experiment.folder / "systems" / adapter_name(TRIALS[name]) / "diverged.txt"


def format_row(experiment: Experiment, name: str) -> list[str]:
    trial, run = TRIALS[name], run_name(name)
    settings = [" ".join(f"{key}={value}" for key, value in part.items()) for part in (trial.train, trial.sampling)]
    if _divergence(experiment, name).exists():
        return [name, trial.why, *settings, "diverged", *["–"] * (len(HEADER) - 5)]
    error, papers = (figure_of(experiment, of, "au_mse", "combination") for of in (run, OURS.name))
    change = paired_difference(experiment, (run, OURS.name), "au_mse", "combination")
    relative = [100 * value / papers.value for value in (change.value, change.low, change.high)]
    single, slope, r, others = (
        figure_of(experiment, run, metric, "single") for metric in ("au_mse", "slope", "r", "unrequested")
    )
    kept = [figure_of(experiment, run, metric, "combination") for metric in ("clip_i", "agreement")]
    row = [f"{error:.3f}", "{:+.0f} % [{:+.0f}, {:+.0f}]".format(*relative), f"{single:.3f}", f"{slope}", f"{r}"]
    row += [*(f"{figure:.3f}" for figure in (*kept, others)), str(error.num_pictures + single.num_pictures)]
    return [name, trial.why, *settings, *row]


def finished_trials(experiment: Experiment) -> list[str]:
    """The trials that have been evaluated or have diverged in this experiment, in the order of `TRIALS`."""
    return [
        name
        for name in TRIALS
        if experiment.summary(run_name(name)) is not None or _divergence(experiment, name).exists()
    ]


def write_table(experiment: Experiment) -> Path:
    rows = [format_row(experiment, name) for name in finished_trials(experiment)]
    write_atomically(experiment.folder / TRIALS_NAME, pd.DataFrame(rows, columns=HEADER).to_csv(index=False))
    return experiment.folder / TRIALS_NAME


def best_trial(experiment: Experiment) -> str | None:
    """
    Of the trials whose CLIP-I and agreement with the prompt are not clearly below the paper's design, the one with the
    lowest AU MSE of combinations, or None. Clearly below means that the whole interval is below the paper's value.
    """

    def figure(name: str, metric: str) -> Figure:
        return figure_of(experiment, run_name(name), metric, "combination")

    def keeps(name: str, metric: str) -> bool:
        return figure(name, metric).high >= figure("paper", metric).value

    names = [n for n in finished_trials(experiment) if n != "paper" and not _divergence(experiment, n).exists()]
    kept = [name for name in names if keeps(name, "clip_i") and keeps(name, "agreement")]
    return min(kept, key=lambda name: figure(name, "au_mse").value, default=None)


def describe_best(experiment: Experiment) -> str:
    name = best_trial(experiment)
    if name is None:
        return "No trial keeps the CLIP-I and the agreement with the prompt of the paper's design."
    error, papers = (figure_of(experiment, run_name(n), "au_mse", "combination").value for n in (name, "paper"))
    single, change = figure_of(experiment, run_name(name), "slope", "single").value, error / papers - 1
    return (
        "Of the trials whose CLIP-I and agreement with the prompt are not clearly below those of the paper's design,"
        f" `{name}` has the lowest AU MSE of combinations: {100 * change:+.0f} % against the paper's"
        f" (the goal of {100 * GOAL:+.0f} % is {'reached' if change <= GOAL else 'not reached'}), with a slope of"
        f" {single:.2f} ({SLOPES[0]} to {SLOPES[1]} is the goal,"
        f" {'reached' if SLOPES[0] <= single <= SLOPES[1] else 'not reached'})."
    )


def run(names: Sequence[str], experiment: Experiment, processes: int) -> str | None:
    """Make the trials. On the main process, returns a sentence: where their table is, and which trial is the best."""
    experiment.prepare()
    # The other trials are compared with the paper's design, so it is always made.
    groups = group_by_adapter(dict.fromkeys(["paper", *names]))
    run_jobs([functools.partial(make_trials, experiment, group) for group in groups], processes)
    if PartialState().is_main_process:
        return f"{write_table(experiment)}: {describe_best(experiment)}"


def run_feedback(names: Sequence[str], experiment: Experiment, processes: int) -> str | None:
    """Make the trials of AU feedback. On the main process, returns the path of their table."""
    trials = FeedbackTrials(experiment)
    experiment.prepare()
    trials.prepare(names)
    run_jobs([functools.partial(trials.make, name) for name in ["start", *names]], processes)
    if PartialState().is_main_process:
        return str(trials.write_table())


def _feedback_budget(arguments: argparse.Namespace) -> dict:
    """The fields of the budget that the command line sets for trials of feedback."""
    seconds, prompts = arguments.feedback_seconds, arguments.feedback_prompts
    for name, value in (("--feedback-seconds", seconds), ("--feedback-prompts", prompts)):
        if value is not None and not arguments.feedback:
            raise ValueError(f"`{name}` is for the trials of AU feedback alone. Add `--feedback`.")
    budget = {}
    if seconds is not None:
        if not 0 < seconds < math.inf:
            raise ValueError(f"`--feedback-seconds` has to be a time above 0, but is {seconds:g}.")
        budget["feedback_seconds"] = seconds
    if prompts is not None:
        check_integer("--feedback-prompts", prompts, 1, len(read_prompts(TOY_PROMPTS)))
        budget["feedback_prompts"] = prompts
    return budget


def main(argv: list[str] | None = None) -> int:
    parser = Parser("paper.trials", __doc__)
    parser.add_argument("--only", nargs="+", metavar="TRIAL", help="(default: all of them)")
    parser.add_argument("--feedback", action="store_true", help="the trials of AU feedback instead")
    parser.add_argument("--feedback-seconds", type=float, help="processor time of each (default: 40, or 3600 if full)")
    parser.add_argument("--feedback-prompts", type=int, help="prompts that judge each (default: 1, or all if full)")
    if "--list" in (sys.argv[1:] if argv is None else argv):
        for name, trial in TRIALS.items():
            print(f"{name:30}{trial.why}: {trial.train | trial.sampling}")
        for name, trial in FEEDBACK_TRIALS.items():
            print(f"--feedback {name:19}{trial.why}: {trial.train}")
        return 0
    parser.add_argument("--list", action="store_true", help="show the trials and stop")
    add_arguments(parser)

    def work() -> str | None:
        arguments = parser.parse_args(argv)
        trials, make_all = (FEEDBACK_TRIALS, run_feedback) if arguments.feedback else (TRIALS, run)
        names = arguments.only or list(trials)
        check_trials(names, trials)
        return make_all(names, make_experiment(arguments, **_feedback_budget(arguments)), arguments.processes)

    return report(work)


if __name__ == "__main__":
    sys.exit(main())
