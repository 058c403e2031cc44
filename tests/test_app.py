import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler
from PIL import Image
from tiny import HIDDEN_DIM, make_components

from action_units import ACTION_UNITS, AU_NAMES, PRESETS, format_aus
from au_encoder import AUAdapter, write_au_adapter
from drawing.files import read_metadata
from drawing.jobs import Job
from drawing.model import Weights
from drawing.studio import Stopped, Studio
from hub import export
from pipeline_fineface_xl import FineFaceXLPipeline
from program import TOY_MODEL, settle_device


ROOT = Path(__file__).resolve().parent.parent
ON_SCREEN = {
    "prompt": "a boy",
    "aus": "AU6=3 AU12=4",
    "seed": 3,
    "negative_prompt": "",
    "num_inference_steps": 2,
    "guidance_scale": 7.5,
    "au_guidance_scale": None,
    "au_scale": 1.0,
}
AUS, PROMPT, SEED = "#aus textarea, #aus input", "#prompt textarea, #prompt input", "#seed input"
JOB = Job("a boy", aus="AU6=3 AU12=4", seed=3, num_inference_steps=2)


@pytest.fixture(scope="module", autouse=True)
def imported():
    """Gradio takes seconds to import, so only the worker that runs these tests does it."""
    global gr, gradio_client, app, actions, FACE_PARTS, PLAIN_NAMES, REGION_SHAPES, face_controls, face_map
    gr = pytest.importorskip("gradio", minversion="6", reason="needs Gradio 6 or newer: pip install gradio")
    gradio_client = pytest.importorskip("gradio_client")
    import app
    from page import actions
    from page.face_controls import FACE_PARTS, PLAIN_NAMES, REGION_SHAPES, face_controls, face_map


@pytest.fixture(scope="module")
def studio(tiny_sd_dir, tiny_adapter_dir) -> Studio:
    return Studio(Weights(tiny_sd_dir, tiny_adapter_dir), torch.device("cpu"), "float32")


@pytest.fixture
def page(studio, tmp_path) -> "actions.Page":
    return actions.Page(studio, tmp_path)


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


# --------------------------------------------------------------------------------------------------------------------
# What stands in the controls
# --------------------------------------------------------------------------------------------------------------------


def test_the_controls_make_a_job(studio):
    values = ON_SCREEN | {"aus": "6C+12D", "negative_prompt": "glasses"}
    job = actions.make_screen_job(studio, **values)
    assert (job.aus, job.negative_prompt, job.height) == ("AU6=3 AU12=4", "glasses", studio.defaults.height)
    assert actions.make_screen_job(studio, **ON_SCREEN).negative_prompt is None
    assert actions.make_screen_job(studio, **ON_SCREEN | {"aus": "happy@0.5 + AU4=2"}).aus == "AU4=2 AU6=2 AU12=2"


def test_aus_in_the_prompt_count_when_the_sliders_are_at_rest(studio):
    job = actions.make_screen_job(studio, **ON_SCREEN | {"prompt": "a boy <AU4=2>", "aus": "neutral"})
    assert (job.prompt, job.aus) == ("a boy", "AU4=2")


WRONG_VALUES = [
    ({"prompt": ""}, "`Prompt` is empty"),
    ({"prompt": None}, "`Prompt` is empty"),
    ({"prompt": "a boy <AU7=3>"}, "AU7"),
    ({"prompt": "a boy <AU6=3>"}, "`Prompt` and in `Expression`"),
    ({"aus": "doubtfull"}, "`Expression`"),
    ({"aus": "AU12=50"}, "`Expression` sets AU12 to 50"),
    ({"seed": None}, "`Seed` has to be a whole number"),
    ({"seed": -1}, "`Seed` has to be a whole number"),
    ({"seed": 2**60}, "`Seed` goes up to"),
    ({"num_inference_steps": None}, "`Steps`"),
    ({"num_inference_steps": 10_000}, "`Steps` goes up to 150"),
    ({"guidance_scale": None}, "`Guidance`"),
    ({"au_guidance_scale": "much"}, "`Expression guidance`"),
    ({"au_scale": float("nan")}, "`AU strength`"),
]


@pytest.mark.parametrize(("values", "part"), WRONG_VALUES)
def test_a_wrong_value_is_called_by_its_label(studio, values, part):
    with pytest.raises(ValueError, match=re.escape(part)):
        actions.make_screen_job(studio, **ON_SCREEN | values)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"first": 50}, "`From` sets AU12 to 50"),
        ({"last": None}, "`To` is empty"),
        ({"first": 3, "last": 3}, "both 3, so nothing would move"),
        ({"count": 1}, "`Pictures` has to be from 2 to"),
        ({"count": None}, "`Pictures` has to be from 2 to"),
        ({"kind": "Into another expression", "start": "nope"}, "`From` is 'nope'"),
        ({"kind": "Into another expression", "start": "6C+12D"}, "both AU6=3 AU12=4, so nothing would move"),
    ],
)
def test_a_wrong_sweep_is_a_message(studio, changes, part):
    values = {"kind": "One muscle", "au": "AU12", "first": 0, "last": 5, "start": "neutral", "end": "", "count": 3}
    with pytest.raises(ValueError, match=re.escape(part)):
        actions.read_sweep(JOB, studio, **values | changes)


def test_a_face_changes_into_another(studio, tmp_path):
    sweep = actions.read_sweep(JOB, studio, "Into another expression", "AU12", 0, 5, "angry", "", 3)
    assert sweep == studio.change(replace(JOB, aus=format_aus("angry")), JOB.aus, 3)
    pictures, _, shown = studio.sweep(sweep)
    assert shown["rows"] == [["AU4=5 AU5=3 AU17=3", "AU4=2.5 AU5=1.5 AU6=1.5 AU12=2 AU17=1.5", "AU6=3 AU12=4"]]
    assert np.array_equal(np.asarray(pictures[-1]), np.asarray(studio.draw(JOB)))


