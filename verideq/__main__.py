"""``python -m verideq``: the same as the command ``verideq``."""

from verideq.cli import main

if __name__ == "__main__":
    main()
