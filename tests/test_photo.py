import logging
import re

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from PIL import Image

import drawing.photo
from drawing.photo import check_box, edit_photo, face_mask, find_faces, open_photo, surroundings


def some_photo(size: tuple[int, int] = (300, 200)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8)
    return Image.fromarray(pixels)


def test_a_photo_lies_as_its_camera_says(tmp_path):
    photo, exif = some_photo(), Image.Exif()
    exif[0x0112] = 6
    photo.rotate(90, expand=True).save(tmp_path / "photo.png", exif=exif)
    assert np.array_equal(np.asarray(open_photo(tmp_path / "photo.png")), np.asarray(photo))


def test_what_is_no_photo_or_too_large_is_not_decoded(tmp_path, monkeypatch):
    some_photo().save(tmp_path / "photo.png")
    (tmp_path / "notes.png").write_text("none")
    with pytest.raises(ValueError, match="^notes.png is no picture"):
        open_photo(tmp_path / "notes.png")
    monkeypatch.setattr(drawing.photo, "MAX_PHOTO_PIXELS", 300 * 200 - 1)
    with pytest.raises(ValueError, match=r"^photo.png has 300 × 200 pixels"):
        open_photo(tmp_path / "photo.png")


@pytest.mark.parametrize("box", [(60, 40, 160, 160), (0, 0, 60, 90), (250, 100, 300, 200)])
def test_only_the_oval_of_a_photo_of_any_size_changes(tiny_pipe, box):
    photo = some_photo((301, 203))
    mask = face_mask(photo.size, box)
    edited = edit_photo(tiny_pipe, photo, mask, "a boy", "12E", num_inference_steps=2)
    assert edited.size == photo.size
    changed = (np.asarray(edited) != np.asarray(photo)).any(-1)
    assert not changed[np.asarray(mask) == 0].any() and changed[np.asarray(mask) == 255].mean() > 0.9


def test_the_model_sees_the_face_with_its_surroundings():
    # In the middle of a large photo a square, 1.4 times the face; at an edge it moves inwards; and never beyond.
    assert surroundings((400, 300, 500, 400), (1000, 800)) == (380, 280, 520, 420)
    assert surroundings((0, 0, 100, 50), (1000, 800)) == (0, 0, 140, 140)
    assert surroundings((24, 24, 104, 116), (128, 128)) == (0, 0, 128, 128)
    # A portrait is not cut, even if the box cuts the face.
    assert surroundings((28, 52, 100, 116), (128, 128)) == (0, 0, 128, 128)
    assert surroundings((128, 52, 200, 116), (400, 128)) == (100, 0, 228, 128)
    assert surroundings((28, 52, 100, 116), (400, 136)) == (14, 34, 115, 135)


def test_brows_have_room_to_rise_and_the_jaw_is_round():
    mask = face_mask((100, 100), (0, 0, 100, 100))
    assert mask.getpixel((18, 22)) > 220 and mask.getpixel((18, 78)) < 128 and mask.getpixel((2, 2)) == 0


def edit(pipe, photo: Image.Image, **options) -> np.ndarray:
    return np.asarray(edit_photo(pipe, photo, face_mask(photo.size, (2, 2, 30, 30)), "a boy", "12E", **options))


def test_only_steps_that_change_the_face_are_computed(tiny_pipe):
    passes, done, options = [], [], {"num_inference_steps": 8, "on_step": lambda step: done.append(step)}
    tiny_pipe.unet.register_forward_pre_hook(lambda *_: passes.append(1))
    edit(tiny_pipe, some_photo((32, 32)), strength=0.5, **options)
    assert len(passes) == 4 and done == [5, 6, 7, 8]
    edit(tiny_pipe, some_photo((32, 32)), strength=1.0, **options)
    assert len(passes) == 4 + 8 and done[4:] == [1, 2, 3, 4, 5, 6, 7, 8]
    # The pipeline itself begins with the first step again.
    tiny_pipe("a boy", aus="12E", num_inference_steps=3)
    assert len(passes) == 4 + 8 + 3


