"""Writes the demo's SentencePiece model: 512 pieces, chosen so that arguments are easy to copy.

python tools/demo/make_tokenizer.py [--out FILE]

The trainers of SentencePiece spend a small vocabulary on fragments that cross syllables, or leave every leading
space a token of its own. So the pieces are chosen here, and the file is written directly, as a unigram model:

    3 control pieces, 5 symbols of the chat template, the space mark
    the 52 syllables that names are made of, with and without a leading space
    the 94 printable ASCII characters
    the words of the corpus that save most tokens, with or without a leading space

A piece never crosses a space, a digit or a punctuation mark (but for " -" and " --"), so an argument after a space has
the same pieces wherever it stands. All scores are alike up to a small preference by rank: the fewest pieces win.
The bytes depend on the grammar alone: no trainer, no path, no version of SentencePiece.

Source of the layout: sentencepiece_model.proto (ModelProto, TrainerSpec, NormalizerSpec).
"""

from __future__ import annotations

import argparse
import re
import struct
from collections import Counter
from pathlib import Path

from grammar import BASE, HOUSE, SYLLABLES, examples, messages

MODEL = Path(__file__).resolve().parents[2] / "mlx_afm" / "assets" / "demo" / "tokenizer.model"
SIZE = 512
SPACE = "▁"
CONTROL = ("<pad>", "<unk>", "</s>")
SYMBOLS = ("<turn_start>", "<turn_end>", "<n>", "<executable_start>", "<executable_end>")
ASCII = tuple(chr(code) for code in range(33, 127))
PAD, UNK, EOS = range(3)
NORMAL, UNKNOWN, CONTROL_TYPE, USER_DEFINED = 1, 2, 3, 4  # ModelProto.SentencePiece.Type
UNIGRAM = 1  # TrainerSpec.ModelType

_RUN = re.compile(rf"{SPACE}?[A-Za-z]+|{SPACE}--?")
_FRAGMENT = re.compile("|".join([*(SPACE + s for s in SYLLABLES), *SYLLABLES, "."]))


def template_text(request: str, command: str) -> str:
    """A pair in the chat template, as text, with newlines already written as `<n>`."""
    turns = messages(request, command)
    return "".join(f"<turn_start> {turn['role']}<n>{turn['content']}<turn_end>" for turn in turns)


def choose_words(count: int) -> list[str]:
    """The `count` letter runs that save most tokens over syllables and characters, best first."""
    corpus = examples(BASE, 12_000, seed=1) + examples(HOUSE, 4_000, seed=1)
    runs: Counter[str] = Counter()
    for example in corpus:
        text = template_text(example.request, example.command)
        for symbol in SYMBOLS:
            text = text.replace(symbol, "\n")
        runs.update(_RUN.findall(text.replace(" ", SPACE)))
    saved = {run: times * (len(_FRAGMENT.findall(run)) - 1) for run, times in runs.items()}
    best = sorted(saved, key=lambda run: (-saved[run], run))[:count]
    assert saved[best[-1]] > 0
    return best


def choose_pieces() -> list[tuple[str, float, int]]:
    """All pieces in the order of their ids: (text, score, type)."""
    fixed = [SPACE, *(SPACE + syllable for syllable in SYLLABLES), *SYLLABLES, *ASCII]
    words = choose_words(SIZE - len(CONTROL) - len(SYMBOLS) - len(fixed))
    pieces = [(text, 0.0, UNKNOWN if text == "<unk>" else CONTROL_TYPE) for text in CONTROL]
    pieces += [(text, 0.0, USER_DEFINED) for text in SYMBOLS]
    pieces += [(text, -10 - rank / 1024, NORMAL) for rank, text in enumerate(words + fixed)]
    return pieces


def model_bytes() -> bytes:
    """The SentencePiece model file."""
    fields = [_text(1, text) + _float(2, score) + _int(3, kind) for text, score, kind in choose_pieces()]
    pieces = b"".join(_message(1, content) for content in fields)
    trainer = _int(3, UNIGRAM) + _int(4, SIZE)
    trainer += _int(25, 1)  # split_digits
    trainer += b"".join(_text(31, symbol) for symbol in SYMBOLS)
    trainer += _int(40, UNK) + _int(41, -1) + _int(42, EOS) + _int(43, PAD)
    trainer += _text(45, "<unk>") + _text(46, "<s>") + _text(47, "</s>") + _text(48, "<pad>")
    normalizer = _text(1, "identity") + _int(3, 1) + _int(4, 0) + _int(5, 1)  # dummy prefix, keep spaces, escape them
    return pieces + _message(2, trainer) + _message(3, normalizer)


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # a negative int32 is written as 64 bits
    result = bytearray()
    while value > 0x7F:
        result.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*result, value])


def _int(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _text(field: int, value: str) -> bytes:
    return _message(field, value.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=MODEL)
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_bytes(model_bytes())


if __name__ == "__main__":
    main()
