"""Find images and patients that two of the splits train, val and test share."""

import hashlib

import numpy as np
from PIL import Image
from scipy import ndimage

from preparation.check_findings import NEAR_KIND

# Near-duplicates: the cosine similarity of the details of two small grey thumbnails. Measured on
# 1000 images of colonoscopy, 22 of ultrasound, 9 of skin and 104 CT slices: copies that were saved
# as JPEG of quality 30, resized by 0.5 to 1.5, stretched to a square or brightened by 1.1 reach
# 0.98 and more, copies brightened by 1.3 and clipped at white 0.93 and more. Different scenes reach
# at most 0.87, the next frame of a video or slice of a scan 0.90 to 0.99.
# Aligned images share their outline: 100 drawn fundus photographs reach 0.99. A second comparison
# therefore subtracts the mean of all images first: different eyes then reach at most 0.89, the CT
# slices above 0.90 and more. The mean is only known if there are enough images.
THUMBNAIL = 16  # pixels per side
NEAR = 0.95
NEAR_WITHOUT_MEAN = 0.90
ENOUGH_FOR_MEAN = 20  # images
CHUNK = 1024  # images that are compared with all others at a time


def digest_of(pixels):
    """Return a hash of an array's shape and content."""
    digest = hashlib.blake2b(str(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels))
    return digest.digest()


def thumbnail_details(grey):
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


def role_of(split):
    """Return the role of a split: train, val or, for all others, test."""
    return {"train": "train", "val": "val", "valid": "val"}.get(split, "test")


def check_patients(splits, findings):
    """Add a finding for each patient (`group`) in more than one of train, val and test."""
    first = {}  # patient -> split and image of its first entry
    reported = set()
    for split, entries in splits.items():
        for entry in entries:
            if entry.group is None:
                continue
            patient = (entry.root, entry.group)
            first_split, first_image = first.setdefault(patient, (split, entry.image))
            is_leak = role_of(first_split) != role_of(split)
            if is_leak and (patient, split) not in reported:
                reported.add((patient, split))
                line = f"{entry.image} ({split}): patient {entry.group} is also in {first_split}"
                findings["patients in several splits"].append(f"{line}, {first_image.name}")


def unique_images(splits, facts):
    """Return (path, split, facts) of each image of each split that has facts."""
    seen = []
    for split, entries in splits.items():
        paths = dict.fromkeys(entry.image for entry in entries if entry.image in facts)
        seen += [(path, split, facts[path]) for path in paths]
    return seen


def check_overlap(seen, findings):
    """Add findings for images in more than one of train, val and test; return their paths.

    seen: (path, split, facts) of each image. Test splits may share images with each other: they ask
    the same images for different things.
    """
    by_digest = {}  # digest of the pixels -> role, split and path of the first image that has it
    by_stem = {}  # path without its ending -> the same
    reported = set()
    for path, split, facts in seen:
        role = role_of(split)
        copy_role, copy_split, copy = by_digest.setdefault(facts.digest, (role, split, path))
        stem = str(path.with_suffix("")).lower()  # a.png and A.jpg may be one picture
        alike_role, alike_split, alike = by_stem.setdefault(stem, (role, split, path))

        if copy_role != role:
            line = f"{path} ({split}): also in {copy_split}"
            if copy != path:
                line += f" as {copy}"
            findings["images in several splits"].append(line)
            reported.add(path)
        elif alike_role != role:
            line = f"{path} ({split}): named like {alike} ({alike_split})"
            findings["images named alike in several splits"].append(line)
            reported.add(path)
    return reported


def check_near(seen, reported, findings):
    """Add a finding for each image of test that is nearly one of train or val, or of val, of train.

    seen: (path, split, facts) of each image. reported: paths that `check_overlap` has reported.
    """
    by_path_and_role = {}
    for path, split, facts in seen:
        if facts.thumbnail is not None and facts.thumbnail.any():
            by_path_and_role[path, role_of(split)] = (path, split, facts)
    seen = list(by_path_and_role.values())
    if not seen:
        return

    details = np.stack([facts.thumbnail for _, _, facts in seen])  # (n,256)
    roles = np.array([role_of(split) for _, split, _ in seen])
    is_reported = np.array([path in reported for path, _, _ in seen])
    for role, earlier_roles in (("val", ["train"]), ("test", ["train", "val"])):
        later = np.flatnonzero((roles == role) & ~is_reported)
        earlier = np.flatnonzero(np.isin(roles, earlier_roles))
        for i, j in near_pairs(details, later, earlier):
            path, split, _ = seen[i]
            earlier_path, earlier_split, _ = seen[j]
            line = f"{path} ({split}): nearly {earlier_path} ({earlier_split})"
            findings[NEAR_KIND].append(line)


def near_pairs(details, later, earlier):
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
