# SPDX-License-Identifier: Apache-2.0
"""
From a data set to training samples: checked rows, pictures and captions that are encoded in each step or once into a
cache on disk, and the endless sequence of samples.

Each sample is a function of the seed and of its number in the run. Memory does not grow with the pictures: labels are
arrays, and everything else stays in files that are mapped or read in parts.
"""

import dataclasses
import functools
import glob
import hashlib
import itertools
import math
import os
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
from datasets import load_dataset, load_dataset_builder
from datasets.exceptions import DatasetsError
from filelock import FileLock
from PIL import ExifTags, Image, ImageOps
from safetensors.torch import save_file
from torch.utils.data import default_collate
from tqdm.auto import tqdm

from action_units import au_columns, mirrored_columns, whole_au
from au_encoder import read_tensors
from face_data.pictures import FACE_BOX, size_and_end, to_rgb
from program import replacing, show_value
from training.checkpoints import disk_errors_explained
from training.config import TrainConfig
from training.encoders import StableDiffusionEncoders


METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
ROWS_PER_SHARD = 1024
CACHE_FORMAT = 2
"""Part of the name of a cache. A change of the format needs a new number, so that older caches are not read."""


# ---- Rows -----------------------------------------------------------------------------------------------------------


class TrainingData:
    """
    Checked rows of a table. Pictures are opened when they are needed.

    The table has the columns of pictures, captions and AUs that `config` names, and those of the face's box if
    `--face_loss_weight` or `--au_side_attention_weight` needs them. Messages count rows from `first_row` on. The run
    prints `notes` once, sentences about rows that are left out or doubtful.

    Raises:
        ValueError: if a column is missing, or a value has a wrong type or range. The message names the row.
    """

    def __init__(self, table: pa.Table, config: TrainConfig, first_row: int = 0):
        self.au_names = choose_aus(table.column_names, config)
        sources = [_sources_of(name, table.column_names) for name in self.au_names]
        measured = list(dict.fromkeys(itertools.chain(*sources)))
        boxes = FACE_BOX if config.face_loss_weight != 1 or config.au_side_attention_weight else ()
        _check_columns(table, [config.image_column, config.caption_column, *measured, *boxes])
        self.first_row, self.folder = first_row, config.train_data_dir
        self.notes: list[str] = []
        self.paths, self.contents = _split_pictures(table.column(config.image_column))
        self.captions = self._read_captions(table, config.caption_column)
        allowed = "FACS intensities go from 0 (absent) to 5 (grade E)."
        aus = {name: self._read_numbers(table, name, 5, allowed) for name in measured}
        self.au_intensities = np.stack([np.mean([aus[name] for name in names], axis=0) for names in sources], axis=1)
        # Order of the AUs in a mirrored picture.
        self.mirrored_aus = mirrored_columns(self.au_names) if config.random_flip else None
        allowed = "A face's box is a part of the picture, 0 to 1."
        corners = [self._read_numbers(table, name, 1, allowed) for name in boxes]
        self.face_boxes = np.stack(corners, axis=1) if corners else None
        # For weight on faces, and for bases that take sizes.
        self.picture_sizes = np.zeros((len(table), 2), np.int32)

    def __len__(self) -> int:
        return len(self.au_intensities)

    def locate(self, row: int) -> tuple["TrainingData", int]:
        """The table that holds a row, and the index of the row in it."""
        return self, row

    def order(self, seed: int, epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, 0, epoch)).permutation(len(self))

    def open_file(self, row: int) -> BinaryIO:
        """Open the file of a picture, or its bytes in the table without a copy."""
        if self.contents[row].is_valid:
            return pa.BufferReader(self.contents[row].as_buffer())
        if not self.paths[row].is_valid:
            raise FileNotFoundError("there is none")
        return open(self.paths[row].as_py(), "rb")

    @contextmanager
    def open_picture(self, row: int) -> Iterator[Image.Image]:
        """Open a picture. An error in the block becomes a ValueError that names the row and the file."""
        try:
            with self.open_file(row) as file, Image.open(file) as picture:
                yield picture
        # Decoders raise errors of many types.
        except Exception as error:
            path = self.paths[row].as_py()
            raise ValueError(f"Row {self.first_row + row}: the picture {path!r} cannot be read: {error}") from error

    def picture_size(self, row: int) -> np.ndarray:
        """Width and height of a picture. Only the head of the file is read, and only once."""
        if not self.picture_sizes[row].any():
            with self.open_picture(row) as picture:
                is_on_its_side = picture.getexif().get(ExifTags.Base.Orientation, 1) >= 5
                self.picture_sizes[row] = picture.size[::-1] if is_on_its_side else picture.size
        return self.picture_sizes[row]

    def name(self, row: int) -> str:
        """Name of a row in messages."""
        path = self.paths[row].as_py()
        if path and self.folder is not None and Path(path).is_relative_to(self.folder):
            path = Path(path).relative_to(self.folder)
        return f"Row {self.first_row + row}" + (f" ({str(path)!r})" if path else "")

    def _read_captions(self, table: pa.Table, name: str) -> pa.ChunkedArray:
        captions = table.column(name)
        is_text = pa.types.is_string(captions.type) or pa.types.is_large_string(captions.type)
        wrong = pc.is_null(captions).to_numpy() if is_text else np.ones(len(captions), bool)
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(f"{self.name(row)}: `{name}` has to be a caption, but is {captions[row].as_py()!r}.")
        return captions

    def _read_numbers(self, table: pa.Table, name: str, highest: float, allowed: str) -> np.ndarray:
        column, numbers = table.column(name), np.full(len(table), np.nan, np.float32)
        if pa.types.is_floating(column.type) or pa.types.is_integer(column.type):
            # A missing value becomes NaN, which is in no range.
            numbers = column.cast(pa.float64()).to_numpy().astype(np.float32)
        wrong = ~((numbers >= 0) & (numbers <= highest))
        if wrong.any():
            row = int(wrong.argmax())
            value = column[row].as_py()
            allowed = "It has to be a number, not text." if isinstance(value, str) else allowed
            raise ValueError(f"{self.name(row)}: {name} is {value!r}. {allowed}")
        return numbers


