"""The loader of config files."""

import pytest

from qlora_jax import config_files, errors


def test_a_file_gives_its_config_and_points():
  config = config_files.config("configs/depth.py:runlocal")
  assert config.variant == "runlocal" and config.is_locked
  points = config_files.points("configs/depth.py:runlocal")
  assert len(points) == 4 < len(config_files.points("configs/depth.py"))
  assert config_files.points("configs/depth.py", "runlocal") == points


def test_mistakes_are_named_in_one_line():
  with pytest.raises(errors.UserError, match=r"configs/missing\.py cannot be read"):
    config_files.config("configs/missing.py")
  with pytest.raises(errors.UserError, match="unknown variant"):
    config_files.config("configs/depth.py:large")
  with pytest.raises(ValueError, match="UserError: --config: unknown variant"):
    config_files.FlagParser().parse("configs/depth.py:large")
