# Where the daemons of `drover@USER.target` keep the state of this user, for the commands that this user types.
if [ -z "${DROVER_STATE_DIR:-}" ] && [ -n "${USER:-}" ] && [ -O "/var/lib/drover/$USER" ]; then
  export DROVER_STATE_DIR="/var/lib/drover/$USER"
fi
