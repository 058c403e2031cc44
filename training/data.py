# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
From a data set to training samples: checked rows, pictures and captions that are encoded in each step or once into a
cache on disk, and the endless sequence of samples.

Each sample is a function of the seed and of its number in the run. Memory does not grow with the pictures: labels are
arrays, and everything else stays in files that are mapped or read in parts.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
import os
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from datasets import Image as ImageFeature
from datasets import load_dataset, load_dataset_builder
from datasets.exceptions import DatasetsError
from filelock import FileLock
from PIL import ExifTags, Image, ImageOps
from safetensors.torch import save_file
from tqdm.auto import tqdm

from action_units import au_columns, mirrored_columns, whole_au
from au_encoder import read_tensors
from face_data.pictures import to_rgb
from program import replacing, show_value
from training.checkpoints import disk_errors_explained
from training.config import TrainConfig
from training.encoders import StableDiffusionEncoders


FACE_BOX = ("face_x0", "face_y0", "face_x1", "face_y1")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
ROWS_PER_SHARD = 1024
CACHE_FORMAT = 2
"""Part of the name of a cache. A change of the format needs a new number, so that older caches are not read."""


# --------------------------------------------------------------------------------------------------------------------
# Rows
# --------------------------------------------------------------------------------------------------------------------


class TrainingData:
    """
    Checked rows of a table. Pictures are opened when they are needed.

    Args:
        table (`pyarrow.Table`):
            Has the columns of pictures, captions and AUs; with `--face_loss_weight`, also those of the face's box.
        config (`TrainConfig`):
            Names the columns.
        first_row (`int`, defaults to 0):
            Number of the first row, for messages.

    Attributes:
        notes (`list[str]`):
            Sentences about rows that are left out or doubtful. The run prints them once.

    Raises:
        ValueError: if a column is missing, or a value has a wrong type or range. The message names the row.
    """

    def __init__(self, table: pa.Table, config: TrainConfig, first_row: int = 0):
        self.au_names = choose_aus(table.column_names, config)
        _check_columns(table.column_names, config)
        self.first_row = first_row
        self.folder = config.train_data_dir
        self.notes: list[str] = []
        self.pictures = table.column(config.image_column)
        self.captions = table.column(config.caption_column)
        self._check_captions(config.caption_column)
        sources = {column for name in self.au_names for column in _sources_of(name, table.column_names)}
        allowed = "FACS intensities go from 0 (absent) to 5 (grade E)."
        columns = {name: self._read_numbers(table, (name,), 5, allowed)[:, 0] for name in sorted(sources)}
        self.au_intensities = np.empty((len(table), len(self.au_names)), np.float32)
        for index, name in enumerate(self.au_names):
            found = [columns[column] for column in _sources_of(name, table.column_names)]
            self.au_intensities[:, index] = found[0] if len(found) == 1 else sum(found) / len(found)
        # Order of the AUs in a mirrored picture.
        self.mirrored_aus = mirrored_columns(self.au_names) if config.random_flip else None
        self.face_boxes = None
        if config.face_loss_weight != 1:
            self.face_boxes = self._read_numbers(table, FACE_BOX, 1, "A face's box is a part of the picture, 0 to 1.")
        # For weight on faces, and for bases that take sizes.
        self.picture_sizes = np.zeros((len(table), 2), np.int32)

    def __len__(self) -> int:
        return len(self.au_intensities)

    def locate(self, row: int) -> tuple["TrainingData", int]:
        """The table that holds a row, and the index of the row in it."""
        return self, row

    def order(self, seed: int, epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, 0, epoch)).permutation(len(self))

    def picture(self, row: int) -> dict:
        """The picture of a row as `{"path": …, "bytes": …}`. One of the two may be None."""
        entry = self.pictures[row].as_py()
        if isinstance(entry, dict):
            return entry
        return {"path": entry, "bytes": None} if isinstance(entry, str) else {"path": None, "bytes": entry}

    def open_picture(self, row: int) -> BinaryIO:
        """Open the file of a picture, or its bytes in the table without a copy."""
        entry = self.pictures[row]
        content, path = (entry["bytes"], entry["path"]) if isinstance(entry, pa.StructScalar) else (entry, entry)
        is_bytes = pa.types.is_binary(content.type) or pa.types.is_large_binary(content.type)
        if is_bytes and content.is_valid:
            return pa.BufferReader(content.as_buffer())
        if not path.is_valid:
            raise FileNotFoundError("there is none")
        return open(path.as_py(), "rb")

    def picture_size(self, row: int) -> np.ndarray:
        """Width and height of a picture. Only the head of the file is read, and only once."""
        if not self.picture_sizes[row].any():
            with self.open_picture(row) as file, Image.open(file) as picture:
                is_on_its_side = picture.getexif().get(ExifTags.Base.Orientation, 1) >= 5
                self.picture_sizes[row] = picture.size[::-1] if is_on_its_side else picture.size
        return self.picture_sizes[row]

    def name(self, row: int) -> str:
        """Name of a row in messages."""
        path = self.picture(row)["path"]
        if path and self.folder is not None and Path(path).is_relative_to(self.folder):
            path = Path(path).relative_to(self.folder)
        return f"Row {self.first_row + row}" + (f" ({str(path)!r})" if path else "")

    def unreadable(self, row: int, error: Exception) -> ValueError:
        path = self.picture(row)["path"]
        return ValueError(f"Row {self.first_row + row}: the picture {path!r} cannot be read: {error}")

    def _check_captions(self, column: str) -> None:
        is_text = pa.types.is_string(self.captions.type) or pa.types.is_large_string(self.captions.type)
        wrong = pc.is_null(self.captions).to_numpy() if is_text else np.ones(len(self.captions), bool)
        if wrong.any():
            row = int(wrong.argmax())
            caption = self.captions[row].as_py()
            raise ValueError(f"{self.name(row)}: `{column}` has to be a caption, but is {caption!r}.")

    def _read_numbers(self, table: pa.Table, names: tuple[str, ...], highest: float, allowed: str) -> np.ndarray:
        numbers = np.empty((len(table), len(names)), np.float32)
        for index, name in enumerate(names):
            column = table.column(name)
            wrong = np.ones(len(table), bool)
            if pa.types.is_floating(column.type) or pa.types.is_integer(column.type):
                # A missing value becomes NaN, which is in no range.
                numbers[:, index] = column.cast(pa.float64()).to_numpy()
                wrong = ~((numbers[:, index] >= 0) & (numbers[:, index] <= highest))
            if wrong.any():
                row = int(wrong.argmax())
                value = column[row].as_py()
                allowed = "It has to be a number, not text." if isinstance(value, str) else allowed
                raise ValueError(f"{self.name(row)}: {name} is {value!r}. {allowed}")
        return numbers


