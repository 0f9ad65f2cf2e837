"""BiomedCLIPSeg against the numbers of the study, timm, open_clip and transformers."""

import json
import subprocess
import sys
import zlib
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT, command
from forms.biomedclipseg import MINI, run_folder, write_hub_files
from hub import Hub
from open_clip.hf_model import HFTextEncoder
from PIL import Image
from recipe import fill
from safetensors.torch import load_file
from torch import nn
from torchvision.transforms import v2
from transformers import BertConfig, CLIPSegConfig
from transformers.models.clipseg.modeling_clipseg import CLIPSegDecoder

import biomedclipseg
import options as options_module
import predict
import train
from biomedclipseg import VARIANTS, BiomedCLIPSeg
from options import Options
from recipes import FAMILIES
from tokenizer import CHARACTERS, WordPieceTokenizer

pytestmark = pytest.mark.numeric

FILE = np.load(ROOT / "tests/golden/biomedclipseg.npz")
NAMES = json.loads(str(FILE["keys"]))


def golden(name: str) -> torch.Tensor:
    return torch.from_numpy(FILE[name])


def golden_weights() -> dict[str, torch.Tensor]:
    """The study's state dict, the legacy table of positions included."""
    stored = {n.removeprefix("buffers/"): FILE[n] for n in FILE.files if n.startswith("buffers/")}
    return {n: torch.from_numpy(stored[n] if n in stored else fill(n, s)) for n, s, _ in NAMES}


def golden_image() -> torch.Tensor:
    meta = json.loads(str(FILE["meta"]))
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(meta["pixels"][0].encode())))
    coarse = rng.standard_normal((2, 3, 14, 14), dtype=np.float32)
    fine = rng.standard_normal((2, 3, 224, 224), dtype=np.float32)
    image = coarse.repeat(16, 2).repeat(16, 3) + np.float32(0.25) * fine
    assert zlib.crc32(image.tobytes()) == meta["pixels_crc32"]
    return torch.from_numpy(image)


# --- the study's own numbers ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """The full model with the golden weights, out of the two files."""
    folder = tmp_path_factory.mktemp("golden")
    files = write_hub_files(golden_weights(), folder)
    model = BiomedCLIPSeg.from_pretrained(**files)
    for path in folder.rglob("*.bin"):  # 790 MB
        path.unlink()
    return model


def intermediate_results(model) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """name -> ours and the study's, in the order in which data meets them."""
    trunk, text = model.biomedclip.visual["trunk"], model.biomedclip.text["transformer"]
    modules = {f"block{i}": trunk.blocks[i] for i in (3, 4, 7, 10)} | {"bert_last_hidden": text}
    modules |= {f"dec{i}": layer for i, layer in enumerate(model.decoder.layers)}
    seen, hooks = {}, []
    for name, module in modules.items():

        def hook(module, inputs, output, name=name):
            if name.startswith("dec"):
                seen[f"{name}_in"], seen[f"{name}_out"] = inputs[0][:, ::14], output[:, ::14]
            else:
                seen[name] = output[:, ::49] if name.startswith("block") else output[:, :4]

        hooks.append(module.register_forward_hook(hook))
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        seen["logits"] = model(golden_image().to(dtype), golden("in/input_ids"))
        seen["embedding"] = model.encode_text(golden("in/input_ids"))
    for hook in hooks:
        hook.remove()
    return {name: (x, golden(f"out/{name}")) for name, x in seen.items()}


@pytest.mark.parity
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_equal_the_study_s(official, dtype, parity):
    try:
        results = intermediate_results(official.to(dtype))
        for name, (ours, theirs) in results.items():
            error = (ours - theirs).abs().max().item()
            print(f"{name}: {error:.1e}")
            limit = 1e-4 if name in ("block7", "block10") else 2e-5
            assert error < limit, f"the first that differs is {name}, by {error:.1e}"
    finally:
        official.float()
    if dtype == torch.float32:
        ours, theirs = results["logits"]
        error = (ours - theirs).abs().max() / theirs.abs().max()
        parity("biomedclipseg", "full size, logits", "medvlsm dc36a3a", float32=error.item())


def test_the_taps_that_the_study_meant_and_pictures_as_prompts(official):
    image, tokens = golden_image(), golden("in/input_ids")
    config, official.config = official.config, replace(official.config, taps=(3, 6, 9))
    try:
        with torch.no_grad():
            logits = official(image, tokens)
            prompt = official.encode_image_prompt(image)
    finally:
        official.config = config
    error = (logits - golden("out/logits_layers_3_6_9")).abs().max()
    assert error < 2e-5
    assert (prompt - golden("out/openclip_image_features")).abs().max() < 2e-5
    assert (logits - golden("out/logits")).abs().max() > 0.5


