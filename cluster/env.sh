# shellcheck shell=bash
# What a shell of a node needs before it starts Ray. The token lies in ~/.ray/auth_token on every node.
PATH="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin:$PATH"
export PATH
export RAY_AUTH_MODE=token
ulimit -S -n "$(ulimit -H -n)"  # Ray opens many files
