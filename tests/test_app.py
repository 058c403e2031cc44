import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image

from action_units import PRESETS, action_units_of, format_aus
from drawing.files import read_metadata
from drawing.jobs import Job
from drawing.model import Weights
from drawing.studio import Studio
from hub import export
from program import TOY_MODEL


pytest.importorskip("gradio", minversion="6", reason="needs Gradio 6 or newer: pip install gradio")
gradio_client = pytest.importorskip("gradio_client")

import app  # noqa: E402  (it ends the process where Gradio is missing)


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
AUS = "#aus textarea, #aus input"
JOB = Job("a boy", aus="AU6=3 AU12=4", seed=3, num_inference_steps=2)


@pytest.fixture(scope="module")
def studio(tiny_sd_dir, tiny_adapter_dir) -> Studio:
    return Studio(Weights(tiny_sd_dir, tiny_adapter_dir), torch.device("cpu"), "float32")


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


# --------------------------------------------------------------------------------------------------------------------
# What stands in the controls
# --------------------------------------------------------------------------------------------------------------------


def test_the_controls_make_a_job():
    values = ON_SCREEN | {"aus": "6C+12D", "negative_prompt": "glasses"}
    job = app.make_screen_job(Job("", height=128, width=128), **values)
    assert (job.aus, job.negative_prompt, job.height) == ("AU6=3 AU12=4", "glasses", 128)
    assert app.make_screen_job(Job(""), **ON_SCREEN).negative_prompt is None


def test_aus_in_the_prompt_count_when_the_sliders_are_at_rest():
    values = ON_SCREEN | {"prompt": "a boy <AU4=2>", "aus": "neutral"}
    job = app.make_screen_job(Job(""), **values)
    assert (job.prompt, job.aus) == ("a boy", "AU4=2")


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"prompt": ""}, "`Prompt` is empty"),
        ({"prompt": None}, "`Prompt` is empty"),
        ({"prompt": "a boy <AU7=3>"}, "AU7"),
        ({"prompt": "a boy <AU6=3>"}, "`Prompt` and in `Expression`"),
        ({"aus": "doubtfull"}, "`Expression` is 'doubtfull'"),
        ({"aus": "AU12=50"}, "`Expression` sets AU12 to 50"),
        ({"seed": None}, "`Seed` has to be a whole number"),
        ({"seed": -1}, "`Seed` has to be a whole number"),
        ({"num_inference_steps": None}, "`Steps`"),
        ({"guidance_scale": None}, "`Guidance`"),
        ({"au_guidance_scale": "much"}, "`Expression guidance`"),
        ({"au_scale": float("nan")}, "`AU strength`"),
    ],
)
def test_a_wrong_value_is_called_by_its_label(values, part):
    with pytest.raises(ValueError, match=re.escape(part)):
        app.make_screen_job(Job(""), **ON_SCREEN | values)


def test_every_au_has_its_place_on_the_screen_once():
    regions = [region for regions in app.FACE_PARTS.values() for region in regions]
    assert all(regions.count(unit.region) == 1 for unit in action_units_of())


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
    monkeypatch.setattr(app, "Studio", lambda *args: pytest.fail("A model was loaded."))
    assert app.main(options) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and part in captured.err


def test_without_gradio_one_line_says_how_to_install_it():
    code = "import runpy, sys; sys.modules['gradio'] = None; runpy.run_path('app.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "pip install gradio" in done.stderr


@contextmanager
def served(studio: Studio):
    """The address of a running page."""
    demo = app.build(studio)
    app.serve(demo, prevent_thread_lock=True, quiet=True)
    try:
        yield demo.local_url
    finally:
        demo.close()


@pytest.fixture(scope="module")
def client(studio):
    with served(studio) as url:
        yield gradio_client.Client(url, verbose=False)


def screen(**values) -> list:
    """The arguments of an endpoint: the controls, and the checkbox for one guidance at their end."""
    return [*(ON_SCREEN | {"au_guidance_scale": 0} | values).values(), True]


