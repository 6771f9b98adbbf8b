"""``python -m tessera`` is the command line."""

from __future__ import annotations


def main() -> None:
    """Run the command line."""
    from .app.commands import main as run

    run()


if __name__ == "__main__":
    main()