def test_the_page_follows_the_aus_of_the_adapter(tiny_sd_dir, tmp_path):
    unet = make_components()["unet"]
    torch.manual_seed(0)
    adapter = AUAdapter.from_unet(unet, hidden_dim=HIDDEN_DIM, au_names=["AU4", "AU12L", "AU12R", "AU26"])
    write_au_adapter(tmp_path / "adapter", adapter, unet, "fineface")
    studio = Studio(Weights(tiny_sd_dir, str(tmp_path / "adapter")), torch.device("cpu"), "float32")
    assert studio.au_names == ("AU4", "AU12L", "AU12R", "AU26")
    job = actions.make_screen_job(studio, **ON_SCREEN | {"aus": "L12D+26B"})
    assert job.aus == "AU12L=4 AU26=2"
    with pytest.raises(ValueError, match="AU6"):
        actions.make_screen_job(studio, **ON_SCREEN)
    sweep = actions.read_sweep(job, studio, "One muscle", "AU12R", 0, 4, "", "", 3)
    assert [job.aus for job in sweep.table.rows[0]] == ["AU12L=4 AU26=2", "AU12L=4 AU12R=2 AU26=2", "AU12=4 AU26=2"]
    page = face_controls("neutral", studio.au_names)
    assert page.props["aus"] == [["AU4"], ["AU12L", "AU12R"], ["AU26"]]
    assert 'data-preset="polite smile"' in page.html_template and 'data-preset="happy"' not in page.html_template
    assert actions.build(studio) is not None


def test_a_link_carries_the_controls(studio):
    job = actions.read_link({"prompt": "a girl", "aus": "12C", "seed": "7", "au_guidance_scale": "3.5"}, studio)
    assert (job.prompt, job.aus, job.seed, job.au_guidance_scale) == ("a girl", "AU12=3", 7, 3.5)
    assert job.num_inference_steps == studio.defaults.num_inference_steps
    with pytest.raises(ValueError, match="`Seed` is 'x' in this link"):
        actions.read_link({"seed": "x"}, studio)


def test_a_picture_brings_its_controls_back(studio, tmp_path):
    job = replace(JOB, negative_prompt="glasses", au_guidance_scale=2.5, height=48, width=32)
    studio.write(studio.draw(job), tmp_path / "face.png", vars(job))
    assert actions.read_picture(tmp_path / "face.png", studio) == job
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    with pytest.raises(ValueError, match="^other.png does not say how it was made"):
        actions.read_picture(tmp_path / "other.png", studio)
    (tmp_path / "notes.png").write_text("none")
    with pytest.raises(ValueError, match="^notes.png does not say"):
        actions.read_picture(tmp_path / "notes.png", studio)
    _, strip, shown = studio.sweep(studio.sweep_au(JOB, "AU12", 0, 5, 2))
    studio.write(strip, tmp_path / "strip.png", shown)
    with pytest.raises(ValueError, match="strip.png is a sheet"):
        actions.read_picture(tmp_path / "strip.png", studio)


def test_every_au_has_its_place_on_the_screen_once():
    regions = [region for regions in FACE_PARTS.values() for region in regions]
    assert all(regions.count(unit.region) == 1 for unit in ACTION_UNITS)
    assert set(AU_NAMES) <= PLAIN_NAMES.keys() <= {unit.name for unit in ACTION_UNITS}
    assert {unit.region for unit in ACTION_UNITS} == REGION_SHAPES.keys()
    # The person's left is on the right-hand side of the picture.
    assert '<svg class="moves" x="12" width="12"' in face_map("mouth", "left")


# --------------------------------------------------------------------------------------------------------------------
# Turns
# --------------------------------------------------------------------------------------------------------------------


class Session:
    """What `Page` reads of a request."""

    def __init__(self, name: str):
        self.session_hash = name


