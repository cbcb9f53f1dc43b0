"""Benchmarks: what the library's parts cost, each beside the way without it. README.md has the figures.

    kernels/        one op: quantize, quantize_both, swiglu
    layers/         one linear layer or layer of experts: LoRA, QAT, the recipe
    models/         whole models: gpt-oss, compiled blocks, more and more layers, a cost model, ablations
    quality/        what training and rounding do to losses and to errors
    distributed/    many GPUs, and thousands of steps
    shared/         the harness (timing, gates, results) and the report that writes README's tables
    results/        JSON and PNG, as the benchmarks wrote them: results/NAME-GPU.json is NAME.py's

Run one from the repository's root: ``python -m benchmarks.layers.lora_grouped``. Each checks its results
before it prints a time.
"""
