"""A Hugging Face tokenizer folder made from a SentencePiece model.

Stock `transformers` and stock mlx-lm then give the ids of `AFMTokenizer`, for texts and for
conversations. How SentencePiece's rules are put into `tokenizer.json`:

- The newline piece is named by a newline instead of `<n>`; it is an ordinary piece that nothing
  merges with. So decoding gives newlines, and the decoder is of the form for which mlx-lm streams
  byte by byte. (Streaming by decoding again and again repeats characters: this library decodes a
  run of byte pieces as a whole, all or nothing.)
- The other user-defined symbols are "added tokens" that are looked for after normalisation.
  Control symbols can only be written by the chat template.
- The dummy prefix is put before every text and taken away again before `<turn_start>`. So a
  rendered conversation has none, like the ids the model was trained on. The library normalises
  each added token too, by the same rules, before it looks for it; therefore a text that is
  nothing but one such symbol has no prefix either.
- Nothing takes a first space off when decoding: an answer may begin with one.

The end-of-sequence token named in the folder is `<turn_end>`: that is where an answer ends, and
mlx-lm stops there whatever `config.json` says. A list in its `eos_token_id` is added to it.

Known differences: literal `</s>` and the like become the control token; a text with the literal
name of a byte piece (`<0x0A>`) becomes that byte in unigram models; an unknown piece is decoded as
its name.
"""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

from mlx_afm.errors import FormatError
from mlx_afm.files import atomic_file, write_json, write_text
from mlx_afm.text.sentencepiece_model import SPACE, Piece, PieceKind, SentencePieceModel, parse_sentencepiece_model
from mlx_afm.text.template import NEWLINE, TURN_END, TURN_START
from mlx_afm.text.tokenizer import AFMTokenizer

_UNIGRAM, _BPE = 1, 2
_SPECIAL = (TURN_START, TURN_END)  # left out when decoding with skip_special_tokens
_MARK = "\ue000"  # stands for a newline: a character for private use, which no normalisation changes


def write_hf_tokenizer(model_file: Path, folder: Path) -> None:
    """Writes the tokenizer files of a model folder; other files there stay as they are.

    `tokenizer.model` (byte for byte), `tokenizer.json`, `tokenizer_config.json` and
    `chat_template.jinja`.

    Raises:
        FormatError: no SentencePiece model, or one whose rules `tokenizer.json` cannot hold.
        ConfigError: the model lacks what the chat template needs.
    """
    tokenizer = AFMTokenizer.from_file(model_file)
    data = Path(model_file).read_bytes()
    model = parse_sentencepiece_model(data, where=model_file)
    content = to_tokenizer_json(model, tokenizer.unk_id, where=model_file)
    with atomic_file(folder / "tokenizer.model") as partial:
        partial.write_bytes(data)
    write_json(folder / "tokenizer.json", content)
    write_json(folder / "tokenizer_config.json", _config(tokenizer))
    write_text(folder / "chat_template.jinja", tokenizer.chat_template)


def to_tokenizer_json(model: SentencePieceModel, unk_id: int, *, where: object) -> dict[str, Any]:
    """The value of `tokenizer.json`.

    Raises:
        FormatError: a kind of model or a rule that it cannot hold, all of them in one error.
    """
    _require_expressible(model, where)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(model),
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(model)},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": _unigram(model, unk_id) if model.model_type == _UNIGRAM else _bpe(model, unk_id),
    }


def _require_expressible(model: SentencePieceModel, where: object) -> None:
    faults = []
    if model.model_type not in (_UNIGRAM, _BPE):
        faults.append(f"model type {model.model_type}, neither unigram (1) nor BPE (2)")
    if model.space_as_suffix:
        faults.append("spaces are suffixes")
    if not model.escape_spaces:
        faults.append("spaces are not escaped")
    if unused := model.texts(PieceKind.UNUSED):
        faults.append(f"{len(unused)} unused pieces, such as {unused[0]!r}")
    if faults:
        raise FormatError("this SentencePiece model has no equal in tokenizer.json", where=where, details=faults)


def _added_tokens(model: SentencePieceModel) -> list[dict[str, Any]]:
    tokens = []
    for index, piece in enumerate(model.pieces):
        user_defined = piece.kind is PieceKind.USER_DEFINED
        if piece.text == NEWLINE:
            continue
        if user_defined and model.remove_extra_spaces and not piece.text.strip(f"{SPACE} "):
            continue  # a run of spaces never gets here, and would be normalised to nothing
        if user_defined or piece.kind in (PieceKind.CONTROL, PieceKind.UNKNOWN):
            flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": user_defined}
            special = not user_defined or piece.text in _SPECIAL
            tokens.append({"id": index, "content": piece.text, **flags, "special": special})
    return tokens


def _normalizers(model: SentencePieceModel) -> list[dict[str, Any]]:
    def replace(pattern: str, content: str) -> dict[str, Any]:
        return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}

    steps = [replace(rf"\n|{NEWLINE}", _MARK)]
    if model.character_map:
        charsmap = base64.b64encode(model.character_map).decode("ascii")
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if model.remove_extra_spaces:
        steps += [replace(r"\A +| +\z", ""), replace(" {2,}", " ")]
    symbols = [token["content"] for token in _added_tokens(model) if token["normalized"]]
    forms = dict.fromkeys(form for symbol in symbols for form in (symbol, symbol.replace(SPACE, " ")))
    spellings = "|".join(map(re.escape, forms))
    return [
        *steps,
        {"type": "Prepend", "prepend": SPACE},
        replace(rf"\A{SPACE}(?=(?:{spellings})\z|{TURN_START})", ""),
        replace(" ", SPACE),
        replace(_MARK, "\n"),
    ]


def _name(piece: Piece) -> str:
    return "\n" if piece.text == NEWLINE else piece.text


def _unigram(model: SentencePieceModel, unk_id: int) -> dict[str, Any]:
    vocab = [[_name(piece), piece.score] for piece in model.pieces]
    return {"type": "Unigram", "unk_id": unk_id, "vocab": vocab, "byte_fallback": model.byte_fallback}


def _bpe(model: SentencePieceModel, unk_id: int) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": model.pieces[unk_id].text,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        "ignore_merges": False,
        "vocab": {_name(piece): index for index, piece in enumerate(model.pieces)},
        "merges": _merges(model),
    }


def _merges(model: SentencePieceModel) -> list[list[str]]:
    """Every way to put a piece together from two, best score first.

    SentencePiece ranks a merge by its result alone, `tokenizer.json` by the pair; longer left
    parts go first, since SentencePiece merges from the left when scores are equal.
    """
    normal = {piece.text: piece.score for piece in model.pieces if piece.kind is PieceKind.NORMAL}
    merges = []
    for text in sorted(normal, key=lambda text: -normal[text]):
        cuts = ((text[:cut], text[cut:]) for cut in range(len(text) - 1, 0, -1))
        merges += [[left, right] for left, right in cuts if left in normal and right in normal]
    return merges


def _config(tokenizer: AFMTokenizer) -> dict[str, Any]:
    pad = tokenizer.convert_ids_to_tokens(tokenizer.pad_id) if tokenizer.pad_id >= 0 else None
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": TURN_END,
        "pad_token": pad,
        "unk_token": tokenizer.convert_ids_to_tokens(tokenizer.unk_id),
        "clean_up_tokenization_spaces": False,
    }
