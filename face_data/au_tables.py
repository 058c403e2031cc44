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
from statistics import fmean

import numpy as np

from action_units import ACTION_UNITS, AU_NAMES, GRADES, au_columns, read_aus, whole_au
from face_data.table_files import read_records


AU_TABLE_TOOLS = ("openface", "libreface", "pyfeat", "arkit", "mediapipe", "fineface", "affectnet")
# MediaPipe names its blendshapes as ARKit does.
_ALIASES = {"mediapipe": "arkit"}
MAX_AU = 5.0

# A table with fewer rows may contain only faint expressions, so it says nothing about the scale.
_MIN_ROWS_OF_A_SCALE = 10
# Texts that C libraries, spreadsheets and pandas write for a missing number.
_NO_NUMBER = re.compile(r"[+-]?(nan(\(\w*\))?|1\.#(ind|[qs]nan)\d*)|#?n/?a|null|none|", re.IGNORECASE)
NO = ("", "0", "0.0", "false", "no", "nan")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Tool:
    """
    How a tool writes AUs. `column` is the name of an AU's column in lower case, which may end with l or r if the tool
    `has_sides`; `factor` turns a value into an intensity; `overshoot` is how far a value may lie below and above its
    range before it is clipped; `presence` is the column of a presence (0 or 1).
    """

    column: str
    factor: float = 1.0
    overshoot: tuple[float, float] = (0.0, 0.0)
    presence: str | None = None
    has_sides: bool = False


_TOOLS = {
    # OpenFace uses regressors, and older versions did not clamp them.
    "openface": _Tool("au{:02}_r", overshoot=(1.0, 1.0), presence="au{:02}_c"),
    # LibreFace multiplies a sigmoid by 5.
    "libreface": _Tool("au_{}_intensity", overshoot=(0.01, 0.01), presence="au_{}"),
    # py-feat gives probabilities. The factor 5 is the usual convention, not a calibration.
    "pyfeat": _Tool("au{:02}", 5.0, (0.01, 0.01)),
    "fineface": _Tool("au{}", has_sides=True),
    # The data of the paper's authors have LibreFace's intensities divided by 5.
    "affectnet": _Tool("au{}_rec", 5.0, (0.01, 0.01)),
}
# Blendshapes have names of their own. Calibrated trackers slightly exceed their range.
_ARKIT = _Tool("", 5.0, (0.1, 0.25))
_SAME_IN_A_PICTURE = {"AU43": "AU45", "AU45": "AU43"}

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


