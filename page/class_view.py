"""The view of SegFormer, UPerNet, DPT and BEiT, which divide an image into known classes.

Its elements are those of image_view.py with the prefix "classes", and classes-shown, the classes
that are drawn. classes-threshold is visible only if all models have a single class.
"""

import gradio as gr
import numpy as np

from engine.runs import num_classes
from imaging import layouts, pictures
from page import downloads, drawing
from page.image_view import ImageView
from page.session import Answer, Session
from page.settings import PageSettings, class_names
from prediction.models import LoadedModel

MOST_NAMED = 20  # classes that are listed


class ClassView(ImageView):
    """Divide an image into classes, which can be shown and hidden."""

    kind = "classes"
    run_label = "Find the classes"
    table_title = "Class"

    def __init__(self, models: list[LoadedModel], settings: PageSettings):
        super().__init__(models, settings)
        largest = max(num_classes(loaded.model) for loaded in models)
        self.has_threshold = largest == 1
        masks = max(1, largest - 1)  # without the background
        self.fill = pictures.mask_opacity(masks)
        self.has_outline = masks == 1

    def build_question(self) -> list:
        """Say which classes the models know; there is nothing to choose."""
        for label, loaded in zip(self.labels, self.models, strict=True):
            names = layouts.foreground(class_names(loaded))
            known = ", ".join(names[:MOST_NAMED])
            if len(names) > MOST_NAMED:
                known += f" and {len(names) - MOST_NAMED} more"
            subject = "It" if len(self.models) == 1 else label
            gr.HTML(drawing.status([f"{subject} finds: {known}."]))
        return []

    def read_question(self) -> str:
        """Return the only question: which class is where."""
        return ""

    def answers(self, session: Session, loaded: LoadedModel, question: str) -> list[Answer]:
        """Return the only answer of a model."""
        return [session.predict(loaded, question, {})]

    def result(self, session, loaded, question, threshold, pixel_size) -> downloads.Result:
        """Return the masks of the classes."""
        (answer,) = self.answers(session, loaded, question)
        return downloads.class_result(
            answer.probabilities,
            class_names(loaded),
            loaded.config,
            threshold,
            pixel_size,
        )

    def build_display(self) -> list:
        """Add the choice of the classes that are drawn."""
        self.shown = gr.CheckboxGroup(
            [], label="Show", visible=False, elem_id="classes-shown", container=True
        )
        return [self.shown]

    def display_updates(self, results: list[downloads.Result]) -> list:
        """Return an update that offers the classes that were found; all are shown."""
        names = {}  # a dict keeps the order
        for result in results:
            for name, row in zip(result.names, result.areas, strict=True):
                if row["area_px"]:
                    names[name] = True
        return [gr.CheckboxGroup([*names], value=[*names], visible=len(names) > 1)]

    def shown_masks(self, result: downloads.Result, *values) -> np.ndarray:
        """Return which masks are drawn, bool (n,): those that are ticked, or all."""
        if not values:
            return np.ones(len(result.names), bool)
        return np.isin(result.names, values[0])

    def table(self, result: downloads.Result) -> str:
        """Return the table of the areas; of many classes only those that were found."""
        indices = []
        for index, row in enumerate(result.areas):
            if row["area_px"] or len(result.areas) <= MOST_NAMED:
                indices.append(index)
        colours = pictures.mask_colours(len(result.names))
        return drawing.area_table(
            self.table_title,
            [result.names[index] for index in indices],
            [colours[index] for index in indices],
            [result.areas[index] for index in indices],
        )


def build(models: list[LoadedModel], settings: PageSettings) -> None:
    """Add the view of these models to the page."""
    ClassView(models, settings).build()
