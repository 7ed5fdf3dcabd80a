"""Answers that follow a JSON schema: tokens that would leave it are ruled out before one is chosen.

Which tokens these are is llguidance's work (the `guided` extra); ours is to tell it what every token spells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np

from mlx_afm.errors import AFMError, ConfigError, MissingDependencyError
from mlx_afm.generation.sampling import LogitsProcessor
from mlx_afm.generation.schema import parse_wanted
from mlx_afm.text.tokenizer import AFMTokenizer

NO_TOKEN = "NoExtensionBias"  # llguidance's word for a text that no token can continue
FEW = 32  # tokens that are looked at one by one
SEPARATORS = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}


def guided_processor(tokenizer: AFMTokenizer, schema: Any) -> GuidedProcessor:
    """What keeps one answer to a schema; a new one for each answer.

    Args:
        tokenizer: the model's.
        schema: a JSON schema, a `response_format` or a pydantic model, see `parse_wanted`.

    Raises:
        MissingDependencyError: llguidance is not installed.
        ConfigError: a schema that is none, or that says what cannot be kept while writing (`not`, `uniqueItems`, ...).
    Cost: the first call for a tokenizer, a table of its tokens; each, the grammar: milliseconds for usual schemas.
    """
    matchers = _import_llguidance().LLMatcher
    wanted = parse_wanted(schema)
    try:
        if wanted.kind == "regex":
            grammar = matchers.grammar_from_regex(wanted.text)
        else:
            grammar = matchers.grammar_from_json_schema(wanted.text, overrides=SEPARATORS)
    except ValueError as error:  # nested too deeply for it
        raise ConfigError("an answer cannot be held to this schema", where="schema", found=error) from error
    return processor_of_grammar(tokenizer, grammar, where="schema")


def processor_of_grammar(tokenizer: AFMTokenizer, grammar: str, *, where: str) -> GuidedProcessor:
    """What keeps one answer to a grammar of llguidance's; `where` is what the user gave.

    Raises:
        MissingDependencyError, ConfigError: as `guided_processor`.
    """
    matcher = _import_llguidance().LLMatcher(_vocabulary(tokenizer), grammar, log_level=0)
    if matcher.is_error():
        advice = "Say it without what is not supported, or check the answer afterwards."
        found = _reason(matcher)
        raise ConfigError("an answer cannot be held to this schema", where=where, found=found, advice=advice)
    return GuidedProcessor(matcher, tokenizer)


def guided_when_asked(tokenizer: AFMTokenizer, schema: Any) -> LogitsProcessor:
    """The same, made at the first call: for the answers of a long file, nearly all of which are waiting."""
    made: list[GuidedProcessor] = []

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        if not made:
            made.append(guided_processor(tokenizer, schema))
        return made[0](tokens, logits)

    return process


class GuidedProcessor:
    """A logits processor of mlx-lm's kind: called with all tokens so far and the logits of the next one.

    The first call sees the prompt alone; what later calls see behind it is the answer. An answer that grew by several
    tokens, or lost its last ones, as in speculative decoding, is followed. The end of the turn is allowed once the
    answer is whole, and the only thing allowed when nothing can follow.
    """

    def __init__(self, matcher: Any, tokenizer: AFMTokenizer) -> None:
        """Use `guided_processor`."""
        self._matcher, self._tokenizer = matcher, tokenizer
        self._prompt_tokens: int | None = None
        self._answer: list[int] = []
        self._consumed = 0  # tokens of the answer that the matcher has: all before the end of the turn
        self._allowed: dict[int, mx.array] = {}  # by tokens of the answer, bool (V,)

    @property
    def complete(self) -> bool:
        """Whether the answer as seen last is whole. False when `max_tokens` cut it."""
        return bool(self._matcher.is_accepting())

    def __call__(self, tokens: mx.array | Sequence[int], logits_BV: mx.array) -> mx.array:
        """The logits (1, V), minus infinity for what may not follow.

        Raises:
            ConfigError: the schema wants a text that the tokenizer's pieces cannot spell.
            AFMError: tokens that were not allowed.
        Cost: waits for the tokens.
        """
        if self._prompt_tokens is None:
            self._prompt_tokens = len(tokens)
        rest = tokens[self._prompt_tokens :]
        answer: Any = rest.tolist() if isinstance(rest, mx.array) else rest
        self._follow([int(token) for token in answer])
        if len(answer) not in self._allowed:
            self._allowed[len(answer)] = self._find_allowed(logits_BV.shape[-1])
        return mx.where(self._allowed[len(answer)], logits_BV, -mx.inf)

    def _follow(self, answer: list[int]) -> None:
        """Brings the matcher to this answer."""
        same = next((i for i, (old, new) in enumerate(zip(self._answer, answer)) if old != new), None)
        same = min(len(self._answer), len(answer)) if same is None else same
        if self._consumed > same:
            self._matcher.rollback(self._consumed - same)
            self._consumed = same
        self._allowed = {count: allowed for count, allowed in self._allowed.items() if count <= same}
        self._answer = answer
        for token in answer[self._consumed : self._spoken()]:
            if not self._matcher.consume_token(token):
                raise AFMError("the answer left its schema", where=f"token {self._consumed + 1}", found=token)
            self._consumed += 1

    def _spoken(self) -> int:
        """Tokens before the end of the turn, which the matcher never sees: it cannot take it back rightly."""
        end = self._tokenizer.turn_end_id
        return self._answer.index(end) if end in self._answer else len(self._answer)

    def _find_allowed(self, rows: int) -> mx.array:
        """Which of the rows of logits may be chosen now, bool (rows,)."""
        end, allowed = self._tokenizer.turn_end_id, np.zeros(max(rows, self._tokenizer.vocab_size), bool)
        if self._spoken() < len(self._answer):
            allowed[end] = True
            return mx.array(allowed[:rows])
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error() and NO_TOKEN not in _reason(self._matcher):
            raise AFMError("the schema became too complex to follow", found=_reason(self._matcher))
        tokens = np.flatnonzero(np.unpackbits(bits, bitorder="little")[: self._tokenizer.vocab_size])
        if self._matcher.is_error():
            tokens = tokens[:0]
        if len(tokens) <= FEW:  # when no piece can spell what must follow, some are named that cannot follow either
            tokens = np.array([token for token in tokens if self._possible(int(token))], np.int64)
        if not len(tokens):
            text = self._tokenizer.decode(self._answer)
            advice = "Rename what it cannot write, or use another tokenizer."
            raise ConfigError("no token can continue the answer", where="schema", found=repr(text), advice=advice)
        allowed[tokens] = True
        return mx.array(allowed[:rows])

    def _possible(self, token: int) -> bool:
        if token == self._tokenizer.turn_end_id:
            return self.complete
        return bool(self._matcher.validate_tokens([token]))


class _Pieces:
    """The tokenizer as llguidance wants to see it."""

    bos_token_id = None

    def __init__(self, tokenizer: AFMTokenizer) -> None:
        spelled = tokenizer.token_bytes()
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.turn_end_id
        self.tokens = [text or b"" for text in spelled]
        self.special_token_ids = [token for token, text in enumerate(spelled) if text is None]
        self._ids = {text: token for token, text in enumerate(spelled) if text}
        self._longest = max(map(len, self._ids))

    def __call__(self, text: bytes) -> list[int]:
        """Ids of a text that only one continuation is left for; as the model would have learnt them, if it can be.

        Not so if the text contains a special token, or one that the tokenizer would normalise.
        """
        ids = self._tokenizer.encode("\n" + text.decode())[2:]  # behind a newline no space is added
        return ids if b"".join(self.tokens[token] for token in ids) == text else self._longest_pieces(text)

    def _longest_pieces(self, text: bytes) -> list[int]:
        ids, place = [], 0
        while place < len(text):
            ends = range(min(place + self._longest, len(text)), place, -1)
            end = next((end for end in ends if text[place:end] in self._ids), None)
            if end is None:
                break  # no piece; what is left is left to the search
            ids.append(self._ids[text[place:end]])
            place = end
        return ids


_VOCABULARIES: WeakKeyDictionary[AFMTokenizer, Any] = WeakKeyDictionary()


def _vocabulary(tokenizer: AFMTokenizer) -> Any:
    """llguidance's table of the tokens, made once for each tokenizer."""
    if tokenizer not in _VOCABULARIES:
        llguidance = _import_llguidance()
        wrapped = llguidance.TokenizerWrapper(_Pieces(tokenizer))
        slices = llguidance.LLTokenizer.json_slices()
        _VOCABULARIES[tokenizer] = llguidance.LLTokenizer(
            wrapped, n_vocab=tokenizer.vocab_size, eos_token=tokenizer.turn_end_id, slices=slices
        )
    return _VOCABULARIES[tokenizer]


def _reason(matcher: Any) -> str:
    """What a matcher complains of, without the state that it shows beneath."""
    lines = matcher.get_error().strip().split("\n")
    why = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), None)
    if why is None or not lines[0].endswith("regex parse error:"):
        return str(lines[0])
    return f"pattern {lines[1].strip()!r}: {why}"


def _import_llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        advice = "Install it: pip install 'mlx-afm[guided]'."
        raise MissingDependencyError("answers by a schema need the llguidance library", advice=advice) from error
    return llguidance