def _split_pictures(column: pa.ChunkedArray) -> tuple[pa.ChunkedArray | pa.Array, pa.ChunkedArray | pa.Array]:
    """The paths and the bytes of pictures, from a column of either or of both. A row may lack one of them."""
    if pa.types.is_struct(column.type):
        return pc.struct_field(column, "path"), pc.struct_field(column, "bytes")
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        return pa.nulls(len(column), pa.string()), column
    return column.cast(pa.large_string()), pa.nulls(len(column), pa.binary())


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


Rows = TrainingData | StreamedData


def load_training_data(config: TrainConfig) -> Rows:
    """
    Load and check all labels and captions. With `--streaming`, they are checked when they are read. Raises a
    ValueError that names the file or the row if the data cannot be read, or a label is wrong.
    """
    folder, notes = config.train_data_dir or Path(config.dataset_name), []
    # Hidden files and folders are not found.
    files = sorted(folder / name for name in glob.iglob("**/*.*", root_dir=folder, recursive=True))
    metadata_files = [path for path in files if path.name in METADATA_NAMES]
    parquet_files = [str(path) for path in files if path.suffix == ".parquet" and path.name not in METADATA_NAMES]
    if config.streaming:
        return StreamedData(_find_urls(config, parquet_files, notes), config, notes)
    if metadata_files and parquet_files:
        raise ValueError(
            f"{str(folder)!r} holds {metadata_files[0].relative_to(folder)}, and {len(parquet_files)} Parquet files,"
            f" such as {Path(parquet_files[0]).relative_to(folder)}. Training reads either pictures with metadata or"
            " Parquet files: move one of the two elsewhere."
        )
    if metadata_files:
        table = _read_metadata_files(folder, metadata_files, config, notes)
    elif parquet_files:
        for path in parquet_files:
            _read_footer(path)
        table = _load_table("parquet", notes, data_files=parquet_files)
    elif folder.is_dir():
        raise ValueError(f"{str(folder)!r} has no {', '.join(METADATA_NAMES)}, and no Parquet file.")
    else:
        table = _load_table(config.dataset_name, notes)
    if config.max_train_samples is not None and config.max_train_samples < len(table):
        notes.append(f"{len(table) - config.max_train_samples:,} rows after `--max_train_samples` are left out.")
        table = table.slice(0, config.max_train_samples)
    if len(table) == 0:
        raise ValueError("The data set is empty.")
    data = TrainingData(table, config)
    data.notes = notes
    return data


