"""Check the text prompts of a data set: their types, and how a model reads them."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from imaging import layouts
from imaging.layouts import Entry
from preparation.check_findings import Findings, count_and_names


def texts_of_entry(entry: Entry) -> list[str]:
    """Return all texts of an entry that are not empty, as p0 is."""
    texts = chain(*entry.prompts.values())
    return [text for text in texts if text.strip()]


def compare_with_prompts(
    entry: Entry, foreground: int, largest: int, limit: int
) -> tuple[str, str] | None:
    """Return a finding (kind, line) if a binary mask contradicts its prompts, else None.

    An empty mask contradicts prompts that ask for something, a mask with foreground contradicts a
    prompt such as "no polyp". An empty mask without prompts is that of a healthy patient.

    foreground: pixels; largest: largest value of the mask; limit: value that foreground exceeds, -1
    where masks hold class numbers.
    """
    texts = texts_of_entry(entry)
    denial = next((text for text in texts if text.lower().startswith("no ")), None)
    if foreground and denial:
        kind = "prompts that deny what the mask shows"
        return kind, f"{entry.mask}: {foreground} pixels, yet {denial!r}"
    if foreground or denial or not texts:
        return None

    if entry.label is not None:
        wanted = f"== {entry.label}"
    elif limit >= 0:
        wanted = f"> {limit}"
    else:
        wanted = "of class 1"
    kind = "empty masks whose prompts ask for something"
    return kind, f"{entry.mask}: no pixel {wanted}, the largest is {largest}"


def check_prompt_types(
    root: Path, splits: dict[str, list[Entry]], shares: dict, findings: Findings
) -> dict[str, Counter]:
    """Return {prompt type: Counter of its texts} over all splits, p0 first.

    Add findings for types that entries lack and for unknown types. shares: of foreground, {(split,
    name): share}; healthy images need no prompts.
    """
    texts = defaultdict(Counter)
    for entry in chain(*splits.values()):
        for prompt_type, listed in entry.prompts.items():
            texts[prompt_type].update(listed)
    known = [prompt_type for prompt_type in texts if layouts.is_prompt_type(prompt_type)]
    known.sort(key=lambda prompt_type: (len(prompt_type), prompt_type))

    for split, entries in splits.items():
        prompted = []
        for entry in entries:
            if texts_of_entry(entry) or shares.get((split, entry.name)) != 0:
                prompted.append(entry)

        file = f"{root}/anns/{split}.json"
        for prompt_type in texts:
            if prompt_type in known:
                lacking = [entry.name for entry in prompted if not entry.prompts.get(prompt_type)]
                is_elsewhere = layouts.is_named_type(prompt_type) and len(lacking) == len(prompted)
                if lacking and not is_elsewhere:  # some types are those of test splits alone
                    line = f"{file}: {prompt_type} is missing in {count_and_names(lacking)}"
                    findings["prompt types that entries lack"].append(line)
            else:
                users = [entry.name for entry in entries if prompt_type in entry.prompts]
                if users:
                    occurrence = f"{file}: {prompt_type!r} in {count_and_names(users)}"
                    findings["unknown prompt types"].append(
                        f"{occurrence}; the types are p0, p1, ... and m_NAME"
                    )
    return {prompt_type: texts[prompt_type] for prompt_type in known}


def tokenizers_of(model: str | None) -> dict:
    """Return {recipes: tokenizer} of a model, one for each text length; {} if `model` is None.

    Also {} if the model's vocabulary is not available; a line says so. Raise ValueError if the
    model reads no prompts.
    """
    if model is None:
        return {}
    from recipes import FAMILIES  # here, as importing every model takes a second

    readers = [name for name, family in FAMILIES.items() if family.reads_text()]
    if model not in readers:
        raise ValueError(f"--model {model}: reads no prompts; take one of {', '.join(readers)}")
    try:
        return FAMILIES[model].tokenizers()
    except (ValueError, OSError) as error:
        print(f"--model {model}: prompts that are cut are not counted ({error})")
        return {}


def check_tokens(
    root: Path, model: str | None, tokenizers: dict, texts: dict[str, Counter], findings: Findings
) -> Iterator[tuple[str, str]]:
    """Yield (heading, text) about the lengths of prompts, and those that a model cuts or mixes up.

    texts: see `check_prompt_types`. Prompts that the default recipe cuts are findings as well.
    """
    if not tokenizers:
        return
    from recipes.images import describe_cuts  # here, as importing every model takes a second

    first = next(iter(tokenizers.values()))  # the others differ in the length that they cut at
    for recipes, tokenizer in tokenizers.items():
        lines = []
        is_any_cut = False
        for prompt_type, counter in texts.items():
            if not counter:
                continue
            if tokenizer is first:
                lines.append((prompt_type, describe_lengths(counter, tokenizer)))
            different = {tuple(tokenizer(text)[0].tolist()) for text in counter}
            if len(different) < len(counter):
                text = f"{len(counter)} texts, only {len(different)} to the model"
                lines.append((prompt_type, text))
            cuts = describe_cuts(counter, tokenizer)
            if cuts:
                is_any_cut = True
                lines.append((prompt_type, cuts))
            if cuts and "default" in recipes.split(", "):
                line = f"{root}: {prompt_type}, {cuts} ({model})"
                findings["prompts that the model cuts"].append(line)

        text = f"takes {tokenizer.length} tokens of a prompt (--recipe {recipes})"
        if not is_any_cut:
            text += "; no text is cut"
        yield model, text
        yield from lines


def describe_lengths(texts, tokenizer) -> str:
    """Return "5 to 14 tokens, median 9" of some texts; the marks of start and end count."""
    lengths = sorted(tokenizer.count(text) for text in texts)
    median = lengths[len(lengths) // 2]
    if lengths[0] == lengths[-1]:
        return f"{median} tokens"
    return f"{lengths[0]} to {lengths[-1]} tokens, median {median}"


def default_prompt(splits: dict[str, list]) -> str | None:
    """Return the value of --prompt to train with: a type that all entries with texts have.

    None if it is p6, which is the default of train.py, or if there are no texts.
    """
    complete = None
    for entry in chain(*splits.values()):
        if not texts_of_entry(entry):
            continue
        types = {kind for kind, listed in entry.prompts.items() if any(map(str.strip, listed))}
        complete = types if complete is None else complete & types

    if complete is None or "p6" in complete:
        return None
    known = [kind for kind in complete if layouts.is_prompt_type(kind)]
    return max(known, key=lambda kind: (len(kind), kind), default="random")
