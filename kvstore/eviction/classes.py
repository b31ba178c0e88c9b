"""Reuse classes: what is known of a block, packed into one word, and the class that follows from it.

The word is the state of a block's ghost too: its class in the low byte, then how often it was used and its children so far, each in 4 bits
and up to 15, then the pace of its conversation, how much of the prompt that wrote it was new (2 bits), and the size of the prompt that
used it last (6 bits).
"""

from __future__ import annotations

import math
from bisect import bisect_right

#: Bounds between classes. Seconds that a conversation pauses between turns: a program, one who watches it, one who reads, one who left.
_PAUSES_S = (15.0, 30.0, 60.0)
#: Weight of the newest pause in a conversation's pace, the moving mean of their logarithms.
_NEWEST = 0.3
#: Tokens of a prompt, and those of them that no request had before: more than 3 or 15 blocks of 512.
_LENGTHS_TOKENS, NEW_TOKENS = (2048, 8192), (1537, 7681)
_USES = (2, 3, 5)
#: Lengths and new lengths, and times paces; the first turn of a conversation has no pace.
_LENGTHS, _NEWS = len(_LENGTHS_TOKENS) + 1, len(NEW_TOKENS) + 1
_WIDTH = (1 + len(_PAUSES_S) + 1) * _LENGTHS * _NEWS
PARTIAL = (len(_USES) + 1) * _WIDTH
#: What classes share, by class: uses, pace, length and new length; a partial tail nothing.
TRAITS: list[tuple[int, ...]] = [
    (cls // _WIDTH, cls % _WIDTH // (_LENGTHS * _NEWS), cls // _NEWS % _LENGTHS, cls % _NEWS) for cls in range(PARTIAL)
] + [()]
#: Where in the word each thing begins.
USES_AT, FAN_AT, PACE_AT, NEW_AT, SIZE_AT = 8, 12, 16, 24, 26
FAN = 0xF << FAN_AT
KEPT = (1 << SIZE_AT) - (1 << FAN_AT)  # all but class, uses and size
COUNTED_ALIKE = 0xFF | 63 << SIZE_AT  # class and size
#: Weight of a block in the learning, by the size of its prompt: one prompt is not as many observations as it has blocks, nor is it a
#: single one, since they leave one by one.
WEIGHTS = [2.0 ** (-size / 8) for size in range(64)]
#: First class of a block's number of uses.
OF_USES = [_WIDTH * bisect_right(_USES, uses) for uses in range(17)]
#: By the number of uses before: class and uses in the word of a block that is used again, less the class of one used once.
USED_AGAIN = [OF_USES[uses] | uses << USES_AT for uses in (*range(1, 16), 15)]
#: A block that ever had this many children is a shared root: what follows it is a new conversation.
_SHARED_CHILDREN = 4
#: Class and uses in the word of a partial tail that was used once.
PARTIAL_ONCE = PARTIAL | 1 << USES_AT


def _pace_of(pause_s: float) -> int:
    """A pause on a logarithmic scale of one byte, 8 steps for each doubling; 0 stands for none."""
    return min(max(round(8 * math.log2(max(pause_s, 0.5))) + 9, 1), 255)


def size_of(blocks: int) -> int:
    """A number of blocks on a logarithmic scale of 6 bits, 4 steps for each doubling."""
    return min(round(4 * math.log2(blocks)), 63)


_PACES = tuple(map(_pace_of, _PAUSES_S))


def situation(state: int | None, pause_s: float, input_tokens: int, new_tokens: int) -> tuple[int, int, int]:
    """What a request's new blocks are told of it: pace, new length and class.

    Parameters
    ----------
    state : int or None
        Of the last block before the new ones; None for none.
    pause_s : float
        Since that was last used.
    new_tokens : int
        0 where it has none, or how many is not known: then a conversation's new length is that of its last turn.
    """
    length, new = bisect_right(_LENGTHS_TOKENS, input_tokens), bisect_right(NEW_TOKENS, new_tokens or input_tokens)
    if state is None or state >> FAN_AT & 0xF >= _SHARED_CHILDREN:
        return 0, new, length * _NEWS + new
    new = new if new_tokens else state >> NEW_AT & 3
    newest, pace = _pace_of(pause_s), state >> PACE_AT & 0xFF
    pace = round(pace + _NEWEST * (newest - pace)) if pace else newest
    return pace, new, ((1 + bisect_right(_PACES, pace)) * _LENGTHS + length) * _NEWS + new
