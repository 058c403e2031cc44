"""The drawn world: its people, its words and the rig that its action units move."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from action_units import AU_NAMES
from toy_faces.renderer import (
    ATTRIBUTES,
    IDENTITY_NAMES,
    SIZE,
    Portrait,
    attributes_in,
    caption,
    render,
    sample_aus,
    sample_portrait,
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
    "AU12": (32, 68, 96, 102),
    "AU15": (36, 80, 92, 112),
    "AU17": (44, 74, 84, 112),
    "AU20": (30, 76, 98, 104),
    "AU25": (42, 74, 86, 108),
    "AU26": (22, 66, 106, 128),
}


def unposed(seed, **fixed):
    """A person looking straight from the middle of the picture, so that face regions are picture regions."""
    portrait = sample_portrait(seed, **fixed)
    pose = IDENTITY_NAMES.index("shift_x")
    identity = portrait.identity[:pose] + (0.0,) * (len(IDENTITY_NAMES) - pose)
    return dataclasses.replace(portrait, identity=identity)


def pixels(portrait, **intensities):
    aus = [intensities.get(name, 0.0) for name in AU_NAMES]
    return np.asarray(render(portrait, aus), dtype=np.float32)


def people(**fixed):
    return [unposed(20 + index, skin=skin, **fixed) for index, skin in enumerate(ATTRIBUTES["skin"])]


def test_a_picture_is_rgb_of_the_stated_size_and_the_same_every_time():
    portrait, aus = sample_portrait(3), sample_aus(3)
    picture = render(portrait, aus)
    assert isinstance(picture, Image.Image) and picture.mode == "RGB" and picture.size == (SIZE, SIZE)
    assert np.array_equal(picture, render(sample_portrait(3), sample_aus(3)))


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


@pytest.mark.parametrize("aus", [[0.0] * 11, np.zeros((1, 12)), []])
def test_a_wrong_number_of_intensities_is_refused(aus):
    with pytest.raises(ValueError, match="12"):
        render(sample_portrait(0), aus)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_intensities_that_are_not_finite_are_refused(value):
    with pytest.raises(ValueError, match="finite"):
        render(sample_portrait(0), [value] + [0.0] * 11)


@pytest.mark.parametrize("name", AU_NAMES)
def test_an_action_unit_grows_over_its_range_and_beyond_it(name):
    for portrait in people(glasses="no"):
        lowest = pixels(portrait, **{name: -2.0})
        changes = [np.abs(pixels(portrait, **{name: float(level)}) - lowest).mean() for level in range(-2, 8)]
        assert all(after > before for before, after in zip(changes, changes[1:], strict=False)), changes


@pytest.mark.parametrize("name", AU_NAMES)
def test_an_action_unit_grows_behind_glasses(name):
    for portrait in people(glasses="yes"):
        neutral = pixels(portrait)
        changes = [np.abs(pixels(portrait, **{name: float(level)}) - neutral).mean() for level in range(6)]
        assert all(after > before for before, after in zip(changes, changes[1:], strict=False)), changes


@pytest.mark.parametrize("name", AU_NAMES)
def test_an_action_unit_is_bold_in_its_region_and_absent_elsewhere(name):
    left, top, right, bottom = REGIONS[name]
    for portrait in people() + people(person="man", beard="yes") + people(hair_style="long"):
        neutral = pixels(portrait)
        for level in (-3.0, 5.0, 8.0):
            change = np.abs(pixels(portrait, **{name: level}) - neutral).max(axis=-1)
            inside = change[top:bottom, left:right].copy()
            change[top:bottom, left:right] = 0
            assert change.max() == 0, (name, level, np.argwhere(change)[:3])
            if level == 5.0:
                assert (inside > 40).sum() >= 100, (name, (inside > 40).sum())


def test_extreme_combinations_still_draw():
    rng = np.random.default_rng(0)
    for seed in range(30):
        picture = np.asarray(render(sample_portrait(seed), rng.uniform(-3, 8, len(AU_NAMES))))
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


def test_a_portrait_without_identity_is_the_average_face():
    values = {name: options[0] for name, options in ATTRIBUTES.items()}
    assert Portrait(**values).identity == (0.0,) * len(IDENTITY_NAMES)
