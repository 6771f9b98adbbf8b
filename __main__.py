"""``python -m tessera`` is the command line."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line."""
    try:
        from .app.commands import main as run

        run()
    except KeyboardInterrupt:  # Before a command began.
        sys.exit(130)


if __name__ == "__main__":
    main()
