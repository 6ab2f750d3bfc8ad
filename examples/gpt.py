"""The model of `make train`: a small GPT, in the form that every command takes as FILE.py:FUNCTION.

    evenflow train examples/gpt.py:build          # learns its example batch by heart
    evenflow train examples/train_gpt.toml        # learns real text

It lies in the package (src/evenflow/demo/gpt.py), where `evenflow train --demo` finds it without a clone.
"""

from evenflow.demo.gpt import GPT, GPTConfig, build, loss

__all__ = ["GPT", "GPTConfig", "build", "loss"]
