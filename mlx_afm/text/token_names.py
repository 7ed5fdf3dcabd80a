"""What tokens are called, and which bytes they stand for, as log probabilities in OpenAI's API tell them."""

from __future__ import annotations

import re
from functools import cached_property

from mlx_afm.text.sentencepiece_model import SPACE
from mlx_afm.text.tokenizer import AFMTokenizer

BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenNames:
    """What a token is called and which bytes it stands for, as log probabilities tell it."""

    def __init__(self, tokenizer: AFMTokenizer) -> None:
        self._tokenizer = tokenizer

    @cached_property
    def _pieces(self) -> list[str]:
        return self._tokenizer.convert_ids_to_tokens(range(self._tokenizer.vocab_size))

    def describe(self, token: int) -> tuple[str, list[int]]:
        """Text and bytes of a token; a lone byte is called `bytes:\\xe4`."""
        if token == self._tokenizer.newline_id:
            return "\n", [10]
        if not 0 <= token < len(self._pieces):  # a row of the embedding without a piece
            return f"<{token}>", list(f"<{token}>".encode())
        piece = self._pieces[token]
        if match := BYTE.fullmatch(piece):
            return f"bytes:\\x{match[1].lower()}", [int(match[1], 16)]
        text = piece.replace(SPACE, " ")
        return text, list(text.encode())
