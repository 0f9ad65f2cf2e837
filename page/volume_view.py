"""The view of models for volumes: three planes with the structures that were found.

The elements have these ids; PLANE is axial, coronal or sagittal:

volumes-upload        drop area for files         volumes-list      list of files, if there are any
volumes-note          name and size, or an error  volumes-model     visible if there are several
volumes-run           button that starts          volumes-status    progress, or an error
volumes-PLANE         picture of a slice          volumes-slice-PLANE   slider of its number, from 1
volumes-window        grey levels by name         volumes-level, volumes-width   sliders, for CT
volumes-shown         structures that are drawn   volumes-table     colours and volumes in ml
volumes-opacity       slider                      volumes-threshold     slider, if it has an effect
volumes-download-mask, -overlay, -table   buttons
"""

import html
import shutil
from pathlib import Path

import gradio as gr

from page import drawing, slices, uploads, volume_case
from page.controls import (
    DISPLAY,
    MODEL,
    PRIVATE,
    RAW,
    SaveButtons,
    describe_failure,
    list_files,
    list_models,
    nothing_to_save,
    number_or,
    share_slider,
)
from page.settings import PageSettings, model_labels
from page.slices import PLANES
from page.volume_case import OPTIONS, Volume, VolumePrediction
from prediction.models import LoadedModel
from prediction.volumes import VolumePredictor

