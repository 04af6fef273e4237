"""A tiny byte-level model on the standard library's text: for tests and tries.

python -m experiments.train_lm --config=byte_stdlib_tiny --workdir=runs/tiny

Half a minute on two cores; it learns the letters' frequencies and little more.
"""

from jaxtrain.models.config import ModelConfig


def get_config():
  """See `experiments.training.run`."""
  return dict(
    model=ModelConfig(
      vocab_size=264,
      embed_dim=32,
      num_layers=2,
      num_heads=4,
      num_kv_heads=2,
      head_dim=8,
      mlp_dim=64,
      max_seq_len=128,
    ),
    source=dict(name='stdlib', include_tests=False),
    tokenizer='byte',
    seq_len=64,
    batch_size=16,
    steps=100,
    optimizer=dict(name='adamw', b2=0.95, weight_decay=0.1),
    schedule=dict(name='warmup_cosine', peak_value=1e-2, warmup_steps=10),
    eval_every=50,
    eval_batches=4,
    save_every=50,
    log_every=10,
  )
