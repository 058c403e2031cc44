import math
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import action_units
from action_units import (
    ACTION_UNITS,
    AU_NAMES,
    MAX_INTENSITY,
    PRESETS,
    action_units_of,
    au_columns,
    au_image_embeds,
    available_presets,
    extract_au_tags,
    format_aus,
    mirrored_columns,
    parse_aus,
    parse_aus_per_prompt,
    read_aus,
)


ALL_NAMES = ", ".join(AU_NAMES)
# An adapter with sides, one AU that has none between them, and AUs beyond the twelve.
SIDED = ("AU4L", "AU4R", "AU26", "AU12L", "AU12R", "AU43L", "AU43R", "AU24")
EVERY_AU = tuple(f"{unit.name}{side}" for unit in ACTION_UNITS for side in ("LR" if unit.sided else [""]))
RAMP = [0.25 * index for index in range(12)]


def as_dict(aus, au_names=AU_NAMES):
    """The AUs that are not 0, by name; for one expression."""
    (row,) = parse_aus(aus, au_names=au_names).tolist()
    return {name: value for name, value in zip(au_names, row, strict=True) if value}


def message(aus, au_names=AU_NAMES):
    with pytest.raises(ValueError) as error:
        parse_aus(aus, au_names=au_names)
    return str(error.value)


# The tables.


def test_the_12_aus_of_the_paper_in_order():
    assert AU_NAMES == tuple(f"AU{number}" for number in (1, 2, 4, 5, 6, 9, 12, 15, 17, 20, 25, 26))


def test_every_au_says_what_it_is():
    for action_unit in ACTION_UNITS:
        assert all((action_unit.facs_name, action_unit.muscles, action_unit.hint))
        assert action_unit.region in "brow eye cheek nose mouth chin jaw neck head gaze".split()
    assert len({action_unit.facs_name for action_unit in ACTION_UNITS}) == len(ACTION_UNITS)


def test_every_au_of_facs_is_there_in_order():
    numbers = [int(unit.name.removeprefix("AU")) for unit in ACTION_UNITS]
    assert numbers == sorted(set(range(1, 47)) - {3, 40} | set(range(51, 59)) | set(range(61, 67)))
    assert {unit.name for unit in ACTION_UNITS if unit.sided} >= {f"AU{n}" for n in (1, 2, 4, 6, 12, 14, 15, 43)}
    assert not {unit.name for unit in ACTION_UNITS if unit.sided} & {"AU17", "AU25", "AU26", "AU27", "AU61"}


def test_antagonists_are_mutual():
    by_name = {unit.name: unit for unit in ACTION_UNITS}
    assert "AU12" in by_name["AU15"].antagonists and "AU43" in by_name["AU5"].antagonists
    for unit in ACTION_UNITS:
        assert all(unit.name in by_name[other].antagonists for other in unit.antagonists)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_parses_within_facs_and_has_a_source(name):
    preset = PRESETS[name]
    assert re.fullmatch("[a-z]+( [a-z]+)*", name)
    assert len(preset.source) > 10
    needed = ["AU12L", "AU12R"] if not preset.aus else []
    for au in preset.aus:
        sides = [f"{au[:-1]}L", f"{au[:-1]}R"] if au[-1] in "LR" else [au]
        needed += [side for side in sides if side not in needed]
    # Whoever mixes a side and both sides of an AU in a preset gets an error here.
    assert as_dict(name, needed) == as_dict(preset, needed) == as_dict(preset.aus, needed) == preset.aus
    assert all(0 < value <= 5 for value in preset.aus.values())
    assert parse_aus(name, au_names=EVERY_AU).any() or name == "neutral"


def test_presets_are_distinct():
    assert len({format_aus(name, EVERY_AU) for name in PRESETS}) == len(PRESETS)


def test_presets_cover_basic_compound_and_everyday_expressions():
    basic = {"happy", "sad", "surprised", "fearful", "angry", "disgusted", "contemptuous"}
    compound = {name for name, preset in PRESETS.items() if preset.source.startswith("Du, Tao & Martinez")}
    assert basic < set(available_presets()) and len(compound) == 15
    assert len(available_presets().keys() - basic - compound) >= 10
    assert PRESETS.keys() - available_presets() >= {"smirk", "wink", "contempt", "one raised brow", "tight lipped"}


def test_presets_are_offered_where_an_adapter_has_their_aus():
    assert {"wink", "smirk", "neutral", "eyes closed"} <= available_presets(("AU6", *SIDED)).keys()
    assert not {"wink", "happy"} & available_presets(SIDED).keys()  # both need AU6
    assert available_presets(EVERY_AU) == PRESETS
    assert PRESETS["contempt"].missing_aus((*SIDED, "AU14")) == ["AU14R"]
    text = message("contempt", (*SIDED, "AU14"))
    assert text.startswith("`aus` is the preset 'contempt', which needs AU14R, but this model knows AU4L, AU4R, AU26,")


