"""What evaluation promises: figures known by hand, runs that can be stopped, and clear words for bad input."""

import functools
import json
import multiprocessing
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import StableDiffusionPipeline
from endless_job import touch_for_ever
from PIL import ExifTags, Image
from safetensors.torch import load_file
from tiny import make_tokenizer

from action_units import AU_NAMES, read_aus
from au_encoder import find_adapter_files, read_au_adapter
from drawing.jobs import Job
from drawing.model import Weights
from evaluation import figures, metrics, report, run, testset, training_picture
from evaluation.image_encoders import make_image_encoder
from evaluation.meters import TOOL_SCRIPTS, ToolError, make_meter
from evaluation.systems import System, au_words, aus_in_words
from evaluation.testset import (
    COMBINATIONS,
    PROMPTS,
    TOY_PROMPTS,
    Item,
    Prompt,
    make_items,
    read_combinations,
    read_prompts,
)
from paper import baselines, feedback_trials, trials
from paper import tables as paper_tables
from paper.experiment import BUDGETS, Budget, Experiment
from paper.trial_series import Trial
from paper.workers import run_jobs
from program import only_run_in, write_atomically
from toy_faces import networks
from toy_faces.pictures import captions_of
from toy_faces.renderer import attributes_in
from training.config import TrainConfig


CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent


# ---- metrics -------------------------------------------------------------------------------------------------------


def one_au(name: str, value: float) -> np.ndarray:
    row = np.zeros((1, 12))
    row[0, AU_NAMES.index(name)] = value
    return row


def test_au_mse_is_the_mean_of_squared_differences_over_the_aus():
    commanded, measured = one_au("AU12", 5), one_au("AU12", 2) + one_au("AU15", 3)
    assert metrics.au_mse(commanded, measured) == pytest.approx([(9 + 9) / 12])
    easy = ~metrics.is_hard(AU_NAMES)
    assert metrics.au_mse(commanded[:, easy], measured[:, easy]) == pytest.approx([9 / 9])


def test_clip_similarity_is_a_cosine():
    similarity = metrics.clip_similarity(np.array([[1.0, 0], [1, 0]]), np.array([[2.0, 0], [3, 3]]))
    assert similarity == pytest.approx([1, np.sqrt(0.5)])


def test_r_and_slope():
    x = np.array([1.0, 2, 3, 4])
    assert metrics.pearson(x, 0.5 * x + 1) == pytest.approx(1)
    assert metrics.slope(x, 0.5 * x + 1) == pytest.approx(0.5)
    assert np.isnan(metrics.pearson(x, np.ones(4)))


def test_unrequested_movement_leaves_out_what_was_commanded():
    neutral = np.full((1, 12), 0.5)
    measured = neutral + one_au("AU12", 4) + one_au("AU6", 1.1)
    assert metrics.unrequested_movement(one_au("AU12", 5), measured, neutral) == pytest.approx([1.1 / 11])


def test_outside_change_looks_only_outside():
    neutral = np.zeros((10, 10, 3), np.uint8)
    picture = neutral.copy()
    picture[2:8, 2:8] = 255
    assert metrics.outside_change(picture, neutral, (0.2, 0.2, 0.8, 0.8)) == 0
    picture[0] = 255
    assert metrics.outside_change(picture, neutral, (0.2, 0.2, 0.8, 0.8)) == pytest.approx(np.sqrt(10 / 64))


def test_bootstrap_draws_prompts_first_and_leaves_out_nan():
    values = np.repeat([0.0, 1, 2, 3], 25)
    alike = metrics.bootstrap(np.mean, values, prompts=np.repeat(np.arange(4), 25), draws=200)
    mixed = metrics.bootstrap(np.mean, values, prompts=np.tile(np.arange(4), 25), draws=200)
    assert alike.value == mixed.value == 1.5
    assert alike.high - alike.low > 2 * (mixed.high - mixed.low)
    holed = metrics.bootstrap(np.mean, np.array([1, np.nan, 3]), prompts=np.array([0, 0, 1]), draws=50)
    assert (holed.value, holed.pictures, holed.prompts) == (2, 2, 2)
    assert metrics.bootstrap(np.mean, np.array([np.nan]), prompts=np.array([0])).pictures == 0


# ---- the test set --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [PROMPTS, TOY_PROMPTS])
def test_the_test_set_is_the_papers(path):
    prompts, combinations = read_prompts(path), read_combinations(COMBINATIONS)
    items = make_items(prompts, combinations, ("single", "combination"))
    assert len(prompts) == 15 and len(combinations) == 50 == len(set(combinations))
    assert len([item for item in items if item.part != "neutral"]) == 1650
    assert len({item.name for item in items}) == len(items)
    assert {prompt.domain for prompt in prompts} == {"in", "out"}
    assert all(sum(map(bool, read_aus(aus)[0])) >= 2 for aus in combinations)


def test_the_toy_worlds_prompts_name_what_its_reader_can_check():
    assert all(attributes_in(prompt.text) for prompt in read_prompts(TOY_PROMPTS))


def test_a_name_tells_prompt_aus_and_seed():
    item = Item("combination", Prompt(3, "a boy", "", 7), "AU1=2 AU4=2.5", 12)
    assert item.name == "p03_combination12_AU1=2+AU4=2.5_seed7.png"


def test_an_empty_line_is_no_prompt(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a boy\n\na girl\n\n")
    prompts = read_prompts(path)
    assert [(prompt.index, prompt.text) for prompt in prompts] == [(0, "a boy"), (1, "a girl")]
    path.write_text("a girl\n")
    assert read_prompts(path)[0].seed == prompts[1].seed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prompt,seed\na boy,1\n,2\n", "line 3: `prompt` is empty"),
        ("text\na boy\n", "no column 'prompt'"),
        ("prompt,seed\na boy,x\n", "line 2: `seed`"),
        ("prompt,domain\na boy,inside\n", "line 2: `domain`"),
        ("prompt,seed\na boy\n", "line 2: 1 cells, but the header has 2"),
        ("prompt\n", "holds no prompt"),
    ],
)
def test_a_broken_prompt_file_is_named_with_its_line(tmp_path, content, message):
    path = tmp_path / "prompts.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(path)


# ---- meters --------------------------------------------------------------------------------------------------------


OPENFACE = ["AU01_r", "AU02_r", *(f"AU{n:02}_r" for n in (4, 5, 6, 9, 12, 15, 17, 20, 25, 26))]


@pytest.fixture
def pictures(tmp_path):
    paths = [tmp_path / f"p00_single_AU12={value}_seed1.png" for value in (1, 2, 3)]
    for path in paths:
        Image.new("RGB", (128, 128), "gray").save(path)
    return paths


