"""One of several processes that communicate in a loop until one is lost."""

import time

import numpy as np
from jax.experimental import multihost_utils

from qlora_jax.parallel import processes

processes.start()
with processes.together():
  for step in range(10_000):
    multihost_utils.process_allgather(np.ones(4))
    print(step, flush=True)
    time.sleep(0.02)
