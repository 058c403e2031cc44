# SPDX-License-Identifier: Apache-2.0
"""
A `Job` says what to draw in one picture. Jobs come from options, JSON Lines or tables of AUs, and are laid out in
sheets. Everything is checked here, without a model.
"""

import itertools
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path, PurePosixPath

import action_units
from action_units import AU_NAMES, action_units_of, au_columns, available_presets, format_aus, read_aus, whole_au
from drawing.contact_sheet import ANIMATION_SUFFIXES, Table
from face_data.au_tables import read_au_table
from program import MAX_NAME_BYTES, check_integer, is_integer, is_real, number_or_none, option, show_value


_logger = logging.getLogger(__name__)
MODEL_DEFAULTS_NAME = "fineface.json"
MAX_SEED = 2**63 - 1
MAX_SIDE = 8192
MAX_PROMPT_LENGTH = 10_000
"""Characters of a prompt. The model reads about 300, and a tokenizer would take 25 s for a million."""
DEMO_PROMPT = "a closeup of a woman with long brown hair and tan skin in a park, wearing a blue sweater"
DEMO_SEED = 5
"""Of six seeds that were looked at, this one shows the named expressions best."""
MAX_SWEEP_COUNT = 50
GRID_INTENSITIES = (0, 1, 2, 3, 4, 5)
SHEET_COLUMNS = 8
DEMO_PRESETS = (
    ("happy", "sad", "surprised", "fearful", "angry", "disgusted"),
    ("laughing", "doubtful", "pained", "pleading", "pouting", "skeptical"),
)


@dataclass(frozen=True)
class Job:
    """
    One picture. `aus` and `negative_aus` are written by `format_aus`, or None if there are none; the other fields are
    arguments of `FineFacePipeline.__call__`, with the same defaults. Equal jobs give equal pictures.
    """

    prompt: str = option(MISSING, "what to draw; AUs may stand in it: 'a boy <AU6=3 AU12=5>'", required=False)
    aus: str | None = option(
        None,
        '"AU6=2.5 AU12=5", "6C+12D", "L12C" for one side, or "doubtful@0.5 + AU4=2" (default: up to the prompt)',
    )
    seed: int = option(0, "equal seeds give equal pictures (default: 0)")
    negative_prompt: str | None = option(None, "what not to draw")
    negative_aus: str | None = option(None, "the expression to guide away from (default: neutral)")
    au_scale: float = option(1.0, "how strongly the AUs are added (default: 1)")
    guidance_scale: float = option(7.5, "how closely to follow prompt and AUs (default: the model's, or 7.5)")
    au_guidance_scale: float | None = option(
        None, "... and the AUs, apart from the prompt, or none (default: the model's, or none)", type=number_or_none
    )
    num_inference_steps: int = option(50, "denoising steps (default: the model's, or 50)")
    height: int | None = option(None, "in pixels (default: the model's)")
    width: int | None = option(None, "in pixels (default: the model's)")


JOB_FIELDS = tuple(field.name for field in fields(Job))


