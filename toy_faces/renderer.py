# SPDX-License-Identifier: Apache-2.0
"""A small world of drawn portraits whose facial action units are known exactly.

Every picture is a person (a closed vocabulary of attributes plus a continuous identity jitter) whose face is a rig
moved by action units: the paper's 12, which move both sides alike, or the 24 of `TOY_AU_NAMES`, which add other units
and move each side by itself. The world exists so that every part of the system can be trained, tested and measured
where nothing can be downloaded and the truth is known.

All lengths in this file are pixels of the finished 128 x 128 picture, in a face frame whose origin is the middle of
the picture's upper edge: x grows to the right, y downwards.
"""

import copy
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from action_units import AU_NAMES


SIZE = 128

# Three samples a pixel and axis: two leave stair steps on the slanted brows, four cost twice the time of three.
SUPERSAMPLING = 3
BACKGROUND_MARGIN = 4

# fmt: off
TOY_AU_NAMES: tuple[str, ...] = (
    "AU1L", "AU1R", "AU2L", "AU2R", "AU4L", "AU4R", "AU5", "AU6L", "AU6R", "AU9", "AU10", "AU12L", "AU12R",
    "AU14L", "AU14R", "AU15L", "AU15R", "AU17", "AU20", "AU24", "AU25", "AU26", "AU43L", "AU43R",
)
# fmt: on
"""The columns of the larger world. L and R are the person's own left and right, so L is on the right-hand side of the
picture, as somebody who looks at it sees it. A name without a side moves both sides."""


def _unit_number(name: str) -> int:
    return int(name.removeprefix("AU").rstrip("LR"))


# Where each unit stands in TOY_AU_NAMES, by its number: what moves the person's left side, and the right one.
_LEFT_COLUMNS, _RIGHT_COLUMNS = (
    {_unit_number(name): column for column, name in enumerate(TOY_AU_NAMES) if not name.endswith(other)}
    for other in ("R", "L")
)
_SIDED_UNITS = tuple(number for number, column in _LEFT_COLUMNS.items() if column != _RIGHT_COLUMNS[number])


def to_toy_aus(aus: np.ndarray) -> np.ndarray:
    """Widens intensities of the paper's twelve AUs to the larger world.

    Args:
        aus (`np.ndarray` of shape `(..., 12)`):
            Intensities in the order of `AU_NAMES`.

    Returns:
        `np.ndarray` of shape `(..., 24)`, same dtype, in the order of `TOY_AU_NAMES`: both sides alike and the AUs
        that the twelve do not have at 0. `render` draws the same picture of both.

    Raises:
        ValueError: The last dimension is not 12.
    """
    aus = np.asarray(aus)
    if aus.shape[-1:] != (len(AU_NAMES),):
        raise ValueError(f"aus needs {len(AU_NAMES)} columns in the order {AU_NAMES}, got shape {aus.shape}.")
    wide = np.zeros((*aus.shape[:-1], len(TOY_AU_NAMES)), dtype=aus.dtype)
    for column, name in enumerate(AU_NAMES):
        number = _unit_number(name)
        wide[..., [_LEFT_COLUMNS[number], _RIGHT_COLUMNS[number]]] = aus[..., column, None]
    return wide


ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "person": ("man", "woman", "boy", "girl"),
    "skin": ("pale", "tan", "brown", "dark"),
    "hair_color": ("black", "brown", "blond", "red", "gray"),
    "hair_style": ("short", "long", "curly", "bun", "bald"),
    "glasses": ("no", "yes"),
    "beard": ("no", "yes"),
    "clothes": ("red", "blue", "green", "yellow", "purple", "white", "black"),
    "garment": ("sweater", "shirt", "jacket"),
    "background": ("park", "beach", "city", "snow", "sunset", "studio", "desert", "night"),
}

IDENTITY_NAMES = (
    "face_width",
    "eye_spacing",
    "nose_length",
    "mouth_width",
    "brow_thickness",
    "eye_color",
    "shift_x",
    "shift_y",
    "scale",
    "tilt",
)

Color = tuple[int, int, int]

SKIN_COLORS: dict[str, Color] = {
    "pale": (255, 226, 204),
    "tan": (232, 182, 138),
    "brown": (172, 116, 80),
    "dark": (126, 82, 60),
}
SKIN_LINES: dict[str, Color] = {
    "pale": (150, 70, 56),
    "tan": (122, 58, 36),
    "brown": (72, 32, 20),
    "dark": (40, 16, 12),
}
# How far a brow goes from half its hair colour to near black: brows have to stand out on every skin.
BROW_DARKENING = {"pale": 0.15, "tan": 0.35, "brown": 0.65, "dark": 0.9}
HAIR_COLORS: dict[str, Color] = {
    "black": (38, 34, 44),
    "brown": (112, 66, 38),
    "blond": (242, 200, 92),
    "red": (206, 80, 34),
    "gray": (178, 182, 192),
}
CLOTHES_COLORS: dict[str, Color] = {
    "red": (214, 52, 56),
    "blue": (48, 98, 206),
    "green": (42, 150, 84),
    "yellow": (246, 200, 52),
    "purple": (132, 68, 172),
    "white": (244, 244, 246),
    "black": (44, 44, 54),
}
EYE_COLORS: tuple[Color, ...] = ((70, 42, 26), (122, 84, 36), (62, 122, 82), (54, 112, 186))
INK: Color = (30, 20, 24)
WHITE: Color = (255, 255, 255)

EYE_Y = 63.0
BROW_Y = 47.5
LENS_Y = 63.8
LENS_RADIUS = 12.9
NOSE_Y = 78.0
MOUTH_Y = 88.5
CHIN_Y = 108.0
SIDES = (-1.0, 1.0)


