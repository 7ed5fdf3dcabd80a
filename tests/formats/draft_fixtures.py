"""A stand-in for the toolkit's three draft assets and its draft checkpoint: ours, small, and of every rule.

Each form of the spec occurs, each with every element type that a record of it may have, shapes with and without
dimensions of 1, an odd number of nibbles' worth of padding, and records that no tensor has.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from math import prod

import numpy as np
import yaml

from mlx_afm.formats.tensors import LazyTensor
from mlx_afm.formats.torch_file import write_torch

WIDTH, HEADS, KV_HEADS, INNER, VOCAB, LAYERS = 32, 4, 2, 48, 64, 2
HEAD_WIDTH = WIDTH // HEADS
FP16, FP32, UINT8, INT8, INT4, UINT4, INT32 = 1, 2, 3, 4, 8, 11, 14
BITS = {FP16: 16, FP32: 32, UINT8: 8, INT8: 8, INT4: 4, UINT4: 4, INT32: 32}
PROGRAM = b"program(1.3)\n[buildInfo = dict<string, string>({})]\n{ /* a stand-in */ }\n"
CONFIG = {
    "__tamm_type__": "models:AFMTextV7Config",
    "hidden_dim": WIDTH,
    "hidden_dim_scale_factor": INNER / WIDTH,
    "num_heads": HEADS,
    "num_kv_heads": KV_HEADS,
    "num_kv_reuse_layers": 0,
    "num_layers": LAYERS,
    "vocab_size": VOCAB,
}


def draft_state(seed=0):
    """A draft model's state dict: name -> float32 array, the head last and tied."""
    rng = np.random.default_rng(seed)
    qkv = (HEADS + 2 * KV_HEADS) * HEAD_WIDTH
    shapes = {"embedding.weight": (VOCAB, WIDTH)}
    for index in range(LAYERS):
        layer = f"layers.layer_{index}."
        shapes |= {
            f"{layer}attention.norm.weight": (WIDTH,),
            f"{layer}attention.qkv_transform.fused_linear.weight": (qkv, WIDTH),
            f"{layer}attention.qk_norm.query_norm.weight": (HEAD_WIDTH,),
            f"{layer}attention.qk_norm.key_norm.weight": (HEAD_WIDTH,),
            f"{layer}attention.output_transform.weight": (WIDTH, WIDTH),
            f"{layer}feed_forward.norm.weight": (WIDTH,),
            f"{layer}feed_forward.hidden_transform.linear_0.weight": (INNER, WIDTH),
            f"{layer}feed_forward.hidden_transform.linear_1.weight": (INNER, WIDTH),
            f"{layer}feed_forward.output_transform.weight": (WIDTH, INNER),
        }
    shapes["output_norm.weight"] = (WIDTH,)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def _forms():
    """Spec name -> (form, shape, types of its records)."""
    layers = {}
    for index in range(LAYERS):
        layer, other = f"decoder.transformer.layer{index}.", index % 2
        attention = f"{layer}self_attention.attention."
        palette = {"lut_indices": (UINT4, UINT8)[other], "lut_palette": (FP16, FP32)[other], "scales": FP16}
        kernel = lambda rows, columns, types=palette: ("lut_4bits", (rows, columns, 1, 1), types)  # noqa: E731
        layers |= {
            f"{layer}self_attention.norm.scale": ("fp16", (1, WIDTH, 1, 1), {"values": FP16}),
            f"{attention}scale_query.scale": ("fp16", (HEAD_WIDTH,), {"values": (FP16, FP32)[other]}),
            f"{attention}scale_key.scale": ("fp16", (1, HEAD_WIDTH), {"values": FP16}),
            f"{attention}i_proj.qkv_proj.q_proj.kernel": kernel(HEADS * HEAD_WIDTH, WIDTH),
            f"{attention}i_proj.qkv_proj.k_proj.kernel": kernel(KV_HEADS * HEAD_WIDTH, WIDTH),
            f"{attention}i_proj.qkv_proj.v_proj.kernel": kernel(
                KV_HEADS * HEAD_WIDTH, WIDTH, {**palette, "scales": FP32}
            ),
            f"{attention}o_proj.conv.kernel": ("fp16", (WIDTH, WIDTH), {"values": FP16}),
            f"{layer}feed_forward.norm.scale": ("fp16", (WIDTH,), {"values": FP16}),
            f"{layer}feed_forward.linear1_0.kernel": kernel(INNER, WIDTH),
            f"{layer}feed_forward.linear1_1.kernel": kernel(INNER, WIDTH),
            f"{layer}feed_forward.linear2.kernel": (
                "linear_4bits",
                (WIDTH, INNER),
                {"values": (INT4, INT8)[other], "scales": (FP16, FP32)[other]},
            ),
        }
    return {
        "decoder.emb.token_emb._embedding": ("linear_4bits", (VOCAB, 1, WIDTH), {"values": INT4, "scales": FP16}),
        **layers,
        "decoder.output_norm.scale": ("fp16", (WIDTH,), {"values": FP16}),
    }


