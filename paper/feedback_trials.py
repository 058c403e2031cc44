# SPDX-License-Identifier: Apache-2.0
"""
Trials of AU feedback under equal processor time.

All go on from one adapter, the paper's design as `paper.tables` trains it, by train_fineface.py. The processor time
between its optimizer steps is measured, and each trial has as many steps as the same time pays for. The second meter
of the world judges. It teaches none of them.
"""

import functools
import json
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch.optim.optimizer import register_optimizer_step_post_hook

import train_fineface
from action_units import AU_NAMES
from au_encoder import LORA_WEIGHTS_NAME, AUAdapter, find_adapter_files, read_au_adapter, write_adapter_weights
from drawing.files import write_png
from evaluation.figures import draw_comparison
from evaluation.run import keep_settings
from evaluation.testset import TOY_PROMPTS, read_prompts
from paper.experiment import METER, Experiment
from paper.tables import OURS
from paper.trial_series import BEST, Trial, Trials
from program import new_folder, write_atomically
from training.config import TRAINING_PRESETS


FEEDBACK = {
    "au_feedback_steps": 4,
    "learning_rate": 5e-4,
    "au_learning_rate": 5e-3,
    # Neither depends on the number of steps, which is known only when some have been timed. A cosine ends
    # with these, and then begins anew for all steps.
    "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": 5,
    "ema_decay": 0.9,
}
FAST = {
    "au_feedback_meter": None,
    "learning_rate": 1e-3,
    "au_learning_rate": 1e-2,
    "lr_scheduler": "cosine",
    "ema_decay": 0.99,
}
"""No feedback, and rates that begin higher and fall along a cosine."""
FIRST_SHARE = 0.25
"""The part of the time that the first trial has if another goes on after it."""
FEEDBACK_TRIALS = {
    "start": Trial("the common adapter, before"),
    "ordinary": Trial("no feedback: the ordinary training goes on", {"au_feedback_meter": None}),
    "ordinary_fast": Trial("… at rates that begin higher and fall along a cosine", FAST),
    "best": Trial(
        "… with the ordinary loss of the best design, faster, and an encoder that can hold interactions of AUs",
        BEST | FAST,
        encoder_type="res_3mlp",
    ),
    "all_steps": Trial("gradient through all four denoising steps"),
    "last_step": Trial("… through the last one", {"au_feedback_backprop": 1}),
    "random_step": Trial("… through one at random", {"au_feedback_mode": "random_step"}),
    "one_step": Trial("the one-step estimate in the ordinary training", {"au_feedback_mode": "one_step"}),
    "latents": Trial("all steps, and a meter on latents: nothing is decoded", reads_latents=True),
    "random_step_latents": Trial(
        "one step at random, on latents", {"au_feedback_mode": "random_step"}, reads_latents=True
    ),
    "one_step_latents": Trial(
        "the one-step estimate, on latents", {"au_feedback_mode": "one_step"}, reads_latents=True
    ),
    "more_ordinary": Trial("all steps, the ordinary loss counts five times as much", {"au_feedback_weight": 0.2}),
    "less_ordinary": Trial("… a fifth as much", {"au_feedback_weight": 5.0}),
    "au_dropout": Trial("all steps, with AU dropout", {"au_drop_prob": 0.1}),
    "direct": Trial("all steps, a few vectors for each layer in place of the encoder", encoder_type="direct"),
    "interactions": Trial("all steps, an encoder that can hold interactions of AUs", encoder_type="res_3mlp"),
    "whole": Trial(
        "… in as many steps as are sampled, tones and colours stay, and the ordinary loss is that of the best design",
        {**TRAINING_PRESETS["best_feedback"], "au_learning_rate": 5e-4, "ema_decay": 0.99},
        encoder_type="res_3mlp",
    ),
    "best_then_whole": Trial(
        f"`best` for {FIRST_SHARE:.0%} of the time, then feedback; half of the faces are commanded one AU alone",
        {
            **TRAINING_PRESETS["best_feedback"],
            "au_feedback_appearance_weight": 10.0,
            "au_feedback_single_prob": 0.5,
            "au_learning_rate": 5e-4,
            "lr_scheduler": "cosine",
            "ema_decay": 0.99,
        },
        after="best",
    ),
}
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


