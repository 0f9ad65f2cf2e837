"""Data sets of tokens, in a file of their own that another process imports quickly."""

from tokenizer import CLIPTokenizer


class Texts(list):
    """Texts whose tokens CLIP's tokenizer makes in the process that asks for them."""

    def __getitem__(self, i):
        return CLIPTokenizer(17)(super().__getitem__(i))[0]


class Prompts(list):
    """Texts and a tokenizer that travels with them."""

    def __init__(self, texts, tokenize):
        super().__init__(texts)
        self.tokenize = tokenize

    def __getitem__(self, i):
        return self.tokenize(super().__getitem__(i))[0]
