# Every target makes its own .venv with the pinned versions; `make help` lists the targets.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The first interpreter of 3.11 or newer that really starts; PYTHON=... overrides.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
STAMP := .venv/.installed
# NEWEST=1: with the newest versions of all of them, in an environment of its own.
NEWEST ?=
QUICK ?=
SOME_INTEGRATIONS := tests/integrations/test_examples.py tests/integrations/test_families.py::test_two_ranks
BESIDE := .venv-integrations$(if $(NEWEST),-newest)
ARGS ?=
BUSY ?= 0
CASE ?=
SECONDS ?= 60
ONLY ?=
# What a machine with torch, triton and numpy alone lacks; WITH="fa3-fwd==0.0.3" adds to it, e.g. a peer of 28 MB.
WHEELS ?= gpu-wheels
WITH ?=
CARRIED := hydra-core omegaconf pyyaml packaging einops tqdm \
	pytest pytest-timeout pytest-xdist execnet iniconfig pluggy pygments hypothesis sortedcontainers
BUILT := antlr4-python3-runtime==4.9.3
GLIBC := 17 24 27 28 31 34 35

.PHONY: help demo cluster-lab lab-cases test test-integrations lint soak kills plans hostile fuzz docs paper kernels kernels-versions emulate \
	gpu-wheels pins clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo '  ARGS="..." goes on to the command, e.g. make test ARGS="tests/sharding -k prefix"'

# BUSY=2 burns as many cores meanwhile: the verdict must stay.
demo: $(STAMP) ## train one model under several methods on 2 CPU ranks, over a free link and a slowed one
	@trap 'kill $$(jobs -p) 2>/dev/null || true' EXIT; for i in $$(seq $(BUSY)); do while :; do :; done & done; \
	echo "260 steps; made for under 2 minutes on 2 idle cores, longer beside other work" >&2; \
	$(BIN)/flashcp sweep experiment=demo $(ARGS)

cluster-lab: $(STAMP) ## attention on an emulated cluster, 4 nodes of 2 ranks: predicted, then measured (root; docs/lab.md)
	$(BIN)/flashcp bench lab $(ARGS)

# A line a case: the folder of its rows, and what differs from conf/bench/lab.yaml.
define LAB_CASES
4x2_pile windows=16
2x2_wlb_llm_gqa nodes=2 data_set=wlb_llm kv_heads=4
2x4_redpajama nodes=2 ranks_per_node=4 data_set=redpajama methods=[llama3,per_document,ring,ring_zigzag,ulysses,usp:h2,usp_zigzag:h4,a2a_all_gather:h4,flashcp_paper,flashcp_paper+exact,flashcp,flashcp:h2,flashcp:h4]
4x2_pile_heads link_share=0.33 methods=[llama3,usp:h2,a2a_all_gather:h2,flashcp_paper,flashcp,flashcp:h2]
8x1_pile_slow nodes=8 ranks_per_node=1 link_share=0.25
4x2_wlb_llm_fast link=free data_set=wlb_llm
4x2_wlb_llm_replicas replicas=2 one_plan=[flashcp,flashcp:h2] data_set=wlb_llm methods=[llama3,per_document,flashcp]
4x2_wlb_llm_long_replicas replicas=2 context=65536 shrink=2 windows=6 one_plan=[flashcp,flashcp:h2] data_set=wlb_llm methods=[llama3,per_document,flashcp,flashcp:h2]
4x2_wlb_llm_four_replicas replicas=4 windows=6 one_plan=[flashcp,flashcp:h2] data_set=wlb_llm methods=[llama3,per_document,flashcp]
4x2_pile_steps context=8192 shrink=16 methods=[llama3,ring,flashcp_paper,flashcp] train_steps=6 faults=[llama3,ring,flashcp] timeout_s=20
endef
export LAB_CASES

lab-cases: $(STAMP) ## the kept labs, or the one named by CASE: rows, pictures, LAB_RESULTS.md (root; an hour and a half, idle)
	@[ -z "$(CASE)" ] || grep -q "^$(CASE)\b" <<< "$$LAB_CASES" || { echo "CASE=$(CASE): expected a name in LAB_CASES" >&2; exit 2; }
	@while read -r name keys; do \
		[ -z "$(CASE)" ] || [ "$(CASE)" = "$$name" ] || continue; \
		$(BIN)/flashcp sweep experiment=lab out=experiments/results/lab/$$name $$keys $(ARGS) < /dev/null; done <<< "$$LAB_CASES"
	$(BIN)/flashcp report experiments/results/lab page=experiments/LAB_RESULTS.md

test: $(STAMP) ## run the tests
	$(BIN)/python -m pytest -n 2 $(ARGS)

test-integrations: $(BESIDE)/.installed ## run the tests beside Transformers, Trainer, TRL and torchtitan (NEWEST=1: their newest versions; QUICK=1: the examples, and every family of models once)
	OMP_NUM_THREADS=1 $(BESIDE)/bin/python -m pytest $(if $(QUICK),$(SOME_INTEGRATIONS),tests/integrations) $(ARGS)

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy -p flashcp

