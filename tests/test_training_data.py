"""From a data set to samples: what is read, what is refused, and what a sample is made of."""

import io
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from training_runs import (  # noqa: F401
    arguments_fixture,
    config_fixture,
    datasets_cache_fixture,
    faces_dir_fixture,
    write_faces,
)

from action_units import AU_NAMES
from train_fineface import main
from training.config import parse_args
from training.data import (
    PixelInputs,
    TrainingData,
    TrainingSamples,
    check_pictures,
    count_cut_captions,
    face_sides,
    face_weights,
    load_training_data,
    read_batches,
    smooth_au_intensities,
)
from training.encoders import load_encoders


# --------------------------------------------------------------------------------------------------------------------
# Labels and samples
# --------------------------------------------------------------------------------------------------------------------


def smoothed(value, count=4000, variance=0.2, rounding_prob=0.0):
    rng = np.random.default_rng(0)
    aus = np.full(12, value, np.float32)
    return np.stack([smooth_au_intensities(aus, variance, rounding_prob, rng) for _ in range(count)])


def test_labels_get_noise_of_the_variance_and_stay_in_range():
    inside = smoothed(2.5)
    assert inside.mean() == pytest.approx(2.5, abs=0.01)
    assert inside.var() == pytest.approx(0.2, rel=0.03)
    at_zero = smoothed(0.0)
    assert at_zero.min() == 0 and (at_zero == 0).mean() == pytest.approx(0.5, abs=0.02)
    assert smoothed(5.0).max() == 5
    assert (smoothed(2.5, count=10, variance=0) == 2.5).all()


def test_a_fifth_of_the_samples_is_rounded_as_a_whole():
    is_integer = smoothed(2.5, rounding_prob=0.2) % 1 == 0
    assert (is_integer.all(axis=1) == is_integer.any(axis=1)).all()
    assert is_integer[:, 0].mean() == pytest.approx(0.2, abs=0.02)


def make_samples(arguments, options):
    config = parse_args(arguments("run", options))
    data = load_training_data(config)
    encoders = load_encoders(config, torch.device("cpu"), torch.float32)
    return TrainingSamples(PixelInputs(data, encoders, 32), 1000, config), data


