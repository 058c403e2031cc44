# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""What happens when a control of the page is touched. What needs no server stands in `controls.js`."""

import base64
import html
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

from action_units import available_presets, extract_au_tags, format_aus, read_aus
from drawing.files import read_metadata
from drawing.jobs import Job, canonical_aus, make_job
from drawing.photo import NO_DETECTOR, check_box, find_faces, has_detector, open_photo
from drawing.studio import (
    Change,
    Stopped,
    Studio,
    Sweep,
    file_name,
    read_expressions,
    write_gif,
    write_zip,
)
from page.layout import BACK, BOX_SIDES, COMPARE, LABELS, lay_out


FIRST_EXPRESSION = "polite smile"
# JavaScript has no whole numbers beyond this one.
MAX_SCREEN_SEED = 2**53 - 1
MAX_STEPS = 150
MAX_SWEEP_COUNT = 24
STRIP_LENGTH = 12
NUM_CHOICES = 4
THUMBNAIL_SIDE = 112
# Those whose request numbers are remembered, which are more than can wait for a picture.
MAX_SESSIONS = 10_000
KEEP_FILES_S = 24 * 60 * 60
PROGRESS = gr.Progress()


@dataclass(frozen=True)
class Shown:
    """A picture, and what the controls said when it was asked for."""

    path: str
    job: Job
    values: tuple

    @property
    def ticket(self) -> str:
        return json.dumps(self.values)


# --------------------------------------------------------------------------------------------------------------------
# From controls to jobs, and back
# --------------------------------------------------------------------------------------------------------------------