# --- timm, open_clip and transformers, live at mini -----------------------------------------------


class Reference(nn.Module):
    """The study's network of the packages' own modules: mini, under the study's names."""

    def __init__(self, taps):
        super().__init__()
        c, self.taps = MINI, taps
        self.biomedclip = nn.Module()
        self.biomedclip.logit_scale = nn.Parameter(torch.tensor(2.6))
        self.biomedclip.visual = nn.Module()
        self.biomedclip.visual.trunk = timm.models.VisionTransformer(
            embed_dim=c.dim, depth=c.layers, num_heads=2, num_classes=0, dynamic_img_size=True
        )
        self.biomedclip.visual.head = nn.Sequential()
        self.biomedclip.visual.head.proj = nn.Linear(c.dim, c.embed_dim, bias=False)
        bert = BertConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.dim,
            num_hidden_layers=c.text_layers,
            num_attention_heads=2,
            intermediate_size=4 * c.dim,
        )
        pooler, mlp = "cls_last_hidden_state_pooler", "mlp"
        self.biomedclip.text = HFTextEncoder("", c.embed_dim, bert, pooler, mlp, pretrained=False)
        self.biomedclip.text.transformer.pooler = None
        clipseg = CLIPSegConfig(
            vision_config={"hidden_size": c.dim, "num_attention_heads": 2, "patch_size": 16},
            projection_dim=c.embed_dim,
            reduce_dim=c.reduce_dim,
            decoder_intermediate_size=c.ffn_dim,
            extract_layers=list(taps),
            use_complex_transposed_convolution=True,
        )
        self.decoder = CLIPSegDecoder(clipseg)
        for layer in self.decoder.layers:  # its default takes the softmax in float32
            layer.self_attn.config._attn_implementation = "sdpa"
        self.double().eval()
        with torch.no_grad():
            for name, p in self.named_parameters():
                p.copy_(torch.from_numpy(fill(name, tuple(p.shape))))

    def encode_image(self, image):
        """Outputs of the blocks in `taps`, shallow to deep: (B,N,C) each."""
        tokens = self.biomedclip.visual.trunk.forward_intermediates(
            image,
            indices=list(self.taps),
            output_fmt="NLC",
            return_prefix_tokens=True,
            intermediates_only=True,
        )
        return [torch.cat([first, patches], 1) for patches, first in tokens]

    def forward(self, image, tokens):
        condition = self.biomedclip.text(tokens)
        return self.decoder(tuple(self.encode_image(image)), condition).logits[:, None]

    def encode_image_prompt(self, image):
        return self.biomedclip.visual.head.proj(self.biomedclip.visual.trunk(image))


def prompts(*lengths) -> torch.Tensor:
    torch.manual_seed(3)
    tokens = torch.zeros(len(lengths), 128, dtype=torch.int64)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = torch.cat([torch.tensor([2]), torch.randint(5, 109, (length - 1,))])
    return tokens


@pytest.fixture(scope="module", params=[(0, 1, 2), (1, 2, 3)])
def pair(request, tmp_path_factory):
    """The packages' network and ours, loaded from the files of it."""
    reference = Reference(request.param)
    files = write_hub_files(reference.state_dict(), tmp_path_factory.mktemp("mini"))
    return reference, BiomedCLIPSeg.from_pretrained(**files, taps=request.param).double()


