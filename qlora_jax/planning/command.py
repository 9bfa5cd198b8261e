"""`launch.py --plan`: makes, shows and stores the plan of a config."""

import json
import pathlib

import ml_collections
from rich import console

from qlora_jax import errors, files
from qlora_jax.planning import compile as compile_lib
from qlora_jax.planning import hardware, plan, report

FILE = "plan.json"


def run(
  config: ml_collections.ConfigDict,
  topology: str | None,
  slices: int,
  out: str | None,
  workdir: str | None,
  command: str,
  dry_run: bool = False,
) -> None:
  """Plans, prints tables, and writes JSON to `out` or into the work directory.

  With `dry_run` nothing is compiled: memory is estimated, and collectives are left out.

  Raises:
    UserError: a wrong config or topology; or the step does not fit, after its plan was stored.
  """
  if not topology:
    raise errors.UserError(f"--topology: missing; known are {hardware.known()}")
  chips = hardware.parse(topology, slices)
  job = plan.job_of(config, chips)
  if not dry_run:
    compile_lib.check()
  target = pathlib.Path(out) if out else pathlib.Path(workdir) / FILE if workdir else None
  if target is not None and not target.parent.is_dir():
    if out:
      raise errors.UserError(f"--out: there is no folder {target.parent}; make it first")
    target.parent.mkdir(parents=True)
  screen, progress = console.Console(), console.Console(stderr=True)
  with progress.status("planning") as status:

    def log(text: str) -> None:
      status.update(f"{text}; a minute or more")
      if not progress.is_terminal:
        progress.print(text, highlight=False, soft_wrap=True)

    try:
      found = plan.guess(job, chips) if dry_run else plan.make(job, chips, log)
    except compile_lib.CompilerError as error:
      raise errors.UserError(
        f"--plan: {error}; try another --topology or mesh, or --dry_run for an estimate"
      ) from error
  found["config"] = json.loads(config.to_json_best_effort())
  found["command"] = command
  report.show(found, screen)
  if target is not None:
    files.write_text(target, json.dumps(found, indent=1))
    screen.print(f"plan: {target}", highlight=False, soft_wrap=True)
  if not found["fits"]:
    raise errors.UserError(f"--plan: {plan.verdict(found)}")
