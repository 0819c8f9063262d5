"""The entry point of `python -m shardloss.cli`."""

from shardloss.cli import main

main()
