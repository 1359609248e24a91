"""Specials that only a template can spell, in text where they may stand next to words that spell them too."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as HFTokenizer


class Aliases:
    """Second spellings of the special tokens, which no text can contain by chance or design.

    A conversation is encoded as one text, since a tokenizer may treat its first words differently from those after
    a special. In that text the template's specials have to be themselves and the messages' have to be characters:
    so messages are hidden from the template's spelling, and the template's specials are then spelled by alias.
    """

    def __init__(self, tokenizer: HFTokenizer):
        self._specials = {i: token for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._ids = {token.content: i for i, token in self._specials.items()}
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        # Drawn anew in every process: data that names it cannot exist yet.
        nonce = secrets.token_hex(8)
        self._hidden, self._alias = f"\ue000{nonce}:{{}}\ue001", f"\ue002{nonce}:{{}}\ue003"
        self._hidden_pattern = re.compile(f"\ue000{nonce}:(\\d+)\ue001")
        self._id_of_alias: dict[int, int] = {}

    @property
    def any_special(self) -> str:
        """The alias of a special that leaves the spaces beside it alone, if there is one."""
        plain = (i for i, token in self._specials.items() if not (token.lstrip or token.rstrip))
        return self._alias.format(next(plain, next(iter(self._specials))))

    def add_to(self, tokenizer: HFTokenizer) -> None:
        """Make ``tokenizer`` know the aliases, as ordinary tokens that strip spaces where their specials do."""
        for i, token in self._specials.items():
            alias = AddedToken(
                self._alias.format(i),
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                single_word=token.single_word,
                normalized=False,
            )
            tokenizer.add_tokens([alias])
            [id_of_alias] = tokenizer.encode(alias.content, add_special_tokens=False).ids
            self._id_of_alias[id_of_alias] = i

    def hide(self, value: Any) -> Any:
        """A copy of messages in which no string spells a special."""
        match value:
            case str():
                return self._spelled.sub(lambda match: self._hidden.format(self._ids[match[0]]), value)
            case Mapping():
                return {key: self.hide(element) for key, element in value.items()}
            case list() | tuple():
                return [self.hide(element) for element in value]
            case _:
                return value

    def only_of_template(self, rendered: str) -> str:
        """The rendered text: specials as aliases, and what was hidden as it was."""
        aliased = self._spelled.sub(lambda match: self._alias.format(self._ids[match[0]]), rendered)
        return self._hidden_pattern.sub(lambda match: self._specials[int(match[1])].content, aliased)

    def resolve(self, ids: Sequence[int]) -> list[int]:
        """``ids`` with every alias's id replaced by its special's."""
        return [self._id_of_alias.get(i, i) for i in ids]