@pytest.mark.parity
def test_outputs_and_all_gradients_equal_the_packages(pair, parity):
    torch.manual_seed(1)
    image, tokens = torch.randn(3, 3, 224, 224).double(), prompts(5, 17, 9)
    gradients = []
    for model in pair:
        model.zero_grad()
        logits = model(image, tokens)
        target = torch.arange(logits.numel()).reshape(logits.shape) % 7 < 3
        F.binary_cross_entropy_with_logits(logits, target.double()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        gradients[-1]["logits"] = logits.detach()
    theirs, ours = gradients
    assert theirs.keys() == ours.keys()
    assert len(ours) > 120
    errors = {}
    for name, reference in theirs.items():
        # Of the keys' biases they are 0 but for rounding: softmax does not see a shift of all keys.
        error = (ours[name] - reference).abs().max() / reference.abs().max().clamp_min(1e-8)
        assert error < 1e-6, f"{name}: {error:.1e}"
        errors[name] = error.item()
    if pair[0].taps == (0, 1, 2):
        packages = f"open_clip {open_clip.__version__}, timm {timm.__version__}"
        packages += f", transformers {transformers.__version__}"
        logits = errors.pop("logits")
        parity("biomedclipseg", "small model, logits", packages, float64=logits)
        worst = max(errors.values())
        parity("biomedclipseg", "small model, all gradients", packages, float64=worst)


def test_float32_and_other_sizes_equal_the_packages(pair):
    reference, model = pair
    tokens = prompts(4, 11)
    for size in (224, 128, 288):
        image = torch.randn(2, 3, size, size).double()
        with torch.no_grad():
            theirs = reference(image, tokens)
            assert (model(image, tokens) - theirs).abs().max() < 1e-6 * theirs.std()
            ours = model.float()(image.float(), tokens)
            prompt = reference.encode_image_prompt(image)
            model.double()
            assert (model.encode_image_prompt(image) - prompt).abs().max() < 1e-6
        assert (ours - theirs).abs().max() < 2e-5


def test_images_that_are_not_square(pair):
    reference, model = pair
    image = torch.randn(1, 3, 64, 176).double()
    with torch.no_grad():
        features = model.encode_image(image)
        theirs = torch.stack(reference.encode_image(image), 1)  # (1,taps,1+HW,C)
        assert features.shape == (1, 3, 5, 11, 128)
        torch.testing.assert_close(features[:, :, 1:].flatten(2, 3), theirs[:, :, 1:])
        torch.testing.assert_close(features[:, :, 0, -1], theirs[:, :, 0])
        assert model(image, prompts(5)).shape == (1, 1, 64, 176)
    with pytest.raises(ValueError, match="multiples of 16"):
        model(torch.zeros(1, 3, 72, 64).double(), prompts(5))


# --- less work, same numbers ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def mini():
    torch.manual_seed(1)
    return BiomedCLIPSeg(MINI).eval().double()


def test_padding_changes_nothing(mini):
    tokens = prompts(5, 9)
    with torch.no_grad():
        padded = mini.biomedclip.text["transformer"](tokens, (tokens != 0)[:, None, None])
        padded = mini.biomedclip.text["proj"](padded[:, 0])  # all 128 columns computed
        torch.testing.assert_close(mini.encode_text(tokens), padded, rtol=0, atol=1e-12)
        torch.testing.assert_close(mini.encode_text(tokens[:1, :5]), padded[:1], rtol=0, atol=1e-12)
        ours, short = mini.float().encode_text(tokens), mini.encode_text(tokens[:, :9])
        assert torch.equal(ours, short)  # the padding is cut off first: the same computation
        rounding = 1e-5 * padded.abs().max()  # of float32, in two layers
        assert (ours - padded).abs().max() < rounding
        mini.double()
        full = mini.encode_text(tokens.where(tokens != 0, 7))
        assert (full - padded).abs().max() > 1e-3  # these are seen


def test_blocks_after_the_last_tap_do_not_run(mini):
    image, tokens = torch.randn(1, 3, 64, 64).double(), prompts(5)
    with torch.no_grad():
        expected = mini(image, tokens)
        dead = mini.biomedclip.visual["trunk"].blocks[3]
        hook = dead.register_forward_hook(lambda *_: pytest.fail("ran"))
        assert torch.equal(mini(image, tokens), expected)
        hook.remove()


def test_features_and_embeddings_can_be_kept_and_shared(mini):
    image, tokens = torch.randn(2, 3, 64, 96).double(), prompts(5, 9)
    with torch.no_grad():
        features, condition = mini.encode_image(image), mini.encode_text(tokens)
        expected = mini(image, tokens)
        assert torch.equal(mini.decode(features, tokens), expected)
        assert torch.equal(mini.decode(features, condition=condition), expected)
        assert torch.equal(mini(image, condition=condition), expected)
        for both in ({}, {"tokens": tokens, "condition": condition}):
            with pytest.raises(ValueError, match="one of the two"):
                mini(image, **both)
        one = mini(image[:1], tokens)  # one image, two prompts
        torch.testing.assert_close(one, mini(image[[0, 0]], tokens))
        assert (one[0] - one[1]).abs().max() > 1e-3


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["all", "decoder"])
def test_trains_in_float32_and_whatever_may_train_does(part):
    torch.manual_seed(0)
    model = BiomedCLIPSeg(MINI).train()
    names = {n for n, p in model.named_parameters() if not p.requires_grad}
    visual = "biomedclip.visual."
    unreached = (f"{visual}trunk.blocks.3.", f"{visual}trunk.norm.", f"{visual}head.")
    unreached = {n for n in model.state_dict() if n.startswith(unreached)}
    assert names == unreached | {"biomedclip.logit_scale"}
    if part == "decoder":
        model.biomedclip.requires_grad_(False)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), 1e-3)
    image, tokens = torch.randn(2, 3, 64, 64), prompts(5, 9)
    target, losses = (torch.arange(64) < 40).float().expand(2, 1, 64, 64), []
    for _ in range(12):
        loss = F.binary_cross_entropy_with_logits(model(image, tokens), target)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.015
    assert {n.split(".")[0] for n in trained} == {
        "all": {"biomedclip", "decoder"},
        "decoder": {"decoder"},
    }[part]


