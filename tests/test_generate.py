import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_adapter, make_components
from PIL import Image

import generate
from action_units import ACTION_UNITS, AU_NAMES, PRESETS
from au_encoder import write_au_adapter
from contact_sheet import Table, draw_sheet, draw_table
from generate import Job, Weights, main, make_batches, make_job, read_metadata


ROOT = Path(__file__).resolve().parent.parent
SIZE = 32


@pytest.fixture
def model_args(tiny_sd_dir, tiny_adapter_dir) -> list[str]:
    return ["--model", tiny_sd_dir, "--adapter", tiny_adapter_dir, "--num-inference-steps", "2", "--device", "cpu"]


@pytest.fixture
def no_model(monkeypatch):
    """Whoever comes as far as loading a model fails."""

    def load_pipeline(*args):
        raise AssertionError("A model was loaded.")

    monkeypatch.setattr(generate, "load_pipeline", load_pipeline)


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
    assert metadata["aus"] == "AU6=3 AU12=4" and metadata["seed"] == 7 and metadata["adapter"] == tiny_adapter_dir
    assert (metadata["num_inference_steps"], metadata["guidance_scale"], metadata["au_scale"]) == (2, 3.0, 1.0)
    assert metadata["versions"]["torch"] == torch.__version__ and metadata["dtype"] == "float32"
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


def test_the_model_folder_brings_defaults_that_options_override(tmp_path):
    (tmp_path / "fineface.json").write_text('{"num_inference_steps": 20, "au_guidance_scale": 5, "size": 128}')
    defaults = generate.read_model_defaults(str(tmp_path))
    job = make_job({"prompt": "a boy", **defaults, "au_guidance_scale": None})
    assert job == Job("a boy", num_inference_steps=20, height=128, width=128)


def test_the_embedded_model_is_named_without_its_folder():
    assert generate._names(Weights(str(generate.EMBEDDED_MODEL)))["model"] == "toy_faces/weights"


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


def test_tables_name_what_they_show():
    job = Job("a boy", aus="AU4=1")
    grid = generate.grid_table(job)
    assert [len(row) for row in grid.rows] == [6] * len(AU_NAMES)
    assert [label.split("\n")[0] for label in grid.row_labels] == list(AU_NAMES)
    assert grid.column_labels == ["0", "1", "2", "3", "4", "5"]
    assert (
        grid.rows[6][5].aus == "AU4=1 AU12=5" and grid.rows[6][0].aus == "AU4=1" and grid.rows[2][0].aus == "neutral"
    )
    presets = generate.preset_table(Job("a boy"), ["polite smile", "AU6=1"])
    assert [job.aus for job in presets.rows[0]] == ["AU12=3", "AU6=1"]
    assert presets.column_labels == ["polite smile", "AU6=1"]
    sweep = generate.sweep_table(Job("a boy"), "12=0:1:4")
    assert sweep.column_labels == ["0", "0.333", "0.667", "1"] and sweep.row_labels == ["AU12\nLip Corner Puller"]


def test_the_demo_has_every_au_and_presets_in_the_same_columns():
    grids, presets = generate.demo_tables(Job("a boy"))
    assert [label.split("\n")[0] for table in grids for label in table.row_labels] == list(AU_NAMES)
    assert all(label in PRESETS for table in presets for label in table.column_labels)
    assert {len(row) for table in [*grids, *presets] for row in table.rows} == {6}


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


def test_a_finished_batch_loads_no_model(model_args, tmp_path, monkeypatch):
    options = [*model_args, "--batch", write_jobs(tmp_path / "jobs.jsonl", {"prompt": "a boy"}), "--output"]
    assert main([*options, str(tmp_path)]) == 0
    monkeypatch.delattr(generate, "load_pipeline")
    assert main([*options, str(tmp_path)]) == 0


def test_jobs_take_what_they_leave_out_from_the_command_line(model_args, tmp_path):
    path = write_jobs(tmp_path / "jobs.jsonl", "", {"aus": "6C"}, {"prompt": "a girl", "seed": 3})
    assert main([*model_args, "--prompt", "a boy", "--seed", "9", "--batch", path, "--output", str(tmp_path)]) == 0
    found = [read_metadata(tmp_path / f"0000{number}.png") for number in (2, 3)]
    assert [(job["prompt"], job["aus"], job["seed"]) for job in found] == [
        ("a boy", "AU6=3", 9),
        ("a girl", None, 3),
    ]


def test_a_killed_batch_goes_on_where_it_was(model_args, tmp_path):
    output = tmp_path / "out"
    path = write_jobs(tmp_path / "jobs.jsonl", *({"prompt": "a boy", "aus": "6C", "seed": i} for i in range(6)))
    options = [*model_args, "--num-inference-steps", "12", "--batch-size", "1", "--batch", path]
    process = subprocess.Popen(
        [sys.executable, ROOT / "generate.py", *options, "--output", output], cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while len(list(output.glob("[0-9]*.png"))) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in output.glob("[0-9]*.png")}
    assert 2 <= len(finished) < 6
    assert all(pixels(path).shape == (SIZE, SIZE, 3) for path in finished)
    assert main([*options, "--output", str(output)]) == 0
    assert [read_metadata(output / f"{i + 1:05d}.png")["seed"] for i in range(6)] == list(range(6))
    assert all(path.stat().st_mtime_ns == modified for path, modified in finished.items())
    assert len(list(output.iterdir())) == 6


def test_ctrl_c_is_one_line_and_130(model_args, tmp_path, capsys, monkeypatch):
    def generate_batch(pipeline, jobs):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(generate, "generate_batch", generate_batch)
    assert main([*model_args, "--prompt", "a boy", "--output", str(tmp_path / "out.png")]) == 130
    assert "Traceback" not in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_help_is_quick_and_needs_no_model():
    code = "import atexit, sys; atexit.register(lambda: print('diffusers' in sys.modules)); import generate; generate."
    result = subprocess.run([sys.executable, "-c", code + "main(['-h'])"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--sweep" in result.stdout and result.stdout.endswith("\nFalse\n") and result.stderr == ""


def test_the_readme_has_every_au():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for unit in ACTION_UNITS:
        assert f"| {unit.name} | {unit.facs_name} | {unit.hint} |" in readme
