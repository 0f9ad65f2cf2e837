"""Read the texts of --prompts-csv, which give each image prompts of its own."""

from collections import Counter
from pathlib import Path

from imaging import boxes_and_points, layouts
from imaging.boxes_and_points import ImageNames, cell_text, first_three
from recipes.sam import image_names


def with_prompts(cases: list, args) -> list[tuple[str, Path, str]]:
    """Return (name, image file, text) of each row of --prompts-csv for one of the images.

    cases: (name, image file, any text) of the images. The name of an image with n > 1 rows gets _1
    to _n, in the order of the rows. Raises ValueError, one line, if an image has no row, or several
    masks in its data set.
    """
    path = Path(args.prompts_csv)
    images = [file for _, file, _ in cases]
    for image, count in Counter(images).items():
        if count > 1:
            raise ValueError(
                f"--prompts-csv: {image} has {count} masks in its data set, and a prompt does not "
                "say which it is for; pass its folder of images as INPUT instead"
            )

    inputs = [*args.roots.values(), *args.inputs]
    names = dict(zip(images, image_names(images, inputs), strict=True))
    texts = read_texts(path, names)
    without = [names[image] for image in images if image not in texts]
    if without:
        raise ValueError(
            f"{path}: {len(without)} of {len(images)} images have no prompt "
            f"({first_three(without)}); add rows for them"
        )

    prompted = []
    for name, image, _ in cases:
        if len(texts[image]) == 1:
            prompted.append((name, image, texts[image][0]))
            continue
        for number, text in enumerate(texts[image], 1):
            prompted.append((f"{name}_{number}", image, text))
    return prompted


def read_texts(path: Path, names: dict[Path, str]) -> dict[Path, list[str]]:
    """Return the texts of a CSV file by image, in the file's order.

    The file has the columns image and prompt, separated by commas, semicolons or tabs. names: the
    images' paths as `ImageNames` takes them. Prints how many rows are for other images. Raises
    FileNotFoundError or ValueError, one line with file and row; also if no row is for any image.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of prompts")
    images = ImageNames(names)

    texts = {}
    unknown_images = []
    for location, row in boxes_and_points.csv_rows(path, "prompts"):
        try:
            image_name, text = parse_row(row)
            image = images.find(image_name)
        except ValueError as error:
            raise ValueError(f"{path}, {location}: {error}") from None
        if image is None:
            unknown_images.append(image_name)
        else:
            texts.setdefault(image, []).append(text)

    boxes_and_points.check_not_empty(path, "prompts", texts, unknown_images, images)
    boxes_and_points.print_ignored_rows(path, unknown_images)
    return texts


def parse_row(row: dict) -> tuple[str, str]:
    """Return the image's name and the text of a row. Raises ValueError, without the location."""
    columns = boxes_and_points.find_columns(row, "prompts")
    values = {}
    for field in ("image", "prompt"):
        value = " ".join(cell_text(row, columns[field]).split())  # a cell may contain line breaks
        if not value:
            raise ValueError(f"has no {field}")
        values[field] = value

    text = values["prompt"]
    if layouts.is_prompt_type(text):
        raise ValueError(f"{text} is a prompt type of data sets; write the text itself")
    return values["image"], text
