# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""What is on the page, in the order in which it stands there. What it does stands in `actions.py`."""

import html
from types import SimpleNamespace

import gradio as gr

from action_units import action_units_of
from drawing.jobs import Job
from drawing.photo import NO_DETECTOR, has_detector
from drawing.studio import MAX_ROWS, Studio
from page.face_controls import face_controls, plain_name, sides_of


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
COMPARE, BACK = "Compare to neutral", "Back to the face"
TABS = {"face": "Face", "photo": "Photo", "sweep": "Sweep", "table": "Table"}
BOX_SIDES = ("Left", "Top", "Right", "Bottom")
EXAMPLE_PROMPTS = {
    "a man with a beard": "a closeup of a man with short black hair and a beard in the city",
    "a girl in the snow": "a portrait of a girl with curly red hair and glasses in the snow",
    "a boy at the beach": "a photo of a boy with short blond hair at the beach, wearing a yellow shirt",
    "a woman at sunset": "a portrait of a woman with long gray hair and dark skin at sunset",
}
IMAGE = {"type": "filepath", "interactive": False, "show_label": False, "buttons": ["fullscreen"]}


def lay_out(studio: Studio, first: Job) -> SimpleNamespace:
    """The components by name; `first` is what the controls say on a new page."""
    ui = SimpleNamespace()
    num_aus = len(action_units_of(studio.au_names))
    gr.HTML(
        f"<h1>FineFace</h1><p>Say who it is, and move {num_aus} muscles of the face. "
        f"Model: {html.escape(describe_model(studio))}</p>",
        elem_id="title",
    )
    add_words(ui, first)
    with gr.Row():
        with gr.Column(scale=5, min_width=300, elem_id="left"):
            with gr.Column(elem_id="stage"), gr.Tabs(selected="face") as ui.tabs:
                with gr.Tab(TABS["face"], id="face", elem_id="face"):
                    add_pictures(ui)
                with gr.Tab(TABS["photo"], id="photo", render_children=True):
                    add_photo(ui, studio)
                with gr.Tab(TABS["sweep"], id="sweep", render_children=True):
                    add_sweep(ui, studio)
                with gr.Tab(TABS["table"], id="table", render_children=True):
                    add_table(ui)
            with gr.Column(elem_id="tools"):
                add_tools(ui)
        with gr.Column(scale=7, min_width=300, elem_id="right"):
            ui.face = face_controls(first.aus, studio.au_names)
            ui.live = gr.Checkbox(
                studio.is_quick, label="Draw at once when a slider or a preset is chosen", elem_id="live"
            )
            with gr.Accordion("Settings", open=False):
                add_settings(ui, first)
    # As `Page.read_job` takes them.
    ui.controls = [ui.prompt, ui.aus, ui.seed, *ui.settings, ui.together]
    # As `Page.show` gives them.
    ui.cards = [ui.picture, ui.compared, ui.choice, ui.said, ui.remarks, ui.download, ui.python, ui.command]
    ui.cards += [ui.compare, ui.shown, ui.drawn, ui.kept]
    return ui


def describe_model(studio: Studio) -> str:
    if studio.is_toy:
        return "the small one that comes with this page and draws cartoon faces"
    return studio.weights.model + (f" with {studio.weights.adapter}" if studio.weights.adapter else "")


def add_words(ui: SimpleNamespace, first: Job) -> None:
    with gr.Row(elem_id="words", equal_height=True):
        ui.prompt = gr.Textbox(
            first.prompt, label=LABELS["prompt"], lines=1, max_lines=4, scale=5, min_width=280, elem_id="prompt"
        )
        ui.aus = gr.Textbox(
            first.aus,
            label=LABELS["aus"],
            placeholder="6C+12D, AU12=2.5, happy@0.5 + AU4=2",
            scale=3,
            min_width=200,
            elem_id="aus",
        )
        ui.seed = gr.Number(first.seed, label=LABELS["seed"], precision=0, scale=1, min_width=100, elem_id="seed")
        with gr.Column(scale=1, min_width=170):
            ui.draw = gr.Button("Draw", variant="primary", elem_id="draw")
            ui.other_person = gr.Button("Another person", size="sm", elem_id="other-person")
    ui.remarks = gr.HTML(elem_id="remarks")
    ui.examples = gr.Dataset(
        components=["textbox"],
        samples=[[prompt] for prompt in EXAMPLE_PROMPTS.values()],
        sample_labels=list(EXAMPLE_PROMPTS),
        label="Examples",
        show_label=False,
        elem_classes="chips",
    )
    # The request numbers of the tabs: what is drawn for an older one is not wanted any more.
    ui.asks = [gr.Number(0, visible="hidden") for _ in TABS]
    # What the controls said when the picture was drawn, as JSON.
    ui.drawn = gr.Textbox("", visible="hidden")
    ui.kept = gr.BrowserState(None, storage_key="fineface", secret="fineface")
    ui.shown = gr.State(None)


