"""
The 12 facial Action Units (AUs) of the model, ready-made expressions, and every way to write AUs down.

An AU is one visible muscle movement of the Facial Action Coding System (FACS; Ekman, Friesen & Hager 2002), which
grades its intensity A–E, here 1–5; 0 is absent. All 12 move both sides of the face alike.

Example:
    >>> AU_NAMES[6], PRESETS["polite smile"].aus
    ('AU12', {'AU12': 3.0})
    >>> format_aus("6C+12D")
    'AU6=3 AU12=4'
    >>> parse_aus(["doubtful@0.5", {"AU6": 2.5, "AU12": 5}]).shape
    torch.Size([2, 12])
"""

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real

import torch


# Intensities beyond FACS extrapolate (paper Fig. 8); past this size a number is more likely a slip than a wish.
MAX_INTENSITY = 10

GRADES = {"A": 1, "B": 2, "C": 3, "D": 4, "E": 5}


@dataclass(frozen=True)
class ActionUnit:
    """One AU: its `name` ("AU12"), FACS name, muscles, the facial `region` it moves, and a `hint` in plain words."""

    name: str
    facs_name: str
    muscles: str
    region: str
    hint: str


ACTION_UNITS = (
    ActionUnit("AU1", "Inner Brow Raiser", "frontalis, pars medialis", "brow", "lifts the inner ends of the brows"),
    ActionUnit("AU2", "Outer Brow Raiser", "frontalis, pars lateralis", "brow", "lifts the outer ends of the brows"),
    ActionUnit("AU4", "Brow Lowerer", "corrugator and depressor supercilii, depressor glabellae", "brow", "a frown"),
    ActionUnit("AU5", "Upper Lid Raiser", "levator palpebrae superioris", "eye", "opens the eyes wide"),
    ActionUnit("AU6", "Cheek Raiser", "orbicularis oculi, pars orbitalis", "cheek", "lifts the cheeks: smiling eyes"),
    ActionUnit("AU9", "Nose Wrinkler", "levator labii superioris alaeque nasi", "nose", "wrinkles the nose"),
    ActionUnit("AU12", "Lip Corner Puller", "zygomaticus major", "mouth", "pulls the mouth corners up: a smile"),
    ActionUnit("AU15", "Lip Corner Depressor", "depressor anguli oris", "mouth", "pulls the mouth corners down"),
    ActionUnit("AU17", "Chin Raiser", "mentalis", "chin", "pushes chin and lower lip up: a pout"),
    ActionUnit("AU20", "Lip Stretcher", "risorius, platysma", "mouth", "stretches the mouth sideways"),
    ActionUnit("AU25", "Lips Part", "depressor labii, relaxed mentalis, orbicularis oris", "mouth", "parts the lips"),
    ActionUnit("AU26", "Jaw Drop", "relaxed masseter, temporalis and internal pterygoid", "jaw", "lets the jaw drop"),
)

AU_NAMES = tuple(action_unit.name for action_unit in ACTION_UNITS)


@dataclass(frozen=True)
class Preset:
    """A named expression: FACS intensities by AU name, and where they are taken from or why."""

    aus: dict[str, float]
    source: str


def _preset(facs: str, source: str) -> Preset:
    return Preset({f"AU{item[:-1]}": float(GRADES[item[-1]]) for item in facs.split("+") if item}, source)


def _compound(prototype: str, variants: str) -> Preset:
    """
    A compound emotion of Du, Tao & Martinez (PNAS 2014), Table 1: `prototype` AUs, which most people showed, at D, and
    `variants`, which some people added, at B. AUs that the model has not are left out; a prototypical AU10 (upper lip
    raiser) leaves its place to AU9, the other muscle of disgust, at C.
    """
    prototype_numbers = prototype.split("+")
    grades = dict.fromkeys(variants.split("+"), "B") | dict.fromkeys(prototype_numbers, "D")
    if "10" in prototype_numbers:
        grades["9"] = "C"
    known = sorted((number for number in grades if f"AU{number}" in AU_NAMES), key=int)
    missing = sorted(grades.keys() - known, key=int)
    source = f"Du, Tao & Martinez 2014, Table 1: {prototype}; some people also {variants}."
    if missing:
        source += f" Without AU{', AU'.join(missing)}" + (" (AU9 for AU10)." if "10" in prototype_numbers else ".")
    return _preset("+".join(number + grades[number] for number in known), source)