class StreamedData:
    """
    The rows of Parquet files in a folder or on the Hub. A row group is read when one of its rows is needed.

    Each epoch has another order of row groups. It collects row groups until they have `shuffle_buffer_size` rows, and
    shuffles these rows together. Memory holds about twice this number of rows.
    """

    def __init__(self, urls: list[str], config: TrainConfig, notes: list[str]):
        with ThreadPoolExecutor(16) as pool:
            footers = list(tqdm(pool.map(_read_footer, urls), "Parquet files", len(urls), leave=False))
        # The first file decides. `TrainingData` raises an error if another file lacks a column.
        self.au_names = choose_aus(footers[0].schema.to_arrow_schema().names, config)
        self.config, self.notes = dataclasses.replace(config, aus=self.au_names), notes
        self.groups = [(url, f, i) for url, f in zip(urls, footers, strict=True) for i in range(f.num_row_groups)]
        sizes = [footer.row_group(index).num_rows for _, footer, index in self.groups]
        self.ends = np.cumsum(sizes)
        self.num_rows = min(int(self.ends[-1]), config.max_train_samples or int(self.ends[-1]))
        self.most_rows = 2 * config.shuffle_buffer_size + max(sizes)
        self.loaded: OrderedDict[int, TrainingData] = OrderedDict()

    def __len__(self) -> int:
        return self.num_rows

    def locate(self, row: int) -> tuple[TrainingData, int]:
        group = int(np.searchsorted(self.ends, row, side="right"))
        first_row = int(self.ends[group - 1]) if group else 0
        if group not in self.loaded:
            url, footer, index = self.groups[group]
            with fsspec.open(url) as file:
                table = pq.ParquetFile(file, metadata=footer).read_row_group(index)
            self.loaded[group] = TrainingData(table, self.config, first_row)
            while len(self.loaded) > 1 and sum(map(len, self.loaded.values())) > self.most_rows:
                self.loaded.popitem(last=False)
        self.loaded.move_to_end(group)
        return self.loaded[group], row - first_row

    def order(self, seed: int, epoch: int) -> np.ndarray:
        rng = np.random.default_rng((seed, 0, epoch))
        starts = np.minimum(np.concatenate([[0], self.ends]), self.num_rows)
        windows, buffered = [[]], 0
        for group in rng.permutation(len(self.groups)):
            if buffered >= self.config.shuffle_buffer_size:
                windows.append([])
                buffered = 0
            windows[-1].append(np.arange(starts[group], starts[group + 1]))
            buffered += len(windows[-1][-1])
        return np.concatenate([rng.permutation(np.concatenate(window)) for window in windows])


