#!/bin/sh
# node ARGUMENTS...: run a node of a Ray cluster (`ray start --block ARGUMENTS`) until it ends. On a busy machine a start
# may fail: for SHARDLOSS_JOIN_S seconds it is repeated, instead of ending the container.
set -u
deadline=$(($(date +%s) + ${SHARDLOSS_JOIN_S:-600}))
trap 'kill -TERM "$running" 2>/dev/null; wait "$running"; exit' TERM INT
while :; do
    ray start --block --disable-usage-stats "$@" &
    running=$!
    wait "$running"
    status=$?
    [ "$(date +%s)" -lt "$deadline" ] || exit "$status"
    echo "node: ray start ended with status $status and is repeated" >&2
    sleep 2 &
    running=$!
    wait "$running"
done
