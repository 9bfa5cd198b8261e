"""The two sides of `peft_step.py`: one fine-tuning step of this package, and PEFT's in torch.

Torch has its fastest settings: no mask (each row is one text, so that attention is the causal
kernel), sdpa, fused AdamW, torch's default number of threads.
"""

import time

# Heavy modules are imported inside the functions: a child's peak of resident memory starts at the
# memory of its parent, and the parent imports this file.
RANK, SEED = 8, 0


def config_of(options, adapter: str):
  """The config of the language demo in one precision, with the adapter 'LoRA' or Queryable."""
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
  """A batch [rows, length] of the word tasks' conversations, without padding, one text per row."""
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
    is_text = batch.segment_ids > 0
    tokens.append(batch.tokens[is_text])
    answers.append(batch.loss_mask[is_text])
    if sum(map(len, tokens)) >= rows * length:
      break
  shape, count = (rows, length), rows * length
  tokens = np.concatenate(tokens)[:count].reshape(shape)
  # The mask is 0 at the end of each conversation, so that no target is a token of the next one.
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
  """Our side: the step of training. `spread_b` sets every `lora_b` to nonzero values."""

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
    if spread_b:  # with B = 0 the gradients of lora_a are zero, and the comparison is empty
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
    # On the device on which the step returns them; otherwise the second step compiles again.
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
  """PEFT's side: the same weights in transformers' Llama.

  The loss is transformers' loss, or with `answers_only` one with logits at answer tokens only.
  """

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
    self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
    self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=0.0, fused=True)
    self.tokens = torch.from_numpy(text.tokens).long()
    mask = torch.from_numpy(text.loss_mask) > 0
    self.answers_only, self.mask = answers_only, mask
    targets = torch.from_numpy(text.targets).long()
    self.targets = targets[mask]
    # Transformers shifts the labels: the label of a position is the token at that position.
    labels = torch.full_like(self.tokens, -100)
    labels[:, 1:] = torch.where(mask, targets, -100)[:, :-1]
    self.labels = labels

  def loss(self):
    import torch

    if not self.answers_only:
      return self.model(input_ids=self.tokens, labels=self.labels).loss
    base = self.model.get_base_model()
    hidden = base.model(input_ids=self.tokens).last_hidden_state
    return torch.nn.functional.cross_entropy(base.lm_head(hidden[self.mask]).float(), self.targets)

  def step(self) -> float:
    import torch

    loss = self.loss()
    self.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
    self.optimizer.step()
    return loss.item()


def make(side: str, options):
  """The side with a name of `peft_step.SIDES`, ready to step."""
  config = config_of(options, side)
  text = rows_of(config, *map(int, options.shape.split("x")))
  if side.startswith("PEFT"):
    return Theirs(config, text, side == "PEFT answers")
  return Ours(config, text)


def compare(options) -> dict:
  """Losses and largest relative difference of gradients, float32, same batch and factors."""
  import numpy as np
  import torch

  config = config_of(options, "LoRA")
  text = rows_of(config, *map(int, options.shape.split("x")))
  ours, theirs = Ours(config, text, spread_b=True), Theirs(config, text, False)
  size = config.model.layers_per_block

  def pairs(tree):
    """(PEFT's parameter, our array of the same shape), for both factors of every map."""
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
    for value, array in pairs(ours.state.params):
      value.copy_(torch.from_numpy(array.copy()))
  nats, grads = ours.gradients()
  loss = theirs.loss()
  loss.backward()
  worst = {"lora_A": 0.0, "lora_B": 0.0}
  for (name, value), (_, our_grad) in zip(
    ((n, p) for n, p in theirs.model.named_parameters() if p.requires_grad),
    pairs(grads),
    strict=True,
  ):
    kind = "lora_A" if "lora_A" in name else "lora_B"
    grad = value.grad.numpy()
    difference = float(np.linalg.norm(grad - our_grad) / np.linalg.norm(grad))
    worst[kind] = max(worst[kind], difference)
  return {
    "ours": float(nats),
    "theirs": loss.item(),
    "gradients": worst,
    "answers": len(theirs.targets),
  }


def products(precision: str) -> dict:
  """FLOP/s of the best of twelve large matrix products on this machine, by library."""
  import jax
  import torch
  from jax import numpy as jnp

  size, rates = 2048, {}
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
    rates[name] = 2 * size**3 / min(times)
  return rates


def flops_per_token(options, shape: str) -> float:
  """Minimum floating-point operations of a step, per token.

  Frozen maps, forward and gradient of their inputs: 2 + 2 per weight. Factors: 2 + 4 per weight.
  Causal attention: (2 + 4) K H T / 2 for each of its two products. Logits of answer tokens: 2 + 2.
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