def test_a_compound_preset_follows_its_rule_and_names_what_is_missing():
    preset = PRESETS["angrily disgusted"]
    assert preset.aus == {"AU4": 4, "AU9": 3, "AU17": 4}
    assert "4+10+17" in preset.source and "Without AU7, AU10, AU24 (AU9 for AU10)" in preset.source


# What parse_aus reads.


@pytest.mark.parametrize(
    ("aus", "expected"),
    [
        ({"AU6": 2.5, "AU12": 5}, {"AU6": 2.5, "AU12": 5}),
        ({"au06": 1, "12": 2, 26: 3, np.int64(1): np.float32(4)}, {"AU6": 1, "AU12": 2, "AU26": 3, "AU1": 4}),
        ({"AU4": Fraction(1, 2)}, {"AU4": 0.5}),
        ({}, {}),
        ("", {}),
        (" \n", {}),
        ("neutral", {}),
        ("AU6=2.5 AU12=5", {"AU6": 2.5, "AU12": 5}),
        ("au6 = 2.5,  12=5e0", {"AU6": 2.5, "AU12": 5}),
        ("AU12=-10 AU05=+.5", {"AU12": -10, "AU5": 0.5}),
        ("6C+12D", {"AU6": 3, "AU12": 4}),
        ("1+2+5B+26", {"AU1": 3, "AU2": 3, "AU5": 2, "AU26": 3}),
        ("AU 6a + au12E", {"AU6": 1, "AU12": 5}),
        ("AU6, AU12 AU25", {"AU6": 3, "AU12": 3, "AU25": 3}),
        ("12", {"AU12": 3}),
        ("polite smile", {"AU12": 3}),
        ("Polite-Smile", {"AU12": 3}),
        ("POLITE__SMILE @ 0.5", {"AU12": 1.5}),
        ("polite smile@-1", {"AU12": -3}),
        ([0] * 4 + [2] + [0] * 7, {"AU6": 2}),
        ("happy@0.5 + AU4=2", {"AU4": 2, "AU6": 2, "AU12": 2}),
        ("AU4=2 AU5=+.5+polite-smile@+0.5 + 25A", {"AU4": 2, "AU5": 0.5, "AU12": 1.5, "AU25": 1}),
        (
            "surprised@0.5+polite smile + 25C+ neutral",
            {"AU1": 2, "AU2": 2, "AU5": 1, "AU12": 3, "AU25": 4.5, "AU26": 2},
        ),
        ("polite smile + polite smile@-.5", {"AU12": 1.5}),
        ("AU6=3 + 12D", {"AU6": 3, "AU12": 4}),
    ],
)
def test_one_expression(aus, expected):
    assert parse_aus(aus).shape == (1, 12)
    assert as_dict(aus) == expected


def test_arrays_of_every_kind_read_alike():
    expected = torch.tensor(RAMP)
    for array in (
        RAMP,
        tuple(RAMP),
        expected,
        expected.to(torch.bfloat16),
        torch.nn.Parameter(expected.double()),
        np.array(RAMP),
        np.array(RAMP[::-1], dtype=np.float16)[::-1],
    ):
        assert torch.equal(parse_aus(array), expected[None])
    batch = torch.stack([expected, expected + 1])
    for array in (batch, batch.numpy(), batch.tolist(), list(batch), batch.T.contiguous().T):
        assert torch.equal(parse_aus(array), batch)


def test_result_is_plain_float32_on_the_cpu_that_shares_nothing():
    source = torch.zeros(2, 12, requires_grad=True)
    parsed = parse_aus(source)
    parsed += 1
    assert parsed.dtype == torch.float32 and parsed.device.type == "cpu" and not parsed.requires_grad
    assert source.sum() == 0


def test_a_list_has_one_expression_per_prompt_in_any_mix_of_forms():
    forms = [{"AU6": 3}, "6C", "AU6=3", "squinting@0", torch.zeros(12), RAMP, np.zeros(12), parse_aus("6C"), {}]
    parsed = parse_aus(forms)
    assert torch.equal(parsed, torch.cat([parse_aus(form) for form in forms]))
    assert torch.equal(parse_aus(np.array(["happy", "sad"])), parse_aus(("happy", "sad")))
    assert parse_aus(["happy"] * 12).shape == (12, 12)


# What parse_aus refuses: the message says where, what came, what is allowed, and the way out.


