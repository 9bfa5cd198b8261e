"""`launch.py --plan`: computes, shows and stores the plan of a config."""

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
  """Computes a plan, prints its tables, and writes JSON to `out` or into the work directory.

  With `dry_run` nothing is compiled: memory is estimated, and collectives are omitted.

  Raises:
    UserError: the config or topology is invalid, the compiler failed, or the step does not fit; in
      the last case the plan is stored first.
  """
  if not topology:
    raise errors.UserError(f"--topology: missing; use one of {hardware.known()}")
  chips = hardware.parse(topology, slices)
  job = plan.job_of(config, chips)
  if not dry_run:
    compile_lib.check()
  target = pathlib.Path(out) if out else pathlib.Path(workdir) / FILE if workdir else None
  if target is not None and not target.parent.is_dir():
    if out:
      raise errors.UserError(f"--out: there is no folder {target.parent}; create it first")
    target.parent.mkdir(parents=True)
  screen, progress = console.Console(), console.Console(stderr=True)
  with progress.status("planning") as status:

    def log(text: str) -> None:
      status.update(f"{text}; this takes a minute or more")
      if not progress.is_terminal:
        progress.print(text, highlight=False, soft_wrap=True)

    try:
      step_plan = plan.guess(job, chips) if dry_run else plan.make(job, chips, log)
    except compile_lib.CompilerError as error:
      raise errors.UserError(
        f"--plan: {error}; try another --topology or mesh, or --dry_run for an estimate"
      ) from error
  step_plan["config"] = json.loads(config.to_json_best_effort())
  step_plan["command"] = command
  report.show(step_plan, screen)
  if target is not None:
    files.write_text(target, json.dumps(step_plan, indent=1))
    screen.print(f"plan: {target}", highlight=False, soft_wrap=True)
  if not step_plan["fits"]:
    raise errors.UserError(f"--plan: {plan.verdict(step_plan)}")
