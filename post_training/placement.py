"""``python -m post_training.placement``; the code is in ``post_training/cli/placement.py``."""

from post_training.cli.placement import main

if __name__ == "__main__":
    main()
