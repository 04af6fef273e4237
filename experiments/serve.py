r"""Serves a model over HTTP, as OpenAI's API.

python -m experiments.serve --model=path/to/model --port=8000

curl localhost:8000/v1/completions -H 'Content-Type: application/json' \
    -d '{"model": "model", "prompt": "To be, or", "max_tokens": 16}'

`--model` is all that `experiments.generate` takes. SIGTERM and Ctrl-C finish
what runs, refuse what is new, and end; what is not done in time is cut off, and
the exit status then is 1. Needs `pip install onemesh[server]`.
"""

import json
import pathlib
import sys
import threading

from absl import app
from absl import flags
from absl import logging

from jaxserve import LLM
from jaxserve import EngineConfig
from jaxserve.chat import load_chat_template
from jaxserve.engine.async_engine import AsyncEngine
from jaxtrain.checkpoints.gguf_import import find_gemma3_270m
from jaxtrain.sharding import simulate_devices

_MODEL = flags.DEFINE_string(
  'model', None, 'Path of a model, or gemma3-270m.', required=True
)
_NAME = flags.DEFINE_string(
  'served_model_name', None, 'What clients call it; else the last of --model.'
)
_TOKENIZER = flags.DEFINE_string(
  'tokenizer', None, "tokenizer.json, its directory, or byte; else the model's."
)
_CHAT_TEMPLATE = flags.DEFINE_string(
  'chat_template', None, "A Jinja file; else the tokenizer's or the model's."
)
_MESH = flags.DEFINE_string('mesh', '', "Such as 'tensor=2'.")
_SIMULATE = flags.DEFINE_integer(
  'simulate_devices', None, 'Number of CPU devices to simulate.'
)
_DTYPE = flags.DEFINE_enum(
  'dtype', None, ['float32', 'bfloat16'], "Compute dtype; else the model's."
)
_ENGINE = flags.DEFINE_string(
  'engine', '{}', 'EngineConfig as JSON, {"max_seq_len": 512}.'
)
_HOST = flags.DEFINE_string(
  'host', '127.0.0.1', 'Address to listen at; 0.0.0.0 is all of this machine.'
)
_PORT = flags.DEFINE_integer(
  'port', 8000, '0 is any free one.', lower_bound=0, upper_bound=65535
)
_API_KEY_FILE = flags.DEFINE_string(
  'api_key_file', None, 'Keys that let in, one per line; without, none needed.'
)
_MAX_UNFINISHED = flags.DEFINE_integer(
  'max_unfinished', 1024, 'Continuations at once; more get 429.', lower_bound=1
)
_MAX_BODY_BYTES = flags.DEFINE_integer(
  'max_body_bytes', 4 << 20, 'Longer requests get 413.', lower_bound=1
)
_DRAIN_TIMEOUT_S = flags.DEFINE_float(
  'drain_timeout_s', 30.0, 'Time to finish after SIGTERM.', lower_bound=0.0
)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}')
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # Orbax tells every step it takes.
  try:
    was_drained = _run()
  except (ValueError, OSError) as e:
    sys.exit(f'serve: {e}')
  sys.exit(0 if was_drained else 1)


def _engine_config():
  try:
    return EngineConfig(**json.loads(_ENGINE.value))
  except (TypeError, json.JSONDecodeError) as e:
    raise ValueError(f'--engine={_ENGINE.value!r}: {e}') from e


def _api_keys():
  if _API_KEY_FILE.value is None:
    return []
  lines = pathlib.Path(_API_KEY_FILE.value).read_text('utf-8').splitlines()
  keys = [line.strip() for line in lines if line.strip()]
  if not keys:
    raise ValueError(f'--api_key_file={_API_KEY_FILE.value}: no key in it')
  return keys


def _chat_template():
  """The file that the flags name; `None` leaves it to the model."""
  path, tokenizer = _CHAT_TEMPLATE.value, _TOKENIZER.value
  if path is not None:
    load_chat_template(path)  # Says what is wrong with it.
  elif tokenizer not in (None, 'byte') and load_chat_template(tokenizer):
    path = tokenizer
  return path


def _run():
  try:
    from jaxserve.server.app import make_app
    from jaxserve.server.serving import Server
    from jaxserve.server.serving import listening_socket
  except ModuleNotFoundError as e:
    raise ValueError(f'{e}: pip install onemesh[server]') from e

  # What may be wrong is tried before the model is loaded.
  config, keys, template = _engine_config(), _api_keys(), _chat_template()
  is_gemma = _MODEL.value == 'gemma3-270m'
  model = find_gemma3_270m() if is_gemma else _MODEL.value
  name = _NAME.value or pathlib.Path(_MODEL.value).resolve().name
  try:
    bound = listening_socket(_HOST.value, _PORT.value)
  except OSError as e:
    raise ValueError(f'--host={_HOST.value} --port={_PORT.value}: {e}') from e
  if _SIMULATE.value:
    simulate_devices(_SIMULATE.value)
  with (
    bound,
    LLM(
      model,
      mesh=_MESH.value,
      tokenizer=_TOKENIZER.value,
      chat_template=template,
      engine=config,
      dtype=_DTYPE.value,
    ) as llm,
  ):
    # Before there is anybody to wait for it.
    threading.Thread(target=llm.engine.prepare_grammars, daemon=True).start()
    engine = AsyncEngine(llm, max_unfinished=_MAX_UNFINISHED.value)
    try:
      server = Server(
        make_app(
          llm,
          engine,
          model=name,
          api_keys=keys,
          max_body_bytes=_MAX_BODY_BYTES.value,
        ),
        engine,
        bound,
        drain_timeout_s=_DRAIN_TIMEOUT_S.value,
        on_ready=lambda url: print(f'serving {name} at {url}', flush=True),
      )
      server.serve_forever()
    finally:
      engine.close()
  return server.was_drained


if __name__ == '__main__':
  app.run(main)
