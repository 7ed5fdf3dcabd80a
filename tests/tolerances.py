"""Every tolerance of the tests, with its reason."""

# Two float32 backends summing in other orders, a few layers deep.
LOGITS = 2e-5
# With the 8-bit fake quantizers on, a value near a rounding boundary may fall the other way.
LOGITS_QUANTIZED = 1e-2
# Greedy tokens are compared where the first choice leads the second by this much.
GREEDY_MARGIN = 1e-3
# Gradients, relative to the norm of each tensor's gradient.
GRADIENT = 1e-3
# The same arithmetic in another order, or in other batches.
SAME_ARITHMETIC = 1e-5
# A weight merged in float32 against the two products computed apart.
FUSED = 1e-4
# Logits with an adapter of float32 against the same rounded to float16 (11 bits), a few layers deep.
ADAPTER_FP16 = 1e-3
