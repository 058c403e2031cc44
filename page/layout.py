# SPDX-License-Identifier: Apache-2.0
"""Lays out the components of the page from top to bottom. Their actions are in `actions.py`."""

import html
from functools import partial
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
ONE_MUSCLE = "One muscle"
TABS = ("face", "photo", "sweep", "table")
BOX_SIDES = ("Left", "Top", "Right", "Bottom")
EXAMPLE_PROMPTS = {
    "a man with a beard": "a closeup of a man with short black hair and a beard in the city",
    "a girl in the snow": "a portrait of a girl with curly red hair and glasses in the snow",
    "a boy at the beach": "a photo of a boy with short blond hair at the beach, wearing a yellow shirt",
    "a woman at sunset": "a portrait of a woman with long gray hair and dark skin at sunset",
}


def lay_out(studio: Studio, first: Job) -> SimpleNamespace:
    """The components by name; `first` gives the values of the controls on a new page."""
    ui = SimpleNamespace(stops={})
    about = "the small one that comes with this page and draws cartoon faces"
    if not studio.is_toy:
        about = " with ".join(filter(None, (studio.weights.model, studio.weights.adapter)))
    num_aus = len(action_units_of(studio.au_names))
    title = f"Say who it is, and move {num_aus} muscles of the face. Model: {html.escape(about)}"
    gr.HTML(f"<h1>FineFace</h1><p>{title}</p>", elem_id="title")
    add_words(ui, studio, first)
    with gr.Row():
        with gr.Column(scale=5, min_width=300, elem_id="left"):
            with gr.Column(elem_id="stage"), gr.Tabs(selected="face") as ui.tabs:
                with gr.Tab("Face", id="face", elem_id="face"):
                    add_pictures(ui)
                with gr.Tab("Photo", id="photo", render_children=True):
                    add_photo(ui, studio)
                with gr.Tab("Sweep", id="sweep", render_children=True):
                    add_sweep(ui, studio)
                with gr.Tab("Table", id="table", render_children=True):
                    add_table(ui)
            with gr.Column(elem_id="tools"):
                add_tools(ui)
        with gr.Column(scale=7, min_width=300, elem_id="right"):
            ui.face = face_controls(first.aus, studio.au_names)
            slow = None if studio.is_quick else "Off: this model takes long here. Press Draw for a picture."
            label = "Draw at once when a slider or a preset is chosen"
            ui.live = gr.Checkbox(studio.is_quick, label=label, info=slow, elem_id="live")
            with gr.Accordion("Settings", open=False):
                add_settings(ui, first)
    # As `Page.read_job` takes them.
    ui.controls = [ui.prompt, ui.aus, ui.seed, *ui.settings, ui.together]
    # As `Page.show` gives them.
    ui.cards = [ui.picture, ui.compared, ui.choice, ui.said, ui.remarks, ui.download, ui.python, ui.command]
    ui.cards += [ui.compare, ui.shown, ui.drawn, ui.kept]
    return ui


small_button = partial(gr.Button, size="sm", min_width=110)
stop_button = partial(gr.Button, "Stop", size="sm", min_width=70)
download_button = partial(gr.DownloadButton, size="sm", min_width=110, interactive=False)
shown_image = partial(gr.Image, type="filepath", interactive=False, show_label=False, buttons=["fullscreen"])
before_and_after = partial(gr.ImageSlider, type="filepath", interactive=False, visible=False)
gallery = partial(gr.Gallery, height="auto", interactive=False, buttons=[])
code_box = partial(gr.Code, interactive=False, show_line_numbers=False, wrap_lines=True)


