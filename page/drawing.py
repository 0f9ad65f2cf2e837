"""Show results on the page: previews of images and masks, tables and lines of HTML."""

import html
import math
from textwrap import shorten

import numpy as np
from PIL import Image

LARGEST_PREVIEW = 1200  # pixels of the longer side of a picture on the page


def preview_step(image: np.ndarray) -> int:
    """Return the factor by which a picture of an image (H,W,3) is reduced for the page."""
    return math.ceil(max(image.shape[:2]) / LARGEST_PREVIEW)


def preview(image: np.ndarray) -> np.ndarray:
    """Return an image, uint8 (H,W,3), reduced for the page: (ceil(H/step),ceil(W/step),3)."""
    step = preview_step(image)
    return np.asarray(Image.fromarray(image).reduce(step))


def preview_masks(masks: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Return masks (n,H,W) at the size of `preview` of the image, by nearest neighbour."""
    step = preview_step(image)
    return masks[:, ::step, ::step]


# --- the table -----------------------------------------------------------------------------------


def swatch(colour: tuple[int, int, int]) -> str:
    """Return a coloured square as HTML."""
    red, green, blue = colour
    return f'<span class="swatch" style="background: rgb({red}, {green}, {blue})"></span>'


def area_cells(mask: np.ndarray, pixel_size: tuple | None) -> dict:
    """Return the area_px, share_of_image and area_mm2 of a mask, bool (H,W).

    pixel_size: width and height of a pixel in mm, None if unknown; area_mm2 is None then.
    """
    count = int(np.count_nonzero(mask))
    square_mm = None if pixel_size is None else count * pixel_size[0] * pixel_size[1]
    return {"area_px": count, "share_of_image": count / mask.size, "area_mm2": square_mm}


def area_table(title: str, names: list[str], colours: list, rows: list[dict]) -> str:
    """Return a table of the areas as HTML: colour, name, pixels, share, mm² where known.

    title: of the column of names. names: of the masks, shown as typed. rows: `area_cells` of
    the masks.
    """
    has_mm2 = any(row["area_mm2"] is not None for row in rows)
    headings = [title, "Pixels", "Share of image"]
    if has_mm2:
        headings.append("mm²")
    lines = ["<table>", table_row("th", headings)]
    for name, colour, row in zip(names, colours, rows, strict=True):
        cells = [
            f"{swatch(colour)} {html.escape(shorten(name, 80, placeholder=' …'))}",
            f"{row['area_px']:,}",
            f"{100 * row['share_of_image']:.1f} %",
        ]
        if has_mm2:
            cells.append(f"{row['area_mm2']:,.2f}")
        lines.append(table_row("td", cells))
    lines.append("</table>")
    return "\n".join(lines)


def table_row(tag: str, cells: list[str]) -> str:
    """Return a row of a table as HTML. tag: th or td. cells: HTML."""
    inner = "".join(f"<{tag}>{cell}</{tag}>" for cell in cells)
    return f"<tr>{inner}</tr>"


def status(sentences: list[str], is_error: bool = False) -> str:
    """Return sentences as a line of HTML, in the colour of errors if it reports one."""
    style = "error" if is_error else "status"
    role = "alert" if is_error else "status"
    return f'<p class="{style}" role="{role}">{html.escape(" ".join(sentences))}</p>'
