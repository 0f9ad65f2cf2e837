# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Fine-tune on twenty images
#
# This notebook trains a segmentation model on twenty images, looks at the scores and pictures,
# and applies the model to a new image. It runs on a CPU in about two minutes and downloads
# nothing: the data is synthetic, and the model is a small SegFormer without pretrained weights.
# The last section says what to change for your own images.

# %%
import csv
import json
import os
import sys
from pathlib import Path

from PIL import Image

if not Path("train.py").exists():  # started in notebooks/
    os.chdir("..")
sys.path.insert(0, os.getcwd())

# %% [markdown]
# ## The data
#
# A data set is a folder with `images/` and `masks/`. Here a command draws one blob on a
# mucosa-like background in each of 80 images. In a mask, white pixels are the blob.

# %%
import prepare

folder = Path("data/twenty")
if not folder.exists():
    prepare.main(
        ["demo", "--out", str(folder), "--images", "80", "--objects", "1-1", "--size", "128"]
    )

# %% [markdown]
# The split is in `anns/train.json`, `val.json` and `test.json`. We keep twenty images to train
# on.

# %%
for split in ("train", "val", "test"):
    entries = json.loads((folder / f"anns/{split}.json").read_text())
    if split == "train":
        entries = entries[:20]
        (folder / "anns/train.json").write_text(json.dumps(entries))
    print(split, len(entries))
entries[0]

# %%
entry = json.loads((folder / "anns/train.json").read_text())[0]
image = Image.open(folder / "images" / entry["img_name"]).convert("RGB")
mask = Image.open(folder / "masks" / entry["mask_name"]).convert("RGB")

pair = Image.new("RGB", (2 * image.width, image.height))
pair.paste(image, (0, 0))
pair.paste(mask, (image.width, 0))
pair.resize((512, 256))

# %% [markdown]
# `prepare.py check` looks for missing files, unusual masks, patients in two splits and
# near-duplicates.

# %%
prepare.main(["check", str(folder)])

# %% [markdown]
# ## Training
#
# The same as `python train.py --model segformer --variant mini --weights none --data data/twenty
# …` on the command line. What is not set here comes from the recipe `default`: joint
# augmentation, Dice + cross entropy, AdamW with a cosine schedule.

# %%
import train

out = Path("runs/twenty")
options = train.Options(
    model="segformer",
    variant="mini",
    weights="none",
    data=[str(folder)],
    out=str(out),
    epochs=60,
    eval_every=20,
    batch_size=4,
    lr=2e-3,
    workers=0,
    resume=(out / "last.pt").exists(),
)
train.run(options)

# %% [markdown]
# ## Scores and pictures
#
# The run folder has a row for each epoch in `metrics.csv`, a plot of it, and the test in `test/`.

# %%
with open(out / "metrics.csv", newline="") as file:
    rows = list(csv.DictReader(file))
rows[-1]

# %%
Image.open(out / "curves.png")

# %%
sorted(path.name for path in (out / "test").rglob("*") if path.is_file())

# %% [markdown]
# The sheet shows the worst, median and best test images. Green outlines are the ground truth,
# magenta outlines the prediction.

# %%
sheet = Image.open(out / "test/overlays/sheet.png")
sheet.thumbnail((720, 720))
sheet

# %% [markdown]
# Always look at the worst images. Here they show red blobs: only three of the twenty training
# images have one, and red is closest to the background. More such images would help most.

# %% [markdown]
# ## Use the model
#
# A run folder is a source of weights like any other.

# %%
from segformer import SegFormer

model = SegFormer.from_pretrained(out)
median = next((out / "test/overlays").glob("median1_*.png"))
name = median.stem.removeprefix("median1_")
probabilities, mask = model.segment(folder / "images" / f"{name}.png")
print(probabilities.shape, probabilities.dtype, mask.shape, mask.dtype)
Image.fromarray(mask * 255).resize((256, 256))

# %% [markdown]
# ## Your own images
#
# Put them into `images/` and their masks into `masks/`, then drop `variant` and `weights`:
# training then starts from the pretrained `nvidia/segformer-b2-finetuned-ade-512-512`, which
# twenty real images need. On a GPU, leave `workers` out too. `docs/data.md` describes the
# folders, `docs/training.md` the options.
