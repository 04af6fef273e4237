"""Parameters of requests: from one table both checks and description.

A parameter that is in no table is refused by name, as is one that OpenAI has
and this server lacks, unless its value asks for nothing.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.server.errors import ApiError
from jaxserve.server.schema import Invalid
from jaxserve.server.schema import Schema
from jaxserve.server.schema import check


@dataclasses.dataclass(frozen=True)
class Field:
  """A parameter.

  Attributes:
    name: In the request.
    schema: What it may be, as JSON Schema; `null` is allowed besides, and
      means the default, unless it is required.
    description: For `/openapi.json`.
    maps_to: The field of `SamplingParams` that it sets as it is.
    default: What holds if it is absent.
    required: Whether it must be there.
    is_supported: Whether any value but the harmless ones of `schema` is.
  """

  name: str
  schema: Schema
  description: str
  maps_to: str | None = None
  default: Any = None
  required: bool = False
  is_supported: bool = True


class Body:
  """The parameters of an endpoint.

  Attributes:
    name: Of the schema in `/openapi.json`.
    schema: It.
  """

  def __init__(self, name: str, fields: Sequence[Field]):
    self.name = name
    self._fields = fields
    properties = {}
    for f in fields:
      schema = f.schema if f.required else _nullable(f.schema)
      properties[f.name] = {'description': f.description, **schema}
      if f.default is not None:
        properties[f.name]['default'] = f.default
    self.schema = {
      'type': 'object',
      'properties': properties,
      'required': [f.name for f in fields if f.required],
      'additionalProperties': False,
    }

  def parse(self, body: Any) -> dict[str, Any]:
    """Returns all parameters, with their defaults.

    Raises:
      ApiError: 400, with the name of the parameter.
    """
    try:
      given = check(body, self.schema)
    except Invalid as e:
      if any(e.path == f.name and not f.is_supported for f in self._fields):
        raise ApiError(
          400,
          f'{e.path} is not supported by this server',
          param=e.path,
          code='unsupported_parameter',
        ) from None
      raise ApiError(
        400, str(e), param=e.path or None, code='invalid_value'
      ) from None
    given = {name: x for name, x in given.items() if x is not None}
    return {f.name: given.get(f.name, f.default) for f in self._fields}

  def sampling_params(
    self, values: Mapping[str, Any], **others: Any
  ) -> SamplingParams:
    """What parsed values ask for, and `others` besides.

    Raises:
      ApiError: 400, where values do not go together.
    """
    for f in self._fields:
      if f.maps_to is not None and values[f.name] is not None:
        others.setdefault(f.maps_to, values[f.name])
    bias = others.get('logit_bias')
    if bias is not None:
      others['logit_bias'] = {int(k): float(v) for k, v in bias.items()}
    try:
      return SamplingParams(**others)
    except ValueError as e:
      raise ApiError(400, str(e), code='invalid_request') from None


def _nullable(schema):
  if 'anyOf' in schema:
    return {**schema, 'anyOf': [*schema['anyOf'], {'type': 'null'}]}
  if 'enum' in schema and None not in schema['enum']:
    schema = {**schema, 'enum': [*schema['enum'], None]}
  kinds = schema.get('type', [])
  kinds = [kinds] if isinstance(kinds, str) else list(kinds)
  if kinds and 'null' not in kinds:
    schema = {**schema, 'type': [*kinds, 'null']}
  return schema
