# The two commands that a fresh machine needs, with nothing but a Rust toolchain and root:
#   make run     builds the program, shows a disk image as a file, works with it, takes it away
#   make test    installs what the tests need and runs all of them
CARGO ?= cargo

.PHONY: all build run test

all: build

build:
	$(CARGO) build --release --package diskfuse

run: build
	scripts/run-demo "$${CARGO_TARGET_DIR:-target}/release/diskfuse"

# The program first, so that a test that needs it finds it built. Last the models: every interleaving of the cache of
# tables, on models of atomics and locks.
test:
	scripts/install-test-tools
	$(CARGO) build --package diskfuse
	$(CARGO) test --workspace --no-fail-fast
	$(CARGO) test --package diskfuse-qcow2 --features loom --lib slices_model