def test_the_text_tower_s_dropout_is_the_study_s_only_if_asked_for():
    torch.manual_seed(0)
    model, tokens = BiomedCLIPSeg(MINI).train(), prompts(9)
    noisy = BiomedCLIPSeg(replace(MINI, dropout=0.1)).train()
    noisy.load_state_dict(model.state_dict())
    with torch.no_grad():
        plain = model.encode_text(tokens)
        assert torch.equal(model.encode_text(tokens), plain)
        many = tokens[:, :9].expand(1000, -1)
        noise = noisy.encode_text(many).std(0).mean()
        assert torch.equal(noisy.eval().encode_text(tokens), plain)
        reference = Reference((0, 1, 2)).biomedclip.text.float().train()  # BERT's own 0.1
        reference.load_state_dict(model.biomedclip.text.state_dict())
        theirs = reference(many).std(0).mean()
    assert 0.95 < noise / theirs < 1.05


def test_an_untrained_decoder_is_drawn_as_the_study_s():
    torch.manual_seed(0)
    # The decoder of the full size below a small text tower.
    decoder = BiomedCLIPSeg(replace(VARIANTS["biomedclipseg"], text_layers=1, vocab_size=9)).decoder
    # As in transformers 4.35.2; what its rules leave out is as torch draws it.
    stds = {"q_proj": 0.0255, "k_proj": 0.0255, "v_proj": 0.0255, "out_proj": 0.125}
    stds |= {"fc1": 0.0884, "fc2": 0.0255, "film_mul": 0.0255, "film_add": 0.0255}
    stds |= dict.fromkeys(("reduces.0", "reduces.1", "reduces.2"), 0.0208)
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Linear):
            std = stds[name if name in stds else name.split(".")[-1]]
            assert module.weight.std().item() == pytest.approx(std, rel=0.05), name
            assert not module.bias.any(), name


# --- loading is total -----------------------------------------------------------------------------


def mini_state():
    torch.manual_seed(0)
    return {k: v.clone() for k, v in BiomedCLIPSeg(MINI).state_dict().items()}


def test_what_no_file_tells_is_said(tmp_path, capsys):
    state = mini_state()
    files = write_hub_files(state, tmp_path)
    model = BiomedCLIPSeg.from_pretrained(files["source"])
    out = capsys.readouterr().out
    assert (
        "the decoder is untrained" in out
        and "assuming taps (0, 1, 2)" in out
        and out.count("\n") == 2
    )
    towers = [n for n in state if n.startswith("biomedclip.")]
    assert all(torch.equal(model.state_dict()[n], state[n]) for n in towers)
    BiomedCLIPSeg.from_pretrained(**files, taps=(1, 2, 3))
    assert capsys.readouterr().out == ""
    BiomedCLIPSeg.from_pretrained(**run_folder(state, tmp_path / "run"))
    assert capsys.readouterr().out == ""


def test_a_decoder_can_be_exchanged(tmp_path):
    state, other = mini_state(), mini_state()
    other = {n: t + 1 if n.startswith("decoder.") else t for n, t in other.items()}
    first, second = (run_folder(s, tmp_path / n) for n, s in (("a", state), ("b", other)))
    model = BiomedCLIPSeg.from_pretrained(first["source"], decoder=second["source"])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, (other if name.startswith("decoder.") else state)[name])


