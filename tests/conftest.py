"""One folder of prepared data for the whole test run."""

import pytest


@pytest.fixture(scope="session")
def shared_data(tmp_path_factory):
  return tmp_path_factory.mktemp("shared_data")