def load_training_data(config: TrainConfig) -> TrainingData | StreamedData:
    """
    Load and check all labels and captions. With `--streaming`, they are checked when they are read.

    Raises:
        ValueError: if the data cannot be read, or a label is wrong. The message names the file or the row.
    """
    folder, notes = config.train_data_dir or Path(config.dataset_name), []
    if config.streaming:
        return StreamedData(_find_parquet_files(config, folder, notes), config, notes)
    metadata_files = sorted(path for path in _files_in(folder) if path.name in METADATA_NAMES)
    parquet_files = _find_parquet_in(folder)
    if metadata_files and parquet_files:
        raise ValueError(
            f"{str(folder)!r} holds {metadata_files[0].relative_to(folder)}, and {len(parquet_files)} Parquet files,"
            f" such as {parquet_files[0].relative_to(folder)}. Training reads either pictures with metadata or Parquet"
            " files: move one of the two elsewhere."
        )
    if metadata_files:
        table = _read_metadata_files(folder, metadata_files, config, notes)
    elif parquet_files:
        for path in parquet_files:
            _read_footer(str(path))
        table = _load_table("parquet", data_files=list(map(str, parquet_files)))
    elif folder.is_dir():
        raise ValueError(f"{str(folder)!r} has no {', '.join(METADATA_NAMES)}, and no Parquet file.")
    else:
        table = _load_table(config.dataset_name, notes=notes)
    if config.max_train_samples is not None and config.max_train_samples < len(table):
        notes.append(f"{len(table) - config.max_train_samples:,} rows after `--max_train_samples` are left out.")
        table = table.slice(0, config.max_train_samples)
    if len(table) == 0:
        raise ValueError("The data set is empty.")
    data = TrainingData(table, config)
    data.notes = notes
    return data


def _load_table(source: str, notes: list[str] | None = None, **options) -> pa.Table:
    """Load a data set with the `datasets` library as a table that stays in its mapped files."""
    try:
        dataset = load_dataset(source, split="train", **options)
    except DatasetsError as error:
        if isinstance(error, OSError):
            raise
        raise ValueError(f"The data set {source!r} cannot be read: {error.__cause__ or error}") from error
    left_out = [name for name in dataset.info.splits or () if name != "train"]
    if notes is not None and left_out:
        notes.append(f"Only the split train of {source!r} is used, not {', '.join(left_out)}.")
    return dataset.with_format("arrow")[:]


def _files_in(folder: Path) -> Iterator[Path]:
    """All files in a folder and its subfolders, except hidden ones."""
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(names) if not name.startswith("."))


def _find_parquet_in(folder: Path) -> list[Path]:
    return [path for path in _files_in(folder) if path.suffix == ".parquet" and path.name not in METADATA_NAMES]


def _read_metadata_files(folder: Path, paths: list[Path], config: TrainConfig, notes: list[str]) -> pa.Table:
    """Read the rows of all metadata files of a folder, with the paths of pictures in the column `--image_column`."""
    tables = []
    for path in paths:
        same_folder = [other.name for other in paths if other.parent == path.parent]
        if len(same_folder) > 1:
            raise ValueError(f"{str(path.parent)!r} holds {' and '.join(same_folder)}. Keep one of them.")
        try:
            table = _read_metadata(path)
        except pa.ArrowException as error:
            raise ValueError(f"{str(path)!r} cannot be read: {error}") from error
        names = [f"{config.image_column}_file_name", "file_name"]
        column = next((name for name in names if name in table.column_names), None)
        if column is None:
            raise ValueError(f"{str(path)!r} has no column file_name. It has {', '.join(table.column_names)}.")
        files = table.column(column).to_pylist()
        wrong = next((row for row, file in enumerate(files) if not isinstance(file, str) or not file), None)
        if wrong is not None:
            raise ValueError(f"{str(path)!r}, row {wrong}: {column} has to name a picture, but is {files[wrong]!r}.")
        pictures = pa.array([str(path.parent / file) for file in files], pa.large_string())
        if config.image_column in table.column_names:
            table = table.drop_columns(config.image_column)
        tables.append(table.drop_columns(column).append_column(config.image_column, pictures))
    if len(paths) > 1:
        counts = [f"{len(table):,} of {path.relative_to(folder)}" for path, table in zip(paths, tables, strict=True)]
        notes.append(f"The rows are {', '.join(counts)}.")
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(f"The metadata files in {str(folder)!r} do not fit together: {error}") from error


