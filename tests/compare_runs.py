"""Runs the studies of `compare_studies.py` in a checkout, and reads what they leave."""

import json
import os
import pathlib
import signal
import subprocess
import time
from typing import Any

import compare_studies
import numpy as np
import pandas as pd
from safetensors import numpy as safetensors_numpy

IGNORED = ("run_id", "seconds", "directory", "date", "tokens_per_second", "examples_per_second")
# Columns that say which row it is, as far as a table has them.
_KEYS = (
  "unit kind setting state arm task method stage seed learning_rate step target "
  "with_instruction part after place block atom instruction prompt"
)
KEYS = tuple(_KEYS.split())
TABLES = ("results.parquet", "curves.parquet", "routing.parquet", "samples.parquet")
UNITS = "units/*.json"
CHECKPOINTS = "**/checkpoints/[0-9]*"
ADAPTERS = ("adapter", "adapter_best")

# Compiling takes most of the time: less is optimised, equally in both checkouts.
XLA_FLAGS = (
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
  " --xla_cpu_use_fusion_emitters=false"
)


_CONFIG_FILE = '''"""Written by compare_checkouts.py."""

import importlib

FIELDS = {fields_renamed!r}


def get_config(arg=None):
  config = importlib.import_module({module!r}).get_config({variant!r})
  with config.unlocked():
    config.update_from_flattened_dict(_named(config, {fields!r}))
  return config


def get_hyper(hyper, arg=None):
  config = get_config()
  return [_named(config, point) for point in {points!r}]


def _named(config, fields):
  return {{(FIELDS[n] if n in FIELDS and _has(config, FIELDS[n]) else n): v
          for n, v in fields.items()}}


def _has(config, name):
  for part in name.split("."):
    if part not in config:
      return False
    config = config[part]
  return True
'''


class Checkout:
  """A checkout in which studies are run, one process after another on one core.

  Args:
    root: the checkout, with its own `PYTHONPATH`.
    python: the interpreter.
    scratch: folder for work directories and prepared data.
    model: folder of the tiny language model.
    compiled: folder of compiled programs; may be shared with another checkout.
  """

  def __init__(
    self,
    root: pathlib.Path,
    python: str,
    scratch: pathlib.Path,
    model: pathlib.Path,
    compiled: pathlib.Path,
  ):
    self.root, self.python, self.scratch, self.model = root, python, scratch, model
    hidden = ("XLA_FLAGS", "PYTHONPATH", "QLORA_JAX_TYPECHECK")
    self._environment = {name: v for name, v in os.environ.items() if name not in hidden} | {
      "PYTHONPATH": str(root),
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": XLA_FLAGS,
      "JAX_COMPILATION_CACHE_DIR": str(compiled),
      "TOKENIZERS_PARALLELISM": "false",
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
      "OMP_NUM_THREADS": "1",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
      "PYTHONHASHSEED": "0",
    }
    self._core = max(os.sched_getaffinity(0))

  def run(self, study: compare_studies.Study) -> dict[str, Any]:
    """Runs a study; returns its rows by table and arrays by adapter, see `read`.

    Raises:
      RuntimeError: the command failed; with the end of what it printed.
    """
    name = "".join(letter if letter.isalnum() else "-" for letter in study.name)
    workdir = self.scratch / name
    workdir.mkdir(parents=True)
    config = self.scratch / f"{name}.py"
    config.write_text(self._config_file(study))
    command = [self.python, "launch.py"]
    if study.command:
      results = f"--results={self.scratch / name}-tables"
      # The command of a study file is `python -m experiments NAME`.
      module = self._module(study.command).replace("experiments.studies.", "experiments ")
      command = [self.python, "-m", *module.split(), results]
    elif study.points:
      command.append("--sweep")
    command += [f"--config={config}", f"--workdir={workdir}", *study.arguments]
    log = self.scratch / f"{name}.log"
    if study.interrupted:
      self._check(self._start(command, log, workdir), 143, study, log)
    self._check(self._start(command, log), 0, study, log)
    return read(workdir)

  def _start(self, command, log: pathlib.Path, interrupted: pathlib.Path | None = None) -> int:
    core = {self._core}
    with log.open("a") as output:
      process = subprocess.Popen(
        command,
        cwd=self.root,
        env=self._environment,
        stdout=output,
        stderr=output,
        preexec_fn=lambda: os.sched_setaffinity(0, core),
      )
      try:
        if interrupted is not None:
          while process.poll() is None and _count_checkpoints(interrupted) < 2:
            time.sleep(0.01)
          process.send_signal(signal.SIGTERM)
        return process.wait()
      finally:
        process.kill()  # where this script itself is stopped

  def _check(
    self, code: int, expected: int, study: compare_studies.Study, log: pathlib.Path
  ) -> None:
    if code != expected:
      end = "\n".join(log.read_text().splitlines()[-30:])
      raise RuntimeError(f"{study.name}: exit code {code}, not {expected}\n{end}")

  def _module(self, name: str) -> str:
    new = compare_studies.NAMES["module"].get(name, name)
    path = self.root.joinpath(*new.split("."))
    return new if path.is_dir() or path.with_suffix(".py").exists() else name

  def _config_file(self, study: compare_studies.Study) -> str:
    module, _, variant = study.config.partition(":")
    places = {"MODEL": str(self.model)}
    fields = {
      name: places.get(value, value) if isinstance(value, str) else value
      for name, value in study.fields.items()
    }
    return _CONFIG_FILE.format(
      fields_renamed=compare_studies.NAMES["field"],
      module=self._module(module),
      variant=variant,
      fields={"data.data_dir": str(self.scratch / "data"), **fields},
      points=list(study.points),
    )


