"""``python -m post_training.manifest``; the code is in ``post_training/cli/manifest.py``."""

from post_training.cli.manifest import main

if __name__ == "__main__":
    main()
