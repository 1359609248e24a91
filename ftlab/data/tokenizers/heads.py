"""What many texts begin with, a template's words, is tokenised once.

Exact where nothing in the vocabulary holds a line feed beside other characters, so that no token goes over one: a text
cut after a line feed has the tokens of both parts one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

LINE_FEED = "\n"
_LOOKED_AT = 32  # the first texts, which tell what all begin with
_FEWEST = 4  # of these that must begin alike
_SHORTEST, _LONGEST = 24, 2_000  # characters of a head

Encode = Callable[[Sequence[str]], list[list[int]]]


def encode_with_heads(encode: Encode, texts: Sequence[str]) -> list[list[int]]:
    """``encode(texts)``, in less time where many of them begin alike.

    Args:
        encode: gives each text the tokens that it has alone.
    """
    heads = shared_heads(texts)
    if not heads:
        return encode(texts)
    # What is left of a text is encoded behind a line feed, as it stands in the text, and the tokens of that taken off.
    line_feed, *encoded_heads = encode([LINE_FEED, *heads])
    known = list(zip(heads, map(len, heads), encoded_heads, strict=True))
    before: list[list[int] | None] = []
    rest = []
    for text in texts:
        for head, n, tokens in known:
            if text.startswith(head):
                before.append(tokens)
                rest.append(text[n - 1 :])  # from the head's last line feed on
                break
        else:
            before.append(None)
            rest.append(text)
    taken = len(line_feed)
    return [
        tokens if head is None else head + tokens[taken:] for head, tokens in zip(before, encode(rest), strict=True)
    ]


def shared_heads(texts: Sequence[str]) -> list[str]:
    """What many of ``texts`` begin with, the longest first; each ends with a line feed."""
    some = sorted(text[:_LONGEST] for text in texts[:_LOOKED_AT])
    found = set()
    for one, other in pairwise(some):
        common = next((one[:i] for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), one)
        head = common[: common.rfind(LINE_FEED) + 1]
        # NUL ends a text inside SentencePiece: what follows it has no tokens.
        if len(head) >= _SHORTEST and "\0" not in head and sum(text.startswith(head) for text in some) >= _FEWEST:
            found.add(head)
    return sorted(found, key=len, reverse=True)
