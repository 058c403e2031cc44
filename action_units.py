# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
The Action Units (AUs) of the Facial Action Coding System, ready-made expressions, and every way to write AUs down.

An AU is one visible movement of the face (FACS; Ekman, Friesen & Hager 2002). FACS grades its intensity A–E, here 1–5;
0 is absent. Each adapter knows a list of AUs, its `au_names`: `"AU12"` moves both sides of the face alike; `"AU12L"`
and `"AU12R"` move one side each, where left and right are the person's own. `AU_NAMES` are the twelve of the paper.

Reading and writing AUs needs no torch; only functions that return tensors import it.

Example:
    >>> AU_NAMES[6], PRESETS["polite smile"].aus
    ('AU12', {'AU12': 3.0})
    >>> format_aus("6C+12D")
    'AU6=3 AU12=4'
    >>> parse_aus(["doubtful@0.5", {"AU6": 2.5, "AU12": 5}]).shape
    torch.Size([2, 12])
    >>> format_aus("L12C+26B", au_names=("AU12L", "AU12R", "AU26"))
    'AU12L=3 AU26=2'
"""

import difflib
import math
import re
import struct
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Integral, Real
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import torch


# Intensities beyond FACS extrapolate (paper Fig. 8). A number beyond this limit is more likely a typing error.
MAX_INTENSITY = 10

GRADES = {"A": 1, "B": 2, "C": 3, "D": 4, "E": 5}

AU_NAMES = ("AU1", "AU2", "AU4", "AU5", "AU6", "AU9", "AU12", "AU15", "AU17", "AU20", "AU25", "AU26")


@dataclass(frozen=True)
class ActionUnit:
    """
    One AU of FACS. `hint` describes the movement in plain words. `sided` says whether one side of the face can make it
    alone. `antagonists` names the AUs that move the same part of the face the other way.
    """

    name: str
    facs_name: str
    muscles: str
    region: str
    hint: str
    sided: bool
    antagonists: tuple[str, ...]


_ANTAGONISTS = (
    *((1, 4), (2, 4), (5, 41), (5, 42), (5, 43), (5, 44), (5, 45), (5, 46), (10, 16), (12, 15), (12, 18), (13, 15)),
    *((16, 17), (17, 25), (17, 26), (17, 27), (18, 20), (20, 22), (20, 23), (22, 28), (24, 25), (24, 26), (24, 27)),
    *((25, 28), (26, 31), (27, 31), (34, 35), (38, 39)),
    *((51, 52), (53, 54), (55, 56), (57, 58), (61, 62), (63, 64), (65, 66)),
)
_SIDED = {1, 2, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 20, 33, 34, 35, 41, 42, 43, 44, 45, 46}


def _action_unit(number: int, facs_name: str, muscles: str, region: str, hint: str) -> ActionUnit:
    antagonists = sorted({other for pair in _ANTAGONISTS if number in pair for other in pair} - {number})
    names = tuple(f"AU{other}" for other in antagonists)
    return ActionUnit(f"AU{number}", facs_name, muscles, region, hint, number in _SIDED, names)


# FACS has no AU3 and no AU40. Its edition of 2002 scores AU41 and AU42 as weak AU43, and AU44 as AU7; the table keeps
# these three because detectors and older codings use them.
ACTION_UNITS = tuple(
    _action_unit(*row)
    for row in (
        (1, "Inner Brow Raiser", "frontalis, pars medialis", "brow", "lifts the inner ends of the brows"),
        (2, "Outer Brow Raiser", "frontalis, pars lateralis", "brow", "lifts the outer ends of the brows"),
        (4, "Brow Lowerer", "corrugator and depressor supercilii, depressor glabellae", "brow", "a frown"),
        (5, "Upper Lid Raiser", "levator palpebrae superioris", "eye", "opens the eyes wide"),
        (6, "Cheek Raiser", "orbicularis oculi, pars orbitalis", "cheek", "lifts the cheeks: smiling eyes"),
        (7, "Lid Tightener", "orbicularis oculi, pars palpebralis", "eye", "tightens the lids and narrows the eyes"),
        (8, "Lips Toward Each Other", "orbicularis oris", "mouth", "draws the lips together over an open jaw"),
        (9, "Nose Wrinkler", "levator labii superioris alaeque nasi", "nose", "wrinkles the nose"),
        (10, "Upper Lip Raiser", "levator labii superioris, caput infraorbitalis", "mouth", "lifts the upper lip"),
        (11, "Nasolabial Deepener", "zygomaticus minor", "cheek", "deepens the fold beside the nose"),
        (12, "Lip Corner Puller", "zygomaticus major", "mouth", "pulls the mouth corners up: a smile"),
        (13, "Sharp Lip Puller", "levator anguli oris", "mouth", "pulls the mouth corners straight up"),
        (14, "Dimpler", "buccinator", "mouth", "tightens the mouth corners: dimples"),
        (15, "Lip Corner Depressor", "depressor anguli oris", "mouth", "pulls the mouth corners down"),
        (16, "Lower Lip Depressor", "depressor labii inferioris", "mouth", "pulls the lower lip down"),
        (17, "Chin Raiser", "mentalis", "chin", "pushes chin and lower lip up: a pout"),
        (18, "Lip Pucker", "incisivii labii superioris and inferioris", "mouth", "puckers the lips: a kiss"),
        (19, "Tongue Show", "genioglossus", "mouth", "shows the tongue"),
        (20, "Lip Stretcher", "risorius, platysma", "mouth", "stretches the mouth sideways"),
        (21, "Neck Tightener", "platysma", "neck", "tightens the skin of the neck"),
        (22, "Lip Funneler", "orbicularis oris", "mouth", "pushes the lips out: a funnel"),
        (23, "Lip Tightener", "orbicularis oris", "mouth", "tightens and narrows the lips"),
        (24, "Lip Pressor", "orbicularis oris", "mouth", "presses the lips together"),
        (25, "Lips Part", "depressor labii, relaxed mentalis, orbicularis oris", "mouth", "parts the lips"),
        (26, "Jaw Drop", "relaxed masseter, temporalis and internal pterygoid", "jaw", "lets the jaw drop"),
        (27, "Mouth Stretch", "pterygoids, digastric", "jaw", "stretches the mouth wide open: a yawn"),
        (28, "Lip Suck", "orbicularis oris", "mouth", "sucks the lips in over the teeth"),
        (29, "Jaw Thrust", "lateral pterygoids", "jaw", "pushes the jaw forward"),
        (30, "Jaw Sideways", "pterygoids, temporalis", "jaw", "moves the jaw to one side"),
        (31, "Jaw Clencher", "masseter", "jaw", "clenches the teeth"),
        (32, "Lip Bite", "orbicularis oris, masseter", "mouth", "bites a lip"),
        (33, "Cheek Blow", "relaxed buccinator", "cheek", "blows air out between the lips"),
        (34, "Cheek Puff", "relaxed buccinator, orbicularis oris", "cheek", "puffs the cheeks"),
        (35, "Cheek Suck", "buccinator", "cheek", "sucks the cheeks in"),
        (36, "Tongue Bulge", "tongue", "cheek", "pushes the tongue into a cheek or lip"),
        (37, "Lip Wipe", "tongue", "mouth", "licks the lips"),
        (38, "Nostril Dilator", "nasalis, pars alaris", "nose", "widens the nostrils"),
        (39, "Nostril Compressor", "nasalis, pars transversa", "nose", "narrows the nostrils"),
        (41, "Lid Droop", "relaxed levator palpebrae superioris", "eye", "lets the upper lids droop"),
        (42, "Slit", "orbicularis oculi, pars palpebralis", "eye", "closes the eyes to a slit"),
        (43, "Eyes Closed", "relaxed levator palpebrae superioris", "eye", "closes the eyes; one side alone: a wink"),
        (44, "Squint", "orbicularis oculi, pars palpebralis", "eye", "squeezes the lids together"),
        (45, "Blink", "relaxed levator palpebrae superioris, orbicularis oculi", "eye", "closes the eyes briefly"),
        (46, "Wink", "relaxed levator palpebrae superioris, orbicularis oculi", "eye", "closes one eye briefly"),
        (51, "Head Turn Left", "muscles of the neck", "head", "turns the head to the person's left"),
        (52, "Head Turn Right", "muscles of the neck", "head", "turns the head to the person's right"),
        (53, "Head Up", "muscles of the neck", "head", "lifts the head"),
        (54, "Head Down", "muscles of the neck", "head", "lowers the head"),
        (55, "Head Tilt Left", "muscles of the neck", "head", "tilts the head to the person's left"),
        (56, "Head Tilt Right", "muscles of the neck", "head", "tilts the head to the person's right"),
        (57, "Head Forward", "muscles of the neck", "head", "pushes the head forward"),
        (58, "Head Back", "muscles of the neck", "head", "draws the head back"),
        (61, "Eyes Turn Left", "recti of the eyes", "gaze", "looks to the person's left"),
        (62, "Eyes Turn Right", "recti of the eyes", "gaze", "looks to the person's right"),
        (63, "Eyes Up", "recti of the eyes", "gaze", "looks up"),
        (64, "Eyes Down", "recti of the eyes", "gaze", "looks down"),
        (65, "Walleye", "recti of the eyes", "gaze", "turns the eyes apart"),
        (66, "Cross-Eye", "recti of the eyes", "gaze", "turns the eyes towards the nose"),
    )
)

_BY_NAME = {unit.name: unit for unit in ACTION_UNITS}

# Every AU of FACS; a sided AU appears as its left and its right name.
ALL_AU_NAMES = tuple(f"{unit.name}{side}" for unit in ACTION_UNITS for side in ("LR" if unit.sided else ("",)))
_MIRRORED = {"L": "R", "R": "L", "AU51": "AU52", "AU55": "AU56", "AU61": "AU62"}
_MIRRORED |= {right: left for left, right in _MIRRORED.items()}


def au_columns(au_names: Sequence[str]) -> Mapping[str, tuple[int, ...]]:
    """
    Map each name to its columns in a vector of AUs. If `au_names` has `AU12L` and `AU12R`, `AU12` maps to both.

    Raises:
        ValueError: if `au_names` is empty, holds a name twice, a name that is not a canonical AU of FACS, an AU both
            with and without sides, or one side without the other.

    Example:
        >>> au_columns(("AU12L", "AU12R", "AU26"))
        {'AU12L': (0,), 'AU12R': (1,), 'AU26': (2,), 'AU12': (0, 1)}
    """
    return _au_columns(tuple(au_names))


@lru_cache
def _au_columns(au_names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    if not au_names:
        raise ValueError("`au_names` is empty. An adapter needs at least one AU, such as AU12.")
    columns: dict[str, tuple[int, ...]] = {}
    for index, name in enumerate(au_names):
        unit = _BY_NAME.get(whole_au(name)) if isinstance(name, str) else None
        if unit is None or name not in (unit.name, f"{unit.name}L", f"{unit.name}R"):
            raise ValueError(
                f"`au_names` holds {_show(name)}, which is no AU of FACS. Names are written AU12, or AU12L and AU12R."
            )
        if name != unit.name and not unit.sided:
            raise ValueError(f"`au_names` holds {name}, but {unit.name} ({unit.facs_name}) has no sides.")
        if name in au_names[:index]:
            raise ValueError(f"`au_names` holds {name} twice.")
        columns[name] = (index,)
    for name in au_names:
        whole = whole_au(name)
        if name != whole:
            if whole in au_names or f"{whole}L" not in columns or f"{whole}R" not in columns:
                raise ValueError(
                    f"`au_names` holds {name}, so it needs both {whole}L and {whole}R, and no {whole} beside them."
                )
            columns[whole] = columns[f"{whole}L"] + columns[f"{whole}R"]
    return columns


def whole_au(name: str) -> str:
    """The AU without its side: `"AU12"` for `"AU12L"`."""
    return name.rstrip("LR")


def action_units_of(au_names: Sequence[str] = AU_NAMES) -> tuple[ActionUnit, ...]:
    """The AUs of an adapter in its order. An AU with two sides appears once."""
    au_columns(au_names)
    return tuple(_BY_NAME[name] for name in dict.fromkeys(map(whole_au, au_names)))


def au_projection(from_names: Sequence[str], to_names: Sequence[str]) -> "torch.Tensor":
    r"""
    The matrix that converts intensities between two lists of AUs: `intensities @ au_projection(from_names, to_names)`.

    An AU sets both of its sides, two sides give their mean, and an AU that `from_names` does not have is 0.

    Returns:
        `torch.Tensor` of shape `(len(from_names), len(to_names))`, `float32`.

    Example:
        >>> au_projection(["AU12"], ["AU12L", "AU12R", "AU25"]).tolist()
        [[1.0, 1.0, 0.0]]
        >>> au_projection(["AU12L", "AU12R"], ["AU12"]).tolist()
        [[0.5], [0.5]]
    """
    import torch

    rows = []
    for name in from_names:
        whole = whole_au(name)
        sides = sum(whole_au(other) == whole for other in from_names)
        weights = {whole: 1 / sides, name: 1.0} | ({f"{whole}L": 1.0, f"{whole}R": 1.0} if name == whole else {})
        rows.append([weights.get(target, 0.0) for target in to_names])
    return torch.tensor(rows)


def mirrored_columns(au_names: Sequence[str]) -> list[int]:
    """
    The order of columns that describes the mirrored face: left and right change places, also in turns of head and
    eyes.

    Raises:
        ValueError: if `au_names` has a turn of head or eyes but not the opposite turn.

    Example:
        >>> mirrored_columns(("AU1", "AU12L", "AU12R"))
        [0, 2, 1]
    """
    columns, order = au_columns(au_names), []
    for name in au_names:
        whole = whole_au(name)
        mirrored = _MIRRORED.get(whole, whole) + _MIRRORED.get(name[-1], "")
        if mirrored not in columns:
            raise ValueError(f"`au_names` has {name}, which is {mirrored} in a mirror, and no {mirrored}.")
        order.append(columns[mirrored][0])
    return order


@dataclass(frozen=True)
class Preset:
    """
    A named expression: FACS intensities by AU name, and their `source`, a study or a reason. A preset that names one
    side of an AU needs an adapter that moves this side alone.
    """

    aus: dict[str, float]
    source: str

    def missing_aus(self, au_names: Sequence[str] = AU_NAMES) -> list[str]:
        """Names of the AUs that this preset needs but an adapter with `au_names` does not have."""
        known = au_columns(au_names)
        return [name for name in self.aus if name not in known]


def available_presets(au_names: Sequence[str] = AU_NAMES) -> dict[str, Preset]:
    """The `PRESETS` that an adapter with `au_names` can draw."""
    return {name: preset for name, preset in PRESETS.items() if not preset.missing_aus(au_names)}


def _preset(facs: str, source: str) -> Preset:
    items = (re.fullmatch("([LR]?)([0-9]+)([A-E])", item).groups() for item in facs.split("+") if item)
    return Preset({f"AU{number}{side}": float(GRADES[grade]) for side, number, grade in items}, source)


def _compound(prototype: str, variants: str) -> Preset:
    """
    A compound emotion of Du, Tao & Martinez (PNAS 2014), Table 1. The `prototype` AUs, which most people showed, get
    grade D; the `variants`, which some people added, get B. AUs outside the paper's twelve are left out, and AU9 at C
    replaces a prototypical AU10 (upper lip raiser), because both muscles serve disgust.
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
    # The six basic emotions and contempt follow the EMFACS prototypes (Friesen & Ekman 1983) as far as 12 AUs allow.
    "happy": _preset("6D+12D", "EMFACS 6+12, the Duchenne smile."),
    "sad": _preset("1D+4C+15D", "EMFACS 1+4+15."),
    "surprised": _preset("1D+2D+5B+25C+26D", "EMFACS 1+2+5B+26; AU25 because a dropped jaw parts the lips."),
    "fearful": _preset("1D+2D+4C+5D+20D+25C+26B", "EMFACS 1+2+4+5+7+20+26, without AU7; AU25 as in 'surprised'."),
    "angry": _preset("4E+5C+17C", "EMFACS 4+5+7+23. AU7 and 23 are missing; AU17 presses the lips in their place."),
    "disgusted": _preset("9D+15B+17C", "EMFACS 9+15+16. AU16 is missing; AU17 as in Du et al. 2014: 9+10+17."),
    # Contempt is one-sided and needs AU14, so 12 symmetric AUs can only come near it.
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
    # These faces have no emotion word. If `source` names no study, it describes the movement.
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
    # These faces need AUs beyond the paper's twelve, or one side alone. Left and right are the person's own.
    "contempt": _preset("R12B+R14C", "Ekman & Friesen 1986: R14 with R12; EMFACS prints R12A+R14A, hardly visible."),
    "smirk": _preset("R12D", "FACS scores a smile of one side by itself: R12."),
    "wink": _preset("L43E+6B+12C", "FACS AU46, a wink: AU43 of one eye; meant for somebody, it comes with a smile."),
    "one raised brow": _preset("L1B+L2E", "FACS L1+L2: frontalis of one side lifts one whole brow (Ekman 1979)."),
    "quizzical": _preset("L1B+L2D+R4C", "'skeptical' with sides: one brow up, the other down (Ekman 1979)."),
    "snarl": _preset("4B+L9C+L10E+25B", "Darwin 1872, ch. 10: one canine tooth uncovered, on one side alone."),
    "sneer": _preset("4B+9B+10D", "Darwin 1872, ch. 11: the upper lip drawn up, here on both sides: AU10, some AU9."),
    "tight lipped": _preset("17B+24D", "FACS AU24 presses the lips, AU17 supports: a held-back word or anger."),
    "eyes closed": _preset("43E", "FACS AU43E: the lids are shut."),
    "asleep": _preset("25B+26B+43E", "Shut lids over a jaw that no muscle holds."),
    "drowsy": _preset("15A+26A+43C", "FACS 2002 scores drooping lids as weak AU43 (formerly AU41)."),
    "blissful": _preset("6D+12D+43E", "The Duchenne smile with closed eyes."),
    "yawning": _preset("25E+27E+43D", "FACS AU27, the mouth wide open; the eyes close at the peak (Provine 1986)."),
    "kissing": _preset("18D+22B", "FACS AU18 puckers the lips, AU22 pushes them forward."),
    "funny face": _preset("19D+25C+26C+L43E", "Tongue out (AU19) and one eye shut."),
    "puffed cheeks": _preset("34D", "FACS AU34: air held behind closed lips."),
    "biting a lip": _preset("25A+32C", "FACS AU32: nervous or holding back."),
}


