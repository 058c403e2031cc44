import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny import HIDDEN_DIM, free_address, make_adapter, make_components

import generate
import program
from action_units import AU_NAMES, PRESETS, action_units_of, parse_aus
from au_encoder import AUAdapter, write_au_adapter
from drawing import files, model
from drawing.contact_sheet import Table, draw_sheet, draw_table, write_animation
from drawing.files import read_metadata
from drawing.jobs import Job, make_job, sheet_of
from drawing.labelled_set import DEFAULT_DISTRIBUTION
from drawing.model import Weights, make_batches, read_au_names
from generate import main


ROOT = Path(__file__).resolve().parent.parent
SIZE = 32
SIDED = Weights(str(program.TOY_MODEL), str(program.TOY_MODEL / "sided"))


@pytest.fixture
def model_args(tiny_sd_dir, tiny_adapter_dir) -> list[str]:
    return ["--model", tiny_sd_dir, "--adapter", tiny_adapter_dir, "--num-inference-steps", "2", "--device", "cpu"]


@pytest.fixture
def no_model(monkeypatch):
    """Whoever comes as far as loading a model fails."""

    def load_pipeline(*args):
        raise AssertionError("A model was loaded.")

    monkeypatch.setattr(model, "load_pipeline", load_pipeline)


def write_jobs(path: Path, *jobs) -> str:
    path.write_text("".join(f"{job if isinstance(job, str) else json.dumps(job)}\n" for job in jobs))
    return str(path)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def assert_one_error_line(capsys, *parts: str) -> None:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and captured.err.endswith("\n")
    for part in parts:
        assert part in captured.err


# --------------------------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--prompt", "a boy", "--aus", "AU7=1"], "AU7"),
        (["--prompt", "a boy", "--aus", "AU6=nan"], "AU6"),
        (["--prompt", "a boy", "--aus", "AU6=inf"], "AU6"),
        (["--prompt", "a boy", "--aus", "AU6=11"], "11"),
        (["--prompt", "a boy", "--aus", "6F"], "grade"),
        (["--prompt", "a boy", "--aus", "doubtfull"], "'doubtful'"),
        (["--prompt", "a boy", "--negative-aus", "AU7=1"], "--negative-aus"),
        (["--prompt", "a boy", "--negative-aus", "AU6=1"], "guide away"),
        (["--prompt", "a boy <AU6=3>", "--aus", "AU6=1"], "one of the two"),
        (["--prompt", "a boy <AU7=3>"], "AU7"),
        (["--prompt", ""], "`--prompt` is empty"),
        (["--prompt", " <AU6=3> "], "`--prompt` is empty"),
        (["--prompt", "a \udcff boy"], "Unicode"),
        (["--prompt", "a boy" * 2001], "`--prompt` has 10005 characters"),
        ([], "`--prompt` is empty"),
        (["--prompt", "a boy", "--seed", "-1"], "--seed"),
        (["--prompt", "a boy", "--seed", str(2**63)], "--seed"),
        (["--prompt", "a boy", "--seed", "one"], "--seed"),
        (["--prompt", "a boy", "--num-inference-steps", "0"], "`--num-inference-steps`"),
        (["--prompt", "a boy", "--guidance-scale", "nan"], "`--guidance-scale`"),
        (["--prompt", "a boy", "--au-guidance-scale", "strong"], "--au-guidance-scale"),
        (["--prompt", "a boy", "--au-scale", "inf"], "`--au-scale`"),
        (["--prompt", "a boy", "--height", "33"], "multiple of 8"),
        (["--prompt", "a boy", "--batch-size", "0"], "--batch-size"),
        (["--prompt", "a boy", "--device", "toaster"], "It finds cpu"),
        (["--prompt", "a boy", "--dtype", "int4"], "--dtype"),
        (["--prompt", "a boy", "--adapter-variant", "sd15"], "--adapter"),
        (["--prompt", "a boy", "--colour", "red"], "--colour"),
        (["--prompt", "a boy", "--sweep", "AU12=0:5"], "AU=FROM:TO:COUNT"),
        (["--prompt", "a boy", "--sweep", "AU12=0:5:1"], "count from 2"),
        (["--prompt", "a boy", "--sweep", "AU12=0:five:6"], "five"),
        (["--prompt", "a boy", "--sweep", "AU12=0:50:6"], "50"),
        (["--prompt", "a boy", "--sweep", "AU7=0:5:6"], "AU7"),
        (["--prompt", "a boy", "--sweep", "AU12=0:5:6", "--aus", "AU12=1"], "both set AU12"),
        (["--prompt", "a boy", "--sweep", "AU12=0:5:6", "--grid"], "not allowed with"),
        (["--prompt", "a boy", "--presets", "doubtfull"], "'doubtful'"),
        (["--prompt", "a boy", "--presets", "--aus", "AU6=1"], "--aus"),
        (["--demo", "--aus", "AU6=1"], "--aus"),
        (["--prompt", "a boy", "--fps", "9"], "`--aus-from`"),
        (["--prompt", "a boy", "--aus-tool", "pyfeat"], "`--aus-from`"),
        (["--prompt", "a boy", "--frames-between", "2"], "`--frames-between` is for an animation"),
        (["--prompt", "a boy", "--distribution", "a.json"], "`--dataset`"),
        (["--prompt", "a boy", "--aus-from", "table.csv"], "a folder of pictures, or an animation"),
    ],
)
def test_bad_options_are_one_line_before_any_model_is_loaded(options, part, no_model, tiny_sd_dir, tmp_path, capsys):
    output = tmp_path / "new" / "out.png"
    assert main(["--model", tiny_sd_dir, *options, "--output", str(output)]) == 2
    assert_one_error_line(capsys, part)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_output_is_an_error(capsys):
    assert main(["--prompt", "a boy"]) == 2
    assert_one_error_line(capsys, "--output")


