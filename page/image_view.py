"""What the views of images have in common: choose an image, see the result, save the files.

A view derives from `ImageView`. It adds the controls of its second step and says how their values
become a result. The elements have these ids; PREFIX is the view's `kind`:

PREFIX-upload      drop area for a file        PREFIX-list        list of files, if there are any
PREFIX-image       the chosen image            PREFIX-note        its name and size, or an error
PREFIX-model       first model                 PREFIX-model-2     second model, to compare with
PREFIX-run         button that starts          PREFIX-status      duration, or an error
PREFIX-result      picture of the result       PREFIX-result-2    of the second model
PREFIX-areas       table of colours and areas  PREFIX-areas-2     of the second model
PREFIX-threshold   slider                      PREFIX-opacity     slider of the fill
PREFIX-outline     switch                      PREFIX-pixel-size  mm of a pixel
PREFIX-download-mask, PREFIX-download-overlay, PREFIX-download-table   buttons
"""

import html
from collections.abc import Callable
from pathlib import Path

import gradio as gr
import numpy as np

from imaging import pictures
from page import downloads, drawing, uploads
from page.controls import (
    DISPLAY,
    MODEL,
    PRIVATE,
    RAW,
    SAME_ANSWER,
    SaveButtons,
    choose_models,
    chosen_models,
    describe_failure,
    list_files,
    nothing_to_save,
    number_or,
    pixel_size_field,
    share_or,
    share_slider,
    upload_field,
)
from page.session import Answer, Session
from page.settings import PageSettings, model_labels
from prediction.models import LoadedModel

LIMITS = f"PNG, JPEG, TIFF and others, up to {uploads.MOST_PIXELS / 1e6:.0f} megapixels."
NO_IMAGE = "Choose an image first (step 1)."
SHORTEST_SECONDS = 0.005  # shorter times would be shown as 0.00 s


class ChosenImage:
    """The first step of the views of images, and the results of one or two models in a row."""

    kind = ""  # prefix of the elements' ids, and name of the view in `Sessions`

    def __init__(self, models: list[LoadedModel], settings: PageSettings):
        self.models = models
        self.settings = settings
        self.labels = model_labels(models)

    def show_image(self, session: Session | None) -> list:
        """Return updates of a view for a chosen image, or for none; defined by the view."""
        raise NotImplementedError

    # --- layout ---

    def build_choice(self) -> None:
        """Add the drop area for an image, and the list of images."""
        gr.HTML(f"<h3>1. Image</h3><p>{LIMITS}</p>")
        self.upload = upload_field("Image file", self.kind)
        self.listing = list_files(self.settings.images, "image", self.kind)

    def build_pictures(self, name: str, **options) -> list[gr.Image]:
        """Add a picture and a table of areas for each of two models; the second is hidden.

        name: of the pictures' ids, KIND-NAME and KIND-NAME-2.
        """
        images = []
        self.tables = []
        with gr.Row():
            for ending in ("", "-2"):
                with gr.Column(min_width=240, visible=not ending) as column:
                    image = gr.Image(
                        interactive=False,
                        format="png",
                        buttons=["fullscreen"],
                        elem_id=f"{self.kind}-{name}{ending}",
                        **options,
                    )
                    table = gr.HTML(elem_id=f"{self.kind}-areas{ending}")
                images.append(image)
                self.tables.append(table)
        self.second_column = column
        return images

    # --- events ---

    def connect_choice(self, shown: list) -> list:
        """Connect the choice of an image. Return the two events. shown: those of `show_image`."""
        chosen = [self.upload, self.listing, self.note, self.pixel_size, *shown]
        return [
            self.upload.upload(self.open_upload, self.upload, chosen, **PRIVATE),
            self.listing.input(self.open_listed, self.listing, chosen, **RAW, **PRIVATE),
        ]

    def session(self, request: gr.Request) -> Session | None:
        """Return the session of the browser that sends a request."""
        return self.settings.sessions.get(request.session_hash, self.kind)

    def pixel_size_of(self, session: Session, pixel: float) -> tuple | None:
        """Return width and height of a pixel in mm, None if they are unknown.

        pixel: of the field; at 0 they are those of the image.
        """
        return (pixel, pixel) if pixel > 0 else session.pixel_size

    def open_upload(self, file: str, request: gr.Request) -> list:
        """Read an upload. gradio removes its file, see `site.build`."""
        return self.open_image(Path(file), request, is_listed=False)

    def open_listed(self, index: int | None, request: gr.Request) -> list:
        """Read an image of the list."""
        try:
            path = self.settings.images.path(index)
        except ValueError as error:
            return self.no_image(request, error)
        return self.open_image(path, request, is_listed=True)

    def open_image(self, path: Path, request: gr.Request, is_listed: bool) -> list:
        """Start the session of an image. Return updates for the image and for no result yet."""
        try:
            session, notes = uploads.open_image(path, is_listed)
        except ValueError as error:
            return self.no_image(request, error)

        self.settings.sessions.put(request.session_hash, self.kind, session)
        height, width = session.image.shape[:2]
        sentences = [f"{path.name}: {width} x {height} pixels."]
        if session.pixel_size is not None:
            sentences.append("A pixel measures {:g} x {:g} mm.".format(*session.pixel_size))
        note = drawing.status([*sentences, *notes])
        listing = gr.skip() if is_listed else None
        no_size = 0  # the field had that of another image
        return [None, listing, note, no_size, *self.show_image(session)]

    def no_image(self, request: gr.Request, error: ValueError) -> list:
        """Drop the earlier image. Return updates that show why there is no new one."""
        self.settings.sessions.drop(request.session_hash, self.kind)
        note = drawing.status([str(error)], is_error=True)
        return [None, None, note, 0, *self.show_image(None)]