def write_program(path, code: str) -> str:
    path.write_text(f"#!{sys.executable}\n{textwrap.dedent(code)}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def write_table(path, names, values, columns=OPENFACE, **extra) -> str:
    table = pd.DataFrame([[value] * 12 for value in values], columns=columns)
    table.insert(0, "file", names)
    table.assign(**extra).to_csv(path, index=False)
    return str(path)


def test_the_toy_meter_reads_pictures(pictures):
    readings = make_meter("toy", CPU).measure(pictures)
    assert len(readings) == 3 and readings[0].aus.shape == (12,) and readings[0].num_faces == 1


def test_a_table_in_any_order_with_a_picture_without_a_face_and_one_with_two(tmp_path, pictures):
    names = [path.name for path in pictures]
    rows = [f"elsewhere/{names[2]}", names[1], names[0], names[0].removesuffix(".png")]
    path = write_table(tmp_path / "t.csv", rows, [3, 2, 4, 1], confidence=[0.9, 0, 0.2, 0.8])
    first, second, third = make_meter(f"openface:{path}", CPU).measure(pictures)
    assert first.aus[0] == 1 and first.num_faces == 2
    assert second.num_faces == 0 and np.isnan(second.aus).all()
    assert third.aus[0] == 3


def test_a_meter_reads_the_aus_of_the_adapter(tmp_path, pictures):
    path = write_table(tmp_path / "t.csv", [path.name for path in pictures], [1, 2, 3], AU45_r=4.0)
    (first, *_) = make_meter(f"openface:{path}", CPU, ("AU12L", "AU12R", "AU24", "AU43")).measure(pictures)
    assert first.num_faces == 1 and np.array_equal(first.aus, [1, 1, np.nan, 4], equal_nan=True)
    twelve = make_meter("toy", CPU).measure(pictures)[0].aus
    aus = make_meter("toy", CPU, ("AU12L", "AU12R", "AU30")).measure(pictures)[0].aus
    assert np.isnan(aus[2]) and aus[:2].mean() == pytest.approx(twelve[6], abs=1e-5)


def test_a_table_that_lacks_pictures_is_refused(tmp_path, pictures):
    path = write_table(tmp_path / "t.csv", [pictures[0].name], [1])
    with pytest.raises(ValueError, match="no row for 2 of 3 pictures, the first of them 'p00_single_AU12=2"):
        make_meter(f"table:{path}", CPU).measure(pictures)


def test_columns_of_another_tool_are_refused_at_once(tmp_path, pictures):
    path = write_table(tmp_path / "t.csv", [path.name for path in pictures], [1, 2, 3])
    with pytest.raises(ValueError, match="au_1_intensity"):
        make_meter(f"libreface:{path}", CPU)


def test_the_tool_of_a_table_can_be_named(pictures, tmp_path, caplog):
    shapes = ("mouthSmileLeft", "mouthSmileRight")
    lines = [",".join(["input", "FaceScore", *(f"AU{int(name[2:]):02}" for name in AU_NAMES), *shapes])]
    lines += [",".join([picture.name, "-nan(ind)", *["0.8"] * 12, "0.2", "0.4"]) for picture in pictures]
    path = tmp_path / "fex.csv"
    path.write_text("\n".join(lines))
    assert make_meter(f"table:{path}", CPU).measure(pictures)[0].aus[6] == pytest.approx(4)
    assert caplog.text.count("has AUs of pyfeat and blendshapes") == 1
    assert make_meter(f"mediapipe:{path}", CPU).measure(pictures)[0].aus[6] == pytest.approx(1.5)
    with pytest.raises(FileNotFoundError, match="'python3' is no table"):
        make_meter("mediapipe:python3", CPU)


def test_openface_runs_and_a_table_it_does_not_write_is_no_face(tmp_path, pictures):
    # It answers as FaceLandmarkImg does: a table for each picture with a face, in its own columns.
    program = write_program(
        tmp_path / "FaceLandmarkImg",
        f"""
        import pathlib, sys
        options = dict(zip(sys.argv[1:-1:2], sys.argv[2::2]))
        out = pathlib.Path(options["-out_dir"])
        out.mkdir()
        for path in sorted(pathlib.Path(options["-fdir"]).iterdir())[:2]:
            rows = [["face", "confidence", *{OPENFACE}], [0, 0.9, *[2.5] * 12]]
            (out / path.with_suffix(".csv").name).write_text("\\n".join(", ".join(map(str, row)) for row in rows))
        """,
    )
    readings = make_meter(f"openface:{program}", CPU).measure(pictures)
    assert [reading.num_faces for reading in readings] == [1, 1, 0]
    assert readings[1].aus == pytest.approx([2.5] * 12)


STAND_INS = {
    "libreface": """
        def get_facial_attributes(path, temp_dir="./tmp"):
            if "AU12=2" in path:
                return {}
            numbers = (1, 2, 4, 5, 6, 9, 12, 15, 17, 20, 25, 26)
            return {
                "detected_aus": {f"au_{number}": int(number != 24) for number in (1, 2, 4, 6, 7, 10, 23, 24)},
                "au_intensities": {f"au_{number}_intensity": 0.5 * number / 26 for number in numbers},
            }
        """,
    "feat": """
        import pandas
        class Detectorv2:
            def detect(self, paths, batch_size):
                rows = [] if "AU12=2" in paths[0] else [0.3, 0.9]
                columns = [f"AU{number:02}" for number in (1, 2, 4, 5, 6, 7, 9, 12, 15, 17, 20, 25, 26, 43)]
                table = pandas.DataFrame([[score / 2] * 14 for score in rows], columns=columns)
                return table.assign(FaceScore=rows)
        """,
}


@pytest.mark.parametrize(
    ("tool", "module", "first", "faces", "others"),
    [
        ("libreface", "libreface", 0.5 / 26, 1, {"AU7": 3, "AU12": 0.5 * 12 / 26, "AU24": 0}),
        ("pyfeat", "feat", 2.25, 2, {"AU7": 2.25, "AU12L": 2.25, "AU12R": 2.25, "AU43": 2.25}),
    ],
)
def test_a_tool_runs_in_its_own_python(tmp_path, pictures, tool, module, first, faces, others):
    """The tools cannot be installed beside ours; modules that answer in their form stand in for them."""
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / f"{module}.py").write_text(textwrap.dedent(STAND_INS[module]))
    command = f"env PYTHONPATH={shlex.quote(str(modules))} {shlex.quote(sys.executable)}"
    readings = make_meter(f"{tool}:{command}", CPU).measure(pictures)
    assert [reading.num_faces for reading in readings] == [faces, 0, faces]
    assert readings[0].aus[0] == pytest.approx(first, abs=1e-4)
    # Both measure more AUs than the paper's twelve.
    readings = make_meter(f"{tool}:{command}", CPU, tuple(others)).measure(pictures)
    assert readings[0].aus == pytest.approx(list(others.values()), abs=1e-4)


MEDIAPIPE = """
    from types import SimpleNamespace as Some
    class FaceLandmarker:
        @staticmethod
        def create_from_options(options):
            assert options.base_options.model_asset_path == "face_landmarker.task" and options.output_face_blendshapes
            return FaceLandmarker()
        __enter__ = lambda self: self
        __exit__ = lambda self, *error: None
        def detect(self, image):
            # Bright red is a face, and bright blue is two.
            assert image.image_format == "sRGB"
            ys, xs = (image.data.max(-1) == 255).nonzero()
            faces = 0 if not len(ys) else 1 if image.data[ys[0], xs[0], 0] == 255 else 2
            shapes = [Some(category_name=name, score=0.5) for name in ("mouthSmileLeft", "mouthSmileRight")]
            height, width = image.data.shape[:2]
            points = [Some(x=x / width, y=y / height) for y, x in zip(ys, xs)] + [Some(x=-0.1, y=1.2)]
            return Some(face_blendshapes=[shapes] * faces, face_landmarks=[points] * faces)
    vision = Some(FaceLandmarkerOptions=Some, FaceLandmarker=FaceLandmarker)
    tasks, Image, ImageFormat = Some(vision=vision, BaseOptions=Some), Some, Some(SRGB="sRGB")
"""