@pytest.mark.parametrize(
    ("aus", "parts"),
    [
        ({"AU7": 1}, ["`aus`", "'AU7'", "does not know", ALL_NAMES]),
        ("AU7=1", ["'AU7'", ALL_NAMES]),
        ("6C+7D", ["'7'", ALL_NAMES]),
        ({7: 1}, ["'7'", ALL_NAMES]),
        ({-6: 1}, ["-6", ALL_NAMES]),
        ({True: 1}, ["True", ALL_NAMES]),
        ({None: 1}, ["None", ALL_NAMES]),
        ({10**5000: 1}, ["too large", ALL_NAMES]),
        ([{}, {"AU7": 1}], ["`aus[1]`", "'AU7'"]),
        ("AU7=1", ["'AU7' (Lid Tightener)", "The nearest is AU6 (Cheek Raiser)."]),
        ("10C", ["'10' (Upper Lip Raiser)", "The nearest is AU9 (Nose Wrinkler)."]),
        ("43E", ["'43' (Eyes Closed)", ALL_NAMES]),
        ("AU112=3", ["'AU112'", "The nearest is AU12."]),
        ("AU99=3", ["'AU99'", f"It knows {ALL_NAMES}."]),
        ({"AU6": 1, "au06": 2}, ["AU6 twice", "once"]),
        ("6C+12D+AU6", ["AU6 twice", "once"]),
        ("AU6=1 6=1", ["AU6 twice"]),
        ({"AU6": math.nan}, ["AU6", "nan", "finite"]),
        ({"AU6": math.inf}, ["AU6", "inf", "finite"]),
        ("AU6=1e400", ["AU6", "inf", "finite"]),
        ("AU6=nan", ["AU6", "nan", "finite"]),
        ({"AU6": 10**5000}, ["AU6", "too large", "-10 to 10"]),
        ({"AU6": 10.01}, ["AU6", "10.01", "0 (absent)", "5 (grade E)", "-10 to 10"]),
        ([0] * 11 + [-11], ["AU26", "-11", "-10 to 10"]),
        (torch.full((3, 12), 99), ["`aus[0]`", "AU1", "99"]),
        ({"AU6": "2.5"}, ["AU6", "'2.5'", "number"]),
        ({"AU6": True}, ["AU6", "True", "number"]),
        ({"AU6": None}, ["AU6", "None", "number"]),
        ({"AU6": 1j}, ["AU6", "complex", "number"]),
        ([True] * 12, ["AU1", "True", "number"]),
        ("happy@12", ["AU6", "48", "-10 to 10"]),
        ("happy@", ["'happy'", "''", "finite number", "doubtful@0.5"]),
        ("happy@much", ["'much'", "finite number"]),
        ("happy@nan", ["'nan'", "finite number"]),
        ("6C@0.5", ["'6C'", "only presets", "6C+12D"]),
        ("doutful", ["'doutful'", "Did you mean 'doubtful'?"]),
        ("Hapily-Surprised@0.5", ["Did you mean 'happily surprised'?"]),
        ("anger", ["Did you mean 'angry'?"]),
        ("xyzzy", ["'xyzzy'", "AU6=3 AU12=5", "6C+12D", "The presets are: neutral, happy,"]),
        ("6F+12D", ["AU6", "grade 'F'", "A, B, C, D, E", "1, 2, 3, 4, 5", "AU6=2.5"]),
        ("R12A+R14A", ["'R12'", "both sides of AU12 alike", "leave out the L or R", ALL_NAMES]),
        ("12L", ["'12L'", "both sides"]),
        ("AUL12=2", ["'AUL12'", "both sides"]),
        ({"L12": 2}, ["'L12'", "both sides"]),
        ("AU6=2,5 AU12=5", ["'5'", "decimal point"]),
        ("AU6=C", ["'AU6=C'", "AU6=2.5"]),
        ("AU6=1_0", ["'AU6=1_0'"]),
        ("AU6=٣", ["AU6=2.5"]),
        ("AU6=3 12", ["'12'", "AU6=2.5"]),
        ("6++12", ["separator", "6++12"]),
        ("happy +", ["separator", "happy"]),
        ("happy + AU4=2 AU4=1", ["AU4 twice"]),
        ("happy + AU12=7", ["AU12", "11", "-10 to 10"]),
        ("happy + sadd", ["'sadd'", "Did you mean 'sad'?"]),
        ("AU4=2 happy", ["'happy'", "a plus before or after a preset"]),
        ("6+", ["separator"]),
        ("AU6=3,", ["separator"]),
        ([1, 2, 3], ["wrong count", "3", "12", ALL_NAMES]),
        ([0] * 13, ["wrong count", "13"]),
        ([[0] * 12, [0] * 11], ["`aus[1]`", "11", "12"]),
        (torch.zeros(13), ["shape (13,)", "(12,) or (batch, 12)"]),
        (torch.zeros(2, 2, 12), ["shape (2, 2, 12)"]),
        (torch.zeros(0, 12), ["shape (0, 12)"]),
        (torch.tensor(1.0), ["shape ()"]),
        ([torch.zeros(2, 12)], ["`aus[0]`", "2 expressions", "one prompt"]),
        (np.zeros((2, 13)), ["`aus[0]`", "13", "12"]),
        (torch.zeros(12, dtype=torch.complex64), ["complex64", "real numbers"]),
        (torch.zeros(12, dtype=torch.bool), ["bool", "real numbers"]),
        (torch.zeros(2, 12).to_sparse(), ["sparse", "dense"]),
        (torch.zeros(12, device="meta"), ["meta", "float32 tensor"]),
        ([], ["empty", "Give a dict"]),
        (np.zeros(0), ["empty", "Give a dict"]),
        (None, ["NoneType", "Give a dict", "a string", "12 numbers", "per prompt"]),
        (3.0, ["float", "Give a dict"]),
        (b"6C", ["bytes", "Give a dict"]),
        ({"AU6"}, ["set", "Give a dict"]),
        (object(), ["object", "Give a dict"]),
        (["happy", None], ["`aus[1]`", "NoneType"]),
        (["happy", [["sad"]]], ["`aus[1]`", "other things than numbers"]),
        ([1j] * 12, ["`aus[0]`", "complex"]),
    ],
    ids=lambda value: None if isinstance(value, list) else type(value).__name__,
)
def test_bad_input_names_cause_and_way_out(aus, parts):
    text = message(aus)
    assert text.startswith("`aus")
    assert not [part for part in parts if part not in text], text
    assert len(text) < 900


