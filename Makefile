# `make` lists what there is to do. Each target does its own set-up; Rust and Python are all it needs.

CARGO ?= cargo
EDM2K := target/release/edm2k
DATA  := demo/cache/emoji-32

# The rows of the demo's grid; no emoji has the last two sets of tags.
PEOPLE := group: people & body
DEMO_TAGS := \
	--tags 'green, heart, subgroup: heart, group: smileys & emotion' \
	--tags 'grinning, face, happy, group: smileys & emotion, subgroup: face smiling' \
	--tags 'woman, dark skin tone, red, hair, subgroup: person, $(PEOPLE)' \
	--tags 'superhero, man, light skin tone, subgroup: person fantasy, $(PEOPLE)' \
	--tags 'heart, couple, kiss, medium skin tone, $(PEOPLE)' \
	--tags 'vampire, woman, red, hair, dark skin tone, $(PEOPLE)' \
	--tags 'superhero, woman, wheelchair, motorized, dark skin tone, $(PEOPLE)'

.DEFAULT_GOAL := help
.PHONY: help demo test test-kernels lint bench verify demo-data demo-train

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(EDM2K): FORCE
	@$(CARGO) build --release --locked --bin edm2k
FORCE:

demo: $(EDM2K) ## draw emoji from tags with the trained model (one PNG, in demo/out)
	@$(EDM2K) sample --model demo/emoji.safetensors --condition-model demo/conditions.safetensors \
		$(DEMO_TAGS) --random-conditions 5 --per-condition 8 --batch 16 \
		--outdir demo/out --overwrite

test: ## run every test
	@$(CARGO) test --release --locked

test-kernels: ## run the CUDA kernels' tests on the emulator (needs a C++17 compiler, x86-64 Linux)
	@$(CARGO) test --release --locked --features emulator \
		--test conv_kernels --test attention_kernels --test pixelwise_kernels --test embedding_kernels

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
	python3 demo/fetch.py
	$(EDM2K) prepare --images demo/cache/emoji --metadata demo/cache/emoji.jsonl --out $(DATA) \
		--size 32x32 --background '#ffffff' --vocabulary 1024 --validation-modulus 50 \
		--source 'Noto emoji (emoji-datasource-google 16.0.0), emojibase-data 17.0.0' \
		--licence 'images Apache-2.0, names and tags MIT'

demo-train: demo-data ## train the demo's models again, or go on with it (hours on a CPU)
	$(EDM2K) condition train --data $(DATA) --out demo/run/conditions.safetensors --overwrite
	$(EDM2K) train --data $(DATA) --outdir demo/run --config demo/emoji.json --duration 1M \
		--batch 64 --lr 0.01 --decay 1500 --rampup 10k --p-mean -0.6 --p-std 1.4 --cond-dropout 0.1
