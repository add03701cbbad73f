"""The sizes that define a checkpoint, and the legend of the letters used in shapes.

Letters, used in every jaxtyping annotation and einsum of the project:

    B sequences   S positions   T tokens on a device   W vocabulary   D model width   L layers
    H heads   N non-rotary width of a head   R rotary width   V value width   Q query rank   C latent rank
    F hidden width of a feed-forward layer   E experts   K chosen experts   G groups   M microbatches
    n devices that share a sequence

This file imports the standard library only, so that sizes can be looked at without JAX.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """How rotary frequencies are stretched beyond the pretraining length (arXiv:2412.19437, section 4.3).

    A model has it or not (`Config.yarn` is None before extension); there is no switch by prompt length,
    as in the released code.
    """

    factor: float = 40.0
    original_length: int = 4096
    beta_fast: float = 32.0  # a pair that turns this often within the original length keeps its frequency
    beta_slow: float = 1.0  # one that turns less often than this is divided by the factor
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self):
        """Refuses sizes that give no frequencies."""
        _positive(self, "factor", "original_length", "beta_fast", "beta_slow")
        if self.beta_fast < self.beta_slow:
            raise ValueError(
                f"config.model.yarn.beta_fast={self.beta_fast} is below beta_slow={self.beta_slow}: "
                "the fast end turns more often, so give it the larger number."
            )


@dataclass(frozen=True, kw_only=True)
class Config:
    """The sizes that define a checkpoint; defaults are those of DeepSeek-V3 (arXiv:2412.19437, section 4.2).

    Letters in brackets are the ones used in shapes.
    """

    vocab: int = 129280  # [W]
    d_model: int = 7168  # [D]
    layers: int = 61  # dense and routed blocks together, without those of multi-token prediction
    dense_layers: int = 3  # the first blocks, whose feed-forward layer is not routed
    mtp_depth: int = 1  # further tokens predicted, each by a block of its own
    heads: int = 128  # [H]
    d_nope: int = 128  # [N]
    d_rope: int = 64  # [R]
    d_value: int = 128  # [V]
    q_rank: int | None = 1536  # [Q]; None projects queries directly
    kv_rank: int = 512  # [C]
    d_dense: int = 18432  # [F] of a dense layer
    d_expert: int = 2048  # [F] of an expert
    experts: int = 256  # [E] routed
    shared_experts: int = 1  # stored as one feed-forward layer of their summed width
    top_k: int = 8  # [K]
    groups: int = 8  # [G] of consecutive experts; a token chooses inside top_groups of them
    top_groups: int = 4
    route_scale: float = 2.5
    norm_eps: float = 1e-6
    latent_norm_eps: float = 1e-6  # transformers keeps 1e-6 here whatever norm_eps says
    rope_theta: float = 10_000.0
    max_length: int = 4096  # the longest sequence the frequencies are meant for
    yarn: Yarn | None = None

    def __post_init__(self):
        """Reports every violation at once, each with its key."""
        _positive(
            self,
            *(
                "vocab",
                "d_model",
                "layers",
                "heads",
                "d_nope",
                "d_rope",
                "d_value",
                "kv_rank",
                "d_dense",
                "d_expert",
            ),
            *("experts", "top_k", "groups", "top_groups", "route_scale", "norm_eps", "latent_norm_eps"),
            *("rope_theta", "max_length"),
        )
        wrong = []
        if self.q_rank is not None and self.q_rank <= 0:
            wrong.append(f"config.model.q_rank={self.q_rank} must be positive, or None for no query latent.")
        if self.d_rope % 2:
            wrong.append(f"config.model.d_rope={self.d_rope} is odd, but RoPE rotates pairs: make it even.")
        if not 0 <= self.dense_layers <= self.layers:
            wrong.append(
                f"config.model.dense_layers={self.dense_layers} is outside 0..layers={self.layers}: "
                "choose a number within."
            )
        for name in ("mtp_depth", "shared_experts"):
            if getattr(self, name) < 0:
                wrong.append(f"config.model.{name}={getattr(self, name)} is negative: give 0 or more.")
        wrong += self._routing_violations()
        if wrong:
            raise ValueError("\n".join(wrong))

    def _routing_violations(self) -> list[str]:
        wrong = []
        if self.experts % self.groups:
            wrong.append(
                f"config.model.experts={self.experts} do not split into groups={self.groups}: "
                f"choose a divisor of {self.experts}."
            )
        if self.top_groups > self.groups:
            wrong.append(f"config.model.top_groups={self.top_groups} exceeds groups={self.groups}: lower it.")
        elif self.top_k > (reach := self.experts // self.groups * self.top_groups):
            wrong.append(
                f"config.model.top_k={self.top_k} exceeds the {reach} experts that {self.top_groups} of "
                f"{self.groups} groups hold: lower top_k or raise top_groups."
            )
        if self.groups > 1 and self.experts // self.groups < 2:
            wrong.append(
                f"config.model.groups={self.groups} leaves one expert a group, but a group is ranked by its "
                "two best: use fewer groups."
            )
        return wrong

    @property
    def routed_layers(self) -> int:
        """Blocks of the main model whose feed-forward layer is routed."""
        return self.layers - self.dense_layers

    @property
    def balanced_layers(self) -> int:
        """[L] Routed blocks that keep an expert bias: those of the main model, then those of MTP."""
        return self.routed_layers + self.mtp_depth

    @property
    def softmax_scale(self) -> float:
        """1 / sqrt(N + R), times the square of YaRN's mscale, on the whole logit as in the released code."""
        scale = (self.d_nope + self.d_rope) ** -0.5
        if self.yarn is None or not self.yarn.mscale_all_dim:
            return scale
        return scale * yarn_mscale(self.yarn.factor, self.yarn.mscale_all_dim) ** 2

    @property
    def rope_magnitude(self) -> float:
        """What YaRN multiplies sines and cosines by; 1 in released models, whose two mscales are equal."""
        if self.yarn is None:
            return 1.0
        y = self.yarn
        if y.mscale and y.mscale_all_dim:
            return yarn_mscale(y.factor, y.mscale) / yarn_mscale(y.factor, y.mscale_all_dim)
        return yarn_mscale(y.factor, 1.0)


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature, 0.1 * mscale * ln(factor) + 1 (arXiv:2309.00071, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _positive(record, *names: str) -> None:
    wrong = [n for n in names if not (math.isfinite(getattr(record, n)) and getattr(record, n) > 0)]
    if wrong:
        raise ValueError(
            "\n".join(f"config.model.{n}={getattr(record, n)} must be finite and above zero." for n in wrong)
        )
