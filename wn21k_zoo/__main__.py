"""``python -m wn21k_zoo`` is ``wn21k``."""

from wn21k_zoo.cli import main

if __name__ == "__main__":
    main()
