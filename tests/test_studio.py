import csv
import io
import json
import re
import shlex
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import drawing.studio
import generate
from action_units import AU_NAMES
from drawing.files import read_metadata
from drawing.jobs import Job
from drawing.model import Weights
from drawing.photo import encode, face_mask
from drawing.studio import (
    MAX_COLUMNS,
    MAX_ROWS,
    MAX_TABLE_BYTES,
    Studio,
    read_expressions,
    write_gif,
    write_zip,
)
from program import TOY_MODEL


ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
JOBS = [
    Job("a boy", aus="AU6=3 AU12=4", seed=3, num_inference_steps=2),
    Job('it\'s a "girl"\n<my-token>', seed=5, num_inference_steps=2, negative_prompt="-x $HOME", height=48, width=32),
    Job("-b", aus="AU12=-2.5", seed=2**40, num_inference_steps=2, au_guidance_scale=3.25, au_scale=0.5),
    Job("a boy", aus="neutral", num_inference_steps=1, guidance_scale=1.0),
]


@pytest.fixture(scope="module")
def tiny_studio(tiny_sd_dir, tiny_adapter_dir) -> Studio:
    return Studio(Weights(tiny_sd_dir, tiny_adapter_dir), CPU, "float32")


def pixels(image) -> np.ndarray:
    if isinstance(image, Image.Image):
        return np.asarray(image)
    with Image.open(image) as opened:
        return np.asarray(opened)


def run_snippet(code: str, path: Path) -> np.ndarray:
    assert code.count('"face.png"') == 1
    exec(compile(code.replace('"face.png"', repr(str(path))), "snippet", "exec"), {})
    return pixels(path)


def run_command(command: str, name: str, path: Path) -> np.ndarray:
    python, script, *options = shlex.split(command.replace("\\\n", " "))
    assert (python, script, options[-1]) == ("python", "generate.py", f"--output={name}")
    assert generate.main([*options[:-1], f"--output={path}"]) == 0
    return pixels(path)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.prompt[:6])
def test_the_code_on_the_screen_draws_the_same_picture_to_the_bit(tiny_studio, job, tmp_path):
    picture = tiny_studio.draw(job)
    tiny_studio.write(picture, tmp_path / "screen.png", vars(job))
    assert tiny_studio.python(job).startswith("# Run this in the folder of the FineFace repository")
    assert np.array_equal(run_snippet(tiny_studio.python(job), tmp_path / "python.png"), pixels(picture))
    assert np.array_equal(run_command(tiny_studio.command(job), "face.png", tmp_path / "command.png"), pixels(picture))
    assert read_metadata(tmp_path / "command.png") == read_metadata(tmp_path / "screen.png")


def test_the_code_for_the_toy_model_draws_the_same_picture_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    studio = Studio(Weights(str(TOY_MODEL)), CPU, "float32")
    job = replace(studio.defaults, aus="AU6=3 AU12=4", num_inference_steps=1, au_guidance_scale=4.0)
    picture = pixels(studio.draw(job))
    assert "--model" not in studio.command(job) and "'toy_faces/weights'" in studio.python(job)
    assert np.array_equal(run_snippet(studio.python(job), tmp_path / "python.png"), picture)
    assert np.array_equal(run_command(studio.command(job), "face.png", tmp_path / "command.png"), picture)


def test_the_command_of_a_sweep_draws_the_same_strip_to_the_bit(tiny_studio, tmp_path):
    # Where the face already has the AU, the sweep takes its place.
    sweep = tiny_studio.sweep_au(JOBS[0], "AU12", -1.0, 5.0, 3)
    counts = []
    pictures, strip, values = tiny_studio.sweep(sweep, counts.append)
    assert list(dict.fromkeys(counts)) == [0, 1, 2, 3]
    assert values["rows"] == [["AU6=3 AU12=-1", "AU6=3 AU12=2", "AU6=3 AU12=5"]]
    assert np.array_equal(pixels(pictures[1]), pixels(tiny_studio.draw(replace(JOBS[0], aus="AU6=3 AU12=2"))))
    tiny_studio.write(strip, tmp_path / "screen.png", values)
    again = run_command(sweep.command, "sweep.png", tmp_path / "sweep.png")
    assert np.array_equal(again, pixels(strip))
    assert read_metadata(tmp_path / "sweep.png") == read_metadata(tmp_path / "screen.png")