def counts_of(form, shape):
    sizes = [size for size in shape if size != 1]
    if form == "fp16":
        return {"values": prod(sizes)}
    if form == "linear_4bits":
        return {"values": prod(sizes), "scales": sizes[-1]}
    return {"lut_indices": prod(sizes), "lut_palette": sizes[0] // 16 * 16, "scales": sizes[0]}


def blob_file(records, seed=1):
    """A blob file of (type code, number of elements) with random payloads; its bytes, and where each record lies."""
    rng = np.random.default_rng(seed)
    out, places = bytearray(struct.pack("<II56x", len(records), 2)), []
    for code, count in records:
        out += bytes(-len(out) % 64)
        bits = count * BITS[code]
        places.append(len(out))
        out += struct.pack("<IIQQQ32x", 0xDEADBEEF, code, -(-bits // 8), len(out) + 64, -bits % 8)
        out += rng.integers(0, 256, -(-bits // 8)).astype(np.uint8).tobytes()
    return bytes(out), places


@dataclass
class DraftAssets:
    """Where everything was written, and what is in it."""

    folder: object
    spec: dict
    template: bytes
    places: list
    records: list
    state: dict = field(default_factory=dict)

    @property
    def checkpoint(self):
        return self.folder / "draft-model.pt"

    def write_spec(self, change=None):
        """Writes the spec, changed by a function of the document or not."""
        document = json.loads(json.dumps(self.spec))
        if change is not None:
            change(document)
        (self.folder / "checkpoint_spec.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")

    def write_state(self, state):
        aliases = {"output_transform.weight": "embedding.weight"} if "embedding.weight" in state else {}
        write_torch(self.checkpoint, {k: LazyTensor.of(v) for k, v in state.items()}, aliases=aliases)


def write_draft_assets(folder, seed=0):
    """Writes the four files of a draft model, and its checkpoint, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    records, owners = [(UINT8, 5), (INT4, 3)], [None, None]  # no tensor's; three nibbles leave half a byte
    for name, (form, shape, types) in _forms().items():
        for role, count in counts_of(form, shape).items():
            records.append((types[role], count))
            owners.append((name, role))
    records.append((INT32, 7))
    owners.append(None)
    template, places = blob_file(records)
    spec = {"weights_mapping": {}}
    for name, (form, shape, _) in _forms().items():
        blobs = {owner[1]: {"offset": place} for owner, place in zip(owners, places) if owner and owner[0] == name}
        spec["weights_mapping"][name] = {"format": form, "shape": list(shape), "blobs": blobs}
    assets = DraftAssets(folder, spec, template, places, records, draft_state(seed))
    (folder / "draft.mil").write_bytes(PROGRAM)
    (folder / "weights_template.bin").write_bytes(template)
    (folder / "draft-model-config.json").write_text(json.dumps(CONFIG))
    assets.write_spec()
    assets.write_state(assets.state)
    return assets
