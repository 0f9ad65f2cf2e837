"""The view of models for volumes: three planes with the structures that were found.

The elements have these ids; PLANE is axial, coronal or sagittal:

volumes-upload        drop area for files         volumes-list      list of files, if there are any
volumes-note          name and size, or an error
volumes-model         first model                 volumes-model-2   second model, to compare with
volumes-run           button that starts          volumes-status    progress, or an error
volumes-PLANE         picture of a slice          volumes-PLANE-2   the same with the second model
volumes-slice-PLANE   slider of its number, from 1
volumes-window        grey levels by name         volumes-level, volumes-width   sliders, for CT
volumes-shown         structures that are drawn
volumes-table         colours and volumes in ml   volumes-table-2   of the second model
volumes-opacity       slider                      volumes-threshold     slider, if it has an effect
volumes-download-mask, -overlay, -table   buttons

Everything after the first two steps is hidden until a volume is chosen.
"""

import html
import shutil
from collections.abc import Callable
from pathlib import Path

import gradio as gr

from page import drawing, slices, uploads, volume_case
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
    share_or,
    share_slider,
    upload_field,
)
from page.settings import PageSettings, model_labels
from page.slices import PLANES
from page.volume_case import OPTIONS, Volume, VolumePrediction
from prediction.models import LoadedModel
from prediction.volumes import VolumePredictor

KIND = "volumes"
NOT_HU = (
    "The model takes CT in Hounsfield units (air -1000, water 0), and the values of this volume "
    "do not look like it, so the result may be wrong."
)
NO_VOLUME = "Choose a volume first (step 1)."
LIMITS = (
    "CT or MR as NIfTI (.nii, .nii.gz), up to 200 MB. If each channel has a file, choose all of "
    "them together."
)
SLIDERS = {
    "axial": "Axial slice, seen from the feet",
    "coronal": "Coronal slice, seen from the front",
    "sagittal": "Sagittal slice, seen from the left",
}
OPACITY = 0.4  # of the masks, at the start
FIRST_WINDOW = "Soft tissue"
REDRAW = DISPLAY | RAW


