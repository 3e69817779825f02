"""A settings field with its one-line help: `steps: int = option(1000, "optimizer steps")`.

The launcher shows the help, and the type and default it reads from the dataclass itself. Below everything else, so that every
layer can describe its own settings where it uses them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

REQUIRED: Any = dataclasses.MISSING


def option(
    default: Any = REQUIRED, help: str = "", *, factory: Callable[[], Any] | None = None, may_change: bool = False
) -> Any:
    """A dataclass field that carries `help`. Without `default` and `factory` the field is required.

    Args:
      default: an immutable value, a frozen dataclass included.
      help: one line, lower case, no full stop; units where there are some.
      factory: makes the default, for mutable ones (`dict`).
      may_change: a run that resumes may have another value than the run that wrote its directory; such keys never alter
        what is computed (how often to log), or the user alters it knowingly (how many steps).
    """
    metadata = {"help": help, "may_change": may_change}
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)