def parse_aus(
    aus: "str | Mapping[str | int, float] | Preset | torch.Tensor | list | tuple",
    argument: str = "aus",
    au_names: Sequence[str] = AU_NAMES,
) -> "torch.Tensor":
    r"""
    Read AUs in any of their forms. Error messages call the input `argument`.

    Args:
        aus (`dict`, `str`, `Preset`, `torch.Tensor`, `numpy.ndarray`, `list` or `tuple`):
            One expression, or a list with one per prompt. AUs that are not named are 0; letter case never matters.

            - dict: intensities by AU. Keys are `"AU6"`, `"AU06"`, `"6"` or `6`; for one side `"AU12L"`, `"12L"` or
              `"L12"`. `{}` is the neutral face.
            - string of numbers: `"AU6=2.5 AU12=5"` or `"6=2.5, 12L=5"`.
            - string in FACS notation: `"6C+12D"`, `"L12C+R4B"`, `"AU6 AU12"`. Grades A–E are 1–5, a bare AU is C = 3.
            - string with a preset: `"polite smile"`, `"polite_smile"`, at half strength `"polite smile@0.5"`.
              `"neutral"` and `""` are the neutral face.
            - string that mixes presets and AUs: `"happy@0.5 + AU4=2"`, `"surprised@0.5 + happy@0.5 + 26C"`. If several
              parts of the mixture move the same AU, it gets their sum.
            - numbers: `(n,)` or `(batch, n)` in the order of `au_names`. A flat list of numbers is one expression.

            `AU12` means both sides where `au_names` has `AU12L` and `AU12R`.
        au_names (`Sequence[str]`, defaults to `AU_NAMES`):
            The AUs of the adapter, see `au_columns`.

    Returns:
        `torch.Tensor` of shape `(batch, len(au_names))`, `float32`, on the CPU, in FACS intensity units. Values
        outside [0, 5] extrapolate.

    Raises:
        ValueError: if the input has another form; names an unknown AU, side, preset or grade; names a preset that the
            adapter cannot draw; gives an AU twice (`AU12` and `AU12L` count as the same); or holds a number that is
            not finite or beyond ±`MAX_INTENSITY`.

    Example:
        >>> parse_aus("6+12E")[0, [4, 6]]
        tensor([3., 5.])
    """
    import torch

    return torch.tensor(read_aus(aus, argument, au_names), dtype=torch.float32)


