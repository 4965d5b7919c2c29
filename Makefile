PY = .venv/bin/python
CHECK = scripts/check.sh
# Where rustup puts cargo, for shells that have not been told.
export PATH := $(PATH):$(HOME)/.cargo/bin

.DEFAULT_GOAL := help
.PHONY: help venv dev demo fmt lint kernels wheel test test-rust test-python test-slow test-avx512 test-asan test-neon bench lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: ## make .venv with the locked versions (again: does nothing)
	@scripts/setup_venv.sh

dev: venv ## build nybble and install it into .venv, editable
	@$(CHECK) develop

demo: dev ## build, then show the whole main job offline
	$(PY) -m nybble demo

fmt: venv ## format Rust and Python
	cargo fmt --all
	$(PY) -m ruff format

lint: venv ## formats, clippy, ruff, mypy, stubtest (needs `make dev` once)
	@$(CHECK) rustfmt clippy ruff mypy stubtest

kernels: venv ## compile the CUDA kernels for all GPUs (needs no GPU)
	@$(CHECK) kernels

wheel: venv ## build the wheel into dist/ and check it
	@$(CHECK) wheel

test: ## everything that CI runs
	@$(CHECK) venv fetch kernels rustfmt clippy rust-tests doctests wheel install ruff mypy stubtest pytest

test-rust: ## Rust tests and doctests
	@$(CHECK) rust-tests doctests

test-python: venv ## pytest on the nybble that .venv has
	@$(CHECK) pytest

test-slow: dev ## all tests, properties with many more cases
	@NYBBLE_TEST_PROFILE=thorough PROPTEST_CASES=10000 $(CHECK) rust-tests doctests pytest

test-avx512: ## the kernels' tests on an emulated AVX-512 machine (Debian; builds it once)
	@scripts/test_avx512.sh

test-neon: ## the Rust tests on an emulated aarch64 machine (Debian; fetches it once)
	@scripts/test_neon.sh

test-asan: ## the kernels' tests with AddressSanitizer
	@scripts/test_asan.sh

bench: dev ## Rust and Python benchmarks
	@$(CHECK) bench

lock: venv ## renew requirements/dev.lock
	scripts/renew_lock.sh

clean: ## delete what was built (.venv stays)
	cargo clean
	rm -rf dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f python/nybble/*.so python/nybble/*.pyd
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
