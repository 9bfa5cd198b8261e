"""Host memory while weights are loaded, as a multiple of the model's size in the loaded dtype.

  python -m benchmarks.load_memory --out=load_memory.json

Each case runs in a separate process. Imports and the start of JAX come before the baseline; then
`hf_layout.load_base` runs while this process reads the other's /proc entry every millisecond. The
output has two peaks above the baseline. `anonymous` is the private memory of the process, which may
be at most 1.3 times the model's size. `resident` adds pages of the memory-mapped files, which the
system frees when it needs memory. The folder holds a Llama of random weights in bfloat16 shards;
with four devices, four forced CPU devices split the parameters over `fsdp`.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

# Heavy modules are imported only in the children; this process only samples.
BUILT_IN = "smollm2-135m-instruct"
SHAPE = {
  "architectures": ["LlamaForCausalLM"],
  "model_type": "llama",
  "hidden_size": 2048,
  "intermediate_size": 8192,
  "num_hidden_layers": 10,
  "num_attention_heads": 32,
  "num_key_value_heads": 8,
  "vocab_size": 32000,
  "tie_word_embeddings": False,
  "max_position_embeddings": 2048,
  "rms_norm_eps": 1e-5,
  "rope_theta": 1e4,
  "hidden_act": "silu",
}


def write_folder(folder: str, layers: int) -> None:
  """Writes a Hugging Face folder of SHAPE with `layers` layers, one shard per two layers."""
  import ml_dtypes
  import numpy as np
  from safetensors import numpy as safetensors_numpy

  width, hidden, vocabulary = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"]
  keys = width // SHAPE["num_attention_heads"] * SHAPE["num_key_value_heads"]
  layer = {
    "self_attn.q_proj": (width, width),
    "self_attn.k_proj": (keys, width),
    "self_attn.v_proj": (keys, width),
    "self_attn.o_proj": (width, width),
    "mlp.gate_proj": (hidden, width),
    "mlp.up_proj": (hidden, width),
    "mlp.down_proj": (width, hidden),
    "input_layernorm": (width,),
    "post_attention_layernorm": (width,),
  }
  shards = [
    {
      "model.embed_tokens.weight": (vocabulary, width),
      "lm_head.weight": (vocabulary, width),
      "model.norm.weight": (width,),
    }
  ]
  for first in range(0, layers, 2):
    shards.append(
      {
        f"model.layers.{index}.{name}.weight": shape
        for index in (first, first + 1)
        for name, shape in layer.items()
      }
    )
  rng, weight_map, size = np.random.default_rng(0), {}, 0
  for number, shapes in enumerate(shards):
    file, tensors = f"model-{number:05d}.safetensors", {}
    for name, shape in shapes.items():
      bits = rng.integers(0, 2**16, shape, np.uint16)
      # Without the highest exponent bit a number is below 2, so neither infinite nor NaN.
      tensors[name] = (bits & np.uint16(0xBFFF)).view(ml_dtypes.bfloat16)
      weight_map[name], size = file, size + tensors[name].nbytes
    safetensors_numpy.save_file(tensors, pathlib.Path(folder, file))
  index = {"metadata": {"total_size": size}, "weight_map": weight_map}
  pathlib.Path(folder, "model.safetensors.index.json").write_text(json.dumps(index))
  pathlib.Path(folder, "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": layers}))


def load(weights: str, dtype: str) -> None:
  """The child: prints 'ready', loads when a line arrives, and prints size, time and devices."""
  import jax
  import numpy as np
  from jax import numpy as jnp

  from qlora_jax.models import decoder, families
  from qlora_jax.parallel import mesh, sharding
  from qlora_jax.weights import hf_layout, sources

  layout = mesh.MeshConfig()
  devices = mesh.make(layout)
  source = sources.open_source(weights)
  config = families.config_from_hf(source.config, layers_per_block=2, base_dtype=dtype, dtype=dtype)
  shardings = sharding.tree(devices, layout.rules, decoder.abstract(config)["base"])
  jax.block_until_ready(jax.device_put(np.ones(8), sharding.replicated(devices)) + 1)
  print("ready", flush=True)
  sys.stdin.readline()
  began = time.monotonic()
  base = jax.block_until_ready(hf_layout.load_base(source, config, shardings))
  seconds = time.monotonic() - began
  leaves = jax.tree.leaves(base)
  print(
    json.dumps(
      {
        "bytes": sum(leaf.nbytes for leaf in leaves),
        "seconds": seconds,
        "devices": len(leaves[0].sharding.device_set),
      }
    ),
    flush=True,
  )
  sys.stdin.readline()  # waits until the sampler is done
  assert all(bool(jnp.isfinite(leaf).all()) for leaf in leaves if leaf.ndim < 3)


def resident(pid: int) -> tuple[int, int]:
  """(RssAnon, VmRSS) of a process, in bytes."""
  text = pathlib.Path(f"/proc/{pid}/status").read_text()
  return tuple(
    1024 * int(re.search(rf"^{name}:\s+(\d+)", text, re.MULTILINE)[1])
    for name in ("RssAnon", "VmRSS")
  )


def measure(weights: str, dtype: str, devices: int) -> dict:
  """Peaks above the baseline, in bytes, while one child loads."""
  flags = f"--xla_force_host_platform_device_count={devices}"
  child = subprocess.Popen(
    [sys.executable, "-m", "benchmarks.load_memory", f"--load={weights}", f"--dtype={dtype}"],
    text=True,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
  )
  if child.stdout.readline() != "ready\n":
    raise SystemExit(f"the loading process ended with code {child.wait()}")
  before, peak = resident(child.pid), (0, 0)
  os.set_blocking(child.stdout.fileno(), False)
  print(file=child.stdin, flush=True)
  line = ""
  while not line.endswith("\n"):
    peak = tuple(map(max, peak, resident(child.pid)))
    time.sleep(0.001)
    line += child.stdout.readline() or ""
    if child.poll() is not None:
      raise SystemExit(f"the loading process ended with code {child.returncode}")
  loaded = json.loads(line)
  assert loaded["devices"] == devices, loaded
  print(file=child.stdin, flush=True)
  assert child.wait() == 0
  anonymous, resident_peak = (a - b for a, b in zip(peak, before, strict=True))
  return {"dtype": dtype, "anonymous": anonymous, "resident": resident_peak, **loaded}


def main(options) -> None:
  print(
    "| weights | loaded as | devices | size, MiB | anonymous | of the size | resident"
    " | of the size | seconds |\n" + "| --- " * 9 + "|",
    flush=True,
  )
  results = []
  with tempfile.TemporaryDirectory() as folder:
    subprocess.run(
      [
        sys.executable,
        "-m",
        "benchmarks.load_memory",
        f"--write={folder}",
        f"--layers={options.layers}",
      ],
      check=True,
    )
    sources = {"SmolLM2, GGUF": BUILT_IN, "Llama, bfloat16 shards": folder}
    for label, weights in list(sources.items())[options.folder_only :]:
      for dtype in ("float32", "bfloat16"):
        for devices in (1, 4):
          case = {"weights": label, **measure(weights, dtype, devices)}
          results.append(case)
          size, anonymous, peak = (case[name] for name in ("bytes", "anonymous", "resident"))
          print(
            f"| {label} | {dtype} | {devices} | {size / 2**20:.0f} | {anonymous / 2**20:.0f}"
            f" | {anonymous / size:.2f} | {peak / 2**20:.0f} | {peak / size:.2f}"
            f" | {case['seconds']:.1f} |",
            flush=True,
          )
  if options.out:
    pathlib.Path(options.out).write_text(json.dumps(results, indent=1))
  assert all(case["anonymous"] < 1.3 * case["bytes"] for case in results), "above 1.3 x"


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--out", help="JSON file of all measurements")
  parser.add_argument("--layers", type=int, default=10, help="layers of the folder's Llama, even")
  parser.add_argument("--folder_only", action="store_true", help="skips the GGUF file")
  parser.add_argument("--write", help=argparse.SUPPRESS)
  parser.add_argument("--load", help=argparse.SUPPRESS)
  parser.add_argument("--dtype", help=argparse.SUPPRESS)
  flags = parser.parse_args()
  if flags.write:
    write_folder(flags.write, flags.layers)
  elif flags.load:
    load(flags.load, flags.dtype)
  else:
    main(flags)
