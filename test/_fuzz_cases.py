"""Which mutations of :mod:`_fuzz_files` a fuzzer tries, as strategies of hypothesis.

Names of tensors and paths into JSON are drawn from the undamaged folder, so that a case tells what it does.
"""

import json

from _fuzz_files import CONFIG, DTYPES, INDEX, OUTSIDE, RESIZES, SINGLE, TEXTS, tensors_in
from hypothesis import strategies as st

NAMES = [
    "",
    ".",
    "..",
    "/",
    "a/b",
    f"../{OUTSIDE}",
    f"/tmp/{OUTSIDE}",
    "\x00",
    "@deep",
    "x" * 300,
    "config.json",
]
NUMBERS = [
    0,
    1,
    -1,
    2,
    3,
    31,
    32,
    33,
    2**31,
    2**32,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
    0.5,
    -0.0,
    1e308,
]
STRANGERS = [  # what some loader reads before a checkpoint's own files, or instead of them
    "other.safetensors", SINGLE, INDEX, "adapter_config.json", "adapter_model.safetensors", "pytorch_model.bin",
    "shard-0-model-00001-of-00001.safetensors", "model.fp16.safetensors",
]  # fmt: skip
SCALARS = st.one_of(
    st.sampled_from(
        [None, True, False, "@nan", "@inf", "@float", "@digits", "@deep", *NUMBERS, *NAMES]
    ),
    st.integers(-(2**70), 2**70),
    st.integers(-300, 300),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(codec="utf-8"), max_size=8),
)
JUNK = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3),
    st.dictionaries(st.text(max_size=4), SCALARS, max_size=2),
    st.just([[[]]]),
    st.just({"a": {"b": {}}}),
)
_SHAPES = st.lists(st.one_of(st.sampled_from(NUMBERS), st.integers(-3, 200), SCALARS), max_size=5)
_OFFSETS = st.lists(
    st.one_of(st.sampled_from(NUMBERS), st.integers(-300, 300_000), SCALARS), max_size=3
)
_COUNTS = ("layers", "experts", "heads", "layer_types")  # of modules, which are made one by one


def bounded(path, value):
    """Whether a config may say so: what counts modules must not keep Python busy for hours."""
    counts = any(isinstance(step, str) and step.endswith(_COUNTS) for step in path)
    return not (counts and isinstance(value, (int, float)) and abs(value) > 64)


def paths_in(document, path=()):
    """The path to each value in a JSON document."""
    if path:
        yield path
    items = (
        document.items()
        if isinstance(document, dict)
        else enumerate(document)
        if isinstance(document, list)
        else ()
    )
    for key, value in items:
        yield from paths_in(value, (*path, key))


def one(name, *arguments):
    """A strategy of ``(name, *arguments)``; what is no strategy is itself."""
    drawn = [a if isinstance(a, st.SearchStrategy) else st.just(a) for a in arguments]
    return st.tuples(st.just(name), *drawn)


def on_files(files):
    """What can happen to each file of a folder, and between them."""
    return st.sampled_from(sorted(files)).flatmap(lambda file: on_file(files, file))


def on_file(files, file):
    other = st.sampled_from([*sorted(files), *STRANGERS])
    at = st.integers(0, len(files[file]))
    kinds = [
        one("flip", file, at, st.integers(1, 255)),
        one("cut", file, at),
        one("splice", file, at, st.integers(0, 20), st.binary(max_size=20)),
        one("delete", file),
        one("special", file, st.sampled_from(["dir", "fifo", "locked"])),
        one(
            "special",
            file,
            "link",
            st.sampled_from(["nowhere", file, ".", f"../{OUTSIDE}", "/dev/zero", "/dev/null"]),
        ),
        one("linked", file),
        one("swap", file, other),
        one("copy", file, other),
    ]
    return st.one_of(kinds)


def on_json(files, file):
    """A JSON file's text and its values; paths into it are those of the undamaged one."""
    document = json.loads(files[file])
    path = st.sampled_from(list(paths_in(document)))
    put = (
        st.tuples(path, JUNK).filter(lambda drawn: bounded(*drawn)).map(lambda d: ("put", file, *d))
    )
    return st.one_of(
        one("text", file, st.sampled_from(sorted(TEXTS))), put, put, put, one("remove", file, path)
    )


def on_index(files):
    """What an index may say of where tensors are."""
    if INDEX not in files:
        return st.nothing()
    names = sorted(json.loads(files[INDEX])["weight_map"])
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    entry = st.sampled_from(names).map(lambda name: ("weight_map", name))
    new = st.text(max_size=8).map(lambda name: ("weight_map", name))
    place = st.one_of(st.sampled_from([*shards, *NAMES, "missing.safetensors", OUTSIDE]), JUNK)
    return st.one_of(
        one("put", INDEX, entry, place),
        one("put", INDEX, new, place),
        one("remove", INDEX, entry),
        one("put", INDEX, ("weight_map",), JUNK),
        one("put", INDEX, ("metadata",), JUNK),
        one("remove", INDEX, st.sampled_from([("weight_map",), ("metadata",)])),
        on_json(files, INDEX),
    )


