"""Storage: blocks, and two processes that prepare the same data at the same time."""

import subprocess
import sys

import numpy as np

from qlora_jax.data import storage

_READER = """
import sys
from qlora_jax.data import pipeline
arrays = pipeline.target_arrays("friedman2", seed=1, data_dir=sys.argv[1], feature_dim=4)
print(len(arrays["train"]), float(arrays["train"].targets.sum()))
"""


def test_blocks_keep_every_row_in_order():
  columns = {"clean": np.arange(600.0), "features": np.arange(1200.0).reshape(600, 2)}
  blocks = dict(storage.blocks(columns))
  assert list(blocks) == [0, 1, 2]
  assert [len(block["clean"]) for block in blocks.values()] == [256, 256, 88]
  for name, column in columns.items():
    np.testing.assert_array_equal(np.concatenate([b[name] for b in blocks.values()]), column)


def test_two_processes_may_prepare_the_same_data_at_once(tmp_path):
  command = [sys.executable, "-c", _READER, str(tmp_path)]
  processes = [
    subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(2)
  ]
  outputs = [process.communicate(timeout=120) for process in processes]
  assert [process.returncode for process in processes] == [0, 0], outputs
  assert outputs[0][0] == outputs[1][0] and outputs[0][0].startswith("8192 ")
  assert not list(tmp_path.rglob("*incomplete*"))


def test_a_reader_prints_nothing_of_its_own(tmp_path, capfd):
  from qlora_jax.data import pipeline

  pipeline.source_arrays("friedman3", data_dir=tmp_path, feature_dim=4)
  assert capfd.readouterr() == ("", "")