def test_whoever_shares_the_model_takes_turns(studio):
    """A scheduler with a memory spoils pictures that are drawn at the same time."""
    scheduler = studio.pipeline.scheduler
    studio.pipeline.scheduler = PNDMScheduler.from_config(scheduler.config, skip_prk_steps=True)
    try:
        jobs = [replace(JOB, seed=seed, num_inference_steps=5) for seed in range(3)]
        alone = [np.asarray(studio.draw(job)) for job in jobs]
        together = [None] * 3

        def draw(i: int) -> None:
            together[i] = np.asarray(studio.draw(jobs[i]))

        threads = [threading.Thread(target=draw, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(np.array_equal(first, second) for first, second in zip(alone, together, strict=True))

        def stop(step: int) -> None:
            if step == 3:
                raise Stopped

        with pytest.raises(Stopped):
            studio.draw(jobs[1], stop)
        assert np.array_equal(np.asarray(studio.draw(jobs[0])), alone[0])
    finally:
        studio.pipeline.scheduler = scheduler


def test_what_is_out_of_date_ends_at_its_next_step(page, studio, monkeypatch):
    session, values = Session("a"), [*(ON_SCREEN | {"num_inference_steps": 20, "au_guidance_scale": 0}).values(), True]
    steps, draw = [], studio.draw

    def watched(job, on_step):
        def counted(step: int) -> None:
            steps.append(step)
            if step == 2:
                page.want(session, 1, 0, 2, 0)  # another tab
                page.want(Session("b"), 2, 0, 0, 0)  # another window
            if step == 4:
                page.want(session, 2, 0, 0, 0)
            on_step(step)

        return draw(job, counted)

    monkeypatch.setattr(studio, "draw", watched)
    assert page.draw(session, 1, [], *values) == gr.skip()
    assert steps == [0, 1, 2, 3, 4]
    page.leave(session)
    assert page.draw(session, 3, [], *values) == gr.skip() and steps[5:] == [0]


def test_four_seeds_and_a_photo_end_at_their_next_step_as_well(page, tmp_path):
    session, values = Session("a"), [*(ON_SCREEN | {"au_guidance_scale": 0}).values(), True]
    page.want(session, 2, 0, 0, 0)
    assert page.draw_four(session, 1, *values) == gr.skip()
    choices = page.draw_four(session, 3, *values)[-1]
    assert [choice.job.seed for choice in choices][0] == 3 and len({choice.job.seed for choice in choices}) == 4
    assert [choice.values[2] for choice in choices] == [choice.job.seed for choice in choices]
    Image.effect_noise((64, 64), 60).save(tmp_path / "photo.png")
    photo = (str(tmp_path / "photo.png"), 0.8, 8, 8, 56, 56)
    page.want(session, 0, 2, 0, 0)
    assert page.edit(session, 1, *photo, *values) == gr.skip()
    assert len(page.edit(session, 3, *photo, *values)) == 2


def test_a_stopped_table_keeps_what_it_has(page, tmp_path):
    session, values = Session("a"), [*(ON_SCREEN | {"au_guidance_scale": 0}).values(), True]
    table = ("faces.csv", {f"{i}.png": "AU12=3" for i in range(4)})
    results = page.draw_table(session, 1, table, *values)
    assert len(next(results)[0]) == 1 and len(next(results)[0]) == 2
    page.want(session, 0, 0, 0, 2)
    _, archive, _ = next(results)
    with zipfile.ZipFile(archive.value["path"] if isinstance(archive.value, dict) else archive.value) as opened:
        assert opened.namelist() == ["0.png", "1.png", "metadata.csv"]


# --------------------------------------------------------------------------------------------------------------------
# The program
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--port", "0"], "--port"),
        (["--port", "web"], "--port"),
        (["--device", "toaster"], "It finds cpu"),
        (["--model", "nowhere"], "'nowhere'"),
        (["--adapter-variant", "sd15"], "--adapter"),
        (["--colour", "red"], "--colour"),
    ],
)
def test_bad_options_are_one_line(options, part, monkeypatch, capsys):
    monkeypatch.setattr("drawing.studio.Studio", lambda *args: pytest.fail("A model was loaded."))
    assert app.main(options) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and part in captured.err


def test_without_gradio_one_line_says_how_to_install_it():
    code = "import runpy, sys; sys.modules['gradio'] = None; runpy.run_path('app.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "pip install gradio" in done.stderr


def test_a_typing_error_is_answered_before_anything_large_is_imported():
    code = "import sys, app; app.main(['--colour', 'red']); sys.exit(bool({'torch', 'gradio'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.startswith("error: ")


@contextmanager
def served(demo):
    """The address of a running page."""
    app.serve(demo, prevent_thread_lock=True, quiet=True)
    try:
        yield demo.local_url
    finally:
        demo.close()


def test_the_start_says_what_takes_time(tiny_sd_dir, tiny_adapter_dir, monkeypatch, capsys):
    monkeypatch.setattr(app, "serve", lambda demo, *args: print("served", type(demo).__name__))
    assert app.main(["--model", tiny_sd_dir, "--adapter", tiny_adapter_dir, "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Loading {tiny_sd_dir} on cpu in float32 …" and lines[1].startswith("Drawing the first")
    assert lines[2].startswith("Opening the page") and lines[3] == "served Blocks"


@pytest.fixture(scope="module")
def client(studio):
    with served(actions.build(studio)) as url:
        yield gradio_client.Client(url, verbose=False)


def screen(**values) -> dict:
    """The arguments of an endpoint: the controls, and the checkbox for one guidance."""
    return ON_SCREEN | {"au_guidance_scale": 0, "one_guidance": True} | values


def test_programs_send_what_they_name(client):
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert set(endpoints) == {"/draw", "/sweep", "/table"}
    names = {name: [p["parameter_name"] for p in endpoint["parameters"]] for name, endpoint in endpoints.items()}
    assert names["/draw"] == list(screen())
    assert names["/sweep"] == ["au", "first", "last", "count", *screen()] and names["/table"] == ["table", *screen()]


def test_a_program_gets_what_its_arguments_say(client, studio, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = client.predict(**screen(), api_name="/draw")
    path = result["value"] if isinstance(result, dict) else result
    assert np.array_equal(pixels(path), np.asarray(studio.draw(JOB)))
    assert read_metadata(path) | vars(JOB) == read_metadata(path)


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"prompt": " "}, "`Prompt` is empty"),
        ({"aus": "<b>x</b>"}, "&lt;b&gt;x"),
        ({"seed": 1.5e300}, "`Seed` goes up to"),
        ({"num_inference_steps": 10_000}, "`Steps` goes up to"),
    ],
)
def test_a_wrong_value_is_a_message(client, values, part):
    with pytest.raises(gradio_client.exceptions.AppError) as caught:
        client.predict(**screen(**values), api_name="/draw")
    assert part in str(caught.value) and "Traceback" not in str(caught.value)


def test_nobody_waits_for_the_page_of_a_slow_model(page, studio, monkeypatch, tmp_path):
    assert page.first_picture is not None
    monkeypatch.setattr("drawing.studio.MAX_QUICK_WEIGHTS", 0)
    slow = actions.Page(studio, tmp_path)
    assert slow.first_picture is None and list(slow.draw_presets()) == []


