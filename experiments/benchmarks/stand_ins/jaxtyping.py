"""What the ops need of jaxtyping where it is not: names for annotations.

Only `gpu.sh` puts this folder on the path, and only if jaxtyping is missing.
Nothing is checked: `Float[Array, 'B T']` is any object.
"""

from typing import Any


class _Dtype:
  """Whatever is between the brackets, it stands for anything."""

  def __class_getitem__(cls, item: Any) -> Any:
    return Any


Array = Any
Bool = Float = Int = Num = UInt32 = _Dtype
