"""`python -m modicum` is the command `modicum`."""

from .experiments.commands import main

if __name__ == "__main__":
    raise SystemExit(main())