@pytest.mark.parametrize(
    "scheduler",
    [DDIMScheduler, PNDMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler],
)
@pytest.mark.parametrize("strength", [0.1, 0.5, 0.8])
def test_a_late_beginning_suits_each_scheduler(tiny_pipe, scheduler, strength):
    """A model that finds exactly the noise that was added to a photo gives the photo back, as its VAE keeps it."""
    # As Stable Diffusion has it for PNDM; and all end without noise, which some would leave in by default.
    options = {"skip_prk_steps": True, "set_alpha_to_one": True}
    tiny_pipe.scheduler = scheduler.from_config(tiny_pipe.scheduler.config | options)
    photo = some_photo((32, 32))
    latents = drawing.photo.encode(tiny_pipe, photo)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    tiny_pipe.unet.register_forward_hook(lambda unet, args, output: (noise.expand_as(output[0]),))
    found = []
    decode = tiny_pipe._decode
    tiny_pipe._decode = lambda latents, generator: found.append(latents) or decode(latents, generator)
    edit(tiny_pipe, photo, strength=strength, num_inference_steps=10)
    inside = np.s_[..., 1:-1, 1:-1]
    assert torch.allclose(found[0][inside], latents[inside], atol=0.02 * latents.std().item())


@pytest.mark.parametrize("strength", [0, 1.5, float("nan")])
def test_a_wrong_strength_is_an_error(tiny_pipe, strength):
    with pytest.raises(ValueError, match="`strength` has to be above 0 and up to 1"):
        edit(tiny_pipe, some_photo((32, 32)), strength=strength)


@pytest.mark.parametrize(("size", "words"), [((32, 32), "is black"), ((16, 32), "16 × 32 pixels, but .* 32 × 32")])
def test_a_mask_that_does_not_say_where_is_an_error(tiny_pipe, size, words):
    with pytest.raises(ValueError, match=words):
        edit_photo(tiny_pipe, some_photo((32, 32)), Image.new("L", size), "a boy", "12E")


def test_editing_logs_nothing(tiny_pipe, caplog):
    photo, logger = some_photo((32, 32)), logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        edit_photo(tiny_pipe, photo, face_mask(photo.size, (0, 0, 32, 32)), "a boy", "12E", num_inference_steps=1)
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("box", "part"),
    [
        ((None, 1, 2, 3), "`box` is incomplete"),
        ((1, 2, 3), "`box` is incomplete"),
        ((400, 10, 500, 90), "lies outside the picture of 300 × 200 pixels"),
        ((90, 90, 10, 10), "or holds less than 16 × 16"),
        ((10, 10, 20, 90), "or holds less than 16 × 16"),
        ((float("nan"), 0, 90, 90), "`box` is incomplete"),
    ],
)
def test_a_wrong_box_is_an_error(box, part):
    with pytest.raises(ValueError, match=re.escape(part)):
        check_box(box, (300, 200))
    assert check_box((-5, 10, 90, 900), (300, 200)) == (0, 10, 90, 200)


def test_a_face_is_found():
    data = pytest.importorskip("skimage.data", reason="needs scikit-image: pip install scikit-image")
    # A portrait of Eileen Collins (NASA), whose face fills the square from (175, 70) to (270, 165).
    photo = Image.fromarray(data.astronaut()).resize((1024, 1024))
    left, top, right, bottom = find_faces(photo)[0]
    assert np.allclose((left, top, right, bottom), (350, 120, 540, 350), atol=40)
    assert find_faces(some_photo()) == []


def test_without_a_detector_the_way_out_is_said(monkeypatch):
    monkeypatch.setattr(drawing.photo, "has_detector", lambda: False)
    with pytest.raises(ValueError, match="pip install scikit-image"):
        find_faces(some_photo())