def _load_table(source: str, notes: list[str], **options) -> pa.Table:
    """Load a data set with the `datasets` library as a table that stays in its mapped files."""
    try:
        dataset = load_dataset(source, split="train", **options)
    except DatasetsError as error:
        if isinstance(error, OSError):
            raise
        raise ValueError(f"The data set {source!r} cannot be read: {error.__cause__ or error}") from error
    _note_other_splits(source, dataset.info.splits or (), notes)
    return dataset.with_format("arrow")[:]


def _note_other_splits(source: str, splits: Iterable[str], notes: list[str]) -> None:
    left_out = [name for name in splits if name != "train"]
    if left_out:
        notes.append(f"Only the split train of {source!r} is used, not {', '.join(left_out)}.")


def _read_metadata_files(folder: Path, paths: list[Path], config: TrainConfig, notes: list[str]) -> pa.Table:
    """Read the rows of all metadata files of a folder, with the paths of pictures in the column `--image_column`."""
    tables = []
    for path in paths:
        same_folder = [other.name for other in paths if other.parent == path.parent]
        if len(same_folder) > 1:
            raise ValueError(f"{str(path.parent)!r} holds {' and '.join(same_folder)}. Keep one of them.")
        with _named(path):
            table = _read_metadata(path)
        names = [f"{config.image_column}_file_name", "file_name"]
        column = next((name for name in names if name in table.column_names), None)
        if column is None:
            raise ValueError(f"{str(path)!r} has no column file_name. It has {', '.join(table.column_names)}.")
        files = table.column(column).to_pylist()
        wrong = next((row for row, file in enumerate(files) if not isinstance(file, str) or not file), None)
        if wrong is not None:
            raise ValueError(f"{str(path)!r}, row {wrong}: {column} has to name a picture, but is {files[wrong]!r}.")
        pictures = pa.array([str(path.parent / file) for file in files], pa.large_string())
        kept = [name for name in table.column_names if name not in (column, config.image_column)]
        tables.append(table.select(kept).append_column(config.image_column, pictures))
    if len(paths) > 1:
        counts = [f"{len(table):,} of {path.relative_to(folder)}" for path, table in zip(paths, tables, strict=True)]
        notes.append(f"The rows are {', '.join(counts)}.")
    with _named(folder, "The metadata files in {} do not fit together"):
        return pa.concat_tables(tables, promote_options="permissive")


@contextmanager
def _named(path: Path | str, what: str = "{} cannot be read") -> Iterator[None]:
    """Turn an error of pyarrow into a ValueError that names the file."""
    try:
        yield
    except pa.ArrowException as error:
        raise ValueError(f"{what.format(repr(str(path)))}: {error}") from error


def _read_metadata(path: Path) -> pa.Table:
    if path.suffix == ".parquet":
        return pq.read_table(path)
    # Read one block, so that all rows decide the type of a column.
    block_size = min(path.stat().st_size + 1, 2**31 - 1)
    if path.suffix == ".csv":
        options = pa.csv.ReadOptions(block_size=block_size)
        return pa.csv.read_csv(path, options, pa.csv.ParseOptions(newlines_in_values=True))
    return pa.json.read_json(path, pa.json.ReadOptions(block_size=block_size))


def _find_urls(config: TrainConfig, urls: list[str], notes: list[str]) -> list[str]:
    """The Parquet files to stream: `urls`, which are in a folder, or the split train of a data set on the Hub."""
    source = config.dataset_name or str(config.train_data_dir)
    if not Path(source).is_dir():
        splits = load_dataset_builder(source).config.data_files
        _note_other_splits(source, splits, notes)
        urls = list(splits["train"])
    if not urls or not all(url.endswith(".parquet") for url in urls):
        raise ValueError(f"`--streaming` reads Parquet files, but {source!r} has others, or none. Leave the flag out.")
    return urls


def _read_footer(url: str) -> pq.FileMetaData:
    with _named(url), fsspec.open(url) as file:
        return pq.read_metadata(file)


