"""prepare.py text-codes: the text tower against transformers and open_clip, from real files."""

import json

import numpy as np
import open_clip
import pytest
import torch
from conftest import close, command
from forms.clipseg import save_archive
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_online import constants, reach
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModelWithProjection

import clipseg
import prepare
import universal
from preparation import text_embeddings

pytestmark = pytest.mark.numeric

TEXTS = ["A computerized tomography of a liver", "spleen", "a Portal Vein, and one more: (x2)"]
SMALL = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512}


def randomised(model: nn.Module) -> nn.Module:
    """Every parameter random, biases and norms too, in numbers that half precision holds."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            base = 1 if "norm" in name or "ln_" in name else 0
            parameter.copy_((noise + base * name.endswith("weight")).half())
    return model.eval()


@pytest.fixture(scope="module")
def theirs():
    """A small CLIP of transformers whose codes have 512 numbers."""
    text = SMALL | {"num_hidden_layers": 3}
    vision = SMALL | {"num_hidden_layers": 1, "image_size": 64}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=512)
    return randomised(CLIPModel(config))


@pytest.fixture(scope="module")
def openai():
    """The same size under OpenAI's names, as open_clip computes it."""
    vision = {"image_size": 64, "layers": 1, "width": 128, "patch_size": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 3}
    return randomised(open_clip.CLIP(512, vision, text, quick_gelu=True))


def folder(model, path):
    model.save_pretrained(path)
    return path


def old_folder(model, path):
    """As the hub's files were in 2021: a pickle, and with a list of positions."""
    (path / "config.json").write_text(json.dumps({"text_config": {"hidden_act": "quick_gelu"}}))
    positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    torch.save(positions | model.state_dict(), path / "pytorch_model.bin")
    return path


def bare_file(model, path):
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, path / "clip.safetensors")
    return path / "clip.safetensors"


def text_half(model, path):
    half = CLIPTextModelWithProjection(model.config.text_config)
    state = model.state_dict()
    half.load_state_dict({name: state[name] for name in half.state_dict()})
    half.save_pretrained(path)
    return path


def archive(model, path):
    save_archive(model.state_dict() | {}, path / "ViT-B-32.pt")
    return path / "ViT-B-32.pt"


def archive_s_folder(model, path):
    return archive(model, path).parent


def wrapped(model, path):
    state = {f"module.{name}": t for name, t in model.state_dict().items()}
    torch.save({"state_dict": state}, path / "epoch.pth")
    return path / "epoch.pth"


def their_codes(theirs, texts):
    with torch.no_grad():
        return theirs.get_text_features(open_clip.tokenize(texts)).pooler_output


