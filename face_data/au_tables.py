# SPDX-License-Identifier: Apache-2.0
"""AU intensities from tables of other tools, row by row. docs/data.md lists the tools, their columns and scales."""

import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

import numpy as np

from action_units import ACTION_UNITS, ALL_AU_NAMES, AU_NAMES, GRADES, au_columns, read_aus, whole_au
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
_EVERY_AU = tuple(dict.fromkeys((*ALL_AU_NAMES, *map(whole_au, ALL_AU_NAMES))))

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Form:
    """
    Columns of a tool. `column` is the name of an AU's column in lower case, which may end with l or r if it
    `has_sides`; `combine` makes one value of those of several columns, and `factor` an intensity of it; `overshoot` is
    how far a value may lie below and above its range before it is clipped. A presence is 0 or 1.
    """

    column: str
    factor: float = 1.0
    overshoot: tuple[float, float] = (0.0, 0.0)
    has_sides: bool = False
    is_presence: bool = False
    combine: Callable[[list[float]], float] = fmean

    @property
    def high(self) -> float:
        """The end of the scale of the columns."""
        return 1.0 if self.is_presence else MAX_AU / self.factor

    def find(self, columns: Iterable[str]) -> dict[str, str]:
        """Map the AUs that have columns of this form to these columns."""
        number = self.column.replace("{:02}", r"(\d\d)").replace("{}", r"([1-9]\d?)")
        pattern = re.compile(number + ("([lr]?)" if self.has_sides else "()"))
        found = ((pattern.fullmatch(name.lower()), name) for name in columns)
        return {f"AU{int(match[1])}{match[2].upper()}": name for match, name in found if match}

    def intensity(self, values: Iterable[float]) -> float:
        return self.factor * self.combine([min(max(value, 0.0), self.high) for value in values])


def _parted_lips(values: list[float]) -> float:
    jaw, close, *lips = values
    return max(jaw * (1 - close), fmean(lips[:2]), fmean(lips[2:]))


# FACS notation reads an AU without a grade as C.
_PRESENT = {"factor": float(GRADES["C"]), "is_presence": True}
_TOOLS = {
    # OpenFace uses regressors, and older versions did not clamp them.
    "openface": (_Form("au{:02}_r", overshoot=(1.0, 1.0)), _Form("au{:02}_c", **_PRESENT)),
    # LibreFace multiplies a sigmoid by 5.
    "libreface": (_Form("au_{}_intensity", overshoot=(0.01, 0.01)), _Form("au_{}", **_PRESENT)),
    # py-feat gives probabilities. The factor 5 is the usual convention, not a calibration.
    "pyfeat": (_Form("au{:02}", 5.0, (0.01, 0.01)),),
    "fineface": (_Form("au{}", has_sides=True),),
    # The data of the paper's authors have LibreFace's intensities divided by 5.
    "affectnet": (_Form("au{}_rec", 5.0, (0.01, 0.01)),),
}
# Blendshapes have names of their own. Calibrated trackers slightly exceed their range.
_SHAPE = _Form("", 5.0, (0.1, 0.25))
_SHAPES_OF_LIPS = replace(_SHAPE, combine=_parted_lips)
# Eyes that are closed for long or briefly look the same in a picture.
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
# An AU is the mean of these blendshapes, but for AU25, see `_parted_lips`; a star stands for left and right.
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
    "AU25": ("jawopen", "mouthclose", "mouthlowerdown*", "mouthupperup*"),
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


def _shapes_of(name: str) -> tuple[str, ...]:
    """The blendshapes of an AU or of one side of it; () if there are none."""
    sides = {"L": ("left",), "R": ("right",)}.get(name[-1], ("left", "right"))
    patterns = _SHAPES_OF_AUS.get(whole_au(name), ())
    return tuple(dict.fromkeys(pattern.replace("*", side) for pattern in patterns for side in sides))


_ALL_SHAPES = {shape for name in _SHAPES_OF_AUS for shape in _shapes_of(name)} | {
    *("jawleft", "jawright", "mouthleft", "mouthright", "mouthshrugupper", "neutral"),
}


