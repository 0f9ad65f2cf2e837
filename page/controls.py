"""Controls that several views have: the choice of a file, sliders, and buttons that save files."""

from collections.abc import Callable

import gradio as gr

from engine import command_line
from page.settings import FileList

# No event is listed for programs. They can call it all the same, so each one checks its values.
PRIVATE = dict(api_visibility="private")
# Events that change the picture of a known result: many in a second while a slider is moved.
DISPLAY = dict(show_progress="hidden", trigger_mode="always_last", **PRIVATE)
# Events that run a model wait for each other.
MODEL = dict(concurrency_id="model", concurrency_limit=1, **PRIVATE)

# For events whose values are taken as the browser holds them. gradio refuses the empty field of a
# number, and what was a choice until a moment ago, with a traceback. Never for the event of a file:
# gradio refuses paths that were not uploaded.
RAW = dict(preprocess=False)

UPLOAD_HEIGHT = 108  # pixels: three lines of text
SAME_ANSWER = "same answer as before, not computed again."
# A click on the visible button makes the file; this then clicks the hidden link to it.
CLICK = "() => {{ document.querySelector('#{id}').click() }}"


def number_or(value: float | None, default: float) -> float:
    """Return the value of a slider or a number, or the default if its field is empty."""
    return default if value is None else float(value)


def share_or(value: float | None, default: float) -> float:
    """Return the value of `share_slider`, or the default if its field is empty.

    Its field can hold any number while it is typed; the result is between 0 and 1.
    """
    return min(max(number_or(value, default), 0.0), 1.0)


def describe_failure(error: Exception, noun: str) -> str:
    """Return a sentence about an error of a model. Raises it if it is a bug. noun: of the input."""
    if command_line.is_out_of_memory(error):
        return (
            f"This {noun} does not fit into memory with this model; crop it, or save it at a lower "
            "resolution."
        )
    if not isinstance(error, ValueError | OSError):
        raise error
    return str(error)


def upload_field(label: str, kind: str, **options) -> gr.File:
    """Add the drop area for files. Its id is KIND-upload."""
    return gr.File(
        label=label,
        show_label=False,
        height=UPLOAD_HEIGHT,
        elem_id=f"{kind}-upload",
        elem_classes="upload",
        **options,
    )


def list_files(files: FileList, noun: str, kind: str) -> gr.Dropdown:
    """Add the list of the files that the page offers, hidden if there are none.

    Its id is KIND-list.
    """
    return gr.Dropdown(
        choices=[(name, index) for index, name in enumerate(files.names)],
        value=None,
        label=f"or choose one of these {noun}s",
        visible=bool(files.names),
        elem_id=f"{kind}-list",
    )


def choose_models(labels: list[str], kind: str) -> tuple[gr.Dropdown, gr.Dropdown]:
    """Add the choices of a model and of a second one, hidden if there is only one model.

    Their values are indices, and -1 for no second model. Their ids are KIND-model and KIND-model-2.
    """
    choices = [(label, index) for index, label in enumerate(labels)]
    with gr.Row(visible=len(labels) > 1):
        first = gr.Dropdown(choices, value=0, label="Model", min_width=140, elem_id=f"{kind}-model")
        second = gr.Dropdown(
            [("none", -1), *choices],
            value=-1,
            label="Compare with",
            min_width=140,
            elem_id=f"{kind}-model-2",
        )
    return first, second


def chosen_models(first: int, second: int) -> list[int]:
    """Return the indices of the one or two models that `choose_models` names."""
    return [first] if second in (-1, first) else [first, second]


def share_slider(label: str, value: float, step: float, elem_id: str, visible=True) -> gr.Slider:
    """Add a slider of a share between 0 and 1; both ends are left out if step is 0.01."""
    end = step if step == 0.01 else 0
    return gr.Slider(
        end,
        1 - end,
        value=value,
        step=step,
        label=label,
        elem_id=elem_id,
        visible=visible,
        min_width=240,  # label and number stand in one line
        buttons=[],
    )


def pixel_size_field(kind: str) -> gr.Number:
    """Add the field of the width and height of a pixel. Its id is KIND-pixel-size."""
    return gr.Number(label="Pixel size in mm", value=0, min_width=140, elem_id=f"{kind}-pixel-size")


class SaveButtons:
    """Buttons that make a file and let the browser save it."""

    def __init__(self, kind: str, labels: dict[str, str], models: list):
        """Add a button for each {name: label}. Their ids are KIND-download-NAME."""
        self.buttons = {}
        self.links = {}
        if len(models) > 1:
            gr.HTML("<p>Saved files are those of the first model.</p>")
        with gr.Row():
            for name, label in labels.items():
                elem_id = f"{kind}-download-{name}"
                self.buttons[name] = gr.Button(label, min_width=100, size="md", elem_id=elem_id)
        for name in labels:
            link_id = f"{kind}-link-{name}"
            self.links[name] = gr.DownloadButton(visible="hidden", elem_id=link_id)

    def connect(self, name: str, write: Callable, inputs: list) -> None:
        """Call write(request, *values of inputs) -> path when a button is clicked."""
        link = self.links[name]
        written = self.buttons[name].click(write, inputs, link, **RAW, **PRIVATE)
        written.success(None, js=CLICK.format(id=link.elem_id), **PRIVATE)


def nothing_to_save() -> gr.Error:
    """Return the error of a button that has nothing to save."""
    return gr.Error("There is no result to save yet.", duration=5, print_exception=False)
