# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
Trials of AU feedback under equal processor time.

All go on from one adapter, the paper's design as `paper.tables` trains it, by train_fineface.py. The processor time
between its optimizer steps is measured, and each trial has as many steps as the same time pays for. The second meter
of the world judges. It teaches none of them.
"""

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch.optim.optimizer import register_optimizer_step_post_hook

import train_fineface
from action_units import AU_NAMES
from au_encoder import LORA_WEIGHTS_NAME, AUAdapter, find_adapter_files, read_au_adapter, write_adapter_weights
from drawing.files import write_png
from evaluation.figures import draw_comparison
from evaluation.report import find_figure
from evaluation.run import keep_settings
from evaluation.testset import COMBINATIONS, TOY_PROMPTS, Item, read_combinations, read_prompts
from paper.experiment import Experiment
from paper.tables import METER, OURS, figure_of, paired_difference
from program import new_folder, write_atomically


@dataclass(frozen=True)
class FeedbackTrial:
    """
    Args:
        why (`str`):
            The reason to try it.
        train (`dict`):
            Flags of train_fineface.py, which replace those of all trials.
        encoder_type (`str`, *optional*):
            Go on with this encoder. It begins with what the common adapter adds, see `change_encoder`.
        reads_latents (`bool`):
            A meter on latents teaches, instead of one on pictures.
    """

    why: str
    train: dict = field(default_factory=dict)
    encoder_type: str | None = None
    reads_latents: bool = False


FEEDBACK = {
    "au_feedback_steps": 4,
    "learning_rate": 5e-4,
    "au_learning_rate": 5e-3,
    # Neither depends on the number of steps, which is known only when some have been timed.
    "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": 5,
    "ema_decay": 0.9,
}
FEEDBACK_TRIALS = {
    "ordinary": FeedbackTrial("no feedback: the ordinary training goes on", {"au_feedback_meter": None}),
    "all_steps": FeedbackTrial("gradient through all four denoising steps"),
    "last_step": FeedbackTrial("… through the last one", {"au_feedback_backprop": 1}),
    "random_step": FeedbackTrial("… through one at random", {"au_feedback_mode": "random_step"}),
    "one_step": FeedbackTrial("the one-step estimate in the ordinary training", {"au_feedback_mode": "one_step"}),
    "latents": FeedbackTrial("all steps, and a meter on latents: nothing is decoded", reads_latents=True),
    "random_step_latents": FeedbackTrial(
        "one step at random, on latents", {"au_feedback_mode": "random_step"}, reads_latents=True
    ),
    "one_step_latents": FeedbackTrial(
        "the one-step estimate, on latents", {"au_feedback_mode": "one_step"}, reads_latents=True
    ),
    "more_ordinary": FeedbackTrial(
        "all steps, the ordinary loss counts five times as much", {"au_feedback_weight": 0.2}
    ),
    "less_ordinary": FeedbackTrial("… a fifth as much", {"au_feedback_weight": 5.0}),
    "au_dropout": FeedbackTrial("all steps, with AU dropout", {"au_drop_prob": 0.1}),
    "direct": FeedbackTrial("all steps, a few vectors for each layer in place of the encoder", encoder_type="direct"),
    "interactions": FeedbackTrial("all steps, an encoder that can hold interactions of AUs", encoder_type="res_3mlp"),
}
HEADER = (
    *("Trial", "what for", "flags", "steps", "seconds a step", "mean r ↑", "slopes", "single AUs, MSE / no control ↓"),
    *("combinations, MSE / no control ↓", "against `ordinary`", "other AUs move by ↓", "agreement with the prompt ↑"),
    "pictures",
)
PROBE_STEPS = 5
"""Steps that are timed to find out how many the budget pays for. They are the first ones of the training."""


@contextmanager
def timed_steps() -> Iterator[list[float]]:
    """Yield a list to which each optimizer step adds the time of its end: of the process, or with a GPU of a clock."""
    clock, seconds = time.perf_counter if torch.accelerator.is_available() else time.process_time, []
    hook = register_optimizer_step_post_hook(lambda *_: seconds.append(clock()))
    try:
        yield seconds
    finally:
        hook.remove()


@torch.no_grad()
def change_encoder(adapter: AUAdapter, encoder_type: str) -> AUAdapter:
    """
    Write an adapter whose values are affine in the AUs with the encoder "direct", or "res_3mlp", whose features add
    nothing until they are trained. Both add exactly what `adapter` adds.
    """
    folded = adapter.fold()
    if encoder_type == "direct":
        return folded
    config = {name: adapter.config[name] for name in ("cross_attention_dim", "num_aus", "hidden_dim", "au_names")}
    grown = AUAdapter(adapter.layers, encoder_type=encoder_type, **config)
    # The first columns are those of the intensities. The next one is that of a feature that is 1.
    grown.to_v_au.weight.copy_(adapter.to_v_au.weight)
    grown.to_v_au.weight[:, : adapter.config.num_aus + 1] = folded.to_v_au.weight
    features = grown.encoder.intensity_proj[-1]
    features.weight.zero_()
    features.bias.zero_()[0] = 1
    return grown


class FeedbackTrials:
    """
    The trials of one experiment.

    Raises:
        ValueError: if the experiment's folder has trials that were trained for another time.
    """

    def __init__(self, experiment: Experiment):
        self.experiment, self.budget = experiment, experiment.budget
        settings = {"feedback_seconds": self.budget.feedback_seconds}
        keep_settings(experiment.folder / "feedback.json", settings, "trials of AU feedback", PartialState())
        self.judge = Path(experiment.model) / "second_meter"

    def prepare(self, names: Sequence[str]) -> None:
        """Make what several trials share: the common adapter, and the meter on latents."""
        with PartialState().main_process_first():
            self.start_adapter(None)
            if any(FEEDBACK_TRIALS[name].reads_latents for name in names):
                self.make_latent_meter()

    def start_adapter(self, encoder_type: str | None) -> Path:
        adapter = self.experiment.train_fineface(OURS.name)
        if encoder_type is None:
            return adapter
        folder = self.experiment.folder / "systems" / f"start_{encoder_type}"
        if not folder.exists():
            changed = change_encoder(read_au_adapter(find_adapter_files(str(adapter))), encoder_type)
            with new_folder(folder) as unfinished:
                write_adapter_weights(unfinished, changed)
                shutil.copy(adapter / LORA_WEIGHTS_NAME, unfinished)
        return folder

    def make_latent_meter(self) -> Path:
        """Train a meter on the latents of the training pictures. Its time is not counted."""
        from toy_faces.fit import Length, fit
        from toy_faces.networks import make_latent_meter
        from training.feedback import shake_latents

        folder = self.experiment.folder / "latent_meter"
        if not folder.exists():
            inputs = self.experiment.inputs()
            rows = range(len(inputs.data))
            latents = torch.stack([inputs.picture(row, False)["latents_mean"].float() for row in rows])
            aus, network = torch.from_numpy(inputs.data.au_intensities), make_latent_meter()

            def loss_function(rng: np.random.Generator) -> torch.Tensor:
                chosen = torch.from_numpy(rng.integers(len(aus), size=64))
                return F.mse_loss(network(shake_latents(latents[chosen])), aus[chosen])

            length = Length(self.budget.latent_meter_steps, 64)
            fit("latent_meter", {"meter": network}, loss_function, self.experiment.folder, length, 1e-3, 0.99)
            with new_folder(folder) as unfinished:
                network.eval().save_pretrained(unfinished)
        return folder

    def make(self, name: str) -> None:
        """Train and evaluate a trial. `"start"` is the common adapter as it is."""
        adapter = self.start_adapter(None) if name == "start" else self.train(name)
        if adapter is not None:
            meters, limit = (f"{METER}:{self.judge}",), self.budget.feedback_prompts
            self.experiment.evaluate(f"feedback_{name}", adapter, meters=meters, limit=limit)

    def train(self, name: str) -> Path | None:
        """Train for `feedback_seconds`. Returns the adapter, or None if the loss was no longer finite."""
        trial = FEEDBACK_TRIALS[name]
        flags = FEEDBACK | {
            "au_feedback_meter": str(Path(self.experiment.model) / "meter"),
            "au_feedback_batch_size": self.budget.batch_size // 2,
            "au_feedback_guidance_scale": self.experiment.sampling["guidance_scale"],
            "adapter_name_or_path": str(self.start_adapter(trial.encoder_type)),
            "checkpointing_steps": PROBE_STEPS,
        }
        if trial.reads_latents:
            flags["au_feedback_meter"] = str(self.make_latent_meter())
        folder = self.experiment.system_folder(f"feedback_{name}", flags | trial.train)
        config, pace = self.experiment.config(folder.name, **flags | trial.train), self.pace(name)

        def train_until(step: int) -> float:
            with timed_steps() as seconds:
                train_fineface.run(replace(config, max_train_steps=step))
            # A run that was stopped near its end has too few steps left to time.
            return float(np.diff(seconds).mean()) if len(seconds) > 2 else pace["seconds"]

        def write(**known) -> None:
            pace.update(known)
            write_atomically(folder / "pace.json", json.dumps(pace))

        try:
            if not pace:
                seconds = train_until(PROBE_STEPS)
                write(seconds=seconds, steps=max(PROBE_STEPS, round(self.budget.feedback_seconds / seconds)))
            if "outcome" not in pace:
                write(seconds=train_until(pace["steps"]), outcome="trained")
        except FloatingPointError as error:
            write(outcome=f"diverged: {error}")
        return folder if pace["outcome"] == "trained" else None

    def pace(self, name: str) -> dict:
        """What is known of a training: "seconds" of a step, "steps" and, when it has ended, the "outcome"."""
        path = self.experiment.folder / "systems" / f"feedback_{name}" / "pace.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def write_table(self) -> Path:
        """Write feedback.csv and feedback.png of the trials that have ended, the common adapter first."""
        rows, folders = [], {}
        for name, trial in ({"start": FeedbackTrial("the common adapter, before")} | FEEDBACK_TRIALS).items():
            if self.pace(name).get("outcome", "").startswith("diverged"):
                rows.append([name, trial.why, "", "diverged", *["–"] * (len(HEADER) - 4)])
            elif self.experiment.summary(f"feedback_{name}") is not None:
                rows.append(self.row(name, trial.why, trial.train, **self.pace(name)))
                folders[name.replace("_", "\n")] = self.experiment.pictures(f"feedback_{name}")
        prompt = read_prompts(TOY_PROMPTS)[0]
        commands = read_combinations(COMBINATIONS, min(6, self.budget.combinations or 6))
        names = {aus.replace("AU", ""): Item("combination", prompt, aus, n).name for n, aus in enumerate(commands)}
        sheet = draw_comparison(folders, names, f"{prompt.text} · seed {prompt.seed}")
        write_png(sheet, self.experiment.folder / "feedback.png")
        path = self.experiment.folder / "feedback.csv"
        write_atomically(path, pd.DataFrame(rows, columns=HEADER).to_csv(index=False))
        return path

    def row(self, name: str, why: str, train: dict, steps="–", seconds=float("nan"), outcome="") -> list[str]:
        run, ordinary = f"feedback_{name}", "feedback_ordinary"

        def figure(metric: str, part: str):
            return figure_of(self.experiment, run, metric, part)

        relative = [
            f"{100 * figure('au_mse', part).value / figure('au_mse_neutral', part).value:.0f} %"
            for part in ("single", "combination")
        ]
        change = "–"
        if self.experiment.summary(ordinary) is not None and name != "ordinary":
            difference = paired_difference(self.experiment, (run, ordinary), "au_mse", "combination")
            whole = figure_of(self.experiment, ordinary, "au_mse", "combination").value / 100
            change = (
                f"{difference.value / whole:+.0f} % [{difference.low / whole:+.0f}, {difference.high / whole:+.0f}]"
            )
        summary = self.experiment.summary(run)
        slopes = [find_figure(summary, "slope", "single", METER, au).value for au in AU_NAMES]
        return [
            *(name, why, " ".join(f"{flag}={value}" for flag, value in train.items()), str(steps)),
            *("–" if np.isnan(seconds) else f"{seconds:.2f}", f"{figure('r', 'single').value:.2f}"),
            *(f"{min(slopes):.2f} to {max(slopes):.2f}", *relative, change),
            *(f"{figure('unrequested', 'single').value:.2f}", f"{figure('agreement', 'combination'):.3f}"),
            str(figure("au_mse", "single").num_pictures + figure("au_mse", "combination").num_pictures),
        ]
