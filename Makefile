# `make` lists what there is to do. Each target does its own set-up; Rust and Python are all it needs.

CARGO ?= cargo
EDM2K := target/release/edm2k
OUT   := demo/out

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench verify demo-data demo-train

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(EDM2K): FORCE
	@$(CARGO) build --release --locked --bin edm2k
FORCE:

demo: $(EDM2K) ## draw emoji from tags with the trained model (one PNG, in demo/out)
	@demo/draw.sh $(EDM2K) $(OUT)

test: ## run every test
	@$(CARGO) test --release --locked

lint: ## formatting, clippy, documentation; warnings are errors
	@$(CARGO) fmt --version >/dev/null 2>&1 && $(CARGO) clippy --version >/dev/null 2>&1 \
		|| rustup component add rustfmt clippy
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --release --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --release --no-deps --document-private-items

bench: $(EDM2K) ## speed and memory of EDM2-XS on this machine
	@$(EDM2K) bench

verify: $(EDM2K) ## replay the numbers of the official implementation
	@$(EDM2K) verify tests/golden

demo-data: $(EDM2K) ## fetch and prepare the demo's images (needs npm)
	@demo/prepare.sh $(EDM2K)

demo-train: $(EDM2K) ## train the demo's model again, or go on with it (hours on a CPU)
	@demo/train.sh $(EDM2K)
