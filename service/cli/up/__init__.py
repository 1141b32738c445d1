"""`halfstep up`: the parts of one installation on one machine, started, watched and stopped together."""