def read_aus(aus, argument: str = "aus", au_names: Sequence[str] = AU_NAMES) -> list[list[float]]:
    """Read AUs like `parse_aus`, but return lists of numbers and do not import torch."""
    reader = _Reader(argument, tuple(au_names))
    values = reader.without_arrays(aus)
    if not isinstance(values, list | tuple) or _are_numbers(values):
        return [reader.read(values)]
    if len(values) == 0:
        raise reader.error(f"is empty. {reader.ways_to_write()}")
    return [replace(reader, label=f"{argument}[{index}]").read(value) for index, value in enumerate(values)]


def format_aus(
    vector: "torch.Tensor | list | tuple | str | Mapping[str | int, float] | Preset",
    au_names: Sequence[str] = AU_NAMES,
) -> str:
    """
    Write one expression as the shortest string that `parse_aus` reads back to the same `float32` numbers. AUs at 0 are
    left out; when all are 0, the string is `"neutral"`. Two sides with the same intensity are written as one AU.
    `vector` is intensities in the order of `au_names`, or any other form of one expression that `parse_aus` reads.

    Raises:
        ValueError: if `parse_aus` cannot read `vector`, or if it holds more than one expression.
    """
    rows = read_aus(vector, "vector", au_names)
    if len(rows) != 1:
        raise ValueError(f"`vector` holds {len(rows)} expressions, but one string holds one. Format them one by one.")
    values, columns = [_to_float32(value) for value in rows[0]], au_columns(au_names)
    items = {}
    for name, value in zip(au_names, values, strict=True):
        sides_agree = len({values[column] for column in columns[whole_au(name)]}) == 1
        items[whole_au(name) if sides_agree else name] = value
    return " ".join(f"{name}={_shortest(value)}" for name, value in items.items() if value) or "neutral"