def test_users_wait_for_each_other(client, studio, monkeypatch):
    running, most, draw = [], [], studio.draw

    def watched(*args):
        running.append(1)
        most.append(len(running))
        time.sleep(0.05)
        try:
            return draw(*args)
        finally:
            running.pop()

    monkeypatch.setattr(studio, "draw", watched)
    jobs = [client.submit(**screen(seed=seed), api_name="/draw") for seed in range(3)]
    jobs.append(client.submit(au="AU12", first=0, last=5, count=2, **screen(), api_name="/sweep"))
    for job in jobs:
        job.result(timeout=60)
    assert most == [1] * 5


def test_nobody_waits_while_a_table_is_read(client, monkeypatch, tmp_path):
    reading, is_drawn = threading.Event(), threading.Event()

    def read_slowly(*args):
        reading.set()
        assert is_drawn.wait(60)
        raise ValueError("read")

    monkeypatch.setattr(actions, "read_expressions", read_slowly)
    table = tmp_path / "faces.csv"
    table.write_text("aus\nhappy\n")
    job = client.submit(table=gradio_client.handle_file(str(table)), **screen(), api_name="/table")
    assert reading.wait(60)
    client.predict(**screen(), api_name="/draw")
    is_drawn.set()
    with pytest.raises(gradio_client.exceptions.AppError, match="read"):
        job.result(timeout=60)


def test_a_table_comes_back_as_a_zip(client, tmp_path):
    table = tmp_path / "faces.csv"
    table.write_text("aus\nhappy\nsad\n")
    archive = client.predict(table=gradio_client.handle_file(str(table)), **screen(), api_name="/table")
    with zipfile.ZipFile(archive["value"] if isinstance(archive, dict) else archive) as opened:
        assert len(opened.namelist()) == 3 and "metadata.csv" in opened.namelist()


# --------------------------------------------------------------------------------------------------------------------
# In a browser
# --------------------------------------------------------------------------------------------------------------------


def toy_studio() -> Studio:
    return Studio(Weights(str(TOY_MODEL)), torch.device("cpu"), "float32")


@pytest.fixture(scope="module")
def toy() -> Studio:
    """The toy model in a hurry: small pictures in one step."""
    studio = toy_studio()
    studio.defaults = replace(studio.defaults, num_inference_steps=1, height=64, width=64)
    return studio


@pytest.fixture(scope="module")
def url(toy):
    with served(actions.build(toy)) as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@contextmanager
def opened(browser, url: str, width: int = 1280, height: int = 900, first="#picture img", scheme="light", **options):
    """A page that shows `first`. It fails if it speaks to another host, breaks a script, or a request fails."""
    # One context for all that want nothing special: it keeps the scripts that it has fetched and compiled.
    shared = [] if options else browser.contexts
    context = shared[0] if shared else browser.new_context(reduced_motion="reduce", **options)
    page = context.new_page()
    page.set_viewport_size({"width": width, "height": height})
    page.emulate_media(color_scheme=scheme)
    page.set_default_timeout(int(os.environ.get("PAGE_TIMEOUT", 60_000)))
    hosts, broken = set(), []
    page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
    page.on("response", lambda response: response.status >= 500 and broken.append(f"{response.status} {response.url}"))
    page.on("pageerror", lambda error: broken.append(str(error)))
    try:
        page.goto(url)
        page.wait_for_selector(first)
        yield page
        page.evaluate("localStorage.clear()")
    finally:
        page.close()
        if options:
            context.close()
    assert hosts <= {"127.0.0.1", None} and broken == []


def wait_for(page, selector: str, condition: str, *args) -> None:
    """Until the element is there, and `condition`, JavaScript on `element` and `args`, is true."""
    script = f"([selector, args], element = document.querySelector(selector)) => element && ({condition})"
    page.wait_for_function(script, arg=[selector, args])


def wait_for_said(page, text: str) -> None:
    """Until the picture is the one of this expression, and the controls agree with it."""
    wait_for(page, "#said", "element.innerText.startsWith(args[0] + ' ·') && !element.closest('.stale')", text)


def wait_for_slider(page, name: str, value: float) -> None:
    wait_for(page, f"#{name} input[type=number]", "element.value == args[0]", value)


def wait_for_message(page, text: str) -> None:
    """A message in sight that does not cover the button."""
    toast = page.locator(".toast-body", has_text=text).first
    toast.wait_for()
    draw, message = page.locator("#draw").bounding_box(), toast.bounding_box()
    is_apart = message["x"] + message["width"] <= draw["x"] or message["y"] >= draw["y"] + draw["height"]
    assert is_apart or message["y"] + message["height"] <= draw["y"], "The message covers the button."


def close_message(page, text: str) -> None:
    # It may have gone by itself meanwhile.
    page.evaluate("document.querySelectorAll('.toast-body button').forEach((button) => button.click())")
    page.locator(".toast-body", has_text=text).first.wait_for(state="detached")


def choose_preset(page, name: str) -> None:
    page.click(f".preset[data-preset='{name}']")


