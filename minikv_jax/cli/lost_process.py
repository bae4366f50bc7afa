"""Passes lines from stdin to stderr, and makes one of what JAX prints before it ends a process that has lost another.

`devices.join` puts it behind stderr: JAX ends the process from C++, with a dozen lines and a stack, and offers no hook.
"""

import re
import sys

LOST = "another process of this run was lost"
_ENDED = "Terminating process because the JAX distributed service detected fatal errors"
_LOG_LINE = re.compile(r"[EF]\d{4} [\d:.]+ +\d+ (coordination_service|client)")


def main() -> None:
    """Reads until the process has ended."""
    reported = skipping = False
    for line in sys.stdin:
        if _ENDED in line and not reported:
            print(f"minikv: error: {LOST}", file=sys.stderr, flush=True)
            reported = True
        skipping = skipping or _LOG_LINE.match(line) is not None
        if not skipping:
            print(line, end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
