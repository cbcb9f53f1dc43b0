"""Checkpoints of transformers: loaded packed, trained, and saved so that others load them.

    from_pretrained, save_pretrained    a model with its experts in MXFP4, from the file on and back
    load_adapter, save_adapter          the adapters beside them, in PEFT's format
    merge_adapter                       adapters added to the packed weights, and what that costs (MergeError)
    save_distributed                    likewise, of what torch.distributed.checkpoint saved

On the command line ``torchao-mx`` (``cli.py``) inspects checkpoints, quantizes them and merges adapters.

The only part of torchao_mx that imports transformers. Importing it adds to transformers' own registries: the
quantizer "torchao_mx" and, under v5, the experts implementation "torchao_mx".
"""

from torchao_mx.hf.versions import is_v5

if is_v5():
    from torchao_mx.hf import hooks_v5 as _hooks
else:
    from torchao_mx.hf import hooks_v4 as _hooks

_hooks.register()

from torchao_mx.hf.adapter import load_adapter, save_adapter  # noqa: E402
from torchao_mx.hf.load import from_pretrained  # noqa: E402  after the version is known to work
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