class ImageView(ChosenImage):
    """A view of models that answer a question about an image."""

    run_label = "Find"
    table_title = "Found"  # heading of the names in the table of areas
    has_threshold = True  # shows the slider of the threshold
    fill = pictures.mask_opacity(1)  # opacity of the fill at the start
    has_outline = True  # at the start

    # --- what a view defines ---

    def build_question(self) -> list:
        """Add the controls of the second step, and return those whose values make a question."""
        return []

    def read_question(self, *values):
        """Return the question that the values of the controls ask. Raises ValueError, a sentence.

        It is kept in the session; `answers` computes it.
        """
        raise NotImplementedError

    def answers(self, session: Session, loaded: LoadedModel, question) -> list[Answer]:
        """Return a model's answers to a question, from memory or by running the model."""
        raise NotImplementedError

    def result(
        self, session: Session, loaded: LoadedModel, question, threshold: float, pixel_size
    ) -> downloads.Result:
        """Return the result of a question that `answers` has computed."""
        raise NotImplementedError

    def remarks(self, loaded: LoadedModel, question) -> list[str]:
        """Return sentences about how a model understood a question."""
        return []

    def build_display(self) -> list:
        """Add controls of the third step, and return them; their values go to `shown_masks`."""
        return []

    def shown_masks(self, result: downloads.Result, *values) -> np.ndarray:
        """Return which masks are drawn, bool (n,). values: those of `build_display`."""
        return np.ones(len(result.names), bool)

    def display_updates(self, results: list[downloads.Result]) -> list:
        """Return updates of the controls of `build_display` for new results, or for none."""
        return []

    # --- layout ---

    def build(self) -> None:
        """Add the view to the page."""
        with gr.Row():
            with gr.Column(scale=2, min_width=340):
                self.build_image()
                self.build_models()
                self.questions = self.build_question()
                self.run_button = gr.Button(
                    self.run_label, variant="primary", elem_id=f"{self.kind}-run"
                )
                self.status = gr.HTML(elem_id=f"{self.kind}-status")
            with gr.Column(scale=4, min_width=480):
                gr.HTML("<h3>3. Result</h3>")
                self.build_results()
                self.build_downloads()
        self.connect()

    def build_image(self) -> None:
        """Add the first step: an image from a file or from the list."""
        self.build_choice()
        self.image = gr.Image(
            label="Chosen image",
            interactive=False,
            visible=False,
            format="png",
            height=180,
            buttons=["fullscreen"],
            elem_id=f"{self.kind}-image",
        )
        self.note = gr.HTML(elem_id=f"{self.kind}-note")

    def build_models(self) -> None:
        """Begin the second step with the choice of models, hidden if there is only one."""
        heading = "<h3>2. What to find</h3>"
        if len(self.models) == 1:
            heading += f"<p>Model: {html.escape(self.labels[0])}</p>"
        gr.HTML(heading)
        self.first, self.second = choose_models(self.labels, self.kind)

    def build_results(self) -> None:
        """Add the pictures, the tables of areas, and the controls of their display."""
        self.results = self.build_pictures("result", label="Result", height=360)
        self.display = self.build_display()
        with gr.Row():
            self.threshold = share_slider(
                "Minimum certainty",
                self.models[0].config.threshold,
                0.01,
                f"{self.kind}-threshold",
                visible=self.has_threshold,
            )
            self.opacity = share_slider("Colour strength", self.fill, 0.05, f"{self.kind}-opacity")
            self.outline = gr.Checkbox(
                self.has_outline,
                label="Draw outlines",
                min_width=140,
                elem_id=f"{self.kind}-outline",
            )
            self.pixel_size = pixel_size_field(self.kind)
        self.appearance = [self.threshold, self.opacity, self.outline, self.pixel_size]

    def build_downloads(self) -> None:
        """Add the buttons that save files."""
        labels = {"mask": "Save mask", "overlay": "Save picture", "table": "Save areas"}
        self.save_buttons = SaveButtons(self.kind, labels, self.models)

    # --- events ---

    def connect(self) -> None:
        """Connect the controls with the functions below."""
        shown = [*self.results, *self.tables, self.second_column, *self.display, self.status]
        self.connect_choice([self.image, *shown])
        values = [self.first, self.second, *self.appearance, *self.questions]
        self.run_button.click(self.run, values, shown, **RAW, **MODEL)
        self.first.input(self.default_threshold, self.first, self.threshold, **RAW, **PRIVATE)

        values = [*self.appearance, *self.display]
        changes = [control.change for control in values]
        gr.on(changes, self.redraw, values, [*self.results, *self.tables], **RAW, **DISPLAY)
        self.save_buttons.connect("mask", self.save_mask, values)
        self.save_buttons.connect("overlay", self.save_overlay, values)
        self.save_buttons.connect("table", self.save_table, values)

    def show_image(self, session: Session | None) -> list:
        """Return updates for a chosen image, or for none, and for no result yet."""
        picture = gr.Image(None, visible=False)
        if session is not None:
            picture = gr.Image(drawing.preview(session.image), visible=True)
        return [picture, *self.no_result(), ""]

    def no_result(self) -> list:
        """Return updates that remove the result."""
        picture = gr.Image(None, label="Result")
        display = self.display_updates([])
        return [picture, None, "", "", gr.Column(visible=False), *display]

    def run(self, request: gr.Request, first, second, *values) -> list:
        """Answer the question of the controls with one or two models.

        values: those of `appearance`, then those of the second step.
        """
        appearance = self.read_appearance(values)
        session = self.session(request)
        if session is None:
            return [*self.no_result(), drawing.status([NO_IMAGE], is_error=True)]

        session.question = None  # until it is answered
        indices = chosen_models(first, second)
        sentences = []
        try:
            question = self.read_question(*values[len(self.appearance) :])
            for index in indices:
                answers = self.answers(session, self.models[index], question)
                sentences.append(self.duration(index, answers))
                sentences += self.remarks(self.models[index], question)
        except (ValueError, MemoryError, RuntimeError) as error:
            line = describe_failure(error, "image")
            return [*self.no_result(), drawing.status([line], is_error=True)]

        query = (indices, question)
        session.question = query
        results = self.results_of(session, query, appearance)
        updates = self.show(session, indices, results, appearance)
        display = self.display_updates(results)
        column = gr.Column(visible=len(indices) > 1)
        return [*updates, column, *display, drawing.status(sentences)]

    def read_appearance(self, values: tuple) -> tuple[float, float, bool, float]:
        """Return threshold, opacity, outlines and pixel size, with which `values` begin.

        Empty fields have the values of the start.
        """
        threshold, opacity, has_outline, pixel = values[: len(self.appearance)]
        threshold = number_or(threshold, self.models[0].config.threshold)
        return threshold, share_or(opacity, self.fill), has_outline, number_or(pixel, 0)

    def duration(self, index: int, answers: list[Answer]) -> str:
        """Return a sentence about the time that a model took, and where it ran."""
        encoding = sum(answer.encoding_seconds for answer in answers)
        prompts = sum(answer.prompt_seconds for answer in answers)
        label = f"{self.labels[index]} on {self.models[index].device.type}"
        if not encoding and not prompts:
            return f"{label}: {SAME_ANSWER}"
        steps = []
        if encoding >= SHORTEST_SECONDS:
            steps.append(f"image prepared in {encoding:.2f} s")
        steps.append(f"answered in {prompts:.2f} s")
        return f"{label}: {', '.join(steps)}."

    def results_of(
        self, session: Session, query: tuple, appearance: tuple
    ) -> list[downloads.Result]:
        """Return the results of the models that answered a question.

        query: the indices of the models, and the question. The results are computed once for each
        threshold and pixel size.
        """
        threshold, _, _, pixel = appearance
        pixel_size = self.pixel_size_of(session, pixel)
        made_of = (query, threshold, pixel_size)
        latest = session.latest
        if latest is not None and latest[0] == made_of:
            return latest[1]

        indices, question = query
        results = []
        for index in indices:
            loaded = self.models[index]
            results.append(self.result(session, loaded, question, threshold, pixel_size))
        session.latest = (made_of, results)
        return results

    def show(
        self, session: Session, indices: list, results: list, appearance: tuple, display=()
    ) -> list:
        """Return the pictures and the tables of one or two results; None for a missing second.

        indices: of their models. display: values of `build_display`, if something was hidden.
        """
        _, opacity, has_outline, _ = appearance
        image = drawing.preview(session.image)
        shown_images = []
        tables = []
        for index, result in zip(indices, results, strict=True):
            masks, colours = self.drawn_masks(result, display)
            masks = drawing.preview_masks(masks, session.image)
            picture = pictures.draw_masks(image, masks, colours, opacity, has_outline)
            shown_images.append(gr.Image(picture, label=self.labels[index]))
            tables.append(self.table(result))
        if len(results) == 1:
            shown_images.append(None)
            tables.append("")
        return [*shown_images, *tables]

    def drawn_masks(self, result: downloads.Result, display: tuple) -> tuple[np.ndarray, list]:
        """Return the masks that are drawn, bool (n,H,W), and their colours."""
        is_shown = self.shown_masks(result, *display)
        colours = np.array(pictures.mask_colours(len(result.names)))
        return result.masks[is_shown], [*colours[is_shown]]

    def table(self, result: downloads.Result) -> str:
        """Return the table of the areas of a result as HTML."""
        colours = pictures.mask_colours(len(result.names))
        return drawing.area_table(self.table_title, result.names, colours, result.areas)

    def redraw(self, request: gr.Request, *values) -> list:
        """Show the known result with other values of `appearance` and of `build_display`."""
        session = self.session(request)
        if session is None or session.question is None:
            return [gr.skip() for _ in range(4)]
        query = session.question
        appearance = self.read_appearance(values)
        results = self.results_of(session, query, appearance)
        return self.show(session, query[0], results, appearance, values[len(self.appearance) :])

    def default_threshold(self, first: int) -> float:
        """Return the threshold of the first model."""
        return self.models[first].config.threshold

    # --- files ---

    def save_mask(self, request: gr.Request, *values) -> str:
        """Write the mask, at the size of the image."""
        return self.save(request, values, downloads.write_masks)

    def save_table(self, request: gr.Request, *values) -> str:
        """Write the measurements."""
        return self.save(request, values, downloads.write_measurements)

    def save_overlay(self, request: gr.Request, *values) -> str:
        """Write the picture of the result, at the size of the image."""
        _, opacity, has_outline, _ = self.read_appearance(values)
        display = values[len(self.appearance) :]

        def write(session: Session, result: downloads.Result, folder: Path) -> Path:
            masks, colours = self.drawn_masks(result, display)
            picture = pictures.draw_masks(session.image, masks, colours, opacity, has_outline)
            return downloads.write_overlay(session, picture, folder)

        return self.save(request, values, write)

    def save(self, request: gr.Request, values: tuple, write: Callable) -> str:
        """Return a file of the first model's result. write: (session, result, folder) -> file."""
        session = self.session(request)
        if session is None or session.question is None:
            raise nothing_to_save()
        result = self.results_of(session, session.question, self.read_appearance(values))[0]
        folder = self.settings.sessions.files_of(request.session_hash)
        return str(write(session, result, folder))
