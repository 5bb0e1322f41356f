#!/bin/sh
# Stands in for drover-worker: locks its node, claims its generation, keeps a ledger of its starts and ends, and waits.
# A file "behaviour" in the state directory is read first and can change any of that.
nn=$(printf '%02d' "$DROVER_NODE_ID")
outbox="$DROVER_MAILBOX/$DROVER_SWARM_ID/$nn/outbox"
ledger="$DROVER_NODE_DIR/ledger"
claim=yes
finish() {
    echo "term $DROVER_GENERATION" >>"$ledger"
    exit 0
}
trap finish TERM

exec 9>"$DROVER_NODE_DIR/worker.lock"
flock -n 9 || exit 75
if [ -f "$DROVER_STATE_DIR/behaviour" ]; then
    . "$DROVER_STATE_DIR/behaviour"
fi
if [ "$claim" = yes ]; then
    read -r stat </proc/self/stat
    # shellcheck disable=SC2086
    set -- $stat
    mkdir -p "$outbox"
    mkdir "$outbox/$DROVER_GENERATION" || exit 1
    printf '{"host":"%s","pid":%s,"start_time":%s}' "$(uname -n)" "$$" "${22}" >"$outbox/$DROVER_GENERATION/owner.json"
fi
env >"$DROVER_NODE_DIR/environment"
echo "start $DROVER_GENERATION $$" >>"$ledger"
while :; do
    sleep 600 9>&- &
    wait $!
done