def test_samples_go_through_all_rows_in_another_order_each_epoch(arguments):
    samples, data = make_samples(arguments, "--au_noise_variance 0 --au_rounding_prob 0")
    row_of = {tuple(aus): row for row, aus in enumerate(data.au_intensities)}
    rows = [row_of[tuple(samples[number]["au_intensities"].numpy())] for number in range(20)]
    epochs = [rows[start : start + 5] for start in range(0, 20, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_dropped_aus_and_captions_have_their_shares(arguments):
    samples, _ = make_samples(arguments, "--au_drop_prob 0.3 --caption_drop_prob 0.6")
    drawn = [samples[number] for number in range(300)]
    empty = samples.inputs.caption(None)["input_ids"]
    assert np.mean([bool((s["au_intensities"] == 0).all()) for s in drawn]) == pytest.approx(0.3, abs=0.09)
    assert np.mean([torch.equal(s["input_ids"], empty) for s in drawn]) == pytest.approx(0.6, abs=0.09)
    assert len({int(s["timesteps"]) for s in drawn}) > 200
    assert not torch.equal(drawn[0]["noise"], drawn[0]["latent_noise"])
    assert not torch.equal(drawn[0]["noise"], drawn[1]["noise"])


def test_timesteps_are_as_likely_as_the_strategy_says(arguments):
    def drawn(options):
        samples, _ = make_samples(arguments, options)
        return np.array([samples._timestep(0, fraction) for fraction in np.linspace(0, 1, 20_000, endpoint=False)])

    def share(timesteps, begin, end):
        return ((timesteps >= begin) & (timesteps < end)).mean()

    plain = drawn("")
    assert (plain.min(), plain.max()) == (0, 999)
    assert share(plain, 400, 500) == pytest.approx(0.1, abs=1e-3)
    later = drawn("--timestep_bias_strategy later --timestep_bias_portion 0.5 --timestep_bias_multiplier 3")
    assert share(later, 500, 1000) == pytest.approx(0.75, abs=1e-3)
    earlier = drawn("--timestep_bias_strategy earlier --timestep_bias_portion 0.5 --timestep_bias_multiplier 3")
    assert share(earlier, 0, 500) == pytest.approx(0.75, abs=1e-3)
    options = "--timestep_bias_strategy range --timestep_bias_begin 400 --timestep_bias_multiplier 4"
    assert share(drawn(options), 400, 1000) == pytest.approx(2400 / 2800, abs=1e-3)


def test_stratified_timesteps_lie_one_in_each_interval_of_a_step(arguments):
    samples, _ = make_samples(arguments, "--timestep_sampling stratified")
    samples.samples_per_step = 8
    for step in range(3):
        timesteps = [int(samples[8 * step + number]["timesteps"]) for number in range(8)]
        assert [timestep // 125 for timestep in timesteps] == list(range(8))


def test_noise_offset_shifts_whole_channels(arguments):
    plain, shifted = (make_samples(arguments, f"--noise_offset {offset}")[0] for offset in (0, 0.5))
    shifts = torch.stack([shifted[number]["noise"] - plain[number]["noise"] for number in range(200)])
    assert shifts.std(dim=(2, 3)).max() < 1e-5
    assert shifts.mean(dim=(2, 3)).std() == pytest.approx(0.5, rel=0.1)


def test_the_face_weighs_more_where_it_is_in_the_cut_picture():
    size = np.array([300, 200])
    # Of the square in the middle, which begins at 50 pixels, the left half of the upper half.
    box = np.array([50 / 300, 0, 150 / 300, 0.5], np.float32)
    weights = face_weights(box, size, 8, 3.0)
    assert weights.mean() == pytest.approx(1)
    inside = weights[:4, :4]
    np.testing.assert_allclose(inside, inside[0, 0], rtol=1e-5)
    np.testing.assert_allclose(weights[4:], weights[-1, -1], rtol=1e-5)
    assert inside[0, 0] / weights[-1, -1] == pytest.approx(3)
    # A cell that is covered to a half counts half of the way.
    partly = face_weights(np.array([0, 0, 1 / 16, 1], np.float32), np.array([64, 64]), 8, 3.0)
    assert partly[0, 0] / partly[0, 7] == pytest.approx(2)
    # The person's left is on the right of the picture.
    sides = np.zeros((8, 8))
    sides[:4, :2], sides[:4, 2:4] = -1, 1
    np.testing.assert_allclose(face_sides(box, size, 8), sides, atol=1e-5)


def test_a_mirrored_picture_has_its_face_mirrored(arguments, tmp_path):
    boxes = {(row, name): value for row in range(5) for name, value in (("face_x0", 0.1), ("face_x1", 0.4))}
    folder = write_faces(tmp_path / "left", boxes)
    samples, _ = make_samples(arguments, f"--random_flip --face_loss_weight 5 --train_data_dir {folder}")
    seen = set()
    for number in range(20):
        sample = samples[number]
        flipped = samples.inputs.picture(int(sample["row"]), flip=True)
        is_flipped = torch.equal(sample["pixel_values"], flipped["pixel_values"])
        left, right = sample["loss_weights"].chunk(2, dim=1)
        assert (left.sum() < right.sum()) == is_flipped
        seen.add(is_flipped)
    assert seen == {True, False}


# --------------------------------------------------------------------------------------------------------------------
# Data sets
# --------------------------------------------------------------------------------------------------------------------


def test_a_picture_of_sixteen_bits_keeps_its_brightness(arguments):
    # 257 steps of 16 bits are one of 8; cut off at 255, the picture would be white.
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8), 64 * 257, np.uint16)).save(file, "PNG")
    aus = dict.fromkeys(AU_NAMES, [0.0])
    table = pa.table({"image": [{"bytes": file.getvalue(), "path": None}], "text": ["a face"], **aus})
    config = parse_args(arguments("run", ""))
    encoders = load_encoders(config, torch.device("cpu"), torch.float32)
    pixels = PixelInputs(TrainingData(table, config), encoders, 8).picture(0, flip=False)["pixel_values"]
    assert pixels.unique().tolist() == pytest.approx([64 / 127.5 - 1])


def test_pictures_are_cut_in_the_middle(arguments):
    samples, _ = make_samples(arguments, "")
    pixels = samples.inputs.picture(0, flip=False)["pixel_values"]
    assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.float32
    assert -1 <= pixels.min() < pixels.max() <= 1
    assert torch.equal(samples.inputs.picture(0, flip=True)["pixel_values"], pixels.flip(-1))