def test_mediapipe_s_script_measures_upright_pictures_and_writes_a_table_with_faces_and_boxes(tmp_path, pictures):
    one, _, two = pictures
    turned, exif = tmp_path / "turned_AU12=1.png", Image.Exif()
    upright = Image.new("RGB", (64, 128), "gray")
    upright.paste("red", (16, 32, 49, 97))
    exif[ExifTags.Base.Orientation] = 6
    upright.rotate(90, expand=True).save(turned, exif=exif)
    for path, colour in ((one, "red"), (two, "blue")):
        picture = Image.open(path)
        picture.paste(colour, (0, 32, 97, 128))
        picture.save(path)
    (tmp_path / "mediapipe.py").write_text(textwrap.dedent(MEDIAPIPE))
    (tmp_path / "pictures.txt").write_text("\n".join(map(str, [*pictures, turned])))
    words = [sys.executable, TOOL_SCRIPTS / "mediapipe_table.py", "pictures.txt", "t.jsonl", "face_landmarker.task"]
    subprocess.run(words, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, check=True)
    readings = make_meter(f"mediapipe:{tmp_path / 't.jsonl'}", CPU).measure([*pictures, turned])
    assert [reading.num_faces for reading in readings] == [1, 0, 2, 1]
    assert readings[0].aus[AU_NAMES.index("AU12")] == pytest.approx(2.5)
    rows = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    boxes = [[rows[number][name] for name in ("face_x0", "face_y0", "face_x1", "face_y1")] for number in (0, 3)]
    assert boxes == [[0, 0.25, 0.75, 1], [0, 0.25, 0.75, 1]]


def test_openface_s_tables_become_one(tmp_path, pictures):
    (tmp_path / "written").mkdir()
    (tmp_path / "pictures.txt").write_text("\n".join(map(str, pictures)))
    for picture, faces in ((pictures[0], 1), (pictures[2], 2)):
        rows = [["face", "confidence", *OPENFACE]]
        rows += [[face, 0.9 - face / 2, *[2.5 + face] * 12] for face in range(faces)]
        # OpenFace cuts a name at its first dot.
        path = tmp_path / "written" / f"{picture.name.split('.')[0]}.csv"
        path.write_text("\n".join(", ".join(map(str, row)) for row in rows))
    words = [sys.executable, TOOL_SCRIPTS / "openface_table.py", "pictures.txt", "written", "t.csv"]
    subprocess.run(words, cwd=tmp_path, check=True)
    readings = make_meter(f"openface:{tmp_path / 't.csv'}", CPU).measure(pictures)
    assert [reading.num_faces for reading in readings] == [1, 0, 2]
    assert readings[0].aus == pytest.approx([2.5] * 12) and readings[2].aus == pytest.approx([2.5] * 12)
    (tmp_path / "pictures.txt").write_text("a/1.png\nb/1.jpg")
    failed = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert failed.returncode == 1 and "one table for all pictures called 1" in failed.stderr


def test_a_tool_that_fails_is_quoted(tmp_path, pictures):
    program = write_program(tmp_path / "FaceLandmarkImg", "raise SystemExit('no model found')")
    with pytest.raises(ToolError, match="exit status 1, saying: no model found"):
        make_meter(f"openface:{program}", CPU).measure(pictures)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("openface", ValueError, "Write toy"),
        ("magic:x.csv", ValueError, "Write toy"),
        ("openface:missing.csv", FileNotFoundError, "no table"),
        ("pyfeat:/no/such/python", FileNotFoundError, "no program"),
        ("toy:/no/such/folder", FileNotFoundError, "no meter"),
    ],
)
def test_a_meter_that_is_none(spec, error, message):
    with pytest.raises(error, match=message):
        make_meter(spec, CPU)


# ---- image encoders ------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_clip(tmp_path) -> str:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config={**sizes, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 16},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=12,
    )
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    return str(tmp_path / "clip")


def test_any_clip_embeds_pictures_and_compares_them_with_prompts(tiny_clip):
    encoder = make_image_encoder(tiny_clip, CPU)
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    images = [Image.fromarray(noise), Image.new("RGB", (64, 64), "red")]
    assert encoder.pixel_values(images).shape == (2, 3, 32, 32)
    assert encoder.embed(images).shape == (2, 12)
    agreement = encoder.agreement(images, ["a boy", "a girl"])
    assert agreement.shape == (2,) and (abs(agreement) <= 1).all()
    assert encoder.agreement(images, ["a girl", "a girl"])[0] != agreement[0]


def test_pictures_are_normalised_as_the_encoder_was_trained(tiny_clip, tmp_path):
    white = [Image.new("RGB", (32, 32), "white")]
    before = make_image_encoder(tiny_clip, CPU).pixel_values(white)
    (tmp_path / "clip" / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
    after = make_image_encoder(tiny_clip, CPU).pixel_values(white)
    assert before[0, 0, 0, 0] == pytest.approx((1 - 0.48145466) / 0.26862954)
    assert after.unique().tolist() == [1]


def test_an_encoder_that_is_none(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="'bert'"):
        make_image_encoder(str(tmp_path), CPU)
    with pytest.raises(FileNotFoundError, match="neither a folder nor the id"):
        make_image_encoder("no folder", CPU)


# ---- systems -------------------------------------------------------------------------------------------------------


def test_aus_in_words_have_three_degrees():
    words = tuple("abcdefghijkl")
    assert aus_in_words((0.5, 1, 3, 5, *[0] * 8), words) == ", slightly b, c, very d"
    assert aus_in_words([0] * 12, words) == ""
    assert len(au_words(True)) == len(au_words(False)) == 12


# ---- whole runs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def arguments(tmp_path, tiny_sd_dir, tiny_adapter_dir) -> list[str]:
    (tmp_path / "prompts.txt").write_text("a boy\na girl\n")
    (tmp_path / "combinations.csv").write_text("aus,source\n6C+12D,\n1+4,\n")
    return [
        f"--output={tmp_path / 'out'}",
        *(f"--model={tiny_sd_dir}", f"--adapter={tiny_adapter_dir}", "--device=cpu", "--batch-size=16"),
        *(f"--prompts={tmp_path / 'prompts.txt'}", f"--combinations={tmp_path / 'combinations.csv'}"),
        *(
            "--num-inference-steps=1",
            "--guidance-scale=2",
            "--parts=combination",
            "--meter=toy",
            "--bootstrap-draws=20",
        ),
        *("--image-encoder=toy", "--face-box", "0.2", "0.2", "0.8", "0.8"),
    ]


def read_files(folder) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.iterdir())}


