"""`python -m halfstep.service.cli` is `halfstep`."""

from halfstep.service.cli.app import main

main()