@contextmanager
def messages() -> Iterator[None]:
    """Show what is wrong with what was asked for as a message on the screen."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        message = "Out of memory. Start app.py with a smaller model or `--dtype float16`."
        raise gr.Error(message, print_exception=False) from error
    except (ValueError, OSError) as error:
        # Gradio shows messages as HTML.
        raise gr.Error(html.escape(" ".join(str(error).split())), print_exception=False) from error


def make_screen_job(studio: Studio, **values) -> Job:
    """
    A checked `Job` from what stands in the controls.

    Raises:
        ValueError: for a value that cannot be, called by its label.
    """
    values["negative_prompt"] = values["negative_prompt"] or None
    for name, most in (("seed", MAX_SCREEN_SEED), ("num_inference_steps", MAX_STEPS)):
        if isinstance(values[name], int) and values[name] > most:
            raise ValueError(f"`{LABELS[name]}` goes up to {most} on this page, but is {values[name]}.")
    _, tag = extract_au_tags(values["prompt"] or "", LABELS["prompt"], studio.au_names)
    values["prompt"] = values["prompt"] or ""
    # A face at rest is what a new screen shows. AUs in the prompt are meant more than that.
    if tag is not None and canonical(values["aus"], studio) == "neutral":
        values["aus"] = None
    return make_job(asdict(studio.defaults) | values, lambda name: LABELS.get(name, name), studio.au_names)


def canonical(text: str | None, studio: Studio, label: str = LABELS["aus"]) -> str:
    return canonical_aus(text or "", label, studio.au_names)


def control_values(studio: Studio, job: Job) -> list:
    """What the controls say for `job`."""
    values = asdict(job) | {"negative_prompt": job.negative_prompt or "", "aus": job.aus or "neutral"}
    is_joint = job.au_guidance_scale is None
    if is_joint:
        values["au_guidance_scale"] = studio.defaults.au_guidance_scale or job.guidance_scale
    return [*(values[name] for name in LABELS), is_joint]


def first_job(studio: Studio) -> Job:
    known = available_presets(studio.au_names)
    return replace(studio.defaults, aus=format_aus(known.get(FIRST_EXPRESSION, "neutral"), studio.au_names))


def read_link(query: Mapping[str, str], studio: Studio) -> Job:
    """
    The job that the parameters of a link describe; what they leave out is as on a new page.

    Raises:
        ValueError: for a value that cannot be.
    """
    first = first_job(studio)
    numbers = {"seed": int, "num_inference_steps": int}
    numbers |= dict.fromkeys(("guidance_scale", "au_guidance_scale", "au_scale"), float)
    values = dict(zip(LABELS, control_values(studio, first), strict=False))
    values["au_guidance_scale"] = first.au_guidance_scale
    for name in LABELS.keys() & query.keys():
        try:
            values[name] = numbers.get(name, str)(query[name])
        except ValueError:
            raise ValueError(f"`{LABELS[name]}` is {query[name][:40]!r} in this link, and no number.") from None
    return make_screen_job(studio, **values)


def read_picture(path: Path, studio: Studio) -> Job:
    """
    The job of a PNG file of ours.

    Raises:
        ValueError: if another program has written it, or it shows several faces.
    """
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


def read_sweep(
    job: Job, studio: Studio, kind: str, au: str, first, last, start: str, end: str, count
) -> Sweep | Change:
    if count is None or not 2 <= count <= MAX_SWEEP_COUNT:
        raise ValueError(f"`Pictures` has to be from 2 to {MAX_SWEEP_COUNT}, but is {count}.")
    if kind != "One muscle":
        start, end = canonical(start, studio, "From"), canonical(end, studio, "To") if (end or "").strip() else job.aus
        if start == end:
            raise ValueError(f"`From` and `To` are both {start}, so nothing would move.")
        return Change(replace(job, aus=start), end, int(count), studio.au_names)
    for label, value in (("From", first), ("To", last)):
        if value is None:
            raise ValueError(f"`{label}` is empty. Give a number.")
        read_aus(f"{au}={value}", label, studio.au_names)
    if first == last:
        raise ValueError(f"`From` and `To` are both {first:g}, so nothing would move.")
    return Sweep(job, au, float(first), float(last), int(count), studio.au_names)


def other_person(prompt: str, studio: Studio) -> tuple[str, int]:
    """Another seed; and where the words say all about a person, as the toy model takes them, other words."""
    seed = random.randrange(100_000)
    if not studio.is_toy:
        return prompt, seed
    from toy_faces.renderer import caption, sample_portrait

    return caption(sample_portrait(seed), seed), seed


# --------------------------------------------------------------------------------------------------------------------
# The actions
# --------------------------------------------------------------------------------------------------------------------


class Page:
    """
    What the controls do with a model. Pictures are files in folders of their own inside `folder`, which is Gradio's:
    it serves what is in there, and deletes it in time.
    """

    def __init__(self, studio: Studio, folder: Path):
        self.studio, self.folder = studio, folder
        self.first_picture = studio.draw(first_job(studio)) if studio.is_quick else None
        self.thumbnails: dict[str, str] = {}
        # By session and tab, the request number from which on pictures are wanted.
        self.wanted: dict[tuple[str | None, str], float] = {}

    # ---- Turns ----

    def stop(self, tab: str, request: gr.Request, ask: float) -> None:
        """End what is drawn in a tab for a request number below `ask`."""
        self.wanted[request.session_hash, tab] = ask
        if len(self.wanted) > MAX_SESSIONS:
            del self.wanted[next(iter(self.wanted))]

    def leave(self, request: gr.Request) -> None:
        """End all that is drawn for a window that was closed."""
        for session, tab in list(self.wanted):
            if session == request.session_hash:
                self.wanted[session, tab] = float("inf")

    def checker(self, tab: str, request: gr.Request, ask: float) -> Callable[[], None]:
        """A function that raises `Stopped` as soon as request `ask` is out of date."""
        key = (request.session_hash, tab)

        def check() -> None:
            if self.wanted.get(key, 0) > ask:
                raise Stopped

        return check

    # ---- Pictures ----

    def new_folder(self) -> Path:
        folder = self.folder / uuid.uuid4().hex
        folder.mkdir(parents=True)
        return folder

    def read_job(self, *values) -> Job:
        *values, is_joint = values
        named = dict(zip(LABELS, values, strict=True))
        if is_joint:
            named["au_guidance_scale"] = None
        return make_screen_job(self.studio, **named)

    def show(self, shown: Shown) -> list:
        """The cards of a picture."""
        job = shown.job
        said = f"<b>{html.escape(job.aus or 'as the prompt says')}</b> · seed {job.seed}"
        remarks = "".join(f"<p role='status'>{html.escape(remark)}</p>" for remark in self.studio.remarks(job))
        picture = gr.Image(shown.path, alt_text=f"{job.prompt}, with the expression {job.aus}", visible=True)
        code = [self.studio.python(job), self.studio.command(job)]
        hidden = [gr.ImageSlider(visible=False), gr.Gallery(visible=False)]
        cards = [picture, *hidden, said, remarks, gr.DownloadButton(value=shown.path), *code]
        return [*cards, COMPARE, shown, shown.ticket, list(shown.values)]

    def show_new(self, shown: Shown, history: list[Shown]) -> list:
        """The cards of a picture, and the history and the strip that begin with it."""
        history = [shown, *(old for old in history if old.path != shown.path)][:STRIP_LENGTH]
        return [*self.show(shown), history, [(old.path, old.job.aus or "") for old in history]]

    def draw_file(self, job: Job, check: Callable[[], None] = lambda: None, folder: Path | None = None) -> str:
        """Draw `job` into a file, saying how far it is, until `check` raises an error."""

        def on_step(step: int) -> None:
            check()
            PROGRESS((step, job.num_inference_steps), desc="Drawing", unit="steps")

        PROGRESS(0, desc="Waiting for the model")
        path = (folder or self.new_folder()) / file_name(job)
        self.studio.write(self.studio.draw(job, on_step), path, asdict(job))
        return str(path)

    def draw(self, request: gr.Request, ask: float, history: list, *values):
        with messages():
            job = self.read_job(*values)
            try:
                path = self.draw_file(job, self.checker("face", request, ask))
            except Stopped:
                return gr.skip()
        return self.show_new(Shown(path, job, values), history)

    def draw_four(self, request: gr.Request, ask: float, *values):
        """The same words with four seeds, to choose from."""
        check = self.checker("face", request, ask)
        with messages():
            job, choices = self.read_job(*values), []
            seeds = [job.seed, *random.sample(range(100_000), NUM_CHOICES - 1)]
            index = list(LABELS).index("seed")
            try:
                for seed in seeds:
                    own = (*values[:index], seed, *values[index + 1 :])
                    one = replace(job, seed=seed)
                    choices.append(Shown(self.draw_file(one, check), one, own))
            except Stopped:
                return gr.skip()
        pictures = [(choice.path, f"seed {choice.job.seed}") for choice in choices]
        return [gr.Image(visible=False), gr.ImageSlider(visible=False), gr.Gallery(pictures, visible=True), choices]

    def compare(self, request: gr.Request, ask: float, shown: Shown | None, label: str):
        """The picture beside the neutral face of the same person, or again the picture alone."""
        if label == BACK:
            return [gr.Image(visible=True), gr.ImageSlider(visible=False), COMPARE]
        with messages():
            if shown is None:
                raise ValueError("There is no picture to compare. Draw one first.")
            try:
                neutral = self.draw_file(replace(shown.job, aus="neutral"), self.checker("face", request, ask))
            except Stopped:
                return gr.skip()
        return [gr.Image(visible=False), gr.ImageSlider((neutral, shown.path), visible=True), BACK]

    def look_back(self, entries: list[Shown], history: list[Shown], event: gr.SelectData) -> list:
        """A picture of the strip or of four people, with the controls as they stood when it was drawn."""
        return self.return_to(entries[event.index], history)

    def return_to(self, shown: Shown, history: list[Shown]) -> list:
        is_old = shown in history
        cards = [*self.show(shown), gr.skip(), gr.skip()] if is_old else self.show_new(shown, history)
        return [*shown.values, shown.job.aus or "neutral", *cards]

    def open_picture(self, upload: str, history: list[Shown]) -> list:
        """A PNG of ours, with the controls as they stood."""
        with messages():
            job = read_picture(Path(upload), self.studio)
        return self.return_to(Shown(upload, job, tuple(control_values(self.studio, job))), history)

    def open(self, request: gr.Request, kept: list | None):
        """
        The controls as the link says, or else as they stood when the page was left, or else as on a new page; and the
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
        state = [*values, job.aus or "neutral"]
        if self.first_picture is None or job != first_job(self.studio):
            return [*state, *[gr.skip()] * NUM_SHOWN, int(self.studio.is_quick)]
        path = self.new_folder() / file_name(job)
        self.studio.write(self.first_picture, path, asdict(job))
        return [*state, *self.show_new(Shown(str(path), job, values), []), 0]

    def draw_presets(self) -> Iterator[dict]:
        """Small pictures of the presets, drawn once while nobody else wants the model."""
        if not self.studio.is_quick:
            return
        yield gr.HTML(pictures=json.dumps(self.thumbnails))
        for count, (name, preset) in enumerate(available_presets(self.studio.au_names).items(), start=1):
            if name in self.thumbnails:
                continue
            picture = self.studio.draw(replace(self.studio.defaults, aus=format_aus(preset, self.studio.au_names)))
            picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
            data = io.BytesIO()
            picture.save(data, "WEBP", quality=80)
            self.thumbnails[name] = f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
            if count % 7 == 0:
                yield gr.HTML(pictures=json.dumps(self.thumbnails))
        yield gr.HTML(pictures=json.dumps(self.thumbnails))

    # ---- Controls ----

    def read_expression(self, text: str) -> str:
        with messages():
            return canonical(text, self.studio)

    def other_expression(self, text: str) -> list[str]:
        names = self.studio.au_names
        others = [format_aus(preset, names) for preset in available_presets(names).values()]
        with messages():
            now = canonical(text, self.studio)
        aus = random.choice([other for other in others if other != now])
        return [aus, aus]

    def other_person(self, prompt: str) -> list:
        return list(other_person(prompt, self.studio))

    # ---- Photos ----

    def find_face(self, upload: str | None) -> list:
        """The box around the largest face, and what was found."""
        if upload is None:
            return [*[None] * len(BOX_SIDES), ""]
        with messages():
            picture = open_photo(upload)
        if not has_detector():
            return [*[None] * len(BOX_SIDES), f"<p>Drag over the face. {NO_DETECTOR}</p>"]
        faces = find_faces(picture)
        if not faces:
            return [*[None] * len(BOX_SIDES), "<p>No face is found. Drag over it.</p>"]
        many = (
            f"{len(faces)} faces are found; this is the largest. Drag over another, or" if len(faces) > 1 else "Drag"
        )
        return [*faces[0], f"<p>{many} over the face if the oval does not fit.</p>"]

    def edit(self, request: gr.Request, ask: float, upload: str | None, strength: float | None, *values):
        check = self.checker("photo", request, ask)
        box, values = values[: len(BOX_SIDES)], values[len(BOX_SIDES) :]
        with messages():
            if upload is None:
                raise ValueError("Choose a photo first.")
            if strength is None or not 0 < strength <= 1:
                raise ValueError(f"`Change` has to be above 0 and up to 1, but is {strength}.")
            job, photo = self.read_job(*values), open_photo(upload)
            box = check_box(box, photo.size, "Left, Top, Right, Bottom")

            def on_step(step: int) -> None:
                check()
                PROGRESS((step, job.num_inference_steps), desc="Drawing", unit="steps")

            try:
                edited = self.studio.edit(photo, box, job, strength, on_step)
            except Stopped:
                return gr.skip()
            folder = self.new_folder()
            before, after = folder / "before.png", folder / f"{Path(upload).stem[:60]}-edited.png"
            photo.save(before, compress_level=1)
            about = asdict(job) | {"picture": Path(upload).name, "strength": strength, "box": list(box)}
            self.studio.write(edited, after, about)
        return [
            gr.ImageSlider((str(before), str(after)), visible=True),
            gr.DownloadButton(value=str(after), interactive=True),
        ]

    # ---- Sweeps and tables ----

    def write_sweep(
        self, sweep: Sweep | Change, on_picture: Callable[[int], None] = lambda count: None
    ) -> tuple[Path, Path]:
        """Draw a sweep, and write its animation and its labelled strip."""
        pictures, sheet, shown = self.studio.sweep(sweep, on_picture)
        folder, stem = self.new_folder(), f"sweep-{sweep.base.seed}"
        gif, strip = folder / f"{stem}.gif", folder / f"{stem}.png"
        write_gif(pictures, gif, self.studio.metadata(shown))
        self.studio.write(sheet, strip, shown)
        return gif, strip

    def draw_sweep(self, request: gr.Request, ask: float, kind, au, first, last, start, end, count, *values):
        check = self.checker("sweep", request, ask)

        def say(done: int) -> None:
            check()
            PROGRESS((done, sweep.count), desc="Drawing", unit="pictures")

        with messages():
            job = self.read_job(*values)
            sweep = read_sweep(job, self.studio, kind, au, first, last, start, end, count)
            try:
                paths = self.write_sweep(sweep, say)
            except Stopped:
                return gr.skip()
        alt_text = f"{job.prompt}, {sweep.title}"
        images = [gr.Image(str(path), alt_text=alt_text, visible=True) for path in paths]
        downloads = [gr.DownloadButton(value=str(path), interactive=True) for path in paths]
        return [*images, *downloads, gr.Code(self.studio.sweep_command(sweep), visible=True)]

    def read_table(self, upload: str | None, *values) -> list:
        """The expressions of a table, as soon as it is there, and what was found."""
        if upload is None:
            return [None, ""]
        job = replace(self.studio.defaults, aus="neutral")
        try:
            jobs, remarks = read_expressions(Path(upload), job, self.studio.au_names)
        except (ValueError, OSError) as error:
            return [None, f"<p class='problem'>{html.escape(' '.join(str(error).split()))}</p>"]
        note = " ".join([f"{len(jobs)} expressions.", *remarks])
        expressions = {name: job.aus for name, job in jobs.items()}
        return [(Path(upload).name, expressions), f"<p>{html.escape(note)}</p>"]

    def draw_table(self, request: gr.Request, ask: float, table: tuple | None, *values) -> Iterator[list]:
        """Each picture as soon as it is there, and then the zip."""
        check = self.checker("table", request, ask)
        with messages():
            if table is None:
                raise ValueError("Choose a table first: CSV, TSV, JSON or JSON Lines.")
            base = self.read_job(*values)
            name, expressions = table
            jobs = {name: replace(base, aus=aus) for name, aus in expressions.items()}
            folder, drawn = self.new_folder(), {}
            for name, job in jobs.items():
                PROGRESS((len(drawn), len(jobs)), desc="Drawing", unit="pictures")
                try:
                    picture = self.studio.draw(job, lambda step: check())
                except Stopped:
                    gr.Info(f"Stopped after {len(drawn)} of {len(jobs)} pictures.")
                    break
                self.studio.write(picture, folder / name, asdict(job))
                drawn[name] = job
                yield [[(str(folder / name), job.aus) for name, job in drawn.items()], gr.skip(), gr.skip()]
            if not drawn:
                return
            archive = folder / "faces.zip"
            write_zip(archive, folder, drawn, self.studio.au_names)
        command = gr.Code(self.studio.table_command(table[0], base), visible=True)
        yield [gr.skip(), gr.DownloadButton(value=str(archive), interactive=True), command]

    # ---- For programs ----

    def api_draw(
        self,
        prompt: str,
        aus: str,
        seed: int,
        negative_prompt: str,
        num_inference_steps: int,
        guidance_scale: float,
        au_guidance_scale: float,
        au_scale: float,
        one_guidance: bool,
    ):
        """Draw one face, and return it as a PNG file that says how it was made."""
        values = (prompt, aus, seed, negative_prompt, num_inference_steps, guidance_scale, au_guidance_scale, au_scale)
        with messages():
            return self.draw_file(self.read_job(*values, one_guidance))

    def api_sweep(
        self,
        au: str,
        first: float,
        last: float,
        count: int,
        prompt: str,
        aus: str,
        seed: int,
        negative_prompt: str,
        num_inference_steps: int,
        guidance_scale: float,
        au_guidance_scale: float,
        au_scale: float,
        one_guidance: bool,
    ):
        """Draw one AU going from `first` to `last`, and return an animation (GIF) and a labelled strip (PNG)."""
        values = (prompt, aus, seed, negative_prompt, num_inference_steps, guidance_scale, au_guidance_scale, au_scale)
        with messages():
            job = self.read_job(*values, one_guidance)
            sweep = read_sweep(job, self.studio, "One muscle", au, first, last, "", "", count)
            return [str(path) for path in self.write_sweep(sweep)]

    def api_table(
        self,
        table: str,
        prompt: str,
        aus: str,
        seed: int,
        negative_prompt: str,
        num_inference_steps: int,
        guidance_scale: float,
        au_guidance_scale: float,
        au_scale: float,
        one_guidance: bool,
    ):
        """Draw a face for each row of a table of AUs (CSV, TSV, JSON, JSON Lines), and return a zip of them."""
        values = (prompt, aus, seed, negative_prompt, num_inference_steps, guidance_scale, au_guidance_scale, au_scale)
        with messages():
            base = self.read_job(*values, one_guidance)
            jobs, _ = read_expressions(Path(table), base, self.studio.au_names)
            folder = self.new_folder()
            for name, job in jobs.items():
                self.studio.write(self.studio.draw(job), folder / name, asdict(job))
            write_zip(folder / "faces.zip", folder, jobs, self.studio.au_names)
        return str(folder / "faces.zip")


