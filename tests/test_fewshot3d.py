"""The few-shot study's attention and text options: its numbers, its mistakes, our corrections."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, close, randomised, shapes, write_run
from recipe import fill

import fewshot3d
import swin_unetr3d
import universal as universal_file
from fewshot3d import AttentionUniversal, CrossModalTransformer, TextSwinUNETR
from imaging import volumes
from universal import UniversalSwinUNETR, dynamic_head

pytestmark = pytest.mark.numeric

MINI = replace(fewshot3d.VARIANTS["mini"], num_classes=4, classes=("background", *"abcd"))
SIDES = (96, 32, 32)
TEXT = replace(fewshot3d.MINI, image_size=SIDES)
ALL = {"attention": True, "concat": True, "contrast": True}


def golden(name: str) -> tuple:
    """-> arrays, what is told of them, names and shapes of the official state dict."""
    arrays = np.load(ROOT / f"tests/golden/{name}.npz")
    meta, keys = json.loads(str(arrays["meta"])), json.loads(str(arrays["keys"]))
    return arrays, meta, {name: tuple(shape) for name, shape, _ in keys}


def state_of(arrays, meta, names) -> dict[str, torch.Tensor]:
    state = {n: torch.from_numpy(fill(n, s, meta["seed"])) for n, s in names.items()}
    stored = [n.removeprefix("buffers/") for n in arrays.files if n.startswith("buffers/")]
    return state | {n: torch.from_numpy(arrays[f"buffers/{n}"]) for n in stored}


STUDY = "Few-Shot-3D-Medical-Segmentation 0973c44"


def compare(found: dict, arrays, limits: dict, part=slice(None), prefix="out/") -> float:
    """Compare each output with what the golden file has of it; return the last one's deviation."""
    for name, (x, every) in found.items():
        expected = torch.from_numpy(arrays[prefix + name])[part]
        error = (x[(..., *every)] - expected).abs().max().item()
        print(f"{prefix}{name} differs by {error:.1e} of {expected.abs().max():.1f}")
        assert error <= 4 * limits[name], f"{name}: {error:.1e}, more than 4 * {limits[name]:.1e}"
    return error / expected.abs().max().item()


# --- attention in the Universal Model ------------------------------------------------------------

EVERY = slice(1, None, 4), slice(2, None, 4), slice(3, None, 4)


@pytest.mark.parity
@torch.no_grad()
def test_golden_outputs_of_the_universal_model(tmp_path, capsys, parity):
    """The second volume is what the study's mistake makes of it: `chain`. Alone it is a first."""
    arrays, meta, names = golden("fewshot3d_universal_attention")
    path, image = tmp_path / "epoch_2.pth", torch.from_numpy(arrays["in/image"])
    state = {f"module.{n}": t for n, t in state_of(arrays, meta, names).items()}
    torch.save({"net": state, "epoch": 2}, path)
    model = AttentionUniversal.from_pretrained(path)
    assert model.config == fewshot3d.AttentionConfig() and not model.training
    assert "untrained" not in capsys.readouterr().out
    kept = {}
    for module in ("encoder10", "decoder1"):

        def hook(_module, _inputs, output, name=module):
            kept[name] = output

        model.get_submodule(module).register_forward_hook(hook)

    model.config = replace(model.config, attend="chain")
    logits, limits = model(image), meta["float32_vs_float64_max_abs"]
    bottom, top = kept.values()
    found = {"dec4": (bottom, ()), "params": (model.head_numbers(bottom), ())}
    deviation = compare(found | {"logits": (logits, EVERY)}, arrays, limits)
    parity("fewshot3d", "universal-attention, logits", STUDY, float32=deviation)

    model.config = replace(model.config, attend="token")
    params = model.head_numbers(bottom)
    mended = dynamic_head(model.precls_conv(top.contiguous()), params)
    compare({"params": (params[:1], ()), "logits": (mended[:1], EVERY)}, arrays, limits, slice(1))
    assert (mended[1] - logits[1]).abs().max() > 10
    close(mended[1:], model(image[1:]), 4 * limits["logits"])


