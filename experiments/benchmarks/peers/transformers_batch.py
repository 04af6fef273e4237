"""Drives continuous batching of transformers (`pip install transformers`).

It also needs torch, and psutil: without that it finds no memory.
"""

import protocol


def load(job):
  """See `protocol.serve`."""
  import psutil  # noqa: F401
  import torch
  import transformers

  torch.set_num_threads(1)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    job['model'], dtype=torch.float32, attn_implementation='sdpa'
  ).eval()
  pages = job['max_num_requests'] * -(-job['max_seq_len'] // job['page_size'])

  def generate(prompts, max_tokens):
    outputs = model.generate_batch(
      inputs=prompts,
      generation_config=transformers.GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
      ),
      continuous_batching_config=transformers.ContinuousBatchingConfig(
        page_size=job['page_size'],
        num_blocks=pages,
        max_batch_tokens=job['max_step_tokens'],
        allow_block_sharing=job['prefix_cache'],
      ),
      progress_bar=False,
    )
    ordered = sorted(outputs.values(), key=lambda o: _number(o.request_id))
    return [list(o.generated_tokens) for o in ordered]

  return generate


def _number(request_id):
  return int(''.join(filter(str.isdigit, request_id)))


if __name__ == '__main__':
  protocol.serve(load)
