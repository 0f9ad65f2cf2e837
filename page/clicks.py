"""Boxes and points that a user clicks into one image, as prompts for SAM.

`Clicks` never changes: every click returns a new one, which remembers the one before for `undo`.
Coordinates are whole pixels of the image, x then y, from 0; boxes include both corners
(imaging/boxes_and_points.py).
"""

import csv
import io
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from imaging.boxes_and_points import NO_LABELS, NO_POINTS, Prompt
from imaging.pictures import class_colours

BOX = "box"
INSIDE = "inside"
OUTSIDE = "outside"

SECOND_CORNER = "Now click the opposite corner of the box."
NO_AREA = "Both corners lie on one line, so this is not a box. Click the opposite corner again."
NEEDS_INSIDE = "Object {number} has only points outside. Add a box or a point inside."
EMPTY_OBJECT = "Object {number}: set a box or a point inside."


@dataclass(frozen=True)
class ClickedObject:
    """The box and the points of one object."""

    label: int = 1  # class index
    box: tuple[int, int, int, int] | None = None  # x0 y0 x1 y1
    points: tuple[tuple[int, int, int], ...] = ()  # x, y, and 1 inside or 0 outside

    @property
    def is_empty(self) -> bool:
        """Return True without a box and points."""
        return self.box is None and not self.points

    @property
    def is_complete(self) -> bool:
        """Return True if SAM can segment it: it has a box or a point inside."""
        return self.box is not None or any(label for _, _, label in self.points)

    def prompt(self) -> Prompt:
        """Return the object's prompt, without a target."""
        box = None if self.box is None else np.float32(self.box)
        if not self.points:
            return Prompt(self.label, None, box, NO_POINTS, NO_LABELS)

        rows = np.array(self.points)  # (P,3)
        points = rows[:, :2].astype(np.float32)
        return Prompt(self.label, None, box, points, rows[:, 2].astype(np.int64))


@dataclass(frozen=True)
class Clicks:
    """The prompts of all objects of one image. Clicks change the last object."""

    size: tuple[int, int]  # of the image, (H,W)
    objects: tuple[ClickedObject, ...] = (ClickedObject(),)
    corner: tuple[int, int] | None = None  # x y of a box's first corner, until the second
    message: str = ""  # for the user, about the last click
    before: "Clicks | None" = None  # what undo returns to

    @property
    def current(self) -> ClickedObject:
        """Return the object that the next click changes."""
        return self.objects[-1]

    @property
    def complete(self) -> list[ClickedObject]:
        """Return the objects that SAM can segment. Their order gives them their numbers."""
        return [clicked for clicked in self.objects if clicked.is_complete]

    def prompts(self) -> list[Prompt]:
        """Return the prompts of the complete objects."""
        return [clicked.prompt() for clicked in self.complete]

    # --- what the user does ---

    def click(self, x: float, y: float, mode: str) -> "Clicks":
        """Return the prompts after a click. mode: BOX, INSIDE or OUTSIDE.

        Clicks outside the image move to its border.
        """
        H, W = self.size
        x = min(max(round(x), 0), W - 1)
        y = min(max(round(y), 0), H - 1)
        if mode == BOX:
            return self.click_corner(x, y)

        point = (x, y, 1 if mode == INSIDE else 0)
        clicked = replace(self.current, points=(*self.current.points, point))
        return self.with_current(clicked)

    def click_corner(self, x: int, y: int) -> "Clicks":
        """Return the prompts after a click on a corner of a box.

        A box for an object that already has one starts the next object.
        """
        if self.corner is None:
            return replace(self, corner=(x, y), message=SECOND_CORNER, before=self)

        first_x, first_y = self.corner
        if x == first_x or y == first_y:
            return replace(self, message=NO_AREA)

        box = (min(x, first_x), min(y, first_y), max(x, first_x), max(y, first_y))
        if self.current.box is None:
            return self.with_current(replace(self.current, box=box))
        following = ClickedObject(self.current.label, box)
        objects = (*self.objects, following)
        return replace(self, objects=objects, corner=None, message="", before=self)

    def with_current(self, clicked: ClickedObject) -> "Clicks":
        """Return the prompts with another last object, and no open box."""
        number = len(self.objects)
        message = ""
        if number > 1 and clicked.is_empty:
            message = EMPTY_OBJECT.format(number=number)
        elif clicked.points and not clicked.is_complete:
            message = NEEDS_INSIDE.format(number=number)
        objects = (*self.objects[:-1], clicked)
        return replace(self, objects=objects, corner=None, message=message, before=self)

    def name_class(self, label: int) -> "Clicks":
        """Return the prompts with a class index for the last object."""
        if label == self.current.label:
            return self
        return self.with_current(replace(self.current, label=label))

    def new_object(self) -> "Clicks":
        """Return the prompts with a further, empty object of the same class.

        The last object stays the last if it is not complete; the message says why.
        """
        number = len(self.objects)
        if self.current.is_empty:
            return replace(self, corner=None, message=EMPTY_OBJECT.format(number=number))
        if not self.current.is_complete:
            return replace(self, corner=None, message=NEEDS_INSIDE.format(number=number))

        objects = (*self.objects, ClickedObject(self.current.label))
        message = EMPTY_OBJECT.format(number=number + 1)
        return replace(self, objects=objects, corner=None, message=message, before=self)

    def undo(self) -> "Clicks":
        """Return the prompts before the last change."""
        return self if self.before is None else self.before

    def clear(self) -> "Clicks":
        """Return no prompts. Undo brings the removed ones back."""
        return Clicks(self.size, (ClickedObject(self.current.label),), before=self)