def read(workdir: pathlib.Path) -> dict[str, Any]:
  """What a study left in its work directory, in the old names.

  Returns:
    'rows': {table: {row: {column: value}}}; 'arrays': {"row/adapter/tensor": array}.
  """
  tables, arrays, runs = {}, {}, {}
  for name in TABLES:
    for path in _paths(workdir, name):
      tables[name.partition(".")[0]] = _old_names(pd.read_parquet(path), columns=True)
  for row in tables.get("results", ()):
    runs[row.get("run_id")] = {name: row[name] for name in KEYS if name in row}
    if isinstance(row.get("directory"), str):
      for folder in ADAPTERS:
        for path in (workdir / row["directory"]).glob(f"{folder}/*.safetensors"):
          for tensor, value in safetensors_numpy.load_file(path).items():
            arrays[f"{_row_name(row)}/{folder}/{tensor}"] = value
  for path in _paths(workdir, UNITS):
    for kind, rows in json.loads(path.read_text()).items():
      tables.setdefault(f"units: {kind}", []).extend(
        _old_names(pd.DataFrame([{"unit": path.stem, **row} for row in rows]))
      )
  found: dict[str, dict] = {}
  for table, rows in tables.items():
    found[table] = {}
    for row in rows:
      named = {**runs.get(row.get("run_id"), {}), **row}
      name = _row_name(named)
      if name in found[table]:
        raise ValueError(f"{workdir}: {table} has two rows {name}")
      found[table][name] = {
        column: value for column, value in named.items() if column not in (*KEYS, *IGNORED)
      }
  if not found:
    raise ValueError(f"{workdir}: no table; see compare_studies.NAMES['file']")
  return {"rows": found, "arrays": arrays}


def _old_names(table: pd.DataFrame, columns: bool = False) -> list[dict[str, Any]]:
  names = compare_studies.NAMES["column"] if columns else {}
  values = {new: old for old, new in compare_studies.NAMES["value"].items()}
  return [
    {
      name: values.get(value, value) if isinstance(value, str) else _plain(value)
      for name, value in row.items()
    }
    for row in table.rename(columns={new: old for old, new in names.items()}).to_dict(
      orient="records"
    )
  ]


def _plain(value: Any) -> Any:
  return value.item() if isinstance(value, np.generic) else value


def _row_name(row: dict[str, Any]) -> str:
  return ", ".join(f"{name} {row[name]}" for name in KEYS if row.get(name) is not None)


def _count_checkpoints(workdir: pathlib.Path) -> int:
  try:
    return len(_paths(workdir, CHECKPOINTS))
  except FileNotFoundError:  # a folder was renamed or removed while it was read
    return 0


def _paths(workdir: pathlib.Path, pattern: str) -> list[pathlib.Path]:
  names = {pattern, compare_studies.NAMES["file"].get(pattern, pattern)}
  return sorted(path for name in names for path in workdir.glob(name))


def write_model(folder: pathlib.Path) -> None:
  """A Llama of two layers with random weights and a byte-level BPE, as a Hugging Face folder."""
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers, trainers

  folder.mkdir(parents=True)
  backend = tokenizers.Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  texts = ["Write the plural of the word.", "Rewrite the word in capital letters. user assistant"]
  backend.train_from_iterator(
    texts * 20,
    trainers.BpeTrainer(
      vocab_size=320,
      special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
      initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
      show_progress=False,
    ),
  )
  backend.save(str(folder / "tokenizer.json"))
  template = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
  )
  (folder / "tokenizer_config.json").write_text(
    json.dumps(
      {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": template,
      }
    )
  )
  vocabulary, width, hidden, groups = 384, 32, 64, 16  # groups: width of keys and values
  (folder / "config.json").write_text(
    json.dumps(
      {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
      }
    )
  )
  shapes = {"model.embed_tokens": (vocabulary, width), "lm_head": (vocabulary, width)}
  for layer in range(2):
    maps = {
      "self_attn.q_proj": (width, width),
      "self_attn.k_proj": (groups, width),
      "self_attn.v_proj": (groups, width),
      "self_attn.o_proj": (width, width),
      "mlp.gate_proj": (hidden, width),
      "mlp.up_proj": (hidden, width),
      "mlp.down_proj": (width, hidden),
      "input_layernorm": (width,),
      "post_attention_layernorm": (width,),
    }
    shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in maps.items()}
  shapes["model.norm"] = (width,)
  rng = np.random.default_rng(0)
  tensors = {
    f"{name}.weight": (0.3 * rng.standard_normal(shape) + (len(shape) == 1)).astype(np.float32)
    for name, shape in shapes.items()
  }
  safetensors_numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