def _read_metadata(path: Path) -> pa.Table:
    if path.suffix == ".parquet":
        return pq.read_table(path)
    # Read one block, so that all rows decide the type of a column.
    block_size = min(path.stat().st_size + 1, 2**31 - 1)
    if path.suffix == ".csv":
        options = pa.csv.ReadOptions(block_size=block_size)
        return pa.csv.read_csv(path, options, pa.csv.ParseOptions(newlines_in_values=True))
    return pa.json.read_json(path, pa.json.ReadOptions(block_size=block_size))


def _find_parquet_files(config: TrainConfig, folder: Path, notes: list[str]) -> list[str]:
    if folder.is_dir():
        urls = list(map(str, _find_parquet_in(folder)))
    else:
        splits = load_dataset_builder(config.dataset_name).config.data_files
        urls = list(splits["train"])
        left_out = [name for name in splits if name != "train"]
        if left_out:
            notes.append(f"Only the split train of {config.dataset_name!r} is used, not {', '.join(left_out)}.")
    if not urls or not all(url.endswith(".parquet") for url in urls):
        source = config.dataset_name or config.train_data_dir
        raise ValueError(
            f"`--streaming` reads Parquet files, but {str(source)!r} has others, or none. Leave the flag out."
        )
    return urls


def _read_footer(url: str) -> pq.FileMetaData:
    try:
        with fsspec.open(url) as file:
            return pq.read_metadata(file)
    except pa.ArrowException as error:
        raise ValueError(f"{url!r} cannot be read: {error}") from error


def check_pictures(data: TrainingData) -> None:
    """
    Open every picture, and add a note to `data.notes` if rows repeat a picture.

    Raises:
        ValueError: if a picture is missing, truncated or no picture. The message names the row and the file.
    """
    rows = range(len(data))
    parts = [rows[start : start + ROWS_PER_SHARD] for start in range(0, len(rows), ROWS_PER_SHARD)]
    with ThreadPoolExecutor(16) as pool:
        checked = pool.map(lambda part: [_check_picture(data, row) for row in part], parts)
        digests = list(itertools.chain(*tqdm(checked, "pictures", len(parts), leave=False)))
    first_rows: dict[bytes, int] = {}
    likely = [(first_rows.setdefault(digest, row), row) for row, digest in zip(rows, digests, strict=True)]
    repeated = [(first, row) for first, row in likely if first != row and _is_same_picture(data, first, row)]
    aus, captions = data.au_intensities, data.captions
    contradictory = [pair for pair in repeated if not np.array_equal(*aus[list(pair)])]
    same = [pair for pair in repeated if pair not in set(contradictory) and captions[pair[0]] == captions[pair[1]]]
    if contradictory:
        first, row = contradictory[0]
        data.notes.append(
            f"WARNING: {len(contradictory):,} rows have the picture of an earlier row, but other AUs:"
            f" {data.name(row)} contradicts {data.name(first)}."
        )
    if same:
        first, row = same[0]
        data.notes.append(
            f"{len(same):,} rows repeat picture, caption and AUs of an earlier row; {data.name(row)}, for example,"
            f" repeats {data.name(first)}. All of them are used."
        )


def _check_picture(data: TrainingData, row: int) -> bytes:
    """Raise an error unless the file has a head that Pillow knows and is complete. Return a digest of size and end."""
    try:
        with data.open_picture(row) as file, Image.open(file) as picture:
            size = file.seek(0, 2)
            file.seek(max(0, size - 64))
            end = file.read(64)
            # Decode the picture only if its end is unknown, because decoding is slow. A JPEG may have more data behind
            # its end marker.
            is_whole = {"PNG": b"IEND" in end, "JPEG": b"\xff\xd9" in end}.get(picture.format, False)
            if not is_whole:
                picture.load()
    # Decoders raise errors of many types.
    except Exception as error:
        raise data.unreadable(row, error) from error
    return hashlib.blake2b(b"%d " % size + end, digest_size=16).digest()


def _is_same_picture(data: TrainingData, first: int, row: int) -> bool:
    with data.open_picture(first) as file, data.open_picture(row) as other:
        return file.read() == other.read()


