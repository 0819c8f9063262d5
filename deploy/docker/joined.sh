#!/bin/sh
# joined HEAD COMMAND...: join HEAD's Ray cluster as a node that runs no worker, and run COMMAND on it.
# A driver must run on a node of its cluster. `ray start` leaves the node running next to the command, and both end with
# the container. For SHARDLOSS_JOIN_S seconds a join that fails is repeated.
set -eu
head=$1
shift
deadline=$(($(date +%s) + ${SHARDLOSS_JOIN_S:-600}))
until ray start --address="$head" --num-cpus=0 --num-gpus=0 --object-store-memory=100000000 --disable-usage-stats >&2; do
    [ "$(date +%s)" -lt "$deadline" ] || exit 1
    echo "joined: the join of $head is repeated" >&2
    sleep 2
done
exec "$@"
