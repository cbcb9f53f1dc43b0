# Each target first installs what it needs into .venv.

PYTHON ?= python3
VENV ?= .venv
# torch and the Triton it was released with: change both together. If PYTHON already has a suitable torch
# (as a GPU machine's image may), that one is used and neither is installed.
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
RUFF ?= ruff==0.17.5
# pytest processes
JOBS ?= 2
# for the program: make demo ARGS="--format mxfp8", make demo ARGS="--method lora", make test ARGS="-k qat"
ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK = 1

py := $(VENV)/bin/python
installed := $(VENV)/.installed-$(shell echo '$(TORCH) $(TRITON) $(RUFF)' | cksum | cut -d ' ' -f 1)
hf_installed := $(VENV)/.installed-hf
wants_hf := $(filter lora --method=lora,$(ARGS))
check_python = import sys; v = sys.version_info; \
	sys.exit(v < (3, 10) and f"torchao_mx needs Python 3.10 or newer and $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=...")
has_torch = import sys, torch; sys.exit([int(n) for n in torch.__version__.split(".")[:2]] < [2, 11])
is_base = import sys; sys.exit(sys.prefix != sys.base_prefix)
has_gpu = import sys, torch; sys.exit(not torch.cuda.is_available())

.PHONY: help demo test lint bench

help:
	@echo 'make demo    train a small transformer on real text, quantize it after and during training, compare;'
	@echo '             with ARGS="--method lora", train adapters on the packed experts of a tiny gpt-oss'
	@echo 'make test    run the tests and doctests; on a GPU machine, the GPU tests too'
	@echo 'make lint    run ruff'
	@echo 'make bench   run the benchmarks on a GPU, without layers.moe_layer and models, which need the hf extra'
	@echo 'ARGS="..." goes to the program: make demo ARGS="--help"'

demo: $(installed) $(if $(wants_hf),$(hf_installed))
	$(py) -m torchao_mx.demo $(ARGS)

# torchao_mx/hf needs transformers; .ci/run tests it with two versions.
test: $(installed)
	$(py) -m pytest -n $(JOBS) --dist worksteal -m 'not gpu' --doctest-modules \
		--doctest-glob=README.md --doctest-glob=CONTRIBUTING.md \
		--ignore=torchao_mx/hf test torchao_mx README.md CONTRIBUTING.md $(ARGS)
	@if $(py) -c '$(has_gpu)'; then set -x; $(py) -m pytest -m gpu test $(ARGS) || test $$? = 5; fi

lint: $(installed)
	$(py) -m ruff check .
	$(py) -m ruff format --check .

bench: $(installed)
	@$(py) -c '$(has_gpu)' || { echo 'make bench needs a CUDA GPU, but torch finds none here' >&2; exit 1; }
	$(py) -m benchmarks.kernels.quantize
	$(py) -m benchmarks.kernels.swiglu
	$(py) -m benchmarks.kernels.quantize_both
	$(py) -m benchmarks.layers.qat_linear
	$(py) -m benchmarks.layers.recipe_linear
	$(py) -m benchmarks.quality.fp8_accuracy
	$(py) -m benchmarks.layers.lora_linear
	$(py) -m benchmarks.layers.lora_linear --first-step
	$(py) -m benchmarks.layers.lora_grouped
	$(py) -m benchmarks.layers.lora_grouped --first-step

# Virtual environments do not nest, so only a base interpreter can share its torch.
$(installed): setup.py
	@$(PYTHON) -c '$(check_python)'
	@echo 'Installing into $(VENV), only this once; torch is large.'
	@if $(PYTHON) -c '$(is_base)' && $(PYTHON) -c '$(has_torch)' 2>/dev/null; \
	then lend=--system-site-packages; else lend=; fi; \
	set -x; $(PYTHON) -m venv $$lend $(VENV)
	@$(py) -c '$(has_torch)' 2>/dev/null || { set -x; $(py) -m pip install $(TORCH) $(TRITON); }
	$(py) -m pip install --quiet --editable '.[demo,test]' $(RUFF)
	@rm -f $(VENV)/.installed-*
	@touch $@

$(hf_installed): $(installed)
	$(py) -m pip install --quiet --editable '.[hf]'
	@touch $@