def extract_au_tags(
    prompt: str,
    argument: str = "prompt",
    au_names: Sequence[str] = AU_NAMES,
    words: Collection[str] = (),
    with_presets: bool = True,
) -> tuple[str, str | None]:
    """
    Take the AU tag out of a prompt, for callers that can send only text.

    A tag is text in angle brackets that starts with an AU (`<AU6=3 AU12=5>`, `<AU12D>`), joins FACS items by plus
    (`<6C+12D>`, `<L12C+R4B>`), starts with a number and an equals sign (`<6=3 12L=5>`), or is a preset (`<doubtful>`),
    a name with a strength (`<doubtful@0.5>`), or a mixture that starts with a preset (`<happy@0.5 + AU4=2>`). Other
    brackets stay in the prompt: `<my-token>`, `<sks>`, `<2d>`, `<lora:x:1>`. Brackets in `words` stay too; pass the
    tokens that were added to a tokenizer (`<happy>`). Without `with_presets`, presets stay too.

    Returns:
        The prompt without the tag, and the tag's text for `parse_aus`, or `None` if there is no tag.

    Raises:
        ValueError: if the tag cannot be read as AUs, if `<AU6=…` is not closed, or if there is more than one tag.

    Example:
        >>> extract_au_tags("a boy <AU6=3 AU12=5> in a park")
        ('a boy in a park', 'AU6=3 AU12=5')
    """
    if not isinstance(prompt, str):
        raise ValueError(f"`{argument}` is no string, but of type {type(prompt).__name__}. Pass one prompt at a time.")
    open_tag = re.search(r"<\s*AU ?[LR]?[0-9][^<>]*(?:<|\Z)", prompt, flags=re.ASCII | re.IGNORECASE)
    if open_tag:
        raise ValueError(f"`{argument}` opens an AU tag with {_show(open_tag[0])} and never closes it with '>'.")
    brackets = (match for match in re.finditer("<([^<>]*)>", prompt) if match[0] not in words)
    tags = [match for match in brackets if _is_au_tag(match[1], with_presets)]
    if not tags:
        return prompt, None
    if len(tags) > 1:
        raise ValueError(f"`{argument}` has {len(tags)} AU tags. Write all AUs into one, such as <AU6=3 AU12=5>.")
    tag = tags[0]
    text = " ".join(tag[1].split())
    read_aus(text, argument, au_names)
    before, after = prompt[: tag.start()].rstrip(), prompt[tag.end() :].lstrip()
    gap = "" if not before or not after or after[0] in ",.;:!?)" else " "
    return before + gap + after, text


