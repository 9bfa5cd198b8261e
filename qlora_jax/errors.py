"""The exception for user errors, and the message for a disk that cannot be written."""

import errno
import os

_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class UserError(ValueError):
  """A mistake in a config, a file or a command that the user can correct.

  The message is one line. It names the field or file, the mistake and the correction.
  `launch.py` prints it without a traceback and exits with code 2.
  """


def unwritable(error: OSError, workdir: str | os.PathLike[str] | None) -> str | None:
  """The message if the disk of `workdir` cannot be written; None for any other error."""
  if error.errno not in _UNWRITABLE:
    return None
  return (
    f"--workdir: {error.filename or workdir} cannot be written ({error.strerror}); make room: the"
    " same command continues from the last checkpoint"
  )
