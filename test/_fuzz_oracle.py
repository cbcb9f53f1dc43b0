"""What a checkpoint's folder says, read on its own: by the order in which transformers reads, by safetensors'
format and by OCP's table of MXFP4. Nothing of torchao_mx is used but the packed tensors that are judged."""

import json
import math
import struct
from pathlib import Path

import numpy as np
import torch
from _fuzz_files import CONFIG, DTYPES, INDEX, SINGLE
from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_mx

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]  # OCP MX 1.0, table 5; the fourth bit is the sign


class Unreadable(Exception):
    """What the folder says cannot be told."""


def read_json(path):
    try:
        document = json.loads(path.read_bytes().decode())
    except (ValueError, RecursionError, OSError) as error:
        raise Unreadable(f"{path.name}: {error}") from None
    if not isinstance(document, dict):
        raise Unreadable(f"{path.name}: no object")
    return document


def read_file(path):
    """``{name: tensor}`` of a safetensors file; every byte of it is in one tensor.

    Of a name that occurs twice the last record counts, as in JSON generally.
    """
    try:
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        text, data = content[8 : 8 + length], content[8 + length :]
        header = json.loads(text.decode())
        if len(text) != length:
            raise Unreadable(f"{path.name}: no header")
        header.pop("__metadata__", None)
        records = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        at, tensors = 0, {}
        for name, record in records:
            begin, end = record["data_offsets"]
            shape, dtype = record["shape"], DTYPES[record["dtype"]]
            numbers = (begin, end, *shape)
            if any(type(n) is not int or n < 0 for n in numbers) or begin != at:
                raise Unreadable(f"{path.name}: {name}'s offsets or shape")
            if end - begin != math.prod(shape) * dtype.itemsize or end > len(data):
                raise Unreadable(f"{path.name}: {name}'s span")
            at = end
            flat = (
                torch.frombuffer(bytearray(data[begin:end]), dtype=dtype)
                if end > begin
                else torch.empty(0, dtype=dtype)
            )
            tensors[name] = flat.view(shape)
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        OSError,
        struct.error,
    ) as error:
        raise Unreadable(f"{path.name}: {error!r}") from None
    if at != len(data):
        raise Unreadable(f"{path.name}: {len(data) - at} bytes belong to no tensor")
    return tensors


def read_tensors(folder):
    """``{name: tensor}`` of what transformers reads of a folder: the file that config.json names, else the single
    file, else the shards of the index. A single file *and* an index must say the same."""
    explicit = read_json(folder / CONFIG).get("transformers_weights")
    if explicit is not None:
        if not isinstance(explicit, str) or Path(explicit).name != explicit:
            raise Unreadable(f"{CONFIG}: transformers_weights={explicit!r}")
        return (
            read_shards(folder / explicit)
            if explicit.endswith(".json")
            else read_file(folder / explicit)
        )
    single, index = folder / SINGLE, folder / INDEX
    if not single.is_file():
        return read_shards(index)
    tensors = read_file(single)
    if index.is_file():
        others = read_shards(index)
        if tensors.keys() != others.keys() or any(
            not equal(tensors[n], others[n]) for n in tensors
        ):
            raise Unreadable(f"{SINGLE} and {INDEX} differ")
    return tensors


