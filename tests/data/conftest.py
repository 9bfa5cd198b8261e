"""One prepared data directory for every test of the data modules."""

import pytest


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
  return tmp_path_factory.mktemp("tfds")
