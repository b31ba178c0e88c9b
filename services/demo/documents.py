"""Texts to ask about: English prose that comes with every Python, cut to about the length wanted."""

from __future__ import annotations

from pydoc_data import topics

#: Characters that one token of this prose stands for, roughly, with the default model's tokenizer.
CHARACTERS_PER_TOKEN = 3.9


def document(number: int, tokens: int) -> str:
    """A document of about `tokens` tokens; documents of different numbers share no beginning.

    Parameters
    ----------
    number : int
        From 0 up; the prose is finite, so very high ones begin with nearly the same text again.
    """
    prose = "\n".join(topics.topics[name].strip() for name in sorted(topics.topics))
    length = int(tokens * CHARACTERS_PER_TOKEN)
    start = number * length % max(1, len(prose) - length)
    return f"Document {number} of the archive.\n\n{prose[start : start + length]}\n"


def question(text: str, asked: str) -> str:
    """A prompt: the document first, so that it is the prefix that all questions about it share."""
    return f"{text}\nQuestion: {asked}\nAnswer:"
