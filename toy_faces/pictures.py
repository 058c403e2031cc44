# SPDX-License-Identifier: Apache-2.0
"""
The rendered training pictures of the toy world: files of pixels, and what each picture shows.

The processes that render them import no torch; only functions that return tensors do.
"""

import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm.auto import tqdm

from program import replacing
from toy_faces.renderer import caption, render, sample_aus, sample_portrait, sample_toy_aus, to_toy_aus


if TYPE_CHECKING:
    import torch


UNSEEN = 10_000_000
"""Seeds from here on are never trained on: the report and the tests draw their pictures from them."""

JUDGE_SEEDS = 5_000_000
"""The second meter, which judges, learns from the pictures of seeds from here on, which nothing else is trained on."""

SHARD = 4_000
"""Pictures in a file. A killed run renders at most this many again."""


def render_seed(seed: int) -> np.ndarray:
    """The picture of one seed, `(SIZE, SIZE, 3)` uint8: a person and an expression that both follow from the seed."""
    return np.asarray(render(sample_portrait(seed), sample_aus(seed)))


def expression_of(seed: int) -> np.ndarray:
    """
    The training expression of a seed, `(24,)` float32 in the order of `TOY_AU_NAMES`: of even seeds one of the paper's
    twelve AUs, both sides alike; of odd seeds one of all AUs, each side by itself.
    """
    return sample_toy_aus(seed) if seed % 2 else to_toy_aus(sample_aus(seed))


def render_expression(seed: int) -> np.ndarray:
    """The training picture of one seed: the person of `render_seed`, with `expression_of` the seed."""
    return np.asarray(render(sample_portrait(seed), expression_of(seed)))


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an `.npy`, which appears whole."""
    with replacing(path) as unfinished, open(unfinished, "wb") as file:
        np.save(file, array)


def render_shard(path: Path, seeds: range, draw: Callable[[int], np.ndarray]) -> None:
    """Render the pictures of `seeds` into `path`, an `.npy` of `(len(seeds), SIZE, SIZE, 3)` uint8."""
    save_array(path, np.stack([draw(seed) for seed in seeds]))


class Pictures:
    """
    The training pictures of the seeds from `first` on, in shards that other processes render in the background:
    training can begin with the first shard. Finished shards of an earlier run are kept.

    Args:
        folder (`Path`): where the shards lie.
        count (`int`): how many pictures there will be.
        first (`int`): the first seed.
        draw (`Callable`): makes the picture of a seed.
        processes (`int`, *optional*): how many render at once; by default a few less than there are processors, which
            leaves some to the training beside them.
        shard (`int`): pictures in a file.
    """

    def __init__(
        self,
        folder: Path,
        count: int,
        first: int = 0,
        draw: Callable[[int], np.ndarray] = render_expression,
        processes: int | None = None,
        shard: int = SHARD,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.first, self.shards = first, []
        starts = range(first, first + count, shard)
        parts = [range(start, min(start + shard, first + count)) for start in starts]
        self.seeds = {folder / f"{part.start:08}-{part.stop:08}.npy": part for part in parts}
        missing = [(path, seeds) for path, seeds in self.seeds.items() if not path.exists()]
        processes = processes or max(1, (os.cpu_count() or 1) - 4)
        self.pool = ProcessPoolExecutor(processes, get_context("spawn")) if missing else None
        self.renders = [self.pool.submit(render_shard, *shard, draw) for shard in missing] if self.pool else []

    def finished(self, at_least: int = 1) -> list[np.ndarray]:
        """The shards that are there, as memory-mapped arrays in the order of their seeds from the first one on."""
        while True:
            for render_of_shard in self.renders:
                if render_of_shard.done():
                    render_of_shard.result()  # raises what went wrong there
            for path in list(self.seeds)[len(self.shards) :]:
                if not path.exists():
                    break
                self.shards.append(np.load(path, mmap_mode="r"))
            if len(self.shards) >= min(at_least, len(self.seeds)):
                return self.shards
            time.sleep(0.1)

    def wait(self) -> list[np.ndarray]:
        """All shards, once they are rendered."""
        if len(self.shards) < len(self.seeds):
            with tqdm(total=len(self.seeds), desc="render", unit="shard", mininterval=5) as progress:
                for count in range(1, len(self.seeds) + 1):
                    progress.update(len(self.finished(count)) - progress.n)
            self.close()
        return self.shards

    def close(self) -> None:
        """Render no more than what has begun. Without this, a spawned process can wait for its renderers forever."""
        if self.pool:
            self.pool.shutdown(cancel_futures=True)

    def draw(
        self, rng: np.random.Generator, batch: int, device: "torch.device", finished_only: bool = False
    ) -> "tuple[np.ndarray, torch.Tensor]":
        """
        Numbers of random pictures, counted from the first one, and their pixel values; with `finished_only`, of those
        that are rendered by now.
        """
        shards = self.finished() if finished_only else self.wait()
        numbers = rng.integers(0, sum(map(len, shards)), batch)
        return numbers, self.pixel_values(numbers, device)

    def pixel_values(self, numbers: Iterable[int], device: "torch.device") -> "torch.Tensor":
        """`(batch, 3, 128, 128)` pixel values of the pictures of these numbers. They have to be rendered."""
        size = len(self.shards[0])
        return to_pixel_values(np.stack([self.shards[number // size][number % size] for number in numbers])).to(device)


def to_pixel_values(pictures: "np.ndarray | torch.Tensor") -> "torch.Tensor":
    """uint8 `(batch, height, width, 3)` → float32 `(batch, 3, height, width)` in [-1, 1], on the same device."""
    import torch

    pixels = pictures if isinstance(pictures, torch.Tensor) else torch.from_numpy(np.array(pictures))
    return (pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def aus_of(seeds: Iterable[int], expression: Callable[[int], np.ndarray] = sample_aus) -> "torch.Tensor":
    """The intensities of seeds, `(batch, AUs)` float32; by default the twelve in the pictures of `render_seed`."""
    import torch

    return torch.from_numpy(np.stack([expression(int(seed)) for seed in seeds]))


def captions_of(
    seeds: Iterable[int], wording: int, expression: Callable[[int], np.ndarray] | None = None
) -> list[str]:
    """
    The captions of rendered seeds; another `wording` words the same people differently. `expression` gives the AUs of
    a seed that its caption names; without it, captions name none.
    """
    return [
        caption(sample_portrait(seed), wording * UNSEEN + seed, expression(seed) if expression else None)
        for seed in map(int, seeds)
    ]