@pytest.mark.parametrize("form", ["csv", "parquet", "other columns"])
def test_other_forms_of_a_data_set_give_the_same_rows(arguments, faces_dir, tmp_path, form):
    folder, options = tmp_path / "other", ""
    loaded = datasets.load_dataset("imagefolder", data_dir=str(faces_dir), split="train")
    if form == "parquet":
        folder.mkdir()
        loaded.to_parquet(folder / "train.parquet")
    else:
        shutil.copytree(faces_dir, folder)
        (folder / "metadata.jsonl").unlink()
        table = loaded.remove_columns("image").to_pandas()
        table.insert(0, "file_name", [f"{row}.png" for row in range(5)])
        if form == "other columns":
            table, options = table.rename(columns={"text": "caption"}), " --caption_column caption"
        table.to_csv(folder / "metadata.csv", index=False)
    expected, data = make_samples(arguments, "")
    other, other_data = make_samples(arguments, f"--train_data_dir {folder}{options}")
    assert other_data.captions.to_pylist() == data.captions.to_pylist()
    np.testing.assert_allclose(other_data.au_intensities, data.au_intensities, atol=1e-6)
    pictures = [inputs.picture(3, flip=False)["pixel_values"] for inputs in (other.inputs, expected.inputs)]
    assert torch.equal(*pictures)


def base_without_models(tmp_path: Path) -> str:
    """A base that tells its family, and fails when any of its models is loaded."""
    (tmp_path / "base").mkdir()
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    index["text_encoder"] = ["transformers", "CLIPTextModel"]
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(index))
    return str(tmp_path / "base")


@pytest.mark.parametrize(
    "changes, drop, message",
    [
        ({(3, "AU12"): 5.5}, (), r"Row 3 \('3.png'\): AU12 is 5.5. FACS intensities go from 0"),
        ({(2, "AU12"): -0.1}, (), r"Row 2 \('2.png'\): AU12 is -0.1"),
        ({(1, "AU4"): float("nan")}, (), r"Row 1 \('1.png'\): AU4 is nan"),
        ({(4, "AU4"): None}, (), r"Row 4 \('4.png'\): AU4 is None"),
        ({(0, "text"): None}, (), r"Row 0 \('0.png'\): `text` has to be a caption, but is None"),
        ({(row, "AU3"): 1.0 for row in range(5)}, (), "AU columns of the data set are AU1, .*'AU3', which is no AU"),
        ({(row, "au7"): 1.0 for row in range(5)}, (), "'au7', which is no AU of FACS. Names are written AU12"),
        ({(row, "AU7L"): 1.0 for row in range(5)}, (), "both AU7L and AU7R, .* Choose AUs with `--aus`"),
        ({}, AU_NAMES, "has no column of an AU, such as AU12. It has "),
        ({}, ("text",), "has no column text.*`--caption_column`"),
    ],
)
def test_a_wrong_label_is_named_before_any_model_is_loaded(arguments, tmp_path, changes, drop, message):
    folder = write_faces(tmp_path / "wrong", changes, drop)
    missing_model = ["--pretrained_model_name_or_path", base_without_models(tmp_path)]
    with pytest.raises(ValueError, match=message):
        main([*arguments("run", f"--train_data_dir {folder}"), *missing_model])
    assert not (tmp_path / "run").exists()


def test_aus_that_are_asked_for_have_to_be_there(arguments, tmp_path):
    folder = write_faces(tmp_path / "ten", (), ("AU9", "AU26"))
    with pytest.raises(ValueError, match=r"has no column AU9, AU26. It has .*AU12.* `--aus` names AUs"):
        load_training_data(parse_args(arguments("run", f"--train_data_dir {folder} --aus {' '.join(AU_NAMES)}")))


SIDES = {(row, f"AU12{side}"): float(row if side == "L" else 1) for row in range(5) for side in "LR"}


