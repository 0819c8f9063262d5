#!/bin/sh
# init: write the tokens of clients (/tokens) and of the Ray cluster (/ray-token) if they do not exist.
set -eu
umask 077
shardloss-server tokens init --dir /tokens
if [ ! -s /ray-token/token ]; then
    python -c 'import secrets; print(secrets.token_hex(32), end="")' > /ray-token/token.part
    mv /ray-token/token.part /ray-token/token
fi
