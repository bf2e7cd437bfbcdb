# Every target sets up .venv by itself. PYTHON chooses the interpreter that makes it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
THREADS ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)

export OMP_NUM_THREADS ?= $(THREADS)

.PHONY: demo test lint format bench gpu-check gpu-sanitize sanitize clean

demo: $(STAMP)
	$(BIN)/python demo.py --output demo

# A process for each core, up to four. What waits for the other threads of its pool must not spin: the cores are taken.
test: $(STAMP)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(THREADS) --maxprocesses 4 $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m benchmarks.bench_layers

# On a machine with a GPU and an environment of its own (it may have no network): tests, then benchmarks, within MINUTES.
MINUTES ?= 10
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check --minutes $(MINUTES)

# The native CUDA kernels under NVIDIA's compute-sanitizer, on a machine with a GPU; without torch's own memory pool, whose
# blocks would hide an access beside a tensor.
gpu-sanitize:
	for tool in memcheck racecheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 $(PYTHON) -m pytest -q -x \
			-p no:cacheprovider tests/test_cuda_native.py -k "fused_conv2d or test_conv2d or test_linear" || exit 1; \
	done

# The property test on a sanitized build of the extension; the ordinary one is put back afterwards.
SANITIZERS = $(shell $(CXX) -print-file-name=libasan.so):$(shell $(CXX) -print-file-name=libubsan.so):$(shell $(CXX) -print-file-name=libstdc++.so.6)

sanitize: $(STAMP)
	BCOS_SANITIZE=1 BCOS_REQUIRE_EXTENSION=1 $(BIN)/python setup.py -q build_ext --inplace
	LD_PRELOAD=$(SANITIZERS) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 BCOS_EXAMPLES=200 \
		$(BIN)/python -m pytest -q -p no:cacheprovider tests/test_native.py -k "property or contract or shared or batch_norm"; \
		status=$$?; $(BIN)/python setup.py -q build_ext --inplace; exit $$status

clean:
	rm -rf $(VENV) build dist bcos_kernels/*.so bcos_kernels/_build.json *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch first: the extension is built against it.
$(STAMP): pyproject.toml setup.py $(wildcard build_support/*.py csrc/*.* csrc/*/*.*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools ninja 'torch>=2.11'
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[dev]'
	touch $@
