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

import sys
from pathlib import Path

from evaluation.metrics import Figure
from evaluation.run import PAPER_PARTS
from paper.experiment import Budget
from paper.feedback_trials import FeedbackTrials
from paper.tables import METHODS, OURS, add_arguments, make_experiment, report
from paper.trial_series import BEST, Trial, Trials
from program import Parser, add_options, spell_option, take_options


GOAL = -0.65
"""The wanted change of the AU MSE of combinations, relative to the paper's design."""
SLOPES = (0.85, 1.15)
GUIDED = {"au_guidance_scale": 3.0}
WEIGHTED = {name: BEST[name] for name in BEST if name.startswith(("face_loss", "timestep_bias"))}
"""The weights of the loss in `BEST` alone."""
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


class DesignTrials(Trials):
    trials = TRIALS
    reference = "paper"
    prefix, table_name = "trial", "trials.csv"
    settings = {"training": "train", "sampling": "sampling"}
    first_figure = "AU MSE, combinations ↓"

    def run_name(self, name: str) -> str:
        return OURS.name if name == "paper" else super().run_name(name)

    def system_name(self, name: str) -> str:
        """The name of a trial's adapter. Equal trainings have one name, that of `paper.tables` if it has the same."""
        train = TRIALS[name].train
        own_name = "trial_" + "_".join(f"{flag}-{value}" for flag, value in sorted(train.items()))
        shared = (m.name for m in METHODS.values() if m.system == "fineface" and m.train == train)
        return next(shared, own_name)

    def train(self, name: str) -> Path:
        return self.experiment.train_fineface(self.system_name(name), **TRIALS[name].train)

    def evaluate(self, name: str, adapter: Path) -> None:
        parts = OURS.parts if name == "paper" else PAPER_PARTS
        self.experiment.evaluate(self.run_name(name), adapter, sampling=TRIALS[name].sampling, parts=parts)

    def figure(self, name: str, metric: str, part: str = "combination") -> Figure:
        return self.experiment.figure(self.run_name(name), metric, part)

    def figures(self, name: str) -> dict[str, str]:
        return {
            self.first_figure: f"{self.figure(name, 'au_mse'):.3f}",
            "against the paper's": self.change(name, "paper"),
            "AU MSE, single ↓": f"{self.figure(name, 'au_mse', 'single'):.3f}",
            "slope, single": f"{self.figure(name, 'slope', 'single')}",
            "mean r ↑": f"{self.figure(name, 'r', 'single')}",
            "CLIP-I, combinations": f"{self.figure(name, 'clip_i'):.3f}",
            "agreement with the prompt ↑": f"{self.figure(name, 'agreement'):.3f}",
            "other AUs move by ↓": f"{self.figure(name, 'unrequested', 'single'):.3f}",
            "pictures": str(self.experiment.num_pictures(self.run_name(name))),
        }

    def describe_best(self) -> str:
        """
        Say which trial has the lowest AU MSE of combinations, of those whose CLIP-I and agreement with the prompt are
        not clearly below the paper's design. Clearly below means that the whole interval is below the paper's value.
        """
        kept = [
            name
            for name in self.evaluated()
            if name != "paper"
            and not self.diverged(name).exists()
            and all(self.figure(name, m).high >= self.figure("paper", m).value for m in ("clip_i", "agreement"))
        ]
        if not kept:
            return "No trial keeps the CLIP-I and the agreement with the prompt of the paper's design."
        name = min(kept, key=lambda name: self.figure(name, "au_mse").value)
        change = self.figure(name, "au_mse").value / self.figure("paper", "au_mse").value - 1
        single = self.figure(name, "slope", "single").value
        return (
            "Of the trials whose CLIP-I and agreement with the prompt are not clearly below those of the paper's"
            f" design, `{name}` has the lowest AU MSE of combinations: {100 * change:+.0f} % against the paper's"
            f" (the goal of {100 * GOAL:+.0f} % is {'reached' if change <= GOAL else 'not reached'}), with a slope of"
            f" {single:.2f} ({SLOPES[0]} to {SLOPES[1]} is the goal,"
            f" {'reached' if SLOPES[0] <= single <= SLOPES[1] else 'not reached'})."
        )

    def report(self) -> str:
        """Write the table, and return a sentence: where it is, and which trial is the best."""
        return f"{super().report()}: {self.describe_best()}"


def main(argv: list[str] | None = None) -> int:
    parser = Parser("paper.trials", __doc__)
    parser.add_argument("--only", nargs="+", metavar="TRIAL", help="(default: all of them)")
    parser.add_argument("--feedback", action="store_true", help="the trials of AU feedback instead")
    add_options(parser, Budget, spell=spell_option)
    lines = [
        f"{option + name:30}{trial.why}: {trial.train | trial.sampling}"
        for option, kind in (("", DesignTrials), ("--feedback ", FeedbackTrials))
        for name, trial in kind.trials.items()
    ]
    # Like a version, the list is shown without the options that are required.
    parser.add_argument("--list", action="version", version="\n".join(lines), help="show the trials and stop")
    add_arguments(parser)

    def work() -> str | None:
        arguments = parser.parse_args(argv)
        kind = FeedbackTrials if arguments.feedback else DesignTrials
        names = arguments.only or list(kind.trials)
        if unknown := [name for name in names if name not in kind.trials]:
            raise ValueError(f"There is no trial {unknown[0]!r}. There are {', '.join(kind.trials)}.")
        budget = take_options(Budget, arguments)
        if budget and not arguments.feedback:
            raise ValueError(f"`{spell_option(next(iter(budget)))}` is for trials of AU feedback. Add `--feedback`.")
        return kind(make_experiment(arguments, **budget)).run(names, arguments.processes)

    return report(work)


if __name__ == "__main__":
    sys.exit(main())
