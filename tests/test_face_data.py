"""DISFA, AffectNet and others in their real formats, drawn by the toy world, become one data set for training."""

import csv
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_dataset
from PIL import Image

from action_units import AU_NAMES
from face_data.annotate import Blip2, annotate, is_photo
from face_data.build import WITHOUT_BOX, correct_aus
from face_data.disfa import find_videos
from face_data.pictures import FACE_BOX, place_picture
from face_data.prepare import main
from face_data.report import AFTER_COLOR, count_intensities, draw_histograms
from face_data.store import list_parts, read_lines, read_parts, read_rows, run_parts
from program import write_atomically
from toy_faces.renderer import render, sample_aus, sample_portrait
from training.config import TrainConfig
from training.data import load_training_data


ROOT = Path(__file__).parents[1]
NUMBERS = [int(name[2:]) for name in AU_NAMES]
NEUTRAL = np.zeros(12, np.float32)


# --------------------------------------------------------------------------------------------------------------------
# Small copies of the data sets
# --------------------------------------------------------------------------------------------------------------------


def draw(seed: int, aus, path: Path, size: int = 64) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    render(sample_portrait(seed), aus).resize((size, size)).save(path)
    return path


def disfa_aus(subject: str, frame: int) -> np.ndarray:
    """Every other frame has an expression, of whole grades."""
    return np.round(sample_aus(int(subject[2:]) * 100 + frame).clip(0, 5)) if frame % 2 else NEUTRAL


def write_labels(root: Path, subject: str, num_frames: int) -> None:
    folder = root / "ActionUnit_Labels" / subject
    folder.mkdir(parents=True)
    for column, number in enumerate(NUMBERS):
        lines = [f"{frame},{disfa_aus(subject, frame)[column]:.0f}\n" for frame in range(1, num_frames + 1)]
        (folder / f"{subject}_au{number}.txt").write_text("".join(lines))


def make_disfa(root: Path, frames: dict[str, tuple[int, int]], first_number: int = 1) -> tuple[Path, Path]:
    """Labels and pictures of so many frames for each subject; a picture shows what its label says."""
    for subject, (num_labels, num_pictures) in frames.items():
        write_labels(root, subject, num_labels)
        for frame in range(1, num_pictures + 1):
            name = f"frames/{subject}/{frame - 1 + first_number:05d}.jpg"
            draw(int(subject[2:]), disfa_aus(subject, frame), root / name)
    return root, root / "frames"


def libreface_columns(aus) -> dict:
    return {f"au_{number}_intensity": float(value) for number, value in zip(NUMBERS, aus, strict=True)}


