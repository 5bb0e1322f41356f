# Sourced by every script here: how a laboratory is named, and how its processes are known again.
# shellcheck shell=bash

set -euo pipefail
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

LAB=${LAB:-main}                    # Which laboratory.
DIR=/var/tmp/drover-slurm-$LAB      # Everything of it that is a file.
USER_NAME=labuser USER_ID=20077     # Whom it knows; the machine itself does not.

fail() {
  echo "lab: $*" >&2
  exit 1
}

[[ $LAB =~ ^[a-z0-9][a-z0-9-]{0,39}$ ]] || fail "LAB=$LAB: a name is 1 to 40 of a-z, 0-9 and -"

netns() { echo "drover-slurm-$LAB-$1"; }

# True when PID STARTTIME in this file is a living process: a pid alone may have been given to somebody else.
alive() {
  local pid start stat
  read -r pid start 2>/dev/null <"$1" || return 1
  { read -r stat <"/proc/$pid/stat"; } 2>/dev/null || return 1
  # The program's name stands in parentheses and may hold anything.
  read -r -a stat <<<"${stat##*) }"
  [[ ${stat[0]} != [ZX] && ${stat[19]} = "$start" ]]
}

# Notes a process of ours in a file.
record() {
  local stat
  { read -r stat <"/proc/$1/stat"; } 2>/dev/null || return 0
  read -r -a stat <<<"${stat##*) }"
  echo "$1 ${stat[19]}" >"$2"
}

# The pid, as seen from the machine, of the first process of a host.
pid_of() {
  local pid
  alive "$DIR/run/$1.pid" || fail "the host $1 does not run (see deploy/lab/up)"
  read -r pid _ <"$DIR/run/$1.pid"
  echo "$pid"
}

# Polls a command until it succeeds or so many seconds have passed.
until_true() {
  local limit=$((SECONDS + $1))
  shift
  until "$@"; do
    ((SECONDS < limit)) || return 1
    sleep 0.05
  done
}

# Runs a command as root on a host.
enter() {
  local pid
  pid=$(pid_of "$1")
  shift
  nsenter --target "$pid" --mount --uts --ipc --net --pid -- "$@"
}

# True when a service of a host runs: its pid is the one inside the host.
serves() {
  local pid inner comm proc=/proc
  alive "$DIR/run/$1.pid" || return 1
  read -r pid _ <"$DIR/run/$1.pid"
  { read -r inner <"$DIR/run/$1.$2"; } 2>/dev/null || return 1
  [[ $1 != switch ]] || proc=$DIR/proc
  { read -r comm <"/proc/$pid/root$proc/$inner/comm"; } 2>/dev/null || return 1
  [[ $comm = "$2" ]]
}

not_serves() { ! serves "$@"; }

# What runs on a host.
services() {
  case $1 in
    switch) echo munged ${SACCT:+mariadbd} ;;
    ctl) echo ${SACCT:+slurmdbd} slurmctld ;;
    login) echo sshd ;;
    *) echo slurmd ;;
  esac
}

# Tells the first process of a host to start or kill something.
tell() {
  local host=$1
  shift
  pid_of "$host" >/dev/null
  until_true 30 [ -p "$DIR/run/$host.orders" ] || fail "$host takes no orders, see $DIR/log/$host"
  echo "$*" >"$DIR/run/$host.orders"
}
