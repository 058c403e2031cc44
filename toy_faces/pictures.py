"""The rendered training pictures of the toy world: a file of pixels, and what each picture shows."""

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from toy_faces.renderer import SIZE, caption, render, sample_aus, sample_portrait


UNSEEN = 10_000_000
"""Seeds from here on are never trained on: the report and the tests draw their pictures from them."""

CHUNK = 500


def render_seed(seed: int) -> np.ndarray:
    """The picture of one seed, `(SIZE, SIZE, 3)` uint8: a person and an expression that both follow from the seed."""
    return np.asarray(render(sample_portrait(seed), sample_aus(seed)))


def render_pictures(path: Path, count: int, processes: int | None = None) -> np.ndarray:
    """
    Render the pictures of seeds 0 … count − 1 into `path`, a memory-mapped `(count, SIZE, SIZE, 3)` uint8 file.

    A file that is already complete is reused. Pictures are written to a temporary name that is renamed at the end,
    so a killed run leaves nothing that could be mistaken for a complete file.
    """
    if not path.exists():
        unfinished = path.with_suffix(".part.npy")
        pictures = np.lib.format.open_memmap(unfinished, "w+", np.uint8, (count, SIZE, SIZE, 3))
        with ProcessPoolExecutor(processes) as pool:
            rendered = pool.map(render_seed, range(count), chunksize=CHUNK)
            for index, picture in enumerate(tqdm(rendered, total=count, desc="render", mininterval=5)):
                pictures[index] = picture
        pictures.flush()
        unfinished.rename(path)
    pictures = np.load(path, mmap_mode="r")
    if len(pictures) < count:
        raise ValueError(f"{path} holds {len(pictures)} pictures, but the preset asks for {count}: delete it.")
    return pictures


def to_pixel_values(pictures: np.ndarray) -> torch.Tensor:
    """uint8 `(batch, height, width, 3)` → float32 `(batch, 3, height, width)` in [-1, 1]."""
    pixels = torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2)
    return (pixels.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def aus_of(seeds) -> torch.Tensor:
    """The AU intensities of rendered seeds, `(batch, 12)` float32."""
    return torch.from_numpy(np.stack([sample_aus(int(seed)) for seed in seeds]))


def captions_of(seeds, wording: int, with_expression: bool = False) -> list[str]:
    """The captions of rendered seeds; another `wording` words the same people differently."""
    return [
        caption(sample_portrait(seed), wording * UNSEEN + seed, sample_aus(seed) if with_expression else None)
        for seed in map(int, seeds)
    ]
