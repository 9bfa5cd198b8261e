"""Array aliases and the axis legend that every signature and einsum string follows.

B batch          T tokens (regression: T = 1)   D model width     F hidden width
D_in, D_out widths of a map
R rank           M atoms                        Q query width     k atoms kept per token
R2 rank, on the right of an R x R matrix (s in einsum strings)
N blocks         S layers per block             L = N * S layers  I routers of a block
E instruction width (P: width of the prior's descriptors)
V vocabulary     H heads                        G key/value heads (J = H / G queries each)
K head width     C key slots (the sequence itself, or the cache)
Z kinds of rotary embedding                     X data shards of the mesh
"""

import os
from typing import Any, TypeVar

import jax
import jaxtyping
import numpy as np
from jaxtyping import Bool, Float, Int  # noqa: F401  (re-exported)

Array = jax.Array | np.ndarray  # functions take host arrays too

PyTree = Any
_Function = TypeVar("_Function")

_CHECKED = os.environ.get("QLORA_JAX_TYPECHECK", "0") == "1"


def typed(function: _Function) -> _Function:
  """Checks shapes and dtypes at run time when QLORA_JAX_TYPECHECK=1 (the tests set it)."""
  if not _CHECKED:
    return function
  import typeguard  # a test dependency: the library runs without it

  return jaxtyping.jaxtyped(function, typechecker=typeguard.typechecked)