def parse_aus_per_prompt(
    aus, batch_size: int, argument: str = "aus", num_people: int | None = None, au_names: Sequence[str] = AU_NAMES
) -> "tuple[torch.Tensor, torch.Tensor]":
    r"""
    Read the `aus` of a pipeline call: one expression for each prompt, or one for all, each in a form of `parse_aus`.
    None leaves the face to the prompt. With `num_people`, a list has one expression for each person in a picture and
    serves all prompts; a list of such lists, or a tensor of shape `(batch, people, n)`, has them for each prompt.

    Returns:
        Intensities of shape `(batch_size, n)` for the n `au_names`, and a mask of shape `(batch_size,)` that is 1 for
        rows with AUs and 0 for rows without. With `num_people`, both have a dimension of people after the first.

    Raises:
        ValueError: as for `parse_aus`, or if the number of expressions fits neither prompts nor people.

    Example:
        >>> intensities, has_aus = parse_aus_per_prompt(["12E", None], 2)
        >>> intensities[:, 6].tolist(), has_aus.tolist()
        ([5.0, 0.0], [1.0, 0.0])
    """
    import torch

    if num_people is None:
        return _parse_expressions(aus, batch_size, argument, "prompts", au_names)
    if not _is_for_each_prompt(aus):
        intensities, has_aus = _parse_expressions(aus, num_people, argument, "masks", au_names)
        return intensities.expand(batch_size, -1, -1), has_aus.expand(batch_size, -1)
    if len(aus) != batch_size:
        raise ValueError(
            f"`{argument}` has expressions for {len(aus)} pictures, but there are {batch_size} prompts. Pass a list of"
            " expressions for each prompt, or one list for all."
        )
    rows = [_parse_expressions(row, num_people, f"{argument}[{i}]", "masks", au_names) for i, row in enumerate(aus)]
    return torch.stack([intensities for intensities, _ in rows]), torch.stack([has_aus for _, has_aus in rows])


