"""``python -m post_training.answer``; the code is in ``post_training/cli/answer.py``."""

from post_training.cli.answer import main

if __name__ == "__main__":
    main()
