"""`python -m fp8kv`: the command line."""

from fp8kv.cli import main

main()