def au_image_embeds(
    aus,
    negative_aus=None,
    au_names: Sequence[str] = AU_NAMES,
    *,
    do_classifier_free_guidance: bool = True,
    num_people: int | None = None,
    dtype: "torch.dtype | None" = None,
) -> "list[torch.Tensor]":
    r"""
    Turn AUs into the `ip_adapter_image_embeds` of a diffusers pipeline. The pipeline must have loaded an adapter of
    ours that was exported as an IP-Adapter, whose image embedding is the vector of AUs itself. Such a pipeline shows
    all embeddings to every prompt of a call, so each prompt gets the mean of different expressions: make one call for
    each of them, or let `au_image_masks` keep them apart.

    Args:
        aus (as for `parse_aus`, or None, or a `list` with None in it):
            One expression for each prompt, or one that serves all. None is the neutral face here: an IP-Adapter is on
            or off for the whole call, so no single prompt can go without it.
        negative_aus (as `aus`, *optional*):
            AUs of the unconditional branch, for each prompt or for all. The default is the neutral face.
        au_names (`Sequence[str]`, defaults to `AU_NAMES`):
            The n AUs of the adapter.
        do_classifier_free_guidance (`bool`, defaults to `True`):
            Whether the `guidance_scale` of the call is above 1. If not, `negative_aus` is not allowed.
        num_people (`int`, *optional*):
            Number of `ip_adapter_masks`; then `aus` is as in `parse_aus_per_prompt`.
        dtype (`torch.dtype`, *optional*):
            The dtype of the pipeline, which does not cast embeddings itself. The default is `torch.float32`.

    Returns:
        A list with one `torch.Tensor`, for one IP-Adapter. Its shape is `(2 * batch, 1, n)` with guidance, negative
        rows first, and `(batch, 1, n)` without; with `num_people`, the 1 is the number of people.

    Raises:
        ValueError: as for `parse_aus_per_prompt`.

    Example:
        >>> [embeds] = au_image_embeds("12D")
        >>> embeds.shape, embeds[:, 0, 6].tolist()
        (torch.Size([2, 1, 12]), [0.0, 4.0])
    """
    import torch

    if num_people is not None:
        is_batch = _is_for_each_prompt(aus)
    else:
        is_batch = getattr(aus, "ndim", 1) == 2 or (isinstance(aus, list | tuple) and not _are_numbers(aus))
    batch_size = max(len(aus), 1) if is_batch else 1
    embeds, _ = parse_aus_per_prompt(aus, batch_size, "aus", num_people, au_names)
    if do_classifier_free_guidance:
        negative, _ = parse_aus_per_prompt(negative_aus, batch_size, "negative_aus", num_people, au_names)
        embeds = torch.cat([negative, embeds])
    elif negative_aus is not None:
        raise ValueError("`negative_aus` needs guidance: without it there is no unconditional branch. Leave it out.")
    return [(embeds if num_people is not None else embeds[:, None]).to(dtype or torch.float32)]


def au_image_masks(
    num_prompts: int,
    num_images_per_prompt: int = 1,
    *,
    do_classifier_free_guidance: bool = True,
    size: tuple[int, int] = (64, 64),
) -> "torch.Tensor":
    r"""
    Make masks that give each prompt of a diffusers call its own expression. Pass them as `cross_attention_kwargs=
    {"ip_adapter_masks": [masks]}`, together with `ip_adapter_image_embeds=au_image_embeds(aus, num_people=len(aus))`.
    The other arguments are as in the call, which has guidance if its `guidance_scale` is above 1; `size` is height and
    width, with the aspect ratio of the pictures.

    Returns:
        `torch.Tensor` of shape `(rows, num_prompts, *size)`, 1 in the mask of each row's own prompt and 0 elsewhere.

    Example:
        >>> au_image_masks(2, do_classifier_free_guidance=False)[:, :, 0, 0].tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    import torch

    rows = torch.eye(num_prompts).repeat_interleave(num_images_per_prompt, dim=0)
    if do_classifier_free_guidance:
        rows = torch.cat([rows, rows])
    return rows[:, :, None, None].expand(-1, -1, *size)


def _is_for_each_prompt(aus) -> bool:
    """Whether the entries of `aus` are lists of expressions. A list of numbers is one expression."""
    if not isinstance(aus, list | tuple):
        return getattr(aus, "ndim", 0) == 3
    return any(
        getattr(entry, "ndim", 0) == 2
        or (isinstance(entry, list | tuple) and not all(isinstance(item, Real) for item in entry))
        for entry in aus
    )


def _parse_expressions(
    aus, count: int, argument: str, counted: str, au_names: Sequence[str]
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Intensities of shape `(count, n)`, and a mask `(count,)` of the rows that have AUs."""
    import torch

    if aus is None:
        return torch.zeros(count, len(au_names)), torch.zeros(count)
    absent = [entry is None for entry in aus] if isinstance(aus, list | tuple) else [False]
    if any(absent):
        aus = [{} if entry is None else entry for entry in aus]
    intensities = parse_aus(aus, argument, au_names)
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


