"""Architecture of a decoder-only language model, as data.

One frozen `ModelConfig` covers the published families (`jaxtrain/models/
<family>.py` reads each one's config.json). Dtypes are not architecture: they
are arguments of `Transformer`.

Letters: V vocab, D model, L layers, N query heads, K kv heads, H head dim,
F feed-forward, E experts.
"""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary position embedding (Su et al., https://arxiv.org/abs/2104.09864).

  Attributes:
    theta: Base of the geometric series of wavelengths.
    scaling: 'none', 'linear' (Chen et al., https://arxiv.org/abs/2306.15595),
      'llama3' (Grattafiori et al., https://arxiv.org/abs/2407.21783) or 'yarn'
      (Peng et al., https://arxiv.org/abs/2309.00071).
    factor: Context extension factor; all but 'none'.
    original_max_len: Context length, in tokens, before extension.
    low_freq_factor: 'llama3': wavelengths above original_max_len / this are
      divided by `factor`.
    high_freq_factor: 'llama3': wavelengths below original_max_len / this are
      kept.
    beta_fast: 'yarn': rotations over the original context above which a
      dimension is kept.
    beta_slow: 'yarn': rotations below which a dimension is interpolated.
    attention_factor: 'yarn': multiplies cos and sin; `None` is the paper's
      0.1 ln(factor) + 1.
  """

  theta: float = 10_000.0
  scaling: str = 'none'
  factor: float = 1.0
  original_max_len: int = 8192
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float | None = None

  def __post_init__(self):
    known = ('none', 'linear', 'llama3', 'yarn')
    if self.scaling not in known:
      raise ValueError(
        f'rope scaling {self.scaling!r} is not one of {", ".join(known)}'
      )

  @property
  def multiplier(self) -> float:
    """Factor on cos and sin (YaRN, equation 22); 1 for the other kinds."""
    if self.scaling != 'yarn':
      return 1.0
    if self.attention_factor is not None:
      return self.attention_factor
    return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclasses.dataclass(frozen=True)
class MoE:
  """Mixture of experts in place of the dense feed-forward.

  Attributes:
    num_experts: E.
    num_experts_per_token: Experts each token is sent to (top-k).
    mlp_dim: F of one expert.
    normalize_weights: Whether the k chosen router probabilities are rescaled
      to sum to one.
  """

  num_experts: int
  num_experts_per_token: int
  mlp_dim: int
  normalize_weights: bool = True

  def __post_init__(self):
    if not 1 <= self.num_experts_per_token <= self.num_experts:
      raise ValueError(
        f'num_experts_per_token={self.num_experts_per_token} is not in 1..'
        f'num_experts={self.num_experts}'
      )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Sizes and switches of one decoder.

  Attributes:
    family: Name of the file in `jaxtrain/models/` that maps published weights.
    vocab_size: V.
    embed_dim: D.
    num_layers: L.
    num_heads: N.
    num_kv_heads: K; N must be a multiple of it.
    head_dim: H.
    mlp_dim: F of the dense feed-forward.
    max_seq_len: Context length in tokens the model was made for.
    rope: Rotary embedding of full-attention layers.
    sliding_rope: That of sliding-window layers; `None` is the same as `rope`.
    sliding_window: Tokens a sliding layer sees, itself included.
    layer_pattern: 'full' or 'sliding' per layer, repeated over the L layers.
    activation: 'silu' or 'gelu' (tanh approximation), gating the MLP.
    qkv_bias: Biases on query, key and value projections.
    qk_norm: RMS norm of each query and key head before RoPE.
    post_norms: RMS norms after attention and MLP too (Gemma).
    norm_plus_one: Norm scales are stored minus one (Gemma).
    norm_eps: Added to the mean square in every norm.
    embed_scale: Embeddings are multiplied by sqrt(D) (Gemma).
    tie_embeddings: The output projection is the embedding table.
    query_scale: Factor on attention logits; `None` is H ** -0.5.
    attention_soft_cap: c in c * tanh(logits / c) inside attention.
    logit_soft_cap: The same for the output logits.
    moe: Mixture of experts, or `None` for a dense MLP.
  """

  vocab_size: int
  embed_dim: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_dim: int
  max_seq_len: int
  family: str = 'llama'
  rope: Rope = Rope()
  sliding_rope: Rope | None = None
  sliding_window: int | None = None
  layer_pattern: tuple[str, ...] = ('full',)
  activation: str = 'silu'
  qkv_bias: bool = False
  qk_norm: bool = False
  post_norms: bool = False
  norm_plus_one: bool = False
  norm_eps: float = 1e-6
  embed_scale: bool = False
  tie_embeddings: bool = False
  query_scale: float | None = None
  attention_soft_cap: float | None = None
  logit_soft_cap: float | None = None
  moe: MoE | None = None

  def __post_init__(self):
    for field in (
      'vocab_size embed_dim num_layers num_heads num_kv_heads head_dim '
      'mlp_dim max_seq_len'
    ).split():
      if getattr(self, field) < 1:
        raise ValueError(f'{field}={getattr(self, field)} must be at least 1')
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f'num_heads={self.num_heads} is not a multiple of num_kv_heads='
        f'{self.num_kv_heads}'
      )
    if self.head_dim % 2:
      raise ValueError(f'head_dim={self.head_dim} must be even (RoPE)')
    if self.activation not in ('silu', 'gelu'):
      raise ValueError(f'activation {self.activation!r} is not silu or gelu')
    bad = set(self.layer_pattern) - {'full', 'sliding'}
    if bad or not self.layer_pattern:
      raise ValueError(
        f'layer_pattern={self.layer_pattern} must hold "full" and "sliding"'
      )
    if 'sliding' in self.layer_pattern and not self.sliding_window:
      raise ValueError('layer_pattern has "sliding" but no sliding_window')

  @property
  def layer_types(self) -> tuple[str, ...]:
    """'full' or 'sliding' for each of the L layers."""
    repeats = -(-self.num_layers // len(self.layer_pattern))
    return (self.layer_pattern * repeats)[: self.num_layers]

  @property
  def num_params(self) -> int:
    """Number of parameters, all experts included."""
    return self._count(self.moe.num_experts if self.moe else 0)

  @property
  def num_active_params(self) -> int:
    """Parameters that one token meets: top-k experts, no embedding lookup."""
    k = self.moe.num_experts_per_token if self.moe else 0
    lookup = 0 if self.tie_embeddings else self.vocab_size * self.embed_dim
    return self._count(k) - lookup

  def _count(self, num_experts: int) -> int:
    d, h = self.embed_dim, self.head_dim
    attention = 2 * d * h * (self.num_heads + self.num_kv_heads)
    if self.qkv_bias:
      attention += h * (self.num_heads + 2 * self.num_kv_heads)
    if self.qk_norm:
      attention += 2 * h
    if self.moe:
      mlp = 3 * num_experts * d * self.moe.mlp_dim + d * self.moe.num_experts
    else:
      mlp = 3 * d * self.mlp_dim
    layer = attention + mlp + d * (4 if self.post_norms else 2)
    tables = self.vocab_size * d * (1 if self.tie_embeddings else 2)
    return self.num_layers * layer + tables + d

  def train_flops_per_token(
    self, seq_len: int, *, full_square: bool = False
  ) -> float:
    """FLOPs of forward and backward for one token of a causal sequence.

    6 per active parameter, plus attention, at half the square (the causal
    convention).

    Args:
      seq_len: Tokens of the sequence.
      full_square: Counts the whole square, or the whole of each window, as
        Chowdhery et al., https://arxiv.org/abs/2204.02311, appendix B.
    """
    scores = 0.0
    for kind in self.layer_types:
      seen = seq_len if kind == 'full' else min(seq_len, self.sliding_window)
      unseen = 0 if full_square else seen * (seen - 1) / (2 * seq_len)
      mean_keys = seen - unseen
      scores += 4 * self.num_heads * self.head_dim * mean_keys
    return 6 * self.num_active_params + 3 * scores
