"""One small training loop for every network of the toy world: resumable at any step, a checkpoint a minute."""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm


SECONDS_BETWEEN_CHECKPOINTS = 60


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine to zero over `steps` optimizer steps."""
    return peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))


def save_atomically(state: dict, path: Path) -> None:
    """Write to a temporary name and rename: a kill at any moment leaves the last complete checkpoint."""
    unfinished = path.with_suffix(".part")
    torch.save(state, unfinished)
    os.replace(unfinished, path)


def fit(
    name: str,
    modules: dict[str, torch.nn.Module],
    loss_function: Callable[[np.random.Generator], torch.Tensor],
    folder: Path,
    steps: int,
    peak_learning_rate: float,
    ema_decay: float = 0.0,
) -> None:
    """
    Train `modules` in place for `steps` optimizer steps, or continue where the checkpoint in `folder` stopped.

    Args:
        loss_function: takes a random generator and returns a scalar loss. The generator is seeded with the number of
            the step, so an interrupted run draws what an uninterrupted one would have drawn.
        ema_decay: above 0, the modules end with the exponential moving average of their weights.
    """
    checkpoint = folder / f"{name}.pt"
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, peak_learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    average = [parameter.detach().clone() for parameter in parameters] if ema_decay else []
    first_step = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        first_step = state["step"]
        for key, module in modules.items():
            module.load_state_dict(state["modules"][key])
        if first_step == steps:
            return
        optimizer.load_state_dict(state["optimizer"])
        average = state["average"]

    def checkpoint_state(step: int) -> dict:
        return {
            "step": step,
            "modules": {key: module.state_dict() for key, module in modules.items()},
            "optimizer": optimizer.state_dict() if step < steps else {},
            "average": average if step < steps else [],
        }

    log = (folder / f"{name}.jsonl").open("a")
    running, saved_at = None, time.monotonic()
    progress = tqdm(range(first_step, steps), initial=first_step, total=steps, desc=name, mininterval=10)
    for step in progress:
        torch.manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak_learning_rate)
        loss = loss_function(np.random.default_rng(step))
        if not torch.isfinite(loss):
            raise FloatingPointError(f"The loss of {name} is {loss.item()} at step {step}; {checkpoint} is kept.")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if ema_decay:
            # Early weights are forgotten sooner, so that a short run is not averaged with its random start.
            decay = min(ema_decay, (step + 1) / (step + 10))
            torch._foreach_lerp_(average, [parameter.detach() for parameter in parameters], 1 - decay)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{running:.4f}", refresh=False)
            log.write(json.dumps({"step": step, "loss": round(running, 5), "time": round(time.time())}) + "\n")
            log.flush()
        if time.monotonic() - saved_at > SECONDS_BETWEEN_CHECKPOINTS:
            save_atomically(checkpoint_state(step + 1), checkpoint)
            saved_at = time.monotonic()
    if ema_decay:
        with torch.no_grad():
            for parameter, mean in zip(parameters, average, strict=True):
                parameter.copy_(mean)
    save_atomically(checkpoint_state(steps), checkpoint)