class VolumeView:
    """Find structures in a volume and look at them slice by slice."""

    def __init__(self, models: list[LoadedModel], settings: PageSettings):
        self.settings = settings
        self.labels = model_labels(models)
        self.models = models
        self.predictors = [VolumePredictor([loaded], OPTIONS) for loaded in models]

    # --- layout ---

    def build(self) -> None:
        """Add the view to the page."""
        with gr.Row():
            with gr.Column(min_width=320):
                self.build_volume()
            with gr.Column(min_width=320):
                self.build_run()
        with gr.Column(visible=False) as self.viewer:
            self.build_viewer()
            with gr.Row():
                with gr.Column(min_width=320):
                    self.build_display()
                with gr.Column(min_width=320):
                    self.build_result()
        self.connect()

    def build_volume(self) -> None:
        """Add the first step: a volume from files or from the list."""
        gr.HTML(f"<h3>1. Volume</h3><p>{LIMITS}</p>")
        with gr.Row():
            self.upload = upload_field(
                "Files of one volume", KIND, file_count="multiple", min_width=200
            )
            self.listing = list_files(self.settings.volumes, "volume", KIND)
        self.note = gr.HTML(elem_id=f"{KIND}-note")

    def build_run(self) -> None:
        """Add the second step: the model."""
        gr.HTML("<h3>2. What to find</h3>")
        self.first, self.second = choose_models(self.labels, KIND)
        self.finds = gr.HTML(self.describe_models(0, -1))
        self.run_button = gr.Button("Find the structures", variant="primary", elem_id=f"{KIND}-run")
        self.status = gr.HTML(elem_id=f"{KIND}-status")

    def build_viewer(self) -> None:
        """Add the third step: the three planes, and those of a second model below them."""
        gr.HTML(
            "<h3>3. Look at it</h3><p>The patient's left (L) is on the right of the picture, as "
            "radiologists look at it. R right, A front, P back, S head, I feet. A click into a "
            "slice moves the other two to this place.</p>"
        )
        self.sliders = {}
        with gr.Row():
            for name in PLANES:
                self.sliders[name] = gr.Slider(
                    1,
                    2,
                    value=1,
                    step=1,
                    label=SLIDERS[name],
                    buttons=[],
                    min_width=260,
                    interactive=True,
                    elem_id=f"{KIND}-slice-{name}",
                )
        self.planes = self.build_planes("")
        with gr.Column(visible=False) as self.second_row:
            self.second_planes = self.build_planes("-2")

    def build_planes(self, ending: str) -> dict[str, gr.Image]:
        """Add a row of the three planes. ending: of their ids."""
        planes = {}
        with gr.Row():
            for name in PLANES:
                planes[name] = gr.Image(
                    label=self.labels[0],
                    show_label=len(self.models) > 1,
                    interactive=False,
                    format="jpeg",
                    height=340,
                    min_width=260,
                    buttons=["fullscreen"],
                    elem_id=f"{KIND}-{name}{ending}",
                    elem_classes="slice",
                )
        return planes

    def build_display(self) -> None:
        """Add the controls of the display."""
        self.window = gr.Radio(
            [*slices.CT_WINDOWS],
            value=FIRST_WINDOW,
            label="Brightness and contrast",
            elem_id=f"{KIND}-window",
        )
        level, width = slices.CT_WINDOWS[FIRST_WINDOW]
        with gr.Row() as self.hounsfield:
            self.level = gr.Slider(
                -1000, 1000, level, step=10, label="Level (HU)", buttons=[],
                min_width=140, elem_id=f"{KIND}-level",
            )  # fmt: skip
            self.width = gr.Slider(
                10, 3000, width, step=10, label="Width (HU)", buttons=[],
                min_width=140, elem_id=f"{KIND}-width",
            )  # fmt: skip
        with gr.Row():
            self.opacity = share_slider("Colour strength", OPACITY, 0.05, f"{KIND}-opacity")
            self.threshold = share_slider(
                "Minimum certainty",
                self.models[0].config.threshold,
                0.01,
                f"{KIND}-threshold",
                visible=False,
            )

    def build_result(self) -> None:
        """Add the structures, and the buttons that save files."""
        self.shown = gr.CheckboxGroup([], label="Show", visible=False, elem_id=f"{KIND}-shown")
        self.tables = [gr.HTML(elem_id=f"{KIND}-table"), gr.HTML(elem_id=f"{KIND}-table-2")]
        labels = {"mask": "Save mask", "overlay": "Save picture", "table": "Save volumes"}
        self.save_buttons = SaveButtons(KIND, labels, self.models)

    def describe_models(self, first: int, second: int) -> str:
        """Return what one or two models find, as HTML."""
        lines = []
        for index in chosen_models(first, second):
            names = ", ".join(self.predictors[index].classes[1:])
            lines.append(drawing.status([f"{self.labels[index]} finds: {names}."]))
        return "".join(lines)

    # --- events ---

    def connect(self) -> None:
        """Connect the controls with the functions below."""
        self.pictures = [*self.planes.values(), *self.second_planes.values()]
        sliders = [*self.sliders.values()]
        appearance = [self.window, self.level, self.width, self.shown, self.opacity, self.threshold]
        shown = [*sliders, *appearance]
        windows = [self.window, self.hounsfield, self.level, self.width]
        result = [*sliders, *self.pictures, self.second_row, self.shown, self.threshold]
        result += [*self.tables, self.status]
        chosen = [self.upload, self.listing, self.note, self.viewer, *windows, *result]
        self.upload.upload(self.open_upload, [self.upload, self.first], chosen, **PRIVATE)
        self.listing.input(self.open_listed, [self.listing, self.first], chosen, **RAW, **PRIVATE)

        models = [self.first, self.second]
        for choice in models:
            choice.input(self.describe_models, models, self.finds, **RAW, **PRIVATE)
        self.run_button.click(
            self.run,
            [*models, *shown],
            result,
            show_progress_on=self.status,
            **RAW,
            **MODEL,
        )

        for name, slider in self.sliders.items():
            planes = [self.planes[name], self.second_planes[name]]
            slider.input(self.drawing_of(name), [slider, *appearance], planes, **REDRAW)
            for plane in planes:
                plane.select(self.move_from(name), shown, [*sliders, *self.pictures], **REDRAW)
        self.window.input(
            self.use_window, shown, [self.level, self.width, *self.pictures], **REDRAW
        )
        for control in (self.level, self.width):
            control.input(self.use_levels, shown, [self.window, *self.pictures], **REDRAW)
        for control in (self.shown, self.opacity):
            control.input(self.draw_all, shown, self.pictures, **REDRAW)
        self.threshold.input(self.use_threshold, shown, [*self.tables, *self.pictures], **REDRAW)

        self.save_buttons.connect("mask", self.save_mask, [self.threshold])
        self.save_buttons.connect("overlay", self.save_picture, [*sliders, *appearance])
        self.save_buttons.connect("table", self.save_table, [self.threshold])

    def volume(self, request: gr.Request) -> Volume | None:
        """Return the volume of the browser that sends a request."""
        return self.settings.sessions.get(request.session_hash, KIND)

    # --- volumes ---

    def open_upload(self, files: list[str], model: int, request: gr.Request) -> list:
        """Read uploaded files. They are moved to a folder that is removed with the session."""
        folder = self.new_folder(request)
        names = {Path(file).name for file in files}
        if len(names) < len(files):
            return self.no_volume(ValueError("Two of the files have the same name; rename one."))

        paths = []
        for file in files:
            paths.append(Path(shutil.move(file, folder / Path(file).name)))
        return self.open_volume(paths, folder, model, False, request)

    def open_listed(self, index: int | None, model: int, request: gr.Request) -> list:
        """Read a volume of the list."""
        try:
            path = self.settings.volumes.path(index)
        except ValueError as error:
            return self.no_volume(error)
        return self.open_volume([path], self.new_folder(request), model, True, request)

    def new_folder(self, request: gr.Request) -> Path:
        """Forget the earlier volume with its files, and return a folder for the next one."""
        earlier = self.volume(request)
        if earlier is not None:
            shutil.rmtree(earlier.folder, ignore_errors=True)
        self.settings.sessions.drop(request.session_hash, KIND)
        return self.settings.sessions.files_of(request.session_hash)

    def open_volume(self, files: list, folder: Path, model: int, is_listed: bool, request) -> list:
        """Start the session of a volume. Return updates that show it."""
        try:
            channels = self.models[model].config.in_channels
            name, paths = volume_case.find_case(files, channels)
            volume, notes = volume_case.open_volume(name, paths, folder)
        except (ValueError, MemoryError) as error:
            return self.no_volume(ValueError(describe_failure(error, "volume")))

        self.settings.sessions.put(request.session_hash, KIND, volume)
        voxel = volume.best_voxel(0.5)
        numbers = [voxel[plane.axis] + 1 for plane in PLANES.values()]
        window = next(iter(volume.windows))
        level, width = slices.CT_WINDOWS[FIRST_WINDOW]
        drawn = self.draw_rows(volume, (*numbers, window, level, width, [], OPACITY, None))
        windows = [
            gr.Radio([*volume.windows], value=window),
            gr.Row(visible=volume.is_ct),
            level,
            width,
        ]
        note = drawing.status([volume.describe(), *notes])
        listing = gr.skip() if is_listed else None
        return [
            None, listing, note, gr.Column(visible=True), *windows,
            *self.slider_updates(volume, voxel), *self.labelled(drawn, [name]),
            *self.no_result(), "",
        ]  # fmt: skip

    def no_volume(self, error: ValueError) -> list:
        """Return updates that show why there is no volume."""
        note = drawing.status([str(error)], is_error=True)
        unchanged = [gr.skip()] * (4 + len(PLANES))  # windows and sliders
        pictures = [None] * len(self.pictures)
        viewer = gr.Column(visible=False)
        return [None, None, note, viewer, *unchanged, *pictures, *self.no_result(), ""]

    def slider_updates(self, volume: Volume, voxel: tuple[int, ...]) -> list:
        """Return updates of the sliders for the planes through a voxel."""
        updates = []
        for plane in PLANES.values():
            count = volume.grid.size[plane.axis]
            updates.append(gr.Slider(1, max(2, count), value=voxel[plane.axis] + 1))
        return updates

    def labelled(self, drawn: list, labels: list[str]) -> list:
        """Return updates of the pictures with a label for each row; one label is for both."""
        updates = []
        for k, picture in enumerate(drawn):
            label = labels[0] if k < len(PLANES) else labels[-1]
            updates.append(gr.Image(picture, label=label))
        return updates

    # --- predictions ---

    def run(
        self,
        request: gr.Request,
        first: int,
        second: int,
        *values,
        progress=gr.Progress(track_tqdm=True),  # noqa: B008
    ) -> list:
        """Find the structures with one or two models. Return updates of all that is shown.

        values: of the sliders and of the display.
        """
        volume = self.volume(request)
        indices = chosen_models(first, second)
        if volume is None:
            return self.without_prediction([gr.skip()] * len(self.pictures), NO_VOLUME)
        try:
            volume.predictions, sentences = self.predict(volume, indices)
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            volume.predictions = []
            pictures = self.labelled(self.draw_rows(volume, values), [volume.name])
            line = ValueError(describe_failure(error, "volume"))
            return self.without_prediction(pictures, uploads.sentence(line, volume.paths[0]))

        predictions = volume.predictions
        threshold = self.models[first].config.threshold
        names = {}  # a dict keeps the order
        for prediction in predictions:
            names |= dict.fromkeys(prediction.classes)
        voxel = volume.best_voxel(threshold)
        numbers = [voxel[plane.axis] + 1 for plane in PLANES.values()]
        window, level, width, _, opacity, _ = values[len(PLANES) :]
        appearance = (window, level, width, [*names], opacity, threshold)
        drawn = self.draw_rows(volume, (*numbers, *appearance))
        labels = [self.labels[index] for index in indices]
        has_threshold = any(prediction.has_threshold for prediction in predictions)
        fits = all(prediction.fits_model for prediction in predictions)
        return [
            *self.slider_updates(volume, voxel),
            *self.labelled(drawn, labels),
            gr.Column(visible=len(predictions) > 1),
            gr.CheckboxGroup([*names], value=[*names], visible=len(names) > 1),
            gr.Slider(value=threshold, visible=has_threshold),
            *self.tables_of(predictions, threshold),
            drawing.status(sentences, is_error=not fits),
        ]

    def predict(self, volume: Volume, indices: list[int]) -> tuple[list[VolumePrediction], list]:
        """Return the predictions of models, and sentences about them. indices: of the models.

        A prediction that is shown already is not computed again.
        """
        known = {prediction.predictor: prediction for prediction in volume.predictions}
        predictions = []
        sentences = []
        for index in indices:
            predictor = self.predictors[index]
            if predictor in known:
                prediction = known[predictor]
                sentences.append(f"{self.labels[index]}: {SAME_ANSWER}")
            else:
                prediction = VolumePrediction(predictor, volume)
                device = self.models[index].device.type
                sentences.append(
                    f"{self.labels[index]}: done in {prediction.seconds:.1f} s on {device}."
                )
            if not prediction.fits_model:
                sentences.append(NOT_HU)
            predictions.append(prediction)
        return predictions, sentences

    def without_prediction(self, pictures: list, sentence: str) -> list:
        """Return updates that show why there is no prediction. pictures: updates of theirs."""
        unchanged = [gr.skip()] * len(PLANES)
        status = drawing.status([sentence], is_error=True)
        return [*unchanged, *pictures, *self.no_result(), status]

    def no_result(self) -> list:
        """Return updates that remove the structures."""
        shown = gr.CheckboxGroup([], value=[], visible=False)
        return [gr.Column(visible=False), shown, gr.Slider(visible=False), "", ""]

    def tables_of(self, predictions: list[VolumePrediction], threshold: float) -> list[str]:
        """Return the tables of one or two predictions as HTML; "" for a missing second."""
        tables = []
        for prediction in predictions:
            title = "Structure"
            if len(predictions) > 1:
                title = self.labels[self.predictors.index(prediction.predictor)]
            tables.append(self.table(prediction, threshold, title))
        return tables if len(tables) > 1 else [*tables, ""]

    def table(self, prediction: VolumePrediction, threshold: float, title: str) -> str:
        """Return the table of the structures as HTML. title: of the column of names."""
        values = prediction.predictor.labels[1:]
        headings = [html.escape(title), "Volume in ml", "Number in mask"]
        lines = ["<table>", drawing.table_row("th", headings)]
        rows = zip(
            prediction.classes,
            prediction.colours,
            prediction.millilitres(threshold),
            values,
            strict=True,
        )
        for name, colour, millilitres, value in rows:
            cells = [
                f"{drawing.swatch(colour)} {html.escape(name)}",
                f"{millilitres:,.1f}",
                str(1 if prediction.predictor.config.overlapping else value),
            ]
            lines.append(drawing.table_row("td", cells))
        lines.append("</table>")
        return "\n".join(lines)

    # --- display ---

    def limits(self, volume: Volume, window: str | None, level, width) -> tuple[float, float]:
        """Return the values that become black and white."""
        if volume.is_ct:
            usual_level, usual_width = slices.CT_WINDOWS[FIRST_WINDOW]
            level = number_or(level, usual_level)
            return slices.window_limits(level, number_or(width, usual_width))
        first = next(iter(volume.windows))
        return volume.windows.get(window, volume.windows[first])

    def draw(self, volume: Volume, name: str, number: int | None, appearance: tuple) -> list:
        """Return the pictures of a slice in both rows, uint8 (h,w,3); None for a missing second.

        name: of the plane. number: of the slice, from 1. appearance: values of its controls.
        """
        window, level, width, shown, opacity, threshold = appearance
        index = int(number_or(number, 1)) - 1
        limits = self.limits(volume, window, level, width)
        opacity = share_or(opacity, OPACITY)
        threshold = self.read_threshold(threshold)

        drawn = []
        for prediction in volume.predictions or [None]:
            picture = volume.picture(name, index, limits, prediction, shown, opacity, threshold)
            drawn.append(picture)
        return drawn if len(drawn) > 1 else [*drawn, None]

    def drawing_of(self, name: str) -> Callable:
        """Return the function that draws a slice of a plane in both rows."""

        def draw_plane(request: gr.Request, number: int | None, *appearance) -> list:
            volume = self.volume(request)
            if volume is None:
                return [gr.skip(), gr.skip()]
            return self.draw(volume, name, number, appearance)

        return draw_plane

    def read_threshold(self, threshold: float | None) -> float:
        """Return the threshold of the slider; that of the start if its field is empty."""
        return number_or(threshold, self.models[0].config.threshold)

    def move_from(self, name: str) -> Callable:
        """Return the function that moves the other planes to a voxel clicked in a plane."""

        def move(request: gr.Request, event: gr.SelectData, *values) -> list:
            return self.move(request, event, name, values)

        return move

    def move(self, request: gr.Request, event: gr.SelectData, name: str, values: tuple) -> list:
        """Return the sliders and the pictures for the voxel that was clicked in a plane."""
        volume = self.volume(request)
        if volume is None:
            return [gr.skip()] * (len(PLANES) + len(self.pictures))

        size = volume.grid.size
        height, width = slices.picture_size(PLANES[name], size, volume.grid.spacing)
        x, y = event.index
        clicked = slices.voxel_at(PLANES[name], (x + 0.5) / width, (y + 0.5) / height, size)
        numbers = []
        for plane, number in zip(PLANES.values(), values, strict=False):
            current = int(number_or(number, 1))
            numbers.append(clicked.get(plane.axis, current - 1) + 1)
        pictures = self.draw_all(request, *numbers, *values[len(PLANES) :])
        return [*numbers, *pictures]

    def draw_all(self, request: gr.Request, *values) -> list:
        """Return the pictures of all planes in both rows, or no updates without a volume.

        values: of the sliders and of the display.
        """
        volume = self.volume(request)
        if volume is None:
            return [gr.skip()] * len(self.pictures)
        return self.draw_rows(volume, values)

    def draw_rows(self, volume: Volume, values: tuple) -> list:
        """Return the pictures of all planes, first the upper row; None for a missing second.

        values: of the sliders and of the display.
        """
        above = []
        below = []
        for name, number in zip(PLANES, values, strict=False):
            first, second = self.draw(volume, name, number, values[len(PLANES) :])
            above.append(first)
            below.append(second)
        return [*above, *below]

    def use_window(self, request: gr.Request, *values) -> list:
        """Return level and width of a window that was chosen by name, and the pictures."""
        numbers = values[: len(PLANES)]
        window, level, width, *rest = values[len(PLANES) :]
        level, width = slices.CT_WINDOWS.get(window, (level, width))
        pictures = self.draw_all(request, *numbers, window, level, width, *rest)
        return [level, width, *pictures]

    def use_levels(self, request: gr.Request, *values) -> list:
        """Return no name of a window, as level and width were moved, and the pictures."""
        return [None, *self.draw_all(request, *values)]

    def use_threshold(self, request: gr.Request, *values) -> list:
        """Return the tables and the pictures at another threshold."""
        volume = self.volume(request)
        if volume is None or not volume.predictions:
            return [gr.skip()] * (len(self.tables) + len(self.pictures))
        tables = self.tables_of(volume.predictions, self.read_threshold(values[-1]))
        return [*tables, *self.draw_all(request, *values)]

    # --- files ---

    def latest_prediction(self, request: gr.Request) -> tuple[VolumePrediction, Path]:
        """Return the first model's prediction, and a new folder for a file of it."""
        volume = self.volume(request)
        if volume is None or not volume.predictions:
            raise nothing_to_save()
        return volume.predictions[0], self.settings.sessions.files_of(request.session_hash)

    def save_mask(self, request: gr.Request, threshold: float | None) -> str:
        """Write the label map as predict.py does."""
        prediction, folder = self.latest_prediction(request)
        threshold = self.read_threshold(threshold)
        return str(volume_case.write_label_maps(prediction, threshold, folder))

    def save_table(self, request: gr.Request, threshold: float | None) -> str:
        """Write the measurements."""
        prediction, folder = self.latest_prediction(request)
        return str(
            volume_case.write_measurements(prediction, self.read_threshold(threshold), folder)
        )

    def save_picture(self, request: gr.Request, *values) -> str:
        """Write the planes as they are shown."""
        prediction, folder = self.latest_prediction(request)
        planes = self.draw_all(request, *values)[: len(PLANES)]
        return str(volume_case.write_picture(prediction.name, planes, folder))


def build(models: list[LoadedModel], settings: PageSettings) -> None:
    """Add the view of these models to the page."""
    VolumeView(models, settings).build()
