"""What goes wrong, in the shape that OpenAI's clients understand."""

from typing import Any

_TYPES = {
  401: 'authentication_error',
  404: 'not_found_error',
  429: 'rate_limit_error',
  500: 'server_error',
  503: 'service_unavailable_error',
}


class ApiError(Exception):
  """An answer that is an error.

  Args:
    status: Of HTTP.
    message: For people.
    param: The parameter at fault, such as 'messages[0].role'.
    code: For programs.
    headers: Of the answer.
  """

  def __init__(
    self,
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
  ):
    super().__init__(message)
    self.status = status
    self.param = param
    self.code = code
    self.headers = headers or {}

  def body(self) -> dict[str, Any]:
    """The JSON of the answer."""
    return {
      'error': {
        'message': str(self),
        'type': _TYPES.get(self.status, 'invalid_request_error'),
        'param': self.param,
        'code': self.code,
      }
    }


ERROR_SCHEMA = {
  'type': 'object',
  'required': ['error'],
  'properties': {
    'error': {
      'type': 'object',
      'required': ['message', 'type', 'param', 'code'],
      'properties': {
        'message': {'type': 'string'},
        'type': {'type': 'string'},
        'param': {'type': ['string', 'null']},
        'code': {'type': ['string', 'null']},
      },
    }
  },
}
