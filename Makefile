# make demo   quantises the small model that comes with the project and shows what that cost
# make test   all tests, JOBS at a time: as many as there are processors
# make lint   ruff, check and format; mypy
# make gpu    GPU tests, then benchmarks into benchmarks/; needs CUDA, and takes PYTHON as it is
#             (torch, transformers, triton installed), because no CUDA build is pinned here
# Each sets up what it needs.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OUTPUT ?= demo-output
BENCHMARKS ?= benchmarks
JOBS ?= logical
DEMO := demo-rtn demo-gptq demo-quarot demo-lm
# a part of what the recipes measure: enough to tell them apart in a few minutes
BRIEF := --set evaluate.limit=200 --set evaluate.perplexity.tokens=16384

.PHONY: demo test lint gpu clean

demo: $(READY)
	@echo "four runs and what they cost: two minutes on two quiet cores with AVX-512, more on others; each row is told as it comes"
	$(BIN)/modelpress compare $(DEMO) $(BRIEF) --output $(OUTPUT)
	$(BIN)/modelpress generate $(OUTPUT)/RSQ-0 --prompt "import os" --max-tokens 32

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types && mkdir -p build/types/compress
	for part in compress/* kernels eval recipes; do \
		ln -sfn ../../../$$part build/types/compress/; done
	$(BIN)/mypy

gpu:
	@$(PYTHON) -c "import torch; torch.cuda.is_available() \
		or exit('needs a CUDA device, torch ' + torch.__version__ + ' finds none'); \
		print(torch.cuda.get_device_name())"
	@$(PYTHON) -c "import setuptools; int(setuptools.__version__.split('.')[0]) >= 77 \
		or exit('needs setuptools 77 or later, found ' + setuptools.__version__)"
	$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(PYTHON) -m pytest -m gpu
	mkdir -p $(BENCHMARKS)
	$(PYTHON) -m compress bench kernels --device cuda --dtype fp16 \
		--output $(BENCHMARKS)/kernels-cuda-fp16.json
	$(PYTHON) -m compress bench kernels --device cuda --dtype bf16 \
		--output $(BENCHMARKS)/kernels-cuda-bf16.json
	$(PYTHON) -m compress bench quantize --device cuda --output $(BENCHMARKS)/quantize-cuda.json

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(OUTPUT) build *.egg-info