def check_pictures(data: TrainingData) -> None:
    """
    Open every picture, and add a note to `data.notes` if rows repeat a picture. Raises a ValueError that names the row
    and the file if a picture is missing, truncated or no picture.
    """
    rows = range(len(data))
    parts = [rows[start : start + ROWS_PER_SHARD] for start in range(0, len(rows), ROWS_PER_SHARD)]
    with ThreadPoolExecutor(16) as pool:
        checked = pool.map(lambda part: [_check_picture(data, row) for row in part], parts)
        digests = list(itertools.chain(*tqdm(checked, "pictures", len(parts), leave=False)))
    first_rows: dict[bytes, int] = {}
    likely = [(first_rows.setdefault(digest, row), row) for row, digest in zip(rows, digests, strict=True)]
    repeated = [(first, row) for first, row in likely if first != row and _read(data, first) == _read(data, row)]
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
    with data.open_picture(row) as picture, data.open_file(row) as file:
        end = size_and_end(file)
        # Decode the picture only if its end is unknown, because decoding is slow. A JPEG may have more data behind its
        # end marker.
        if not {"PNG": b"IEND" in end, "JPEG": b"\xff\xd9" in end}.get(picture.format, False):
            picture.load()
    return hashlib.blake2b(end, digest_size=16).digest()


def _read(data: TrainingData, row: int) -> bytes:
    with data.open_file(row) as file:
        return file.read()


def count_cut_captions(data: TrainingData, encoders: StableDiffusionEncoders) -> None:
    """Add a note to `data.notes` if captions are longer than the base can read."""
    counts = pc.value_counts(data.captions)
    captions, times = counts.field("values"), counts.field("counts").to_numpy()
    cut = [index for index, caption in enumerate(captions) if encoders.is_cut(caption.as_py())]
    if cut:
        data.notes.append(
            f"{times[cut].sum():,} of {len(data):,} captions are longer than the {encoders.max_tokens}"
            f" tokens that the base reads, and are cut, such as {show_value(captions[cut[0]].as_py())}."
        )


def choose_aus(columns: Iterable[str], config: TrainConfig) -> tuple[str, ...]:
    """
    The AUs to train: those of `--aus`, or all that have a column, in the order of their numbers, left before right.
    Raises a ValueError if there is no AU, FACS does not have the AU of a column, one side of an AU is missing, or no
    AU has sides and `--au_side_tokens` needs them.
    """
    named = [name for name in columns if re.fullmatch(r"AU[ _]?\d+[LR]?", name, flags=re.IGNORECASE)]
    au_names = config.aus or tuple(sorted(named, key=lambda name: (int(re.sub(r"\D", "", name)), name)))
    if not au_names:
        raise ValueError(f"The data set has no column of an AU, such as AU12. It has {', '.join(columns)}.")
    try:
        au_columns(au_names)
    except ValueError as error:
        raise ValueError(
            f"The AU columns of the data set are {', '.join(au_names)}: {error} Choose AUs with `--aus`."
        ) from error
    if config.au_side_tokens and not any(name.endswith("L") for name in au_names):
        raise ValueError(
            "`--au_side_tokens` needs AUs with sides such as AU12L and AU12R, but the run trains"
            f" {', '.join(au_names)}. Choose them with `--aus`, or leave the flag out."
        )
    return au_names


def _sources_of(au: str, columns: list[str]) -> tuple[str, ...]:
    """The columns whose mean is an AU: its own column, or the whole AU's for a side, or the columns of both sides."""
    if au not in columns:
        if whole_au(au) in columns:
            return (whole_au(au),)
        if f"{au}L" in columns and f"{au}R" in columns:
            return f"{au}L", f"{au}R"
    return (au,)


def _check_columns(table: pa.Table, needed: list[str]) -> None:
    missing = [name for name in needed if name not in table.column_names]
    if missing:
        raise ValueError(
            f"The data set has no column {', '.join(missing)}. It has {', '.join(table.column_names)}."
            " `--image_column` and `--caption_column` name the columns of picture and caption, and `--aus` names AUs;"
            f" `--face_loss_weight` and `--au_side_attention_weight` need {', '.join(FACE_BOX)}; without them, set"
            " `--face_loss_weight 1`, also after `--preset best`."
        )


# ---- Pictures and captions: as pixels and token ids, or as latents and embeddings from a cache ----------------------