@dataclass(frozen=True)
class _Reader:
    """Reads expressions for an adapter with `au_names`. Messages call what is read `label`."""

    label: str
    au_names: tuple[str, ...]

    def error(self, what: str) -> ValueError:
        return ValueError(f"`{self.label}` {what}")

    def ways_to_write(self) -> str:
        return (
            'Give a dict ({"AU6": 2.5, "AU12": 5}), a string ("AU6=2.5 AU12=5", "6C+12D", "doubtful", "doubtful@0.5"),'
            f" {len(self.au_names)} numbers in the order {', '.join(self.au_names)}, or a list with one of these per"
            " prompt."
        )

    def without_arrays(self, aus):
        """Turn tensors and numpy arrays into nested lists, and return anything else unchanged."""
        torch = sys.modules.get("torch")  # if nobody imported torch, `aus` is no tensor
        if torch is None or not isinstance(aus, torch.Tensor):
            # Recognize arrays by their methods, so that this file does not need numpy.
            is_array = hasattr(type(aus), "__array__") and hasattr(type(aus), "tolist") and not isinstance(aus, str)
            return aus.tolist() if is_array else aus
        if aus.is_nested or aus.layout != torch.strided or aus.is_complex() or aus.dtype == torch.bool:
            raise self.error(f"is a tensor of {aus.dtype}, {aus.layout}. It needs dense real numbers.")
        count = len(self.au_names)
        if aus.ndim not in (1, 2) or aus.shape[-1] != count or len(aus) == 0:
            raise self.error(
                f"has the shape {tuple(aus.shape)}. It needs ({count},) or (batch, {count}), in the order"
                f" {', '.join(self.au_names)}."
            )
        try:
            return aus.detach().cpu().double().tolist()
        except RuntimeError as error:
            raise self.error(
                f"is a tensor of {aus.dtype} on the device {aus.device}, whose numbers cannot be read. Pass a float32"
                " tensor."
            ) from error

    def read(self, aus) -> list[float]:
        """Read one expression as one number for each AU."""
        values = self.without_arrays(aus)
        if values is not aus and isinstance(values, list) and values and isinstance(values[0], list):
            if len(values) > 1:
                raise self.error(f"holds {len(values)} expressions, but one prompt takes one. Unpack the array.")
            values = values[0]
        if isinstance(values, str):
            return self.read_string(values)
        if isinstance(values, Preset):
            values = values.aus
        if isinstance(values, Mapping):
            return self.place((self.au_name(key), value) for key, value in values.items())
        kind = type(values).__name__
        if not isinstance(values, list | tuple):
            raise self.error(f"has the type {kind}, which names no AUs. {self.ways_to_write()}")
        if not _are_numbers(values):
            raise self.error(f"is a {kind} of other things than numbers. {self.ways_to_write()}")
        if len(values) != len(self.au_names):
            raise self.error(
                f"has the wrong count of numbers, {len(values)}. It needs {len(self.au_names)}, in the order"
                f" {', '.join(self.au_names)}."
            )
        return self.place(zip(self.au_names, values, strict=True))

    def read_string(self, text: str) -> list[float]:
        text = re.sub(" ?([=@,]) ?", r"\1", " ".join(text.split()))
        # A plus after = or @ is the sign of a number.
        parts = re.split(r" ?(?<![=@])\+ ?", text)
        if "" in parts and len(parts) > 1:
            raise self.error(f"has a separator without an AU on both sides in {_show(text)}. Take it out.")
        presets = [part for part in parts if _find_preset(part.partition("@")[0])]
        pairs = (pair for part in parts if part not in presets for pair in self.read_items(part))
        rows = [self.place(pairs), *map(self.read_preset, presets)]
        values = map(sum, zip(*rows, strict=True))
        return [self.check_intensity(name, value) for name, value in zip(self.au_names, values, strict=True)]

    def read_preset(self, text: str) -> list[float]:
        name, at, strength = text.partition("@")
        preset = _find_preset(name)
        missing = preset.missing_aus(self.au_names)
        if missing:
            raise self.error(
                f"is the preset {_show(name)}, which needs {', '.join(missing)}, but this model knows"
                f" {', '.join(self.au_names)}. Load an AU adapter that was trained for them."
            )
        factor = _to_float(strength) if at else 1.0
        if factor is None or not math.isfinite(factor):
            raise self.error(
                f"gives the preset {_show(name)} the strength {_show(strength)}. A strength is a finite number, such"
                ' as "doubtful@0.5".'
            )
        return self.place((au, factor * value) for au, value in preset.aus.items())

    def read_items(self, text: str) -> Iterator[tuple[str, float]]:
        """Read the AUs of a string that has no presets and no pluses."""
        if not text:
            return
        name, at, _ = text.partition("@")
        is_assignment = "=" in text
        if not is_assignment and not re.search("[0-9]", name):
            presets = available_presets(self.au_names)
            nearest = difflib.get_close_matches(_preset_key(name[:40]), presets, n=1, cutoff=0.5)
            way_out = f"Did you mean {nearest[0]!r}?" if nearest else f"The presets are: {', '.join(presets)}."
            raise self.error(
                f'is {_show(name)}, which is no preset and no AUs such as "AU6=3 AU12=5" or "6C+12D". {way_out}'
            )
        if at and not is_assignment:
            raise self.error(f"gives {_show(name)} a strength, which only presets take. Write grades: 6C+12D.")
        # FACS literature writes "AU 12", and spaces around separators carry no meaning.
        text = re.sub(r"\bAU (?=[LR]?[0-9])", "AU", text, flags=re.ASCII | re.IGNORECASE)
        items = re.split("[, ]", text)
        if "" in items:
            raise self.error(f"has a separator without an AU on both sides in {_show(text)}. Take it out.")
        yield from map(self.read_assignment if is_assignment else self.read_facs_item, items)

    def read_assignment(self, item: str) -> tuple[str, float]:
        # A bare AU is not allowed here: in "AU6=2,5" the 5 is more likely a decimal than AU5.
        name, equals, value = item.partition("=")
        number = _to_float(value)
        if not equals or number is None:
            raise self.error(
                f"has {_show(item)} where an AU and its number belong. Write AU6=2.5 AU12=5, with a decimal point,"
                " with spaces or commas between AUs, and with a plus before or after a preset."
            )
        return self.au_name(name), number

    def read_facs_item(self, item: str) -> tuple[str, float]:
        match = re.fullmatch("(.*[0-9][LR]?)([A-Z]?)", item, flags=re.ASCII | re.IGNORECASE)
        name, grade = match.groups() if match else (item, "")
        name = self.au_name(name)
        if grade and grade.upper() not in GRADES:
            raise self.error(
                f"gives {name} the grade {grade!r}. FACS grades are A, B, C, D, E, which are 1, 2, 3, 4, 5; an AU"
                f" without a grade is C. For other numbers write {name}=2.5."
            )
        return name, float(GRADES[grade.upper() or "C"])

    def au_name(self, name) -> str:
        """The key of `au_columns` for any spelling: "AU6", "au06", "6", 6; with a side "AU12L", "12L", "L12"."""
        if isinstance(name, Integral) and not isinstance(name, bool) and 0 <= name < 1000:
            name = str(name)
        known = ", ".join(self.au_names)
        if not isinstance(name, str):
            raise self.error(f"names an AU by {_show(name)}. AUs are named by strings: {known}.")
        spelling = r"([LR]?)(?:AU)?([LR]?)0*([1-9][0-9]*)([LR]?)"
        match = re.fullmatch(spelling, name.strip(), flags=re.ASCII | re.IGNORECASE)
        side = (match[1] + match[2] + match[4]).upper() if match else ""
        whole = f"AU{match[3]}" if match else ""
        columns = au_columns(self.au_names)
        if whole + side in columns:
            return whole + side
        if whole in columns and len(side) == 1:
            raise self.error(
                f"names {_show(name)}, one side of the face, but this model moves both sides of {whole} alike: leave"
                f" out the L or R, or load an AU adapter with sides. It knows {known}."
            )
        unit, nearest = _BY_NAME.get(whole), _nearest_au(whole, side, self.au_names)
        what = f" ({unit.facs_name})" if unit else ""
        hint = f" The nearest is {nearest}." if nearest else ""
        raise self.error(f"names {_show(name)}{what}, which this model does not know. It knows {known}.{hint}")

    def place(self, pairs: Iterable[tuple[str, Real]]) -> list[float]:
        """Check `pairs`, whose names are keys of `au_columns`, and return intensities in the order of the AUs."""
        columns, intensities = au_columns(self.au_names), [None] * len(self.au_names)
        for name, value in pairs:
            value = self.check_intensity(name, value)
            for column in columns[name]:
                if intensities[column] is not None:
                    sides = f" ({name} is both its sides)" if len(columns[name]) > 1 else ""
                    raise self.error(f"gives {self.au_names[column]} twice{sides}. Give each AU once.")
                intensities[column] = value
        return [0.0 if value is None else value for value in intensities]

    def check_intensity(self, name: str, value: Real) -> float:
        if not isinstance(value, Real) or isinstance(value, bool):
            raise self.error(f"sets {name} to {_show(value)}. An intensity is a number, such as 2.5.")
        # `not … <= …` rejects NaN too. Compare before `float(value)`, which overflows for a huge integer.
        if not -MAX_INTENSITY <= value <= MAX_INTENSITY:
            raise self.error(
                f"sets {name} to {_show(value)}. Intensities are finite and go from 0 (absent) to 5 (grade E); to"
                f" extrapolate, from -{MAX_INTENSITY} to {MAX_INTENSITY}."
            )
        return float(value)