_PAPERS_SHAPES = {shape for name in AU_NAMES for shape in _shapes_of(name)}
_ALL_SHAPES = {shape for name in (*_SHAPES_OF_AUS, "AU25") for shape in _shapes_of(name)} | {
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
    path, counts, layout, largest, num_faces = Path(path), Counter(), None, 0.0, 0
    for line, whole in read_records(path, say):
        for record in _split_faces(whole):
            try:
                if layout is None or record.keys() != layout.columns:
                    layout = _Layout(record.keys(), tool, image_column, tuple(au_names), unmeasured, counts)
                    if layout.has_other_shapes and tool is None and not counts["shapes"]:
                        counts["shapes"] += 1
                        say(
                            f"{path} has AUs of {layout.tool} and blendshapes (arkit), which differ. The AUs are read;"
                            " name the tool to read the blendshapes."
                        )
            except ValueError as error:
                raise ValueError(f"{path}, line {line}: {error}") from error
            try:
                row = layout.read(record, line)
            except ValueError as error:
                placed = ValueError(f"{path}, line {line}: {error}")
                if on_error is None:
                    raise placed from error
                on_error(placed)
                continue
            if row.face_found:
                num_faces += 1
                largest = max(largest, float(np.nanmax(row.aus)))
            yield row
    if layout is not None:
        for sentence in _notes(counts, layout.tool, largest, num_faces, au_names, unmeasured):
            say(f"{path}: {sentence}")


class _Layout:
    """What the columns of a table are. Raises a ValueError if they have no AUs that are wanted."""

    def __init__(
        self,
        columns: Iterable[str],
        tool: str | None,
        image_column: str | None,
        au_names: tuple[str, ...],
        unmeasured: float,
        counts: Counter,
    ):
        self.columns = columns
        self.tool = _ALIASES.get(tool, tool) or detect_tool(columns)
        self.read_aus = _make_reader(self.tool, list(columns), au_names, unmeasured, counts)
        self.num_aus = len(au_names)
        self.name_column = find_name_column(columns, image_column)
        self.face_column = _first_of(columns, _FACE_COLUMNS)
        self.confidence_column = _first_of(columns, ("confidence", "facescore"))
        self.signs = [column for column in columns if column.lower() in _SIGNS_OF_A_FACE]
        self.has_other_shapes = self.tool != "arkit" and "arkit" in _tools_of(columns)

    def read(self, record: dict, line: int) -> AURow:
        aus = self.read_aus(record) if all(_says_face(record[column], column) for column in self.signs) else None
        face_found = aus is not None and not np.isnan(aus).all()
        if not face_found:
            aus = np.full(self.num_aus, np.nan, np.float32)
        name = _name(record[self.name_column]) if self.name_column else ""
        number = re.fullmatch(r"([0-9]{1,9})(\.0)?", _name(record[self.face_column])) if self.face_column else None
        face = int(number[1]) if number else None
        return AURow(name, aus, face_found, line, record, face, self._confidence(record))

    def _confidence(self, record: dict) -> float:
        column = self.confidence_column
        try:
            value = 0.0 if column is None else read_number(record[column], column)
        except ValueError:
            return 0.0
        return value if value > 0 else 0.0


def _notes(
    counts: Counter, tool: str, largest: float, num_faces: int, au_names: Sequence[str], unmeasured: float
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
    is_whole_scale = tool != "arkit" and _TOOLS[tool].factor == 1
    if is_whole_scale and num_faces >= _MIN_ROWS_OF_A_SCALE and 0 < largest <= 1:
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
    examples = ", ".join(f"{tool} {format.column.format(1)!r}" for tool, format in _TOOLS.items())
    hint = " There is one column: commas, semicolons, tabs and bars divide columns." if len(columns) == 1 else ""
    raise ValueError(
        f"The columns are those of no known tool: {', '.join(columns[:30])}.{hint} AUs are read as {examples} and so"
        " on (in any letter case), as blendshapes, or as `aus`."
    )


def _tools_of(columns: Iterable[str]) -> dict[str, bool]:
    """The tools that have columns in the table, and whether each has all of its columns."""
    present = {column.strip().lower() for column in columns}
    found = {}
    for name, tool in _TOOLS.items():
        aus = {whole_au(au) for au in _find_aus(tool.column, tool.has_sides, present)}
        if aus:
            found[name] = aus.issuperset(AU_NAMES)
    # py-feat and FineFace both write AU12, but AU01 is py-feat's, and AU1 and columns of sides are FineFace's.
    own = {"pyfeat": r"au0\d", "fineface": r"au[1-9]|au\d+[lr]"}
    owners = {name for name, pattern in own.items() if any(re.fullmatch(pattern, column) for column in present)}
    for name in own.keys() - (owners or {"pyfeat" if present.intersection(_PYFEAT_SIGNS) else "fineface"}):
        found.pop(name, None)
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
    find, names = _source_finder(used_tool, columns), []
    for unit in ACTION_UNITS:
        sides = [f"{unit.name}{side}" for side in "LR"] if unit.sided else []
        left, right = map(find, sides) if sides else (None, None)
        if unit.name == "AU45":
            continue
        if None not in (left, right) and left != right:
            names += sides
        elif find(unit.name):
            names.append(unit.name)
    if not names and _first_of(columns, ("aus",)) is None:
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
    unknown = [name for name in blendshapes if _shape_key(name) not in _ALL_SHAPES]
    if unknown:
        raise ValueError(f"There is no blendshape {', '.join(map(repr, unknown))}; ARKit has 52, such as 'jawOpen'.")
    if not any(map(_shapes_of, au_names)):
        return np.zeros(len(au_names), np.float32)
    values = dict.fromkeys(_ALL_SHAPES, 0.0) | {_shape_key(name): value for name, value in blendshapes.items()}
    return _make_reader("arkit", list(_ALL_SHAPES), tuple(au_names), 0.0, Counter())(values)


@dataclass(frozen=True)
class _Source:
    """
    What an AU is computed from: `factor` times the mean of `columns`, whose values go from 0 to `high`. None is a
    blendshape that the table does not have, and counts as 0.
    """

    columns: tuple[str | None, ...]
    factor: float
    high: float
    overshoot: tuple[float, float] = (0.0, 0.0)
    is_presence: bool = False
    combine: Callable[[list[float]], float] = fmean

    def intensity(self, values: dict[str, float]) -> float:
        return self.factor * self.combine(
            [0.0 if column is None else min(max(values[column], 0.0), self.high) for column in self.columns]
        )


def _parted_lips(values: list[float]) -> float:
    jaw, close, *lips = values
    return max(jaw * (1 - close), fmean(lips[:2]), fmean(lips[2:]))


def _find_aus(column: str, has_sides: bool, columns: Iterable[str]) -> dict[str, str]:
    """Map the AUs that have columns of the form `column` to these columns."""
    number = column.replace("{:02}", r"(\d\d)").replace("{}", r"([1-9]\d?)")
    pattern = re.compile(number + ("([lr]?)" if has_sides else "()"))
    found = ((pattern.fullmatch(name.lower()), name) for name in columns)
    return {f"AU{int(match[1])}{match[2].upper()}": name for match, name in found if match}


def _source_finder(tool: str, columns: Iterable[str]) -> Callable[[str], _Source | None]:
    """A function from an AU to what it is computed from, which is None if the table lacks it."""
    if tool == "arkit":
        by_key = {_shape_key(column): column for column in columns}

        def find_shapes(name: str) -> _Source | None:
            found = tuple(map(by_key.get, _shapes_of(name)))
            combine = _parted_lips if name == "AU25" else fmean
            return _Source(found, _ARKIT.factor, 1.0, _ARKIT.overshoot, combine=combine) if any(found) else None

        return find_shapes
    form = _TOOLS[tool]
    intensities = _find_aus(form.column, form.has_sides, columns)
    presences = _find_aus(form.presence, False, columns) if form.presence else {}

    def find(name: str) -> _Source | None:
        whole, side = whole_au(name), name[len(whole_au(name)) :]
        numbers = [whole, _SAME_IN_A_PICTURE.get(whole, whole)]
        for au in numbers:
            # The side, the whole face, or both sides, whichever the table has.
            for wanted in ((f"{au}{side}",), (au,), (f"{au}L", f"{au}R")):
                if intensities.keys() >= set(wanted):
                    found = tuple(intensities[au] for au in wanted)
                    return _Source(found, form.factor, MAX_AU / form.factor, form.overshoot)
        present = next((presences[au] for au in numbers if au in presences), None)
        return None if present is None else _Source((present,), GRADES["C"], 1.0, is_presence=True)

    return find


def _make_reader(
    tool: str, columns: list[str], au_names: tuple[str, ...], unmeasured: float, counts: Counter
) -> Callable[[dict], np.ndarray]:
    """
    A function from a row to its AUs, which are all NaN if all cells are empty. AUs without a column are `unmeasured`.
    `counts` gets the rows of which an AU is not measured, or only its presence.
    """
    find = _source_finder(tool, columns)
    sources = {name: find(name) for name in au_names}
    of_columns = {column: source for source in sources.values() if source for column in source.columns if column}
    expression = _first_of(columns, ("aus",))
    if tool == "fineface" and expression is not None and None in sources.values():
        return lambda record: _read_expression(record[expression], expression, au_names)
    if not of_columns:
        shapes = [shape for name in au_names for shape in _shapes_of(name)]
        wanted = shapes if tool == "arkit" else [_TOOLS[tool].column.format(int(whole_au(n)[2:])) for n in au_names]
        raise _no_column(f"{', '.join(wanted[:2])}{', …' if len(wanted) > 2 else ''}", columns)
    noted = [name for name, source in sources.items() if source is None]
    noted += [(name, "presence") for name, source in sources.items() if source and source.is_presence]

    def read(record: dict) -> np.ndarray:
        values = {column: read_number(record[column], column, counts) for column in of_columns}
        missing = [column for column, value in values.items() if math.isnan(value)]
        if 0 < len(missing) < len(values):
            raise ValueError(
                f"column {missing[0]!r} is empty, while other AUs have values. A row has all of them or none."
            )
        if missing:
            return np.full(len(au_names), np.nan, np.float32)
        for column, source in of_columns.items():
            below, above = source.overshoot
            if not -below <= values[column] <= source.high + above:
                raise ValueError(
                    f"column {column!r} is {values[column]:g}. {tool} measures from 0 to {source.high:g}."
                )
        counts.update(noted)
        return np.float32([source.intensity(values) if source else unmeasured for source in sources.values()])

    return read


def _read_expression(value, column: str, au_names: tuple[str, ...]) -> np.ndarray:
    if value is None:
        return np.full(len(au_names), np.nan, np.float32)
    rows = np.float32(read_aus(value, column, au_names))
    if len(rows) != 1 or not ((rows >= 0) & (rows <= MAX_AU)).all():
        raise ValueError(f"column {column!r} is {value!r}, but has to be one expression from 0 to 5.")
    return rows[0]


def _first_of(columns: Iterable[str], names: Sequence[str]) -> str | None:
    """The column with the first of `names` that is there, in any letter case."""
    by_key = {column.lower(): column for column in columns}
    return next((by_key[name] for name in names if name in by_key), None)


def _no_column(what: str, columns: Iterable[str]) -> ValueError:
    return ValueError(f"There is no column {what}. The columns are {', '.join(list(columns)[:30])}.")


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


def _shape_key(name: str) -> str:
    key = name.strip().lower()
    side = {"_l": "left", "_r": "right"}.get(key[-2:])
    return (key[:-2] + side if side else key).replace("_", "")


def find_name_column(columns: Iterable[str], image_column: str | None) -> str | None:
    """
    The column of a picture's name: `image_column`, else the first usual one, if any.

    Raises:
        ValueError: if there is no `image_column`.
    """
    wanted = _NAME_COLUMNS if image_column is None else (image_column.strip().lower(),)
    found = _first_of(columns, wanted)
    if found is None and image_column is not None:
        raise _no_column(wanted[0], columns)
    return found


def _name(value) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None else str(value)


def _says_face(value, column: str) -> bool:
    if column.lower() == "confidence":
        return read_number(value, column) != 0
    return ("" if value is None else str(value).strip().lower()) not in NO


def read_number(value, column: str, counts: Counter | None = None) -> float:
    """Read a number; decimal commas are counted. An empty cell, and texts such as "n/a", are NaN."""
    try:
        number = float(value) if not isinstance(value, bool) else None
    except (TypeError, ValueError, OverflowError):
        number = None
        text = "" if value is None else str(value).strip()
        if (value is None or isinstance(value, str)) and _NO_NUMBER.fullmatch(text):
            return math.nan
        if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]*,[0-9]+", text):
            if counts is not None:
                counts["decimal commas"] += 1
            return float(text.replace(",", "."))
    if number is None or math.isinf(number):
        shown = repr(value) if len(repr(value)) <= 50 else f"{repr(value)[:50]}…"
        raise ValueError(f"column {column!r} is {shown}, but has to be a number.")
    return number
