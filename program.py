# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""What every program shares: its parser, the model options, the device, checks of `--output`, and processes."""

import argparse
import os
import re
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch


EMBEDDED_MODEL = Path(__file__).resolve().parent / "toy_faces" / "weights"


class Parser(argparse.ArgumentParser):
    """One whose errors are ValueErrors, for `main` to report."""

    def error(self, message: str):
        raise ValueError(message)


def number_or_none(text: str) -> float | None:
    return None if text == "none" else float(text)


def add_model_options(parser) -> None:
    """Which model, where and in which precision, to a parser or a group of one; `settle_device` completes them."""
    parser.add_argument("--model", default=str(EMBEDDED_MODEL), help="folder or Hub id (default: the embedded model)")
    parser.add_argument("--adapter", help="folder or Hub id of the AU adapter (default: the one beside the model)")
    parser.add_argument("--adapter-variant", help="sd15: of the published adapter, the files for Stable Diffusion 1.5")
    parser.add_argument("--device", help="as torch names it (default: the accelerator, if there is one)")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="(default: float32 on cpu, else 16)"
    )


def settle_device(args: argparse.Namespace) -> None:
    """Put the device, and the dtype that suits it if none was named, in the place of what was asked for."""
    args.device = pick_device(args.device)
    args.dtype = args.dtype or ("float32" if args.device.type == "cpu" else "float16")


def spell_option(name: str) -> str:
    return "--" + name.replace("_", "-")


def pick_device(name: str | None) -> torch.device:
    """The device of this name; without one, the accelerator that torch finds, or the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    devices = {"cpu": 1} | ({accelerator.type: torch.accelerator.device_count()} if accelerator else {})
    if name is None:
        # What accelerate calls its option to leave the GPU alone.
        cpu_only = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        return torch.device("cpu" if cpu_only else list(devices)[-1])
    match = re.fullmatch("([a-z]+)(?::([0-9]+))?", name)
    if not match or int(match[2] or 0) >= devices.get(match[1], 0):
        raise ValueError(f"`--device` is {name!r}, which torch does not find here. It finds {' and '.join(devices)}.")
    return torch.device(name)


def check_output(path: Path, is_folder: bool = False, suffixes: Sequence[str] = (".png",)) -> None:
    """Raise an error if nothing can be written at `path`. Creates nothing."""
    if path.exists() and path.is_dir() != is_folder:
        raise OSError(f"`--output` is {str(path)!r}, which is {'no' if is_folder else 'a'} folder.")
    if not is_folder and path.suffix.lower() not in suffixes:
        raise ValueError(f"`--output` is {str(path)!r}. Pictures are PNG files: give it the ending .png.")
    folder = (path if is_folder else path.parent).resolve()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OSError(f"`--output` is {str(path)!r}, but nothing can be written into {str(existing)!r}.")


class Processes:
    """Those that `accelerate launch` or `torchrun` has started together to share the work; mostly only this one."""

    def __init__(self, device: torch.device):
        self.state = None
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            from accelerate import PartialState

            if device.index is not None:
                raise ValueError(
                    f"`--device` is {str(device)!r}, which all processes would share. Leave out the number: each takes"
                    " a device of its own."
                )
            # Whoever is done first waits for the last.
            self.state = PartialState(cpu=device.type == "cpu", timeout=timedelta(days=7))

    @property
    def is_main(self) -> bool:
        return self.state is None or self.state.is_main_process

    def on_main(self, work: Callable):
        """What `work` returns on the main process, on all of them. If it fails there, all end, with one message."""
        if self.state is None:
            return work()
        from accelerate.utils import broadcast_object_list

        outcome = [None, None]
        if self.is_main:
            try:
                outcome = [work(), None]
            except (ValueError, OSError) as error:
                outcome = [None, error]
        error = outcome[1]
        broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise error or SystemExit(2)
        return outcome[0]

    def share(self, entries: list) -> list:
        """Every n-th of `entries`, another one for each process."""
        return entries if self.state is None else entries[self.state.process_index :: self.state.num_processes]

    def wait(self) -> None:
        if self.state is not None:
            self.state.wait_for_everyone()
