"""Take the pictures of docs/page.md: the page in chromium, with a run of texts and one of volumes.

    make demo
    python prepare.py demo-volumes
    python train.py --model swin_unetr3d --variant mini --weights none --data data/demo_volumes \
        --size 64 32 32 --spacing 4 7 8 --lr 1e-3 --epochs 40 --eval-every 20 --crops-per-volume 2 \
        --overlap 0 --out runs/organs
    .venv-app/bin/python docs/screenshots.py
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "data/demo"
VOLUMES = ROOT / "data/demo_volumes"
PORT = 7899
SIZE = {"width": 1280, "height": 900}
WAIT = 120_000  # milliseconds


def serve(run: Path) -> subprocess.Popen:
    """Start the page of a run, and return its process once it is ready."""
    program = [sys.executable, ROOT / "app.py", "--weights", run, "--port", str(PORT)]
    process = subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "the page is ready" in line:
            return process
    raise RuntimeError(f"{run}: the page did not start")


def show_text(page) -> None:
    """Find what the text of a test image of the demo names."""
    entry = json.loads((DEMO / "anns/test.json").read_text())[0]
    page.set_input_files("#text-upload input", DEMO / "images" / entry["img_name"])
    expect(page.locator("#text-note")).to_contain_text("pixels", timeout=WAIT)
    prompt = entry["prompts"]["p6"]
    page.fill("#text-phrases textarea", prompt if isinstance(prompt, str) else prompt[0])
    page.click("#text-run")
    expect(page.locator("#text-status")).to_contain_text("answered", timeout=WAIT)


def show_volume(page) -> None:
    """Find the organs of a CT of the demo."""
    case = sorted((VOLUMES / "imagesTr").glob("*.nii.gz"))[-1]
    page.set_input_files("#volumes-upload input", case)
    expect(page.locator("#volumes-note")).to_contain_text("voxels", timeout=WAIT)
    page.click("#volumes-run")
    expect(page.locator("#volumes-status")).to_contain_text("done in", timeout=WAIT)


def take(run: Path, show, picture: Path) -> None:
    """Save a picture of the page of a run after `show` has used it."""
    process = serve(run)
    try:
        with sync_playwright() as playwright:
            chromium = shutil.which("chromium")
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport=SIZE)
            page.goto(f"http://127.0.0.1:{PORT}/")
            show(page)
            page.wait_for_timeout(2000)  # milliseconds, until the pictures are drawn
            page.screenshot(path=picture, full_page=True)
    finally:
        process.terminate()
        process.wait()
    print(f"wrote {picture}")


def main() -> None:
    """Take both pictures."""
    take(ROOT / "runs/demo", show_text, ROOT / "docs/page_text.png")
    take(ROOT / "runs/organs", show_volume, ROOT / "docs/page_volume.png")


if __name__ == "__main__":
    main()
