"""`python -m fp8kv`: the command line."""

from fp8kv._cli import main

main()
