"""A byte-level model on the standard library's text: the quickstart's.

python -m experiments.train_lm --config=quickstart --workdir=runs/quickstart \
    --simulate_devices=8

A third of a million parameters see 1.2 MB of text. On two cores of a Xeon
(AVX-512), 8 simulated devices: 1.78 nats/byte on held-out files.
"""

from jaxtrain.models.config import ModelConfig


def get_config():
  """See `experiments.training.run`."""
  return dict(
    model=ModelConfig(
      vocab_size=264,
      embed_dim=96,
      num_layers=3,
      num_heads=2,
      num_kv_heads=2,
      head_dim=48,
      mlp_dim=256,
      max_seq_len=512,
    ),
    source='stdlib',
    tokenizer='byte',
    packing='concat_then_split',
    seq_len=256,
    batch_size=16,
    steps=300,
    optimizer=dict(name='adamw', b2=0.95, weight_decay=0.1),
    schedule=dict(name='warmup_cosine', peak_value=1e-2, warmup_steps=20),
    mesh='data=2,fsdp=2,tensor=2',
    eval_every=80,
    eval_batches=16,
    save_every=150,
    log_every=20,
  )
