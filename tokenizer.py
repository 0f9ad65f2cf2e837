"""Tokenizers that turn prompts into ids: CLIP's byte pairs and BERT's WordPiece.

CLIP: Radford et al. 2021 (arXiv 2103.00020); official code openai/CLIP, clip/simple_tokenizer.py
(CRIS has a copy as utils/simple_tokenizer.py). The steps, for "2 Polyps &amp; a fold":

    unescape HTML, lower-case                      "2 polyps & a fold"
    split into words, single digits, other signs   "2" "polyps" "&" "a" "fold"
    UTF-8 bytes as printable characters, last +    p o l y p s</w>
      "</w>"; join pairs in the merges' order      poly ps</w>
    look up, add start and end, cut, pad           49406 273 6833 814 261 320 11021 49407 0 ...

Left out: `ftfy`, which the official code runs first to repair broken encodings. Only texts with
mojibake, ligatures, curly quotes, full-width or decomposed characters, or control characters (which
it removes) differ; write such prompts in plain characters.

`clip_merges.txt.xz` holds OpenAI's merge table (MIT licence, Copyright (c) 2021 OpenAI): lines 2 to
48,895 of bpe_simple_vocab_16e6.txt.gz (the rest is not used), which is part of openai/CLIP and of
the `open_clip_torch` wheel. To build it again:

    python -c "import open_clip, os; print(os.path.dirname(open_clip.__file__))"    # -> DIR
    zcat DIR/bpe_simple_vocab_16e6.txt.gz | sed -n 2,48895p | xz -9e > clip_merges.txt.xz

BERT: Devlin et al. 2019 (arXiv 1810.04805); official code google-research/bert, tokenization.py.
The vocabulary is a file next to the weights, vocab.txt. The steps, for "2 Pólyps, benign":

    drop control characters, lower-case, no accents      "2 polyps, benign"
    split into words, punctuation, Chinese characters    "2" "polyps" "," "benign"
    longest pieces from the left, "##" inside a word     2 polyp ##s , benign
    add start and end, cut, pad; ids are line numbers    [CLS] 2 polyp ##s , benign [SEP] [PAD]
"""

import functools
import html
import lzma
import string
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

START = 49406
END = 49407
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


@functools.cache
def byte_pair_encoder() -> Tokenizer:
    """Return CLIP's byte-pair encoder, without start, end and padding.

    The vocabulary follows from the merges: 256 bytes, the same with </w>, one token per merge.
    """
    with lzma.open(Path(__file__).with_name("clip_merges.txt.xz"), "rt", encoding="utf-8") as file:
        merges = [tuple(line.split()) for line in file]

    # Sorted by code point is OpenAI's order: 188 bytes that stand for themselves, then the others.
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = characters + [character + "</w>" for character in characters]
    for left, right in merges:
        tokens.append(left + right)
    vocabulary = {token: i for i, token in enumerate(tokens)}

    encoder = Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix="</w>"))
    encoder.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])  # START and END
    words = pre_tokenizers.Split(Regex("(?i)" + WORDS), "removed", invert=True)
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    encoder.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    return encoder


def encode_rows(encoder: Tokenizer, texts, start, end, length, pad_token):
    """Return the token ids of B texts as rows (B, length) int64: start, text, end, padding.

    A text that is too long loses its tail, but never the end token.
    """
    rows = torch.full((len(texts), length), pad_token)  # (B,T)
    for row, text in zip(rows, texts, strict=True):
        # One by one: `encode_batch` starts threads, which forked data-loader workers lose.
        ids = [start, *encoder.encode(text).ids, end][:length]
        row[: len(ids)] = torch.tensor(ids)
        if len(ids) == length:
            row[-1] = end
    return rows


class CLIPTokenizer:
    """Tokenizer of all CLIP text encoders: 49,408 tokens; 49406 starts a text and 49407 ends it.

    length: ids per text, 77 in CLIP; 17 or 22 in CRIS. pad_token: 0 in OpenAI's code and CRIS,
    49407 in transformers' CLIP and CLIPSeg.
    """

    def __init__(self, length=77, pad_token=0):
        self.length = length
        self.pad_token = pad_token

    def __call__(self, texts):
        """Return ids (B, length) int64 of a text or a list of B texts; long texts are cut."""
        if isinstance(texts, str):
            texts = [texts]
        texts = [self.clean(text) for text in texts]
        return encode_rows(byte_pair_encoder(), texts, START, END, self.length, self.pad_token)

    @staticmethod
    def clean(text: str) -> str:
        """Unescape HTML, twice because the web contains "&amp;lt;", and lower-case."""
        return html.unescape(html.unescape(text)).lower()

    def count(self, text: str) -> int:
        """Return the number of ids of a text with start and end, before it is cut to `length`."""
        return len(byte_pair_encoder().encode(self.clean(text)).ids) + 2


# In PubMedBERT's order. In a text they stand for themselves, as in every BERT tokenizer.
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# The vocabulary of models that come without one, `mini`: single characters, 109 tokens.
LETTERS = [*string.ascii_lowercase, *string.digits]
CHARACTERS = SPECIAL + LETTERS + [*string.punctuation] + ["##" + letter for letter in LETTERS]


class WordPieceTokenizer:
    """Tokenizer of BERT models with a lower-case vocabulary, such as PubMedBERT in BiomedCLIP.

    vocabulary: the tokens in the order of their ids, or a vocab.txt with one per line.
    length: ids per text, 256 in BiomedCLIP. pad_token: the id of [PAD], 0 there.
    Raise ValueError if the vocabulary lacks one of the five special tokens.
    """

    def __init__(self, vocabulary, length=256, pad_token=0):
        tokens = vocabulary
        source = "vocabulary"
        if isinstance(vocabulary, str | Path):
            tokens = Path(vocabulary).read_text(encoding="utf-8").rstrip("\n").split("\n")
            source = vocabulary
        ids = {token: i for i, token in enumerate(tokens)}
        for token in SPECIAL:
            if token not in ids:
                raise ValueError(
                    f"{source}: has no {token}; pass BERT's vocab.txt, one token a line"
                )

        self.length = length
        self.pad_token = pad_token
        self.start = ids["[CLS]"]
        self.end = ids["[SEP]"]
        self.encoder = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
        self.encoder.add_special_tokens(SPECIAL)
        self.encoder.normalizer = normalizers.BertNormalizer()
        self.encoder.pre_tokenizer = pre_tokenizers.BertPreTokenizer()

    def __call__(self, texts):
        """Return ids (B, length) int64 of a text or a list of B texts; long texts are cut."""
        if isinstance(texts, str):
            texts = [texts]
        return encode_rows(self.encoder, texts, self.start, self.end, self.length, self.pad_token)

    def count(self, text: str) -> int:
        """Return the number of ids of a text with start and end, before it is cut to `length`."""
        return len(self.encoder.encode(text).ids) + 2