def add_words(ui: SimpleNamespace, studio: Studio, first: Job) -> None:
    with gr.Row(elem_id="words", equal_height=True):
        sizes = {"lines": 1, "max_lines": 4, "scale": 5, "min_width": 280}
        ui.prompt = gr.Textbox(first.prompt, label=LABELS["prompt"], elem_id="prompt", **sizes)
        example, sizes = "6C+12D, AU12=2.5, happy@0.5 + AU4=2", {"scale": 3, "min_width": 200}
        ui.aus = gr.Textbox(first.aus, label=LABELS["aus"], placeholder=example, elem_id="aus", **sizes)
        ui.seed = gr.Number(first.seed, label=LABELS["seed"], precision=0, scale=1, min_width=100, elem_id="seed")
        with gr.Column(scale=1, min_width=170):
            ui.draw = gr.Button("Draw", variant="primary", elem_id="draw")
            # Only of the toy model it is known which words make another person.
            another = "Another person" if studio.is_toy else "Another seed"
            ui.other_person = small_button(another, elem_id="other-person")
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
    ui.shown, ui.history, ui.choices = gr.State(None), gr.State([]), gr.State([])


def add_pictures(ui: SimpleNamespace) -> None:
    ui.picture = shown_image(label="Picture", elem_id="picture")
    ui.compared = before_and_after(label="Neutral and now", elem_id="compare", show_label=False, buttons=[])
    ui.choice = gallery(
        label="Choose one of four seeds", columns=2, visible=False, elem_id="choice", allow_preview=False
    )
    ui.said = gr.HTML(elem_id="said", html_template='<div role="status" aria-live="polite">${value}</div>')


def add_tools(ui: SimpleNamespace) -> None:
    """Buttons for the picture, and the pictures before it."""
    with gr.Row():
        ui.other_expression = small_button("Other expression", elem_id="other-expression", min_width=140)
        ui.compare = small_button(COMPARE, elem_id="compare-button", min_width=150)
        ui.four = small_button("Four seeds", elem_id="four", min_width=100)
    with gr.Row():
        ui.download = download_button("Download PNG", elem_id="download", interactive=True)
        ui.open = gr.UploadButton("Open a PNG", size="sm", file_types=[".png"], elem_id="open", min_width=130)
        ui.stops["face"] = stop_button(elem_id="stop")
    look = {"columns": 6, "fit_columns": False, "object_fit": "cover", "elem_id": "strip", "elem_classes": "strip"}
    ui.strip = gallery(label="Last pictures: choose one to go back to it", allow_preview=False, **look)
    with gr.Accordion("The same picture from code", open=False):
        ui.python = code_box(label="Python", language="python")
        ui.command = code_box(label="Command line", language="shell")


def add_photo(ui: SimpleNamespace, studio: Studio) -> None:
    """Another expression on a photograph, inside a box around the face."""
    gr.Markdown(
        "Another expression on a face: only what is inside the oval changes. Say in the prompt who is in the photo."
        + (" The model of this page draws cartoons; photographs need other weights." if studio.is_toy else "")
    )
    ui.edited = before_and_after(label="Before and after", elem_id="edited", buttons=["fullscreen"])
    sources = ["upload", "clipboard"]
    ui.photo = gr.Image(label="Photo", type="filepath", sources=sources, elem_id="photo", buttons=[], height=None)
    how = "The face is found; or drag over it." if has_detector() else f"Drag over the face. {NO_DETECTOR}"
    ui.photo_note = gr.HTML(f"<p>{how}</p>", elem_id="photo-note")
    with gr.Row():
        ui.box = [
            gr.Number(label=side, precision=0, min_width=70, elem_id=f"box-{side.lower()}") for side in BOX_SIDES
        ]
        ui.strength = gr.Number(0.8, label="Change", step=0.05, min_width=80, elem_id="strength")
    with gr.Row():
        ui.download_photo = download_button("Download the photo", elem_id="download-photo")
        ui.stops["photo"] = stop_button(elem_id="stop-photo")