def test_all_aus_that_the_data_have_are_trained_in_the_order_of_facs(arguments, tmp_path):
    folder = write_faces(tmp_path / "sided", {**SIDES, **{(row, "AU7"): 2.0 for row in range(5)}}, ("AU12", "AU26"))
    data = load_training_data(parse_args(arguments("run", f"--train_data_dir {folder}")))
    assert data.au_names == (*AU_NAMES[:5], "AU7", "AU9", "AU12L", "AU12R", *AU_NAMES[7:11])
    assert data.au_intensities[:, 7:9].tolist() == [[row, 1] for row in range(5)]
    # Those that are asked for, in their order: the mean of both sides, and a whole AU for each side.
    data = load_training_data(parse_args(arguments("run", f"--train_data_dir {folder} --aus AU12 AU7L AU7R")))
    assert data.au_names == ("AU12", "AU7L", "AU7R")
    assert data.au_intensities.tolist() == [[(row + 1) / 2, 2, 2] for row in range(5)]
    with pytest.raises(ValueError, match="`--au_side_tokens` needs AUs with sides .*, but the run trains AU12, AU26"):
        parsed = parse_args(arguments("run", f"--train_data_dir {folder} --aus AU12 AU26 --au_side_tokens"))
        load_training_data(parsed)


def test_sides_change_places_in_a_mirrored_picture(arguments, tmp_path):
    folder = write_faces(tmp_path / "sided", SIDES, ("AU12",))
    options = f"--train_data_dir {folder} --aus AU12L AU4 AU12R --au_noise_variance 0 --au_rounding_prob 0"
    plain, data = make_samples(arguments, options)
    flipped, _ = make_samples(arguments, f"{options} --random_flip")
    num_mirrored = 0
    for number in range(20):
        one, other = plain[number], flipped[number]
        left, brow, right = one["au_intensities"].tolist()
        if torch.equal(one["pixel_values"], other["pixel_values"]):
            assert other["au_intensities"].tolist() == [left, brow, right]
        else:
            assert torch.equal(one["pixel_values"], other["pixel_values"].flip(-1))
            assert other["au_intensities"].tolist() == [right, brow, left]
            num_mirrored += 1
    assert 4 < num_mirrored < 16 and (data.au_intensities[:, 0] != data.au_intensities[:, 2]).any()


def test_a_run_that_cannot_be_mirrored_is_an_error(arguments, tmp_path):
    folder = write_faces(tmp_path / "gaze", {(row, "AU61"): 1.0 for row in range(5)})
    with pytest.raises(ValueError, match="AU61, which is AU62 in a mirror, and no AU62"):
        load_training_data(parse_args(arguments("run", f"--train_data_dir {folder} --random_flip")))


def change_picture(folder, change):
    path = folder / "2.png"
    if change == "missing":
        path.unlink()
    elif change == "empty":
        path.write_bytes(b"")
    elif change == "no picture":
        path.write_text("<html>404 not found</html>")
    elif change == "JPEG cut off":
        Image.open(path).resize((200, 200)).save(path, "JPEG")
        path.write_bytes(path.read_bytes()[:-500])
    else:
        path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize("change", ["missing", "empty", "no picture", "PNG cut off", "JPEG cut off"])
def test_a_broken_picture_is_named_before_any_model_is_loaded(arguments, tmp_path, change):
    folder = write_faces(tmp_path / "broken")
    change_picture(folder, change)
    missing_model = ["--pretrained_model_name_or_path", base_without_models(tmp_path)]
    with pytest.raises(ValueError, match=r"Row 2: the picture '.*2\.png' cannot be read"):
        main([*arguments("run", f"--train_data_dir {folder}"), *missing_model])
    assert not (tmp_path / "run").exists()


def test_a_broken_picture_in_a_worker_is_one_line(arguments, tmp_path):
    folder = write_faces(tmp_path / "broken")
    samples, _ = make_samples(arguments, f"--train_data_dir {folder}")
    change_picture(folder, "PNG cut off")
    batches = torch.utils.data.DataLoader(samples, batch_sampler=[range(5)], num_workers=1)
    with pytest.raises(ValueError, match=r"\ARow 2: the picture '[^\n]*2\.png' cannot be read[^\n]*\Z"):
        list(read_batches(batches))


def test_a_jpeg_with_more_behind_its_end_is_whole(arguments, tmp_path):
    folder = write_faces(tmp_path / "camera")
    Image.open(folder / "2.png").save(folder / "2.png", "JPEG")
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes() + bytes(1000))
    check_pictures(load_training_data(parse_args(arguments("run", f"--train_data_dir {folder}"))))


