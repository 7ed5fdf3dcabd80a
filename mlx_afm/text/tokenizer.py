"""The tokenizer: a SentencePiece model, and newlines written as `<n>`.

Besides its own methods it has those of a Hugging Face tokenizer that mlx-lm touches, so that
`mlx_lm.stream_generate` and its detokenizer work with it as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import sentencepiece

from mlx_afm.errors import ConfigError, DataError, FormatError
from mlx_afm.files import require_not_lfs_pointer, to_path
from mlx_afm.text import template
from mlx_afm.text.hf_chat_template import hf_chat_template
from mlx_afm.text.messages import parse_messages, parse_tools
from mlx_afm.text.sentencepiece_model import SPACE, PieceKind, SentencePieceModel, parse_sentencepiece_model
from mlx_afm.text.system_prompt import with_system_prompt
from mlx_afm.text.words import Counts, Ids, WordTable, flat, in_full, may_cut_before, words_are_independent

_SPECIAL_TOKENS = {
    "turn_start": template.TURN_START,
    "turn_end": template.TURN_END,
    "newline": template.NEWLINE,
    "executable_start": template.EXECUTABLE_START,
    "executable_end": template.EXECUTABLE_END,
}


def require_token_ids(ids: Iterable[object], vocabulary: int, *, where: object) -> list[int]:
    """The ids as integers, if the model has a row of the embedding for each.

    An id that is too large or negative makes the model read memory that is not its own.

    Args:
        ids: token ids, from wherever.
        vocabulary: rows of the model's embedding; there may be more than the tokenizer has pieces.
        where: named in the error.

    Raises:
        ConfigError: the first id that cannot be used, and its place, counted from 0.
    """
    checked = []
    for place, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, (int, np.integer)) or not 0 <= token < vocabulary:
            raise ConfigError(
                "token id outside the vocabulary",
                where=f"{where}, token {place}",
                expected=f"a whole number from 0 to {vocabulary - 1} (the model has {vocabulary} tokens)",
                found=f"{token!r:.80}",
            )
        checked.append(int(token))
    return checked


class AFMTokenizer:
    """Text to ids and back.

        encode("hello\\nworld")         [▁hel, lo, <n>, world]
        decode([hel, lo, <n>, ▁world])  "hello\\n world"

    Attributes:
        eos_id, pad_id, unk_id: the model's own; a pad id of -1 means that there is none.
        turn_start_id, turn_end_id, newline_id, executable_start_id, executable_end_id: special tokens of
            the chat template.
        prefix_id: the lone space that encoding puts before a text that begins with a special token.
        special_pieces: pieces that no text of a conversation may spell out.
        threads: how many encode many texts at once.
        file, sha256: the `tokenizer.model`, and the hash of its content in hex.
        system_prompt: of conversations without a system message, in prompts; None for no system turn. `load` sets it
            to the one that the adapter was trained with (see `system_prompt.py`).
    """

    bos_token = None
    bos_token_id = None
    clean_up_tokenization_spaces = False

    def __init__(
        self, processor: sentencepiece.SentencePieceProcessor, model: SentencePieceModel, file: Path, sha256: str
    ) -> None:
        """Use `from_file`."""
        _require_symbols(processor, model, file)
        self.file, self.sha256 = file, sha256
        self.threads = 1
        self.system_prompt: str | None = template.DEFAULT_SYSTEM
        self._processor = processor
        self._pieces = tuple(piece.text for piece in model.pieces)
        self._kinds = tuple(piece.kind for piece in model.pieces)
        ids = {piece: index for index, piece in enumerate(self._pieces)}
        self.vocab_size = len(self._pieces)
        self.eos_id: int = processor.eos_id()
        self.pad_id: int = processor.pad_id()
        self.unk_id: int = processor.unk_id()
        self.turn_start_id = ids[template.TURN_START]
        self.turn_end_id = ids[template.TURN_END]
        self.newline_id = ids[template.NEWLINE]
        self.executable_start_id = ids[template.EXECUTABLE_START]
        self.executable_end_id = ids[template.EXECUTABLE_END]
        self.prefix_id = ids[SPACE]
        self.special_pieces = _special_pieces(model)
        mark = template.TURN_END if may_cut_before(template.TURN_END, model) else None
        self._words = WordTable(self.encode_many, mark) if words_are_independent(model) else None
        self.chat_template = hf_chat_template(self._pieces[self.eos_id])

    @classmethod
    def from_file(cls, path: str | Path) -> AFMTokenizer:
        """The tokenizer in a `tokenizer.model`.

        Raises:
            FormatError: no such file, or no SentencePiece model.
            ConfigError: a symbol that the chat template needs is missing, or the dummy prefix is;
                everything in one error.
        """
        path = to_path(path)
        if not path.is_file():
            raise FormatError("no such file", where=path, expected="a SentencePiece tokenizer.model")
        data = path.read_bytes()
        require_not_lfs_pointer(path, data)
        return cls.from_bytes(data, path)

    @classmethod
    def from_bytes(cls, data: bytes, path: Path) -> AFMTokenizer:
        """The tokenizer in the content of the file `path`, which is named in messages.

        Raises:
            FormatError, ConfigError: see `from_file`.
        """
        model = parse_sentencepiece_model(data, where=path)
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(data)
        except (RuntimeError, OSError) as error:
            raise FormatError("SentencePiece refuses this model", where=path, found=error) from error
        return cls(processor, model, path, hashlib.sha256(data).hexdigest())

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Ids of a text; nothing is added or dropped, whatever `add_special_tokens` says.

        The first piece carries the space that SentencePiece puts before every text.

        Raises:
            DataError: a lone surrogate, which is no text.
        """
        try:
            ids: list[int] = self._processor.encode(text.replace("\n", template.NEWLINE))
        except (UnicodeEncodeError, RuntimeError) as error:  # which of them depends on the release
            _require_text(text)
            raise DataError("SentencePiece cannot encode this text", found=error) from error
        return ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, as `encode` gives them; one call for all, which costs less.

        Raises:
            DataError: a text that is none.
        """
        try:
            encoded: list[list[int]] = self._processor.encode(
                [text.replace("\n", template.NEWLINE) for text in texts], num_threads=self.threads
            )
        except (UnicodeEncodeError, RuntimeError, TypeError):
            return [self.encode(text) for text in texts]  # says which text it is
        return encoded

    def encode_flat(self, texts: Sequence[str], shared: str = "") -> tuple[Ids, Counts]:
        """Ids of all texts, int32 (N,), and how many each has, int64 (texts,): those of `encode`, at the least cost.

        Args:
            texts: what to encode; `words.SHARED` at the beginning of one, before a space, stands for `shared`.
            shared: whole words that many of the texts begin with.

        Raises:
            DataError: a text that is none.
        """
        if self._words is not None:
            return self._words.encode(texts, shared)
        encoded = self.encode_many(in_full(texts, shared))
        return flat(encoded), np.fromiter(map(len, encoded), np.int64, len(encoded))

    def unknown_texts(self, text: str) -> list[str]:
        """The parts of a text that become the unknown token, in their order."""
        spelled = text.replace("\n", template.NEWLINE)
        pieces: list[str] = self._processor.encode(spelled, out_type=str)
        return [piece for piece, token in zip(pieces, self.encode(text), strict=True) if token == self.unk_id]

    def decode(self, ids: Iterable[int], *, strip_prefix: bool = False) -> str:
        """Text of ids that continue a text, as an answer does: each space is kept.

        So the texts of the parts, cut at newlines, are the text of the whole, and streaming gives
        the same as decoding at once. Only the newline token becomes a newline. Control tokens have no text.

        Args:
            ids: token ids.
            strip_prefix: the ids begin a text, as `encode` gave them: take its first space off.

        Raises:
            ConfigError: an id outside the vocabulary.
        """
        lines = [[self.newline_id]]
        for token in map(int, ids):
            if not 0 <= token < self.vocab_size:
                raise ConfigError(
                    "token id outside the vocabulary", expected=f"0 to {self.vocab_size - 1}", found=token
                )
            if token == self.newline_id:
                lines.append([token])
            else:
                lines[-1].append(token)
        # A newline token in front of every line keeps SentencePiece from taking its first space off.
        text = "\n".join(self._processor.decode(line)[len(template.NEWLINE) :] for line in lines)
        return text.removeprefix(" ") if strip_prefix else text

    def token_bytes(self) -> list[bytes | None]:
        """UTF-8 bytes that each id adds to a text; None for control tokens and the special tokens of a conversation."""
        return [self._bytes_of(token) for token in range(self.vocab_size)]

    def _bytes_of(self, token: int) -> bytes | None:
        piece, kind = self._pieces[token], self._kinds[token]
        if token == self.newline_id:
            return b"\n"
        if kind == PieceKind.BYTE:
            return bytes([int(piece[1:-1], 16)])  # <0x41>
        if kind not in (PieceKind.NORMAL, PieceKind.USER_DEFINED) or piece in self.special_pieces:
            return None
        return piece.replace(SPACE, " ").encode()

    # What mlx-lm reads.

    @property
    def eos_token_id(self) -> int:
        """The id that ends an answer: the end of a turn, since that is all mlx-lm looks at."""
        return self.turn_end_id

    @property
    def eos_token_ids(self) -> set[int]:
        """All ids at which an answer ends."""
        return {self.turn_end_id, self.eos_id}

    @property
    def eos_token(self) -> str:
        """The piece of `eos_token_id`."""
        return template.TURN_END

    def __len__(self) -> int:
        return self.vocab_size

    def get_vocab(self) -> dict[str, int]:
        """Piece to id."""
        return {piece: index for index, piece in enumerate(self._pieces)}

    @overload
    def convert_ids_to_tokens(self, ids: int) -> str: ...
    @overload
    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str]: ...
    def convert_ids_to_tokens(self, ids: int | Iterable[int]) -> str | list[str]:
        """The pieces of ids, or of one id."""
        return self._pieces[ids] if isinstance(ids, int) else [self._pieces[token] for token in ids]

    def convert_tokens_to_ids(self, token: str) -> int | None:
        """The id of a piece, None if there is no such piece."""
        return self.get_vocab().get(token)

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        tokenize: bool = True,
        continue_final_message: bool = False,
        **_: object,
    ) -> list[int] | str:
        """Ids (or, not tokenized, the text without the end-of-sequence token) of a conversation.

        Args:
            messages: a list of dicts, checked as in training.
            tools: tool definitions for the system turn.
            add_generation_prompt: end with the head of an answer.
            tokenize: ids rather than text.
            continue_final_message: leave the last answer open, to be continued.
            _: settings of other templates (`enable_thinking`, `return_dict`) have no meaning here.

        Raises:
            DataError: a conversation that cannot be rendered.
        """
        parsed = parse_messages(messages, where="messages", special_pieces=self.special_pieces)
        parsed = with_system_prompt(parsed, self.system_prompt)
        definitions = parse_tools(tools or (), where="tools", special_pieces=self.special_pieces)
        spans = template.render(parsed, system=None, tools=definitions, add_generation_prompt=add_generation_prompt)
        open_end = continue_final_message and spans[-1].text.endswith(template.TURN_END)
        if tokenize:
            ids = template.encode(spans, self).ids
            return ids[:-1] if open_end else ids
        text = "".join(span.text for span in spans)
        return text.removesuffix(template.TURN_END) if open_end else text


def _require_symbols(processor: sentencepiece.SentencePieceProcessor, model: SentencePieceModel, where: object) -> None:
    faults = []
    user_defined = set(model.texts(PieceKind.USER_DEFINED))
    faults += [f"no user-defined symbol {token}" for token in _SPECIAL_TOKENS.values() if token not in user_defined]
    if processor.eos_id() < 0:
        faults.append("no end-of-sequence piece")
    if not model.dummy_prefix:
        faults.append("no dummy prefix: texts are not encoded with a space in front")
    if SPACE not in model.texts(PieceKind.NORMAL, PieceKind.USER_DEFINED):
        faults.append(f"no piece for a lone space ({SPACE})")
    if faults:
        raise ConfigError(
            "this tokenizer cannot write the chat template",
            where=where,
            advice="Use the tokenizer.model that came with the model",
            details=faults,
        )


def _require_text(text: str) -> None:
    for index, character in enumerate(text):
        if "\ud800" <= character <= "\udfff":
            raise DataError("not text: a lone surrogate", where=f"column {index + 1}", found=repr(character))


def _special_pieces(model: SentencePieceModel) -> tuple[str, ...]:
    """User-defined pieces that change a conversation's structure when a text spells them out.

    Not among them: the newline piece, which a text may spell (it reads as a newline, as with the
    toolkit); control pieces, which text never turns into; and runs of spaces, digits or words that
    models also define as symbols.
    """
    special = []
    for piece in model.texts(PieceKind.USER_DEFINED):
        visible = piece.replace(SPACE, " ").strip()
        if len(visible) > 1 and not visible.isalnum() and piece != template.NEWLINE:
            special.append(piece)
    return tuple(special)
