"""What is to be drawn; that bad input is an error, test_generate.py says."""

import pytest

from action_units import AU_NAMES, PRESETS
from drawing.jobs import (
    Job,
    demo_tables,
    grid_table,
    interpolate_jobs,
    make_job,
    preset_table,
    read_model_defaults,
    read_table_jobs,
    sweep_table,
)


def test_the_model_folder_brings_defaults_that_options_override(tmp_path):
    (tmp_path / "fineface.json").write_text('{"num_inference_steps": 20, "au_guidance_scale": 5, "size": 128}')
    defaults = read_model_defaults(str(tmp_path))
    job = make_job({"prompt": "a boy", **defaults, "au_guidance_scale": None})
    assert job == Job("a boy", num_inference_steps=20, height=128, width=128)


def test_tables_name_what_they_show():
    job = Job("a boy", aus="AU4=1")
    grid = grid_table(job)
    assert [len(row) for row in grid.rows] == [6] * len(AU_NAMES)
    assert [label.split("\n")[0] for label in grid.row_labels] == list(AU_NAMES)
    assert grid.column_labels == ["0", "1", "2", "3", "4", "5"]
    assert (
        grid.rows[6][5].aus == "AU4=1 AU12=5" and grid.rows[6][0].aus == "AU4=1" and grid.rows[2][0].aus == "neutral"
    )
    presets = preset_table(Job("a boy"), ["polite smile", "AU6=1"])
    assert [job.aus for job in presets.rows[0]] == ["AU12=3", "AU6=1"]
    assert presets.column_labels == ["polite smile", "AU6=1"]
    sweep = sweep_table(Job("a boy"), "12=0:1:4")
    assert sweep.column_labels == ["0", "0.333", "0.667", "1"] and sweep.row_labels == ["AU12\nLip Corner Puller"]


def test_the_demo_has_every_au_and_presets_in_the_same_columns():
    grids, presets = demo_tables(Job("a boy"))
    assert [label.split("\n")[0] for table in grids for label in table.row_labels] == list(AU_NAMES)
    assert all(label in PRESETS for table in presets for label in table.column_labels)
    assert {len(row) for table in [*grids, *presets] for row in table.rows} == {6}


def test_frames_go_evenly_from_row_to_row():
    keys = [Job("a boy", aus=aus) for aus in ("neutral", "AU12=3", "AU4=1")]
    frames = interpolate_jobs(keys, 2)
    expected = ["neutral", "AU12=1", "AU12=2", "AU12=3", "AU4=0.333 AU12=2", "AU4=0.667 AU12=1", "AU4=1"]
    assert [job.aus for job in frames.values()] == expected and sorted(frames) == list(frames)
    assert [job.aus for job in interpolate_jobs(keys, 0).values()] == ["neutral", "AU12=3", "AU4=1"]
    assert [job.aus for job in interpolate_jobs(keys[1:2], 5).values()] == ["AU12=3"]


SIDED = ("AU4", "AU12L", "AU12R", "AU26")


def test_tables_follow_the_aus_of_the_adapter():
    job = make_job({"prompt": "a boy <AU12L=3>", "negative_aus": "R12C"}, au_names=SIDED)
    assert (job.aus, job.negative_aus) == ("AU12L=3", "AU12R=3")
    grid = grid_table(Job("a boy", aus="AU12R=2"), SIDED)
    assert grid.row_labels[1:3] == ["AU12L\nLip Corner Puller, left", "AU12R\nLip Corner Puller, right"]
    assert [row[5].aus for row in grid.rows] == ["AU4=5 AU12R=2", "AU12L=5 AU12R=2", "AU12R=5", "AU12R=2 AU26=5"]
    assert [job.aus for job in sweep_table(Job("a boy"), "AU12=0:2:2", SIDED).rows[0]] == ["neutral", "AU12=2"]
    assert [job.aus for job in sweep_table(Job("a boy"), "12l=1:2:2", SIDED).rows[0]] == ["AU12L=1", "AU12L=2"]
    with pytest.raises(ValueError, match="both set AU12"):
        sweep_table(Job("a boy", aus="AU12R=1"), "AU12=0:2:2", SIDED)
    assert preset_table(Job("a boy"), ["smirk"], SIDED).rows[0][0].aus == "AU12R=4"
    grids, presets = demo_tables(Job("a boy"), SIDED)
    assert [label.split("\n")[0] for table in grids for label in table.row_labels] == list(SIDED) and not presets
    frames = interpolate_jobs([Job("a boy", aus="AU12L=2"), Job("a boy", aus="AU12R=2")], 1, SIDED)
    assert [job.aus for job in frames.values()] == ["AU12L=2", "AU12=1", "AU12R=2"]


def test_a_table_brings_the_sides_of_the_adapter(tmp_path):
    path = tmp_path / "shapes.csv"
    path.write_text("file_name,mouthSmileLeft,mouthSmileRight\na.png,0.8,0.2\n")
    say = [].append
    (job,) = read_table_jobs(path, Job("a boy"), say=say, au_names=SIDED)[0].values()
    assert job.aus == "AU12L=4 AU12R=1"
    (job,) = read_table_jobs(path, Job("a boy"), say=say)[0].values()
    assert job.aus == "AU12=2.5"
