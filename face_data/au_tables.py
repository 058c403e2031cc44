# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
AU intensities from the tables of other tools: LibreFace, py-feat 2, OpenFace 2, ARKit and MediaPipe blendshapes, the
published `affectnet_metadata.csv`, and tables in this project's own columns. Files are read row by row.

Example:
    >>> blendshapes_to_aus({"mouthSmileLeft": 0.8, "mouthSmileRight": 0.6})[6]
    np.float32(3.5)
    >>> detect_tool([" frame", *(f" AU{number:02}_r" for number in (1, 2, 4, 5, 6, 9, 12, 15, 17, 20, 25, 26))])
    'openface'
"""

import csv
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from action_units import AU_NAMES, parse_aus


AU_TABLE_TOOLS = ("openface", "libreface", "pyfeat", "arkit", "fineface", "affectnet")
MAX_AU = 5.0

_NUMBERS = [int(name.removeprefix("AU")) for name in AU_NAMES]


@dataclass(frozen=True)
class _Scale:
    """A tool's AU columns in the order of `AU_NAMES`, in lower case, what turns a value into an intensity, and how
    far a value may leave [0, 5] and still be an estimate that overshot."""

    columns: tuple[str, ...]
    factor: float
    overshoot: float


def _scale(pattern: str, factor: float = 1.0, overshoot: float = 0.0) -> _Scale:
    return _Scale(tuple(pattern.format(number) for number in _NUMBERS), factor, overshoot)


_SCALES = {
    # Regressors, which older versions did not clamp.
    "openface": _scale("au{:02}_r", overshoot=1.0),
    # Sigmoid × 5.
    "libreface": _scale("au_{}_intensity", overshoot=0.01),
    # Probabilities; times 5 is the usual convention and no calibration.
    "pyfeat": _scale("au{:02}", 5.0, 0.05),
    "fineface": _scale("au{}"),
    # The AU columns of the original FineFace's data, LibreFace divided by 5.
    "affectnet": _scale("au{}_rec", 5.0, 0.05),
}

# Where a picture's name is looked for, the likeliest first; a frame number names a picture of a video.
_NAME_COLUMNS = (
    *("file_name", "filename", "image", "image_path", "imagename", "subdirectory_filepath", "input", "file", "path"),
    *("frame", "frame_idx"),
)
_SHAPES_OF_AUS = {
    "AU1": ("browinnerup",),
    "AU2": ("browouterupleft", "browouterupright"),
    "AU4": ("browdownleft", "browdownright"),
    "AU5": ("eyewideleft", "eyewideright"),
    "AU6": ("cheeksquintleft", "cheeksquintright"),
    "AU9": ("nosesneerleft", "nosesneerright"),
    "AU12": ("mouthsmileleft", "mouthsmileright"),
    "AU15": ("mouthfrownleft", "mouthfrownright"),
    "AU17": ("mouthshruglower",),
    "AU20": ("mouthstretchleft", "mouthstretchright"),
    "AU26": ("jawopen",),
}
_LIP_SHAPES = (*("mouthclose", "mouthlowerdownleft", "mouthlowerdownright", "mouthupperupleft", "mouthupperupright"),)
_USED_SHAPES = (*(shape for shapes in _SHAPES_OF_AUS.values() for shape in shapes), *_LIP_SHAPES)
# Those of the 52 that no AU of the 12 needs.
_OTHER_SHAPES = (
    *("eyeblinkleft", "eyelookdownleft", "eyelookinleft", "eyelookoutleft", "eyelookupleft", "eyesquintleft"),
    *("eyeblinkright", "eyelookdownright", "eyelookinright", "eyelookoutright", "eyelookupright", "eyesquintright"),
    *("jawforward", "jawleft", "jawright", "mouthfunnel", "mouthpucker", "mouthleft", "mouthright"),
    *("mouthdimpleleft", "mouthdimpleright", "mouthrolllower", "mouthrollupper", "mouthshrugupper"),
    *("mouthpressleft", "mouthpressright", "cheekpuff", "tongueout", "neutral"),
)


@dataclass(frozen=True)
class AURow:
    """
    One face of a table.

    Args:
        name (`str`):
            File name of the picture, or number of the frame; "" if the table has neither.
        aus (`numpy.ndarray` of shape `(12,)`):
            float32 FACS intensities in [0, 5], in the order of `AU_NAMES`. NaN without a face.
        face_found (`bool`):
            False where the tool reports no face.
        line (`int`):
            Of the file, from 1, header included; of a Parquet file or a JSON list the number of the row, from 1.
        record (`dict`):
            The row as it was read, for its other columns.
    """

    name: str
    aus: np.ndarray
    face_found: bool
    line: int
    record: dict = field(default_factory=dict, repr=False, compare=False)


def read_au_table(
    path: str | os.PathLike,
    tool: str | None = None,
    image_column: str | None = None,
    on_error: Callable[[ValueError], None] | None = None,
) -> Iterator[AURow]:
    """
    Read the AUs of a table row by row.

    Args:
        path (`str` or `os.PathLike`):
            A .csv, .tsv, .jsonl, .json (one object or a list of them, read as a whole) or .parquet file.
        tool (`str`, *optional*):
            One of `AU_TABLE_TOOLS`; by default the columns tell.

            - `"openface"`: OpenFace 2, `AU01_r`, intensities from 0 to 5.
            - `"libreface"`: LibreFace, `au_1_intensity`, from 0 to 5.
            - `"pyfeat"`: py-feat, `AU01`, probabilities from 0 to 1, times 5.
            - `"arkit"`: ARKit or MediaPipe blendshapes, see `blendshapes_to_aus`.
            - `"fineface"`: `AU1` … `AU26`, from 0 to 5; or a column `aus` in any form that `parse_aus` reads.
            - `"affectnet"`: the published `affectnet_metadata.csv`, `AU1_rec`, from 0 to 1, times 5.
        image_column (`str`, *optional*):
            Column of the name; by default the first usual one that the table has, such as `file_name` or `frame`.
        on_error (`Callable`, *optional*):
            Is called with the error of a row whose AUs cannot be read, and the row left out; by default it is raised.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a file type, column or value that cannot be read; the message has path, line and column.
    """
    if tool is not None and tool not in AU_TABLE_TOOLS:
        raise ValueError(f"`tool` is {tool!r}. The tools are {', '.join(AU_TABLE_TOOLS)}.")
    path = Path(path)
    columns = read_aus = name_column = None
    for line, record in read_records(path):
        if columns is None or set(record) != columns:
            columns = set(record)
            try:
                read_aus = _READERS[tool or detect_tool(columns)](list(record))
                name_column = _find_name_column(list(record), image_column)
            except ValueError as error:
                raise ValueError(f"{path}, line {line}: {error}") from error
        try:
            aus = read_aus(record)
        except ValueError as error:
            placed = ValueError(f"{path}, line {line}: {error}")
            if on_error is None:
                raise placed from error
            on_error(placed)
            continue
        face_found = not np.isnan(aus).any() and _reports_face(record)
        if not face_found:
            aus = np.full(len(AU_NAMES), np.nan, np.float32)
        yield AURow(_name(record[name_column]) if name_column else "", aus, face_found, line, record)


def detect_tool(columns: Iterable[str]) -> str:
    """
    The tool of `AU_TABLE_TOOLS` whose columns these are. Letter case and spaces around a name do not matter.

    Raises:
        ValueError: if no tool's AU columns are complete, or those of several are.
    """
    present = {column.strip().lower() for column in columns}
    needed = {tool: set(scale.columns) for tool, scale in _SCALES.items()}
    # AU12 alone does not tell py-feat from FineFace: their difference is AU01 or AU1.
    found = [tool for tool in AU_TABLE_TOOLS if tool in needed and needed[tool] <= present]
    if "aus" in present and "fineface" not in found:
        found.append("fineface")
    if set(_USED_SHAPES) <= set(map(_shape_key, present)):
        found.append("arkit")
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"The columns are those of {' and '.join(found)}. Say which to read.")
    nearest = max(needed, key=lambda tool: len(needed[tool] & present))
    missing = [column for column in _SCALES[nearest].columns if column not in present]
    examples = ", ".join(f"{tool} {scale.columns[0]!r}" for tool, scale in _SCALES.items())
    hint = f" For {nearest}, the columns {', '.join(missing)} are missing." if len(missing) < len(AU_NAMES) else ""
    raise ValueError(
        f"The columns are those of no known tool: {', '.join(map(str, list(columns)[:30]))}.{hint} All {len(AU_NAMES)}"
        f" AUs are needed, as {examples} and so on (in any letter case), as blendshapes, or as `aus`."
    )


def blendshapes_to_aus(blendshapes: Mapping[str, float]) -> np.ndarray:
    """
    The AUs of ARKit or MediaPipe blendshapes. Eleven AUs have blendshapes of their own: the mean of left and right,
    times 5. Lips part (AU25) as far as the jaw opens against closed lips, or as a lip is drawn from the other:
    max(jawOpen · (1 − mouthClose), mouthLowerDown, mouthUpperUp). The factor 5 is a convention and no calibration.

    Args:
        blendshapes (`Mapping[str, float]`):
            Values in [0, 1] by name, `browDownLeft`, `BrowDownLeft` or `browDown_L`; names that are left out are 0.

    Returns:
        `numpy.ndarray` of shape `(12,)`, float32, in [0, 5], in the order of `AU_NAMES`.

    Raises:
        ValueError: for a name that is none of the 52, or a value that is not in [0, 1].
    """
    values = {_shape_key(name): value for name, value in blendshapes.items()}
    unknown = [name for name in blendshapes if _shape_key(name) not in _USED_SHAPES + _OTHER_SHAPES]
    if unknown:
        raise ValueError(f"There is no blendshape {', '.join(map(repr, unknown))}; ARKit has 52, such as 'jawOpen'.")
    return _aus_of_shapes({shape: _number(values.get(shape, 0.0), shape) for shape in _USED_SHAPES})


def read_records(path: str | os.PathLike) -> Iterator[tuple[int, dict]]:
    """
    The rows of a table as line number and dict, as `read_au_table` counts and reads them. Column names are stripped,
    and objects within a JSON object give their entries to it.
    """
    path = Path(path)
    reader = _RECORD_READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: the file type is {path.suffix!r}, but has to be {', '.join(_RECORD_READERS)}.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no table {str(path)!r}.")
    for line, record in reader(path):
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {line}: a row has to be an object, but is a {type(record).__name__}.")
        yield line, record


def _read_separated(path: Path, delimiter: str) -> Iterator[tuple[int, dict]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, delimiter=delimiter, skipinitialspace=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            if len(set(header)) < len(header):
                twice = next(name for name in header if header.count(name) > 1)
                raise ValueError(f"{path}: the column {twice!r} is there twice.")
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise ValueError(
                        f"{path}, line {reader.line_num}: {len(cells)} cells, but the header has {len(header)}."
                    )
                yield reader.line_num, dict(zip(header, map(str.strip, cells), strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from error


def _read_json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    with path.open("rb") as file:
        for line, text in enumerate(file, 1):
            if text.strip():
                yield line, _flat(_parse_json(text, f"{path}, line {line}"))


def _read_json(path: Path) -> Iterator[tuple[int, dict]]:
    value = _parse_json(path.read_bytes(), str(path))
    for line, record in enumerate(value if isinstance(value, list) else [value], 1):
        yield line, _flat(record)


def _read_parquet(path: Path) -> Iterator[tuple[int, dict]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path}: Parquet files need pyarrow: pip install pyarrow") from error

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            line = 0
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    line += 1
                    yield line, _flat(record)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: {error}") from error


_RECORD_READERS = {
    ".csv": lambda path: _read_separated(path, ","),
    ".tsv": lambda path: _read_separated(path, "\t"),
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def _parse_json(text: bytes, label: str):
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{label}: this is no JSON: {error}") from error


def _flat(record):
    """LibreFace and MediaPipe group their values in objects; `aus` is one value."""
    if not isinstance(record, dict):
        return record
    flat = {}
    for name, value in record.items():
        if isinstance(value, dict) and name.strip().lower() != "aus":
            flat |= {inner.strip(): item for inner, item in value.items()}
        else:
            flat[name.strip()] = value
    return flat


def _find_columns(columns: list[str], wanted: Iterable[str], key: Callable[[str], str] = str.lower) -> list[str]:
    by_key = {key(column): column for column in columns}
    missing = [name for name in wanted if name not in by_key]
    if missing:
        raise ValueError(f"There is no column {', '.join(missing)}. The columns are {', '.join(columns[:30])}.")
    return [by_key[name] for name in wanted]


def _scale_reader(tool: str) -> Callable[[list[str]], Callable[[dict], np.ndarray]]:
    scale = _SCALES[tool]

    def prepare(columns: list[str]) -> Callable[[dict], np.ndarray]:
        names = _find_columns(columns, scale.columns)

        def read(record: dict) -> np.ndarray:
            values = [_number(record[name], name) for name in names]
            _check_gaps(values, names)
            for name, value in zip(names, values, strict=True):
                if not math.isnan(value) and not -scale.overshoot <= value * scale.factor <= MAX_AU + scale.overshoot:
                    raise ValueError(
                        f"column {name!r} is {value:g}. {tool} measures from 0 to {MAX_AU / scale.factor:g}."
                    )
            return np.clip(np.float32(values) * np.float32(scale.factor), 0, MAX_AU)

        return read

    return prepare


def _fineface_reader(columns: list[str]) -> Callable[[dict], np.ndarray]:
    by_key = {column.lower(): column for column in columns}
    if "aus" not in by_key or set(_SCALES["fineface"].columns) <= set(by_key):
        return _scale_reader("fineface")(columns)

    def read(record: dict) -> np.ndarray:
        value = record[by_key["aus"]]
        if value is None:
            return np.full(len(AU_NAMES), np.nan, np.float32)
        rows = parse_aus(value, by_key["aus"]).numpy()
        if len(rows) != 1 or not ((rows >= 0) & (rows <= MAX_AU)).all():
            raise ValueError(f"column {by_key['aus']!r} is {value!r}, but has to be one expression from 0 to 5.")
        return rows[0]

    return read


def _arkit_reader(columns: list[str]) -> Callable[[dict], np.ndarray]:
    names = _find_columns(columns, _USED_SHAPES, _shape_key)

    def read(record: dict) -> np.ndarray:
        values = [_number(record[name], name) for name in names]
        _check_gaps(values, names)
        if math.isnan(values[0]):
            return np.full(len(AU_NAMES), np.nan, np.float32)
        return _aus_of_shapes(dict(zip(_USED_SHAPES, values, strict=True)))

    return read


_READERS = {tool: _scale_reader(tool) for tool in _SCALES} | {"fineface": _fineface_reader, "arkit": _arkit_reader}


def _aus_of_shapes(values: dict[str, float]) -> np.ndarray:
    for shape, value in values.items():
        # Calibrated trackers overshoot a little.
        if not -0.1 <= value <= 1.25:
            raise ValueError(f"the blendshape {shape!r} is {value:g}. Blendshapes go from 0 to 1.")
    values = {shape: min(max(value, 0.0), 1.0) for shape, value in values.items()}
    aus = {name: sum(values[shape] for shape in shapes) / len(shapes) for name, shapes in _SHAPES_OF_AUS.items()}
    lower = (values["mouthlowerdownleft"] + values["mouthlowerdownright"]) / 2
    upper = (values["mouthupperupleft"] + values["mouthupperupright"]) / 2
    aus["AU25"] = max(values["jawopen"] * (1 - values["mouthclose"]), lower, upper)
    return np.float32([MAX_AU * aus[name] for name in AU_NAMES])


def _shape_key(name: str) -> str:
    key = name.strip().lower()
    side = {"_l": "left", "_r": "right"}.get(key[-2:])
    return (key[:-2] + side if side else key).replace("_", "")


def _find_name_column(columns: list[str], image_column: str | None) -> str | None:
    if image_column is not None:
        return _find_columns(columns, [image_column.strip().lower()])[0]
    by_key = {column.lower(): column for column in columns}
    return next((by_key[name] for name in _NAME_COLUMNS if name in by_key), None)


def _name(value) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None else str(value)


def _reports_face(record: dict) -> bool:
    for column, value in record.items():
        key = column.lower()
        text = "" if value is None else str(value).strip().lower()
        if key in ("success", "hasface") and text in ("", "0", "0.0", "false", "no", "nan"):
            return False
        if key == "confidence" and _number(value, column) == 0:
            return False
    return True


def _check_gaps(values: list[float], names: list[str]) -> None:
    missing = [name for name, value in zip(names, values, strict=True) if math.isnan(value)]
    if 0 < len(missing) < len(values):
        raise ValueError(
            f"column {missing[0]!r} is empty, while other AUs have values. A row has all of them or none."
        )


def _number(value, column: str) -> float:
    """NaN for an empty cell."""
    if value is None or (isinstance(value, str) and not value):
        return math.nan
    try:
        number = float(value) if not isinstance(value, bool) else None
    except (TypeError, ValueError):
        number = None
    if number is None or math.isinf(number):
        raise ValueError(f"column {column!r} is {value!r}, but has to be a number.")
    return number
