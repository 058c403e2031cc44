# SPDX-License-Identifier: Apache-2.0
"""Makes a labelled data set for training. Its expressions and prompts are drawn at random from a distribution."""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from action_units import AU_NAMES, read_aus
from drawing.jobs import Job, canonical_aus, check_keys, errors_at, make_job, read_json_object
from program import is_integer, is_real


DEFAULT_DISTRIBUTION = Path(__file__).resolve().parents[1] / "examples" / "dataset_distribution.json"
DATASET_METADATA_NAME = "metadata.jsonl"
PICTURES_PER_FOLDER = 1000


@dataclass(frozen=True)
class Expressions:
    """
    One kind of expression. Either `aus` names its AUs, or `count` says how many AUs are chosen at random: (least,
    most). With `intensity`, (least, most), each AU gets a random intensity; without it, `aus` keep theirs.
    """

    weight: float
    aus: object = None
    count: tuple[int, int] | None = None
    intensity: tuple[float, float] | None = None


@dataclass(frozen=True)
class Distribution:
    """
    The distribution of a data set. In a prompt, `{person}` is replaced by one of `words["person"]`. Each prompt and
    seed make `pictures_per_subject` pictures, each with an expression of its own.
    """

    source: str
    prompts: list[str]
    words: dict[str, list[str]]
    expressions: list[Expressions]
    pictures_per_subject: int = 1


def read_distribution(path: Path, au_names: Sequence[str] = AU_NAMES) -> Distribution:
    """
    Raises:
        OSError: if there is no such file.
        ValueError: if it is no JSON, or has an unknown key or a wrong value. The message names the file.
    """
    with errors_at(path):
        values = read_json_object(path.read_bytes())
        check_keys(values, tuple(field.name for field in fields(Distribution)))
        for key in ("source", "prompts", "words", "expressions"):
            if not values.get(key):
                raise ValueError(f"`{key}` is missing or empty.")
        words, per_subject = values["words"], values.get("pictures_per_subject", 1)
        if not isinstance(values["source"], str) or not is_integer(per_subject) or per_subject < 1:
            raise ValueError("`source` has to be text, and `pictures_per_subject` a whole number from 1 on.")
        if not isinstance(words, dict) or not all(_is_list_of_text(entry) for entry in words.values()):
            raise ValueError("`words` has to be an object with a list of words for each name.")
        if not _is_list_of_text(values["prompts"]) or not isinstance(values["expressions"], list):
            raise ValueError("`prompts` has to be a list of texts, and `expressions` a list of objects.")
        for prompt in values["prompts"]:
            unknown = [name for name in re.findall(r"\{(.*?)\}", prompt) if name not in words]
            if unknown:
                raise ValueError(f"{prompt!r} asks for {{{unknown[0]}}}, but `words` has {', '.join(words)}.")
        values["expressions"] = [
            _read_expressions(entry, f"expressions[{index}]", au_names)
            for index, entry in enumerate(values["expressions"])
        ]
    return Distribution(**values)


def _read_expressions(values, label: str, au_names: Sequence[str]) -> Expressions:
    with errors_at(f"`{label}`"):
        if not isinstance(values, dict):
            raise ValueError("this is no JSON object.")
        check_keys(values, tuple(field.name for field in fields(Expressions)))
        if ("aus" in values) == ("count" in values):
            raise ValueError("give either `aus`, or the `count` of AUs to choose.")
        weight = values.get("weight")
        if not is_real(weight) or weight <= 0:
            raise ValueError(f"`weight` has to be a number above 0, but is {weight!r}.")
        for key, high, is_number in (("count", len(au_names), is_integer), ("intensity", 5, is_real)):
            ends = values.get(key)
            if key in values:
                is_range = isinstance(ends, list) and len(ends) == 2 and all(map(is_number, ends))
                if not is_range or not 0 <= ends[0] <= ends[1] <= high:
                    raise ValueError(f"`{key}` has to be [least, most] within 0 and {high}, but is {ends!r}.")
                values[key] = tuple(ends)
        if "count" in values and "intensity" not in values:
            raise ValueError("AUs that are chosen need an `intensity`, such as [0.5, 5].")
        if "aus" in values:
            aus = read_aus(canonical_aus(values["aus"], "aus", au_names), au_names=au_names)[0]
            if min(aus) < 0 or max(aus) > 5:
                raise ValueError("labels go from 0 to 5, but `aus` goes beyond.")
    return Expressions(**values)


def _is_list_of_text(values) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(text, str) and text for text in values)


def draw_dataset(
    distribution: Distribution, num_pictures: int, defaults: Mapping, au_names: Sequence[str] = AU_NAMES
) -> tuple[dict[str, Job], dict[str, dict]]:
    """
    Returns jobs by the names of their pictures, and by the same names the rows of metadata that `train_fineface.py`
    reads. A picture depends only on its number, so a larger data set begins with the pictures of a smaller one.
    """
    values, jobs, rows = dict(defaults), {}, {}
    seed = values.pop("seed", 0)
    for number in range(num_pictures):
        subject = f"{seed}-{number // distribution.pictures_per_subject:06d}"
        rng = random.Random(f"subject {subject}")
        template = rng.choice(distribution.prompts)
        prompt = re.sub(r"\{(.*?)\}", lambda match, rng=rng: rng.choice(distribution.words[match[1]]), template)
        picture_seed = rng.randrange(2**32)
        aus = _draw_aus(distribution.expressions, random.Random(f"expression {seed}-{number}"), au_names)
        name = f"images/{number // PICTURES_PER_FOLDER:03d}/{number:06d}.png"
        jobs[name] = make_job({**values, "prompt": prompt, "aus": aus, "seed": picture_seed}, au_names=au_names)
        labels = {"source": distribution.source, "subject": f"{distribution.source}-{subject}"}
        rows[name] = {"file_name": name, "text": prompt, **{unit: aus.get(unit, 0.0) for unit in au_names}, **labels}
    return jobs, rows


def _draw_aus(expressions: list[Expressions], rng: random.Random, au_names: Sequence[str]) -> dict[str, float]:
    kind = rng.choices(expressions, [kind.weight for kind in expressions])[0]
    if kind.count is not None:
        aus = dict.fromkeys(rng.sample(au_names, rng.randint(*kind.count)), 0.0)
    else:
        # Rounded, because a preset at a strength of 0.1 reads 0.30000000000000004.
        values = read_aus(kind.aus, au_names=au_names)[0]
        aus = {name: round(value, 4) for name, value in zip(au_names, values, strict=True) if value}
    return aus if kind.intensity is None else {name: round(rng.uniform(*kind.intensity), 2) for name in aus}


def check_dataset_folder(folder: Path, num_pictures: int) -> None:
    """Raise an error if `folder` has a larger data set, finished or not: some of its pictures would have no label."""
    numbers = [int(path.stem) for path in folder.glob("images/*/*.png") if path.stem.isdecimal()]
    num_found = max(numbers, default=-1) + 1
    if num_found > num_pictures:
        raise ValueError(
            f"{str(folder)!r} holds a data set of {num_found} pictures, and `--dataset` is {num_pictures}. Use another"
            " `--output`, or ask for as many or more."
        )