@dataclass(frozen=True)
class Portrait:
    """Who is drawn and where: everything of a picture but its expression.

    Args:
        person, skin, hair_color, hair_style, glasses, beard, clothes, garment, background (`str`):
            One value each of `ATTRIBUTES`. Only a man has a beard.
        identity (`tuple[float, ...]`):
            One number in [-1, 1] for each of `IDENTITY_NAMES`: proportions of the face, eye colour and pose.

    Raises:
        ValueError: A value is outside its vocabulary, a beard is given to somebody else than a man, or `identity` has
            the wrong length or range.
    """

    person: str
    skin: str
    hair_color: str
    hair_style: str
    glasses: str
    beard: str
    clothes: str
    garment: str
    background: str
    identity: tuple[float, ...] = (0.0,) * len(IDENTITY_NAMES)

    def __post_init__(self):
        for name in ATTRIBUTES:
            _check_attribute(name, getattr(self, name))
        if self.beard == "yes" and self.person != "man":
            raise ValueError(f"beard='yes' is drawn on a man only, got person={self.person!r}; pass person='man'.")
        if len(self.identity) != len(IDENTITY_NAMES) or not all(-1 <= value <= 1 for value in self.identity):
            raise ValueError(
                f"identity needs {len(IDENTITY_NAMES)} numbers in [-1, 1], one for each of {IDENTITY_NAMES}, "
                f"got {self.identity!r}."
            )

    @property
    def attributes(self) -> dict[str, str]:
        """The attributes by name, without the identity."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name in ATTRIBUTES}


def _check_attribute(name: str, value: str) -> None:
    if name not in ATTRIBUTES:
        raise ValueError(f"There is no attribute {name!r}; a portrait has {tuple(ATTRIBUTES)}.")
    if value not in ATTRIBUTES[name]:
        raise ValueError(f"{name}={value!r} is not drawn here; the allowed values are {ATTRIBUTES[name]}.")


# --------------------------------------------------------------------------------------------------------------------
# Sampling
# --------------------------------------------------------------------------------------------------------------------

# Long hair on a man or a bald girl can be asked for; sampling keeps to what makes the persons easy to tell apart.
STYLE_WEIGHTS = {
    "man": {"short": 5, "curly": 3, "bald": 3, "long": 1},
    "woman": {"short": 2, "long": 5, "curly": 3, "bun": 4},
    "boy": {"short": 5, "curly": 4},
    "girl": {"long": 5, "curly": 3, "bun": 4, "short": 1},
}


def sample_portrait(seed: int, **fixed: str) -> Portrait:
    """Draws a person.

    Args:
        seed (`int`):
            The same seed and `fixed` give the same portrait.
        fixed (`str`):
            Attributes of `ATTRIBUTES` that are given instead of drawn, `sample_portrait(7, glasses="yes")`. The
            attributes that are not given stay what the seed alone makes them, as far as they can.

    Returns:
        `Portrait`: The person.

    Raises:
        ValueError: A name or a value is not in `ATTRIBUTES`, or a beard is given to somebody else than a man.
    """
    for name, value in fixed.items():
        _check_attribute(name, value)
    rng = random.Random(seed)
    drawn = {name: rng.choice(values) for name, values in ATTRIBUTES.items()}
    style_place, glasses_place, beard_place = rng.random(), rng.random(), rng.random()
    identity = tuple(rng.uniform(-1, 1) for _ in IDENTITY_NAMES)

    person = fixed.get("person", "man" if fixed.get("beard") == "yes" else drawn["person"])
    styles = STYLE_WEIGHTS[person]
    # The place in [0, 1) is drawn for everyone, so that fixing the person leaves all later draws as they are.
    drawn["hair_style"] = random.Random(style_place).choices(tuple(styles), tuple(styles.values()))[0]
    drawn["glasses"] = "yes" if glasses_place < 0.3 else "no"
    drawn["beard"] = "yes" if person == "man" and beard_place < 0.45 else "no"
    return Portrait(**{**drawn, "person": person, **fixed}, identity=identity)


# What tends to move together in real faces, by AU number; the rest of a combination is drawn at random.
CO_OCCURRENCES = (
    (6, 12),
    (6, 12, 25),
    (1, 2),
    (1, 2, 5),
    (1, 2, 5, 25, 26),
    (25, 26),
    (1, 4),
    (1, 4, 15),
    (4, 9),
    (4, 5),
    (15, 17),
    (1, 4, 20, 25),
    (9, 17),
    (12, 25),
)


def sample_aus(seed: int) -> np.ndarray:
    """Draws an expression.

    Args:
        seed (`int`):
            The same seed gives the same intensities.

    Returns:
        `np.ndarray` of shape `(12,)`, float32, in the order of `AU_NAMES`: one in ten is neutral (all 0), three in ten
        have a single action unit, the rest two to five; active intensities are uniform in (0.5, 5].
    """
    rng = random.Random(f"aus {seed}")
    numbers = [int(name[2:]) for name in AU_NAMES]
    kind = rng.random()
    if kind < 0.1:
        active = []
    elif kind < 0.4:
        active = [rng.choice(numbers)]
    elif kind < 0.7:
        active = list(rng.choice(CO_OCCURRENCES))
        if len(active) < 5 and rng.random() < 0.4:
            active.append(rng.choice([number for number in numbers if number not in active]))
    else:
        active = rng.sample(numbers, rng.randint(2, 5))
    intensities = np.zeros(len(AU_NAMES), dtype=np.float32)
    for number in active:
        intensities[numbers.index(number)] = 5 - 4.5 * rng.random()
    return intensities


# More faces of the larger world. "12" moves both sides alike, "12L" one side; half of the faces are drawn mirrored.
TOY_CO_OCCURRENCES = (
    *(tuple(map(str, numbers)) for numbers in CO_OCCURRENCES),
    ("43L",),  # winks
    ("43L", "6L", "12"),
    ("43L", "6L", "12L"),
    ("43L", "6L", "12", "25"),
    ("12L", "14L"),  # contempt is R12+R14 in FACS; a smirk adds a brow or an eye
    ("12L", "14L", "2L"),
    ("12L", "14", "6L"),
    ("12L", "12R", "14L"),
    ("1L", "2L", "4R"),  # one raised brow
    ("2L", "4R", "12L"),
    ("1L", "2L"),
    ("9", "10"),  # sneers
    ("4", "9", "10"),
    ("10", "25"),
    ("10", "14L"),
    ("17", "24"),  # tight lips
    ("4", "17", "24"),
    ("14", "24"),
    ("12", "14"),
    ("43",),  # closed eyes
    ("43", "6", "12"),
    ("43", "25", "26"),
    ("43", "4", "6", "9"),
    ("43", "1", "4", "15"),
    ("12L", "15R"),
)
_IMPOSSIBLE_PAIRS = ({5, 43}, {24, 25}, {24, 26})


def sample_toy_aus(seed: int) -> np.ndarray:
    """Draws an expression of the larger world.

    Args:
        seed (`int`):
            The same seed gives the same intensities.

    Returns:
        `np.ndarray` of shape `(24,)`, float32, in the order of `TOY_AU_NAMES`: of ten, one is neutral (all 0), two
        have a single action unit on both sides alike, two have one on one side, two have a co-occurrence that may
        have one unit more, one has two to five units at random on both sides alike, and two have the same with sides
        that differ. Active intensities are uniform in (0.5, 5]. Eyes are never closed and widened at once, nor lips
        pressed and parted.
    """
    rng = random.Random(f"toy aus {seed}")
    units = [str(number) for number in _LEFT_COLUMNS]
    kind = rng.random()
    if kind < 0.1:
        active = []
    elif kind < 0.3:
        active = [rng.choice(units)]
    elif kind < 0.5:
        active = [f"{rng.choice(_SIDED_UNITS)}L"]
    elif kind < 0.7:
        active = list(rng.choice(TOY_CO_OCCURRENCES))
        if rng.random() < 0.4:
            taken = {_unit_number(unit) for unit in active}
            active.append(rng.choice([unit for unit in units if int(unit) not in taken]))
    else:
        active = rng.sample(units, rng.randint(2, 5))
        if kind >= 0.8:
            choices = (("{}L",), ("{}R",), ("{}L", "{}R"), ("{}",))
            active = [
                form.format(unit)
                for unit in active
                for form in (rng.choice(choices) if int(unit) in _SIDED_UNITS else ("{}",))
            ]
    mirror = rng.random() < 0.5
    intensities = np.zeros(len(TOY_AU_NAMES), dtype=np.float32)
    drawn: set[int] = set()
    for unit in active:
        number = _unit_number(unit)
        if any(number in pair and drawn & (pair - {number}) for pair in _IMPOSSIBLE_PAIRS):
            continue
        drawn.add(number)
        sides = "LR" if unit == str(number) else unit[-1].translate(str.maketrans("LR", "RL")) if mirror else unit[-1]
        columns = [{"L": _LEFT_COLUMNS, "R": _RIGHT_COLUMNS}[side][number] for side in sides]
        intensities[columns] = 5 - 4.5 * rng.random()
    return intensities


# --------------------------------------------------------------------------------------------------------------------
# Words
# --------------------------------------------------------------------------------------------------------------------

EXPRESSION_WORDS = (
    "raised inner brows",
    "raised outer brows",
    "lowered brows",
    "widened eyes",
    "lifted cheeks",
    "wrinkled nose",
    "smiling mouth",
    "drooping mouth corners",
    "pushed up chin",
    "stretched lips",
    "parted lips",
    "dropped jaw",
)
"""One for each of `AU_NAMES`."""
TOY_EXPRESSION_WORDS = {
    **{_unit_number(name): words for name, words in zip(AU_NAMES, EXPRESSION_WORDS, strict=True)},
    10: "raised upper lip",
    14: "dimpled mouth corners",
    24: "pressed lips",
    43: "closed eyes",
}
"""By AU number, of an action unit that moves both sides."""
ONE_SIDED_WORDS = {
    1: "raised {} inner brow",
    2: "raised {} outer brow",
    4: "lowered {} brow",
    6: "lifted {} cheek",
    12: "smiling {} mouth corner",
    14: "dimpled {} mouth corner",
    15: "drooping {} mouth corner",
    43: "closed {} eye",
}
"""By AU number, of an action unit that moves the person's own left or right."""
# The text encoder reads 48 tokens, two of which are its own. A word of this vocabulary is one token, as is a comma.
MAX_CAPTION_TOKENS = 46
LEADS = ("a photo of", "a portrait of", "a closeup of", "a picture of", "")
PLACES = {
    "park": ("in a park", "in the park"),
    "beach": ("at the beach", "on a beach"),
    "city": ("in the city", "in a city"),
    "snow": ("in the snow", "in snow"),
    "sunset": ("at sunset", "in front of a sunset"),
    "studio": ("in a studio", "in the studio"),
    "desert": ("in the desert", "in a desert"),
    "night": ("at night", "in the night"),
}


def caption(portrait: Portrait, seed: int | None = None, aus: np.ndarray | None = None) -> str:
    """Says in lower-case words who is in the picture, and of the expression only what `aus` asks for.

    Args:
        portrait (`Portrait`):
            The person.
        seed (`int`, *optional*):
            `None` gives the canonical sentence, which names every attribute (a beard, or none, of a man only). A seed
            gives one of many wordings, in which each attribute but the person is left out about one time in five;
            the absence of glasses and of a beard goes mostly without saying.
        aus (`np.ndarray` of shape `(12,)` or `(24,)`, *optional*):
            Intensities in the order of `AU_NAMES` or `TOY_AU_NAMES`. Those above 0.5 are named in words ("very parted
            lips"); of a wording with a seed, one in five is left out. Of the 24, sides that are at most 0.5 apart
            are named as one, others by the person's own left and right ("lowered left brow"), and the weakest are
            left out where the words would be more than the text encoder reads.

    Returns:
        `str`: "a closeup of a girl with long red hair and glasses in a park, wearing a blue sweater".

    Raises:
        ValueError: `aus` does not have 12 or 24 finite numbers.
    """
    rng = None if seed is None else random.Random(f"caption {seed}")
    named = {name: value for name, value in portrait.attributes.items() if _is_named(portrait, name, rng)}
    bald_first = named.get("hair_style") == "bald"
    subject = f"a bald {portrait.person}" if bald_first else f"a {portrait.person}"
    details = [words for words in (_hair_words(named), *_feature_words(named)) if words]
    clothes = _clothes_words(named)
    place = _pick(PLACES[named["background"]], rng) if "background" in named else ""
    lead = "a portrait of" if rng is None else rng.choice(LEADS)
    if rng is not None:
        rng.shuffle(details)
    sentence = " ".join(f"{lead} {_join_words(subject, details, clothes, place, rng)}".split()).replace(" ,", ",")
    if aus is None:
        return sentence
    expression = _expression_words(_checked_aus(aus), rng)
    if len(aus) == len(TOY_AU_NAMES):
        while len(re.findall(r"\w+|,", ", ".join([sentence, *expression]))) > MAX_CAPTION_TOKENS:
            del expression[min(expression, key=expression.get)]
    return ", ".join([sentence, *expression])