def test_the_page_draws_what_its_controls_say(client, studio, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    results = client.predict(*screen(), api_name="/draw")
    path = results[0]["value"]
    assert np.array_equal(pixels(path), np.asarray(studio.draw(JOB)))
    assert read_metadata(path) | vars(JOB) == read_metadata(path)


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"prompt": " "}, "`Prompt` is empty"),
        ({"aus": "<b>x</b>"}, "&lt;b&gt;x"),
        ({"seed": 1.5e300}, "greater than maximum"),
        ({"num_inference_steps": 10_000}, "greater than maximum"),
    ],
)
def test_a_wrong_value_is_a_message(client, values, part):
    with pytest.raises(gradio_client.exceptions.AppError) as caught:
        client.predict(*screen(**values), api_name="/draw")
    assert part in str(caught.value) and "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    ("ends", "part"), [((50, 5), "`From` sets AU12 to 50"), ((0, None), "`To` is empty"), ((0, "x"), "`To`")]
)
def test_a_wrong_sweep_is_a_message(ends, part):
    with pytest.raises(ValueError, match=re.escape(part)):
        app.read_sweep(JOB, "AU12", *ends, 3)


def test_nobody_waits_for_the_page_of_a_slow_model(studio, monkeypatch, tmp_path):
    assert app.Page(studio, tmp_path).first_picture is not None
    monkeypatch.setattr("drawing.studio.MAX_QUICK_WEIGHTS", 0)
    assert app.Page(studio, tmp_path).first_picture is None


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
    jobs = [client.submit(*screen(seed=seed), api_name="/draw") for seed in range(3)]
    jobs.append(client.submit("AU12", 0, 5, 2, *screen(), api_name="/sweep"))
    for job in jobs:
        job.result(timeout=60)
    assert most == [1] * 5


def test_a_table_comes_back_as_a_zip(client, tmp_path):
    table = tmp_path / "faces.csv"
    table.write_text("aus\nhappy\nsad\n")
    pictures, archive, command = client.predict(gradio_client.handle_file(str(table)), *screen(), api_name="/table")
    with zipfile.ZipFile(archive["value"]) as opened:
        assert len(opened.namelist()) == 3 and "metadata.csv" in opened.namelist()
    assert len(pictures) == 2 and "--aus-from=faces.csv" in command["value"]


# --------------------------------------------------------------------------------------------------------------------
# In a browser
# --------------------------------------------------------------------------------------------------------------------


def embedded_studio() -> Studio:
    return Studio(Weights(str(TOY_MODEL)), torch.device("cpu"), "float32")


@pytest.fixture(scope="module")
def url():
    """The page of the embedded model, in a hurry."""
    studio = embedded_studio()
    studio.defaults = replace(studio.defaults, num_inference_steps=2)
    with served(studio) as url:
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
def opened(browser, url: str, width: int = 1280, height: int = 900, **options):
    """A page with its first picture on it; whoever speaks to another host, or breaks a script, fails."""
    context = browser.new_context(viewport={"width": width, "height": height}, reduced_motion="reduce", **options)
    page = context.new_page()
    page.set_default_timeout(60_000)
    hosts, broken = set(), []
    page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
    page.on("pageerror", lambda error: broken.append(str(error)))
    page.goto(url)
    page.wait_for_selector("#picture img")
    yield page
    assert hosts <= {"127.0.0.1", None} and broken == []
    context.close()


def wait_for(page, selector: str, condition: str, *args) -> None:
    """Until `condition`, JavaScript on `element` and `args`, is true."""
    script = f"([selector, args]) => {{ const element = document.querySelector(selector); return {condition}; }}"
    page.wait_for_function(script, arg=[selector, args])


def wait_for_said(page, text: str) -> None:
    wait_for(page, "#said", "element.innerText.includes(args[0])", text)


def wait_for_slider(page, name: str, value: float) -> None:
    wait_for(page, f"#{name} input[type=number]", "element.value == args[0]", value)