def read_shards(index):
    """``{name: tensor}`` of the shards that an index lists, each of which holds what it says and no more."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(f, str) for f in places.values()):
        raise Unreadable(f"{index.name}: no weight_map")
    tensors = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file:
            raise Unreadable(f"{index.name}: {file!r} is not in the folder")
        shard = read_file(index.parent / file)
        strangers = [n for n in shard if places.get(n) != file]
        if strangers:
            raise Unreadable(f"{file}: {strangers[0]} is not there by {index.name}")
        tensors |= shard
    if tensors.keys() != places.keys():
        raise Unreadable(f"{index.name}: a tensor is missing")
    return tensors


def decoded(blocks, scales):
    """fp32 ``[..., K]`` of ``blocks [..., K/32, 16]`` and ``scales [..., K/32]``."""
    blocks, scales = blocks.numpy(), scales.numpy().astype(np.int32)
    codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(*blocks.shape[:-1], 32)
    table = np.array([*E2M1, *(-v for v in E2M1)], dtype=np.float64)
    values = np.ldexp(table[codes], scales[..., None] - 127)
    values[scales == 255] = np.nan
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    return torch.from_numpy(values.reshape(*values.shape[:-2], -1))


def equal(a, b):
    """Bit for bit, but that every NaN is one."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = a.detach().contiguous(), b.detach().contiguous()
    if not a.is_floating_point():
        return torch.equal(a, b)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    same = a.view(bits) == b.view(bits)
    return bool((same | (a.float().isnan() & b.float().isnan())).all())


_MERGED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class Said:
    """A folder's tensors, by the names that a model may have for them."""

    def __init__(self, folder):
        self.config = read_json(folder / CONFIG)
        self.tensors = read_tensors(folder)
        self.used = set()

    def value(self, name):
        """What the folder has for the parameter ``name``, or None."""
        if name in self.tensors:
            self.used.add(name)
            return self.tensors[name]
        if name.startswith("model.") and name.removeprefix("model.") in self.tensors:
            return self.value(name.removeprefix("model."))  # as of a model without its head
        owner, _, weight = name.rpartition(".")
        if f"{name}_blocks" in self.tensors:
            self.used |= {f"{name}_blocks", f"{name}_scales"}
            blocks, scales = (self.tensors.get(name + s) for s in ("_blocks", "_scales"))
            if (
                scales is None
                or blocks.dtype != torch.uint8
                or scales.dtype not in (torch.uint8, torch.float8_e8m0fnu)
            ):
                return None
            return decoded(blocks, scales.view(torch.uint8)).mT
        if weight in _MERGED and f"{owner}.0.down_proj.weight" in self.tensors:
            experts = []
            while f"{owner}.{len(experts)}.down_proj.weight" in self.tensors:
                names = [f"{owner}.{len(experts)}.{part}.weight" for part in _MERGED[weight]]
                self.used |= set(names)
                experts.append(torch.cat([self.tensors[n] for n in names]))
            return torch.stack(experts)
        if name == "lm_head.weight" and self.config.get("tie_word_embeddings"):
            return self.value("model.embed_tokens.weight")
        return None


def problems(model, folder, dtype=torch.bfloat16):
    """Where a loaded ``model`` is not what ``folder`` says."""
    try:
        said = Said(folder)
    except Unreadable as error:
        return [f"loaded though unreadable: {error}"]
    found = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        value = said.value(name)
        if value is None:
            found.append(f"{name}: loaded, and no tensor of the folder is it")
        elif not value.is_floating_point():
            found.append(f"{name}: loaded from {value.dtype}")
        elif parameter.is_meta:
            found.append(f"{name}: on meta")
        elif difference := _difference(parameter.detach(), value, dtype):
            found.append(f"{name}: {difference}")
    if not any(hasattr(p, "qdata") for p in model.parameters()):
        found.append("no weight is packed")
    for name, buffer in model.named_buffers():
        if buffer.is_meta or (buffer.is_floating_point() and not buffer.isfinite().all()):
            found.append(f"{name}: a buffer that is not computed")
    return found


def unused(folder, model):
    """The folder's tensors that no parameter of ``model`` is."""
    said = Said(folder)
    for name, _ in model.named_parameters(remove_duplicate=False):
        said.value(name)
    return sorted(said.tensors.keys() - said.used)