def write_table(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


# What each picture of AffectNet is: a name, an expression's number, the side in pixels, what LibreFace measures.
SMILE = np.float32([0, 0, 0, 0, 3, 0, 4, 0, 0, 0, 2, 0])
FROWN = np.float32([2, 0, 4, 0, 0, 0.5, 0, 1, 0.5, 0.2, 0, 0])
PICTURES = {
    "smile": (1, 512, SMILE),
    "frown": (6, 600, FROWN),
    "noface": (10, 512, SMILE),
    "small": (1, 511, SMILE),
    "weak": (0, 512, NEUTRAL + np.float32(0.016)),
}
KEPT_NAMES = {"smile", "frown"}


def make_old_affectnet(root: Path) -> tuple[Path, Path]:
    lists, rows = [], []
    for number, (name, (expression, side, aus)) in enumerate(PICTURES.items()):
        path = f"{100 + number}/{name}.jpg"
        draw(number, aus, root / "Manually_Annotated_Images" / path, side)
        box = {"face_x": 60, "face_y": 51, "face_width": 384, "face_height": 410}
        landmarks = {"facial_landmarks": "100.5;200.5;110;210"}
        emotion = {"expression": expression, "valence": 0.1, "arousal": -0.2}
        lists.append({"subDirectory_filePath": path} | box | landmarks | emotion)
        # As a machine with other folders has called it.
        rows.append({"file_name": f"/data/AffectNet/Manually_Annotated_Images/{path}"} | libreface_columns(aus))
    folder = root / "Manually_Annotated_file_lists"
    folder.mkdir()
    write_table(folder / "training.csv", lists[:3])
    write_table(folder / "validation.csv", lists[3:])
    return root, write_table(root.parent / "libreface.csv", rows)


def make_new_affectnet(root: Path) -> tuple[Path, Path]:
    rows = []
    for number, (expression, side, aus) in enumerate(PICTURES.values()):
        split = root / ("val_set" if number == 1 else "train_set")
        draw(number, aus, split / f"images/{number}.jpg", side)
        (split / "annotations").mkdir(exist_ok=True)
        np.save(split / f"annotations/{number}_exp.npy", np.array(str(expression)))
        rows.append({"file_name": f"{split.name}/images/{number}.jpg"} | libreface_columns(aus))
    return root, write_table(root.parent / "libreface.csv", rows)


def make_folder(root: Path, count: int = 6) -> Path:
    """Pictures with captions and true AUs, in the format of the training itself."""
    lines = []
    for seed in range(count):
        draw(seed, sample_aus(seed), root / f"{seed:02d}.png", 32)
        aus = {name: float(value) for name, value in zip(AU_NAMES, sample_aus(seed), strict=True)}
        lines.append({"file_name": f"{seed:02d}.png", "text": f"person {seed}", "subject": f"p{seed}"} | aus)
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


def prepare(*args, status: int = 0) -> None:
    assert main([str(arg) for arg in args]) == status


def rows_of(folder: Path) -> list[dict]:
    return list(read_rows(folder))


def counts_of(folder: Path) -> dict[str, int]:
    counts = {}
    for line in read_parts(folder):
        if "dropped" in line:
            counts[line["dropped"]] = counts.get(line["dropped"], 0) + line["count"]
    return counts


def aus_of(row: dict) -> list[float]:
    return [row[name] for name in AU_NAMES]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --------------------------------------------------------------------------------------------------------------------
# DISFA
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_number", [1, 0])
def test_each_disfa_frame_gets_its_own_label(tmp_path, first_number):
    root, frames = make_disfa(tmp_path / "DISFA", {"SN001": (8, 8), "SN032": (6, 6)}, first_number)
    prepare("disfa", "--root", root, "--images", frames, "--neutral_share", 1, "--output", tmp_path / "w")
    rows = rows_of(tmp_path / "w")
    assert len(rows) == 14
    for row in rows:
        subject, frame = row["origin"].split("/")
        assert aus_of(row) == disfa_aus(subject, int(frame)).tolist()
        source = frames / subject / f"{int(frame) - 1 + first_number:05d}.jpg"
        assert (tmp_path / "w" / row["file_name"]).read_bytes() == source.read_bytes()
        assert (row["source"], row["subject"], row["text"]) == ("disfa", subject, "")


def test_disfa_keeps_every_expression_and_a_share_of_the_neutral_frames(tmp_path, capsys):
    root, frames = make_disfa(tmp_path / "DISFA", {"SN001": (40, 40)})
    prepare("disfa", "--root", root, "--images", frames, "--output", tmp_path / "w")
    expected = [frame for frame in range(1, 41) if disfa_aus("SN001", frame).any()]
    rows = rows_of(tmp_path / "w")
    expressive = [int(row["origin"].split("/")[1]) for row in rows if any(aus_of(row))]
    num_neutral = 40 - len(expected)
    assert expressive == expected and len(rows) - len(expressive) == round(0.1 * num_neutral)
    table = capsys.readouterr().out
    assert f"disfa  {num_neutral - round(0.1 * num_neutral)}  no AU, and not in the share that is kept" in table
    assert f"{len(rows)}  kept" in table


def test_labels_and_pictures_of_unequal_length_are_cut_to_what_both_have(tmp_path):
    root, frames = make_disfa(tmp_path / "DISFA", {"SN001": (8, 5), "SN002": (5, 9), "SN003": (4, 4)})
    # One AU has a label less than the others.
    labels = root / "ActionUnit_Labels/SN003/SN003_au26.txt"
    labels.write_text("".join(labels.read_text().splitlines(keepends=True)[:3]))
    prepare("disfa", "--root", root, "--images", frames, "--neutral_share", 1, "--output", tmp_path / "w")
    assert len(rows_of(tmp_path / "w")) == 13
    assert counts_of(tmp_path / "w") == {
        "labels without a frame": 3,
        "frames without a label": 5,
        "labels of some AUs only": 1,
    }


def break_picture(root):
    path = root / "frames/SN002/00003.jpg"
    path.write_bytes(path.read_bytes()[:300])


def break_label(root):
    path = root / "ActionUnit_Labels/SN002/SN002_au12.txt"
    path.write_text(path.read_text().replace("3,", "3,7", 1))


PROBLEMS = {
    "corrupt picture": (break_picture, "frames/SN002/00003.jpg: picture or video that cannot be read"),
    "no label file": (
        lambda root: (root / "ActionUnit_Labels/SN002/SN002_au12.txt").unlink(),
        "SN002_au12.txt: missing label file",
    ),
    "bad label": (break_label, "SN002_au12.txt: label file that cannot be read (line 3 is"),
    "no pictures": (lambda root: shutil.rmtree(root / "frames/SN002"), "frames: subject without video or pictures"),
    "no labels": (lambda root: shutil.rmtree(root / "ActionUnit_Labels/SN002"), "frames/SN002: no labels"),
}


@pytest.mark.parametrize(("harm", "message"), PROBLEMS.values(), ids=PROBLEMS)
def test_what_is_wrong_with_disfa_is_named_and_ends_the_step_or_is_left_out(tmp_path, capsys, harm, message):
    root, frames = make_disfa(tmp_path / "DISFA", {"SN001": (3, 3), "SN002": (3, 3)})
    harm(root)
    command = ["disfa", "--root", root, "--images", frames, "--neutral_share", 1, "--num_workers", 1]
    prepare(*command, "--output", tmp_path / "stopped", status=2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error and "--on_error skip" in error
    prepare("build", tmp_path / "stopped", "--output", tmp_path / "faces", "--default_caption", "a face", status=2)
    assert "was interrupted. Run it again" in capsys.readouterr().err
    # The same command goes on with what was begun, now leaving out what is wrong.
    prepare(*command, "--output", tmp_path / "stopped", "--on_error", "skip")
    kept = [row["origin"] for row in rows_of(tmp_path / "stopped")]
    assert kept[:3] == ["SN001/1", "SN001/2", "SN001/3"]
    assert kept[3:] == (["SN002/1", "SN002/2"] if harm is break_picture else [])
    # The report says which file it was.
    assert message.partition(": ")[0] in capsys.readouterr().out


def test_a_folder_is_not_filled_with_other_settings(tmp_path, capsys):
    root, frames = make_disfa(tmp_path / "DISFA", {"SN001": (3, 3)})
    prepare("disfa", "--root", root, "--images", frames, "--output", tmp_path / "w")
    before = files_of(tmp_path / "w")
    prepare("disfa", "--root", root, "--images", frames, "--output", tmp_path / "w", "--seed", 1, status=2)
    assert (
        "holds rows made with other settings: `seed` was 0 and is now 1. Set another folder, or delete"
        in capsys.readouterr().err
    )
    prepare("disfa", "--root", root, "--images", frames, "--output", root, status=2)
    assert "is no empty folder" in capsys.readouterr().err
    assert files_of(tmp_path / "w") == before


def test_several_processes_make_the_same_as_one(tmp_path):
    root, frames = make_disfa(tmp_path / "DISFA", {f"SN{number:03d}": (4, 4) for number in (1, 2, 3, 4, 5)})
    for count in (1, 2):
        prepare(
            "disfa", "--root", root, "--images", frames, "--output", tmp_path / f"w{count}", "--num_workers", count
        )
    assert files_of(tmp_path / "w1") == files_of(tmp_path / "w2")


def test_a_killed_step_goes_on_where_it_was(tmp_path):
    root, frames = make_disfa(tmp_path / "DISFA", {f"SN{number:03d}": (3, 3) for number in range(1, 7)})
    command = ["disfa", "--root", root, "--images", frames, "--neutral_share", 1, "--num_workers", 2, "--output"]
    prepare(*command, tmp_path / "whole")
    # Whoever opens a pipe waits: both processes stand still, each in the middle of a part.
    halts = [frames / f"SN{number:03d}/00002.jpg" for number in (3, 4)]
    for path in halts:
        path.rename(path.with_suffix(".bak"))
        os.mkfifo(path)
    work = tmp_path / "killed"
    done = [work / f"rows/SN{number:03d}.jsonl" for number in (1, 2)]
    arguments = [sys.executable, "-m", "face_data.prepare", *map(str, command), str(work)]
    process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and not all(path.exists() for path in done):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert sorted((work / "rows").glob("SN*")) == done and not (work / "finished").exists()
    times = {path: path.stat().st_mtime_ns for path in done}
    (work / "rows/.SN003.jsonl.part").write_text("half a li")
    for path in halts:
        path.with_suffix(".bak").rename(path)
    prepare(*command, work)
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in times.items())
    assert files_of(work) == files_of(tmp_path / "whole")


def test_a_link_that_a_killed_process_has_left_is_replaced(tmp_path):
    first, second, unfinished = tmp_path / "a.jpg", tmp_path / "b.jpg", tmp_path / ".placed.jpg.part"
    for path, color in ((first, "red"), (second, "blue")):
        Image.new("RGB", (8, 8), color).save(path)
    before = first.read_bytes()
    for source in (first, second):
        os.link(first, unfinished)
        assert place_picture(source, tmp_path / "placed.jpg").path.samefile(source)
    os.link(first, unfinished)
    write_atomically(tmp_path / "placed.jpg", "text")
    assert first.read_bytes() == before


def end_itself(part: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_reported(tmp_path):
    with pytest.raises(OSError, match="A worker process was killed, perhaps for lack of memory"):
        run_parts(end_itself, ["a", "b"], tmp_path, 2, "label")


def test_videos_need_a_reader_and_say_so(tmp_path, capsys, monkeypatch):
    write_labels(tmp_path / "DISFA", "SN001", 3)
    video = tmp_path / "DISFA/Videos_RightCamera/RightVideoSN001_Comp.avi"
    video.parent.mkdir()
    video.touch()
    assert find_videos(tmp_path / "DISFA", "right") == {"SN001": video}
    monkeypatch.setitem(sys.modules, "av", None)
    prepare("disfa", "--root", tmp_path / "DISFA", "--camera", "right", "--output", tmp_path / "w", status=2)
    assert "pip install av" in capsys.readouterr().err and not (tmp_path / "w").exists()


def write_video(path: Path, num_frames: int) -> None:
    """Frame n is grey with the brightness 10 · n."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=20)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for number in range(1, num_frames + 1):
            picture = Image.new("RGB", (64, 48), (10 * number,) * 3)
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())


@pytest.mark.skipif(importlib.util.find_spec("av") is None, reason="needs PyAV")
def test_frames_of_videos_get_their_own_labels(tmp_path, capsys):
    root = tmp_path / "DISFA"
    for subject, num_labels in (("SN001", 8), ("SN002", 14)):
        write_labels(root, subject, num_labels)
        write_video(root / f"Videos_LeftCamera/LeftVideo{subject}_comp.avi", 12)
    prepare("disfa", "--root", root, "--neutral_share", 1, "--output", tmp_path / "w")
    rows = rows_of(tmp_path / "w")
    assert [row["origin"] for row in rows if row["subject"] == "SN001"] == [f"SN001/{n}" for n in range(1, 9)]
    for row in rows:
        subject, frame = row["origin"].split("/")
        assert aus_of(row) == disfa_aus(subject, int(frame)).tolist()
        brightness = np.asarray(Image.open(tmp_path / "w" / row["file_name"])).mean()
        assert brightness == pytest.approx(10 * int(frame), abs=3)
    assert counts_of(tmp_path / "w") == {"frames without a label": 4, "labels without a frame": 2}
    # What comes before a damage is kept.
    video = root / "Videos_LeftCamera/LeftVideoSN001_comp.avi"
    video.write_bytes(b"no video")
    prepare("disfa", "--root", root, "--output", tmp_path / "v", status=2)
    assert f"{video}: picture or video that cannot be read (after frame 0" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------------
# AffectNet
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_old_affectnet, make_new_affectnet])
def test_both_forms_of_affectnet_are_filtered(tmp_path, make):
    root, table = make(tmp_path / "AffectNet")
    prepare("affectnet", "--root", root, "--aus", table, "--output", tmp_path / "w")
    rows = rows_of(tmp_path / "w")
    by_size = {Image.open(tmp_path / "w" / row["file_name"]).width: row for row in rows}
    assert by_size.keys() == {512, 600}
    assert aus_of(by_size[512]) == SMILE.tolist() and np.allclose(aus_of(by_size[600]), FROWN)
    assert counts_of(tmp_path / "w") == {
        "marked as no face": 1,
        "picture too small": 1,
        "sum of all intensities too small": 1,
    }
    if make is make_old_affectnet:
        box = [by_size[512][name] for name in ("face_x0", "face_y0", "face_x1", "face_y1")]
        assert box == pytest.approx([60 / 512, 51 / 512, 444 / 512, 461 / 512], abs=1e-5)


def test_what_is_wrong_with_affectnet_is_counted(tmp_path, capsys):
    root, table = make_old_affectnet(tmp_path / "AffectNet")
    images = root / "Manually_Annotated_Images"
    (images / "100/smile.jpg").write_bytes(b"no picture")
    (images / "101/frown.jpg").rename(images / "101/other.jpg")
    draw(9, SMILE, images / "109/unlisted.jpg", 512)
    with table.open() as file:
        rows = list(csv.DictReader(file))
    unlisted = {"file_name": "109/unlisted.jpg"} | libreface_columns(SMILE)
    # The last picture has two faces, and the last row is wrong.
    write_table(table, [*rows, rows[-1] | {"au_1_intensity": 3}, unlisted, unlisted | {"au_1_intensity": 9}])
    command = ["affectnet", "--root", root, "--aus", table, "--num_workers", 1, "--output"]
    prepare(*command, tmp_path / "stopped", status=2)
    assert "line 9: column 'au_1_intensity' is 9. libreface measures from 0 to 5" in capsys.readouterr().err
    prepare(*command, tmp_path / "w", "--on_error", "skip")
    assert counts_of(tmp_path / "w") == {
        "marked as no face": 1,
        "picture too small": 1,
        "several faces": 1,
        "picture or video that cannot be read": 1,
        "picture that is not there": 1,
        "picture that is in no file list": 1,
        "row of the table that cannot be read": 1,
    }
    report = capsys.readouterr().out
    assert "101/frown.jpg" in report and "109/unlisted.jpg" in report and "100/smile.jpg" in report


def test_a_missing_annotation_is_reported_with_its_path(tmp_path, capsys):
    root, table = make_new_affectnet(tmp_path / "AffectNet")
    (root / "train_set/annotations/0_exp.npy").unlink()
    prepare("affectnet", "--root", root, "--aus", table, "--output", tmp_path / "w", status=2)
    assert "train_set/annotations/0_exp.npy: missing label file" in capsys.readouterr().err


def test_a_picture_that_is_missing_in_one_split_is_not_taken_from_the_other(tmp_path):
    root, table = make_new_affectnet(tmp_path / "AffectNet")
    (root / "val_set/images/1.jpg").rename(root / "train_set/images/1.jpg")
    (root / "val_set/annotations/1_exp.npy").rename(root / "train_set/annotations/1_exp.npy")
    prepare("affectnet", "--root", root, "--aus", table, "--output", tmp_path / "w", "--on_error", "skip")
    assert counts_of(tmp_path / "w")["picture that is not there"] == 1
    assert counts_of(tmp_path / "w")["picture that is not in the table"] == 1


def test_the_paper_corrects_measured_intensities():
    lowest, highest = np.zeros(12), np.full(12, 5.0)
    lowest[0], highest[0] = 1.0, 4.0
    aus = np.full(12, 2.0)
    corrected = dict(zip(AU_NAMES, correct_aus(aus, lowest, highest).tolist(), strict=True))
    assert corrected["AU1"] == pytest.approx(5 * (2**1.8 - 1) / (4**1.8 - 1))
    # 5 · (2 / 5)^1.8 is below 1.
    assert corrected["AU4"] == 0
    assert corrected["AU15"] == corrected["AU17"] == corrected["AU20"] == pytest.approx(5 * (2 / 5) ** 0.8)
    assert all(corrected[name] == 2 for name in ("AU2", "AU5", "AU6", "AU9", "AU12", "AU25", "AU26"))
    assert not correct_aus(np.full(12, 0.99), lowest, highest)[[1, 3, 4]].any()
    # An AU that is the same everywhere stays what it is.
    same = np.full(12, 3.0)
    assert correct_aus(same, same, same).tolist() == same.tolist()


# --------------------------------------------------------------------------------------------------------------------
# Any folder, and the data set
# --------------------------------------------------------------------------------------------------------------------


def train_config(tmp_path: Path, data: Path, **options) -> TrainConfig:
    return TrainConfig(
        pretrained_model_name_or_path="none", output_dir=tmp_path / "run", train_data_dir=data, **options
    )


@pytest.fixture
def work_folder(tmp_path) -> Path:
    root = make_folder(tmp_path / "mine")
    command = ["folder", "--root", root, "--aus", root / "metadata.jsonl", "--rows_per_part", 2]
    prepare(*command, "--output", tmp_path / "w")
    return tmp_path / "w"


@pytest.mark.parametrize("reader", ["imagefolder", "parquet", "stream"])
def test_the_training_reads_what_is_built(tmp_path, work_folder, reader, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    form = "parquet" if reader == "stream" else reader
    prepare("build", work_folder, "--output", tmp_path / "faces", "--format", form, "--num_workers", 2)
    for folder in (tmp_path / "faces", tmp_path / "faces/train"):
        data = load_training_data(train_config(tmp_path, folder, streaming=reader == "stream"))
        assert len(data) == 6
        for row in range(6):
            table, index = data.locate(row)
            np.testing.assert_allclose(table.au_intensities[index], sample_aus(row), rtol=1e-6)
            assert table.captions[index].as_py() == f"person {row}"
            with table.open_file(index) as file:
                assert file.read() == (tmp_path / f"mine/{row:02d}.png").read_bytes()


def test_shards_are_streamed_by_the_datasets_library(tmp_path, work_folder):
    prepare("build", work_folder, "--output", tmp_path / "faces", "--format", "parquet")
    rows = list(load_dataset(str(tmp_path / "faces"), split="train", streaming=True))
    assert [row["text"] for row in rows] == [f"person {n}" for n in range(6)]
    assert [(row["source"], row["subject"], row["origin"]) for row in rows[:2]] == [
        ("mine", "p0", "00.png"),
        ("mine", "p1", "01.png"),
    ]
    np.testing.assert_array_equal(rows[3]["image"], Image.open(tmp_path / "mine/03.png"))


@pytest.mark.parametrize("form", ["imagefolder", "parquet"])
def test_boxes_of_faces_reach_the_training(tmp_path, work_folder, form, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    root, table = make_old_affectnet(tmp_path / "AffectNet")
    prepare("affectnet", "--root", root, "--aus", table, "--output", tmp_path / "a")
    command = ["build", tmp_path / "a", work_folder, "--output", tmp_path / "faces", "--format", form]
    prepare(*command, "--keep_drawings", "--default_caption", "a face")
    data = load_training_data(train_config(tmp_path, tmp_path / "faces", face_loss_weight=4.0))
    boxes = sorted(map(tuple, data.face_boxes.round(4).tolist()))
    # The data set without boxes has the whole picture.
    assert boxes.count((0, 0, 1, 1)) == 6 and len(boxes) == 8
    assert boxes[-1] == pytest.approx((60 / 512, 51 / 512, 444 / 512, 461 / 512), abs=1e-4)


@pytest.mark.parametrize(
    ("columns", "box"),
    [
        ({"FaceRectX": 8, "FaceRectY": 4, "FaceRectWidth": 16, "FaceRectHeight": 40}, [0.25, 0.125, 0.75, 1]),
        ({"face_x0": 0.1, "face_y0": 0.2, "face_x1": 0.9, "face_y1": 1}, [0.1, 0.2, 0.9, 1]),
        ({"face_x0": "", "face_y0": "", "face_x1": "", "face_y1": ""}, None),
    ],
)
def test_boxes_of_a_table_are_read(tmp_path, columns, box):
    draw(0, SMILE, tmp_path / "p/a.png", 32)
    aus = {f"AU{number:02d}": value / 5 for number, value in zip(NUMBERS, SMILE, strict=True)}
    table = write_table(tmp_path / "t.csv", [{"input": "a.png"} | aus | columns])
    prepare("folder", "--root", tmp_path / "p", "--aus", table, "--output", tmp_path / "w")
    (row,) = rows_of(tmp_path / "w")
    assert [row[name] for name in row if name.startswith("face_")] == (box or [])


def test_a_table_may_name_its_columns_otherwise(tmp_path, capsys):
    root = make_folder(tmp_path / "mine", 2)
    rows = [json.loads(line) for line in (root / "metadata.jsonl").read_text().splitlines()]
    renamed = [{"Bild": row.pop("file_name"), "Text der Karte": row.pop("text")} | row for row in rows]
    table = write_table(tmp_path / "t.csv", renamed)
    command = ["folder", "--root", root, "--aus", table, "--output", tmp_path / "w", "--source", "mine"]
    prepare(*command, status=2)
    assert "there is no file name. Say which column has it with `--image_column`" in capsys.readouterr().err
    prepare(*command, "--image_column", "Bild", "--caption_column", "Karte", status=2)
    shutil.rmtree(tmp_path / "w")
    prepare(*command, "--image_column", "Bild", "--caption_column", "Text der Karte")
    assert [row["text"] for row in rows_of(tmp_path / "w")] == ["person 0", "person 1"]


def make_table(path: Path, aus_of_names: list[tuple[str, dict]], tool: str = "AU{}") -> Path:
    """A row for each name, with all AUs 0 but for those given."""
    zeros = {tool.format(number): 0 for number in NUMBERS}
    return write_table(path, [{"file_name": name} | zeros | aus for name, aus in aus_of_names])


def test_one_picture_under_two_names_is_one_picture(tmp_path, capsys):
    for number, name in enumerate("abcd"):
        draw(number, SMILE, tmp_path / f"faces/{name}.png", 32)
    rows = [("a.png", {"AU12": 5}), ("b.png", {"AU12": 5}), ("D:\\faces\\b.png", {})]
    rows += [("/x/faces/a.png", {"AU12": 5})]
    rows += [("c.png", {"AU6": 1}), ("c.png", {"AU6": 2})]
    table = make_table(tmp_path / "t.csv", rows)
    prepare("folder", "--root", tmp_path / "faces", "--aus", table, "--output", tmp_path / "w")
    assert [(row["origin"], row["AU12"]) for row in rows_of(tmp_path / "w")] == [("a.png", 5)]
    assert counts_of(tmp_path / "w") == {
        "row that says the same again": 1,
        "rows under several names that contradict each other": 1,
        "several faces": 1,
        "picture that is not in the table": 1,
    }


def test_letters_with_accents_are_found_however_they_are_composed(tmp_path):
    # macOS keeps names decomposed; the folder has a name without Latin letters.
    composed, decomposed = "Jos\u00e9", "Jose\u0301"
    root = tmp_path / "\u0444\u043e\u0442\u043e"
    draw(0, SMILE, root / decomposed / f"{decomposed}.png", 32)
    draw(1, SMILE, root / f"{composed}.png", 32)
    rows = [(f"{composed}/{composed}.png", {}), (f"C:\\x\\{decomposed}.png", {"AU1": 1})]
    table = make_table(tmp_path / "t.csv", rows)
    prepare("folder", "--root", root, "--aus", table, "--output", tmp_path / "w")
    assert [(row["origin"], row["AU1"], row["source"]) for row in rows_of(tmp_path / "w")] == [
        (f"{decomposed}/{decomposed}.png", 0, "\u0444\u043e\u0442\u043e"),
        (f"{composed}.png", 1, "\u0444\u043e\u0442\u043e"),
    ]
    prepare("build", tmp_path / "w", "--output", tmp_path / "faces", "--default_caption", "a face")
    assert len(load_dataset("imagefolder", data_dir=str(tmp_path / "faces"), split="train")) == 2


def test_an_output_inside_the_root_is_not_counted(tmp_path):
    root = make_folder(tmp_path / "mine", 3)
    draw(9, SMILE, root / "animation.GIF", 32)
    draw(9, SMILE, root / "other.jfif".replace("jfif", "jpg"), 32).rename(root / "other.jfif")
    for name in ("w", "again"):
        command = ["folder", "--root", root, "--aus", root / "metadata.jsonl", "--output", root / name]
        prepare(*command)
        # The GIF and the JFIF picture are pictures too.
        assert counts_of(root / name) == {"picture that is not in the table": 2}
        prepare("build", root / name, "--output", root / f"faces-{name}", "--num_workers", 1)


def test_an_index_that_is_missing_is_made_again_and_changes_no_row(tmp_path):
    root = make_folder(tmp_path / "mine", 2)
    command = ["folder", "--root", root, "--aus", root / "metadata.jsonl", "--output", tmp_path / "w"]
    prepare(*command)
    rows = files_of(tmp_path / "w/rows")
    (tmp_path / "w/pictures.sqlite").unlink()
    prepare(*command)
    assert (tmp_path / "w/pictures.sqlite").is_file() and files_of(tmp_path / "w/rows") == rows


def test_names_that_no_file_can_have_are_rows_to_skip(tmp_path, capsys):
    root = make_folder(tmp_path / "mine", 1)
    zeros = dict.fromkeys(AU_NAMES, 0.0)
    names = ["x" * 300 + ".png", "a\0b.png", "\ud800.png", "00.png"]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"file_name": name} | zeros) for name in names))
    command = ["folder", "--root", root, "--aus", tmp_path / "t.jsonl", "--num_workers", 1, "--output"]
    prepare(*command, tmp_path / "stopped", status=2)
    assert "line 3: '\\ud800.png' is no Unicode text" in capsys.readouterr().err
    prepare(*command, tmp_path / "w", "--on_error", "skip")
    assert [row["origin"] for row in rows_of(tmp_path / "w")] == ["00.png"]
    assert counts_of(tmp_path / "w") == {"picture that is not there": 2, "row of the table that cannot be read": 1}


def test_pictures_that_need_another_form_are_changed_and_counted(tmp_path, capsys):
    root = tmp_path / "mine"
    root.mkdir()
    Image.fromarray(np.full((8, 8), 32896, np.uint16)).save(root / "sixteen.png")
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(root / "clear.png")
    Image.new("RGB", (8, 8), "red").save(root / "plain.png")
    Image.new("RGB", (8, 8), "red").save(root / "plain.avif", quality=100)
    Image.new("F", (8, 8), 0.5).save(root / "float.tif")
    names = ["sixteen.png", "clear.png", "plain.png", "plain.avif", "float.tif"]
    table = make_table(tmp_path / "t.csv", [(name, {}) for name in names])
    command = ["folder", "--root", root, "--aus", table, "--on_error", "skip"]
    prepare(*command, "--output", tmp_path / "w", "--num_workers", 1)
    colors = {}
    for row in rows_of(tmp_path / "w"):
        with Image.open(tmp_path / "w" / row["file_name"]) as picture:
            colors[row["file_name"]] = picture.convert("RGB").getpixel((0, 0))
    near_red = colors.pop("images/plain.avif.png")
    assert np.abs(np.subtract(near_red, (255, 0, 0))).max() <= 3
    assert colors == {
        "images/sixteen.png.png": (128, 128, 128),
        "images/clear.png.png": (255, 255, 255),
        "images/plain.png": (255, 0, 0),
    }
    text = capsys.readouterr().out
    assert "1    of them: brought from 16 bits to 8" in text and "1    of them: transparent pixels composed on" in text
    assert "floating point numbers, which have no agreed scale" in text
    prepare("build", tmp_path / "w", "--output", tmp_path / "faces", "--default_caption", "a face")
    assert "of them: brought from 16 bits to 8" in (tmp_path / "faces/report.txt").read_text()
    assert (
        json.loads((tmp_path / "faces/report.json").read_text())["mine"]["changed"]["brought from 16 bits to 8"] == 1
    )


def test_what_is_guessed_of_a_table_is_said_and_reported(tmp_path, capsys, caplog):
    root = make_folder(tmp_path / "mine", 2)
    (tmp_path / "t.csv").write_text("input;AU01;AU12;mouthSmileLeft\n00.png;0,2;0,4;0,9\n01.png;0;1;0\n")
    command = ["folder", "--root", root, "--aus", tmp_path / "t.csv", "--output"]
    prepare(*command, tmp_path / "w")
    assert [row["AU12"] for row in rows_of(tmp_path / "w")] == [2, 5]
    notes = ["semicolons", "AUs of pyfeat and blendshapes", "2 numbers have a decimal comma", "gives AU1, AU12."]
    notes += ["Of the paper's AUs the data do not have AU2, AU4, AU5, AU6, AU9, AU15"]
    report = capsys.readouterr().out
    for note in notes:
        assert caplog.text.count(note) == 1 and report.count(note) == 1
    prepare(*command, tmp_path / "v", "--au_tool", "mediapipe")
    assert [row["AU12"] for row in rows_of(tmp_path / "v")] == pytest.approx([2.25, 0])
    # What is wanted and has sides gets the AU of both, and nothing that no table measures.
    prepare(*command, tmp_path / "u", "--au_names", "AU12L", "AU12R")
    assert [(row["AU12L"], row["AU12R"], "AU1" in row) for row in rows_of(tmp_path / "u")] == [
        (2, 2, False),
        (5, 5, False),
    ]
    assert "pyfeat gives AU12L, AU12R. Left out, because `--au_names` does not name them: AU1." in caplog.text
    prepare(*command, tmp_path / "u", status=2)
    assert "`au_names` was ['AU12L', 'AU12R'] and is now ['AU1', 'AU12']" in capsys.readouterr().err


def test_aus_of_two_tools_are_joined(tmp_path, capsys):
    root = make_folder(tmp_path / "mine", 6)
    (root / "metadata.jsonl").unlink()
    captions = "".join(f"0{n}.png,person {n}\n" for n in range(6))
    (tmp_path / "captions.csv").write_text(f"file_name,caption\n{captions}")
    shapes = {"mouthSmileLeft": 0.8, "mouthSmileRight": 0.2, "eyeWideLeft": 0.1, "eyeBlinkRight": 1}
    shapes = [{"categoryName": name, "score": score} for name, score in shapes.items()]
    faces = [[shapes], [shapes], [], [shapes, shapes[:1]], [shapes], [shapes]]
    lines = [{"file_name": f"0{n}.png", "faceBlendshapes": f} for n, f in enumerate(faces)]
    (tmp_path / "mp.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = [{"input": f"/elsewhere/0{n}.png", "AU05": 0.6, "AU09": 0.2, "AU12": 0.1} for n in range(4)]
    rows += [{"input": "/elsewhere/04.png", "AU05": "", "AU09": "", "AU12": ""}]
    write_table(tmp_path / "pf.csv", rows)
    command = ["folder", "--root", root, "--captions", tmp_path / "captions.csv"]
    command += ["--aus", f"mediapipe={tmp_path / 'mp.jsonl'}", "--aus", f"pyfeat={tmp_path / 'pf.csv'}:AU5,AU9"]
    prepare(*command, "--output", tmp_path / "stopped", "--num_workers", 1, status=2)
    assert "05.png: picture that is in the first table only" in capsys.readouterr().err
    prepare(*command, "--output", tmp_path / "w", "--on_error", "skip")
    rows = rows_of(tmp_path / "w")
    assert [(row["origin"], row["text"]) for row in rows] == [("00.png", "person 0"), ("01.png", "person 1")]
    for row in rows:
        aus = {name: row[name] for name in ("AU5", "AU9", "AU12L", "AU12R", "AU43L", "AU43R", "AU1")}
        assert list(aus.values()) == pytest.approx([3, 1, 4, 1, 0, 5, 0], abs=1e-5)
        assert not {"AU5L", "AU9R", "AU12", "AU45"} & row.keys()
    assert counts_of(tmp_path / "w") == {
        "no face": 2,
        "several faces": 1,
        "picture that is in the first table only": 1,
    }
    report = capsys.readouterr().out
    assert "Left out, because another table gives them: AU5L, AU5R, AU9L, AU9R." in report
    assert "pyfeat gives AU5, AU9. Left out, because `--aus` does not name them: AU12." in report


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (["{}", "{}"], "takes all AUs from"),
        (["{}", "{}:AU5", "{}:AU9,AU5"], "takes AU5 from two tables"),
        (["{}", "{}:AU99"], "names 'AU99'"),
        (["{}:AU5", "--au_tool", "pyfeat", "{}"], "`--au_tool` is for one table"),
        (["none.csv"], "There is no table 'none.csv'"),
    ],
)
def test_tables_that_contradict_each_other_are_refused(tmp_path, capsys, tables, message):
    table = make_table(tmp_path / "t.csv", [("a.png", {})])
    words = [word if word.startswith("--") else f"--aus={word.format(table)}" for word in tables]
    words = [word.replace("--aus=pyfeat", "pyfeat") for word in words]
    prepare("folder", "--root", tmp_path, *words, "--output", tmp_path / "w", status=2)
    assert message in capsys.readouterr().err and not (tmp_path / "w").exists()


def test_words_of_emotion_are_taken_out_of_captions_and_counted(tmp_path, capsys):
    root = make_folder(tmp_path / "mine", 2)
    text = (
        (root / "metadata.jsonl").read_text().replace("person 0", "a smiling man").replace("person 1", "an angry boy")
    )
    (root / "metadata.jsonl").write_text(text)
    command = ["folder", "--root", root, "--aus", root / "metadata.jsonl", "--output"]
    prepare(*command, tmp_path / "w", "--drop_emotion_words")
    assert [row["text"] for row in rows_of(tmp_path / "w")] == ["a man", "a boy"]
    assert "2    of them: words of emotion taken out of the caption\n" in capsys.readouterr().out
    prepare(*command, tmp_path / "v")
    assert [row["text"] for row in rows_of(tmp_path / "v")] == ["a smiling man", "an angry boy"]
    for name, extra in (("w", []), ("v", ["--drop_emotion_words"])):
        prepare("build", tmp_path / name, "--output", tmp_path / f"faces-{name}", *extra)
        built = (tmp_path / f"faces-{name}/train/metadata.jsonl").read_text()
        assert [json.loads(line)["text"] for line in built.splitlines()] == ["a man", "a boy"]
        assert "removed_words" not in built
        report = json.loads((tmp_path / f"faces-{name}/report.json").read_text())
        assert report["mine"]["removed_words"] == {"smiling": 1, "angry": 1}


def test_a_picture_that_a_camera_has_turned_is_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), "red").save(tmp_path / "a.jpg", exif=exif)
    placed = place_picture(tmp_path / "a.jpg", tmp_path / "b.jpg")
    assert (placed.path, placed.size, placed.is_turned, placed.is_mirrored) == (
        tmp_path / "b.jpg",
        (20, 40),
        True,
        False,
    )
    assert placed.note == "turned upright, as EXIF says"
    with Image.open(tmp_path / "b.jpg") as picture:
        assert picture.size == (20, 40) and picture.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sides_of_a_picture_that_exif_mirrors_are_not_trained(tmp_path, capsys, orientation):
    (tmp_path / "p").mkdir()
    exif = Image.Exif()
    exif[0x0112] = orientation
    # Black where a viewer shows the left of the upright picture, whatever the orientation.
    shown = Image.new("RGB", (40, 20), "white")
    shown.paste("black", (0, 0, 20, 20))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = shown.transpose(undo[orientation]) if orientation > 1 else shown
    for name in ("smirk", "smile"):
        stored.save(tmp_path / f"p/{name}.png", exif=exif)
    rows = [{"file_name": "smirk.png", "AU12L": 3, "AU12R": 1}, {"file_name": "smile.png", "AU12L": 2, "AU12R": 2}]
    box = {"face_x0": 0, "face_y0": 0, "face_x1": 0.5, "face_y1": 1}
    table = write_table(tmp_path / "t.csv", [row | box for row in rows])
    prepare("folder", "--root", tmp_path / "p", "--aus", table, "--output", tmp_path / "w")
    kept = rows_of(tmp_path / "w")
    is_mirrored = orientation in (2, 4, 5, 7)
    assert [row["origin"] for row in kept] == (["smile.png"] if is_mirrored else ["smirk.png", "smile.png"])
    assert len(list((tmp_path / "w/images").iterdir())) == len(kept)
    # The box is that of the picture as it is shown.
    assert [row[name] for row in kept for name in FACE_BOX] == [0, 0, 0.5, 1] * len(kept)
    with Image.open(tmp_path / "w" / kept[-1]["file_name"]) as picture:
        assert picture.size == (40, 20) and [picture.getpixel((x, 10)) for x in (5, 35)] == [(0,) * 3, (255,) * 3]
    text = capsys.readouterr().out
    assert text.count("mirrored by EXIF, so the sides of its AUs are uncertain") == is_mirrored
    said = "of them: turned upright, as EXIF says; the face's box taken for that of the picture as it is shown"
    assert (f"{len(kept)}    {said}" in text) == (orientation > 1)


def test_a_box_that_is_not_within_its_picture_is_counted(tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "p").mkdir()
    # As a viewer shows it, the first picture is 20 pixels wide.
    Image.new("RGB", (40, 20), "red").save(tmp_path / "p/stored.png", exif=exif)
    Image.new("RGB", (40, 20), "red").save(tmp_path / "p/outside.png")
    Image.new("RGB", (40, 20), "red").save(tmp_path / "p/edge.png")
    rectangle = ("FaceRectX", "FaceRectY", "FaceRectWidth", "FaceRectHeight")
    boxes = {"stored.png": (10, 2, 20, 16), "outside.png": (50, 2, 20, 16), "edge.png": (30, 2, 20, 16)}
    rows = [{"file_name": name, "AU12": 0.6} | dict(zip(rectangle, box, strict=True)) for name, box in boxes.items()]
    table = write_table(tmp_path / "t.csv", rows)
    prepare("folder", "--root", tmp_path / "p", "--aus", table, "--output", tmp_path / "w")
    kept = rows_of(tmp_path / "w")
    assert ["face_x0" in row for row in kept] == [False, False, True]
    assert [kept[2][name] for name in FACE_BOX] == [0.75, 0.1, 1, 0.9]
    left_out = "the face's box left out, because it is not within the picture"
    text = capsys.readouterr().out
    assert f"1    of them: {left_out}" in text and f"1    of them: turned upright, as EXIF says; {left_out}" in text
    # In the data set, a loss that is weighted by faces would weight nothing there.
    prepare("build", tmp_path / "w", "--output", tmp_path / "faces", "--default_caption", "a face")
    report = json.loads((tmp_path / "faces/report.json").read_text())["p"]
    assert sum(note.endswith(WITHOUT_BOX) for note in report["changed"]) == 2


def test_the_data_set_tells_what_was_left_out_and_shows_the_intensities(tmp_path, work_folder, capsys):
    root, table = make_old_affectnet(tmp_path / "AffectNet")
    prepare("affectnet", "--root", root, "--aus", table, "--output", tmp_path / "a")
    lines = [
        {
            "file_name": row["file_name"],
            "cartoon": "no",
            "real": "yes",
            "is_photo": row["origin"].endswith("frown.jpg"),
        }
        for row in rows_of(tmp_path / "a")
    ]
    for part in list_parts(tmp_path / "a"):
        (tmp_path / "a/photos").mkdir(exist_ok=True)
        part_lines = lines if part == "0000000" else []
        (tmp_path / f"a/photos/{part}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in part_lines))
    capsys.readouterr()
    faces = tmp_path / "faces"
    prepare("build", tmp_path / "a", work_folder, "--output", faces, "--default_caption", "a face")
    report = json.loads((faces / "report.json").read_text())
    table = tmp_path / "mine/metadata.jsonl"
    notes = [f"{table}: fineface gives {', '.join(AU_NAMES)}."]
    # AffectNet has boxes of faces, the other pictures have none.
    assert report["mine"] == {"kept": 6, "dropped": {}, "changed": {WITHOUT_BOX: 6}, "notes": notes}
    assert report["affectnet"]["kept"] == 1 and report["affectnet"]["dropped"]["no photograph"] == 1
    assert sum(report["affectnet"]["dropped"].values()) == len(PICTURES) - 1
    assert (faces / "report.txt").read_text() == capsys.readouterr().out
    assert "7  kept" in (faces / "report.txt").read_text().splitlines()[-1]
    with Image.open(faces / "histogram.png") as picture:
        colors = {color for _, color in picture.convert("RGB").getcolors(1 << 20)}
        assert tuple(bytes.fromhex(AFTER_COLOR[1:])) in colors
    # Only measured AUs are corrected.
    rows = [json.loads(line) for line in (faces / "train/metadata.jsonl").read_text().splitlines()]
    assert [row["AU9"] for row in rows if row["source"] == "affectnet"] == [0]
    assert [aus_of(row) for row in rows if row["source"] == "mine"] == [sample_aus(n).tolist() for n in range(6)]


def test_the_histogram_counts_every_face_at_its_intensity():
    none = count_intensities([], 12)
    before = none + count_intensities([np.full(12, 0.1), np.full(12, 5.0), np.zeros(12)], 12)
    assert before[0].nonzero()[0].tolist() == [0, 1, 20] and before.sum() == 36
    blank = np.asarray(draw_histograms(AU_NAMES, none, none, "t"))
    assert (np.asarray(draw_histograms(AU_NAMES, before, none, "t")) != blank).any()


def sided_folder(tmp_path: Path) -> Path:
    """The work folder `sided`, of two pictures with AUs of each side: a smirk, and a brow that is raised."""
    for number, name in enumerate("ab"):
        draw(number, SMILE, tmp_path / f"sided/{name}.png", 32)
    aus = {"AU1L": [0, 4], "AU1R": [0, 2], "AU7": [1, 2], "AU12L": [3, 0], "AU12R": [1, 0]}
    rows = [{"file_name": f"{name}.png"} | {au: aus[au][n] for au in aus} for n, name in enumerate("ab")]
    table = write_table(tmp_path / "sided.csv", rows)
    prepare("folder", "--root", tmp_path / "sided", "--aus", table, "--output", tmp_path / "s", "--measured")
    return tmp_path / "s"


@pytest.mark.parametrize("form", ["imagefolder", "parquet"])
def test_each_side_reaches_the_training(tmp_path, form, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    command = ["build", sided_folder(tmp_path), "--default_caption", "a face", "--format", form]
    prepare(*command, "--output", tmp_path / "kept", "--keep_aus")
    data = load_training_data(train_config(tmp_path, tmp_path / "kept"))
    assert data.au_names == ("AU1L", "AU1R", "AU7", "AU12L", "AU12R")
    assert data.au_intensities.tolist() == [[0, 0, 1, 3, 1], [4, 2, 2, 0, 0]]
    # The correction brings both sides to one range, so the weaker one stays weaker.
    prepare(*command, "--output", tmp_path / "corrected")
    data = load_training_data(train_config(tmp_path, tmp_path / "corrected"))
    np.testing.assert_allclose(data.au_intensities, [[0, 0, 1, 3, 1], [5, 5 / 2**1.8, 2, 0, 0]], rtol=1e-6)


def test_sources_with_other_aus_meet_in_those_that_all_have(tmp_path, work_folder, capsys):
    sided = sided_folder(tmp_path)
    command = ["build", sided, work_folder, "--default_caption", "a face", "--keep_aus", "--output"]
    prepare(*command, tmp_path / "faces")
    rows = [json.loads(line) for line in (tmp_path / "faces/train/metadata.jsonl").read_text().splitlines()]
    assert {name for row in rows for name in row if name.startswith("AU")} == {"AU1", "AU12"}
    assert [(row["AU1"], row["AU12"]) for row in rows[:2]] == [(0, 2), (3, 0)]
    report = json.loads((tmp_path / "faces/report.json").read_text())
    assert report["sided"]["notes"][-2:] == ["Not in the data set: AU7.", "The mean of both sides: AU1, AU12."]
    assert report["mine"]["notes"][-1].startswith("Not in the data set: AU2, AU4, AU5, AU6, AU9, AU15")
    # Those that are named may have the sides that one source does not tell.
    prepare(*command, tmp_path / "sides", "--au_names", "AU12L", "AU12R")
    rows = [json.loads(line) for line in (tmp_path / "sides/train/metadata.jsonl").read_text().splitlines()]
    smiles = [(3, 1), (0, 0), *((sample_aus(n)[6],) * 2 for n in range(6))]
    assert [(row["AU12L"], row["AU12R"]) for row in rows] == smiles
    report = json.loads((tmp_path / "sides/report.json").read_text())
    assert report["mine"]["notes"][-1] == "The same on both sides: AU12L, AU12R."
    capsys.readouterr()
    prepare(*command, tmp_path / "none", "--au_names", "AU7", status=2)
    assert f"`--au_names` has AU7, but {work_folder} has AU1, AU2" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_the_sum_of_all_aus_counts_an_au_with_sides_once(tmp_path):
    sided_folder(tmp_path)
    command = ["folder", "--root", tmp_path / "sided", "--aus", tmp_path / "sided.csv", "--output", tmp_path / "w"]
    prepare(*command, "--min_total_intensity", 4)
    # 1 + (3 + 1) / 2 and (4 + 2) / 2 + 2.
    assert [row["origin"] for row in rows_of(tmp_path / "w")] == ["b.png"]


def test_pictures_with_the_same_bytes_are_counted(tmp_path, capsys):
    root = make_folder(tmp_path / "mine", 4)
    shutil.copyfile(root / "00.png", root / "02.png")
    shutil.copyfile(root / "00.png", root / "03.png")
    command = ["folder", "--root", root, "--aus", root / "metadata.jsonl", "--rows_per_part", 2]
    prepare(*command, "--output", tmp_path / "w")
    said = f"2 pictures have the bytes of another one, such as {root / '03.png'} and {root / '00.png'}."
    assert capsys.readouterr().out.count(said) == 1 and len(rows_of(tmp_path / "w")) == 4


def test_an_interrupted_build_goes_on_where_it_was(tmp_path, work_folder):
    faces = tmp_path / "faces"
    command = ["build", work_folder, "--output", faces, "--format", "parquet"]
    prepare(*command)
    whole = files_of(faces)
    kept = next(iter(sorted((faces / "train").glob("*.parquet"))))
    mtime = kept.stat().st_mtime_ns
    for name in ("report.txt", "histogram.png", ".parts/rows/0-0000001.jsonl", "train/mine-0000001.parquet"):
        (faces / name).unlink()
    # What a killed process leaves would be taken for a shard.
    (faces / "train/.mine-0000001.parquet.part").write_bytes(b"PAR1")
    prepare(*command)
    assert files_of(faces) == whole and kept.stat().st_mtime_ns == mtime


def test_a_step_that_is_missing_is_named(tmp_path, capsys):
    root, table = make_old_affectnet(tmp_path / "AffectNet")
    prepare("affectnet", "--root", root, "--aus", table, "--output", tmp_path / "a")
    prepare("build", tmp_path / "a", "--output", tmp_path / "faces", status=2)
    assert f"Run `prepare photos {tmp_path / 'a'}`, or set `--keep_drawings`" in capsys.readouterr().err
    prepare("build", tmp_path / "a", "--output", tmp_path / "faces", "--keep_drawings", status=2)
    assert f"a caption is not known yet. Run `prepare caption {tmp_path / 'a'}`" in capsys.readouterr().err
    prepare("build", root, "--output", tmp_path / "faces", status=2)
    assert "is no work folder" in capsys.readouterr().err
    assert not (tmp_path / "faces").exists()


@pytest.mark.parametrize("source", ["train", "test2", "a b"])
def test_names_that_would_be_taken_for_splits_are_refused(tmp_path, capsys, source):
    root = make_folder(tmp_path / "mine", 1)
    table = root / "metadata.jsonl"
    prepare("folder", "--root", root, "--aus", table, "--source", source, "--output", tmp_path / "w", status=2)
    assert "has to be letters and digits, and no name of a split" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--aus", "none.csv"], "There is no table 'none.csv'"),
        (["--min_side", "0"], "`--min_side` has to be an integer, at least 1"),
        (["--num_workers", "0"], "`--num_workers` has to be an integer, at least 1"),
        (["--au_tool", "openface"], "there is no AU that openface measures"),
        (["--au_names", "AU12L"], "it needs both AU12L and AU12R"),
        (["--au_names", "AU12", "AU7"], "takes AU7 from"),
        (["--root", "nowhere"], "'nowhere' is no"),
    ],
)
@pytest.mark.parametrize("step", ["folder", "affectnet"])
def test_wrong_options_are_refused_before_anything_is_written(tmp_path, capsys, step, changes, message):
    root, table = make_old_affectnet(tmp_path / "AffectNet")
    prepare(step, "--root", root, "--aus", table, "--output", tmp_path / "w", *changes, status=2)
    errors = capsys.readouterr().err.splitlines()
    assert message in errors[-1].replace("`--root` has to be a folder, but 'nowhere' is none", "'nowhere' is no")
    assert not (tmp_path / "w/rows").exists()


# --------------------------------------------------------------------------------------------------------------------
# BLIP-2
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_blip2_dir(tmp_path_factory) -> str:
    """A BLIP-2 with random weights that knows some words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        BlipImageProcessor,
        OPTConfig,
        PreTrainedTokenizerFast,
    )

    words = [
        "<pad>",
        "</s>",
        "<unk>",
        "<image>",
        "yes",
        "no",
        *"Question : Is this a cartoon ? photo real Answer".split(),
    ]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="</s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**sizes, image_size=32, patch_size=8).to_dict(),
        qformer_config=Blip2QFormerConfig(**sizes, vocab_size=len(words)).to_dict(),
        text_config=OPTConfig(
            **text,
            vocab_size=len(words),
            word_embed_proj_dim=16,
            max_position_embeddings=128,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
        ).to_dict(),
        num_query_tokens=4,
        image_token_index=words.index("<image>"),
    )
    model = Blip2ForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        # Strong enough that answers depend on the picture.
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        # And consist of words.
        model.get_input_embeddings().weight[:4] = 0
    folder = tmp_path_factory.mktemp("tiny_blip2")
    model.save_pretrained(folder)
    images = BlipImageProcessor(size={"height": 32, "width": 32})
    Blip2Processor(images, tokenizer, num_query_tokens=4).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("cartoon", "real", "expected"),
    [
        ("no", "yes", True),
        ("No, it is not.", "Yes", True),
        ("yes", "no", False),
        ("yes, it is", "I do not know", False),
        ("", "no", False),
        ("yes", "yes", None),
        ("no", "no", None),
        ("nothing", "yesterday", None),
    ],
)
def test_two_answers_say_whether_it_is_a_photograph(cartoon, real, expected):
    assert is_photo(cartoon, real) is expected