def test_messages_use_the_callers_name_for_the_argument():
    with pytest.raises(ValueError, match=r"^`negative_aus\[1\]` names 'AU7'"):
        parse_aus([{}, {"AU7": 1}], "negative_aus")


def test_a_nested_tensor_is_refused():
    tensor = torch.nested.nested_tensor([torch.zeros(12), torch.zeros(12)], layout=torch.jagged)
    assert "dense real numbers" in message(tensor)


def test_a_list_that_holds_itself_is_refused():
    aus = []
    aus.append(aus)
    assert "`aus[0]`" in message(aus)


@pytest.mark.parametrize("text", ["0" * 10**6, " " * 10**6 + "x", "6+" * 10**5, "AU6=" + "9" * 10**6, "a" * 10**6])
def test_long_strings_are_refused_at_once_and_quoted_short(text):
    assert len(message(text)) < 900


# format_aus.


def test_format_leaves_zeros_out_and_numbers_short():
    assert format_aus(parse_aus("AU12=5 AU6=2.50")) == "AU6=2.5 AU12=5"
    assert format_aus({"AU1": 0.1, "AU2": 10, "AU4": -3, "AU5": 1 / 3}) == "AU1=0.1 AU2=10 AU4=-3 AU5=0.33333334"
    assert format_aus(torch.zeros(12)) == format_aus([-0.0] * 12) == "neutral"


def test_format_takes_one_expression():
    assert format_aus(torch.ones(1, 12)) == format_aus([1] * 12)
    with pytest.raises(ValueError, match="`vector` holds 2 expressions"):
        format_aus(torch.ones(2, 12))
    with pytest.raises(ValueError, match="`vector` has the shape"):
        format_aus(torch.ones(11))


intensities = st.floats(-MAX_INTENSITY, MAX_INTENSITY, width=32)


@settings(max_examples=150, deadline=None)
@given(st.lists(intensities, min_size=12, max_size=12))
def test_format_reads_back_to_the_same_float32(values):
    vector = torch.tensor(values)
    text = format_aus(vector)
    assert torch.equal(parse_aus(text)[0], vector)
    assert format_aus(text) == text


def test_format_writes_a_side_only_where_sides_differ():
    assert format_aus({"12L": 3, "12R": 3, "AU26": 1}, SIDED) == "AU26=1 AU12=3"
    assert format_aus("R4B+L12C+12R", SIDED) == "AU4R=2 AU12=3"
    assert format_aus("L12C+R12A", SIDED) == "AU12L=3 AU12R=1"
    assert format_aus([0] * 8, SIDED) == "neutral"


def lists_of_aus():
    """Any list of AUs that an adapter may have."""
    units = st.lists(st.sampled_from(ACTION_UNITS), min_size=1, max_size=12, unique=True)
    lists = units.flatmap(lambda chosen: st.tuples(*(st.tuples(st.just(unit), st.booleans()) for unit in chosen)))
    return lists.map(
        lambda chosen: [
            f"{unit.name}{side}" for unit, is_sided in chosen for side in ("LR" if unit.sided and is_sided else [""])
        ]
    ).flatmap(st.permutations)


