"""CLIPSeg against transformers: same weights, equal outputs, then time and memory.

    python benchmarks/clipseg_transformers.py                               # forward, training step
    python benchmarks/clipseg_transformers.py --data data/kvasir_polyp      # also whole epochs

Forward: evaluation mode, no gradients. For transformers the prompts are padded to 77 tokens and the
image is repeated for every prompt, as its processor and its interface need it.
Training step: our decoder alone, from cached features (recipes/cached_features.py), against the
whole model of transformers, whose towers run without gradients, too.
Epoch: one after the first, over --images images with loading; our features are in a file already.
"""

import argparse
import sys
import tempfile
from types import SimpleNamespace

import torch
from common import HEADER, ROOT, in_turns, machine, peak_memory, print_memory_rows, row

sys.path.insert(0, str(ROOT))

import clipseg  # noqa: E402
import data  # noqa: E402
from engine import command_line  # noqa: E402
from engine.ranges import POSITIVE, Number  # noqa: E402
from imaging import layouts  # noqa: E402
from losses import dice_bce  # noqa: E402
from recipes import cached_features  # noqa: E402
from recipes.clipseg import CLIPSEG, clipseg_recipe, clipseg_towers  # noqa: E402
from tokenizer import CLIPTokenizer  # noqa: E402

PROMPTS = [
    "one small pink round polyp", "a polyp", "two large red oval polyps", "a brown lesion",
    "polyp which is a projecting growth of tissue", "a white tube", "an instrument",
    "normal mucosa",
    "one medium purple polyp, located in the top left", "a dark spot",
]  # fmt: skip
ONE_PROMPT = "forward, one image, one prompt"
TEN_PROMPTS = "forward, one image, ten prompts"
STEP = "training step"
KINDS = (ONE_PROMPT, TEN_PROMPTS, STEP)


def our_model() -> clipseg.CLIPSeg:
    """Return an untrained model."""
    torch.manual_seed(0)
    return clipseg.CLIPSeg(clipseg.VARIANTS["rd64-refined"]).eval()


def official_model(ours: clipseg.CLIPSeg):
    """Return transformers' model with our weights."""
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

    vision = {"patch_size": 16}  # as on the hub; the default of the class is 32
    config = CLIPSegConfig(vision_config=vision, use_complex_transposed_convolution=True)
    model = CLIPSegForImageSegmentation(config)
    model.load_state_dict(clipseg.to_official(ours.state_dict()))
    return model.eval()


def official_logits(model, image, tokens):
    """Return logits (B,1,H,W).

    tokens (B,77): padded with the end token 49407; the padding is masked out.
    """
    end = tokens.argmax(1, keepdim=True)  # (B,1), position of the first end token
    mask = torch.arange(tokens.shape[1])[None] <= end  # (B,77)
    out = model(pixel_values=image, input_ids=tokens, attention_mask=mask.long())
    return out.logits.view(len(image), 1, *image.shape[2:])


def random_batch(size: int) -> dict:
    """Return a batch of random images and masks with real prompts."""
    torch.manual_seed(1)
    texts = [PROMPTS[i % len(PROMPTS)] for i in range(size)]
    tokens = CLIPTokenizer(77, 49407)(texts)  # (B,77)
    mask = (torch.rand(size, 1, 352, 352) > 0.5).float()
    return {"image": torch.randn(size, 3, 352, 352), "tokens": tokens, "mask": mask}


