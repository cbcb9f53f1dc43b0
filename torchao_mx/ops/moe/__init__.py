"""What a layer of experts needs beside its products: rows sorted by expert, gathered, weighted and summed.

``routing`` sorts, ``combine`` sums each token's rows, ``swiglu`` is the activation, ``group_sum`` sums rows per
expert (gradients of biases and weights). ``groups`` and ``gather`` are the device code that finds a tile's expert
and a row's token, which the products share; ``narrow`` has the products with a narrow side, of adapters.
"""
