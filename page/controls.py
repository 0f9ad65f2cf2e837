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

# A click on the visible button makes the file; this then clicks the hidden link to it.
CLICK = "() => {{ document.querySelector('#{id}').click() }}"


def number_or(value: float | None, default: float) -> float:
    """Return the value of a slider or a number, or the default if its field is empty."""
    return default if value is None else float(value)


def describe_failure(error: Exception, noun: str) -> str:
    """Return a sentence about an error of a model. Raises it if it is a bug. noun: of the input."""
    if command_line.is_out_of_memory(error):
        return f"This {noun} does not fit into memory with this model; make it smaller."
    if not isinstance(error, ValueError | OSError):
        raise error
    return str(error)


def list_files(files: FileList, noun: str, elem_id: str) -> gr.Dropdown:
    """Add the list of the files that the page offers, hidden if there are none."""
    return gr.Dropdown(
        choices=[(name, index) for index, name in enumerate(files.names)],
        value=None,
        label=f"or choose one of these {noun}s",
        visible=bool(files.names),
        elem_id=elem_id,
    )


def list_models(labels: list[str], elem_id: str) -> gr.Dropdown:
    """Add the choice of a model, hidden if there is only one. Its value is an index."""
    choices = [(label, index) for index, label in enumerate(labels)]
    return gr.Dropdown(choices, value=0, label="Model", visible=len(labels) > 1, elem_id=elem_id)


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
        min_width=200,
        buttons=[],
    )


class SaveButtons:
    """Buttons that make a file and let the browser save it."""

    def __init__(self, kind: str, labels: dict[str, str]):
        """Add a button for each {name: label}. Their ids are KIND-download-NAME."""
        self.buttons = {}
        self.links = {}
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
