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
# # Read CRIS with shapes
#
# CRIS takes an image and a phrase and returns the mask of what the phrase names. This notebook
# runs `cris.py` step by step and prints the shape of every intermediate result. It needs a CPU, a
# few seconds and no download: the weights are random, as only the shapes matter here.
#
# Paper: Wang et al., CVPR 2022, [arXiv 2111.15174](https://arxiv.org/abs/2111.15174).

# %%
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

if not Path("cris.py").exists():  # started in notebooks/
    os.chdir("..")
sys.path.insert(0, os.getcwd())

import cris
from tokenizer import CLIPTokenizer


def show(name: str, tensor: torch.Tensor) -> None:
    print(f"{name:24} {tuple(tensor.shape)}")


# %% [markdown]
# The full-size model with CLIP's ResNet-50. `Config` has every number of it.

# %%
torch.manual_seed(0)
config = cris.VARIANTS["rn50"]
model = cris.CRIS(config).eval()
torch.set_grad_enabled(False)
config

# %%
for name, part in model.named_children():
    count = sum(parameter.numel() for parameter in part.parameters())
    print(f"{name:12} {count:>12,} parameters")

# %% [markdown]
# ## Inputs
#
# An image of 416 x 416 pixels, and a phrase as token ids: 49406 starts it, 49407 ends it, zeros
# pad it.

# %%
image = torch.randn(1, 3, 416, 416)
tokenize = CLIPTokenizer(config.text_length, config.pad_token)
tokens = tokenize("one small pink polyp")
show("image", image)
show("tokens", tokens)
tokens

# %% [markdown]
# ## Image encoder
#
# CLIP's ResNet returns three feature maps at strides 8, 16 and 32. The last one has passed CLIP's
# attention pool, which CRIS changes to keep all positions.

# %%
v3, v4, v5 = model.backbone.visual(image)
show("v3, stride 8", v3)
show("v4, stride 16", v4)
show("v5, stride 32", v5)

# %% [markdown]
# ## Text encoder
#
# CLIP's text transformer returns a feature for each token (`words`), and one for the whole phrase
# (`state`), which is the feature at the end token, projected into the space of the image
# features.

# %%
words, state = model.backbone.encode_text(tokens)
show("words", words)
show("state", state)

# %% [markdown]
# ## Neck
#
# The neck multiplies v5 by the phrase, channel by channel, and fuses the three maps at stride 16.
# Two more channels hold the coordinates of each pixel.

# %%
fused = model.neck(v3, v4, v5, state)
show("neck", fused)

# %% [markdown]
# ## Decoder
#
# Three transformer layers: the 26 x 26 pixels attend to each other and to the words. Padded
# tokens are masked.

# %%
padding = tokens == 0
decoded = model.decoder(fused, words, padding)
show("decoder", decoded)

# %% [markdown]
# ## Projector
#
# The map is upsampled twice. Then the phrase provides the weights of a 3 x 3 convolution, which
# gives the logits.

# %%
logits = model.proj(decoded, state)
show("logits", logits)
torch.equal(logits, model(image, tokens))

# %% [markdown]
# `upsampled_conv3x3` is faster than upsampling and convolving, and equal to it:

# %%
x = torch.randn(1, 16, 26, 26, dtype=torch.float64)
weight = torch.randn(8, 16, 3, 3, dtype=torch.float64)

plain = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
plain = F.conv2d(plain, weight, padding=1)
fast = cris.upsampled_conv3x3(x, weight)
print(f"largest difference {(fast - plain).abs().max():.1e}")

# %% [markdown]
# ## From an image file to a mask
#
# `preprocess` makes the image a square, `postprocess` brings the logits back to the size of the
# image, and `segment` does everything in one call. `config.pixels` says how the image becomes a
# square.

# %%
from PIL import Image

photo = Image.new("RGB", (640, 480), (180, 90, 80))
pixels = model.preprocess(photo)
show("preprocessed", pixels)
probabilities, mask = model.segment(photo, "one small pink polyp")
print("probabilities", probabilities.shape, "mask", mask.shape)

# %% [markdown]
# `docs/models/cris.md` lists the implementation details with the lines of the official code.
