"""A volume that a browser has chosen: what is shown of it, its predictions, and their files.

Memory holds what slices are drawn from: two bytes for each voxel of the volume, and one for each of
its masks. Probabilities wait in a file. Saved files are those of predict.py: the same voxels,
columns and numbers.
"""

import tempfile
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from engine.measurement_table import MEASUREMENTS, MeasurementTable
from imaging import measurements, nifti, pictures, volumes
from page import slices, uploads
from page.session import MODELS, bytes_of
from page.slices import PLANES, LabelMasks, ThresholdMasks
from prediction.inputs import group_channels
from prediction.volumes import VolumePredictor, class_endings

# The options of predict.py that the page leaves at their defaults.
OPTIONS = SimpleNamespace(
    threshold=None,
    classes=None,
    organ_rules=False,
    largest_component=False,
    probabilities=False,
    overlays=False,
    tta=False,
)


class Volume:
    """A volume as it is shown: its first channel, in RAS."""

    def __init__(self, name: str, paths: list[Path], image: np.ndarray, grid, folder: Path):
        """Keep what slices are drawn from.

        name: of the case. paths: the files of its channels. image: float32 (C,X,Y,Z). folder: for
        files that belong to it.
        """
        self.name = name
        self.paths = paths
        self.folder = folder
        self.grid = grid
        self.channels = len(image)

        facts = volumes.hu_facts(image[0])
        self.is_ct = bool(facts[0] < -200 and volumes.is_hu(facts))
        if self.is_ct:
            self.values = slices.whole_hu(image[0])  # (X,Y,Z)
        else:
            self.values = slices.sixteen_bits(image[0])  # (X,Y,Z)
        self.windows = self.find_windows()
        self.predictions = []  # of one or two models, once there are any

    @property
    def nbytes(self) -> int:
        """Return the memory that the volume and its predictions take."""
        masks = [vars(prediction.masks) for prediction in self.predictions]
        return bytes_of([self.values, masks])

    def find_windows(self) -> dict[str, tuple[float, float]]:
        """Return the names of the windows to choose from, with the values of black and white."""
        if not self.is_ct:
            return {
                "Automatic": slices.percentile_limits(self.values, 1),
                "Full range": slices.percentile_limits(self.values, 0),
            }
        windows = {}
        for name, (level, width) in slices.CT_WINDOWS.items():
            windows[name] = slices.window_limits(level, width)
        return windows

    def describe(self) -> str:
        """Return a sentence about the volume."""
        voxels = " x ".join(map(str, self.grid.size))
        text = f"{self.name}: {voxels} voxels of {nifti.mm_text(self.grid.spacing)}"
        if self.channels > 1:
            text += f", {self.channels} channels (the first is shown)"
        return f"{text}."

    def best_voxel(self, threshold: float) -> tuple[int, ...]:
        """Return the voxel whose planes show most of the first prediction, else the middle."""
        masks = self.predictions[0].masks.volumes(threshold) if self.predictions else ()
        return pictures.central_voxel(masks, self.grid.size)

    def picture(
        self, name: str, index: int, limits: tuple, prediction, shown, opacity: float, threshold
    ) -> np.ndarray:
        """Return a slice with the masks of a prediction drawn on, uint8 (h,w,3).

        name: of the plane. index: of the slice, from 0; beyond the last one, the last. limits:
        values of black and white. prediction: VolumePrediction, or None. shown: names of the
        classes to draw. opacity, threshold: 0..1.
        """
        plane = PLANES[name]
        index = min(max(index, 0), self.grid.size[plane.axis] - 1)
        values = pictures.plane(self.values, plane.axis, index)
        grey = slices.grey_levels(values, limits)
        masks = np.zeros((0, *grey.shape), bool)
        colours = []
        if prediction is not None:
            indices = [k for k, class_name in enumerate(prediction.classes) if class_name in shown]
            masks = prediction.masks.slices(plane, index, threshold, indices)
            colours = [prediction.colours[k] for k in indices]

        size = slices.picture_size(plane, self.grid.size, self.grid.spacing)
        drawn = slices.draw_slice(grey, masks, colours, opacity, size)
        return slices.write_edges(drawn, plane.edges)


def find_case(files: list[Path], channels: int) -> tuple[str, list[Path]]:
    """Return the name of the volume that files hold, and the files of its channels in order.

    channels: the model's. Raises ValueError, one sentence, unless they are exactly one volume that
    is small enough to decode; only headers are read.
    """
    for file in files:
        uploads.check_volume(file)
    try:
        cases = group_channels(sorted(files), channels)
    except ValueError as error:
        raise ValueError(uploads.sentence(error, files[0])) from None
    if len(cases) != 1:
        names = ", ".join(name for name, _ in cases[:3])
        raise ValueError(f"These are {len(cases)} volumes ({names}); choose the files of one.")
    return cases[0]