def test_blip2_says_the_same_of_a_picture_alone_and_among_others(tiny_blip2_dir):
    pictures = [render(sample_portrait(seed), sample_aus(seed)) for seed in range(3)]
    blip2 = Blip2(tiny_blip2_dir)
    captions = blip2.describe(pictures)
    assert captions == [blip2.describe([picture])[0] for picture in pictures] and all(captions)
    answers = blip2.ask(pictures, "Is this a cartoon?")
    assert answers == [blip2.ask([picture], "Is this a cartoon?")[0] for picture in pictures]
    # The question is not a part of the answer.
    assert all(answers) and all(len(answer.split()) <= 5 for answer in answers)
    assert not any(answer.startswith("Question : Is this") for answer in answers)


def test_blip2_steps_go_on_and_their_answers_decide(tmp_path, tiny_blip2_dir, monkeypatch):
    root = make_folder(tmp_path / "mine", 7)
    rows = [json.loads(line) for line in (root / "metadata.jsonl").read_text().splitlines()]
    # Those whose caption is known keep it.
    lines = [json.dumps(row | {"text": row["text"] if n == 2 else ""}) for n, row in enumerate(rows)]
    (root / "metadata.jsonl").write_text("\n".join(lines))
    work, faces = tmp_path / "w", tmp_path / "faces"
    command = ["folder", "--root", root, "--aus", root / "metadata.jsonl", "--drawings", "--output", work]
    prepare(*command, "--rows_per_part", 3)
    for step in ("photos", "caption"):
        prepare(step, work, "--blip2", tiny_blip2_dir, "--batch_size", 2)
    before = files_of(work)
    captions = [line for part in list_parts(work) for line in read_lines(work / f"captions/{part}.jsonl")]
    photos = [line for part in list_parts(work) for line in read_lines(work / f"photos/{part}.jsonl")]
    names = [row["file_name"] for row in rows_of(work)]
    assert [line["file_name"] for line in captions] == [line["file_name"] for line in photos] == names
    assert captions[2]["text"] == "person 2" and all(line["text"] for line in captions)
    for line in photos:
        assert line["is_photo"] is is_photo(line["cartoon"], line["real"])
    (work / "captions/0000001.jsonl").unlink()
    kept_time = (work / "captions/0000000.jsonl").stat().st_mtime_ns
    prepare("caption", work, "--blip2", tiny_blip2_dir, "--batch_size", 3)
    assert files_of(work) == before and (work / "captions/0000000.jsonl").stat().st_mtime_ns == kept_time
    # As `accelerate launch` does it.
    shutil.rmtree(work / "captions")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, parts in ((1, {"0000001", "table"}), (0, set(list_parts(work)))):
        monkeypatch.setenv("RANK", str(rank))
        prepare("caption", work, "--blip2", tiny_blip2_dir)
        assert {path.stem for path in (work / "captions").glob("*.jsonl")} == parts
    assert files_of(work) == before
    # The tiny model knows nothing: some of what it says is put straight.
    for number in (1, 2, 4):
        photos[number] |= {"cartoon": "no", "real": "yes", "is_photo": True}
    for part, start in (("0000000", 0), ("0000001", 3), ("0000002", 6)):
        text = "".join(json.dumps(line) + "\n" for line in photos[start : start + 3])
        (work / f"photos/{part}.jsonl").write_text(text)
    prepare("build", work, "--output", faces)
    built = [json.loads(line) for line in (faces / "train/metadata.jsonl").read_text().splitlines()]
    expected = [(f"{n:02d}.png", captions[n]["text"]) for n in range(7) if photos[n]["is_photo"]]
    assert [(row["origin"], row["text"]) for row in built] == expected and len(expected) >= 3


