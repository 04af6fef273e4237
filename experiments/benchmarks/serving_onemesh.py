"""Drives our engine, as the files of `peers` drive theirs."""

from experiments.benchmarks.peers import protocol


def load(job):
  """See `protocol.serve`."""
  from jaxserve import LLM
  from jaxserve import EngineConfig
  from jaxserve import SamplingParams

  llm = LLM(
    job['model'],
    engine=EngineConfig(
      max_num_requests=job['max_num_requests'],
      max_seq_len=job['max_seq_len'],
      page_size=job['page_size'],
      max_step_tokens=job['max_step_tokens'],
      cache_bytes=job['kv_gigabytes'] << 30,
      prefix_cache=job['prefix_cache'],
      **job.get('engine', {}),
    ),
  )

  def generate(prompts, max_tokens):
    params = SamplingParams(
      max_tokens=max_tokens, temperature=0, ignore_eos=True
    )
    outputs = llm.generate(prompts, params, show_progress=False)
    return [list(o.outputs[0].token_ids) for o in outputs]

  return generate


if __name__ == '__main__':
  protocol.serve(load)
