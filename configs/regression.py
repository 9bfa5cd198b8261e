"""Queryable LoRA against its baselines on noisy non-linear regression.

A residual MLP is trained on a clean source and frozen; adapters of equal size learn a shifted,
noisy target. Every method searches the same learning rates over `search_seeds`, is chosen on
noisy validation rows, and is then trained afresh on `final_seeds`, whose noise-free test error
the report compares, paired by seed.

  python launch.py --config=configs/regression.py:runlocal --workdir=runs/local
  python launch.py --config=configs/regression.py:demo --workdir=runs/demo --sweep
  python launch.py --config=configs/regression.py:headline --workdir=runs/headline --sweep
  python launch.py --config=configs/regression.py --workdir=runs/regression --sweep
  python launch.py --config=configs/regression.py:stability --workdir=runs/stability --sweep
  python launch.py --config=configs/regression.py:small --workdir=runs/small/regression --sweep

`headline` is the protocol in full on the two tasks whose claims the README makes. `stability` is
LoRA and Queryable LoRA alone on every task, with a loss recorded every ten steps, to count spikes.
`small` has the protocol's rates and seeds on two tasks, in few steps, and is made in minutes.
"""

import dataclasses

import ml_collections
from ml_collections import config_dict

from qlora_jax import sweeps
from qlora_jax.adapters import config as adapter_config
from qlora_jax.adapters import factory
from qlora_jax.launching import options

VARIANTS = ("", "runlocal", "demo", "headline", "stability", "small")
LEARNING_RATES = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
OTHER_NOISE_LEVELS = (0.0, 0.25, 1.0)  # beside the study's 0.5, for error against noise
SYNTHETIC = ("regimes", "multi_target", "friedman1", "friedman2", "friedman3", "sines")
TABLES = ("bikeshare", "house_prices", "avocados", "flights")


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The base setting of the study, or a variant of it: see the file's head."""
  arg = arg or ""
  sweeps.check_variant(arg, VARIANTS)
  config = ml_collections.ConfigDict()
  config.variant = arg
  config.label = config_dict.placeholder(str)  # a setting's name in tables; its adapter's if none
  config.seed = 0
  config.model = dict(inputs=24, width=64, hidden=64, layers=4, layers_per_block=1)
  config.adapter = _adapter_fields()
  config.optimizer = dict(
    learning_rate=1e-2,
    steps=1000,
    batch_size=64,
    warmup=0.05,
    weight_decay=0.0,
    clip=1.0,
    memory_multiplier=1.0,
    router_multiplier=1.0,
  )
  config.pretrain = dict(learning_rate=3e-3, steps=3000, batch_size=128, seed=0)
  config.data = dict(task="regimes", noise_level=0.5)
  config.data.noise_kind = config_dict.placeholder(str)
  config.data.train_rows = config_dict.placeholder(int)
  config.data.data_dir = "data"
  config.instruction = dict(encoder="minilm", dim=16, shuffled=False)
  config.protocol = dict(search_seeds=(0, 1, 2), final_seeds=tuple(range(100, 110)))
  # Groups of fewer runs are filled up with copies: search and final runs then share one program.
  config.protocol.least_runs = 1
  # routing_every: steps between two measurements of what the routing gains, 0 for the end alone.
  config.eval = dict(every=200, routing_every=200)
  # seconds: least time between two; keep: newest ones kept; on_nonfinite: what a loss that is not
  # finite does, 'end' the training or 'stop' the command with the batch saved.
  config.checkpoint = dict(seconds=15.0, keep=2, on_nonfinite="end")
  config.mesh = dict(runs=1)
  config.cluster = options.default()
  if arg == "runlocal":
    config.optimizer.steps = 400
    config.pretrain.steps = 1000
  if arg == "demo":
    config.optimizer.steps = 600
    config.pretrain.steps = 1500
    config.protocol.update(search_seeds=(0,), final_seeds=(100, 101, 102, 103))
  if arg == "stability":
    config.eval.every = 10
  if arg == "small":
    config.optimizer.steps = 300
    config.pretrain.steps = 1500
    config.protocol.search_seeds = (0,)
    config.eval.every = 100
  return config