class PixelInputs:
    """Pictures and captions as `pixel_values` and `input_ids`, which the frozen encoders encode in each step."""

    def __init__(self, data: Rows, encoders: StableDiffusionEncoders, resolution: int):
        side = resolution // encoders.vae_scale_factor
        self.data, self.encoders, self.resolution = data, encoders, resolution
        self.takes_sizes = encoders.takes_sizes
        self.latents_shape = (encoders.latent_channels, side, side)

    def picture(self, row: int, flip: bool) -> dict[str, torch.Tensor]:
        """Read `pixel_values` of shape `(3, resolution, resolution)`, float32 in [-1, 1], mirrored if `flip`."""
        data, index = self.data.locate(row)
        with data.open_picture(index) as file:
            picture, _ = to_rgb(file)
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


class LatentInputs(PixelInputs):
    """
    The same pictures and captions as `latents_mean`, `latents_std` and `prompt_embeds` from a cache, which
    `cache_inputs` makes. `pictures` are the latents of all rows, and with `--random_flip` those of all mirrored
    pictures; `captions` has each different caption once, the empty caption first, and `caption_indices` the index of
    each row's caption.
    """

    def __init__(
        self, inputs: PixelInputs, pictures: list["CachedRows"], captions: "CachedRows", caption_indices: np.ndarray
    ):
        super().__init__(inputs.data, inputs.encoders, inputs.resolution)
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


def cache_inputs(inputs: PixelInputs, config: TrainConfig, accelerator: Accelerator) -> LatentInputs:
    """Encode `inputs` into a cache on disk. Its name is a hash of the inputs and the encoders."""
    data, encoders = inputs.data, inputs.encoders
    # float16 is precise enough for latents, but bfloat16 is not.
    dtype = torch.float32 if encoders.vae.dtype == torch.float32 else torch.float16
    settings, pictures_digest = (CACHE_FORMAT, encoders.fingerprint(), dtype), _digest_pictures(data)

    def cache_rows(kind: str, names: tuple, num_rows: int, read: Callable, encode: Callable) -> CachedRows:
        digest = hashlib.blake2b("".join(map(repr, (*settings, *names))).encode(), digest_size=16).hexdigest()
        folder = (config.cache_dir or config.output_dir / "cache") / f"{kind}-{digest}"
        return encode_rows(folder, num_rows, read, encode, dtype, config, accelerator)

    latents = [
        cache_rows(
            "latents",
            (inputs.resolution, flip, pictures_digest),
            len(data),
            functools.partial(inputs.picture, flip=flip),
            lambda batch: encoders.encode_pictures(batch["pixel_values"]),
        )
        for flip in ((False, True) if config.random_flip else (False,))
    ]
    # Encode each caption once, because many rows share one. `large_string` has no limit of 2 GiB of text.
    encoded = data.captions.cast(pa.large_string()).combine_chunks().dictionary_encode()
    captions = pa.concat_arrays([pa.array([""], pa.large_string()), encoded.dictionary])
    embeddings = cache_rows(
        "captions",
        tuple(captions.to_pylist()),
        len(captions),
        lambda row: {"input_ids": encoders.tokenize(captions[row].as_py())},
        lambda batch: encoders.encode_captions(batch["input_ids"]),
    )
    return LatentInputs(inputs, latents, embeddings, encoded.indices.to_numpy() + 1)


def encode_rows(
    folder: Path,
    num_rows: int,
    read: Callable[[int], dict[str, torch.Tensor]],
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
    firsts = range(0, num_rows, ROWS_PER_SHARD)
    rows_of = {folder / f"{n:05d}.safetensors": range(num_rows)[i : i + ROWS_PER_SHARD] for n, i in enumerate(firsts)}
    mine = list(rows_of)[accelerator.process_index :: accelerator.num_processes]
    missing = [path for path in mine if not path.exists()]
    for path in tqdm(missing, desc=folder.name[:16], unit="file", disable=not accelerator.is_main_process):
        lock = path.with_suffix(".lock")
        # Another run with the same cache may be writing this file, so check again after waiting for the lock.
        with FileLock(lock):
            if not path.exists():
                batches = torch.utils.data.DataLoader(
                    rows_of[path],
                    config.train_batch_size,
                    collate_fn=lambda rows: default_collate([read(row) for row in rows]),
                    num_workers=config.dataloader_num_workers,
                    generator=torch.Generator(),
                )
                encoded = [encode(batch) for batch in read_batches(batches)]
                tensors = {name: torch.cat([part[name].to("cpu", dtype) for part in encoded]) for name in encoded[0]}
                with disk_errors_explained(f"{folder.name[:16]}/{path.name}", folder), replacing(path) as unfinished:
                    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished)
            lock.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    return CachedRows(list(rows_of))