def test_a_run_makes_measures_and_reports(arguments, tmp_path):
    assert run.main([*arguments, "--only=generate"]) == 0
    pictures = read_files(tmp_path / "out" / "pictures")
    assert len(pictures) == 2 * (1 + 2)
    table = write_table(tmp_path / "openface.csv", list(pictures), [2.0] * 6, confidence=[0, *[0.9] * 5])
    assert run.main([*arguments, "--only=measure", f"--meter=openface:{table}"]) == 0

    results = pd.read_csv(tmp_path / "out" / "results.csv")
    assert len(results) == 6 * 2 and set(results["meter"]) == {"toy", "openface"}
    as_parquet = pd.read_parquet(tmp_path / "out" / "results.parquet")
    pd.testing.assert_frame_equal(as_parquet.drop(columns="domain"), results.drop(columns="domain"), check_dtype=False)
    combinations = results[(results["part"] == "combination") & (results["meter"] == "openface")]
    assert combinations["AU12"].tolist() == [4, 0, 4, 0]
    neutral = results[(results["part"] == "neutral") & (results["meter"] == "toy")]
    assert neutral["clip_i"].tolist() == pytest.approx([1, 1], abs=1e-5)
    assert (neutral["outside"] == 0).all() and results["agreement"].notna().any()

    summary = pd.read_csv(tmp_path / "out" / "summary.csv")
    missing = summary[(summary["metric"] == "no_face") & (summary["meter"] == "openface")]
    assert missing["value"].sum() == 1 and missing["pictures"].sum() == 6
    # The picture without a face is in no figure: three of four are left, each measured as 2 throughout.
    figure = report.find_figure(summary, "au_mse", "combination", "openface")
    kept = combinations[combinations["num_faces"] > 0]
    assert figure.pictures == len(kept) == 3
    assert figure.value == pytest.approx(np.square(kept[list(AU_NAMES)].to_numpy() - 2).mean())
    text = (tmp_path / "out" / "report.md").read_text()
    assert "No face was found in 1 of 6 pictures" in text and "Measured by toy" in text
    assert (tmp_path / "out" / "figures" / "figure5_combinations.png").exists()


def test_a_run_that_was_stopped_loses_nothing_and_makes_nothing_twice(arguments, tmp_path):
    run.main([*arguments, "--only=generate"])
    folder = tmp_path / "out" / "pictures"
    whole = read_files(folder)
    lost = list(whole)[1::2]
    for name in lost:
        (folder / name).unlink()
    (folder / f".{lost[0]}.part").write_bytes(b"half a picture")
    assert run.main([*arguments, "--batch-size=1"]) == 0
    again = read_files(folder)
    assert list(again) == list(whole)
    for name in whole:
        assert np.array_equal(np.asarray(Image.open(folder / name)).shape, (32, 32, 3))
        assert (again[name][1] == whole[name][1]) == (name not in lost)
    measured = tmp_path / "out" / "measurements" / "toy"
    before = read_files(measured)
    (measured / "p01_combination.csv").unlink()
    assert run.main(arguments) == 0
    after = read_files(measured)
    assert {name: data for name, (data, _) in after.items()} == {name: data for name, (data, _) in before.items()}
    assert after["p00_combination.csv"] == before["p00_combination.csv"]


def test_a_picture_does_not_depend_on_its_neighbours(arguments, tmp_path):
    run.main([*arguments, "--only=generate"])
    run.main([*arguments, "--only=generate", f"--output={tmp_path / 'alone'}", "--batch-size=1"])
    for path in (tmp_path / "out" / "pictures").iterdir():
        pair = [np.asarray(Image.open(p), np.int16) for p in (path, tmp_path / "alone" / "pictures" / path.name)]
        assert abs(pair[0] - pair[1]).max() <= 1


def test_a_run_grows_by_prompts_and_parts_but_not_with_other_settings(arguments, tmp_path, capsys):
    assert run.main([*arguments, "--limit=1", "--only=generate"]) == 0
    assert run.main([*arguments, "--only=generate"]) == 0
    assert run.main([*arguments, "--guidance-scale=3", "--au-scale=0.5"]) == 2
    message = capsys.readouterr().err
    assert "`guidance_scale` was 2.0 and is now 3.0; `au_scale` was 1.0 and is now 0.5" in message
    (tmp_path / "prompts.txt").write_text("a girl\na boy\n")
    assert run.main(arguments) == 2
    assert "`prompts` was" in capsys.readouterr().err


def test_other_measuring_settings_are_refused_too(arguments, tmp_path, capsys):
    assert run.main([*arguments, "--limit=1"]) == 0
    assert run.main([*arguments, "--limit=1", "--face-box", "0", "0", "1", "0.5"]) == 2
    assert "`face_box` was" in capsys.readouterr().err


