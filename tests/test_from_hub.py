"""Pictures from a data set on the Hub become training data: fetched, filtered, measured by two tools, and joined."""

import io
import json
import signal
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, List, Value
from hub_server import running_hub
from PIL import Image as PILImage
from test_face_data import counts_of, files_of, prepare, rows_of, train_config, write_table

from action_units import AU_NAMES
from toy_faces.renderer import render, sample_aus, sample_portrait
from training.data import load_training_data


ROOT = Path(__file__).parents[1]
NUM_ROWS, ROWS_PER_SHARD, SIDE = 14, 3, 32
# Row 3 has two faces, row 8 has none, and of row 11 nothing is left but the emotion.
NUM_FACES = [2 if row == 3 else 0 if row == 8 else 1 for row in range(NUM_ROWS)]
PROMPTS = ["Furious!" if row == 11 else f"a smiling person {row}, with furrowed brows" for row in range(NUM_ROWS)]
KEPT = [row for row in range(NUM_ROWS) if row not in (3, 8, 11)]
# As a data set that finds faces with a program of one's own: it kills the process where a file says so.
DETECTOR = """
import os, signal
calls = 0
def find(picture):
    global calls
    calls += 1
    if os.path.exists("halt") and calls == 11:
        os.kill(os.getpid(), signal.SIGKILL)
    return [(0.25, 0.125, 0.75, 1.0)]
"""


def aus_of_row(row: int) -> np.ndarray:
    return sample_aus(row).clip(0, 5)


