"""Kills a run at twenty moments and lets it go on; `test_killed.py` runs this and compares.

  python tests/training/killed.py FOLDER WEIGHTS DATA

Everything is imported once, before any device is in use; each start of the run is a fork. A run is
killed, started again, killed again and so on to its end, four times over from the beginning: each
of them must come to the bits of the run that nothing stopped. A fifth run is stopped by SIGTERM
and goes on with other numbers of devices and processes.
"""

import json
import os
import pathlib
import random
import resource
import signal
import socket
import sys
import time

import jax

from configs import llm
from qlora_jax import errors, files
from qlora_jax.parallel import processes
from qlora_jax.training import checkpoint, checksums, loop, progress, stop
from qlora_jax.workloads import language, language_shards, workload

STEPS = 20
# (what the run does, how often before, seconds that the kill comes later at most, or None where
# the run holds still at that very place, signal; FULL lets it write no more than 1 KiB to a file).
KILL, TERM, FULL = signal.SIGKILL, signal.SIGTERM, None
CHAINS = {
  "compile": [
    ("update", 1, 0.5, KILL),
    ("step", 2, 0.02, KILL),
    ("seal", 1, None, KILL),
    ("step", 3, None, TERM),
    ("fitted", 1, None, KILL),
  ],
  "start": [
    ("start", 1, 0.5, KILL),
    ("built", 1, 0.3, KILL),
    ("step", 5, 0.02, KILL),
    ("step", 1, None, FULL),
    ("save", 2, 0.05, KILL),
    ("adapter", 1, None, KILL),
  ],
  "save": [
    ("save", 1, 0.02, KILL),
    ("save", 2, 0.05, KILL),
    ("save", 1, 0.05, KILL),
    ("seal", 2, None, KILL),
    ("result", 1, None, KILL),
  ],
  "step": [
    ("step", 1, None, KILL),
    ("step", 2, 0.05, KILL),
    ("step", 4, 0.05, KILL),
    ("save", 3, 0.05, KILL),
    ("seal", 2, None, KILL),
    ("done", 1, None, KILL),
  ],
}


# (processes, devices of each, size of the tensor axis): a run that moves from one to the next.
PLACES = [(1, 1, 1), (1, 4, 2), (2, 2, 1), (1, 1, 1)]


def config(weights: str, data: str, tensor: int = 1):
  found = llm.get_config()
  found.model.weights, found.model.layers_per_block, found.model.adapted = weights, 1, ("q",)
  found.adapter.name, found.adapter.rank = "lora", 4
  found.optimizer.update({"steps": STEPS, "batch_size": 4, "learning_rate": 5e-2})
  found.data.name, found.data.length = data, 32
  found.eval.update({"every": 2, "validation": 4})
  found.checkpoint.update({"seconds": 0.0, "keep": 2, "keep_best": 1, "validate_every": 4})
  found.mesh.tensor = tensor
  return found