PRESETS = {
    "neutral": _preset("", "FACS: no AU is active."),
    # The six basic emotions and contempt: EMFACS prototypes (Friesen & Ekman 1983) as far as the 12 AUs go.
    "happy": _preset("6D+12D", "EMFACS 6+12, the Duchenne smile."),
    "sad": _preset("1D+4C+15D", "EMFACS 1+4+15."),
    "surprised": _preset("1D+2D+5B+25C+26D", "EMFACS 1+2+5B+26; AU25 because a dropped jaw parts the lips."),
    "fearful": _preset("1D+2D+4C+5D+20D+25C+26B", "EMFACS 1+2+4+5+7+20+26, without AU7; AU25 as in 'surprised'."),
    "angry": _preset("4E+5C+17C", "EMFACS 4+5+7+23. AU7 and 23 are missing; AU17 presses the lips in their place."),
    "disgusted": _preset("9D+15B+17C", "EMFACS 9+15+16. AU16 is missing; AU17 as in Du et al. 2014: 9+10+17."),
    # Contempt is one-sided and needs AU14; 12 symmetric AUs can only say its mood.
    "contemptuous": _preset("4A+12A+17B", "EMFACS R12A+R14A, here two-sided without AU14: faint smile, raised chin."),
    "happily surprised": _compound("1+2+12+25", "5+26"),
    "happily disgusted": _compound("10+12+25", "4+6+9"),
    "sadly fearful": _compound("1+4+20+25", "2+5+6+15"),
    "sadly angry": _compound("4+15", "6+7+11+17"),
    "sadly surprised": _compound("1+4+25+26", "2+6"),
    "sadly disgusted": _compound("4+10", "1+6+9+11+15+17+25"),
    "fearfully angry": _compound("4+20+25", "5+7+10+11"),
    "fearfully surprised": _compound("1+2+5+20+25", "4+10+11+26"),
    "fearfully disgusted": _compound("1+4+10+20+25", "2+5+6+9+15"),
    "angrily surprised": _compound("4+25+26", "5+7+10"),
    "angrily disgusted": _compound("4+10+17", "7+9+24"),
    "disgustedly surprised": _compound("1+2+5+10", "4+9+17+24"),
    "appalled": _compound("4+10", "6+9+17+24"),
    "hatred": _compound("4+10", "7+9+17+24"),
    "awed": _compound("1+2+5+25", "4+20+26"),
    # Faces that no emotion word covers. Where no study is named, the reason is the movement itself.
    "amazed": _preset("1D+2D+5C+12B+25D+26D", "'surprised' at its widest, with the trace of a welcoming smile."),
    "bittersweet": _preset("1C+6B+12C+15B", "The brow of 'sad' over a smile that the mouth corners resist."),
    "bored": _preset("1A+15B+17B", "A slack, sinking mouth under idle brows. The drooping lids (AU43) are missing."),
    "concentrated": _preset("4C+17B", "Darwin 1872, ch. 9: a mind that meets difficulty frowns; lips held firmly."),
    "confused": _preset("1A+4D+25B", "Rozin & Cohen 2003: the furrowed brow; lips parted on the question."),
    "determined": _preset("4C+5B+17D", "Darwin 1872, ch. 9: firmly closed mouth, lowered brow. AU17 stands for AU24."),
    "disapproving": _preset("4D+15A+17C", "Benitez-Quiroz et al. 2016, 'The not face': 4+17, without 14, 24."),
    "doubtful": _preset("1C+2C+15C+17D", "The shrug: brows up over a horseshoe mouth (Ekman 1979, 'About brows')."),
    "focused": _preset("4B+5B", "Attention: eyes open on the task under a light frown, mouth at rest."),
    "greeting": _preset("1C+2C+6B+12C", "The eyebrow flash with a smile (Eibl-Eibesfeldt 1972)."),
    "grimace": _preset("4B+6C+9C+20D+25D", "Bared teeth in a wide mouth, eyes squeezed: strain or an awkward moment."),
    "interested": _preset("1B+2B+5B+25A", "Darwin 1872, ch. 12: attention, the first grade of surprise."),
    "laughing": _preset("6E+12E+25D+26C", "Ruch & Ekman 2001: AU6+12 with the mouth open."),
    "nervous smile": _preset("1C+4A+12B+20C+25B", "A smile across the stretched mouth and brow of fear."),
    "pained": _preset("4D+6D+9C+20B+25B", "Prkachin & Solomon 2008: 4, 6 or 7, 9 or 10, 43; here without AU43."),
    "playful": _preset("1B+2C+6C+12C+25C+26C", "The open-mouthed play face (van Hooff 1972) with a teasing brow."),
    "pleading": _preset("1E+5B+17B", "Puppy eyes: the inner brow alone (Waller et al. 2013)."),
    "polite smile": _preset("12C", "The smile of courtesy: AU12 without AU6 (Ekman, Davidson & Friesen 1990)."),
    "pouting": _preset("4B+15C+17E", "Chin and lower lip pushed up, corners down. The pucker (AU18) is missing."),
    "relieved": _preset("1B+6A+12B+25C+26B", "A breath let out: loose jaw, parted lips, the start of a smile."),
    "shy": _preset("1B+12B+15A+17C", "Keltner 1995: a smile held back, AU12 against the muscles that pull it down."),
    "skeptical": _preset("2C+4C+17B", "One brow up, one down; in symmetric AUs the outer ends up, the inner down."),
    "squinting": _preset("4B+6E+9A", "Eyes narrowed against light. AU7 is missing; AU6 narrows them from below."),
    "tired": _preset("1B+15A+25B+26B", "Muscles let go: the jaw hangs a little and the corners sink."),
    "worried": _preset("1D+4C+20A", "Darwin 1872, ch. 7: the grief muscles, inner brows up and together."),
}