# What `Page.show_new` gives.
NUM_SHOWN = 14


# --------------------------------------------------------------------------------------------------------------------
# Which control does what
# --------------------------------------------------------------------------------------------------------------------


def connect(ui: SimpleNamespace, page: Page) -> None:
    """Tell each control what it does."""
    connect_requests(ui, page)
    connect_controls(ui, page)
    connect_pictures(ui, page)
    connect_photo(ui, page)


# One picture at a time, whoever asks: all of these wait in one queue. Everything else does not wait for pictures; it
# stands in the queue as well, because only then its errors are shown.
MODEL = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}
AT_ONCE = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
# In the browser alone.
LOCAL = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


def connect_requests(ui: SimpleNamespace, page: Page) -> None:
    """Whatever wants a picture counts up the request number of a tab; only this draws, and the last number wins."""
    shown = [*ui.cards, ui.history, ui.strip]
    drawings = {
        "face": (page.draw, [ui.history, *ui.controls], shown, ui.picture),
        "photo": (
            page.edit,
            [ui.photo, ui.strength, *ui.box, *ui.controls],
            [ui.edited, ui.download_photo],
            ui.edited,
        ),
        "sweep": (page.draw_sweep, [*ui.sweep, *ui.controls], ui.swept, ui.swept[0]),
        "table": (page.draw_table, [ui.expressions, *ui.controls], ui.tabled, ui.tabled[0]),
    }
    stops = {"face": ui.stop, "sweep": ui.stop_sweep, "table": ui.stop_table}
    for ask, (tab, (draw, inputs, outputs, progress_on)) in zip(ui.asks, drawings.items(), strict=True):
        stop = _stopper(page, tab)
        ask.change(stop, ask, None, **LOCAL)
        ask.change(draw, [ask, *inputs], outputs, trigger_mode="always_last", show_progress_on=progress_on, **MODEL)
        if tab in stops:
            stops[tab].click(stop, ask, None, js="(ask) => ask + 0.5", **LOCAL)


