"""The face of serving: `LLM(model).generate(prompts)`."""

import collections
from collections.abc import Iterator, Mapping, Sequence
import os
from typing import Any

import jax
from tqdm import auto as tqdm

from jaxserve.chat import Message
from jaxserve.chat import load_chat_template
from jaxserve.engine.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.engine.outputs import Delta
from jaxserve.engine.outputs import RequestOutput
from jaxserve.engine.runner import Runner
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.engine.step import num_stored_heads
from jaxserve.loading import load_model
from jaxtrain.checkpoints.tokenizer import Tokenizer
from jaxtrain.checkpoints.tokenizer import load_tokenizer
from jaxtrain.models.config import ModelConfig
from jaxtrain.sharding import PRESETS
from jaxtrain.sharding import ShardingRules
from jaxtrain.sharding import make_mesh


class LLM:
  """A model ready to generate.

  >>> with LLM('path/to/model', mesh='tensor=4') as llm:
  ...   [out] = llm.generate('To be, or', SamplingParams(max_tokens=16))
  ...   print(out.text)

  Args:
    model: A directory of the Hugging Face layout, a GGUF file, a training
      checkpoint of this library, or a parameter tree (with `config`). A tree
      that is already on the mesh is used in place.
    config: Architecture; read from `model` unless that is a tree.
    mesh: A mesh, or its description such as 'tensor=2'; one device by default.
    rules: How parameters and heads lie on the mesh. Logical axes that do not
      divide are replicated.
    tokenizer: A tokenizer, its path, or 'byte'; found in `model` by default.
    chat_template: A file; found in `model` by default.
    engine: Sizes of the engine.
    dtype: Compute dtype; that of the parameters by default.
    param_dtype: Parameters are converted to it as they are loaded.

  Raises:
    ValueError: The model cannot be read, or does not fit mesh or engine.
  """

  def __init__(
    self,
    model: str | os.PathLike | Any,
    *,
    config: ModelConfig | None = None,
    mesh: jax.sharding.Mesh | str = '',
    rules: ShardingRules = PRESETS['tensor_parallel'],
    tokenizer: Tokenizer | str | None = None,
    chat_template: str | os.PathLike | None = None,
    engine: EngineConfig = EngineConfig(),
    dtype: Any = None,
    param_dtype: Any = None,
  ):
    mesh = make_mesh(mesh) if isinstance(mesh, str) else mesh
    self.config, params, rules, found = load_model(
      model, config, mesh, rules, param_dtype
    )
    if isinstance(tokenizer, str):
      tokenizer = load_tokenizer(tokenizer)
    self.tokenizer = found if tokenizer is None else tokenizer
    if chat_template is None and not isinstance(model, Mapping):
      chat_template = model
    self.chat_template = chat_template and load_chat_template(
      chat_template, self.tokenizer
    )
    if dtype is None:
      dtype = params['embed']['embedding'].dtype
    max_seq_len = engine.max_seq_len or self.config.max_seq_len
    if max_seq_len > self.config.max_seq_len:
      raise ValueError(
        f'max_seq_len={max_seq_len} is beyond the context of the model, '
        f'{self.config.max_seq_len} tokens'
      )
    num_pages = engine.num_pages or _default_num_pages(
      engine,
      self.config,
      max_seq_len,
      num_stored_heads(rules, mesh, self.config),
      jax.numpy.dtype(dtype if engine.kv_dtype is None else engine.kv_dtype),
    )
    self.runner = Runner(
      self.config,
      params,
      mesh,
      rules,
      engine,
      num_pages=num_pages,
      max_seq_len=max_seq_len,
      dtype=dtype,
    )
    self.engine = Engine(
      self.runner,
      engine,
      max_seq_len=max_seq_len,
      num_pages=num_pages,
      vocab_size=self.config.vocab_size,
      tokenizer=self.tokenizer,
    )

  def generate(
    self,
    prompts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
    *,
    show_progress: bool = True,
  ) -> list[RequestOutput]:
    """Continues every prompt.

    Args:
      prompts: Texts or lists of token ids; a single one is a list of one.
      params: For all prompts, or one per prompt.
      show_progress: Shows a bar with tokens per second.

    Returns:
      One output per prompt, in their order.

    Raises:
      ValueError: A prompt that `Engine.add_request` refuses (then none runs),
        or as many params as prompts were not given.
    """
    prompts, params = _paired(prompts, params)
    ids = []
    try:
      for prompt, p in zip(prompts, params, strict=True):
        ids.append(self.engine.add_request(prompt, p))
      outputs = self._run(set(ids), show_progress)
    except BaseException:
      # Also on Ctrl-C: what was not finished must not haunt the next call.
      self.engine.forget(ids)
      raise
    return [outputs[i] for i in ids]

  def chat(
    self,
    messages: Sequence[Message] | Sequence[Sequence[Message]],
    params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
    *,
    show_progress: bool = True,
  ) -> list[RequestOutput]:
    """Answers conversations, put into text by the model's chat template.

    Args:
      messages: A conversation, `[{'role': 'user', 'content': 'Hi'}]`, or
        several.
      params: As for `generate`.
      show_progress: As for `generate`.

    Returns:
      One output per conversation.

    Raises:
      ValueError: The model has no chat template, or it refuses the messages.
    """
    if self.chat_template is None:
      raise ValueError(
        'the model has no chat template; give LLM(chat_template=)'
      )
    many = [messages] if isinstance(messages[0], Mapping) else messages
    prompts = [self.chat_template.token_ids(m) for m in many]
    return self.generate(prompts, params, show_progress=show_progress)

  def stream(
    self,
    prompts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
  ) -> Iterator[Delta]:
    """Continues every prompt, and yields tokens and text as they come.

    >>> for delta in llm.stream('To be, or'):
    ...   print(delta.text, end='', flush=True)

    Args:
      prompts: As for `generate`; deltas of several prompts come mixed.
      params: As for `generate`.

    Yields:
      What a step added to one continuation; the last one of a request has its
      whole output. Requests end when the iterator is closed.

    Raises:
      ValueError: As for `generate`.
    """
    prompts, params = _paired(prompts, params)
    ids, deltas = [], collections.deque()
    try:
      for prompt, p in zip(prompts, params, strict=True):
        ids.append(self.engine.add_request(prompt, p, sink=deltas.append))
      num_left = len(ids)
      while num_left:
        self.engine.step()
        while deltas:
          num_left -= deltas[0].output is not None
          yield deltas.popleft()
    finally:
      self.engine.forget(ids)

  def update_params(self, params: Any) -> None:
    """Serves other parameters of the same layout, in place; see `Engine`."""
    self.engine.update_params(params)

  def close(self) -> None:
    """Frees the pages. Parameters go when nothing else holds them."""
    self.runner.close()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def _run(self, wanted, show_progress):
    outputs = {}
    num_tokens = 0
    with tqdm.tqdm(
      total=len(wanted), unit='request', disable=not show_progress
    ) as bar:
      while wanted - outputs.keys():
        for out in self.engine.step():
          if out.request_id not in wanted:
            continue
          outputs[out.request_id] = out
          num_tokens += sum(len(c.token_ids) for c in out.outputs)
          bar.update()
          elapsed = bar.format_dict['elapsed'] or 1e-9
          bar.set_postfix_str(
            f'{num_tokens / elapsed:.0f} tokens/s', refresh=False
          )
    return outputs


def _paired(prompts, params):
  prompts = _as_list(prompts)
  if isinstance(params, SamplingParams):
    params = [params] * len(prompts)
  if len(params) != len(prompts):
    raise ValueError(f'{len(params)} params for {len(prompts)} prompts')
  return prompts, params


def _as_list(prompts):
  if isinstance(prompts, str):
    return [prompts]
  prompts = list(prompts)
  if prompts and not isinstance(prompts[0], (str, Sequence)):
    # A flat list (or array) of token ids, unless its items are arrays.
    if not hasattr(prompts[0], '__len__'):
      return [prompts]
  return prompts


def _default_num_pages(engine, config, max_seq_len, num_heads, dtype):
  wanted = engine.max_num_requests * -(-max_seq_len // engine.page_size)
  page_bytes = (
    2
    * config.num_layers
    * engine.page_size
    * num_heads
    * config.head_dim
    * dtype.itemsize
  )
  return max(1, min(wanted, engine.cache_bytes // page_bytes))
