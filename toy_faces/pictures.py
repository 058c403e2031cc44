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


def render_shard(path: Path, seeds: range, draw: Callable[[int], np.ndarray]) -> None:
    """Render the pictures of `seeds` into `path`, an `.npy` of `(len(seeds), SIZE, SIZE, 3)` uint8."""
    pictures = np.stack([draw(seed) for seed in seeds])
    with replacing(path) as unfinished, open(unfinished, "wb") as file:
        np.save(file, pictures)


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
        self.first, self.count, self.loaded = first, count, {}
        self.seeds = {
            folder / f"{start:08}-{min(start + shard, first + count):08}.npy": range(
                start, min(start + shard, first + count)
            )
            for start in range(first, first + count, shard)
        }
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
            shards = []
            for path in self.seeds:
                if path not in self.loaded and not path.exists():
                    break
                if path not in self.loaded:
                    self.loaded[path] = np.load(path, mmap_mode="r")
                shards.append(self.loaded[path])
            if len(shards) >= min(at_least, len(self.seeds)):
                return shards
            time.sleep(0.1)

    def wait(self) -> list[np.ndarray]:
        """All shards, once they are rendered."""
        with tqdm(total=len(self.seeds), desc="render", unit="shard", mininterval=5) as progress:
            for count in range(1, len(self.seeds) + 1):
                progress.update(len(self.finished(count)) - progress.n)
        if self.pool:
            self.pool.shutdown()
        return self.finished(len(self.seeds))


def to_pixel_values(pictures: "np.ndarray | torch.Tensor") -> "torch.Tensor":
    """uint8 `(batch, height, width, 3)` → float32 `(batch, 3, height, width)` in [-1, 1], on the same device."""
    import torch

    pixels = pictures if isinstance(pictures, torch.Tensor) else torch.from_numpy(np.array(pictures))
    return (pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def aus_of(seeds: Iterable[int]) -> "torch.Tensor":
    """Intensities of the paper's twelve AUs in the pictures of `render_seed`, `(batch, 12)` float32."""
    import torch

    return torch.from_numpy(np.stack([sample_aus(int(seed)) for seed in seeds]))


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