def add_pictures(ui: SimpleNamespace) -> None:
    ui.picture = gr.Image(label="Picture", elem_id="picture", **IMAGE)
    ui.compared = gr.ImageSlider(
        label="Neutral and now",
        type="filepath",
        interactive=False,
        visible=False,
        show_label=False,
        buttons=[],
        elem_id="compare",
    )
    ui.choice = gallery("Choose one of four people", columns=2, visible=False, elem_id="choice")
    ui.choices = gr.State([])
    ui.said = gr.HTML(elem_id="said", html_template='<div role="status" aria-live="polite">${value}</div>')


def gallery(label: str, **options) -> gr.Gallery:
    return gr.Gallery(label=label, height="auto", allow_preview=False, interactive=False, buttons=[], **options)


def add_tools(ui: SimpleNamespace) -> None:
    """What can be done with the picture, and the pictures before it."""
    ui.history = gr.State([])
    with gr.Row():
        ui.other_expression = gr.Button("Other expression", size="sm", elem_id="other-expression", min_width=140)
        ui.compare = gr.Button(COMPARE, size="sm", elem_id="compare-button", min_width=150)
        ui.four = gr.Button("Four people", size="sm", elem_id="four", min_width=100)
    with gr.Row():
        ui.download = gr.DownloadButton("Download PNG", size="sm", elem_id="download", min_width=110)
        ui.open = gr.UploadButton("Open a PNG", size="sm", file_types=[".png"], elem_id="open", min_width=130)
        ui.stop = gr.Button("Stop", size="sm", elem_id="stop", min_width=70)
    ui.strip = gallery(
        "Last pictures: choose one to go back to it",
        columns=6,
        fit_columns=False,
        object_fit="cover",
        elem_id="strip",
        elem_classes="strip",
    )
    with gr.Accordion("The same picture from code", open=False):
        ui.python = code_box("Python", "python")
        ui.command = code_box("Command line", "shell")


def code_box(label: str, language: str, visible: bool = True) -> gr.Code:
    options = {"interactive": False, "show_line_numbers": False, "wrap_lines": True}
    return gr.Code(label=label, language=language, visible=visible, **options)


def add_photo(ui: SimpleNamespace, studio: Studio) -> None:
    """Another expression on a photograph, inside a box around the face."""
    gr.Markdown(
        "Another expression on a face: only what is inside the oval changes. Say in the prompt who is in the photo."
        + (" The model of this page draws cartoons; photographs need other weights." if studio.is_toy else "")
    )
    ui.edited = gr.ImageSlider(
        label="Before and after",
        type="filepath",
        interactive=False,
        visible=False,
        buttons=["fullscreen"],
        elem_id="edited",
    )
    ui.photo = gr.Image(
        label="Photo", type="filepath", sources=["upload", "clipboard"], elem_id="photo", buttons=[], height=None
    )
    how = "The face is found; or drag over it." if has_detector() else f"Drag over the face. {NO_DETECTOR}"
    ui.photo_note = gr.HTML(f"<p>{how}</p>", elem_id="photo-note")
    with gr.Row():
        ui.box = [
            gr.Number(label=side, precision=0, min_width=70, elem_id=f"box-{side.lower()}") for side in BOX_SIDES
        ]
        ui.strength = gr.Number(0.8, label="Change", step=0.05, min_width=80, elem_id="strength")
    ui.photo_inputs = [ui.photo, ui.strength, *ui.box]
    ui.download_photo = gr.DownloadButton("Download the photo", size="sm", interactive=False, elem_id="download-photo")


