"""Tables of other tools: their column names, their scales, and what is said about a table that is wrong."""

import csv
import json
import re
import time

import numpy as np
import pytest

from action_units import AU_NAMES
from face_data.au_tables import (
    AU_TABLE_TOOLS,
    blendshapes_to_aus,
    detect_tool,
    find_measured_aus,
    read_au_table,
)


NUMBERS = [int(name[2:]) for name in AU_NAMES]
# Every AU has a value of its own, so that a mixed up column shows.
INTENSITIES = np.float32([0.1, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 4.8, 5])

OPENFACE_OTHERS = ["AU07_r", "AU10_r", "AU14_r", "AU23_r", "AU45_r", *(f"AU{number:02}_c" for number in NUMBERS)]
SIDED = ("browOuterUp", "browDown", "eyeWide", "cheekSquint", "noseSneer", "mouthSmile", "mouthFrown", "mouthStretch")
LIPS = ("mouthLowerDown", "mouthUpperUp")


def openface_row():
    columns = {f"AU{number:02}_r": f"{value:.2f}" for number, value in zip(NUMBERS, INTENSITIES, strict=True)}
    row = {"frame": 7, "face_id": 0, "timestamp": 0.2, "confidence": 0.98, "success": 1} | columns
    return row | dict.fromkeys(OPENFACE_OTHERS, "1.00")


def libreface_row():
    intensities = {f"au_{number}_intensity": float(value) for number, value in zip(NUMBERS, INTENSITIES, strict=True)}
    return {"frame_idx": 7, "au_1": 1, "au_7": 0, "facial_expression": "Happiness"} | intensities


def pyfeat_row():
    probabilities = {f"AU{number:02}": value / 5 for number, value in zip(NUMBERS, INTENSITIES, strict=True)}
    return {"FaceScore": 0.99, "input": "faces/7.png", "AU07": 0.3, "AU43": 1.0} | probabilities


def affectnet_row():
    columns = {f"AU{number}_rec": value / 5 for number, value in zip(NUMBERS, INTENSITIES, strict=True)}
    return {"ImageName": "a/7.jpg", "HasFace": 1.0, "IsPhoto": True, "TextDescription": "a face"} | columns


def arkit_row(left="Left", right="Right"):
    row = {f"{name}{side}": 0.0 for name in (*SIDED, *LIPS) for side in (left, right)}
    return row | dict.fromkeys(("browInnerUp", "mouthShrugLower", "jawOpen", "mouthClose", "_neutral"), 0.0)


def write_csv(path, rows, gap=""):
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([gap + name for name in rows[0]])
        writer.writerows([[f"{gap}{value}" for value in row.values()] for row in rows])
    return path


@pytest.mark.parametrize(
    ("tool", "row", "name"),
    [
        ("openface", openface_row(), "7"),
        ("libreface", libreface_row(), "7"),
        ("pyfeat", pyfeat_row(), "faces/7.png"),
        ("affectnet", affectnet_row(), "a/7.jpg"),
        ("fineface", {"file_name": "7.png", **dict(zip(AU_NAMES, INTENSITIES.tolist(), strict=True))}, "7.png"),
    ],
)
def test_each_tool_is_recognised_and_brought_to_intensities(tmp_path, tool, row, name):
    assert detect_tool(row) == tool and tool in AU_TABLE_TOOLS
    # OpenFace writes a space after each comma.
    (read,) = read_au_table(write_csv(tmp_path / "table.csv", [row], gap=" "))
    np.testing.assert_allclose(read.aus, INTENSITIES, atol=1e-5)
    assert (read.name, read.face_found, read.line, read.aus.dtype) == (name, True, 2, np.float32)