def test_a_photo_and_the_code_on_the_screen_on_sdxl(tiny_xl_dir, tiny_xl_adapter_dir, tmp_path):
    studio = Studio(Weights(tiny_xl_dir, tiny_xl_adapter_dir), CPU, "float32")
    job = Job("a boy", aus="AU12=5", seed=3, num_inference_steps=2)
    assert "import FineFaceXLPipeline" in studio.python(job)
    assert np.array_equal(run_snippet(studio.python(job), tmp_path / "python.png"), pixels(studio.draw(job)))
    photo = Image.effect_noise((64, 64), 60).convert("RGB")
    edited = pixels(studio.edit(photo, face_mask(photo.size, (8, 8, 56, 56)), job, 1.0)) != pixels(photo)
    assert edited[16:48, 16:48].mean() > 0.5 and not edited[:8].any()
    # In half precision, the VAE of SDXL would overflow; it is in half precision again afterwards.
    vae, dtypes = studio.pipeline.vae.half(), []
    vae.encoder.register_forward_pre_hook(lambda module, inputs: dtypes.append(inputs[0].dtype))
    latents = encode(studio.pipeline, photo)
    assert (dtypes, latents.dtype, vae.dtype) == ([torch.float32], torch.float16, torch.float16)


def test_progress_counts_the_steps(tiny_studio):
    steps = []
    tiny_studio.draw(Job("a boy", aus="happy", num_inference_steps=3), steps.append)
    assert steps == [0, 1, 2, 3]


def test_remarks_do_not_reach_into_a_drawing(tiny_studio):
    """They come from other threads, without waiting for it, and a tokenizer pads as its last caller wanted."""
    tiny_studio.draw(JOBS[0])
    tokenizer = tiny_studio.pipeline.tokenizer.backend_tokenizer
    before = tokenizer.padding, tokenizer.truncation
    assert tiny_studio.remarks(Job("a boy " * 100))[0].startswith("The prompt is too long for the model")
    assert (tokenizer.padding, tokenizer.truncation) == before and None not in before


def test_a_model_without_an_adapter_is_an_error(tiny_sd_dir):
    with pytest.raises(ValueError, match="--adapter"):
        Studio(Weights(tiny_sd_dir), CPU, "float32")


def test_the_animation_goes_there_and_back(tmp_path):
    colours = ("red", "green", "blue", "white")
    write_gif([Image.new("RGB", (32, 48), colour) for colour in colours], tmp_path / "sweep.gif", {"seed": 3})
    with Image.open(tmp_path / "sweep.gif") as gif:
        assert (gif.n_frames, gif.info["loop"], gif.size) == (6, 0, (384, 576))
        assert json.loads(gif.info["comment"]) == {"seed": 3}
        seen = []
        for frame in range(gif.n_frames):
            gif.seek(frame)
            seen.append(gif.convert("RGB").getpixel((5, 5)))
    assert seen[1] == seen[5] == (0, 128, 0) and seen[3] == (255, 255, 255)
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.gif"]


