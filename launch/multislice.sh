#!/usr/bin/env bash
# Several TPU slices as one run: create, setup, run, logs, stop, delete. `launch/multislice.sh --help`; docs/launching/multislice.md.
exec bash "$(dirname "$0")/tpu.sh" multislice "$@"
