"""The one table of names: each of our arrays and the released tensors that it is made of."""

from collections.abc import Callable, Iterator
from enum import Enum
from typing import NamedTuple

import numpy as np

from dsv3_jax.config import Config

BIAS = "bias"  # the leaf of the expert bias, beside the model's


class Layout(NamedTuple):
    """How a released matrix [out, in] lies in our leaf."""

    turn: Callable[[np.ndarray], np.ndarray]  # its own inverse
    place: Callable[[slice, int], tuple[slice, ...]]  # where a band of the released rows, so many, is in ours


class Storage(Enum):
    """How released FP8 checkpoints store a tensor; in others it has the checkpoint's type, or FP32."""

    BLOCKS = "E4M3 with an FP32 scale for each 128 x 128 block"
    PLAIN = "BF16"
    EXACT = "FP32, whatever the checkpoint's type"


class Kind(NamedTuple):
    """What becomes of a tensor on its way."""

    layout: Layout
    storage: Storage


class Tensor(NamedTuple):
    """A released tensor and its place in ours."""

    name: str
    shape: tuple[int, ...]  # as released: [out, in] for matrices
    kind: Kind
    leaf: str  # dotted, as in our checkpoints
    at: tuple[int, ...]  # of the layer, and of the expert

    @property
    def scale(self) -> str:
        """The name of the block scales that a tensor in FP8 has beside it."""
        return self.name + "_scale_inv"


_AS_IS = Layout(lambda x: x, lambda rows, _: (rows,))
_TURNED = Layout(np.transpose, lambda rows, _: (slice(None), rows))
_SECOND_HALF = Layout(
    np.transpose, lambda rows, every: (slice(None), slice(every + rows.start, every + rows.stop))
)

LINEAR = Kind(_TURNED, Storage.BLOCKS)
SECOND = Kind(_SECOND_HALF, Storage.BLOCKS)
MATRIX = Kind(_TURNED, Storage.PLAIN)
TABLE = Kind(_AS_IS, Storage.PLAIN)
GAIN = Kind(_AS_IS, Storage.PLAIN)
EXACT = Kind(_AS_IS, Storage.EXACT)

_Row = tuple[str, str, Kind, str]  # our leaf, the released name, what becomes of it, its released shape

_EMBED: _Row = ("model.embed", "embed_tokens.weight", TABLE, "W D")
_HEAD: _Row = ("model.head", "lm_head.weight", MATRIX, "W D")
_NORM: _Row = ("model.norm", "model.norm.weight", GAIN, "D")

_ATTENTION: tuple[_Row, ...] = (
    ("attention_norm", "input_layernorm.weight", GAIN, "D"),
    ("attention.kv_down", "self_attn.kv_a_proj_with_mqa.weight", LINEAR, "CR D"),
    ("attention.kv_norm", "self_attn.kv_a_layernorm.weight", GAIN, "C"),
    ("attention.kv_up", "self_attn.kv_b_proj.weight", LINEAR, "HY C"),
    ("attention.out", "self_attn.o_proj.weight", LINEAR, "D HV"),
    ("ffn_norm", "post_attention_layernorm.weight", GAIN, "D"),
)
_LATENT_QUERY: tuple[_Row, ...] = (
    ("attention.query.down", "self_attn.q_a_proj.weight", LINEAR, "Q D"),
    ("attention.query.norm", "self_attn.q_a_layernorm.weight", GAIN, "Q"),
    ("attention.query.up", "self_attn.q_b_proj.weight", LINEAR, "HX Q"),
)
_DIRECT_QUERY: tuple[_Row, ...] = (("attention.query.up", "self_attn.q_proj.weight", LINEAR, "HX D"),)
_DENSE: tuple[_Row, ...] = (
    ("ffn.gate_up", "mlp.gate_proj.weight", LINEAR, "FD D"),
    ("ffn.gate_up", "mlp.up_proj.weight", SECOND, "FD D"),
    ("ffn.down", "mlp.down_proj.weight", LINEAR, "D FD"),
)
_ROUTER: _Row = ("ffn.router", "mlp.gate.weight", MATRIX, "E D")
_CORRECTION: _Row = (BIAS, "mlp.gate.e_score_correction_bias", EXACT, "E")
_SHARED: tuple[_Row, ...] = (
    ("ffn.shared.gate_up", "mlp.shared_experts.gate_proj.weight", LINEAR, "FS D"),
    ("ffn.shared.gate_up", "mlp.shared_experts.up_proj.weight", SECOND, "FS D"),
    ("ffn.shared.down", "mlp.shared_experts.down_proj.weight", LINEAR, "D FS"),
)
_EXPERT: tuple[_Row, ...] = (
    ("ffn.experts.gate_up", "mlp.experts.{}.gate_proj.weight", LINEAR, "F D"),
    ("ffn.experts.gate_up", "mlp.experts.{}.up_proj.weight", SECOND, "F D"),
    ("ffn.experts.down", "mlp.experts.{}.down_proj.weight", LINEAR, "D F"),
)
_MTP: tuple[_Row, ...] = (
    ("embed_norm", "enorm.weight", GAIN, "D"),
    ("hidden_norm", "hnorm.weight", GAIN, "D"),
    ("join", "eh_proj.weight", MATRIX, "D 2D"),
    ("norm", "shared_head.norm.weight", GAIN, "D"),  # MTP's own, in spite of the name
)
_COPIES: tuple[_Row, ...] = (_EMBED, ("model.head", "shared_head.head.weight", MATRIX, "W D"))


