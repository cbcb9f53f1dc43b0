"""What a layer of experts needs besides its products: rows sorted by expert, gathered, weighted and summed.

``routing`` sorts rows by expert, ``combine`` sums each token's rows, ``swiglu`` is the activation,
``group_sum`` sums rows per expert (gradients of biases and weights). ``groups`` and ``gather`` are device
code, shared with the products, that finds a tile's expert and a row's token. ``narrow`` multiplies by adapters.
"""