def _stopper(page: Page, tab: str) -> Callable:
    def stop(request: gr.Request, ask: float) -> None:
        page.stop(tab, request, ask)

    return stop


def connect_controls(ui: SimpleNamespace, page: Page) -> None:
    """The expression as text and as sliders, which always say the same, and what asks for a picture."""
    asked = [*ui.asks, ui.tabs]
    by_hand = {"fn": None, "inputs": ui.asks, "outputs": asked, "js": "fineface.draw", **LOCAL}
    touched = {"fn": None, "inputs": [ui.live, *ui.asks], "outputs": asked, "js": "fineface.touch", **LOCAL}
    of_face = {"fn": None, "inputs": ui.asks, "outputs": asked, "js": "fineface.drawFace", **LOCAL}

    # Enter draws in every box.
    boxes = [control for control in ui.controls if control not in (ui.aus, ui.together)]
    gr.on([ui.draw.click, *(box.submit for box in boxes)], **by_hand)
    ui.aus.blur(page.read_expression, ui.aus, ui.face, **AT_ONCE)
    ui.aus.submit(page.read_expression, ui.aus, ui.face, **AT_ONCE).success(**by_hand)
    # In the browser, so that the text is never behind when a picture is asked for.
    ui.face.input(None, ui.face, ui.aus, js="(aus) => aus", **LOCAL)
    ui.face.release(**touched)
    ui.together.input(**touched)
    ui.other_person.click(page.other_person, ui.prompt, [ui.prompt, ui.seed], **AT_ONCE).success(**of_face)
    ui.other_expression.click(page.other_expression, ui.aus, [ui.aus, ui.face], **AT_ONCE).success(**of_face)
    ui.examples.click(lambda sample: sample[0], ui.examples, ui.prompt, **AT_ONCE).success(**touched)
    ui.tabs.change(None, None, ui.draw, js="fineface.openTab", **LOCAL)

    first = dict(zip([*LABELS, "together"], control_values(page.studio, first_job(page.studio)), strict=True))
    names, defaults = json.dumps(list(first)), json.dumps(first)
    gr.on(
        [component.change for component in (*ui.controls, ui.drawn)],
        None,
        [*ui.controls, ui.drawn],
        None,
        js=f"(...values) => fineface.compare({names}, {defaults}, ...values)",
        **LOCAL,
    )