def tensors(c: Config) -> Iterator[Tensor]:
    """Every tensor that our weights are made of, once, layer by layer."""
    shape = _shapes(c)
    yield _tensor(_EMBED, shape, "model.", "", ())
    for i in range(c.layers):
        prefix = f"model.layers.{i}."
        if i < c.dense_layers:
            for row in (*_attention(c), *_DENSE):
                yield _tensor(row, shape, prefix, "model.dense.", (i,))
        else:
            yield from _routed(c, shape, prefix, "model.routed.", i - c.dense_layers, i - c.dense_layers)
    for i in range(c.mtp_depth):
        for row in _MTP:
            yield _tensor(row, shape, mtp_prefix(c, i), "model.mtp.", (i,))
        yield from _routed(c, shape, mtp_prefix(c, i), "model.mtp.block.", i, c.routed_layers + i)
    yield _tensor(_NORM, shape, "", "", ())
    yield _tensor(_HEAD, shape, "", "", ())


def copies(c: Config) -> Iterator[Tensor]:
    """The shared embedding and head that released checkpoints repeat beside each MTP block.

    We keep one of each. On import a copy may be absent but not different; export writes them.
    """
    for i in range(c.mtp_depth):
        for row in _COPIES:
            yield _tensor(row, _shapes(c), mtp_prefix(c, i), "", ())


def mtp_prefix(c: Config, depth: int) -> str:
    """Where the released names of the MTP block of depth 0, 1, ... begin: as a layer after the last."""
    return f"model.layers.{c.layers + depth}."


def is_ignored(name: str) -> bool:
    """Whether a tensor says nothing: some files have rotary frequencies, which the configuration gives."""
    return name.endswith("rotary_emb.inv_freq")


def _attention(c: Config) -> tuple[_Row, ...]:
    return (*_ATTENTION, *(_DIRECT_QUERY if c.q_rank is None else _LATENT_QUERY))


def _routed(
    c: Config, shape: Callable[[str], tuple[int, ...]], prefix: str, leaf: str, layer: int, bias: int
) -> Iterator[Tensor]:
    """A routed block, the experts one by one."""
    for row in (*_attention(c), _ROUTER, *(_SHARED if c.shared_experts else ())):
        yield _tensor(row, shape, prefix, leaf, (layer,))
    yield _tensor(_CORRECTION, shape, prefix, "", (bias,))
    for expert in range(c.experts):
        for ours, released, kind, letters in _EXPERT:
            row = (ours, released.format(expert), kind, letters)
            yield _tensor(row, shape, prefix, leaf, (layer, expert))


def _tensor(
    row: _Row, shape: Callable[[str], tuple[int, ...]], prefix: str, leaf: str, index: tuple[int, ...]
) -> Tensor:
    ours, released, kind, letters = row
    return Tensor(prefix + released, shape(letters), kind, leaf + ours, index)


def _shapes(c: Config) -> Callable[[str], tuple[int, ...]]:
    """Sizes by letters: the configuration's legend, and HX, HY, HV for all heads' columns together."""
    sizes = {
        "W": c.vocab,
        "D": c.d_model,
        "2D": 2 * c.d_model,
        "Q": c.q_rank or 0,
        "C": c.kv_rank,
        "CR": c.kv_rank + c.d_rope,
        "HX": c.heads * (c.d_nope + c.d_rope),
        "HY": c.heads * (c.d_nope + c.d_value),
        "HV": c.heads * c.d_value,
        "FD": c.d_dense,
        "FS": c.shared_experts * c.d_expert,
        "F": c.d_expert,
        "E": c.experts,
    }
    return lambda letters: tuple(sizes[letter] for letter in letters.split())
