"""Find images and patients that two of the splits train, val and test share."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from imaging import layouts
from imaging.files import read_json
from preparation import check_findings
from preparation.check_findings import Findings

# Near-duplicates: the cosine similarity of the details of two small grey thumbnails. Measured on
# 1000 images of colonoscopy, 22 of ultrasound, 9 of skin and 104 CT slices: copies that were saved
# as JPEG of quality 30, resized by 0.5 to 1.5, stretched to a square or brightened by 1.1 reach
# 0.98 and more, copies brightened by 1.3 and clipped at white 0.93 and more. Different scenes reach
# at most 0.87, the next frame of a video or slice of a scan 0.90 to 0.99.
# Aligned images share their outline: 100 drawn fundus photographs reach 0.99. A second comparison
# therefore subtracts the mean of all images first: different eyes then reach at most 0.89, the CT
# slices above 0.90 and more. The mean is only known if there are enough images.
# A 64-bit difference hash (dHash of 9x8 pixels, distance at most 4) is simpler and finds more
# trimmed copies, but takes aligned images for copies. Measured on the same 1135 images and on 100
# drawn fundus photographs; the pairs of colonoscopy images were looked at:
#
#                                                              thumbnails     dHash
#   copies as JPEG of quality 30, of 0.5 to 1.5, square, of 1.1     1135      1135 of 1135 each
#   copies brightened by 1.3                                        1134      1123 of 1135
#   copies without 2 % of each side                                  231       850 of 1135
#   colonoscopy: copies, one of them with a black rim                  4         5 of 5
#   colonoscopy: pairs of different images that are named              0         0 of 499,495
#   drawn fundus photographs: different ones that are named            0      1849 of 4950 pairs
#   drawn fundus photographs: copies resized by 0.5 to 1.5             0       100 of 100 each
THUMBNAIL = 16  # pixels per side
NEAR = 0.95
NEAR_WITHOUT_MEAN = 0.90
ENOUGH_FOR_MEAN = 20  # images
CHUNK = 1024  # images that are compared with all others at a time


def digest_of(pixels: np.ndarray) -> bytes:
    """Return a hash of an array's shape and content."""
    digest = hashlib.blake2b(str(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels))
    return digest.digest()


def thumbnail_details(grey: Image.Image) -> np.ndarray:
    """Return the details of a grey image, (256,) float32 of length 1; zeros if it has none.

    Details are differences from the surroundings, so brightness and contrast have no effect.
    """
    small = grey.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    small = np.asarray(small, np.float32)
    details = small - ndimage.uniform_filter(small, 5, mode="nearest")
    details = details.ravel() - details.mean()
    if details.std() < 1:  # less than a grey level is noise
        return np.zeros_like(details)
    return details / np.linalg.norm(details)


@dataclass(frozen=True)
class SplitImage:
    """An image or a volume in a split."""

    path: Path
    split: str
    root: Path  # of the data set
    facts: object  # ImageFacts or VolumeFacts: `digest` and `thumbnail` are compared

    @property
    def role(self) -> str:
        return layouts.split_role(self.split)


def same_stem(path: Path) -> str:
    """Return a path without its ending, in lower case: a.png and A.jpg may be one picture."""
    return str(path.with_suffix("")).lower()


def split_images(splits: dict[str, list], facts: dict) -> list[SplitImage]:
    """Return each image of each split once, if it is in facts, {path: facts}."""
    images = []
    for split, entries in splits.items():
        roots = {entry.image: entry.root for entry in entries if entry.image in facts}
        for path, root in roots.items():
            images.append(SplitImage(path, split, root, facts[path]))
    return images


def published_split(root: Path) -> str | None:
    """Return where a data set's split comes from, as its source.json says; None if it does not.

    Raises ValueError, one line, if the file is not an object or the field not a text.
    """
    path = root / "source.json"
    if not path.is_file():
        return None

    content = read_json(path)
    text = content.get("published_split") if isinstance(content, dict) else 0  # 0: refused below
    if text is not None and not (isinstance(text, str) and text.strip()):
        expected = '{"published_split": "where the split comes from"}'
        raise ValueError(f"{path}: expected an object such as {expected}")
    return text