def connect_pictures(ui: SimpleNamespace, page: Page) -> None:
    """What can be done with a picture that is there."""
    face_ask = ui.asks[0]
    state = [*ui.controls, ui.face, *ui.cards, ui.history, ui.strip]
    ui.strip.select(page.look_back, [ui.history, ui.history], state, **AT_ONCE)
    ui.choice.select(page.look_back, [ui.choices, ui.history], state, **AT_ONCE)
    ui.open.upload(page.open_picture, [ui.open, ui.history], state, **AT_ONCE)
    ui.four.click(
        page.draw_four,
        [face_ask, *ui.controls],
        [ui.picture, ui.compared, ui.choice, ui.choices],
        show_progress_on=ui.picture,
        **MODEL,
    )
    ui.compare.click(
        page.compare,
        [face_ask, ui.shown, ui.compare],
        [ui.picture, ui.compared, ui.compare],
        show_progress_on=ui.picture,
        **MODEL,
    )
    ui.upload.change(page.read_table, ui.upload, [ui.expressions, ui.table_note], **AT_ONCE)
    ui.kind.change(
        lambda kind: [gr.Row(visible=kind == "One muscle"), gr.Row(visible=kind != "One muscle")],
        ui.kind,
        [ui.of_muscle, ui.of_expression],
        **AT_ONCE,
    )