def test_measuring_needs_the_pictures(arguments, capsys):
    assert run.main([*arguments, "--only=measure"]) == 2
    assert "6 of 6 pictures are missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--batch-size=0"], "`--batch-size`"),
        (["--prompts=missing.csv"], "`--prompts`"),
        (["--meter=toy"], "names toy twice"),
        (["--model=missing"], "`--model`"),
        (["--system=lora_t"], "no pytorch_lora_weights.safetensors of lora_t"),
        (["--system=sd"], "leave out `--adapter`"),
        (["--face-box", "1", "0", "0", "1"], "`--face-box`"),
        (["--ip-adapter=missing.safetensors"], "`--ip-adapter`"),
        (["--parts", "everything"], "invalid choice"),
        (["--num-inference-steps=0"], "`--num-inference-steps`"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(arguments, tmp_path, tiny_adapter_dir, capsys, extra, message):
    if extra == ["--system=lora_t"]:
        extra = [*extra, f"--adapter={tmp_path}"]
    assert run.main([*arguments, *extra]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("system", ["fineface", "sd"])
def test_stable_diffusion_xl_is_evaluated_too(arguments, tmp_path, tiny_xl_dir, tiny_xl_adapter_dir, system):
    arguments = [argument for argument in arguments if not argument.startswith(("--model", "--adapter"))]
    adapter = [f"--adapter={tiny_xl_adapter_dir}"] if system == "fineface" else []
    xl = [f"--model={tiny_xl_dir}", *adapter, f"--system={system}", "--limit=1"]
    assert run.main([*arguments, *xl]) == 0
    pictures = read_files(tmp_path / "out" / "pictures")
    assert len({data for data, _ in pictures.values()}) == len(pictures) == 3
    results = pd.read_csv(tmp_path / "out" / "results.csv")
    assert len(results) == 3 and results["clip_i"].notna().all()


def test_the_text_system_hears_of_aus_in_its_prompt_alone(arguments, tmp_path, tiny_sd_dir):
    without_adapter = [argument for argument in arguments if not argument.startswith("--adapter")]
    assert run.main([*without_adapter, "--system=sd", "--only=generate"]) == 0
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["system"] == "sd" and settings["au_guidance_scale"] is None
    pictures = read_files(tmp_path / "out" / "pictures")
    assert len({data for name, (data, _) in pictures.items() if name.startswith("p00")}) > 1


# ---- figures -------------------------------------------------------------------------------------------------------


def results_of_a_perfect_model(au_names=AU_NAMES) -> pd.DataFrame:
    prompts = [Prompt(0, "a boy", "in", 1), Prompt(1, "a girl", "out", 2)]
    items = make_items(prompts, ["AU6=3 AU12=4"], ("single",), au_names)
    commands = np.array(read_aus([item.aus for item in items], au_names=au_names))
    table = pd.DataFrame({"name": [item.name for item in items], "part": [item.part for item in items]})
    table["prompt_index"] = [item.prompt.index for item in items]
    table["domain"] = [item.prompt.domain for item in items]
    table[list(au_names)] = commands
    table[[f"measured_{name}" for name in au_names]] = commands + 0.25
    return table.assign(meter="perfect", num_faces=1)


def test_the_heat_map_of_a_perfect_model_is_a_diagonal():
    measured = report.with_neutral(results_of_a_perfect_model())
    assert np.allclose(figures.movement_matrix(measured), np.eye(12))
    assert figures.draw_heat_map(measured, "perfect").width > 500
    assert figures.draw_dose_response(measured, "perfect").width > 500


SIDED = ("AU4", "AU12L", "AU12R", "AU15", "AU43L", "AU43R")


def test_figures_are_of_the_aus_of_the_adapter_that_the_meter_reads():
    results = results_of_a_perfect_model(SIDED)
    assert (results["part"] == "single").sum() == 2 * 5 * len(SIDED)
    results[["measured_AU43L", "measured_AU43R"]] = np.nan
    summary = report.summarize(results, draws=20)
    assert set(summary["au"]) == {"", *SIDED[:4]}
    figure = report.find_figure(summary, "au_mse", "single", "perfect")
    # The pictures that command AU43 are in no figure.
    assert figure.value == pytest.approx(0.25**2) and figure.pictures == 2 * 5 * 4
    assert report.find_figure(summary, "au_mse_easy", "single", "perfect").pictures == 2 * 5 * 3
    settings = dict.fromkeys(
        ("system", "model", "adapter", "num_inference_steps", "guidance_scale", "au_guidance_scale", "au_scale")
    )
    # Only the other side of the same AU counts, as far as it moves at full command.
    leaking = results.copy()
    leaking.loc[leaking["AU12L"] == 5, "measured_AU12R"] += [0.2, 0.6]
    leaks = report.summarize(leaking, draws=20).query("metric == 'other_side'").set_index("au")["value"]
    assert leaks.to_dict() == pytest.approx({"AU12L": 0.4, "AU12R": 0.0})
    # AU12 is no side of AU1.
    assert "other_side" not in set(report.summarize(results_of_a_perfect_model(AU_NAMES), draws=20)["metric"])
    unmeasured = {"perfect": report.unmeasured_aus(results)}
    text = report.format_report(summary, settings, "", [], unmeasured)
    assert "It does not read AU43L, AU43R. Pictures that command these are in none" in text
    assert "| AU12L |" in text and "| AU43L |" not in text
    measured = report.with_neutral(results)
    assert list(figures.movement_matrix(measured)) == list(SIDED[:4])
    assert np.allclose(figures.movement_matrix(measured), np.eye(4))
    sizes = [draw(measured, "perfect").size for draw in (figures.draw_heat_map, figures.draw_dose_response)]
    assert sizes[0][0] < 300 and sizes[1][1] < 320


def test_the_summary_of_a_perfect_model():
    summary = report.summarize(results_of_a_perfect_model(), draws=20)

    def value(metric: str, au: str = "") -> float:
        return report.find_figure(summary, metric, "single", "perfect", au).value

    assert value("au_mse") == value("au_mse_in") == pytest.approx(0.25**2)
    assert value("r") == value("slope") == value("slope_easy") == value("slope", "AU12") == pytest.approx(1)
    assert value("unrequested") == pytest.approx(0)
    # (1 + 4 + 9 + 16 + 25) / 5 in one of twelve AUs, seen from 0.25 above.
    errors = [(12 * 0.25**2 - 0.25**2 + (k - 0.25) ** 2) / 12 for k in range(1, 6)]
    assert value("au_mse_neutral") == pytest.approx(np.mean(errors))


def test_sampling_defaults_are_those_of_the_pipeline():
    template = run.make_template(run.EvaluationConfig(output=Path("out"), model="user/model"))
    assert template.guidance_scale == 7.5 and template.num_inference_steps == 50
    assert os.path.exists(COMBINATIONS)


# ---- baselines and the experiment ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> str:
    """A toy world whose networks are as small as they get, and untrained."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    tokenizer = networks.make_tokenizer(captions_of(range(20), 0))
    StableDiffusionPipeline(
        vae=networks.make_vae((8, 8, 8, 8), 0),
        text_encoder=networks.make_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=networks.make_unet((32,)),
        scheduler=networks.make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=networks.make_image_encoder(),
        requires_safety_checker=False,
    ).save_pretrained(folder)
    small = {"block_out_channels": (8, 8, 8, 8), "hidden_size": 16}
    meter = networks.make_meter()
    for name, reader in {"meter": meter, "attribute_reader": networks.make_attribute_reader()}.items():
        networks.PictureReader.from_config(reader.config, **small).save_pretrained(folder / name)
    networks.SecondMeter(meter.config.au_names, widths=(8, 8), depth=1).save_pretrained(folder / "second_meter")
    (folder / "fineface.json").write_text('{"num_inference_steps": 2, "guidance_scale": 2.0}')
    return str(folder)


SMALLEST = {"prompts": 1, "combinations": 2, "bootstrap_draws": 20, "feedback_seconds": 0.001, "latent_meter_steps": 2}
TINY = Budget("tiny", 12, 2, 2, 4, **SMALLEST)
"""It shows that every line runs."""


@pytest.fixture(autouse=True)
def quick_is_tiny(monkeypatch):
    monkeypatch.setitem(BUDGETS, "quick", TINY)


@pytest.fixture(scope="session")
def prepared(world, tmp_path_factory) -> Experiment:
    experiment = Experiment(tmp_path_factory.mktemp("experiment"), TINY, world)
    experiment.prepare()
    return experiment


def train_baseline(experiment: Experiment, system: str, output: str, steps: int, **changes) -> Path:
    """Train, unless another test has done so with this output, which tests share."""
    # A schedule that does not depend on where the run ends.
    constant = {"lr_scheduler": "constant_with_warmup", "learning_rate": 0.02, "checkpointing_steps": 1}
    baselines.run(system, experiment.config(output, **(constant | {"max_train_steps": steps} | changes)))
    return experiment.folder / "systems" / output


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    paths = [path for path in sorted(folder.rglob("*.safetensors")) if "checkpoint" not in str(path)]
    return {f"{path.name} {key}": tensor for path in paths for key, tensor in load_file(path).items()}


def draw(world: str, system: str, adapter: Path | None, aus: list[str]) -> np.ndarray:
    weights = Weights(world, None if adapter is None else str(adapter))
    jobs = [Job("a woman", text, 3, guidance_scale=2, num_inference_steps=2) for text in aus]
    images = System(system, weights, CPU, torch.float32).draw(jobs)
    return np.stack([np.asarray(image, np.int16) for image in images])


@pytest.mark.parametrize("system", baselines.BASELINES)
def test_a_baseline_that_was_stopped_ends_as_if_it_had_not_been(prepared, system):
    whole = read_weights(train_baseline(prepared, system, f"{system}_whole", 2))
    stopped = train_baseline(prepared, system, f"{system}_stopped", 1)
    after_one = read_weights(stopped)
    train_baseline(prepared, system, f"{system}_stopped", 2)
    resumed = read_weights(stopped)
    assert whole and whole.keys() == resumed.keys()
    assert all(torch.allclose(whole[key], resumed[key], atol=1e-6) for key in whole)
    assert any(not torch.equal(after_one[key], resumed[key]) for key in whole)
    # As an older version has left it, which did not have this flag.
    settings = json.loads((stopped / baselines.SETTINGS_NAME).read_text())
    del settings["noise_offset"]
    (stopped / baselines.SETTINGS_NAME).write_text(json.dumps(settings))
    before = read_files_in(stopped)
    train_baseline(prepared, system, f"{system}_stopped", 2)
    assert read_files_in(stopped) == before
    with only_run_in(stopped), pytest.raises(ValueError, match="is being written by another run"):
        train_baseline(prepared, system, f"{system}_stopped", 3)
    with pytest.raises(ValueError, match="`learning_rate` was 0.02 and is now 0.03"):
        train_baseline(prepared, system, f"{system}_stopped", 2, learning_rate=0.03)


def read_files_in(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("system", ["sd", "dreambooth", "lora_t", "lora_au"])
def test_each_system_hears_of_aus_and_draws_otherwise_than_the_base(prepared, world, system):
    adapter = None if system == "sd" else train_baseline(prepared, system, f"{system}_whole", 2)
    neutral, expression = draw(world, system, adapter, ["", "AU12=5 AU26=4"])
    assert abs(neutral - expression).max() > 0
    if adapter is not None:
        base, _ = draw(world, "sd", None, ["", "AU12=5"])
        assert abs(neutral - base).max() > 0


def test_the_dreambooth_loss_keeps_the_prior(prepared):
    folder = train_baseline(prepared, "dreambooth", "dreambooth_whole", 2) / baselines.PRIOR_FOLDER
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == TINY.pictures and all((folder / row["file_name"]).exists() for row in rows)
    # What the base draws for plain captions, which say nothing of AUs.
    assert all(row["AU12"] == 0 and "mouth" not in row["text"] for row in rows)


def test_an_image_prompt_and_aus_work_together(prepared, world, tmp_path):
    adapter = prepared.train_fineface("of_rank_2", learning_rate=0.05, rank=2)
    ip_adapter = train_baseline(prepared, "ip_adapter", "ip_adapter_whole", 2) / baselines.IP_ADAPTER_NAME
    (tmp_path / "prompts.txt").write_text("a man\n")
    pictures = {}
    for color in ("red", "blue"):
        references = tmp_path / color
        references.mkdir()
        Image.new("RGB", (128, 128), color).save(references / "0.png")
        arguments = [f"--output={tmp_path / f'out_{color}'}", f"--model={world}", f"--adapter={adapter}"]
        arguments += [f"--prompts={tmp_path / 'prompts.txt'}", f"--reference-images={references}", "--device=cpu"]
        arguments += [f"--ip-adapter={ip_adapter}", "--parts=combination", "--limit-combinations=1"]
        assert run.main([*arguments, "--bootstrap-draws=5"]) == 0
        paths = sorted((tmp_path / f"out_{color}" / "pictures").iterdir())
        pictures[color] = [np.asarray(Image.open(path), np.int16) for path in paths]
        assert "likeness to the image prompt" in (tmp_path / f"out_{color}" / "report.md").read_text()
    for red, blue in zip(pictures["red"], pictures["blue"], strict=True):
        assert abs(red - blue).max() > 0
    combination, neutral = pictures["red"]
    assert abs(combination - neutral).max() > 0


@pytest.mark.parametrize("system", baselines.BASELINES)
def test_a_baseline_trains_in_bfloat16_from_a_cache_in_half_precision(prepared, system):
    folder = train_baseline(prepared, system, f"{system}_bf16", 1, mixed_precision="bf16")
    assert json.loads((folder / baselines.DONE_NAME).read_text()) == {"steps": 1}


@pytest.mark.parametrize(
    ("system", "changes", "message"),
    [
        ("lora_t", {"streaming": True, "cache_latents": False}, "`--streaming` is for train_fineface.py alone"),
        ("lora_t", {"dry_run": True}, "`--dry_run` is for train_fineface.py alone"),
        ("lora_au", {"encoder_type": "direct"}, "`--encoder_type direct` makes no token.* Choose another type"),
        ("lora_t", {"pretrained_model_name_or_path": "tiny_xl_dir"}, "is a StableDiffusionXLPipeline.* 1 or 2 alone"),
        ("ip_adapter", {"pretrained_model_name_or_path": "tiny_sd_dir"}, "image encoder of the base, but .* has none"),
    ],
)
def test_flags_and_bases_that_a_baseline_cannot_follow_are_refused(
    prepared, request, monkeypatch, system, changes, message
):
    changes = {name: request.getfixturevalue(v) if "_dir" in str(v) else v for name, v in changes.items()}
    # Nothing is loaded before.
    monkeypatch.setattr(baselines, "make_accelerator", None)
    with pytest.raises(ValueError, match=message):
        train_baseline(prepared, system, "refused", 1, **changes)
    assert not (prepared.folder / "systems" / "refused").exists()


def test_a_experiment_is_refused_with_other_settings(prepared, world):
    with pytest.raises(ValueError, match="`guidance_scale` was 2.0 and is now 3.0"):
        Experiment(prepared.folder, TINY, world, {"guidance_scale": 3.0})
    with pytest.raises(ValueError, match="`steps` was 2 and is now 3"):
        Experiment(prepared.folder, replace(TINY, steps=3), world)
    prepared.train_fineface("of_rank_2", learning_rate=0.05, rank=2)
    with pytest.raises(ValueError, match="`rank` was 2 and is now 4"):
        prepared.train_fineface("of_rank_2", learning_rate=0.05)


def test_a_model_that_is_no_toy_world_is_refused(tiny_sd_dir, tmp_path):
    with pytest.raises(FileNotFoundError, match="no meter/"):
        Experiment(tmp_path / "new", TINY, tiny_sd_dir)
    assert not (tmp_path / "new").exists()


# ---- the paper's tables and the trials -----------------------------------------------------------------------------


def write_run(experiment: Experiment, name: str, error: float, clip_i: float = 0.9, slope: float = 1.0) -> None:
    """What `evaluation.run` leaves of a system that is off by `error` in every AU, more or less."""
    items = make_items([Prompt(0, "a boy", "in", 1), Prompt(1, "a girl", "out", 2)], ["1+4", "6+12"], ("combination",))
    results = pd.DataFrame({"name": [item.name for item in items], "part": [item.part for item in items]})
    results["prompt_index"] = [item.prompt.index for item in items]
    results[list(AU_NAMES)] = np.array(read_aus([item.aus for item in items]))
    # Some pictures are harder than others, for all systems.
    hardness = np.linspace(0, 2, len(items))[:, None]
    measured = [f"measured_{name}" for name in AU_NAMES]
    results[measured] = results[list(AU_NAMES)].to_numpy() + error + hardness
    folder = experiment.folder / "runs" / name
    folder.mkdir(parents=True, exist_ok=True)
    results.assign(meter="toy", num_faces=1, clip_i=clip_i).to_csv(folder / "results.csv", index=False)
    combinations = (results["part"] == "combination").to_numpy()
    au_mse = np.square(error + hardness[combinations]).mean()
    rows = [("toy", "combination", "au_mse", au_mse), ("toy", "single", "slope", slope)]
    rows += [("", "combination", "clip_i", clip_i), ("", "combination", "agreement", 0.8)]
    columns = ["meter", "part", "metric", "value"]
    summary = pd.DataFrame(rows, columns=columns).assign(au="", pictures=4, prompts=2)
    summary = summary.assign(low=summary["value"] - 0.01, high=summary["value"] + 0.01)
    summary.to_csv(folder / "summary.csv", index=False)


@pytest.fixture
def experiment(world, tmp_path) -> Experiment:
    return Experiment(tmp_path / "experiment", TINY, world)


def test_a_difference_of_two_systems_is_that_of_the_same_pictures(experiment):
    write_run(experiment, "good", 0.5)
    write_run(experiment, "bad", 0.7)
    figure = experiment.paired_difference(("bad", "good"), "au_mse", "combination")
    # (0.7 + h)² − (0.5 + h)² = 0.24 + 0.4 h, whatever else makes a picture hard.
    hardness = np.linspace(0, 2, 6)[[1, 2, 4, 5]]
    assert figure.value == pytest.approx(0.24 + 0.4 * hardness.mean()) and figure.low > 0


def test_the_order_of_methods_is_compared_pair_by_pair(experiment):
    # AU MSE and CLIP-I of combinations in the paper, and the error and the CLIP-I of our runs.
    numbers = {"a": (4, 0.3, 0.9, 0.5), "b": (3, 0.2, 0.3, 0.8), "c": (2, 0.1, 0.5, 0.8), "d": (2, 0.3, 0.2, 0.6)}
    methods = []
    for name, (mse, clip_i, error, our_clip_i) in numbers.items():
        write_run(experiment, name, error, our_clip_i)
        methods.append(paper_tables.Method(name, (0, 0, mse, clip_i), name))
    # Less is better. The paper has d and c before b, and b before a; c and d are equal there.
    words = paper_tables.compare_orders(experiment, methods, 2)
    assert words.startswith("**AU MSE, combinations ↓.** Ours, from best to worst: d, b, c, a. ")
    assert "order: 4 of 5; in the opposite order: 1; open" in words and "in it: 0. In" in words
    assert words.endswith("here: c before b.")
    # More is better. Our b and c are equal.
    words = paper_tables.compare_orders(experiment, methods, 3)
    assert "from best to worst: b, c, d, a. " in words and "order: 0 of 5; in the opposite order: 4; open" in words
    assert "in it: 1. In" in words and words.endswith("here: a before b; a before c; d before b; d before c.")


def test_the_paragraphs_of_the_results_are_wrapped_and_tables_and_lists_are_not():
    kept = "# Title\n\n| a table |" + 60 * " cell |" + "\n\n- a list" + 60 * " + more"
    assert paper_tables.wrap(kept) == kept
    lines = paper_tables.wrap(f"{60 * 'word '}\n{kept}").split("\n")
    assert [len(line) for line in lines[:3]] == [119, 119, 59] and "\n".join(lines[3:]) == kept


def test_the_best_trial_keeps_clip_i_and_is_held_against_the_goal(experiment):
    design = trials.DesignTrials(experiment)
    write_run(experiment, design.run_name("paper"), 1.0)
    assert "No trial keeps" in design.describe_best()
    write_run(experiment, design.run_name("stratified"), 0.3, slope=0.9)
    write_run(experiment, design.run_name("au_guidance_3"), 0.1, clip_i=0.5)
    words = design.describe_best()
    assert "`stratified`" in words and "-49 % against" in words and "goal of -65 % is not reached" in words
    assert "0.90 (0.85 to 1.15 is the goal, reached)" in words
    write_atomically(design.diverged("rank_64"), "inf")
    assert design.report() == f"{experiment.folder / 'trials.csv'}: {words}"
    table = pd.read_csv(experiment.folder / "trials.csv")
    assert table["Trial"].tolist() == ["paper", "au_guidance_3", "rank_64", "stratified"]
    assert table.iloc[2, 4] == "diverged" and table.iloc[3, 5].startswith("-49 %")


def test_trials_are_flags_of_the_trainer_and_share_adapters(experiment, tmp_path, capsys):
    for name, trial in [*trials.TRIALS.items(), *feedback_trials.FEEDBACK_TRIALS.items()]:
        base = TrainConfig(pretrained_model_name_or_path="base", train_data_dir=tmp_path, output_dir=tmp_path)
        assert replace(base, **trial.train), name
    names = ["paper", "best", "au_guidance_3", "best_guided"]
    groups = trials.DesignTrials(experiment).group_by_system(names)
    assert groups == [["paper", "au_guidance_3"], ["best", "best_guided"]]
    assert trials.main(["--quick", "--only", "paper", "magic"]) == 2
    assert "There is no trial 'magic'. There are paper," in capsys.readouterr().err


def test_a_trial_that_diverges_is_recorded_once_but_the_one_all_are_compared_with_has_to_work(prepared, monkeypatch):
    monkeypatch.setitem(trials.TRIALS, "wild", Trial("it cannot work", {"learning_rate": 1e30}))
    design = trials.DesignTrials(prepared)
    design.make(["wild"])
    assert "Training has stopped" in design.diverged("wild").read_text() and design.evaluated() == []
    # It is not tried again.
    before = read_files_in(prepared.folder / "systems")
    design.make(["wild"])
    assert read_files_in(prepared.folder / "systems") == before
    design.diverged("wild").unlink()
    monkeypatch.setattr(design, "reference", "wild")
    with pytest.raises(FloatingPointError):
        design.make(["wild"])
    assert not design.diverged("wild").exists()


@pytest.fixture
def quick_trials(monkeypatch):
    """A slope needs two intensities, and a pace two steps after the first one."""
    monkeypatch.setattr(testset, "INTENSITIES", (1, 5))
    monkeypatch.setattr(feedback_trials, "PROBE_STEPS", 3)


def test_trials_of_feedback_begin_alike_and_get_the_same_processor_time(prepared, quick_trials):
    folder = prepared.folder
    arguments = ["--quick", f"--model={prepared.model}", f"--work={folder}", "--processes=1", "--feedback", "--only"]
    assert trials.main([*arguments, "ordinary", "latents"]) == 0
    table = pd.read_csv(folder / "feedback.csv").set_index("Trial")
    assert table.index.tolist() == ["start", "ordinary", "latents"]
    # The budget pays for none, so each has the steps that are timed to find that out.
    assert table["steps"].tolist() == ["–", "3", "3"] and (table["seconds a step"][1:].astype(float) > 0).all()
    assert table["slopes"].str.fullmatch(r"-?\d+\.\d\d to -?\d+\.\d\d").all()
    assert json.loads((folder / "runs" / "feedback_latents" / "settings.json").read_text())["adapter"]
    before = read_files_in(folder / "systems") | read_files_in(folder / "runs")
    assert trials.main([*arguments, "ordinary", "latents"]) == 0
    assert before == read_files_in(folder / "systems") | read_files_in(folder / "runs")
    # More prompts judge what is trained already.
    trained = read_files_in(folder / "systems")
    assert trials.main([*arguments, "ordinary", "--feedback-prompts=2"]) == 0
    more = pd.read_csv(folder / "feedback.csv").set_index("Trial")["pictures"]
    assert (more / table["pictures"]).tolist() == [2, 2, 1] and read_files_in(folder / "systems") == trained

    start = read_au_adapter(find_adapter_files(str(folder / "systems" / "fineface")))
    aus = torch.rand(3, 12, generator=torch.Generator().manual_seed(0)) * 5
    for encoder_type in ("direct", "res_3mlp"):
        changed = feedback_trials.change_encoder(start, encoder_type)
        assert changed.config.encoder_type == encoder_type
        torch.testing.assert_close(changed(aus)[1], start(aus)[1], rtol=1e-4, atol=1e-5)


def test_the_time_of_trials_of_feedback_is_one_for_a_folder(experiment, world, capsys):
    feedback_trials.FeedbackTrials(experiment)
    arguments = ["--quick", f"--model={world}", f"--work={experiment.folder}"]
    for options, message in (
        (["--feedback", "--feedback-seconds=4"], "`feedback_seconds` was 0.001 and is now 4.0"),
        (["--feedback", "--feedback-batch-size=16"], "`feedback_batch_size` was 2 and is now 16"),
        (["--feedback", "--feedback-seconds=-1"], "at least 0, but is -1.0"),
        (["--feedback", "--feedback-prompts=0"], "at least 1, but is 0"),
        (["--feedback-prompts=2"], "Add `--feedback`."),
    ):
        assert trials.main([*arguments, *options]) == 2
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in experiment.folder.iterdir()) == ["experiment.json", "feedback.json"]


def test_more_time_pays_for_more_steps(prepared, tmp_path, quick_trials):
    # Trials of another time, on the same data.
    folder = shutil.copytree(prepared.folder, tmp_path / "work", ignore=shutil.ignore_patterns("feedback*"))
    budget = replace(prepared.budget, feedback_seconds=1.0, feedback_batch_size=4)
    series = feedback_trials.FeedbackTrials(Experiment(folder, budget, prepared.model))
    adapter = series.train("ordinary")
    # More than the steps that are timed to find out how many the time pays for.
    assert series.pace("ordinary")["steps"] > 3
    config = json.loads((adapter / "train_config.json").read_text())
    assert (config["train_batch_size"], config["au_feedback_batch_size"]) == (4, 2)


def test_a_trial_after_another_goes_on_from_its_adapter(prepared, tmp_path, quick_trials):
    folder = shutil.copytree(prepared.folder, tmp_path / "work", ignore=shutil.ignore_patterns("feedback*"))
    series = feedback_trials.FeedbackTrials(
        Experiment(folder, replace(prepared.budget, feedback_seconds=0.1), prepared.model)
    )
    adapter = series.train("best_then_whole")
    config = json.loads((adapter / "train_config.json").read_text())
    first = Path(config["adapter_name_or_path"])
    assert first.name == "feedback_best_then_whole_first" and config["au_feedback_meter"]
    assert json.loads((first / "train_config.json").read_text())["au_feedback_meter"] is None
    # It has learned interactions of AUs.
    grown, one, other = read_au_adapter(find_adapter_files(str(adapter))), *torch.eye(12)[:2, None]
    values = [grown(aus)[1] for aus in (one, other, one + other, 0 * one)]
    assert (values[0] + values[1] - values[2] - values[3]).abs().max() > 0


@pytest.mark.slow
def test_jobs_in_other_processes_are_done_and_the_first_error_ends_them(tmp_path):
    run_jobs([functools.partial(Path.touch, tmp_path / name) for name in "ab"], processes=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    with pytest.raises(ValueError, match="invalid literal"):
        run_jobs([functools.partial(int, "no number"), functools.partial(time.sleep, 60)], processes=2)


def test_jobs_end_with_the_process_that_was_killed(tmp_path):
    paths = [tmp_path / name for name in "ab"]
    jobs = [functools.partial(touch_for_ever, path) for path in paths]
    parent = multiprocessing.get_context("spawn").Process(target=run_jobs, args=(jobs, 2))
    parent.start()
    deadline = time.monotonic() + 120
    while not all(path.exists() for path in paths) and time.monotonic() < deadline:
        time.sleep(0.1)
    parent.kill()
    parent.join()
    for _ in range(3):
        touched = [path.stat().st_mtime_ns for path in paths]
        time.sleep(1)
        if touched == [path.stat().st_mtime_ns for path in paths]:
            return
    pytest.fail("The jobs go on.")


@pytest.mark.slow
def test_one_command_trains_evaluates_and_writes_the_papers_tables(world, tmp_path, capsys):
    arguments = ["--quick", f"--model={world}", f"--work={tmp_path / 'work'}", f"--output={tmp_path / 'r.md'}"]
    assert paper_tables.main([*arguments, "--processes=2"]) == 0
    text = (tmp_path / "r.md").read_text()
    for method in paper_tables.METHODS.values():
        assert f"| {method.label} | {method.paper[0]:.2f} |" in text
    assert all((tmp_path / name).exists() for name in re.findall(r"\]\((.*?\.png)\)", text)) and "figure7" in text
    before = read_files_in(tmp_path / "work" / "systems") | read_files_in(tmp_path / "work" / "runs")
    assert paper_tables.main([*arguments, "--processes=1"]) == 0
    assert before == read_files_in(tmp_path / "work" / "systems") | read_files_in(tmp_path / "work" / "runs")
    assert trials.main([*arguments, "--processes=1", "--only", "au_guidance_3", "tokens_4"]) == 0
    assert "\ntokens_4," in (tmp_path / "work" / "trials.csv").read_text()
    # The table of all trials that were ever run is not lost when the others are written again.
    (tmp_path / "r.md").write_text("old\n\n## Trials\n\n| by hand |\n")
    assert paper_tables.main([*arguments, "--processes=1"]) == 0
    assert (tmp_path / "r.md").read_text() == text + "\n## Trials\n\n| by hand |\n"
    assert paper_tables.main([*arguments, "--guidance-scale=5"]) == 2
    assert "`guidance_scale` was 2.0 and is now 5.0" in capsys.readouterr().err


@pytest.mark.slow
def test_processes_share_the_pictures_and_the_measuring(world, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = [f"--output={tmp_path / 'out'}", f"--model={world}", "--system=sd", "--device=cpu", "--batch-size=1"]
    arguments += ["--parts", "combination", "--limit=2", "--limit-combinations=2", "--bootstrap-draws=5"]
    subprocess.run([*launcher, "-m", "evaluation.run", *arguments], check=True, cwd=ROOT)
    results = pd.read_csv(tmp_path / "out" / "results.csv")
    assert len(results) == results["name"].nunique() == 2 * (1 + 2)
    # Drawn by two, the pictures are those that one draws.
    alone = [f"--output={tmp_path / 'alone'}", *arguments[1:]]
    assert run.main([*alone, "--only=generate"]) == 0
    for path in (tmp_path / "out" / "pictures").iterdir():
        pair = [np.asarray(Image.open(p), np.int16) for p in (path, tmp_path / "alone" / "pictures" / path.name)]
        assert abs(pair[0] - pair[1]).max() <= 1


# A run of the training as a picture


def test_a_training_run_becomes_a_curve_above_its_validation_sheets(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    # A run that was resumed at step 20: the second part has these steps again.
    for part, steps in enumerate((range(1, 25), range(21, 41))):
        with SummaryWriter(str(tmp_path / "run" / "logs" / f"part{part}")) as writer:
            for step in steps:
                writer.add_scalar("train_loss", 1 / step + part, step)
        time.sleep(0.01)
    (tmp_path / "run" / "validation").mkdir()
    for step in (10, 20, 30, 40):
        Image.new("RGB", (700, 50), (step, 0, 0)).save(tmp_path / "run" / "validation" / f"step-{step:06}.png")
    steps, losses = training_picture.read_losses(tmp_path / "run")
    assert steps.tolist() == list(range(1, 41))
    np.testing.assert_allclose(losses, [1 / step + (step > 20) for step in steps], rtol=1e-6)
    np.testing.assert_allclose(training_picture.smooth(np.arange(5.0), 3), [0.5, 1, 2, 3, 3.5])

    assert training_picture.main([str(tmp_path / "run"), str(tmp_path / "run.png")]) == 0
    with Image.open(tmp_path / "run.png") as picture:
        sheets = [picture.getpixel((5, training_picture.CHART_HEIGHT + 25 + 50 * row))[0] for row in range(3)]
        assert picture.width == 700 and sheets[0] == 10 and sheets[-1] == 40
    assert training_picture.main([str(tmp_path), str(tmp_path / "none.png")]) == 2
    assert "no losses" in capsys.readouterr().err and not (tmp_path / "none.png").exists()