def _difference(parameter, value, dtype):
    if not hasattr(parameter, "qdata"):
        return "" if equal(parameter, value.to(dtype)) else "has other values"
    if parameter.shape != value.shape:
        return f"has shape {tuple(parameter.shape)}"
    if parameter.packed_axis == -2:
        parameter, value = parameter.mT, value.mT
    if value.dtype == torch.float32 and equal(
        parameter.dequantize(torch.float32), value.contiguous()
    ):
        return ""  # the file's own blocks
    scale, data = to_mx(
        value.to(dtype).contiguous(),
        torch.float4_e2m1fn_x2,
        32,
        scaling_mode=ScaleCalculationMode.RCEIL,
    )
    scales, bytes_ = parameter.scale.view(torch.uint8), parameter.qdata.view(torch.uint8)
    same = torch.equal(scale.view(torch.uint8), scales)
    finite = (scales != 255).repeat_interleave(16, dim=-1)  # in the others every element is NaN
    same = same and bool(((data.view(torch.uint8) == bytes_) | ~finite).all())
    return "" if same else "was packed from other values"


# --- adapters ----------------------------------------------------------------------------------------

# Options of PEFT's LoraConfig (0.21) with which a file's matrices are not the update, or not all of it.
MATTER = (
    "use_dora", "lora_bias", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save", "use_qalora",
    "trainable_token_indices", "layer_replication", "alora_invocation_tokens", "use_bdlora", "arrow_config",
    "kasa_config", "monteclora_config",
)  # fmt: skip


class SaidAdapter:
    """An adapter's two files, by PEFT's layout."""

    def __init__(self, folder):
        self.config = config = read_json(folder / "adapter_config.json")
        self.tensors = read_file(folder / "adapter_model.safetensors")
        if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
            raise Unreadable("adapter_config.json: no plain LoRA")
        if any(config.get(name) for name in MATTER):
            raise Unreadable("adapter_config.json: more than LoRA")
        init = config.get("init_lora_weights", True)
        if isinstance(init, str) and init.startswith(
            ("pissa", "olora", "corda", "loftq", "lora_ga")
        ):
            raise Unreadable("adapter_config.json: other weights beside it")
        r, alpha = config.get("r"), config.get("lora_alpha")
        if (
            any(isinstance(n, bool) or not isinstance(n, (int, float)) for n in (r, alpha))
            or r <= 0
        ):
            raise Unreadable("adapter_config.json: no rank or alpha")
        self.r, self.scaling = r, alpha / (math.sqrt(r) if config.get("use_rslora") else r)

    def updates(self, sizes):
        """``{name: (A, B)}`` for ``sizes`` of ``{name: (key, experts or None, out, in)}``, of all the tensors.

        Those of experts are ``[E, r, in]`` and ``[E, out, r]``; PEFT under transformers 4 has the two axes of
        gpt-oss's weights the other way round, which their lengths tell.
        """
        found, left = {}, dict(self.tensors)
        for name, (key, experts, n, k) in sizes.items():
            try:
                a, b = (left.pop(f"base_model.model.{key}.lora_{s}.weight") for s in "AB")
            except KeyError as error:
                raise Unreadable(f"{name}: {error} is missing") from None
            if not (a.is_floating_point() and b.is_floating_point()):
                raise Unreadable(f"{name}: no floating adapters")
            if experts is None:
                wanted = (self.r, k), (n, self.r)
            elif tuple(a.shape) == (experts * self.r, n) != (experts * self.r, k):
                wanted = (experts * self.r, n), (k, self.r * experts)
                a, b = (
                    b.reshape(-1, self.r, experts).permute(2, 1, 0).reshape(-1, k)
                    if b.shape == wanted[1]
                    else b,
                    a.reshape(experts, self.r, n).permute(2, 1, 0).reshape(n, -1),
                )
                wanted = (experts * self.r, k), (n, self.r * experts)
            else:
                wanted = (experts * self.r, k), (n, self.r * experts)
            if (tuple(a.shape), tuple(b.shape)) != wanted:
                raise Unreadable(f"{name}: shapes {tuple(a.shape)} and {tuple(b.shape)}")
            if experts is not None:
                a, b = a.reshape(experts, self.r, k), b.reshape(n, self.r, experts).permute(2, 0, 1)
            found[name] = a, b
        if left:
            raise Unreadable(f"{min(left)}: has no place")
        return found