KIND = "volumes"
NOT_HU = (
    "The model takes CT in Hounsfield units (air -1000, water 0), and the values of this volume "
    "hardly are: do not rely on the result."
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
        self.build_planes()
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
            self.upload = gr.File(
                label="Files of one volume",
                show_label=False,
                file_count="multiple",
                height=90,
                min_width=200,
                elem_id=f"{KIND}-upload",
                elem_classes="upload",
            )
            self.listing = list_files(self.settings.volumes, "volume", f"{KIND}-list")
        self.note = gr.HTML(elem_id=f"{KIND}-note")

    def build_run(self) -> None:
        """Add the second step: the model."""
        gr.HTML("<h3>2. What to find</h3>")
        self.model = list_models(self.labels, f"{KIND}-model")
        self.finds = gr.HTML(self.describe_model(0))
        self.run_button = gr.Button("Find the structures", variant="primary", elem_id=f"{KIND}-run")
        self.status = gr.HTML(elem_id=f"{KIND}-status")

    def build_planes(self) -> None:
        """Add the third step: the three planes."""
        gr.HTML(
            "<h3>3. Look at it</h3><p>The patient's left (L) is on the right of the picture, as "
            "radiologists look at it. R right, A front, P back, S head, I feet. A click into a "
            "slice moves the other two to this place.</p>"
        )
        self.planes = {}
        self.sliders = {}
        with gr.Row():
            for name in PLANES:
                with gr.Column(min_width=260):
                    self.planes[name] = gr.Image(
                        show_label=False,
                        interactive=False,
                        format="jpeg",
                        height=340,
                        buttons=["fullscreen"],
                        elem_id=f"{KIND}-{name}",
                        elem_classes="slice",
                    )
                    self.sliders[name] = gr.Slider(
                        1,
                        2,
                        value=1,
                        step=1,
                        label=SLIDERS[name],
                        buttons=[],
                        interactive=True,
                        elem_id=f"{KIND}-slice-{name}",
                    )

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
            self.opacity = share_slider("Strength of the colours", OPACITY, 0.05, f"{KIND}-opacity")
            self.threshold = share_slider(
                "Mark voxels with a certainty above",
                self.models[0].config.threshold,
                0.01,
                f"{KIND}-threshold",
                visible=False,
            )

    def build_result(self) -> None:
        """Add the structures, and the buttons that save files."""
        self.shown = gr.CheckboxGroup([], label="Show", visible=False, elem_id=f"{KIND}-shown")
        self.table = gr.HTML(elem_id=f"{KIND}-table")
        self.save_buttons = SaveButtons(
            KIND,
            {"mask": "Save mask (NIfTI)", "overlay": "Save picture", "table": "Save volumes (CSV)"},
        )

    def describe_model(self, index: int) -> str:
        """Return what a model finds, as HTML."""
        names = ", ".join(self.predictors[index].classes[1:])
        return f"<p>{html.escape(self.labels[index])} finds: {html.escape(names)}.</p>"

    # --- events ---

    def connect(self) -> None:
        """Connect the controls with the functions below."""
        planes = [*self.planes.values()]
        sliders = [*self.sliders.values()]
        look = [self.window, self.level, self.width, self.shown, self.opacity, self.threshold]
        result = [self.shown, self.threshold, self.table, self.status]
        windows = [self.window, self.hounsfield, self.level, self.width]
        chosen = [self.upload, self.listing, self.note, *sliders, *planes, *windows, *result]
        self.upload.upload(self.open_upload, [self.upload, self.model], chosen, **PRIVATE)
        self.listing.input(self.open_listed, [self.listing, self.model], chosen, **RAW, **PRIVATE)

        self.model.input(self.describe_model, self.model, self.finds, **RAW, **PRIVATE)
        self.run_button.click(
            self.run,
            [self.model, *look],
            [*sliders, *planes, *result],
            show_progress_on=self.status,
            **RAW,
            **MODEL,
        )

        draw = {"axial": self.axial, "coronal": self.coronal, "sagittal": self.sagittal}
        move = {
            "axial": self.move_axial, "coronal": self.move_coronal, "sagittal": self.move_sagittal,
        }  # fmt: skip
        for name, slider in self.sliders.items():
            plane = self.planes[name]
            slider.input(draw[name], [slider, *look], plane, **REDRAW)
            plane.select(move[name], [*sliders, *look], [*sliders, *planes], **REDRAW)
        self.window.input(
            self.use_window, [*sliders, *look], [self.level, self.width, *planes], **REDRAW
        )
        for control in (self.level, self.width):
            control.input(self.use_levels, [*sliders, *look], [self.window, *planes], **REDRAW)
        for control in (self.shown, self.opacity):
            control.input(self.draw_all, [*sliders, *look], planes, **REDRAW)
        self.threshold.input(self.use_threshold, [*sliders, *look], [self.table, *planes], **REDRAW)

        self.save_buttons.connect("mask", self.save_mask, [self.threshold])
        self.save_buttons.connect("overlay", self.save_picture, [*sliders, *look])
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
        window = next(iter(volume.windows))
        limits = volume.windows[window]
        planes = []
        for plane_name, plane in PLANES.items():
            index = voxel[plane.axis]
            planes.append(volume.picture(plane_name, index, limits, [], 0, 0.5))
        level, width = slices.CT_WINDOWS[FIRST_WINDOW]
        windows = [
            gr.Radio([*volume.windows], value=window),
            gr.Row(visible=volume.is_ct),
            level,
            width,
        ]
        note = drawing.status([volume.describe(), *notes])
        listing = gr.skip() if is_listed else None
        return [
            None, listing, note, *self.slider_updates(volume, voxel), *planes, *windows,
            *self.no_result(), "",
        ]  # fmt: skip

    def no_volume(self, error: ValueError) -> list:
        """Return updates that show why there is no volume."""
        note = drawing.status([str(error)], is_error=True)
        nothing = [gr.skip()] * len(PLANES)
        empty = [None] * len(PLANES)
        windows = [gr.skip()] * 4
        return [None, None, note, *nothing, *empty, *windows, *self.no_result(), ""]

    def slider_updates(self, volume: Volume, voxel: tuple[int, ...]) -> list:
        """Return updates of the sliders for the planes through a voxel."""
        updates = []
        for plane in PLANES.values():
            count = volume.grid.size[plane.axis]
            updates.append(gr.Slider(1, max(2, count), value=voxel[plane.axis] + 1))
        return updates

    # --- predictions ---

    def run(
        self,
        request: gr.Request,
        model: int,
        *look,
        progress=gr.Progress(track_tqdm=True),  # noqa: B008
    ) -> list:
        """Find the structures. Return updates of the sliders, the planes and the result."""
        volume = self.volume(request)
        if volume is None:
            return self.without_prediction(NO_VOLUME)
        try:
            volume.prediction = VolumePrediction(self.predictors[model], volume)
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            line = describe_failure(error, "volume")
            return self.without_prediction(uploads.sentence(ValueError(line), volume.paths[0]))

        prediction = volume.prediction
        threshold = self.models[model].config.threshold
        voxel = volume.best_voxel(threshold)
        choices = [(name, k) for k, name in enumerate(prediction.classes)]
        shown = [*range(len(choices))]
        window, level, width, _, opacity, _ = look
        numbers = [voxel[plane.axis] + 1 for plane in PLANES.values()]
        values = (*numbers, window, level, width, shown, opacity, threshold)
        sentences = [f"Done in {prediction.seconds:.1f} s on {self.models[model].device.type}."]
        if not prediction.fits_model:
            sentences.append(NOT_HU)
        return [
            *self.slider_updates(volume, voxel),
            *self.draw_all(request, *values),
            gr.CheckboxGroup(choices, value=shown, visible=len(choices) > 1),
            gr.Slider(value=threshold, visible=prediction.has_threshold),
            self.table_of(prediction, threshold),
            drawing.status(sentences, is_error=not prediction.fits_model),
        ]

    def without_prediction(self, sentence: str) -> list:
        """Return updates that show why there is no prediction."""
        unchanged = [gr.skip()] * (2 * len(PLANES))
        return [*unchanged, *self.no_result(), drawing.status([sentence], is_error=True)]

    def no_result(self) -> list:
        """Return updates that remove the structures."""
        return [gr.CheckboxGroup([], value=[], visible=False), gr.Slider(visible=False), ""]

    def table_of(self, prediction: VolumePrediction, threshold: float) -> str:
        """Return the table of the structures as HTML."""
        values = prediction.predictor.labels[1:]
        lines = ["<table>", drawing.table_row("th", ["Structure", "Volume in ml", "Value in mask"])]
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

    def draw(self, request: gr.Request, name: str, number: int | None, look: tuple):
        """Return the picture of a slice, numbered from 1, or no update without a volume."""
        volume = self.volume(request)
        if volume is None:
            return gr.skip()
        window, level, width, shown, opacity, threshold = look
        index = int(number_or(number, 1)) - 1
        limits = self.limits(volume, window, level, width)
        opacity = number_or(opacity, OPACITY)
        return volume.picture(name, index, limits, shown, opacity, self.read_threshold(threshold))

    def read_threshold(self, threshold: float | None) -> float:
        """Return the threshold of the slider; that of the start if its field is empty."""
        return number_or(threshold, self.models[0].config.threshold)

    def axial(self, request: gr.Request, number, *look):
        """Return the picture of an axial slice."""
        return self.draw(request, "axial", number, look)

    def coronal(self, request: gr.Request, number, *look):
        """Return the picture of a coronal slice."""
        return self.draw(request, "coronal", number, look)

    def sagittal(self, request: gr.Request, number, *look):
        """Return the picture of a sagittal slice."""
        return self.draw(request, "sagittal", number, look)

    def move(self, request: gr.Request, event: gr.SelectData, name: str, values: tuple) -> list:
        """Return the sliders and the pictures for the voxel that was clicked in a plane."""
        volume = self.volume(request)
        if volume is None:
            return [gr.skip()] * (2 * len(PLANES))

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

    def move_axial(self, request: gr.Request, event: gr.SelectData, *values) -> list:
        """Move the other planes to a voxel of the axial one."""
        return self.move(request, event, "axial", values)

    def move_coronal(self, request: gr.Request, event: gr.SelectData, *values) -> list:
        """Move the other planes to a voxel of the coronal one."""
        return self.move(request, event, "coronal", values)

    def move_sagittal(self, request: gr.Request, event: gr.SelectData, *values) -> list:
        """Move the other planes to a voxel of the sagittal one."""
        return self.move(request, event, "sagittal", values)

    def draw_all(self, request: gr.Request, *values) -> list:
        """Return the pictures of all planes. values: of the sliders and of the display."""
        look = values[len(PLANES) :]
        drawn = []
        for name, number in zip(PLANES, values, strict=False):
            drawn.append(self.draw(request, name, number, look))
        return drawn

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
        """Return the table and the pictures at another threshold."""
        volume = self.volume(request)
        if volume is None or volume.prediction is None:
            return [gr.skip()] * (1 + len(PLANES))
        table = self.table_of(volume.prediction, self.read_threshold(values[-1]))
        return [table, *self.draw_all(request, *values)]

    # --- files ---

    def found(self, request: gr.Request) -> tuple[VolumePrediction, Path]:
        """Return a browser's prediction, and a new folder for a file of it."""
        volume = self.volume(request)
        if volume is None or volume.prediction is None:
            raise nothing_to_save()
        return volume.prediction, self.settings.sessions.files_of(request.session_hash)

    def save_mask(self, request: gr.Request, threshold: float | None) -> str:
        """Write the label map as predict.py does."""
        prediction, folder = self.found(request)
        threshold = self.read_threshold(threshold)
        return str(volume_case.write_label_maps(prediction, threshold, folder))

    def save_table(self, request: gr.Request, threshold: float | None) -> str:
        """Write the measurements."""
        prediction, folder = self.found(request)
        return str(
            volume_case.write_measurements(prediction, self.read_threshold(threshold), folder)
        )

    def save_picture(self, request: gr.Request, *values) -> str:
        """Write the planes as they are shown."""
        prediction, folder = self.found(request)
        planes = self.draw_all(request, *values)
        return str(volume_case.write_picture(prediction.volume, planes, folder))


def build(models: list[LoadedModel], settings: PageSettings) -> None:
    """Add the view of these models to the page."""
    VolumeView(models, settings).build()
