"""Doctests of what needs transformers are collected where that is installed."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("transformers") else ["torchao_mx/hf"]
