"""Compiles one step for a TPU topology, in a separate process that `compile.py` starts.

Only this process loads libtpu, because on a machine without TPUs libtpu writes to standard error
and takes memory. It reads a pickled `Request` from standard input and writes JSON to the request's
file `result`.
"""

import contextlib
import json
import pathlib
import pickle
import resource
import sys
import time
from typing import Any

import jax
from jax.experimental import topologies

from qlora_jax.parallel import mesh as mesh_lib
from qlora_jax.planning import compile as compile_lib
from qlora_jax.planning import hlo, program
from qlora_jax.workloads import language_shards


def devices(topology) -> list[Any]:
  """The devices of a topology's description, one per chip."""
  options = dict(topology.chip.options)
  if topology.slices > 1:
    options["num_slices"] = topology.slices
  return list(
    topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options).devices
  )


def measure(request: compile_lib.Request) -> dict[str, Any]:
  """Compiles a step and reads the program.

  Returns:
    fits: whether the program fits into HBM.
    memory: bytes per chip by kind.
    used, limit: HBM in bytes, if the program does not fit.
    program, peak: bytes of code, and at the point of highest use, if it fits.
    collectives: fields of `hlo.Collective`, if it fits.
    trace_seconds, compile_seconds, host_peak_bytes: cost of the compilation.
  """
  job, topology = request.job, request.topology
  mesh = mesh_lib.make(job.mesh, devices(topology))
  shards = language_shards.Shards(mesh, job.mesh.rules)
  state, frozen, batch = program.arguments(job, shards)
  sizes = {
    "base": program.bytes_per_chip(frozen),
    "adapter": program.bytes_per_chip(state.params),
    "optimizer": program.bytes_per_chip((state.step, state.opt_state, state.learning_rate)),
    "batch": program.bytes_per_chip(batch),
  }
  began = time.monotonic()
  with contextlib.redirect_stdout(sys.stderr):
    lowered = program.lower(job, shards, "tpu")
    traced = time.monotonic()
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      used_and_limit = compile_lib.exceeded(str(error))
      if used_and_limit is None:
        raise
      return {"fits": False, "memory": sizes, **used_and_limit, **_times(began, traced)}
  memory, text = compiled.memory_analysis(), compiled.as_text()
  if request.hlo:
    pathlib.Path(request.hlo).write_text(text)
  blocks = job.model.config.blocks
  argument_shapes = {
    leaf.sharding.shard_shape(leaf.shape)
    for leaf in jax.tree.leaves((state, frozen))
    if leaf.ndim > 1
  }
  activations = hlo.saved_bytes(text, blocks, argument_shapes)
  activations = min(activations, memory.temp_size_in_bytes)
  output = memory.output_size_in_bytes - memory.alias_size_in_bytes
  sizes |= {
    "activations": activations,
    "temporaries": memory.temp_size_in_bytes
    - activations
    + output
    + memory.argument_size_in_bytes
    - sum(sizes.values()),
  }
  slice_size = topology.chips_per_slice if topology.slices > 1 else 0
  return {
    "fits": True,
    "memory": sizes,
    "program": memory.generated_code_size_in_bytes,
    # Live bytes at the point of highest use; the compiler's packing adds the difference to the sum.
    "peak": memory.peak_memory_in_bytes,
    "collectives": [vars(collective) for collective in hlo.collectives(text, slice_size)],
    **_times(began, traced),
  }


def _times(began: float, traced: float) -> dict[str, float]:
  return {
    "trace_seconds": traced - began,
    "compile_seconds": time.monotonic() - traced,
    "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
  }


def main() -> None:
  request = pickle.load(sys.stdin.buffer)
  pathlib.Path(request.result).write_text(json.dumps(measure(request)))


if __name__ == "__main__":
  main()