def _expression_words(aus: np.ndarray, rng: random.Random | None) -> dict[str, float]:
    """The intensity of what is named, by its words, in the order in which they are said."""
    named = []
    for number, looks in TOY_EXPRESSION_WORDS.items():
        left, right = float(aus[_LEFT_COLUMNS[number]]), float(aus[_RIGHT_COLUMNS[number]])
        if abs(left - right) <= 0.5:
            named.append((looks, (left + right) / 2))
        else:
            named += [(ONE_SIDED_WORDS[number].format(word), own) for word, own in (("left", left), ("right", right))]
    words = []
    for looks, intensity in named:
        if intensity > 0.5 and (rng is None or rng.random() < 0.8):
            degree = "slightly " if intensity < 2 else "very " if intensity > 3.5 else ""
            words.append((degree + looks, intensity))
    if rng is not None:
        rng.shuffle(words)
    return dict(words)


def _is_named(portrait: Portrait, name: str, rng: random.Random | None) -> bool:
    if name == "person":
        return True
    if name == "beard" and portrait.person != "man":
        return False
    if rng is None:
        return True
    unsaid = 0.9 if getattr(portrait, name) == "no" else 0.2
    return rng.random() >= unsaid


def _pick(words: tuple[str, ...], rng: random.Random | None) -> str:
    return words[0] if rng is None else rng.choice(words)


def _hair_words(named: dict[str, str]) -> str:
    style, color = named.get("hair_style"), named.get("hair_color", "")
    if style == "bun":
        return f"{color} hair in a bun"
    if style in (None, "bald"):
        return f"{color} hair" if color else ""
    return f"{style} {color} hair"


def _feature_words(named: dict[str, str]) -> list[str]:
    words = [f"{named['skin']} skin"] if "skin" in named else []
    for name, yes, no in (("glasses", "glasses", "no glasses"), ("beard", "a beard", "no beard")):
        if name in named:
            words.append(yes if named[name] == "yes" else no)
    return words


def _clothes_words(named: dict[str, str]) -> str:
    color, garment = named.get("clothes"), named.get("garment")
    if color and garment:
        return f"a {color} {garment}"
    if color:
        return f"{color} clothes"
    return f"a {garment}" if garment else ""


def _join_words(subject: str, details: list[str], clothes: str, place: str, rng: random.Random | None) -> str:
    listed = ", ".join(details[:-1]) + " and " + details[-1] if len(details) > 1 else "".join(details)
    looks = f"with {listed}" if listed else ""
    order = 0 if rng is None else rng.randrange(4)
    if order == 0:
        return f"{subject} {looks} {place}" + (f", wearing {clothes}" if clothes else "")
    if order == 1:
        return f"{subject} {looks}" + (f" wearing {clothes}" if clothes else "") + (f", {place}" if place else "")
    if order == 2:
        return f"{subject} {place}" + (f" in {clothes}" if clothes else "") + (f", {looks}" if looks else "")
    return f"{subject} {place} {looks}" + (f", dressed in {clothes}" if clothes else "")


_SYNONYMS = {"blonde": "blond", "grey": "gray"}
_HAIR_COLOR_WORDS = "black|brown|blonde|blond|red|gray|grey"
_CLOTHES_COLOR_WORDS = "|".join(ATTRIBUTES["clothes"])
_ATTRIBUTE_PATTERNS = {
    "person": r"\b(man|woman|boy|girl)\b",
    "skin": r"\b(pale|tan|brown|dark)[ -]skin",
    "hair_color": rf"\b({_HAIR_COLOR_WORDS})(?:[ -](?:short|long|curly))?[ -](?:hair|bun\b)",
    "hair_style": rf"\b(short|long|curly)(?:,? (?:{_HAIR_COLOR_WORDS}))?[ -]hair|\b(bun|bald)\b",
    "clothes": rf"\b({_CLOTHES_COLOR_WORDS}) (?:{'|'.join(ATTRIBUTES['garment'])}|clothes)\b",
    "garment": rf"\b({'|'.join(ATTRIBUTES['garment'])})\b",
    "background": rf"\b({'|'.join(ATTRIBUTES['background'])})\b",
}


def attributes_in(prompt: str) -> dict[str, str]:
    """Reads which attributes a prompt of this vocabulary names.

    Args:
        prompt (`str`):
            A caption of `caption`, or words like it; case does not matter.

    Returns:
        `dict[str, str]`: Values of `ATTRIBUTES` by name, only of what is named.
    """
    text = prompt.lower()
    found = {}
    for name, pattern in _ATTRIBUTE_PATTERNS.items():
        match = re.search(pattern, text)
        if match:
            word = next(group for group in match.groups() if group)
            found[name] = _SYNONYMS.get(word, word)
    for name in ("glasses", "beard"):
        if re.search(rf"\b{name}\b", text):
            found[name] = "no" if re.search(rf"\b(?:no|without(?: a)?) {name}\b", text) else "yes"
    return {name: found[name] for name in ATTRIBUTES if name in found}


# --------------------------------------------------------------------------------------------------------------------
# Canvas
# --------------------------------------------------------------------------------------------------------------------


def mix(first: Color, second: Color, amount: float) -> Color:
    """`first` at an amount of 0, `second` at 1."""
    amount = min(max(amount, 0.0), 1.0)
    return tuple(round(a + (b - a) * amount) for a, b in zip(first, second, strict=True))


class Canvas:
    """A supersampled picture that is drawn on in face-frame pixels.

    Args:
        image (`PIL.Image.Image`):
            The background, `SIZE * SUPERSAMPLING` square; it is drawn over.
        shift (`tuple[float, float]`), scale (`float`), tilt (`float`):
            The pose: pixels, a factor and radians, about the middle of the head.
    """

    PIVOT = (0.0, 66.0)

    def __init__(self, image: Image.Image, shift=(0.0, 0.0), scale=1.0, tilt=0.0):
        self.image = image
        self.draw = ImageDraw.Draw(image)
        cosine, sine = math.cos(tilt) * scale * SUPERSAMPLING, math.sin(tilt) * scale * SUPERSAMPLING
        self.matrix = np.array([[cosine, sine], [-sine, cosine]])
        pivot = np.array(self.PIVOT)
        self.offset = (pivot + (SIZE / 2, 0) + shift) * SUPERSAMPLING - pivot @ self.matrix

    def copy(self) -> "Canvas":
        other = copy.copy(self)
        other.image = self.image.copy()
        other.draw = ImageDraw.Draw(other.image)
        return other

    def paste_right_half(self, other: "Canvas") -> None:
        """Takes over what `other`, a canvas of the same pose, has to the right of the midline, x > 0."""
        mask = Image.new("1", self.image.size)
        half_plane = np.array([(0.0, -SIZE), (2 * SIZE, -SIZE), (2 * SIZE, 2 * SIZE), (0, 2 * SIZE)])
        ImageDraw.Draw(mask).polygon((half_plane @ self.matrix + self.offset).ravel().tolist(), fill=1)
        self.image.paste(other.image, mask=mask)

    def polygon(self, points: np.ndarray, color: Color) -> None:
        self.draw.polygon((points @ self.matrix + self.offset).ravel().tolist(), fill=color)

    def ellipse(self, x: float, y: float, radius_x: float, radius_y: float, color: Color) -> None:
        self.polygon(_CIRCLE * (radius_x, radius_y) + (x, y), color)

    def stroke(self, points: np.ndarray, width: float, color: Color, taper: float = 0.7) -> None:
        """A pen stroke along `points`, `width` pixels in its middle and `1 - taper` of it at both ends."""
        tangents = np.gradient(points, axis=0)
        lengths = np.maximum(np.hypot(tangents[:, 0], tangents[:, 1]), 1e-6)
        normals = np.stack([-tangents[:, 1], tangents[:, 0]], axis=1) / lengths[:, None]
        profile = 1 - taper * (1 - np.sin(np.linspace(0, math.pi, len(points)))) ** 1.5
        reach = normals * (profile * width / 2)[:, None]
        self.polygon(np.concatenate([points + reach, (points - reach)[::-1]]), color)


_ANGLES = np.linspace(0, 2 * math.pi, 28, endpoint=False)
_CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)


@lru_cache(maxsize=32)
def _spline_matrix(count: int, steps: int = 7) -> np.ndarray:
    # Catmull-Rom through `count` points; a matrix, because the same few counts come again in every picture.
    rows = []
    identity = np.eye(count)
    for index in range(count - 1):
        before, after = identity[max(index - 1, 0)], identity[min(index + 2, count - 1)]
        start, end = identity[index], identity[index + 1]
        for step in range(steps):
            t = step / steps
            rows.append(
                0.5
                * (
                    2 * start
                    + (end - before) * t
                    + (2 * before - 5 * start + 4 * end - after) * t**2
                    + (3 * start - before - 3 * end + after) * t**3
                )
            )
    rows.append(identity[-1])
    return np.array(rows)


