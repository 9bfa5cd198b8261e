"""A fine-tuning step beside PEFT in torch: tokens a second and peak memory on this machine's CPU.

  python -m benchmarks.peft_step --out=peft_step.json

SmolLM2-135M-Instruct, LoRA of rank 8 on all seven maps, AdamW with clipping, loss on answer tokens;
both sides have the same weights, rows and precision. First one process compares loss and gradients
of both sides. Then every case gets a process a side; all are compiled and warm before the first is
timed, and they take turns, so that noise of the machine falls on all alike; seconds of all threads
together are told too, which other programs on the machine disturb less. Memory is the largest
resident set of a side's process over its life, compilation and loading included.

Torch has its fastest settings: no mask (each row is one text, so that its attention is the causal
kernel), sdpa, fused AdamW, its own number of threads. `PEFT, answers` makes logits at answer
places only, as our loss does; PEFT's own loss makes all.
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time

# Heavy modules are imported where a process needs them: a child's peak of resident memory starts
# at that of the process that made it.
SIDES = {
  "LoRA": "qlora_jax, LoRA r8",
  "Queryable": "qlora_jax, Queryable",
  "PEFT": "PEFT, LoRA r8",
  "PEFT answers": "PEFT, answers",
}
RANK, SEED, WARM = 8, 0, 2


def config_of(options, adapter: str):
  """The config of the language demo, in one precision."""
  from configs import llm
  from qlora_jax.weights import sources

  config = llm.get_config("demo")
  config.model.weights = options.weights
  config.model.base_dtype = config.model.dtype = options.precision
  layers = sources.open_source(options.weights).config["num_hidden_layers"]
  config.model.layers_per_block = max(s for s in range(1, 6) if layers % s == 0)
  if adapter == "LoRA":
    config.adapter.name, config.adapter.rank = "lora", RANK
  return config


def rows_of(config, rows: int, length: int):
  """A batch of `rows` full rows of the word tasks' conversations, each row one text."""
  import numpy as np

  from qlora_jax.data.text import packing, pipeline
  from qlora_jax.weights import sources
  from qlora_jax.workloads import language

  tokenizer = sources.open_source(config.model.weights).tokenizer()
  data = pipeline.load("word_tasks", seed=SEED, tasks=config.data.tasks)
  split = pipeline.encode(
    data.splits["train"],
    tokenizer,
    language.render_with(tokenizer, ""),
    length=length,
    instruction_in_prompt=True,
  )
  tokens, answers = [], []
  for batch in pipeline.batches(split, batch_size=8, seed=SEED, pack=True):
    real = batch.segment_ids > 0
    tokens.append(batch.tokens[real])
    answers.append(batch.loss_mask[real])
    if sum(map(len, tokens)) >= rows * length:
      break
  shape, count = (rows, length), rows * length
  tokens = np.concatenate(tokens)[:count].reshape(shape)
  # Where segments met the mask is 0, so that a target never is another conversation's token.
  mask = np.concatenate(answers)[:count].reshape(shape)
  mask[:, -1] = 0.0
  return packing.TextBatch(
    tokens=tokens,
    targets=np.roll(tokens, -1, axis=1),
    loss_mask=mask,
    segment_ids=np.ones(shape, np.int32),
    instruction_id=np.zeros(shape, np.int32),
    positions=np.broadcast_to(np.arange(length, dtype=np.int32), shape).copy(),
  )


class Ours:
  """Our side: the step that training runs."""

  def __init__(self, config, text, spread_b: bool = False):
    import jax
    import numpy as np
    from jax import numpy as jnp

    from qlora_jax.training import optimizer, step
    from qlora_jax.weights import hf_layout
    from qlora_jax.workloads import language_config as language_settings
    from qlora_jax.workloads import language_step

    settings = language_settings.resolve(config)
    base = hf_layout.load_base(settings.source, settings.model.config)
    self.model = settings.model
    params, self.frozen = language_step.init_params(self.model, base, jax.random.key(SEED))
    if spread_b:  # at zero, gradients of lora_a are zero and would agree with anything
      params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
          jnp.full_like(leaf, 1e-3) * (1 + jnp.arange(leaf.shape[-1]) % 7)
          if path[-1].key == "lora_b"
          else leaf
        ),
        params,
      )
    table = np.random.default_rng(SEED).normal(size=(1, config.instruction.dim))
    uses = self.model.adapter.uses_instruction
    self.batch = language_step.from_text(text, table.astype(np.float32) if uses else None)
    tx = optimizer.make(settings.optimizer)
    # Put where the step leaves it: else the second step is compiled anew.
    self.state, self.batch = jax.device_put(
      (
        step.TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), jnp.float32(1e-4)),
        self.batch,
      ),
      jax.devices()[0],
    )
    self._update = jax.jit(
      lambda state, frozen, batch: step.train_step(
        state, frozen, batch, self.model, tx, language_step.gradients
      ),
      donate_argnums=0,
    )

  def step(self) -> float:
    self.state, values = self._update(self.state, self.frozen, self.batch)
    return float(values["train/loss"])

  def gradients(self):
    import jax

    from qlora_jax.workloads import language_step

    compute = jax.jit(language_step.gradients, static_argnums=3)
    return compute(self.state.params, self.frozen, self.batch, self.model)


