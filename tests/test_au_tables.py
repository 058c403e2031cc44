"""Tables of other tools: their column names, their scales, and what is said about a table that is wrong."""

import csv
import json

import numpy as np
import pytest

from action_units import AU_NAMES
from face_data.au_tables import AU_TABLE_TOOLS, blendshapes_to_aus, detect_tool, read_au_table


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
    with pytest.raises(ValueError, match="For fineface, the columns au6 are missing"):
        detect_tool([name for name in row if name != "AU6"])
    with pytest.raises(ValueError, match="openface and fineface"):
        detect_tool([*row, *openface_row()])
    path = write_csv(tmp_path / "t.csv", [row])
    with pytest.raises(ValueError, match="There is no column picture"):
        list(read_au_table(path, image_column="picture"))
    with pytest.raises(ValueError, match=r"t\.csv, line 2: There is no column au01_r"):
        list(read_au_table(path, tool="openface"))
    with pytest.raises(ValueError, match="The tools are openface, libreface"):
        list(read_au_table(path, tool="faceopen"))
    path.write_text(path.read_text() + "b.png,1\n")
    with pytest.raises(ValueError, match=r"t\.csv, line 3: 2 cells, but the header has 13"):
        list(read_au_table(path))
    with pytest.raises(FileNotFoundError, match="no table"):
        list(read_au_table(tmp_path / "none.csv"))
    with pytest.raises(ValueError, match="file type is '.xls'"):
        list(read_au_table(tmp_path / "t.xls"))
    with pytest.raises(ValueError, match="no blendshape 'smile'"):
        blendshapes_to_aus({"smile": 1.0})
    with pytest.raises(ValueError, match="'jawopen' is 5"):
        blendshapes_to_aus({"jawOpen": 5.0})