@settings(max_examples=150, deadline=None)
@given(lists_of_aus(), st.data())
def test_format_reads_back_with_any_list_of_aus(au_names, data):
    # Few values, so that sides often agree.
    few = st.sampled_from([0.0, -0.0, 3.0]) | intensities
    vector = torch.tensor(data.draw(st.lists(few, min_size=len(au_names), max_size=len(au_names))))
    text = format_aus(vector, au_names)
    assert torch.equal(parse_aus(text, au_names=au_names)[0], vector)
    assert format_aus(text, au_names) == text
    short = text.lower().replace("au", "")
    assert read_aus(short, au_names=au_names) == read_aus(text, au_names=au_names)
    # A mirror swaps left and right, and a second mirror swaps them back.
    if any((f"AU{number}" in au_names) != (f"AU{number + 1}" in au_names) for number in (51, 55, 61)):
        with pytest.raises(ValueError, match="in a mirror"):
            mirrored_columns(au_names)
        return
    order = mirrored_columns(au_names)
    mirrored = format_aus(vector[order], au_names)
    opposite = {"L": "R", "R": "L", "51": "52", "52": "51", "55": "56", "56": "55", "61": "62", "62": "61"}
    swapped = re.sub("([LR]|51|52|55|56|61|62)=", lambda match: f"{opposite[match[1]]}=", text)
    assert torch.equal(parse_aus(swapped, au_names=au_names), parse_aus(mirrored, au_names=au_names))
    assert torch.equal(vector[order][order], vector)


# Lists of AUs other than the twelve.


@pytest.mark.parametrize(
    ("aus", "expected"),
    [
        ({"AU12L": 1, "12R": 2, "L4": 3, "AUR4": 4}, {"AU12L": 1, "AU12R": 2, "AU4L": 3, "AU4R": 4}),
        ({"AU12": 2, 4: 1}, {"AU12L": 2, "AU12R": 2, "AU4L": 1, "AU4R": 1}),
        ("AU12L=3", {"AU12L": 3}),
        ("au12r=3 L4=1, 26=2", {"AU12R": 3, "AU4L": 1, "AU26": 2}),
        ("L12C+R4B", {"AU12L": 3, "AU4R": 2}),
        ("12LC + AU R4", {"AU12L": 3, "AU4R": 3}),
        ("12C", {"AU12L": 3, "AU12R": 3}),
        ("l12 r12e", {"AU12L": 3, "AU12R": 5}),
        ("smirk@0.5", {"AU12R": 2}),
        ("eyes closed + smirk@0.5 + L12A", {"AU43L": 5, "AU43R": 5, "AU12R": 2, "AU12L": 1}),
        ("polite smile + smirk@0.5", {"AU12L": 3, "AU12R": 5}),
        (torch.eye(8)[4], {"AU12R": 1}),
        ([0, 0, 0, 2.0, 0, 0, 0, 0], {"AU12L": 2}),
    ],
)
def test_an_adapter_with_sides(aus, expected):
    assert parse_aus(aus, au_names=SIDED).shape == (1, 8)
    assert as_dict(aus, SIDED) == expected


@pytest.mark.parametrize(
    ("aus", "parts"),
    [
        ({"AU12": 1, "AU12L": 2}, ["AU12L twice", "Give each AU once"]),
        ("AU12R=1 AU12=2", ["AU12R twice (AU12 is both its sides)"]),
        ("L12C+12LC", ["AU12L twice"]),
        ("L26C", ["'L26'", "both sides of AU26 alike", "leave out the L or R"]),
        ("L7C", ["'L7' (Lid Tightener)", "does not know", ", ".join(SIDED), "nearest is AU"]),
        ("L15C", ["'L15'", "nearest is AU"]),
        ("LR12", ["'LR12'", "does not know"]),
        ("L12F", ["AU12L", "grade 'F'"]),
        ("wink", ["'wink'", "needs AU6", ", ".join(SIDED)]),
        (torch.zeros(12), ["shape (12,)", "(8,) or (batch, 8)", ", ".join(SIDED)]),
        ([0] * 12, ["12", "needs 8"]),
    ],
)
def test_what_an_adapter_with_sides_refuses(aus, parts):
    text = message(aus, SIDED)
    assert not [part for part in parts if part not in text], text


def test_the_nearest_au_keeps_its_side():
    assert "nearest is AU6L (" in message("L7C", ("AU6L", "AU6R", "AU12L", "AU12R"))
    assert "AU15" not in message("AU12=3", ("AU15", "AU26")).partition("nearest")[2]  # an antagonist


@pytest.mark.parametrize(
    ("asked", "nearest"),
    [("R46", "AU43R"), ("45", "AU43"), ("13", "AU12"), ("38", "AU9"), ("23", "AU24"), ("51", None), ("61", None)],
)
def test_the_nearest_au_shares_a_muscle_or_the_region(asked, nearest):
    text = message(asked, (*AU_NAMES[:6], "AU12L", "AU12R", "AU24", "AU26", "AU43L", "AU43R"))
    assert text.partition(" The nearest is ")[2].partition(" (")[0] == (nearest or "")
    assert "AU6" not in message("24", AU_NAMES).partition("nearest")[2]  # another orbicularis


