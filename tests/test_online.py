"""Real weights from where they are published. `make test-online` runs these."""

import hashlib
import lzma
import os
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from huggingface_hub import constants, hf_hub_download
from PIL import Image

import biomedclipseg
import cris
import train
from tokenizer import WordPieceTokenizer

pytestmark = pytest.mark.online

CATS = "http://images.cocodataset.org/val2017/000000039769.jpg"  # what they publish is of

# github.com/openai/CLIP, clip/clip.py: the folder of each file is its sha256
OPENAI = "https://openaipublic.azureedge.net/clip/models"
RN50 = "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762"


def reach(url: str) -> None:
    """Skips the test, and says why, where this machine cannot reach `url`."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10)
    except urllib.error.HTTPError:
        pass  # it answers
    except OSError as error:
        pytest.skip(f"{url} is out of reach: {error}")


def picture(url: str, folder: Path) -> Image.Image:
    """An image from there, for weights from the hub; skips the test if either is out of reach."""
    reach(constants.ENDPOINT)
    reach(url)
    return Image.open(urllib.request.urlretrieve(url, folder / Path(url).name)[0])


@pytest.mark.parametrize("variant", ["rn50", "rn101"])
def test_clip_loads_from_the_hub(variant):
    reach(constants.ENDPOINT)
    model = cris.CRIS.from_pretrained(f"timm/resnet{variant[2:]}_clip.openai")
    assert model.config.layers == cris.VARIANTS[variant].layers and model.config.text_length == 77


def test_openai_s_archive_equals_the_hub_s_copy(tmp_path):
    reach(constants.ENDPOINT)
    reach(f"{OPENAI}/{RN50}/RN50.pt")
    path = tmp_path / "RN50.pt"
    urllib.request.urlretrieve(f"{OPENAI}/{RN50}/RN50.pt", path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == RN50
    archive = cris.CRIS.from_pretrained(path).backbone.state_dict()
    hub = cris.CRIS.from_pretrained("timm/resnet50_clip.openai").backbone.state_dict()
    for name, x in archive.items():
        assert ".connect." in name or torch.equal(x, hub[name]), name


def test_the_merges_are_the_hub_s():
    reach(constants.ENDPOINT)
    theirs = Path(hf_hub_download("openai/clip-vit-base-patch32", "merges.txt")).read_text("utf-8")
    with lzma.open(ROOT / "clip_merges.txt.xz", "rt", encoding="utf-8") as file:
        ours = file.read()
    assert theirs.splitlines()[1:] == ours.splitlines()


@pytest.mark.parametrize("decoder", [None, "CIDAS/clipseg-rd64-refined"])
def test_biomedclipseg_loads_from_the_hub(decoder):
    reach(constants.ENDPOINT)
    hub_id = "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
    model = biomedclipseg.BiomedCLIPSeg.from_pretrained(hub_id, decoder)
    tokens = WordPieceTokenizer(biomedclipseg.find_vocabulary(hub_id))("one small polyp")
    assert tokens[0, :2].tolist() != [1, 1] and 1 not in tokens[0]  # no [UNK]
    logits = model(torch.zeros(1, 3, 224, 224), tokens)
    assert logits.shape == (1, 1, 224, 224) and logits.isfinite().all()


@pytest.mark.parametrize("prompt, published", [("p1", 0.3112), ("p4", 0.4994), ("p6", 0.4530)])
def test_zero_shot_dice_on_kvasir(prompt, published, real_data, tmp_path):
    """medvlsm, arXiv 2308.07706v1, figure 2, whose protocol was the official one."""
    weights = os.environ.get("CRIS_CHECKPOINT")
    if not weights:
        pytest.skip("CRIS_CHECKPOINT names no file: the RefCOCO-trained CRIS is not on the hub")
    options = train.Options(
        weights=weights,
        epochs=0,
        prompt=prompt,
        data=[str(real_data / "kvasir_polyp")],
        out=str(tmp_path / "run"),
    )
    dice = train.run(options)["tests"]["kvasir_polyp"]["dice"]["mean"]
    assert dice == pytest.approx(published, abs=0.01)  # OpenCV resampled there