def _digest_pictures(data: TrainingData) -> str:
    """A hash of all pictures: of path, size and time of change for files, and of the bytes for others."""
    digest = hashlib.blake2b(digest_size=16)
    for path, content in zip(data.paths, data.contents, strict=True):
        if content.is_valid:
            digest.update(hashlib.blake2b(content.as_buffer(), digest_size=16).digest())
        else:
            status = os.stat(path := path.as_py())
            digest.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


# ---- Samples --------------------------------------------------------------------------------------------------------


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
    `box` is left, top, right and bottom, as fractions from 0 to 1 of the whole picture, whose width and height are
    `picture_size`. Training uses the square in its middle.
    """
    weights = 1 + (weight - 1) * _covered(box, picture_size, side)
    return (weights / weights.mean()).astype(np.float32)


def face_sides(box: np.ndarray, picture_size: np.ndarray, side: int) -> np.ndarray:
    """
    How much of each of `side` × `side` latents is on the person's left side of the face, which is the right half of
    its box, minus how much is on the person's right side. The arguments are those of `face_weights`.
    """
    left, top, right, bottom = box
    middle = (left + right) / 2
    halves = [np.array(half) for half in ((middle, top, right, bottom), (left, top, middle, bottom))]
    on_left, on_right = (_covered(half, picture_size, side) for half in halves)
    return (on_left - on_right).astype(np.float32)


def _covered(box: np.ndarray, picture_size: np.ndarray, side: int) -> np.ndarray:
    """The fraction of each of `side` × `side` latents that the box covers."""
    shorter_side = picture_size.min()
    cut = (picture_size - shorter_side) / 2
    corners = (box.reshape(2, 2) * picture_size - cut) / shorter_side * side
    cells = np.arange(side)[:, None]
    columns, rows = np.clip(np.minimum(corners[1], cells + 1) - np.maximum(corners[0], cells), 0, 1).T
    return np.outer(rows, columns)


@dataclasses.dataclass(eq=False)
class TrainingSamples(torch.utils.data.Dataset):
    """
    The endless sequence of training samples. Sample n is a function of only the seed and n, and with stratified
    timesteps also of `samples_per_step`.
    """

    inputs: PixelInputs | LatentInputs
    num_train_timesteps: int
    config: TrainConfig
    samples_per_step: int = 1

    def __post_init__(self):
        self.timestep_ends = np.cumsum(timestep_probabilities(self.num_train_timesteps, self.config))
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
            place = (data.face_boxes[index], data.picture_size(index), inputs.latents_shape[-1])
            if config.face_loss_weight != 1:
                weights = face_weights(*place, config.face_loss_weight)
                sample["loss_weights"] = torch.from_numpy(np.flip(weights, 1).copy() if flip else weights)
            if config.au_side_attention_weight:
                sides = face_sides(*place)
                sample["face_sides"] = torch.from_numpy(-np.flip(sides, 1) if flip else sides)
        if config.au_feedback_meter is not None:
            sample["aus_are_dropped"] = torch.tensor(bool(drop_aus))
            # AU feedback commands the AUs of another row; of the same row group with `--streaming`.
            rng = np.random.default_rng((config.seed, 3, number))
            other = (index + int(rng.integers(1, max(2, len(data))))) % len(data)
            flip, drop_aus = rng.random(2) < (0.5 * config.random_flip, config.au_drop_prob)
            sample["commanded_aus"] = self._aus(data, other, flip, drop_aus, rng)
            sample["feedback_seed"] = torch.tensor(int(rng.integers(2**63)))
            one, intensity = rng.integers(len(data.au_names)), rng.uniform(0, 5)
            if rng.random() < config.au_feedback_single_prob:
                sample["commanded_aus"] = intensity * torch.eye(len(data.au_names))[one]
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
