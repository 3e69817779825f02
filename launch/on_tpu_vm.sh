#!/usr/bin/env bash
# What tpu.sh has every machine of a slice do, in the home directory there.
set -euo pipefail
cd "$(dirname "$0")/.."

case ${1:-} in
  install) # [BUCKET]: the machines have Python 3.10; uv brings a newer one
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --allow-existing --python 3.12 .venv
    python3 -m uv pip install --quiet --python .venv --editable '.[tpu]'
    if [[ -n ${2:-} ]]; then
      if ! command -v gcsfuse > /dev/null; then
        source=https://packages.cloud.google.com/apt
        curl -fsSL "$source/doc/apt-key.gpg" | sudo tee /usr/share/keyrings/gcsfuse.asc > /dev/null
        echo "deb [signed-by=/usr/share/keyrings/gcsfuse.asc] $source gcsfuse-$(lsb_release -cs) main" |
          sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
        sudo apt-get -q update
        sudo apt-get -qy install gcsfuse
      fi
      mkdir -p ~/bucket
      mountpoint -q ~/bucket || gcsfuse --implicit-dirs "$2" ~/bucket
    fi
    ;;
  start) # ARGUMENTS of launch.run; the connection may end, the run goes on
    if [[ -s run.pid ]] && kill -0 "$(< run.pid)" 2> /dev/null; then
      echo 'launch: a run is going on here; stop it first' >&2
      exit 1
    fi
    nohup .venv/bin/python -m launch.run "${@:2}" > run.log 2>&1 < /dev/null &
    echo $! > run.pid
    ;;
  logs) tail -n +1 --pid="$(< run.pid)" -F run.log ;;
  stop) kill -TERM "$(< run.pid)" ;;
  *)
    echo 'usage: on_tpu_vm.sh install [BUCKET] | start ARGUMENTS | logs | stop' >&2
    exit 2
    ;;
esac
