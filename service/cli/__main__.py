"""`python -m service.cli` is `halfstep`."""

from service.cli.app import main

main()