def add_sweep(ui: SimpleNamespace, studio: Studio) -> None:
    gr.Markdown("The face moves; the person stays.")
    kind = gr.Radio([ONE_MUSCLE, "Into another expression"], value=ONE_MUSCLE, show_label=False)
    aus = {}
    for unit in action_units_of(studio.au_names):
        aus |= {name: f"{plain_name(unit)} · {name}" for name in (unit.name, *sides_of(unit, studio.au_names))}
    with gr.Row() as ui.of_muscle:
        choices = [(label, name) for name, label in aus.items()]
        au = gr.Dropdown(choices, value="AU12" if "AU12" in aus else next(iter(aus)), label="Muscle")
        first = gr.Number(0, label="From", step=0.5, min_width=80, elem_id="sweep-from")
        last = gr.Number(5, label="To", step=0.5, min_width=80, elem_id="sweep-to")
    with gr.Row(visible=False) as ui.of_expression:
        start = gr.Textbox("neutral", label="From", elem_id="change-from", min_width=120)
        end = gr.Textbox(label="To", placeholder="the expression above", elem_id="change-to", min_width=120)
    count = gr.Number(6, label="Pictures", precision=0, elem_id="sweep-count")
    # As `read_sweep` takes them.
    ui.sweep = [kind, au, first, last, start, end, count]
    images = [
        shown_image(label="Animation", elem_id="sweep-gif"),
        shown_image(label="Strip", elem_id="sweep-strip", visible="hidden"),
    ]
    with gr.Row():
        downloads = [
            download_button("Download GIF", elem_id="download-gif"),
            download_button("Download strip", elem_id="download-strip"),
        ]
        ui.stops["sweep"] = stop_button(elem_id="stop-sweep")
    ui.swept = [*images, *downloads, code_box(label="Command line", language="shell", visible=False)]


def add_table(ui: SimpleNamespace) -> None:
    """Expressions from a file, and a zip of their pictures."""
    gr.Markdown(
        "A picture of this person for each row of a table: a column `aus` (`6C+12D`, `doubtful@0.5`, …), columns "
        f"`AU1`, `AU2`, …, or what OpenFace, LibreFace, py-feat, ARKit or MediaPipe write. At most {MAX_ROWS} rows."
    )
    types = [".csv", ".tsv", ".jsonl", ".json"]
    ui.upload = gr.File(label="CSV, TSV, JSON or JSON Lines", file_types=types, height=150)
    ui.table_note = gr.HTML(elem_id="table-note", html_template='<div role="status">${value}</div>')
    ui.expressions = gr.State(None)
    pictures = gallery(label="Pictures", elem_classes="strip")
    with gr.Row():
        download = download_button("Download zip", elem_id="download-zip")
        ui.stops["table"] = stop_button(elem_id="stop-table")
    ui.tabled = [pictures, download, code_box(label="Command line", language="shell", visible=False)]


def add_settings(ui: SimpleNamespace, first: Job) -> None:
    """Controls that are rarely changed, in the order of `LABELS`."""
    is_joint = first.au_guidance_scale is None
    au_guidance_scale = first.guidance_scale if is_joint else first.au_guidance_scale
    ui.settings = [gr.Textbox(label=LABELS["negative_prompt"], placeholder="glasses", elem_id="negative_prompt")]
    with gr.Row():
        for name, value, step, info in (
            ("num_inference_steps", first.num_inference_steps, 1, "more is slower"),
            ("guidance_scale", first.guidance_scale, 0.5, "how closely to follow the prompt"),
            ("au_guidance_scale", au_guidance_scale, 0.5, "how closely to follow the sliders"),
            ("au_scale", first.au_scale, 0.1, "how strongly the AUs are added; 0 is off"),
        ):
            options = {"precision": 0 if step == 1 else None, "min_width": 130, "elem_id": name}
            ui.settings.append(gr.Number(value, label=LABELS[name], info=info, step=step, **options))
    ui.together = gr.Checkbox(is_joint, label="One guidance for prompt and expression, as in the paper")
