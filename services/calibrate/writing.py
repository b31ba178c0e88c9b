"""Text of the model's own: stories, letters, speeches, advice, which no Python carries, sampled from the model it will serve."""

from __future__ import annotations

from typing import Any

import torch

#: How each piece begins; kinds of writing that sources and manuals lack, the kinds mixed along the list.
OPENINGS = (
    "It was late in the autumn when Miss Harcourt returned to her father's house; and though she had been absent scarcely",
    "My dear friend,\n\nI have received your letter of the",
    '"I do not believe a word of it," said the captain, setting down his glass.',
    "When, in the judgment of a free people, it becomes necessary to",
    "User: My sister wants to learn to cook. What should she start with?\nAssistant:",
    "Mr. Harding had been a widower for eleven years, and was considered by the whole neighbourhood as",
    "hack value /n./ Often adduced as the reason or motivation for",
    "The history of the city begins",
    "Once upon a time, in a village between two mountains, there lived",
    "Ladies and gentlemen, we are gathered here",
    "The detective looked at the two glasses on the table and",
    "In the course of the debate the honourable member observed that",
    "Chapter XII\n\nThe morning after the ball, Mrs. Weston was so good as to",
    "WASHINGTON - Officials said on Tuesday that",
    "Abstract. We study the effect of temperature on",
    "ACT I\n\nSCENE I. A room in the palace.\n\nEnter the DUKE and",
    "Old programmers still tell the story of the machine that",
    "The patient, a 54-year-old man, presented with",
    "She could not but be sensible of the attention which Mr. Elliot paid her, and yet",
    "Recipe for a Sunday dinner\n\nIngredients:",
    "User: Explain to me how a bank works, as if I were ten.\nAssistant:",
    "The rain had not stopped for three days. Tom sat by the window and",
    "Section 4. No person shall be held to answer for",
    "Dear Sir or Madam,\n\nI am writing to complain about",
    '"You must give my compliments to them," cried Emma. "I am sure that',
    "The theory was first proposed in 1905, when",
    "We had been walking for an hour when the guide stopped and said,",
    "Review: I bought this for my mother and",
    "The war of that year changed the country, for",
    "To be happy, a man must first of all",
    "User: Write a poem about the sea.\nAssistant:",
    "crash 1. /n./ A sudden, usually drastic failure. Most often said of",
)
#: Tokens of a piece. Longer ones wander, and cost more: each step reads the cache of all that was written before.
PIECE = 256


@torch.no_grad()
def windows(model: Any, tokenizer: Any, count: int, tokens: int, seed: int = 0) -> list[list[int]]:
    """`count` windows of `tokens` token ids, each of several pieces, sampled at temperature 1 among 200 tokens, all in one batch."""
    if not count:
        return []
    each = -(-tokens // PIECE)
    openings = [OPENINGS[i % len(OPENINGS)] for i in range(count * each)]
    tokenizer.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    batch = tokenizer(openings, return_tensors="pt", padding=True, padding_side="left").to(model.device)
    length = -(-tokens // each)
    # `generate` samples from torch's global generator: a caller's random state stays its own.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = model.generate(
            **batch, do_sample=True, temperature=1.0, top_k=200, max_new_tokens=length, min_new_tokens=length,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    padding = (batch["attention_mask"] == 0).sum(1).tolist()
    pieces = [row[skip : skip + length] for row, skip in zip(made.tolist(), padding, strict=True)]
    return [[t for piece in pieces[i::count] for t in piece][:tokens] for i in range(count)]