@pytest.mark.parametrize("option", ["--model", "--adapter"])
@pytest.mark.parametrize("name", ["nowhere", "./no/where", "a/b/c", "tests/nowhere"])
def test_a_folder_that_is_not_there_is_an_error(option, name, no_model, tiny_sd_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = ["--model", tiny_sd_dir, "--prompt", "a boy", option, name]
    assert main([*options, "--output", str(tmp_path / "out.png")]) == 2
    assert_one_error_line(capsys, f"`{option}`", "neither a folder nor")


def test_a_folder_without_a_model_is_an_error(no_model, tmp_path, capsys):
    assert main(["--model", str(tmp_path), "--prompt", "a boy", "--output", str(tmp_path / "out.png")]) == 2
    assert_one_error_line(capsys, "model_index.json")


@pytest.mark.parametrize("name", ["file.txt/out.png", "out.jpg", "folder.png"])
def test_an_output_that_cannot_be_written_is_an_error(name, no_model, tiny_sd_dir, tmp_path, capsys):
    (tmp_path / "file.txt").write_text("")
    (tmp_path / "folder.png").mkdir()
    assert main(["--model", tiny_sd_dir, "--prompt", "a boy", "--output", str(tmp_path / name)]) == 2
    assert_one_error_line(capsys, "`--output`")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file.txt", "folder.png"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_an_error(no_model, tiny_sd_dir, tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert main(["--model", tiny_sd_dir, "--prompt", "a boy", "--output", str(tmp_path / "a" / "b.png")]) == 2
    assert_one_error_line(capsys, "nothing can be written")


def test_an_adapter_for_another_base_is_an_error(tiny_sd_dir, tmp_path, capsys):
    unet = make_components(cross_attention_dim=48)["unet"]
    write_au_adapter(tmp_path / "adapter", make_adapter(unet), unet, "fineface")
    options = ["--model", tiny_sd_dir, "--adapter", str(tmp_path / "adapter"), "--prompt", "a boy"]
    assert main([*options, "--output", str(tmp_path / "out.png")]) == 2
    assert_one_error_line(capsys, "48", "32")
    assert not (tmp_path / "out.png").exists()


def test_aus_are_those_that_the_adapter_knows(tiny_sd_dir, tmp_path, capsys):
    unet = make_components()["unet"]
    adapter = AUAdapter.from_unet(unet, hidden_dim=HIDDEN_DIM, au_names=["AU4", "AU12L", "AU12R", "AU26"])
    write_au_adapter(tmp_path / "adapter", adapter, unet, "fineface")
    args = ["--model", tiny_sd_dir, "--adapter", str(tmp_path / "adapter"), "--num-inference-steps", "1"]
    args += ["--device", "cpu", "--prompt", "a boy", "--output", str(tmp_path / "a.png")]
    assert main([*args, "--aus", "smirk@0.5 + AU26=1"]) == 0
    assert read_metadata(tmp_path / "a.png")["aus"] == "AU12R=2 AU26=1"
    assert main([*args, "--presets", "smirk", "polite smile", "--overwrite"]) == 0
    assert read_metadata(tmp_path / "a.png")["rows"] == [["AU12R=4", "AU12=3"]]
    capsys.readouterr()
    assert main([*args, "--aus", "27C"]) != 0
    assert_one_error_line(capsys, "knows AU4, AU12L, AU12R, AU26. The nearest is AU26")
    (tmp_path / "adapter" / "au_encoder" / "config.json").write_text('{"au_names": ["AU3"]}')
    assert main([*args, "--aus", "4C"]) != 0
    assert_one_error_line(capsys, "config.json: `au_names` holds 'AU3'")


def test_aus_without_an_adapter_are_an_error(tiny_sd_dir, tmp_path, capsys):
    output = tmp_path / "out.png"
    assert main(["--model", tiny_sd_dir, "--prompt", "a boy", "--aus", "AU6=1", "--output", str(output)]) == 2
    assert_one_error_line(capsys, "--adapter")
    assert not output.exists()


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ('{"prompt": "a boy",}', "JSON"),
        ('["a boy"]', "no JSON object"),
        ('{"prompt": "\\ud800"}', "Unicode"),
        ('{"aus": "6C"}', "`prompt`"),
        ('{"prompt": 1}', "`prompt`"),
        ('{"prompt": "a boy", "aus": "AU7=1"}', "AU7"),
        ('{"prompt": "a boy", "aus": {"AU6": NaN}}', "AU6"),
        ('{"prompt": "a boy", "aus": ["6C", "12D"]}', "2 expressions"),
        ('{"prompt": "a boy", "aus": [1, 2]}', "count"),
        ('{"prompt": "a boy", "seed": true}', "`seed`"),
        ('{"prompt": "a boy", "seed": 1.5}', "`seed`"),
        ('{"prompt": "a boy", "num_inference_steps": 0}', "`num_inference_steps`"),
        ('{"prompt": "a boy", "au_scale": "1"}', "`au_scale`"),
        ('{"prompt": "a boy", "negative_prompt": 3}', "`negative_prompt`"),
        ('{"prompt": "a boy", "expression": "6C"}', "'expression'"),
        ('{"prompt": "a boy", "output": "out.jpg"}', "`output`"),
        ('{"prompt": "a boy", "output": "../out.png"}', "`output`"),
        ('{"prompt": "a boy", "output": "/out.png"}', "`output`"),
        ('{"prompt": "a boy", "output": "a\\u0000.png"}', "`output`"),
        ('{"prompt": "a boy", "output": "FIRST.png"}', "line 1"),
        ('{"prompt": "a boy", "output": "first.png/b.png"}', "the picture of line 1, and no folder"),
        ('{"prompt": "a boy", "output": "..\\\\x.png"}', "`output`"),
        ('{"prompt": "a boy", "output": "C:\\\\x.png"}', "`output`"),
        ('{"prompt": "a boy", "output": "%s.png"}' % ("ü" * 125), "more than 249 bytes"),
        ('{"prompt": "a boy", "seed": 1%s}' % ("0" * 400), "`seed`"),
        ('{"prompt": "a boy", "au_scale": 1%s}' % ("0" * 400), "`au_scale`"),
        ('{"prompt": "a boy", "height": 8000000000000}', "`height`"),
        ('{"prompt": %s}' % ("[" * 100_000), "JSON"),
        ('{"prompt": "%s"}' % ("a" * 10_001), "10001 characters"),
    ],
)
def test_a_bad_job_is_named_by_its_line(line, part, no_model, tiny_sd_dir, tmp_path, capsys):
    jobs = write_jobs(tmp_path / "jobs.jsonl", {"prompt": "a boy", "output": "first.png"}, "", line)
    assert main(["--model", tiny_sd_dir, "--batch", jobs, "--output", str(tmp_path / "out")]) == 2
    assert_one_error_line(capsys, "jobs.jsonl, line 3: ", part)
    assert not (tmp_path / "out").exists()