def test_a_table_becomes_the_jobs_of_its_command(tiny_studio, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("faces.csv").write_text("file_name,aus\nann/1.jpg,6C+12D\n,happy@0.5\n")
    jobs, remarks = read_expressions(Path("faces.csv"), replace(JOBS[0], aus="AU4=5"))
    assert [job.aus for job in jobs.values()] == ["AU6=3 AU12=4", "AU6=2 AU12=2"] and remarks == []
    assert all(replace(job, aus=None) == replace(JOBS[0], aus=None) for job in jobs.values())

    command = shlex.split(tiny_studio.table_command("faces.csv", JOBS[0]).replace("\\\n", " "))
    assert generate.main(command[2:]) == 0
    for name, job in jobs.items():
        drawn, again = pixels(tiny_studio.draw(job)), pixels(Path("faces") / name)
        # The command draws both at once, which may round differently.
        assert np.abs(drawn.astype(int) - again).max() <= 2


def test_rows_without_a_face_are_counted_and_left_out(tmp_path):
    table = tmp_path / "faces.jsonl"
    rows = [{"file_name": "a.jpg", **dict.fromkeys(AU_NAMES, 1)}, {"file_name": "b.jpg", **dict.fromkeys(AU_NAMES)}]
    table.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    jobs, remarks = read_expressions(table, JOBS[0])
    assert [job.aus.split()[0] for job in jobs.values()] == ["AU1=1"] and remarks == [
        "Rows without a face, which are left out: 1."
    ]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("aus\nAU7=1\n", "faces.csv, line 2: `aus` names 'AU7'"),
        ("smile\n3\n", "faces.csv, line 2"),
        ("aus\n", "holds no row with a face"),
        ("", "faces.csv: the file is empty"),
        ("aus\n" + "happy\n" * (MAX_ROWS + 1), f"{MAX_ROWS} are allowed"),
        (",".join(map(str, range(MAX_COLUMNS + 1))), "2,000 are allowed"),
        ("a" * (MAX_TABLE_BYTES + 1), "5,000,000 are allowed"),
    ],
)
def test_a_wrong_table_is_an_error_that_names_no_folder(text, part, tmp_path):
    table = tmp_path / "faces.csv"
    table.write_text(text)
    with pytest.raises(ValueError, match=re.escape(part)) as caught:
        read_expressions(table, JOBS[0])
    assert str(tmp_path) not in str(caught.value)


def test_limits_are_checked_before_a_table_is_understood(tmp_path, monkeypatch):
    """Otherwise, whoever sends a large table makes everybody wait."""
    table = tmp_path / "faces.csv"
    table.write_text("aus\n" + "happy\n" * 100_000)
    read = []
    monkeypatch.setattr("drawing.studio.read_table_jobs", watching(drawing.studio.read_table_jobs, read))
    began = time.perf_counter()
    with pytest.raises(ValueError, match=f"{MAX_ROWS} are allowed"):
        read_expressions(table, JOBS[0])
    assert time.perf_counter() - began < 2
    for text in ("a" * (MAX_TABLE_BYTES + 1), "," * MAX_COLUMNS):
        table.write_text(text)
        with pytest.raises(ValueError, match="are allowed"):
            read_expressions(table, JOBS[0])
    assert read == ["faces.csv"]


def watching(read_table_jobs, read: list):
    def watched(path, *args, **options):
        read.append(path.name)
        return read_table_jobs(path, *args, **options)

    return watched


def test_the_zip_holds_the_pictures_and_a_table_of_them(tiny_studio, tmp_path):
    jobs = {"00001.png": JOBS[0], "00002.png": JOBS[1]}
    for name, job in jobs.items():
        tiny_studio.write(tiny_studio.draw(job), tmp_path / name, vars(job))
    write_zip(tmp_path / "faces.zip", tmp_path, jobs)
    with zipfile.ZipFile(tmp_path / "faces.zip") as archive:
        assert archive.namelist() == [*jobs, "metadata.csv"]
        rows = list(csv.DictReader(io.StringIO(archive.read("metadata.csv").decode())))
        archive.extract("00002.png", tmp_path / "out")
    assert [row["text"] for row in rows] == [JOBS[0].prompt, JOBS[1].prompt]
    assert [float(rows[0][name]) for name in ("AU1", "AU6", "AU12")] == [0, 3, 4]
    assert read_metadata(tmp_path / "out" / "00002.png")["seed"] == 5
