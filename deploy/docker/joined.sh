#!/bin/sh
# joined HEAD COMMAND...: be a node of HEAD's Ray cluster, one that takes no worker, and run COMMAND on it.
# A driver must stand on a node of its cluster; `ray start` leaves that node running beside the command, and both end
# with the container.
set -eu
head=$1
shift
ray start --address="$head" --num-cpus=0 --num-gpus=0 --object-store-memory=100000000 --disable-usage-stats >&2
exec "$@"