# --- drawing --------------------------------------------------------------------------------------


def to_image_pixel(x: float, y: float, scale: float) -> tuple[float, float]:
    """Return the x and y in an image of a pixel in its preview, which is `scale` times larger.

    Centres of pixels are whole numbers in both.
    """
    return (x + 0.5) / scale - 0.5, (y + 0.5) / scale - 0.5


def to_preview_pixel(x: float, y: float, scale: float) -> tuple[float, float]:
    """Return the x and y in a preview of a pixel of the image: the inverse of `to_image_pixel`."""
    return to_image_pixel(x, y, 1 / scale)


def draw_clicks(picture: Image.Image, clicks: Clicks, scale: float = 1.0) -> None:
    """Draw all prompts into the image, or its preview, each object in its colour.

    A point inside is a filled circle with +, one outside a dark circle with -, and the first corner
    of an open box a cross. scale: of the preview to the image.
    """
    draw = ImageDraw.Draw(picture)
    radius = max(4, min(picture.size) // 70)
    colours = class_colours(len(clicks.objects))

    for number, (clicked, colour) in enumerate(zip(clicks.objects, colours, strict=True), 1):
        if clicked.box is not None:
            x0, y0, x1, y1 = clicked.box
            upper_left = to_preview_pixel(x0, y0, scale)
            lower_right = to_preview_pixel(x1, y1, scale)
            draw.rectangle((*upper_left, *lower_right), outline=colour, width=max(2, radius // 3))
        for x, y, label in clicked.points:
            draw_point(draw, to_preview_pixel(x, y, scale), radius, colour, bool(label))
        if not clicked.is_empty and len(clicks.objects) > 1:
            draw_number(draw, clicked, number, radius, colour, scale)
    if clicks.corner is not None:
        draw_cross(draw, to_preview_pixel(*clicks.corner, scale), 2 * radius)


def draw_cross(draw, centre: tuple[float, float], arm: float) -> None:
    """Draw a white cross with a black rim."""
    x, y = centre
    for colour, width in (("black", 5), ("white", 2)):
        draw.line((x - arm, y, x + arm, y), colour, width)
        draw.line((x, y - arm, x, y + arm), colour, width)


def draw_number(draw, clicked: ClickedObject, number: int, radius: int, colour, scale) -> None:
    """Write the number of an object at its box or beside its first point, on its colour."""
    if clicked.box is None:
        x, y = to_preview_pixel(*clicked.points[0][:2], scale)
        x += 1.5 * radius
    else:
        x, y = to_preview_pixel(clicked.box[0], clicked.box[1], scale)

    font = ImageFont.load_default(size=max(14, 3 * radius))
    text = f" {number} "
    left, top, right, bottom = draw.textbbox((x, y), text, font)
    draw.rectangle((left, y, right, bottom + top - y), fill=colour)
    draw.text((x, y), text, "white", font, stroke_width=2, stroke_fill="black")


def draw_point(draw, centre: tuple, radius: int, colour: tuple, is_inside: bool) -> None:
    """Draw a point of a prompt: + inside, - outside."""
    x, y = centre
    circle = (x - radius, y - radius, x + radius, y + radius)
    if is_inside:
        draw.ellipse(circle, fill=colour, outline="black", width=1)
    else:
        draw.ellipse(circle, fill="black", outline=colour, width=2)

    arm = radius // 2
    sign = "black" if is_inside else "white"
    draw.line((x - arm, y, x + arm, y), sign, 2)
    if is_inside:
        draw.line((x, y - arm, x, y + arm), sign, 2)


# --- files ----------------------------------------------------------------------------------------


def prompt_files(clicks: Clicks, image: str, classes: tuple[str, ...]) -> dict[str, str]:
    """Return the contents of the files of boxes and points, as `predict.py` reads them.

    {"boxes": CSV, "points": CSV}; a kind without rows is left out. image: name of the image's file.
    classes: those of the model; the column `class` is filled if there are several.
    """
    boxes = []
    points = []
    for number, clicked in enumerate(clicks.complete, 1):
        name = classes[clicked.label] if len(classes) > 1 else ""
        start = (image, name, number)
        if clicked.box is not None:
            boxes.append((*start, *clicked.box))
        for point in clicked.points:
            points.append((*start, *point))

    contents = {}
    if boxes:
        header = ("image", "class", "object", "x0", "y0", "x1", "y1")
        contents["boxes"] = csv_text(header, boxes)
    if points:
        header = ("image", "class", "object", "x", "y", "label")
        contents["points"] = csv_text(header, points)
    return contents


def csv_text(header: tuple[str, ...], rows: list[tuple]) -> str:
    """Return a CSV file as text."""
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return file.getvalue()