_WAYS_TO_WRITE_AUS = (
    'Give a dict ({"AU6": 2.5, "AU12": 5}), a string ("AU6=2.5 AU12=5", "6C+12D", "doubtful", "doubtful@0.5"), '
    f"{len(AU_NAMES)} numbers in the order of `AU_NAMES`, or a list with one of these per prompt."
)


def parse_aus(
    aus: str | Mapping[str | int, float] | Preset | torch.Tensor | list | tuple, argument: str = "aus"
) -> torch.Tensor:
    r"""
    Read AUs in any of their forms.

    Args:
        aus (`dict`, `str`, `Preset`, `torch.Tensor`, `numpy.ndarray`, `list` or `tuple`):
            One expression, or a list with one per prompt. AUs that are not named are 0; letter case never matters.

            - dict: intensities by AU. Keys are `"AU6"`, `"AU06"`, `"6"` or `6`. `{}` is the neutral face.
            - string of numbers: `"AU6=2.5 AU12=5"` or `"6=2.5, 12=5"`.
            - string in FACS notation: `"6C+12D"`, `"AU6 AU12"`. Grades A–E are 1–5, a bare AU is C = 3.
            - string with a preset: `"polite smile"`, `"polite_smile"`, at half strength `"polite smile@0.5"`.
              `"neutral"` and `""` are the neutral face.
            - numbers: `(12,)` or `(batch, 12)` in the order of `AU_NAMES`. A flat list of numbers is one expression.
        argument (`str`, defaults to `"aus"`):
            What error messages call the input.

    Returns:
        `torch.Tensor` of shape `(batch, 12)`, `float32`, on the CPU, in FACS intensity units. Values outside [0, 5]
        extrapolate.

    Raises:
        ValueError: if the input has another form, names an unknown AU, preset or grade, gives an AU twice, or holds a
            number that is not finite or beyond ±`MAX_INTENSITY`.

    Example:
        >>> parse_aus("6+12E")[0, [4, 6]]
        tensor([3., 5.])
    """
    values = _without_arrays(aus, argument)
    if not isinstance(values, list | tuple) or _are_numbers(values):
        rows = [_parse_one(values, argument)]
    elif len(values) == 0:
        raise ValueError(f"`{argument}` is empty. {_WAYS_TO_WRITE_AUS}")
    else:
        rows = [_parse_one(value, f"{argument}[{index}]") for index, value in enumerate(values)]
    return torch.tensor(rows, dtype=torch.float32)


