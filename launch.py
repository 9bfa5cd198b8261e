"""Trains one config or a study, prints dry runs, plans and status: the command line.

  python launch.py --config=configs/regression.py:runlocal --workdir=DIR
  python launch.py --config=configs/regression.py --workdir=DIR --sweep
  python launch.py --config=configs/regression.py --sweep --dry_run
  python launch.py --config=configs/llm.py:demo --workdir=DIR
  python launch.py --plan --config=configs/llama.py:size=70b --topology=v5p:4x4x4
  python launch.py --config=configs/regression.py --workdir=DIR --sweep --cluster=slurm
  python launch.py --status --workdir=DIR

A user's error gives one line on standard error and exit code 2. An interrupted training saves and
exits with 130 (143 after SIGTERM); the same command then continues it.
"""

import pathlib
import shlex
import sys

from absl import flags
from ml_collections import config_flags

from qlora_jax import config_files, errors
from qlora_jax.launching import options
from qlora_jax.training import stop

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with an optional :variant.")
flags.FLAGS["config"].parser = config_files.FlagParser()
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of results and checkpoints.")
_SWEEP = flags.DEFINE_bool("sweep", False, "Train all trials of the config's get_hyper.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only print trials and parameter counts.")
_CLUSTER = flags.DEFINE_enum("cluster", "local", ["local", "slurm", "tpu"], "Where it runs.")
_MAX_PARALLEL = flags.DEFINE_integer(
  "max_parallel", None, "Maximum simultaneous Slurm jobs of a study.", lower_bound=1
)
_STATUS = flags.DEFINE_bool("status", False, "Show the status of the arms in --workdir.")
_PLAN = flags.DEFINE_bool("plan", False, "Show memory and time of a training step on --topology.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "TPU topology of a plan, such as v5p:4x4x4.")
_SLICES = flags.DEFINE_integer("slices", 1, "Number of slices of --topology.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "File of a plan's JSON; by default plan.json in --workdir.")
_WORKERS = flags.DEFINE_integer(
  "workers", None, "Processes of a study on a CPU; by default one per core.", lower_bound=1
)


def main(argv: list[str]) -> None:
  del argv
  if _STATUS.value:
    from qlora_jax.launching import status

    status.show(_workdir())
    return
  config, cluster = options.split(_load_config())
  if _CLUSTER.value == "slurm" and not _DRY_RUN.value:
    options.require_slurm()
  if _CLUSTER.value == "tpu":
    from qlora_jax.launching import tpu

    if not _DRY_RUN.value:  # report config errors before any TPU is created
      from qlora_jax.studies import study

      study.resolve(config)
    arguments = tpu.arguments_of_workers(sys.argv[1:])
    tpu.launch(arguments, _WORKDIR.value, cluster.tpu, _DRY_RUN.value)
    return
  if _PLAN.value:
    from qlora_jax.planning import command

    command.run(
      config,
      _TOPOLOGY.value,
      _SLICES.value,
      _OUT.value,
      _WORKDIR.value,
      "python " + shlex.join(sys.argv),
      _DRY_RUN.value,
    )
    return
  from qlora_jax.studies import study  # imported late, so that a flag error is reported fast
  from qlora_jax.workloads import workload

  path = flags.FLAGS["config"].config_filename
  points = config_files.points(path, config.variant) if _SWEEP.value else [{}]
  if _CLUSTER.value == "slurm":
    _submit(config, points if _SWEEP.value else None, cluster.slurm)
    return
  if _DRY_RUN.value:
    for arm_config, rates in study.expand(config, points):
      resolved = study.resolve(arm_config, abstract=True)
      adapter = resolved.model.adapter if study.is_language(arm_config) else resolved.adapter
      for rate in rates:
        print(
          f"{workload.task_name(arm_config)}/{workload.arm_name(arm_config)} lr {rate:g}: "
          f"{resolved.trainable_params} trainable parameters, rank {adapter.rank}"
        )
    if _SWEEP.value:
      from qlora_jax.studies import protocol

      for line in protocol.check(protocol.planned(config, points), protocol.rules_of(config)):
        print(f"protocol: {line}")
    return
  workdir = _workdir()
  from qlora_jax.parallel import processes

  processes.start()  # before the first use of a device
  stop.install()  # again, because JAX sets a signal handler if there are several processes
  with processes.together():
    _run(config, points, workdir)


def _run(config, points: list[dict], workdir: pathlib.Path) -> None:
  from qlora_jax.parallel import processes
  from qlora_jax.studies import study
  from qlora_jax.studies import workdir as workdir_lib

  study.resolve(config)
  with workdir_lib.claimed(workdir, config, "python " + shlex.join(sys.argv)):
    if _SWEEP.value:
      # One language model uses all cores.
      count = _WORKERS.value or (1 if study.is_language(config) else _default_workers())
      study.run(config, points, workdir, count)
    else:
      _, summary = study.single(config, workdir)
  if not _SWEEP.value:
    if not processes.is_first():
      return
    print(summary)
    if study.is_language(config):
      from qlora_jax.workloads import language

      if (workdir / language.ADAPTER).is_dir():  # absent if nothing was trained
        print(f"adapter: {workdir / language.ADAPTER}")
    _report(workdir)
    return
  if processes.is_first():
    _report(workdir, show=True)


def _submit(config, points: list[dict] | None, slurm_options) -> None:
  from experiments import report
  from qlora_jax.launching import slurm

  if _DRY_RUN.value:
    print(slurm.dry_run(config, points, _WORKDIR.value, slurm_options, _MAX_PARALLEL.value))
    return
  message, has_final_results = slurm.launch(
    config,
    points,
    _workdir(),
    slurm_options,
    "python " + shlex.join(sys.argv),
    _MAX_PARALLEL.value,
    report.write_report,
  )
  print(message)
  if has_final_results:
    _report(_workdir(), show=True)


def _workdir() -> pathlib.Path:
  if not _WORKDIR.value:
    raise errors.UserError("--workdir: missing; give a directory for results and checkpoints")
  return pathlib.Path(_WORKDIR.value)


def _report(workdir: pathlib.Path, show: bool = False) -> None:
  from experiments import report
  from experiments.report import terminal

  page = report.write_report(workdir)
  if show:
    terminal.show(page)
  print(f"report: {page}")


def _load_config():
  example = "give a file such as configs/regression.py:runlocal"
  if _CONFIG.value is None:
    raise errors.UserError(f"--config: missing; {example}")
  return _CONFIG.value.lock()


def _default_workers() -> int:
  import jax

  from qlora_jax.studies import workers

  return workers.default_count() if jax.default_backend() == "cpu" else 1


def cli() -> None:
  """Parses the flags and runs `main`; a user's error is reported in one line."""
  stop.install()
  try:
    main(_parse_flags())
  except errors.UserError as error:
    _fail(str(error))
  except OSError as error:
    if message := errors.unwritable(error, _WORKDIR.value):
      _fail(message)
    raise
  except KeyboardInterrupt as interruption:
    print("interrupted; the same command continues", file=sys.stderr)
    sys.exit(stop.exit_code(interruption))


def _parse_flags() -> list[str]:
  """Parses the flags and returns the positional arguments.

  Raises:
    UserError: a flag or a field of the config is wrong.
  """
  try:
    return flags.FLAGS(sys.argv)
  except (flags.Error, AttributeError, KeyError, TypeError) as error:
    text = str(error)
    # The message of ml_collections contains the traceback of the config file's error.
    if "UserError: " in text:
      raise errors.UserError(text.strip().rpartition("UserError: ")[2]) from error
    raise errors.UserError(
      f"flags: {' '.join(text.split())}; see the config file's fields"
    ) from error


def _fail(message: str) -> None:
  print(f"error: {message}", file=sys.stderr)
  sys.exit(2)


if __name__ == "__main__":
  cli()
