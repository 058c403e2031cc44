# SPDX-License-Identifier: Apache-2.0
"""The actions of the controls of the page. Actions that need no server are in `controls.js`."""

import base64
import functools
import html
import inspect
import io
import json
import random
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import torch

from action_units import extract_au_tags, read_aus
from drawing.files import read_metadata
from drawing.jobs import Job, canonical_aus, make_job
from drawing.photo import NO_DETECTOR, check_box, face_mask, find_faces, has_detector, open_photo
from drawing.studio import Stopped, Studio, Sweep, file_name, read_expressions, write_gif, write_zip
from page.layout import BACK, BOX_SIDES, COMPARE, LABELS, ONE_MUSCLE, TABS, lay_out


FIRST_EXPRESSION = "polite smile"
# JavaScript has no whole numbers beyond this one.
MAX_SCREEN_SEED = 2**53 - 1
MAX_STEPS = 150
MAX_SWEEP_COUNT = 24
STRIP_LENGTH = 12
NUM_CHOICES = 4
THUMBNAIL_SIDE = 112
# Sessions whose request numbers are remembered, which are more than can wait for a picture.
MAX_SESSIONS = 10_000
KEEP_FILES_S = 24 * 60 * 60
PROGRESS = gr.Progress()


@dataclass(frozen=True)
class Shown:
    """A picture, and the values of the controls when it was asked for."""

    path: str
    job: Job
    values: tuple


