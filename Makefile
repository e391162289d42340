# make demo   the whole flow on made-up scenes, ending with a submission, its score and a report
# make test   the tests; make test-all adds the slow ones; make lint checks style and types;
#             make docs builds the documentation into build/site; make figures fills README and docs from bench/results
# Both need python3 (3.11 or later), make and git alone; the first run makes .venv and installs what is needed.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
DEMO := demo

export NO_ALBUMENTATIONS_UPDATE := 1
unexport PYTHONDONTWRITEBYTECODE  # torch and its kin, compiled anew, cost each process ten seconds

.PHONY: demo test test-all lint docs figures setup clean

demo: $(READY)
	rm -rf $(DEMO)
	$(BIN)/cloudrt synth $(DEMO)/data -n 200 --size 700x467 --seed 1
	$(BIN)/cloudrt-train $(DEMO)/data --runs $(DEMO)/runs --name demo --cache $(DEMO)/cache \
	  --encoder-weights none --encoder resnet18 --set decoder_pyramid_channels=64 --set decoder_segmentation_channels=64 \
	  --input-size 192x128 --epochs 5 --batch-size 8 --accumulate 1 --schedule one-cycle --encoder-lr 2e-3 --decoder-lr 2e-3 \
	  --validation-share 0.15
	$(BIN)/cloudrt-export $(DEMO)/runs/demo/best.pth --calibration $(DEMO)/data/train_images --images 16
	$(BIN)/cloudrt-infer $(DEMO)/data/test_images --model $(DEMO)/runs/demo/model.onnx \
	  --sample $(DEMO)/data/sample_submission.csv --output $(DEMO)/submission.csv --report
	$(BIN)/cloudrt score $(DEMO)/submission.csv $(DEMO)/data/test_truth.csv
	@echo "Look at $(DEMO)/report.html and $(DEMO)/runs/demo/curves.png"

test: $(READY)
	$(BIN)/pytest -m "not slow" -n 2 --dist loadfile

test-all: $(READY)
	$(BIN)/pytest -n 2 --dist loadfile

# The layout as installed, where train, export and bench are parts of cloudrt: what mypy and import-linter look at.
lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/layout && mkdir -p build/layout && cp -rs $(CURDIR)/cloudrt build/layout/cloudrt
	cp -rs $(CURDIR)/train $(CURDIR)/export $(CURDIR)/bench build/layout/cloudrt/
	cd build/layout && ../../$(BIN)/lint-imports --no-cache ../../setup.cfg
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/mkdocs build --strict

figures: $(READY)
	$(BIN)/python -m cloudrt.bench.studies.render README.md docs/how-to/cluster.md

setup: $(READY)

$(READY): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "cloudrt needs Python 3.11 or later; say which with make PYTHON=python3.12"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[all,dev]'
	@touch $@

clean:
	rm -rf .venv $(DEMO) build dist *.egg-info