def make_job(values: Mapping, spell: Callable[[str], str] = str, au_names: Sequence[str] = AU_NAMES) -> Job:
    """
    Check raw values of the fields of a `Job`, and make it. `spell` gives the name of a field in messages; `au_names`
    are the AUs of the adapter that will draw it.
    """
    for name in ("prompt", "negative_prompt"):
        text = "" if values.get(name) is None else values[name]
        # The command line and JSON can contain lone surrogates (halves of characters), which no file can.
        if not isinstance(text, str) or re.search("[\ud800-\udfff]", text):
            raise ValueError(f"`{spell(name)}` has to be Unicode text, but is {show_value(text)}.")
        if len(text) > MAX_PROMPT_LENGTH:
            raise ValueError(f"`{spell(name)}` has {len(text)} characters. At most {MAX_PROMPT_LENGTH} are allowed.")
    prompt, tag = action_units.extract_au_tags(values.get("prompt") or "", spell("prompt"), au_names)
    if not prompt.strip():
        raise ValueError(f"`{spell('prompt')}` is empty. Say what to draw, such as 'a girl in a park'.")
    if tag is not None and values.get("aus") is not None:
        raise ValueError(f"AUs stand in `{spell('prompt')}` and in `{spell('aus')}`. Write them in one of the two.")
    expressions = {"aus": values.get("aus") if tag is None else tag, "negative_aus": values.get("negative_aus")}
    written = {
        name: None if aus is None else canonical_aus(aus, spell(name), au_names) for name, aus in expressions.items()
    }
    job = Job(**{**values, "prompt": prompt, **written})
    for name, low, high in (("seed", 0, MAX_SEED), ("num_inference_steps", 1, 1000)):
        check_integer(spell(name), getattr(job, name), low, high)
    for name in ("height", "width"):
        value = getattr(job, name)
        if value is not None and (not is_integer(value) or not 8 <= value <= MAX_SIDE or value % 8):
            raise ValueError(
                f"`{spell(name)}` is in pixels and has to be a multiple of 8 up to {MAX_SIDE}, but is"
                f" {show_value(value)}."
            )
    for name in ("au_scale", "guidance_scale", "au_guidance_scale"):
        value = getattr(job, name)
        if not is_real(value) and (name, value) != ("au_guidance_scale", None):
            raise ValueError(f"`{spell(name)}` has to be a finite number, but is {show_value(value)}.")
    if job.aus is None and job.negative_aus is not None:
        raise ValueError(f"`{spell('negative_aus')}`, the AUs to guide away from, needs `{spell('aus')}` to guide to.")
    return job


def canonical_aus(aus, label: str, au_names: Sequence[str] = AU_NAMES) -> str:
    """Rewrite one expression, in any form of `parse_aus`, as `format_aus` does; `label` is its name in messages."""
    intensities = read_aus(aus, label, au_names)
    if len(intensities) != 1:
        raise ValueError(f"`{label}` holds {len(intensities)} expressions, but a picture has one. Make a job of each.")
    return format_aus(intensities, au_names)


def intensities_of(job: Job, au_names: Sequence[str] = AU_NAMES) -> dict[str, float]:
    return dict(zip(au_names, read_aus(job.aus or "", au_names=au_names)[0], strict=True))


# ---- Files ----------------------------------------------------------------------------------------------------------


def read_model_defaults(model: str) -> dict:
    """
    Read the settings that suit a model best, from the optional `fineface.json` in its folder: `num_inference_steps`,
    `guidance_scale`, `au_guidance_scale`, and `size`, which becomes `height` and `width` in pixels.
    """
    path = Path(model) / MODEL_DEFAULTS_NAME
    if not path.is_file():
        return {}
    defaults = read_json_file(path)
    with errors_at(path):
        check_keys(defaults, ("num_inference_steps", "guidance_scale", "au_guidance_scale", "size"))
        if "size" in defaults:
            defaults["height"] = defaults["width"] = defaults.pop("size")
        make_job({"prompt": "any", **defaults})
    return defaults


def read_jobs(path: Path, defaults: Mapping, au_names: Sequence[str] = AU_NAMES) -> dict[str, Job]:
    """
    Read the jobs of a JSON Lines file, by the names of their pictures. A job without `output` is named by its line:
    `00001.png`.

    Raises:
        ValueError: if a line is no JSON object, or has an unknown key or a wrong value. The message has its number.
    """
    jobs, numbers = {}, {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        with errors_at(f"{path}, line {number}"):
            values = read_json_object(line)
            check_keys(values, (*JOB_FIELDS, "output"))
            name = _check_name(values.pop("output", f"{number:05d}.png"))
            # Some file systems do not distinguish upper from lower case.
            first_number = numbers.setdefault(name.casefold(), number)
            if first_number != number:
                raise ValueError(f"`output` is {name!r}, as in line {first_number}. Each job needs its own.")
            jobs[name] = make_job({**defaults, **values}, au_names=au_names)
    if not jobs:
        raise ValueError(f"{path} holds no job. Write one JSON object a line.")
    for name in jobs:
        for folder in map(str, PurePosixPath(name).parents):
            if folder.casefold() in numbers:
                raise ValueError(
                    f"{path}, line {numbers[name.casefold()]}: `output` is {name!r}, but {folder!r} is the picture of"
                    f" line {numbers[folder.casefold()]}, and no folder."
                )
    return jobs


@contextmanager
def errors_at(place) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def read_json_object(data: bytes) -> dict:
    try:
        values = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"this is no JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"this is no JSON object, but {show_value(values)}.")
    return values


def read_json_file(path: Path) -> dict:
    """The JSON object in a file; the errors name it."""
    with errors_at(path):
        return read_json_object(path.read_bytes())


def check_keys(values: Mapping, known: tuple[str, ...]) -> None:
    unknown = [key for key in values if key not in known]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no key here. The keys are {', '.join(known)}.")


def is_animation(args) -> bool:
    """Whether the arguments of `generate.py` ask for an animation."""
    return args.aus_from is not None and args.output.suffix.lower() in ANIMATION_SUFFIXES


def _check_name(name) -> str:
    is_name = isinstance(name, str) and name.isprintable() and name.lower().endswith(".png")
    # The rules of Windows hold on every system, because a folder that is made here may be copied there.
    if not is_name or set(name) & set('\\:*?"<>|') or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(
            f"`output` has to name a .png file inside the `--output` folder, but is {show_value(name)}. Folders are"
            ' divided by /, and \\ : * ? " < > | are not allowed.'
        )
    if any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in Path(name).parts):
        raise ValueError(f"`output` is {show_value(name)}, a name of more than {MAX_NAME_BYTES} bytes.")
    return Path(name).as_posix()


