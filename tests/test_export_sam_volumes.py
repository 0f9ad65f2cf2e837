"""The exported networks of SAM and of models of volumes, compared with the models themselves."""

import warnings
from dataclasses import replace

import pytest
import torch
from conftest import randomised

import fewshot3d
import sam_decoder
import swin_unetr3d
import universal
from exporting import sam_networks, volume_networks
from prediction.models import LoadedModel, Weights
from prediction.onnx_networks import OnnxSAM, Session

WINDOW = {"image_size": (64, 32, 32)}
TEXT_WINDOW = {"image_size": (96, 32, 32)}
LIMIT = 1e-4  # of the output's largest absolute value


def loaded(name, model) -> LoadedModel:
    return LoadedModel(Weights(name, name, {}), randomised(model), recipe=None)


def sam() -> LoadedModel:
    return loaded("sam_decoder", sam_decoder.SAM(sam_decoder.VARIANTS["mini"]))


def swin(**config) -> LoadedModel:
    config = replace(swin_unetr3d.VARIANTS["mini"], **WINDOW, **config)
    return loaded("swin_unetr3d", swin_unetr3d.SwinUNETR(config))


def few_shot(attend) -> LoadedModel:
    config = replace(fewshot3d.VARIANTS["mini"], attend=attend, **WINDOW)
    return loaded("fewshot3d", fewshot3d.AttentionUniversal(config))


def universal_model() -> LoadedModel:
    config = replace(universal.UNIVERSAL_VARIANTS["mini"], **WINDOW)
    return loaded("universal", universal.UniversalSwinUNETR(config))


def text_model(variant) -> LoadedModel:
    config = replace(fewshot3d.TEXT_VARIANTS[variant], **TEXT_WINDOW)
    text = torch.randn(512, generator=torch.Generator().manual_seed(0))
    return loaded("text_swin_unetr", fewshot3d.TextSwinUNETR(config, text))


def to_program(part) -> torch.export.ExportedProgram:
    """Return a part as a program of torch.export."""
    axes = []
    for name in part.inputs:
        sizes = part.dynamic.get(name, {})
        axes.append({axis: torch.export.Dim(size) for axis, size in sizes.items()})
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(
            part.module, tuple(part.inputs.values()), dynamic_shapes=tuple(axes), strict=False
        )


def to_session(part, program, path) -> Session:
    """Write the program of a part as an ONNX file, and open it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = torch.onnx.export(
            program,
            input_names=[*part.inputs],
            output_names=[*part.outputs],
            dynamo=True,
            verbose=False,
        )
    network.save(path)
    return Session(path, ["CPUExecutionProvider"])


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= LIMIT * theirs.abs().max()


def prompts(B, Q, has_box, P) -> dict:
    """Return Q prompts for each of B images, with a box or P points or both."""
    random = torch.Generator().manual_seed(P)
    arguments = {}
    if has_box:
        corner = torch.rand(B, Q, 2, generator=random) * 100
        arguments["boxes"] = torch.cat([corner, corner + 50], 2)
    if P:
        arguments["points"] = torch.rand(B, Q, P, 2, generator=random) * 256
        arguments["labels"] = torch.randint(-1, 2, (B, Q, P), generator=random)
    return arguments


# Numbers of images and prompts, whether the prompts have a box, and their number of points.
FORMS = [(1, 1, True, 0), (1, 3, True, 0), (3, 1, False, 1), (2, 2, False, 3), (2, 1, True, 2)]


def decoded(decoder, features, arguments):
    """Return masks and IoU of a decoder for prompts of `SAM.decode`."""
    config = sam_decoder.VARIANTS["mini"]
    model = OnnxSAM(sam_decoder.SAM, config, {"decoder": decoder})
    return model.decode(features, **arguments)


def assert_decodes(decoder, model):
    """Check a decoder against SAM's for all forms of prompts."""
    random = torch.Generator().manual_seed(0)
    for form in FORMS:
        features = torch.randn(form[0], 64, 16, 16, generator=random)
        arguments = prompts(*form)
        with torch.no_grad():
            expected = model.decode(features, **arguments)
            outputs = decoded(decoder, features, arguments)
        for ours, theirs in zip(outputs, expected, strict=True):
            assert_close(ours, theirs)


def test_the_decoder_s_points_are_the_model_s_prompts():
    model = sam()
    assert_decodes(sam_networks.parts(model)[1].module, model.model)