@pytest.mark.parametrize(
    ("au_names", "text"),
    [
        ([], "`au_names` is empty"),
        (["AU3"], "'AU3', which is no AU of FACS"),
        (["12"], "Names are written AU12"),
        (["AU012"], "no AU of FACS"),
        (["AU12LR"], "no AU of FACS"),
        ([12], "no AU of FACS"),
        ("AU12", "'A', which is no AU"),
        (["AU26L", "AU26R"], "AU26 (Jaw Drop) has no sides"),
        (["AU12", "AU12"], "AU12 twice"),
        (["AU12L"], "both AU12L and AU12R"),
        (["AU12L", "AU12R", "AU12"], "no AU12 beside them"),
    ],
)
def test_a_list_that_no_adapter_can_have_is_an_error(au_names, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        au_columns(au_names)
    with pytest.raises(ValueError, match=re.escape(text)):
        parse_aus("neutral" if au_names else {}, au_names=au_names)


def test_the_action_units_of_an_adapter():
    assert [unit.name for unit in action_units_of()] == list(AU_NAMES)
    assert [unit.name for unit in action_units_of(SIDED)] == ["AU4", "AU26", "AU12", "AU43", "AU24"]


# What goes into diffusers' `ip_adapter_image_embeds`.


def test_image_embeds_are_the_negative_aus_and_the_aus():
    [embeds] = au_image_embeds(["12E", None], "4B")
    assert embeds.shape == (4, 1, 12) and embeds.dtype == torch.float32
    negative, positive = embeds.chunk(2)  # as diffusers does
    assert torch.equal(positive[:, 0], parse_aus(["12E", {}]))
    assert torch.equal(negative[:, 0], parse_aus(["4B", "4B"]))


@pytest.mark.parametrize(
    ("aus", "kwargs", "shape"),
    [
        ("happy", {}, (2, 1, 12)),
        (None, {}, (2, 1, 12)),
        (torch.ones(3, 12), {}, (6, 1, 12)),
        ([1.0] * 12, {}, (2, 1, 12)),
        (np.ones((3, 12)), {"do_classifier_free_guidance": False}, (3, 1, 12)),
        (["happy", "sad"], {"do_classifier_free_guidance": False, "dtype": torch.float16}, (2, 1, 12)),
        ("smirk", {"au_names": SIDED}, (2, 1, 8)),
        (["happy", "sad", None], {"num_people": 3}, (2, 3, 12)),
        ([["happy", "sad"], ["sad", "happy"]], {"num_people": 2, "do_classifier_free_guidance": False}, (2, 2, 12)),
    ],
)
def test_image_embeds_have_the_shape_that_diffusers_takes(aus, kwargs, shape):
    [embeds] = au_image_embeds(aus, **kwargs)
    assert embeds.shape == shape and embeds.dtype == kwargs.get("dtype", torch.float32)


def test_image_embeds_refuse_what_no_call_can_use():
    with pytest.raises(ValueError, match="`negative_aus` needs guidance"):
        au_image_embeds("happy", "sad", do_classifier_free_guidance=False)
    with pytest.raises(ValueError, match="`negative_aus` has 3 expressions, but there are 2 prompts"):
        au_image_embeds(["happy", "sad"], ["sad"] * 3)
    with pytest.raises(ValueError, match="`aus` is empty"):
        au_image_embeds([])


# extract_au_tags.


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a boy in a park <AU6=3 AU12=5>", ("a boy in a park", "AU6=3 AU12=5")),
        ("<6C+12D> a boy", ("a boy", "6C+12D")),
        ("a boy <doubtful@0.5>, in a park", ("a boy, in a park", "doubtful@0.5")),
        ("a  boy < Polite_Smile >  in  a park", ("a  boy in  a park", "Polite_Smile")),
        ("a boy <6 = 3, 12=5> <my-token>", ("a boy <my-token>", "6 = 3, 12=5")),
        ("<AU 12>", ("", "AU 12")),
        ("a boy <neutral>", ("a boy", "neutral")),
        ("a boy <happy@0.5 + AU4=2>", ("a boy", "happy@0.5 + AU4=2")),
    ],
)
def test_a_tag_is_taken_out_of_the_prompt(prompt, expected):
    assert extract_au_tags(prompt) == expected
    parse_aus(expected[1])


@pytest.mark.parametrize("tag", ["AU12L=3", "AU L12C", "L12C+R4B", "12L=3 26=1", "R12=1", "smirk", "smirk@0.5"])
def test_a_tag_can_name_one_side(tag):
    assert extract_au_tags(f"a boy <{tag}>", au_names=SIDED) == ("a boy", tag)
    parse_aus(tag, au_names=SIDED)