def curve(*points: tuple[float, float]) -> np.ndarray:
    """A smooth curve through the points, `(n, 2)`."""
    return _spline_matrix(len(points)) @ np.array(points, dtype=float)


def mirrored(points: np.ndarray, side: float) -> np.ndarray:
    """The points of the right half of the picture on the given side, -1 or 1."""
    return points * (side, 1.0)


def closed_by_mirror(half: np.ndarray) -> np.ndarray:
    """A closed outline from its right half, which starts and ends on the middle line."""
    return np.concatenate([half, mirrored(half, -1.0)[::-1]])


# --------------------------------------------------------------------------------------------------------------------
# Rig
# --------------------------------------------------------------------------------------------------------------------


class Rig:
    """The face's geometry and colours for one portrait and expression, in pixels at 128.

    Where the sides differ, `halves` has one rig a side and every structure is drawn by the half that it lies in. `au`
    of a half are the intensities of its side. On the midline both sides do what `middle` says, so that neither pulls
    the other along and a mouth still meets itself there.

    Args:
        portrait (`Portrait`):
            The person.
        aus (`Sequence[float]` of length 24):
            Intensities in the order of `TOY_AU_NAMES`; displacements are linear in them, also beyond [0, 5].
    """

    def __init__(self, portrait: Portrait, aus: Sequence[float]):
        self.portrait = portrait
        left = {number: float(aus[column]) for number, column in _LEFT_COLUMNS.items()}
        right = {number: float(aus[column]) for number, column in _RIGHT_COLUMNS.items()}
        self.au = self.middle = {number: _shared(left[number], right[number]) for number in left}
        self.sides = SIDES
        self.jitter = dict(zip(IDENTITY_NAMES, portrait.identity, strict=True))
        self.child = portrait.person in ("boy", "girl")
        self.feminine = portrait.person in ("woman", "girl")
        self._set_colors()
        self._set_proportions()
        # The person's left is on the right-hand side of the picture, where x is positive.
        self.halves = (self,) if left == right else (self._half(-1.0, right), self._half(1.0, left))

    def _half(self, side: float, au: dict[int, float]) -> "Rig":
        half = copy.copy(self)
        half.sides, half.au = (side,), au
        return half

    def _set_colors(self) -> None:
        portrait = self.portrait
        self.skin = SKIN_COLORS[portrait.skin]
        self.line = SKIN_LINES[portrait.skin]
        self.shade = mix(self.skin, self.line, 0.28)
        self.hair = HAIR_COLORS[portrait.hair_color]
        self.hair_dark = mix(self.hair, INK, 0.28)
        self.hair_light = mix(self.hair, WHITE, 0.22)
        half_hair = mix(self.hair, (50, 26, 10), 0.55)
        self.brow = mix(half_hair, (18, 10, 10), BROW_DARKENING[portrait.skin])
        lip_target = (216, 40, 70) if self.feminine else (190, 76, 70)
        self.lip = mix(self.skin, lip_target, 0.72 if self.feminine else 0.55)
        self.blush = mix(self.skin, (240, 84, 84), 0.26 if self.feminine or self.child else 0.18)
        place = (self.jitter["eye_color"] + 1) / 2 * (len(EYE_COLORS) - 1)
        index = min(int(place), len(EYE_COLORS) - 2)
        self.iris = mix(EYE_COLORS[index], EYE_COLORS[index + 1], place - index)

    def _set_proportions(self) -> None:
        jitter, au = self.jitter, self.au
        self.width = 1 + 0.045 * jitter["face_width"] + (0.02 if self.child else 0.0)
        self.eye_x = 18.0 + 1.0 * jitter["eye_spacing"]
        self.eye_scale = 1.15 if self.child else 1.0
        self.nose_y = NOSE_Y + 1.2 * jitter["nose_length"] - (1.5 if self.child else 0.0)
        self.mouth_half_width = 13.0 + 1.2 * jitter["mouth_width"]
        self.brow_width = (
            4.4
            + 0.6 * jitter["brow_thickness"]
            + {"man": 1.0, "boy": -0.3, "girl": -0.4}.get(self.portrait.person, 0.0)
        )
        self.jaw = 2.1 * au[26]
        self.chin_y = CHIN_Y - (2.0 if self.child else 0.0) + self.jaw

    def evidence(self, number: int, au: dict[int, float] | None = None) -> float:
        """Strength of an AU's wrinkles, 0 without it and 1 at an intensity of 5; they keep growing up to 8."""
        return min(max((self.au if au is None else au)[number], 0.0), 8.0) / 5

    def wrinkle(self, canvas: Canvas, points: np.ndarray, width: float, strength: float) -> None:
        """A skin fold that widens and darkens with its strength and is not there at 0."""
        if strength > 0:
            color = mix(self.skin, self.line, 0.25 + 0.75 * strength)
            canvas.stroke(points, width * (0.35 + 0.65 * strength), color)


def _shared(left: float, right: float) -> float:
    """As far as both sides move the same way."""
    if left * right <= 0:
        return left if left == right else 0.0
    return min(left, right, key=abs)


def _jaw_weight(y: np.ndarray) -> np.ndarray:
    # The jaw turns about the ears: the outline moves fully at the chin and not at all at the cheek bones.
    return np.clip((y - 68.0) / (CHIN_Y - 68.0), 0.0, 1.0) ** 1.15


_FACE_HALVES = {
    "man": ((0, 12), (19, 15), (32, 29), (36, 48), (35.5, 68), (33.5, 86), (26.5, 99.5), (12.5, 107), (0, 108)),
    "woman": ((0, 12), (19, 15), (32, 29), (35.5, 48), (34.5, 68), (30, 86), (20, 100), (8.5, 107), (0, 108)),
    "boy": ((0, 12), (20, 15), (33, 29), (36, 48), (36, 68), (33.5, 85), (24, 98), (10, 105), (0, 106)),
}
_FACE_HALVES["girl"] = _FACE_HALVES["boy"]


def face_half(rig: Rig) -> np.ndarray:
    """The right half of the face's outline, from the top of the skull to the chin."""
    half = curve(*_FACE_HALVES[rig.portrait.person]) * (rig.width, 1.0)
    half[:, 1] += rig.jaw * _jaw_weight(half[:, 1])
    return half


# --------------------------------------------------------------------------------------------------------------------
# Background, body and hair
# --------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=len(ATTRIBUTES["background"]))
def _background(place: str) -> Image.Image:
    side = (SIZE + 2 * BACKGROUND_MARGIN) * SUPERSAMPLING
    image = Image.new("RGB", (side, side))
    _BACKGROUND_PAINTERS[place](_BackgroundPen(image))
    return image


class _BackgroundPen:
    """Draws boxes, discs and polygons in pixels of the picture, past its edges by the margin."""

    def __init__(self, image: Image.Image):
        self.draw = ImageDraw.Draw(image)

    def _at(self, *values: float) -> list[float]:
        return [(value + BACKGROUND_MARGIN) * SUPERSAMPLING for value in values]

    def band(self, top: float, color: Color) -> None:
        self.box(-9, top, 140, 140, color)

    def box(self, left: float, top: float, right: float, bottom: float, color: Color) -> None:
        self.draw.rectangle(self._at(left, top, right, bottom), fill=color)

    def disc(self, x: float, y: float, radius: float, color: Color, flat: float = 1.0) -> None:
        self.draw.ellipse(self._at(x - radius, y - radius * flat, x + radius, y + radius * flat), fill=color)

    def shape(self, *points: tuple[float, float], color: Color) -> None:
        self.draw.polygon([tuple(self._at(*point)) for point in points], fill=color)


def _paint_park(pen: _BackgroundPen) -> None:
    pen.band(-9, (160, 218, 250))
    pen.disc(34, 92, 60, (140, 204, 110), 0.4)
    pen.band(84, (108, 188, 84))
    for x in (9, 119):
        pen.box(x - 3, 54, x + 3, 96, (122, 84, 56))
        pen.disc(x, 40, 20, (58, 148, 74))
        pen.disc(x - 5, 34, 11, (84, 172, 92))


def _paint_beach(pen: _BackgroundPen) -> None:
    pen.band(-9, (132, 216, 252))
    pen.disc(18, 20, 12, (255, 240, 150))
    pen.band(52, (28, 140, 206))
    pen.band(76, (120, 214, 226))
    pen.band(84, (248, 222, 164))


def _paint_city(pen: _BackgroundPen) -> None:
    pen.band(-9, (206, 214, 228))
    pen.box(-9, 34, 16, 140, (118, 130, 154))
    pen.box(12, 58, 34, 140, (148, 158, 180))
    pen.box(108, 22, 140, 140, (102, 112, 138))
    pen.box(92, 50, 112, 140, (140, 150, 172))
    pen.box(-9, 96, 140, 140, (88, 94, 112))


def _paint_snow(pen: _BackgroundPen) -> None:
    pen.band(-9, (188, 212, 236))
    pen.shape((-20, 90), (14, 30), (50, 90), color=(140, 168, 204))
    pen.shape((2, 51), (14, 30), (26, 51), (14, 46), color=(250, 252, 255))
    pen.shape((76, 90), (116, 24), (156, 90), color=(152, 178, 212))
    pen.shape((102, 47), (116, 24), (130, 47), (116, 42), color=(250, 252, 255))
    pen.band(80, (246, 250, 255))


