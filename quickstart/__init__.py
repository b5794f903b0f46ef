"""The quickstart's tiny language model: its world, its tokenizer, its training. See train.py."""
