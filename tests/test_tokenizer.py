"""Both tokenizers against official ids (tests/golden), open_clip and transformers."""

import gzip
import json
import lzma
import pickle
import unicodedata
from pathlib import Path

import ftfy
import open_clip
import pytest
import torch
from conftest import ROOT
from open_clip.tokenizer import SimpleTokenizer
from token_sets import Prompts, Texts
from torch.utils.data import DataLoader
from transformers import CLIPTokenizer as TransformersTokenizer
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

import tokenizer
from tokenizer import CHARACTERS, SPECIAL, CLIPTokenizer, WordPieceTokenizer

GOLDEN = json.loads((ROOT / "tests/golden/clip_bpe.json").read_text(encoding="utf-8"))


def ids(text):
    """The ids alone: no start, no end, nothing cut off."""
    row = CLIPTokenizer(length=2000)(text)[0].tolist()
    used = [i for i, token in enumerate(row) if token][-1]
    assert row[0] == 49406 and row[used] == 49407
    return row[1:used]


def test_official_ids_of_every_golden_string_that_needs_no_ftfy():
    needs_ftfy = {case["text"] for case in GOLDEN["cases"] if "needs ftfy" in case["tags"]}
    wrong = {case["text"] for case in GOLDEN["cases"] if ids(case["text"]) != case["ids"]}
    assert len(GOLDEN["cases"]) == 258 and len(needs_ftfy) == 6
    assert wrong == needs_ftfy
    repaired = [c for c in GOLDEN["cases"] if ids(ftfy.fix_text(c["text"])) != c["ids"]]
    assert not repaired  # ftfy is the whole difference


@pytest.mark.parametrize("pad_token, key", [(0, "zero_padded"), (49407, "endoftext_padded")])
def test_official_rows(pad_token, key):
    assert {row["length"] for row in GOLDEN["rows"]} == {17, 22, 77}
    for row in GOLDEN["rows"]:
        ours = CLIPTokenizer(row["length"], pad_token)(row["text"])
        assert ours.dtype == torch.int64 and ours.tolist() == [row[key]]