soak: $(STAMP) ## 2,000 steps of random packs, masks and operators on four processes: is all right, does anything grow?
	OMP_NUM_THREADS=1 $(BIN)/python -m torch.distributed.run --standalone --nproc-per-node=4 \
		-m tests.soak 2000 experiments/results/soak

kills: $(STAMP) ## kill -9 of a rank, of flashcp and of torchrun, 20 times each: who stays, is the resumed run the same?
	$(BIN)/python -m tests.soak.kills 20 experiments/results/kills

plans: $(STAMP) ## 200,000 random packs through every strategy: is any plan, route or bound wrong? (40 min on two cores)
	$(BIN)/python -m tests.soak.plans 200000 experiments/results/plans
	$(BIN)/python -m tests.soak.timed 2000 experiments/results/plans/timed

docs: $(STAMP) ## build site/: guides, results and the API; a link that leads nowhere fails
	$(BIN)/sphinx-build -q -W --keep-going -c docs . site $(ARGS)

paper: $(STAMP) ## the paper's figures from the simulator: rows, pictures, experiments/PAPER_RESULTS.md (some 15 min)
	for figure in paper_fig3 paper_fig5 paper_fig6 paper_fig7 paper_table2 demo_predicted speedup_parts \
		beyond_paper whole_batch whole_batch_1024 whole_batch_steps mixes; do \
		$(BIN)/flashcp sweep experiment=$$figure out=experiments/results/paper/$$figure workers=2 $(ARGS); done
	$(BIN)/flashcp sweep experiment=demo_hybrid out=experiments/results/paper/demo_hybrid $(ARGS)
	$(BIN)/flashcp report experiments/results/paper page=experiments/PAPER_RESULTS.md

kernels: $(STAMP) ## compile every shipped Triton kernel for sm_80, sm_90, sm_100 and gfx942; print what they take
	$(BIN)/python -m flashcp.experiments.bench.tune_attention --table $(ARGS)

emulate: $(STAMP) ## the CUDA exchange on emulated GPUs: a thousand random schedules against the reference (2 min)
	$(BIN)/python -m tests.emulation.schedules $(ARGS)

hostile: $(STAMP) ## every hostile argument and command line: 33,000 calls (10 min on two cores)
	$(BIN)/python -m tests.hostile.battery "" experiments/results/hostile

fuzz: $(STAMP) ## spoil the input of every parser, SECONDS=60 each, or of those of a group or whose names hold ONLY; exit code 1 for a failure
	$(BIN)/python -m tests.fuzz $(SECONDS) "$(ONLY)" "$(OUT)"

# torch imports triton only when something asks for it: another one, first on the path, needs no other torch.
kernels-versions: $(STAMP) ## the same with triton 3.6.0 and the newest release, each in a folder of its own
	@status=0; for version in 3.6.0 newest; do \
		folder=$(CURDIR)/.venv/triton-$$version; wanted=triton==$$version; \
		[ $$version != newest ] || { rm -rf $$folder; wanted=triton; }; \
		[ -d $$folder ] || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
			--target $$folder $$wanted; \
		PYTHONPATH=$$folder $(BIN)/python -m flashcp.experiments.bench.tune_attention --table $(ARGS) || status=1; \
	done; exit $$status

gpu-wheels: $(STAMP) ## fill gpu-wheels/ with wheels to carry to a GPU machine (Linux x86-64, Python 3.12): docs/gpu.md
	mkdir -p $(WHEELS) && rm -f $(WHEELS)/*.whl
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
		--python-version 3.12 --implementation cp -c constraints.txt --dest $(WHEELS) \
		$(foreach minor,$(GLIBC),--platform manylinux_2_$(minor)_x86_64) --platform manylinux2014_x86_64 \
		$(CARRIED) $(WITH)
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir $(WHEELS) $(BUILT)
	@cd $(WHEELS) && du --apparent-size -ch *.whl

pins: $(STAMP) ## print what .venv holds, in the form of constraints.txt
	@$(BIN)/python -m pip freeze --all --exclude-editable | grep -v '^pip==' | sed 's/+cpu$$//' | sort -f

clean: ## remove .venv, build folders and caches
	rm -rf .venv .venv-integrations* build site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@[ -n "$(PYTHON)" ] || { echo "flashcp needs Python 3.11 or newer, none found: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo \
		"flashcp needs Python 3.11 or newer, not PYTHON=$(PYTHON)" >&2; exit 2; }
	[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(BESIDE)/.installed: $(STAMP) tests/integrations/requirements.txt
	[ -x $(BESIDE)/bin/python ] || $(BIN)/python -m venv $(BESIDE)
	$(BESIDE)/bin/python -m pip install --quiet --disable-pip-version-check $(if $(NEWEST),--upgrade) \
		-r <(sed '$(if $(NEWEST),s/==.*//)' tests/integrations/requirements.txt)
	$(BESIDE)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@
