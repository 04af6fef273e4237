"""A Llama-shaped model of 110 M parameters, the size of GPT-2 small.

A recipe to start from on one TPU or GPU host, with data of your own:

python -m experiments.train_lm --config=llama_110m --workdir=runs/llama_110m \
    --override=source.files='"data/*.jsonl"' \
    --override=tokenizer='"tokenizer.json"' --mesh=fsdp=-1

Learning rate, betas, decay and schedule are those of GPT-3's 125 M model (Brown
et al., https://arxiv.org/abs/2005.14165, table 2.1 and appendix B), whose batch
of half a million tokens this keeps. 20 tokens per parameter (Hoffmann et al.,
https://arxiv.org/abs/2203.15556) are 4,400 steps.
"""

from jaxtrain.models.config import ModelConfig


def get_config():
  """See `experiments.training.run`."""
  return dict(
    model=ModelConfig(
      vocab_size=32_000,
      embed_dim=768,
      num_layers=12,
      num_heads=12,
      num_kv_heads=12,
      head_dim=64,
      mlp_dim=2048,
      max_seq_len=2048,
      tie_embeddings=True,
    ),
    source=dict(name='jsonl', files='data/*.jsonl', validation_fraction=0.005),
    tokenizer='tokenizer.json',
    seq_len=2048,
    batch_size=256,
    steps=4400,
    dtype='bfloat16',
    remat='dots_no_batch',
    optimizer=dict(name='adamw', b2=0.95, weight_decay=0.1),
    schedule=dict(
      name='warmup_cosine',
      peak_value=6e-4,
      warmup_steps=700,
      final_value=6e-5,
    ),
    z_loss=1e-4,
    mesh='fsdp=-1',
    eval_every=500,
    eval_batches=8,
    save_every=500,
    log_every=10,
  )