def _paint_sunset(pen: _BackgroundPen) -> None:
    for top, color in ((-9, (118, 60, 140)), (24, (184, 74, 130)), (48, (234, 104, 98)), (70, (252, 152, 84))):
        pen.band(top, color)
    pen.disc(112, 80, 17, (255, 226, 130))
    pen.band(88, (92, 52, 110))


def _paint_studio(pen: _BackgroundPen) -> None:
    pen.band(-9, (150, 154, 162))
    pen.disc(64, 60, 66, (176, 180, 188))
    pen.disc(64, 58, 54, (198, 202, 208))


def _paint_desert(pen: _BackgroundPen) -> None:
    pen.band(-9, (254, 234, 178))
    pen.shape((-9, 70), (10, 52), (34, 52), (46, 90), (-9, 90), color=(206, 112, 66))
    pen.disc(108, 108, 52, (232, 164, 84), 0.6)
    pen.band(92, (220, 146, 70))
    pen.box(110, 42, 118, 100, (70, 138, 82))
    pen.box(101, 60, 118, 66, (70, 138, 82))
    pen.box(101, 50, 106, 66, (70, 138, 82))


def _paint_night(pen: _BackgroundPen) -> None:
    pen.band(-9, (22, 28, 68))
    pen.disc(108, 22, 16, (252, 244, 196))
    pen.disc(100, 18, 13, (22, 28, 68))
    pen.disc(20, 118, 56, (36, 50, 104), 0.6)
    pen.disc(116, 124, 52, (30, 42, 90), 0.6)


_BACKGROUND_PAINTERS: dict[str, Callable[[_BackgroundPen], None]] = {
    "park": _paint_park,
    "beach": _paint_beach,
    "city": _paint_city,
    "snow": _paint_snow,
    "sunset": _paint_sunset,
    "studio": _paint_studio,
    "desert": _paint_desert,
    "night": _paint_night,
}


def draw_background(rig: Rig) -> Image.Image:
    """A fresh copy of the place, moved against the head by up to 2 pixels."""
    x, y = (round((BACKGROUND_MARGIN - 2 * rig.jitter[name]) * SUPERSAMPLING) for name in ("shift_x", "shift_y"))
    return _background(rig.portrait.background).crop((x, y, x + SIZE * SUPERSAMPLING, y + SIZE * SUPERSAMPLING))


def draw_body(canvas: Canvas, rig: Rig) -> None:
    color = CLOTHES_COLORS[rig.portrait.clothes]
    trim = mix(color, INK, 0.24) if rig.portrait.clothes != "black" else mix(color, WHITE, 0.22)
    narrow = 0.88 if rig.child else 1.0
    shoulders = curve((0, 110), (14, 110), (30, 113), (48, 118), (58, 126), (64, 142)) * (narrow, 1.0)
    canvas.polygon(closed_by_mirror(shoulders), color)
    neck_half_width = 13.5 if rig.portrait.person == "man" else 11.0
    _GARMENT_PAINTERS[rig.portrait.garment](canvas, neck_half_width, color, trim)
    neck = np.array([(neck_half_width, 88.0), (neck_half_width, 111.0), (neck_half_width - 4, 114.5), (0, 116.0)])
    canvas.polygon(closed_by_mirror(np.concatenate([[(0.0, 88.0)], neck])), rig.shade)


def _draw_sweater(canvas: Canvas, neck: float, color: Color, trim: Color) -> None:
    canvas.polygon(closed_by_mirror(curve((0, 104), (neck + 4, 107), (neck + 4, 115), (0, 121.5))), trim)


def _draw_shirt(canvas: Canvas, neck: float, color: Color, trim: Color) -> None:
    canvas.stroke(np.array([(0, 117.0), (0, 123), (0, 140)]), 2.4, trim, taper=0.0)
    for side in SIDES:
        collar = np.array([(neck - 1, 106.0), (neck + 4, 108), (neck + 3, 122), (1, 117.5)])
        canvas.polygon(mirrored(collar, side), mix(color, WHITE, 0.55) if trim[0] + trim[1] < 420 else trim)


def _draw_jacket(canvas: Canvas, neck: float, color: Color, trim: Color) -> None:
    inner = (250, 250, 250) if color[0] + color[1] + color[2] < 700 else (120, 140, 170)
    canvas.polygon(closed_by_mirror(np.array([(0, 108.0), (neck + 1, 108), (0, 140)])), inner)
    for side in SIDES:
        lapel = np.array([(neck - 1, 106.0), (neck + 8, 109.5), (neck + 9, 120), (2, 140), (-1, 140)])
        canvas.polygon(mirrored(lapel, side), trim)


_GARMENT_PAINTERS = {"sweater": _draw_sweater, "shirt": _draw_shirt, "jacket": _draw_jacket}


def draw_hair_back(canvas: Canvas, rig: Rig) -> None:
    style = rig.portrait.hair_style
    if style == "long":
        half = curve((0, 5.5), (20, 7.5), (36, 21), (43, 44), (45, 72), (47, 98), (46, 116), (30, 121), (0, 121))
        canvas.polygon(closed_by_mirror(half) * (rig.width, 1.0), rig.hair_dark)
    elif style == "curly":
        for angle in np.linspace(-1.22 * math.pi, 0.22 * math.pi, 13):
            canvas.ellipse(37 * math.cos(angle), 47 + 33 * math.sin(angle), 10.5, 10.5, rig.hair)
        canvas.ellipse(0, 44, 38, 34, rig.hair)
    elif style == "bun":
        canvas.ellipse(0, 9.5, 15.5, 10.5, rig.hair)
        canvas.stroke(curve((-8, 6.5), (0, 3.0), (8, 6.5)), 2.2, rig.hair_light)
        canvas.stroke(curve((-14, 15.5), (0, 12), (14, 15.5)), 4, rig.hair_dark, taper=0.2)
    elif style == "bald":
        for side in SIDES:
            canvas.ellipse(side * 36.5 * rig.width, 55, 6.0, 13, rig.hair)


def draw_ears(canvas: Canvas, rig: Rig) -> None:
    for side in SIDES:
        canvas.ellipse(side * 36.5 * rig.width, 65.5, 4.6, 7.6, rig.skin)
        canvas.ellipse(side * 37.2 * rig.width, 65.5, 2.2, 4.4, rig.shade)


_HAIR_CAPS = {
    "short": (
        ((0, 6.5), (19, 8), (34, 19), (39.5, 38), (38.5, 57)),
        ((36, 56), (33.8, 42), (28, 28), (14, 24.5), (0, 23.5)),
    ),
    "long": (
        ((0, 5.5), (20, 7.5), (36, 21), (42, 44), (44, 72), (45.5, 98), (43, 117)),
        ((37.5, 117), (38, 96), (36.4, 72), (34.6, 46), (28.5, 29), (14, 23.5), (0, 20)),
    ),
    "curly": (
        ((0, 8), (19, 10), (34, 21), (40, 38), (40, 58)),
        ((36.5, 58), (34, 42), (28, 27.5), (14, 24), (0, 23.5)),
    ),
    "bun": (
        ((0, 13), (18, 13.5), (32.5, 21), (38.5, 38), (37.5, 54)),
        ((36.2, 54), (34, 41), (29, 28), (14, 22), (0, 21)),
    ),
}


def draw_hair_front(canvas: Canvas, rig: Rig) -> None:
    """The hair around the face; it stays clear of the forehead, where brows and forehead lines have to be read."""
    style = rig.portrait.hair_style
    if style == "bald":
        canvas.stroke(curve((-17, 22), (-9, 17.5), (0, 16.5)), 3, mix(rig.skin, WHITE, 0.35))
        for side in SIDES:
            patch = curve((35, 42), (38.5, 48), (39, 60), (36, 60), (34.6, 50), (35, 42))
            canvas.polygon(mirrored(patch, side) * (rig.width, 1.0), rig.hair)
        return
    outer, inner = _HAIR_CAPS[style]
    half = np.concatenate([curve(*outer), curve(*inner)])
    canvas.polygon(closed_by_mirror(half) * (rig.width, 1.0), rig.hair)
    if style == "curly":
        for x, y in ((0, 20), (11, 20.5), (21, 23.5), (29, 29), (35, 39), (38.5, 50), (39.5, 61)):
            for side in SIDES:
                canvas.ellipse(side * x * rig.width, y - 2.5, 6.2, 6.2, rig.hair)
        for x, y in ((-17, 13), (0, 8), (17, 13)):
            canvas.stroke(curve((x - 5, y + 3), (x, y - 1), (x + 5, y + 3)), 2.2, rig.hair_light)
        return
    if style == "short" and not rig.feminine:
        tuft = curve((-22, 24.5), (-6, 22.5), (9, 25.6), (23, 25.5), (12, 17), (-10, 17), (-22, 24.5))
        canvas.polygon(tuft, rig.hair)
    gloss = curve((-25, 22), (-15, 14.5), (0, 12.5)) if style != "bun" else curve((-25, 25), (-17, 19.5), (-7, 17.5))
    canvas.stroke(gloss, 2.8, rig.hair_light)


