# `make` lists what there is to do. Each target does its own set-up. It needs Rust and Python, and where kernels are compiled
# g++ and Python's venv.

CARGO ?= cargo

# The architectures of this machine's GPUs, e.g. 89; empty where there is none.
GPUS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d . | sort -nu | paste -sd,)
# The demo needs no ONNX, and CUDA code only where there is a driver to run it.
DRIVER := $(GPUS)$(shell ldconfig -p 2>/dev/null | grep -o 'libcuda\.so\.1' | head -n 1)
FEATURES := --no-default-features --features cli $(if $(DRIVER),--features cuda)
# Tests and lint compile the kernels for one architecture; the compiler's report covers all.
TESTED := --profile tests --features emulator
TEST_ARCHS := EDM2K_CUDA_ARCHS=$(or $(EDM2K_CUDA_ARCHS),$(GPUS),80)
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
	--tags 'cat, face, group: animals & nature' \
	--tags 'red, apple, fruit, group: food & drink' \
	--tags 'blue, apple, fruit, group: food & drink' \
	--tags 'superhero, woman, wheelchair, motorized, dark skin tone, $(PEOPLE)'

.DEFAULT_GOAL := help
.PHONY: help nvcc demo page test test-kernels test-page test-tensorboard test-taggers test-wheel test-wine quick hooks hard lint bench bundle package wheel verify demo-data demo-train

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

nvcc: ## install NVIDIA's compiler for this checkout, unless there is one (300 MB, from PyPI)
	@[ -n "$$NVCC$$CUDA_HOME$$CUDA_PATH" ] || command -v nvcc >/dev/null || scripts/install-nvcc >/dev/null

$(EDM2K): FORCE $(if $(DRIVER),nvcc)
	@$(CARGO) build --release --locked --bin edm2k $(FEATURES)
FORCE:

demo: $(EDM2K) ## draw emoji from tags with the trained model (one PNG, in demo/out)
	@$(EDM2K) sample --model demo/emoji.safetensors --condition-model demo/conditions.safetensors \
		$(DEMO_TAGS) --random-conditions 4 --per-condition 8 --batch 16 \
		--outdir demo/out --overwrite

page: FEATURES += --features serve
page: $(EDM2K) ## draw with the demo's model in a browser: http://127.0.0.1:7860 (docs/serve.md)
	@$(EDM2K) serve --model demo/emoji.safetensors --condition-model demo/conditions.safetensors

test: nvcc ## run every test: on the emulator, the compiler's report, on a GPU if there is one
	@$(TEST_ARCHS) $(CARGO) test --locked $(TESTED)

test-kernels: nvcc ## run the CUDA kernels' tests
	@$(TEST_ARCHS) $(CARGO) test --locked $(TESTED) \
		--test kernels --test emulator --test kernel_report

quick: ## the inner loop, without kernels: formatting, the library's unit tests, types of the program
	@$(CARGO) fmt --all --check
	@CARGO_INCREMENTAL=1 $(CARGO) test --profile tests --locked --no-default-features --lib --quiet
	@CARGO_INCREMENTAL=1 $(CARGO) check --profile tests --locked --no-default-features --features cli,serve --bins --quiet

hooks: ## run `make quick` before each commit from now on
	@git config core.hooksPath scripts/hooks

SUDO = $(if $(filter 0,$(shell id -u)),,sudo)
test-page: nvcc ## draw on the page in a real browser (Debian's chromium, installed if it is missing); screenshots in target/page
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { $(SUDO) apt-get -qq update && \
		$(SUDO) apt-get -qq install --no-install-recommends chromium chromium-driver fonts-dejavu-core >/dev/null; }
	@$(TEST_ARCHS) $(CARGO) test --locked $(TESTED) --test program -- --ignored page::

test-tensorboard: $(EDM2K) ## have TensorBoard's own reader read a run's event files (from PyPI, in target/tensorboard)
	@[ -x target/tensorboard/bin/python ] || { python3 -m venv target/tensorboard && \
		target/tensorboard/bin/pip -q install tensorboard 'setuptools<81'; }
	@target/tensorboard/bin/python scripts/test-tensorboard $(EDM2K)

test-wine: $(EDM2K) ## try the program for Windows under Wine (Debian's wine64 and mingw-w64, installed if they are missing)
	@command -v x86_64-w64-mingw32-gcc >/dev/null && ls /usr/lib/wine/wine64 >/dev/null 2>&1 || { $(SUDO) apt-get -qq update && \
		$(SUDO) apt-get -qq install --no-install-recommends wine64 gcc-mingw-w64-x86-64 >/dev/null; }
	@rustup target add x86_64-pc-windows-gnu 2>/dev/null
	@scripts/test-wine $(EDM2K)

TAGGERS := target/taggers
test-taggers: FEATURES += --features onnx
test-taggers: $(EDM2K) ## compare the WD taggers' architectures with onnxruntime (6 GB from PyPI, in target/taggers)
	@[ -x $(TAGGERS)/timm/bin/python ] || { python3 -m venv $(TAGGERS)/timm && \
		$(TAGGERS)/timm/bin/pip -q install timm onnx onnxruntime; }
	@[ -x $(TAGGERS)/keras/bin/python ] || { python3 -m venv $(TAGGERS)/keras && \
		$(TAGGERS)/keras/bin/pip -q install 'tensorflow-cpu<2.16' 'onnx<1.17' tf2onnx onnxruntime pillow; }
	@$(TAGGERS)/timm/bin/python scripts/test-taggers $(EDM2K) timm
	@$(TAGGERS)/keras/bin/python scripts/test-taggers $(EDM2K) keras

MINUTES ?= 5
hard: $(EDM2K) ## kill it, fill its disks, feed it damaged files, MINUTES=5 (docs/reliability.md)
	@python3 scripts/hard.py $(EDM2K) --minutes $(MINUTES)

lint: nvcc ## formatting, clippy, documentation; warnings are errors
	@$(CARGO) fmt --version >/dev/null 2>&1 && $(CARGO) clippy --version >/dev/null 2>&1 \
		|| rustup component add rustfmt clippy
	$(CARGO) fmt --all --check
	$(TEST_ARCHS) $(CARGO) clippy --locked --all-targets $(TESTED) -- -D warnings
	$(CARGO) clippy --locked --profile tests --no-default-features --features cli -- -D warnings
	$(TEST_ARCHS) RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --no-deps --document-private-items $(TESTED)

bundle: nvcc ## all that checks and measures on a GPU machine without Rust, in target/bundle; EDM2K_CUDA_ARCHS=90 narrows it
	@CARGO="$(CARGO)" scripts/bundle

package: nvcc ## the crate with compiled kernels, in target/package; compiles it from that file alone
	@CARGO="$(CARGO)" scripts/package

wheel: nvcc ## a wheel that puts edm2k with its kernels on the PATH, in target/wheel
	@$(CARGO) build --release --locked --bin edm2k
	@python3 scripts/wheel.py target/release/edm2k target/wheel

test-wheel: wheel ## install that wheel in a fresh environment, and draw with what is then on the PATH
	@rm -rf target/wheel/env && python3 -m venv target/wheel/env
	@target/wheel/env/bin/pip install --quiet --no-index target/wheel/edm2k-*.whl
	@cd target/wheel && PATH="$$PWD/env/bin:/usr/bin:/bin" && edm2k --version && \
		edm2k sample --model ../../demo/emoji.safetensors --tags 'green, heart' --steps 2 --overwrite --outdir out

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