def connect_photo(ui: SimpleNamespace, page: Page) -> None:
    ui.photo.change(page.find_face, ui.photo, [*ui.box, ui.photo_note], **AT_ONCE)
    gr.on([box.change for box in ui.box], None, ui.box, None, js="fineface.showBox", **LOCAL)


def connect_api(ui: SimpleNamespace, page: Page) -> None:
    """What programs may call. They send what stands in the controls, by name, and get files."""
    public = MODEL | {"api_visibility": "public"}
    # An event needs a control, and this one nobody can press.
    hidden = gr.Button(visible=False)
    hidden.click(page.api_draw, ui.controls, ui.picture, api_name="draw", **public)
    hidden.click(
        page.api_sweep, [*ui.sweep[1:4], ui.sweep[-1], *ui.controls], ui.swept[:2], api_name="sweep", **public
    )
    hidden.click(page.api_table, [ui.upload, *ui.controls], ui.tabled[1], api_name="table", **public)


def build(studio: Studio) -> gr.Blocks:
    """The page. Nothing is drawn for it but, with a quick model, the first picture."""
    with gr.Blocks(
        title="FineFace", fill_width=True, analytics_enabled=False, delete_cache=(3600, KEEP_FILES_S)
    ) as demo:
        ui, page = lay_out(studio, first_job(studio)), Page(studio, Path(demo.GRADIO_CACHE))
        # First, as names are given away in this order.
        connect_api(ui, page)
        connect(ui, page)
        opened = [*ui.controls, ui.face, *ui.cards, ui.history, ui.strip, ui.asks[0]]
        demo.load(page.open, ui.kept, opened, **AT_ONCE)
        demo.load(
            page.draw_presets, None, ui.face, concurrency_limit=1, show_progress="hidden", api_visibility="private"
        )
        demo.unload(page.leave)
    return demo
