"""The plan of a training step on a topology: memory, time, whether it fits, and a suggestion.

Memory and collectives come from the compiler; FLOPs are analytic; times follow from both and from
the published figures of the chips.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import ml_collections

from qlora_jax import errors
from qlora_jax.parallel import mesh as mesh_lib
from qlora_jax.planning import compile as compile_lib
from qlora_jax.planning import estimate, flops, hardware, hlo, program, search
from qlora_jax.workloads import language_config

TRIES = 2  # maximum number of suggestions that are compiled


def job_of(config: ml_collections.ConfigDict, topology: hardware.Topology) -> program.Job:
  """The training step of a config, checked against the topology.

  Raises:
    UserError: the config does not train a language model, or its mesh or batch does not fit the
      chips.
  """
  if config.get("kind") != "language":
    raise errors.UserError(
      "--plan: the config is not a language model's; use one such as configs/llama.py:size=70b"
    )
  resolved = language_config.resolve(config, abstract=True)
  layout = mesh_lib.from_config(config.mesh)
  if topology.slices > 1 and layout.slice == 1:
    layout = dataclasses.replace(layout, slice=topology.slices)
  sizes = mesh_lib.resolve(layout, topology.chips)
  if sizes[0] != topology.slices:
    raise errors.UserError(
      f"mesh.slice: {sizes[0]} is not the number of slices, {topology.slices}; give --slices"
    )
  layout = dataclasses.replace(layout, **dict(zip(mesh_lib.AXES, sizes, strict=True)))
  mesh_lib.check_batch(
    jax.sharding.AbstractMesh(sizes, mesh_lib.AXES),
    resolved.optimizer.batch_size,
    resolved.micro_batches,
  )
  return program.Job(
    resolved.model,
    resolved.optimizer,
    layout,
    config.data.length,
    micro_batches=resolved.micro_batches,
  )


def make(
  job: program.Job,
  topology: hardware.Topology,
  log: Callable[[str], None] = lambda text: None,
  suggest: bool = True,
  hlo_file: str = "",
) -> dict[str, Any]:
  """Compiles the step and returns its plan, in the stored form.

  Args:
    job: the step.
    topology: the chips.
    log: called with a progress message before each compilation, which takes minutes.
    suggest: whether to search for a change, and compile it, if the step does not fit.
    hlo_file: file for the text of the compiled program; '' writes none.

  Raises:
    UserError: libtpu is not installed.
    CompilerError: the compiler failed for a reason other than memory.
  """
  log(f"compiling the step for {_describe_chips(topology)}")
  compiled = compile_lib.run(job, topology, hlo_file)
  plan = describe(job, topology, compiled)
  if plan["fits"] or not suggest:
    return plan
  estimated_bytes = search.estimated(job, topology).total
  changes = search.nearest(job, topology, plan["hbm"]["needed"] / estimated_bytes)
  plan["suggestion"] = None
  for change in itertools.islice(changes, TRIES):
    log(f"does not fit; compiling with {change.text}")
    changed = describe(change.job, change.topology, compile_lib.run(change.job, change.topology))
    plan["suggestion"] = {
      "flags": list(change.flags),
      "verified": changed["fits"],
      "hbm": changed["hbm"],
      "step_time": changed["step_time"],
    }
    if changed["fits"]:
      break
  return plan


def guess(job: program.Job, topology: hardware.Topology) -> dict[str, Any]:
  """The plan without compilation: memory is estimated, and collectives are omitted."""
  kinds = dataclasses.asdict(search.estimated(job, topology))
  times = {"trace_seconds": 0.0, "compile_seconds": 0.0, "host_peak_bytes": 0}
  plan = describe(job, topology, {"fits": True, "memory": kinds, "estimated": True, **times})
  change = None if plan["fits"] else next(search.nearest(job, topology), None)
  if change is not None:
    plan["suggestion"] = {
      "flags": list(change.flags),
      "verified": False,
      "hbm": {"needed": change.bytes},
      "step_time": None,
    }
  return plan


def describe(
  job: program.Job, topology: hardware.Topology, compiled: dict[str, Any]
) -> dict[str, Any]:
  """The plan of a step from the result of its compilation, see `worker.measure`."""
  shape, chip = job.model.config, topology.chip
  sizes = dict(zip(mesh_lib.AXES, mesh_lib.resolve(job.mesh, topology.chips), strict=True))
  shards = sizes["slice"] * sizes["data"] * sizes["fsdp"]
  answers = job.places(shards) * shards * job.micro_batches
  work = flops.step(shape, job.model.adapter, job.rows, job.length, answers)
  collectives = [hlo.Collective(**fields) for fields in compiled.get("collectives", ())]
  estimated = search.estimated(job, topology)
  kinds = dict(compiled["memory"])
  needed = compiled.get("used") or sum(kinds.values())
  if not compiled["fits"]:  # the compiler reports only the sum
    kinds["activations"] = estimated.activations
    kinds["temporaries"] = max(0, needed - sum(kinds.values()))
  limit = compiled.get("limit") or int(chip.hbm)
  fits = compiled["fits"] and needed <= limit
  times = estimate.step_time(
    job,
    topology,
    work,
    collectives,
    kinds["base"] * sizes["fsdp"],
    kinds.get("activations", 0),
  )
  return {
    "topology": topology.name,
    "slices": topology.slices,
    "chips": topology.chips,
    "mesh": sizes,
    "remat": shape.remat,
    "micro_batches": job.micro_batches,
    "rows": job.rows,
    "length": job.length,
    "blocks": shape.blocks,
    "layers_per_block": shape.layers_per_block,
    "adapter": dataclasses.asdict(job.model.adapter),
    "fits": fits,
    "compiled": not compiled.get("estimated", False),
    "hbm": {
      "needed": needed,
      "limit": limit,
      "kinds": kinds,
      "activations_are_estimated": not compiled["fits"] or "estimated" in compiled,
    },
    "collectives": estimate.by_kind(collectives),
    "collectives_of_routing": len(estimate.of_routing(collectives)),
    "flops": {
      **dataclasses.asdict(work),
      "model": work.model,
      "hardware": work.hardware,
    },
    "step_time": None
    if not fits
    else {
      **{name: getattr(times, name) for name in ("compute", "memory", "ici", "dcn")},
      "estimate": times.overlapped,
      "serial": times.serial,
      "mfu": times.mfu,
      "bound": times.bound,
      "assumed_utilisation": estimate.UTILISATION,
      "tokens_per_second": job.rows * job.length / times.overlapped,
    },
    "host_memory": host_memory(job, topology, kinds),
    "compile": {
      "trace_seconds": compiled["trace_seconds"],
      "compile_seconds": compiled["compile_seconds"],
      "host_peak_bytes": compiled["host_peak_bytes"],
    },
  }


def host_memory(
  job: program.Job, topology: hardware.Topology, kinds: dict[str, int]
) -> dict[str, float]:
  """Bytes of RAM that a host needs at most, and has; and its number of chips.

  A host reads the shards of the base for its chips one tensor at a time. It writes checkpoints from
  a copy of its chips' adapters and optimiser states.
  """
  chips = min(topology.chip.chips_per_host, topology.chips_per_slice)
  shape = job.model.config
  largest = max(
    shape.vocabulary * shape.width,
    shape.layers_per_block * max(inputs * outputs for inputs, outputs in shape.map_shapes.values()),
  )
  state = kinds["adapter"] + kinds["optimizer"]
  needed = chips * (kinds["base"] + state) + 4 * largest
  return {"needed": float(needed), "limit": topology.chip.host_memory, "chips": chips}


def verdict(plan: dict[str, Any]) -> str:
  """One sentence: the free memory if the step fits, else the missing memory and a suggestion."""
  hbm = plan["hbm"]
  gap = abs(hbm["limit"] - hbm["needed"]) / hardware.GIB
  limit = f"{hbm['limit'] / hardware.GIB:.1f} GiB per chip"
  source = "" if plan["compiled"] else "by the estimate "
  if plan["fits"]:
    return f"{source}fits with {gap:.1f} GiB of {limit} to spare"
  text = f"{source}the step needs {gap:.1f} GiB more than the {limit}"
  suggestion = plan.get("suggestion")
  if suggestion is None:
    return f"{text}; no mesh, remat or topology of this chip was found that fits"
  flags = " ".join(suggestion["flags"])
  if suggestion["verified"]:
    return f"{text}; fits with {flags} ({suggestion['hbm']['needed'] / hardware.GIB:.1f} GiB)"
  if not plan["compiled"]:
    return f"{text}; it should fit with {flags}, which was not compiled"
  return f"{text}; the nearest change that was compiled does not fit either: {flags}"


def _describe_chips(topology: hardware.Topology) -> str:
  slices = f"{topology.slices} slices of " if topology.slices > 1 else ""
  return f"{slices}{topology.name} ({topology.chips} chips)"
