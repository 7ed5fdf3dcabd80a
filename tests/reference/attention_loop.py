"""The model in float64 loops over tokens and heads: slow, plain, and nothing shared with ours.

Written from the architecture's description: one token at a time, every product spelled out in NumPy.
"""

from __future__ import annotations

import numpy as np


def rms_norm(x, weight, eps):
    return x / np.sqrt(np.mean(x * x) + eps) * weight


def rotate(x, position, theta):
    half = len(x) // 2
    out = np.empty_like(x)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        out[2 * i] = x[2 * i] * np.cos(angle) - x[2 * i + 1] * np.sin(angle)
        out[2 * i + 1] = x[2 * i] * np.sin(angle) + x[2 * i + 1] * np.cos(angle)
    return out


def quantize(x, scale):
    return np.clip(np.rint(x / scale), -128, 127) * scale if scale else x


def attend(query, keys, values):
    scores = np.array([query @ key for key in keys]) / np.sqrt(len(query))
    weights = np.exp(scores - scores.max())
    return (weights / weights.sum()) @ np.array(values)


def feed_forward(weights, name, x):
    gate = weights[f"{name}.gate_proj.weight"] @ x
    up = weights[f"{name}.up_proj.weight"] @ x
    return weights[f"{name}.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up)


def logits(weights: dict[str, np.ndarray], config, tokens: list[int]) -> np.ndarray:
    """Logits (len(tokens), V) of one row of tokens; weights by our names, float64."""
    heads, kv_heads, width, eps = config.num_heads, config.num_kv_heads, config.head_dim, config.rms_norm_eps
    xs = [weights["model.embedding.weight"][token].copy() for token in tokens]
    keys = values = None
    names = [(f"model.layers.{i}", True) for i in range(config.num_ordinary_layers)]
    names += [(f"model.kv_reuse_layers.{i}", False) for i in range(config.num_kv_reuse_layers)]
    for name, ordinary in names:
        attention = f"{name}.self_attn"
        normed = [rms_norm(x, weights[f"{name}.input_layernorm.weight"], eps) for x in xs]
        if ordinary:
            rows = [weights[f"{attention}.qkv_proj.weight"] @ x for x in normed]
            keys, values = [], []
            for position, row in enumerate(rows):
                flat = row[heads * width :].reshape(2, kv_heads, width)
                scale = weights.get(f"{attention}.quant_key_scale"), weights.get(f"{attention}.quant_value_scale")
                turned = [
                    rms_norm(rotate(k, position, config.rope_theta), weights[f"{attention}.k_norm.weight"], eps)
                    for k in flat[0]
                ]
                keys.append([quantize(k, scale[0]) for k in turned])
                values.append([quantize(v, scale[1]) for v in flat[1]])
            queries = [row[: heads * width] for row in rows]
        else:
            queries = [weights[f"{attention}.q_proj.weight"] @ x for x in normed]
        for position, query in enumerate(queries):
            parts = []
            for head in range(heads):
                q = rotate(query.reshape(heads, width)[head], position, config.rope_theta)
                q = rms_norm(q, weights[f"{attention}.q_norm.weight"], eps)
                shared = head // (heads // kv_heads)
                parts.append(
                    attend(q, [k[shared] for k in keys[: position + 1]], [v[shared] for v in values[: position + 1]])
                )
            xs[position] = xs[position] + weights[f"{attention}.out_proj.weight"] @ np.concatenate(parts)
        for position, x in enumerate(xs):
            normed_x = rms_norm(x, weights[f"{name}.post_attention_layernorm.weight"], eps)
            xs[position] = x + feed_forward(weights, f"{name}.mlp", normed_x)
    final = [rms_norm(x, weights["model.output_norm.weight"], eps) for x in xs]
    return np.array(final) @ weights["model.embedding.weight"].T
