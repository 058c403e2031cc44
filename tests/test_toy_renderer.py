"""The drawn world: its people, its words and the rig that its action units move."""

import dataclasses
import functools
import hashlib
import itertools
import math
import random
import re

import numpy as np
import PIL
import pytest
from PIL import Image

from action_units import AU_NAMES
from toy_faces.renderer import (
    ATTRIBUTES,
    IDENTITY_NAMES,
    MAX_CAPTION_TOKENS,
    SIZE,
    TOY_AU_NAMES,
    Portrait,
    Rig,
    attributes_in,
    caption,
    make_mouth,
    render,
    sample_aus,
    sample_portrait,
    sample_toy_aus,
    to_toy_aus,
)


# Where an action unit may change the picture of an unposed face, in pixels: left, top, right, bottom (exclusive).
# The columns leave room for the widest face; the rows are what keeps one unit out of another's part of the face.
REGIONS = {
    "AU1": (30, 24, 98, 56),
    "AU2": (28, 24, 100, 56),
    "AU4": (28, 36, 100, 62),
    "AU5": (28, 46, 100, 68),
    "AU6": (24, 52, 104, 92),
    "AU9": (42, 52, 86, 84),
    "AU10": (42, 66, 86, 98),
    "AU12": (32, 68, 96, 102),
    "AU14": (40, 78, 88, 98),
    "AU15": (36, 80, 92, 112),
    "AU17": (44, 74, 84, 112),
    "AU20": (30, 76, 98, 104),
    "AU24": (46, 78, 82, 104),
    "AU25": (42, 74, 86, 108),
    "AU26": (22, 66, 106, 128),
    "AU43": (30, 50, 98, 76),
}
SIDED = [name for name in TOY_AU_NAMES if name[-1] in "LR"]
# The person's own left is on the right-hand side of the picture.
HALVES = {"L": slice(SIZE // 2, SIZE), "R": slice(0, SIZE // 2)}

# Of the pictures of `pictures_digest`, as they were before a side could move by itself.
TWO_SIDED_DIGEST = "3d227bfa428fa70ddd59ac79046273ca948831042298e1df358a6fd3eca32abc"
DIGEST_PILLOW = "12.3.0"


def unposed(seed, **fixed):
    """A person looking straight from the middle of the picture, so that face regions are picture regions."""
    portrait = sample_portrait(seed, **fixed)
    pose = IDENTITY_NAMES.index("shift_x")
    identity = portrait.identity[:pose] + (0.0,) * (len(IDENTITY_NAMES) - pose)
    return dataclasses.replace(portrait, identity=identity)


def pixels(portrait, **intensities):
    aus = tuple(intensities.get(name, intensities.get(name.rstrip("LR"), 0.0)) for name in TOY_AU_NAMES)
    return np.array(rendered(portrait, aus), dtype=np.float32)


# Many tests look at the same neutral faces.
rendered = functools.lru_cache(1000)(render)


def people(**fixed):
    return [unposed(20 + index, skin=skin, **fixed) for index, skin in enumerate(ATTRIBUTES["skin"])]


def test_a_picture_is_rgb_of_the_stated_size_and_the_same_every_time():
    portrait, aus = sample_portrait(3), sample_aus(3)
    picture = render(portrait, aus)
    assert isinstance(picture, Image.Image) and picture.mode == "RGB" and picture.size == (SIZE, SIZE)
    assert np.array_equal(picture, render(sample_portrait(3), sample_aus(3)))


def pictures_digest(widen):
    digest, rng = hashlib.sha256(), random.Random(15)
    for seed in range(40):
        aus = sample_aus(seed) if seed % 2 else np.array([rng.uniform(-3, 8) for _ in AU_NAMES])
        digest.update(render(sample_portrait(seed), widen(aus)).tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("widen", [np.array, to_toy_aus])
def test_a_face_with_both_sides_alike_and_no_new_unit_stays_as_it_was_to_the_pixel(widen):
    assert pictures_digest(widen) == TWO_SIDED_DIGEST, (
        f"The pictures changed. The digest was made with Pillow {DIGEST_PILLOW}, this is {PIL.__version__}: "
        "if they differ, Pillow's drawing may have changed; if they do not, the rig has."
    )


def test_no_intensities_mean_the_neutral_face():
    portrait = sample_portrait(5)
    assert np.array_equal(render(portrait), render(portrait, np.zeros(len(AU_NAMES))))


def test_people_differ_and_their_numbers_stay_in_range():
    portraits = [sample_portrait(seed) for seed in range(60)]
    assert len(set(portraits)) == 60
    for name, values in ATTRIBUTES.items():
        assert {getattr(portrait, name) for portrait in portraits} == set(values)
    assert all(-1 <= value <= 1 for portrait in portraits for value in portrait.identity)


def test_fixed_attributes_win_and_leave_the_other_draws_alone():
    fixed = sample_portrait(11, glasses="yes", background="night")
    assert (fixed.glasses, fixed.background) == ("yes", "night")
    assert dataclasses.replace(fixed, glasses="no", background="park") == sample_portrait(
        11, glasses="no", background="park"
    )
    assert all(sample_portrait(seed, beard="yes").person == "man" for seed in range(20))


def test_asking_for_what_is_not_drawn_names_what_is():
    with pytest.raises(ValueError, match="green.*black.*blond"):
        sample_portrait(0, hair_color="green")
    with pytest.raises(ValueError, match="hat.*glasses"):
        sample_portrait(0, hat="yes")
    with pytest.raises(ValueError, match="person='man'"):
        sample_portrait(0, person="girl", beard="yes")
    with pytest.raises(ValueError, match="face_width"):
        dataclasses.replace(sample_portrait(0), identity=(0.0, 0.0))
    with pytest.raises(ValueError, match="allowed values"):
        dataclasses.replace(sample_portrait(0), skin="plaid")


@pytest.mark.parametrize("aus", [[0.0] * 11, np.zeros((1, 12)), [], [0.0] * 23])
def test_a_wrong_number_of_intensities_is_refused(aus):
    for take in (lambda: render(sample_portrait(0), aus), lambda: caption(sample_portrait(0), aus=aus)):
        with pytest.raises(ValueError, match="12 .*'AU26'.* 24 .*'AU43R'"):
            take()


def test_twelve_intensities_widen_to_both_sides():
    wide = to_toy_aus(np.arange(24, dtype=np.float32).reshape(2, 12))
    assert wide.shape == (2, 24) and wide.dtype == np.float32
    for name, column in zip(TOY_AU_NAMES, wide.T, strict=True):
        unit = name.rstrip("LR")
        expected = [AU_NAMES.index(unit) + 12 * row for row in range(2)] if unit in AU_NAMES else [0, 0]
        assert column.tolist() == expected, name
    with pytest.raises(ValueError, match="12 columns.*AU26"):
        to_toy_aus(wide)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_intensities_that_are_not_finite_are_refused(value):
    with pytest.raises(ValueError, match="finite"):
        render(sample_portrait(0), [value] + [0.0] * 11)


@pytest.mark.parametrize("name", [*REGIONS, *SIDED])
def test_an_action_unit_grows_over_its_range_and_beyond_it_and_can_be_read_at_every_step(name):
    for portrait in people(glasses="no"):
        levels = {level: pixels(portrait, **{name: float(level)}) for level in range(-2, 9)}
        changes = [np.abs(levels[level] - levels[-2]).mean() for level in range(-2, 8)]
        assert all(after > before for before, after in itertools.pairwise(changes)), changes
        for level in range(8):
            steps = np.abs(levels[level + 1] - levels[level]).max(axis=-1)
            assert (steps > 20).sum() >= (10 if name in SIDED else 20), (name, level)


@pytest.mark.parametrize("name", [*REGIONS, *SIDED[1::2]])
def test_an_action_unit_grows_behind_glasses(name):
    for portrait in people(glasses="yes")[::3]:
        neutral = pixels(portrait)
        changes = [np.abs(pixels(portrait, **{name: float(level)}) - neutral).mean() for level in range(6)]
        assert all(after > before for before, after in zip(changes, changes[1:], strict=False)), changes


@pytest.mark.parametrize("name", [*REGIONS, *SIDED])
def test_an_action_unit_is_bold_in_its_region_and_absent_elsewhere(name):
    left, top, right, bottom = REGIONS[name.rstrip("LR")]
    for portrait in people() + people(person="man", beard="yes")[::3] + people(hair_style="long")[::3]:
        neutral = pixels(portrait)
        for level in (-3.0, 5.0, 8.0):
            change = np.abs(pixels(portrait, **{name: level}) - neutral).max(axis=-1)
            inside = change[top:bottom, left:right].copy()
            change[top:bottom, left:right] = 0
            assert change.max() == 0, (name, level, np.argwhere(change)[:3])
            if level == 5.0:
                assert (inside > 40).sum() >= (50 if name in SIDED else 100), (name, (inside > 40).sum())


@pytest.mark.parametrize("name", SIDED)
def test_one_side_leaves_the_other_still_to_the_pixel(name):
    own, other = HALVES[name[-1]], HALVES["LR".replace(name[-1], "")]
    bases = (
        {},
        {"AU5": 3.0, "AU10": 4.0, "AU12": 2.0, "AU15": 1.0, "AU25": 4.0, "AU26": 3.0},
        {"AU1": 2.0, "AU4": 3.0, "AU9": 3.0, "AU17": 4.0, "AU24": 3.0},
    )
    for portrait in people(person="man", beard="yes")[:1] + people(glasses="yes")[2:]:
        for base in bases:
            before = pixels(portrait, **base)
            for level in (5.0, 8.0) if base else (-3.0, 5.0, 8.0):
                change = np.abs(pixels(portrait, **base, **{name: level}) - before).max(axis=-1)
                assert change[:, other].max() == 0, (name, level, base)
                assert level < 0 or (change[:, own] > 30).sum() >= 20, (name, level, base)


@pytest.mark.parametrize("name", SIDED)
def test_one_side_of_a_tilted_face_leaves_the_other_still(name):
    for seed in range(6):
        portrait = sample_portrait(seed)
        jitter = dict(zip(IDENTITY_NAMES, portrait.identity, strict=True))
        angle = math.radians(2 * jitter["tilt"])
        rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5
        x, y = columns - SIZE / 2 - 2 * jitter["shift_x"], rows - 66 - 1.5 * jitter["shift_y"]
        across = (x * math.cos(angle) + y * math.sin(angle)) * (1 if name[-1] == "L" else -1)
        change = np.abs(pixels(portrait, **{name: 5.0}) - pixels(portrait)).max(axis=-1)
        # A pixel that the tilted midline passes through belongs to both sides.
        assert change[across < -0.8].max() == 0 and change.max() > 30


def test_both_sides_together_do_what_either_does():
    for name in sorted({name[:-1] for name in SIDED}):
        for portrait in people()[::3]:
            neutral, both = pixels(portrait), pixels(portrait, **{name: 4.0})
            for side, half in HALVES.items():
                alone = pixels(portrait, **{name + side: 4.0})
                # A smile of both sides also lowers the middle of the mouth, which one side leaves where it is.
                differing = (np.abs(alone - both)[:, half].max(axis=-1) > 30).sum()
                moved = (np.abs(both - neutral)[:, half].max(axis=-1) > 30).sum()
                assert differing < 0.4 * moved, (name, side)


def test_the_two_halves_of_a_mouth_meet():
    rng = np.random.default_rng(2)
    for seed in range(50):
        rig = Rig(sample_portrait(seed), rng.uniform(-3, 8, len(TOY_AU_NAMES)))
        right, left = (make_mouth(half) for half in rig.halves)
        for line in ("upper_outer", "upper_inner", "lower_inner", "lower_outer"):
            middle = len(getattr(left, line)) // 2
            assert np.array_equal(getattr(left, line)[middle], getattr(right, line)[middle]), line


def test_no_action_unit_looks_like_another():
    for portrait in people(person="man", beard="yes")[2:] + people(glasses="yes")[:2]:
        pictures = {name: pixels(portrait, **{name: 4.0}) for name in REGIONS}
        for name, other in itertools.combinations(REGIONS, 2):
            assert (np.abs(pictures[name] - pictures[other]).max(axis=-1) > 40).sum() > 100, (name, other)


@pytest.mark.parametrize("name", ["AU43", "AU43L", "AU43R"])
def test_closed_eyes_show_no_white(name):
    for portrait in people(glasses="no"):
        x, y = 18, 63
        for base in ({}, {"AU5": 5.0}, {"AU6": 5.0}):
            picture = pixels(portrait, **base, **{name: 5.0})
            for side, column in (("L", SIZE // 2 + x), ("R", SIZE // 2 - x)):
                eye = picture[y - 8 : y + 8, column - 10 : column + 10]
                white = (eye.min(axis=-1) > 235).sum()
                assert (white == 0) == (name[4:] in ("", side)), (name, side, base, white)


def test_extreme_combinations_still_draw():
    rng = np.random.default_rng(0)
    for seed in range(30):
        for names in (AU_NAMES, TOY_AU_NAMES):
            picture = np.asarray(render(sample_portrait(seed), rng.uniform(-3, 8, len(names))))
            assert picture.std() > 10


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_every_value_of_an_attribute_is_visible(name):
    base = unposed(4, person="man", hair_style="short", hair_color="brown", glasses="no", beard="no")
    pictures = [pixels(dataclasses.replace(base, **{name: value})) for value in ATTRIBUTES[name]]
    for index, first in enumerate(pictures):
        for second in pictures[:index]:
            assert (np.abs(first - second).max(axis=-1) > 30).sum() > 150


def test_the_identity_shows():
    base = sample_portrait(9)
    for index in range(len(IDENTITY_NAMES)):
        low, high = (
            dataclasses.replace(base, identity=base.identity[:index] + (value,) + base.identity[index + 1 :])
            for value in (-1.0, 1.0)
        )
        assert np.abs(pixels(low) - pixels(high)).max() > 20, IDENTITY_NAMES[index]


def test_the_canonical_caption_names_every_attribute():
    for seed in range(200):
        portrait = sample_portrait(seed)
        expected = {**portrait.attributes}
        if portrait.person != "man":
            del expected["beard"]
        assert attributes_in(caption(portrait)) == expected


def test_a_varied_caption_names_nothing_wrong_and_always_the_person():
    named = []
    for seed in range(600):
        portrait = sample_portrait(seed)
        words = caption(portrait, seed)
        found = attributes_in(words)
        assert words == words.lower() and "  " not in words and " ," not in words
        assert found["person"] == portrait.person
        assert all(getattr(portrait, name) == value for name, value in found.items()), words
        named += [name for name in ATTRIBUTES if name in found]
    for name in ("skin", "hair_color", "hair_style", "clothes", "garment", "background"):
        assert 0.7 < named.count(name) / 600 < 0.9


def test_a_varied_caption_is_reproducible_and_varied():
    portrait = sample_portrait(1)
    assert caption(portrait, 7) == caption(portrait, 7)
    assert len({caption(portrait, seed) for seed in range(40)}) > 30


def test_a_caption_names_the_expression_only_where_it_is_asked_to():
    portrait, aus = sample_portrait(1), np.zeros(12, np.float32)
    aus[[0, 6, 9]] = 0.2, 3, 5
    assert caption(portrait, aus=aus) == caption(portrait) + ", smiling mouth, very stretched lips"
    silent = caption(portrait, 7)
    assert caption(portrait, 7, aus).startswith(silent)
    assert attributes_in(caption(portrait, 7, aus)) == attributes_in(silent)


def said(**intensities):
    return caption(sample_portrait(1), aus=toy_aus(**intensities)).removeprefix(caption(sample_portrait(1)))


def toy_aus(**intensities):
    return np.array([intensities.get(name, intensities.get(name.rstrip("LR"), 0.0)) for name in TOY_AU_NAMES])


def test_a_caption_names_the_side_that_moves():
    assert said(AU1L=3) == ", raised left inner brow"
    assert said(AU12R=5, AU14R=1) == ", very smiling right mouth corner, slightly dimpled right mouth corner"
    assert said(AU12L=3.2, AU12R=2.8) == ", smiling mouth"
    assert said(AU4L=1, AU4R=4) == ", slightly lowered left brow, very lowered right brow"
    assert said(AU10=3, AU14=3, AU24=3, AU43=3) == (
        ", raised upper lip, dimpled mouth corners, pressed lips, closed eyes"
    )
    assert said(AU43L=4, AU6L=3, AU2R=3) == ", raised right outer brow, lifted left cheek, very closed left eye"


def test_twelve_intensities_are_said_alike_in_both_widths():
    for seed in range(100):
        portrait, aus = sample_portrait(seed), sample_aus(seed)
        words = caption(portrait, seed, aus)
        if len(re.findall(r"\w+|,", words)) <= MAX_CAPTION_TOKENS:
            assert caption(portrait, seed, to_toy_aus(aus)) == words


def test_a_caption_of_the_larger_world_fits_into_the_text_encoder():
    from toy_faces.networks import MAX_TOKENS

    assert MAX_CAPTION_TOKENS == MAX_TOKENS - 2
    fullest = 0
    for seed in range(300):
        portrait, aus = sample_portrait(seed), sample_toy_aus(seed)
        for words in (caption(portrait, seed, aus), caption(portrait, None, aus)):
            tokens = len(re.findall(r"\w+|,", words))
            assert tokens <= MAX_CAPTION_TOKENS
            fullest = max(fullest, tokens)
    assert fullest > MAX_CAPTION_TOKENS - 6
    # What is dropped is the weakest.
    everything = said(**{name: 1.0 + index / 10 for index, name in enumerate(TOY_AU_NAMES)})
    assert everything.endswith("closed eyes") and "inner brow" not in everything


def test_a_prompt_is_read_for_what_it_names_and_no_more():
    assert attributes_in("A closeup of a girl with long red hair and glasses in a park, wearing a blue sweater") == {
        "person": "girl",
        "hair_color": "red",
        "hair_style": "long",
        "glasses": "yes",
        "clothes": "blue",
        "garment": "sweater",
        "background": "park",
    }
    assert attributes_in("a bald man without glasses, grey beard, in a brown study") == {
        "person": "man",
        "hair_style": "bald",
        "glasses": "no",
        "beard": "yes",
    }
    assert attributes_in("a still life") == {}


def test_sampled_intensities_follow_their_recipe():
    rows = np.stack([sample_aus(seed) for seed in range(2000)])
    assert rows.dtype == np.float32 and rows.shape == (2000, len(AU_NAMES))
    assert np.array_equal(rows[5], sample_aus(5))
    active = (rows > 0).sum(axis=1)
    assert 0.07 < (active == 0).mean() < 0.13
    assert 0.25 < (active == 1).mean() < 0.35
    assert active.max() == 5
    values = rows[rows > 0]
    assert values.min() > 0.5 and values.max() <= 5
    assert ((rows > 0).mean(axis=0) > 0.1).all()


def test_sampled_intensities_of_the_larger_world_follow_their_recipe():
    rows = np.stack([sample_toy_aus(seed) for seed in range(4000)])
    assert rows.dtype == np.float32 and rows.shape == (4000, len(TOY_AU_NAMES))
    assert np.array_equal(rows[5], sample_toy_aus(5))
    values = rows[rows > 0]
    assert values.min() > 0.5 and values.max() <= 5
    assert ((rows > 0).mean(axis=0) > 0.08).all()
    assert 0.08 < (rows == 0).all(axis=1).mean() < 0.12

    columns = {name: rows[:, index] for index, name in enumerate(TOY_AU_NAMES)}
    lefts, rights = (np.stack([columns[name[:-1] + side] for name in SIDED[::2]], axis=1) for side in "LR")
    differing = (lefts != rights).any(axis=1)
    assert 0.35 < differing.mean() < 0.65
    assert 0.12 < (differing & ((rows > 0).sum(axis=1) == 1)).mean() < 0.25
    # Either side is as likely to move.
    assert np.allclose((lefts > 0).mean(axis=0), (rights > 0).mean(axis=0), atol=0.03)
    closed = np.maximum(columns["AU43L"], columns["AU43R"]) > 0
    assert not (closed & (columns["AU5"] > 0)).any()
    assert not ((columns["AU24"] > 0) & (columns["AU25"] + columns["AU26"] > 0)).any()
    winks = (columns["AU43L"] > 0) != (columns["AU43R"] > 0)
    contempt = (columns["AU12R"] > 0) & (columns["AU14R"] > 0) & (columns["AU12L"] + columns["AU14L"] == 0)
    raised = (columns["AU2L"] > 0) & (columns["AU4R"] > 0) & (columns["AU2R"] + columns["AU4L"] == 0)
    assert winks.mean() > 0.04 and contempt.mean() > 0.003 and raised.mean() > 0.003


def test_a_portrait_without_identity_is_the_average_face():
    values = {name: options[0] for name, options in ATTRIBUTES.items()}
    assert Portrait(**values).identity == (0.0,) * len(IDENTITY_NAMES)