def test_merge_table_is_the_one_in_open_clip():
    official = Path(open_clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
    lines = gzip.decompress(official.read_bytes()).split(b"\n")[1:48895]
    ours = lzma.decompress((ROOT / "clip_merges.txt.xz").read_bytes()).split(b"\n")
    assert ours == [*lines, b""]


def test_every_character_as_open_clip():
    """Each character of Unicode 3.2, in a word, after an apostrophe and before a digit."""
    official, known = SimpleTokenizer(), unicodedata.ucd_3_2_0.name
    texts = [f"a{chr(c)}b'{chr(c)}1" for c in range(0x3100) if known(chr(c), "")]
    texts = [text for text in texts if ftfy.fix_text(text) == text]
    assert len(texts) > 7500
    assert [t for t in texts if ids(t) != official.encode(t)] == []


def test_every_prompt_of_kvasir_as_open_clip_and_transformers(real_data):
    splits = (real_data / "kvasir_polyp/anns").glob("*.json")
    entries = [entry for split in splits for entry in json.loads(split.read_text())]
    prompts = [p for entry in entries for p in entry["prompts"].values()]
    texts = sorted({t for p in prompts for t in ([p] if isinstance(p, str) else p)})
    assert len(texts) > 1000
    official = SimpleTokenizer()
    vocabulary = {token: i for token, i in official.encoder.items() if i < 49406}
    vocabulary |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    transformers = TransformersTokenizer(vocabulary, list(official.bpe_ranks))
    for length in (17, 77):
        zeros = CLIPTokenizer(length)(texts)
        assert torch.equal(zeros, official(texts, context_length=length))
        reference = transformers(
            texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )["input_ids"]
        assert torch.equal(CLIPTokenizer(length, pad_token=49407)(texts), reference)


def test_batches():
    tokenize = CLIPTokenizer(9)
    polyp = [49406, 6833, 335, 49407, 0, 0, 0, 0, 0]  # GOLDEN["rows"][0]
    assert tokenize("polyp").tolist() == [polyp]
    assert tokenize(["", "polyp"]).tolist() == [[49406, 49407] + 7 * [0], polyp]
    assert tokenize([]).shape == (0, 9)


def test_texts_are_counted_before_they_are_cut():
    texts = [row["text"] for row in GOLDEN["rows"]] + ["", "Polyp &amp;amp; fold"]
    for text in texts:
        whole = CLIPTokenizer(1000, pad_token=-1)(text)[0]
        assert CLIPTokenizer(17).count(text) == (whole >= 0).sum()


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_works_in_loader_workers(start):
    texts = [row["text"] for row in GOLDEN["rows"]]
    expected = CLIPTokenizer(17)(texts)
    loader = DataLoader(Texts(texts), 5, num_workers=1, multiprocessing_context=start)
    assert torch.equal(torch.cat(list(loader)), expected)


def test_small_to_pickle_and_built_once():
    copy = pickle.loads(pickle.dumps(CLIPTokenizer(22, 49407)))
    assert (copy.length, copy.pad_token) == (22, 49407)
    assert len(pickle.dumps(copy)) < 200  # not the merge table
    copy("polyp"), CLIPTokenizer()("polyp")
    assert tokenizer.byte_pair_encoder.cache_info().currsize == 1


# --- WordPiece ------------------------------------------------------------------------------------

TOY = json.loads((ROOT / "tests/golden/wordpiece_toy.json").read_text(encoding="utf-8"))


def write_vocabulary(path, tokens=TOY["vocab"]):
    path.write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return path


def pieces(tokens, text):
    """The ids of a text without its padding."""
    return [i for i in WordPieceTokenizer(tokens, length=2000)(text)[0].tolist() if i]


def test_official_word_pieces(tmp_path):
    assert len(TOY["cases"]) == 23
    for vocabulary in (TOY["vocab"], write_vocabulary(tmp_path / "vocab.txt")):
        wrong = [c["text"] for c in TOY["cases"] if pieces(vocabulary, c["text"]) != c["ids"]]
        assert not wrong


def test_word_pieces_of_every_character_as_python_transformers(tmp_path):
    """The original algorithm in Python, on each character of Unicode 3.2 between letters."""
    known = [c for c in range(0x3100) if unicodedata.ucd_3_2_0.name(chr(c), "") or c < 0xA0]
    texts = [f"a{chr(c)}b {chr(c)}1" for c in known] + [f"A{chr(c)}" for c in (0x4E00, 0x1F44D)]
    letters = sorted({c for text in texts for c in unicodedata.normalize("NFD", text.lower())})
    words = [c for c in letters if c.strip() and unicodedata.category(c)[0] != "C"]
    tokens = [*SPECIAL, *words, *("##" + c for c in words)]
    assert len(texts) > 7500 and len(set(tokens)) == len(tokens)
    official = BertTokenizerLegacy(str(write_vocabulary(tmp_path / "vocab.txt", tokens)))
    ours = WordPieceTokenizer(tokens, 20)
    wrong = {t[1] for t in texts if ours(t)[0].tolist() != official_row(official, t, 20)}
    # Whether these four are letters, accents or punctuation depends on the version of Unicode.
    assert wrong <= set("\u166d\u1734\u1885\u1886")


def official_row(official, text, length):
    return official(text, padding="max_length", truncation=True, max_length=length)["input_ids"]


def test_word_pieces_of_every_prompt_of_kvasir_as_transformers(real_data, tmp_path):
    splits = (real_data / "kvasir_polyp/anns").glob("*.json")
    entries = [entry for split in splits for entry in json.loads(split.read_text())]
    prompts = [p for entry in entries for p in entry["prompts"].values()]
    texts = sorted({t for p in prompts for t in ([p] if isinstance(p, str) else p)})
    assert len(texts) > 1000
    official = BertTokenizerLegacy(str(write_vocabulary(tmp_path / "vocab.txt")))
    for length in (12, 256):  # the shorter cuts most of them
        reference = [official_row(official, text, length) for text in texts]
        assert WordPieceTokenizer(TOY["vocab"], length)(texts).tolist() == reference


def test_batches_of_word_pieces():
    tokenize = WordPieceTokenizer(TOY["vocab"], 5)
    assert tokenize("polyp").dtype == torch.int64
    assert tokenize("polyp").tolist() == [[2, 70, 3, 0, 0]]
    assert tokenize(["", "polyp polyp polyp polyp"]).tolist() == [
        [2, 3, 0, 0, 0],
        [2, 70, 70, 70, 3],
    ]
    assert tokenize([]).shape == (0, 5)


def test_the_vocabulary_of_single_characters():
    ids = WordPieceTokenizer(CHARACTERS, 8)("Re-d é")[0].tolist()
    assert [CHARACTERS[i] for i in ids] == ["[CLS]", "r", "##e", "-", "d", "e", "[SEP]", "[PAD]"]
    assert len(set(CHARACTERS)) == len(CHARACTERS) == 109
    printable = "".join(map(chr, range(32, 127)))
    assert CHARACTERS.index("[UNK]") not in pieces(CHARACTERS, printable)


def test_what_is_no_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"merges.txt: has no \[PAD\]") as caught:
        WordPieceTokenizer(write_vocabulary(tmp_path / "merges.txt", ["a b", "c d"]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_word_pieces_work_in_loader_workers(start):
    texts = [c["text"] for c in TOY["cases"]]
    tokenize = WordPieceTokenizer(TOY["vocab"], 40)
    expected = tokenize(texts)
    loader = DataLoader(Prompts(texts, tokenize), 5, num_workers=1, multiprocessing_context=start)
    assert torch.equal(torch.cat(list(loader)), expected)
    copy = pickle.loads(pickle.dumps(WordPieceTokenizer(TOY["vocab"], 40)))
    assert torch.equal(copy(texts), expected)
