"""What the page keeps in memory for each browser: its image, features and probabilities."""

import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, is_dataclass
from pathlib import Path

import numpy as np
import torch

from engine.runs import num_classes
from prediction.images import image_sample
from prediction.models import LoadedModel

MODELS = threading.Lock()  # held during a forward pass: one at a time uses all cores best
MOST_SESSIONS = 16  # images in memory, over all browsers
MOST_MEMORY = 4 * 2**30  # bytes of all sessions, beside the latest
MOST_BYTES = 512 * 2**20  # of the probabilities of a session, beside the latest
LARGEST_ANSWER = 2 * 2**30  # bytes of the probabilities of one image


def bytes_of(value) -> int:
    """Return the bytes of all arrays and tensors in nested dicts, sequences and dataclasses."""
    if isinstance(value, np.ndarray | torch.Tensor):
        return value.nbytes
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return sum(map(bytes_of, value))
    return 0


@dataclass(frozen=True)
class Answer:
    """The probabilities that a model predicts for an image, and the time it took."""

    probabilities: np.ndarray  # float32 (K,H,W) at the image's own size
    encoding_seconds: float  # 0 if the features of the image were in memory
    prompt_seconds: float  # 0 if the answer was in memory


class Session:
    """An image that a browser has chosen, with everything that was computed from it.

    Another image gets a new session, so that results never belong to an earlier image.
    """

    def __init__(self, image: np.ndarray, name: str, pixel_size: tuple | None = None):
        """Keep an image.

        image: uint8 (H,W,3). name: of its file, without the ending. pixel_size: width and height of
        a pixel in mm, None if unknown.
        """
        self.image = image
        self.name = name
        self.pixel_size = pixel_size
        self.question = None  # what the result on the page answers; each view sets its own
        self.latest = None  # what the page shows now, and what it was made of
        self.lock = threading.Lock()  # guards the two caches
        self.items = {}  # id of a model -> item with the image and its features
        self.answers = OrderedDict()  # (id of a model, key of a prompt) -> Answer, the latest last

    @property
    def nbytes(self) -> int:
        """Return the memory that the session takes."""
        with self.lock:
            return bytes_of([self.image, self.items, self.answers, self.latest])

    def predict(self, loaded: LoadedModel, key: Hashable, tensors: dict) -> Answer:
        """Return a model's answer to a prompt, from memory if it was computed before.

        key: what the prompt is recognised by, such as its text. tensors: the prompt as the recipe's
        `tokenize` or `make_prompts` returns it; {} for models without prompts. Raises ValueError,
        one sentence, if the answer would be too large.
        """
        known = self.known_answer(loaded, key)
        if known is not None:
            return known

        self.check_size(loaded)
        with MODELS, torch.no_grad():
            start = time.perf_counter()
            item = self.item(loaded)
            encoded = time.perf_counter()
            probabilities, _ = loaded.recipe.predict(loaded.model, item | tensors)
            probabilities = probabilities.float().cpu().numpy()  # (K,H,W)
            end = time.perf_counter()

        answer = Answer(probabilities, encoded - start, end - encoded)
        with self.lock:
            self.answers[id(loaded), key] = Answer(probabilities, 0.0, 0.0)
            self.drop_oldest_answers()
        return answer

    def known_answer(self, loaded: LoadedModel, key: Hashable) -> Answer | None:
        """Return an answer that is in memory, None if it is not."""
        with self.lock:
            answer = self.answers.get((id(loaded), key))
            if answer is not None:
                self.answers.move_to_end((id(loaded), key))
        return answer

    def check_size(self, loaded: LoadedModel) -> None:
        """Raise ValueError, one sentence, if a model's probabilities would fill the memory."""
        height, width = self.image.shape[:2]
        size = 4 * num_classes(loaded.model) * height * width
        if size > LARGEST_ANSWER:
            raise ValueError(
                f"An image of {width} x {height} pixels is too large for a model with "
                f"{num_classes(loaded.model)} classes; make the image smaller."
            )

    def item(self, loaded: LoadedModel) -> dict:
        """Return the item of the image for a model, with the image's features if it has them."""
        if id(loaded) in self.items:
            return self.items[id(loaded)]

        colours = loaded.weights.options.get("pseudocolor")
        sample = image_sample(self.image, Path(self.name), (), colours=colours)
        item = loaded.recipe.inputs(sample, train=False, rng=None)
        item |= loaded.recipe.encode(loaded.model, item)
        with self.lock:
            self.items[id(loaded)] = item
        return item

    def drop_oldest_answers(self) -> None:
        """Remove the answers that were used longest ago until the others fit into MOST_BYTES."""
        total = sum(answer.probabilities.nbytes for answer in self.answers.values())
        while total > MOST_BYTES and len(self.answers) > 1:
            _, oldest = self.answers.popitem(last=False)
            total -= oldest.probabilities.nbytes


class Sessions:
    """The sessions of all browsers, by browser and view. Those used longest ago are removed.

    A session has `nbytes`, which grows with every result.
    """

    def __init__(self, folder: Path, limit: int = MOST_SESSIONS, most_memory: int = MOST_MEMORY):
        """Start without sessions.

        folder: for the files that are made for browsers. limit: of their number. most_memory: bytes
        of all together.
        """
        self.folder = folder
        self.limit = limit
        self.most_memory = most_memory
        self.lock = threading.Lock()
        self.sessions = OrderedDict()  # (browser, view) -> session, the latest last
        self.folders = {}  # browser -> folder of its files

    def put(self, browser: str, view: str, session) -> None:
        """Replace the session of a browser's view. browser: gradio's session hash."""
        with self.lock:
            self.sessions[browser, view] = session
            self.sessions.move_to_end((browser, view))
            self.drop_oldest()

    def get(self, browser: str, view: str):
        """Return the session of a browser's view, None if there is none (any more)."""
        with self.lock:
            session = self.sessions.get((browser, view))
            if session is not None:
                self.sessions.move_to_end((browser, view))
                self.drop_oldest()  # results have been added since the last time
        return session

    def drop_oldest(self) -> None:
        """Remove the sessions used longest ago until the others fit; the latest one stays."""
        while len(self.sessions) > 1:
            total = sum(session.nbytes for session in self.sessions.values())
            if len(self.sessions) <= self.limit and total <= self.most_memory:
                return
            self.sessions.popitem(last=False)

    def drop(self, browser: str, view: str) -> None:
        """Remove the session of a browser's view, if there is one."""
        with self.lock:
            self.sessions.pop((browser, view), None)

    def files_of(self, browser: str) -> Path:
        """Return a new folder for files of a browser, which is removed with it."""
        with self.lock:
            if browser not in self.folders:
                self.folders[browser] = Path(tempfile.mkdtemp(dir=self.folder))
            return Path(tempfile.mkdtemp(dir=self.folders[browser]))

    def forget(self, browser: str) -> None:
        """Remove everything of a browser whose page was closed."""
        with self.lock:
            for key in [key for key in self.sessions if key[0] == browser]:
                del self.sessions[key]
            folder = self.folders.pop(browser, None)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
