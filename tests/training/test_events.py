"""Events as lines of `metrics.jsonl`."""

import math

from mlx_afm.training import Evaluated, ZeroGradientsFound, to_record


def test_a_record_has_the_values_of_its_event_and_null_for_what_json_lacks():
    evaluated = Evaluated(step=3, loss=1.5, tokens=12, best=True, seconds=0.25)
    expected = {"event": "eval", "step": 3, "loss": 1.5, "tokens": 12, "best": True, "seconds": 0.25}
    assert to_record(evaluated) == expected
    for value in (math.nan, math.inf, -math.inf):
        assert to_record(Evaluated(step=3, loss=value, tokens=12, best=True, seconds=0.25)) == {
            **expected,
            "loss": None,
        }


def test_a_record_keeps_names():
    event = ZeroGradientsFound(step=3, names=("a.lora_b",), trained_tensors=4)
    assert to_record(event) == {
        "event": "zero_gradients", "step": 3, "names": ("a.lora_b",), "trained_tensors": 4,
    }  # fmt: skip
