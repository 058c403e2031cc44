# SPDX-License-Identifier: Apache-2.0
"""What both kinds of trials share, those of the design and those of AU feedback: a series is made, and has a table."""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from accelerate import PartialState

from paper.experiment import Experiment
from paper.workers import run_jobs
from program import write_atomically
from training.config import TRAINING_PRESETS


BEST = {**TRAINING_PRESETS["best"], "au_learning_rate": 1e-2}
"""`--preset best`. The AUs learn at ten times the rate of the LoRA, which is 1e-3 here."""


@dataclass(frozen=True)
class Trial:
    """
    A variant, and why it is tried: flags of train_fineface.py, and options of `evaluation.run`. A trial of AU feedback
    can go on with another encoder, which begins with what the common adapter adds, learn from a meter on latents, or
    go on `after` another trial that has the first part of the time.
    """

    why: str
    train: dict = field(default_factory=dict)
    sampling: dict = field(default_factory=dict)
    encoder_type: str | None = None
    reads_latents: bool = False
    after: str | None = None


class Trials:
    """
    Trials of one kind in an experiment. A subclass has `train(name)`, which returns the adapter of a trial,
    `evaluate(name, adapter)`, and `figures(name)`, which returns the cells of a trial's row by their headings.
    """

    trials: dict[str, Trial]
    reference: str
    """The trial that is always made, because the others are compared with it."""
    prefix: str
    table_name: str
    settings: dict[str, str]
    """Columns of the table that say what was set: attributes of `Trial` by their headings."""
    first_figure: str
    """The column in which a training that diverged says so."""

    def __init__(self, experiment: Experiment):
        self.experiment, self.budget = experiment, experiment.budget

    def run(self, names: Iterable[str], processes: int) -> str | None:
        """Make the trials. On the main process, returns what `report` says of them."""
        self.experiment.prepare()
        self.prepare(names)
        groups = self.group_by_system([self.reference, *names])
        run_jobs([functools.partial(self.make, group) for group in groups], processes)
        return self.report() if PartialState().is_main_process else None

    def group_by_system(self, names: Iterable[str]) -> list[list[str]]:
        groups: dict[str, list[str]] = {}
        for name in dict.fromkeys(names):
            groups.setdefault(self.system_name(name), []).append(name)
        return list(groups.values())

    def prepare(self, names: Iterable[str]) -> None:
        """Make what several of the trials share, beside the data."""

    def make(self, names: Sequence[str]) -> None:
        """
        Train the system that the trials `names` share, and evaluate each trial. A training that diverges is a result
        too: it is recorded, and no error is raised, unless it is that of the reference.
        """
        if self.diverged(names[0]).exists():
            return
        try:
            adapter = self.train(names[0])
        except FloatingPointError as error:
            if self.reference in names:
                raise
            write_atomically(self.diverged(names[0]), f"{error}\n")
            return
        for name in names:
            self.evaluate(name, adapter)

    def run_name(self, name: str) -> str:
        """The name of a trial's evaluation."""
        return f"{self.prefix}_{name}"

    def system_name(self, name: str) -> str:
        """The name of a trial's training. Trials of one name share it."""
        return self.run_name(name)

    def diverged(self, name: str) -> Path:
        """The file that says that the training of a trial ended with a loss that is not finite."""
        return self.experiment.folder / "systems" / self.system_name(name) / "diverged.txt"

    def evaluated(self) -> list[str]:
        return [name for name in self.trials if self.experiment.summary(self.run_name(name)) is not None]

    def change(self, name: str, other: str) -> str:
        """The difference of a trial's AU MSE of combinations from that of another, as a share of the latter."""
        runs = self.run_name(name), self.run_name(other)
        difference = self.experiment.paired_difference(runs, "au_mse", "combination")
        percent = self.experiment.figure(runs[1], "au_mse", "combination").value / 100
        shares = (value / percent for value in (difference.value, difference.low, difference.high))
        return "{:+.0f} % [{:+.0f}, {:+.0f}]".format(*shares)

    def report(self) -> str:
        """Write the table of the trials that have ended, and return its path."""
        rows, evaluated = [], self.evaluated()
        for name, trial in self.trials.items():
            row = {"Trial": name, "what for": trial.why}
            for heading, flags in self.settings.items():
                row[heading] = " ".join(f"{flag}={value}" for flag, value in getattr(trial, flags).items())
            if self.diverged(name).exists():
                rows.append(row | {self.first_figure: "diverged"})
            elif name in evaluated:
                rows.append(row | self.figures(name))
        path = self.experiment.folder / self.table_name
        write_atomically(path, pd.DataFrame(rows).fillna("–").to_csv(index=False))
        return str(path)