@dataclass(frozen=True)
class AURow:
    """One face of a table."""

    name: str  # file name of the picture, or number of the frame; "" if the table has neither
    aus: np.ndarray  # (n,) float32 FACS intensities in [0, 5], in the order of `au_names`; NaN without a face
    face_found: bool  # False where the tool reports no face
    line: int  # in the file, from 1, header included; of a Parquet file or a JSON list, number of the row, from 1
    record: dict = field(default_factory=dict, repr=False, compare=False)  # the row as it was read, with all columns
    face: int | None = None  # number of the face in its picture or video, if the tool gives one
    confidence: float = 0.0  # the tool's confidence in the face, or 0 if the table has none


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
            One of `AU_TABLE_TOOLS`, whose columns and scales docs/data.md lists; by default `detect_tool` finds it.
            Intensities from 0 to 5 are taken as they are, and probabilities and blendshapes from 0 to 1
            times 5. An AU that is only called present becomes 3, because FACS notation reads an AU without a grade as
            C. A column `aus` has any form that `parse_aus` reads.
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
    reader = _Reader(tool, image_column, tuple(au_names), unmeasured)
    for line, record in _read_faces(path, say):
        try:
            if record.keys() != reader.columns:
                reader.columns = None
                reader.set_columns(record.keys())
            row = reader.read(record, line)
        except ValueError as error:
            placed = ValueError(f"{path}, line {line}: {error}")
            # Columns that cannot be read are no error of one row.
            if on_error is None or reader.columns is None:
                raise placed from error
            on_error(placed)
        else:
            yield row
    for sentence in reader.notes():
        say(f"{path}: {sentence}")


def _read_faces(path: str | os.PathLike, say: Callable[[str], None]) -> Iterator[tuple[int, dict]]:
    return ((line, face) for line, record in read_records(path, say) for face in _split_faces(record))