@pytest.mark.parametrize("names", [("holiday", "train_journey", "home"), ("train", "test", "validation-2")])
def test_folders_that_are_called_like_splits_lose_no_row(arguments, tmp_path, capsys, names):
    for name in names:
        write_faces(tmp_path / "data" / name)
    # A hidden folder is none of the data.
    write_faces(tmp_path / "data" / ".trash")
    main(arguments("run", f"--train_data_dir {tmp_path / 'data'} --max_train_steps 1"))
    said = " ".join(capsys.readouterr().out.split())
    assert "samples 15 epochs" in said
    counts = [f"5 of {name}/metadata.jsonl" for name in sorted(names)]
    assert f"The rows are {', '.join(counts)}." in said


def test_parquet_files_that_are_called_like_splits_lose_no_row(arguments, shards_dir):
    (shards_dir / "0.parquet").rename(shards_dir / "train.parquet")
    (shards_dir / "1.parquet").rename(shards_dir / "test.parquet")
    for options in ("", " --streaming"):
        assert len(load_training_data(parse_args(arguments("run", f"--train_data_dir {shards_dir}{options}")))) == 20


def test_what_is_left_out_is_said(arguments, faces_dir, tmp_path):
    data = load_training_data(parse_args(arguments("run", "--max_train_samples 3")))
    assert len(data) == 3 and data.notes == ["2 rows after `--max_train_samples` are left out."]
    folder = write_faces(tmp_path / "both")
    pq.write_table(pa.table({"text": ["a face"]}), folder / "more.parquet")
    with pytest.raises(ValueError, match="holds metadata.jsonl, and 1 Parquet files, such as more.parquet"):
        load_training_data(parse_args(arguments("run", f"--train_data_dir {folder}")))
    (folder / "more.parquet").unlink()
    (folder / "metadata.csv").write_text("file_name,text\n0.png,a face\n")
    with pytest.raises(ValueError, match="holds metadata.csv and metadata.jsonl. Keep one of them"):
        load_training_data(parse_args(arguments("run", f"--train_data_dir {folder}")))


def test_file_names_may_be_absolute_paths(arguments, faces_dir, tmp_path):
    rows = [json.loads(line) for line in (faces_dir / "metadata.jsonl").read_text().splitlines()]
    (tmp_path / "list").mkdir()
    lines = [json.dumps(row | {"file_name": str(faces_dir / row["file_name"])}) for row in rows]
    (tmp_path / "list/metadata.jsonl").write_text("\n".join(lines))
    absolute, _ = make_samples(arguments, f"--train_data_dir {tmp_path / 'list'}")
    expected, _ = make_samples(arguments, "")
    assert all(torch.equal(absolute[3][name], expected[3][name]) for name in expected[3])


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("metadata.jsonl", '{"file_name": "0.png"', "metadata.jsonl' cannot be read: JSON parse error"),
        ("metadata.jsonl", '{"text": "a face"}', "metadata.jsonl' has no column file_name. It has text"),
        ("metadata.jsonl", '{"file_name": 7, "text": "a face"}', "row 0: file_name has to name a picture, but is 7"),
        ("metadata.csv", "file_name,text\n0.png", "metadata.csv' cannot be read: CSV parse error: Expected 2 columns"),
        ("data.parquet", "no Parquet", "data.parquet' cannot be read: Parquet magic bytes not found"),
        ("notes.txt", "", "has no metadata.jsonl, metadata.csv, metadata.parquet, and no Parquet file"),
    ],
)
def test_data_that_cannot_be_read_is_named(arguments, tmp_path, name, content, message):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_training_data(parse_args(arguments("run", f"--train_data_dir {tmp_path / 'data'}")))


def test_numbers_that_are_text_are_called_so(arguments, tmp_path):
    folder = write_faces(tmp_path / "text", {(row, "AU12"): "0.5" for row in range(5)})
    with pytest.raises(ValueError, match="AU12 is '0.5'. It has to be a number, not text"):
        load_training_data(parse_args(arguments("run", f"--train_data_dir {folder}")))


