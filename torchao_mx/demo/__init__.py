"""The demo: train a small model on real text, quantize it after and during training, compare.

``python -m torchao_mx.demo --help`` lists the options; ``cli.main`` is the same as a function.
"""