class FeedbackTrials(Trials):
    """
    Trials that go on from one adapter for the same processor time.

    Raises:
        ValueError: if the experiment's folder has trials that were trained for another time.
    """

    trials = FEEDBACK_TRIALS
    reference = "start"
    prefix, table_name = "feedback", "feedback.csv"
    settings = {"flags": "train"}
    first_figure = "steps"

    def __init__(self, experiment: Experiment):
        super().__init__(experiment)
        self.batch_size = self.budget.feedback_batch_size or self.budget.batch_size
        settings = {"feedback_seconds": self.budget.feedback_seconds, "feedback_batch_size": self.batch_size}
        # Experiments of earlier versions have no size of their own for trials of feedback.
        defaults = {"feedback_batch_size": self.budget.batch_size}
        path = experiment.folder / "feedback.json"
        keep_settings(path, settings, "trials of AU feedback", PartialState(), defaults)

    def prepare(self, names: Iterable[str]) -> None:
        """Make the common adapter, and the meter on latents."""
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

    def evaluate(self, name: str, adapter: Path) -> None:
        meters = (f"{METER}:{Path(self.experiment.model) / 'second_meter'}",)
        self.experiment.evaluate(self.run_name(name), adapter, meters=meters, limit=self.budget.feedback_prompts)

    def train(self, name: str) -> Path:
        """Train for `feedback_seconds`."""
        trial = FEEDBACK_TRIALS[name]
        if name == "start":
            return self.start_adapter(None)
        if trial.after is None:
            return self.train_for(1, name, trial, self.start_adapter(trial.encoder_type))
        first, before = f"{name}_first", FEEDBACK_TRIALS[trial.after]
        adapter = self.train_for(FIRST_SHARE, first, before, self.start_adapter(before.encoder_type))
        return self.train_for(1 - FIRST_SHARE, name, trial, adapter)

    def train_for(self, share: float, name: str, trial: Trial, start: Path) -> Path:
        """Train from the adapter `start` for a share of `feedback_seconds`. Returns the folder, named after `name`."""
        flags = FEEDBACK | {
            "au_feedback_meter": str(Path(self.experiment.model) / "meter"),
            "train_batch_size": self.batch_size,
            "au_feedback_batch_size": self.batch_size // 2,
            "au_feedback_guidance_scale": self.experiment.sampling["guidance_scale"],
            "adapter_name_or_path": str(start),
        }
        if trial.reads_latents:
            flags["au_feedback_meter"] = str(self.make_latent_meter())
        folder = self.experiment.system_folder(self.system_name(name), flags | trial.train)
        config, pace = self.experiment.config(folder.name, **flags | trial.train), self.pace(name)

        def train_until(step: int) -> float:
            with timed_steps() as seconds:
                # Not after each few steps: writing a checkpoint takes time that belongs to the training.
                checkpoints = max(PROBE_STEPS, step // 10)
                train_fineface.run(replace(config, max_train_steps=step, checkpointing_steps=checkpoints))
            # A run that was stopped near its end has too few steps left to time.
            return float(np.diff(seconds).mean()) if len(seconds) > 2 else pace["seconds"]

        def write(**known) -> None:
            pace.update(known)
            write_atomically(folder / "pace.json", json.dumps(pace))

        if not pace:
            seconds = train_until(PROBE_STEPS)
            write(seconds=seconds, steps=max(PROBE_STEPS, round(share * self.budget.feedback_seconds / seconds)))
        if pace.get("outcome") != "trained":
            write(seconds=train_until(pace["steps"]), outcome="trained")
        return folder

    def pace(self, name: str) -> dict:
        """What is known of a training: "seconds" of a step, "steps" and, when it has ended, the "outcome"."""
        path = self.experiment.folder / "systems" / self.system_name(name) / "pace.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def figures(self, name: str) -> dict[str, str]:
        figure = functools.partial(self.experiment.figure, self.run_name(name))
        paces = [pace for pace in map(self.pace, (f"{name}_first", name)) if pace]
        slopes = [figure("slope", "single", au).value for au in AU_NAMES]

        def to_no_control(part: str) -> str:
            return f"{100 * figure('au_mse', part).value / figure('au_mse_neutral', part).value:.0f} %"

        has_other = name != "ordinary" and "ordinary" in self.evaluated()
        return {
            self.first_figure: " + ".join(str(pace["steps"]) for pace in paces) or "–",
            "seconds a step": ", ".join(f"{pace['seconds']:.2f}" for pace in paces) or "–",
            "mean r ↑": f"{figure('r', 'single').value:.2f}",
            "slopes": f"{min(slopes):.2f} to {max(slopes):.2f}",
            "single AUs, MSE / no control ↓": to_no_control("single"),
            "combinations, MSE / no control ↓": to_no_control("combination"),
            "against `ordinary`": self.change(name, "ordinary") if has_other else "–",
            "other AUs move by ↓": f"{figure('unrequested', 'single').value:.2f}",
            "agreement with the prompt ↑": f"{figure('agreement', 'combination'):.3f}",
            "pictures": str(self.experiment.num_pictures(self.run_name(name))),
        }

    def report(self) -> str:
        """Write the table, and feedback.png with some combinations of each trial."""
        folders = {n.replace("_", "\n"): self.experiment.pictures(self.run_name(n)) for n in self.evaluated()}
        prompt = read_prompts(TOY_PROMPTS)[0]
        sheet = draw_comparison(
            folders, self.experiment.combinations(prompt, 6), f"{prompt.text} · seed {prompt.seed}"
        )
        write_png(sheet, self.experiment.folder / "feedback.png")
        return super().report()