def test_names_and_shapes_of_both_studies():
    """In the state dicts of their classes."""
    _, _, names = golden("fewshot3d_universal_attention")
    with torch.device("meta"):
        config = fewshot3d.VARIANTS["universal-attention"]
        model = AttentionUniversal(config, torch.empty(32, 512))
    assert shapes(universal_file.to_official(model.state_dict())) == names
    official = {n: torch.empty(s, device="meta") for n, s in names.items()}
    assert shapes(swin_unetr3d.convert(official)) == shapes(model.state_dict())
    count, source = sum(p.numel() for p in model.parameters()), (ROOT / "fewshot3d.py").read_text()
    assert f'"universal-attention": AttentionConfig(),  # {count:,}\n' in source
    plain = fewshot3d.TextConfig(**swin_unetr3d.BTCV)
    for name, config in {**fewshot3d.TEXT_VARIANTS, "without": plain}.items():
        with torch.device("meta"):
            model = TextSwinUNETR(config)
        count = sum(p.numel() for p in model.parameters())
        assert re.search(rf'"?{name}"?[ :].*[#:] .*\b{count:,}\b', source), (name, count)
    _, meta, every = golden("fewshot3d_btcv")
    for variant, options in meta["variants"].items():
        with torch.device("meta"):
            model = TextSwinUNETR(fewshot3d.TextConfig(12, **options))
        names = official_names(meta, every, variant)
        assert shapes(swin_unetr3d.to_official(model.state_dict())) == names


def official_names(meta, every, variant) -> dict[str, tuple]:
    told = meta["keys_by_variant"][variant]
    names = {n: s for n, s in every.items() if n not in told["absent"]}
    return names | {n: tuple(s) for n, s, _ in told["changed_or_extra"]}


