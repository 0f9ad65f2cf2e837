"""The view of CLIPSeg, BiomedCLIPSeg and CRIS, which find what a phrase describes.

Its elements are those of image_view.py with the prefix "text", and text-phrases, the phrases.
"""

from textwrap import shorten

import gradio as gr

from imaging import layouts
from page import downloads
from page.image_view import ImageView
from page.session import Answer, Session
from page.settings import PageSettings, class_names
from prediction.models import LoadedModel
from recipes.images import cut_texts

MOST_PHRASES = 8


class TextView(ImageView):
    """Find what several phrases describe, each in its colour."""

    kind = "text"
    table_title = "Phrase"

    def build_question(self) -> list:
        """Add the box for phrases."""
        self.phrases = gr.Textbox(
            label="Describe it in a few words, one thing per line",
            placeholder="for example: one small pink polyp",
            lines=3,
            max_lines=MOST_PHRASES,
            max_length=2000,
            elem_id="text-phrases",
        )
        return [self.phrases]

    def read_question(self, text: str) -> list[str]:
        """Return the phrases, each once. Raises ValueError, a sentence, if none or too many."""
        phrases = []
        for line in (text or "").splitlines():
            phrase = " ".join(line.split())
            if phrase and phrase not in phrases:
                phrases.append(phrase)
        if not phrases:
            raise ValueError("Write what to find first (step 2).")
        if len(phrases) > MOST_PHRASES:
            raise ValueError(
                f"These are {len(phrases)} phrases; at most {MOST_PHRASES} fit one picture."
            )
        return phrases

    def answers(self, session: Session, loaded: LoadedModel, question: list) -> list[Answer]:
        """Return the answers to the phrases."""
        answers = []
        for phrase in question:
            tokens = loaded.recipe.tokenize(phrase)
            answers.append(session.predict(loaded, phrase, tokens))
        return answers

    def remarks(self, loaded: LoadedModel, question: list) -> list[str]:
        """Return a sentence about each phrase that is too long for a model."""
        sentences = []
        for phrase in cut_texts(question, loaded.recipe.tokenizer):
            start = shorten(phrase, 40, placeholder=" …")
            sentences.append(f"“{start}” is too long: the model reads only its beginning.")
        return sentences

    def result(self, session, loaded, question, threshold, pixel_size) -> downloads.Result:
        """Return the masks of the phrases."""
        probabilities = {}
        for phrase, answer in zip(question, self.answers(session, loaded, question), strict=True):
            probabilities[phrase] = answer.probabilities  # (1,H,W)
        (target,) = layouts.foreground(class_names(loaded))
        return downloads.phrase_result(probabilities, target, threshold, pixel_size)


def build(models: list[LoadedModel], settings: PageSettings) -> None:
    """Add the view of these models to the page."""
    TextView(models, settings).build()
