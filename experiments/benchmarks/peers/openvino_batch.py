"""Drives continuous batching of OpenVINO (`pip install openvino-genai`).

It reads GGUF: float16 weights, whose values the other engines have in float32.
Computation and cache are set to float32, as theirs.
"""

import protocol


def load(job):
  """See `protocol.serve`."""
  import numpy as np
  import openvino
  import openvino_genai

  if job['gguf'] is None:
    raise NotImplementedError('it reads no GGUF of this architecture')
  scheduler = openvino_genai.SchedulerConfig()
  scheduler.cache_size = job['kv_gigabytes']
  scheduler.max_num_batched_tokens = job['max_step_tokens']
  scheduler.max_num_seqs = job['max_num_requests']
  scheduler.enable_prefix_caching = job['prefix_cache']
  scheduler.dynamic_split_fuse = True
  pipe = openvino_genai.ContinuousBatchingPipeline(
    job['gguf'],
    scheduler,
    'CPU',
    {
      'INFERENCE_NUM_THREADS': 1,
      'INFERENCE_PRECISION_HINT': 'f32',
      'KV_CACHE_PRECISION': 'f32',
      'DYNAMIC_QUANTIZATION_GROUP_SIZE': 0,
    },
  )

  def generate(prompts, max_tokens):
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = max_tokens
    config.ignore_eos = True
    config.do_sample = False
    outputs = pipe.generate(
      [openvino.Tensor(np.array([p], np.int64)) for p in prompts],
      [config] * len(prompts),
    )
    return [list(map(int, o.m_generation_ids[0])) for o in outputs]

  return generate


if __name__ == '__main__':
  protocol.serve(load)