def train(folder: pathlib.Path, weights: str, data: str, tell, devices=1, tensor=1) -> None:
  """The run in this process; `tell` is called with what it is about to do."""
  jax.config.update("jax_num_cpu_devices", devices)

  def wrap(function, before=None, after=None):
    def wrapped(*args, **kwargs):
      if before:
        tell(before)
      result = function(*args, **kwargs)
      if after:
        tell(after)
      return result

    return wrapped

  def told(owner, name, before=None, after=None):
    setattr(owner, name, wrap(getattr(owner, name), before, after))

  make_update = language_shards.update
  language_shards.update = lambda *args: wrap(make_update(*args), "update", "step")
  told(checkpoint.Checkpointer, "save", after="save")  # the writing has begun
  told(checksums, "write", "seal")
  told(loop, "fit", after="fitted")
  told(language.Language, "_save", "adapter")
  told(files, "write_json", "result", "done")  # this run calls it once, for its result
  jax.config.update("jax_compilation_cache_dir", str(folder.parent / "compiled"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
  tell("start")
  processes.start()
  stop.install()  # after JAX, which sets a handler of its own where there are several processes
  shown = progress.Display(total_trials=1, plain=True)
  settings = config(weights, data, tensor)
  trial = workload.Trial(settings.seed, settings.optimizer.learning_rate)
  cohort = workload.Cohort(settings, "search", (trial,))  # a search generates nothing
  resources = language.Resources(folder.parent, shown)
  training = resources.open(cohort, folder)
  tell("built")
  loop.train(training, resources.saving(cohort, folder), shown)


def fork(folder, weights, data, moment=None, delay=0.0, environment=(), **place):
  """Runs `train` in a fork; returns a function that kills it at `moment` and gives its exit code.

  The code is negative for a signal.
  """
  reading, writing = os.pipe()
  pid = os.fork()
  if pid == 0:
    seen = {}

    def tell(what):
      seen[what] = seen.get(what, 0) + 1
      if not moment or (what, seen[what]) != moment[:2]:
        return
      if moment[3] is FULL:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
        return
      os.write(writing, b"!")
      while moment[2] is None and not stop.requested():  # holds still until the signal is here
        time.sleep(0.01)

    os.environ.update(environment)
    try:
      train(folder, weights, data, tell, **place)
    except errors.UserError as error:
      print(f"error: {error}")
      sys.exit(2)
    except KeyboardInterrupt as interruption:
      sys.exit(stop.exit_code(interruption))
    sys.exit(0)
  os.close(writing)

  def end() -> int:
    if os.read(reading, 1):  # empty where the run ended without coming there
      time.sleep(delay)
      os.kill(pid, moment[3])
    os.close(reading)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

  return end


def start(*args, **kwargs) -> int:
  return fork(*args, **kwargs)()


def elsewhere(folder: pathlib.Path, weights: str, data: str) -> list[dict]:
  """A run that is asked to stop, and goes on in the next place, until it is done."""
  told = []
  for index, (count, devices, tensor) in enumerate(PLACES):
    asked = ("step", 5, None, TERM) if index + 1 < len(PLACES) else None
    with socket.socket() as free:
      free.bind(("localhost", 0))
      address = f"localhost:{free.getsockname()[1]}"
    ends = [
      fork(
        folder,
        weights,
        data,
        asked if each == count - 1 else None,  # the last one alone hears it
        environment={
          "QLORA_JAX_COORDINATOR": address,
          "QLORA_JAX_PROCESSES": str(count),
          "QLORA_JAX_PROCESS": str(each),
        }
        if count > 1
        else {},
        devices=devices,
        tensor=tensor,
      )
      for each in range(count)
    ]
    codes = [end() for end in reversed(ends)]
    steps = sorted(int(path.name) for path in folder.glob("checkpoints/[0-9]*"))
    told.append({"place": [count, devices], "codes": codes, "steps": steps})
    print(told[-1], flush=True)
  return told


def main(folder: pathlib.Path, weights: str, data: str) -> None:
  rng, told = random.Random(0), []
  # The first chain comes before the run that is not stopped: its programs are not compiled yet.
  for name, moments in CHAINS.items():
    for moment in moments:
      code = start(folder / name, weights, data, moment, rng.uniform(0, moment[2] or 0))
      checkpoints = folder / name / "checkpoints"
      left = sorted(path.name for path in checkpoints.iterdir()) if checkpoints.exists() else []
      told.append({"chain": name, "moment": moment[0], "code": code, "left": left})
      print(told[-1], flush=True)
    code = start(folder / name, weights, data)
    told.append({"chain": name, "moment": "end", "code": code, "left": []})
  code = start(folder / "whole", weights, data)
  told.append({"chain": "whole", "moment": "end", "code": code, "left": []})
  places = elsewhere(folder / "elsewhere", weights, data)
  (folder / "told.json").write_text(json.dumps({"kills": told, "places": places}))


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]), *sys.argv[2:])