def test_another_model_does_not_mix_with_captions_that_are_there(tmp_path, work_folder, tiny_blip2_dir):
    annotate(work_folder, "captions", tiny_blip2_dir, 2)
    with pytest.raises(ValueError, match="other settings: `model` was"):
        annotate(work_folder, "captions", "another/blip2", 2)


def test_the_paper_s_data_come_from_one_command(tmp_path, tiny_blip2_dir, capsys, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    disfa, frames = make_disfa(tmp_path / "DISFA", {"SN001": (5, 5), "SN002": (5, 5)})
    root, _ = make_old_affectnet(tmp_path / "AffectNet")
    published = []
    for number, (name, (_, side, aus)) in enumerate(PICTURES.items()):
        facts = {"HasFace": 1.0, "IsPhoto": True, "IsReal": name != "frown", "TextDescription": f"a {name}"}
        sizes = {"ImageResolutionX": side, "ImageResolutionY": side}
        columns = {f"AU{n}_rec": value / 5 for n, value in zip(NUMBERS, aus.tolist(), strict=True)}
        published.append(
            {"ImageName": f"Manually_Annotated_Images/{100 + number}/{name}.jpg"} | facts | sizes | columns
        )
    table = write_table(tmp_path / "affectnet_metadata.csv", published)
    faces = tmp_path / "faces"
    command = ["paper", "--disfa", disfa, "--images", frames, "--affectnet", root, "--aus", table]
    prepare(*command, "--blip2", tiny_blip2_dir, "--output", faces)
    table = capsys.readouterr().out
    assert "all " in table.splitlines()[-1]
    data = load_training_data(train_config(tmp_path, faces))
    by_caption = {data.captions[row].as_py(): data.au_intensities[row] for row in range(len(data))}
    # IsReal says that the frown is no photograph.
    assert "a smile" in by_caption and "a frown" not in by_caption
    assert len(data) == 1 + len(rows_of(faces / ".work/disfa"))
