# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
AU intensities from the tables of other tools: LibreFace, py-feat 2, OpenFace 2, ARKit and MediaPipe blendshapes, the
published `affectnet_metadata.csv`, and tables in this project's own columns. Files are read row by row.

`au_names`, the list of an adapter, decides which AUs are read. Blendshapes and this project's own columns have sides.
A measurement of the whole face sets both sides, and two sides give their mean if the adapter moves both alike. Eyes
that are closed for long (AU43) or briefly (AU45) look the same in a picture, so each AU can replace the other.

Example:
    >>> blendshapes_to_aus({"mouthSmileLeft": 0.8, "mouthSmileRight": 0.6})[6]
    np.float32(3.5)
    >>> detect_tool([" frame", *(f" AU{number:02}_r" for number in (1, 2, 4, 5, 6, 9, 12, 15, 17, 20, 25, 26))])
    'openface'
"""

import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from action_units import ACTION_UNITS, AU_NAMES, GRADES, au_columns, parse_aus, whole_au
from face_data.table_files import read_records


AU_TABLE_TOOLS = ("openface", "libreface", "pyfeat", "arkit", "mediapipe", "fineface", "affectnet")
# MediaPipe names its blendshapes as ARKit does.
_ALIASES = {"mediapipe": "arkit"}
MAX_AU = 5.0

# A table with fewer rows may contain only faint expressions, so it says nothing about the scale.
_MIN_ROWS_OF_A_SCALE = 10
# Texts that C libraries, spreadsheets and pandas write for a missing number.
_NO_NUMBER = re.compile(r"[+-]?(nan(\(\w*\))?|1\.#(ind|[qs]nan)\d*)|#?n/?a|null|none|", re.IGNORECASE)
_NO = ("", "0", "0.0", "false", "no", "nan")

_logger = logging.getLogger(__name__)
_PAPERS_NUMBERS = {int(name.removeprefix("AU")) for name in AU_NAMES}


@dataclass(frozen=True)
class _Scale:
    """
    The format of a tool's AUs. `column` is the name of an AU's column in lower case, `factor` turns a value into an
    intensity, `overshoot` is the distance from [0, 5] that an intensity may have before clipping, `presence` is the
    column of a presence (0 or 1), and `has_sides` says whether columns may end with l or r for a side.
    """

    column: str
    factor: float = 1.0
    overshoot: float = 0.0
    presence: str | None = None
    has_sides: bool = False


_SCALES = {
    # OpenFace uses regressors, and older versions did not clamp them.
    "openface": _Scale("au{:02}_r", overshoot=1.0, presence="au{:02}_c"),
    # LibreFace multiplies a sigmoid by 5.
    "libreface": _Scale("au_{}_intensity", overshoot=0.01, presence="au_{}"),
    # py-feat gives probabilities. The factor 5 is the usual convention, not a calibration.
    "pyfeat": _Scale("au{:02}", 5.0, 0.05),
    "fineface": _Scale("au{}", has_sides=True),
    # The data of the paper's authors have LibreFace's intensities divided by 5.
    "affectnet": _Scale("au{}_rec", 5.0, 0.05),
}
_COLUMN_PATTERNS = {
    "openface": r"au(\d\d)_r",
    "libreface": r"au_(\d{1,2})_intensity",
    "pyfeat": r"au(\d\d)",
    "fineface": r"au([1-9]\d?)[lr]?",
    "affectnet": r"au(\d{1,2})_rec",
}
_SAME_IN_A_PICTURE = {43: 45, 45: 43}

# Columns that may hold a picture's name, the most likely first. A frame number names a picture of a video.
_NAME_COLUMNS = (
    *("file_name", "filename", "image", "image_path", "imagename", "subdirectory_filepath", "input", "file", "path"),
    *("frame", "frame_idx"),
)
# Columns that hold the number of a face in its picture.
_FACE_COLUMNS = ("face_id", "faceid", "face_idx", "face", "person_id")
_SIGNS_OF_A_FACE = ("success", "hasface", "confidence")
# Columns that only py-feat writes. They decide if all AUs have two digits, which FineFace writes alike.
_PYFEAT_SIGNS = ("facescore", "facerectx")
# An AU is the mean of these blendshapes; a star stands for left and right.
_SHAPES_OF_AUS = {
    "AU1": ("browinnerup",),
    "AU2": ("browouterup*",),
    "AU4": ("browdown*",),
    "AU5": ("eyewide*",),
    "AU6": ("cheeksquint*",),
    "AU7": ("eyesquint*",),
    "AU9": ("nosesneer*",),
    "AU10": ("mouthupperup*",),
    "AU12": ("mouthsmile*",),
    "AU14": ("mouthdimple*",),
    "AU15": ("mouthfrown*",),
    "AU16": ("mouthlowerdown*",),
    "AU17": ("mouthshruglower",),
    "AU18": ("mouthpucker",),
    "AU19": ("tongueout",),
    "AU20": ("mouthstretch*",),
    "AU22": ("mouthfunnel",),
    "AU24": ("mouthpress*",),
    "AU26": ("jawopen",),
    "AU28": ("mouthrolllower", "mouthrollupper"),
    "AU29": ("jawforward",),
    "AU34": ("cheekpuff",),
    "AU43": ("eyeblink*",),
    "AU45": ("eyeblink*",),
    "AU61": ("eyelookoutleft", "eyelookinright"),
    "AU62": ("eyelookinleft", "eyelookoutright"),
    "AU63": ("eyelookup*",),
    "AU64": ("eyelookdown*",),
}
_SHAPES_OF_PARTED_LIPS = (
    *("jawopen", "mouthclose", "mouthlowerdownleft", "mouthlowerdownright", "mouthupperupleft", "mouthupperupright"),
)


def _shapes_of(name: str) -> tuple[str, ...]:
    """The blendshapes of an AU or of one side of it; () if there are none."""
    if name == "AU25":
        return _SHAPES_OF_PARTED_LIPS
    sides = {"L": ("left",), "R": ("right",)}.get(name[-1], ("left", "right"))
    patterns = _SHAPES_OF_AUS.get(whole_au(name), ())
    return tuple(dict.fromkeys(pattern.replace("*", side) for pattern in patterns for side in sides))


def _used_shapes(au_names: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(shape for name in au_names for shape in _shapes_of(name)))


_PAPERS_SHAPES = _used_shapes(AU_NAMES)
_ALL_SHAPES = {
    *_used_shapes((*_SHAPES_OF_AUS, "AU25")),
    *("jawleft", "jawright", "mouthleft", "mouthright", "mouthshrugupper", "neutral"),
}


@dataclass(frozen=True)
class AURow:
    """
    One face of a table.

    Args:
        name (`str`):
            File name of the picture, or number of the frame; "" if the table has neither.
        aus (`numpy.ndarray` of shape `(n,)`):
            float32 FACS intensities in [0, 5], in the order of `au_names`. NaN without a face.
        face_found (`bool`):
            False where the tool reports no face.
        line (`int`):
            Line in the file, from 1, header included; for a Parquet file or a JSON list, number of the row, from 1.
        record (`dict`):
            The row as it was read, with all columns.
        face (`int`, *optional*):
            Number of the face in its picture or video, if the tool gives one.
        confidence (`float`):
            The tool's confidence in the face, or 0 if the table has none.
    """

    name: str
    aus: np.ndarray
    face_found: bool
    line: int
    record: dict = field(default_factory=dict, repr=False, compare=False)
    face: int | None = None
    confidence: float = 0.0


def read_au_table(
    path: str | os.PathLike,
    tool: str | None = None,
    image_column: str | None = None,
    on_error: Callable[[ValueError], None] | None = None,
    say: Callable[[str], None] = _logger.warning,
    au_names: Sequence[str] = AU_NAMES,
    unmeasured: float = 0.0,
) -> Iterator[AURow]:
    """
    Read the AUs of a table row by row.

    Args:
        path (`str` or `os.PathLike`):
            A .csv, .tsv, .jsonl, .json or .parquet file, see `table_files.read_records`.
        tool (`str`, *optional*):
            One of `AU_TABLE_TOOLS`; by default `detect_tool` finds it from the columns.

            - `"openface"`: OpenFace 2, `AU01_r`, intensities from 0 to 5. An AU that has only a presence, `AU28_c`,
              becomes 3 if it is present, because FACS notation reads an AU without a grade as C.
            - `"libreface"`: LibreFace, `au_1_intensity`, from 0 to 5; a presence such as `au_7` becomes 3 too.
            - `"pyfeat"`: py-feat, `AU01`, probabilities from 0 to 1, times 5.
            - `"arkit"`, `"mediapipe"`: blendshapes as columns, or as MediaPipe's own results have them; see
              `blendshapes_to_aus`.
            - `"fineface"`: `AU1`, `AU12L`, …, from 0 to 5; or a column `aus` in any form that `parse_aus` reads.
            - `"affectnet"`: the published `affectnet_metadata.csv`, `AU1_rec`, from 0 to 1, times 5.
        image_column (`str`, *optional*):
            Column of the picture's name; by default the first usual one in the table, such as `file_name` or `frame`.
        on_error (`Callable`, *optional*):
            Called with the error of a row whose AUs cannot be read; the row is then left out. By default the error is
            raised.
        say (`Callable`, *optional*):
            Called with a sentence about each kind of value that was guessed, left out or taken as 0. By default the
            sentence is logged.
        au_names (`Sequence[str]`, defaults to `AU_NAMES`):
            The AUs to read.
        unmeasured (`float`, defaults to 0.0):
            Value of AUs that the table does not have. NaN distinguishes them from a face at rest.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a file type, column or value that cannot be read; the message has path, line and column.
    """
    if tool is not None and tool not in AU_TABLE_TOOLS:
        raise ValueError(f"`tool` is {tool!r}. The tools are {', '.join(AU_TABLE_TOOLS)}.")
    au_columns(au_names)
    path = Path(path)
    counts, largest, num_faces, said = Counter(), 0.0, 0, set()
    columns = used_tool = read_aus = name_column = None
    face_columns, signs, confidences = [], [], []
    for line, whole in read_records(path, say):
        for record in _split_faces(whole):
            if columns is None or record.keys() != columns:
                columns = record.keys()
                try:
                    used_tool = _ALIASES.get(tool, tool) or detect_tool(columns)
                    read_aus = _READERS[used_tool](list(columns), counts, tuple(au_names))
                    name_column = find_name_column(list(columns), image_column)
                    face_columns = [column for column in columns if column.lower() in _FACE_COLUMNS]
                    confidences = [column for column in columns if column.lower() in ("confidence", "facescore")]
                    signs = [column for column in columns if column.lower() in _SIGNS_OF_A_FACE]
                except ValueError as error:
                    raise ValueError(f"{path}, line {line}: {error}") from error
                if tool is None and used_tool != "arkit" and "arkit" in _tools_of(columns) and used_tool not in said:
                    said.add(used_tool)
                    say(
                        f"{path} has AUs of {used_tool} and blendshapes (arkit), which differ. The AUs are read; name"
                        " the tool to read the blendshapes."
                    )
            try:
                face_found = _reports_face(record, signs)
                aus = read_aus(record) if face_found else None
            except ValueError as error:
                placed = ValueError(f"{path}, line {line}: {error}")
                if on_error is None:
                    raise placed from error
                on_error(placed)
                continue
            if aus is not None and unmeasured != 0:
                aus[[index for index, name in enumerate(au_names) if counts[name]]] = unmeasured
            if aus is None or np.isnan(aus).all():
                face_found, aus = False, np.full(len(au_names), np.nan, np.float32)
            else:
                num_faces += 1
                largest = max(largest, float(np.nanmax(aus)))
            name = _name(record[name_column]) if name_column else ""
            face, confidence = _face(record, face_columns), _confidence(record, confidences)
            yield AURow(name, aus, face_found, line, record, face, confidence)
    for sentence in _notes(counts, used_tool, largest, num_faces, au_names, unmeasured):
        say(f"{path}: {sentence}")


def _notes(
    counts: Counter,
    tool: str | None,
    largest: float,
    num_faces: int,
    au_names: Sequence[str],
    unmeasured: float,
) -> Iterator[str]:
    """Sentences about a table that was read to its end."""
    missing = [name for name in au_names if counts[name]]
    if missing:
        taken = "taken as 0" if unmeasured == 0 else "left out"
        what = "blendshape or column" if tool == "arkit" else "column"
        yield f"there is no {what} for {', '.join(missing)} (in {max(map(counts.get, missing)):,} rows): {taken}."
    present = [name for name in au_names if counts[name, "presence"]]
    if present:
        yield f"{tool} measures only the presence of {', '.join(present)}: present is taken as {GRADES['C']}."
    if counts["decimal commas"]:
        yield f"{counts['decimal commas']:,} numbers have a decimal comma."
    if tool in _SCALES and _SCALES[tool].factor == 1 and num_faces >= _MIN_ROWS_OF_A_SCALE and 0 < largest <= 1:
        yield (
            f"the largest AU of {num_faces:,} faces is {largest:.3g}, but {tool} measures from 0 to {MAX_AU:g}. If"
            f" the values go from 0 to 1, they are five times too weak: multiply them by {MAX_AU:g}."
        )


def detect_tool(columns: Iterable[str]) -> str:
    """
    Find the tool of `AU_TABLE_TOOLS` that writes these columns. Letter case and spaces around a name do not matter. A
    tool with all of its columns has priority over a tool with some, and AUs have priority over blendshapes, because a
    table of py-feat 2 has both.

    Raises:
        ValueError: if no tool writes such columns, or the table has AUs of several tools.
    """
    columns = [str(column) for column in columns]
    found = _tools_of(columns)
    found = [tool for tool, is_complete in found.items() if is_complete] or list(found)
    if len(found) > 1 and "arkit" in found:
        found.remove("arkit")
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"The columns are those of {' and '.join(found)}. Name the tool to read.")
    examples = ", ".join(f"{tool} {scale.column.format(1)!r}" for tool, scale in _SCALES.items())
    hint = " There is one column: commas, semicolons, tabs and bars divide columns." if len(columns) == 1 else ""
    raise ValueError(
        f"The columns are those of no known tool: {', '.join(columns[:30])}.{hint} AUs are read as {examples} and so"
        " on (in any letter case), as blendshapes, or as `aus`."
    )


def _tools_of(columns: Iterable[str]) -> dict[str, bool]:
    """The tools that have columns in the table, and whether each has all of its columns."""
    present = {column.strip().lower() for column in columns}
    found = {}
    for tool, pattern in _COLUMN_PATTERNS.items():
        numbers = {int(match[1]) for match in (re.fullmatch(pattern, column) for column in present) if match}
        if numbers:
            found[tool] = numbers >= _PAPERS_NUMBERS
    # py-feat and FineFace both write AU12, but AU01 is py-feat's, and AU1 and columns of sides are FineFace's.
    own = {"pyfeat": r"au0\d", "fineface": r"au([1-9]|\d+[lr])"}
    own = {tool: any(re.fullmatch(pattern, column) for column in present) for tool, pattern in own.items()}
    if not any(own.values()):
        own["pyfeat"] = bool(present.intersection(_PYFEAT_SIGNS))
        own["fineface"] = not own["pyfeat"]
    for tool, is_own in own.items():
        if not is_own:
            found.pop(tool, None)
    if "aus" in present:
        found["fineface"] = True
    shapes = {_shape_key(column) for column in present}
    if shapes & (_ALL_SHAPES - {"neutral"}):
        found["arkit"] = shapes.issuperset(_PAPERS_SHAPES)
    return found


def find_measured_aus(path: str | os.PathLike, tool: str | None = None) -> tuple[str, tuple[str, ...]]:
    """
    The tool of a table and the AUs that its columns measure, by their numbers, each side by itself where the table
    tells both. Closed eyes are AU43, also where the tool calls them a blink (AU45).

    Args:
        path (`str` or `os.PathLike`), tool (`str`, *optional*):
            As `read_au_table` takes them. JSON is read to its end, because each row may have other columns.

    Returns:
        `tuple[str, tuple[str, ...]]`: one of `AU_TABLE_TOOLS`, and the AUs; () if a column `aus` tells them.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the table has no rows, or no columns of a tool.
    """
    path, columns = Path(path), {}
    for _, whole in read_records(path, lambda sentence: None):
        for record in _split_faces(whole):
            columns |= dict.fromkeys(record)
        if path.suffix.lower() not in (".json", ".jsonl"):
            break
    if not columns:
        raise ValueError(f"{path}: the table has no rows.")
    try:
        used_tool = _ALIASES.get(tool, tool) or detect_tool(columns)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if used_tool == "arkit":
        present = {_shape_key(column) for column in columns}
    else:
        present = {column.lower() for column in columns}

    def source(name: str):
        """The columns of an AU, or None if the table lacks them."""
        if used_tool != "arkit":
            return _find_sources(used_tool, present, [name])[0]
        shapes = _shapes_of(name)
        is_there = all if name != whole_au(name) else any
        return shapes if is_there(shape in present for shape in shapes) else None

    names = []
    for unit in ACTION_UNITS:
        sides = [f"{unit.name}{side}" for side in "LR"] if unit.sided else []
        left, right = map(source, sides) if sides else (None, None)
        if unit.name != "AU45" and None not in (left, right) and left != right:
            names += sides
        elif unit.name != "AU45" and source(unit.name):
            names.append(unit.name)
    if not names and "aus" not in present:
        raise ValueError(f"{path}: there is no AU that {used_tool} measures. The columns are {', '.join(columns)}.")
    return used_tool, tuple(names)


def blendshapes_to_aus(blendshapes: Mapping[str, float], au_names: Sequence[str] = AU_NAMES) -> np.ndarray:
    """
    Compute AUs from ARKit or MediaPipe blendshapes. Most AUs are 5 times their own blendshape, of one side or the mean
    of both. The lips part (AU25) if the jaw opens while the lips do not close, or if one lip moves away from the
    other: max(jawOpen · (1 − mouthClose), mouthLowerDown, mouthUpperUp). The factor 5 is a convention, not a
    calibration. Left and right are the person's own, unless the measured picture was mirrored.

    Args:
        blendshapes (`Mapping[str, float]`):
            Values in [0, 1] by name, `browDownLeft`, `BrowDownLeft` or `browDown_L`; names that are left out are 0.
        au_names (`Sequence[str]`, defaults to `AU_NAMES`):
            The AUs to compute. AUs without blendshapes are 0.

    Returns:
        `numpy.ndarray` of shape `(len(au_names),)`, float32, in [0, 5], in the order of `au_names`.

    Raises:
        ValueError: if a name is none of the 52 blendshapes, or a value is outside [0, 1].

    Example:
        >>> blendshapes_to_aus({"eyeBlinkLeft": 1}, ("AU43L", "AU43R")).tolist()
        [5.0, 0.0]
    """
    au_columns(au_names)
    values = {_shape_key(name): value for name, value in blendshapes.items()}
    unknown = [name for name in blendshapes if _shape_key(name) not in _ALL_SHAPES]
    if unknown:
        raise ValueError(f"There is no blendshape {', '.join(map(repr, unknown))}; ARKit has 52, such as 'jawOpen'.")
    shapes = _used_shapes(au_names)
    return _aus_of_shapes({shape: read_number(values.get(shape, 0.0), shape, Counter()) for shape in shapes}, au_names)


def _find_columns(columns: list[str], wanted: Iterable[str], key: Callable[[str], str] = str.lower) -> list[str]:
    by_key = {key(column): column for column in columns}
    missing = [name for name in wanted if name not in by_key]
    if missing:
        raise ValueError(f"There is no column {', '.join(missing)}. The columns are {', '.join(columns[:30])}.")
    return [by_key[name] for name in wanted]


_Reader = Callable[[dict], np.ndarray]


@dataclass(frozen=True)
class _Source:
    """
    The columns whose mean is an AU. `factor` turns a value into an intensity, and a value may lie outside [0, `high`]
    by `overshoot`.
    """

    columns: tuple[str, ...]
    factor: float
    high: float
    overshoot: float = 0.0
    is_presence: bool = False


def _sources_of(name: str, scale: _Scale) -> Iterator[_Source]:
    """The columns that may hold an AU, the best first."""
    whole, side = whole_au(name), name[len(whole_au(name)) :].lower()
    number = int(whole.removeprefix("AU"))
    numbers = [number, *([_SAME_IN_A_PICTURE[number]] if number in _SAME_IN_A_PICTURE else [])]
    limits = (scale.factor, MAX_AU / scale.factor, scale.overshoot / scale.factor)
    for column in map(scale.column.format, numbers):
        if side and scale.has_sides:
            yield _Source((column + side,), *limits)
        yield _Source((column,), *limits)
        if not side and scale.has_sides:
            yield _Source((f"{column}l", f"{column}r"), *limits)
    for number in numbers if scale.presence else ():
        yield _Source((scale.presence.format(number),), float(GRADES["C"]), 1.0, is_presence=True)


def _find_sources(tool: str, columns: Iterable[str], au_names: Sequence[str]) -> list[_Source | None]:
    columns = set(columns)
    return [
        next((source for source in _sources_of(name, _SCALES[tool]) if columns.issuperset(source.columns)), None)
        for name in au_names
    ]


def _scale_reader(tool: str) -> Callable[[list[str], Counter, tuple[str, ...]], _Reader]:
    def prepare(columns: list[str], counts: Counter, au_names: tuple[str, ...]) -> _Reader:
        by_key = {column.lower(): column for column in columns}
        sources = _find_sources(tool, by_key.keys(), au_names)
        of_columns = {by_key[column]: source for source in sources if source for column in source.columns}
        if not of_columns:
            wanted = [next(_sources_of(name, _SCALES[tool])).columns[0] for name in au_names]
            _require_any([], wanted, columns)
        # `weights` maps the values in the order of `of_columns` to AUs: the mean of an AU's columns, or 0 without any.
        weights = np.zeros((len(of_columns), len(au_names)), np.float32)
        positions = {column: position for position, column in enumerate(of_columns)}
        for index, source in enumerate(sources):
            for column in source.columns if source else ():
                weights[positions[by_key[column]], index] = source.factor / len(source.columns)
        seen = [name for name, source in zip(au_names, sources, strict=True) if source is None]
        seen += [(name, "presence") for name, source in zip(au_names, sources, strict=True) if _is_presence(source)]

        def read(record: dict) -> np.ndarray:
            values = [read_number(record[column], column, counts) for column in of_columns]
            _check_gaps(values, list(of_columns))
            for (column, source), value in zip(of_columns.items(), values, strict=True):
                if not math.isnan(value) and not -source.overshoot <= value <= source.high + source.overshoot:
                    raise ValueError(f"column {column!r} is {value:g}. {tool} measures from 0 to {source.high:g}.")
            counts.update(seen)
            return np.clip(np.float32(values) @ weights, 0, MAX_AU)

        return read

    return prepare


def _is_presence(source: _Source | None) -> bool:
    return source is not None and source.is_presence


def _fineface_reader(columns: list[str], counts: Counter, au_names: tuple[str, ...]) -> _Reader:
    by_key = {column.lower(): column for column in columns}
    if "aus" not in by_key or all(_find_sources("fineface", by_key.keys(), au_names)):
        return _scale_reader("fineface")(columns, counts, au_names)

    def read(record: dict) -> np.ndarray:
        value = record[by_key["aus"]]
        if value is None:
            return np.full(len(au_names), np.nan, np.float32)
        rows = parse_aus(value, by_key["aus"], au_names).numpy()
        if len(rows) != 1 or not ((rows >= 0) & (rows <= MAX_AU)).all():
            raise ValueError(f"column {by_key['aus']!r} is {value!r}, but has to be one expression from 0 to 5.")
        return rows[0]

    return read


def _arkit_reader(columns: list[str], counts: Counter, au_names: tuple[str, ...]) -> _Reader:
    by_key = {_shape_key(column): column for column in columns}
    shapes = _used_shapes(au_names)
    names = [by_key.get(shape) for shape in shapes]
    _require_any(names, shapes, columns)
    present = {shape for shape, name in zip(shapes, names, strict=True) if name is not None}
    missing = [au for au in au_names if not present.intersection(_shapes_of(au))]

    def read(record: dict) -> np.ndarray:
        values = [0.0 if name is None else read_number(record[name], name, counts) for name in names]
        _check_gaps(values, names)
        if any(map(math.isnan, values)):
            return np.full(len(au_names), np.nan, np.float32)
        counts.update(missing)
        return _aus_of_shapes(dict(zip(shapes, values, strict=True)), au_names)

    return read


_READERS = {tool: _scale_reader(tool) for tool in _SCALES} | {"fineface": _fineface_reader, "arkit": _arkit_reader}


def _require_any(names: list[str | None], wanted: Sequence[str], columns: list[str]) -> None:
    if not any(name is not None for name in names):
        examples = f"{', '.join(wanted[:2])}{', …' if len(wanted) > 2 else ''}"
        raise ValueError(f"There is no column {examples}. The columns are {', '.join(columns[:30])}.")


def _split_faces(record: dict) -> Iterator[dict]:
    """
    Split a record of raw MediaPipe results into one row for each face. A face is a list of categories with a name and
    a score, within `faceBlendshapes` and `categories` (JavaScript) or `face_blendshapes` (Python).
    """
    key = next((name for name in record if name.lower().replace("_", "") in ("faceblendshapes", "categories")), None)
    if key is None or not isinstance(record[key], list):
        yield record
        return
    others = {name: value for name, value in record.items() if name != key}
    faces = [record[key]] if key == "categories" else record[key]
    for number, face in enumerate(faces):
        categories = face.get("categories") if isinstance(face, dict) else face
        shapes = {}
        for category in categories if isinstance(categories, list) else ():
            if isinstance(category, dict):
                name = category.get("categoryName") or category.get("category_name")
                shapes[str(name)] = category.get("score")
        yield others | {"face_id": number} | shapes
    if not faces:
        yield others | dict.fromkeys(_ALL_SHAPES)


def _aus_of_shapes(values: dict[str, float], au_names: Sequence[str]) -> np.ndarray:
    for shape, value in values.items():
        # Calibrated trackers slightly exceed the range.
        if not -0.1 <= value <= 1.25:
            raise ValueError(f"the blendshape {shape!r} is {value:g}. Blendshapes go from 0 to 1.")
    values = {shape: min(max(value, 0.0), 1.0) for shape, value in values.items()}

    def activation(name: str) -> float:
        shapes = _shapes_of(name)
        if name == "AU25":
            lower = (values["mouthlowerdownleft"] + values["mouthlowerdownright"]) / 2
            upper = (values["mouthupperupleft"] + values["mouthupperupright"]) / 2
            return max(values["jawopen"] * (1 - values["mouthclose"]), lower, upper)
        return sum(values[shape] for shape in shapes) / max(len(shapes), 1)

    return np.float32([MAX_AU * activation(name) for name in au_names])


def _shape_key(name: str) -> str:
    key = name.strip().lower()
    side = {"_l": "left", "_r": "right"}.get(key[-2:])
    return (key[:-2] + side if side else key).replace("_", "")


def find_name_column(columns: list[str], image_column: str | None) -> str | None:
    if image_column is not None:
        return _find_columns(columns, [image_column.strip().lower()])[0]
    by_key = {column.lower(): column for column in columns}
    return next((by_key[name] for name in _NAME_COLUMNS if name in by_key), None)


def _name(value) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None else str(value)


def _face(record: dict, columns: list[str]) -> int | None:
    match = re.fullmatch(r"([0-9]{1,9})(\.0)?", _name(record[columns[0]])) if columns else None
    return int(match[1]) if match else None


def _confidence(record: dict, columns: list[str]) -> float:
    try:
        values = [read_number(record[column], column, Counter()) for column in columns[:1]]
    except ValueError:
        values = []
    return max([0.0, *(value for value in values if value > 0)])


def _reports_face(record: dict, signs: list[str]) -> bool:
    for column in signs:
        value = record[column]
        if column.lower() == "confidence":
            if read_number(value, column, Counter()) == 0:
                return False
        elif ("" if value is None else str(value).strip().lower()) in _NO:
            return False
    return True


def _check_gaps(values: list[float], names: list[str | None]) -> None:
    known = [(value, name) for value, name in zip(values, names, strict=True) if name is not None]
    missing = [name for value, name in known if math.isnan(value)]
    if 0 < len(missing) < len(known):
        raise ValueError(
            f"column {missing[0]!r} is empty, while other AUs have values. A row has all of them or none."
        )


def read_number(value, column: str, counts: Counter) -> float:
    """Read a number, with a decimal point or comma. An empty cell, and texts such as "n/a", are NaN."""
    try:
        number = float(value) if not isinstance(value, bool) else None
    except (TypeError, ValueError, OverflowError):
        number = None
        text = "" if value is None else str(value).strip()
        if (value is None or isinstance(value, str)) and _NO_NUMBER.fullmatch(text):
            return math.nan
        if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]*,[0-9]+", text):
            counts["decimal commas"] += 1
            return float(text.replace(",", "."))
    if number is None or math.isinf(number):
        shown = repr(value) if len(repr(value)) <= 50 else f"{repr(value)[:50]}…"
        raise ValueError(f"column {column!r} is {shown}, but has to be a number.")
    return number
