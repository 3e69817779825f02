#!/usr/bin/env bash
# Several TPU machines as one slice: create, setup, run, logs, stop, delete. `launch/pod_slice.sh --help`; docs/launching/pod_slice.md.
exec bash "$(dirname "$0")/tpu.sh" pod "$@"
