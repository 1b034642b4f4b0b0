"""What makes a run last and spread: resumed bit for bit after any stop, shared by processes."""

from extras.runtime.identity import check_inputs  # noqa: F401
from extras.runtime.ranks import spread  # noqa: F401
from extras.runtime.supervise import run_program, supervise  # noqa: F401
