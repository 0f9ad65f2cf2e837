"""The view of SAM: mark objects in an image by boxes and points.

Every click is answered at once, as the image is encoded when it is opened. The elements have these
ids:

boxes-upload     drop area for a file         boxes-list        list of files, if there are any
boxes-note       name and size, or an error   boxes-mode        what a click does
boxes-model      first model                  boxes-model-2     second model, to compare with
boxes-class      class of the object, if the first model has several
boxes-new-object, boxes-undo, boxes-clear     buttons
boxes-status     what to do next, or an error
boxes-image      the image to click into      boxes-image-2     the same with the second model
boxes-areas      table of colours and areas   boxes-areas-2     of the second model
boxes-threshold, boxes-opacity   sliders      boxes-pixel-size  mm of a pixel
boxes-download-mask, -objects, -overlay, -table, -clicks   buttons
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gradio as gr

from imaging import pictures
from page import drawing, objects
from page.clicks import BOX, INSIDE, OUTSIDE, Clicks, to_image_pixel
from page.controls import (
    DISPLAY,
    MODEL,
    PRIVATE,
    RAW,
    SaveButtons,
    choose_models,
    chosen_models,
    describe_failure,
    nothing_to_save,
    number_or,
    pixel_size_field,
    share_or,
    share_slider,
)
from page.image_view import NO_IMAGE, ChosenImage
from page.objects import Objects
from page.session import Session
from page.settings import PageSettings, class_names
from prediction.models import LoadedModel

KIND = "boxes"
MODES = [
    ("corner of a box (two opposite ones)", BOX),
    ("point inside the object", INSIDE),
    ("point outside the object", OUTSIDE),
]
OPACITY = 0.3  # of the masks, at the start
START = "Click into the image: two opposite corners of a box around an object."
# Clicks wait for each other, and none is dropped.
CLICKS = MODEL | RAW | dict(show_progress="hidden", trigger_mode="multiple")
REDRAW = DISPLAY | RAW


class BoxView(ChosenImage):
    """Mark objects by boxes and points."""

    kind = KIND

    # --- layout ---

    def build(self) -> None:
        """Add the view to the page."""
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                self.build_choice()
                self.note = gr.HTML(elem_id=f"{KIND}-note")
                self.build_tools()
            with gr.Column(scale=4, min_width=480):
                self.build_result()
        self.connect()

    def build_tools(self) -> None:
        """Add the second step: what clicks do."""
        gr.HTML("<h3>2. Click on what to mark</h3>")
        self.first, self.second = choose_models(self.labels, KIND)
        self.mode = gr.Radio(
            MODES, value=BOX, label="The next click marks a", elem_id=f"{KIND}-mode"
        )
        self.label = gr.Dropdown(
            self.class_choices(0),
            value=1,
            label="Class of the current object",
            visible=len(self.class_choices(0)) > 1,
            elem_id=f"{KIND}-class",
        )
        with gr.Row():
            self.undo = gr.Button("Undo", min_width=80, size="md", elem_id=f"{KIND}-undo")
            self.new_object = gr.Button(
                "Next object", min_width=80, size="md", elem_id=f"{KIND}-new-object"
            )
            self.clear = gr.Button("Clear all", min_width=80, size="md", elem_id=f"{KIND}-clear")
        gr.HTML(
            "<p>Points correct a mark: set one inside where it misses something, one outside "
            "where it covers too much. Each further box marks another object.</p>"
        )

    def build_result(self) -> None:
        """Add the third step: the image with the marks of each model, areas, and files."""
        gr.HTML("<h3>3. Result</h3>")
        self.status = gr.HTML(elem_id=f"{KIND}-status")
        self.images = self.build_pictures(
            "image", label=self.labels[0], show_label=len(self.models) > 1, height=420
        )
        with gr.Row():
            self.threshold = share_slider(
                "Minimum certainty", self.models[0].config.threshold, 0.01, f"{KIND}-threshold"
            )
            self.opacity = share_slider("Colour strength", OPACITY, 0.05, f"{KIND}-opacity")
            self.pixel_size = pixel_size_field(KIND)
        self.appearance = [self.threshold, self.opacity, self.pixel_size]
        self.save_buttons = SaveButtons(
            KIND,
            {
                "mask": "Save mask",
                "objects": "Save objects",
                "overlay": "Save picture",
                "table": "Save areas",
                "clicks": "Save clicks",
            },
            self.models,
        )

    def class_choices(self, index: int) -> list[tuple[str, int]]:
        """Return (name, class index) of a model's classes without the background."""
        classes = class_names(self.models[index])
        if len(classes) == 1:
            return [(classes[0], 1)]
        return [(name, label) for label, name in enumerate(classes) if label > 0]

    # --- events ---

    def connect(self) -> None:
        """Connect the controls with the functions below."""
        shown = [*self.images, *self.tables, self.second_column, self.status, self.label]
        inputs = [self.first, self.second, *self.appearance]
        for opened in self.connect_choice(shown):
            opened.success(self.refresh, inputs, shown, **CLICKS)

        for image in self.images:
            image.select(self.click, [*inputs, self.mode], shown, **CLICKS)
        self.new_object.click(self.start_object, inputs, shown, **CLICKS)
        self.undo.click(self.take_back, inputs, shown, **CLICKS)
        self.clear.click(self.remove_all, inputs, shown, **CLICKS)
        self.label.input(self.name_class, [*inputs, self.label], shown, **CLICKS)
        changed = self.first.input(self.change_model, self.first, self.label, **RAW, **PRIVATE)
        changed.success(self.refresh, inputs, shown, **CLICKS)
        self.second.input(self.refresh, inputs, shown, **CLICKS)
        for control in self.appearance:
            control.change(self.redraw, self.appearance, shown, **REDRAW)

        self.save_buttons.connect("mask", self.save_mask, self.appearance)
        self.save_buttons.connect("objects", self.save_numbered, self.appearance)
        self.save_buttons.connect("overlay", self.save_picture, self.appearance)
        self.save_buttons.connect("table", self.save_table, self.appearance)
        self.save_buttons.connect("clicks", self.save_clicks, self.appearance)

    # --- images ---

    def show_image(self, session: Session | None) -> list:
        """Return updates for a chosen image without marks, or for none."""
        if session is None:
            return [*self.no_marks(None), "", gr.skip()]
        clicks = Clicks(session.image.shape[:2])
        image, masks, scale = objects.preview(session.image, objects.no_masks(clicks))
        picture = objects.picture(image, masks, clicks, 0, scale)
        waiting = drawing.status(["Preparing the image, once …"])
        return [*self.no_marks(picture), waiting, gr.skip()]

    def no_marks(self, picture) -> list:
        """Return updates that show a picture without marks, and no tables."""
        return [picture, None, "", "", gr.Column(visible=False)]

    # --- clicks ---

    def click(self, request: gr.Request, event: gr.SelectData, *values) -> list:
        """Answer a click into an image. values: the models, those of `appearance`, and the mode."""

        def add(clicks: Clicks) -> Clicks:
            x, y = to_image_pixel(*event.index, objects.preview_scale(clicks.size))
            return clicks.click(x, y, values[-1])

        return self.change(request, values[:-1], add)

    def start_object(self, request: gr.Request, *values) -> list:
        """Start the next object. values: of the models, then of `appearance`."""
        return self.change(request, values, Clicks.new_object)

    def take_back(self, request: gr.Request, *values) -> list:
        """Take back the last click."""
        return self.change(request, values, Clicks.undo)

    def remove_all(self, request: gr.Request, *values) -> list:
        """Remove all clicks."""
        return self.change(request, values, Clicks.clear)

    def name_class(self, request: gr.Request, *values) -> list:
        """Set the class of the current object, the last of the values, to a class index."""
        return self.change(request, values[:-1], lambda clicks: clicks.name_class(values[-1]))

    def change(self, request: gr.Request, values: tuple, step: Callable) -> list:
        """Change the clicks by a step, Clicks -> Clicks, and answer them."""
        session = self.session(request)
        if session is None:
            return self.without_image()
        return self.answer(session, *values, clicks=step(self.clicks(session)))

    def refresh(self, request: gr.Request, *values) -> list:
        """Answer the clicks again: the image or a model is another one."""
        session = self.session(request)
        if session is None:
            return self.no_change()
        return self.answer(session, *values, clicks=self.clicks(session))

    def clicks(self, session: Session) -> Clicks:
        """Return the clicks into the image of a session."""
        if session.question is None:
            return Clicks(session.image.shape[:2])
        return session.question[0].clicks

    def change_model(self, index: int) -> gr.Dropdown:
        """Return the classes of another model."""
        choices = self.class_choices(index)
        return gr.Dropdown(choices=choices, value=1, visible=len(choices) > 1)

    def answer(
        self, session: Session, first: int, second: int, *appearance, clicks: Clicks
    ) -> list:
        """Segment the clicked objects and show them. first, second: indices of the models."""
        results = []
        try:
            for index in chosen_models(first, second):
                loaded = self.models[index]
                results.append(objects.segment(session, loaded, self.known_classes(clicks, loaded)))
            session.question = results
            return self.show(session, appearance)
        except (ValueError, MemoryError, RuntimeError) as error:
            line = describe_failure(error, "image")
            skipped = [gr.skip()] * len(self.images)
            status = drawing.status([line], is_error=True)
            return [*skipped, "", "", gr.skip(), status, gr.skip()]

    def known_classes(self, clicks: Clicks, loaded: LoadedModel) -> Clicks:
        """Return the clicks, all of the first class if the model does not know the class of one."""
        highest = max(1, len(class_names(loaded)) - 1)
        if all(clicked.label <= highest for clicked in clicks.objects):
            return clicks
        relabelled = [replace(clicked, label=1) for clicked in clicks.objects]
        return replace(clicks, objects=tuple(relabelled), before=None)

    # --- display ---

    def read_appearance(self, appearance: tuple) -> tuple[float, float, float]:
        """Return threshold, opacity and pixel size; empty fields have the values of the start."""
        threshold, opacity, pixel = appearance
        usual = self.models[0].config.threshold
        return number_or(threshold, usual), share_or(opacity, OPACITY), number_or(pixel, 0)

    def show(self, session: Session, appearance: tuple) -> list:
        """Return updates of the pictures, the tables, the status, and the class of the object."""
        threshold, opacity, pixel = self.read_appearance(appearance)
        results = session.question
        clicks = results[0].clicks
        shown_images = []
        tables = []
        for marked_objects in results:
            masks = marked_objects.masks(threshold)
            image, small_masks, scale = objects.preview(session.image, masks)
            picture = objects.picture(image, small_masks, clicks, opacity, scale)
            label = self.labels[self.models.index(marked_objects.loaded)]
            shown_images.append(gr.Image(picture, label=label))
            rows = objects.areas(marked_objects, masks, self.pixel_size_of(session, pixel))
            tables.append(self.table(results[0], rows))

        is_compared = len(results) > 1
        if not is_compared:
            shown_images.append(None)
            tables.append("")
        column = gr.Column(visible=is_compared)
        return [*shown_images, *tables, column, self.sentence(results), clicks.current.label]

    def no_change(self) -> list:
        """Return updates of what `show` returns that change nothing."""
        return [gr.skip()] * (2 * len(self.images) + 3)

    def redraw(self, request: gr.Request, *appearance) -> list:
        """Show the known result with other values of `appearance`."""
        session = self.session(request)
        if session is None or session.question is None:
            return self.no_change()
        return self.show(session, appearance)

    def without_image(self) -> list:
        """Return updates that ask for an image."""
        status = drawing.status([NO_IMAGE], is_error=True)
        return [*self.no_marks(None), status, gr.skip()]

    def table(self, first: Objects, rows: list[dict]) -> str:
        """Return the table of a model's areas as HTML, "" without objects.

        first: of the first model. Its classes are those that the user has chosen from.
        """
        if not rows:
            return ""
        names = []
        for k in range(len(rows)):
            name = f"Object {k + 1}"
            names.append(f"{name}: {first.class_of(k)}" if len(first.classes) > 1 else name)
        colours = pictures.class_colours(len(rows))
        return drawing.area_table("Object", names, colours, rows)

    def sentence(self, results: list[Objects]) -> str:
        """Return what to do next as HTML."""
        clicks = results[0].clicks
        if clicks.message:
            return drawing.status([clicks.message])
        if not clicks.complete:
            return drawing.status([START])
        count = len(clicks.complete)
        seconds = sum(
            marked_objects.encoding_seconds + marked_objects.prompt_seconds
            for marked_objects in results
        )
        noun = "object" if count == 1 else "objects"
        device = results[0].loaded.device.type
        return drawing.status([f"{count} {noun} marked ({seconds:.2f} s on {device})."])

    # --- files ---

    def marked_objects(self, request: gr.Request) -> tuple[Session, Objects, Path]:
        """Return a session, the first model's objects, and a new folder for a file of them."""
        session = self.session(request)
        if session is None or session.question is None or not self.clicks(session).complete:
            raise nothing_to_save()
        folder = self.settings.sessions.files_of(request.session_hash)
        return session, session.question[0], folder

    def save_mask(self, request: gr.Request, *appearance) -> str:
        """Write the mask as predict.py does."""
        session, marked_objects, folder = self.marked_objects(request)
        threshold, _, _ = self.read_appearance(appearance)
        return str(objects.write_mask(session, marked_objects, threshold, folder))

    def save_numbered(self, request: gr.Request, *appearance) -> str:
        """Write the numbers of the objects."""
        session, marked_objects, folder = self.marked_objects(request)
        threshold, _, _ = self.read_appearance(appearance)
        return str(objects.write_numbered(session, marked_objects, threshold, folder))

    def save_picture(self, request: gr.Request, *appearance) -> str:
        """Write the image with the marks."""
        session, marked_objects, folder = self.marked_objects(request)
        threshold, opacity, _ = self.read_appearance(appearance)
        return str(objects.write_picture(session, marked_objects, threshold, opacity, folder))

    def save_table(self, request: gr.Request, *appearance) -> str:
        """Write the measurements."""
        session, marked_objects, folder = self.marked_objects(request)
        threshold, _, pixel = self.read_appearance(appearance)
        size = self.pixel_size_of(session, pixel)
        return str(objects.write_measurements(session, marked_objects, threshold, size, folder))

    def save_clicks(self, request: gr.Request, *appearance) -> str:
        """Write the boxes and points."""
        session, marked_objects, folder = self.marked_objects(request)
        return str(objects.write_clicks(session, marked_objects, folder))


def build(models: list[LoadedModel], settings: PageSettings) -> None:
    """Add the view of these models to the page."""
    BoxView(models, settings).build()
