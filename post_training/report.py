"""``python -m post_training.report``; the code is in ``post_training/cli/report.py``."""

from post_training.cli.report import main

if __name__ == "__main__":
    main()
