import pytest
from sentencepiece_models import model_bytes, proto_field, toy_pieces

from mlx_afm.errors import FormatError
from mlx_afm.text.sentencepiece_model import PieceKind, parse_sentencepiece_model


def test_reads_what_the_librarys_own_reader_reads(model_file):
    reader = pytest.importorskip("sentencepiece.sentencepiece_model_pb2", reason="needs protobuf").ModelProto()
    data = model_file.read_bytes()
    reader.ParseFromString(data)
    model = parse_sentencepiece_model(data, where=model_file)
    assert [(p.text, p.score, int(p.kind)) for p in model.pieces] == [(p.piece, p.score, p.type) for p in reader.pieces]
    assert model.model_type == reader.trainer_spec.model_type
    assert model.byte_fallback == reader.trainer_spec.byte_fallback
    assert model.space_as_suffix == reader.trainer_spec.treat_whitespace_as_suffix
    assert model.character_map == reader.normalizer_spec.precompiled_charsmap
    assert model.dummy_prefix == reader.normalizer_spec.add_dummy_prefix
    assert model.remove_extra_spaces == reader.normalizer_spec.remove_extra_whitespaces
    assert model.escape_spaces == reader.normalizer_spec.escape_whitespaces


def test_absent_settings_mean_the_defaults_of_the_format():
    model = parse_sentencepiece_model(proto_field(1, proto_field(1, b"a")), where="x")
    assert model.pieces[0].kind is PieceKind.NORMAL
    assert (model.model_type, model.dummy_prefix, model.byte_fallback) == (1, True, False)


def test_unknownproto_fields_of_every_kind_are_skipped():
    extra = proto_field(90, 7) + proto_field(91, b"x") + proto_field(92, 1.0) + b"\xe9\x05" + bytes(8)
    with_extra = parse_sentencepiece_model(model_bytes(toy_pieces(), extra=extra), where="x")
    assert with_extra == parse_sentencepiece_model(model_bytes(toy_pieces()), where="x")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a model at all",
        b"\x80" * 20,
        b"\x0a\xff\xff\xff\xff\x7f",
        b"\x0a\x05ab",
        b"\x0b",
        b"\x00\x00",
        proto_field(1, proto_field(1, b"\xff")),
        proto_field(1, proto_field(3, 99)),
        proto_field(1, proto_field(2, b"xyz")),
        proto_field(1, proto_field(1, b"a")) + proto_field(2, proto_field(3, b"text")),
        proto_field(1, proto_field(1, b"a")) + proto_field(3, proto_field(2, 1)),
    ],
)
def test_hostile_bytes_are_refused(data):
    with pytest.raises(FormatError, match="some file: not a SentencePiece model"):
        parse_sentencepiece_model(data, where="some file")


def test_every_truncation_is_refused_or_a_shorter_model():
    data = model_bytes(toy_pieces())
    for stop in range(0, len(data), 7):
        try:
            assert len(parse_sentencepiece_model(data[:stop], where="x").pieces) <= len(toy_pieces())
        except FormatError:
            continue
