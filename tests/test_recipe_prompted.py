"""CLIPSeg and BiomedCLIPSeg in training: parts, cached features, negatives, prompt study."""

import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_same_scores, command, rows, write_run
from safetensors.torch import load_file

import biomedclipseg
import clipseg
import data
import train
from engine import evaluate
from imaging import layouts
from options import resolve
from recipes import FAMILIES, cached_features, cris, images
from recipes import clipseg as clipseg_recipes
from tokenizer import CHARACTERS, CLIPTokenizer, WordPieceTokenizer

pytestmark = pytest.mark.numeric

MODELS = {"clipseg": clipseg.CLIPSeg, "biomedclipseg": biomedclipseg.BiomedCLIPSeg}


@pytest.fixture
def options(options, tmp_path):
    """A CLIPSeg, with nothing kept from other tests."""
    return replace(options, model="clipseg", overlays=0, cache=str(tmp_path / "cache"))


def start(options) -> dict[str, torch.Tensor]:
    """The weights that a run with these options begins with."""
    settings = FAMILIES[options.model].protocols["default"]
    torch.manual_seed(options.seed)
    model = FAMILIES[options.model].load("none", "mini", settings, {"image_size": 64}, None)
    return {name: t.clone() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("what", ["all", "decoder", "adapters", "lora"])
def test_what_trains(model, what, options, capsys):
    options = replace(options, model=model, train=what, lora_rank=2 if what == "lora" else None)
    before = start(options)
    summary = train.run(options)
    said = capsys.readouterr().out
    after = load_file(f"{options.out}/best.safetensors")
    new = {name for name in after if "adapter" in name}
    assert set(after) - new == set(before)  # plain names, also after LoRA
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    if what == "adapters":  # fc1, fc2 with biases behind attention and MLP, and of the condition
        assert not changed and len(new) == 4 * (2 * (2 + 2) + 1)
        return
    decoder = {name for name in before if name.startswith("decoder.")}
    assert decoder <= changed
    towers = changed - decoder
    if what == "decoder":
        assert not towers
        assert f"training {sum(before[name].numel() for name in decoder):,} of " in said
    elif what == "lora":
        assert towers and all(after[name].ndim == 2 for name in towers)
        for name in towers:
            assert torch.linalg.matrix_rank((after[name] - before[name]).double(), 1e-3) <= 2
    else:
        assert any("embed" in name for name in towers) and any("norm" in name for name in towers)
    loaded = MODELS[model].from_pretrained(options.out)
    assert torch.equal(
        loaded.state_dict()["decoder.film_mul.weight"], after["decoder.film_mul.weight"]
    )
    again = train.Options(
        weights=options.out, eval=True, test=options.data, out=options.out + "-again",
        cache=options.cache, workers=0, overlays=0,
    )  # fmt: skip
    assert_same_scores(train.run(again)["tests"], summary["tests"])


@pytest.mark.parametrize("model", MODELS)
def test_all_that_is_said_to_train_gets_a_gradient(model, demo, options):
    settings = FAMILIES[model].protocols["default"]
    net = FAMILIES[model].load("none", "mini", settings, {"image_size": 64}, None)
    recipe = FAMILIES[model].recipe(net, settings)
    dataset = data.open_dataset(layouts.read_entries(demo, "train"), options.cache)
    items = data.Items(dataset, "p6", recipe.inputs, train=True, seed=0)
    batch = torch.utils.data.default_collate([items[0, i] for i in range(4)])
    recipe.loss(recipe.forward(net, batch), batch)[0].backward()
    for name, parameter in net.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize("model", MODELS)
def test_kept_features_train_as_their_images_do(model, options, untested, capsys):
    """Same losses to 1e-3; a second run computes nothing; other weights compute anew."""
    plain = replace(options, model=model, recipe="origin", batch_size=16, train="decoder", epochs=2)
    plain = replace(plain, schedule="constant")
    train.run(replace(plain, keep_features=False, out=options.out + "-plain"))
    train.run(replace(plain, keep_features=True))
    assert "caching 36 image features" in capsys.readouterr().out
    pair = [rows(f"{options.out}{end}/metrics.csv") for end in ("-plain", "")]
    for a, b in zip(*pair, strict=True):
        for key in ("train_loss", "val_loss"):
            assert float(a[key]) == pytest.approx(float(b[key]), abs=1e-3)
    train.run(replace(plain, keep_features=True, out=options.out + "-2"))
    assert "image features" not in capsys.readouterr().out
    assert rows(f"{options.out}-2/metrics.csv") == rows(f"{options.out}/metrics.csv")
    train.run(replace(plain, keep_features=True, seed=1, out=options.out + "-3"))
    assert "caching 36 image features" in capsys.readouterr().out


@pytest.mark.slow
def test_kept_features_change_no_loss_at_full_size(real_data, tmp_path):
    """CLIPSeg rd64-refined on Kvasir-SEG with its prompts, decoder alone, float16 on the way."""
    root = tmp_path / "kvasir"
    (root / "anns").mkdir(parents=True)
    for kind in ("images", "masks"):
        (root / kind).symlink_to(real_data / "kvasir_polyp" / kind)
    for split, count in {"train": 24, "val": 6}.items():
        listed = json.loads((real_data / f"kvasir_polyp/anns/{split}.json").read_text())
        (root / f"anns/{split}.json").write_text(json.dumps(listed[:count]))
    table = []
    for keep in (False, True):
        options = train.Options(
            model="clipseg", weights="none", data=[str(root)], recipe="origin", batch_size=8,
            epochs=3, keep_features=keep, out=str(tmp_path / f"run{keep}"),
            cache=str(tmp_path / "cache"), workers=0,
        )  # fmt: skip
        train.run(options)
        table.append(rows(f"{options.out}/metrics.csv"))
    print(*table, sep="\n")
    for a, b in zip(*table, strict=True):
        for key in ("train_loss", "val_loss"):
            assert float(a[key]) == pytest.approx(float(b[key]), abs=1e-3)
    assert float(table[0][-1]["train_loss"]) < float(table[0][0]["train_loss"]) - 0.002


def test_kept_views_change_no_loss_and_mirror_the_prompts_too(options, untested):
    views = replace(
        options, model="clipseg", train="decoder", prompt="p6", views=["original", "hflip"],
        feature_dtype="float32", batch_size=1, max_steps=60,
    )  # fmt: skip
    losses = []
    for keep, dtype in ((True, "float32"), (False, None)):
        out = f"{options.out}-{keep}"
        train.run(replace(views, keep_features=keep, feature_dtype=dtype, out=out))
        losses.append([float(row["train_loss"]) for row in rows(train.Path(out) / "metrics.csv")])
    # One image and one text at a time: the same operations, so that little but rounding is left.
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_kept_features_are_those_of_the_image_and_the_text(demo, options):
    """Row by row what the encoders give, for entries that share an image too."""
    entries = layouts.read_entries(demo, "train")[:4]
    entries.append(replace(entries[1], name="again", prompts={"p6": ["another text"]}))
    dataset = data.open_dataset(entries, options.cache)
    settings = clipseg_recipes.CLIPSEG["origin"]
    net = clipseg_recipes.load_clipseg("none", "mini", settings, {"image_size": 64}, None).eval()
    recipe = clipseg_recipes.clipseg_recipe(net, settings)
    asked = replace(options, prompt="p6", train="decoder", views=["original"])
    asked = replace(asked, feature_dtype="float16")
    kept = cached_features.cache_features(
        recipe, net, clipseg_recipes.clipseg_towers, [dataset], asked
    )
    for i in range(5):
        plain, short = (
            data.Items(dataset, "p6", r.inputs, train=True, seed=0)[0, i] for r in (recipe, kept)
        )
        assert torch.equal(plain["mask"], short["mask"])
        with torch.no_grad():
            expected = net(plain["image"][None], plain["tokens"][None])
            found = net.decode(
                short["features"][None].float(), condition=short["condition"][None].float()
            )
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)  # float16 on the way


