"""What all views of the page share: the files to choose from, sessions, and names of models."""

from dataclasses import dataclass
from pathlib import Path

from engine.runs import patients_of
from imaging import layouts
from page.session import Sessions
from prediction.images import unnamed_classes
from prediction.models import LoadedModel
from recipes.base import BOX_OPTIONS


@dataclass(frozen=True)
class FileList:
    """Files that the page offers in a list. A browser sends the index of a file, never a path."""

    names: tuple[str, ...] = ()
    paths: tuple[Path, ...] = ()
    folder: Path | None = None  # resolved folder that all files must stay inside

    def path(self, index: int) -> Path:
        """Return a file. Raises ValueError if there is none at this index, or if it was moved."""
        if not isinstance(index, int) or not 0 <= index < len(self.paths):
            raise ValueError("this image is not in the list; choose another one")
        path = self.paths[index]
        if self.folder is not None and not is_inside(path, self.folder):
            raise ValueError(f"{path.name} is no longer in the folder; choose another one")
        return path


@dataclass(frozen=True)
class PageSettings:
    """What a view needs beside its models."""

    sessions: Sessions
    images: FileList = FileList()
    volumes: FileList = FileList()


# --- files to choose from ------------------------------------------------------------------------


def is_inside(path: Path, folder: Path) -> bool:
    """Return True if a file lies in a resolved folder once all links are followed."""
    return path.resolve().is_relative_to(folder)


def list_folder(folder: Path) -> tuple[FileList, FileList]:
    """Return the images and the volumes below the folder of --images.

    Links that leave the folder are left out. Raises ValueError, one line, if the folder does not
    exist or holds neither.
    """
    if not folder.is_dir():
        raise ValueError(f"--images {folder}: is not a folder")

    root = folder.resolve()
    usable = []
    for path in layouts.files_below(root):
        if path.is_file() and is_inside(path, root):
            usable.append(path)
    images = list(filter(layouts.is_image, usable))
    volumes = list(filter(layouts.is_volume, usable))
    if not images and not volumes:
        raise ValueError(f"--images {folder}: contains no images or volumes")
    return in_folder(images, root), in_folder(volumes, root)


def in_folder(paths: list[Path], root: Path) -> FileList:
    """Return the list of files below a resolved folder, by their names relative to it."""
    names = [path.relative_to(root).as_posix() for path in paths]
    return FileList(tuple(names), tuple(paths), root)


def files_of_runs(models: list[LoadedModel], takes: str) -> FileList:
    """Return the images of the runs' test splits that still exist.

    takes: "images" or "volumes", as `Family.takes`.
    """
    names = []
    paths = []
    for loaded in models:
        if loaded.weights.family.takes != takes:
            continue
        for folder in loaded.weights.options.get("data") or ():
            for entry in entries_of_test(folder, loaded.weights.run):
                if entry.image not in paths and entry.image.is_file():
                    names.append(entry.image.name)
                    paths.append(entry.image)
    return FileList(tuple(names), tuple(paths))


def entries_of_test(folder: str, run: dict) -> list[layouts.Entry]:
    """Return the entries of a data set's test split; none if it is gone or has been changed."""
    try:
        path, _ = layouts.path_and_split(folder)
        return layouts.read_entries(Path(path), "test", patients_of(run, [folder]))
    except (ValueError, OSError):
        return []


# --- models --------------------------------------------------------------------------------------


def kind_of(loaded: LoadedModel) -> str:
    """Return the kind of view that a model needs: text, classes, boxes or volumes."""
    family = loaded.weights.family
    if family.takes == "volumes":
        return "volumes"
    if family.reads_text():
        return "text"
    return "boxes" if BOX_OPTIONS in family.options else "classes"


def model_labels(models: list[LoadedModel]) -> list[str]:
    """Return a name for each model, such as "polyps (CRIS)"; whole paths if two are the same."""
    labels = []
    for loaded in models:
        name = Path(loaded.weights.source).resolve().name
        labels.append(f"{name} ({type(loaded.model).__name__})")
    if len(set(labels)) == len(labels):
        return labels

    labels = []
    for loaded in models:
        labels.append(f"{loaded.weights.source} ({type(loaded.model).__name__})")
    return labels


def class_names(loaded: LoadedModel) -> tuple[str, ...]:
    """Return the classes of a model for images, background first if there are several."""
    return tuple(loaded.weights.run.get("classes") or unnamed_classes(loaded.model))