# ---- Tables of AUs --------------------------------------------------------------------------------------------------


def read_table_jobs(
    path: Path,
    job: Job,
    tool: str | None = None,
    face: int | None = None,
    max_rows: int | None = None,
    say: Callable[[str], None] = _logger.warning,
    au_names: Sequence[str] = AU_NAMES,
) -> tuple[dict[str, Job], int]:
    """
    Make a job from each row of a table: `job` with the AUs of the row. `tool`, `say` and `au_names` are as
    `read_au_table` takes them. If the table numbers the faces of a picture (`face_id`), `face` is the one to draw, by
    default that of the first row with a face; rows of other faces are skipped, and `say` gets their number. Returns
    the jobs by the names of their pictures, which have the row's line and name (`00002_frame_1.png`), and the number
    of rows that are skipped because no face was found.

    Raises:
        OSError, ValueError: if the table cannot be read, has too many rows, or has no row to draw.
    """
    jobs, num_skipped, asked_face, others = {}, 0, face, Counter()
    for row in read_au_table(path, tool, say=say, au_names=au_names):
        if row.face is not None and row.face_found:
            face = row.face if face is None else face
        if row.face_found and row.face is not None and row.face != face:
            others[row.face] += 1
        elif not row.face_found:
            num_skipped += 1
        else:
            name = re.sub(r"[^\w.-]+", "_", Path(row.name).stem)[:60]
            jobs[f"{row.line:05d}{'_' * bool(name)}{name}.png"] = replace(job, aus=format_aus(row.aus, au_names))
        if max_rows is not None and len(jobs) + num_skipped > max_rows:
            raise ValueError(
                f"{path} has more than {max_rows} rows, and {max_rows} are allowed here. Divide the table, or use"
                " `generate.py --aus-from`."
            )
    if not jobs and others:
        raise ValueError(f"{path} has no face {face}. It has the faces {', '.join(map(str, sorted(others)))}.")
    if not jobs:
        raise ValueError(f"{path} holds no row with a face; {num_skipped} rows are without.")
    if others and asked_face is None:
        rows = ", ".join(f"{number} ({count:,} rows)" for number, count in sorted(others.items()))
        say(f"{path} has several faces. Face {face} ({len(jobs):,} rows) is drawn, and left out are {rows}.")
    return jobs, num_skipped


def interpolate_jobs(key_jobs: list[Job], frames_between: int, au_names: Sequence[str] = AU_NAMES) -> dict[str, Job]:
    """Make the frames of an animation: between two of `key_jobs`, the AUs change evenly over `frames_between` more."""
    keys, count = [intensities_of(job, au_names) for job in key_jobs], frames_between + 1
    frames = [
        # Rounding to thousandths, which nobody can see, keeps the AUs in the metadata readable.
        {name: round(value + (second[name] - value) * step / count, 3) for name, value in first.items()}
        for first, second in itertools.pairwise(keys)
        for step in range(count)
    ]
    jobs = (replace(key_jobs[0], aus=format_aus(frame, au_names)) for frame in [*frames, keys[-1]])
    return {f"{number:06d}.png": job for number, job in enumerate(jobs)}