def test_the_kinds_of_file_say_the_same(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [libreface_row() | {"frame_idx": frame, "au_12_intensity": float(frame)} for frame in range(3)]
    write_csv(tmp_path / "t.csv", rows)
    (tmp_path / "t.tsv").write_text((tmp_path / "t.csv").read_text().replace(",", "\t"))
    (tmp_path / "t.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    (tmp_path / "t.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    lines_of = {"csv": [2, 3, 4], "tsv": [2, 3, 4], "jsonl": [1, 3, 5], "json": [1, 2, 3], "parquet": [1, 2, 3]}
    for suffix, lines in lines_of.items():
        table = list(read_au_table(tmp_path / f"t.{suffix}"))
        assert [row.name for row in table] == ["0", "1", "2"], suffix
        assert [row.aus[AU_NAMES.index("AU12")] for row in table] == [0, 1, 2], suffix
        assert [row.line for row in table] == lines, suffix


def test_the_answer_of_libreface_for_one_picture_is_read_as_it_is(tmp_path):
    answer = {"detected_aus": {"au_1": 1}, "au_intensities": {k: v for k, v in libreface_row().items() if "_in" in k}}
    (tmp_path / "answer.json").write_text(json.dumps(answer | {"facial_expression": "Neutral"}))
    (row,) = read_au_table(tmp_path / "answer.json")
    np.testing.assert_allclose(row.aus, INTENSITIES, atol=1e-5)
    assert row.name == ""


@pytest.mark.parametrize(
    "row",
    [
        openface_row() | {"success": 0, "AU12_r": "-nan(ind)", "AU15_r": "inf", "AU17_r": ""},
        {name: "-nan(ind)" if name.endswith("_r") else value for name, value in openface_row().items()},
        {name: "#N/A" if name.endswith("_r") else value for name, value in openface_row().items()},
        openface_row() | {"success": 0},
        openface_row() | {"confidence": "0.00"},
        affectnet_row() | {"HasFace": ""},
        {name: "" if name.startswith("AU") else value for name, value in pyfeat_row().items()},
        {name: "nan" if "intensity" in name else value for name, value in libreface_row().items()},
    ],
)
def test_a_picture_without_a_face_is_marked(tmp_path, row):
    (read,) = read_au_table(write_csv(tmp_path / "table.csv", [row]))
    assert not read.face_found and np.isnan(read.aus).all()


def test_regressors_that_overshoot_are_cut_to_the_scale(tmp_path):
    (row,) = read_au_table(write_csv(tmp_path / "t.csv", [openface_row() | {"AU01_r": -0.4, "AU26_r": 5.3}]))
    assert row.aus[0] == 0 and row.aus[-1] == 5


def test_a_column_of_expressions_is_read_too(tmp_path):
    lines = [{"image": "a.png", "aus": "6C+12E"}, {"image": "b.png", "aus": {"AU4": 2.5}}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    smile, frown = read_au_table(tmp_path / "t.jsonl")
    assert smile.aus[[4, 6]].tolist() == [3, 5] and frown.aus[2] == 2.5 and frown.record == lines[1]


def test_blendshapes_become_aus():
    shapes = arkit_row() | {"mouthSmileLeft": 1.0, "mouthSmileRight": 0.5, "browInnerUp": 0.2, "jawOpen": 0.6}
    aus = dict(zip(AU_NAMES, blendshapes_to_aus(shapes).tolist(), strict=True))
    expected = {"AU1": 1, "AU12": 3.75, "AU25": 3, "AU26": 3}
    assert aus == pytest.approx(dict.fromkeys(AU_NAMES, 0) | expected)
    # An open jaw behind closed lips parts none.
    assert blendshapes_to_aus(shapes | {"mouthClose": 1.0})[10] == 0
    assert blendshapes_to_aus({"mouthUpperUpLeft": 0.5, "mouthUpperUp_R": 0.5})[10] == 2.5


@pytest.mark.parametrize("sides", [("Left", "Right"), ("_L", "_R")])
def test_each_blendshape_moves_its_au_alone(sides):
    owners = {"browInnerUp": "AU1", "mouthShrugLower": "AU17"}
    aus = ("AU2", "AU4", "AU5", "AU6", "AU9", "AU12", "AU15", "AU20")
    for name, au in zip(SIDED, aus, strict=True):
        owners |= {name + side: au for side in sides}
    for shape, au in owners.items():
        values = blendshapes_to_aus(arkit_row(*sides) | {shape: 1.0})
        assert values[AU_NAMES.index(au)] >= 2.5 and np.count_nonzero(values) == 1, shape


def test_a_table_of_blendshapes_is_recognised(tmp_path):
    row = {"Timecode": "0:01", "BlendShapeCount": 61, "HeadYaw": -0.3} | arkit_row("_L", "_R") | {"JawOpen": 0.4}
    row.pop("jawOpen")
    (read,) = read_au_table(write_csv(tmp_path / "t.csv", [row]))
    assert detect_tool(row) == "arkit" and read.aus[-2:] == pytest.approx([2, 2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"AU12": "much"}, r"t\.csv, line 2: column 'AU12' is 'much', but has to be a number"),
        ({"AU12": 9}, r"line 2: column 'AU12' is 9\. fineface measures from 0 to 5"),
        ({"AU12": ""}, r"line 2: column 'AU12' is empty, while other AUs have values"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(tmp_path, changes, message):
    row = {"file_name": "a.png"} | dict.fromkeys(AU_NAMES, 1.0) | changes
    with pytest.raises(ValueError, match=message):
        list(read_au_table(write_csv(tmp_path / "t.csv", [row])))
    errors = []
    rows = read_au_table(write_csv(tmp_path / "t.csv", [row, row | {"AU12": 2.0}]), on_error=errors.append)
    assert [row.line for row in rows] == [3] and "line 2" in str(errors[0])


def test_wrong_tables_are_refused(tmp_path):
    row = {"file_name": "a.png"} | dict.fromkeys(AU_NAMES, 1.0)
    with pytest.raises(ValueError, match="those of no known tool: frame, AU12_c"):
        detect_tool(["frame", "AU12_c"])
    with pytest.raises(ValueError, match="openface and fineface"):
        detect_tool([*row, *openface_row()])
    with pytest.raises(ValueError, match="openface and fineface"):
        detect_tool(["AU12", *openface_row()])  # complete or not makes no difference
    path = write_csv(tmp_path / "t.csv", [row])
    with pytest.raises(ValueError, match="There is no column picture"):
        list(read_au_table(path, image_column="picture"))
    with pytest.raises(ValueError, match=r"t\.csv, line 2: There is no column au01_r"):
        list(read_au_table(path, tool="openface"))
    with pytest.raises(ValueError, match="The tools are openface, libreface"):
        list(read_au_table(path, tool="faceopen"))
    path.write_text(path.read_text() + "b.png,1\n")
    with pytest.raises(ValueError, match=r"t\.csv, line 3: 2 cells, but the header has 13, with commas between them"):
        list(read_au_table(path))
    with pytest.raises(FileNotFoundError, match="no table"):
        list(read_au_table(tmp_path / "none.csv"))
    with pytest.raises(ValueError, match="file type is '.xls'"):
        list(read_au_table(tmp_path / "t.xls"))
    with pytest.raises(ValueError, match="no blendshape 'smile'"):
        blendshapes_to_aus({"smile": 1.0})
    with pytest.raises(ValueError, match="'jawopen' is 5"):
        blendshapes_to_aus({"jawOpen": 5.0})


def read(path, **options):
    """The rows of a table, and what was said about it."""
    said = []
    return list(read_au_table(path, say=said.append, **options)), said


def test_of_aus_and_blendshapes_in_one_table_the_tool_decides_and_the_choice_is_said(tmp_path):
    # As py-feat 2 writes it: AU01 … and the 52 blendshapes of the same face, which say something else.
    path = write_csv(tmp_path / "fex.csv", [pyfeat_row() | arkit_row() | {"mouthSmileLeft": 0.2}] * 2)
    rows, (note,) = read(path)
    assert rows[0].aus[6] == pytest.approx(INTENSITIES[6]) and "AUs of pyfeat and blendshapes (arkit)" in note
    for tool in ("arkit", "mediapipe"):
        rows, said = read(path, tool=tool)
        assert rows[0].aus[6] == pytest.approx(0.5) and not said
    assert read(path, tool="pyfeat")[1] == []


@pytest.mark.parametrize(
    "result",
    [
        [{"faceBlendshapes": [{"categories": "FACE", "headIndex": -1, "headName": ""}], "faceLandmarks": [[]]}],
        {"face_blendshapes": ["FACE"], "facial_transformation_matrixes": []},
        [{"categories": "FACE"}],
        "FACE",
    ],
)
def test_the_results_of_mediapipe_are_read_as_they_are(tmp_path, result):
    name = "category_name" if "face_blendshapes" in result else "categoryName"
    shapes = arkit_row() | {"mouthSmileLeft": 0.8, "mouthSmileRight": 0.6}
    face = [{"index": i, "score": score, name: shape} for i, (shape, score) in enumerate(shapes.items())]
    (tmp_path / "r.json").write_text(json.dumps(result).replace('"FACE"', json.dumps(face)))
    ((row,), said) = read(tmp_path / "r.json")
    assert row.face_found and row.aus[6] == pytest.approx(3.5) and row.aus.sum() == pytest.approx(3.5) and not said


def test_two_faces_and_none_of_a_mediapipe_result_are_rows(tmp_path):
    faces = [{"categories": [{"categoryName": "jawOpen", "score": score}]} for score in (0.2, 0.4)]
    lines = [{"file_name": "a.png", "faceBlendshapes": faces}, {"file_name": "b.png", "faceBlendshapes": []}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows, (note,) = read(tmp_path / "t.jsonl")
    assert [(row.name, row.face, row.face_found) for row in rows] == [
        ("a.png", 0, True),
        ("a.png", 1, True),
        ("b.png", None, False),
    ]
    assert [row.aus[-1] for row in rows[:2]] == pytest.approx([1, 2])
    assert "no blendshape or column for AU1, AU2" in note and "(in 2 rows)" in note


EXCEL = "Datei;AU6;AU12;;\r\nM\u00fcller.png;2,5;3;;\r\n;;;;\r\nb.png;0;4,25;;\r\n;;;;\r\n"


@pytest.mark.parametrize(
    ("data", "sentences"),
    [
        (EXCEL.encode("utf-8-sig"), ["semicolons", "2 empty rows", "no column for AU1, AU2", "2 numbers have a dec"]),
        (EXCEL.encode("cp1252"), ["is read as cp1252", "semicolons", "2 empty rows", "no column", "decimal comma"]),
        (("sep=;\n" + EXCEL).encode(), ["semicolons", "2 empty rows", "no column", "decimal comma"]),
        (EXCEL.encode("utf-16"), ["semicolons", "2 empty rows", "no column", "decimal comma"]),
        (EXCEL.encode("utf-16-le"), ["semicolons", "2 empty rows", "no column", "decimal comma"]),
        (EXCEL.replace(";", "\t").encode("utf-16"), ["tabs", "2 empty rows", "no column", "decimal comma"]),
        (EXCEL.replace(",", ".").replace(";", ",").encode(), ["2 empty rows", "no column"]),
    ],
)
def test_what_spreadsheets_save_is_read_and_what_was_guessed_is_said(tmp_path, data, sentences):
    (tmp_path / "t.csv").write_bytes(data)
    rows, said = read(tmp_path / "t.csv", image_column="Datei")
    assert [(row.name, row.aus[4], row.aus[6], row.aus.sum()) for row in rows] == [
        ("Müller.png", 2.5, 3, 5.5),
        ("b.png", 0, 4.25, 4.25),
    ]
    assert len(said) == len(sentences)
    assert all(sentence in note and "t.csv" in note for sentence, note in zip(sentences, said, strict=True))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("t.csv", b"", "t.csv: the file is empty"),
        ("t.csv", b"a,AU12,a\n", "column 'a' is there twice"),
        ("t.csv", b"PK\x03\x04\0\0", "t.csv: this is a workbook"),
        ("t.xlsx", b"PK\x03\x04", "Save its sheet as CSV"),
        ("t.csv", b"a,AU12\n\x81,1\n", "t.csv: the encoding is none of"),
        ("t.csv", b"AU12 AU6\n1 2\n", "There is one column: commas, semicolons, tabs and bars"),
        ("t.csv", b"a;AU12\nx;1;2\n", "line 2: 3 cells, but the header has 2, with semicolons between them"),
        ("t.jsonl", b'{"AU12": 1' + b"0" * 400 + b"}", "line 1: column 'AU12' is 1000"),
        ("t.json", b"[" * 200_000, "t.json: the objects are nested too deeply"),
        ("t.jsonl", b'{"a": ' * 200_000, "t.jsonl, line 1: the objects are nested too deeply"),
        ("t.jsonl", b" " * 2**22 + b"{}", "t.jsonl, line 1: more than 4,194,304 characters"),
        ("t.csv", ",".join(f"c{n}" for n in range(20_000)).encode(), "20,000 columns, and 10,000 are allowed"),
        ("t.parquet", b"PAR1", "t.parquet: "),
    ],
)
def test_files_that_are_no_tables_are_refused_in_one_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        list(read_au_table(tmp_path / name))
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_many_columns_take_no_quadratic_time(tmp_path):
    # The last column is there twice; to find it by counting each took seconds.
    names = [f"c{number}" for number in range(9_998)] + ["z", "z"]
    (tmp_path / "t.csv").write_text(",".join(names) + "\n")
    start = time.process_time()
    with pytest.raises(ValueError, match="'z' is there twice"):
        list(read_au_table(tmp_path / "t.csv"))
    assert time.process_time() - start < 0.5


def test_tables_that_were_appended_to_each_other_are_one(tmp_path):
    path = write_csv(tmp_path / "t.csv", [openface_row()])
    path.write_text(path.read_text() * 3)
    rows, said = read(path)
    assert len(rows) == 3 and "2 rows repeat the header" in said[0]


@pytest.mark.parametrize("tool", ["libreface", "openface", "fineface"])
def test_a_whole_table_between_0_and_1_is_said_to_be_weak(tmp_path, tool):
    columns = {"libreface": "au_{}_intensity", "openface": "AU{:02}_r", "fineface": "AU{}"}[tool]
    rows = [{columns.format(number): 0.9 if number == 12 else 0.1 for number in NUMBERS}] * 12
    (note,) = read(write_csv(tmp_path / "t.csv", rows))[1]
    assert f"the largest AU of 12 faces is 0.9, but {tool} measures from 0 to 5" in note
    assert read(write_csv(tmp_path / "t.csv", [*rows, rows[0] | {columns.format(1): 1.5}]))[1] == []
    # A few faint faces are no table of another scale.
    assert read(write_csv(tmp_path / "t.csv", rows[:3]))[1] == []


def test_the_aus_of_two_digits_are_those_of_the_tool_that_the_others_tell():
    assert detect_tool(["AU12", "AU25"]) == "fineface" and detect_tool(["AU12", "FaceScore"]) == "pyfeat"
    assert detect_tool(["AU01", "AU12"]) == "pyfeat" and detect_tool(["AU1", "AU12"]) == "fineface"


def test_the_log_has_what_nobody_else_is_told(tmp_path, caplog):
    list(read_au_table(write_csv(tmp_path / "t.csv", [{"AU6": 1, "AU12": 2}])))
    assert "there is no column for AU1" in caplog.text


# Other AUs than the twelve, and sides


SIDED_AUS = ("AU4", "AU7", "AU12L", "AU12R", "AU25", "AU28", "AU43L", "AU43R")


def read_one(tmp_path, row, au_names=SIDED_AUS, **options):
    """The AUs of the only row, by name, and what was said."""
    ((read_row,), said) = read(write_csv(tmp_path / "t.csv", [row]), au_names=au_names, **options)
    return dict(zip(au_names, read_row.aus.tolist(), strict=True)), said


def test_openface_sets_both_sides_and_brings_its_other_aus(tmp_path):
    row = openface_row() | {"AU07_r": 2, "AU45_r": 3.5, "AU28_c": 1}
    aus, said = read_one(tmp_path, row)
    expected = {"AU4": 1, "AU7": 2, "AU12L": 3, "AU12R": 3, "AU25": 4.8, "AU28": 3, "AU43L": 3.5, "AU43R": 3.5}
    assert aus == pytest.approx(expected)
    assert len(said) == 1 and "openface measures only the presence of AU28: present is taken as 3" in said[0]


def test_libreface_and_pyfeat_bring_what_they_measure(tmp_path):
    aus, said = read_one(tmp_path, libreface_row() | {"au_7": 1, "au_24": 0}, ("AU7", "AU12", "AU24", "AU43"))
    assert aus == pytest.approx({"AU7": 3, "AU12": 3, "AU24": 0, "AU43": 0})
    assert "no column for AU43" in said[0] and "measures only the presence of AU7, AU24" in said[1]
    aus, said = read_one(tmp_path, pyfeat_row() | {"AU07": 0.3, "AU43": 1.0, "AU28": 0.1})
    assert aus["AU7"] == pytest.approx(1.5) and aus["AU43L"] == aus["AU43R"] == 5 and not said
    assert aus["AU28"] == pytest.approx(0.5)


def test_own_columns_have_sides(tmp_path):
    row = {"file_name": "a.png", "AU4": 1, "AU12L": 2, "AU12R": 4, "AU25": 0, "AU43": 3}
    assert detect_tool(row) == "fineface"
    aus, said = read_one(tmp_path, row)
    assert (aus["AU12L"], aus["AU12R"], aus["AU43L"], aus["AU43R"]) == (2, 4, 3, 3)
    assert "no column for AU7, AU28" in said[0]
    assert read_one(tmp_path, row, ("AU12", "AU45"))[0] == {"AU12": 3, "AU45": 3}  # the mean; closed is closed
    aus, _ = read_one(tmp_path, {"image": "a.png", "aus": "L12C+43E"})
    assert (aus["AU12L"], aus["AU12R"], aus["AU43L"], aus["AU43R"]) == (3, 0, 5, 5)
    assert detect_tool(["AU12L", "AU12R"]) == "fineface"


def test_blendshapes_keep_their_sides(tmp_path):
    shapes = {"mouthSmileLeft": 0.8, "mouthSmileRight": 0.2, "eyeBlinkRight": 1.0, "eyeSquintLeft": 0.4}
    shapes |= {"mouthRollLower": 0.6, "mouthRollUpper": 0.2, "jawOpen": 0.5}
    expected = {"AU4": 0, "AU7": 1, "AU12L": 4, "AU12R": 1, "AU25": 2.5, "AU28": 2, "AU43L": 0, "AU43R": 5}
    assert dict(zip(SIDED_AUS, blendshapes_to_aus(shapes, SIDED_AUS).tolist(), strict=True)) == pytest.approx(expected)
    row = arkit_row() | dict.fromkeys(("eyeBlinkLeft", "eyeSquintRight"), 0.0) | shapes
    assert read_one(tmp_path, row)[0] == pytest.approx(expected)
    assert read_one(tmp_path, row, ("AU12", "AU23"))[0] == pytest.approx({"AU12": 2.5, "AU23": 0})
    assert blendshapes_to_aus(shapes, ("AU23",)).tolist() == [0]
    gaze = blendshapes_to_aus({"eyeLookOutLeft": 1, "eyeLookInRight": 1}, ("AU61", "AU62"))
    assert gaze.tolist() == [5, 0]


def test_a_list_of_aus_that_does_not_exist_is_an_error_before_the_file_is_read(tmp_path):
    with pytest.raises(ValueError, match="no AU of FACS"):
        list(read_au_table(tmp_path / "nowhere.csv", au_names=("AU3",)))
    with pytest.raises(ValueError, match="There is no column au43_r. The columns are"):
        list(read_au_table(write_csv(tmp_path / "t.csv", [{"AU12_r": 1}]), au_names=("AU43",)))


PAPERS_TWELVE = "AU1 AU2 AU4 AU5 AU6 AU9 AU12 AU15 AU17 AU20 AU25 AU26"


@pytest.mark.parametrize(
    ("rows", "tool", "aus"),
    [
        ([openface_row()], "openface", f"{PAPERS_TWELVE} AU7 AU10 AU14 AU23 AU43"),
        ([libreface_row()], "libreface", f"{PAPERS_TWELVE} AU7"),
        ([pyfeat_row()], "pyfeat", f"{PAPERS_TWELVE} AU7 AU43"),
        ([affectnet_row()], "affectnet", PAPERS_TWELVE),
        ([{"AU1": 0, "AU12L": 3}, {"AU12R": 3, "AU99": 1}], "fineface", "AU1 AU12L AU12R"),
        ([{"browInnerUp": 1, "eyeBlink_L": 1, "eyeBlink_R": 0, "cheekPuff": 0}], "arkit", "AU1 AU34 AU43L AU43R"),
        ([{"faceBlendshapes": [[{"categoryName": "mouthSmileLeft", "score": 1}]]}], "arkit", "AU12"),
        ([{"aus": "12C"}], "fineface", ""),
    ],
)
def test_the_aus_that_a_table_measures_are_found_in_its_columns(tmp_path, rows, tool, aus):
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(json.dumps(row, default=float) for row in rows))
    found = find_measured_aus(path)
    assert (found[0], set(found[1])) == (tool, set(aus.split()))
    assert [int(re.sub(r"\D", "", name)) for name in found[1]] == sorted(int(re.sub(r"\D", "", n)) for n in found[1])