def of_study(arg: str | None) -> ml_collections.ConfigDict:
  """The base setting of other studies: one search seed, ten runs trained at once.

  Args:
    arg: that file's variant: none, or `runlocal`, which is small enough to look at.
  """
  arg = arg or ""
  sweeps.check_variant(arg, ("", "runlocal"))
  config = get_config(arg)
  config.variant = arg
  config.protocol.update(search_seeds=(0,), least_runs=10)
  if arg:
    config.protocol.update(least_runs=1, final_seeds=(100, 101))
  return config


def get_hyper(hyper, arg: str | None = None) -> list[dict]:
  """The full search: tasks x methods x learning rates, then noise levels; seeds: `protocol`."""
  if arg == "runlocal":
    rates = hyper.sweep("optimizer.learning_rate", (3e-3, 1e-2))
    return hyper.product(hyper.sweep("adapter.name", ("lora", "queryable")), rates)
  if arg == "demo":
    rates = hyper.sweep("optimizer.learning_rate", (3e-3, 1e-2, 3e-2))
    common = ("none", "full", "lora", "queryable")
    return hyper.chainit(
      hyper.product(_task("regimes"), hyper.sweep("adapter.name", common), rates),
      hyper.product(
        _task("multi_target"),
        hyper.sweep("adapter.name", ("lora", "lora_input", "queryable_prior")),
        rates,
      ),
      hyper.product(
        _task("bikeshare"),
        hyper.sweep("adapter.name", (*common, "queryable_prior")),
        rates,
      ),
    )
  if arg == "headline":
    rates = hyper.sweep("optimizer.learning_rate", LEARNING_RATES)
    first = ("none", "lora", "queryable", "full", "static", "queryable_no_summary")
    second = ("lora", "lora_input", "queryable_prior", "queryable", "full_input")
    return hyper.chainit(
      _methods(hyper, "regimes", first[:3], rates),
      _methods(hyper, "multi_target", second[:3], rates),
      _methods(hyper, "regimes", first[3:], rates),
      _methods(hyper, "multi_target", second[3:], rates),
    )
  rates = hyper.sweep("optimizer.learning_rate", LEARNING_RATES)
  if arg == "stability":
    others = [name for name in (*SYNTHETIC, *TABLES) if name != "multi_target"]
    return hyper.chainit(
      _methods(hyper, "multi_target", ("lora_input", "queryable_prior"), rates),
      *(_methods(hyper, name, ("lora", "queryable"), rates) for name in others),
    )
  if arg == "small":
    first = ("none", "lora", "queryable", "static")
    second = ("lora_input", "queryable_prior", "queryable")
    return hyper.chainit(
      _methods(hyper, "regimes", first, rates), _methods(hyper, "multi_target", second, rates)
    )
  methods = hyper.product(
    hyper.chainit(*(_task(name) for name in (*SYNTHETIC, *TABLES))),
    hyper.sweep("adapter.name", factory.names()),
  )
  noise = hyper.product(
    hyper.sweep("data.task", ("regimes",)),
    hyper.sweep("data.noise_level", OTHER_NOISE_LEVELS),
    hyper.sweep("adapter.name", ("lora", "queryable", "full", "static")),
  )
  return hyper.product(hyper.chainit(methods, noise), rates)


def _methods(hyper, task: str, names: tuple[str, ...], rates: list[dict]) -> list[dict]:
  return hyper.product(_task(task), hyper.sweep("adapter.name", names), rates)


def _task(name: str) -> list[dict]:
  """A task; a table's noise is its own."""
  return [{"data.task": name, "data.noise_level": 0.0 if name in TABLES else 0.5}]


def _adapter_fields() -> ml_collections.ConfigDict:
  """Every field of `AdapterConfig` as an override; None keeps the preset's value."""
  fields = ml_collections.ConfigDict({"name": "queryable", "budget": 8192})
  for field in dataclasses.fields(adapter_config.AdapterConfig):
    if field.name not in ("family", "map_ranks", "instruction_dim"):
      fields[field.name] = config_dict.placeholder(type(field.default))
  return fields