def test_a_batch_without_jobs_or_file_is_an_error(no_model, tiny_sd_dir, tmp_path, capsys):
    options = ["--model", tiny_sd_dir, "--output", str(tmp_path / "out"), "--batch"]
    assert main([*options, write_jobs(tmp_path / "jobs.jsonl", "")]) == 2
    assert_one_error_line(capsys, "no job")
    assert main([*options, str(tmp_path / "nowhere.jsonl")]) == 2
    assert_one_error_line(capsys, "nowhere.jsonl")


@pytest.mark.parametrize(
    "text", ['{"steps": 20}', '{"size": 100}', '{"num_inference_steps": 0}', "[20]", '{"guidance_scale": "high"}']
)
def test_bad_model_defaults_name_their_file(text, no_model, tmp_path, capsys):
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "fineface.json").write_text(text)
    assert main(["--model", str(tmp_path), "--prompt", "a boy", "--output", str(tmp_path / "out.png")]) == 2
    assert_one_error_line(capsys, "fineface.json: ")


# --------------------------------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------------------------------


def test_a_picture_says_how_it_was_made(model_args, tiny_adapter_dir, tmp_path, capsys):
    output = tmp_path / "new" / "out.png"
    options = ["--prompt", "ein Mädchen <6C+12D>", "--seed", "7", "--negative-prompt", "雨", "--guidance-scale", "3"]
    assert main([*model_args, *options, "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    metadata = read_metadata(output)
    assert metadata["prompt"] == "ein Mädchen" and metadata["negative_prompt"] == "雨"
    assert metadata["aus"] == "AU6=3 AU12=4" and metadata["seed"] == 7
    # Where they are on this disk is nobody's business.
    assert metadata["adapter"] == Path(tiny_adapter_dir).name and len(metadata["adapter_files"]) == 16
    assert str(tmp_path.parent) not in json.dumps(metadata)
    assert (metadata["num_inference_steps"], metadata["guidance_scale"], metadata["au_scale"]) == (2, 3.0, 1.0)
    assert metadata["versions"]["torch"] == version("torch") and metadata["dtype"] == "float32"
    with Image.open(output) as image:
        assert image.size == (SIZE, SIZE) and image.text["Description"] == "ein Mädchen [AU6=3 AU12=4]"
    assert [path.name for path in output.parent.iterdir()] == ["out.png"]


def test_a_picture_of_another_program_has_no_metadata(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    with pytest.raises(ValueError, match="no FineFace metadata"):
        read_metadata(tmp_path / "other.png")


def test_seed_and_aus_decide_the_picture(model_args, tmp_path):
    runs = {"a": ("6C", "1"), "again": ("AU6=3", "1"), "other_seed": ("6C", "2"), "other_aus": ("12C", "1")}
    for name, (aus, seed) in runs.items():
        options = ["--prompt", "a boy", "--aus", aus, "--seed", seed, "--output", str(tmp_path / f"{name}.png")]
        assert main([*model_args, *options]) == 0
    pictures = {name: pixels(tmp_path / f"{name}.png") for name in runs}
    assert (pictures["a"] == pictures["again"]).all()
    assert (pictures["a"] != pictures["other_seed"]).any()
    assert (pictures["a"] != pictures["other_aus"]).any()


def test_the_toy_model_is_named_without_its_folder():
    assert files._names(Weights(str(program.TOY_MODEL)))["model"] == "toy_faces/weights"


# --------------------------------------------------------------------------------------------------------------------
# Sheets
# --------------------------------------------------------------------------------------------------------------------


def test_a_sweep_is_a_labelled_row_of_one_person(model_args, tmp_path):
    output = tmp_path / "sweep.png"
    options = ["--prompt", "a boy", "--aus", "AU6=2.5", "--sweep", "AU12=-1:5:4", "--batch-size", "3"]
    assert main([*model_args, *options, "--output", str(output)]) == 0
    metadata = read_metadata(output)
    assert metadata["rows"] == [["AU6=2.5 AU12=-1", "AU6=2.5 AU12=1", "AU6=2.5 AU12=3", "AU6=2.5 AU12=5"]]
    assert "aus" not in metadata
    # The first picture of the sheet is the one that --aus gives alone.
    single = tmp_path / "single.png"
    assert main([*model_args, "--prompt", "a boy", "--aus", "AU6=2.5 AU12=-1", "--output", str(single)]) == 0
    sheet, picture = pixels(output), pixels(single)
    places = np.lib.stride_tricks.sliding_window_view(sheet, picture.shape)
    assert (np.abs(places - picture).max(axis=(-1, -2, -3)) <= 1).sum() == 1


@pytest.mark.parametrize(
    ("options", "rows"), [(["--grid"], [6] * 12), (["--demo"], [6] * 14), (["--presets", *PRESETS][:11], [8, 2])]
)
def test_sheets_hold_all_pictures(options, rows, model_args, tmp_path):
    output = tmp_path / "sheet.png"
    options = ["--prompt", "a boy", "--num-inference-steps", "1", "--batch-size", "32", *options]
    assert main([*model_args, *options, "--output", str(output)]) == 0
    assert [len(row) for row in read_metadata(output)["rows"]] == rows


def test_a_table_has_its_labels_and_all_pixels():
    colors = ["red", "green", "blue"]
    pictures = [[Image.new("RGB", (64, 64), color) for color in colors] for _ in range(2)]
    plain = np.asarray(draw_table(Table(pictures, [], ["", "", ""])))
    assert (plain[-64:, :64] == (255, 0, 0)).all() and (plain[-64:, -64:] == (0, 0, 255)).all()
    labelled = draw_table(Table(pictures, ["AU1\nInner Brow Raiser", "AU2"], ["0", "1", "disgustedly surprised"]))
    left, top = labelled.width - plain.shape[1], labelled.height - 2 * 64 - 2
    image = np.asarray(labelled)
    assert left > 0 and (image[-64:, left : left + 64] == (255, 0, 0)).all()
    for label in (image[:top, left : left + 64], image[top : top + 64, :left], image[-64:, :left], image[:top, -64:]):
        assert (label.min() < 128) and (label == 255).any()
    sheet = draw_sheet([[Table(pictures, [], colors)] * 2, [Table(pictures, [], colors)]], "a title " * 99)
    assert sheet.width > 6 * 64 and sheet.height > 4 * 64 and (np.asarray(sheet)[:, -4:] == 255).all()


# --------------------------------------------------------------------------------------------------------------------
# Batches
# --------------------------------------------------------------------------------------------------------------------


def test_a_batch_equals_its_singles(model_args, tmp_path):
    jobs = [
        {"prompt": "a boy", "aus": "6C+12D", "seed": 1},
        {"prompt": "a girl in a park", "aus": {"AU4": 5}, "seed": 2, "negative_prompt": "hat", "negative_aus": "12E"},
        {"prompt": "a man", "seed": 3},
        {"prompt": "a man", "aus": "sad", "seed": 3, "au_scale": 0.5, "au_guidance_scale": 4},
    ]
    path = write_jobs(tmp_path / "jobs.jsonl", *jobs)
    assert main([*model_args, "--batch", path, "--output", str(tmp_path / "batch"), "--batch-size", "4"]) == 0
    for number, job in enumerate(jobs, start=1):
        path = write_jobs(tmp_path / "single.jsonl", {**job, "output": f"single/{number:05d}.png"})
        assert main([*model_args, "--batch", path, "--output", str(tmp_path)]) == 0
        batch, single = (tmp_path / folder / f"{number:05d}.png" for folder in ("batch", "single"))
        assert np.abs(pixels(batch) - pixels(single)).max() <= 1
        assert read_metadata(batch) == read_metadata(single)


def test_only_jobs_of_equal_settings_share_a_call():
    jobs = [Job("a", "AU1=1"), Job("b"), Job("c", "AU2=1", seed=4), Job("d", "AU1=1", au_scale=2.0), Job("e", "AU5=1")]
    assert make_batches(jobs, 2) == [[jobs[0], jobs[2]], [jobs[4]], [jobs[1]], [jobs[3]]]


def test_a_batch_skips_what_is_there_and_refuses_what_differs(model_args, tmp_path, capsys):
    output = tmp_path / "out"
    options = [*model_args, "--output", str(output), "--batch"]
    first = {"prompt": "a boy", "aus": "6C", "output": "a.png"}
    assert main([*options, write_jobs(tmp_path / "jobs.jsonl", first)]) == 0
    before = (output / "a.png").stat().st_mtime_ns
    # An unfinished file of a run that was killed.
    (output / ".b.png.part").write_bytes(b"half")
    path = write_jobs(tmp_path / "jobs.jsonl", first, {**first, "output": "b.png"}, {**first, "output": "c/d.png"})
    assert main([*options, path]) == 0
    assert capsys.readouterr().out.endswith("2 new pictures, 1 from before\n")
    assert (output / "a.png").stat().st_mtime_ns == before
    assert sorted(path.name for path in output.rglob("*.*")) == ["a.png", "b.png", "d.png"]
    # The same file name for another job.
    path = write_jobs(tmp_path / "jobs.jsonl", {**first, "seed": 5}, {**first, "output": "new.png"})
    assert main([*options, path]) == 2
    assert_one_error_line(capsys, "a.png", "`seed` = 0 in place of 5", "--overwrite")
    assert not (output / "new.png").exists()
    assert main([*options, path, "--overwrite"]) == 0
    assert read_metadata(output / "a.png")["seed"] == 5


def test_a_batch_refuses_a_picture_of_another_program(model_args, no_model, tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    path = write_jobs(tmp_path / "jobs.jsonl", {"prompt": "a boy", "output": "a.png"})
    assert main([*model_args, "--batch", path, "--output", str(tmp_path)]) == 2
    assert_one_error_line(capsys, "another program")


@pytest.mark.parametrize("damage", ["cut", "bomb", "metadata"])
def test_a_damaged_picture_is_drawn_again_or_named(damage, model_args, tmp_path, capsys, monkeypatch):
    path = write_jobs(tmp_path / "jobs.jsonl", {"prompt": "a boy", "output": "a.png"})
    options = [*model_args, "--batch", path, "--output", str(tmp_path)]
    assert main(options) == 0
    whole = (tmp_path / "a.png").read_bytes()
    capsys.readouterr()
    if damage == "cut":
        # Its metadata are at its beginning.
        (tmp_path / "a.png").write_bytes(whole[: len(whole) * 2 // 3])
        assert main(options) == 0
        assert capsys.readouterr().out.endswith("1 new pictures, 0 from before\n")
        assert (tmp_path / "a.png").read_bytes() == whole
        return
    if damage == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8)
    else:
        chunks = PngInfo()
        chunks.add_itxt("fineface", "[1, 2]")
        Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=chunks)
    assert main(options) == 2
    assert_one_error_line(capsys, "a.png", "by another program")


def test_a_second_run_into_the_same_folder_is_refused(model_args, tmp_path, capsys, monkeypatch):
    options = [*model_args, "--batch", write_jobs(tmp_path / "jobs.jsonl", {"prompt": "a boy"}), "--output"]
    draw = model.generate_batch

    def draw_while_another_run_begins(pipeline, jobs):
        assert main([*options, str(tmp_path / "out")]) == 2
        assert "is being written by another run" in capsys.readouterr().err
        return draw(pipeline, jobs)

    monkeypatch.setattr(model, "generate_batch", draw_while_another_run_begins)
    assert main([*options, str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["00001.png"]


def test_a_finished_batch_loads_no_model(model_args, tmp_path, monkeypatch):
    options = [*model_args, "--batch", write_jobs(tmp_path / "jobs.jsonl", {"prompt": "a boy"}), "--output"]
    assert main([*options, str(tmp_path)]) == 0
    monkeypatch.delattr(model, "load_pipeline")
    assert main([*options, str(tmp_path)]) == 0


def test_jobs_take_what_they_leave_out_from_the_command_line(model_args, tmp_path):
    path = write_jobs(tmp_path / "jobs.jsonl", "", {"aus": "6C"}, {"prompt": "a girl", "seed": 3})
    assert main([*model_args, "--prompt", "a boy", "--seed", "9", "--batch", path, "--output", str(tmp_path)]) == 0
    found = [read_metadata(tmp_path / f"0000{number}.png") for number in (2, 3)]
    assert [(job["prompt"], job["aus"], job["seed"]) for job in found] == [
        ("a boy", "AU6=3", 9),
        ("a girl", None, 3),
    ]


GENERATE = {
    "code": f"import runpy; runpy.run_path({str(ROOT / 'generate.py')!r}, run_name='__main__')",
    "path": [ROOT],
}


def test_a_killed_batch_goes_on_where_it_was(model_args, processes, tmp_path):
    output = tmp_path / "out"
    path = write_jobs(tmp_path / "jobs.jsonl", *({"prompt": "a boy", "aus": "6C", "seed": i} for i in range(6)))
    options = [*model_args, "--batch-size", "1", "--batch", path, "--output", str(output)]
    (answer,) = processes(GENERATE | {"arguments": options, "kill": ["os.replace", "00003.png"]})
    assert answer["status"] == -signal.SIGKILL, answer
    finished = {path: path.stat().st_mtime_ns for path in output.glob("[0-9]*.png")}
    assert sorted(path.name for path in finished) == ["00001.png", "00002.png"]
    assert all(pixels(path).shape == (SIZE, SIZE, 3) for path in finished)
    assert main(options) == 0
    assert [read_metadata(output / f"{i + 1:05d}.png")["seed"] for i in range(6)] == list(range(6))
    assert all(path.stat().st_mtime_ns == modified for path, modified in finished.items())
    assert len(list(output.iterdir())) == 6


def test_pictures_are_written_while_the_next_are_drawn(model_args, tmp_path, monkeypatch):
    """The model does not wait for the disk, and at the end everything is there."""
    events, all_drawn = [], threading.Event()
    write, draw = files.write_picture, model.generate_batch

    def slow_write(image, path, metadata):
        assert all_drawn.wait(60)
        write(image, path, metadata)
        events.append(path.name)

    def noted_draw(pipeline, jobs):
        images = draw(pipeline, jobs)
        events.append("draw")
        if len(events) == 3:
            all_drawn.set()
        return images

    monkeypatch.setattr(files, "write_picture", slow_write)
    monkeypatch.setattr(model, "generate_batch", noted_draw)
    path = write_jobs(tmp_path / "jobs.jsonl", *({"prompt": "a boy", "seed": i} for i in range(3)))
    options = [*model_args, "--num-inference-steps", "1", "--batch-size", "1", "--batch", path]
    assert main([*options, "--output", str(tmp_path)]) == 0
    assert events == ["draw"] * 3 + ["00001.png", "00002.png", "00003.png"]


def test_pictures_are_drawn_with_the_lora_in_the_weights(model_args, tmp_path, monkeypatch):
    """A step then costs what one of plain Stable Diffusion costs, and the pictures are those of the LoRA beside it."""
    weights = Weights(model_args[1], model_args[3])
    job = Job("a boy", aus="6C+12D", num_inference_steps=2)
    beside = model.load_pipeline(weights, torch.device("cpu"), torch.float32)
    expected = np.asarray(model.generate_batch(beside, [job])[0]).astype(int)
    draw, num_loras = model.generate_batch, []

    def noted_draw(pipeline, jobs):
        num_loras.append(sum(hasattr(module, "lora_A") for module in pipeline.unet.modules()))
        return draw(pipeline, jobs)

    monkeypatch.setattr(model, "generate_batch", noted_draw)
    path = tmp_path / "a.png"
    assert main([*model_args, "--prompt", job.prompt, "--aus", job.aus, "--output", str(path)]) == 0
    assert num_loras == [0] and any(hasattr(module, "lora_A") for module in beside.unet.modules())
    assert np.abs(pixels(path) - expected).max() <= 1


def test_a_picture_that_cannot_be_written_is_an_error(model_args, tmp_path, capsys, monkeypatch):
    def full_disk(image, path, metadata):
        raise OSError("No space left on device")

    monkeypatch.setattr(files, "write_picture", full_disk)
    path = write_jobs(tmp_path / "jobs.jsonl", {"prompt": "a boy"})
    assert main([*model_args, "--batch", path, "--output", str(tmp_path)]) == 2
    assert "error: No space left on device\n" in capsys.readouterr().err


def test_two_processes_share_a_batch(model_args, processes, tmp_path, capsys):
    jobs = [{"prompt": "a boy", "aus": aus, "seed": i} for i, aus in enumerate(("6C", None, "12D", "4", "1+2"))]
    options = [*model_args, "--batch", write_jobs(tmp_path / "jobs.jsonl", *jobs, jobs[0]), "--output"]
    # What torchrun and accelerate launch tell each of the processes that they start.
    environment = free_address() | {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2"}
    run = GENERATE | {"arguments": [*options, tmp_path / "two"]}
    answers = processes(*(run | {"environment": environment | {"RANK": i, "LOCAL_RANK": i}} for i in ("0", "1")))
    assert [answer["status"] for answer in answers] == [0, 0], answers
    outputs = [answer["output"] for answer in answers]
    assert outputs == [f"{tmp_path / 'two'}: 6 new pictures, 0 from before\n", ""]
    assert main([*options, str(tmp_path / "one"), "--batch-size", "1"]) == 0
    for number in range(1, 7):
        one, two = (tmp_path / folder / f"{number:05d}.png" for folder in ("one", "two"))
        assert np.abs(pixels(one) - pixels(two)).max() <= 1
        assert read_metadata(one) == read_metadata(two)
    # Nothing is left to do, and nothing to load, for one process.
    assert main([*options, str(tmp_path / "two")]) == 0
    assert capsys.readouterr().out.endswith("0 new pictures, 6 from before\n")


@pytest.mark.slow
def test_an_error_of_several_processes_is_one_line(model_args, tmp_path):
    path = write_jobs(tmp_path / "jobs.jsonl", {"prompt": "a boy", "aus": "AU7=1"})
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    options = [str(ROOT / "generate.py"), *model_args, "--batch", path, "--output", str(tmp_path / "out")]
    result = subprocess.run([*launcher, *options], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode != 0
    assert result.stderr.count("error: ") == 1 and "jobs.jsonl, line 1: " in result.stderr


def test_several_processes_do_not_share_one_gpu(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="a device of its own"):
        program.start_processes(torch.device("cuda:1"))


def test_the_work_is_shared_evenly():
    processes = program.start_processes(torch.device("cpu"))
    assert processes.is_main_process and program.share_of(processes, [1, 2, 3]) == [1, 2, 3]
    shares = []
    for index in range(3):
        processes = SimpleNamespace(process_index=index, num_processes=3)
        shares.append(program.share_of(processes, list(range(8))))
    assert sorted(sum(shares, [])) == list(range(8)) and max(map(len, shares)) - min(map(len, shares)) <= 1


# --------------------------------------------------------------------------------------------------------------------
# Tables of AUs, and animations
# --------------------------------------------------------------------------------------------------------------------


def write_openface(path: Path, *rows: tuple[int, dict[str, float]]) -> str:
    """A table as OpenFace writes it: for each frame whether there is a face, and intensities by name."""
    names = [f"AU{int(name[2:]):02d}_r" for name in AU_NAMES]
    lines = [", ".join(["frame", "timestamp", "confidence", "success", *names])]
    for number, (success, aus) in enumerate(rows, start=1):
        values = [str(aus.get(name, 0.0)) for name in AU_NAMES]
        lines.append(", ".join([str(number), "0.0", "0.98" if success else "0.0", str(success), *values]))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_a_table_becomes_pictures_of_one_person(model_args, tmp_path, capsys):
    table = write_openface(
        tmp_path / "face.csv", (1, {"AU12": 2.5}), (0, {}), (1, {}), (1, {"AU12": 5.0, "AU6": 1.25})
    )
    output = tmp_path / "out"
    options = [*model_args, "--prompt", "a boy", "--seed", "3", "--aus-from", table, "--output", str(output)]
    assert main(options) == 0
    assert capsys.readouterr().out == f"{output}: 3 new pictures, 0 from before, 1 rows without a face skipped\n"
    names = ["00002_1.png", "00004_3.png", "00005_4.png"]
    assert sorted(path.name for path in output.iterdir()) == names
    found = [read_metadata(output / name) for name in names]
    assert [job["aus"] for job in found] == ["AU12=2.5", "neutral", "AU6=1.25 AU12=5"]
    assert {(job["prompt"], job["seed"]) for job in found} == {("a boy", 3)}
    assert main(options) == 0
    assert "0 new pictures, 3 from before" in capsys.readouterr().out
    single = tmp_path / "single.png"
    assert main([*model_args, "--prompt", "a boy", "--seed", "3", "--aus", "12=2.5", "--output", str(single)]) == 0
    assert np.abs(pixels(single) - pixels(output / names[0])).max() <= 1


def test_one_face_of_several_is_drawn_and_said(model_args, tmp_path, capsys, caplog):
    lines = ["frame, face_id, success, AU12_r", "1, 0, 1, 1.0", "1, 1, 1, 4.0", "2, 0, 0, -nan(ind)", "2, 1, 1, 5.0"]
    (tmp_path / "two.csv").write_text("\n".join(lines))
    options = [*model_args, "--prompt", "a boy", "--aus-from", str(tmp_path / "two.csv"), "--output"]
    for face, extra, aus in ((0, [], ["AU12=1"]), (1, ["--aus-face", "1"], ["AU12=4", "AU12=5"])):
        caplog.clear()
        assert main([*options, str(tmp_path / f"out{face}"), *extra]) == 0
        assert [read_metadata(path)["aus"] for path in sorted((tmp_path / f"out{face}").iterdir())] == aus
        assert ("Face 0 (1 rows) is drawn, and left out are 1 (2 rows)" in caplog.text) == (not extra)
    assert main([*options, str(tmp_path / "out7"), "--aus-face", "7"]) == 2
    assert "has no face 7. It has the faces 0, 1" in capsys.readouterr().err


def test_the_tool_of_a_table_can_be_said(model_args, tmp_path, caplog):
    (tmp_path / "fex.csv").write_text("input,AU01,AU12,mouthSmileLeft,mouthSmileRight\na.png,0,1.0,0.2,0.2\n")
    options = [*model_args, "--prompt", "a boy", "--aus-from", str(tmp_path / "fex.csv"), "--output"]
    for name, extra, aus in (("a", [], "AU12=5"), ("b", ["--aus-tool", "mediapipe"], "AU12=1")):
        assert main([*options, str(tmp_path / name), *extra]) == 0
        assert read_metadata(tmp_path / name / "00002_a.png")["aus"] == aus
    assert caplog.text.count("has AUs of pyfeat and blendshapes") == 1


def test_blendshapes_become_pictures(model_args, tmp_path):
    shapes = ("browInnerUp", "browOuterUpLeft", "browOuterUpRight", "browDownLeft", "browDownRight", "eyeWideLeft")
    shapes += ("eyeWideRight", "cheekSquintLeft", "cheekSquintRight", "noseSneerLeft", "noseSneerRight", "jawOpen")
    shapes += ("mouthSmileLeft", "mouthSmileRight", "mouthFrownLeft", "mouthFrownRight", "mouthShrugLower")
    shapes += ("mouthStretchLeft", "mouthStretchRight", "mouthClose", "mouthLowerDownLeft", "mouthLowerDownRight")
    shapes += ("mouthUpperUpLeft", "mouthUpperUpRight")
    row = dict.fromkeys(shapes, 0.0) | {"mouthSmileLeft": 0.8, "mouthSmileRight": 0.4}
    table = tmp_path / "arkit.json"
    table.write_text(json.dumps([row]))
    assert main([*model_args, "--prompt", "a boy", "--aus-from", str(table), "--output", str(tmp_path / "out")]) == 0
    assert read_metadata(tmp_path / "out" / "00001.png")["aus"] == "AU12=3"


@pytest.mark.parametrize(
    ("text", "options", "part"),
    [
        ("frame,AU99\n1,2\n", [], "table.csv"),
        ("AU1\n", ["--aus", "6C"], "`--aus`"),
        (",".join(AU_NAMES) + "\n", [], "no row with a face"),
        (",".join(AU_NAMES) + "\n" + ",".join("x" * 12) + "\n", [], "line 2"),
    ],
)
def test_a_bad_table_is_an_error(text, options, part, no_model, tiny_sd_dir, tmp_path, capsys):
    (tmp_path / "table.csv").write_text(text)
    options = ["--model", tiny_sd_dir, "--prompt", "a boy", "--aus-from", str(tmp_path / "table.csv"), *options]
    assert main([*options, "--output", str(tmp_path / "out")]) == 2
    assert_one_error_line(capsys, part)
    assert not (tmp_path / "out").exists()


def test_a_table_becomes_a_gif(model_args, tmp_path, capsys, monkeypatch):
    table = write_openface(tmp_path / "face.csv", (1, {}), (1, {"AU12": 5.0, "AU26": 5.0}))
    output = tmp_path / "face.gif"
    options = [*model_args, "--prompt", "a boy", "--aus-from", table, "--frames-between", "2", "--fps", "10"]
    options += ["--output", str(output), "--batch-size", "1"]
    # Stopped after two frames, it goes on from there.
    draw, calls = model.generate_batch, []

    def stop_at_the_third(pipeline, jobs):
        calls.append(jobs)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return draw(pipeline, jobs)

    monkeypatch.setattr(model, "generate_batch", stop_at_the_third)
    assert main(options) == 130
    assert not output.exists()
    assert main(options) == 0
    assert len(calls) == 3 + 2
    assert capsys.readouterr().out == f"{output}: 4 frames from 2 rows\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["face.csv", "face.gif"]
    with Image.open(output) as animation:
        assert animation.n_frames == 4 and animation.info["duration"] == 100 and animation.info["loop"] == 0
        assert json.loads(animation.info["comment"])["rows"] == [["neutral", "AU12=5 AU26=5"]]


def test_an_animation_shows_its_pictures_in_order(tmp_path):
    colors = ("red", "green", "blue")
    write_animation((Image.new("RGB", (16, 16), color) for color in colors), tmp_path / "a.gif", 1000)
    with Image.open(tmp_path / "a.gif") as animation:
        assert animation.info["duration"] == 20
        for index, color in enumerate(colors):
            animation.seek(index)
            assert animation.convert("RGB").getpixel((8, 8)) == Image.new("RGB", (1, 1), color).getpixel((0, 0))


def test_a_film_shows_its_pictures_in_order(tmp_path):
    av = pytest.importorskip("av")
    colors = ((200, 40, 40), (40, 200, 40), (40, 40, 200))
    pictures = (Image.new("RGB", (32, 32), color) for color in colors)
    write_animation(pictures, tmp_path / "new" / "a.mp4", 12.5, "who it is")
    with av.open(str(tmp_path / "new" / "a.mp4")) as film:
        assert film.metadata["comment"] == "who it is" and film.streams.video[0].average_rate == 12.5
        frames = [frame.to_image().getpixel((16, 16)) for frame in film.decode(video=0)]
    assert np.abs(np.array(frames) - np.array(colors)).max() < 12


def test_a_film_without_its_library_is_an_error(no_model, tiny_sd_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    table = write_openface(tmp_path / "face.csv", (1, {}))
    options = ["--model", tiny_sd_dir, "--prompt", "a boy", "--aus-from", table]
    assert main([*options, "--output", str(tmp_path / "face.mp4")]) == 2
    assert_one_error_line(capsys, "pip install av")


# --------------------------------------------------------------------------------------------------------------------
# Data sets
# --------------------------------------------------------------------------------------------------------------------


def write_distribution(path: Path, **changes) -> str:
    values = json.loads(DEFAULT_DISTRIBUTION.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return str(path)


def aus_of(row: dict) -> list[float]:
    return [row[name] for name in AU_NAMES]


def test_a_data_set_is_made_and_resumed_in_the_training_format(model_args, tmp_path, capsys):
    from datasets import load_dataset

    output = tmp_path / "data"
    options = [*model_args, "--num-inference-steps", "1", "--output", str(output), "--dataset"]
    assert main([*options, "5"]) == 0
    assert capsys.readouterr().out == f"{output}: 5 new pictures, 0 from before\n"
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.png")}
    assert main([*options, "7"]) == 0
    assert capsys.readouterr().out == f"{output}: 2 new pictures, 5 from before\n"
    assert all(path.stat().st_mtime_ns == modified for path, modified in before.items())
    dataset = load_dataset("imagefolder", data_dir=str(output), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(dataset) == 7 and set(dataset.column_names) == {"image", "text", *AU_NAMES, "source", "subject"}
    lines = [json.loads(line) for line in (output / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in lines:
        shown = read_metadata(output / line["file_name"])
        assert shown["prompt"] == line["text"]
        assert torch.allclose(parse_aus(shown["aus"])[0], torch.tensor(aus_of(line)), atol=1e-6)
    capsys.readouterr()
    # Fewer would leave pictures without a label, and another distribution is another data set.
    assert main([*options, "6"]) == 2
    assert_one_error_line(capsys, "7 pictures")
    # ... of a run that was killed before it wrote them, too.
    (output / "metadata.jsonl").unlink()
    assert main([*options, "6"]) == 2
    assert_one_error_line(capsys, "7 pictures")
    other = write_distribution(tmp_path / "other.json", prompts=["a boy"])
    assert main([*options, "7", "--distribution", other]) == 2
    assert_one_error_line(capsys, "--overwrite")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"prompts": None}, "`prompts` is missing"),
        ({"prompts": ["a {tall} boy"]}, "{tall}"),
        ({"words": {"person": "man"}}, "`words`"),
        ({"colours": []}, "'colours'"),
        ({"pictures_per_subject": 0}, "`pictures_per_subject`"),
        ({"expressions": [{"aus": "6C"}]}, "`expressions[0]`: `weight`"),
        ({"expressions": [{"weight": 1}]}, "either `aus`"),
        ({"expressions": [{"weight": 1, "aus": "AU7"}]}, "AU7"),
        ({"expressions": [{"weight": 1, "aus": "AU12=6"}]}, "0 to 5"),
        ({"expressions": [{"weight": 1, "count": [1, 2]}]}, "`intensity`"),
        ({"expressions": [{"weight": 1, "count": [2, 1], "intensity": [0, 5]}]}, "`count`"),
        ({"expressions": [{"weight": 1, "count": [1, 13], "intensity": [0, 5]}]}, "`count`"),
        ({"expressions": [{"weight": 1, "aus": "6C", "intensity": [0, 6]}]}, "`intensity`"),
    ],
)
def test_a_bad_distribution_is_an_error(changes, part, no_model, tiny_sd_dir, tmp_path, capsys):
    path = write_distribution(tmp_path / "bad.json", **changes)
    options = ["--model", tiny_sd_dir, "--dataset", "3", "--distribution", path, "--output", str(tmp_path / "out")]
    assert main(options) == 2
    assert_one_error_line(capsys, "bad.json: ", part)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "part"),
    [(["--dataset", "0"], "--dataset"), (["--dataset", "2", "--prompt", "a boy"], "Leave out `--prompt`")],
)
def test_a_bad_data_set_is_an_error(options, part, no_model, tiny_sd_dir, tmp_path, capsys):
    assert main(["--model", tiny_sd_dir, *options, "--output", str(tmp_path / "out")]) == 2
    assert_one_error_line(capsys, part)


def test_ctrl_c_is_one_line_and_130(model_args, tmp_path, capsys, monkeypatch):
    def generate_batch(pipeline, jobs):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(model, "generate_batch", generate_batch)
    assert main([*model_args, "--prompt", "a boy", "--output", str(tmp_path / "out.png")]) == 130
    assert "Traceback" not in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def imports_torch(argv: list[str]) -> subprocess.CompletedProcess:
    """Run generate.py. Its last line says whether torch or diffusers was imported."""
    code = "import atexit, sys; atexit.register(lambda: print({'torch', 'diffusers'} & set(sys.modules)));"
    code += f"import generate; sys.exit(generate.main({argv!r}))"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_help_is_quick_and_needs_no_model():
    result = imports_torch(["-h"])
    assert result.returncode == 0, result.stderr
    assert "--sweep" in result.stdout and result.stdout.endswith("\nset()\n") and result.stderr == ""


@pytest.mark.parametrize("options", [["--promt", "a boy"], ["--prompt", "a boy", "--batch-size", "0"]])
def test_a_typing_error_is_reported_without_importing_torch(options):
    result = imports_torch([*options, "--output", "out.png"])
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stdout == "set()\n"


def test_the_docs_have_every_au_of_the_toy_model():
    text = (ROOT / "docs" / "expressions.md").read_text(encoding="utf-8")
    for unit in action_units_of(read_au_names(SIDED)):
        assert f"| {unit.name} | {unit.facs_name} | {unit.hint} |" in text


def test_the_commands_of_the_docs_for_the_sided_adapter_are_read():
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", ROOT / "docs" / "expressions.md")]
    commands = re.findall(r"generate\.py (.* toy_faces/weights/sided .*)", "\n".join([*texts, generate.__doc__]))
    for command in commands:
        args, au_names = generate.parse_args(shlex.split(command)), read_au_names(SIDED)
        job = make_job({"prompt": args.prompt, "aus": getattr(args, "aus", None)}, au_names=au_names)
        sheet = sheet_of(job, args, au_names)
        jobs = [job] if sheet is None else sheet[0][0].rows[0]
        with pytest.raises(ValueError, match="know"):
            # The default adapter has no sides.
            [make_job({"prompt": "a girl", "aus": job.aus}) for job in jobs]
    assert len(commands) == 6