# --- the tower -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [folder, old_folder, bare_file, text_half])
def test_codes_equal_transformers(theirs, form, tmp_path):
    expected = their_codes(theirs, TEXTS)
    tower = text_embeddings.TextTower.from_pretrained(form(theirs, tmp_path))
    found = text_embeddings.encode(tower, TEXTS)
    assert found.shape == (3, 512) and found.dtype == torch.float32 and not tower.training
    assert expected.std() > 0.1 and not torch.allclose(expected[0], expected[1])
    close(found, expected, 2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("form", [archive, archive_s_folder, bare_file, wrapped])
def test_codes_equal_open_clip(openai, form, tmp_path):
    with torch.no_grad():
        expected = openai.encode_text(open_clip.tokenize(TEXTS))
    found = text_embeddings.encode(
        text_embeddings.TextTower.from_pretrained(form(openai, tmp_path)), TEXTS
    )
    assert expected.std() > 0.1
    close(found, expected, 2e-5 * expected.abs().max().item())


def test_names_and_shapes_of_the_official_size():
    """CLIP ViT-B/32 has 151,277,313 parameters, prints OpenAI's notebook."""
    with torch.device("meta"):
        hub = CLIPModel(CLIPConfig())
        ours = text_embeddings.TextTower(512, 12, 512)
    original = open_clip.create_model("ViT-B-32-quickgelu", device="meta")
    for model in hub, original:
        assert sum(p.numel() for p in model.parameters()) == 151_277_313
    expected = {f"clip.{name}": t for name, t in ours.state_dict().items()}
    expected = {n: tuple(t.shape) for n, t in clipseg.to_official(expected).items()}
    names = {f"clip.{n}": tuple(t.shape) for n, t in hub.state_dict().items()
             if n.startswith("text_") and "position_ids" not in n}  # fmt: skip
    assert names == expected
    text = {f"clip_model.{n}": t for n, t in original.state_dict().items()
            if not n.startswith("visual.") and n != "logit_scale"}  # fmt: skip
    text = clipseg.to_official({n: t for n, t in text.items() if "attn_mask" not in n})
    assert {n: tuple(t.shape) for n, t in text.items()} == expected


FAULTS = {
    "missing": (
        lambda s: s.pop("text_model.encoder.layers.1.mlp.fc1.bias"),
        "mlp.fc1.bias is miss",
    ),
    "unknown": (lambda s: s.update({"text_model.extra": torch.ones(2)}), "expected no such tensor"),
    "shape": (
        lambda s: s.update({"text_model.final_layer_norm.weight": torch.ones(64)}),
        "final_layer_norm.weight is (64,), expected (128,)",
    ),
    "no text": (
        lambda s: [s.pop(name) for name in list(s) if name.startswith("text_")],
        "no text tower of CLIP; take openai/clip-vit-base-patch32",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_not_whole_is_refused(theirs, fault, tmp_path):
    state, (harm, message) = {n: t.clone() for n, t in theirs.state_dict().items()}, FAULTS[fault]
    harm(state)
    save_file(state, tmp_path / "clip.safetensors")
    with pytest.raises(ValueError) as error:
        text_embeddings.TextTower.from_pretrained(tmp_path / "clip.safetensors")
    assert message in str(error.value) and "\n" not in str(error.value)


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(theirs, tmp_path_factory):
    return folder(theirs, tmp_path_factory.mktemp("clip"))


def made(weights, out, monkeypatch, capsys, *arguments):
    """{name: code}, the metadata, and what was printed."""
    given = "text-codes", "--weights", weights, "--out", out, *arguments
    code, said, error = command(monkeypatch, capsys, prepare, *given)
    assert code == 0, error
    with safe_open(out, "pt") as file:
        return load_file(out), file.metadata(), said


def test_the_released_codes_have_their_typos(theirs, weights, tmp_path, monkeypatch, capsys):
    codes, about, said = made(
        weights, tmp_path / "a.safetensors", monkeypatch, capsys, "--study", "universal"
    )
    assert codes.keys() == {*universal.ORGANS[1:]}
    assert about == {"template": "A computerized tomography of a {}", "weights": str(weights)}
    assert all(code.shape == (512,) and code.dtype == torch.float32 for code in codes.values())
    texts = {  # clip_embedding.py of the Universal Model
        "spleen": "A computerized tomography of a Spleen",
        "aorta": "A computerized tomography of a Arota",
        "celiac trunk": "A computerized tomography of a Celiac Truck",
        "portal vein and splenic vein":
            "A computerized tomography of a Portal Vein and Splenic Vein",
    }  # fmt: skip
    for name, code in zip(texts, their_codes(theirs, [*texts.values()]), strict=True):
        close(codes[name], code, 1e-4)
    right = made(
        weights, tmp_path / "b.safetensors", monkeypatch, capsys, "--classes", "Aorta", "x"
    )[0]
    (code,) = their_codes(theirs, ["A computerized tomography of a aorta"])
    close(right["aorta"], code, 1e-4)
    assert not torch.allclose(right["aorta"], codes["aorta"], atol=1e-2)
    x = np.stack([code.numpy() for code in codes.values()]).astype(np.float64)
    cosines = np.corrcoef(np.c_[x, -x])  # of centred rows: with their negatives the mean is 0
    mean = cosines[~np.eye(32, dtype=bool)].mean()
    np.fill_diagonal(cosines, -1)
    one, other = (list(codes)[k] for k in np.unravel_index(cosines.argmax(), cosines.shape))
    line = "32 codes; cosine between two: mean {:.3f}, closest {} and {} {:.3f}\n"
    orders = (one, other), (other, one)
    assert any(line.format(mean, *pair, cosines.max()) in said for pair in orders)


def test_classes_template_and_order(theirs, weights, tmp_path, monkeypatch, capsys):
    arguments = "--template", "CT of {}, slice", "--classes", "Liver_Tumor", "kidney", "liver tumor"
    codes, about, said = made(weights, tmp_path / "a.safetensors", monkeypatch, capsys, *arguments)
    assert codes.keys() == {"liver tumor", "kidney"} and about["template"] == "CT of {}, slice"
    expected = their_codes(theirs, ["CT of liver tumor, slice", "CT of kidney, slice"])
    close(torch.stack([codes["liver tumor"], codes["kidney"]]), expected, 1e-4)
    cosine = torch.cosine_similarity(*expected, dim=0)
    pair = f"mean {cosine:.3f}, closest liver tumor and kidney {cosine:.3f}"
    assert f"2 codes; cosine between two: {pair}" in said
    one = made(weights, tmp_path / "b.safetensors", monkeypatch, capsys, "--classes", "kidney")
    assert one[0].keys() == {"kidney"} and "1 code, of kidney" in one[2]


def test_classes_of_data_sets(weights, tmp_path, monkeypatch, capsys):
    prepare.main(["demo-volumes", "--volumes", "3", "--out", str(tmp_path / "ct")])
    for kind in "images", "masks":
        (tmp_path / "mr/train" / kind).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "mr/train" / kind / "a.png")
    names = {"0": "background", "1": "Stomach", "2": "small_bowel", "3": "Liver"}
    (tmp_path / "mr/classes.json").write_text(json.dumps(names))
    codes, _, _ = made(
        weights, tmp_path / "a.safetensors", monkeypatch, capsys,
        "--data", tmp_path / "ct", tmp_path / "mr",
    )  # fmt: skip
    assert codes.keys() == {
        "spleen", "right kidney", "left kidney", "liver", "aorta", "stomach", "small bowel",
    }  # fmt: skip


def test_the_loader_of_the_model_reads_them(weights, tmp_path, monkeypatch, capsys):
    out = tmp_path / "a.safetensors"
    codes, _, _ = made(weights, out, monkeypatch, capsys, "--classes", "liver", "spleen")
    embedding = torch.stack([codes["spleen"], codes["liver"]])
    config = universal.UniversalConfig(
        12, num_classes=2, classes=("background", "spleen", "liver"), image_size=(64, 32, 32)
    )
    model = universal.UniversalSwinUNETR(config, embedding).eval()
    with torch.no_grad():
        assert model(torch.rand(1, 1, 64, 32, 32), [1]).shape == (1, 1, 64, 32, 32)


REFUSED = {
    "none": ([], "give one of --classes, --data and --study"),
    "two": (["--classes", "x", "--study", "universal"], "give one of --classes"),
    "template": (["--classes", "x", "--template", "CT"], "{} must be in it once"),
    "twice": (["--classes", "x", "--template", "{} {}"], "{} must be in it once"),
    "long": (["--classes", "x " * 80], "more than 77 tokens"),
    "no data": (["--data", "nowhere"], "nowhere: no such folder"),
    "no weights": (["--classes", "x", "--weights", "nowhere.pt"], "no such file or folder"),
    "ending": (["--classes", "x", "--out", "codes.pt"], "kept in a .safetensors"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(weights, tmp_path, what, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments, message = REFUSED[what]
    given = "text-codes", "--weights", weights, *arguments
    code, said, error = command(monkeypatch, capsys, prepare, *given)
    assert code == 2 and said == "" and error.count("\n") == 1 and message in error, error
    assert not [*tmp_path.iterdir()]


def test_a_text_of_just_so_many_tokens(theirs, weights):
    tower = text_embeddings.TextTower.from_pretrained(weights)
    just = " ".join(["x"] * 75)  # and start and end
    close(text_embeddings.encode(tower, [just])[0], their_codes(theirs, [just])[0], 1e-4)
    with pytest.raises(ValueError, match="more than 77 tokens"):
        text_embeddings.encode(tower, [just + " x"])


def test_other_clips_and_data_without_names(theirs, demo, weights, tmp_path, monkeypatch, capsys):
    (tmp_path / "wide").mkdir()
    state = {n: t.clone() for n, t in theirs.state_dict().items()}
    state["text_projection.weight"] = torch.ones(768, 128)
    save_file(state, tmp_path / "wide/model.safetensors")
    (tmp_path / "laion").mkdir()
    save_file(theirs.state_dict(), tmp_path / "laion/model.safetensors")
    (tmp_path / "laion/config.json").write_text('{"text_config": {"hidden_act": "gelu"}}')
    (tmp_path / "half").mkdir()
    gelu = CLIPTextConfig(**SMALL, num_hidden_layers=1, hidden_act="gelu", projection_dim=512)
    CLIPTextModelWithProjection(gelu).save_pretrained(tmp_path / "half")
    capsys.readouterr()  # its progress
    (tmp_path / "mine.safetensors").write_bytes(b"mine")
    out = tmp_path / "out.safetensors"
    for arguments, message in (
        (["--classes", "x", "--weights", tmp_path / "wide"], "codes of 768 numbers, the model"),
        (["--classes", "x", "--weights", tmp_path / "laion"], "has gelu, OpenAI's CLIP has quick"),
        (["--classes", "x", "--weights", tmp_path / "half"], "half: has gelu, OpenAI's CLIP has"),
        (["--data", demo, "--weights", weights], "without names of classes; give --classes"),
        (["--classes", "x", "--out", tmp_path / "mine.safetensors"], "exists already"),
    ):
        given = "text-codes", "--out", out, *arguments
        code, said, error = command(monkeypatch, capsys, prepare, *given)
        assert code == 2 and said == "" and error.count("\n") == 1 and message in error, error
    assert not out.exists() and (tmp_path / "mine.safetensors").read_bytes() == b"mine"


@pytest.mark.online
def test_codes_of_the_real_weights(tmp_path, monkeypatch, capsys):
    """What the released txt_encoding.pth has: norms of 8.10 to 9.62 and these cosines."""
    reach(constants.ENDPOINT)
    out = tmp_path / "a.safetensors"
    codes, _, said = made(text_embeddings.WEIGHTS, out, monkeypatch, capsys, "--study", "universal")
    norms = torch.stack([code.norm() for code in codes.values()])
    assert abs(norms.min() - 8.103) < 0.01 and abs(norms.max() - 9.618) < 0.01
    assert "mean 0.875" in said
    for one, other, expected in (
        ("liver", "liver tumor", 0.975), ("right kidney", "left kidney", 0.989),
    ):  # fmt: skip
        assert abs(torch.cosine_similarity(codes[one], codes[other], 0) - expected) < 1e-3
