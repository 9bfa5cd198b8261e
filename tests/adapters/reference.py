"""Forward passes of every adapter family in NumPy float64, written from the equations.

Sources: `docs/method.md` and the papers that it cites. Nothing here calls the library; of it only
the names and shapes of its parameter trees are used, and the fields of `AdapterConfig`. Letters as
in `qlora_jax/typing.py`; leading axes `...` are [B] in the MLP and [B, T] in the decoder.
"""

import numpy as np


def double(tree):
  """The same tree with float64 leaves."""
  if isinstance(tree, dict):
    return {name: double(branch) for name, branch in tree.items()}
  return np.asarray(tree, np.float64)


def slice_of(tree, index):
  """Leaves [N, ...] at one block."""
  if isinstance(tree, dict):
    return {name: slice_of(branch, index) for name, branch in tree.items()}
  return tree[index]


def rms_norm(x, epsilon=1e-6):
  return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon)


def softmax(x):
  weights = np.exp(x - x.max(-1, keepdims=True))
  return weights / weights.sum(-1, keepdims=True)


def sigmoid(x):
  return 1.0 / (1.0 + np.exp(-x))


def gelu_tanh(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def scaling_of(adapter, rank):
  """alpha/R, for rsLoRA alpha/sqrt(R); alpha = 0 means alpha = R."""
  alpha = adapter.alpha if adapter.alpha else rank
  if adapter.family == "rslora" or adapter.scaling == "sqrt_rank":
    return alpha / np.sqrt(rank)
  return alpha / rank


def sparse_weights(adapter, logits):
  """Softmax over the k largest logits, or 1/k each with `weights='equal'`; token by token."""
  num_kept = adapter.top_k if adapter.top_k else logits.shape[-1]
  flat = logits.reshape(-1, logits.shape[-1])
  weights = np.zeros_like(flat)
  for row, values in zip(weights, flat, strict=True):
    order = np.argsort(-values)
    chosen, others = order[:num_kept], order[num_kept:]
    if len(others):  # a tie within rounding would make float32 and float64 choose differently
      assert values[chosen].min() - values[others].max() > 1e-4
    row[chosen] = 1.0 / num_kept if adapter.weights == "equal" else softmax(values[chosen])
  return weights.reshape(logits.shape)


def mix(weights, matrices):
  """sum_m w_m U_m, one matrix per token."""
  return np.einsum("...m,mrs->...rs", weights, matrices)


def rows_times(rows, matrices):
  """One row vector per token times one matrix per token."""
  return np.einsum("...r,...rs->...s", rows, matrices)


def dora(x, kernel, lora_a, lora_b, magnitude, scaling):
  """x times (m / ||V||_c) V with V = W + scaling A B and m = magnitude ||W||_c."""
  direction = kernel + scaling * lora_a @ lora_b
  column_norm = np.sqrt((direction**2).sum(0))
  base_norm = np.sqrt((kernel**2).sum(0))
  return x @ (direction / column_norm * (magnitude * base_norm))


def singular_factors(kernel, rank):
  """U_R S_R and V_R^T of the largest R singular values, from the eigenvectors of W W^T."""
  values, vectors = np.linalg.eigh(kernel @ kernel.T)  # ascending
  order = np.argsort(-values)[:rank]
  left = vectors[:, order]
  singular = np.sqrt(values[order])
  return left * singular, (left / singular).T @ kernel


class Block:
  """Steps (1)-(6) of Queryable LoRA for one block; also keeps what other families route."""

  def __init__(self, adapter, params, shared, states, recurrent, instruction, log_prior):
    self.adapter, self.params, self.shared = adapter, params, shared
    self.states, self.recurrent = states, recurrent
    self.instruction, self.log_prior = instruction, log_prior
    self.operators = {}
    self.routed = []  # (weights, logits) in the order in which they are made
    self.left = None  # h of the first anchor: z C

  def memory(self, name):
    suffix = f"_{name}" if self.adapter.memory == "map" else ""
    return self.shared[f"atoms{suffix}"], self.shared.get(f"atom_keys{suffix}")

  def summary(self, router):
    if self.adapter.summary == "recurrent":
      return self.recurrent
    if self.adapter.summary == "none":
      return None
    total = np.zeros_like(self.recurrent)
    if self.states:
      scores = [rms_norm(state) @ router["pseudo_query"] for state in self.states]
      attention = softmax(np.stack(scores, axis=-1))
      for j, state in enumerate(self.states):
        total = total + attention[..., j : j + 1] * state
    return total

  def logits(self, router, keys, state):
    adapter = self.adapter
    if adapter.routing == "static":
      logits = np.zeros((*state.shape[:-1], adapter.atoms)) + router["mixture"]
    else:
      query = np.zeros((*state.shape[:-1], adapter.query_dim))
      summary = self.summary(router)
      if adapter.query_state:
        query = query + state @ router["query_state"]
      if summary is not None:
        query = query + summary @ router["query_summary"]
      if adapter.instruction_in_query:
        query = query + self.instruction @ router["query_instruction"]
      if adapter.query_bias:
        query = query + router["query_bias"]
      logits = query @ keys.T / np.sqrt(adapter.query_dim)
    if adapter.prior_weight:
      logits = logits + adapter.prior_weight * self.log_prior
    return logits / adapter.temperature

  def operator(self, name, low_rank):
    """C [..., R, R] of a map; the first map that asks is the anchor."""
    key = name if self.adapter.operator == "map" else ""
    if key not in self.operators:
      atoms, keys = self.memory(name)
      router = self.params[f"router_{name}" if key else "router"]
      state = rms_norm(low_rank)
      logits = self.logits(router, keys, state)
      weights = sparse_weights(self.adapter, logits)
      self.routed.append((weights, logits))
      self.operators[key] = mix(weights, atoms)
      if self.left is None:
        self.left = rows_times(state, self.operators[key])
    return self.operators[key]


def adapted_map(adapter, name, x, base, branch, block, frozen=None):
  """One adapted map: [..., D_in] to [..., D_out]."""
  kernel = base["kernel"]
  y = x @ kernel
  match adapter.family:
    case _ if branch is None:  # this map is not adapted
      pass
    case "lora" | "rslora":
      rank = branch["lora_a"].shape[1]
      y = x @ (kernel + scaling_of(adapter, rank) * branch["lora_a"] @ branch["lora_b"])
    case "dora":
      scaling = scaling_of(adapter, branch["lora_a"].shape[1])
      y = dora(x, kernel, branch["lora_a"], branch["lora_b"], branch["magnitude"], scaling)
    case "lora_xs":
      rank = branch["core"].shape[0]
      lora_a, lora_b = singular_factors(kernel, rank)
      # Each pair of singular vectors has a free sign; the library's choice is taken.
      signs = np.sign((lora_a * frozen["lora_a"]).sum(0))
      core = signs[:, None] * branch["core"] * signs
      y = y + scaling_of(adapter, rank) * x @ lora_a @ core @ lora_b
    case "comol":
      low_rank = x @ branch["lora_a"]
      logits = rms_norm(low_rank) @ branch["router"]
      weights = sparse_weights(adapter, logits)
      mixed = rows_times(low_rank, mix(weights, branch["cores"]))
      y = y + scaling_of(adapter, low_rank.shape[-1]) * mixed @ branch["lora_b"]
      block.routed.append((weights, logits))
    case "lily":
      low_rank = x @ branch["lora_a"]
      logits = low_rank @ branch["router"]
      weights = sparse_weights(adapter, logits)
      combined = mix(weights, block.shared[f"lily_b_{name}"])  # one B per token
      y = y + scaling_of(adapter, low_rank.shape[-1]) * rows_times(low_rank, combined)
      block.routed.append((weights, logits))
    case "queryable":
      low_rank = x @ branch["lora_a"]
      mixed = rows_times(low_rank, block.operator(name, low_rank))
      y = y + scaling_of(adapter, low_rank.shape[-1]) * mixed @ branch["lora_b"]
  return y + base["bias"] if "bias" in base else y


def log_language_prior(adapter, shared, instruction):
  if "atom_descriptors" not in shared:
    return None
  embedding = instruction
  if "prior_projection" in shared:
    embedding = embedding @ shared["prior_projection"]
  return np.log(softmax(embedding @ shared["atom_descriptors"].T / adapter.prior_temperature))


def stack(adapter, params, base, frozen, hidden, instruction, blocks, layers, layer, anchor):
  """N blocks of S layers.

  Args:
    layer: (map function, base of the layer, hidden) -> hidden.
    anchor: (base of the layer, hidden) -> (name of the anchor map, its input).

  Returns:
    hidden, weights and logits [N, G, ..., M] (None without routing), and log pi.
  """
  shared = params.get("memory", {})
  log_prior = log_language_prior(adapter, shared, instruction)
  states, records = [], []
  recurrent = np.zeros((*hidden.shape[:-1], adapter.rank))
  for index in range(blocks):
    block_params = slice_of(params.get("blocks", {}), index)
    block = Block(adapter, block_params, shared, states, recurrent, instruction, log_prior)
    for slot in range(layers):
      place = f"layer_{slot}"
      inner = slice_of(base["blocks"][place], index)
      fixed = slice_of(frozen["blocks"][place], index) if frozen else {}
      branches = block_params.get(place, {})

      def apply(name, x, inner=inner, fixed=fixed, branches=branches, block=block):
        leaves = inner[name] if name in inner else inner["mlp"][name]
        branch = branches.get(name) or branches.get("mlp", {}).get(name, {})
        factors = fixed.get(name) or fixed.get("mlp", {}).get(name, {})
        return adapted_map(
          adapter, name, x, leaves, branch.get("branch"), block, factors.get("branch")
        )

      hidden = layer(apply, inner, hidden)
    if adapter.history == "output" and adapter.family == "queryable":
      name, x = anchor(slice_of(base["blocks"]["layer_0"], index), hidden)
      maps = block_params["layer_0"]
      lora_a = (maps.get(name) or maps["mlp"][name])["branch"]["lora_a"]
      block.left = rms_norm(x @ lora_a)
    if block.left is not None:
      states = [*states, block.left]
      if adapter.summary == "recurrent":
        keep = sigmoid(block_params["gate"]["gate"])
        recurrent = keep * recurrent + (1 - keep) * block.left
    records.append(block.routed)
  if not records[0]:
    return hidden, None, None, log_prior
  weights = np.stack([np.stack([pair[0] for pair in routed]) for routed in records])
  logits = np.stack([np.stack([pair[1] for pair in routed]) for routed in records])
  return hidden, weights, logits, log_prior


def mlp(adapter, shape, params, base, frozen, features, instruction):
  """The residual MLP: values [...], weights, logits, log pi."""

  def layer(apply, inner, hidden):
    up = apply("up", rms_norm(hidden) * inner["norm"]["scale"])
    return hidden + apply("down", gelu_tanh(up))

  def anchor(inner, hidden):
    return "up", rms_norm(hidden) * inner["norm"]["scale"]

  hidden = features @ base["input"]["kernel"] + base["input"]["bias"]
  if adapter.instruction_in_input:
    hidden = hidden + instruction @ params["instruction_input"]
  hidden, *routing = stack(
    adapter,
    params.get("stack", {}),
    base["stack"],
    frozen.get("stack"),
    hidden,
    instruction,
    shape.blocks,
    shape.layers_per_block,
    layer,
    anchor,
  )
  hidden = rms_norm(hidden) * base["norm"]["scale"]
  values = hidden @ base["output"]["kernel"] + base["output"]["bias"]
  return values[..., 0], *routing


def rotate(x, theta=10_000.0):
  """Rotary positions 0, 1, .. on [B, T, H, K], half-split: pairs (x_i, x_{i + K/2})."""
  half = x.shape[-1] // 2
  out = np.empty_like(x)
  for position in range(x.shape[1]):
    for i in range(half):
      angle = position * theta ** (-2 * i / x.shape[-1])
      first, second = x[:, position, :, i], x[:, position, :, i + half]
      out[:, position, :, i] = first * np.cos(angle) - second * np.sin(angle)
      out[:, position, :, i + half] = first * np.sin(angle) + second * np.cos(angle)
  return out


def causal_attention(query, key, value):
  """Grouped-query attention on [B, T, H, K] and [B, T, G, K]."""
  batch, length, heads, width = query.shape
  heads_per_group = heads // key.shape[2]
  out = np.zeros_like(query)
  for b in range(batch):
    for h in range(heads):
      for t in range(length):
        scores = key[b, : t + 1, h // heads_per_group] @ query[b, t, h] / np.sqrt(width)
        out[b, t, h] = softmax(scores) @ value[b, : t + 1, h // heads_per_group]
  return out


def decoder(adapter, shape, params, base, frozen, tokens, instruction):
  """A Llama-like decoder: hidden states [B, T, D] after the last norm, weights, logits, log pi."""
  batch, length = tokens.shape

  def norm(x, leaves):
    return rms_norm(x, 1e-5) * leaves["scale"]

  def layer(apply, inner, hidden):
    x = norm(hidden, inner["attention_norm"])
    query, key, value = (
      apply(name, x).reshape(batch, length, -1, shape.head_dim) for name in ("q", "k", "v")
    )
    mixed = causal_attention(rotate(query), rotate(key), value)
    hidden = hidden + apply("o", mixed.reshape(batch, length, -1))
    x = norm(hidden, inner["feed_forward_norm"])
    gate, up = apply("gate", x), apply("up", x)
    return hidden + apply("down", gate * sigmoid(gate) * up)

  def anchor(inner, hidden):
    return "q", norm(hidden, inner["attention_norm"])

  of_token = np.repeat(instruction[:, None], length, axis=1)  # [B, T, E]
  hidden = base["embedding"][tokens]
  if adapter.instruction_in_input:
    hidden = hidden + of_token @ params["instruction_input"]
  hidden, *routing = stack(
    adapter,
    params.get("stack", {}),
    base["stack"],
    frozen.get("stack"),
    hidden,
    of_token,
    shape.layers // shape.layers_per_block,
    shape.layers_per_block,
    layer,
    anchor,
  )
  return norm(hidden, base["norm"]), *routing


def kl_to_prior(weights, log_prior):
  """Mean over blocks, routers and tokens of sum_m w_m (log w_m - log pi_m), with 0 log 0 = 0."""
  logs = np.log(np.where(weights > 0, weights, 1.0))
  return np.mean(np.sum(weights * (logs - log_prior), -1))