# ---- Sheets: tables of jobs, which become tables of pictures --------------------------------------------------------


def sweep_table(job: Job, sweep: str, au_names: Sequence[str] = AU_NAMES) -> Table[Job]:
    """A row in which one AU rises and the other AUs of `job` stay. `"AU12=0:5:6"` means 6 pictures from 0 to 5."""
    match = re.fullmatch("(?:AU)?0*([0-9]+[LR]?)=([^:]+):([^:]+):([0-9]{1,9})", sweep.strip(), flags=re.IGNORECASE)
    count = int(match[4]) if match else 0
    if not 2 <= count <= MAX_SWEEP_COUNT:
        raise ValueError(
            f"`--sweep` is {sweep!r}. Write AU=FROM:TO:COUNT, such as AU12=0:5:6, with a count from 2 to"
            f" {MAX_SWEEP_COUNT}."
        )
    name = f"AU{match[1].upper()}"
    for end in (match[2], match[3]):
        read_aus(f"{name}={end}", "--sweep", au_names)
    if any(read_aus(job.aus or "", au_names=au_names)[0][column] for column in au_columns(au_names)[name]):
        raise ValueError(f"`--sweep` and `--aus` both set {name}. Take it out of `--aus`.")
    first, last = float(match[2]), float(match[3])
    values = [first + (last - first) * i / (count - 1) for i in range(count)]
    row = [with_au(job, name, value, au_names) for value in values]
    return Table([row], [_label(name)], [f"{value:.3g}" for value in values])


def grid_table(job: Job, au_names: Sequence[str] = AU_NAMES, rows: slice = slice(None)) -> Table[Job]:
    """For each of `au_names[rows]`, a row in which it rises and the other AUs of `job` stay."""
    names = au_names[rows]
    jobs = [[with_au(job, name, value, au_names) for value in GRID_INTENSITIES] for name in names]
    return Table(jobs, [_label(name) for name in names], [str(value) for value in GRID_INTENSITIES])


def preset_table(job: Job, expressions: list[str], au_names: Sequence[str] = AU_NAMES) -> Table[Job]:
    """A row of expressions in any form of `parse_aus`, each labelled as it was written."""
    jobs = [replace(job, aus=canonical_aus(aus, "--presets", au_names)) for aus in expressions]
    return Table([jobs], [], expressions)


def demo_tables(job: Job, au_names: Sequence[str] = AU_NAMES) -> list[list[Table[Job]]]:
    """All AUs in two blocks side by side, and rows of presets below them."""
    half = (len(au_names) + 1) // 2
    grids = [grid_table(job, au_names, rows) for rows in (slice(half), slice(half, None)) if au_names[rows]]
    known = available_presets(au_names)
    rows = [row for row in ([name for name in names if name in known] for names in DEMO_PRESETS) if row]
    presets = [preset_table(job, row, au_names) for row in rows]
    return [grids, [replace(table, row_labels=["" if n else "Presets"]) for n, table in enumerate(presets)]]


def sheet_of(job: Job, args, au_names: Sequence[str]) -> list[list[Table[Job]]] | None:
    """The tables of the sheet that the arguments of `generate.py` ask for, or None."""
    if args.sweep is not None:
        return [[sweep_table(job, args.sweep, au_names)]]
    if args.grid:
        return [[grid_table(job, au_names)]]
    if args.presets is not None:
        expressions = args.presets or list(available_presets(au_names))
        rows = (expressions[i : i + SHEET_COLUMNS] for i in range(0, len(expressions), SHEET_COLUMNS))
        return [[preset_table(job, row, au_names)] for row in rows]
    return demo_tables(job, au_names) if args.demo else None


def with_au(job: Job, name: str, value: float, au_names: Sequence[str] = AU_NAMES) -> Job:
    """`job` with another intensity of one AU, on both sides if `name` says none."""
    changes = {au_names[column]: value for column in au_columns(au_names)[name]}
    return replace(job, aus=format_aus(intensities_of(job, au_names) | changes, au_names))


def _label(name: str) -> str:
    side = {"L": ", left", "R": ", right"}.get(name[-1], "")
    return f"{name}\n{action_units_of([whole_au(name)])[0].facs_name}{side}"