def format_aus(vector: torch.Tensor | list | tuple | str | Mapping[str | int, float] | Preset) -> str:
    """
    Write one expression as the shortest string that `parse_aus` reads back to the same `float32` numbers. AUs at 0 are
    left out; when all are 0, the string is `"neutral"`.

    Args:
        vector (`torch.Tensor` or `list`):
            12 intensities in the order of `AU_NAMES`, or any other form of one expression that `parse_aus` reads.

    Raises:
        ValueError: if `parse_aus` cannot read `vector`, or if it holds more than one expression.
    """
    rows = parse_aus(vector, "vector")
    if len(rows) != 1:
        raise ValueError(f"`vector` holds {len(rows)} expressions, but one string holds one. Format them one by one.")
    items = (f"{name}={_shortest(value)}" for name, value in zip(AU_NAMES, rows[0].tolist(), strict=True) if value)
    return " ".join(items) or "neutral"


def extract_au_tags(prompt: str, argument: str = "prompt") -> tuple[str, str | None]:
    """
    Take the AU tag out of a prompt, for callers that can send only text.

    A tag is text in angle brackets that starts with an AU (`<AU6=3 AU12=5>`, `<AU12D>`), joins FACS items by plus
    (`<6C+12D>`), starts with a number and an equals sign (`<6=3 12=5>`), or is a preset (`<doubtful>`) or a name with
    a strength (`<doubtful@0.5>`). All other brackets stay: `<my-token>`, `<sks>`, `<2d>`, `<lora:x:1>`.

    Returns:
        The prompt without the tag, and the tag's text for `parse_aus`, or `None` without one.

    Raises:
        ValueError: if the tag cannot be read as AUs, if `<AU6=…` is not closed, or if there is more than one tag.

    Example:
        >>> extract_au_tags("a boy <AU6=3 AU12=5> in a park")
        ('a boy in a park', 'AU6=3 AU12=5')
    """
    if not isinstance(prompt, str):
        raise ValueError(f"`{argument}` is no string, but of type {type(prompt).__name__}. Pass one prompt at a time.")
    open_tag = re.search(r"<\s*AU ?[0-9][^<>]*(?:<|\Z)", prompt, flags=re.ASCII | re.IGNORECASE)
    if open_tag:
        raise ValueError(f"`{argument}` opens an AU tag with {_show(open_tag[0])} and never closes it with '>'.")
    tags = [match for match in re.finditer("<([^<>]*)>", prompt) if _is_au_tag(match[1])]
    if not tags:
        return prompt, None
    if len(tags) > 1:
        raise ValueError(f"`{argument}` has {len(tags)} AU tags. Write all AUs into one, such as <AU6=3 AU12=5>.")
    tag = tags[0]
    text = " ".join(tag[1].split())
    parse_aus(text, argument)
    before, after = prompt[: tag.start()].rstrip(), prompt[tag.end() :].lstrip()
    gap = "" if not before or not after or after[0] in ",.;:!?)" else " "
    return before + gap + after, text


