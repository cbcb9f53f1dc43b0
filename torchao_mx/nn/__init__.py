"""The modules into which ``quantize_`` turns linear layers and modules of experts.

Each scheme is its own folder or file (``ptq``, ``qat``, ``lora``, ``recipes``): a config, modules, and a
handler passed to ``registry``. A scheme imports another only to build on it: the recipe trains with the fake
quantization of ``qat`` and converts with ``ptq``. ``check_model`` examines a whole model before any of it
changes, and knows the configs only through the registry.

All schemes share ``experts`` for modules of 3-D weights and ``linear_checks`` for linear layers. ``modules``
replaces one module by another. ``raw_reads`` finds weights that code reads without calling their layer.
"""
