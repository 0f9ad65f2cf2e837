"""Serve a page in the browser for people who do not type commands.

    python app.py --weights runs/cris-kvasir_polyp
    python app.py --weights runs/cris-mine runs/segformer-mine --images folder/
    python app.py                       # the demo, once `make demo` has trained it

The page needs gradio: make app ARGS="--weights …" installs it in .venv-app and starts the page.
Images stay on this machine: the page is reachable only from it, unless --host says otherwise, and
what was uploaded is removed when the program ends. docs/page.md has the details.
"""

if __name__ == "__main__":
    from engine import startup

    startup.guard_imports()  # the imports below take seconds

import argparse
import importlib.util
import os
import shutil
import tempfile
import threading
from pathlib import Path

from engine import command_line
from engine.ranges import Number
from engine.runs import is_onnx, read_run
from page import access, settings
from page.session import Sessions
from prediction.models import LoadedModel, find_weights, load_model
from recipes import FAMILIES, second_file

USAGE = "python app.py --weights SOURCE [SOURCE ...] [options]"
DEMO = Path("runs/demo")
PORT = Number(whole=True, at_least=1, at_most=65535)


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = command_line.Parser(__doc__, usage=USAGE, add_help=False)
    add = parser.add_argument
    add(
        "--weights",
        metavar="SOURCE",
        nargs="+",
        help=f"trained models: run folders, files, ONNX files, or hub ids [{DEMO}, if it exists]",
    )
    add(
        "--model",
        metavar="NAME",
        choices=sorted(FAMILIES),
        help=f"model of --weights that are not runs: {', '.join(sorted(FAMILIES))} [run]",
    )
    add("--clip", metavar="FILE", help="CLIP ViT-B/16 for CLIPSeg's --weights rd64-uni-refined.pth")
    add(
        "--decoder",
        metavar="SOURCE",
        help="biomedclipseg: CLIPSeg with the decoder, if --weights have none",
    )
    add(
        "--device",
        metavar="NAME",
        default="auto",
        help="device to run on: auto, cpu, cuda, cuda:1, mps [auto]",
    )
    add(
        "--images",
        metavar="FOLDER",
        help="folder of images and volumes to choose from on the page [test data of the runs]",
    )
    add(
        "--port",
        metavar="N",
        type=PORT,
        help=f"port of the page [{access.PORTS[0]}, or the next free]",
    )
    add(
        "--host",
        metavar="ADDRESS",
        default="127.0.0.1",
        help="address to listen on; others than this machine's own need a password [127.0.0.1]",
    )
    add(
        "--auth",
        metavar="USER:FILE",
        help="ask for this user and the password in FILE [PAGE_USER and PAGE_PASSWORD, if set]",
    )
    add("-h", "--help", action="help", help="show this help and exit")
    return parser.parse_args()


def sources_of(weights: list[str] | None) -> list[str]:
    """Return the sources of --weights, or the demo run. Raises ValueError, one line."""
    if weights:
        return weights
    if read_run(DEMO):
        print(f"no --weights: showing the demo, {DEMO}")
        return [str(DEMO)]
    raise ValueError(
        "--weights is missing: the folder of a training run, such as runs/NAME. To try the page, "
        f"run make demo, which trains a small model in {DEMO}, and then this command again"
    )


def load_models(args) -> list[LoadedModel]:
    """Load the models of --weights. Raises OSError or ValueError, one line."""
    models = []
    for source in sources_of(args.weights):
        name = None if is_onnx(source) or read_run(source) else args.model
        weights = find_weights(source, name)
        second = second_file(weights.name, args.clip, args.decoder)
        models.append(load_model(weights, args.device, second))
    return models


def main() -> int:
    """Run the command line: serve the page until a signal ends the program."""
    args = parse()
    login = access.credentials(args.auth)
    access.check_host(args.host, login)
    args.port = access.free_port(args.host, args.port)
    if importlib.util.find_spec("gradio") is None:
        raise ValueError(
            "the page needs gradio: make app installs it in .venv-app, then run "
            ".venv-app/bin/python app.py"
        )

    listed = None
    if args.images is not None:
        listed = settings.list_folder(Path(args.images))
    models = load_models(args)
    if listed is None:
        listed = [settings.files_of_runs(models, takes) for takes in ("images", "volumes")]

    folder = Path(tempfile.mkdtemp(prefix="page-"))  # only this user can open it
    try:
        with command_line.recovery_advice(lambda: "the page is closed and its files are removed"):
            serve(args, models, settings.PageSettings(Sessions(folder), *listed), login)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def serve(args, models: list, page_settings: settings.PageSettings, login) -> None:
    """Serve the page until a signal raises KeyboardInterrupt.

    gradio reads these variables when it is imported, so it is imported here.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(page_settings.sessions.folder)
    from page import site

    page = site.build(models, page_settings)
    try:
        address = site.serve(page, args.host, args.port, login)
        print(f"the page is ready: {address} (Ctrl-C ends it)", flush=True)
        threading.Event().wait()
    finally:
        page.close(verbose=False)


if __name__ == "__main__":
    command_line.command(main)
