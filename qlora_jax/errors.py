"""The one exception that stands for a user's mistake, and the words for a disk that is full."""

import errno
import os

_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class UserError(ValueError):
  """A mistake in a config, a file or a command that its user can mend.

  The message is one line that names the field or file, says what was wrong and what would be
  right. `launch.py` prints it without a traceback and exits with code 2.
  """


def unwritable(error: OSError, workdir: str | os.PathLike[str] | None) -> str | None:
  """The line about a disk that takes no more of a run in `workdir`; None for another error."""
  if error.errno not in _UNWRITABLE:
    return None
  return (
    f"--workdir: {error.filename or workdir} cannot be written ({error.strerror}); make room: the"
    " same command goes on from the last checkpoint"
  )