def parse_aus_per_prompt(
    aus, batch_size: int, argument: str = "aus", num_people: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    The `aus` of a call of the pipeline: one expression for each prompt, or one for all; None leaves it to the prompt.

    Args:
        aus (as for `parse_aus`, or None, or a `list` with None in it):
            The expressions.
        batch_size (`int`):
            Number of prompts.
        argument (`str`, defaults to `"aus"`):
            What error messages call the input.
        num_people (`int`, *optional*):
            With several people in a picture, one for each person, or one for all people. Then a list of expressions
            serves all prompts, and a list of such lists, or a tensor of shape `(batch, people, 12)`, has one for each.

    Returns:
        Intensities of shape `(batch_size, 12)`, and of shape `(batch_size,)` 1 for each row that has AUs and 0 else.
        With a number of people, both have a dimension more, after that of the batch.

    Raises:
        ValueError: as for `parse_aus`, or if the number of expressions fits neither prompts nor people.

    Example:
        >>> intensities, has_aus = parse_aus_per_prompt(["12E", None], 2)
        >>> intensities[:, 6].tolist(), has_aus.tolist()
        ([5.0, 0.0], [1.0, 0.0])
    """
    if num_people is None:
        return _parse_expressions(aus, batch_size, argument, "prompts")
    if not _is_for_each_prompt(aus):
        intensities, has_aus = _parse_expressions(aus, num_people, argument, "masks")
        return intensities.expand(batch_size, -1, -1), has_aus.expand(batch_size, -1)
    if len(aus) != batch_size:
        raise ValueError(
            f"`{argument}` has expressions for {len(aus)} pictures, but there are {batch_size} prompts. Pass a list of"
            " expressions for each prompt, or one list for all."
        )
    rows = [_parse_expressions(entry, num_people, f"{argument}[{i}]", "masks") for i, entry in enumerate(aus)]
    return torch.stack([intensities for intensities, _ in rows]), torch.stack([has_aus for _, has_aus in rows])


def _is_for_each_prompt(aus) -> bool:
    """Whether the entries of `aus` are lists of expressions. A list of numbers is one expression."""
    if not isinstance(aus, list | tuple):
        return getattr(aus, "ndim", 0) == 3
    return any(
        getattr(entry, "ndim", 0) == 2
        or (isinstance(entry, list | tuple) and not all(isinstance(item, Real) for item in entry))
        for entry in aus
    )


def _parse_expressions(aus, count: int, argument: str, counted: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Intensities `(count, 12)` and which rows have AUs `(count,)`."""
    if aus is None:
        return torch.zeros(count, len(AU_NAMES)), torch.zeros(count)
    absent = [entry is None for entry in aus] if isinstance(aus, list | tuple) else [False]
    if any(absent):
        aus = [{} if entry is None else entry for entry in aus]
    intensities = parse_aus(aus, argument)
    has_aus = torch.tensor([not entry for entry in absent]).float() if any(absent) else torch.ones(len(intensities))
    if len(intensities) == 1:
        return intensities.expand(count, -1), has_aus.expand(count)
    if len(intensities) != count:
        raise ValueError(
            f"`{argument}` has {len(intensities)} expressions, but there are {count} {counted}. Pass one for each, or"
            " one for all. For several expressions of one prompt, repeat it: `prompt=[prompt] * len(aus)`; for several"
            " people in one picture, pass a mask for each as `au_masks`."
        )
    return intensities, has_aus


def _without_arrays(aus, label: str):
    """Tensors and numpy arrays as nested lists, anything else as it is."""
    if not isinstance(aus, torch.Tensor):
        # numpy is known by what it can do, so that this file needs torch alone.
        is_array = hasattr(type(aus), "__array__") and hasattr(type(aus), "tolist") and not isinstance(aus, str)
        return aus.tolist() if is_array else aus
    if aus.is_nested or aus.layout != torch.strided or aus.is_complex() or aus.dtype == torch.bool:
        raise ValueError(f"`{label}` is a tensor of {aus.dtype}, {aus.layout}. It needs dense real numbers.")
    if aus.ndim not in (1, 2) or aus.shape[-1] != len(AU_NAMES) or len(aus) == 0:
        raise ValueError(
            f"`{label}` has the shape {tuple(aus.shape)}. It needs ({len(AU_NAMES)},) or (batch, {len(AU_NAMES)}), in "
            "the order of `AU_NAMES`."
        )
    try:
        return aus.detach().cpu().double().tolist()
    except RuntimeError as error:
        raise ValueError(
            f"`{label}` is a tensor of {aus.dtype} on the device {aus.device}, whose numbers cannot be read. Pass a "
            "float32 tensor."
        ) from error


def _parse_one(aus, label: str) -> list[float]:
    """One expression as 12 numbers."""
    values = _without_arrays(aus, label)
    if values is not aus and isinstance(values, list) and values and isinstance(values[0], list):
        if len(values) > 1:
            raise ValueError(f"`{label}` holds {len(values)} expressions, but one prompt takes one. Unpack the array.")
        values = values[0]
    if isinstance(values, str):
        return _parse_string(values, label)
    if isinstance(values, Preset):
        values = values.aus
    if isinstance(values, Mapping):
        return _place(((_au_name(key, label), value) for key, value in values.items()), label)
    if not isinstance(values, list | tuple):
        raise ValueError(f"`{label}` has the type {type(values).__name__}, which names no AUs. {_WAYS_TO_WRITE_AUS}")
    if not _are_numbers(values):
        raise ValueError(f"`{label}` is a {type(values).__name__} of other things than numbers. {_WAYS_TO_WRITE_AUS}")
    if len(values) != len(AU_NAMES):
        raise ValueError(
            f"`{label}` has the wrong count of numbers, {len(values)}. It needs {len(AU_NAMES)}, in the order of "
            f"`AU_NAMES`: {', '.join(AU_NAMES)}."
        )
    return _place(zip(AU_NAMES, values, strict=True), label)


def _parse_string(text: str, label: str) -> list[float]:
    text = " ".join(text.split())
    name, at, strength = text.partition("@")
    preset = _find_preset(name)
    if preset:
        factor = _to_float(strength) if at else 1.0
        if factor is None or not math.isfinite(factor):
            raise ValueError(
                f"`{label}` gives the preset {_show(name)} the strength {_show(strength)}. A strength is a finite "
                'number, such as "doubtful@0.5".'
            )
        return _place(((name, factor * value) for name, value in preset.aus.items()), label)
    if not text:
        return _place((), label)
    is_assignment = "=" in text
    if not is_assignment and not re.search("[0-9]", name):
        raise ValueError(_unknown_preset_message(name, label))
    if at and not is_assignment:
        raise ValueError(f"`{label}` gives {_show(name)} a strength, which only presets take. Write grades: 6C+12D.")
    # FACS literature writes "AU 12", and spaces around separators carry no meaning.
    text = re.sub(r"\bAU (?=[0-9])", "AU", re.sub(" ?([=+,]) ?", r"\1", text), flags=re.ASCII | re.IGNORECASE)
    items = re.split("[, ]" if is_assignment else "[+, ]", text)
    if "" in items:
        raise ValueError(f"`{label}` has a separator without an AU on both sides in {_show(text)}. Take it out.")
    read_item = _read_assignment if is_assignment else _read_facs_item
    return _place((read_item(item, label) for item in items), label)


def _read_assignment(item: str, label: str) -> tuple[str, float]:
    # A bare AU is no assignment: in "AU6=2,5" the 5 ends a number and is not AU5.
    name, equals, value = item.partition("=")
    number = _to_float(value)
    if not equals or number is None:
        raise ValueError(
            f"`{label}` has {_show(item)} where an AU and its number belong. Write AU6=2.5 AU12=5, with a decimal "
            "point, and with spaces or commas between AUs."
        )
    return _au_name(name, label), number


def _read_facs_item(item: str, label: str) -> tuple[str, float]:
    match = re.fullmatch("(.*[0-9])([A-Z]?)", item, flags=re.ASCII | re.IGNORECASE)
    name, grade = match.groups() if match else (item, "")
    if grade.upper() in ("L", "R"):
        name, grade = item, ""
    name = _au_name(name, label)
    if grade and grade.upper() not in GRADES:
        raise ValueError(
            f"`{label}` gives {name} the grade {grade!r}. FACS grades are A, B, C, D, E, which are 1, 2, 3, 4, 5; an "
            f"AU without a grade is C. For other numbers write {name}=2.5."
        )
    return name, float(GRADES[grade.upper() or "C"])


def _au_name(name, label: str) -> str:
    """The entry of `AU_NAMES` that "AU6", "au06", "6" or 6 stand for."""
    if isinstance(name, Integral) and not isinstance(name, bool) and 0 <= name < 1000:
        name = str(name)
    if not isinstance(name, str):
        raise ValueError(f"`{label}` names an AU by {_show(name)}. AUs are named by strings: {', '.join(AU_NAMES)}.")
    match = re.fullmatch(r"([LR]?)(?:AU)?([LR]?)0*([1-9][0-9]*)([LR]?)", name.strip(), flags=re.ASCII | re.IGNORECASE)
    known_name = f"AU{match[3]}" if match else None
    if match and (match[1] or match[2] or match[4]):
        raise ValueError(
            f"`{label}` names {_show(name)}, one side of the face. The {len(AU_NAMES)} AUs are symmetric, both sides "
            "move alike: leave out the L or R."
        )
    if known_name not in AU_NAMES:
        raise ValueError(
            f"`{label}` names {_show(name)}, which this model does not know. It knows {', '.join(AU_NAMES)}."
        )
    return known_name


def _place(pairs: Iterable[tuple[str, Real]], label: str) -> list[float]:
    """Checked intensities in the order of `AU_NAMES`."""
    intensities = {}
    for name, value in pairs:
        if name in intensities:
            raise ValueError(f"`{label}` gives {name} twice. Give each AU once.")
        intensities[name] = _check_intensity(name, value, label)
    return [intensities.get(name, 0.0) for name in AU_NAMES]


def _check_intensity(name: str, value: Real, label: str) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError(f"`{label}` sets {name} to {_show(value)}. An intensity is a number, such as 2.5.")
    # Written so that NaN fails too, and on the number itself, which may be too large for a float.
    if not -MAX_INTENSITY <= value <= MAX_INTENSITY:
        raise ValueError(
            f"`{label}` sets {name} to {_show(value)}. Intensities are finite and go from 0 (absent) to 5 (grade E); "
            f"to extrapolate, from -{MAX_INTENSITY} to {MAX_INTENSITY}."
        )
    return float(value)


def _are_numbers(values) -> bool:
    return len(values) > 0 and all(isinstance(value, Real) for value in values)


def _to_float(text: str) -> float | None:
    """Python's reading of a decimal, without its underscores and foreign digits."""
    try:
        return float(text) if text.isascii() and "_" not in text else None
    except ValueError:
        return None


def _shortest(value: float) -> str:
    # Nine significant digits tell all float32 numbers apart.
    candidates = (float(f"{value:.{digits}g}") for digits in range(1, 10))
    shortest = next(number for number in candidates if torch.tensor(number, dtype=torch.float32).item() == value)
    return repr(shortest).removesuffix(".0")


def _preset_key(name: str) -> str:
    return " ".join(re.sub("[-_]", " ", name).lower().split())


def _find_preset(name: str) -> Preset | None:
    return PRESETS.get(_preset_key(name))


def _unknown_preset_message(name: str, label: str) -> str:
    nearest = difflib.get_close_matches(_preset_key(name[:40]), PRESETS, n=1, cutoff=0.5)
    way_out = f"Did you mean {nearest[0]!r}?" if nearest else f"The presets are: {', '.join(PRESETS)}."
    return f'`{label}` is {_show(name)}, which is no preset and no AUs such as "AU6=3 AU12=5" or "6C+12D". {way_out}'


def _is_au_tag(content: str) -> bool:
    content = " ".join(content.split())
    au = r"(?:AU|[LR])? ?\d+[A-Z]?"
    shapes = rf"AU ?\d.*|{au}(?: ?\+ ?{au})+|\d+ ?=.*|[A-Z _-]+@ ?[-+.\d]+"
    is_preset = _find_preset(content.partition("@")[0]) is not None
    return is_preset or re.fullmatch(shapes, content, flags=re.ASCII | re.IGNORECASE) is not None


def _show(value) -> str:
    """A short `repr` for error messages; of an unknown object only its type, as its `repr` may be anything."""
    if isinstance(value, str):
        return repr(str(value) if len(value) <= 40 else value[:37] + "...")
    if value is None or isinstance(value, bool):
        return repr(value)
    try:
        return f"{float(value):g}" if isinstance(value, Real) else f"a {type(value).__name__}"
    except OverflowError:
        return "a number too large for a float"