def on_tensors(files):
    """What may be wrong with a safetensors file, within and in its header."""
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    everywhere = sorted({n for file in shards for n in tensors_in(files[file])})

    def within(file):
        names = sorted(tensors_in(files[file]))
        tensor, other = st.sampled_from(names), st.sampled_from(names)
        new = st.one_of(
            st.sampled_from(everywhere),
            tensor.map(lambda n: n + "x"),
            tensor.map(lambda n: n.partition(".")[2]),
            tensor.map(lambda n: n.rpartition(".")[0]),
            st.text(max_size=6),
        )
        by = st.sampled_from([-(2**63), -8, -2, -1, 0, 1, 2, 8, 10**6, 2**63])
        dtypes = sorted(DTYPES)
        valid = [
            one("drop", file, tensor),
            one("retype", file, tensor, st.sampled_from(dtypes)),
            one("resize", file, tensor, st.sampled_from(sorted(RESIZES))),
            one(
                "poke",
                file,
                tensor,
                st.integers(0, 10**6),
                st.sampled_from([b"\xff", b"\x7f\x80", b"\xff\xff\xff\xff", b"\0"]),
            ),
            one("fill", file, tensor, st.sampled_from([0, 0x7F, 0x80, 0xFF])),
            one("rename", file, tensor, new),
            one("move", file, tensor, st.sampled_from(shards)),
        ]
        damaged = [
            one("field", file, tensor, "dtype", st.one_of(st.sampled_from([*dtypes, "F4", "bf16", "C64", "@gone"]), JUNK)),
            one("field", file, tensor, "shape", st.one_of(_SHAPES, JUNK, st.just("@gone"))),
            one("field", file, tensor, "data_offsets", st.one_of(_OFFSETS, JUNK, st.just("@gone"))),
            one("field", file, tensor, st.text(max_size=4), JUNK),
            one("shift", file, tensor, by, by),
            one("exchange", file, tensor, other),
            one("forget", file, tensor),
            one("alias", file, tensor, new),
            one("twice", file, tensor, other),
            one("put_record", file, st.one_of(tensor, new), JUNK),
            one("metadata", file, st.one_of(JUNK, st.sampled_from([{"format": f} for f in ("tf", "flax", "mlx", "np", "")]))),
            one("header", file, st.sampled_from([b"", b"{", b"{}", b"null", b"[]", b"1", b"\xff\xfe", b"[" * 50_000, b'{"a":' * 50_000])),
            one("wrapped", file, st.sampled_from([b"", b" ", b"\xef\xbb\xbf", b"\0"]), st.sampled_from([b"", b" " * 7, b"\0", b"}", b"{}"])),
            one("length", file, st.one_of(st.sampled_from([0, 1, 2, 8, 2**31, 2**63, 2**64 - 1, 10**8]), st.integers(0, 10**5))),
            one("flip_header", file, st.integers(0, 10**5), st.integers(1, 255)),
        ]  # fmt: skip
        return st.one_of(*valid, *damaged)

    return st.sampled_from(shards).flatmap(within)


def several(strategy):
    """One mutation as a rule, of which a reader sees what it does; now and then up to three."""
    return st.one_of(
        st.tuples(strategy),
        st.tuples(strategy),
        st.lists(strategy, min_size=2, max_size=3).map(tuple),
    )


_SAYS = {
    "model_type": ["llama", "mistral", "gpt_oss", "qwen3_moe", "bert", "t5", "nosuch", "torchao_mx"],
    "architectures": [["LlamaForCausalLM"], ["BertModel"], ["NoSuch"], "text", [1]],
    "quantization_config": [
        None, {}, "mxfp4", {"quant_method": "mxfp4"}, {"quant_method": "fp8"}, {"quant_method": 4}, {"quant_method": "nosuch"},
        {"quant_method": "torchao_mx"}, {"quant_method": "torchao"}, {"quant_method": "mxfp4", "modules_to_not_convert": 3},
        {"quant_method": "mxfp4", "dequantize": True},
    ],
    "compression_config": [{"quant_method": "compressed-tensors"}],
    "transformers_weights": [f"../{OUTSIDE}", "other.safetensors", SINGLE, INDEX, "x.bin", 3, None],
    "auto_map": [{"AutoConfig": "a.B", "AutoModelForCausalLM": "a.C"}, {"AutoConfig": "../a.B"}, 1],
    "tie_word_embeddings": [True, None, 1, "yes"],
    "dtype": ["float16", "float32", "float8_e4m3fn", "int8", "nosuch", 3, None],
    "torch_dtype": ["float16", "nosuch"],
    "base_model_tp_plan": [{"layers.*": "colwise"}, 3],
    "_attn_implementation": ["nosuch", "flash_attention_2"],
    "_experts_implementation": ["nosuch"],
    "hidden_act": ["gelu", "nosuch", None],
    "layer_types": [["full_attention"], ["nosuch", "nosuch"], None, 3],
    "rope_scaling": [{"rope_type": "nosuch"}, {"rope_type": "yarn"}, 3],
    "rope_parameters": [{"rope_type": "nosuch"}, {"rope_theta": "x"}, {}, None],
    "mlp_only_layers": [[0], None, 3],
    "decoder_sparse_step": [0, 2],
}  # fmt: skip


def on_config(files):
    """What config.json may say: of the keys that matter here, and of all others."""
    document = json.loads(files[CONFIG])
    numbers = sorted(k for k, v in document.items() if type(v) in (int, float))
    said = st.sampled_from(sorted(_SAYS)).flatmap(
        lambda k: one("nested", CONFIG, k, st.sampled_from(_SAYS[k]))
    )
    near = st.sampled_from(numbers).flatmap(
        lambda k: one(
            "put",
            CONFIG,
            (k,),
            st.one_of(st.integers(-3, 200), st.sampled_from(NUMBERS)).filter(
                lambda v: bounded((k,), v)
            ),
        )
    )
    return st.one_of(said, said, near, on_json(files, CONFIG))