def test_what_is_something_else_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pth")
    with pytest.raises(ValueError, match=r"biomedclip\."):
        BiomedCLIPSeg.from_pretrained(tmp_path / "linear.pth")
    run = run_folder(mini_state(), tmp_path / "run")
    with pytest.raises(ValueError, match="linear.pth.*decoder.film_mul.weight is missing"):
        BiomedCLIPSeg.from_pretrained(**run, decoder=tmp_path / "linear.pth")
    with pytest.raises(ValueError, match="holds CRIS in format 1, not BiomedCLIPSeg"):
        BiomedCLIPSeg.from_pretrained(
            **run_folder(mini_state(), tmp_path / "cris", **{"class": "CRIS"})
        )
    for taps in ((2, 1, 3), (1, 1, 2), (1, 2, 4), (-1, 0, 1)):
        with pytest.raises(ValueError, match="blocks of 0 to 3"):
            BiomedCLIPSeg(replace(MINI, taps=taps))


# --- which decoder --------------------------------------------------------------------------------


def other_decoder(state, offset):
    """The same state with another decoder."""
    return {n: t + offset if n.startswith("decoder.") else t for n, t in state.items()}


def as_original_release(state) -> dict[str, torch.Tensor]:
    """The decoder under the original release's names, of which the hub's are known by hand."""
    original = {"reduce.weight": torch.ones(32, 128), "reduce.bias": torch.ones(32)}
    for name, t in state.items():
        if not name.startswith("decoder.") or "k_proj" in name or "v_proj" in name:
            continue
        if "q_proj" in name:
            t = torch.cat([state[name.replace("q_proj", f"{x}_proj")] for x in "qkv"])
            name = name.replace("q_proj.", "in_proj_")
        name = name.removeprefix("decoder.").replace("transposed_convolution", "trans_conv")
        name = name.replace("layers", "blocks").replace("layer_norm", "norm")
        original[name.replace("mlp.fc", "linear")] = t
    return original


def recipe_files(tmp_path, monkeypatch) -> tuple[dict, dict, dict]:
    """BiomedCLIP and two CLIPSegs in the place of the hub's -> state, files, paths of decoders."""
    state = mini_state()
    files = write_hub_files(state, tmp_path / "hub")
    named = write_hub_files(other_decoder(state, 1), tmp_path / "named")
    settings = FAMILIES["biomedclipseg"].protocols
    for recipe in settings:
        towers, decoder = {"biomedclipseg": str(files["source"])}, settings[recipe].default_decoder
        decoder = str(files["decoder"]) if decoder else None
        here = replace(settings[recipe], hub_ids=towers, default_decoder=decoder)
        monkeypatch.setitem(settings, recipe, here)
    return state, files, named


def loaded_by(train_set, **given):
    """The model that train.py begins with."""
    options = Options(model="biomedclipseg", data=["somewhere"], workers=0, **given)
    settings = options_module.resolve(options)
    return train.starting_model(settings, train_set, torch.device("cpu"))


def assert_decoder(model, state, source):
    assert model.decoder_source == (None if source is None else str(source))
    for name, t in model.state_dict().items():
        assert torch.equal(t, state[name]), name


@pytest.mark.parametrize("recipe", ["default", "origin-d"])
def test_the_default_weights_by_name_are_the_default(recipe, tmp_path, monkeypatch, capsys):
    state, files, named = recipe_files(tmp_path, monkeypatch)
    file = files["source"] / "open_clip_pytorch_model.bin"
    for weights in (None, str(files["source"]), str(file)):  # id of the hub, folder, file
        capsys.readouterr()
        model = loaded_by([1], weights=weights, recipe=recipe)
        assert_decoder(model, state, files["decoder"])
        assert "the decoder comes from " in capsys.readouterr().out
        model = loaded_by([1], weights=weights, recipe=recipe, decoder=str(named["decoder"]))
        assert_decoder(model, other_decoder(state, 1), named["decoder"])


def test_a_recipe_without_a_decoder_and_weights_with_one(tmp_path, monkeypatch):
    state, files, named = recipe_files(tmp_path, monkeypatch)
    source = str(files["source"])
    assert loaded_by([1], weights=source, recipe="origin").decoder_source is None
    model = loaded_by([1], weights=source, recipe="origin", decoder=str(named["decoder"]))
    assert_decoder(model, other_decoder(state, 1), named["decoder"])
    for weights in (None, source):
        with pytest.raises(ValueError, match="BiomedCLIP.* has no decoder"):
            loaded_by(None, weights=weights, recipe="origin", eval=True, test=["somewhere"])

    own = other_decoder(state, 2)
    whole = str(run_folder(own, tmp_path / "run")["source"])
    for recipe in (None, "default", "origin", "origin-d"):
        assert_decoder(loaded_by([1], weights=whole, recipe=recipe), own, whole)
    model = loaded_by([1], weights=whole, decoder=str(named["decoder"]))
    assert_decoder(model, other_decoder(state, 1), named["decoder"])