def open_tab(page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()
    wait_for(page, "#draw", "element.innerText.toLowerCase().startsWith(args[0])", "draw")


def press(page, selector: str, *keys: str) -> None:
    page.focus(selector)
    for key in keys:
        page.keyboard.press(key)


def download(page, selector: str, folder: Path) -> Path:
    with page.expect_download() as caught:
        page.click(selector)
    path = folder / caught.value.suggested_filename
    caught.value.save_as(path)
    return path


@pytest.fixture(scope="module")
def window(browser, url):
    """Opens the page as it begins. It takes seconds to load, so a test that passes leaves it to the next one."""
    with ExitStack() as stack:
        pages = []

        @contextmanager
        def window():
            page = pages.pop() if pages else stack.enter_context(opened(browser, url))
            first = page.input_value(PROMPT)
            yield page
            open_tab(page, "Face")
            for selector, text in ((PROMPT, first), (SEED, "0"), (AUS, "AU12=3")):
                page.fill(selector, text)
            press(page, AUS, "Enter")
            wait_for(page, "#said", "element.innerText === 'AU12=3 · seed 0' && !element.closest('.stale')")
            page.evaluate("localStorage.clear()")
            pages.append(page)

        yield window


def test_a_face_by_hand(window, tmp_path):
    angry = format_aus(PRESETS["angry"])
    with window() as page:
        drawn = page.locator("#strip .thumbnail-item")
        before = drawn.count()
        page.uncheck("#live input")
        choose_preset(page, "angry")
        wait_for_slider(page, "AU4", 5)
        wait_for(page, AUS, "element.value === args[0]", angry)
        # Nobody has drawn it yet, and the picture says so.
        wait_for(page, "#stage", "element.classList.contains('stale')")
        press(page, "#draw", "Enter")
        wait_for_said(page, angry)
        metadata = read_metadata(download(page, "#download", tmp_path))
        assert metadata["aus"] == angry and metadata["seed"] == 0
        assert drawn.count() == before + 1

        # Back to the first picture: its sliders come back as well, and nothing is drawn again.
        drawn.nth(1).click()
        wait_for_said(page, "AU12=3")
        wait_for_slider(page, "AU4", 0)
        assert drawn.count() == before + 1

        # A file brings its controls as well.
        page.set_input_files("#open input, input[type=file][accept*=png]", next(tmp_path.iterdir()))
        wait_for_said(page, angry)
        wait_for_slider(page, "AU4", 5)

        page.check("#live input")
        choose_preset(page, "sad")
        wait_for_said(page, format_aus("sad"))
        page.click("#other-expression")
        is_another = "!element.innerText.startsWith(args[0]) && element.innerText.includes('seed 0')"
        wait_for(page, "#said", is_another, f"{format_aus('sad')} ·")


def test_every_key_draws(window):
    with window() as page:
        slider, number = "#AU1 input[type=range]", "#AU1 input[type=number]"
        for keys, value in (
            (["ArrowRight"] * 3, "0.3"),
            (["End"], "5"),
            (["ArrowLeft"], "4.9"),
            (["Home", "PageUp"], "0.5"),
        ):
            press(page, slider, *keys)
            wait_for_said(page, f"AU1={value} AU12=3")
        page.fill(number, "2.5")
        press(page, number, "Enter")
        wait_for_said(page, "AU1=2.5 AU12=3")
        page.fill(SEED, "77")
        press(page, SEED, "Enter")
        wait_for(page, "#said", "element.innerText.includes('seed 77') && !element.closest('.stale')")
        page.click("#AU1 .reset")
        wait_for_said(page, "AU12=3")
        page.click(".reset-all")
        wait_for_said(page, "neutral")


def test_a_number_beyond_the_limits(window):
    """Box, text and picture say the same, whatever was typed."""
    with window() as page:
        number = "#AU12 input[type=number]"
        page.fill(number, "9")
        press(page, number, "Enter")
        wait_for_said(page, "AU12=9")
        assert page.input_value(AUS) == "AU12=9" and page.input_value(number) == "9" and page.is_checked(".is-beyond")
        page.fill(number, "99")
        page.locator("#AU12 .problem", has_text="to extrapolate, from −10 to 10").wait_for()
        press(page, number, "Enter")
        wait_for(page, number, "element.value === '9'")
        assert page.input_value(AUS) == "AU12=9" and page.inner_text("#said").startswith("AU12=9 ·")
        page.uncheck(".is-beyond")
        wait_for_said(page, "AU12=5")
        page.fill(AUS, "AU12=-2")
        press(page, AUS, "Enter")
        wait_for_said(page, "AU12=-2")
        assert page.is_checked(".is-beyond") and page.input_value(number) == "-2"
        # Leaving the box, whose text the sliders say, does not undo what they say next.
        page.fill(number, "-3")
        press(page, number, "Enter")
        wait_for_said(page, "AU12=-3")
        page.uncheck(".is-beyond")
        wait_for_said(page, "neutral")


def test_every_wrong_value_is_a_message_that_covers_nothing(window):
    with window() as page:
        # Opened before it is needed: a moment later, Gradio sets its values once more.
        page.get_by_role("button", name="Settings").click()
        for selector, value, key, part in (
            (AUS, "6x+12", "Enter", "`Expression`"),
            (AUS, "AU12=nope", "Tab", "`Expression`"),
            (AUS, "doubtfull <b>", "Enter", "Did you mean"),
            (SEED, "", "Enter", "`Seed`"),
            (PROMPT, "", "Enter", "`Prompt` is empty"),
        ):
            before = page.input_value(selector)
            page.fill(selector, value)
            press(page, selector, key)
            wait_for_message(page, part)
            page.fill(selector, before)
            close_message(page, part)
        for name, value, part in (
            ("num_inference_steps", "9999", "`Steps` goes up to 150"),
            ("guidance_scale", "", "`Guidance`"),
        ):
            selector = f"#{name} input"
            before = page.input_value(selector)
            page.fill(selector, value)
            press(page, selector, "Enter")
            wait_for_message(page, part)
            page.fill(selector, before)
            close_message(page, part)
        assert "Traceback" not in page.inner_text("body")
        box = page.locator("#picture img").bounding_box()
        in_sight = "document.elementFromPoint(args[0], args[1]) === element"
        wait_for(page, "#picture img", in_sight, box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)


def test_the_last_wish_wins(window):
    with window() as page:
        for name in ("angry", "sad", "happy"):
            choose_preset(page, name)
        wait_for_said(page, format_aus("happy"))
        for selector in ("#other-person", "#other-expression"):
            page.click(selector)
            page.click(selector)
        page.wait_for_timeout(500)
        wait_for(page, "#stage", "!element.classList.contains('stale')")
        said = page.inner_text("#said")
        assert said.startswith(page.input_value(AUS)) and said.endswith(f"seed {page.input_value(SEED)}")


def test_another_person_looks_different(window):
    with window() as page:
        prompt = page.input_value(PROMPT)
        page.click("#other-person")
        wait_for(page, "#said", "!element.innerText.includes('seed 0') && !element.closest('.stale')")
        assert page.input_value(PROMPT) != prompt and page.input_value(AUS) == "AU12=3"
        # What was stopped is no reason not to draw the next.
        page.click("#stop")
        page.click("#four")
        page.wait_for_selector("#choice img")
        page.locator("#choice .thumbnail-item").nth(2).click()
        page.wait_for_selector("#picture img")
        wait_for(page, "#stage", "!element.classList.contains('stale')")
        assert page.inner_text("#said").endswith(f"seed {page.input_value(SEED)}")
        page.click("#compare-button")
        page.wait_for_selector("#compare img")
        page.get_by_role("button", name="Back to the face").click()
        page.wait_for_selector("#picture img")
        page.click("#compare-button")
        page.wait_for_selector("#compare img")
        # A new picture ends the comparison.
        choose_preset(page, "sad")
        wait_for_said(page, format_aus("sad"))
        page.wait_for_selector("#picture img")
        assert page.is_hidden("#compare") and page.inner_text("#compare-button") == "Compare to neutral"


def test_presets_have_a_strength_and_mix(window):
    with window() as page:
        page.wait_for_selector(".preset[data-preset=happy] img")
        choose_preset(page, "happy")
        wait_for_said(page, "AU6=4 AU12=4")
        press(page, ".strength input", *["ArrowLeft"] * 10)
        wait_for_said(page, "AU6=2 AU12=2")
        wait_for(page, ".preset[data-preset=happy]", "element.ariaPressed === 'true'")
        page.check(".is-added")
        choose_preset(page, "angry")
        wait_for_said(page, "AU4=2.5 AU5=1.5 AU6=2 AU12=2 AU17=1.5")
        # A slider ends what was chosen, and another way to write the same face marks it again.
        press(page, "#AU26 input[type=range]", "End")
        wait_for(page, ".preset[data-preset=angry]", "element.ariaPressed === 'false'")
        page.fill(AUS, "happy@0.5")
        press(page, AUS, "Enter")
        wait_for_said(page, "AU6=2 AU12=2")
        wait_for(page, ".preset[data-preset=happy]", "element.ariaPressed === 'true'")
        assert page.inner_text(".strength output") == "50 %"
        page.uncheck(".is-added")


def test_what_the_model_does_not_see_is_said(window):
    with window() as page:
        page.fill(PROMPT, "a closeup of a pirate with long hair " + "and glasses " * 30)
        wait_for(page, "#stage", "element.classList.contains('stale')")
        press(page, PROMPT, "Enter")
        page.locator("#remarks p", has_text="does not know: pirate.").wait_for()
        page.locator("#remarks p", has_text="does not see:").wait_for()
        page.get_by_role("button", name="a girl in the snow").click()
        wait_for(page, "#remarks", "!element.querySelector('p')")


def test_the_controls_survive_a_reload_and_go_into_a_link(window, browser, url):
    with window() as page:
        page.fill(SEED, "42")
        press(page, SEED, "Enter")
        choose_preset(page, "sad")
        wait_for_said(page, format_aus("sad"))
        link = page.evaluate("location.href")
        assert "seed=42" in link and "prompt" not in link
        page.goto(url)
        page.wait_for_selector("#picture img")
        wait_for_said(page, format_aus("sad"))
        assert page.input_value(SEED) == "42"
    with opened(browser, link) as page:
        wait_for_said(page, format_aus("sad"))
        assert page.input_value(SEED) == "42" and page.input_value("#AU15 input[type=number]") == "4"
    with opened(browser, f"{url}?seed=many&aus=12E") as page:
        page.locator(".toast-body", has_text="`Seed` is 'many' in this link").wait_for()


def test_a_sweep_and_a_table_by_hand(window, tmp_path):
    with window() as page:
        open_tab(page, "Sweep")
        wait_for(page, "#draw", "element.innerText === 'Draw sweep'")
        page.fill("#sweep-count input", "3")
        page.fill("#sweep-from input", "5")
        press(page, "#sweep-from input", "Enter")
        wait_for_message(page, "both 5, so nothing would move")
        page.fill("#sweep-from input", "0")
        page.click("#draw")
        page.wait_for_selector("#sweep-strip img")
        with Image.open(download(page, "#download-gif", tmp_path)) as gif:
            assert gif.n_frames == 4
        assert len(read_metadata(download(page, "#download-strip", tmp_path))["rows"][0]) == 3

        # A preset shows the face that it draws.
        choose_preset(page, "sad")
        wait_for_said(page, format_aus("sad"))
        page.wait_for_selector("#picture img")
        wait_for(page, "#draw", "element.innerText === 'Draw'")

        open_tab(page, "Table")
        page.click("#draw")
        wait_for_message(page, "Choose a table first")
        table = tmp_path / "faces.csv"
        for text, part in (("", "the file is empty"), ("aus\nAU7=1\n", "faces.csv, line 2")):
            table.write_text(text)
            page.set_input_files("input[type=file][accept*=csv]", str(table))
            page.locator("#table-note .problem", has_text=part).wait_for()
            page.get_by_label("Clear").or_(page.get_by_label("Remove this file")).first.click()
        table.write_text("aus\nhappy\nsad\n")
        page.set_input_files("input[type=file][accept*=csv]", str(table))
        page.get_by_text("2 expressions.").wait_for()
        page.click("#draw")
        wait_for(page, "#download-zip", "!element.disabled")
        with zipfile.ZipFile(download(page, "#download-zip", tmp_path)) as archive:
            assert len(archive.namelist()) == 3


def test_a_photo_by_hand(window, tmp_path):
    # A camera on its side: the file lies, and says so.
    photo = Image.effect_noise((300, 220), 60).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.rotate(90, expand=True).save(tmp_path / "photo.png", exif=exif)
    with window() as page:
        open_tab(page, "Photo")
        page.click("#draw")
        wait_for_message(page, "Choose a photo first")
        page.set_input_files("#photo input[type=file]", str(tmp_path / "photo.png"))
        image = page.locator("#photo img")
        image.scroll_into_view_if_needed()
        wait_for(page, "#photo img", "element.naturalWidth === 300")
        page.wait_for_timeout(300)
        box = image.bounding_box()
        page.mouse.move(box["x"] + 0.7 * box["width"], box["y"] + 0.8 * box["height"])
        page.mouse.down()
        page.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 0.25 * box["height"], steps=4)
        page.mouse.up()
        wait_for(page, "#box-left input", "Math.abs(element.value - 120) <= 2")
        left, top, right, bottom = (
            int(page.input_value(f"#box-{side} input")) for side in ("left", "top", "right", "bottom")
        )
        assert (abs(top - 55) <= 2, abs(right - 210) <= 2, abs(bottom - 176) <= 2) == (True, True, True)
        page.wait_for_selector("#photo .box")
        press(page, "#strength input", "Enter")
        page.wait_for_selector("#edited img")
        edited = pixels(download(page, "#download-photo", tmp_path))
        before = np.asarray(photo)
        assert edited.shape == before.shape
        inside = np.zeros(before.shape[:2], bool)
        inside[top : bottom + 1, left : right + 1] = True
        assert np.array_equal(edited[~inside], before[~inside]) and (edited[inside] != before[inside]).any()


