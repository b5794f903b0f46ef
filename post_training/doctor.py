"""``python -m post_training.doctor``; the code is in ``post_training/cli/doctor.py``."""

from post_training.cli.doctor import main

if __name__ == "__main__":
    main()