def choose_preset(page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def download(page, selector: str, folder: Path) -> Path:
    with page.expect_download() as caught:
        page.click(selector)
    path = folder / caught.value.suggested_filename
    caught.value.save_as(path)
    return path


def test_a_face_by_hand(browser, url, tmp_path):
    angry = format_aus(PRESETS["angry"])
    with opened(browser, url) as page:
        # An arrow key is a tenth, and the text follows.
        page.focus("#AU1 input[type=range]")
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        wait_for(page, AUS, "element.value.includes('AU1=0.3')")

        page.uncheck("#live input")
        choose_preset(page, "angry")
        wait_for_slider(page, "AU4", 5)
        assert page.input_value(AUS) == angry
        page.focus("#draw")
        page.keyboard.press("Enter")
        wait_for_said(page, angry)
        metadata = read_metadata(download(page, "#download", tmp_path))
        assert metadata["aus"] == angry and metadata["seed"] == 0
        assert page.locator("#strip .thumbnail-item").count() == 2

        # Back to the first picture: its sliders come back as well.
        page.locator("#strip .thumbnail-item").nth(1).click()
        wait_for_said(page, "AU12=3")
        wait_for_slider(page, "AU4", 0)

        page.check("#live input")
        choose_preset(page, "sad")
        wait_for_said(page, format_aus("sad"))
        page.click("#other-expression")
        is_another = "!element.innerText.startsWith(args[0]) && element.innerText.includes('seed 0')"
        wait_for(page, "#said", is_another, f"{format_aus('sad')} ·")
        page.click("#other-person")
        wait_for(page, "#said", "!element.innerText.includes('seed 0')")


def test_a_wrong_value_is_a_message_beside_the_picture(browser, url):
    with opened(browser, url) as page:
        page.fill(AUS, "doubtfull <b>")
        page.click("#draw")
        page.get_by_text("is no preset").first.wait_for()
        assert "Traceback" not in page.inner_text("body")
        box = page.locator("#picture img").bounding_box()
        in_sight = "document.elementFromPoint(args[0], args[1]) === element"
        wait_for(page, "#picture img", in_sight, box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.fill(AUS, "AU12=-2")
        page.keyboard.press("Enter")
        wait_for_said(page, "AU12=-2")
        assert page.is_checked("#beyond input") and page.input_value("#AU12 input[type=number]") == "-2"


def test_a_sweep_and_a_table_by_hand(browser, url, tmp_path):
    with opened(browser, url) as page:
        page.get_by_role("tab", name="Sweep").click()
        page.fill("#sweep-count input[type=number]", "3")
        page.click("#draw-sweep")
        page.wait_for_selector("#sweep-strip img")
        with Image.open(download(page, "#download-gif", tmp_path)) as gif:
            assert gif.n_frames == 4
        assert len(read_metadata(download(page, "#download-strip", tmp_path))["rows"][0]) == 3

        page.get_by_role("tab", name="Table").click()
        page.click("#draw-table")
        page.get_by_text("Choose a file first").first.wait_for()
        table = tmp_path / "faces.csv"
        table.write_text("aus\nhappy\nsad\n")
        page.set_input_files("input[type=file]", str(table))
        page.get_by_text("faces", exact=True).first.wait_for()
        page.click("#draw-table")
        wait_for(page, "#download-zip", "!element.disabled")
        with zipfile.ZipFile(download(page, "#download-zip", tmp_path)) as archive:
            assert len(archive.namelist()) == 3


def test_on_a_phone(browser, url):
    nameless = """() => [...document.querySelectorAll("button, input, textarea")].filter(e => e.offsetParent && !(
        e.labels?.length || e.ariaLabel || e.title || e.innerText.trim() || e.querySelector("img")?.alt
    )).map(e => e.outerHTML)"""
    with opened(browser, url, 390, 844, has_touch=True) as page:
        # The picture and the button stay in sight, and above the sliders that pass below them.
        page.locator("#AU26").scroll_into_view_if_needed()
        page.wait_for_timeout(300)
        box = page.locator("#picture img").bounding_box()
        assert box["y"] >= 0 and box["y"] + box["height"] < page.locator("#AU26").bounding_box()["y"]
        on_top = (
            "[...Array(20).keys()].every(i => element.contains(document.elementFromPoint(60, args[0] + i * args[1])))"
        )
        wait_for(page, "#stage", on_top, box["y"], box["height"] / 20)
        assert page.locator("#draw").bounding_box()["y"] < 844
        for tab in ("Sweep", "Table", "Face"):
            page.get_by_role("tab", name=tab).click()
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
            assert page.evaluate(nameless) == []
        page.get_by_role("button", name="sad", exact=True).tap()
        wait_for_said(page, "AU15=4")


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
    with served(embedded_studio()) as url, opened(browser, url, 1160, 1150) as page:
        for name in ("surprised", "angry", "sad", "disgusted", "happy"):
            choose_preset(page, name)
            wait_for_said(page, format_aus(name))
        page.mouse.move(0, 0)
        page.wait_for_timeout(1000)
        page.screenshot(path=path)
    with Image.open(path) as image:
        image.convert("RGB").save(path, optimize=True)
    assert path.stat().st_size < 400 * 1024