def portrait(row: int) -> bytes:
    file = io.BytesIO()
    render(sample_portrait(row), aus_of_row(row)).resize((SIDE, SIDE)).save(file, "PNG" if row % 2 else "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("portraits")
    (folder / "data").mkdir()
    features = Features(
        {
            "image": Image(),
            "prompt": Value("string"),
            "num_faces": Value("int64"),
            "boxes": List(List(Value("float64"))),
        }
    )
    for number, start in enumerate(range(0, NUM_ROWS, ROWS_PER_SHARD)):
        rows = range(start, min(start + ROWS_PER_SHARD, NUM_ROWS))
        columns = {
            "image": [{"bytes": portrait(row), "path": None} for row in rows],
            "prompt": [PROMPTS[row] for row in rows],
            "num_faces": [NUM_FACES[row] for row in rows],
            "boxes": [[[8.0, 4.0, 24.0, 32.0]] * NUM_FACES[row] for row in rows],
        }
        Dataset.from_dict(columns, features).to_parquet(folder / f"data/train-{number:05d}-of-00005.parquet")
    return folder


def hub_command(pictures: Path, *options) -> list[str]:
    words = ["hub", "user/portraits", "--pictures", pictures, "--output", pictures.with_name("work"), *options]
    return list(map(str, [*words, "--rows_per_part", 4]))


def test_a_killed_fetch_goes_on_where_it_was(shards, processes, tmp_path):
    (tmp_path / "faces_of_mine.py").write_text(DETECTOR)
    filters = ("--face_count_column", "num_faces", "--detector", "faces_of_mine:find")
    commands = [hub_command(tmp_path / name / "pictures", *filters) for name in ("killed", "whole")]
    code = "import sys; from face_data.prepare import main; sys.exit(main(sys.argv[1:]))"
    with running_hub() as hub:
        hub.add_folder("user/portraits", shards, "dataset")

        def run(command: list[str]) -> dict:
            hub.requests_of_files.clear()
            places = {"folder": tmp_path, "path": [ROOT, tmp_path], "hub": hub.url}
            return processes({"code": code, "arguments": command, **places})[0]

        (tmp_path / "halt").touch()
        assert run(commands[0])["status"] == -signal.SIGKILL
        killed = tmp_path / "killed/pictures"
        assert not (killed / "metadata.jsonl").exists() and (killed / ".hub/rows/0000000.jsonl").exists()
        (tmp_path / "halt").unlink()
        finished = run(commands[0])
        assert finished["status"] == 0, finished
        # Shards that were read to their end are not asked for again; the first one says what the columns are.
        assert "data/train-00001-of-00005.parquet" not in {path for path, _ in hub.requests_of_files}
        assert run(commands[1])["status"] == 0
        assert hub.not_understood == []
    of_killed, of_whole = files_of(killed), files_of(tmp_path / "whole/pictures")
    # Where the stream goes on, it counts from where it was opened.
    del of_killed[".hub/state.json"], of_whole[".hub/state.json"]
    assert of_killed == of_whole
    rows = [json.loads(line) for line in (killed / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == [f"a person {row}" for row in KEPT]
    assert [(killed / row["file_name"]).read_bytes() for row in rows] == [portrait(row) for row in KEPT]
    assert rows[0]["face_x0"] == 0.25 and rows[0]["removed_words"] == ["smiling", "furrowed brows"]
    said = finished["output"]
    for line in ("several faces", "no face", "no caption, or nothing left of it", "words of emotion taken out of the"):
        assert line in said
    assert "smiling 11, furrowed brows 11" in said and "run the same command with --aus" in said


def test_pictures_that_are_files_of_the_repository_are_fetched(processes, tmp_path):
    """A data set of pictures beside a `metadata.jsonl`, and of pictures in an archive: the rows have only paths."""
    for name in ("files", "archive"):
        (tmp_path / name).mkdir()
    lines = [{"file_name": f"{row}.{'png' if row % 2 else 'jpg'}", "prompt": f"a person {row}"} for row in range(3)]
    contents = {line["file_name"]: portrait(row) for row, line in enumerate(lines)}
    contents["metadata.jsonl"] = "\n".join(map(json.dumps, lines)).encode()
    with zipfile.ZipFile(tmp_path / "archive/train.zip", "w") as archive:
        for name, content in contents.items():
            (tmp_path / "files" / name).write_bytes(content)
            archive.writestr(name, content)
    code = "import sys; from face_data.prepare import main; sys.exit(main(sys.argv[1:]))"
    with running_hub() as hub:
        hub.add_folder("user/files", tmp_path / "files", "dataset")
        hub.add_folder("user/archive", tmp_path / "archive", "dataset")
        for name in ("files", "archive"):
            command = ["hub", f"user/{name}", "--pictures", name + "/fetched", "--output", name + "/work"]
            run = {"code": code, "arguments": command, "folder": tmp_path, "path": [ROOT], "hub": hub.url}
            (finished,) = processes(run)
            assert finished["status"] == 0, finished
            rows = (tmp_path / name / "fetched/metadata.jsonl").read_text().splitlines()
            found = [(tmp_path / name / "fetched" / json.loads(row)["file_name"]).read_bytes() for row in rows]
            assert found == [portrait(row) for row in range(3)]


@pytest.fixture
def fetched(shards, tmp_path) -> Path:
    """The pictures, from the shards as a folder, which the datasets library reads as it reads the Hub."""
    prepare("hub", shards, "--pictures", tmp_path / "pictures", "--output", tmp_path / "work", *FETCH)
    return tmp_path / "pictures"


FETCH = ("--source", "portraits", "--boxes_column", "boxes", "--rows_per_part", 4, "--num_workers", 1)


def test_aus_of_two_tools_make_a_data_set_of_it(shards, fetched, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [json.loads(line) for line in (fetched / "metadata.jsonl").read_text().splitlines()]
    # What the tools would measure: one writes results as MediaPipe has them, the other a table as py-feat's.
    shapes_of = {"AU6": "cheekSquint", "AU12": "mouthSmile", "AU5": "eyeWide", "AU9": "noseSneer"}
    blendshapes, table = [], []
    for row, line in zip(KEPT, rows, strict=True):
        aus = dict(zip(AU_NAMES, aus_of_row(row).tolist(), strict=True))
        scores = {f"{shape}{side}": aus[name] / 5 for name, shape in shapes_of.items() for side in ("Left", "Right")}
        # MediaPipe hardly sees raised lids and wrinkled noses.
        scores |= {name: 0.0 for name in scores if name.startswith(("eyeWide", "noseSneer"))}
        face = [{"categoryName": name, "score": score} for name, score in scores.items()]
        blendshapes.append({"file_name": line["file_name"], "faceBlendshapes": [{"categories": face}]})
        columns = {f"AU{int(name[2:]):02d}": value / 5 for name, value in aus.items()}
        table.append({"input": str(fetched / line["file_name"])} | columns)
    (tmp_path / "mp.jsonl").write_text("\n".join(map(json.dumps, blendshapes)))
    write_table(tmp_path / "pf.csv", table)
    command = ["hub", shards, "--pictures", fetched, "--output", tmp_path / "work", *FETCH]
    command += ["--aus", f"mediapipe={tmp_path / 'mp.jsonl'}", "--aus", f"pyfeat={tmp_path / 'pf.csv'}:AU5,AU9"]
    prepare(*command)
    assert "words of emotion taken out of the caption" in capsys.readouterr().out
    prepared = rows_of(tmp_path / "work")
    assert counts_of(tmp_path / "work") == {}
    for row, line in zip(KEPT, prepared, strict=True):
        aus = dict(zip(AU_NAMES, aus_of_row(row).tolist(), strict=True))
        # Blendshapes have sides, probabilities have none.
        measured = {name: aus[name.rstrip("LR")] for name in ("AU5", "AU6L", "AU6R", "AU9", "AU12L", "AU12R")}
        assert {name: line[name] for name in line if name.startswith("AU")} == pytest.approx(measured, abs=1e-4)
        assert line["text"] == f"a person {row}"
        assert [line[name] for name in ("face_x0", "face_y0", "face_x1", "face_y1")] == [0.25, 0.125, 0.75, 1]
    prepare("build", tmp_path / "work", "--output", tmp_path / "faces", "--format", "parquet")
    data = load_training_data(train_config(tmp_path, tmp_path / "faces", face_loss_weight=4.0))
    assert len(data) == len(KEPT) and data.captions[0].as_py() == "a person 0"
    report = json.loads((tmp_path / "faces/report.json").read_text())["portraits"]
    assert report["removed_words"] == {"smiling": len(KEPT), "furrowed brows": len(KEPT)}
    assert any("the data do not have AU1, AU2" in note for note in report["notes"])


def test_more_pictures_can_be_fetched_later(shards, tmp_path):
    command = ["hub", shards, "--pictures", tmp_path / "few", "--output", tmp_path / "work", *FETCH]
    for count, expected in ((2, 2), (5, 5), (99, len(KEPT))):
        prepare(*command, "--max_pictures", count)
        assert len((tmp_path / "few/metadata.jsonl").read_text().splitlines()) == expected
    texts = [json.loads(line)["text"] for line in (tmp_path / "few/metadata.jsonl").read_text().splitlines()]
    assert texts == [f"a person {row}" for row in KEPT]


def test_captions_can_stay_as_they_are(shards, tmp_path):
    command = ["hub", shards, "--pictures", tmp_path / "pictures", "--output", tmp_path / "work", *FETCH]
    prepare(*command, "--keep_emotion_words", "--max_pictures", 1)
    assert json.loads((tmp_path / "pictures/metadata.jsonl").read_text())["text"] == PROMPTS[0]


def test_options_of_aus_without_a_table_are_said(shards, tmp_path, capsys):
    command = ["hub", shards, "--pictures", tmp_path / "pictures", "--output", tmp_path / "work", *FETCH]
    prepare(*command, "--max_pictures", 1, "--au_names", "AU12", "--measured")
    assert "run the same command with --aus. It fills" in (said := capsys.readouterr().out)
    assert "Until then, nothing is made of --au_names, --measured." in said
    prepare(*command, "--max_pictures", 1)
    assert "nothing is made" not in capsys.readouterr().out
    prepare(*command, "--au_names", "AU12L", status=2)
    assert "it needs both AU12L and AU12R" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--caption_column", "title"], "no column 'title' for `--caption_column`. The columns are image, prompt"),
        (["--picture_column", "photo"], "no column 'photo' for `--picture_column`"),
        (["--detector", "no_module:find"], "has to be MODULE:FUNCTION: No module named 'no_module'"),
        (["--max_pictures", "0"], "`--max_pictures` has to be an integer, at least 1"),
        (["--aus", "none.csv"], "There is no table 'none.csv'"),
        (["--source", "train"], "no name of a split"),
    ],
)
def test_wrong_options_are_refused_before_pictures_are_fetched(shards, tmp_path, capsys, options, message):
    command = ["hub", shards, "--pictures", tmp_path / "pictures", "--output", tmp_path / "work", *FETCH, *options]
    prepare(*command, status=2)
    assert message in capsys.readouterr().err and not list(tmp_path.glob("pictures/0*"))


def test_a_picture_that_cannot_be_read_is_named_or_left_out(tmp_path, capsys):
    folder = tmp_path / "portraits"
    folder.mkdir()
    features = Features({"image": Image(), "prompt": Value("string")})
    images = [{"bytes": content, "path": None} for content in (b"no picture", portrait(0))]
    columns = {"image": [*images, None, {"bytes": None, "path": "elsewhere/face.png"}], "prompt": ["a face"] * 4}
    # `Dataset.to_parquet` would read the file.
    pq.write_table(Dataset.from_dict(columns, features).data.table, folder / "train.parquet")
    command = ["hub", folder, "--pictures", tmp_path / "pictures", "--output", tmp_path / "work"]
    prepare(*command, status=2)
    assert "0000000/00000: picture or video that cannot be read" in capsys.readouterr().err
    prepare(*command, "--on_error", "skip")
    assert "3  picture or video that cannot be read" in (said := capsys.readouterr().out)
    assert "elsewhere/face.png" in said
    (line,) = (tmp_path / "pictures/metadata.jsonl").read_text().splitlines()
    with PILImage.open(tmp_path / "pictures" / json.loads(line)["file_name"]) as picture:
        assert picture.size == (SIDE, SIDE)
    assert not [path for path in (tmp_path / "pictures").iterdir() if path.name.startswith(".0")]
