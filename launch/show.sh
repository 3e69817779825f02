# Sourced by the launch scripts: `fail`, and `run`, which with dry_run=yes prints a command as one would type it.
# shellcheck shell=bash

fail() {
  printf 'launch: %s\n' "$1" >&2
  exit 2
}

# One word of a command line: bare where that is safe, --key='value' where a value needs quotes, else 'quoted'.
quoted() {
  local safe='^[A-Za-z0-9_@%+=:,./-]+$' key=''
  if [[ $1 =~ $safe ]]; then
    printf '%s' "$1"
    return
  fi
  local rest=$1
  if [[ $1 =~ ^(--[A-Za-z0-9_.]+=)(.*)$ ]]; then key=${BASH_REMATCH[1]} rest=${1#"${BASH_REMATCH[1]}"}; fi
  printf "%s'%s'" "$key" "${rest//\'/\'\\\'\'}"
}

words() {
  local word space=''
  for word in "$@"; do
    printf '%s' "$space"
    quoted "$word"
    space=' '
  done
}

run() {
  if [[ ${dry_run:-no} == yes ]]; then
    words "$@"
    printf '\n'
  else
    "$@"
  fi
}