FAINT_TEXTS = """
() => {
  const context = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const mix = (colors) => {
    for (const color of ["white", ...colors]) { context.fillStyle = color; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((part) => part / 255);
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) =>
    element ? [...behind(element.parentElement), getComputedStyle(element).backgroundColor] : [];
  const contrast = (element, color) => {
    const background = behind(element);
    const [low, high] = [mix(background), mix([...background, color])].map(luminance).sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const isText = (element) => element.matches("input[type=number], textarea")
    || [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
  const faint = [...document.querySelectorAll("body *")]
    .filter((element) => isText(element) && !element.closest(":disabled, script, style"))
    .filter((element) => element.checkVisibility({ visibilityProperty: true, opacityProperty: true }))
    .map((element) => [contrast(element, getComputedStyle(element).color), element])
    .filter(([value]) => value < 4.5)
    .map(([value, element]) => `${value.toFixed(2)} ${element.outerHTML.slice(0, 130)}`);
  const range = document.querySelector("#AU12 input[type=range]"), style = getComputedStyle(range);
  for (const name of ["--slider-color", "--body-text-color-subdued"]) {
    const value = contrast(range.closest(".part"), style.getPropertyValue(name));
    if (value < 3) faint.push(`${value.toFixed(2)} ${name}`);
  }
  return faint;
}
"""
"""JavaScript: the texts in sight with a contrast under 4.5, and the marks of sliders with one under 3, as in WCAG."""