def add_sweep(ui: SimpleNamespace, studio: Studio) -> None:
    gr.Markdown("The face moves; the person stays.")
    ui.kind = gr.Radio(["One muscle", "Into another expression"], value="One muscle", show_label=False)
    with gr.Row() as ui.of_muscle:
        aus = [
            (f"{plain_name(unit)} · {name}", name)
            for unit in action_units_of(studio.au_names)
            for name in dict.fromkeys([unit.name, *sides_of(unit, studio.au_names)])
        ]
        au = gr.Dropdown(aus, value="AU12" if "AU12" in dict(map(reversed, aus)) else aus[0][1], label="Muscle")
        first = gr.Number(0, label="From", step=0.5, min_width=80, elem_id="sweep-from")
        last = gr.Number(5, label="To", step=0.5, min_width=80, elem_id="sweep-to")
    with gr.Row(visible=False) as ui.of_expression:
        start = gr.Textbox("neutral", label="From", elem_id="change-from", min_width=120)
        end = gr.Textbox(label="To", placeholder="the expression above", elem_id="change-to", min_width=120)
    count = gr.Number(6, label="Pictures", precision=0, elem_id="sweep-count")
    ui.sweep = [ui.kind, au, first, last, start, end, count]
    gif = gr.Image(label="Animation", elem_id="sweep-gif", **IMAGE)
    strip = gr.Image(label="Strip", elem_id="sweep-strip", visible="hidden", **IMAGE)
    with gr.Row():
        download_gif = gr.DownloadButton("Download GIF", size="sm", elem_id="download-gif", interactive=False)
        download_strip = gr.DownloadButton("Download strip", size="sm", elem_id="download-strip", interactive=False)
        ui.stop_sweep = gr.Button("Stop", size="sm", min_width=70)
    ui.swept = [gif, strip, download_gif, download_strip, code_box("Command line", "shell", visible=False)]


def add_table(ui: SimpleNamespace) -> None:
    """Expressions from a file, and a zip of their pictures."""
    gr.Markdown(
        "A picture of this person for each row of a table: a column `aus` (`6C+12D`, `doubtful@0.5`, …), columns "
        f"`AU1`, `AU2`, …, or what OpenFace, LibreFace, py-feat, ARKit or MediaPipe write. At most {MAX_ROWS} rows."
    )
    ui.upload = gr.File(
        label="CSV, TSV, JSON or JSON Lines", file_types=[".csv", ".tsv", ".jsonl", ".json"], height=150
    )
    ui.table_note = gr.HTML(elem_id="table-note", html_template='<div role="status">${value}</div>')
    ui.expressions = gr.State(None)
    pictures = gr.Gallery(label="Pictures", height="auto", interactive=False, buttons=[], elem_classes="strip")
    with gr.Row():
        download = gr.DownloadButton("Download zip", size="sm", interactive=False, elem_id="download-zip")
        ui.stop_table = gr.Button("Stop", size="sm", min_width=70, elem_id="stop-table")
    ui.tabled = [pictures, download, code_box("Command line", "shell", visible=False)]


def add_settings(ui: SimpleNamespace, first: Job) -> None:
    """What is rarely changed, in the order of `LABELS`."""

    def number(name: str, value: float, step: float, info: str, precision: int | None = None) -> gr.Number:
        return gr.Number(
            value, label=LABELS[name], info=info, step=step, precision=precision, min_width=130, elem_id=name
        )

    is_joint = first.au_guidance_scale is None
    au_guidance_scale = first.guidance_scale if is_joint else first.au_guidance_scale
    negative_prompt = gr.Textbox(label=LABELS["negative_prompt"], placeholder="glasses", elem_id="negative_prompt")
    with gr.Row():
        numbers = [
            number("num_inference_steps", first.num_inference_steps, 1, "more is slower", precision=0),
            number("guidance_scale", first.guidance_scale, 0.5, "how closely to follow the prompt"),
            number("au_guidance_scale", au_guidance_scale, 0.5, "how closely to follow the sliders"),
            number("au_scale", first.au_scale, 0.1, "how strongly the AUs are added; 0 is off"),
        ]
    ui.together = gr.Checkbox(is_joint, label="One guidance for prompt and expression, as in the paper")
    ui.settings = [negative_prompt, *numbers]