def draw_ornaments(canvas: Canvas, rig: Rig) -> None:
    """A girl's bow and a woman's earrings: long hair alone does not tell the two from each other."""
    if rig.portrait.person == "girl":
        for side in SIDES:
            wing = np.array([(0.0, 0.0), (8.5, -6.0), (9.5, 0), (8.5, 6.0)]) * (side, 1)
            canvas.polygon(wing @ np.array([[0.94, 0.34], [-0.34, 0.94]]) + (23, 14), (255, 96, 160))
        canvas.ellipse(23, 14, 3.0, 3.0, (206, 44, 112))
    elif rig.portrait.person == "woman":
        for side in SIDES:
            canvas.ellipse(side * 37.4 * rig.width, 76.5, 3.0, 3.6, (255, 206, 70))


# --------------------------------------------------------------------------------------------------------------------
# Face
# --------------------------------------------------------------------------------------------------------------------


def draw_face(canvas: Canvas, rig: Rig) -> None:
    half = face_half(rig)
    lower = half[half[:, 1] > 80]
    shadow = np.concatenate([[(0.0, 84.0)], lower * (0.72, 1.0) + (0, 4.0)])
    shadow[:, 0] = np.minimum(shadow[:, 0], 13.0 if rig.portrait.person == "man" else 10.6)
    canvas.polygon(closed_by_mirror(shadow), mix(rig.skin, rig.line, 0.55))
    canvas.polygon(closed_by_mirror(half), rig.skin)


def draw_beard(canvas: Canvas, rig: Rig) -> None:
    """A beard along the jaw; the mouth, the cheeks beside it and the middle of the chin stay bare to be read."""
    if rig.portrait.beard == "no":
        return
    half = face_half(rig)
    lower = half[half[:, 1] > 60]
    middle = np.array([0.0, 66.0])
    outer = middle + (lower - middle) * (1.035, 1.05)
    share = np.linspace(0, 1, len(lower))[:, None]
    inner = middle + (lower - middle) * np.concatenate([0.92 - 0.15 * np.sin(share * math.pi), 1 - 0.11 * share], 1)
    # One side at a time: a single outline would cross the face with an edge from ear to ear.
    for side in SIDES:
        canvas.polygon(mirrored(np.concatenate([outer, inner[::-1]]), side), rig.hair_dark)


def draw_forehead(canvas: Canvas, rig: Rig) -> None:
    """Lines of AU1 in the middle and of AU2 at the sides of the forehead, and those of AU4 between the brows."""
    inner, outer, frown = rig.evidence(1), rig.evidence(2), rig.evidence(4)
    for y in (30.0, 35.0):
        arc = curve((-9.5, y + 1.2), (-4, y - 0.4), (4, y - 0.4), (9.5, y + 1.2))
        rig.wrinkle(canvas, arc, 2.4, rig.evidence(1, rig.middle))
        for side in rig.sides:
            if rig.au[1] != rig.middle[1]:
                own = curve((0.9, y - 0.6), (4, y - 0.4), (9.5, y + 1.2))
                rig.wrinkle(canvas, mirrored(own, side), 2.4, inner)
            arc = curve((12.5, y + 1.4), (17.5, y - 0.6), (23.5, y + 1.4))
            rig.wrinkle(canvas, mirrored(arc, side), 2.4, outer)
    for side in rig.sides:
        crease = curve((3.4, 42 - 2 * frown), (2.9, 47), (3.8, 52))
        rig.wrinkle(canvas, mirrored(crease, side), 2.6, frown)


def draw_brows(canvas: Canvas, rig: Rig) -> None:
    au = rig.au
    spread = rig.eye_x - 18.0
    together = min(0.7 * au[4], 5.0)
    height = BROW_Y - (1.0 if rig.child else 0.0)
    inner = (9.2 + spread - together, height + 0.3 - 1.4 * au[1] + 1.15 * au[4])
    middle = (17.5 + spread - 0.6 * together, height - 1.2 - 0.6 * au[1] - 0.75 * au[2] + 0.95 * au[4])
    arch = (25.0 + spread, height - 1.6 - 0.05 * au[1] - 1.4 * au[2] + 0.55 * au[4])
    outer = (31.0 + spread, height + 2.6 - 1.3 * au[2] + 0.25 * au[4])
    line = curve(inner, middle, arch, outer)
    # The inner end is blunt and the outer one pointed, as brows grow; the blunt end makes AU1 and AU4 easy to see.
    tangents = np.gradient(line, axis=0)
    normals = np.stack([-tangents[:, 1], tangents[:, 0]], axis=1) / np.hypot(*tangents.T)[:, None]
    profile = np.interp(np.linspace(0, 1, len(line)), (0, 0.06, 0.3, 1), (0.6, 0.92, 1.0, 0.3))
    reach = normals * (profile * rig.brow_width / 2)[:, None]
    shape = np.concatenate([line + reach, (line - reach)[::-1]])
    for side in rig.sides:
        canvas.polygon(mirrored(shape, side), rig.brow)


@dataclass(frozen=True)
class Eye:
    """One eye's lids: heights in pixels over and under its middle, and the curves they make."""

    x: float
    side: float
    half_width: float
    upper: float
    lower: float

    def lid(self, height: float, x: np.ndarray) -> np.ndarray:
        """The y of a lid of the given height (upwards) at picture columns `x`."""
        place = np.clip((x - self.x) / self.half_width, -1, 1)
        # The outer corner sits a little higher than the inner one.
        return EYE_Y - height * (1 - np.abs(place) ** 2.2) - 0.8 * place * self.side

    def between_lids(self, points: np.ndarray) -> np.ndarray:
        """Points moved into the opening, which cuts a shape off at the lids without a mask."""
        clipped = points.copy()
        clipped[:, 1] = np.clip(points[:, 1], self.lid(self.upper, points[:, 0]), self.lid(-self.lower, points[:, 0]))
        return clipped


def make_eye(rig: Rig, side: float) -> Eye:
    scale, closing = rig.eye_scale, rig.au[43]
    lower = 5.0 * scale - 0.85 * rig.au[6]
    # Lids meet and do not cross: half a pixel of opening is a closed eye.
    upper = max(4.9 * scale + 0.88 * rig.au[5], 0.5 - lower)
    if closing < 0:
        upper -= 0.3 * closing
    elif closing > 0:
        # Both lids go to a line below the middle of the eye, the lower one only a little, as real ones do.
        # The first step covers the most white, so the lids speed up to make every step as easy to see.
        share = min(closing / 5, 1.0)
        share *= 0.6 + 0.4 * share
        meeting = -0.62 * lower
        lower += share * (0.25 - meeting - lower)
        upper += share * (0.25 + meeting - upper)
    return Eye(side * rig.eye_x, side, 9.2 * (0.5 + 0.5 * scale), upper, lower)


def draw_eyes(canvas: Canvas, rig: Rig) -> None:
    """The eyes; AU5 and AU6 move their lids, AU43 closes them over a crease and, beyond 5, squeezes them."""
    closed = rig.evidence(43)
    for side in rig.sides:
        eye = make_eye(rig, side)
        columns = eye.x + np.linspace(-1, 1, 25) * eye.half_width
        top = np.stack([columns, eye.lid(eye.upper, columns)], axis=1)
        bottom = np.stack([columns, eye.lid(-eye.lower, columns)], axis=1)
        if rig.au[5] < 0 or closed > 0:
            rest = np.stack([columns, eye.lid(4.9 * rig.eye_scale, columns)], axis=1)
            canvas.polygon(np.concatenate([rest, top[::-1]]), mix(rig.skin, rig.line, 0.28 + 0.16 * closed))
            rig.wrinkle(canvas, rest[2:-2], 1.6, 0.6 * closed)
        canvas.polygon(np.concatenate([top, bottom[::-1]]), (255, 253, 250))
        radius = 4.9 * rig.eye_scale
        for share, color in ((1.0, mix(rig.iris, INK, 0.45)), (0.8, rig.iris), (0.46, (16, 12, 16))):
            iris = _CIRCLE * (radius * share) + (eye.x, EYE_Y + 0.2)
            canvas.polygon(eye.between_lids(iris), color)
        light = _CIRCLE * (1.5 * rig.eye_scale) + (eye.x - 1.6, EYE_Y - 1.6)
        canvas.polygon(eye.between_lids(light), WHITE)
        canvas.stroke(bottom, 1.3, mix(rig.skin, rig.line, 0.75))
        canvas.stroke(top, (2.6 if rig.feminine else 2.1) + 1.6 * max(closed - 1, 0.0), INK, taper=0.3)
        draw_lashes(canvas, rig, eye, top)


def draw_lashes(canvas: Canvas, rig: Rig, eye: Eye, top: np.ndarray) -> None:
    """A woman's lashes at the outer corner, and everybody's along a lid that closes."""
    closed = rig.evidence(43)
    if rig.feminine:
        corner = np.array([eye.x + eye.side * (eye.half_width - 1), top[[0, -1], 1].min()])
        for reach_x, reach_y in ((4.0, -2.6), (2.0, -4.0)):
            start = corner - (eye.side * (2.6 - reach_x * 0.6), 0.35 * eye.upper * (1.2 - reach_x * 0.25))
            end = start + (eye.side * reach_x, reach_y * max(1 - 1.5 * closed, -0.5))
            canvas.stroke(np.linspace(start, end, 5), 1.8, INK, taper=0.4)
    # They grow from half-way down: an open eye hides them behind the lid.
    length = 3.2 * max(closed - 0.4, 0.0)
    if length > 0:
        for place in (-0.55, -0.2, 0.15, 0.5, 0.8):
            start = np.array([eye.x + eye.side * place * eye.half_width, 0.0])
            start[1] = eye.lid(eye.upper, start[:1])[0]
            lash = np.linspace(start, start + (eye.side * place * 0.8 * length, length), 3)
            canvas.stroke(lash, 1.5, INK, taper=0.4)


