# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""Which AUs of a data set come from which table."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from action_units import ALL_AU_NAMES, AU_NAMES, au_columns, whole_au
from face_data.au_tables import AU_TABLE_TOOLS, find_measured_aus


@dataclass(frozen=True)
class AUTable:
    """
    A table, the tool that wrote it (by default its columns tell), and the AUs taken from it. `choose_aus` fills in
    AUs that are left open, and a `note` on which AUs are taken and which are left out.
    """

    path: Path
    tool: str | None = None
    aus: tuple[str, ...] = ()
    note: str = ""

    @classmethod
    def parse(cls, text: str) -> "AUTable":
        """`"FILE"`, `"TOOL=FILE"`, `"FILE:AU5,AU9"` or `"TOOL=FILE:AU5,AU9"`."""
        tool, _, rest = text.partition("=")
        tool, rest = (tool, rest) if tool in AU_TABLE_TOOLS else (None, text)
        match = re.fullmatch(r"(.+?)(?::(AU\w+(?:,\s*AU\w+)*))?", rest, flags=re.IGNORECASE | re.DOTALL)
        if match is None:
            raise ValueError(f"`--aus` is {text!r}. Write FILE, TOOL=FILE, or TOOL=FILE:AU5,AU9.")
        aus = tuple(name.strip().upper() for name in match[2].split(",")) if match[2] else ()
        unknown = [name for name in aus if name not in {*ALL_AU_NAMES, *map(whole_au, ALL_AU_NAMES)}]
        if unknown:
            raise ValueError(
                f"`--aus` names {unknown[0]!r} in {text!r}, which is no AU of FACS. Write AU5, or AU12L and AU12R."
            )
        return cls(Path(match[1]), tool, aus)


def choose_aus(tables: tuple[AUTable, ...], au_names: tuple[str, ...] | None = None) -> tuple[AUTable, ...]:
    """
    Decide which AUs come from which table: those that are written behind it, and from the one table behind which there
    are none, all others that it measures.

    Args:
        au_names (`tuple[str, ...]`, *optional*):
            The AUs of the data. An AU without sides gives both sides, and two sides give their mean. By default what
            the tables measure, each side by itself where they tell it.

    Raises:
        FileNotFoundError: if a table is not there.
        ValueError: if an AU comes from no table or from two, if a table gives none, or if `au_names` is no list that
            an adapter can have.
    """
    for table in tables:
        if not table.path.is_file():
            raise FileNotFoundError(f"There is no table {str(table.path)!r}.")
    named = [name for table in tables for name in table.aus]
    twice = next((name for name in named if named.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"`--aus` takes {twice} from two tables. An AU comes from one.")
    whole = [table.path for table in tables if not table.aus]
    if len(whole) > 1:
        raise ValueError(
            f"`--aus` takes all AUs from {whole[0]} and from {whole[1]}. Say behind all tables but one which AUs come"
            " from it: TOOL=FILE:AU5,AU9."
        )
    chosen = []
    for table in tables:
        tool, measured = find_measured_aus(table.path, table.tool)
        offered = au_names or table.aus or measured or AU_NAMES
        taken = tuple(name for name in offered if _is_among(name, table.aus or named) == bool(table.aus))
        # Closed eyes look the same for long and briefly.
        missing = [n for n in taken if measured and whole_au(n).replace("AU45", "AU43") not in au_columns(measured)]
        if missing or not taken:
            raise ValueError(
                f"`--aus` takes {', '.join(missing) or 'no AU'} from {table.path}, where {tool} measures"
                f" {', '.join(measured)}. Choose others by `--au_names`, or behind the file's name."
            )
        left = [name for name in measured if not _is_among(name, taken)]
        elsewhere = [name for name in left if _is_among(name, named) and not _is_among(name, table.aus)]
        others = [name for name in left if name not in elsewhere]
        note = f"{table.path}: {tool} gives {', '.join(taken)}."
        if elsewhere:
            note += f" Left out, because another table gives them: {', '.join(elsewhere)}."
        if others:
            option = "--au_names" if au_names else "--aus"
            note += f" Left out, because `{option}` does not name them: {', '.join(others)}."
        chosen.append(replace(table, aus=taken, note=note))
    au_columns([name for table in chosen for name in table.aus])
    return tuple(chosen)


def sort_aus(names: Iterable[str]) -> tuple[str, ...]:
    """AUs by their numbers, left before right."""
    return tuple(sorted(names, key=lambda name: (int(whole_au(name).removeprefix("AU")), name)))


def _is_among(name: str, others: Iterable[str]) -> bool:
    """AU12 is among AUs with AU12L, and AU12L among AUs with AU12."""
    return any(name in (other, whole_au(other)) or whole_au(name) == other for other in others)