def test_repeated_and_contradictory_rows_are_counted(arguments, tmp_path):
    folder = write_faces(tmp_path / "repeated")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    shutil.copy(folder / "1.png", folder / "copy.png")
    rows += [rows[0], rows[1] | {"file_name": "copy.png", "AU12": 4.9}, rows[2] | {"text": "another caption"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = load_training_data(parse_args(arguments("run", f"--train_data_dir {folder}")))
    check_pictures(data)
    assert data.notes == [
        "WARNING: 1 rows have the picture of an earlier row, but other AUs: Row 6 ('copy.png') contradicts"
        " Row 1 ('1.png').",
        "1 rows repeat picture, caption and AUs of an earlier row; Row 5 ('0.png'), for example, repeats Row 0"
        " ('0.png'). All of them are used.",
    ]


def test_captions_that_the_base_cuts_are_counted(arguments, tmp_path):
    # The tiny tokenizer reads 14 letters.
    captions = {(row, "text"): "a short one" if row < 3 else "a caption that is too long" for row in range(5)}
    folder = write_faces(tmp_path / "long", captions)
    samples, data = make_samples(arguments, f"--train_data_dir {folder}")
    count_cut_captions(data, samples.inputs.encoders)
    assert data.notes == [
        "2 of 5 captions are longer than the 16 tokens that the base reads, and are cut, such as"
        " 'a caption that is too long'."
    ]


@pytest.fixture
def shards_dir(faces_dir, tmp_path):
    """The faces four times over, in two Parquet files of five row groups of two rows each."""
    loaded = datasets.load_dataset("imagefolder", data_dir=str(faces_dir), split="train")
    table = datasets.concatenate_datasets([loaded] * 4).cast_column("image", datasets.Image(decode=False))
    pictures = [
        {"bytes": Path(entry["path"]).read_bytes(), "path": f"{row}.png"} for row, entry in enumerate(table["image"])
    ]
    table = table.remove_columns("image").with_format("arrow")[:]
    table = table.append_column("image", pa.array(pictures))
    (tmp_path / "shards").mkdir()
    for shard in range(2):
        pq.write_table(table.slice(10 * shard, 10), tmp_path / f"shards/{shard}.parquet", row_group_size=2)
    return tmp_path / "shards"


def test_a_stream_has_each_row_once_an_epoch_and_few_in_memory(arguments, shards_dir):
    options = f"--train_data_dir {shards_dir} --streaming --shuffle_buffer_size 4"
    samples, data = make_samples(arguments, options)
    _, whole = make_samples(arguments, f"--train_data_dir {shards_dir}")
    most_rows, epochs = 0, []
    for epoch in range(2):
        rows = []
        for number in range(20 * epoch, 20 * epoch + 20):
            rows.append(int(samples[number]["row"]))
            most_rows = max(most_rows, sum(map(len, data.loaded.values())))
        assert sorted(rows) == list(range(20))
        epochs.append(rows)
    assert epochs[0] != epochs[1] != list(range(20))
    assert most_rows <= 2 * 4 + 2
    for row in (0, 7, 19):
        part, index = data.locate(row)
        assert np.array_equal(part.au_intensities[index], whole.au_intensities[row])
        assert part.name(index) == f"Row {row} ('{row}.png')"


def test_a_streamed_run_resumes_bit_for_bit(arguments, shards_dir, tmp_path):
    options = f"--train_data_dir {shards_dir} --streaming --shuffle_buffer_size 4 --checkpointing_steps 2"
    main(arguments("run", options))
    names = ("au_attn_processors.safetensors", "pytorch_lora_weights.safetensors")
    whole = [load_file(tmp_path / "run" / name) for name in names]
    shutil.rmtree(tmp_path / "run/checkpoint-4")
    main(arguments("run", f"{options} --resume_from_checkpoint latest"))
    for name, tensors in zip(names, whole, strict=True):
        resumed = load_file(tmp_path / "run" / name)
        assert resumed.keys() == tensors.keys() and all(torch.equal(resumed[key], tensors[key]) for key in tensors)


def test_a_wrong_label_in_a_stream_is_named_when_it_is_read(arguments, shards_dir):
    table = pq.read_table(shards_dir / "1.parquet")
    index = table.column_names.index("AU12")
    table = table.set_column(index, "AU12", pa.array([9.0] * 10))
    pq.write_table(table, shards_dir / "1.parquet", row_group_size=2)
    with pytest.raises(ValueError, match=r"Row 1\d \('1\d.png'\): AU12 is 9.0. FACS intensities go from 0"):
        main(arguments("run", f"--train_data_dir {shards_dir} --streaming --train_batch_size 20"))


def test_only_parquet_files_are_streamed(arguments):
    with pytest.raises(ValueError, match="`--streaming` reads Parquet files, but '.*' has others, or none"):
        main(arguments("run", "--streaming"))