@pytest.mark.parametrize(
    "what",
    [
        {"train": "lora", "lora_rank": 2},
        {"train": "adapters"},
        {"train": "decoder", "keep_features": True},
    ],
)
def test_a_resumed_run_ends_as_one_that_never_stopped(what, options, untested, monkeypatch):
    whole = replace(options, **what)
    cut, end = replace(whole, out=whole.out + "-cut"), train.Run.end_epoch

    def end_and_stop(run):
        end(run)
        raise KeyboardInterrupt

    train.run(whole)
    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "end_epoch", end_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train.run(cut)
    assert len(rows(f"{cut.out}/metrics.csv")) == 1
    train.run(replace(cut, resume=True))
    assert rows(f"{cut.out}/metrics.csv") == rows(f"{whole.out}/metrics.csv")
    ours, theirs = (load_file(f"{o.out}/best.safetensors") for o in (cut, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_of_biomedclipseg_carries_its_vocabulary(options, tmp_path):
    folder = tmp_path / "biomedclip"
    config = replace(biomedclipseg.VARIANTS["mini"], image_size=64)
    model = biomedclipseg.BiomedCLIPSeg(config)
    write_run(folder, biomedclipseg.BiomedCLIPSeg, model.state_dict(), config)
    (folder / "vocab.txt").write_text("\n".join(CHARACTERS), encoding="utf-8")
    options = replace(options, model="biomedclipseg", variant=None, weights=str(folder), epochs=1)
    options = replace(options, size=None)
    summary = train.run(options)
    shutil.rmtree(folder)  # the run stands on its own
    again = replace(options, weights=options.out, out=options.out + "-again", eval=True)
    assert_same_scores(train.run(again)["tests"], summary["tests"])
    model = biomedclipseg.BiomedCLIPSeg.from_pretrained(options.out)
    assert model.config.vocabulary == f"{train.Path(options.out).resolve()}/vocab.txt"


@pytest.mark.parametrize(
    "options_too, said",
    [
        (["--keep-features", "--train", "all"], "--keep-features needs --train decoder"),
        (["--model", "cris", "--keep-features", "--train", "decoder"], "--keep-features needs"),
        (["--train", "lora", "--lora-rank", "0"], "at least 1"),
        (["--model", "cris", "--train", "adapters"], "CRIS has no place"),
        (["--negatives", "0.5", "--prompt", "p1"], "--negatives needs prompts that differ"),
        (["--threshold", "half"], "half"),
    ],
)
def test_what_cannot_be_is_one_line(options_too, said, demo, tmp_path, monkeypatch, capsys):
    words = ["--model", "clipseg", "--variant", "mini", "--weights", "none", "--data", demo]
    words += [
        "--out",
        tmp_path / "run",
        "--cache",
        tmp_path / "cache",
        "--workers",
        0,
        "--size",
        64,
    ]
    code, _, err = command(monkeypatch, capsys, train, *words, *options_too)
    assert code == 2 and said in err and err.strip().count("\n") == 0, err


def test_negatives_ask_for_what_is_not_there(demo, options):
    dataset = data.open_dataset(layouts.read_entries(demo, "train"), options.cache)

    def inputs(sample, train, rng):
        return sample

    n, found = len(dataset), 0
    own = [{text for texts in e.prompts.values() for text in texts} for e in dataset.entries]
    items = data.Items(dataset, "p6", inputs, train=True, seed=0, negatives=0.3)
    for epoch in range(10):
        for i in range(n):
            sample = items[epoch, i]
            asked_for_another = sample["prompt"] not in own[i]
            assert asked_for_another == (not sample["mask"].any())
            found += asked_for_another
    assert abs(found / (10 * n) - 0.3) < 4 * (0.3 * 0.7 / (10 * n)) ** 0.5
    never = data.Items(dataset, "p6", inputs, train=False, seed=0, negatives=1.0)
    assert all(never[0, i]["mask"].any() for i in range(n))


def test_the_prompt_study_scores_as_a_test_of_each_type_does(options, capsys):
    run = replace(options, epochs=1)
    train.run(run)
    asked = replace(
        run, weights=run.out, variant=None, eval=True, epochs=0, data=[], test=options.data
    )
    study = train.run(replace(asked, prompt_study=True, out=run.out + "-study"))["tests"]["demo"]
    table = capsys.readouterr().out
    assert list(study) == ["p0", "p1", "p2", "p3", "p4", "p5", "p6"]
    for kind in ("p0", "p3", "p6"):
        (one,) = train.run(replace(asked, prompt=kind, out=f"{run.out}-{kind}"))["tests"].values()
        assert study[kind]["dice"]["mean"] == pytest.approx(one["dice"]["mean"], abs=1e-6)
        assert f"{kind}   Dice {one['dice']['mean']:.4f}" in table
    saved = json.loads((train.Path(run.out + "-study") / "test/summary.json").read_text())
    assert saved["tests"]["demo"] == json.loads(json.dumps(study))


def test_a_threshold_is_found_in_validation(options, demo, untested):
    options = replace(options, threshold="auto", epochs=1)
    train.run(options)
    model = clipseg.CLIPSeg.from_pretrained(options.out)
    recipe = clipseg_recipes.clipseg_recipe(model, clipseg_recipes.CLIPSEG["default"])
    val = data.open_dataset(layouts.read_entries(demo, "val"), options.cache)
    options = replace(options, prompt="p6")
    dice = {}
    for threshold in np.arange(1, 20) / 20:
        model.config = replace(model.config, threshold=float(threshold))
        scores = evaluate.evaluate(model, recipe, val, resolve(options), False, "")
        dice[float(threshold)] = np.mean([row["dice"] for row in scores])
    saved = json.loads((train.Path(options.out) / "config.json").read_text())
    assert dice[saved["config"]["threshold"]] == max(dice.values())


def test_towers_that_no_decoder_reads_are_not_tested():
    settings = clipseg_recipes.BIOMEDCLIPSEG["origin"]
    with pytest.raises(ValueError, match="--weights is missing: BiomedCLIP"):
        clipseg_recipes.load_biomedclipseg(None, None, settings, {}, None)


def test_a_study_of_prompts_needs_a_type_of_all():
    some = SimpleNamespace(entries=[SimpleNamespace(prompts=p) for p in ({"p1": ["a"]}, {})])
    with pytest.raises(ValueError, match="busi has no type of prompt that all entries have"):
        recipe = SimpleNamespace(sources=images.common_prompt_types)
        evaluate.prompt_study(None, recipe, {"busi": some}, None)


# --- prompts as the model sees them ---------------------------------------------------------------


def with_prompts(demo, *prompts, split="train"):
    """Entries of the demo set with other texts, of type p1."""
    entries = layouts.read_entries(demo, split)
    return [replace(e, prompts={"p1": [text]}) for e, text in zip(entries, prompts, strict=False)]


def with_texts(demo, root, texts, kind="p1"):
    """A copy of the demo set whose n-th image is asked for by the n-th text, and so on."""
    (root / "anns").mkdir(parents=True)
    for folder in ("images", "masks"):
        (root / folder).symlink_to(demo / folder)
    for split in ("train", "val", "test"):
        listed = json.loads((demo / f"anns/{split}.json").read_text())
        for i, entry in enumerate(listed):
            entry["prompts"] = {kind: texts[i % len(texts)]}
        (root / f"anns/{split}.json").write_text(json.dumps(listed))
    return root


def ids(tokenizer, text):
    return tuple(tokenizer(text)[0].tolist())


ONE_PROMPT = ["polyp", "Polyp", "POLYP", "polyp ", " polyp", "pol&#121;p"]


def test_absent_prompts_have_other_tokens(demo, options):
    """Whatever the texts look like; CLIP's tokenizer unescapes HTML, too."""
    texts = [*ONE_PROMPT, "Flat  Lesion", "flat lesion"]
    dataset = data.open_dataset(with_prompts(demo, *texts), options.cache)
    tokenizer = CLIPTokenizer(77)
    dataset.compare_prompts_by(tokenizer)
    for i, text in enumerate(texts):
        for seed in range(20):
            absent = dataset.absent_prompt(i, "p1", np.random.default_rng(seed))
            assert absent in texts and ids(tokenizer, absent) != ids(tokenizer, text)
    dataset.check_negatives("p1")
    part = dataset.subset([*range(6)])
    with pytest.raises(ValueError, match="--negatives needs prompts that differ to the model"):
        part.check_negatives("p1")
    with pytest.raises(ValueError, match="--negatives needs prompts that differ to the model"):
        part.absent_prompt(3, "p1", np.random.default_rng(0))


def test_prompts_that_are_cut_to_the_same_tokens_are_the_same(demo, options):
    texts = ["one small red polyp on the left", "one small red polyp on the right"]
    dataset = data.open_dataset(with_prompts(demo, *texts), options.cache)
    dataset.compare_prompts_by(CLIPTokenizer(7))  # start, five words, end
    with pytest.raises(ValueError, match="needs prompts that differ"):
        dataset.check_negatives("p1")
    dataset.compare_prompts_by(CLIPTokenizer(17))
    dataset.check_negatives("p1")
    assert dataset.absent_prompt(0, "p1", np.random.default_rng(0)) == texts[1]


def test_unknown_words_are_one_token_to_bert(demo, options):
    """Words that the vocabulary lacks are all [UNK]."""
    vocabulary = [*CHARACTERS[:5], "polyp"]
    dataset = data.open_dataset(with_prompts(demo, "adenoma", "naevus"), options.cache)
    dataset.compare_prompts_by(WordPieceTokenizer(vocabulary, 16))
    with pytest.raises(ValueError, match="needs prompts that differ"):
        dataset.check_negatives("p1")


def test_without_a_tokenizer_case_and_blanks_do_not_count(demo, options):
    dataset = data.open_dataset(with_prompts(demo, *ONE_PROMPT[:5]), options.cache)
    with pytest.raises(ValueError, match="needs prompts that differ"):
        dataset.absent_prompt(0, "p1", np.random.default_rng(0))


def test_an_absent_prompt_is_found_among_several_texts(demo, options):
    """Also if the draw of a text hits one that is present each time."""
    entries = with_prompts(demo, "polyp", "polyp")
    entries[1] = replace(entries[1], prompts={"p1": ["polyp"] * 99 + ["lesion"]})
    dataset = data.open_dataset(entries, options.cache)
    for seed in range(5):
        assert dataset.absent_prompt(0, "p1", np.random.default_rng(seed)) == "lesion"


def test_texts_of_a_batch_are_counted_as_the_model_sees_them(demo, options):
    dataset = data.open_dataset(with_prompts(demo, *ONE_PROMPT[:4]), options.cache)
    dataset.compare_prompts_by(CLIPTokenizer(77))
    assert images.texts_per_batch(dataset, "p1", 8) == pytest.approx(1)
    dataset = data.open_dataset(with_prompts(demo, *ONE_PROMPT[:3], "lesion"), options.cache)
    dataset.compare_prompts_by(CLIPTokenizer(77))
    two = 1 - 0.25**2 + 1 - 0.75**2  # three quarters of all draws, and a quarter
    assert images.texts_per_batch(dataset, "p1", 2) == pytest.approx(two)


@pytest.mark.parametrize(
    "texts, frozen", [(ONE_PROMPT, True), (["polyp", "lesion", "fold"], False)]
)
def test_cris_keeps_its_text_norm_where_all_prompts_are_the_same(demo, options, texts, frozen):
    dataset = data.open_dataset(with_prompts(demo, *texts * 2), options.cache)
    settings = replace(cris.PROTOCOLS["default"], prompt="p1")
    model = cris.load_cris("none", "mini", settings, {"image_size": 64}, dataset)
    assert model.config.freeze_text_norm is frozen
    model.train()
    assert model.neck.txt_proj[1].training is not frozen
    given = {"image_size": 64, "freeze_text_norm": not frozen}  # of a recipe: it decides
    model = cris.load_cris("none", "mini", settings, given, dataset)
    assert model.config.freeze_text_norm is not frozen


def test_negatives_are_refused_before_training(demo, tmp_path, monkeypatch, capsys):
    root = with_texts(demo, tmp_path / "set", ["polyp", "Polyp", "POLYP "])
    words = ["--model", "clipseg", "--variant", "mini", "--weights", "none", "--data", root]
    words += ["--out", tmp_path / "run", "--cache", tmp_path / "cache", "--workers", 0]
    words += ["--size", 64, "--prompt", "p1", "--negatives", 0.001]
    code, _, err = command(monkeypatch, capsys, train, *words)
    assert code == 2 and "set: --negatives needs prompts that differ to the model" in err
    assert err.strip().count("\n") == 0 and not (tmp_path / "run/last.pt").exists()


def test_types_are_read_in_any_case_and_cut_prompts_are_said(demo, tmp_path, monkeypatch, capsys):
    """76 words of one token fit between start and end in 78, not in CLIP's 77."""
    root = with_texts(demo, tmp_path / "set", ["red " * 76, "red " * 75, "blue"], kind="p3")
    words = ["--model", "clipseg", "--variant", "mini", "--weights", "none", "--data", root]
    words += ["--out", tmp_path / "run", "--cache", tmp_path / "cache", "--workers", 0]
    words += ["--size", 64, "--max-steps", 1, "--batch-size", 4, "--device", "cpu"]
    code, said, err = command(monkeypatch, capsys, train, *words, "--prompt", " P3, p3")
    assert code == 0, err
    assert json.loads((tmp_path / "run/config.json").read_text())["options"]["prompt"] == "p3,p3"
    (line,) = [line for line in said.splitlines() if " cut " in line]
    assert re.match("prompt p3,p3: 1 of 3 texts are cut at the model's 77 tokens; “red red", line)
    assert line.endswith("has 78 and ends after “red red red”")
    code, _, err = command(monkeypatch, capsys, train, *words, "--prompt", "P3 p1")
    assert code == 2 and "--prompt 'P3 p1': write prompt types like p6 or p6,p1" in err


def test_a_run_that_was_trained_on_a_literal_type_keeps_its_prompt(options, tmp_path):
    """Older runs took P6 for a text: they are resumed and tested as they were trained."""
    assert resolve(replace(options, prompt="P6")).prompt == "p6"
    assert resolve(replace(options, prompt="P6", resume=True)).prompt == "P6"
    config = replace(clipseg.VARIANTS["mini"], image_size=64)
    state = clipseg.CLIPSeg(config).state_dict()
    old = {"options": {"prompt": "P6", "data": []}}
    run = write_run(tmp_path / "old", clipseg.CLIPSeg, state, config, **old)
    again = replace(options, variant=None, weights=str(run), eval=True, prompt=None)
    assert resolve(again).prompt == "P6"