def draw_cheeks(canvas: Canvas, rig: Rig) -> None:
    """The blush, which AU6 raises and brightens, the fold it pushes up under the eye, and crow's feet beside it."""
    raised, strength = 0.95 * rig.au[6], rig.evidence(6)
    for side in rig.sides:
        x, y = side * 22.5 * rig.width, 80.5 - raised
        size = 1 + 0.16 * strength
        glow = mix(rig.blush, (246, 92, 84), 0.3 * strength)
        canvas.ellipse(x, y, 8.6 * size, 5.6 * size, mix(rig.skin, glow, 0.5))
        canvas.ellipse(x, y, 6.4 * size, 4.0 * size, glow)
        if strength > 0:
            canvas.ellipse(x, y - 1.2, 4.6 * strength, 1.6 * strength, mix(glow, WHITE, 0.3 * strength))
        under = curve((rig.eye_x - 8, 70.5), (rig.eye_x - 1, 72.6), (rig.eye_x + 8, 69.5)) - (0, 0.42 * raised)
        rig.wrinkle(canvas, mirrored(under, side), 2.4, strength)
        outer = rig.eye_x + 9.8
        for start_y, end_y in ((60.5, 56.5), (63.2, 63.2), (66.0, 69.5)):
            foot = np.linspace((outer, start_y), (outer + 2.4 + 3.0 * strength, end_y), 6)
            rig.wrinkle(canvas, mirrored(foot, side), 2.1, strength)


def draw_nose(canvas: Canvas, rig: Rig) -> None:
    """The nose; AU9 lifts and widens its wings and wrinkles its bridge."""
    lift, spread, strength = 0.85 * rig.au[9], max(0.6 * rig.au[9], -1.5), rig.evidence(9)
    y, half = rig.nose_y, {"man": 7.2, "woman": 6.2}.get(rig.portrait.person, 5.4)
    line = mix(rig.skin, rig.line, 0.8)
    canvas.stroke(curve((3.6, 60), (4.6, 68), (5.4, y - 5)), 2.6, mix(rig.skin, rig.line, 0.16))
    canvas.ellipse(0, y - 3.4, 3.4, 3.0, mix(rig.skin, WHITE, 0.22))
    for side in SIDES:
        wing = curve(
            (half + spread - 0.8, y - 5.5 - lift), (half + spread + 1.2, y - 2.2 - lift), (half - 1.5, y + 0.3)
        )
        canvas.stroke(mirrored(wing, side), 2.0, line, taper=0.5)
        canvas.ellipse(side * (3.1 + 0.5 * spread), y - 0.2 - 0.35 * lift, 1.7, 1.1, line)
        flare = curve(
            (7.6, y - 9.5 - lift), (half + 2.0 + 0.7 * spread, y - 7.6 - lift), (half + 4.6 + spread, y - 3 - lift)
        )
        rig.wrinkle(canvas, mirrored(flare, side), 2.8, strength)
    canvas.stroke(curve((-3.6, y + 0.6), (0, y + 1.6), (3.6, y + 0.6)), 1.8, line)
    for row, reach in ((57.5, 6.2), (62.8, 7.0), (68.0, 7.4)):
        fold = curve((-reach, row - 1.6), (0, row + 0.9), (reach, row - 1.6))
        rig.wrinkle(canvas, fold, 3.0, strength)


@dataclass(frozen=True)
class Mouth:
    """The lips' curves, each `(n, 2)` from the left corner to the right one."""

    upper_outer: np.ndarray
    upper_inner: np.ndarray
    lower_inner: np.ndarray
    lower_outer: np.ndarray
    gap: float
    bared: float

    @property
    def corner(self) -> np.ndarray:
        return self.lower_inner[-1]

    def inside(self, points: np.ndarray) -> np.ndarray:
        """Points moved between the lips, which cuts teeth and tongue off at them without a mask."""
        columns, clipped = self.upper_inner[:, 0], points.copy()
        top = np.interp(points[:, 0], columns, self.upper_inner[:, 1])
        bottom = np.interp(points[:, 0], columns, self.lower_inner[:, 1])
        clipped[:, 1] = np.clip(points[:, 1], top, bottom)
        return clipped


_MOUTH_PLACES = np.sin(np.linspace(-math.pi / 2, math.pi / 2, 29))


def make_mouth(rig: Rig) -> Mouth:
    au, place = rig.au, _MOUTH_PLACES
    half_width = rig.mouth_half_width + 0.6 * au[12] + 1.45 * au[20] - 0.75 * max(au[26], 0.0)
    half_width += -0.5 * au[14] - 0.35 * au[24]
    half_width = min(max(half_width, 6.0), 27.0)
    upper_gap = 0.45 * au[25]
    lower_gap = 0.75 * au[25] + 1.75 * au[26] - 0.6 * max(au[24], 0.0)
    gap = max(upper_gap + lower_gap, 0.0)
    # AU10 bares the upper teeth of lips that are apart; it does not part them.
    bared = 0.4 * max(au[10], 0.0) * min(gap / 2, 1.0)
    upper_gap = min(max(upper_gap, 0.0), gap) + bared
    gap += bared
    lower_gap = gap - upper_gap
    # The corners rest a little high: a straight line between full lips reads as sad.
    corner = -0.7 - 1.35 * au[12] + 1.3 * au[15] + 0.45 * max(au[26], 0.0)
    sag = 0.25 * rig.middle[12]
    own_sag = 0.25 * (au[12] - rig.middle[12])
    pushed = 0.75 * au[17]
    thin = max(1 - 0.085 * au[20], 0.35) * min(max(1 + 0.12 * au[25], 0.5), 1.0) * max(1 - 0.13 * au[24], 0.1)

    bell = 1 - place**2
    center_line = MOUTH_Y + corner * np.abs(place) ** 1.8 + sag * bell - pushed * bell**2
    center_line += own_sag * bell * (1 - np.exp(-((place / 0.4) ** 2)))
    # An open jaw rounds the opening; parted lips leave it a spindle.
    roundness = 1 - 0.45 * min(max(au[26], 0.0), 5.0) / 5
    upper_inner = center_line - upper_gap * bell
    lower_inner = np.maximum(center_line + (lower_gap) * bell**roundness, upper_inner)
    if gap == 0:
        lower_inner = upper_inner
    bow = bell**0.75 * (1 - 0.28 * np.exp(-((place / 0.16) ** 2)))
    full = 1.25 if rig.feminine else 1.0
    # AU10 pulls the lip up on a broad front, which squares the bow.
    upper_outer = np.minimum(upper_inner - 3.5 * full * thin * bow - 0.55 * au[10] * bell**0.5, upper_inner)
    lower_outer = lower_inner + (4.3 * full * thin + 0.15 * max(au[17], 0.0)) * bell**0.8
    x = half_width * place
    return Mouth(*(np.stack([x, y], axis=1) for y in (upper_outer, upper_inner, lower_inner, lower_outer)), gap, bared)