def test_everything_can_be_read_by_night_and_by_day(browser, url):
    with opened(browser, url, scheme="dark") as page:
        page.get_by_role("button", name="Settings").click()
        page.click(".more summary")
        page.fill("#AU12 input[type=number]", "99")
        page.locator("#AU12 .problem", has_text="goes from 0 to 5").wait_for()
        for scheme in ("dark", "light"):
            page.emulate_media(color_scheme=scheme)
            wait_for(page, "body", "(document.querySelector('.dark') !== null) === args[0]", scheme == "dark")
            # Some colours fade into the others.
            page.wait_for_timeout(300)
            for tab in ("Face", "Photo", "Sweep", "Table"):
                open_tab(page, tab)
                assert page.evaluate(FAINT_TEXTS) == [], scheme
            # The check sees what is faint.
            title = "document.querySelector('#title p').style.color"
            page.evaluate(f"{title} = getComputedStyle(document.body).backgroundColor")
            assert len(page.evaluate(FAINT_TEXTS)) == 1
            page.evaluate(f"{title} = ''")


def test_a_slow_model_of_sdxl_says_so_and_draws(browser, tiny_xl_dir, tiny_xl_adapter_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("drawing.studio.MAX_QUICK_WEIGHTS", 0)
    base = FineFaceXLPipeline.from_pretrained(tiny_xl_dir, add_watermarker=False)
    base.load_au_adapter(tiny_xl_adapter_dir)
    base.save_pretrained(tmp_path / "model")
    args = app.parse_args(["--model", str(tmp_path / "model"), "--device", "cpu", "--dtype", "float32"])
    settle_device(args)
    with (
        served(app.load_page(args)) as url,
        opened(browser, f"{url}?num_inference_steps=1&aus=4E", first="#picture .empty") as page,
    ):
        # What the link says comes after the page, and would replace what is typed before.
        wait_for(page, AUS, "element.value == 'AU4=5'")
        assert f"Model: {tmp_path / 'model'}" in page.inner_text("#title")
        says = "() => getComputedStyle(document.querySelector('#picture .empty'), '::after').content"
        assert page.evaluate(says) == '"Nothing is drawn yet. Press Draw."'
        page.get_by_text("this model takes long here").wait_for()
        assert not page.is_checked("#live input")
        assert page.inner_text("#other-person") == "Another seed"
        page.fill(AUS, "")
        assert "6C+12D" in page.get_attribute("#aus textarea, #aus input", "placeholder")
        page.fill(AUS, "12E")
        prompt = page.input_value(PROMPT)
        press(page, AUS, "Enter")
        wait_for_said(page, "AU12=5")
        page.click("#other-person")
        wait_for(page, "#said", "!element.innerText.endsWith('seed 0') && !element.closest('.stale')")
        assert page.input_value(PROMPT) == prompt


def test_two_sides_are_linked_until_they_are_unlinked(browser):
    with gr.Blocks() as demo:
        face = face_controls("AU12=3", ("AU12L", "AU12R", "AU26"))
        said = gr.Textbox(elem_id="said")
        face.input(None, face, said, js="(aus) => aus", queue=False)
        back = gr.Button("back", elem_id="back")
        back.click(None, None, face, js="() => 'AU12L=4 AU12R=1 AU26=2'", queue=False)
    with served(demo) as url:
        page = browser.new_page()
        page.goto(url)
        left, right = (f".side[data-name=AU12{side}] input[type=range]" for side in "LR")
        for selector in (left, "#said textarea", "#back"):
            page.wait_for_selector(selector)
        assert page.is_hidden(right) and page.locator("#AU26 .link").count() == 0
        page.get_by_role("img", name="moves the mouth", exact=True).wait_for()
        press(page, left, "ArrowRight")
        wait_for(page, "#said textarea", "element.value === 'AU12=3.1'")
        page.click("#AU12 .link")
        press(page, right, "End")
        wait_for(page, "#said textarea", "element.value === 'AU12L=3.1 AU12R=5'")
        page.get_by_role("img", name="moves the mouth, on the person's left: on the right of the picture").wait_for()
        page.click("#AU12 .link")
        wait_for(page, "#said textarea", "element.value === 'AU12=3.1'")
        assert page.is_hidden(right)
        page.click("#back")
        wait_for(page, right, "element.value === '1' && element.offsetParent")
        page.close()


def test_on_a_phone(browser, url):
    nameless = """() => [...document.querySelectorAll("button, input, textarea")].filter(e => e.offsetParent && !(
        e.labels?.length || e.ariaLabel || e.title || e.innerText.trim() || e.querySelector("img")?.alt
    )).map(e => e.outerHTML)"""
    with opened(browser, url, 390, 844, has_touch=True) as page:
        # Presets are the next thing under the picture.
        said, presets = page.locator("#said").bounding_box(), page.locator(".presets").first.bounding_box()
        assert 0 <= presets["y"] - said["y"] - said["height"] < 40
        # The picture and the button stay in sight, and above the sliders that pass below them.
        page.locator("#AU26").scroll_into_view_if_needed()
        page.wait_for_timeout(300)
        box = page.locator("#picture img").bounding_box()
        assert box["y"] >= 0 and box["y"] + box["height"] < page.locator("#AU26").bounding_box()["y"]
        on_top = (
            "[...Array(20).keys()].every(i => element.contains(document.elementFromPoint(60, args[0] + i * args[1])))"
        )
        wait_for(page, "#stage", on_top, box["y"], box["height"] / 20)
        button = page.locator("#draw").bounding_box()
        assert button["y"] + button["height"] <= 844
        page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
        last = page.locator("#tools").bounding_box()
        assert last["y"] + last["height"] <= page.locator("#draw").bounding_box()["y"]
        for tab in ("Photo", "Sweep", "Table", "Face"):
            open_tab(page, tab)
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
            assert page.evaluate(nameless) == []
        page.fill(SEED, "")
        press(page, SEED, "Enter")
        wait_for_message(page, "`Seed`")
        page.fill(SEED, "0")
        page.locator(".preset[data-preset=sad]").tap()
        wait_for_said(page, format_aus("sad"))


@pytest.mark.slow
def test_the_exported_space_runs_as_it_is(browser, tmp_path):
    assert export.main([str(TOY_MODEL), str(tmp_path / "space"), "--space"]) == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port), "PYTHONPATH": ""}
    process = subprocess.Popen([sys.executable, "app.py"], cwd=tmp_path / "space", env=environment)
    try:
        for _ in range(240):
            assert process.poll() is None, "app.py has ended."
            with suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
                break
            time.sleep(0.5)
        with opened(browser, f"http://127.0.0.1:{port}/") as page:
            choose_preset(page, "sad")
            wait_for_said(page, format_aus("sad"))
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.mark.slow
def test_the_picture_of_the_page(browser, tmp_path):
    """SCREENSHOT=docs/app.png pytest tests/test_app.py -m slow -k picture_of_the_page"""
    path = Path(os.environ.get("SCREENSHOT", tmp_path / "app.png"))
    with served(actions.build(toy_studio())) as url, opened(browser, url, 1160, 1150) as page:
        for name in ("surprised", "angry", "sad", "disgusted", "happy"):
            choose_preset(page, name)
            wait_for_said(page, format_aus(name))
        page.wait_for_selector(".preset[data-preset=worried] img", state="attached")
        page.mouse.move(0, 0)
        page.wait_for_timeout(1000)
        page.screenshot(path=path)
    with Image.open(path) as image:
        image = image.convert("RGB")
        image.quantize(palette=image.quantize(256), dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)
    assert path.stat().st_size < 400 * 1024