def open_volume(name: str, paths: list[Path], folder: Path) -> tuple[Volume, list[str]]:
    """Read the volume of a case, and return notes about how it was read.

    folder: for files that belong to it. Raises ValueError, one sentence.
    """
    try:
        with uploads.captured_output() as printed:
            image, grid = nifti.read_volume(paths)
    except (ValueError, OSError) as error:
        raise ValueError(uploads.sentence(error, paths[0])) from None

    return Volume(name, paths, image, grid, folder), uploads.notes_of(printed, paths[0])


def read_silently(predictor: VolumePredictor, paths: list[Path]) -> tuple[dict, nifti.Grid]:
    """Return the volume of files and its grid; names of uploads are not logged.

    Raises OSError or ValueError, one line, for a volume that does not fit the model.
    """
    with uploads.captured_output():
        return predictor.read(paths)


# --- predictions ----------------------------------------------------------------------------------


class VolumePrediction:
    """What a model found in a volume."""

    def __init__(self, predictor: VolumePredictor, volume: Volume):
        """Predict a volume.

        Raises OSError or ValueError, one line, for a volume that does not fit the model.
        """
        start = time.perf_counter()
        config = predictor.config
        images, grid = read_silently(predictor, volume.paths)
        image = predictor.first_image(images)
        self.fits_model = not config.intensity or volumes.is_hu(volumes.hu_facts(image))
        with MODELS:
            probabilities = predictor.predict_probabilities(images, grid)  # (K,X,Y,Z)
        del images, image

        self.predictor = predictor
        self.name = volume.name
        self.paths = volume.paths
        self.grid = grid
        self.has_threshold = config.overlapping or config.num_classes == 1
        self.classes = predictor.classes[1:]
        self.colours = pictures.mask_colours(len(self.classes))

        if self.has_threshold:
            steps = slices.threshold_steps(config.threshold)
            self.masks = ThresholdMasks(probabilities.numpy(), steps)
        else:
            (labels,) = predictor.label_maps(probabilities, grid, config.threshold)
            self.masks = LabelMasks(labels, predictor.labels[1:])
            probabilities = probabilities.amax(0, keepdim=True)  # those of the classes in `labels`
        self.shape = tuple(probabilities.shape)
        self.file = tempfile.TemporaryFile(dir=volume.folder)  # noqa: SIM115 it lives as long
        probabilities.numpy().tofile(self.file)
        self.seconds = time.perf_counter() - start

    def millilitres(self, threshold: float) -> list[float]:
        """Return the volume of each class in ml."""
        voxel_ml = abs(np.linalg.det(self.grid.affine[:3, :3])) / 1000
        return [count * voxel_ml for count in self.masks.counts(threshold)]

    def probabilities(self) -> torch.Tensor:
        """Return the probabilities of the classes, float32 (n,X,Y,Z), from their file.

        Those of classes that do not overlap are right where the class is the most probable.
        """
        stored = np.memmap(self.file, np.float32, "c", shape=self.shape)
        return torch.from_numpy(stored).expand(len(self.classes), -1, -1, -1)

    def label_maps(self, threshold: float) -> np.ndarray:
        """Return the label maps as predict.py writes them, uint8 (n,X,Y,Z)."""
        if not self.has_threshold:
            return self.masks.labels[None]
        exact = float(self.masks.steps[self.masks.step(threshold)])
        return self.predictor.label_maps(self.probabilities(), self.grid, exact)


# --- files ----------------------------------------------------------------------------------------


def write_label_maps(prediction: VolumePrediction, threshold: float, folder: Path) -> Path:
    """Write the label map, or a ZIP file of one for each overlapping class. Return the file."""
    maps = prediction.label_maps(threshold)
    endings = [""]
    if prediction.predictor.config.overlapping:
        endings = class_endings(prediction.classes)

    paths = []
    for ending, label_map in zip(endings, maps, strict=True):
        path = folder / f"{prediction.name}{ending}.nii.gz"
        nifti.write(path, volume=label_map, grid=prediction.grid)
        paths.append(path)
    if len(paths) == 1:
        return paths[0]

    archive_path = folder / f"{prediction.name}_masks.zip"
    with zipfile.ZipFile(archive_path, "w") as archive:  # the files are compressed already
        for path in paths:
            archive.write(path, path.name)
            path.unlink()
    return archive_path


def write_measurements(prediction: VolumePrediction, threshold: float, folder: Path) -> Path:
    """Write measurements.csv. Return the file."""
    predictor = prediction.predictor
    images, grid = read_silently(predictor, prediction.paths)
    image = predictor.first_image(images)
    maps = prediction.label_maps(threshold)
    rows = predictor.measure(maps, prediction.probabilities(), image[0], grid)

    path = folder / MEASUREMENTS
    table = MeasurementTable(path, measurements.VOLUME_COLUMNS, tuple(prediction.classes))
    table.add(prediction.name, rows)
    table.write([prediction.name])
    return path


def write_picture(name: str, planes: list[np.ndarray], folder: Path) -> Path:
    """Write pictures of planes, uint8 (h,w,3), side by side into NAME_overlay.png. Return it."""
    picture = Image.fromarray(slices.side_by_side(planes))
    path = folder / f"{name}_overlay.png"
    pictures.save_picture(path, picture)
    return path
