"""Modules: what ``quantize_`` makes of linear layers and of experts.

A scheme is a room or a file of its own (``ptq``, ``qat``, ``lora``, ``recipes``): config, modules, and a
handler that it gives to ``registry``. None knows the others but for what it is built on: the recipe trains
with the fake quantization of ``qat``, and converts as ``ptq`` quantizes. ``check_model`` looks at a whole
model before any of it changes, and knows configs by the registry alone.

``experts`` is what all schemes share for modules of 3-D weights, ``linear_checks`` for linear layers.
``modules`` puts one module in another's place, and ``raw_reads`` finds weights that are read past their
layer.
"""