class _Reader:
    """Reads rows, and counts what is to be said about them. `set_columns` comes before the first row."""

    def __init__(self, tool: str | None, image_column: str | None, au_names: tuple[str, ...], unmeasured: float):
        self.wanted_tool, self.image_column = _ALIASES.get(tool, tool), image_column
        self.au_names, self.unmeasured = au_names, unmeasured
        self.columns, self.counts, self.largest = None, Counter(), 0.0

    def set_columns(self, columns: Collection[str]) -> None:
        """Raises a ValueError if they have no AUs that are wanted."""
        self.tool = self.wanted_tool or detect_tool(columns)
        found = _find_sources(self.tool, columns)
        self.sources = [found.get(name) for name in self.au_names]
        self.missing = [name for name in self.au_names if name not in found]
        self.present = [(name, "presence") for name in self.au_names if name in found and found[name][0].is_presence]
        known = filter(None, self.sources)
        self.forms = {column: form for form, of_form in known for column in of_form if column is not None}
        reads_expressions = self.tool == "fineface" and self.missing
        self.expression = _first_of(columns, ("aus",)) if reads_expressions else None
        if self.expression is None and not self.forms:
            shapes = [shape for name in self.au_names for shape in _shapes_of(name)]
            numbers = [int(whole_au(name)[2:]) for name in self.au_names]
            wanted = shapes if self.tool == "arkit" else list(map(_TOOLS[self.tool][0].column.format, numbers))
            raise _no_column(f"{', '.join(wanted[:2])}{', …' if len(wanted) > 2 else ''}", columns)
        self.name_column = find_name_column(columns, self.image_column)
        self.face_column = _first_of(columns, _FACE_COLUMNS)
        self.confidence_column = _first_of(columns, ("confidence", "facescore"))
        self.signs = [column for column in columns if column.lower() in _SIGNS_OF_A_FACE]
        self.counts["shapes"] |= self.wanted_tool is None and self.tool != "arkit" and "arkit" in _tools_of(columns)
        self.columns = columns

    def read(self, record: dict, line: int) -> AURow:
        aus = np.full(len(self.au_names), np.nan, np.float32)
        if all(_says_face(record[column], column) for column in self.signs):
            aus = self.read_aus(record) if self.expression is None else self._read_expression(record[self.expression])
        face_found = not np.isnan(aus).all()
        if face_found:
            self.counts["faces"] += 1
            self.largest = max(self.largest, float(np.nanmax(aus)))
        name = _name(record[self.name_column]) if self.name_column else ""
        number = re.fullmatch(r"([0-9]{1,9})(\.0)?", _name(record[self.face_column])) if self.face_column else None
        face = int(number[1]) if number else None
        return AURow(name, aus, face_found, line, record, face, self._confidence(record))

    def read_aus(self, record: dict) -> np.ndarray:
        """The AUs of a row, which are all NaN if all cells are empty."""
        values = {column: read_number(record[column], column, self.counts) for column in self.forms}
        missing = [column for column, value in values.items() if math.isnan(value)]
        if 0 < len(missing) < len(values):
            raise ValueError(
                f"column {missing[0]!r} is empty, while other AUs have values. A row has all of them or none."
            )
        if missing:
            return np.full(len(self.au_names), np.nan, np.float32)
        for column, form in self.forms.items():
            (below, above), high = form.overshoot, form.high
            if not -below <= values[column] <= high + above:
                raise ValueError(f"column {column!r} is {values[column]:g}. {self.tool} measures from 0 to {high:g}.")
        self.counts.update(self.missing + self.present)
        return np.float32(
            [s[0].intensity(values.get(c, 0.0) for c in s[1]) if s else self.unmeasured for s in self.sources]
        )

    def _read_expression(self, value) -> np.ndarray:
        if value is None:
            return np.full(len(self.au_names), np.nan, np.float32)
        rows = np.float32(read_aus(value, self.expression, self.au_names))
        if len(rows) != 1 or not ((rows >= 0) & (rows <= MAX_AU)).all():
            raise ValueError(f"column {self.expression!r} is {value!r}, but has to be one expression from 0 to 5.")
        return rows[0]

    def _confidence(self, record: dict) -> float:
        try:
            value = read_number(record.get(self.confidence_column), "")
        except ValueError:
            return 0.0
        return value if value > 0 else 0.0

    def notes(self) -> Iterator[str]:
        """Sentences about a table that was read to its end."""
        counts, num_faces = self.counts, self.counts["faces"]
        if counts["shapes"]:
            yield (
                f"the table has AUs of {self.tool} and blendshapes (arkit), which differ. The AUs are read; name the"
                " tool to read the blendshapes."
            )
        missing = [name for name in self.au_names if counts[name]]
        if missing:
            taken = "taken as 0" if self.unmeasured == 0 else "left out"
            what = "blendshape or column" if self.tool == "arkit" else "column"
            yield f"there is no {what} for {', '.join(missing)} (in {max(map(counts.get, missing)):,} rows): {taken}."
        present = [name for name in self.au_names if counts[name, "presence"]]
        if present:
            yield f"{self.tool} measures only the presence of {', '.join(present)}: present is taken as {GRADES['C']}."
        if counts["decimal commas"]:
            yield f"{counts['decimal commas']:,} numbers have a decimal comma."
        if num_faces < _MIN_ROWS_OF_A_SCALE or not 0 < self.largest <= 1:
            return
        if self.tool != "arkit" and _TOOLS[self.tool][0].factor == 1:
            yield (
                f"the largest AU of {num_faces:,} faces is {self.largest:.3g}, but {self.tool} measures from 0 to"
                f" {MAX_AU:g}. If the values go from 0 to 1, they are five times too weak: multiply them by"
                f" {MAX_AU:g}."
            )


def detect_tool(columns: Iterable[str]) -> str:
    """
    The tool of `AU_TABLE_TOOLS` that writes these columns. Letter case and spaces around a name do not matter. AUs
    have priority over blendshapes, because a table of py-feat 2 has both.

    Raises:
        ValueError: if no tool writes such columns, or the table has AUs of several tools.
    """
    columns = [str(column) for column in columns]
    found = _tools_of(columns)
    if len(found) > 1 and "arkit" in found:
        found.remove("arkit")
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"The columns are those of {' and '.join(found)}. Name the tool to read.")
    examples = ", ".join(f"{tool} {forms[0].column.format(1)!r}" for tool, forms in _TOOLS.items())
    hint = " There is one column: commas, semicolons, tabs and bars divide columns." if len(columns) == 1 else ""
    raise ValueError(
        f"The columns are those of no known tool: {', '.join(columns[:30])}.{hint} AUs are read as {examples} and so"
        " on (in any letter case), as blendshapes, or as `aus`."
    )