def plain_transformer(model: CrossModalTransformer, heads: int, text, image) -> tuple:
    """Attention of several heads written out. text (N,C), image (M,C) -> the same shapes."""
    state = model.state_dict(keep_vars=True)

    def step(x, y, attention, norm1, mlp, norm2):
        def linear(x, name):
            return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

        def norm(x, name):
            x = (x - x.mean(1, True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
            return x * state[f"{name}.weight"] + state[f"{name}.bias"]

        weights, biases = state[f"{attention}.in_proj_weight"], state[f"{attention}.in_proj_bias"]
        inputs = zip((x, y, y), weights.chunk(3), biases.chunk(3), strict=True)
        q, k, v = (one @ w.T + b for one, w, b in inputs)
        some = []
        for a, b, c in zip(*(t.chunk(heads, 1) for t in (q, k, v)), strict=True):
            some.append((a @ b.T / a.shape[1] ** 0.5).softmax(1) @ c)
        x = norm(x + linear(torch.cat(some, 1), f"{attention}.out_proj"), norm1)
        return norm(x + linear(linear(x, f"{mlp}.0").relu(), f"{mlp}.2"), norm2)

    own = "{0}_self_attention {0}_norm1 {0}_feedforward {0}_norm2"
    cross = "cross_modal_attention_{0} cross_modal_norm1_{0} cross_modal_feedforward_{0} "
    cross += "cross_modal_norm2_{0}"
    text = step(text, text, *own.format("text").split())
    image = step(image, image, *own.format("img").split())
    text = step(text, image, *cross.format("text").split())
    return text, step(image, text, *cross.format("image").split())


@pytest.mark.parametrize("N, M", [(1, 1), (5, 1), (7, 7)])
def test_the_transformer_and_its_gradients_equal_the_formula(N, M):
    """In float64."""
    model = randomised(CrossModalTransformer(12, 3)).double()
    generator = torch.Generator().manual_seed(0)
    text, image = (torch.randn(1, n, 12, generator=generator).double() for n in (N, M))
    text, image = text.requires_grad_(), image.requires_grad_()
    wanted = [text, image, *model.parameters()]
    outputs = model(text, image), plain_transformer(model, 3, text[0], image[0])
    outputs = [torch.cat([x.view(-1, 12) for x in pair]) for pair in outputs]
    weight = torch.randn(outputs[0].shape, generator=generator).double()
    close(*outputs, 1e-12)
    for pair in zip(*(torch.autograd.grad(x, wanted, weight) for x in outputs), strict=True):
        close(*pair, 1e-12 * max(1, pair[1].abs().max().item()))


@pytest.fixture(scope="module")
def universal():
    return randomised(AttentionUniversal(MINI)).double()


def numbers(model, attend: str, codes=None, classes=None, bottom=None) -> torch.Tensor:
    """(B,k,153) of three bottoms unless others are given; codes (K,256) instead of the model's."""
    model.config = replace(model.config, attend=attend)
    if bottom is None:
        bottom = torch.randn(3, 192, 2, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    kept = model.organ_embedding.weight.data
    model.organ_embedding.weight.data = kept if codes is None else codes
    with torch.no_grad():
        x = model.head_numbers(bottom, classes)
    model.organ_embedding.weight.data = kept
    return x


@pytest.mark.parametrize("attend", fewshot3d.ATTEND)
def test_asking_for_some_classes_changes_none(universal, attend):
    """Though in `classes` all others have a part in each, and in `chain` one of them."""
    every, some = numbers(universal, attend), numbers(universal, attend, classes=[3, 1])
    close(some, every[:, [3, 1]], 1e-12)


def test_who_sees_whom(universal):
    """Another code of the last class, another first image, another second one."""
    codes = universal.organ_embedding.weight.data.clone()
    codes[3] += 1
    bottom = torch.randn(2, 192, 2, 2, 2, generator=torch.Generator().manual_seed(1)).double()
    others = [bottom.clone(), bottom.clone()]
    others[0][0] += torch.arange(192)[:, None, None, None] % 5
    others[1][1] += torch.arange(192)[:, None, None, None] % 5
    # attend -> does it change the numbers of class 0, of the first volume, of the second?
    seen = {}
    for attend in fewshot3d.ATTEND:
        before = numbers(universal, attend, bottom=bottom)[:, 0]
        changed = (
            numbers(universal, attend, codes, bottom=bottom),
            *(numbers(universal, attend, bottom=x) for x in others),
        )
        seen[attend] = [(x[:, 0] - before).abs().amax(1).gt(1e-6).tolist() for x in changed]
    own = [True, False], [False, True]
    assert seen == {
        "token": [[False, False], *own],
        "chain": [[False, False], [True, True], [False, False]],
        "classes": [[True, True], *own],
    }


@torch.no_grad()
def test_classes_are_the_tokens_that_the_study_meant(universal):
    """The image is then as often there as there are classes, which is once."""
    bottom = torch.randn(1, 192, 2, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    image, codes = universal.GAP(bottom).flatten(1), universal.codes()
    text, image = plain_transformer(universal.cross_attention, 4, codes, image.expand(4, -1))
    both = torch.cat((image, text), 1)
    weight = universal.controller.weight.flatten(1)
    expected = both @ weight.T + universal.controller.bias
    close(numbers(universal, "classes", bottom=bottom)[0], expected, 1e-12)


@torch.no_grad()
def test_a_further_class(universal):
    """It changes the others only where classes attend to each other."""
    model = AttentionUniversal(universal.config).double()
    model.load_state_dict(universal.state_dict())
    before = {attend: numbers(model, attend) for attend in fewshot3d.ATTEND}
    model.add_class("e")
    for attend, x in before.items():
        same = torch.allclose(numbers(model, attend)[:, :4], x, rtol=0, atol=1e-9)
        assert same == (attend != "classes")


def test_attention_comes_from_a_run_folder_or_is_new(tmp_path, capsys):
    config = replace(MINI, attend="classes")
    model = randomised(AttentionUniversal(config))
    folder = write_run(tmp_path / "run", AttentionUniversal, model.state_dict(), config)
    loaded = AttentionUniversal.from_pretrained(folder)
    assert loaded.config == config and capsys.readouterr().out == ""
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in loaded.state_dict().items())
    plain = randomised(swin_unetr3d.SwinUNETR(swin_unetr3d.Config(12)))
    torch.save(swin_unetr3d.to_official(plain.state_dict()), tmp_path / "model.pt")
    options = {"codes": "random", "attend": "chain"}
    loaded = AttentionUniversal.from_pretrained(tmp_path, ["liver"], **options)
    told = "new and untrained: organ_embedding, precls_conv, GAP, controller, cross_attention\n"
    assert capsys.readouterr().out.endswith(told) and loaded.config.attend == "chain"


def test_other_models_are_refused(universal, tmp_path):
    state, name = universal.state_dict(), "cross_attention.img_norm2.bias"
    write_run(tmp_path / "run", UniversalSwinUNETR, state, MINI)
    with pytest.raises(ValueError, match="holds UniversalSwinUNETR in format 1, not Attention"):
        AttentionUniversal.from_pretrained(tmp_path / "run")
    state.pop(name)
    torch.save({"net": state}, tmp_path / "epoch.pth")
    with pytest.raises(ValueError, match=f"1 tensors do not fit: {name} is missing"):
        AttentionUniversal.from_pretrained(tmp_path / "epoch.pth")
    with pytest.raises(ValueError, match="attend 'image' is none of token, chain, classes"):
        AttentionUniversal(replace(MINI, attend="image"))
    with pytest.raises(ValueError, match="attend 'chain' takes 4 volumes at a time, .* not 5"):
        numbers(universal, "chain", bottom=torch.randn(5, 192, 2, 2, 2).double())


# --- a text beside the volume --------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("variant", ["plain", "attention", "concat", "attention_contrast_concat"])
@torch.no_grad()
def test_golden_outputs_of_the_text_options(variant, tmp_path, capsys, parity):
    arrays, meta, every = golden("fewshot3d_btcv")
    state = state_of(arrays, meta, official_names(meta, every, variant))
    torch.save({"epoch": 9, "best_acc": 0.5, "state_dict": state}, tmp_path / "model_final.pt")
    model = TextSwinUNETR.from_pretrained(tmp_path / "model_final.pt")
    assert model.config == fewshot3d.TextConfig(12, **meta["variants"][variant])
    told = capsys.readouterr().out
    assert "untrained" not in told and "decoder5" not in told
    found, part = {}, slice(None if model.config.contrast else 1)  # its loss is of both volumes
    volume, text = (torch.from_numpy(arrays[f"in/{name}"][part]) for name in ("image", "text"))
    model.decoder5.register_forward_pre_hook(lambda _, x: found.update(decoder5_in=(x[0], ())))
    logits, contrast = model(volume, text)
    found["logits"] = logits, (slice(1, None, 8), slice(2, None, 8), slice(3, None, 8))
    # Told of the variant that has all.
    limits = meta["float32_vs_float64_max_abs"]
    limits = {name: limits[f"attention_contrast_concat/{name}"] for name in found}
    deviation = compare(found, arrays, limits, part, f"out/{variant}/")
    if variant == "attention_contrast_concat":
        parity("fewshot3d", "text, all options, logits", STUDY, float32=deviation)
    assert (contrast is None) != model.config.contrast
    if contrast is not None:  # cosines of hundreds of numbers, which round by sqrt(n) * 6e-8
        close(contrast, torch.from_numpy(arrays[f"out/{variant}/contrast_loss"]), 5e-6)


def text_model(**options) -> TextSwinUNETR:
    return randomised(TextSwinUNETR(replace(TEXT, **options)))


@pytest.fixture(scope="module")
def every():
    return text_model(**ALL)


@pytest.fixture
def inputs():
    """Three windows, a text."""
    generator = torch.Generator().manual_seed(0)
    windows = torch.rand(3, 1, *SIDES, generator=generator)
    return windows, F.normalize(torch.randn(512, generator=generator), dim=0)


@torch.no_grad()
def test_a_text_serves_all_windows_of_a_volume(every, inputs):
    """The study's served four at a time, and it stopped where there were fewer."""
    windows, text = inputs
    alone = torch.cat([every(window[None], text)[0] for window in windows])
    forms = text, text[None], text.expand(3, 512)
    for logits, _ in (every(windows, form) for form in forms):
        close(logits, alone, 2e-5 * alone.abs().max().item())
    other, _ = every(windows[:1], text.flip(0))
    assert (other - alone[:1]).abs().max() > 0.01
    image = torch.rand(1, 96, 32, 80, generator=torch.Generator().manual_seed(1))
    logits = volumes.sliding_window(lambda x: every(x, text)[0], image, SIDES, batch=2)
    assert logits.shape == (3, *image.shape[1:]) and logits.isfinite().all()


def test_the_contrast_is_a_cosine_and_teaches_text_and_image():
    model, generator = text_model(contrast=True), torch.Generator().manual_seed(0)
    bottom = torch.randn(2, 192, 3, 1, 1, generator=generator).requires_grad_()
    texts = torch.randn(2, 512, generator=generator)
    _, loss = model.fuse(bottom, texts)
    about = F.leaky_relu(model.text_fc_contrast(texts), 0.01)
    cosines = [(a @ b) / a.norm() / b.norm() for a, b in zip(about, bottom.flatten(1), strict=True)]
    close(loss, 1 - (cosines[0] + cosines[1]) / 2, 1e-6)
    loss.backward()
    assert model.text_fc_contrast.weight.grad.any() and bottom.grad.any()


def test_whose_text_attention_reads():
    """As in the study that of the contrast, or its own. What is idle is not trained."""
    found, generator = {}, torch.Generator().manual_seed(0)
    bottom = torch.randn(2, 192, 3, 1, 1, generator=generator)
    text = torch.randn(2, 512, generator=generator)
    for shared in (True, False):
        model = text_model(**ALL, shared=shared)
        fused, _ = model.fuse(bottom, text)  # the contrast is in no loss here
        fused.square()[:, :, 0].sum().backward()
        grads = {n: p.grad is not None and p.grad.any() for n, p in model.named_parameters()}
        idle = {n.split(".")[0] for n, p in model.named_parameters() if not p.requires_grad}
        assert not any(grads[f"{part}.weight"] for part in idle)
        assert idle == {"text_fc_concat"} | ({"text_fc_attention"} if shared else set())
        found[shared] = grads["text_fc_attention.weight"], grads["text_fc_contrast.weight"]
    assert found == {True: (False, True), False: (True, False)}
    assert all(p.requires_grad for p in text_model(attention=True).parameters())
    assert all(p.requires_grad for p in text_model(concat=True).parameters())


def save_plain(folder, state=None):
    """A file of Swin UNETR with three classes, and its model."""
    model = randomised(swin_unetr3d.SwinUNETR(swin_unetr3d.Config(12, num_classes=3)))
    torch.save({"state_dict": swin_unetr3d.to_official(model.state_dict())}, folder / "model.pt")
    return model


@torch.no_grad()
def test_concat_begins_as_the_plain_model(inputs, tmp_path, capsys):
    """Whatever the text says. With the image's weights repeated, as in the study, it does not."""
    (windows, text), plain = inputs, save_plain(tmp_path)
    expected = plain(windows[:1])
    for repeat in (False, True):
        model = TextSwinUNETR.from_pretrained(tmp_path, concat=True, repeat=repeat)
        told = capsys.readouterr().out.splitlines()[1:]
        weights = "those for the image" if repeat else "0"
        assert told[0] == f"{tmp_path}: decoder5's weights for the text: {weights}"
        assert told[1] == f"{tmp_path}: new and untrained: text_fc_concat" and len(told) == 2
        old = plain.decoder5.transp_conv.weight
        new = model.decoder5.transp_conv.weight
        assert torch.equal(new, torch.cat((old, old if repeat else torch.zeros_like(old))))
        logits, _ = model(windows[:1], text)
        # Channels times 0 are added, perhaps in another order: float32's rounding of such sums.
        rounding = 1e-5 * expected.abs().max().item()
        difference = (logits - expected).abs().max().item()
        assert difference > 100 * rounding if repeat else difference <= rounding


def test_a_plain_file_gets_any_option(tmp_path, capsys):
    plain = save_plain(tmp_path)
    with torch.no_grad():
        volume = torch.rand(1, 1, 64, 32, 32)
        model = TextSwinUNETR.from_pretrained(tmp_path)
        assert "untrained" not in capsys.readouterr().out
        assert torch.equal(model(volume, torch.zeros(512))[0], plain(volume))  # of any size, too
    model = TextSwinUNETR.from_pretrained(tmp_path, 2, **ALL, image_size=SIDES)
    assert model.config == replace(TEXT, num_classes=2, **ALL)
    new = "text_fc_contrast, text_fc_attention, cross_attention, text_fc_concat, out"
    told = capsys.readouterr().out.splitlines()[-1].split("new and untrained: ")[1]
    assert set(told.split(", ")) == set(new.split(", "))
    state = model.state_dict()
    for name, t in plain.state_dict().items():
        kept = name.split(".")[0] != "out" and name != "decoder5.transp_conv.weight"
        assert torch.equal(t, state[name]) == kept if t.shape == state[name].shape else not kept


def test_the_encoder_alone(tmp_path, capsys):
    state = swin_unetr3d.to_official(save_plain(tmp_path).state_dict())
    encoder = {n: t for n, t in state.items() if n.startswith("swinViT.")}
    torch.save({"state_dict": encoder}, tmp_path / "model_swinvit.pt")
    (tmp_path / "model.pt").unlink()
    with pytest.raises(ValueError, match="encoder alone, without a decoder; give num_classes"):
        TextSwinUNETR.from_pretrained(tmp_path, **ALL)
    capsys.readouterr()
    model = TextSwinUNETR.from_pretrained(tmp_path, 5, **ALL)
    out = capsys.readouterr().out
    assert model.config == fewshot3d.TextConfig(12, num_classes=5, **ALL)
    assert "decoder5" in out and "cross_attention" in out and "weights for the text" not in out


def test_own_checkpoints_keep_their_options(every, tmp_path, capsys):
    folder = write_run(tmp_path / "run", TextSwinUNETR, every.state_dict(), every.config)
    loaded = TextSwinUNETR.from_pretrained(folder)
    assert loaded.config == every.config and capsys.readouterr().out == ""
    assert all(torch.equal(t, every.state_dict()[n]) for n, t in loaded.state_dict().items())
    named = TextSwinUNETR.from_pretrained(folder, classes=("background", "liver", "spleen"))
    assert named.config.classes[1] == "liver"
    state = swin_unetr3d.to_official(every.state_dict())
    for part in ("cross_attention", "text_fc_concat", "text_fc_contrast"):
        rest = {n: t for n, t in every.state_dict().items() if not n.startswith(part)}
        write_run(tmp_path / "run", TextSwinUNETR, rest, every.config)
        with pytest.raises(ValueError, match=rf"tensors do not fit: {part}\..* is missing"):
            TextSwinUNETR.from_pretrained(folder)
    name = "cross_attention.text_norm1.weight"
    torch.save({n: t for n, t in state.items() if n != name}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=f"1 tensors do not fit: {name} is missing"):
        TextSwinUNETR.from_pretrained(tmp_path / "model.pt", image_size=SIDES)


@torch.no_grad()
def test_what_does_not_fit_is_told(every):
    volume, text = torch.zeros(2, 1, *SIDES), torch.zeros(512)
    for wrong in (torch.zeros(4, 512), torch.zeros(27), torch.zeros(2, 1, 512)):
        with pytest.raises(ValueError, match=r"text is \(.*\), expected \(512,\) or \(2,512"):
            every(volume, wrong)
    with pytest.raises(ValueError) as caught:
        every(volume.transpose(2, 3), text)
    told = "the volume's sides are (32, 96, 32), the text options take (96, 32, 32)"
    assert str(caught.value) == told
    with pytest.raises(
        ValueError, match=r"image_size \(64, 64, 64\): 8 voxels at the bottleneck, not"
    ):
        TextSwinUNETR(replace(TEXT, attention=True, image_size=(64, 64, 64)))
