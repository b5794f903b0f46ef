"""``python -m post_training.flags_table``: rewrite ``models/transformer_fields.json``."""

from post_training.models.transformer_fields import main

if __name__ == "__main__":
    main()
