"""One-line faults that the tests must notice; `mutants.py` plants them one at a time.

Each is a change of a wrong reading of an equation, an off-by-one or a forgotten check. `tests` are
the files, or single tests, that ought to fail; others need not be run.
"""

from tests import planted_faults_of_adapters

PACKING = "tests/data/text/test_packing.py"
TRUNCATION = "tests/data/text/test_packing_truncation.py"
PIPELINE = "tests/data/text/test_text_pipeline.py"
STATISTICS = "tests/studies/test_statistics.py"
CHECKPOINT = "tests/training/test_checkpoint.py"
METRICS = "tests/training/test_metrics.py"
GGUF = "tests/weights/test_gguf.py"
SOURCES = "tests/weights/test_sources.py"
ADAPTER_FILE = "tests/weights/test_adapter_file.py"
LOOP = "tests/training/test_loop.py"
TOGETHER = "tests/training/test_study.py::test_a_trial_in_a_cohort_equals_the_trial_alone"

Fault = planted_faults_of_adapters.Fault

_A, _D, _T = "qlora_jax/adapters/", "qlora_jax/data/text/", "qlora_jax/training/"
_S, _W, _E = "qlora_jax/studies/statistics.py", "qlora_jax/weights/", "qlora_jax/workloads/"

FAULTS = (
  *planted_faults_of_adapters.FAULTS,
  # Packing.
  Fault(
    "truncation one token short",
    _D + "packing.py",
    "tokens=example.tokens[: length + 1],\n"
    "          answer_mask=example.answer_mask[: length + 1],",
    "tokens=example.tokens[:length],\n          answer_mask=example.answer_mask[:length],",
    (TRUNCATION, PACKING),
  ),
  Fault(
    "prompt_length is not clipped",
    _D + "packing.py",
    "prompt_length=min(example.prompt_length, length + 1)",
    "prompt_length=example.prompt_length",
    (TRUNCATION, PACKING),
  ),
  Fault(
    "a token is its own target",
    _D + "packing.py",
    "batch.targets[b, start:end] = example.tokens[1:]",
    "batch.targets[b, start:end] = example.tokens[:-1]",
    (PACKING, PIPELINE),
  ),
  Fault(
    "positions go on across examples",
    _D + "packing.py",
    "np.arange(end - start)",
    "np.arange(start, end)",
    (PACKING,),
  ),
  Fault(
    "the loss mask is one token late",
    _D + "packing.py",
    "batch.loss_mask[b, start:end] = example.answer_mask[1:]",
    "batch.loss_mask[b, start:end] = example.answer_mask[:-1]",
    (PACKING, PIPELINE),
  ),
  Fault(
    "a restored iterator starts its epoch anew",
    _D + "pipeline.py",
    "self._rows = None\n\n  def _epoch_rows",
    "self._rows, self._row = None, 0\n\n  def _epoch_rows",
    (PIPELINE,),
  ),
  # Statistics.
  Fault(
    "Holm without the running maximum",
    _S,
    "adjusted[order] = np.maximum.accumulate(stepped)",
    "adjusted[order] = stepped",
    (STATISTICS,),
  ),
  Fault(
    "Bonferroni for Holm",
    _S,
    "(len(p) - np.arange(len(p))) * p[order]",
    "len(p) * p[order]",
    (STATISTICS,),
  ),
  Fault(
    "the bootstrap breaks the pairs",
    _S,
    "paired=len(samples) > 1",
    "paired=False",
    (STATISTICS,),
  ),
  Fault(
    "a normal quantile for few seeds",
    _S,
    "float(stats.t.ppf(1 - SIGNIFICANCE / 2, len(a) - 1)) * error",
    "float(stats.norm.ppf(1 - SIGNIFICANCE / 2)) * error",
    (STATISTICS,),
  ),
  Fault(
    "a spread over n, not n - 1",
    "qlora_jax/studies/spread.py",
    'float(np.std(statistics.vector("a", a, minimum=2), ddof=1))',
    'float(np.std(statistics.vector("a", a, minimum=2)))',
    (STATISTICS,),
  ),
  # Checkpoints.
  Fault(
    "a changed byte of a checkpoint passes",
    _T + "checksums.py",
    "      if actual != digest:",
    "      if False:",
    (CHECKPOINT,),
  ),
  Fault(
    "a checkpoint of another config is taken",
    _T + "checkpoint.py",
    '      if differing:\n        raise errors.UserError(\n          f"--config: the checkpoint',
    '      if False:\n        raise errors.UserError(\n          f"--config: the checkpoint',
    (CHECKPOINT,),
  ),
  Fault(
    "the best checkpoint is the worst",
    _T + "checkpoint.py",
    "reverse=True,\n            n=keep_best",
    "reverse=False,\n            n=keep_best",
    (CHECKPOINT,),
  ),
  Fault(
    "a resumed run loses the line of its checkpoint's step",
    _T + "metrics.py",
    'json.loads(line)["step"] <= step]',
    'json.loads(line)["step"] < step]',
    (METRICS,),
  ),
  # The loop.
  Fault(
    "a resumed training starts its data again",
    _T + "loop.py",
    'workload.seek(saved.extra["position"])',
    "pass",
    (LOOP,),
  ),
  Fault(
    "a resumed training forgets the losses since the last line",
    _T + "loop.py",
    'pending = [_as_float32(values) for values in saved.extra["pending"]]',
    "pending = []",
    (LOOP,),
  ),
  Fault(
    "the best step has the greatest objective",
    _T + "loop.py",
    "objective is not None and objective < self._least",
    "objective is not None and objective > self._least",
    (LOOP,),
  ),
  Fault(
    "one diverged trial ends its whole cohort",
    _T + "loop.py",
    "and not len(finite):",
    "and len(finite) < len(losses):",
    (LOOP,),
  ),
  Fault(
    "columns measured at the end go to the first trial alone",
    _T + "loop.py",
    'if line["trial_id"] == row["trial_id"]][-1:]',
    'if line["trial_id"] == result["rows"][0]["trial_id"]][-1:]',
    (LOOP,),
  ),
  Fault(
    "all trials of a cohort train on the data of its first seed",
    _E + "cohort_program.py",
    "trial_batches = jax.tree.map(lambda leaf: leaf[row], batches)",
    "trial_batches = jax.tree.map(lambda leaf: leaf[0], batches)",
    (TOGETHER,),
  ),
  # Weights.
  Fault(
    "interleaved rotary rows are not reordered",
    _W + "gguf_layout.py",
    "return paired.swapaxes(1, 2).reshape(value.shape)",
    "return value",
    (GGUF,),
  ),
  Fault(
    "Gemma's stored norms keep their offset",
    _W + "gguf_layout.py",
    "return value - np.ones((), value.dtype)",
    "return value",
    (GGUF,),
  ),
  Fault(
    "linear maps are read as they are stored",
    _W + "hf_layout.py",
    "value = value.T if self.transposed else value",
    "value = value",
    (SOURCES, "tests/models/test_families.py"),
  ),
  Fault(
    "an adapter loads on another base",
    _W + "adapter_file.py",
    "if expected_fingerprint is not None and base_fingerprint != expected_fingerprint:",
    "if False:",
    (ADAPTER_FILE,),
  ),
)