def test_a_run_records_its_decoder(demo, tmp_path, monkeypatch, capsys):
    _, files, named = recipe_files(tmp_path, monkeypatch)
    words = ["--model", "biomedclipseg", "--weights", files["source"], "--size", 64, "--epochs", 1]
    words += ["--data", demo, "--max-steps", 1, "--cache", tmp_path / "cache", "--workers", 0]
    for name, more, expected in (
        ("a", [], files["decoder"]),
        ("b", ["--decoder", named["decoder"]], named["decoder"]),
        ("c", ["--recipe", "origin", "--batch-size", 4], None),
    ):
        out = tmp_path / name
        code, _, error = command(monkeypatch, capsys, train, *words, *more, "--out", out)
        assert code == 0, error
        config = json.loads((out / "config.json").read_text())
        assert config["decoder"] == (None if expected is None else str(expected))
        # As a run folder of before, which knew no --decoder, it still resumes.
        for key in ("clip", "decoder"):
            config["options"].pop(key)
        (out / "config.json").write_text(json.dumps(config))
        code, _, error = command(monkeypatch, capsys, train, "--resume", "--out", out, *more)
        assert code == (0 if not more or name == "c" else 2), error

    words = [min((demo / "images").iterdir()), "--prompt", "x", "--model", "biomedclipseg"]
    words += ["--weights", files["source"], "--probabilities"]
    for name, more in (("e", []), ("f", ["--decoder", named["decoder"]])):
        out = ["--out", tmp_path / name]
        code, _, error = command(monkeypatch, capsys, predict, *words, *more, *out)
        assert code == 0, error
    one, other = (next((tmp_path / n).glob("*_probability.png")).read_bytes() for n in "ef")
    assert one != other


@pytest.mark.parametrize(
    "words, said",
    [
        (["--model", "segformer"], "--decoder: segformer has no use for it, only biomedclipseg"),
        (["--model", "biomedclipseg", "--weights", "none"], "--decoder: with --weights none"),
    ],
)
def test_a_decoder_that_does_nothing_is_refused(words, said, demo, tmp_path, monkeypatch, capsys):
    words = [*words, "--decoder", "x", "--data", demo, "--out", tmp_path / "run"]
    code, _, error = command(monkeypatch, capsys, train, *words)
    assert code == 2 and said in error and error.count("\n") == 1, error


def test_a_decoder_of_the_original_release(tmp_path):
    state = mini_state()
    files = write_hub_files(other_decoder(state, 1), tmp_path / "hub")
    torch.save(as_original_release(state), tmp_path / "rd64-uni-refined.pth")
    model = BiomedCLIPSeg.from_pretrained(files["source"], tmp_path / "rd64-uni-refined.pth")
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())

    # Its whole module has CLIP twice besides, which is not wanted.
    whole = {"clip_model.visual.conv1.weight": torch.ones(1), "model.conv1.weight": torch.ones(1)}
    torch.save(whole | as_original_release(state), tmp_path / "whole.pth")
    model = BiomedCLIPSeg.from_pretrained(files["source"], tmp_path / "whole.pth")
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())

    damaged = as_original_release(state)
    damaged["blocks.1.self_attn.in_proj_weight"] = torch.ones(())
    torch.save(damaged, tmp_path / "damaged.pth")
    with pytest.raises(ValueError, match=r"damaged.pth: .*layers\.1\.self_attn\.\w+ is"):
        BiomedCLIPSeg.from_pretrained(files["source"], tmp_path / "damaged.pth")