@pytest.mark.slow
def test_sam_s_encoder_as_onnx_file_and_as_program(tmp_path):
    model = sam()
    encoder, _ = sam_networks.parts(model)
    program = to_program(encoder)
    session = to_session(encoder, program, tmp_path / "encoder.onnx")
    for B in (1, 3):
        image = torch.randn(B, 3, 256, 256)
        with torch.no_grad():
            expected = model.model.encode_image(image)
            assert_close(program.module()(image), expected)
        assert_close(session(image)[0], expected)


@pytest.mark.slow
def test_sam_s_decoder_as_onnx_file_and_as_program(tmp_path):
    model = sam()
    _, decoder = sam_networks.parts(model)
    program = to_program(decoder)
    assert_decodes(program.module(), model.model)
    assert_decodes(to_session(decoder, program, tmp_path / "decoder.onnx"), model.model)


VOLUMES = {
    "swin_unetr3d": swin,
    "swin_unetr3d, V2": lambda: swin(v2=True, in_channels=2, num_classes=1),
    "universal": universal_model,
    "fewshot3d": lambda: few_shot("token"),
    "fewshot3d, classes": lambda: few_shot("classes"),
    "text_swin_unetr": lambda: text_model("mini-all"),
    "text_swin_unetr, concat": lambda: text_model("mini-concat"),
}


def expected_logits(model: LoadedModel, image):
    with torch.no_grad():
        logits = model.model(image)
    return logits[0] if isinstance(logits, tuple) else logits


@pytest.mark.slow
@pytest.mark.parametrize("name", VOLUMES)
def test_a_window_as_onnx_file_and_as_program(name, tmp_path):
    model = VOLUMES[name]()
    image = torch.randn(3, model.config.in_channels, *model.config.image_size)
    expected = [expected_logits(model, image[:count]) for count in (1, 3)]
    (part,) = volume_networks.parts(model)
    program = to_program(part)
    session = to_session(part, program, tmp_path / "network.onnx")
    for logits, count in zip(expected, (1, 3), strict=True):
        assert logits.shape[0] == count
        assert_close(session(image[:count])[0], logits)
        with torch.no_grad():
            assert_close(program.module()(image[:count]), logits)


def random_module(module):
    """Return a module whose parameters are all random."""
    random = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=random) / 4
    return module


ATTENTION = random_module(swin_unetr3d.WindowAttention(12, 3))
TABLES = (swin_unetr3d.position_index(), swin_unetr3d.shift_masks())


@pytest.mark.parametrize(
    ("module", "shapes", "others"),
    [
        # padding, and a window smaller than 7 along one axis or all
        (ATTENTION, [(2, 14, 9, 5, 12)], (True, *TABLES)),
        (ATTENTION, [(2, 14, 9, 5, 12)], (False, *TABLES)),
        (ATTENTION, [(2, 16, 8, 8, 12)], (True, *TABLES)),
        (ATTENTION, [(2, 4, 2, 2, 12)], (True, *TABLES)),
        (random_module(swin_unetr3d.ResBlock(2, 12)), [(2, 2, 6, 5, 4)], ()),
        (random_module(swin_unetr3d.ResBlock(12, 12)), [(2, 12, 6, 5, 4)], ()),
        (random_module(swin_unetr3d.UpBlock(24, 12)), [(2, 24, 3, 2, 4), (2, 12, 6, 4, 8)], ()),
        (random_module(swin_unetr3d.UpBlock(4, 2)), [(2, 4, 3, 2, 4), (2, 2, 6, 4, 8)], ()),
    ],
)
def test_the_plain_lines_are_the_fast_paths(module, shapes, others):
    inputs = [torch.randn(shape) for shape in shapes]
    plain = volume_networks.PLAIN_LINES[type(module)]
    with torch.no_grad():
        theirs = module(*inputs, *others)
        ours = plain(module, *inputs, *others)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_model_is_unchanged_unless_it_is_traced(monkeypatch):
    model = swin()
    block = model.model.encoder1
    image = torch.randn(2, 1, 4, 4, 4)
    with torch.no_grad():
        fast = block(image)
        volume_networks.parts(model)
        assert torch.equal(block(image), fast)
        monkeypatch.setattr(volume_networks.torch.compiler, "is_compiling", lambda: True)
        assert not torch.equal(block(image), fast)


def test_a_chain_of_windows_is_refused():
    with pytest.raises(ValueError, match=r"^fewshot3d: attend is 'chain'.* cannot be exported$"):
        volume_networks.parts(few_shot("chain"))
