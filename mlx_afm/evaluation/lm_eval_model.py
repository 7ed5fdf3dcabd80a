"""Our models in lm-evaluation-harness, without a server.

    mlx-afm-lm-eval --model mlx-afm --model_args model=afm-mlx,adapter=poet.fmadapter --tasks hellaswag

takes the options of `lm_eval`. That program (0.4) finds only the models that it lists itself, so this one adds ours and
goes on as `lm_eval`. In a script, import this module and pass `model="mlx-afm"` to `lm_eval.simple_evaluate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_afm.data.config import CONTEXT_TOKENS
from mlx_afm.errors import MissingDependencyError, SettingError
from mlx_afm.generation.answers import iter_answers
from mlx_afm.generation.config import GenerateConfig
from mlx_afm.generation.loglikelihood import loglikelihoods
from mlx_afm.generation.prompts import require_tokenizer
from mlx_afm.generation.rows import Request
from mlx_afm.workflows.load import load

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences
except ImportError as error:
    advice = "Install it: pip install 'mlx-afm[lm-eval]'."
    raise MissingDependencyError("this needs lm-evaluation-harness", advice=advice) from error

SAMPLING = {"top_p", "top_k", "min_p", "seed"}  # besides temperature
MAX_ANSWER_TOKENS = 256  # of a task that does not say, as lm_eval's own models have it


@register_model("mlx-afm")
class AFMEvalModel(TemplateLM):  # type: ignore[misc]
    """A base with at most one adapter.

    Args:
        model: MLX folder, or hub id.
        adapter: folder, `.pt` or `.fmadapter`; None for the base.
        batch_size: answers that are generated at once.
        max_length: tokens of context and answer together; a longer context loses its beginning.
        device, max_batch_size: what lm_eval passes to every model; MLX's default device is used.

    Raises:
        SettingError: `unknown` arguments; and see `mlx_afm.load`.
    """

    def __init__(
        self,
        model: str,
        adapter: str | None = None,
        batch_size: int | str | None = 16,
        max_length: int = CONTEXT_TOKENS,
        device: str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            expected, found = "model, adapter, batch_size, max_length", ", ".join(sorted(unknown))
            raise SettingError("unknown model_args", expected=expected, found=found)
        self._model, tokenizer = load(model, adapter)
        self.tokenizer = require_tokenizer(tokenizer)
        self._batch_size = int(str(batch_size)) if str(batch_size).isdecimal() else 16
        self._max_length = int(max_length)

    @property
    def eot_token_id(self) -> int:
        """The token that also stands in front of every text."""
        return self.tokenizer.eos_id

    @property
    def tokenizer_name(self) -> str:
        """Which part of lm_eval's caches belongs to this tokenizer."""
        return "mlx-afm"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Ids of a text, without a token in front, as the server's /tokenize gives them to lm_eval."""
        return self.tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        pairs = []
        for _, context, continuation in requests:
            ids = [*context, *continuation][-self._max_length :]
            place = max(len(ids) - len(continuation), 1)
            pairs.append((ids[:place], ids[place:]))
        found = loglikelihoods(self._model, pairs)
        return [
            (sum(token.logprob or 0.0 for token in tokens), all(token.logprob == token.top[0][1] for token in tokens))
            for tokens in found
        ]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log probability of whole texts, in windows of the model's context."""
        totals = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            windows = utils.get_rolling_token_windows(ids, self.prefix_token_id, self._max_length - 1, 1)
            pairs = [(None, *utils.make_disjoint_window(window)) for window in windows]
            totals.append(sum(value for value, _ in self._loglikelihood_tokens(pairs)))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers to contexts, each up to one of its stop strings."""
        made = [self._request(*request.args) for request in requests]
        answers = dict(iter_answers(self._model, self.tokenizer, made, batch_size=self._batch_size))
        return [answers[number].text for number in range(len(made))]

    def _request(self, context: str, settings: dict[str, Any]) -> Request:
        """A prompt and how to answer it; settings that have no meaning here are refused."""
        given = {key: value for key, value in settings.items() if key != "do_sample"}
        limit = given.pop("max_tokens", given.pop("max_gen_toks", MAX_ANSWER_TOKENS))
        stop = [text for text in handle_stop_sequences(given.pop("until", None), None) if text]
        temperature = given.pop("temperature", 0.0) if settings.get("do_sample", True) else 0.0
        if unknown := sorted(given.keys() - SAMPLING):
            expected, found = ", ".join(sorted(SAMPLING)), ", ".join(unknown)
            raise SettingError("generation_kwargs that have no meaning here", expected=expected, found=found)
        config = GenerateConfig(max_tokens=limit, temp=temperature, stop=tuple(stop), **given)
        return Request(ids=self.tok_encode(context)[-(self._max_length - limit) :], config=config)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Not possible as a text: the special tokens of the template are ids that no text spells."""
        raise NotImplementedError("mlx-afm renders conversations to ids; evaluate through /v1/chat/completions")


def run_lm_eval() -> None:
    """Runs `lm_eval` with the arguments of this process; it knows `mlx-afm` too."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
