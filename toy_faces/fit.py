# SPDX-License-Identifier: Apache-2.0
"""One small training loop for every network of the toy world: resumable at any step, a checkpoint a minute."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm

from program import replacing


SECONDS_BETWEEN_CHECKPOINTS = 60


@dataclass(frozen=True)
class Length:
    """How long a network is trained: `steps` of `batch` pictures, and no longer than `seconds`."""

    steps: int
    batch: int
    seconds: float = math.inf


def learning_rate(progress: float, step: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine to zero as `progress` goes from 0 to 1."""
    return peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def fit(
    name: str,
    modules: dict[str, nn.Module],
    loss_function: Callable[[np.random.Generator], torch.Tensor],
    folder: Path,
    length: Length,
    peak_learning_rate: float,
    ema_decay: float = 0.0,
) -> None:
    """
    Train `modules` in place, or continue where the checkpoint in `folder` stopped. Parameters without gradients are
    neither trained nor saved.

    Args:
        loss_function: takes a random generator and returns a scalar loss. The generator is seeded with the number of
            the step, so an interrupted run draws what an uninterrupted one would have drawn.
        length: the schedule of the learning rate follows steps or seconds, whichever is further on.
        ema_decay: above 0, the modules end with the exponential moving average of their weights.
    """
    checkpoint = folder / f"{name}.pt"
    named = nn.ModuleDict(modules).named_parameters()
    trained = {name: parameter for name, parameter in named if parameter.requires_grad}
    parameters = list(trained.values())
    optimizer = torch.optim.AdamW(parameters, peak_learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    average = [parameter.detach().clone() for parameter in parameters] if ema_decay else []
    step, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=parameters[0].device)
        step, seconds = state["step"], state["seconds"]
        with torch.no_grad():
            for parameter, saved in zip(parameters, state["parameters"], strict=True):
                parameter.copy_(saved)
        if state["finished"]:
            return
        optimizer.load_state_dict(state["optimizer"])
        average = state["average"]

    def save(finished: bool = False) -> None:
        state = {"step": step, "seconds": seconds, "finished": finished, "parameters": parameters}
        state |= {"optimizer": {}, "average": []} if finished else {}
        with replacing(checkpoint) as unfinished:
            torch.save({"optimizer": optimizer.state_dict(), "average": average} | state, unfinished)
        halves = [tensor.detach().half().cpu().contiguous() for tensor in average or parameters]
        with replacing(folder / f"{name}.half.safetensors") as unfinished:
            save_file(dict(zip(trained, halves, strict=True)), unfinished)

    running, started, saved_at = None, time.monotonic() - seconds, time.monotonic()
    with (
        (folder / f"{name}.jsonl").open("a") as log,
        tqdm(initial=step, total=length.steps, desc=name, mininterval=10) as bar,
    ):
        while step < length.steps and seconds < length.seconds:
            torch.manual_seed(step)
            progress = max(step / length.steps, seconds / length.seconds)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress, step, peak_learning_rate)
            loss = loss_function(np.random.default_rng(step))
            if step % 20 == 0:
                # Reading the loss waits for the device, so it is not read at every step.
                value = loss.item()
                if not math.isfinite(value):
                    raise FloatingPointError(f"The loss of {name} is {value} at step {step}; {checkpoint} is kept.")
                running = value if running is None else 0.8 * running + 0.2 * value
                bar.set_postfix(loss=f"{running:.4f}", refresh=False)
                line = {"step": step, "loss": round(running, 5), "seconds": round(seconds, 1)}
                log.write(json.dumps(line) + "\n")
                log.flush()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=False)
            optimizer.step()
            if average:
                # Early weights are forgotten sooner, so that a short run is not averaged with its random start.
                decay = min(ema_decay, (step + 1) / (step + 10))
                torch._foreach_lerp_(average, [parameter.detach() for parameter in parameters], 1 - decay)
            step, seconds = step + 1, time.monotonic() - started
            bar.update()
            if time.monotonic() - saved_at > SECONDS_BETWEEN_CHECKPOINTS:
                save()
                saved_at = time.monotonic()
    if average:
        with torch.no_grad():
            for parameter, mean in zip(parameters, average, strict=True):
                parameter.copy_(mean)
    save(finished=True)