def _tools_of(columns: Iterable[str]) -> list[str]:
    """The tools that have columns in the table."""
    present = {column.strip().lower() for column in columns}
    found = [tool for tool, forms in _TOOLS.items() if forms[0].find(present)]
    # py-feat and FineFace both write AU12, but AU01 is py-feat's, and AU1 and columns of sides are FineFace's.
    own = {"pyfeat": r"au0\d", "fineface": r"au[1-9]|au\d+[lr]"}
    owners = {name for name, pattern in own.items() if any(re.fullmatch(pattern, column) for column in present)}
    owners = owners or {"pyfeat" if present.intersection(_PYFEAT_SIGNS) else "fineface"}
    found = [tool for tool in found if tool not in own or tool in owners]
    if "aus" in present and "fineface" not in found:
        found.append("fineface")
    if {_shape_key(column) for column in present} & (_ALL_SHAPES - {"neutral"}):
        found.append("arkit")
    return found


def find_measured_aus(path: str | os.PathLike, tool: str | None = None) -> tuple[str, tuple[str, ...]]:
    """
    The tool of a table, one of `AU_TABLE_TOOLS`, and the AUs that its columns measure, by their numbers, each side by
    itself where the table tells both; () if a column `aus` tells them. Closed eyes are AU43, also where the tool calls
    them a blink (AU45). JSON is read to its end, because each row may have other columns.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the table has no rows, or no columns of a tool.
    """
    columns = {}
    for _, record in _read_faces(path, lambda sentence: None):
        columns |= dict.fromkeys(record)
        if not str(path).lower().endswith((".json", ".jsonl")):
            break
    if not columns:
        raise ValueError(f"{path}: the table has no rows.")
    try:
        used_tool = _ALIASES.get(tool, tool) or detect_tool(columns)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    sources, names = _find_sources(used_tool, columns), []
    for unit in ACTION_UNITS:
        sides = (f"{unit.name}L", f"{unit.name}R")
        left, right = map(sources.get, sides)
        if None not in (left, right) and left != right:
            names += sides
        elif unit.name in sources:
            names.append(unit.name)
    names = tuple(name for name in names if whole_au(name) != "AU45")
    if not names and _first_of(columns, ("aus",)) is None:
        raise ValueError(f"{path}: there is no AU that {used_tool} measures. The columns are {', '.join(columns)}.")
    return used_tool, names


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
    reader = _Reader("arkit", None, tuple(au_names), 0.0)
    reader.set_columns(_ALL_SHAPES)
    return reader.read_aus(
        dict.fromkeys(_ALL_SHAPES, 0.0) | {_shape_key(name): value for name, value in blendshapes.items()}
    )


def _find_sources(tool: str, columns: Iterable[str]) -> dict[str, tuple[_Form, tuple[str | None, ...]]]:
    """
    The columns that each AU and each side can be computed from, as far as a table of `tool` has them. None is a
    blendshape that is not there, and counts as 0.
    """
    sources = {}
    if tool == "arkit":
        by_key = {_shape_key(column): column for column in columns}
        for name in _EVERY_AU:
            found = tuple(map(by_key.get, _shapes_of(name)))
            if any(found):
                sources[name] = (_SHAPES_OF_LIPS if name == "AU25" else _SHAPE, found)
        return sources
    for form in _TOOLS[tool]:
        found = form.find(columns)
        for name in _EVERY_AU:
            whole = whole_au(name)
            for au in (whole, _SAME_IN_A_PICTURE.get(whole, whole)):
                # The side, the whole face, or both sides, whichever the table has.
                for wanted in ((name.replace(whole, au),), (au,), (f"{au}L", f"{au}R")):
                    if name not in sources and found.keys() >= set(wanted):
                        sources[name] = (form, tuple(map(found.get, wanted)))
    return sources


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
    """The column of a picture's name: `image_column`, which has to be there, or else the first usual one, if any."""
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
