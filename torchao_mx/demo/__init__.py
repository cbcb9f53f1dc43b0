"""The end-to-end demo: pretrain a small transformer, then PTQ and QAT of it side by side.

``python -m torchao_mx.demo --help`` lists the options; :func:`main` is the same as a function.
"""

from torchao_mx.demo.cli import main

__all__ = ["main"]