def test_a_wrong_file_is_named(tmp_path):
    state = mini_state()
    files = write_hub_files(state, tmp_path / "hub")
    torch.save(as_original_release(state), tmp_path / "rd64-uni-refined.pth")
    torch.save({f"w_{x}_000": torch.zeros(4, 8) for x in "ab"}, tmp_path / "lora.pth")
    torch.save({"visual.conv1.weight": torch.zeros(8, 3, 16, 16)}, tmp_path / "ViT-B-16.pt")
    name = "segformer.encoder.patch_embeddings.0.proj.weight"
    torch.save({name: torch.zeros(8, 3, 7, 7)}, tmp_path / "segformer.bin")
    torch.save(torch.zeros(32, 512).half(), tmp_path / "txt_encoding.pth")
    clip = {"clip.vision_model.post_layernorm.bias": torch.zeros(8)}
    decoder = {n: t for n, t in state.items() if n.startswith("decoder.")}
    torch.save(clip | decoder, tmp_path / "clipseg.pth")
    as_weights = {
        "rd64-uni-refined.pth": "is a decoder of CLIPSeg without CLIP, not BiomedCLIPSeg; use Bio",
        "clipseg.pth": "is CLIPSeg, not BiomedCLIPSeg; use BiomedCLIP as weights and this file",
        "ViT-B-16.pt": "seems to be CLIP (names of OpenAI), neither BiomedCLIP nor BiomedCLIPSeg",
        "lora.pth": "seems to be a LoRA of SAM's image encoder",
        "segformer.bin": "seems to be a SegFormer, neither",
        "txt_encoding.pth": "holds a single tensor, float16 of shape (32, 512)",
    }
    as_decoder = {
        "hub/biomedclip/open_clip_pytorch_model.bin": "seems to be BiomedCLIP, which has no dec",
        "ViT-B-16.pt": "seems to be CLIP (names of OpenAI), which has no decoder of CLIPSeg",
        "lora.pth": "seems to be a LoRA of SAM's image encoder (names of SAMed), which has no dec",
        "segformer.bin": "seems to be a SegFormer, which has no decoder",
        "txt_encoding.pth": "holds a single tensor, float16 of shape (32, 512)",
    }
    for table, role in ((as_weights, "source"), (as_decoder, "decoder")):
        for name, said in table.items():
            with pytest.raises(ValueError) as caught:
                BiomedCLIPSeg.from_pretrained(**files | {role: tmp_path / name})
            message = str(caught.value)
            assert message.startswith(str(tmp_path / name)) and said in message, message
            assert "\n" not in message