def check_patients(splits: dict[str, list], is_published: bool, findings: Findings) -> None:
    """Add a finding for each patient (`group`) in more than one of train, val and test."""
    kind = check_findings.SHARED_PATIENTS
    if is_published:
        kind = check_findings.PUBLISHED_PATIENTS

    first = {}  # patient -> split and image of its first entry
    reported = set()
    for split, entries in splits.items():
        for entry in entries:
            if entry.group is None:
                continue
            first_split, first_image = first.setdefault(entry.group, (split, entry.image))
            is_leak = layouts.split_role(first_split) != layouts.split_role(split)
            if is_leak and (entry.group, split) not in reported:
                reported.add((entry.group, split))
                line = f"{entry.image} ({split}): patient {entry.group} is also in {first_split}"
                findings[kind].append(f"{line}, {first_image.name}")


def check_overlap(images: list[SplitImage], published: set[Path], findings: Findings) -> set[Path]:
    """Add findings for images in more than one of train, val and test; return their paths.

    Test splits may share images with each other: they ask the same images for different things.
    published: the data sets with a `published_split`.
    """
    by_digest = {}  # digest of the pixels -> the first image that has it
    by_stem = {}  # path without its ending -> the same
    reported = set()
    for image in images:
        copy = by_digest.setdefault(image.facts.digest, image)
        alike = by_stem.setdefault(same_stem(image.path), image)

        if copy.role != image.role:
            line = f"{image.path} ({image.split}): also in {copy.split}"
            if copy.path != image.path:
                line += f" as {copy.path}"
            kind = check_findings.SHARED_IMAGES
            other_root = copy.root
        elif alike.role != image.role:
            line = f"{image.path} ({image.split}): named like {alike.path} ({alike.split})"
            kind = check_findings.SHARED_NAMES
            other_root = alike.root
        else:
            continue

        if other_root != image.root:
            kind = "images shared by data sets"
        elif image.root in published:
            kind = check_findings.PUBLISHED_IMAGES
        findings[kind].append(line)
        reported.add(image.path)
    return reported


def check_near(images: list[SplitImage], reported: set[Path], findings: Findings) -> None:
    """Add a finding for each image that is nearly the same as one of an earlier split.

    Images of test are compared with train and val, those of val with train.
    reported: paths that `check_overlap` has reported.
    """
    by_path_and_role = {}
    for image in images:
        if image.facts.thumbnail is not None and image.facts.thumbnail.any():
            by_path_and_role.setdefault((image.path, image.role), image)
    images = list(by_path_and_role.values())
    if not images:
        return

    details = np.stack([image.facts.thumbnail for image in images])  # (n,256)
    roles = np.array([image.role for image in images])
    is_reported = np.array([image.path in reported for image in images])
    for role, earlier_roles in (("val", ["train"]), ("test", ["train", "val"])):
        later = np.flatnonzero((roles == role) & ~is_reported)
        earlier = np.flatnonzero(np.isin(roles, earlier_roles))
        for i, j in near_pairs(details, later, earlier):
            image = images[i]
            other = images[j]
            line = f"{image.path} ({image.split}): nearly {other.path} ({other.split})"
            findings[check_findings.NEAR].append(line)


def near_pairs(details: np.ndarray, later, earlier) -> Iterator[tuple[int, int]]:
    """Yield (i, j) for each image i of `later` that is nearly the image j of `earlier`.

    details (n,256): `thumbnail_details` of all images; later, earlier: indices into them. j is the
    most similar one. All pairs are compared by matrix products: 10,000 against 10,000 images take a
    second.
    """
    if len(earlier) == 0:
        return

    mean = np.zeros_like(details[0])
    if len(details) >= ENOUGH_FOR_MEAN:
        mean = details.mean(axis=0)
    differences = details - mean
    differences /= np.maximum(np.linalg.norm(differences, axis=1, keepdims=True), 1e-6)

    for start in range(0, len(later), CHUNK):
        chunk = later[start : start + CHUNK]
        similarity = details[chunk] @ details[earlier].T  # (chunk,earlier)
        if similarity.max() < NEAR:
            continue
        similarity[differences[chunk] @ differences[earlier].T < NEAR_WITHOUT_MEAN] = 0
        for row, best in enumerate(similarity.argmax(axis=1)):
            if similarity[row, best] >= NEAR:
                yield chunk[row], earlier[best]
