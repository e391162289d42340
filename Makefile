# make demo      run every step on synthetic images, from training to a scored submission and a report
# make test      run the tests; make test-all also runs the slow ones
# make lint      check style, workflows, import order and types
# make docs      build the documentation in build/site
# make wheel     build the source archive and the wheel in dist/
# make figures   render the figures in README and docs from bench/results
# All need Python 3.11 or later, make and git; the first run of any creates .venv and installs the dependencies.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
DEMO := demo

export NO_ALBUMENTATIONS_UPDATE := 1
export ORT_DISABLE_TELEMETRY := 1
unexport PYTHONDONTWRITEBYTECODE  # without byte code, importing torch takes each process ten seconds longer

.PHONY: demo test test-all lint docs wheel figures setup clean

demo: $(READY)
	rm -rf $(DEMO)
	$(BIN)/cloudrt synth $(DEMO)/data -n 200 --size 700x467 --seed 1
	$(BIN)/cloudrt-train $(DEMO)/data --runs $(DEMO)/runs --name demo --cache $(DEMO)/cache \
	  --encoder-weights none --encoder resnet18 --set decoder_pyramid_channels=64 --set decoder_segmentation_channels=64 \
	  --input-size 192x128 --epochs 5 --batch-size 8 --accumulate 1 --schedule one-cycle --encoder-lr 2e-3 --decoder-lr 2e-3 \
	  --validation-share 0.15
	$(BIN)/cloudrt-export $(DEMO)/runs/demo/best.pth --data $(DEMO)/data/train_images --max-images 16
	$(BIN)/cloudrt-infer $(DEMO)/data/test_images --model $(DEMO)/runs/demo/model.onnx \
	  --sample $(DEMO)/data/sample_submission.csv --output $(DEMO)/submission.csv --report
	$(BIN)/cloudrt score $(DEMO)/submission.csv $(DEMO)/data/test_truth.csv
	@echo "Open $(DEMO)/submission.html and $(DEMO)/runs/demo/curves.png"

test: $(READY)
	$(BIN)/pytest -m "not slow" -n 2 --dist loadfile

test-all: $(READY)
	$(BIN)/pytest -n 2 --dist loadfile

# mypy and import-linter check the layout as installed, where train, export and bench are parts of cloudrt.
lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	rm -rf build/layout && mkdir -p build/layout && cp -rs $(CURDIR)/cloudrt build/layout/cloudrt
	cp -rs $(CURDIR)/train $(CURDIR)/export $(CURDIR)/bench build/layout/cloudrt/
	cd build/layout && ../../$(BIN)/lint-imports --no-cache ../../setup.cfg
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/mkdocs build --strict

wheel: $(READY)
	$(BIN)/python -m build

figures: $(READY)
	$(BIN)/python -m cloudrt.bench.studies.render README.md docs/benchmarks.md docs/explanation/decoding.md docs/how-to/cluster.md docs/how-to/export.md docs/how-to/maps.md docs/how-to/tensorrt.md docs/how-to/train.md

setup: $(READY)

$(READY): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "cloudrt needs Python 3.11 or later; choose another one with make PYTHON=python3.12"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[all,dev]'
	@touch $@

clean:
	rm -rf .venv $(DEMO) build dist *.egg-info
