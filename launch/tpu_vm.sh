#!/usr/bin/env bash
# One TPU machine: create, setup, run, logs, stop, delete. `launch/tpu_vm.sh --help`; docs/launching/tpu_vm.md.
exec bash "$(dirname "$0")/tpu.sh" vm "$@"