@pytest.mark.parametrize(
    "prompt",
    ["", " a  boy ", "<sks> man", "<my-token>", "<2d> <3D>", "<12>", "<>", "< >", "a<b>c</b>", "I <3 you", "6C+12D"]
    + [
        "<lora:x:0.5>",
        "<2+1 people>",
        "1 < 2 = 3",
        "a boy <happy",
        "<audi-a4>",
        "<happy-token>",
        "AU6=3",
        "<me@home>",
    ],
)
def test_other_brackets_stay(prompt):
    assert extract_au_tags(prompt) == (prompt, None)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("a boy <AU6=x>", "'AU6=x'"),
        ("a boy <AU7=1>", "'AU7'"),
        ("a boy <6F+12D>", "grade 'F'"),
        ("a boy <R12A+R14A>", "both sides of AU12 alike"),
        ("a boy <wink>", "the preset 'wink', which needs AU43L"),
        ("a boy <happy + 7C>", "'7'"),
        ("a boy <doutful@0.5>", "Did you mean 'doubtful'"),
        ("a boy <happy@much>", "'much'"),
        ("a boy <AU6=3 in a park", "'<AU6=3 in a park' and never closes"),
        ("a boy < au6=3 <happy>", "closes"),
        ("a boy <AU6=3> <AU12=5>", "2 AU tags"),
        (None, "NoneType"),
        (["a boy <AU6=3>"], "list"),
    ],
)
def test_a_malformed_tag_is_an_error(prompt, text):
    with pytest.raises(ValueError, match=re.escape(text)) as error:
        extract_au_tags(prompt)
    assert str(error.value).startswith("`prompt`")


# Whatever comes in, parse_aus returns finite (n, 12) float32 or raises ValueError.


def check_parses_or_refuses(aus):
    try:
        parsed = parse_aus(aus)
    except ValueError as error:
        assert str(error).startswith("`aus")
        return
    assert parsed.dtype == torch.float32 and parsed.ndim == 2 and parsed.shape[1] == 12 and len(parsed) > 0
    assert parsed.isfinite().all() and parsed.abs().max() <= MAX_INTENSITY


facs_pieces = ["AU", "au", "6", "12", "26", "0", "7", "C", "e", "F", "L", "R", "+", "-", "=", ",", ".", " ", "@"]
facs_like = st.lists(st.sampled_from([*facs_pieces, "1e9", "nan", "inf", "happy", "_", "\n"]), max_size=8).map("".join)
strings = (
    st.text(max_size=20) | facs_like | st.sampled_from(sorted(PRESETS)) | st.from_regex(r"AU\d+=\S*", fullmatch=True)
)
numbers = st.integers() | st.floats() | st.fractions() | st.decimals() | st.complex_numbers() | st.booleans()
leaves = strings | numbers | st.none() | st.binary(max_size=4)
keys = strings | st.integers(-1, 30) | st.none() | st.booleans() | st.sampled_from(AU_NAMES)
anything = st.recursive(
    leaves | st.dictionaries(keys, leaves, max_size=4) | st.lists(numbers, min_size=11, max_size=13),
    lambda children: (
        st.lists(children, max_size=4) | st.tuples(children) | st.dictionaries(keys, children, max_size=3)
    ),
    max_leaves=12,
)
arrays = st.builds(
    lambda shape, dtype, value: np.full(shape, value).astype(dtype),
    st.lists(st.sampled_from([0, 1, 2, 12, 13]), max_size=3),
    st.sampled_from(["f2", "f4", "f8", "i1", "i8", "u8", "?", "c8", "O", "U3", "S3", "M8[s]"]),
    st.sampled_from([0, 1, 5, 100]),
)


@settings(max_examples=200, deadline=None)
@given(facs_like | strings)
def test_any_string_parses_or_raises_value_error(text):
    check_parses_or_refuses(text)


@settings(max_examples=200, deadline=None)
@given(anything)
def test_any_structure_parses_or_raises_value_error(aus):
    check_parses_or_refuses(aus)


@settings(max_examples=150, deadline=None)
@given(arrays)
def test_any_array_parses_or_raises_value_error(array):
    check_parses_or_refuses(array)
    check_parses_or_refuses([array, array])


@pytest.mark.filterwarnings("ignore:ComplexHalf", "ignore:torch.quantize")
@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 2, 12, 13]), max_size=3),
    st.sampled_from([value for value in vars(torch).values() if isinstance(value, torch.dtype)]),
    st.sampled_from(["cpu", "meta"]),
)
def test_any_tensor_parses_or_raises_value_error(shape, dtype, device):
    try:
        tensor = torch.zeros(shape, dtype=dtype, device=device)
    except (RuntimeError, TypeError):
        return
    check_parses_or_refuses(tensor)
    check_parses_or_refuses([tensor])


