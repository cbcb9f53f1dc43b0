"""Load transformers checkpoints packed, train them, and save them in layouts that other programs load.

    from_pretrained, save_pretrained    a model whose experts are in MXFP4 on disk and in memory
    load_adapter, save_adapter          adapters in PEFT's format
    merge_adapter                       add adapters to packed weights; report the rounding error (MergeError)
    save_distributed                    convert a torch.distributed.checkpoint to the published layout

The command line ``torchao-mx`` (``cli.py``) inspects checkpoints, quantizes them and merges adapters.

No other part of torchao_mx imports transformers. Importing this one registers the quantizers "torchao_mx" and
"torchao_mx_ptq" with transformers and, under v5, the experts implementation "torchao_mx".
"""

from torchao_mx.hf.versions import is_v5

if is_v5():
    from torchao_mx.hf import hooks_v5 as _hooks
else:
    from torchao_mx.hf import hooks_v4 as _hooks

_hooks.register()

from torchao_mx.hf.adapter import load_adapter, save_adapter  # noqa: E402
from torchao_mx.hf.load import from_pretrained  # noqa: E402  after the version check
from torchao_mx.hf.merge import MergeError, merge_adapter  # noqa: E402
from torchao_mx.hf.save import save_pretrained  # noqa: E402
from torchao_mx.hf.save_sharded import save_distributed  # noqa: E402

__all__ = [
    "MergeError",
    "from_pretrained",
    "load_adapter",
    "merge_adapter",
    "save_adapter",
    "save_distributed",
    "save_pretrained",
]