class Theirs:
  """PEFT's side: the same weights in transformers' Llama, its own loss or that of the answers."""

  def __init__(self, config, text, answers_only: bool):
    import peft
    import torch
    import transformers

    from qlora_jax.weights import sources

    source = sources.open_source(config.model.weights)
    dtype = getattr(torch, config.model.dtype)
    shape = transformers.LlamaConfig(
      **{
        name: value
        for name, value in source.config.items()
        if name not in ("architectures", "model_type", "dtype", "transformers_version")
      }
    )
    shape.use_cache = False
    model = transformers.AutoModelForCausalLM.from_config(
      shape, dtype=dtype, attn_implementation="sdpa"
    )
    named = dict(model.named_parameters())
    with torch.no_grad():
      for name in source.names():
        named[name].copy_(torch.from_numpy(source.read(name).copy()))
    self.model = peft.get_peft_model(
      model,
      peft.LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=[
          "q_proj",
          "k_proj",
          "v_proj",
          "o_proj",
          "gate_proj",
          "up_proj",
          "down_proj",
        ],
      ),
    )
    self.model.train()
    self.trained = [each for each in self.model.parameters() if each.requires_grad]
    self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=0.0, fused=True)
    self.tokens = torch.from_numpy(text.tokens).long()
    mask = torch.from_numpy(text.loss_mask) > 0
    self.answers_only, self.mask = answers_only, mask
    targets = torch.from_numpy(text.targets).long()
    self.targets = targets[mask]
    # Transformers shifts labels itself: the label of a place is the token there.
    labels = torch.full_like(self.tokens, -100)
    labels[:, 1:] = torch.where(mask, targets, -100)[:, :-1]
    self.labels = labels

  def loss(self):
    import torch

    if not self.answers_only:
      return self.model(input_ids=self.tokens, labels=self.labels).loss
    inner = self.model.get_base_model()
    hidden = inner.model(input_ids=self.tokens).last_hidden_state
    return torch.nn.functional.cross_entropy(inner.lm_head(hidden[self.mask]).float(), self.targets)

  def step(self) -> float:
    import torch

    loss = self.loss()
    self.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
    self.optimizer.step()
    return loss.item()


def make(side: str, options):
  """A side ready to step."""
  config = config_of(options, side)
  text = rows_of(config, *map(int, options.shape.split("x")))
  if side.startswith("PEFT"):
    return Theirs(config, text, side == "PEFT answers")
  return Ours(config, text)