@settings(max_examples=200, deadline=None)
@given(st.lists(facs_like | st.sampled_from(["<", ">", "<AU6=3>", "a boy"]), max_size=6).map("".join))
def test_any_prompt_gives_readable_aus_or_raises_value_error(prompt):
    try:
        rest, aus = extract_au_tags(prompt)
    except ValueError as error:
        assert str(error).startswith("`prompt`")
        return
    if aus is None:
        assert rest == prompt
    else:
        assert parse_aus(aus).shape == (1, 12)


# The file as diffusers loads it.


def test_the_file_needs_torch_alone():
    # diffusers takes any line that begins so for an import, in docstrings too.
    text = Path(action_units.__file__).read_text(encoding="utf-8")
    imports = set(re.findall(r"^\s*(?:import|from)\s+(\S+)", text, flags=re.MULTILINE))
    standard = {"collections.abc", "dataclasses", "difflib", "functools", "math", "numbers", "re", "struct", "sys"}
    assert imports == standard | {"typing", "torch"}


def test_reading_aus_does_not_import_torch():
    code = (
        "import sys, action_units as a; a.read_aus(['happy', '6C+12D', {'AU4': 2}]); a.format_aus('doubtful@0.3');"
        "a.extract_au_tags('a boy <12D>'); a.available_presets(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(action_units.__file__).parent)


def test_docstring_examples_are_true():
    import doctest

    assert doctest.testmod(action_units).attempted >= 4
    assert doctest.testmod(action_units).failed == 0


# One for each prompt, and for each person


def per_prompt(*args, **kwargs) -> tuple[list, list]:
    intensities, has_aus = parse_aus_per_prompt(*args, **kwargs)
    assert intensities.shape == (*has_aus.shape, 12)
    return intensities[..., AU_NAMES.index("AU12")].tolist(), has_aus.tolist()


@pytest.mark.parametrize(
    ("aus", "expected"),
    [
        (None, ([0, 0], [0, 0])),
        ("12E", ([5, 5], [1, 1])),
        ([0] * 6 + [5] + [0] * 5, ([5, 5], [1, 1])),
        (["12E"], ([5, 5], [1, 1])),
        (["12E", None], ([5, 0], [1, 0])),
        ([None, None], ([0, 0], [0, 0])),
        (torch.eye(12)[6:8], ([1, 0], [1, 1])),
    ],
)
def test_prompts_have_one_expression_each_or_all_the_same(aus, expected):
    assert per_prompt(aus, 2) == expected


@pytest.mark.parametrize(
    ("aus", "expected"),
    [
        (None, ([[0, 0, 0]] * 2, [[0, 0, 0]] * 2)),
        ("12E", ([[5, 5, 5]] * 2, [[1, 1, 1]] * 2)),
        (["12E", None, {"AU12": 2}], ([[5, 0, 2]] * 2, [[1, 0, 1]] * 2)),
        ([[1.0] * 12, [2.0] * 12, [3.0] * 12], ([[1, 2, 3]] * 2, [[1, 1, 1]] * 2)),
        ([["12E", None, "12A"], "12B"], ([[5, 0, 1], [2, 2, 2]], [[1, 0, 1], [1, 1, 1]])),
        ([["12E", None, "12A"], None], ([[5, 0, 1], [0, 0, 0]], [[1, 0, 1], [0, 0, 0]])),
        (torch.arange(72.0).reshape(2, 3, 12) / 10, ([[0.6, 1.8, 3.0], [4.2, 5.4, 6.6]], [[1, 1, 1]] * 2)),
        (np.zeros((3, 12)), ([[0, 0, 0]] * 2, [[1, 1, 1]] * 2)),
    ],
)
def test_people_have_one_expression_each_in_one_picture_or_all(aus, expected):
    intensities, has_aus = per_prompt(aus, 2, num_people=3)
    assert np.allclose(intensities, expected[0]) and has_aus == expected[1]


@pytest.mark.parametrize(
    ("aus", "num_people", "message"),
    [
        (["12E"] * 3, None, "`aus` has 3 expressions, but there are 2 prompts"),
        (["12E"] * 2, 3, "`aus` has 2 expressions, but there are 3 masks"),
        ([["12E"] * 3] * 3, 3, "for 3 pictures, but there are 2 prompts"),
        ([["12E"] * 3, ["12E"] * 2], 3, "`aus\\[1\\]` has 2 expressions"),
        ([["12E"] * 3, ["12E", "12E", "AU7"]], 3, "`aus\\[1\\]"),
    ],
)
def test_another_number_of_expressions_is_an_error(aus, num_people, message):
    with pytest.raises(ValueError, match=message):
        parse_aus_per_prompt(aus, 2, num_people=num_people)