def count_cut_captions(data: TrainingData, encoders: StableDiffusionEncoders) -> None:
    """Add a note to `data.notes` if captions are longer than the base can read."""
    counts = pc.value_counts(data.captions)
    captions, times = counts.field("values"), counts.field("counts").to_numpy()
    cut = [index for index, caption in enumerate(captions) if encoders.is_cut(caption.as_py())]
    if cut:
        data.notes.append(
            f"{times[cut].sum():,} of {len(data):,} captions are longer than the {encoders.tokenizer.model_max_length}"
            f" tokens that the base reads, and are cut, such as {show_value(captions[cut[0]].as_py())}."
        )


def choose_aus(columns: Iterable[str], config: TrainConfig) -> tuple[str, ...]:
    """
    The AUs to train: those of `--aus`, or all that have a column, in the order of their numbers, left before right.

    Raises:
        ValueError: if there is no AU, FACS does not have the AU of a column, or one side of an AU is missing.
    """
    if config.aus:
        return config.aus
    named = [name for name in columns if re.fullmatch(r"AU[ _]?\d+[LR]?", name, flags=re.IGNORECASE)]
    if not named:
        raise ValueError(f"The data set has no column of an AU, such as AU12. It has {', '.join(columns)}.")
    au_names = tuple(sorted(named, key=lambda name: (int(re.sub(r"\D", "", name)), name)))
    try:
        au_columns(au_names)
    except ValueError as error:
        raise ValueError(
            f"The AU columns of the data set are {', '.join(au_names)}: {error} Choose AUs with `--aus`."
        ) from error
    return au_names


def _sources_of(au: str, columns: list[str]) -> tuple[str, ...]:
    """The columns whose mean is an AU: its own column, or the whole AU's for a side, or the columns of both sides."""
    if au not in columns:
        if whole_au(au) in columns:
            return (whole_au(au),)
        if f"{au}L" in columns and f"{au}R" in columns:
            return f"{au}L", f"{au}R"
    return (au,)


def _check_columns(columns: list[str], config: TrainConfig) -> None:
    needed = [config.image_column, config.caption_column]
    needed += [column for au in config.aus for column in _sources_of(au, columns)]
    needed += FACE_BOX if config.face_loss_weight != 1 else ()
    missing = [name for name in needed if name not in columns]
    if missing:
        raise ValueError(
            f"The data set has no column {', '.join(missing)}. It has {', '.join(columns)}. `--image_column` and"
            " `--caption_column` name the columns of picture and caption, and `--aus` names AUs; `--face_loss_weight`"
            f" needs {', '.join(FACE_BOX)}."
        )


# --------------------------------------------------------------------------------------------------------------------
# Pictures and captions: as pixels and token ids, or as latents and embeddings from a cache
# --------------------------------------------------------------------------------------------------------------------


class PixelInputs:
    """Pictures and captions as `pixel_values` and `input_ids`, which the frozen encoders encode in each step."""

    def __init__(self, data: TrainingData | StreamedData, encoders: StableDiffusionEncoders, resolution: int):
        side = resolution // encoders.vae_scale_factor
        self.data, self.encoders, self.resolution = data, encoders, resolution
        self.takes_sizes = encoders.takes_sizes
        self.latents_shape = (encoders.latent_channels, side, side)

    def picture(self, row: int, flip: bool) -> dict[str, torch.Tensor]:
        """Read `pixel_values` of shape `(3, resolution, resolution)`, float32 in [-1, 1], mirrored if `flip`."""
        data, index = self.data.locate(row)
        try:
            picture, _ = to_rgb(ImageFeature().decode_example(data.picture(index)))
        # Decoders raise errors of many types.
        except Exception as error:
            raise data.unreadable(index, error) from error
        # Resize the shorter side, and crop the longer side.
        picture = ImageOps.fit(picture, (self.resolution, self.resolution))
        pixels = np.asarray(ImageOps.mirror(picture) if flip else picture)
        return {"pixel_values": torch.from_numpy(pixels / np.float32(127.5) - 1).permute(2, 0, 1).contiguous()}

    def caption(self, row: int | None) -> dict[str, torch.Tensor]:
        """The `input_ids` of the caption of a row, or of the empty caption for None."""
        if row is None:
            return {"input_ids": self.encoders.tokenize("")}
        data, index = self.data.locate(row)
        caption = data.captions[index].as_py()
        if isinstance(self.data, StreamedData) and self.encoders.is_cut(caption):
            # Python shows the same warning only once.
            warnings.warn("Some captions are longer than the base can read. They are cut.", stacklevel=2)
        return {"input_ids": self.encoders.tokenize(caption)}