def compare(options) -> dict:
  """Loss and gradients of both sides on one batch in float32, with the same factors."""
  import numpy as np
  import torch

  config = config_of(options, "LoRA")
  text = rows_of(config, *map(int, options.shape.split("x")))
  ours, theirs = Ours(config, text, spread_b=True), Theirs(config, text, False)
  size = config.model.layers_per_block

  def pairs(tree):
    """(PEFT's parameter, our leaf of the same map), for both factors of every map."""
    for name, value in theirs.model.named_parameters():
      if not value.requires_grad:
        continue
      words = name.split(".")
      layer, map_name = int(words[words.index("layers") + 1]), words[-4].removesuffix("_proj")
      node = tree["stack"]["blocks"][f"layer_{layer % size}"]
      node = node["mlp"] if map_name in ("gate", "up", "down") else node
      leaf = node[map_name]["branch"][words[-3].lower()]
      yield value, np.asarray(leaf[layer // size]).T

  with torch.no_grad():
    for value, own in pairs(ours.state.params):
      value.copy_(torch.from_numpy(own.copy()))
  nats, grads = ours.gradients()
  loss = theirs.loss()
  loss.backward()
  worst = {"lora_A": 0.0, "lora_B": 0.0}
  for (name, value), (_, own) in zip(
    ((n, p) for n, p in theirs.model.named_parameters() if p.requires_grad),
    pairs(grads),
    strict=True,
  ):
    kind = "lora_A" if "lora_A" in name else "lora_B"
    found = value.grad.numpy()
    worst[kind] = max(worst[kind], float(np.linalg.norm(found - own) / np.linalg.norm(found)))
  return {
    "ours": float(nats),
    "theirs": loss.item(),
    "gradients": worst,
    "answers": len(theirs.targets),
  }


def products(precision: str) -> dict:
  """Multiply-add rate of this machine's best matrix product, FLOP/s, by library."""
  import jax
  import torch
  from jax import numpy as jnp

  size, found = 2048, {}
  a = jnp.ones((size, size), precision)
  product = jax.jit(lambda a: a @ a)
  b = torch.ones((size, size), dtype=getattr(torch, precision))
  for name, run in (("jax", lambda: product(a).block_until_ready()), ("torch", lambda: b @ b)):
    run()
    times = []
    for _ in range(12):
      began = time.perf_counter()
      run()
      times.append(time.perf_counter() - began)
    found[name] = 2 * size**3 / min(times)
  return found


def flops_a_token(options, shape: str) -> float:
  """Least floating-point operations a token of a step.

  Forward and gradient in the inputs of the frozen maps, 2 + 2 a weight; the factors, 2 + 4;
  causal attention, (2 + 4) K H T / 2 for each of its two products; logits of answers, 2 + 2.
  """
  from qlora_jax.workloads import language_config as language_settings

  config = config_of(options, "LoRA")
  rows, length = map(int, shape.split("x"))
  text = rows_of(config, rows, length)
  model = language_settings.resolve(config).model.config
  maps = model.map_shapes.values()
  weights = model.layers * sum(a * b for a, b in maps)
  factors = model.layers * RANK * sum(a + b for a, b in maps)
  attention = model.layers * 2 * 3 * model.heads * model.head_dim * length
  share = float(text.loss_mask.mean())
  return 4 * weights + 6 * factors + attention + 4 * share * model.width * model.vocabulary


def child(options) -> None:
  """Answers the parent over standard streams: a line in is a number of steps, or nothing to end."""
  if options.child == "compare":
    print(json.dumps(compare(options)), flush=True)
    return
  if options.child == "limit":
    print(
      json.dumps(
        {
          "flops_a_token": {
            each: flops_a_token(options, each) for each in options.shape.split(",")
          },
          "products": products(options.precision),
        }
      ),
      flush=True,
    )
    return
  side = make(options.child, options)
  losses = [side.step() for _ in range(WARM)]  # compiles, and fills the allocators
  print(json.dumps({"losses": losses}), flush=True)
  for line in sys.stdin:
    began, spent = time.perf_counter(), time.process_time()
    for _ in range(int(line)):
      side.step()
    print(
      json.dumps(
        {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - spent}
      ),
      flush=True,
    )
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  print(json.dumps({"peak_bytes": peak}), flush=True)


class Process:
  """A child that steps when it is told."""

  def __init__(self, name: str, weights: str, precision: str, shape: str):
    command = [
      sys.executable,
      "-m",
      "benchmarks.peft_step",
      f"--child={name}",
      f"--weights={weights}",
      f"--precision={precision}",
      f"--shape={shape}",
    ]
    self.pipe = subprocess.Popen(
      command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env={**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"},
    )

  def read(self) -> dict:
    line = self.pipe.stdout.readline()
    if not line:
      raise SystemExit(f"a measuring process ended with code {self.pipe.wait()}")
    return json.loads(line)

  def steps(self, count: int) -> tuple[float, float]:
    """Seconds a step, and seconds of all its threads together."""
    print(count, file=self.pipe.stdin, flush=True)
    found = self.read()
    return found["seconds"] / count, found["cpu_seconds"] / count

  def end(self) -> int:
    self.pipe.stdin.close()
    return self.read()["peak_bytes"]


def measure(options, precision: str, shape: str) -> dict:
  """Seconds a step of every turn, peak memory and first losses of every side."""
  sides = options.sides.split(",")
  running = {side: Process(side, options.weights, precision, shape) for side in sides}
  first = {side: each.read()["losses"] for side, each in running.items()}  # all are ready
  times = {side: [] for side in sides}
  for turn in range(options.turns):
    for side in sides if turn % 2 == 0 else reversed(sides):
      times[side].append(running[side].steps(options.steps))
  found = {
    side: {
      "seconds": [wall for wall, _ in times[side]],
      "cpu_seconds": [spent for _, spent in times[side]],
      "losses": first[side],
      "peak_bytes": each.end(),
    }
    for side, each in running.items()
  }
  # All start as the base: the adapters' second factors are zero.
  started = [losses[0] for losses in first.values()]
  tolerance = 1e-4 if precision == "float32" else 0.02
  assert max(started) - min(started) < tolerance * min(started), f"first losses differ: {first}"
  return found


def table(report: dict) -> str:
  """Markdown: medians, and their ratios to PEFT's own step."""
  lines = [
    "| precision | rows | side | tokens/s | of PEFT | of the limit | CPU seconds a step"
    " | peak memory, MiB | of PEFT |",
    "| --- " * 9 + "|",
  ]
  for case in report["cases"]:
    rows, length = map(int, case["shape"].split("x"))
    rate = {k: rows * length / statistics.median(v["seconds"]) for k, v in case["sides"].items()}
    for side, found in case["sides"].items():
      peak, own = found["peak_bytes"], case["sides"]["PEFT"]["peak_bytes"]
      lines.append(
        f"| {case['precision']} | {rows} × {length} | {SIDES[side]} | {rate[side]:.0f}"
        f" | {rate[side] / rate['PEFT']:.2f} | {rate[side] / case['limit']:.2f}"
        f" | {statistics.median(found['cpu_seconds']):.2f}"
        f" | {peak / 2**20:.0f} | {peak / own:.2f} |"
      )
  return "\n".join(lines)


def main(options) -> None:
  began = time.monotonic()
  agree = Process("compare", options.weights, "float32", "2x64").read()
  gap = abs(agree["ours"] - agree["theirs"]) / agree["theirs"]
  print(
    f"losses agree: {agree['ours']:.6f} and {agree['theirs']:.6f} nats over {agree['answers']}"
    f" answer tokens; gradients differ by {agree['gradients']['lora_A']:.1e} (lora_a) and"
    f" {agree['gradients']['lora_B']:.1e} (lora_b) of their norm at most",
    flush=True,
  )
  assert gap < 1e-4 and max(agree["gradients"].values()) < 1e-3, agree
  report = {"agreement": agree, "cases": []}
  for precision in options.precisions.split(","):
    limit = Process("limit", options.weights, precision, options.shapes).read()
    best = max(limit["products"].values())
    for shape, flops in limit["flops_a_token"].items():
      found = measure(options, precision, shape)
      rate = best / flops
      report["cases"].append(
        {
          "precision": precision,
          "shape": shape,
          "limit": rate,
          "flops_a_token": flops,
          "products": limit["products"],
          "sides": found,
        }
      )
      print(
        f"{precision} {shape}: limit {rate:.0f} tokens/s, {flops / 1e9:.3f} GFLOP"
        f" a token at {best / 1e9:.0f} GFLOP/s",
        flush=True,
      )
  report["seconds"] = time.monotonic() - began
  print(f"\n{table(report)}\n\n{report['seconds']:.0f} s")
  if options.out:
    pathlib.Path(options.out).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--weights", default="smollm2-135m-instruct", help="of a Llama")
  parser.add_argument("--shapes", default="4x128,8x256", help="rows x tokens, with commas between")
  parser.add_argument("--precisions", default="float32,bfloat16")
  parser.add_argument("--sides", default="LoRA,Queryable,PEFT", help=f"some of {', '.join(SIDES)}")
  parser.add_argument("--turns", type=int, default=3, help="times that each side is timed")
  parser.add_argument("--steps", type=int, default=1, help="steps each time")
  parser.add_argument("--out", help="JSON file of all measurements")
  parser.add_argument("--child", help=argparse.SUPPRESS)
  parser.add_argument("--precision", default="float32", help=argparse.SUPPRESS)
  parser.add_argument("--shape", default="4x128", help=argparse.SUPPRESS)
  given = parser.parse_args()
  if "PEFT" not in given.sides.split(",") or set(given.sides.split(",")) - set(SIDES):
    parser.error(f"--sides: give PEFT, and others of {', '.join(SIDES)}")
  child(given) if given.child else main(given)