def training_step(model, logits_of, batch: dict):
    """Return a step that trains the decoder of a model, on `batch` or on the batch it is given.

    logits_of: (batch) -> logits (B,1,H,W).
    """
    optimizer = torch.optim.AdamW(model.decoder.parameters(), lr=1e-4, fused=True)

    def step(batch=batch):
        loss, _ = dice_bce(logits_of(batch), batch["mask"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def our_steps(model: clipseg.CLIPSeg, batch: dict) -> dict:
    """Return {kind of step: function to time} of our model."""
    image = batch["image"][:1]  # (1,3,352,352)
    tokens = CLIPTokenizer(77, 49407)(PROMPTS)  # (10,77)

    @torch.no_grad()
    def one_prompt():
        return model(image, tokens[:1])

    @torch.no_grad()
    def ten_prompts():
        return model(image, tokens)

    with torch.no_grad():
        features = model.encode_image(batch["image"]).half()
        condition = model.encode_text(batch["tokens"]).half()
    cached = {"features": features, "condition": condition, "mask": batch["mask"]}

    def decode(b):
        return model.decode(b["features"].float(), condition=b["condition"].float())

    step = training_step(model, decode, cached)
    return {ONE_PROMPT: one_prompt, TEN_PROMPTS: ten_prompts, STEP: step}


def official_steps(model, batch: dict) -> dict:
    """Return {kind of step: function to time} of transformers' model."""
    image = batch["image"][:1]  # (1,3,352,352)
    tokens = CLIPTokenizer(77, 49407)(PROMPTS)  # (10,77)
    repeated = image.expand(10, -1, -1, -1)  # (10,3,352,352)

    @torch.no_grad()
    def one_prompt():
        return official_logits(model, image, tokens[:1])

    @torch.no_grad()
    def ten_prompts():
        return official_logits(model, repeated, tokens)

    def whole_model(b):
        return official_logits(model, b["image"], b["tokens"])

    step = training_step(model, whole_model, batch)
    return {ONE_PROMPT: one_prompt, TEN_PROMPTS: ten_prompts, STEP: step}


def epochs(model: clipseg.CLIPSeg, steps: dict, args) -> dict:
    """Return {implementation: function that trains for one epoch, with loading}.

    steps: {implementation: training step}.
    """
    options = SimpleNamespace(
        prompt="p6",
        cache=tempfile.mkdtemp(),
        workers=args.workers,
        views=["original"],
        feature_dtype="float16",
    )
    entries = layouts.read_entries(args.data, "train")[: args.images]
    dataset = data.open_dataset(entries, options.cache)
    recipe = clipseg_recipe(model, CLIPSEG["origin"])
    cached = cached_features.cache_features(recipe, model, clipseg_towers, [dataset], options)
    batch_count = data.batches_per_epoch(len(dataset), args.batch_size)

    functions = {}
    for name, inputs in (("official", recipe.inputs), ("ours", cached.inputs)):
        items = data.Items(dataset, "p6", inputs, train=True, seed=0)
        order = data.train_batches(len(dataset), args.batch_size, 1000, 0, 0)
        batches = iter(data.make_loader(items, order, args.workers, torch.device("cpu")))

        def epoch(batches=batches, step=steps[name]):
            for _ in range(batch_count):
                step(next(batches))

        functions[name] = epoch
    return functions


def print_equal(kind: str, official, ours) -> None:
    """Print how much the logits of two functions differ. Raise AssertionError above 1e-5."""
    expected = official()
    actual = ours()
    difference = (expected - actual).abs().max()
    deviation = expected.std()
    print(
        f"{kind}: logits differ by at most {difference:.1e}; "
        f"their standard deviation is {deviation:.1e}"
    )
    torch.testing.assert_close(expected, actual, rtol=0, atol=1e-5)


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    help = "images in a training step (default: %(default)s)"
    add("--batch-size", type=POSITIVE, default=8, metavar="N", help=help)
    help = "timed rounds after the warm-up (default: %(default)s)"
    add("--rounds", type=POSITIVE, default=5, metavar="N", help=help)
    help = "CPU threads (default: %(default)s)"
    add("--threads", type=POSITIVE, default=2, metavar="N", help=help)
    help = "folder of a data set with prompts, to time whole epochs (default: no epochs)"
    add("--data", metavar="DIR", help=help)
    help = "images of --data in an epoch (default: %(default)s)"
    add("--images", type=POSITIVE, default=64, metavar="N", help=help)
    help = "processes that load images of --data (default: %(default)s)"
    add("--workers", type=Number(True, 0), default=2, metavar="N", help=help)
    # For child processes: implementation, kind of step.
    add("--memory", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = parse()
    torch.set_num_threads(args.threads)
    ours = our_model()
    official = official_model(ours)
    batch = random_batch(args.batch_size)

    if args.memory:
        implementation, kind = args.memory
        if implementation == "ours":
            steps = our_steps(ours, batch)
        else:
            steps = official_steps(official, batch)
        print(peak_memory(steps[kind]))
        return 0

    steps = {"ours": our_steps(ours, batch), "official": official_steps(official, batch)}
    print(
        f"{machine()}\nrd64-refined, 352 px, float32, {args.batch_size} images in a training step"
    )
    for kind in (ONE_PROMPT, TEN_PROMPTS):
        print_equal(kind, steps["official"][kind], steps["ours"][kind])

    print(f"\n{HEADER}")
    for kind in KINDS:
        times = in_turns({name: steps[name][kind] for name in steps}, args.rounds)
        print(row(kind, times["official"], times["ours"], "s"), flush=True)
    if args.data:
        training_steps = {name: steps[name][STEP] for name in steps}
        times = in_turns(epochs(ours, training_steps, args), 1)
        name = f"epoch of {args.images} images"
        print(row(name, times["official"], times["ours"], "s"), flush=True)
    print_memory_rows(KINDS)
    return 0


if __name__ == "__main__":
    command_line.command(main)