@torch.no_grad()
def test_the_real_decoder_equals_transformers_and_recorded_numbers(real_weights, tmp_path):
    """rd64-refined's decoder below towers of three layers; taps and numbers of a separate check."""
    config = replace(VARIANTS["biomedclipseg"], layers=3, text_layers=1, vocab_size=9)
    config = replace(config, taps=(0, 1, 2))
    towers = BiomedCLIPSeg(config).biomedclip.state_dict()
    torch.save(towers, tmp_path / "open_clip_pytorch_model.bin")
    more = {"layers": 3, "text_layers": 1, "vocab_size": 9, "taps": (0, 1, 2)}
    decoder = real_weights / "rd64-uni-refined.pth"
    model = BiomedCLIPSeg.from_pretrained(tmp_path, decoder, **more)
    assert model.config == config
    clipseg = CLIPSegConfig(
        vision_config={"patch_size": 16}, reduce_dim=64, use_complex_transposed_convolution=True
    )
    official = CLIPSegDecoder(clipseg).eval()
    for layer in official.layers:  # its default takes the softmax in float32
        layer.self_attn.config._attn_implementation = "sdpa"
    from test_clipseg import real_decoder

    state = {n.removeprefix("decoder."): t for n, t in real_decoder(decoder).items()}
    official.load_state_dict(state)  # strict

    generator = torch.Generator().manual_seed(0)
    taps = torch.randn(2, 3, 485, 768, generator=generator)
    taps[..., 133] += 8
    taps[..., 408] -= 20
    condition = torch.randn(2, 512, generator=generator) * 0.4
    results = {}
    for dtype in (torch.float32, torch.float64):
        x, c = taps.to(dtype), condition.to(dtype)
        ours = model.to(dtype).decode(biomedclipseg.tokens_to_grid(x, 22, 22), condition=c)
        theirs = official.to(dtype)(x.unbind(1), c).logits[:, None]
        results[dtype] = ours.double(), theirs.double()
    single, rounded = results[torch.float32]
    double, expected = results[torch.float64]
    assert (double - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert (single - expected).abs().max() <= max(2e-5, 4 * (rounded - expected).abs().max())
    recorded = torch.tensor([-3.8998, -3.7136, -3.4716], dtype=torch.float64)
    assert (double[0, 0, 0, :3] - recorded).abs().max() < 1e-4
    assert abs(double.mean() + 2.7214) < 1e-4 and abs(double.std() - 0.9962) < 1e-4


# --- the hub --------------------------------------------------------------------------------------

PROGRAM = """
import sys
from safetensors.torch import save_file
from biomedclipseg import BiomedCLIPSeg, find_vocabulary
from tokenizer import WordPieceTokenizer
home, towers, decoder = sys.argv[1:]
model = BiomedCLIPSeg.from_pretrained(towers, decoder=decoder, vocabulary=towers)
vocabulary = find_vocabulary(model.config.vocabulary)
tokens = WordPieceTokenizer(vocabulary, 8, model.config.pad_token)("red 2")
print(tokens.tolist())
save_file(model.state_dict(), home + "/saved.safetensors")
"""


def test_towers_decoder_and_vocabulary_from_the_hub(tmp_path):
    towers, decoder = VARIANTS["biomedclipseg"].vocabulary, "CIDAS/clipseg-rd64-refined"
    state, folder = mini_state(), tmp_path / "repositories"
    files = write_hub_files(state, tmp_path / "files")
    (folder / towers).mkdir(parents=True), (folder / decoder).mkdir(parents=True)
    files["source"].rename(folder / towers / "main")
    files["decoder"].rename(folder / decoder / "main")
    write_vocabulary(folder / towers / "main/vocab.txt")
    with Hub(folder) as hub:
        environment = hub.environment(tmp_path / "home")
        printed = [run(environment, tmp_path, towers, decoder)]
    # The port is closed now: all is kept.
    printed.append(run(environment, tmp_path, towers, decoder))
    for out in printed:
        assert out.splitlines()[-1] == str(expected_tokens())
    downloads = [line for line in printed[0].splitlines() if line.startswith("downloading")]
    names = ("open_clip_pytorch_model.bin", "pytorch_model.bin", "vocab.txt")
    assert [line.split()[1].rstrip(",") for line in downloads] == list(names)
    assert "downloading" not in printed[1]
    saved = load_file(tmp_path / "saved.safetensors")
    assert all(torch.equal(t, saved[name]) for name, t in state.items())


def run(environment, home, *arguments) -> str:
    command = [sys.executable, "-c", PROGRAM, str(home), *arguments]
    done = subprocess.run(
        command, env=environment, check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_vocabulary(path):
    path.write_text("\n".join(CHARACTERS) + "\n", encoding="utf-8")


def expected_tokens():
    pieces = ["[CLS]", "r", "##e", "##d", "2", "[SEP]", "[PAD]", "[PAD]"]
    return [[CHARACTERS.index(piece) for piece in pieces]]


def test_a_vocabulary_beside_the_weights_is_the_one(tmp_path):
    run = run_folder(mini_state(), tmp_path / "run")
    write_vocabulary(tmp_path / "run/vocab.txt")
    for source in (tmp_path / "run", tmp_path / "run/best.safetensors"):
        config = BiomedCLIPSeg.from_pretrained(source).config
        tokenize = WordPieceTokenizer(biomedclipseg.find_vocabulary(config.vocabulary), 8)
        assert tokenize("Red 2").tolist() == expected_tokens()
    assert biomedclipseg.find_vocabulary(run["source"]) == tmp_path / "run/vocab.txt"
    with pytest.raises(FileNotFoundError, match="no such file"):
        biomedclipseg.find_vocabulary(tmp_path / "gone/vocab.txt")


# --- pixels ---------------------------------------------------------------------------------------


def test_pixels_are_torchvision_s_resize_of_pil_images():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)).resize((301, 147))
    config = VARIANTS["biomedclipseg"]
    steps = [v2.Resize((224, 224)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    official = v2.Compose([*steps, v2.Normalize(config.mean, config.std)])(image)
    torch.testing.assert_close(biomedclipseg.preprocess(image, config), official, rtol=0, atol=1e-6)
    mask = Image.fromarray(np.asarray(image.convert("L")) > 127)
    nearest = np.asarray(mask.resize((224, 224), Image.Resampling.NEAREST))
    ours = biomedclipseg.preprocess_mask(torch.from_numpy(np.array(mask)), config)
    assert np.array_equal(ours[0].numpy() > 0.5, nearest)


def test_the_way_back_is_bilinear_logits(mini):
    logits = torch.tensor([[[-4.0, 4.0], [-4.0, 4.0]]])
    back = mini.postprocess(logits, (2, 4))
    torch.testing.assert_close(back[0, 0], torch.tensor([-4.0, -2.0, 2.0, 4.0]).sigmoid())
