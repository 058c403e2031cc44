# SPDX-License-Identifier: Apache-2.0
"""
Rows of CSV, TSV, JSON, JSON Lines and Parquet files as dicts, read one by one, with the habits of spreadsheets: other
separators and encodings, empty columns and rows at the end. What had to be guessed or left out is said.
"""

import codecs
import contextlib
import csv
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path


# py-feat 2, the widest known tool, writes about 2,200 columns.
MAX_COLUMNS = 10_000
MAX_LINE_CHARACTERS = 2**22
# A .json file is parsed as a whole, which takes ten times its size.
MAX_JSON_BYTES = 2**28
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_WORKBOOK_SUFFIXES = (".xlsx", ".xls", ".xlsm", ".ods", ".numbers")


def read_records(path: str | os.PathLike, say: Callable[[str], None]) -> Iterator[tuple[int, dict]]:
    """
    Read the rows of a table: a .csv, .tsv, .jsonl, .json (one object or a list of them, read as a whole) or .parquet
    file. `say` is called with a sentence about whatever was guessed or left out, once for each kind.

    Yields:
        `tuple[int, dict]`: the number of the line in the file, from 1, header included (of a .json or .parquet file,
        the number of the row), and the row by column. Column names are stripped, cells of CSV and TSV are stripped
        text, and objects within a JSON object give their entries to it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file cannot be read as a table; the message has the path and, where there is one, the line.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in _WORKBOOK_SUFFIXES:
        raise ValueError(f"{path}: the file type is {path.suffix!r}, a workbook. Save its sheet as CSV (UTF-8).")
    if suffix not in _READERS:
        raise ValueError(f"{path}: the file type is {path.suffix!r}, but has to be {', '.join(_READERS)}.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no table {str(path)!r}.")
    for line, record in _READERS[suffix](path, say):
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {line}: a row has to be an object, but is a {type(record).__name__}.")
        flat = {}
        for name, value in record.items():
            # LibreFace and MediaPipe group their values in objects; `aus` is one value.
            is_group = isinstance(value, dict) and name.strip().lower() != "aus"
            flat |= {inner.strip(): item for inner, item in (value if is_group else {name: value}).items()}
        if len(flat) > MAX_COLUMNS:
            raise ValueError(f"{path}, line {line}: {len(flat):,} columns, and {MAX_COLUMNS:,} are allowed.")
        yield line, flat


def _read_lines(path: Path, say: Callable[[str], None]) -> Iterator[str]:
    """The lines of a text file, with their ends, in the encoding that its bytes tell."""
    number = 0
    with path.open(newline="", encoding=_find_encoding(path, say)) as file:
        while text := file.readline(MAX_LINE_CHARACTERS):
            number += 1
            if len(text) == MAX_LINE_CHARACTERS:
                raise ValueError(f"{path}, line {number}: more than {MAX_LINE_CHARACTERS:,} characters.")
            yield text


def _find_encoding(path: Path, say: Callable[[str], None]) -> str:
    with path.open("rb") as file:
        start = file.read(4096)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if start.startswith(b"PK\x03\x04"):
        raise ValueError(f"{path}: this is a workbook or a ZIP file under another name. Save its sheet as CSV.")
    # Half of the bytes of Latin text in UTF-16 are 0, and none of text in UTF-8.
    if b"\0" in start:
        even, odd = start[::2].count(0), start[1::2].count(0)
        if max(even, odd) < len(start) / 8:
            raise ValueError(f"{path}: this is no text file.")
        return "utf-16-be" if even > odd else "utf-16-le"
    for encoding in ("utf-8-sig", "cp1252"):
        with contextlib.suppress(UnicodeDecodeError), path.open(encoding=encoding) as file:
            while file.read(2**20):
                pass
            if encoding == "cp1252":
                say(f"{path} is not in UTF-8. It is read as cp1252 (Windows, Western Europe); save others in UTF-8.")
            return encoding
    raise ValueError(f"{path}: the encoding is none of UTF-8, UTF-16 and cp1252. Save it in UTF-8.")


def _read_separated(path: Path, say: Callable[[str], None], usual: str) -> Iterator[tuple[int, dict]]:
    lines = _read_lines(path, say)
    first, first_line = next(lines, ""), 0
    # The separator is the one that divides the header into the most columns; the usual one if several do.
    counts = {mark: len(next(csv.reader([first], delimiter=mark), [])) for mark in (usual, *_SEPARATORS)}
    separator = max(counts, key=counts.get)
    # Excel writes a line for the separator.
    if first.lower().startswith("sep="):
        first_line, separator, first = 1, first.rstrip()[4:5] or "\t", next(lines, "")
    separators = _SEPARATORS.get(separator, repr(separator))
    if separator != usual:
        say(f"{path}: the columns are separated by {separators}.")
    reader = csv.reader(chain([first], lines), delimiter=separator, skipinitialspace=True)
    num_empty = num_headers = 0
    try:
        header = [name.strip() for name in next(reader, [])]
        while header and not header[-1]:
            header.pop()
        _check_columns(header, path)
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if not any(cells):
                num_empty += bool(cells)
            elif cells[: len(header)] == header:
                # Tables that were joined by appending one file to another.
                num_headers += 1
            elif len(cells) < len(header) or any(cells[len(header) :]):
                raise csv.Error(
                    f"{len(cells)} cells, but the header has {len(header)}, with {separators} between them."
                )
            else:
                cells = cells[: len(header)]
                record = {name: cell for name, cell in zip(header, cells, strict=True) if name}
                yield first_line + reader.line_num, record
    except csv.Error as error:
        raise ValueError(f"{path}, line {first_line + reader.line_num}: {error}") from error
    if num_empty:
        say(f"{path}: {num_empty:,} empty rows are left out.")
    if num_headers:
        say(f"{path}: {num_headers:,} rows repeat the header and are left out.")


def _check_columns(header: list[str], path: Path) -> None:
    if not header:
        raise ValueError(f"{path}: the file is empty, or its first line is, where the names of the columns belong.")
    if len(header) > MAX_COLUMNS:
        raise ValueError(f"{path}: {len(header):,} columns, and {MAX_COLUMNS:,} are allowed.")
    twice = next((name for name, count in Counter(filter(None, header)).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"{path}: the column {twice!r} is there twice.")


def _read_json_lines(path: Path, say: Callable[[str], None]) -> Iterator[tuple[int, dict]]:
    for line, text in enumerate(_read_lines(path, say), 1):
        if text.strip():
            yield line, _parse_json(text, f"{path}, line {line}")


def _read_json(path: Path, say: Callable[[str], None]) -> Iterator[tuple[int, dict]]:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(
            f"{path}: {path.stat().st_size:,} bytes, and {MAX_JSON_BYTES:,} are allowed of a file that is read as a"
            " whole. Write one object a line, as .jsonl."
        )
    value = _parse_json(path.read_text(encoding=_find_encoding(path, say)), str(path))
    # The categories of one face, as MediaPipe's own classes become JSON.
    if isinstance(value, list) and value and all(isinstance(item, dict) and "score" in item for item in value):
        value = {"categories": value}
    yield from enumerate(value if isinstance(value, list) else [value], 1)


def _read_parquet(path: Path, say: Callable[[str], None]) -> Iterator[tuple[int, dict]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_columns(file.schema_arrow.names, path)
            batches = file.iter_batches(batch_size=1024)
            yield from enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), 1)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: {error}") from error


_READERS = {
    ".csv": lambda path, say: _read_separated(path, say, ","),
    ".tsv": lambda path, say: _read_separated(path, say, "\t"),
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def _parse_json(text: str, label: str):
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{label}: the objects are nested too deeply.") from error
    except ValueError as error:
        raise ValueError(f"{label}: this is no JSON: {error}") from error
