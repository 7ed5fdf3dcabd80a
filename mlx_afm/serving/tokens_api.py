"""The tokenizer over HTTP, as vLLM has it."""

from __future__ import annotations

from typing import Any

from mlx_afm.errors import AFMError
from mlx_afm.serving.api_error import APIError, invalid_fields
from mlx_afm.serving.bodies import DetokenizeBody, TokenizeBody
from mlx_afm.serving.requests import Reader, definition
from mlx_afm.text.token_names import TokenNames
from mlx_afm.text.tokenizer import require_token_ids


def tokenize(body: TokenizeBody, reader: Reader, names: TokenNames) -> dict[str, Any]:
    """Ids of a text, or of a conversation as chat completions would render it.

    Raises:
        APIError: neither, or both; a conversation that the template cannot render.
    """
    if (body.prompt is None) == (body.messages is None):
        raise invalid_fields([("prompt", "expected prompt or messages, one of them")])
    if body.messages is not None:
        tools = [definition(tool) for tool in body.tools or []]
        ids = reader.prompt(body.model or "", [message.plain() for message in body.messages], tools).ids
    elif body.prompt == end_token(reader):  # programs ask for its id in this way
        ids = [reader.tokenizer.eos_id]
    else:
        start = [] if body.add_special_tokens is False else [reader.tokenizer.eos_id]
        ids = [*start, *reader.tokenizer.encode(body.prompt or "")]
    texts = [names.describe(token)[0] for token in ids] if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": reader.config.context_tokens, "tokens": ids, "token_strs": texts}


def end_token(reader: Reader) -> str:
    """The name of the token that ends a text and stands in front of one."""
    return reader.tokenizer.convert_ids_to_tokens([reader.tokenizer.eos_id])[0]


def detokenize(body: DetokenizeBody, reader: Reader) -> dict[str, Any]:
    """The text of ids.

    Raises:
        APIError: an id that the model does not have.
    """
    try:
        ids = require_token_ids(body.tokens, reader.vocabulary, where="tokens")
    except AFMError as error:
        raise APIError(400, str(error), code="invalid_value", param="tokens") from error
    return {"prompt": reader.tokenizer.decode([token for token in ids if token < reader.tokenizer.vocab_size])}


def tokenizer_info(reader: Reader) -> dict[str, Any]:
    """What programs ask of a tokenizer before they use it."""
    tokenizer, end = reader.tokenizer, end_token(reader)
    return {
        "tokenizer_class": "SentencePieceTokenizer",
        "vocab_size": tokenizer.vocab_size,
        "model_max_length": reader.config.context_tokens,
        "bos_token": end,
        "eos_token": end,
        "eos_token_id": tokenizer.eos_id,
        "bos_token_id": tokenizer.eos_id,
        "add_bos_token": True,
        "chat_template": None,
    }