@contextmanager
def messages() -> Iterator[None]:
    """Show an error in what was asked for as a message on the screen."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        message = "Out of memory. Start app.py with a smaller model or `--dtype float16`."
        raise gr.Error(message, print_exception=False) from error
    except (ValueError, OSError) as error:
        # Gradio shows messages as HTML.
        raise gr.Error(html.escape(" ".join(str(error).split())), print_exception=False) from error


def answered(action: Callable) -> Callable:
    """Decorate an action: its errors become messages, and what is stopped changes nothing on the screen."""

    @functools.wraps(action)
    def wrapped(*args):
        with messages():
            try:
                return action(*args)
            except Stopped:
                return gr.skip()

    return wrapped


# ---- From controls to jobs, and back ------------------------------------------------------------------------------


def make_screen_job(studio: Studio, **values) -> Job:
    """A checked `Job` from the values of the controls, which errors call by their labels."""
    values["negative_prompt"] = values["negative_prompt"] or None
    for name, most in (("seed", MAX_SCREEN_SEED), ("num_inference_steps", MAX_STEPS)):
        if isinstance(values[name], int) and values[name] > most:
            raise ValueError(f"`{LABELS[name]}` goes up to {most} on this page, but is {values[name]}.")
    _, tag = extract_au_tags(values["prompt"] or "", LABELS["prompt"], studio.au_names)
    # A new page shows a face at rest. AUs in the prompt count more than that.
    if tag is not None and canonical(values["aus"], studio) == "neutral":
        values["aus"] = None
    return make_job(asdict(studio.defaults) | values, lambda name: LABELS.get(name, name), studio.au_names)


def canonical(text: str | None, studio: Studio, label: str = LABELS["aus"]) -> str:
    return canonical_aus(text or "", label, studio.au_names)


def control_values(studio: Studio, job: Job) -> list:
    """The values of the controls for `job`."""
    values = asdict(job) | {"negative_prompt": job.negative_prompt or "", "aus": job.aus or "neutral"}
    is_joint = job.au_guidance_scale is None
    if is_joint:
        values["au_guidance_scale"] = studio.defaults.au_guidance_scale or job.guidance_scale
    return [*(values[name] for name in LABELS), is_joint]


def first_job(studio: Studio) -> Job:
    return replace(studio.defaults, aus=studio.presets.get(FIRST_EXPRESSION, "neutral"))


def read_link(query: Mapping[str, str], studio: Studio) -> Job:
    """The job that the parameters of a link describe; what they leave out is as on a new page."""
    types = {"seed": int, "num_inference_steps": int}
    types |= dict.fromkeys(("guidance_scale", "au_guidance_scale", "au_scale"), float)
    values = {name: value for name, value in asdict(first_job(studio)).items() if name in LABELS}
    for name in LABELS.keys() & query.keys():
        try:
            values[name] = types.get(name, str)(query[name])
        except ValueError:
            raise ValueError(f"`{LABELS[name]}` is {query[name][:40]!r} in this link, and no number.") from None
    return make_screen_job(studio, **values)


def read_picture(path: Path, studio: Studio) -> Job:
    """The job of a PNG file of ours. One of another program, or with several faces, is a ValueError."""
    try:
        metadata = read_metadata(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path.name} does not say how it was made: another program has written it.") from error
    if "aus" not in metadata:
        raise ValueError(f"{path.name} is a sheet or an edited photo. Open a picture of one face.")
    if metadata.get("negative_aus") not in (None, "neutral"):
        gr.Warning(f"The picture was guided away from {metadata['negative_aus']}, for which this page has no control.")
    names = (*LABELS, "height", "width")
    return make_screen_job(studio, **{name: metadata.get(name, getattr(studio.defaults, name)) for name in names})


def read_sweep(job: Job, studio: Studio, kind: str, au: str, first, last, start: str, end: str, count) -> Sweep:
    if count is None or not 2 <= count <= MAX_SWEEP_COUNT:
        raise ValueError(f"`Pictures` has to be from 2 to {MAX_SWEEP_COUNT}, but is {count}.")
    if kind != ONE_MUSCLE:
        start, end = canonical(start, studio, "From"), canonical(end, studio, "To") if (end or "").strip() else job.aus
        if start == end:
            raise ValueError(f"`From` and `To` are both {start}, so nothing would move.")
        return studio.change(replace(job, aus=start), end, int(count))
    for label, value in (("From", first), ("To", last)):
        if value is None:
            raise ValueError(f"`{label}` is empty. Give a number.")
        read_aus(f"{au}={value}", label, studio.au_names)
    if first == last:
        raise ValueError(f"`From` and `To` are both {first:g}, so nothing would move.")
    return studio.sweep_au(job, au, float(first), float(last), int(count))


# ---- The actions --------------------------------------------------------------------------------------------------


class Page:
    """
    The actions of the controls. Pictures are files in folders of their own inside `folder`, which is Gradio's: it
    serves them, and deletes them in time.
    """

    def __init__(self, studio: Studio, folder: Path):
        self.studio, self.folder = studio, folder
        self.first_picture = studio.draw(first_job(studio)) if studio.is_quick else None
        self.thumbnails: dict[str, str] = {}
        # For each session, the request number of each tab from which on pictures are wanted.
        self.wanted: dict[str | None, dict[str, float]] = {}

    # Turns

    def want(self, request: gr.Request, *asks: float) -> None:
        """End what is drawn for a lower request number than that in `asks`, which has one for each tab."""
        before = self.wanted.pop(request.session_hash, {})
        asks = zip(TABS, asks, strict=True)
        self.wanted[request.session_hash] = {tab: max(ask, before.get(tab, 0)) for tab, ask in asks}
        if len(self.wanted) > MAX_SESSIONS:
            del self.wanted[next(iter(self.wanted))]

    def leave(self, request: gr.Request) -> None:
        """End all that is drawn for a window that was closed."""
        self.want(request, *[float("inf")] * len(TABS))

    def progress(self, tab: str, request: gr.Request | None, ask: float, total: int, unit: str = "steps") -> Callable:
        """
        A function that shows how many of `total` are done, and raises `Stopped` as soon as request `ask` is out of
        date. Without a request, as programs send none, it never is.
        """

        def say(done: int) -> None:
            if request is not None and self.wanted.get(request.session_hash, {}).get(tab, 0) > ask:
                raise Stopped
            PROGRESS((done, total), desc="Drawing", unit=unit)

        return say

    # Pictures

    def new_folder(self) -> Path:
        folder = self.folder / uuid.uuid4().hex
        folder.mkdir(parents=True)
        return folder

    def read_job(self, *values) -> Job:
        named = dict(zip((*LABELS, "is_joint"), values, strict=True))
        if named.pop("is_joint"):
            named["au_guidance_scale"] = None
        return make_screen_job(self.studio, **named)

    def show(self, shown: Shown) -> list:
        """The cards of a picture."""
        job = shown.job
        said = f"<b>{html.escape(job.aus or 'as the prompt says')}</b> · seed {job.seed}"
        remarks = "".join(f"<p role='status'>{html.escape(remark)}</p>" for remark in self.studio.remarks(job))
        picture = gr.Image(shown.path, alt_text=f"{job.prompt}, with the expression {job.aus}", visible=True)
        hidden = [gr.ImageSlider(visible=False), gr.Gallery(visible=False)]
        cards = [picture, *hidden, said, remarks, gr.DownloadButton(value=shown.path)]
        cards += [self.studio.python(job), self.studio.command(job), COMPARE]
        return [*cards, shown, json.dumps(shown.values), list(shown.values)]

    def show_new(self, shown: Shown, history: list[Shown]) -> list:
        """The cards of a picture, and the history and the strip that begin with it."""
        history = [shown, *(old for old in history if old.path != shown.path)][:STRIP_LENGTH]
        return [*self.show(shown), history, [(old.path, old.job.aus or "") for old in history]]

    def return_to(self, shown: Shown, history: list[Shown]) -> list:
        """The controls of a picture, and its cards."""
        cards = [*self.show(shown), gr.skip(), gr.skip()] if shown in history else self.show_new(shown, history)
        return [*shown.values, shown.job.aus or "neutral", *cards]

    def draw_file(self, job: Job, request: gr.Request | None = None, ask: float = 0) -> str:
        """Draw `job` into a file, saying how far it is."""
        PROGRESS(0, desc="Waiting for the model")
        on_step = self.progress("face", request, ask, job.num_inference_steps)
        return self.studio.draw_into(self.new_folder() / file_name(job), job, on_step)

    @answered
    def draw(self, request: gr.Request, ask: float, history: list, *values):
        job = self.read_job(*values)
        return self.show_new(Shown(self.draw_file(job, request, ask), job, values), history)

    @answered
    def draw_four(self, request: gr.Request, ask: float, *values):
        """The same words with four seeds, to choose from."""
        job, index, choices = self.read_job(*values), list(LABELS).index("seed"), []
        for seed in [job.seed, *random.sample(range(100_000), NUM_CHOICES - 1)]:
            path = self.draw_file(one := replace(job, seed=seed), request, ask)
            choices.append(Shown(path, one, (*values[:index], seed, *values[index + 1 :])))
        pictures = [(choice.path, f"seed {choice.job.seed}") for choice in choices]
        return [gr.Image(visible=False), gr.ImageSlider(visible=False), gr.Gallery(pictures, visible=True), choices]

    @answered
    def compare(self, request: gr.Request, ask: float, shown: Shown | None, label: str):
        """The picture beside the neutral face of the same person, or again the picture alone."""
        if label == BACK:
            return [gr.Image(visible=True), gr.ImageSlider(visible=False), COMPARE]
        if shown is None:
            raise ValueError("There is no picture to compare. Draw one first.")
        neutral = self.draw_file(replace(shown.job, aus="neutral"), request, ask)
        return [gr.Image(visible=False), gr.ImageSlider((neutral, shown.path), visible=True), BACK]

    def look_back(self, entries: list[Shown], history: list[Shown], event: gr.SelectData) -> list:
        """A picture of the strip or of four seeds, with the controls as they were when it was drawn."""
        return self.return_to(entries[event.index], history)

    @answered
    def open_picture(self, upload: str, history: list[Shown]) -> list:
        """A PNG of ours, with its controls."""
        job = read_picture(Path(upload), self.studio)
        return self.return_to(Shown(upload, job, tuple(control_values(self.studio, job))), history)

    def open(self, request: gr.Request, kept: list | None):
        """
        The controls as the link says, or else as they were when the page was left, or else as on a new page; and the
        picture, if it is there already, or else a request for it.
        """
        job = first_job(self.studio)
        try:
            known = {name: value for name, value in request.query_params.items() if name in LABELS}
            if known:
                job = read_link(known, self.studio)
            elif kept:
                job = self.read_job(*kept)
        except (ValueError, TypeError) as error:
            gr.Warning(html.escape(f"{error} The page begins anew."))
        values = tuple(control_values(self.studio, job))
        if self.first_picture is None or job != first_job(self.studio):
            return [*values, job.aus or "neutral", *[gr.skip()] * NUM_SHOWN, int(self.studio.is_quick)]
        path = self.new_folder() / file_name(job)
        self.studio.write(self.first_picture, path, asdict(job))
        return [*self.return_to(Shown(str(path), job, values), []), 0]

    def draw_presets(self) -> Iterator[dict]:
        """Small pictures of the presets, which are drawn once and kept."""
        if not self.studio.is_quick:
            return
        for count, (name, aus) in enumerate(self.studio.presets.items()):
            if count % 7 == 0:
                yield gr.HTML(pictures=json.dumps(self.thumbnails))
            if name not in self.thumbnails:
                picture = self.studio.draw(replace(self.studio.defaults, aus=aus))
                picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
                data = io.BytesIO()
                picture.save(data, "WEBP", quality=80)
                self.thumbnails[name] = f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
        yield gr.HTML(pictures=json.dumps(self.thumbnails))

    # Controls

    @answered
    def read_expression(self, text: str, face: str):
        """The text as the sliders write it. Sliders that say the same already may be on their way to another face."""
        aus = canonical(text, self.studio)
        return gr.skip() if aus == face else aus

    @answered
    def other_expression(self, text: str) -> list[str]:
        now = canonical(text, self.studio)
        return [random.choice([aus for aus in self.studio.presets.values() if aus != now])] * 2

    def other_person(self, prompt: str) -> list:
        """Another seed; for the toy model other words too, as its words say all but details of a person."""
        seed = random.randrange(100_000)
        if self.studio.is_toy:
            from toy_faces.renderer import caption, sample_portrait

            prompt = caption(sample_portrait(seed), seed)
        return [prompt, seed]

    # Photos

    @answered
    def find_face(self, upload: str | None) -> list:
        """The box around the largest face, and what was found."""
        faces, note = [], ""
        if upload is not None:
            picture = open_photo(upload)
            faces = find_faces(picture) if has_detector() else []
            note = "No face is found. Drag over it." if has_detector() else f"Drag over the face. {NO_DETECTOR}"
        if faces:
            several = f"{len(faces)} faces are found; this is the largest. Drag over another, or"
            note = f"{several if len(faces) > 1 else 'Drag'} over the face if the oval does not fit."
        return [*(faces[0] if faces else [None] * len(BOX_SIDES)), note and f"<p>{note}</p>"]

    @answered
    def edit(self, request: gr.Request, ask: float, upload: str | None, strength: float | None, *values):
        box, values = values[: len(BOX_SIDES)], values[len(BOX_SIDES) :]
        if upload is None:
            raise ValueError("Choose a photo first.")
        if strength is None or not 0 < strength <= 1:
            raise ValueError(f"`Change` has to be above 0 and up to 1, but is {strength}.")
        job, photo = self.read_job(*values), open_photo(upload)
        box = check_box(box, photo.size, "Left, Top, Right, Bottom")
        on_step = self.progress("photo", request, ask, job.num_inference_steps)
        edited, folder = self.studio.edit(photo, face_mask(photo.size, box), job, strength, on_step), self.new_folder()
        before, after = folder / "before.png", folder / f"{Path(upload).stem[:60]}-edited.png"
        photo.save(before, compress_level=1)
        about = asdict(job) | {"picture": Path(upload).name, "strength": strength, "box": list(box)}
        self.studio.write(edited, after, about)
        slider = gr.ImageSlider((str(before), str(after)), visible=True)
        return [slider, gr.DownloadButton(value=str(after), interactive=True)]

    # Sweeps and tables

    def write_sweep(self, sweep: Sweep, request: gr.Request | None = None, ask: float = 0) -> tuple[str, str]:
        """Draw a sweep, and write its animation and its labelled strip."""
        on_picture = self.progress("sweep", request, ask, len(sweep.table.rows[0]), "pictures")
        pictures, sheet, shown = self.studio.sweep(sweep, on_picture)
        folder, stem = self.new_folder(), f"sweep-{sweep.job.seed}"
        gif, strip = folder / f"{stem}.gif", folder / f"{stem}.png"
        write_gif(pictures, gif, shown | self.studio.about)
        self.studio.write(sheet, strip, shown)
        return str(gif), str(strip)

    @answered
    def draw_sweep(self, request: gr.Request, ask: float, *values):
        job = self.read_job(*values[7:])
        sweep = read_sweep(job, self.studio, *values[:7])
        paths = self.write_sweep(sweep, request, ask)
        images = [gr.Image(path, alt_text=f"{job.prompt}, {sweep.title}", visible=True) for path in paths]
        downloads = [gr.DownloadButton(value=path, interactive=True) for path in paths]
        return [*images, *downloads, gr.Code(sweep.command, visible=True)]

    def read_table(self, upload: str | None) -> list:
        """The expressions of a table, as soon as it is there, and what was found."""
        if upload is None:
            return [None, ""]
        job = replace(self.studio.defaults, aus="neutral")
        try:
            jobs, remarks = read_expressions(Path(upload), job, self.studio.au_names)
        except (ValueError, OSError) as error:
            return [None, f"<p class='problem'>{html.escape(' '.join(str(error).split()))}</p>"]
        note = html.escape(" ".join([f"{len(jobs)} expressions.", *remarks]))
        return [(Path(upload).name, {name: job.aus for name, job in jobs.items()}), f"<p>{note}</p>"]

    def draw_table(self, request: gr.Request, ask: float, table: tuple | None, *values) -> Iterator[list]:
        """Each picture as soon as it is there, and then the zip."""
        with messages():
            if table is None:
                raise ValueError("Choose a table first: CSV, TSV, JSON or JSON Lines.")
            base, (table_name, expressions) = self.read_job(*values), table
            folder, drawn = self.new_folder(), {}
            on_picture = self.progress("table", request, ask, len(expressions), "pictures")
            for name, aus in expressions.items():
                job = replace(base, aus=aus)
                try:
                    self.studio.draw_into(folder / name, job, lambda step: on_picture(len(drawn)))
                except Stopped:
                    gr.Info(f"Stopped after {len(drawn)} of {len(expressions)} pictures.")
                    break
                drawn[name] = job
                yield [[(str(folder / name), job.aus) for name, job in drawn.items()], gr.skip(), gr.skip()]
            if not drawn:
                return
            archive = folder / "faces.zip"
            write_zip(archive, folder, drawn, self.studio.au_names)
        command = gr.Code(self.studio.table_command(table_name, base), visible=True)
        yield [gr.skip(), gr.DownloadButton(value=str(archive), interactive=True), command]

    # For programs

    def api_draw(self, *values):
        """Draw one face, and return it as a PNG file that says how it was made."""
        return self.draw_file(self.read_job(*values))

    def api_sweep(self, au, first, last, count, *values):
        """Draw one AU going from `first` to `last`, and return an animation (GIF) and a labelled strip (PNG)."""
        job = self.read_job(*values)
        return self.write_sweep(read_sweep(job, self.studio, ONE_MUSCLE, au, first, last, "", "", count))

    def api_table(self, table, *values):
        """Draw a face for each row of a table of AUs (CSV, TSV, JSON, JSON Lines), and return a zip of them."""
        jobs, _ = read_expressions(Path(table), self.read_job(*values), self.studio.au_names)
        folder = self.new_folder()
        for name, job in jobs.items():
            self.studio.draw_into(folder / name, job)
        write_zip(folder / "faces.zip", folder, jobs, self.studio.au_names)
        return str(folder / "faces.zip")


# The number of values that `Page.show_new` returns.
NUM_SHOWN = 14


# ---- Which control does what --------------------------------------------------------------------------------------


# All that draws waits in one queue, as the model draws one picture at a time. Everything else does not wait for
# pictures; it is in a queue as well, because only then its errors are shown.
MODEL = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}
AT_ONCE = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
# In the browser alone.
LOCAL = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


def connect_requests(ui: SimpleNamespace, page: Page) -> None:
    """A wish for a picture gives a tab a new request number. Its change draws, and the last number wins."""
    shown, photo = [*ui.cards, ui.history, ui.strip], [ui.photo, ui.strength, *ui.box]
    drawings = {
        "face": (page.draw, [ui.history], shown, ui.picture),
        "photo": (page.edit, photo, [ui.edited, ui.download_photo], ui.edited),
        "sweep": (page.draw_sweep, ui.sweep, ui.swept, ui.swept[0]),
        "table": (page.draw_table, [ui.expressions], ui.tabled, ui.tabled[0]),
    }
    for ask, (tab, (draw, inputs, outputs, progress_on)) in zip(ui.asks, drawings.items(), strict=True):
        inputs = [ask, *inputs, *ui.controls]
        ask.change(page.want, ui.asks, None, **LOCAL)
        ask.change(draw, inputs, outputs, trigger_mode="always_last", show_progress_on=progress_on, **MODEL)
        ui.stops[tab].click(page.want, ui.asks, None, js=f"(...asks) => fineface.ask('{tab}', asks)", **LOCAL)
    # These draw on the tab of the face without drawing the face anew, so they bring request numbers of their own.
    four, compared = [ui.picture, ui.compared, ui.choice, ui.choices], [ui.picture, ui.compared, ui.compare]
    for button, draw, inputs, outputs in (
        (ui.four, page.draw_four, ui.controls, four),
        (ui.compare, page.compare, [ui.shown, ui.compare], compared),
    ):
        own = {"js": "(_, ...values) => [fineface.next(), ...values]", "show_progress_on": ui.picture}
        button.click(draw, [ui.asks[0], *inputs], outputs, **own, **MODEL)


def connect_controls(ui: SimpleNamespace, page: Page) -> None:
    """The expression as text and as sliders, which always say the same, and what asks for a picture."""
    asked = [*ui.asks, ui.tabs]
    by_hand = {"fn": None, "inputs": ui.asks, "outputs": asked, "js": "fineface.draw", **LOCAL}
    touched = {"fn": None, "inputs": [ui.live, *ui.asks], "outputs": asked, "js": "fineface.touch", **LOCAL}
    of_face = {"fn": None, "inputs": ui.asks, "outputs": asked, "js": "fineface.drawFace", **LOCAL}

    # Enter draws in every box; that of the expression is read first.
    typed = [control for control in (*ui.controls, *ui.sweep, *ui.box, ui.strength) if hasattr(control, "submit")]
    gr.on([ui.draw.click, *(box.submit for box in typed if box is not ui.aus)], **by_hand)
    ui.aus.blur(page.read_expression, [ui.aus, ui.face], ui.face, **AT_ONCE)
    ui.aus.submit(page.read_expression, [ui.aus, ui.face], ui.face, **AT_ONCE).success(**by_hand)
    # In the browser, so that the text is never behind when a picture is asked for.
    ui.face.input(None, ui.face, ui.aus, js="(aus) => aus", **LOCAL)
    ui.face.release(**touched)
    ui.together.input(**touched)
    ui.other_person.click(page.other_person, ui.prompt, [ui.prompt, ui.seed], **AT_ONCE).success(**of_face)
    ui.other_expression.click(page.other_expression, ui.aus, [ui.aus, ui.face], **AT_ONCE).success(**of_face)
    ui.examples.click(lambda sample: sample[0], ui.examples, ui.prompt, **AT_ONCE).success(**touched)
    ui.tabs.change(None, None, ui.draw, js="fineface.openTab", **LOCAL)

    first = dict(zip([*LABELS, "together"], control_values(page.studio, first_job(page.studio)), strict=True))
    watched = [*ui.controls, ui.drawn]
    js = f"(...values) => fineface.compare({json.dumps(list(first))}, {json.dumps(first)}, ...values)"
    gr.on([component.change for component in watched], None, watched, None, js=js, **LOCAL)


def connect_files(ui: SimpleNamespace, page: Page) -> None:
    """Pictures that are there already, photos and tables, which do not wait for the model."""
    state = [*ui.controls, ui.face, *ui.cards, ui.history, ui.strip]
    ui.strip.select(page.look_back, [ui.history, ui.history], state, **AT_ONCE)
    ui.choice.select(page.look_back, [ui.choices, ui.history], state, **AT_ONCE)
    ui.open.upload(page.open_picture, [ui.open, ui.history], state, **AT_ONCE)
    ui.upload.change(page.read_table, ui.upload, [ui.expressions, ui.table_note], **AT_ONCE)
    ui.photo.change(page.find_face, ui.photo, [*ui.box, ui.photo_note], **AT_ONCE)
    gr.on([box.change for box in ui.box], None, ui.box, None, js="fineface.showBox", **LOCAL)

    def show_kind(kind: str) -> list:
        return [gr.Row(visible=kind == ONE_MUSCLE), gr.Row(visible=kind != ONE_MUSCLE)]

    ui.sweep[0].change(show_kind, ui.sweep[0], [ui.of_muscle, ui.of_expression], **AT_ONCE)


def connect_api(ui: SimpleNamespace, page: Page) -> None:
    """The functions for programs, which send the values of the controls, by name, and get files."""
    # An event needs a control; this one is hidden.
    hidden = gr.Button(visible=False)
    sweep, au = [*ui.sweep[1:4], ui.sweep[-1]], ("au", "first", "last", "count")
    for name, own, draw, inputs, outputs, queue in (
        ("draw", (), page.api_draw, [], ui.picture, "model"),
        ("sweep", au, page.api_sweep, sweep, ui.swept[:2], "model"),
        # A table is read outside the queue of the model; its pictures then take turns with all others.
        ("table", ("table",), page.api_table, [ui.upload], ui.tabled[1], "tables"),
    ):
        options = MODEL | {"api_visibility": "public", "concurrency_id": queue, "api_name": name}
        hidden.click(endpoint(draw, *own), [*inputs, *ui.controls], outputs, **options)


def endpoint(draw: Callable, *own: str) -> Callable:
    """`draw` with names for its arguments, under which programs send them: `own`, and those of the controls."""
    names, kind = (*own, *LABELS, "one_guidance"), inspect.Parameter.POSITIONAL_OR_KEYWORD
    call = answered(draw)
    call.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])
    return call


def build(studio: Studio) -> gr.Blocks:
    """The page. Nothing is drawn for it but, with a quick model, the first picture."""
    delete_cache = (3600, KEEP_FILES_S)
    with gr.Blocks(title="FineFace", fill_width=True, analytics_enabled=False, delete_cache=delete_cache) as demo:
        ui, page = lay_out(studio, first_job(studio)), Page(studio, Path(demo.GRADIO_CACHE))
        # The API comes first, as names are given away in this order.
        for connect in (connect_api, connect_requests, connect_controls, connect_files):
            connect(ui, page)
        opened = [*ui.controls, ui.face, *ui.cards, ui.history, ui.strip, ui.asks[0]]
        demo.load(page.open, ui.kept, opened, **AT_ONCE)
        demo.load(page.draw_presets, None, ui.face, **AT_ONCE | {"concurrency_limit": 1})
        demo.unload(page.leave)
    return demo