def draw_mouth(canvas: Canvas, rig: Rig) -> Mouth:
    """The lips and the folds around them, with teeth and tongue between them."""
    mouth, au = make_mouth(rig), rig.au
    draw_lip_bulges(canvas, rig, mouth)
    upper_color = mix(rig.lip, INK, 0.14)
    seam = mix(rig.line, INK, 0.45)
    canvas.polygon(np.concatenate([mouth.lower_inner, mouth.lower_outer[::-1]]), rig.lip)
    canvas.polygon(np.concatenate([mouth.upper_outer, mouth.upper_inner[::-1]]), upper_color)
    if mouth.gap > 0:
        canvas.polygon(np.concatenate([mouth.upper_inner, mouth.lower_inner[::-1]]), (84, 20, 30))
        if au[26] > 0:
            middle = mouth.lower_inner[len(mouth.lower_inner) // 2]
            tongue = _CIRCLE * (abs(mouth.corner[0]) * 0.62, 0.9 * au[26]) + middle + (0, 0.2 * au[26])
            canvas.polygon(mouth.inside(tongue), (226, 96, 104))
        if au[25] > 0:
            teeth = np.concatenate([mouth.upper_inner, mouth.upper_inner[::-1] + (0, 0.86 * au[25] + mouth.bared)])
            canvas.polygon(mouth.inside(teeth), (255, 255, 250))
    pressed = rig.evidence(24)
    seam_width = (2.2 if mouth.gap == 0 else 1.2) + 1.0 * pressed
    canvas.stroke(mouth.upper_inner, seam_width, seam, taper=0.4)
    if pressed < 1:
        y, lip = mouth.lower_outer[len(mouth.lower_outer) // 2][1], 1 - pressed
        shine = curve((-4, y - 2.2 * lip), (0, y - 1.7 * lip), (4, y - 2.2 * lip))
        canvas.stroke(shine, 1.4 * lip, mix(rig.lip, WHITE, 0.35))
    # The edge of a lip that AU10 turns up throws a shadow, which shows it where lips have the colour of the skin.
    rig.wrinkle(canvas, mouth.upper_outer[5:-5] - (0, 0.4), 1.8, 0.8 * rig.evidence(10))
    draw_mouth_folds(canvas, rig, mouth)
    return mouth


def draw_lip_bulges(canvas: Canvas, rig: Rig, mouth: Mouth) -> None:
    """The skin that AU24 presses out above and below the lips, with a crease along it."""
    strength = rig.evidence(24)
    if strength == 0:
        return
    middle = len(_MOUTH_PLACES) // 2
    top, bottom = mouth.upper_outer[middle, 1], mouth.lower_outer[middle, 1]
    light = mix(rig.skin, WHITE, 0.24 * strength)
    canvas.ellipse(0, top - 0.4, 9.5, 2.8 * strength, light)
    canvas.ellipse(0, bottom + 0.6, 9.5, 3.4 * strength, light)
    y = bottom + 2.8 + 3.2 * strength
    rig.wrinkle(canvas, curve((-8, y - 1.8), (-3, y - 0.2), (3, y - 0.2), (8, y - 1.8)), 2.6, strength)


def draw_mouth_folds(canvas: Canvas, rig: Rig, mouth: Mouth) -> None:
    """
    Nasolabial folds of AU12, their upper arch of AU10, dimples of AU14, marionette lines of AU15 and the brackets of
    AU20 at the corners.
    """
    x, y = mouth.corner
    smile, sad, stretch = rig.evidence(12), rig.evidence(15), rig.evidence(20)
    sneer, dimple = rig.evidence(10), rig.evidence(14)
    for side in rig.sides:
        top = rig.nose_y - 3.2 - 1.4 * sneer
        arch = curve((9.4, top + 3), (10.8, top + 0.6), (13.4, top), (16.4, top + 3), (18.6, top + 10))
        rig.wrinkle(canvas, mirrored(arch, side), 3.3, sneer)
        start = (9.5, rig.nose_y - 2.5)
        fold = curve(start, (x + 1.5, 0.5 * (rig.nose_y + y) - 3), (x + 4.5, y - 0.5), (x + 3.6, y + 4.5))
        rig.wrinkle(canvas, mirrored(fold, side), 2.5, smile)
        marionette = curve((x + 1.0, y + 1.0), (x + 2.6, y + 4), (x + 2.2, y + 5 + 4 * sad))
        rig.wrinkle(canvas, mirrored(marionette, side), 2.8, sad)
        reach = 2.5 + 2.5 * stretch
        bracket = curve((x + 1.6, y - reach), (x + 3.4, y), (x + 1.6, y + reach))
        rig.wrinkle(canvas, mirrored(bracket, side), 2.7, stretch)
        if dimple > 0:
            size = 0.3 + 0.7 * min(dimple, 1.3)
            canvas.ellipse(side * (x + 3.0), y, 2.8 * size, 4.0 * size, mix(rig.skin, WHITE, 0.3 * dimple))
            pit = mix(rig.skin, rig.line, 0.25 + 0.75 * dimple)
            canvas.ellipse(side * (x + 0.6), y, 1.9 * size, 3.1 * size, pit)
            reach = 2.4 + 3.0 * size
            crescent = curve((x + 3.6, y - reach), (x + 6.2, y), (x + 3.6, y + reach))
            rig.wrinkle(canvas, mirrored(crescent, side), 3.2, dimple)


def draw_chin(canvas: Canvas, rig: Rig, mouth: Mouth) -> None:
    """The chin's shading; AU17 raises its boss under a bold fold and dimples it."""
    strength = rig.evidence(17)
    lip = mouth.lower_outer[len(mouth.lower_outer) // 2][1]
    resting = lip + 0.6 * rig.au[17]
    canvas.stroke(
        curve((-5, resting + 2.4), (0, resting + 3.2), (5, resting + 2.4)), 1.8, mix(rig.skin, rig.line, 0.22)
    )
    if strength == 0:
        return
    y = rig.chin_y - 6.4 - 0.9 * strength
    size = min(strength, 1.3)
    canvas.ellipse(0, y + 1.4, 9.0 * size, 4.6 * size, mix(rig.skin, WHITE, 0.34 * strength))
    fold = curve((-11, y + 3.4), (-7.5, y - 1.8), (0, y - 3.6), (7.5, y - 1.8), (11, y + 3.4))
    rig.wrinkle(canvas, fold, 2.8, strength)
    for x in (-4.4, 0.0, 4.4):
        dimple = curve((x * 1.05, y + 0.2), (x * 0.85, y + 3.6))
        rig.wrinkle(canvas, dimple, 2.4, strength)


def draw_lenses(canvas: Canvas, rig: Rig) -> None:
    """The brighter skin behind the glasses, which sets dark frames off from dark skin; drawn under the eyes."""
    if rig.portrait.glasses == "yes":
        for side in SIDES:
            canvas.ellipse(side * rig.eye_x, LENS_Y, LENS_RADIUS, LENS_RADIUS, mix(rig.skin, WHITE, 0.22))


def draw_glasses(canvas: Canvas, rig: Rig) -> None:
    if rig.portrait.glasses == "no":
        return
    # Blue, because black frames would swallow the lid line that AU5 lifts and the folds of AU9 under the bridge.
    frame = (26, 84, 186)
    for side in SIDES:
        ring = np.concatenate([_CIRCLE, _CIRCLE[:2]]) * LENS_RADIUS + (side * rig.eye_x, LENS_Y)
        canvas.stroke(ring, 2.0, frame, taper=0.0)
        canvas.stroke(
            np.array([(rig.eye_x + 12.5, 61.5), (34, 61.2), (37 * rig.width, 61)]) * (side, 1), 2.0, frame, 0.0
        )
    canvas.stroke(curve((-rig.eye_x + 12.5, 61.5), (0, 59.6), (rig.eye_x - 12.5, 61.5)), 2.0, frame, taper=0.0)


def render(portrait: Portrait, aus: Sequence[float] | None = None) -> Image.Image:
    """Draws the person with the expression.

    Args:
        portrait (`Portrait`):
            Who is drawn, and where.
        aus (`Sequence[float]` of length 12 or 24, *optional*):
            Intensities in the order of `AU_NAMES`, which move both sides alike, or of `TOY_AU_NAMES`, where L and R
            are the person's own left and right and L is on the right-hand side of the picture. They are linear in
            what they move; trained with 0 to 5 and sensible from -3 to 8. `None` is the neutral face.

    Returns:
        `PIL.Image.Image`: RGB, 128 x 128.

    Raises:
        ValueError: `aus` does not have 12 or 24 finite numbers.
    """
    rig = Rig(portrait, _checked_aus(aus))
    shift = (2 * rig.jitter["shift_x"], 1.5 * rig.jitter["shift_y"])
    scale, tilt = 1 + 0.03 * rig.jitter["scale"], math.radians(2 * rig.jitter["tilt"])
    canvas = Canvas(draw_background(rig), shift, scale, tilt)
    body = Canvas(canvas.image, shift, scale)
    draw_hair_back(canvas, rig)
    draw_body(body, rig)
    draw_ears(canvas, rig)
    draw_face(canvas, rig)
    draw_beard(canvas, rig)
    draw_lenses(canvas, rig)
    for half in rig.halves:
        draw_cheeks(canvas, half)
        draw_forehead(canvas, half)
        draw_eyes(canvas, half)
    draw_nose(canvas, rig)
    mouth = draw_across_midline(canvas, rig, draw_mouth)
    draw_chin(canvas, rig, mouth)
    draw_hair_front(canvas, rig)
    draw_ornaments(canvas, rig)
    draw_glasses(canvas, rig)
    for half in rig.halves:
        draw_brows(canvas, half)
    return canvas.image.reduce(SUPERSAMPLING)


def draw_across_midline(canvas: Canvas, rig: Rig, draw: Callable[[Canvas, Rig], Mouth]) -> Mouth:
    """
    Calls `draw`. Where the sides differ, it draws the whole structure once for each of them, as if the other one were
    like it, and the two pictures are joined at the midline. Both give the same midline, which is where the result of
    `draw` may be used.
    """
    if len(rig.halves) == 1:
        return draw(canvas, rig)
    other = canvas.copy()
    first, second = rig.halves
    draw(canvas, first)
    result = draw(other, second)
    canvas.paste_right_half(other)
    return result


def _checked_aus(aus: Sequence[float] | None) -> np.ndarray:
    """The 24 intensities in the order of `TOY_AU_NAMES`."""
    if aus is None:
        return np.zeros(len(TOY_AU_NAMES))
    values = np.asarray(aus, dtype=np.float64)
    if values.shape not in ((len(AU_NAMES),), (len(TOY_AU_NAMES),)):
        raise ValueError(
            f"aus needs {len(AU_NAMES)} intensities in the order {AU_NAMES} or {len(TOY_AU_NAMES)} in the order "
            f"{TOY_AU_NAMES}, got shape {values.shape}."
        )
    if not np.isfinite(values).all():
        raise ValueError(f"aus has to be finite numbers, got {values.tolist()}; 0 is an action unit at rest.")
    return to_toy_aus(values) if len(values) == len(AU_NAMES) else values