class LatentInputs:
    """
    Pictures and captions as `latents_mean`, `latents_std` and `prompt_embeds` from a cache, made by `cache_inputs`.

    Args:
        pictures (`list[CachedRows]`):
            The latents of all rows, and with `--random_flip` the latents of all mirrored pictures.
        captions (`CachedRows`):
            Each different caption once, the empty caption first.
        caption_indices (`numpy.ndarray`):
            Index in `captions` of each row's caption.
        takes_sizes (`bool`):
            Whether the base takes the `original_size` of pictures.
    """

    def __init__(
        self,
        data: TrainingData,
        latents_shape: tuple[int, int, int],
        pictures: list["CachedRows"],
        captions: "CachedRows",
        caption_indices: np.ndarray,
        takes_sizes: bool = False,
    ):
        self.takes_sizes = takes_sizes
        self.data, self.latents_shape = data, latents_shape
        self.pictures, self.captions, self.caption_indices = pictures, captions, caption_indices

    def picture(self, row: int, flip: bool) -> dict[str, torch.Tensor]:
        return self.pictures[flip][row]

    def caption(self, row: int | None) -> dict[str, torch.Tensor]:
        return self.captions[0 if row is None else int(self.caption_indices[row])]


class CachedRows:
    """Rows of named tensors in memory-mapped files of `ROWS_PER_SHARD` rows each."""

    def __init__(self, paths: list[Path]):
        self.shards = [read_tensors(path) for path in paths]

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        shard = self.shards[row // ROWS_PER_SHARD]
        return {name: tensor[row % ROWS_PER_SHARD] for name, tensor in shard.items()}


@dataclass(frozen=True)
class _RowsToEncode(torch.utils.data.Dataset):
    read: Callable[[int], dict[str, torch.Tensor]]

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return self.read(row)


def cache_inputs(inputs: PixelInputs, config: TrainConfig, accelerator: Accelerator) -> LatentInputs:
    """Encode `inputs` into a cache on disk. Its name is a hash of the inputs and the encoders."""
    data, encoders = inputs.data, inputs.encoders
    # float16 is precise enough for latents, but bfloat16 is not.
    dtype = torch.float32 if encoders.vae.dtype == torch.float32 else torch.float16
    settings = (CACHE_FORMAT, encoders.fingerprint(), dtype)
    pictures_digest = _digest_pictures(data)

    def cache_rows(kind: str, digest: str, read: Callable[[int], dict], num_rows: int, encode: Callable) -> CachedRows:
        folder = (config.cache_dir or config.output_dir / "cache") / f"{kind}-{digest}"
        return encode_rows(folder, _RowsToEncode(read), num_rows, encode, dtype, config, accelerator)

    latents = [
        cache_rows(
            "latents",
            _hash(*settings, inputs.resolution, flip, pictures_digest),
            functools.partial(inputs.picture, flip=flip),
            len(data),
            lambda batch: encoders.encode_pictures(batch["pixel_values"]),
        )
        for flip in ((False, True) if config.random_flip else (False,))
    ]
    # Encode each caption once, because many rows share one. `large_string` has no limit of 2 GiB of text.
    encoded = data.captions.cast(pa.large_string()).combine_chunks().dictionary_encode()
    captions = pa.concat_arrays([pa.array([""], pa.large_string()), encoded.dictionary])
    embeddings = cache_rows(
        "captions",
        _hash(*settings, *(caption.as_py() for caption in captions)),
        lambda row: {"input_ids": encoders.tokenize(captions[row].as_py())},
        len(captions),
        lambda batch: encoders.encode_captions(batch["input_ids"]),
    )
    indices = encoded.indices.to_numpy() + 1
    return LatentInputs(data, inputs.latents_shape, latents, embeddings, indices, inputs.takes_sizes)


def encode_rows(
    folder: Path,
    rows: torch.utils.data.Dataset,
    num_rows: int,
    encode: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    dtype: torch.dtype,
    config: TrainConfig,
    accelerator: Accelerator,
) -> CachedRows:
    """
    Encode the rows that are not in `folder` yet. A file is renamed into place when it is complete, so an interrupted
    run leaves only complete files, and the next run writes the missing ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{shard:05d}.safetensors" for shard in range(math.ceil(num_rows / ROWS_PER_SHARD))]
    mine = paths[accelerator.process_index :: accelerator.num_processes]
    missing = [path for path in mine if not path.exists()]
    size = config.train_batch_size
    for path in tqdm(missing, desc=folder.name[:16], unit="file", disable=not accelerator.is_main_process):
        lock = path.with_suffix(".lock")
        # Another run with the same cache may be writing this file, so check again after waiting for the lock.
        with FileLock(lock):
            if not path.exists():
                first = int(path.stem) * ROWS_PER_SHARD
                last = min(first + ROWS_PER_SHARD, num_rows)
                batches = torch.utils.data.DataLoader(
                    rows,
                    batch_sampler=[range(start, min(start + size, last)) for start in range(first, last, size)],
                    num_workers=config.dataloader_num_workers,
                    generator=torch.Generator(),
                )
                encoded = [encode(batch) for batch in read_batches(batches)]
                tensors = {name: torch.cat([part[name].to("cpu", dtype) for part in encoded]) for name in encoded[0]}
                with disk_errors_explained(f"{folder.name[:16]}/{path.name}", folder), replacing(path) as unfinished:
                    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished)
            lock.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    return CachedRows(paths)


def _hash(*values) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for value in values:
        digest.update(repr(value).encode())
    return digest.hexdigest()


def _digest_pictures(data: TrainingData) -> str:
    """A hash of all pictures: of path, size and time of change for files, and of the bytes for others."""
    digest = hashlib.blake2b(digest_size=16)
    for row in range(len(data)):
        entry = data.picture(row)
        if entry["bytes"] is None:
            status = os.stat(entry["path"])
            digest.update(f"{entry['path']} {status.st_size} {status.st_mtime_ns}\n".encode())
        else:
            digest.update(hashlib.blake2b(entry["bytes"], digest_size=16).digest())
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------------------------
# Samples
# --------------------------------------------------------------------------------------------------------------------


def smooth_au_intensities(
    au_intensities: np.ndarray, variance: float, rounding_prob: float, rng: np.random.Generator
) -> np.ndarray:
    """Smooth the labels of one sample: Gaussian noise, clipped to [0, 5]; some samples rounded (paper §4.3)."""
    noise = rng.standard_normal(au_intensities.shape, np.float32)
    smoothed = np.clip(au_intensities + np.float32(math.sqrt(variance)) * noise, 0, 5)
    return np.round(smoothed) if rng.random() < rounding_prob else smoothed


def timestep_probabilities(num_train_timesteps: int, config: TrainConfig) -> np.ndarray:
    """The probability of each timestep. It is uniform except for the timesteps of `--timestep_bias_strategy`."""
    weights = np.ones(num_train_timesteps)
    portion = round(num_train_timesteps * config.timestep_bias_portion)
    favoured = {
        "none": slice(0, 0),
        "earlier": slice(0, portion),
        "later": slice(num_train_timesteps - portion, None),
        "range": slice(config.timestep_bias_begin, config.timestep_bias_end),
    }
    weights[favoured[config.timestep_bias_strategy]] *= config.timestep_bias_multiplier
    return weights / weights.sum()


def face_weights(box: np.ndarray, picture_size: np.ndarray, side: int, weight: float) -> np.ndarray:
    """
    Weights of the loss at each of `side` × `side` latents, `weight` inside the face against 1 outside, with mean 1.

    Args:
        box (`numpy.ndarray` of shape `(4,)`):
            Left, top, right and bottom, as fractions of the whole picture from 0 to 1.
        picture_size (`numpy.ndarray` of shape `(2,)`):
            Width and height of the picture. Training uses the square in its middle.
    """
    shorter_side = picture_size.min()
    cut = (picture_size - shorter_side) / 2
    corners = (box.reshape(2, 2) * picture_size - cut) / shorter_side * side
    cells = np.arange(side)[:, None]
    # Fraction of each column and row of latents that the box covers.
    covered = np.clip(np.minimum(corners[1], cells + 1) - np.maximum(corners[0], cells), 0, 1)
    weights = 1 + (weight - 1) * np.outer(covered[:, 1], covered[:, 0])
    return (weights / weights.mean()).astype(np.float32)


class TrainingSamples(torch.utils.data.Dataset):
    """
    The endless sequence of training samples. Sample n is a function of only the seed and n, and with stratified
    timesteps also of `samples_per_step`.
    """

    def __init__(
        self,
        inputs: PixelInputs | LatentInputs,
        num_train_timesteps: int,
        config: TrainConfig,
        samples_per_step: int = 1,
    ):
        self.inputs = inputs
        self.config = config
        self.samples_per_step = samples_per_step
        self.timestep_ends = np.cumsum(timestep_probabilities(num_train_timesteps, config))
        self.orders: dict[int, np.ndarray] = {}

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        config, inputs = self.config, self.inputs
        row = self._row(number)
        data, index = inputs.data.locate(row)
        # Always draw all numbers in the same order, so that an option does not change the draws of others.
        rng = np.random.default_rng((config.seed, 1, number))
        noise, latent_noise = rng.standard_normal((2, *inputs.latents_shape), np.float32)
        timestep = self._timestep(number, rng.random())
        flip, drop_aus, drop_caption = rng.random(3) < (0.5, config.au_drop_prob, config.caption_drop_prob)
        flip = flip and config.random_flip
        au_intensities = self._aus(data, index, flip, drop_aus, rng)
        offset = rng.standard_normal((len(noise), 1, 1), np.float32)
        sample = {
            "row": torch.tensor(row),
            **inputs.picture(row, bool(flip)),
            **inputs.caption(None if drop_caption else row),
            "au_intensities": au_intensities,
            "noise": torch.from_numpy(noise + np.float32(config.noise_offset) * offset),
            "latent_noise": torch.from_numpy(latent_noise),
            "timesteps": torch.tensor(timestep),
        }
        if inputs.takes_sizes:
            width, height = data.picture_size(index).tolist()
            sample["original_size"] = torch.tensor([height, width])
        if data.face_boxes is not None:
            size, side = data.picture_size(index), inputs.latents_shape[-1]
            weights = face_weights(data.face_boxes[index], size, side, config.face_loss_weight)
            sample["loss_weights"] = torch.from_numpy(np.flip(weights, 1).copy() if flip else weights)
        if config.au_feedback_meter is not None:
            # AU feedback commands the AUs of another row; of the same row group with `--streaming`.
            rng = np.random.default_rng((config.seed, 3, number))
            other = (index + int(rng.integers(1, max(2, len(data))))) % len(data)
            flip, drop_aus = rng.random(2) < (0.5 * config.random_flip, config.au_drop_prob)
            sample["commanded_aus"] = self._aus(data, other, flip, drop_aus, rng)
            sample["feedback_seed"] = torch.tensor(int(rng.integers(2**63)))
        return sample

    def _aus(self, data: TrainingData, index: int, flip: bool, drop: bool, rng: np.random.Generator) -> torch.Tensor:
        aus, config = data.au_intensities[index], self.config
        if flip:
            aus = aus[data.mirrored_aus]
        aus = smooth_au_intensities(aus, config.au_noise_variance, config.au_rounding_prob, rng)
        return torch.from_numpy(aus * np.float32(not drop))

    def _row(self, number: int) -> int:
        epoch, place = divmod(number, len(self.inputs.data))
        if epoch not in self.orders:
            # Keep the previous epoch, because a batch may lie in two epochs.
            self.orders = {e: order for e, order in self.orders.items() if e == epoch - 1}
            self.orders[epoch] = self.inputs.data.order(self.config.seed, epoch)
        return int(self.orders[epoch][place])

    def _timestep(self, number: int, fraction: float) -> int:
        if self.config.timestep_sampling == "stratified":
            fraction = (number % self.samples_per_step + fraction) / self.samples_per_step
        timestep = np.searchsorted(self.timestep_ends, fraction, side="right")
        return min(int(timestep), len(self.timestep_ends) - 1)


def read_batches(dataloader: torch.utils.data.DataLoader) -> Iterator[dict[str, torch.Tensor]]:
    """Iterate over batches, and give an error from a worker process the message that it has in the main process."""
    try:
        yield from dataloader
    except ValueError as error:
        raise ValueError(str(error).rpartition("ValueError: ")[2].strip()) from error


def make_dataloader(
    samples: TrainingSamples, first_step: int, config: TrainConfig, accelerator: Accelerator
) -> torch.utils.data.DataLoader:
    """The batches of this process from `first_step` to the last one."""
    size, accumulated = config.train_batch_size, config.gradient_accumulation_steps
    starts = [
        (batch * accelerator.num_processes + accelerator.process_index) * size
        for batch in range(first_step * accumulated, config.max_train_steps * accumulated)
    ]
    return torch.utils.data.DataLoader(
        samples,
        batch_sampler=[range(start, start + size) for start in starts],
        num_workers=config.dataloader_num_workers,
        pin_memory=accelerator.device.type != "cpu",
        # The loader draws seeds that nobody uses. With its own generator, it leaves the global random state alone.
        generator=torch.Generator(),
    )
