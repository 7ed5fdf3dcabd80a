"""Small SentencePiece models: one written by hand, whose ids the tests spell out, and trained ones."""

import io
import struct

import sentencepiece

MARKS = ["<turn_start>", "<turn_end>", "<n>", "<executable_start>", "<executable_end>"]

TOY_WORDS = ["▁", "▁system", "▁user", "▁assistant", "▁tool", "hel", "lo", "▁world", "A", "▁conversation"]
TOY_WORDS += ["▁between", "▁a", "▁and", "▁helpful", ".", "function"]
TOY_LETTERS = [chr(code) for code in range(0x21, 0x7F) if chr(code) not in "A."]

TEXT = """\
The lighthouse keeper writes one line a day: weather, ships, and what he had for supper.
Open the valve slowly, wait ten seconds, then close it again; never leave it half open!
How many apples are left if 12 friends eat 3 each from a basket of 40? There are 4.
def area(width, height):
    return width * height  # in metres, not feet
{"name": "weather", "arguments": {"city": "Paris", "days": [1, 2, 3]}}
A conversation between a user and a helpful assistant. You answer with the command alone.
tar --extract --file archive.tar.gz -C /tmp/folder && ls -la ~/Documents | grep '\\.txt$'
response format in json. name: city description: None schema: {"type": "object"}
system tools: new tools: function user assistant tool
Größe, Äpfel und Öl; naïve café; señor; 東京 は 大きい; Привет, мир; γεια σου κόσμε
"""


def proto_field(number, value):
    def varint(value):
        out = bytearray()
        while value > 0x7F:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        return bytes([*out, value])

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def model_bytes(pieces, *, dummy_prefix=True, model_type=1, extra=b""):
    """A SentencePiece model of (text, score, kind) triples, with no normalisation at all."""
    entries = [proto_field(1, t.encode()) + proto_field(2, float(s)) + proto_field(3, k) for t, s, k in pieces]
    trainer = proto_field(3, model_type)
    normaliser = proto_field(1, b"identity") + proto_field(3, int(dummy_prefix)) + proto_field(4, 0) + proto_field(5, 1)
    return (
        b"".join(proto_field(1, entry) for entry in entries)
        + proto_field(2, trainer)
        + proto_field(3, normaliser)
        + extra
    )


def toy_pieces(marks=MARKS):
    pieces = [("<pad>", 0, 3), ("<unk>", 0, 2), ("</s>", 0, 3), *((mark, 0, 4) for mark in marks)]
    pieces += [(word, -1 - index / 64, 1) for index, word in enumerate(TOY_WORDS)]
    return pieces + [(letter, -5 - index / 64, 1) for index, letter in enumerate(TOY_LETTERS)]


def train(model_type, **settings):
    """Bytes of a model trained on TEXT in a fraction of a second."""
    model = io.BytesIO()
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines() * 4),
        model_writer=model,
        model_type=model_type,
        pad_id=0,
        unk_id=1,
        eos_id=2,
        bos_id=-1,
        user_defined_symbols=[*MARKS, "▁▁▁▁"],
        minloglevel=2,
        num_threads=1,
        hard_vocab_limit=False,
        **{"vocab_size": 480, **options, **settings},
    )
    return model.getvalue()


TRAINED = {
    "unigram": lambda: train("unigram"),
    "bpe": lambda: train("bpe"),
    "unigram-unk": lambda: train("unigram", byte_fallback=False, vocab_size=220),
    "bpe-unk": lambda: train("bpe", byte_fallback=False, vocab_size=220),
    "unigram-nfkc": lambda: train("unigram", normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True),
}