def _muscles(text: str) -> set[str]:
    """The names in a list of muscles, short enough to be equal for the parts and heads of one muscle."""
    word = r"(?:relaxed )?((?:(?:levator|depressor|orbicularis|pars|caput) )?\w+)"
    return {re.match(word, muscle)[1] for muscle in re.split(", | and ", text)}


def _nearest_au(whole: str, side: str, au_names: tuple[str, ...]) -> str | None:
    """
    The AU in `au_names` that moves the face most like `whole`, if any has a muscle or the region in common with it; if
    FACS has no `whole`, the closest spelling.
    """
    unit = _BY_NAME.get(whole)
    if unit is None:
        return next(iter(difflib.get_close_matches(whole, map(whole_au, au_names), n=1, cutoff=0.7)), None)

    def likeness(other: ActionUnit) -> tuple[int, bool, int]:
        shared = len(_muscles(unit.muscles) & _muscles(other.muscles))
        return (shared, unit.region == other.region, -abs(int(unit.name[2:]) - int(other.name[2:])))

    # An AU with another muscle in another region, such as a smile for a turned head, is no help.
    others = [
        other for other in action_units_of(au_names) if other.name not in unit.antagonists and any(likeness(other)[:2])
    ]
    nearest = max(others, key=likeness, default=None)
    if nearest is None:
        return None
    return f"{nearest.name}{side if nearest.name + side in au_names else ''} ({nearest.facs_name})"


def _are_numbers(values) -> bool:
    return len(values) > 0 and all(isinstance(value, Real) for value in values)


def _to_float(text: str) -> float | None:
    """Read a decimal as Python does, but reject underscores and non-ASCII digits."""
    try:
        return float(text) if text.isascii() and "_" not in text else None
    except ValueError:
        return None


def _to_float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def _shortest(value: float) -> str:
    # Nine significant digits distinguish all float32 numbers.
    candidates = (float(f"{value:.{digits}g}") for digits in range(1, 10))
    shortest = next(number for number in candidates if _to_float32(number) == value)
    return repr(shortest).removesuffix(".0")


def _preset_key(name: str) -> str:
    return " ".join(re.sub("[-_]", " ", name).lower().split())


def _find_preset(name: str) -> Preset | None:
    return PRESETS.get(_preset_key(name))


def _is_au_tag(content: str, with_presets: bool = True) -> bool:
    content = " ".join(content.split())
    au = r"(?:AU|[LR])? ?\d+[LR]?[A-Z]?"
    shapes = rf"AU ?[LR]?\d.*|{au}(?: ?\+ ?{au})+|[LR]?\d+[LR]? ?=.*|[A-Z _-]+@ ?[-+.\d]+"
    is_preset = with_presets and _find_preset(re.split(" ?[@+]", content)[0]) is not None
    return is_preset or re.fullmatch(shapes, content, flags=re.ASCII | re.IGNORECASE) is not None


def _show(value) -> str:
    """A short `repr` for error messages. An unknown object shows only its type, because its `repr` may be anything."""
    if isinstance(value, str):
        return repr(str(value) if len(value) <= 40 else value[:37] + "...")
    if value is None or isinstance(value, bool):
        return repr(value)
    try:
        return f"{float(value):g}" if isinstance(value, Real) else f"a {type(value).__name__}"
    except OverflowError:
        return "a number too large for a float"
